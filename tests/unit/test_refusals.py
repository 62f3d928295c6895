"""Folders that are not served: refused before any export, with a remedy that works.

The first part needs no torch. The second part imports transformers, which takes seconds.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

import deploy.archive.build
from deploy.archive.build import build_archive, prepare
from deploy.common.paths import ROOT, UserError
from deploy.weights.folder import check_folder, weight_files
from handler.config import HubWeights, parse_app
from tests.hub_server import Hub

SHARD, INDEX = "model-00001-of-00001.safetensors", "model.safetensors.index.json"


class ExportBegan(Exception):
    """The folder was accepted."""


@pytest.fixture(autouse=True)
def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(*_):
        raise ExportBegan

    monkeypatch.setattr(deploy.archive.build, "export", begin)


def refusal(folder: Path, capfd: pytest.CaptureFixture[str] | None = None) -> str:
    """Return why a folder is refused, and check the form of the message."""
    with pytest.raises(UserError) as error:
        prepare("mine", folder, folder.parent / "target", engine={"name": "openvino"})
    text = str(error.value)
    assert "\n" not in text and "Traceback" not in text and len(text) < 800
    assert text.startswith(str(folder)), "names the folder or the file"
    assert ";" in text and not text.endswith("."), "one sentence; the remedy comes last"
    assert not (folder.parent / "target").exists()
    if capfd:
        assert capfd.readouterr() == ("", ""), "no progress bars, warnings or reports"
    return text


def accepted(folder: Path) -> bool:
    """Return whether the checks let a folder pass to the export."""
    with pytest.raises(ExportBegan):
        prepare("mine", folder, folder.parent / "target", engine={"name": "openvino"})
    return True


def edit(path: Path, **fields: object) -> None:
    """Change fields of a JSON file; None removes one."""
    value = json.loads(path.read_text()) if path.is_file() else {}
    value = {k: v for k, v in (value | fields).items() if v is not None}
    path.write_text(json.dumps(value))


def keep(folder: Path, *names: str) -> None:
    for path in folder.iterdir():
        if path.name not in names:
            path.unlink()


# What a folder holds instead of a model in Hugging Face layout.


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("model.Q4_K_M.gguf", "GGUF, the format of llama.cpp (model.Q4_K_M.gguf); .*gguf_file="),
        ("consolidated.00.pth", "Meta's own layout (consolidated.00.pth); .*Hugging Face layout"),
        ("params.json", "Meta's own layout (params.json); "),
        ("consolidated.safetensors", "Mistral's own layout (consolidated.safetensors); "),
        ("tf_model.h5", "only TensorFlow weights (tf_model.h5)"),
        ("model.weights.h5", "only Keras weights"),
        ("model.keras", "only a Keras model"),
        ("saved_model.pb", "only a TensorFlow model"),
        ("model.ckpt.index", "only a TensorFlow checkpoint"),
        ("flax_model.msgpack", "only Flax weights (flax_model.msgpack)"),
        ("_CHECKPOINT_METADATA", "only an Orbax checkpoint of JAX"),
        ("model.onnx", "only an ONNX model (model.onnx)"),
        ("onnx/model.onnx", "only an ONNX model (onnx/model.onnx)"),
        ("openvino_model.xml", "already exported for OpenVINO"),
        ("zero_to_fp32.py", "DeepSpeed, in pieces"),
        ("pytorch_model_fsdp_0/__0_0.distcp", "distributed checkpoint of PyTorch"),
        ("model.nemo", "NeMo archive"),
        ("weights.npz", "weights for MLX"),
        ("rank0.engine", "TensorRT-LLM"),
        ("model.task", "MediaPipe"),
        ("model.llamafile", "llamafile"),
        ("rust_model.ot", "weights for Rust"),
        ("epoch=3.ckpt", "training checkpoint"),
        ("lit_model.pth", "LitGPT"),
        ("model.pt", "weights in an unknown layout"),
        ("model.zip", "compressed file (model.zip); unpack"),
        ("model.tar.gz", "compressed file (model.tar.gz); unpack"),
        ("model.safetensors.incomplete", "incomplete download"),
        ("model.safetensors.part", "incomplete download"),
        ("mine.mar", "finished archive"),
        ("model.safetensors", "has no config.json; download it"),
        ("notes.txt", "has no config.json (it holds notes.txt); name a folder"),
    ],
)
def test_names_other_formats(file: str, words: str, tmp_path: Path, capfd):
    folder = tmp_path / "model"
    (folder / file).parent.mkdir(parents=True)
    (folder / file).write_bytes(b"{}")
    text = refusal(folder, capfd)
    for part in words.split(".*"):
        assert part in text


@pytest.mark.parametrize("file", ["model.gguf", "tf_model.h5", "flax_model.msgpack", "model.onnx"])
def test_names_other_formats_beside_a_config(file: str, model_folder: Path):
    keep(model_folder, "config.json", "tokenizer.json")
    (model_folder / file).write_bytes(b"x")
    assert file in refusal(model_folder)


def test_rejects_empty_folder(tmp_path: Path):
    (tmp_path / "model").mkdir()
    assert "is empty; name a folder in Hugging Face layout" in refusal(tmp_path / "model")


@pytest.mark.parametrize(
    ("inner", "also"),
    [
        ("checkpoint-500", ()),
        ("checkpoint-1000", ("checkpoint-500", "checkpoint-900")),
        ("my-model", ()),
        ("snapshots/0123", ("snapshots/9999",)),
        ("models--me--tiny/snapshots/0123", ()),
        ("hub/models--me--tiny/snapshots/0123", ()),
    ],
)
def test_names_the_folder_inside_that_holds_the_model(
    inner: str, also: tuple[str, ...], model_folder: Path, tmp_path: Path
):
    """The newest training step; in the Hub's cache, the revision that it calls main."""
    outer = tmp_path / "outer"
    for name in (inner, *also):
        shutil.copytree(model_folder, outer / name)
    (outer / "runs").mkdir()
    if inner.startswith("snapshots"):
        (outer / "refs").mkdir()
        (outer / "refs" / "main").write_text("0123")
    text = refusal(outer)
    assert f"has no config.json, but a folder inside it holds a model; name {outer / inner}" in text
    assert accepted(outer / inner)


def test_names_a_model_whose_only_links_are_broken(model_folder: Path, tmp_path: Path):
    """A snapshot of the Hub's cache that was copied without its blobs."""
    (model_folder / SHARD).rename(tmp_path / "blob")
    (model_folder / SHARD).symlink_to("../../blobs/abc")
    assert "is a link to ../../blobs/abc, which does not exist; copy" in refusal(model_folder)
    (model_folder / SHARD).unlink()
    shutil.copy(tmp_path / "blob", model_folder / SHARD)
    assert accepted(model_folder)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("meta-llama/Llama-3.2-1B", "repo: meta-llama/Llama-3.2-1B"),
        ("https://huggingface.co/openai-community/gpt2", "repo: openai-community/gpt2"),
        ("~no-one/model", "~no-one/model: there is no such model folder; check the path"),
        ("a" * 300, "cannot be read (File name too long)"),
        ("gs://bucket/model", "copy it from gs: to this machine"),
        ("/nowhere/model", "/nowhere/model: there is no such model folder; check the path"),
    ],
)
def test_says_what_to_name_instead_of_a_missing_folder(given: str, words: str, capsys):
    from deploy.weights.__main__ import main

    assert main(["mine", "--model-dir", given]) == 1
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_the_yaml_for_a_repository_is_complete():
    with pytest.raises(UserError) as error:
        check_folder(Path("me/mine"))
    written = re.search(r"app: (\{.*\}\})", str(error.value))
    text = f"app: {written[1]}".replace("its commit of 40 digits", f"'{'0' * 40}'")
    app = parse_app(yaml.safe_load(text), "mine.yaml")
    assert isinstance(app.weights, HubWeights) and app.weights.repo == "me/mine"


def test_rejects_a_file_instead_of_a_folder(model_folder: Path):
    with pytest.raises(UserError, match=r"is a file; name the folder .* model, .*/model$"):
        check_folder(model_folder / SHARD)
    (model_folder.parent / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="holds GGUF"):
        check_folder(model_folder.parent / "x.gguf")


# Adapters and models for other purposes.

LORA = {"peft_type": "LORA", "base_model_name_or_path": "meta/llama", "r": 4}


@pytest.mark.parametrize("with_config", [False, True])
def test_rejects_adapter_alone(with_config: bool, model_folder: Path):
    keep(model_folder, "tokenizer.json", *(["config.json"] if with_config else []))
    edit(model_folder / "adapter_config.json", **LORA)
    save_file({"lora_A": np.zeros((4, 4))}, model_folder / "adapter_model.safetensors")
    text = refusal(model_folder)
    assert "LORA adapter for meta/llama (adapter_config.json)" in text
    assert "merge_and_unload().save_pretrained(" in text and "to serve the base model" not in text


def test_rejects_adapter_beside_its_model(model_folder: Path):
    edit(model_folder / "adapter_config.json", **LORA)
    save_file({"lora_A": np.zeros((4, 4))}, model_folder / "adapter_model.safetensors")
    assert "move the adapter's files out of the folder" in refusal(model_folder)
    for path in model_folder.glob("adapter_*"):
        path.unlink()
    assert accepted(model_folder)


def test_does_not_offer_to_merge_a_learned_prompt(model_folder: Path):
    edit(model_folder / "adapter_config.json", **LORA | {"peft_type": "PROMPT_TUNING"})
    assert "PROMPT_TUNING adapter" in (text := refusal(model_folder)) and "merge_and" not in text


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("model_index.json", "a pipeline of diffusers"),
        ("modules.json", "a model of sentence-transformers"),
    ],
)
def test_rejects_models_for_images_and_embeddings(file: str, words: str, model_folder: Path):
    (model_folder / file).write_text("[]")
    assert words in refusal(model_folder)


# JSON files.


@pytest.mark.parametrize("text", ["{", "[]", "null", '"a"', "\ufeff{}", "[" * 100_000, "<html>"])
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer_config.json", INDEX]
)
def test_rejects_broken_json(name: str, text: str, model_folder: Path):
    (model_folder / name).write_text(text)
    assert f"{name}: is not a JSON object" in refusal(model_folder)


@pytest.mark.parametrize("name", ["config.json", INDEX, SHARD, "tokenizer_config.json"])
def test_rejects_empty_files(name: str, model_folder: Path):
    (model_folder / name).write_bytes(b"")
    assert f"{name}: is empty; download it again" in refusal(model_folder)


def test_rejects_json_that_is_not_text(model_folder: Path):
    (model_folder / "config.json").write_bytes(b"\xff\xfe{\0}\0")
    assert "config.json: is not a JSON object" in refusal(model_folder)


def test_rejects_a_file_that_cannot_be_read(model_folder: Path, monkeypatch):
    def read(path: Path):
        raise PermissionError(13, "Permission denied", str(path / "config.json"))

    monkeypatch.setattr("deploy.weights.folder.weight_files", read)
    assert "config.json: cannot be read (Permission denied); check" in refusal(model_folder)


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("value", [-1, 4, 10**9, "2", "</s>", 1.5, True, [1, -1], [9], ["a"], {}])
def test_rejects_end_tokens_that_are_not_ids(file: str, value: object, model_folder: Path):
    edit(model_folder / "config.json", vocab_size=4)
    edit(model_folder / file, eos_token_id=value)
    text = refusal(model_folder)
    assert f"{file}: eos_token_id is {json.dumps(value)}; " in text and "remove it" in text
    edit(model_folder / file, eos_token_id=None)
    assert accepted(model_folder)


@pytest.mark.parametrize("value", [0, 3, [1, 2], [], None])
def test_accepts_end_tokens(value: object, model_folder: Path):
    edit(model_folder / "config.json", vocab_size=4)
    edit(model_folder / "generation_config.json", eos_token_id=value)
    assert accepted(model_folder)


def test_end_tokens_of_a_nested_vocabulary(model_folder: Path):
    edit(model_folder / "config.json", text_config={"vocab_size": 4}, eos_token_id=7)
    assert "below vocab_size, which is 4" in refusal(model_folder)


def test_says_when_nothing_ends_a_completion(model_folder: Path, capsys):
    assert accepted(model_folder)
    assert "names no eos_token_id, so a completion ends only at max" in capsys.readouterr().out
    edit(model_folder / "tokenizer_config.json", eos_token="</s>")
    assert accepted(model_folder)
    assert "eos_token_id" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [
        ("temperature", "hot", "a number"),
        ("top_k", [50], "a number"),
        ("max_length", "20", "a number"),
        ("repetition_penalty", True, "a number"),
        ("do_sample", "yes", "true or false"),
        ("do_sample", 1, "true or false"),
    ],
)
def test_rejects_settings_of_a_wrong_type(field, value, kind: str, model_folder: Path):
    """OpenVINO GenAI would fail on them when it loads the model."""
    edit(model_folder / "generation_config.json", **{field: value})
    text = refusal(model_folder)
    assert f"generation_config.json: {field} is {json.dumps(value)}; it should be {kind} or" in text
    edit(model_folder / "generation_config.json", **{field: None}, top_p=0.9, early_stopping="x")
    assert accepted(model_folder)


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("field", ["num_hidden_layers", "max_position_embeddings", "vocab_size"])
def test_rejects_sizes_below_one(field: str, value: int, model_folder: Path):
    edit(model_folder / "config.json", **{field: value})
    assert f"{field} is {value}; it should be at least 1" in refusal(model_folder)
    edit(model_folder / "config.json", **{field: 4})
    assert accepted(model_folder)


def test_rejects_more_layers_than_any_model_has(model_folder: Path):
    """transformers would spend hours creating them."""
    edit(model_folder / "config.json", num_hidden_layers=10**7)
    assert "num_hidden_layers is 10000000; it should be at least 1 and at most 500" in (
        refusal(model_folder)
    )


# Quantization.

BNB4 = {"quant_method": "bitsandbytes", "load_in_4bit": True}
BNB8 = {"load_in_8bit": True}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quant_method gptq (4 bits)"),
        ({"quant_method": "awq", "bits": 4}, "quant_method awq (4 bits)"),
        (BNB4, "bitsandbytes (4 bits)"),
        (BNB8, "bitsandbytes (8 bits)"),
        (
            {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4}}},
            "quant_method hqq",
        ),
        ({"quant_type": "int8_weight_only"}, "quant_method int8_weight_only"),
        ({"bits": 4, "group_size": 64}, "weights quantized for MLX (4 bits)"),
        ({}, "no quant_method"),
        ("gptq", '"gptq" (not an object)'),
    ]
    + [
        ({"quant_method": name}, f"quant_method {name}")
        for name in (
            *("fp8", "fbgemm_fp8", "compressed-tensors", "mxfp4", "quanto", "torchao", "eetq"),
            *("aqlm", "vptq", "higgs", "spqr", "bitnet", "quark", "auto-round", "modelopt"),
            *("exl2", "marlin", "metal", "sinq", "fp_quant", "something-new"),
        )
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_rejects_quantized_checkpoints(settings, words: str, nested: bool, model_folder: Path):
    value = {"quantization_config": settings}
    edit(model_folder / "config.json", **({"text_config": value} if nested else value))
    text = refusal(model_folder)
    where = "text_config.quantization_config" if nested else "quantization_config"
    assert f"{where} in config.json says {words}" in text
    assert "use the model's checkpoint without quantization" in text


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("quantization", {"group_size": 64, "bits": 4}),
        ("compression_config", {"quant_method": "compressed-tensors"}),
    ],
)
def test_rejects_quantization_in_other_fields(field: str, value: dict, model_folder: Path):
    edit(model_folder / "config.json", **{field: value})
    assert f"{field} in config.json says" in refusal(model_folder)


@pytest.mark.parametrize(
    "name", ["quantize_config.json", "quant_config.json", "hf_quant_config.json"]
)
def test_rejects_quantization_in_other_files(name: str, model_folder: Path):
    edit(model_folder / name, bits=4)
    assert f"{name} says that the weights are quantized" in refusal(model_folder)


def test_accepts_quantization_that_is_null(model_folder: Path):
    value = json.loads((model_folder / "config.json").read_text()) | {"quantization_config": None}
    (model_folder / "config.json").write_text(json.dumps(value))
    assert accepted(model_folder)


# Files of weights.


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("../x.safetensors", "names ../x.safetensors, but all weights should be in the folder"),
        ("/etc/passwd", "names /etc/passwd, but all weights should be in"),
        ("shards/x.safetensors", "names shards/x.safetensors, but all weights should be in"),
        ("", "weight_map should be an object that maps each tensor to its file"),
        (7, "weight_map should be an object that maps each tensor to its file"),
    ],
)
def test_rejects_index_that_names_other_folders(name: object, words: str, model_folder: Path):
    (model_folder / "shards").mkdir()
    shutil.copy(model_folder / SHARD, model_folder / "shards" / "x.safetensors")
    shutil.copy(model_folder / SHARD, model_folder.parent / "x.safetensors")
    edit(model_folder / INDEX, weight_map={"lm_head.weight": name})
    assert words in refusal(model_folder)


@pytest.mark.parametrize("value", [[], {}, "x"])
def test_rejects_index_without_files(value: object, model_folder: Path):
    (model_folder / INDEX).write_text(json.dumps({"weight_map": value}))
    assert "weight_map should be an object" in refusal(model_folder)


def test_rejects_shards_without_index(model_folder: Path):
    (model_folder / INDEX).rename(model_folder.parent / INDEX)
    assert f"has shards ({SHARD}) but no {INDEX}" in refusal(model_folder)
    (model_folder.parent / INDEX).rename(model_folder / INDEX)
    assert accepted(model_folder)


def test_counts_shards_that_are_missing_without_index(model_folder: Path):
    (model_folder / INDEX).unlink()
    (model_folder / SHARD).rename(model_folder / "model-00002-of-00004.safetensors")
    assert "and 3 of 4 shards are missing" in refusal(model_folder)


def test_counts_shards_that_are_missing_with_index(model_folder: Path):
    edit(model_folder / INDEX, weight_map={"a": "a.safetensors", "b": "b.safetensors", "c": SHARD})
    assert "names a.safetensors, which is missing (and 1 more)" in refusal(model_folder)


@pytest.mark.parametrize("name", ["llama.safetensors", "model.fp16.safetensors"])
def test_names_the_file_that_the_engines_read(name: str, model_folder: Path):
    (model_folder / INDEX).unlink()
    (model_folder / SHARD).rename(model_folder / name)
    assert f"has {name}, but the engines read model.safetensors; rename" in refusal(model_folder)
    (model_folder / name).rename(model_folder / "model.safetensors")
    assert accepted(model_folder)


@pytest.mark.parametrize("name", ["model.bin", "pytorch_model.fp16.bin"])
def test_names_the_pickle_that_the_engines_read(name: str, model_folder: Path):
    keep(model_folder, "config.json", "tokenizer.json")
    (model_folder / name).write_bytes(b"x")
    (model_folder / "training_args.bin").write_bytes(b"x")
    assert f"has {name}, but the engines read model.safetensors or pytorch_model.bin; rename" in (
        refusal(model_folder)
    )
    (model_folder / name).rename(model_folder / "pytorch_model.bin")
    assert accepted(model_folder)


def test_files_of_training_are_not_called_weights(model_folder: Path):
    keep(model_folder, "config.json", "tokenizer.json")
    for name in ("optimizer.pt", "rng_state.pth", "scheduler.pt", "training_args.bin"):
        (model_folder / name).write_bytes(b"x")
    assert "has no *.safetensors and no *.bin file; download the weights" in refusal(model_folder)


def test_quotes_the_command_for_a_git_lfs_pointer(model_folder: Path):
    folder = model_folder.rename(model_folder.with_name("it's my model"))
    (folder / SHARD).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    command = shlex.split(refusal(folder).partition("run: ")[2])
    assert command == ["git", "-C", str(folder), "lfs", "pull"]


def test_recognizes_ctranslate2(model_folder: Path):
    keep(model_folder, "config.json")
    for name in ("model.bin", "vocabulary.json"):
        (model_folder / name).write_bytes(b"x")
    assert "holds a model for CTranslate2 (model.bin); " in refusal(model_folder)


def test_rejects_weights_that_are_a_folder(model_folder: Path):
    keep(model_folder, "config.json", "tokenizer.json")
    (model_folder / "model.safetensors").mkdir()
    assert "has no *.safetensors and no *.bin file; download the weights" in refusal(model_folder)


def test_rejects_tensor_in_two_shards(model_folder: Path):
    other = "model-00002-of-00002.safetensors"
    shutil.copy(model_folder / SHARD, model_folder / other)
    edit(model_folder / INDEX, weight_map={"lm_head.weight": SHARD, "norm": other})
    assert f"{other}: holds the tensor lm_head.weight, which {SHARD} holds too" in (
        refusal(model_folder)
    )


def test_leaves_out_weights_that_transformers_does_not_read(model_folder: Path):
    """Shards that the index does not name, pickles and other forms of the same weights."""
    for name in (
        "model-00002-of-00002.safetensors",
        "pytorch_model.bin",
        "consolidated.safetensors",
    ):
        (model_folder / name).write_bytes(b"x")
    assert accepted(model_folder)
    weights = [p.name for p in weight_files(model_folder) if p.suffix != ".json"]
    assert weights == [SHARD]
    shutil.copy(model_folder / SHARD, model_folder / "model.safetensors")
    names = [p.name for p in weight_files(model_folder)]
    assert names[0] == "model.safetensors" and SHARD not in names and INDEX not in names


@pytest.mark.parametrize(
    ("architecture", "does"),
    [
        ("LlamaForSequenceClassification", "classifies texts"),
        ("BertForMaskedLM", "fills gaps in a text"),
        ("BertForQuestionAnswering", "marks answers in a text"),
        ("LlamaForTokenClassification", "classifies tokens"),
        ("T5EncoderModel", "makes embeddings"),
    ],
)
def test_rejects_architectures_that_generate_no_text(
    architecture: str, does: str, model_folder: Path
):
    edit(model_folder / "config.json", architectures=[architecture])
    assert f"architectures is {architecture}, which {does} and does not" in refusal(model_folder)


@pytest.mark.parametrize("value", ["LlamaForCausalLM", {"a": 1}, [1]])
def test_rejects_architectures_that_are_not_a_list_of_names(value: object, model_folder: Path):
    edit(model_folder / "config.json", architectures=value)
    assert "it should be a list of names" in refusal(model_folder)


# What only transformers knows. These tests import it, which takes seconds.


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from safetensors.torch import load_file
    from safetensors.torch import save_file as save

    from tests.tiny import LLAMA, random_model

    folder = random_model(tmp_path_factory.mktemp("refusals") / "tiny", LLAMA)
    tensors: dict = {}
    for path in folder.glob("*.safetensors*"):
        tensors |= load_file(path) if path.suffix == ".safetensors" else {}
        path.unlink()
    save(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def llama(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A complete checkpoint of two layers, which a test may damage."""
    monkeypatch.setattr("deploy.weights.checkpoint.CHECKED", tmp_path / "checked")
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def rewrite(folder: Path, change: Callable[[dict], dict]) -> None:
    """Change the tensors of a checkpoint."""
    from safetensors.torch import load_file
    from safetensors.torch import save_file as save

    path = folder / "model.safetensors"
    save(change(load_file(path)), path, metadata={"format": "pt"})


@pytest.mark.slow
def test_accepts_complete_checkpoint_in_silence(llama: Path, capfd):
    assert accepted(llama)
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("lm_head", "tensor lm_head.weight of LlamaForCausalLM is missing in the weights"),
        (".layers.1.", "and 6 more of LlamaForCausalLM are missing in the weights"),
        ("embed_tokens", "tensor model.embed_tokens.weight of LlamaForCausalLM is missing"),
        ("layers.0.self_attn.q_proj", "tensor model.layers.0.self_attn.q_proj.weight of"),
        ("model.norm", "tensor model.norm.weight of LlamaForCausalLM is missing"),
    ],
)
def test_rejects_missing_tensors(part: str, words: str, llama: Path, capfd):
    rewrite(llama, lambda tensors: {k: v for k, v in tensors.items() if part not in k})
    text = refusal(llama, capfd)
    assert words in text and "; download all files again" in text


@pytest.mark.slow
@pytest.mark.parametrize("form", ["shards", "pickle"])
def test_names_complete_weights_that_are_hidden_by_others(form: str, llama: Path):
    """transformers reads model.safetensors first, whatever else there is."""
    import torch
    from safetensors.torch import load_file

    whole = (llama / "model.safetensors").read_bytes()
    if form == "shards":
        shards(llama)
        (llama / "model.safetensors").write_bytes(whole)
    else:
        torch.save(load_file(llama / "model.safetensors"), llama / "pytorch_model.bin")
    rewrite(llama, lambda tensors: {k: v for k, v in tensors.items() if "lm_head" not in k})
    other = INDEX if form == "shards" else "pytorch_model.bin"
    assert f"remove model.safetensors if {other} is complete" in refusal(llama)
    (llama / "model.safetensors").unlink()
    assert accepted(llama)


@pytest.mark.slow
def test_accepts_head_that_is_tied_to_the_embedding(llama: Path):
    rewrite(llama, lambda tensors: {k: v for k, v in tensors.items() if "lm_head" not in k})
    edit(llama / "config.json", tie_word_embeddings=True)
    assert accepted(llama)


@pytest.mark.slow
def test_rejects_model_without_architectures_only_if_tensors_are_missing(llama: Path):
    edit(llama / "config.json", architectures=None)
    assert accepted(llama)
    rewrite(llama, lambda tensors: {k: v for k, v in tensors.items() if "lm_head" not in k})
    assert "tensor lm_head.weight of LlamaForCausalLM is missing" in refusal(llama)


def shards(folder: Path, listed: int = 2, kept: int = 2) -> None:
    """Split a checkpoint into two shards, list some in the index, and keep some."""
    from safetensors.torch import load_file
    from safetensors.torch import save_file as save

    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    places = {}
    for i in range(2):
        shard = f"model-{i + 1:05}-of-00002.safetensors"
        part = names[i::2]
        if i < kept:
            save({name: tensors[name] for name in part}, folder / shard, metadata={"format": "pt"})
        places |= dict.fromkeys(part if i < listed else [], shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


@pytest.mark.slow
def test_rejects_index_that_lists_fewer_shards_than_there_are(llama: Path):
    shards(llama, listed=1)
    assert "of LlamaForCausalLM are missing in the weights; download" in refusal(llama)


@pytest.mark.slow
def test_rejects_index_without_metadata(llama: Path):
    shards(llama)
    edit(llama / INDEX, metadata=None)
    assert 'has no object metadata, which transformers needs; write "metadata"' in refusal(llama)
    edit(llama / INDEX, metadata={})
    assert accepted(llama)


@pytest.mark.slow
def test_accepts_index_that_lists_fewer_tensors_than_its_shards_hold(llama: Path):
    """transformers reads whole shards, so the model is complete."""
    shards(llama)
    index = json.loads((llama / INDEX).read_text())
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if "layers.1" not in k}
    assert len({*index["weight_map"].values()}) == 2
    (llama / INDEX).write_text(json.dumps(index))
    assert accepted(llama)


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("damage", ["none", "missing", "truncated", "html", "code"])
def test_checkpoint_of_pickles(sharded: bool, damage: str, llama: Path, capfd, tmp_path: Path):
    import torch
    from safetensors.torch import load_file

    tensors = load_file(llama / "model.safetensors")
    (llama / "model.safetensors").unlink()
    if damage == "missing":
        del tensors["lm_head.weight"]
    name = "pytorch_model-00001-of-00001.bin" if sharded else "pytorch_model.bin"
    if sharded:
        places = {"metadata": {}, "weight_map": dict.fromkeys(tensors, name)}
        (llama / "pytorch_model.bin.index.json").write_text(json.dumps(places))
    torch.save(tensors, llama / name)
    data = (llama / name).read_bytes()
    if damage == "truncated":
        (llama / name).write_bytes(data[: len(data) // 2])
    if damage == "html":
        (llama / name).write_bytes(b"<html>404</html>")
    if damage == "code":
        torch.save({"lm_head.weight": Path(tmp_path / "planted")}, llama / name)
    if damage == "none":
        assert accepted(llama)
    else:
        text = refusal(llama, capfd)
        assert ("lm_head.weight" if damage == "missing" else "cannot load this model") in text


@pytest.mark.slow
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rejects_weights_that_are_not_numbers(llama: Path, value: float):
    """OpenVINO GenAI generates an empty text from them, and the self-check may not meet them."""

    def damage(tensors: dict) -> dict:
        tensors["model.embed_tokens.weight"][7, 3] = value
        return tensors

    rewrite(llama, damage)
    assert "the tensor model.embed_tokens.weight has values that are not numbers" in refusal(llama)


def test_rejects_format_before_anything_else(tmp_path: Path):
    with pytest.raises(UserError, match="format 'rar': use one of"):
        build_archive("mine", tmp_path / "nowhere", archive_format="rar")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"intermediate_size": 160}, "(and 5 more) has the shape 64 x 128 in the weights, but"),
        ({"vocab_size": 400}, "in the weights, but 400 x 64 by config.json"),
        ({"num_key_value_heads": 4}, "has the shape 32 x 64 in the weights, but 64 x 64 by"),
        ({"num_hidden_layers": 3}, "tensors model.layers.2.input_layernorm.weight, "),
        ({"num_hidden_layers": 1}, "are in the weights, but LlamaForCausalLM by config.json does"),
        ({"attention_bias": True}, "layers.0.self_attn.k_proj.bias, "),
    ],
)
def test_rejects_config_of_another_model(fields: dict, words: str, llama: Path, capfd):
    edit(llama / "config.json", **fields)
    assert words in refusal(llama, capfd)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_proj.bias", "model.layers.1.self_attn.q_norm.weight"]
)
def test_rejects_tensors_that_the_model_would_ignore(name: str, llama: Path):
    """A bias or a norm that config.json does not name: completions would be silently wrong."""
    rewrite(llama, lambda tensors: tensors | {name: tensors["model.norm.weight"].clone()})
    assert f"tensor {name} is in the weights, but LlamaForCausalLM by" in refusal(llama)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
        "model.layers.0.self_attn.rotary_emb.cos_cached",
        "model.layers.0.attn.bias",
        "model.layers.0.attention.masked_bias",
        "model.version",
        "mtp.layers.0.self_attn.q_proj.weight",
        "vision_tower.layers.0.self_attn.q_proj.weight",
        "score.weight",
    ],
)
def test_accepts_tensors_that_are_not_part_of_the_model(name: str, llama: Path):
    rewrite(llama, lambda tensors: tensors | {name: tensors["model.norm.weight"].clone()})
    assert accepted(llama)


@pytest.mark.slow
def test_accepts_layers_that_predict_several_tokens(llama: Path):
    """DeepSeek and GLM store them after the model's own layers; transformers does not use them."""

    def more(tensors: dict, number: int) -> dict:
        last = {k: v.clone() for k, v in tensors.items() if "layers.1." in k}
        return tensors | {k.replace("layers.1.", f"layers.{number}."): v for k, v in last.items()}

    rewrite(llama, lambda tensors: more(tensors, 2))
    assert "in the weights, but LlamaForCausalLM by config.json does not use them" in refusal(llama)
    edit(llama / "config.json", num_nextn_predict_layers=1)
    assert accepted(llama)
    rewrite(llama, lambda tensors: more(tensors, 3))
    assert "model.layers.3." in refusal(llama)


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["base_model.model.", "module.", "_orig_mod."])
def test_rejects_names_with_a_prefix(prefix: str, llama: Path):
    rewrite(llama, lambda tensors: {prefix + k: v for k, v in tensors.items()})
    assert f"the names of the tensors begin with {prefix!r}" in refusal(llama)
    rewrite(llama, lambda tensors: {k.removeprefix(prefix): v for k, v in tensors.items()})
    assert accepted(llama)


@pytest.mark.slow
@pytest.mark.parametrize("names", [["Llama9ForCausalLM"], None])
def test_rejects_type_that_transformers_does_not_know(names: list | None, llama: Path, capfd):
    edit(llama / "config.json", model_type="llama9", architectures=names)
    text = refusal(llama, capfd)
    assert "model_type is llama9, which transformers 5" in text and "write llama)" in text
    edit(llama / "config.json", model_type="llama")
    assert accepted(llama)


@pytest.mark.slow
@pytest.mark.parametrize("value", ["llama\n\nTraceback", "\x1b[31mred", "x" * 10_000, "\u202eab"])
def test_message_stays_on_one_line(value: str, llama: Path):
    """A value from a download can neither break the line nor control the terminal."""
    for fields in ({"model_type": value}, {"architectures": [f"{value}ForMaskedLM"]}):
        shutil.copy(llama / "config.json", llama.parent / "config.json")
        edit(llama / "config.json", **fields)
        with pytest.raises(UserError) as error:
            prepare("mine", llama, llama.parent / "target", engine={"name": "openvino"})
        assert str(error.value).isprintable() and len(str(error.value)) <= 1000
        shutil.copy(llama.parent / "config.json", llama / "config.json")


@pytest.mark.slow
def test_rejects_config_without_a_type(llama: Path):
    edit(llama / "config.json", model_type=None)
    assert '"model_type": "llama" into it' in refusal(llama)
    edit(llama / "config.json", model_type="llama")
    assert accepted(llama)


CODE = {"AutoConfig": "my.MyConfig", "AutoModelForCausalLM": "my.MyForCausalLM"}


@pytest.mark.slow
def test_rejects_the_models_own_code(llama: Path, monkeypatch, capfd):
    edit(llama / "config.json", model_type="mine", architectures=["Mine"], auto_map=CODE)
    edit(llama / "config.json", architectures=["MyForCausalLM"])
    (llama / "my.py").write_text("raise SystemExit('ran')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asks whether to run the code"))
    text = refusal(llama, capfd)
    assert "needs code from the model's repository (auto_map), and trust_remote_code is" in text
    assert "because that code would run with the server's permissions" in text


@pytest.mark.slow
def test_code_of_a_known_type_does_not_run(llama: Path, capsys):
    """transformers' own class serves the model; the archive leaves the code out."""
    edit(llama / "config.json", auto_map=CODE)
    (llama / "my.py").write_text("raise SystemExit('ran')")
    assert accepted(llama)
    assert "leaving out my.py" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "bert", "architectures": None}, "model_type is bert, an encoder, which"),
        ({"model_type": "bert", "architectures": ["BertLMHeadModel"]}, "an encoder, which fills"),
        ({"model_type": "t5", "architectures": None}, "does not load as a model that generates"),
        ({"model_type": "t5", "architectures": ["T5WithLMHeadModel"]}, "t5 (T5WithLMHeadModel), "),
        (
            {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
            "is not served as",
        ),
        ({"model_type": "llava", "architectures": None}, "does not load as a model that generates"),
        (
            {"model_type": "clip", "architectures": ["CLIPModel"]},
            "is not served as a text-generation model",
        ),
        ({"model_type": "whisper", "architectures": None, "is_encoder_decoder": True}, "decoder"),
        ({"model_type": "bart", "architectures": None, "is_encoder_decoder": True}, "decoder"),
        ({"architectures": ["LlamaModel"]}, "architectures is LlamaModel, which is not served as"),
        ({"model_type": ["llama"]}, "model_type is ['llama'], not a name"),
        ({"hidden_size": "64"}, "cannot load this model ("),
        ({"num_attention_heads": 5}, "is not a multiple of the number of attention heads (5)"),
        ({"rope_parameters": 7}, "cannot load this model ("),
        ({"rope_parameters": {"rope_type": "foo"}}, "cannot load this model (KeyError 'foo')"),
        ({"num_hidden_layers": "2"}, "Field 'num_hidden_layers' expected int, got str"),
        ({"pad_token_id": 10**6}, "cannot load this model (Padding_idx must be within"),
        ({"_attn_implementation": "flash_attention_2"}, "cannot load this model (FlashAttention2"),
        ({"layer_types": ["full_attention"]}, "cannot load this model ("),
        ({"dtype": "float99"}, "cannot load this model ("),
        ({"hidden_act": "nope"}, "cannot load this model ("),
    ],
)
def test_rejects_models_that_are_not_served(fields: dict, words: str, llama: Path, capfd):
    edit(llama / "config.json", **fields)
    assert words in refusal(llama, capfd)


@pytest.mark.slow
def test_a_folder_that_has_passed_is_not_checked_again(llama: Path, monkeypatch):
    assert accepted(llama)
    monkeypatch.setattr("deploy.weights.checkpoint._check", lambda _: pytest.fail("checked again"))
    assert accepted(llama)
    with pytest.raises(pytest.fail.Exception):
        edit(llama / "config.json", torch_dtype="float32")
        accepted(llama)


@pytest.mark.slow
@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("equal", [False, True])
def test_accepts_tied_head_that_is_stored_too(pickled: bool, equal: bool, llama: Path, capfd):
    """Pickles always hold both; transformers ties them only if they are equal."""
    import torch
    from safetensors.torch import load_file

    edit(llama / "config.json", tie_word_embeddings=True)
    if equal:
        rewrite(llama, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    if pickled:
        torch.save(load_file(llama / "model.safetensors"), llama / "pytorch_model.bin")
        (llama / "model.safetensors").unlink()
    assert accepted(llama) and capfd.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("dtype", ["int8", "uint8", "bool", "float8_e4m3fn", "int64"])
def test_rejects_weights_that_are_not_floating_point(dtype: str, pickled: bool, llama: Path):
    """transformers would cast the numbers without their scales."""
    import torch
    from safetensors.torch import load_file

    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(llama, lambda t: t | {name: t[name].to(getattr(torch, dtype))})
    if pickled:
        torch.save(load_file(llama / "model.safetensors"), llama / "pytorch_model.bin")
        (llama / "model.safetensors").unlink()
    assert f"the tensor {name} is stored as {dtype}, and config.json has no" in refusal(llama)
    rewrite(llama, lambda t: t | {name: t[name].half()}) if not pickled else None
    assert pickled or accepted(llama)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_accepts_floating_point_of_any_size(dtype: str, llama: Path):
    import torch

    rewrite(llama, lambda t: {k: v.to(getattr(torch, dtype)) for k, v in t.items()})
    assert accepted(llama)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("mistral", "LlamaForCausalLM"),
        ("gemma", "LlamaForCausalLM"),
        ("llama", "GemmaForCausalLM"),
        ("llama", "Qwen3ForCausalLM"),
    ],
)
def test_rejects_type_and_architecture_that_differ(kind: str, name: str, llama: Path):
    """Some have the same tensors: Gemma's weights would load as Llama's and generate nonsense."""
    edit(llama / "config.json", model_type=kind, architectures=[name])
    assert f"model_type is {kind} ({name}), but the class of model_type {kind} is " in (
        refusal(llama)
    )
    edit(llama / "config.json", model_type="llama", architectures=["LlamaForCausalLM"])
    assert accepted(llama)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["expert", "layer", "fewer", "int8"])
def test_rejects_incomplete_experts(damage: str, tmp_path: Path, monkeypatch, capfd):
    """transformers joins the experts of a layer into one tensor when it loads them."""
    import torch

    from tests.families.models import write_family

    monkeypatch.setattr("deploy.weights.checkpoint.CHECKED", tmp_path / "checked")
    folder = tmp_path / "mixtral"
    write_family(folder, "mixtral")
    (path,) = folder.glob("*.safetensors")
    path.rename(folder / "model.safetensors")
    assert accepted(folder)
    expert = "layers.0.block_sparse_moe.experts.0.w1.weight"

    def change(tensors: dict) -> dict:
        name = next(name for name in tensors if name.endswith(expert))
        if damage == "int8":
            tensors[name] = tensors[name].to(torch.int8)
        if damage == "expert":
            del tensors[name]
        return {k: v for k, v in tensors.items() if damage != "layer" or "layers.1." not in k}

    rewrite(folder, change)
    if damage == "fewer":
        edit(folder / "config.json", num_local_experts=2)
    capfd.readouterr()
    words = {"expert": "experts", "layer": "layers.1.", "fewer": "by config.json", "int8": "int8"}
    assert words[damage] in refusal(folder, capfd)


# Repositories on the Hub: refused before the weights are downloaded.

FETCH = """
import sys
from pathlib import Path
from deploy.common.paths import ROOT, UserError
from deploy.weights.hub import fetch_snapshot
from handler.config import HubWeights
weights = HubWeights(source="hub", repo="me/mine", revision="0" * 40, license="mit")
try:
    fetch_snapshot(weights, Path(sys.argv[1]))
except UserError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("files", "words"),
    [
        (
            {"config.json": {"quantization_config": {"quant_method": "gptq", "bits": 4}}},
            "me/mine: quantization_config in config.json says quant_method gptq (4 bits), ",
        ),
        ({"adapter_config.json": LORA}, "me/mine: holds a LORA adapter for meta/llama"),
        ({"config.json": {"eos_token_id": -1}}, "me/mine/config.json: eos_token_id is -1; "),
        ({"README.md": {}}, "me/mine: has no config.json; download it from the same repository"),
    ],
)
def test_rejects_repository_before_its_weights_are_downloaded(files, words, tmp_path: Path):
    (repository := tmp_path / "repository").mkdir()
    for name, content in files.items():
        (repository / name).write_text(json.dumps(content))
    (repository / "model.safetensors").write_bytes(b"0" * 1_000_000)
    with Hub(repository, "me/mine", "0" * 40) as hub:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
        command = [sys.executable, "-c", FETCH, str(tmp_path / "out")]
        run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
        assert not [request for request in hub.requests if "safetensors" in request]
    assert run.stdout.startswith(words) and run.stdout.count("\n") == 1, run.stderr


@pytest.mark.slow
def test_mxfp4_is_accepted_and_dequantized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """gpt-oss: transformers turns the blocks into bfloat16 by itself."""
    import torch
    from safetensors.torch import load_file
    from safetensors.torch import save_file as save

    from handler.config import engine_config
    from handler.engine.loading import load_model
    from tests.families.models import write_family

    monkeypatch.setattr("deploy.weights.checkpoint.CHECKED", tmp_path / "checked")
    folder = tmp_path / "gpt-oss"
    write_family(folder, "gpt_oss")
    (file,) = folder.glob("*.safetensors")
    tensors, wanted = load_file(file), {}
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        generator = torch.Generator().manual_seed(0)
        sizes = (experts, outputs, inputs // 32)
        blocks = torch.randint(256, (*sizes, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(120, 124, sizes, dtype=torch.uint8, generator=generator)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        pairs = torch.stack([values[(blocks & 15).long()], values[(blocks >> 4).long()]], -1)
        exact = pairs.reshape(*sizes, 32) * torch.exp2(scales.float() - 127)[..., None]
        wanted[name] = exact.reshape(experts, outputs, inputs).transpose(1, 2)
    assert wanted
    save(tensors, file, metadata={"format": "pt"})
    edit(folder / "config.json", quantization_config={"quant_method": "mxfp4"})
    prepare("mine", folder, tmp_path / "target", engine={"name": "transformers"})
    model = load_model(folder, engine_config(name="transformers").transformers).state_dict()
    for name, tensor in wanted.items():
        assert torch.equal(model[name].float(), tensor)
