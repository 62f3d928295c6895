"""Write checkpoints of a true architecture and size with random weights.

For machines that cannot reach the Hub. Memory, throughput and every code path are those of the real
model. The text is noise, and all output of such a checkpoint is marked "random weights".
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

SHARD_BYTES = 500_000_000
"""The size of a shard. One shard at a time is in memory."""


def write_random_checkpoint(folder: Path, architecture: dict, special_tokens: list[str]) -> None:
    """Write config, tokenizer and bfloat16 shards.

    Args:
        folder: an existing folder.
        architecture: `model_type`, and the arguments of its configuration class.
        special_tokens: texts that must be single tokens, as they are in the real vocabulary.
    """
    values = dict(architecture)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    _write_shards(model, folder)
    byte_tokenizer(special_tokens, config.vocab_size).save_pretrained(folder)


def byte_tokenizer(special_tokens: list[str], vocab_size: int = 0) -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token a byte, which reads any text without a vocabulary.

    Ids above the bytes, up to `vocab_size`, decode to " r1234". A model with random weights mostly
    generates those.
    """
    end = "<|endoftext|>"
    tokens = [end, *sorted(pre_tokenizers.ByteLevel.alphabet()), *special_tokens]
    tokens += [f"Ġr{i}" for i in range(len(tokens), vocab_size)]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=end,
        eos_token=end,
        pad_token=end,
        additional_special_tokens=special_tokens,
        clean_up_tokenization_spaces=False,
    )


def _write_shards(model: torch.nn.Module, folder: Path) -> None:
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    shapes = {n: t.shape for n, t in model.state_dict().items() if n not in tied}
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        bytes_needed = 2 * shape.numel()
        if shards[-1] and size + bytes_needed > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += bytes_needed
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    for i, names in enumerate(tqdm(shards, desc="random weights", unit="shard"), start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(
            {name: _tensor(name, shapes[name], generator) for name in names},
            folder / file,
            metadata={"format": "pt"},
        )
        # safetensors writes 0600, which a container's user cannot read
        (folder / file).chmod(0o644)
        weight_map |= dict.fromkeys(names, file)
    total = sum(2 * shape.numel() for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _tensor(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Initialize one tensor: norms to one, biases to zero, the others to normal(0, 0.02)."""
    if len(shape) <= 1:
        fill = torch.zeros if name.endswith("bias") else torch.ones
        return fill(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
