"""The tokenizer in an archive: equal to transformers' for its folder, or refused in seconds."""

import base64
import json
import random
import re
import shlex
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors

from deploy.archive.build import prepare
from deploy.archive.tokenizer import difference, tokenizer_files, with_tokenizer
from deploy.common.paths import UserError
from handler.engine.folder import ModelFolder
from handler.engine.text import TextStream
from tests import vocabularies
from tests.vocabularies import CHATML, LLAMA_2, byte_level, sentencepiece, write_tokenizer

pytestmark = pytest.mark.slow

TEXTS = [
    "Once upon a time",
    " leading",
    "trailing ",
    "  two  spaces",
    "a\n\nb",
    "Zażółć 東京 🎉👩\u200d👩\u200d👧",
    "<|im_start|>user\nhi<|im_end|>",
    "<s>[INST] hi [/INST]</s>",
    "",
    "don't . stop ! It ' s",
    "\ufffd x e\u0301 é",
    "<|think|> hi <|think|>",
    "one two three four five six seven eight nine ten eleven twelve",
]
THINK = {"content": "<|think|>", "special": True, "normalized": False}
THINK |= {"lstrip": False, "rstrip": False, "single_word": False}
WRITES_START = "{{ bos_token }}" + CHATML
Write = Callable[[Path], object]


def layout(make: Callable[[], Tokenizer], patch: Write | None = None, **settings: object) -> Write:
    """Return a function that writes a folder with this tokenizer, changed by `patch`."""

    def write(folder: Path) -> None:
        write_tokenizer(folder, make(), **settings)
        if patch:
            patch(folder)

    return write


def settings_of(name: str, **settings: object) -> Write:
    """Return a patch that changes a JSON file; None removes an entry."""

    def patch(folder: Path) -> None:
        path = folder / name
        content = json.loads(path.read_text()) if path.exists() else {}
        content = {k: v for k, v in (content | settings).items() if v is not None}
        path.write_text(json.dumps(content))

    return patch


def stored(change: Callable[[Tokenizer], object]) -> Write:
    """Return a patch that changes tokenizer.json."""

    def patch(folder: Path) -> None:
        path = folder / "tokenizer.json"
        tokenizer = Tokenizer.from_file(str(path))
        change(tokenizer)
        tokenizer.save(str(path))

    return patch


def without_json(**files: Callable[[dict], str]) -> Write:
    """Return a patch that writes files from tokenizer.json's content, and removes it."""

    def patch(folder: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        for name, make in files.items():
            (folder / name.replace("_", ".")).write_text(make(content["model"]))
        (folder / "tokenizer.json").unlink()

    return patch


def merges(model: dict) -> str:
    return "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]) + "\n"


def both(*patches: Write) -> Write:
    return lambda folder: [patch(folder) for patch in patches]


def llama(scheme: str, tokenizer_class: str, **settings: object) -> Write:
    return layout(
        lambda: sentencepiece(scheme),
        tokenizer_class=tokenizer_class,
        **({"template": LLAMA_2} | settings),
    )


ADDED = {"added_tokens_decoder": {"500": THINK}}
LAYOUTS: dict[str, Write] = {
    **{f"kind: {name}": layout(make) for name, make in vocabularies.KINDS.items()},
    **{
        f"{scheme}, {name}": llama(scheme, name)
        for scheme in ("normalizer", "first", "always", "never", "gemma")
        for name in ("PreTrainedTokenizerFast", "LlamaTokenizerFast", "LlamaTokenizer")
    },
    "Llama, legacy": llama("normalizer", "LlamaTokenizer", legacy=True),
    "Llama, not legacy": llama("normalizer", "LlamaTokenizerFast", legacy=False),
    "Llama, no prefix": llama("normalizer", "LlamaTokenizer", add_prefix_space=False),
    "Llama, tags of a template": llama(
        "normalizer",
        "LlamaTokenizerFast",
        template="{% for m in messages %}<|user|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}",
    ),
    "Llama, no class named": layout(sentencepiece, tokenizer_class=None),
    "Mistral": llama("normalizer", "LlamaTokenizer", model_type="mistral"),
    "Mixtral, legacy": llama("normalizer", "LlamaTokenizer", model_type="mixtral", legacy=True),
    "Phi-3": llama("normalizer", "LlamaTokenizer", model_type="phi3", legacy=False),
    "Gemma": layout(
        lambda: sentencepiece("gemma"),
        tokenizer_class="GemmaTokenizer",
        model_type="gemma",
        template=WRITES_START,
        pad_token="<pad>",
    ),
    "model type that transformers does not know": layout(byte_level, model_type="unheard-of"),
    **{
        f"bytes, {name} of {kind}": layout(byte_level, tokenizer_class=name, model_type=kind)
        for name, kind in [
            ("GPT2Tokenizer", "gpt2"),
            ("GPT2TokenizerFast", "opt"),
            ("Qwen2Tokenizer", "qwen2"),
            ("Qwen2TokenizerFast", "llama"),
            ("GPTNeoXTokenizerFast", "gpt_neox"),
            ("BloomTokenizerFast", "bloom"),
            ("CohereTokenizerFast", "cohere"),
            ("CodeGenTokenizer", "codegen"),
            ("PreTrainedTokenizer", "llama"),
            ("TokenizersBackend", "llama"),
            ("NoSuchTokenizer", "llama"),
        ]
    },
    "start token by the tokenizer": layout(lambda: byte_level(start=True)),
    "start token by tokenizer and template": layout(
        lambda: byte_level(start=True), template=WRITES_START
    ),
    "end token by the tokenizer": layout(lambda: byte_level(end=True)),
    "both by the tokenizer, both in the template": layout(
        lambda: byte_level(start=True, end=True), template=WRITES_START + "{{ eos_token }}"
    ),
    "add_bos_token, class that ignores it": layout(byte_level, add_bos_token=True),
    "add_bos_token, GPT-2": layout(
        byte_level, tokenizer_class="GPT2Tokenizer", model_type="gpt2", add_bos_token=True
    ),
    "add_bos_token, Llama": layout(
        lambda: sentencepiece(start=False),
        tokenizer_class="LlamaTokenizer",
        add_bos_token=True,
        add_eos_token=False,
    ),
    "add_bos_token false, Llama": llama("normalizer", "LlamaTokenizer", add_bos_token=False),
    "add_eos_token, Llama": llama("normalizer", "LlamaTokenizer", add_eos_token=True),
    "truncation": layout(byte_level, stored(lambda t: t.enable_truncation(6))),
    "truncation from the left": layout(
        sentencepiece, stored(lambda t: t.enable_truncation(6, direction="left"))
    ),
    "truncation, rebuilt class": layout(
        sentencepiece, stored(lambda t: t.enable_truncation(6)), tokenizer_class="LlamaTokenizer"
    ),
    "padding": layout(byte_level, stored(lambda t: t.enable_padding(pad_id=0, length=32))),
    "padding to a multiple": layout(
        byte_level, stored(lambda t: t.enable_padding(pad_to_multiple_of=8, direction="left"))
    ),
    "truncation and padding": layout(
        byte_level, stored(lambda t: (t.enable_truncation(8), t.enable_padding(length=8)))
    ),
    "padding names the token of templates": layout(
        byte_level,
        stored(lambda t: t.enable_padding(pad_id=2, pad_token="</s>", length=9)),
        template="{{ pad_token }}" + CHATML,
    ),
    "special_tokens_map.json alone": layout(
        byte_level,
        settings_of("special_tokens_map.json", bos_token="<s>", eos_token="</s>"),
        template="{{ bos_token }}{{ eos_token }}" + CHATML,
        bos_token=None,
        eos_token=None,
    ),
    "special_tokens_map.json overrides": layout(
        byte_level,
        settings_of("special_tokens_map.json", eos_token={"content": "<|im_end|>"}),
        template=CHATML + "{{ eos_token }}",
    ),
    "special_tokens_map.json does not override": layout(
        byte_level,
        settings_of("special_tokens_map.json", eos_token="<|im_end|>"),
        template=CHATML + "{{ eos_token }}",
        added_tokens_decoder={},
    ),
    "tokens in tokenizer_config.json alone": layout(
        byte_level, template="<|think|>" + CHATML, **ADDED
    ),
    "tokens in tokenizer_config.json alone, Llama": llama(
        "normalizer", "LlamaTokenizer", template="<|think|>" + CHATML, **ADDED
    ),
    "tokens in added_tokens.json alone": layout(
        byte_level,
        settings_of("added_tokens.json", **{"<|think|>": 500}),
        template="<|think|>" + CHATML,
    ),
    "tokens in additional_special_tokens alone": layout(
        byte_level, additional_special_tokens=["<|think|>"]
    ),
    "tokens in extra_special_tokens alone": layout(byte_level, extra_special_tokens=["<|think|>"]),
    "pad token that the vocabulary lacks": layout(byte_level, pad_token="<pad>"),
    "end token that the vocabulary lacks": layout(byte_level, eos_token="<|think|>"),
    "tokens that strip and normalize": layout(
        byte_level,
        stored(
            lambda t: t.add_tokens(
                [
                    AddedToken("<|think|>", lstrip=True, rstrip=True),
                    AddedToken("hi", single_word=True, normalized=True),
                ]
            )
        ),
    ),
    "end token as an object": layout(
        byte_level,
        eos_token={"__type": "AddedToken"} | THINK | {"content": "</s>"},
        template=CHATML + "{{ eos_token }}",
    ),
    "sep, cls and mask": layout(
        byte_level,
        sep_token="<s>",
        cls_token="</s>",
        mask_token="<unk>",
        template="{{ sep_token }}{{ cls_token }}{{ mask_token }}" + CHATML,
    ),
    "tokens of the model's own": layout(
        byte_level,
        image_token="<|im_end|>",
        extra_special_tokens={"audio_token": "<s>"},
        template="{{ image_token }}{{ audio_token }}" + CHATML,
    ),
    "tokens of the model's own, saved by transformers 5": layout(
        byte_level,
        model_specific_special_tokens={"image_token": "<|im_end|>"},
        template="{{ image_token }}" + CHATML,
    ),
    "splits special tokens": layout(byte_level, split_special_tokens=True),
    "cleans up": layout(byte_level, clean_up_tokenization_spaces=True),
    "cleans up words": layout(vocabularies.word_piece, clean_up_tokenization_spaces=True),
    "cleans up bytes": layout(sentencepiece, clean_up_tokenization_spaces=True),
    "vocab.json and merges.txt": layout(
        byte_level,
        without_json(vocab_json=lambda m: json.dumps(m["vocab"]), merges_txt=merges),
        tokenizer_class="GPT2Tokenizer",
        model_type="gpt2",
    ),
    "vocab.json and merges.txt, Qwen2": layout(
        byte_level,
        without_json(vocab_json=lambda m: json.dumps(m["vocab"]), merges_txt=merges),
        tokenizer_class="Qwen2Tokenizer",
        model_type="qwen2",
    ),
    "vocab.txt": layout(
        vocabularies.word_piece,
        without_json(vocab_txt=lambda m: "\n".join(sorted(m["vocab"], key=m["vocab"].get))),
        tokenizer_class="BertTokenizer",
        model_type="bert",
    ),
    "normalizer of Unicode": layout(
        byte_level, stored(lambda t: setattr(t, "normalizer", normalizers.NFKC()))
    ),
    "lower case": layout(
        byte_level, stored(lambda t: setattr(t, "normalizer", normalizers.Lowercase()))
    ),
    "digits one by one": layout(
        byte_level,
        stored(
            lambda t: setattr(
                t,
                "pre_tokenizer",
                pre_tokenizers.Sequence(
                    [
                        pre_tokenizers.Digits(individual_digits=True),
                        pre_tokenizers.ByteLevel(add_prefix_space=False),
                    ]
                ),
            )
        ),
    ),
    "GPT-2's repository": layout(
        byte_level,
        both(
            without_json(vocab_json=lambda m: json.dumps(m["vocab"]), merges_txt=merges),
            settings_of("special_tokens_map.json", eos_token="</s>"),
            lambda folder: (folder / "tokenizer_config.json").unlink(),
        ),
        model_type="gpt2",
    ),
    "tokens in files of an older format": layout(
        byte_level,
        both(
            without_json(vocab_json=lambda m: json.dumps(m["vocab"]), merges_txt=merges),
            settings_of("added_tokens.json", **{"<|think|>": 501, "<x>": 500}),
        ),
        tokenizer_class="GPT2Tokenizer",
        model_type="gpt2",
    ),
    "ids of added tokens in another order": layout(
        byte_level, settings_of("added_tokens.json", **{"<c>": 502, "<|think|>": 500, "<b>": 501})
    ),
    "ids of added tokens with a gap": layout(
        byte_level, settings_of("added_tokens.json", **{"<|think|>": 700})
    ),
    "ids that the vocabulary gives to other tokens": layout(
        byte_level, added_tokens_decoder={"777": THINK, "3": THINK | {"content": "<x>"}}
    ),
    "start token that the vocabulary lacks, in the template": llama(
        "normalizer", "LlamaTokenizer", bos_token="<bos>", template=WRITES_START
    ),
    "splits special tokens, Llama": llama(
        "normalizer", "LlamaTokenizer", split_special_tokens=True
    ),
    "prefix space, GPT-2": layout(
        byte_level, tokenizer_class="GPT2Tokenizer", model_type="gpt2", add_prefix_space=True
    ),
    "processor of RoBERTa": layout(
        byte_level,
        stored(
            lambda t: setattr(
                t, "post_processor", processors.RobertaProcessing(("</s>", 2), ("<s>", 1))
            )
        ),
    ),
    "extra special tokens as objects": layout(
        byte_level, extra_special_tokens=[{"__type": "AddedToken"} | THINK]
    ),
    "short model_max_length": layout(
        byte_level, model_max_length=8, truncation_side="left", padding_side="left"
    ),
    "custom code that is not needed": layout(
        byte_level, auto_map={"AutoTokenizer": ["own.Slow", "own.Fast"]}
    ),
}


@pytest.fixture(params=LAYOUTS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    LAYOUTS[request.param](tmp_path / "model")
    return tmp_path / "model"


def archived(folder: Path, cache: Path | None = None) -> ModelFolder:
    """Read a folder as the engines do, after `make archive`."""
    made = folder.parent / "archived"
    made.mkdir()
    for path in tokenizer_files(folder, cache or folder.parent / "cache"):
        shutil.copy(path, made)
    shutil.copy(folder / "config.json", made)
    return ModelFolder(made)


def reference(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_archive_reads_and_decodes_as_transformers(folder: Path):
    """The same ids and text: of prompts, of chats, and of random tokens in a stream."""
    ours, theirs = archived(folder), reference(folder)
    for text in TEXTS:
        assert ours.encode(text) == theirs(text)["input_ids"]
    if theirs.chat_template:
        options = {"add_generation_prompt": True}
        for text in TEXTS:
            content = re.sub(r"<s>|</s>|<\|", "", text)  # control tokens are text in messages
            chat = [{"role": "user", "content": content}]
            prompt = ours.chat_prompt(chat)
            assert prompt == theirs.apply_chat_template(chat, tokenize=False, **options)
            expected = theirs.apply_chat_template(chat, return_dict=False, **options)
            assert ours.encode(prompt) == expected
            trusting = ours.encode(prompt.trusting_users())
            assert trusting == expected, "special_tokens_in_content: control"
    choices = random.Random(0)
    for _ in range(40):
        prompt_ids = theirs(choices.choice(TEXTS[:2]))["input_ids"]
        ids = [choices.randrange(3, len(theirs) + 20) for _ in range(30)]
        whole = theirs.decode(prompt_ids + ids, skip_special_tokens=True)
        whole = whole[len(theirs.decode(prompt_ids, skip_special_tokens=True)) :]
        for at_once in (True, False):
            stream = TextStream(ours.decode, prompt_ids, [], at_once=at_once)
            assert "".join([*map(stream.push, ids), stream.finish()]) == whole


def test_archive_has_no_other_file_of_the_tokenizer(tmp_path: Path):
    """An engine could prefer another tokenizer in the folder, such as vocab.json, to ours."""
    folder = write_tokenizer(tmp_path / "m", byte_level())
    for name in ("vocab.json", "merges.txt", "added_tokens.json", "tokenizer.model"):
        (folder / name).write_text("{}")
    (folder / "model.safetensors").write_text("")
    files = with_tokenizer(list(folder.iterdir()), tokenizer_files(folder, tmp_path / "cache"))
    names = sorted(path.name for path in files)
    expected = ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]
    assert names == [*expected, "tokenizer_config.json"]


LOST: dict[str, Write] = {
    **{
        f"bytes, {name}": layout(byte_level, tokenizer_class=name)
        for name in ("LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer")
    },
    "bytes, no class named": layout(byte_level, tokenizer_class=None),
    "bytes, no tokenizer_config.json": layout(
        byte_level, lambda folder: (folder / "tokenizer_config.json").unlink()
    ),
    "sentencepiece, GPT2Tokenizer": layout(sentencepiece, tokenizer_class="GPT2Tokenizer"),
    "words, LlamaTokenizer": layout(vocabularies.word_piece, tokenizer_class="LlamaTokenizer"),
}


@pytest.mark.parametrize("write", LOST.values(), ids=LOST)
def test_uses_tokenizer_json_alone_if_transformers_loses_text(
    tmp_path: Path, write: Write, capsys: pytest.CaptureFixture
):
    """transformers drops every space of such files, for example of DeepSeek-R1-Distill-Llama."""
    write(folder := tmp_path / "model")
    ours, plain = archived(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in TEXTS:
        assert ours.encode(text) == plain.encode(text).ids
        assert ours.decode(ours.encode(text)) == plain.decode(plain.encode(text).ids)
    assert "using tokenizer.json without" in capsys.readouterr().out


def test_deepseek_is_read_as_transformers_reads_it(tmp_path: Path):
    """transformers knows that this model type does not use SentencePiece."""
    settings = {"tokenizer_class": "LlamaTokenizerFast", "model_type": "deepseek_v3"}
    folder = write_tokenizer(tmp_path / "model", byte_level(), **settings)
    ours, theirs = archived(folder), reference(folder)
    assert all(ours.encode(text) == theirs(text)["input_ids"] for text in TEXTS)


def only(name: str, content: bytes = b"{}") -> Write:
    def write(folder: Path) -> None:
        write_tokenizer(folder, byte_level())
        (folder / "tokenizer.json").unlink()
        (folder / name).write_bytes(content)

    return write


def nothing(folder: Path) -> None:
    only("x")(folder)
    (folder / "tokenizer_config.json").unlink()


SPM = b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02"
TIKTOKEN = b"".join(base64.b64encode(bytes([i])) + f" {i}\n".encode() for i in range(256))
REFUSED: dict[str, tuple[Write, str]] = {
    "no tokenizer": (nothing, "has no tokenizer; copy the tokenizer.json of the same model"),
    "tokenizer_config.json alone": (only("x"), "has no tokenizer; copy"),
    "tokenizer.model": (only("tokenizer.model", SPM), "pip install 'transformers<5' sentencepiece"),
    "spiece.model": (only("spiece.model", SPM), "has spiece.model and no tokenizer.json"),
    "tokenizer.model of tiktoken": (
        only("tokenizer.model", TIKTOKEN),
        "tokenizer.model is in tiktoken's format",
    ),
    "qwen.tiktoken": (only("qwen.tiktoken", TIKTOKEN), "has qwen.tiktoken and no tokenizer.json"),
    "tekken.json": (only("tekken.json"), "has tekken.json and no tokenizer.json; copy"),
    "broken tokenizer.json": (only("tokenizer.json", b"{"), "tokenizer.json: is not a tokenizer"),
    "empty tokenizer.json": (only("tokenizer.json", b""), "tokenizer.json: is not a tokenizer"),
    "tokenizer.json that is a list": (only("tokenizer.json", b"[]"), "is not a tokenizer"),
    "tokenizer.json of another library": (
        only("tokenizer.json", b'{"model": {"type": "NoSuchModel"}}'),
        "is not a tokenizer",
    ),
    "git-lfs pointer": (
        only("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\n"),
        "is not a tokenizer",
    ),
    "broken vocab.json": (only("vocab.json", b"{"), "vocab.json: is not a JSON object"),
    "vocab.json without merges": (
        layout(
            byte_level,
            without_json(vocab_json=lambda m: json.dumps({"<unk>": 0, "</s>": 1, "a": 2})),
            tokenizer_class="GPT2Tokenizer",
            model_type="gpt2",
        ),
        "its tokenizer cannot be read .`vocab` and `merges` must",
    ),
    "broken tokenizer_config.json": (
        layout(byte_level, lambda folder: (folder / "tokenizer_config.json").write_text("{")),
        "tokenizer_config.json: is not a JSON object .* download the file again",
    ),
    "tokenizer_config.json that is a list": (
        layout(byte_level, lambda folder: (folder / "tokenizer_config.json").write_text("[]")),
        "tokenizer_config.json: is not a JSON object but",
    ),
    "broken special_tokens_map.json": (
        layout(byte_level, lambda folder: (folder / "special_tokens_map.json").write_text("{")),
        "special_tokens_map.json: is not a JSON object",
    ),
    "list of templates without names": (
        layout(byte_level, template=["x"]),
        "cannot be read .*; download tokenizer.json, tokenizer_config.json again",
    ),
    "token that is a list": (layout(byte_level, bos_token=["<s>"]), "Special token bos_token has"),
    "id that is no number": (
        layout(byte_level, added_tokens_decoder={"a": THINK}),
        "cannot be read .*; download",
    ),
    "merges.txt alone": (layout(byte_level, without_json(merges_txt=merges)), "has no tokenizer"),
    "vocabulary of nothing, in vocab.json": (
        layout(
            byte_level,
            without_json(vocab_json=lambda m: "{}", merges_txt=lambda m: ""),
            tokenizer_class="GPT2Tokenizer",
            model_type="gpt2",
        ),
        "loses text; copy the tokenizer.json",
    ),
    "special token that is a number": (layout(byte_level, eos_token=7), "cannot be read"),
    "vocabulary of nothing": (
        layout(
            byte_level,
            lambda folder: Tokenizer(vocabularies.models.BPE()).save(
                str(folder / "tokenizer.json")
            ),
        ),
        "returns no token for 'Hello', so it is empty",
    ),
    "unknown token that the vocabulary lacks": (
        layout(
            byte_level,
            lambda folder: Tokenizer(
                vocabularies.models.WordLevel({"a": 0}, unk_token="<none>")
            ).save(str(folder / "tokenizer.json")),
        ),
        "its tokenizer cannot be read",
    ),
    "tokenizer of a larger model": (
        layout(byte_level, settings_of("config.json", vocab_size=60)),
        "vocab_size in config.json is 60, so it belongs to another model",
    ),
    "tokenizer of a larger model, in text_config": (
        layout(
            byte_level, settings_of("config.json", vocab_size=None, text_config={"vocab_size": 60})
        ),
        "vocab_size in config.json is 60",
    ),
    "tokenizer in Python": (
        layout(
            byte_level,
            both(
                without_json(
                    vocab_json=lambda m: json.dumps(m["vocab"] | {"</w>": 900}), merges_txt=merges
                ),
            ),
            tokenizer_class="CTRLTokenizer",
            model_type="ctrl",
        ),
        "copy the tokenizer.json|choose a model that has one",
    ),
    "custom code": (
        layout(
            byte_level,
            without_json(vocab_txt=lambda m: "\n".join(m["vocab"])),
            tokenizer_class="OwnTokenizer",
            model_type="own",
            auto_map={"AutoTokenizer": ["own.OwnTokenizer", None]},
        ),
        "needs code from its repository .auto_map in tokenizer_config.json., which never runs",
    ),
}


@pytest.mark.parametrize(("write", "message"), REFUSED.values(), ids=REFUSED)
def test_refuses_before_any_export(
    tmp_path: Path, write: Write, message: str, monkeypatch: pytest.MonkeyPatch
):
    """The message is one line that names the folder and a remedy."""
    write(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr("deploy.archive.build.export", None)
    with pytest.raises(UserError, match=message) as refused:
        tokenizer_files(tmp_path / "model", tmp_path / "cache")
    assert "\n" not in str(refused.value) and str(tmp_path / "model") in str(refused.value)
    assert not list((tmp_path / "cache").glob("*")), "nothing to be found the next time"
    with pytest.raises(UserError):
        prepare("x", tmp_path / "model", tmp_path / "x", engine={"name": "openvino"})


def test_command_in_the_remedy_for_sentencepiece_is_quoted(tmp_path: Path):
    only("tokenizer.model", SPM)(folder := tmp_path / "it's $HOME;x")
    with pytest.raises(UserError) as refused:
        tokenizer_files(folder, tmp_path / "cache")
    command = shlex.split(str(refused.value).split("environment: ")[1])
    assert command[:5] == ["pip", "install", "transformers<5", "sentencepiece", "protobuf"]
    assert command[5:8] == ["&&", "cd", str(folder)]
    compile(command[-1], "command", "exec")


def test_second_call_reads_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = write_tokenizer(tmp_path / "m", byte_level())
    first = tokenizer_files(folder, tmp_path / "cache")
    monkeypatch.setattr("deploy.archive.tokenizer._make", None)
    began = time.monotonic()
    assert tokenizer_files(folder, tmp_path / "cache") == first
    assert time.monotonic() - began < 0.1


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "config.json", "special_tokens_map.json"]
)
def test_makes_the_tokenizer_again_after_a_change(tmp_path: Path, name: str):
    folder = write_tokenizer(tmp_path / "m", byte_level())
    first = tokenizer_files(folder, tmp_path / "cache")
    path = folder / name
    path.write_text((path.read_text() if path.exists() else "{}") + " ")
    assert tokenizer_files(folder, tmp_path / "cache") != first


def test_link_out_of_the_folder_is_not_read(tmp_path: Path):
    """A download could link a template to any file of this machine."""
    folder = write_tokenizer(tmp_path / "m", byte_level())
    (tmp_path / "secret.jinja").write_text("secret")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "default.jinja").symlink_to(tmp_path / "secret.jinja")
    prompt = archived(folder).chat_prompt([{"role": "user", "content": "Hi"}])
    assert prompt.startswith("<|im_start|>user") and "secret" not in prompt


@pytest.mark.parametrize(
    ("tokenizer_class", "model_type"),
    [("XGLMTokenizer", "xglm"), ("BioGptTokenizer", "biogpt"), ("CpmAntTokenizer", "cpmant")],
)
def test_remedy_for_a_class_that_cannot_read_its_folder_works(
    tmp_path: Path, tokenizer_class: str, model_type: str
):
    folder, tokenizer = tmp_path / "m", byte_level()
    write_tokenizer(folder, tokenizer, tokenizer_class=tokenizer_class, model_type=model_type)
    with pytest.raises(UserError, match=r"cannot be read .*set tokenizer_class .* to PreTrained"):
        tokenizer_files(folder, tmp_path / "cache")
    settings_of("tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")(folder)
    assert archived(folder).encode(TEXTS[3]) == tokenizer.encode(TEXTS[3]).ids


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            stored(lambda t: setattr(t, "normalizer", normalizers.Lowercase())),
            "has different tokens",
        ),
        (stored(lambda t: setattr(t, "decoder", decoders.Fuse())), "different text"),
        (settings_of("tokenizer_config.json", chat_template="x"), "renders different text"),
        (
            lambda folder: (folder / "chat_template.jinja").write_text("{% for m in x %}"),
            "renders different text",
        ),
    ],
)
def test_finds_what_differs_from_transformers(tmp_path: Path, change: Write, message: str):
    theirs = reference(write_tokenizer(tmp_path / "m", byte_level()))
    assert difference(ModelFolder(tmp_path / "m"), theirs) == ""
    change(tmp_path / "m")
    assert message in difference(ModelFolder(tmp_path / "m"), theirs)
