"""Checking folders of weights, and the command line that gets them."""

import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import deploy.weights.fetch
from deploy.common.paths import UserError
from deploy.weights.__main__ import main
from deploy.weights.fetch import get_weights
from deploy.weights.folder import check_folder, weight_files
from handler.config import HubWeights, load_app


def test_rejects_git_lfs_pointer(model_folder: Path):
    weights = next(model_folder.glob("*.safetensors"))
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(UserError, match=r"is a git-lfs pointer.*run: git -C .*model lfs pull"):
        check_folder(model_folder)


def test_rejects_missing_shard(model_folder: Path):
    next(model_folder.glob("*.safetensors")).unlink()
    (model_folder / "model-00009-of-00009.safetensors").write_bytes(b"x")
    with pytest.raises(
        UserError, match=r"names model-00001-of-00001\.safetensors, which is missing"
    ):
        check_folder(model_folder)


@pytest.mark.parametrize("kept", [5, 40, -1], ids=["a few bytes", "half a header", "all but one"])
def test_rejects_incomplete_file(model_folder: Path, kept: int):
    weights = next(model_folder.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(
        UserError, match=rf"{weights.name}: is damaged or its download is incomplete"
    ):
        check_folder(model_folder)


def write_config(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)


@pytest.mark.slow  # imports transformers
@pytest.mark.parametrize("name", ["BertForMaskedLM", "T5ForConditionalGeneration"])
def test_rejects_model_that_does_not_generate_text(model_folder: Path, name: str):
    write_config(model_folder, json.dumps({"architectures": [name]}))
    with pytest.raises(UserError, match=rf"config\.json: architectures is {name}, .*ForCausalLM"):
        check_folder(model_folder)


@pytest.mark.parametrize(
    "names",
    [
        None,
        [],
        ["GPT2LMHeadModel"],
        ["LlamaForCausalLM"],
        pytest.param(["Gemma3ForConditionalGeneration"], marks=pytest.mark.slow),
    ],
)
def test_accepts_models_that_generate_text(model_folder: Path, names: list[str] | None):
    write_config(model_folder, json.dumps({"architectures": names}))
    assert check_folder(model_folder) == model_folder


@pytest.mark.parametrize("text", ["{", "[]"])
def test_rejects_config_that_is_not_an_object(model_folder: Path, text: str):
    write_config(model_folder, text)
    with pytest.raises(UserError, match=r"config\.json: is not a JSON object"):
        check_folder(model_folder)


@pytest.mark.parametrize(
    ("missing", "message"),
    [("config.json", "has no config.json"), ("*.safetensors", r"has no \*\.safetensors")],
)
def test_rejects_folder_without_a_model(model_folder: Path, missing: str, message: str):
    for path in model_folder.glob(missing):
        path.unlink()
    with pytest.raises(UserError, match=message):
        get_weights("mine", model_dir=model_folder)


def test_git_lfs_clone(model_folder: Path):
    """Old repositories hold a pickle; it is used only where there are no safetensors."""
    (model_folder / "pytorch_model.bin").write_bytes(b"x")
    (model_folder / "tf_model.h5").write_bytes(b"x")
    (model_folder / ".git").mkdir()
    names = [p.name for p in weight_files(model_folder)]
    assert "pytorch_model.bin" not in names and "tf_model.h5" not in names
    for path in model_folder.glob("*.safetensors*"):
        path.unlink()
    names = [p.name for p in weight_files(get_weights("mine", model_dir=model_folder))]
    assert names[0] == "pytorch_model.bin" and "tokenizer.json" in names


def test_hub_revisions_are_full_commits():
    for name in ("gpt2", "dolly-v2-3b"):
        assert isinstance(load_app(name).weights, HubWeights)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "error: APP=nothing: there is no handler/apps/nothing.yaml. Known: dolly"),
        (["mine", "--model-dir", "/nowhere"], "error: /nowhere: there is no such model folder"),
        (
            ["mine", "--model-dir", __file__],
            "error: tests/unit/test_weights_folder.py: is a file",
        ),
    ],
)
def test_user_error_is_one_line(arguments, message, capsys):
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith(message) and error.count("\n") == 1


def test_two_programs_make_a_folder_once(model_folder: Path, tmp_path: Path, monkeypatch):
    """Two would delete each other's unfinished folders."""
    made = []

    def slow(*_) -> Callable[[Path], None]:
        def fetch(folder: Path) -> None:
            made.append(folder)
            time.sleep(0.5)
            shutil.copytree(model_folder, folder, dirs_exist_ok=True)

        return fetch

    monkeypatch.setattr(deploy.weights.fetch, "_fetcher", slow)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: get_weights("gpt2", models=tmp_path), range(2))
    assert first == second and len(made) == 1
