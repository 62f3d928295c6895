"""Choosing an engine, and exporting a model for it."""

import importlib.util
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import openvino
import psutil
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from deploy.archive import build
from deploy.archive.build import build_archive, model_config
from deploy.archive.compress import compress
from deploy.archive.export import (
    EXPORTED,
    ExportError,
    choose_engine,
    export,
    has_gpu,
    has_vllm,
)
from deploy.archive.trace import trace
from deploy.common.paths import UserError
from handler.config import engine_config
from handler.engine.folder import ModelFolder
from handler.engine.positions import context
from handler.engine.self_check import SelfCheckError
from tests import tiny
from tests.families.models import write_family
from tools.setup_env import vllm_python

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
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert choose() == ("transformers", "OpenVINO is not installed")


def test_choice_of_the_engine_on_a_gpu(tiny_llama: Path, tmp_path: Path):
    def choose(weights: Path = tiny_llama, *, vllm: bool = True, **settings) -> tuple[str, str]:
        return choose_engine(
            engine_config(**settings), weights, tmp_path, gpu=lambda: True, vllm=lambda: vllm
        )

    assert choose() == ("vllm", "there is a GPU")
    assert choose(vllm=False) == ("transformers", "there is a GPU, and vLLM is not installed")
    assert choose(name="openvino")[0] == "openvino", "the configuration names it"
    assert choose(transformers={"max_memory": {"cpu": "2GiB"}})[0] == "transformers"
    unknown = broken_copy(tiny_llama, tmp_path)
    assert choose(unknown) == (
        "transformers",
        "the vllm engine does not serve model_type nonsense: vLLM does not list it",
    )
    named = engine_config().model_copy(update={"name": "vllm"})
    with pytest.raises(UserError, match=r"type nonsense: vLLM does not list it; .*=transformers"):
        choose_engine(named, unknown, tmp_path)


def test_vllm_is_not_chosen_without_a_gpu(tiny_llama: Path, tmp_path: Path):
    name, _ = choose_engine(
        engine_config(), tiny_llama, tmp_path, gpu=lambda: False, vllm=lambda: True
    )
    assert name == "openvino"


def test_detection_is_that_of_the_machine():
    assert has_gpu() == torch.cuda.is_available()
    assert has_vllm() == (vllm_python("cuda") is not None)


def test_image_for_gpus_has_vllm_on_any_machine(tiny_llama: Path):
    """The machine that builds the image needs neither a GPU nor vLLM."""
    _, settings = model_config("tiny", tiny_llama, gpu_image=True)
    assert (settings.name, settings.chosen) == ("vllm", "there is a GPU")


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


def test_failed_export_is_one_sentence_with_the_log(tiny_llama: Path, tmp_path: Path):
    broken = broken_copy(tiny_llama, tmp_path)
    with pytest.raises(
        UserError, match=r"^OpenVINO cannot export this model \(.*\.log\)$"
    ) as error:
        export(broken, engine_config(), tmp_path / "cache")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert not [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]


def broken_copy(model: Path, tmp_path: Path) -> Path:
    """Copy a model, with a type that transformers does not know."""
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"model_type": "nonsense"}))
    return broken


def failing(*_: object) -> Path:
    raise ExportError("OpenVINO cannot export this model (no reason; the full log is x)")


def differing(*_: object, **__: object) -> Path:
    raise SelfCheckError("self-check: this engine generates different text")


@pytest.mark.parametrize("part", ["export", "verify"])
def test_auto_uses_transformers_if_the_export_fails_or_is_wrong(
    part: str, monkeypatch: pytest.MonkeyPatch, tiny_llama: Path, tmp_path: Path
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(build, "export", lambda *_: tmp_path)
    monkeypatch.setattr(build, part, failing if part == "export" else differing)
    prepared = build.prepare("mine", tiny_llama, tmp_path / "prepared")
    engine = yaml.safe_load((prepared / "model-config.yaml").read_text())["app"]["engine"]
    assert engine["name"] == "transformers"
    assert re.match("OpenVINO cannot export|self-check: ", engine["chosen"])
    names = {path.name for path in (prepared / "weights").iterdir()}
    assert any(name.endswith(".safetensors") for name in names)
    assert not {EXPORTED, "self_check.json"} & names
    with pytest.raises(
        UserError, match=r"(log is x\)|different text); serve it .*ENGINE=transformers$"
    ):
        build.prepare("mine", tiny_llama, tmp_path / "prepared", engine={"name": "openvino"})


def float32_constants(file: Path) -> list[np.ndarray]:
    return [
        np.array(node.data).ravel()
        for node in openvino.Core().read_model(file).get_ops()
        if node.get_type_name() == "Constant" and node.get_element_type() == openvino.Type.f32
    ]


@pytest.mark.parametrize("name", ["llama-llama3", "llama-yarn", "llama-longrope", "gpt_neox"])
def test_frequencies_of_rope_stay_in_float32(name: str, tmp_path: Path):
    """In float16 the angle of position 4,000 is wrong by up to 1."""
    folder = write_family(tmp_path / name, name)
    trace(folder, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    (wanted,) = [b for n, b in model.named_buffers() if n.endswith("rotary_emb.inv_freq")]
    for precision in ("fp16", "int8", "int4") if name == "llama-llama3" else ("int8",):
        made = tmp_path / f"{precision}.xml"
        compress(tmp_path / EXPORTED, made, precision, 32)
        same = [c for c in float32_constants(made) if c.shape == tuple(wanted.shape)]
        if name == "llama-longrope":  # the graph divides short and long factors by these
            same = [1 / c for c in same]
        assert any(np.allclose(c, wanted, rtol=1e-6, atol=0) for c in same), precision


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


@pytest.mark.parametrize(
    ("config", "stored", "length"),
    [
        ({"model_type": "bloom"}, None, 2048),
        ({"model_type": "bloom"}, 10**30, 2048),
        ({"model_type": "bloom"}, 4096, 4096),
        ({"model_type": "bloom", "seq_length": 512}, 4096, 512),
        ({"model_type": "falcon"}, 4096, 2048),
    ],
    ids=["no limit", "no number", "the tokenizer's", "the model's", "the type's default"],
)
def test_model_without_a_context_length_gets_one_that_is_printed(
    config: dict, stored: int | None, length: int, tmp_path: Path, capsys
):
    """A MODEL_DIR needs no YAML. If there is one, its app.engine.max_context counts."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": stored}))
    complete, settings = build.model_config("mine", tmp_path, {"name": "openvino"})
    printed = f"serving {length} tokens (" in capsys.readouterr().out
    assert printed == ("seq_length" not in config)
    if printed:
        assert settings.max_context == complete["app"]["engine"]["max_context"] == length
    _, settings = build.model_config("mine", tmp_path, {"name": "openvino", "max_context": 100})
    assert settings.max_context == 100 and not capsys.readouterr().out
