"""From a folder of weights to a model in memory: precision, devices, offload."""

import logging
from collections import Counter
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from handler.config import EngineConfig

logger = logging.getLogger(__name__)


def load_model(weights: Path, config: EngineConfig) -> PreTrainedModel:
    """Load a causal language model, ready for inference.

    With `device_map: auto` accelerate fills GPUs first, then RAM, then `offload_folder`, within
    `max_memory` (for example `{0: 10GiB, cpu: 4GiB}`). Layers on disk are read again at every
    step: it runs, at the speed of the disk.

    Source: accelerate's "big model inference", through transformers' `device_map`.
    """
    options: dict = {"dtype": getattr(torch, config.dtype), "local_files_only": True}
    if config.device_map:
        options["device_map"] = config.device_map
    if config.max_memory:
        options["max_memory"] = config.max_memory
    if config.offload_folder:
        Path(config.offload_folder).mkdir(parents=True, exist_ok=True)
        options["offload_folder"] = config.offload_folder
    return AutoModelForCausalLM.from_pretrained(weights, **options).eval()


def context_length(model_config) -> int:
    """Positions the architecture was made for (`n_positions` in GPT-2's config).

    Raises:
        ValueError: the configuration names none, so the app's YAML has to.
    """
    text_config = model_config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length"):
        if length := getattr(text_config, name, None):
            return int(length)
    raise ValueError("the model's config.json names no context length: set app.engine.max_context")


def end_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, extra: list[str]
) -> set[int]:
    """Token ids that end a completion: the model's own, the tokenizer's, and the app's.

    `extra` are texts that must be one token of this vocabulary, such as dolly's "### End".

    Raises:
        ValueError: a text of `extra` is not a single token.
    """
    ends: set[int] = set()
    for value in (model.generation_config.eos_token_id, tokenizer.eos_token_id):
        ends.update(value if isinstance(value, list) else [value] if value is not None else [])
    for text in extra:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise ValueError(
                f"app.engine.stop_tokens: {text!r} is {len(ids)} tokens in this vocabulary, not "
                "one; use app.parameters.stop for strings"
            )
        ends.add(ids[0])
    return ends


def device_summary(model: PreTrainedModel) -> str:
    """Where the weights are: "cpu", or how many modules accelerate put where."""
    device_map = getattr(model, "hf_device_map", None)
    if not device_map or len(set(device_map.values())) == 1:
        return str(model.device)
    counts = Counter(str(device) for device in device_map.values())
    return " + ".join(f"{device} ({count} modules)" for device, count in counts.items())
