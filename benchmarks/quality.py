"""What quantization costs: perplexity on a fixed text, and agreement with float32.

    python -m benchmarks.quality

SmolLM2-135M. The text is the data set descriptions that come with scikit-learn, which the lock
pins: plain English, several thousand tokens. Perplexity is exp of the mean negative log-likelihood
of each next token, in windows of 512 tokens that do not overlap. "Same choice" is the share of
positions where the most likely token is float32's; "same words" is how many tokens of a greedy
completion pass until it leaves float32's, the median of 32 completions of 64.

Every OpenVINO row is computed with the settings it is served with, dynamic quantization included.
"""

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openvino
import sklearn.datasets  # type: ignore[import-untyped]  # scikit-learn has no types
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from benchmarks.load import prompts
from benchmarks.record import write
from deploy.archive.build import model_config
from deploy.archive.export import EXPORTED, export
from deploy.common import cli
from deploy.weights.fetch import get_weights
from handler.config import EngineConfig
from handler.engine import Engine, Progress, Sampling, create_engine
from handler.engine.folder import ModelFolder
from handler.engine.openvino_engine import properties

APP = "smollm2-135m"
WINDOW = 512
COMPLETIONS = 32
NEW_TOKENS = 64

Logits = Callable[[np.ndarray], np.ndarray]
"""Token ids [T] -> logits [T, vocabulary] in float32."""

ROWS = {
    "float32": {"name": "transformers", "transformers": {"dtype": "float32"}},
    "bfloat16": {"name": "transformers", "transformers": {"dtype": "bfloat16"}},
    "fp16": {"name": "openvino", "openvino": {"precision": "fp16", "dynamic_quantization": 0}},
    "int8": {"name": "openvino", "openvino": {"precision": "int8"}},
    "int8, dynamic quantization off": {
        "name": "openvino",
        "openvino": {"precision": "int8", "dynamic_quantization": 0},
    },
    "int4, groups of 64": {"name": "openvino", "openvino": {"precision": "int4", "group_size": 64}},
    "int4, groups of 192": {
        "name": "openvino",
        "openvino": {"precision": "int4", "group_size": 192},
    },
}


def text() -> str:
    """The fixed text."""
    folder = Path(sklearn.datasets.__file__).parent / "descr"
    return "\n".join(path.read_text() for path in sorted(folder.glob("*.rst")))


def windows(folder: ModelFolder) -> list[np.ndarray]:
    """The text's token ids, in pieces of WINDOW."""
    ids = np.array(folder.encode(text()), dtype=np.int64)
    return [ids[i : i + WINDOW] for i in range(0, len(ids) - WINDOW + 1, WINDOW)]


def torch_logits(weights: Path, config: EngineConfig) -> Logits:
    """The model as transformers loads it."""
    dtype = getattr(torch, config.transformers.dtype)
    model = AutoModelForCausalLM.from_pretrained(weights, dtype=dtype).eval()

    @torch.inference_mode()
    def logits(ids: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(ids)[None]).logits[0].float().numpy()

    return logits


def openvino_logits(weights: Path, config: EngineConfig) -> Logits:
    """The exported model with the properties the engine gives it."""
    file = export(weights, config) / EXPORTED
    compiled = openvino.Core().compile_model(file, "CPU", properties(config))
    request = compiled.create_infer_request()

    def logits(ids: np.ndarray) -> np.ndarray:
        request.reset_state()
        request.infer(
            {
                "input_ids": ids[None],
                "attention_mask": np.ones((1, len(ids)), dtype=np.int64),
                "position_ids": np.arange(len(ids), dtype=np.int64)[None],
                "beam_idx": np.zeros(1, dtype=np.int32),
            }
        )
        return request.get_tensor("logits").data[0].copy()

    return logits


def greedy(engine: Engine, tokenizer: ModelFolder) -> list[list[int]]:
    """Complete COMPLETIONS prompts, one at a time, and return the token ids."""
    next_prompt = prompts(seed=1)
    completions = []
    for _ in range(COMPLETIONS):
        sampling = Sampling(max_new_tokens=NEW_TOKENS, ignore_eos=True)
        engine.submit(0, next_prompt(), sampling, stream=False)
        done: list[Progress] = []
        while not (done and done[-1].finish_reason):
            done += engine.advance(1)
        completions.append(tokenizer.encode("".join(p.text for p in done)))
    return completions


def measure(logits: Logits, pieces: list[np.ndarray]) -> tuple[float, np.ndarray]:
    """Compute the perplexity, and the most likely next token at every position."""
    losses, choices = [], []
    for ids in pieces:
        scores = torch.from_numpy(logits(ids))[:-1]
        losses.append(
            torch.nn.functional.cross_entropy(scores, torch.from_numpy(ids[1:]), reduction="none")
        )
        choices.append(scores.argmax(-1).numpy())
    return float(torch.cat(losses).mean().exp()), np.concatenate(choices)


def shared(a: list[int], b: list[int]) -> int:
    """Count the tokens that two completions begin with in common."""
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))


app = cli.app(__doc__)


@app.command()
def main() -> None:
    """Measure and write results/quality.json."""
    weights = get_weights(APP)
    folder = ModelFolder(weights)
    pieces = windows(folder)
    measured: dict[str, dict[str, float]] = {}
    reference: tuple[np.ndarray, list[list[int]]] | None = None
    for name, settings in tqdm(ROWS.items(), unit="model"):
        _, config = model_config(APP, weights, settings)
        on_openvino = config.name == "openvino"
        logits = (openvino_logits if on_openvino else torch_logits)(weights, config)
        perplexity, choices = measure(logits, pieces)
        engine = create_engine(export(weights, config) if on_openvino else weights, config)
        completions = greedy(engine, folder)
        reference = reference or (choices, completions)
        lengths = [shared(a, b) for a, b in zip(completions, reference[1], strict=True)]
        measured[name] = {
            "perplexity": perplexity,
            "same_choice": float((choices == reference[0]).mean()),
            "same_words": float(np.median(lengths)),
        }
        del logits, engine
    about = {
        "text": f"scikit-learn's data set descriptions, {len(pieces) * WINDOW} tokens",
        "text_sha256": hashlib.sha256(text().encode()).hexdigest(),
        "rows": measured,
    }
    packages = ["torch", "transformers", "openvino", "openvino-genai", "nncf", "scikit-learn"]
    print(write("quality", about, packages).name)


if __name__ == "__main__":
    sys.exit(cli.run(app, "benchmarks.quality"))
