"""Choosing an engine, and exporting a model for it."""

import importlib.util
import json
import re
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import yaml

from deploy.archive.build import build_archive
from deploy.archive.export import EXPORTED, choose_engine, export
from deploy.common.paths import UserError
from handler.config import engine_config
from handler.engine.folder import ModelFolder
from handler.engine.positions import context
from tests import tiny

pytestmark = pytest.mark.slow


def test_choice_of_the_engine(monkeypatch: pytest.MonkeyPatch, tiny_llama: Path, tmp_path: Path):
    def choose(**settings) -> tuple[str, str]:
        return choose_engine(engine_config(**settings), tiny_llama, tmp_path)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose() == ("openvino", "there is no GPU")
    assert choose(transformers={"offload_folder": "x"})[0] == "openvino", (
        "only a place, should one be needed"
    )
    assert choose(name="transformers")[0] == "transformers"
    assert choose(transformers={"max_memory": {"cpu": "2GiB"}}) == (
        "transformers",
        "max_memory needs it",
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose() == ("transformers", "there is a GPU")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert choose() == ("transformers", "OpenVINO is not installed")


def test_chooses_transformers_if_the_export_does_not_fit_into_memory(
    monkeypatch: pytest.MonkeyPatch, tiny_llama: Path, tmp_path: Path
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    name, why = choose_engine(engine_config(), tiny_llama, tmp_path)
    assert name == "transformers"
    assert re.fullmatch(r"exporting for OpenVINO takes \d.\d GB of memory and 0.0 are free", why)
    export(tiny_llama, engine_config(), tmp_path)
    assert choose_engine(engine_config(), tiny_llama, tmp_path)[0] == "openvino", (
        "the export exists already"
    )


def test_export_is_made_once_for_each_setting(tiny_llama: Path, tmp_path: Path):
    first = export(tiny_llama, engine_config(), tmp_path)
    stamp = (first / EXPORTED).stat().st_mtime_ns
    assert export(tiny_llama, engine_config(threads=1), tmp_path) == first
    assert (first / EXPORTED).stat().st_mtime_ns == stamp
    assert export(tiny_llama, engine_config(openvino={"precision": "fp16"}), tmp_path) != first
    assert not list(tmp_path.glob("*.unfinished"))


def test_archive_holds_the_export_instead_of_the_weights(tiny_llama: Path, tmp_path: Path):
    archive = build_archive("tiny", tiny_llama, engine={"name": "openvino"}, store=tmp_path)
    names = {p.name for p in (archive / "weights").iterdir()}
    assert {EXPORTED, "openvino_model.bin", "tokenizer.json", "config.json"} <= names
    assert not [name for name in names if name.endswith(".safetensors")]
    config = yaml.safe_load((archive / "model-config.yaml").read_text())["app"]["engine"]
    assert (config["name"], config["chosen"]) == ("openvino", "the configuration names it")


def test_rejects_model_that_cannot_be_exported(tiny_llama: Path, tmp_path: Path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in tiny_llama.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"model_type": "nonsense"}))
    with pytest.raises(UserError, match=r"cannot export .*app\.engine\.name: transformers"):
        export(broken, engine_config(), tmp_path / "cache")
    assert not [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]


def test_model_folder_agrees_with_transformers(smollm2: Path):
    """transformers reads the same files."""
    from transformers import AutoTokenizer

    folder, reference = ModelFolder(smollm2), AutoTokenizer.from_pretrained(smollm2)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "¿Qué tal? 🍳"},
        {"role": "assistant", "content": "Bien."},
        {"role": "user", "content": "2024?"},
    ]
    for part in (messages[:2], messages[1:2], messages):
        expected = reference.apply_chat_template(part, tokenize=False, add_generation_prompt=True)
        assert folder.chat_prompt(part) == expected
        ids = folder.encode(expected)
        assert ids == reference(expected)["input_ids"]
        assert folder.decode(ids) == reference.decode(ids, skip_special_tokens=True)
    assert context(folder.config, None).tokens == 8192
    assert folder.end_tokens(["<|endoftext|>"]) == {0, 2}


def test_start_token_of_the_chat_template_is_not_added_twice(tiny_llama: Path, tmp_path: Path):
    tokenizer = tiny.ascii_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer.json").read_text())
    piece = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    settings["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [piece, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            "<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
        },
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text((tiny_llama / "config.json").read_text())
    folder = ModelFolder(tmp_path)
    prompt = folder.chat_prompt([{"role": "user", "content": "ab"}])
    assert folder.encode(prompt).count(0) == 1
