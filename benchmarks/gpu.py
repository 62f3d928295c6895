"""The engine `transformers` on a GPU: how much of it one gets, and what offload costs there.

    python -m benchmarks.gpu        # one GPU, 6 GB of disk

results/gpu.json has two rounds of `smollm2 gpu` and `dolly gpu`; nobody has run all systems yet.

SmolLM2-135M with its real weights and the dolly-v2-3b shape with random ones, in bfloat16, decode
only, at 1, 8 and 32 sequences: continuous batching as the handler drives it, one request at a time
as the original did, and the same engine on the machine's processor. Then dolly's shape with
`max_memory` spread over GPU, RAM and disk. One token of one sequence needs every weight once, so
the GPU's memory bandwidth, measured in the same rounds, divided by the weights' bytes is the most
that one sequence can get (the roofline).

Not here: vLLM, whose CUDA build is what one would serve with on a GPU.
"""

import argparse
import json
import sys
import time

import torch

from benchmarks.large import decode_rate, seconds_of
from benchmarks.load import prompts
from benchmarks.record import in_rounds, peak_memory_gb, write
from deploy.archive.build import model_config
from deploy.common.cli import command
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

SYSTEMS = {
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
    """Bytes a second that the GPU reads from its memory: the best of ten sums over 4 GB."""
    values = torch.ones(2**30, dtype=torch.float32, device="cuda")
    seconds = []
    for _ in range(11):
        torch.cuda.synchronize()
        began = time.perf_counter()
        values.sum()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return values.nbytes / min(seconds[1:])


def load(question: dict) -> TransformersEngine:
    """The engine as the app's archive would have it, in bfloat16, with the question's settings."""
    weights = get_weights(question["app"], shape_only=question["app"] == LARGE)
    half = {"name": "transformers", "transformers": {"dtype": "bfloat16"}, "max_batch": 32}
    settings = merge(half, question.get("engine", {}))
    _, config = model_config(question["app"], weights, settings)
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


def child(question: dict) -> None:
    """Load one engine, measure it, print the figures as JSON."""
    speed = bandwidth()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()  # what was just read is not the engine's
    weights = get_weights(question["app"], shape_only=question["app"] == LARGE)
    files = [f for f in weight_files(weights) if f.suffix == ".safetensors"]
    began = time.perf_counter()
    engine = load(question)
    figures = {"load_seconds": time.perf_counter() - began, "bandwidth": speed}
    figures["bytes"] = sum(f.stat().st_size for f in files)
    new_tokens = question.get("new_tokens", NEW_TOKENS)
    for sequences in SEQUENCES:  # CUDA loads and chooses its kernels when they are first needed
        decode_rate(engine, sequences, new_tokens)
    for sequences in SEQUENCES:
        figures[f"tokens_per_second {sequences}"] = decode_rate(engine, sequences, new_tokens)
    figures["prompt_tokens_per_second"] = first_tokens(engine)
    if engine.model.device.type == "cuda":
        figures["share_of_roofline"] = figures["tokens_per_second 1"] * figures["bytes"] / speed
    if "engine" not in question:
        for sequences in SEQUENCES:
            steps_per_second = figures[f"tokens_per_second {sequences}"] / sequences
            busy = kernel_seconds(engine, sequences, new_tokens=16) * steps_per_second
            figures[f"share_of_time_in_kernels {sequences}"] = busy
    figures["gpu_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    figures["peak_memory_gb"] = peak_memory_gb()
    print(engine.description, file=sys.stderr)
    print(json.dumps(figures))


def same_text() -> dict[str, str]:
    """What SmolLM2 answers to one greedy prompt, on the GPU and on the processor."""
    texts = {}
    for place in ("auto", "cpu"):
        engine = load(
            {"app": SMALL, "engine": {"transformers": {"device_map": place, "dtype": "float32"}}}
        )
        question = [{"role": "user", "content": "What is the capital of France?"}]
        prompt = engine.chat_prompt(question)
        engine.submit(0, prompt, Sampling(max_new_tokens=24), stream=False)
        text = ""
        while engine.running or not text:
            text += "".join(progress.text for progress in engine.advance(1))
        texts[str(engine.model.device)] = text
    return texts


@command
def main(arguments: list[str] | None) -> None:
    """Measure, and write results/gpu.json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument("--output", default="gpu", help="name of the result file")
    parser.add_argument("--child", type=json.loads, help="used by the program itself")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise UserError("there is no GPU that torch can use here (`make setup TORCH=cuda`?)")
    if options.child:
        child(options.child)
        return
    systems = {name: SYSTEMS[name] for name in options.systems}
    figures = {"systems": in_rounds("benchmarks.gpu", systems, options.rounds)}
    figures["texts"] = same_text()
    print(write(options.output, figures, ["torch", "transformers", "accelerate"]).name)


if __name__ == "__main__":
    sys.exit(main())
