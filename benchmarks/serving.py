"""The comparison: every system alone on the machine, through HTTP, in alternated rounds.

    python -m benchmarks.serving                          # all, three rounds, 40 minutes
    python -m benchmarks.serving --systems "ours int8" "direct int8" --rounds 1

SmolLM2-135M-Instruct, greedy, 128 new tokens, distinct prompts of 30 to 60 tokens; closed loop at
1, 8 and 32 clients, then streams at 1 and 8. A round starts each system, warms it up, measures and
stops it. A system that is not installed is listed with the reason instead of figures.
"""

import argparse
import sys
import time

import psutil
from tqdm import tqdm

from benchmarks import peers
from benchmarks.load import NEW_TOKENS, Report, Target, closed_loop, prompts
from benchmarks.record import summary, write
from benchmarks.systems import SYSTEMS, System
from deploy.common.cli import command
from deploy.common.paths import UserError
from handler.engine import Engine, Sampling

REQUESTS_EACH = {1: 6, 8: 3, 32: 2}
"""Clients -> requests each of them sends: 8 to 60 seconds a measurement."""

STREAMS = (1, 8)


def engine_loop(engine: Engine, *, clients: int, requests_each: int, seed: int) -> float:
    """The same closed loop without any server: tokens per second."""
    sources = [prompts((seed * 2 + 1) * 1000 + i) for i in range(clients)]
    left = [requests_each] * clients

    def send(client: int) -> None:
        left[client] -= 1
        sampling = Sampling(max_new_tokens=NEW_TOKENS, ignore_eos=True)
        engine.submit((client, left[client]), sources[client](), sampling, stream=False)

    began, tokens, running = time.perf_counter(), 0, clients
    for client in range(clients):
        send(client)
    while running:
        for progress in engine.advance(1):
            if progress.finish_reason:
                tokens += progress.completion_tokens
                client = progress.key[0]
                if left[client]:
                    send(client)
                else:
                    running -= 1
    return tokens / (time.perf_counter() - began)


def measure(system: System, seed: int) -> dict[str, float]:
    """Start a system, ask it everything once, stop it. Returns one number a quantity."""
    began = time.perf_counter()
    with system.start() as (target, pid):
        figures = {"start_seconds": time.perf_counter() - began}
        if not isinstance(target, Target):
            engine_loop(target, clients=8, requests_each=1, seed=seed + 500)
            for clients, each in REQUESTS_EACH.items():
                rate = engine_loop(target, clients=clients, requests_each=each, seed=seed)
                figures[f"tokens_per_second {clients}"] = rate
            return figures
        warm_up = 128 if system.streams else 16
        _checked(closed_loop(target, clients=8, requests_each=1, new_tokens=warm_up, warm_up=0))
        for clients, each in REQUESTS_EACH.items():
            if clients <= system.most_clients:
                each = each if system.most_clients > 8 else max(1, each // 3)
                report = closed_loop(
                    target, clients=clients, requests_each=each, seed=seed, warm_up=0
                )
                figures[f"tokens_per_second {clients}"] = _checked(report).tokens_per_second
        for clients in STREAMS if system.streams else ():
            report = closed_loop(
                *(target,),
                **{"clients": clients, "requests_each": 3, "seed": seed + 300, "warm_up": 0},
                stream=True,
            )
            figures[f"first_token_seconds {clients}"] = _checked(report).first_token_p50
            figures[f"streamed_tokens_per_second {clients}"] = report.tokens_per_second
        figures["memory_mb"] = memory(pid) / 1e6
    return figures


def memory(pid: int) -> int:
    """Bytes that a process and its descendants hold in RAM, shared pages counted once (PSS)."""
    root = psutil.Process(pid)
    return sum(p.memory_full_info().pss for p in [root, *root.children(recursive=True)])


def _checked(report: Report) -> Report:
    if report.errors:
        raise UserError(f"requests failed: {report.errors}; figures with errors are not kept")
    return report


@command
def main(arguments: list[str] | None) -> None:
    """Measure, and write results/serving.json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument("--output", default="serving", help="name of the result file")
    options = parser.parse_args(arguments)
    missing = {name: SYSTEMS[name].missing() for name in options.systems}
    present = [name for name in options.systems if not missing[name]]
    for name, reason in missing.items():
        if reason:
            print(f"{name}: not measured: {reason}")
    values: dict[str, dict[str, list[float]]] = {name: {} for name in present}
    progress = tqdm(total=options.rounds * len(present), unit="system")
    for number in range(options.rounds):
        for name in present:
            progress.set_description(name)
            for quantity, value in measure(SYSTEMS[name], seed=number).items():
                values[name].setdefault(quantity, []).append(value)
            progress.update()
    progress.close()
    figures = {
        name: {"what": SYSTEMS[name].what}
        | ({"not measured": missing[name]} if missing[name] else {})
        | {quantity: summary(v) for quantity, v in values.get(name, {}).items()}
        for name in options.systems
    }
    versions = ["torch", "transformers", "torchserve", "openvino", "openvino-genai", "nncf"]
    others = {peer: peers.version_of(peer) for peer in peers.REQUIREMENTS}
    print(write(options.output, figures, versions, others).name)


if __name__ == "__main__":
    sys.exit(main())
