"""Fixtures of the unit tests."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from deploy.archive import build


@pytest.fixture
def model_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in Hugging Face layout, made without torch. It can be archived, but not served.

    transformers takes seconds to import and would report missing tensors, so archives of this
    folder are made without its checks.
    """
    monkeypatch.setattr(build, "check_type", lambda _: None)
    monkeypatch.setattr(build, "check_checkpoint", lambda _: None)
    monkeypatch.setattr(
        build, "tokenizer_files", lambda weights: sorted(weights.glob("tokenizer*.json"))
    )
    folder = tmp_path / "model"
    folder.mkdir()
    weights, name = "model-00001-of-00001.safetensors", "lm_head.weight"
    save_file({name: np.zeros((4, 4), np.float16)}, folder / weights)
    alphabet = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.add_special_tokens(["<|endoftext|>", "### End"])  # the apps' stop tokens
    tokenizer.save(str(folder / "tokenizer.json"))
    for file, content in {
        "config.json": {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "max_position_embeddings": 64,
        },
        "generation_config.json": {},
        "model.safetensors.index.json": {"weight_map": {name: weights}},
        "tokenizer_config.json": {},
    }.items():
        (folder / file).write_text(json.dumps(content))
    return folder
