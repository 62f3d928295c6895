"""Loading a checkpoint into the transformers engine: missing tensors, memory, ids, context."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from deploy.archive.export import export
from handler.config import engine_config
from handler.engine import PromptError, Sampling, create_engine, loading
from tests import tiny
from tests.families.models import write_family

pytestmark = pytest.mark.slow


@pytest.fixture
def weights(tmp_path):
    return write_family(tmp_path / "model", "llama")


def change(weights, function):
    """Change the stored tensors, and return their file."""
    file = weights / "model.safetensors"
    tensors = load_file(file)
    function(tensors)
    save_file(tensors, file, {"format": "pt"})
    return file


def write(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def load(weights, **settings):
    return create_engine(weights, engine_config(name="transformers", **settings))


@pytest.mark.parametrize(
    ("removed", "named"),
    [
        ("lm_head", "are missing in the weights: lm_head.weight;"),
        ("model.layers.1.", "are missing in the weights: model.layers.1.input_layernorm.weight, "),
        ("model.layers.0.mlp.up", "are missing in the weights: model.layers.0.mlp.up_proj.weight"),
        ("model.embed_tokens", "are missing in the weights: model.embed_tokens.weight"),
    ],
)
def test_load_rejects_missing_tensors(weights, removed, named):
    def remove(tensors):
        for name in [name for name in tensors if name.startswith(removed)]:
            del tensors[name]

    change(weights, remove)
    with pytest.raises(ValueError, match=named):
        load(weights)


def test_head_that_is_tied_to_the_embedding_is_not_missing(weights):
    change(weights, lambda tensors: tensors.pop("lm_head.weight"))
    write(weights / "config.json", tie_word_embeddings=True)
    assert load(weights)


def test_tensors_of_another_shape_are_named(weights):
    write(weights / "config.json", intermediate_size=64)
    with pytest.raises(ValueError, match=r"have a different shape .*: model\.layers\.0\.mlp"):
        load(weights)


@pytest.mark.parametrize("self_check", [True, False])
def test_model_whose_logits_are_not_numbers_is_not_served(weights, self_check):
    change(weights, lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    with pytest.raises(ValueError, match="logits are not numbers"):
        load(weights, self_check=self_check)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["float16", "bin", "both", "no dtype", "odd dtype", "4 bits"])
def test_memory_is_checked_for_the_size_after_loading(weights, monkeypatch, layout, dtype):
    parameters = sum(tensor.numel() for tensor in load_file(weights / "model.safetensors").values())
    expected = parameters * getattr(torch, dtype).itemsize
    file = weights / "model.safetensors"
    if layout == "float16":
        change(weights, lambda ts: ts.update({name: t.half() for name, t in ts.items()}))
    elif layout in ("bin", "both"):
        torch.save(load_file(file), weights / "pytorch_model.bin")
        if layout == "bin":
            file.unlink()
    elif layout == "no dtype":
        write(weights / "config.json", dtype=None)
    elif layout == "odd dtype":
        write(weights / "config.json", dtype="auto")
    else:
        change(weights, lambda ts: ts.update(packed=torch.zeros(1000, dtype=torch.uint8)))
        write(weights / "config.json", quantization_config={"quant_method": "mxfp4"})
        expected += 2000 * torch.bfloat16.itemsize
    sizes = []
    monkeypatch.setattr(loading, "check_memory", lambda _, parts, **__: sizes.append(parts))
    loading._check_memory(weights, engine_config(transformers={"dtype": dtype}).transformers)
    assert sizes == [{"the model": expected}]


@pytest.mark.parametrize("name", ["transformers", "openvino"])
def test_token_without_an_embedding_fails_only_its_request(weights, tmp_path, name):
    tokenizer = tiny.ascii_tokenizer()
    tokenizer.add_tokens(["<|think|>"])  # and nobody resized the model
    tokenizer.save_pretrained(weights)
    config = engine_config(name=name, self_check=False, openvino={"precision": "fp16"})
    engine = create_engine(
        export(weights, config, tmp_path) if name == "openvino" else weights, config
    )
    engine.submit("other", "Hello", Sampling(max_new_tokens=5, ignore_eos=True), stream=False)
    engine.advance(0)
    rejected = r"has the token '<\|think\|>' with the id 96, .* ids end at 95"
    with pytest.raises(PromptError, match=rejected):
        engine.submit("bad", "<|think|> hi", Sampling(), stream=False)
    while not (done := [p for p in engine.advance(0.1) if p.finish_reason]):
        pass
    assert [(p.key, p.finish_reason) for p in done] == [("other", "length")]


def test_chat_template_that_writes_a_token_without_an_embedding_fails_only_chat(weights):
    tokenizer = tiny.ascii_tokenizer()
    tokenizer.add_tokens(["<|turn|>"], special_tokens=True)
    tokenizer.chat_template = "{{ messages[0]['content'] }}<|turn|>"
    tokenizer.save_pretrained(weights)
    engine = load(weights)
    chat = engine.chat_prompt([{"role": "user", "content": "Hello"}])
    with pytest.raises(PromptError, match=r"has the token '<\|turn\|>' with the id 96"):
        engine.submit("chat", chat, Sampling(), stream=False)
    assert engine.submit("plain", "Hello", Sampling(max_new_tokens=1), stream=False) == 5
    while engine.unfinished:
        assert all(p.finish_reason in (None, "length") for p in engine.advance(0.1))


def test_ids_that_the_tokenizer_does_not_know_have_no_text(weights):
    """Many models have more rows than tokens, for speed, and any row can be sampled."""
    rows = torch.zeros(32, 64)

    def pad(tensors):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = torch.cat([tensors[name], rows])

    change(weights, pad)
    write(weights / "config.json", vocab_size=96 + len(rows))
    engine = load(weights)
    forward = engine._forward

    def unknown_ids(ids, mask, cache):
        logits = forward(ids, mask, cache).clone()
        logits[:, :96] = logits.min() - 1
        return logits

    engine._forward = unknown_ids
    engine.submit("a", "Hello", Sampling(max_new_tokens=9, ignore_eos=True), stream=True)
    while not (done := [p for p in engine.advance(0.1) if p.finish_reason]):
        pass
    assert [(p.text, p.completion_tokens, p.finish_reason) for p in done] == [("", 9, "length")]


def test_longrope_is_served_in_its_short_range_only(tmp_path):
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    architecture = tiny.LLAMA | {"rope_scaling": rope, "original_max_position_embeddings": 64}
    engine = load(tiny.random_model(tmp_path / "longrope", architecture))
    assert engine.max_context == 64 and "context 64" in engine.description
    with pytest.raises(PromptError, match="at most 63 fit"):
        engine.submit("long", "x" * 64, Sampling(), stream=False)
