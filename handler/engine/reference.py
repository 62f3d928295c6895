"""The model's own choice of tokens: one forward pass over a whole text, without cache or batch."""

import inspect
from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel


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
