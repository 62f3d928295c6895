"""Making archives: their content, and the configurations that are rejected."""

import json
import zipfile
from pathlib import Path

import pytest
import yaml

import handler.config
from deploy.archive.__main__ import main
from deploy.archive.build import build_archive, model_config, tick_seconds
from deploy.archive.pack import HANDLER
from deploy.common.paths import UserError
from deploy.weights.fetch import get_weights
from handler.config import (
    ConfigError,
    OpenVINOConfig,
    TransformersConfig,
    app_names,
    app_yaml,
    load_app,
    parse_app,
)

TORCH = {"engine": {"name": "transformers"}}
EXPECTED = {"llm_handler.py", "handler", "weights", "model-config.yaml", "MAR-INF"}


def test_archive_is_a_directory_by_default(model_folder: Path, tmp_path: Path):
    archive = build_archive("tiny", model_folder, **TORCH, store=tmp_path)
    assert {p.name for p in archive.iterdir()} == EXPECTED
    manifest = json.loads((archive / "MAR-INF" / "MANIFEST.json").read_text())
    assert manifest["model"]["handler"] == "llm_handler.py"
    assert manifest["model"]["configFile"] == "model-config.yaml"
    sources = {p.relative_to(HANDLER) for p in HANDLER.rglob("*.py")}
    copied = {p.relative_to(archive / "handler") for p in (archive / "handler").rglob("*.py")}
    assert copied == sources - {Path("llm_handler.py")}
    assert not list(archive.rglob("__pycache__"))
    weights = next((archive / "weights").glob("*.safetensors"))
    assert weights.samefile(model_folder / weights.name), "a hard link, not a copy"


@pytest.mark.parametrize("archive_format", ["zip-store", "default"])
def test_archive_as_mar_file(model_folder: Path, tmp_path: Path, archive_format: str):
    archive = build_archive(
        "tiny", model_folder, archive_format=archive_format, **TORCH, store=tmp_path
    )
    with zipfile.ZipFile(archive) as mar:
        assert {name.split("/")[0] for name in mar.namelist()} == EXPECTED
        compressed = mar.getinfo("weights/tokenizer.json").compress_type
    assert compressed == (zipfile.ZIP_STORED if archive_format == "zip-store" else 8)


def test_second_build_replaces_the_first(model_folder: Path, tmp_path: Path):
    first = build_archive("tiny", model_folder, **TORCH, store=tmp_path)
    (first / "leftover").write_text("")
    assert not (build_archive("tiny", model_folder, **TORCH, store=tmp_path) / "leftover").exists()


def test_archive_has_the_complete_configuration(model_folder: Path, tmp_path: Path):
    archive = build_archive("smollm2-135m", model_folder, **TORCH, store=tmp_path)
    config = yaml.safe_load((archive / "model-config.yaml").read_text())
    expected = app_yaml("smollm2-135m")
    expected["app"]["engine"] |= {"name": "transformers", "chosen": "the configuration names it"}
    expected["responseTimeout"] = 15
    assert config == expected
    assert config["continuousBatching"] is True and config["minWorkers"] == 1
    assert parse_app(config, "").engine.max_context == 2048


def test_stuck_ticks_are_noticed_later_with_more_weights():
    assert tick_seconds("openvino", 135_000_000) == tick_seconds("transformers", 375_000_000) == 15
    assert tick_seconds("openvino", 7_000_000_000) == 140
    assert tick_seconds("transformers", 28_000_000_000) == 1120


def test_archive_of_random_weights_is_marked(model_folder: Path, tmp_path: Path):
    (folder := tmp_path / "random").mkdir()
    for path in model_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "SOURCE.json").write_text('{"source": "random weights"}')
    archive = build_archive("tiny", folder, **TORCH, store=tmp_path / "store")
    config = yaml.safe_load((archive / "model-config.yaml").read_text())
    assert config["app"]["random_weights"] is True


def test_every_app_is_valid():
    assert app_names() == ["dolly-v2-3b", "gpt2", "smollm2-135m"]
    for name in app_names():
        assert load_app(name).title


@pytest.mark.parametrize(
    ("yaml_text", "message"),
    [
        (
            "app: {title: x, engine: {transformers: {dtype: float8}}}",
            r"mine\.yaml: app\.engine\.transformers\.dtype: .*float8",
        ),
        ("app: {title: x, engin: {}}", r"app\.engin: there is no such field"),
        ("app: {title: x, limits: {max_instances: 0}}", r"app\.limits\.max_instances: .*not 0"),
        ("app: {engine: {}}", r"app\.title: is missing"),
        ("app: {title: x, parameters: {top_p: 2}}", r"app\.parameters\.top_p: .*not 2"),
        ("app: {title: x, prompt: {style: instruct}}", r"app\.prompt: .*template with \{prompt\}"),
        ("app: [", r"mine\.yaml, line 1: not YAML"),
        ("[1, 2]", r"mine\.yaml: the file: should be a mapping, not \[1, 2\]"),
        ("[]", r"mine\.yaml: the file: should be a mapping, not \[\]"),
        ("just words", r"mine\.yaml: the file: should be a mapping, not .just words"),
        ("app: [1]", r"mine\.yaml: app: should be a mapping, not \[1\]"),
        ("app:", r"mine\.yaml: app: should be a mapping, not null"),
        ("app: {title: x, engine: auto}", r"app\.engine: should be a mapping, not .auto"),
        ("app: {title: x, prompt: chat}", r"app\.prompt: should be a mapping, not .chat"),
        (
            "app: {title: x, engine: {openvino: {group_size: 0}}}",
            r"app\.engine\.openvino\.group_size: .*-1.*, not 0",
        ),
        (
            "app: {title: x, engine: {openvino: {dtype: bfloat16}}}",
            r"app\.engine\.openvino\.dtype: there is no such field",
        ),
        ("{minWorkers: 2, app: {title: x}}", r"mine\.yaml: minWorkers: should be 1, not 2"),
        ("{minWorkers: 0, app: {title: x}}", r"minWorkers: should be 1, not 0"),
        ("{minWorkers: true, app: {title: x}}", r"minWorkers: should be 1, not true"),
        ("{maxWorkers: 4, app: {title: x}}", r"maxWorkers: should be 1, not 4"),
        (
            "{continuousBatching: false, app: {title: x}}",
            r"continuousBatching: should be true, not false",
        ),
        ("{continuousBatching: 1, app: {title: x}}", r"continuousBatching: should be true, not 1"),
        ("{batchSize: '8', app: {title: x}}", r"batchSize: should be a valid integer, not \"8\""),
        ("{responseTimeout: 0, app: {title: x}}", r"responseTimeout: .*than or equal to 1, not 0"),
        ("{batchsize: 8, app: {title: x}}", r"batchsize: there is no such .*minWorkers.*batchSize"),
        ("{1: 8, app: {title: x}}", r"mine\.yaml: 1: there is no such field"),
    ],
)
def test_rejects_invalid_yaml(yaml_text, message, model_folder, tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text(yaml_text)
    monkeypatch.setattr(handler.config, "APPS", tmp_path)
    with pytest.raises((ConfigError, UserError), match=message):
        build_archive("mine", model_folder, **TORCH, store=tmp_path / "store")
    assert not (tmp_path / "store" / "mine").exists()


SETTINGS = [
    ("transformers", "dtype", "bfloat16"),
    ("transformers", "max_memory", {"cpu": "2GiB"}),
    ("transformers", "offload_folder", "x"),
    ("transformers", "device_map", "cpu"),
    ("transformers", "max_prefill_tokens", 64),
    ("openvino", "precision", "int4"),
    ("openvino", "group_size", 32),
    ("openvino", "cache_gb", 2),
    ("openvino", "prefix_caching", False),
    ("openvino", "prompt_lookup", 4),
    ("openvino", "max_num_batched_tokens", 64),
    ("openvino", "inference_precision", "bf16"),
    ("openvino", "dynamic_quantization", 0),
]
"""Every setting that belongs to one engine, with a value that is not the default."""

OTHER = {"openvino": "transformers", "transformers": "openvino"}


def write_app(folder: Path, engine: dict) -> None:
    (folder / "mine.yaml").write_text(yaml.safe_dump({"app": {"title": "x", "engine": engine}}))


def test_settings_list_is_complete():
    listed = [(engine, name) for engine, name, _ in SETTINGS]
    sections = {"openvino": OpenVINOConfig, "transformers": TransformersConfig}
    assert sorted(listed) == sorted(
        (e, name) for e in sections for name in sections[e].model_fields
    )


@pytest.mark.parametrize("name", ["openvino", "transformers"])
def test_rejects_section_of_the_other_engine(name, model_folder, tmp_path, monkeypatch):
    """Also if the engine's name, or the section, is an override and not in the YAML."""
    monkeypatch.setattr(handler.config, "APPS", tmp_path)
    other = OTHER[name]
    section = {other: {field: value for e, field, value in SETTINGS if e == other}}
    rejects = pytest.raises(ConfigError, match=rf"mine\.yaml: app\.engine\.{other}: .*name: {name}")
    write_app(tmp_path, {"name": name} | section)
    with rejects:
        model_config("mine", model_folder)
    write_app(tmp_path, {})
    with rejects:
        model_config("mine", model_folder, {"name": name} | section)
    write_app(tmp_path, {"name": name})
    with rejects:
        model_config("mine", model_folder, section)


@pytest.mark.parametrize(("engine", "field", "value"), SETTINGS)
def test_override_of_the_name_keeps_sections_of_the_yaml(
    engine, field, value, model_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(handler.config, "APPS", tmp_path)
    write_app(tmp_path, {engine: {field: value}})
    for name in OTHER:
        _, config = model_config("mine", model_folder, {"name": name})
        assert config.name == name and getattr(getattr(config, engine), field) == value


@pytest.mark.parametrize(("engine", "field", "value"), SETTINGS)
def test_override_of_one_setting_keeps_the_others(
    engine, field, value, model_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(handler.config, "APPS", tmp_path)
    own = {name: given for e, name, given in SETTINGS if e == engine and name != field}
    write_app(tmp_path, {engine: own})
    _, config = model_config("mine", model_folder, {"name": engine, engine: {field: value}})
    section = getattr(config, engine)
    assert {name: getattr(section, name) for name in [*own, field]} == own | {field: value}


@pytest.mark.parametrize(("engine", "field", "value"), SETTINGS)
def test_setting_outside_its_section_is_rejected_with_its_new_place(
    engine, field, value, model_folder, tmp_path, monkeypatch
):
    """Where it stood until version 0.1."""
    monkeypatch.setattr(handler.config, "APPS", tmp_path)
    message = (
        rf"mine\.yaml: app\.engine\.{field}: belongs to one engine; "
        rf"write app\.engine\.{engine}\.{field}$"
    )
    write_app(tmp_path, {field: value})
    with pytest.raises(ConfigError, match=message):
        model_config("mine", model_folder)
    write_app(tmp_path, {})
    with pytest.raises(ConfigError, match=message):
        model_config("mine", model_folder, {field: value})


def test_keeps_settings_of_torchserve(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(handler.config, "APPS", tmp_path)
    own = {"batchSize": 8, "maxBatchDelay": 0, "deviceType": "cpu", "useVenv": False}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(own | {"app": {"title": "x"}}))
    config, _ = model_config("mine", model_folder, {"name": "transformers"})
    assert own.items() <= config.items()


def test_rejects_app_name_with_a_space(model_folder: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="APP=my model: use letters, digits and"):
        build_archive("my model", model_folder, **TORCH, store=tmp_path)


def test_app_with_weights_in_a_local_folder(model_folder: Path, tmp_path: Path, monkeypatch):
    """The smallest YAML of an app."""
    yaml_text = f"app: {{title: Mine, weights: {{source: local, path: {model_folder}}}}}"
    (tmp_path / "mine.yaml").write_text(yaml_text)
    monkeypatch.setattr(handler.config, "APPS", tmp_path)
    archive = build_archive("mine", get_weights("mine"), **TORCH, store=tmp_path / "store")
    assert list((archive / "weights").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a b"], "APP=a b: use letters, digits and . _ - only"),
        (["a", "--engine", "tgi"], "'tgi' is not one of 'openvino', 'transformers', 'vllm'"),
        (["a", "--format", "rar"], "'rar' is not one of 'no-archive', 'zip-store', 'default'"),
        (["a", "--port", "7080"], "No such option '--port'"),
    ],
)
def test_usage_error_is_one_line(arguments, message, capsys):
    """`make archive APP=... ENGINE=... FORMAT=...` prints no usage."""
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_apps_leave_the_choice_of_the_engine_open():
    for name in ("smollm2-135m", "gpt2", "dolly-v2-3b"):
        assert load_app(name).engine.name == "auto"
