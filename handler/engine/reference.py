"""The model's own choice of tokens: one forward pass over a whole text, without cache or batch.

    python -m handler.engine.reference WEIGHTS < completions.json > gaps.json

As a program it serves engines whose libraries change transformers' classes in their own process.
"""

import inspect
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from handler.config import engine_config
from handler.engine.loading import load_model
from handler.memory import MemoryLimitError


class Scores(NamedTuple):
    """How generated tokens compare with the model's choices, in standard deviations of the logits.

    `gaps` says how far each token is below the model's first choice, and `margins` how far the
    second choice is.
    """

    gaps: list[float]
    margins: list[float]


@torch.inference_mode()
def score(model: PreTrainedModel, prompt: Sequence[int], generated: Sequence[int]) -> Scores:
    """Compare tokens that an engine generated after a prompt with what the model would choose.

    Args:
        model: a causal language model.
        prompt: token ids [T].
        generated: token ids [n], each chosen after all before it.

    Returns:
        n gaps and n margins. They are NaN where the logits are not numbers.
    """
    ids = torch.tensor([[*prompt, *generated[:-1]]], device=model.device)
    n = len(generated)
    # Layers that share keys and values, as in Gemma 3n, get them through the cache.
    shared = bool(getattr(model.config.get_text_config(decoder=True), "num_kv_shared_layers", 0))
    options = {"attention_mask": torch.ones_like(ids), "use_cache": shared, "logits_to_keep": n}
    known = inspect.signature(model.forward).parameters
    out = model(input_ids=ids, **{k: v for k, v in options.items() if k in known})
    logits = out.logits[0, -n:].float()
    best = logits.topk(2).values
    chosen = logits.gather(1, torch.tensor([list(generated)], device=logits.device).T)[:, 0]
    # Some models give minus infinity to ids that are no tokens.
    finite = logits.masked_fill(logits.isinf(), torch.nan)
    mean = finite.nanmean(-1, keepdim=True)
    deviation = (finite - mean).square().nanmean(-1).sqrt()
    if logits.isnan().any():
        deviation = torch.full_like(deviation, torch.nan)
    gaps, margins = (best[:, 0] - chosen) / deviation, (best[:, 0] - best[:, 1]) / deviation
    return Scores(gaps.tolist(), margins.tolist())


_NO_MEMORY = 3
"""Exit status of this program: the model does not fit into memory."""


def gaps_elsewhere(
    weights: Path, completions: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> list[list[float]]:
    """Score completions in another process, in float32 on the CPU.

    Args:
        weights: the model's folder.
        completions: the token ids of prompt and completion of each.

    Returns:
        The gaps of each completion; see `Scores`.

    Raises:
        MemoryLimitError: the model does not fit into memory.
        RuntimeError: the other process failed; the message is the last line of its output.
    """
    run = subprocess.run(
        [sys.executable, "-m", "handler.engine.reference", weights.absolute()],
        input=json.dumps([[list(prompt), list(generated)] for prompt, generated in completions]),
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    if run.returncode:
        last = (run.stderr.strip() or f"exit status {run.returncode}").splitlines()[-1]
        raise (MemoryLimitError if run.returncode == _NO_MEMORY else RuntimeError)(last)
    gaps: list[list[float]] = json.loads(run.stdout.splitlines()[-1])
    return gaps


def main() -> int:
    """Run the command line; see the module's docstring."""
    config = engine_config().transformers
    exact = {"dtype": "float32", "device_map": None, "max_memory": None}
    try:
        model = load_model(Path(sys.argv[1]), config.model_copy(update=exact))
    except MemoryLimitError as error:
        print(error, file=sys.stderr)
        return _NO_MEMORY
    print(json.dumps([score(model, *completion).gaps for completion in json.load(sys.stdin)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
