"""Ways to serve one shape of traffic: every system alone on the machine, in alternated rounds.

    python -m benchmarks.serving                          # all, three rounds, 40 minutes
    python -m benchmarks.serving "ours int8" "direct int8" --rounds 1

`benchmarks.compare` compares the fastest systems on all shapes. SmolLM2-135M-Instruct, greedy, 128
new tokens, distinct prompts of 30 to 60 tokens; closed loop at 1, 8 and 32 clients, then streams at
1 and 8. A round starts each system, warms it up, measures and stops it. A system that is not
installed is listed with the reason instead of measurements.
"""

import sys
import time
from collections.abc import Hashable
from typing import Annotated, Any

import click
import typer
from tqdm import tqdm

from benchmarks import peers
from benchmarks.load import NEW_TOKENS, Target, checked, closed_loop, prompts
from benchmarks.record import memory, summary, write
from benchmarks.systems import SYSTEMS, System
from deploy.common import cli
from handler.engine import Engine, Sampling

REQUESTS_EACH = {1: 6, 8: 3, 32: 2}
"""Clients -> requests each of them sends: 8 to 60 seconds a measurement."""

STREAMS = (1, 8)


def engine_loop(engine: Engine, *, clients: int, requests_each: int, seed: int) -> float:
    """Measure tokens per second of the same closed loop without a server."""
    sources = [prompts((seed * 2 + 1) * 1000 + i) for i in range(clients)]
    left = [requests_each] * clients
    client_of: dict[Hashable, int] = {}

    def send(client: int) -> None:
        left[client] -= 1
        key = client, left[client]
        client_of[key] = client
        sampling = Sampling(max_new_tokens=NEW_TOKENS, ignore_eos=True)
        engine.submit(key, sources[client](), sampling, stream=False)

    began, tokens, running = time.perf_counter(), 0, clients
    for client in range(clients):
        send(client)
    while running:
        for progress in engine.advance(1):
            if progress.finish_reason:
                tokens += progress.completion_tokens
                client = client_of[progress.key]
                if left[client]:
                    send(client)
                else:
                    running -= 1
    return tokens / (time.perf_counter() - began)


def measure(system: System, seed: int) -> dict[str, float]:
    """Start a system, measure each quantity once, stop it."""
    began = time.perf_counter()
    with system.start() as (target, pid):
        measured = {"start_seconds": time.perf_counter() - began}
        if not isinstance(target, Target):
            engine_loop(target, clients=8, requests_each=1, seed=seed + 500)
            for clients, each in REQUESTS_EACH.items():
                rate = engine_loop(target, clients=clients, requests_each=each, seed=seed)
                measured[f"tokens_per_second {clients}"] = rate
            return measured
        warm_up = 128 if system.streams else 16
        checked(closed_loop(target, clients=8, requests_each=1, new_tokens=warm_up, warm_up=0))
        for clients, each in REQUESTS_EACH.items():
            if clients <= system.most_clients:
                each = each if system.most_clients > 8 else max(1, each // 3)
                report = closed_loop(
                    target, clients=clients, requests_each=each, seed=seed, warm_up=0
                )
                measured[f"tokens_per_second {clients}"] = checked(report).tokens_per_second
        for clients in STREAMS if system.streams else ():
            report = closed_loop(
                target, clients=clients, requests_each=3, seed=seed + 300, warm_up=0, stream=True
            )
            if (first := checked(report).first_token_p50) is not None:
                measured[f"first_token_seconds {clients}"] = first
            measured[f"streamed_tokens_per_second {clients}"] = report.tokens_per_second
        measured["memory_mb"] = memory(pid) / 1e6
    return measured


app = cli.app(__doc__)


@app.command()
def main(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SYSTEM", click_type=click.Choice(list(SYSTEMS)), help="All by default."
        ),
    ] = None,
    rounds: int = 3,
    output: Annotated[str, typer.Option(help="Name of the result file.")] = "serving",
) -> None:
    """Measure, and write results/serving.json."""
    names = names or list(SYSTEMS)
    missing = {name: SYSTEMS[name].missing() for name in names}
    present = [name for name in names if not missing[name]]
    for name, reason in missing.items():
        if reason:
            print(f"{name}: not measured: {reason}")
    values: dict[str, dict[str, list[float]]] = {name: {} for name in present}
    progress = tqdm(total=rounds * len(present), unit="system")
    for round_index in range(rounds):
        for name in present:
            progress.set_description(name)
            for quantity, value in measure(SYSTEMS[name], seed=round_index).items():
                values[name].setdefault(quantity, []).append(value)
            progress.update()
    progress.close()
    measured: dict[str, dict[str, Any]] = {}
    for name in names:
        measured[name] = {"what": SYSTEMS[name].what}
        if reason := missing[name]:
            measured[name]["not measured"] = reason
        measured[name] |= {quantity: summary(v) for quantity, v in values.get(name, {}).items()}
    versions = ["torch", "transformers", "torchserve", "openvino", "openvino-genai", "nncf"]
    others = {peer: peers.version_of(peer) for peer in peers.LOCKS}
    print(write(output, measured, versions, others).name)


if __name__ == "__main__":
    sys.exit(cli.run(app, "benchmarks.serving"))
