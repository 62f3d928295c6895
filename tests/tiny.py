"""Tiny models of real architectures, made in seconds, for tests that need no real text."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from deploy.weights.random_weights import byte_tokenizer, write_random_checkpoint

LLAMA = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GPT2 = {"model_type": "gpt2", "vocab_size": 320, "n_embd": 64, "n_layer": 2, "n_head": 4}
GPT2 |= {"n_positions": 256, "bos_token_id": 0, "eos_token_id": 0}
MISTRAL = LLAMA | {"model_type": "mistral", "sliding_window": 16}
DOLLY = {
    "model_type": "gpt_neox",
    "vocab_size": 320,
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "rotary_pct": 0.25,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
VLLM = {
    "LLAMA": LLAMA | {"num_attention_heads": 2, "num_key_value_heads": 1},
    "MISTRAL": MISTRAL | {"num_attention_heads": 2, "num_key_value_heads": 1},
    "GPT2": GPT2 | {"n_head": 2},
    "DOLLY": DOLLY | {"num_attention_heads": 3},
}
"""The same with heads of 32 values: vLLM's kernels for a CPU have none of 16 or 24."""
DOLLY_SPECIAL = ["### End", "### Instruction:", "### Response:\n"]


def random_model(folder: Path, architecture: dict) -> Path:
    """Write a checkpoint with random weights; its completions are random ASCII characters."""
    folder.mkdir(parents=True)
    tokenizer = ascii_tokenizer()
    write_random_checkpoint(folder, architecture | {"vocab_size": len(tokenizer)}, [])
    tokenizer.save_pretrained(folder)
    return folder


def ascii_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token for each ASCII character, so that random ids are readable."""
    characters = [chr(code) for code in range(33, 127)] + ["Ġ"]
    vocabulary = {token: i for i, token in enumerate(["<|endoftext|>", *characters])}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=end, eos_token=end, pad_token=end, unk_token="?"
    )


def taught_model(
    folder: Path, architecture: dict, special: list[str], pairs: dict[str, str], end: str
) -> Path:
    """Write a checkpoint that has learned to continue each prompt with its answer and `end`."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    tokenizer = byte_tokenizer(special)
    values = dict(architecture)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    model = AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rows = []
    for prompt, answer in pairs.items():
        question = tokenizer(prompt)["input_ids"]
        rows.append((question, tokenizer(answer + end)["input_ids"]))
    longest = max(len(q) + len(a) for q, a in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for i, (question, answer) in enumerate(rows):
        ids[i, : len(question) + len(answer)] = torch.tensor(question + answer)
        labels[i, len(question) : len(question) + len(answer)] = torch.tensor(answer)
    for _ in range(400):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss.item() < 0.01:
            break
    else:
        raise AssertionError(f"the tiny model did not learn its answers: loss {loss.item():.3f}")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
