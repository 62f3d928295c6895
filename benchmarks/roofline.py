"""How fast the machine could run SmolLM2-135M, and how fast the engine does: the roofline.

    python -m benchmarks.roofline      # two minutes; writes results/roofline.json

A step of the engine reads every weight once, and computes two operations for each weight and each
token. Throughput therefore has two ceilings: memory bandwidth times operations per byte, and what
the cores compute. The lower one is the roof. Chapter 07 calls the same functions and draws the
figure.

Source of the idea: Williams, Waterman, Patterson, "Roofline", CACM 52 (4), 2009. Activations,
norms and softmax are not counted; they are small here.
"""

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from openvino import opset13
from safetensors import safe_open
from tqdm import tqdm
from transformers import AutoConfig

from benchmarks.large import bandwidth, seconds_of
from benchmarks.record import summary, write
from deploy.archive.build import model_config
from deploy.archive.export import EXPORTED, export
from deploy.common import cli
from deploy.vertex.capacity import kv_bytes_per_token
from deploy.weights.fetch import get_weights
from deploy.weights.folder import weight_files
from handler.config import EngineConfig
from handler.engine import Engine, Sampling, create_engine
from handler.engine.openvino_engine import properties

APP = "smollm2-135m"
ENGINE = {
    "name": "openvino",
    "openvino": {"prefix_caching": False, "max_num_batched_tokens": 128},
}
"""Engine settings. The prefix cache is off, because it skips what was prefilled before. The pieces
of a prompt are those with which results/roofline.json was measured."""

ROUNDS = 5
SEQUENCES = (1, 8, 32)
NEW_TOKENS = 64
PROMPT = 512
CONTEXTS, BESIDE = (100, 700), 16
"""Prompts of two lengths, and how many at once, for what a longer context costs."""

SIDE = 2048
"""Side of the square matrix that is multiplied: 4 MB in 8 bits, so that memory is no limit."""


def machine(config: EngineConfig) -> dict[str, float]:
    """Measure the ceilings: bytes a second from RAM; operations a second of a large multiplication.

    The matrix multiplications run in the engine's own library with its settings, once with the
    weights in 8 bits, as they are served, and once in float32.
    """
    return {
        "bytes_per_second": bandwidth(),
        "int8_flops": _multiplication(config, small=True),
        "float32_flops": _multiplication(config, small=False),
    }


def _multiplication(config: EngineConfig, *, small: bool) -> float:
    """Measure operations per second: the best of 20 multiplications [512, SIDE] x [SIDE, SIDE]."""
    draw = np.random.default_rng(0)
    inputs = opset13.parameter([-1, SIDE], np.float32)
    values = draw.integers(-127, 127, (SIDE, SIDE)).astype(np.int8 if small else np.float32)
    weights = opset13.constant(values)
    if small:
        scale = opset13.constant(np.full((SIDE, 1), 0.01, np.float32))
        weights = opset13.multiply(opset13.convert(weights, np.float32), scale)
    product = opset13.matmul(inputs, weights, False, True)
    model = openvino.Model([product], [inputs])
    request = openvino.Core().compile_model(model, "CPU", properties(config)).create_infer_request()
    rows = draw.standard_normal((512, SIDE), dtype=np.float32)
    seconds = []
    for _ in range(20):
        began = time.perf_counter()
        request.infer([rows])
        seconds.append(time.perf_counter() - began)
    return 2 * rows.size * SIDE / min(seconds)


def speeds(engine: Engine) -> dict[str, float]:
    """Measure tokens per second of decoding SEQUENCES at once, and of a prefill."""
    found = {f"decode {n}": _decode_rate(engine, n) for n in SEQUENCES}
    return found | {f"prefill {PROMPT}": prefill_rate(engine, PROMPT)}


def _decode_rate(engine: Engine, sequences: int) -> float:
    """Measure like `benchmarks.large`, but subtract the fastest of three prefills.

    A slow prefill would make decoding look fast.
    """
    first = min(seconds_of(engine, sequences, 1) for _ in range(3))
    return sequences * NEW_TOKENS / (seconds_of(engine, sequences, 1 + NEW_TOKENS) - first)


def prefill_rate(engine: Engine, tokens: int) -> float:
    """Measure tokens per second of the prefill of a prompt of about `tokens` tokens."""
    sampling = Sampling(max_new_tokens=1, ignore_eos=True)
    began = time.perf_counter()
    read = engine.submit("prefill", "river " * (tokens - 1), sampling, stream=False)
    while not any(progress.finish_reason for progress in engine.advance(1)):
        pass
    return read / (time.perf_counter() - began)


def context_seconds(engine: Engine) -> float:
    """Measure the seconds that one more token of context adds to each generated token.

    It is the slope between prompts of two lengths, with BESIDE sequences at once. Reading the keys
    and values from memory is a small part of it.
    """
    short, long = (_step_seconds(engine, tokens) for tokens in CONTEXTS)
    return (long - short) / BESIDE / (CONTEXTS[1] - CONTEXTS[0])


def _step_seconds(engine: Engine, tokens: int) -> float:
    """Measure a step that decodes BESIDE sequences, after all prefills."""
    sampling = Sampling(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    for key in range(BESIDE):  # each begins with another word: nothing is shared
        engine.submit(key, f"{key} " + "river " * (tokens - 2), sampling, stream=True)
    generated, left, began, before = {}, BESIDE, 0.0, 0
    while left:
        for progress in engine.advance(0):
            generated[progress.key] = progress.completion_tokens
            left -= progress.finish_reason is not None
        if not began and len(generated) == BESIDE:
            began, before = time.perf_counter(), sum(generated.values())
    return (time.perf_counter() - began) / (sum(generated.values()) - before) * BESIDE


def work(weights: Path, exported: Path, config: EngineConfig) -> dict[str, dict[str, float]]:
    """Count operations and bytes from RAM per token of each of `speeds`.

    A step reads the exported weights once, and the keys and values of all earlier tokens. A prefill
    runs in pieces of `max_num_batched_tokens`, and the last layer, which is as large as the
    vocabulary, computes only for the prompt's last token.
    """
    layers, head = matrices(weights)
    shape = AutoConfig.from_pretrained(weights)
    size = (exported / EXPORTED).with_suffix(".bin").stat().st_size
    kept = kv_bytes_per_token(shape)  # of one token
    attention = 4 * shape.num_hidden_layers * shape.hidden_size  # operations per token before
    found = {}
    for n in SEQUENCES:
        before = 45 + NEW_TOKENS / 2  # prompts of benchmarks.load, and half of the completion
        flop = 2 * (layers + head) + attention * before
        found[f"decode {n}"] = {"flop": flop, "bytes": size / n + kept * before}
    piece, before = min(PROMPT, config.openvino.max_num_batched_tokens), PROMPT / 2
    found[f"prefill {PROMPT}"] = {
        "flop": 2 * layers + 2 * head / PROMPT + attention * before,
        "bytes": (size + kept * before) / piece,
    }
    return found


def matrices(weights: Path) -> tuple[int, int]:
    """Count the numbers in the layers' matrices, and in the embeddings (also the last layer)."""
    layers = head = 0
    for path in weight_files(weights):
        if path.suffix == ".safetensors":
            with safe_open(path, "np") as file:
                shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
            for name, shape in shapes.items():
                if len(shape) == 2 and "embed" in name:
                    head += math.prod(shape)
                elif len(shape) == 2:
                    layers += math.prod(shape)
    return layers, head


def roof(ceilings: dict[str, float], flop_per_byte: float, peak: str = "int8_flops") -> float:
    """Compute the operations per second that the machine allows at `flop_per_byte`."""
    return min(ceilings["bytes_per_second"] * flop_per_byte, ceilings[peak])


def summed_up(
    ceilings: Sequence[dict[str, float]],
    found: Sequence[dict[str, float]],
    done: dict[str, dict[str, float]],
) -> dict[str, Any]:
    """Sum up rounds for `plots.roofline`.

    The best round of the machine and of the engine counts, because other programs only slow them.

    Args:
        ceilings: `machine`, of some rounds.
        found: `speeds`, of some rounds.
        done: `work`.
    """
    best = {name: max(values[name] for values in ceilings) for name in ceilings[0]}
    points = {}
    for name, per_token in done.items():
        rates = summary([values[name] for values in found])
        reached = rates["max"] * per_token["flop"]
        intensity = per_token["flop"] / per_token["bytes"]
        allowed = roof(best, intensity)
        points[name] = {
            "tokens_per_second": rates,
            "flop_per_byte": intensity,
            "flops": reached,
            "roof": allowed,
            "share_of_roof": reached / allowed,
        }
    return {"machine": best, "points": points}


app = cli.app(__doc__)


@app.command()
def main() -> None:
    """Measure, and write results/roofline.json."""
    weights = get_weights(APP)
    _, config = model_config(APP, weights, ENGINE)
    exported = export(weights, config)
    engine = create_engine(exported, config)
    speeds(engine)  # the first run of every shape compiles it
    context_seconds(engine)
    ceilings, found, slopes = [], [], []
    for _ in tqdm(range(ROUNDS), unit="round"):
        ceilings.append(machine(config))
        found.append(speeds(engine))
        slopes.append(context_seconds(engine))
    measured = summed_up(ceilings, found, work(weights, exported, config))
    measured["ceilings"] = {name: summary([c[name] for c in ceilings]) for name in ceilings[0]}
    measured["context_seconds"] = summary(slopes)
    for name, row in measured["points"].items():
        print(
            f"{name}: {row['flop_per_byte']:.3g} flop/byte, {row['share_of_roof']:.2f} of the roof"
        )
    print(f"a token of context costs {1e6 * measured['context_seconds']['median']:.1f} us a token")
    print(write("roofline", measured, ["openvino", "openvino-genai"]).name)


if __name__ == "__main__":
    sys.exit(cli.run(app, "benchmarks.roofline"))
