"""The engine `transformers` on a GPU: how much of the GPU it uses, and what offload costs.

    python -m benchmarks.gpu        # one GPU, 6 GB of disk

results/gpu.json has two rounds of `smollm2 gpu` and `dolly gpu`; the others have not run yet.

SmolLM2-135M with its real weights and the dolly-v2-3b shape with random ones, in bfloat16, decode
only, at 1, 8 and 32 sequences: continuous batching as the handler drives it, one request at a time
as the baseline handler does, and the same engine on the machine's CPU. Then dolly's shape with
`max_memory` spread over GPU, RAM and disk. One token of one sequence needs every weight once, so
the GPU's memory bandwidth, measured in the same rounds, divided by the weights' bytes is the most
that one sequence can get (the roofline).

Not included: vLLM, whose CUDA build is the usual choice on a GPU.
"""

import json
import sys
import time
from typing import Annotated, Any

import click
import torch
import typer

from benchmarks.large import decode_rate, seconds_of
from benchmarks.load import prompts
from benchmarks.record import in_rounds, peak_memory_gb, write
from deploy.archive.build import model_config
from deploy.common import cli
from deploy.common.paths import UserError
from deploy.weights.fetch import get_weights
from deploy.weights.folder import weight_files
from handler.config import merge
from handler.engine import Sampling
from handler.engine.transformers_engine import TransformersEngine

ROUNDS = 3
NEW_TOKENS = 64
SEQUENCES = (1, 8, 32)
SMALL, LARGE = "smollm2-135m", "dolly-v2-3b"
SPREAD = {0: "2GiB", "cpu": "2GiB"}
"""Of the large model's 5.6 GB; the rest stays on disk."""

SYSTEMS: dict[str, dict[str, Any]] = {
    "smollm2 gpu": {"app": SMALL},
    "smollm2 gpu, one at a time": {"app": SMALL, "engine": {"max_batch": 1}},
    "smollm2 cpu": {"app": SMALL, "engine": {"transformers": {"device_map": "cpu"}}},
    "dolly gpu": {"app": LARGE},
    "dolly cpu": {"app": LARGE, "engine": {"transformers": {"device_map": "cpu"}}, "new_tokens": 8},
    "dolly gpu + cpu + disk": {
        "app": LARGE,
        "engine": {"transformers": {"max_memory": SPREAD}},
        "new_tokens": 4,
    },
}


def bandwidth() -> float:
    """Measure the bytes a second that the GPU reads from its memory: best of ten sums over 4 GB."""
    values = torch.ones(2**30, dtype=torch.float32, device="cuda")
    seconds = []
    for _ in range(11):
        torch.cuda.synchronize()
        began = time.perf_counter()
        values.sum()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return values.nbytes / min(seconds[1:])


def load(case: dict) -> TransformersEngine:
    """Load the engine as the app's archive configures it, in bfloat16, with the case's settings."""
    weights = get_weights(case["app"], shape_only=case["app"] == LARGE)
    half = {"name": "transformers", "transformers": {"dtype": "bfloat16"}, "max_batch": 32}
    settings = merge(half, case.get("engine", {}))
    _, config = model_config(case["app"], weights, settings)
    return TransformersEngine(weights, config)


def first_tokens(engine: TransformersEngine) -> float:
    """Prefill: prompt tokens a second of 8 prompts sent together."""
    next_prompt = prompts(8)
    tokens = sum(len(engine.folder.encode(next_prompt())) for _ in range(8))
    return tokens / seconds_of(engine, 8, 1)


def kernel_seconds(engine: TransformersEngine, sequences: int, new_tokens: int) -> float:
    """Seconds in which the GPU computes, summed over the kernels of one decode step.

    From torch's profiler, which slows down what it watches: so only the kernels' own times are
    used, never the run's. (These few steps have shorter contexts than the timed ones.)
    """
    spent = []
    for written in (1, 1 + new_tokens):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
            seconds_of(engine, sequences, written)
        spent.append(sum(event.self_device_time_total for event in trace.key_averages()) / 1e6)
    return (spent[1] - spent[0]) / new_tokens


def measure(case: dict) -> None:
    """Load one engine, measure it, and print the measurements as JSON."""
    speed = bandwidth()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()  # what was just read is not the engine's
    weights = get_weights(case["app"], shape_only=case["app"] == LARGE)
    files = [f for f in weight_files(weights) if f.suffix == ".safetensors"]
    began = time.perf_counter()
    engine = load(case)
    measured = {"load_seconds": time.perf_counter() - began, "bandwidth": speed}
    measured["bytes"] = sum(f.stat().st_size for f in files)
    new_tokens = case.get("new_tokens", NEW_TOKENS)
    for sequences in SEQUENCES:  # CUDA loads and chooses its kernels when they are first needed
        decode_rate(engine, sequences, new_tokens)
    for sequences in SEQUENCES:
        measured[f"tokens_per_second {sequences}"] = decode_rate(engine, sequences, new_tokens)
    measured["prompt_tokens_per_second"] = first_tokens(engine)
    if engine.model.device.type == "cuda":
        measured["share_of_roofline"] = measured["tokens_per_second 1"] * measured["bytes"] / speed
    if "engine" not in case:
        for sequences in SEQUENCES:
            steps_per_second = measured[f"tokens_per_second {sequences}"] / sequences
            busy = kernel_seconds(engine, sequences, new_tokens=16) * steps_per_second
            measured[f"share_of_time_in_kernels {sequences}"] = busy
    measured["gpu_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    measured["peak_memory_gb"] = peak_memory_gb()
    print(engine.description, file=sys.stderr)
    print(json.dumps(measured))


def same_text() -> dict[str, str]:
    """Complete one prompt greedily with SmolLM2, on the GPU and on the CPU."""
    texts = {}
    for place in ("auto", "cpu"):
        engine = load(
            {"app": SMALL, "engine": {"transformers": {"device_map": place, "dtype": "float32"}}}
        )
        messages = [{"role": "user", "content": "What is the capital of France?"}]
        prompt = engine.chat_prompt(messages)
        assert prompt is not None
        engine.submit(0, prompt, Sampling(max_new_tokens=24), stream=False)
        text = ""
        while engine.unfinished:
            text += "".join(progress.text for progress in engine.advance(1))
        texts[str(engine.model.device)] = text
    return texts


app = cli.app(__doc__)


@app.command()
def main(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SYSTEM", click_type=click.Choice(list(SYSTEMS)), help="All by default."
        ),
    ] = None,
    rounds: int = ROUNDS,
    output: Annotated[str, typer.Option(help="Name of the result file.")] = "gpu",
    child: Annotated[str | None, typer.Option(hidden=True, help="A case, as JSON.")] = None,
) -> None:
    """Measure, and write results/gpu.json."""
    if not torch.cuda.is_available():
        raise UserError("there is no GPU that torch can use here (`make setup TORCH=cuda`?)")
    if child:
        measure(json.loads(child))
        return
    systems = {name: SYSTEMS[name] for name in names or SYSTEMS}
    measured = {
        "systems": in_rounds("benchmarks.gpu", systems, rounds),
        "texts": same_text(),
    }
    print(write(output, measured, ["torch", "transformers", "accelerate"]).name)


if __name__ == "__main__":
    sys.exit(cli.run(app, "benchmarks.gpu"))
