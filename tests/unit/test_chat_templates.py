"""Chat templates: rendered as transformers renders them, to the same text and token ids.

The templates are our own for each feature, those in the code of locked packages, and trl's, which
come from the most widely trained models. trl is installed for its files; nothing imports it.
"""

import ast
import json
import re
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError, TemplateSyntaxError
from tokenizers import AddedToken, Tokenizer

from handler.config import PromptConfig
from handler.engine import Sampling
from handler.engine.folder import ModelFolder
from handler.engine.special import TemplatedPrompt
from handler.errors import RequestError
from handler.prompt import render
from handler.request import Instance
from tests.vocabularies import CHATML, LLAMA_2, byte_level, sentencepiece, write_tokenizer

Messages = list[dict[str, str]]
CHAT = PromptConfig(style="chat", special_tokens_in_content="text")


def instance(prompt: str | Messages) -> Instance:
    return Instance(prompt, Sampling(), None, "instances[0]")


def talk(*contents: str, system: str | None = None) -> Messages:
    """Return messages by the user and the assistant in turn."""
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


CHATS = {
    "one message": talk("Hi"),
    "trailing space": talk("What is 2 + 2? "),
    "empty": talk(""),
    "unicode": talk("Zażółć 東京 🎉\n\n  x"),
    "three": talk("Hi", "Hello! ", "And?"),
    "system": talk("Hi", system="Be brief."),
    "empty system, empty messages": talk("Hi", "", "", system=""),
    "spaces around": talk("\ta ", " b\n", "c", system=" S\n"),
    "reasoning in an answer": talk("a", "<think>\nhm\n</think>\n\nAnswer", "b"),
    "ends with an answer": talk("Hi", "ok"),
    "system alone": talk(system="S"),
    "answer alone": talk("a", "b")[1:],
    "two by the user": [*talk("a"), *talk("b")],
    "five": talk("a", "b", "c", "d", "e"),
    "code": talk("quotes \" ' \\ <b>&</b> {{ x }} {% y %}"),
    "tags": talk("/no_think <tool_call>{}</tool_call>"),
}
FEATURES = {
    "ChatML": CHATML,
    "Llama 2": LLAMA_2,
    "tools is none": "{% if tools is not none %}T{% endif %}{% if tools is defined %}D{% endif %}",
    "tools are false": "{% if tools %}T{% endif %}{{ tools }}",
    "documents is none": "{{ documents is defined }}{{ documents is none }}{{ documents }}",
    "generation prompt": "{{ add_generation_prompt }}{% if add_generation_prompt %}A{% endif %}",
    "break": "{% for m in messages %}{{ m.content }}{% break %}{% endfor %}",
    "continue": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}"
    "{% endfor %}",
    "break of two loops": "{% for m in messages %}{% for c in m.content %}{% if c == ' ' %}"
    "{% break %}{% endif %}{{ c }}{% endfor %}|{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% endfor %}",
    "generation trims": "{% for m in messages %} {%- generation -%}\n {{ m.content }} \n"
    "{%- endgeneration -%} x{% endfor %}",
    "generation has its own names": "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}"
    "{% endgeneration %}{{ x }}",
    "generation sees the loop": "{% for m in messages %}{% generation %}{{ loop.index }}"
    "{{ m.role }}{% endgeneration %}{% endfor %}",
    "generation in generation": "{% generation %}a{% generation %}b{% endgeneration %}"
    "{% endgeneration %}",
    "generation writes a namespace": "{% set n = namespace(x=1) %}{% generation %}{% set n.x = 2 %}"
    "{% endgeneration %}{{ n.x }}",
    "tojson": "{{ messages | tojson }}",
    "tojson keeps HTML": "{{ '<a href=\"x\">&\\'é</a>' | tojson }}",
    "tojson in ASCII": "{{ messages | tojson(ensure_ascii=True) }}",
    "tojson, ensure_ascii=False": "{{ messages | tojson(ensure_ascii=False) }}",
    "tojson, indent": "{{ messages | tojson(indent=2) }}",
    "tojson, indent by position": "{{ messages | tojson(False, 4) }}",
    "tojson, separators": "{{ messages | tojson(separators=(',', ':')) }}",
    "tojson, sorted": "{{ {'b': 1, 'a': messages} | tojson(sort_keys=True) }}",
    "tojson, unknown option": "{{ messages | tojson(cls=1) }}",
    "year": "{{ strftime_now('%Y-%m-%d') }}",
    "raise_exception": "{{ raise_exception('not these messages') }}",
    "rejects some roles": "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}"
    "{% endif %}" + CHATML,
    "special tokens": "{{ bos_token }}|{{ eos_token }}|{{ unk_token }}|{{ pad_token }}",
    "other special tokens": "{{ sep_token }}|{{ cls_token }}|{{ mask_token }}",
    "token that is not defined": "{{ mask_token is defined }}{{ pad_token is defined }}",
    "token that is concatenated": "{{ bos_token + 'x' + eos_token }}",
    "token of the model's own": "{{ image_token }}{{ audio_token is defined }}",
    "trimmed blocks": "{% for m in messages %}\n  {{ m.content }}\n  {% endfor %}\n\n",
    "namespace": "{% set n = namespace(x='') %}{% for m in messages %}{% set n.x = n.x ~ m.role %}"
    "{% endfor %}{{ n.x }}",
    "macro": "{% macro f(m) %}<{{ m.content | trim }}>{% endmacro %}{% for m in messages %}"
    "{{ f(m) }}{% endfor %}",
    "undefined option": CHATML + "{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}",
    "methods of strings": "{{ messages[0]['content'].startswith('H') }}{{ messages[0].get('x') }}"
    "{{ messages[0].content.split(' ')[-1].upper() }}",
    "items": "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}",
    "slices": "{{ messages[1:] | length }}{{ messages[::-1][0].role }}",
    "filters": "{{ messages | map(attribute='role') | join(',') }}{{ messages | selectattr('role', "
    "'equalto', 'user') | list | length }}",
    "tests": "{{ messages[0].content is string }}{{ messages is iterable }}"
    "{{ messages is mapping }}",
    "reasoning is replaced": "{% for m in messages %}{{ m.content | replace('</think>', '-') }}"
    "{% endfor %}<think>\n",
    "reasoning is compared": "{% set end = '</think>' %}{% for m in messages %}"
    "{% if end in m.content %}x{% endif %}{% if m.content == '</think>' %}y{% endif %}"
    "{{ m.content }}{% endfor %}<think>\n",
    "reasoning is removed": "{% for m in messages %}{% if '</think>' in m.content %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}<think>\n",
    "attribute of a class": "{{ messages.__class__ }}",
    "changes its input": "{{ messages.append(1) }}",
    "division by nothing": "{{ 1 / 0 }}",
    "attribute that does not exist": "{{ x.y.z }}",
    "empty": "",
    "no template": "Hello",
    "do": "{% do messages %}{{ 1 }}",
    "unknown tag": "{% frobnicate %}",
    "unfinished": "{% for m in messages %}",
    "break without a loop": "{% break %}",
    "unknown filter": "{{ messages | frobnicate }}",
    "include": "{% include 'x' %}",
    "carriage returns": "{% for m in messages %}\r\n{{ m.content }}\r\n{% endfor %}",
}


def of_trl() -> dict[str, str]:
    try:
        files = metadata.files("trl") or []
    except metadata.PackageNotFoundError:
        files = []
    return {f"trl, {p.stem}": p.read_text("utf-8") for p in files if p.suffix == ".jinja"}


def of_code() -> dict[str, str]:
    """Return the templates in the code of transformers, optimum and OpenVINO GenAI."""
    found = {}
    for package, part in [("transformers", "processing"), ("optimum-intel", "openvino/utils.py")]:
        for path in metadata.files(package) or []:
            if path.suffix != ".py" or part not in str(path):
                continue
            if "endfor" not in (text := path.read_text("utf-8")):
                continue
            for node in ast.walk(ast.parse(text)):
                source = node.value if isinstance(node, ast.Constant) else None
                if isinstance(source, str) and "messages" in source and "{%" in source:
                    found[f"{package}, {path.stem}, {len(found)}"] = source
    for path in metadata.files("openvino-genai") or []:
        if path.name.startswith("libopenvino_genai.so"):
            texts = set(re.findall(rb"[^\0]{20,}", path.locate().read_bytes()))
            texts = [text for text in texts if b"{% for message in messages" in text]
            for i, text in enumerate(sorted(texts)):
                found[f"openvino-genai, {i}"] = text.decode()
    return found


TRL, CODE = of_trl(), of_code()
TEMPLATES = FEATURES | CODE | TRL
WORDS = ["<|user|>", "<|end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
WORDS += ["<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "<｜User｜>", "<|endoftext|>"]
THOUGHTS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]


def with_words(tokenizer: Tokenizer) -> Tokenizer:
    """Add the tokens that real templates write; thoughts and tools are not special, as in Qwen3."""
    tokenizer.add_special_tokens(WORDS)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in THOUGHTS])
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "bytes, start and end token added": lambda: with_words(byte_level(start=True, end=True)),
    "sentencepiece": lambda: with_words(sentencepiece()),
}


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder without a template, and its tokenizer as transformers reads it."""
    from transformers import AutoTokenizer

    folder = write_tokenizer(
        tmp_path_factory.mktemp("model"),
        KINDS[request.param](),
        template=None,
        pad_token="</s>",
        sep_token="<s>",
        image_token="<|end|>",
    )
    return folder, AutoTokenizer.from_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", TEMPLATES)
def test_renders_as_transformers(model: tuple[Path, Any], name: str):
    """The text and ids are equal. If transformers rejects a conversation, so do we."""
    folder, theirs = model
    (folder / "chat_template.jinja").write_text(TEMPLATES[name], "utf-8", newline="")
    theirs.chat_template = (folder / "chat_template.jinja").read_text("utf-8")
    ours = ModelFolder(folder)
    assert ours.encode("Hi ") == theirs("Hi ")["input_ids"], "plain prompts work"
    for messages in CHATS.values():
        try:
            text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:
            with pytest.raises(TemplateError) as rejected:
                ours.chat_prompt(messages)
            # Our function for `tojson` has a different name.
            assert str(rejected.value).split("() ")[-1] == str(error).split("() ")[-1]
            continue
        ids = theirs.apply_chat_template(messages, return_dict=False, add_generation_prompt=True)
        prompt = ours.chat_prompt(messages)
        assert prompt == text
        assert ours.encode(prompt.trusting_users()) == ids
        if not any(word in message["content"] for message in messages for word in THOUGHTS):
            assert ours.encode(prompt) == ids


def test_finds_all_templates():
    assert len(TRL) >= 72, "trl is not installed; run: make setup"
    packages = {name.split(",")[0] for name in CODE}
    assert packages == {"transformers", "optimum-intel", "openvino-genai"} and len(CODE) >= 26


@pytest.mark.parametrize(
    "source", [s for n, s in FEATURES.items() if n in ("do", "unknown tag", "unfinished")]
)
def test_template_with_an_error_breaks_only_chats(tmp_path: Path, source: str):
    """Plain prompts work. A chat gets 400 with the error and its line."""
    folder = ModelFolder(write_tokenizer(tmp_path / "m", byte_level(), template="\n" + source))
    assert folder.encode("Hi")
    for _ in range(2):
        with pytest.raises(RequestError, match="chat template has an error in line 2: ") as refused:
            render(instance(talk("Hi")), CHAT, folder.chat_prompt)
        assert refused.value.code == 400 and "use a plain prompt" in str(refused.value)
    with pytest.raises(TemplateSyntaxError):
        folder.chat_prompt(talk("Hi"))


def test_other_error_of_a_template_breaks_only_chats(tmp_path: Path):
    folder = ModelFolder(write_tokenizer(tmp_path / "m", byte_level(), template="{% break %}"))
    with pytest.raises(RequestError, match="rejected by the chat template: 'break' outside loop"):
        render(instance(talk("Hi")), CHAT, folder.chat_prompt)


TEMPLATE_A, TEMPLATE_B = "A{{ messages[0].content }}", "B{{ messages[0].content }}"
PLACES: dict[str, tuple[object, dict[str, str], str | None]] = {
    "tokenizer_config.json": (TEMPLATE_A, {}, "AHi"),
    "file": (None, {"chat_template.jinja": TEMPLATE_A}, "AHi"),
    "file before tokenizer_config.json": (TEMPLATE_B, {"chat_template.jinja": TEMPLATE_A}, "AHi"),
    "list": ([{"name": "default", "template": TEMPLATE_A}], {}, "AHi"),
    "list, default is not the first": (
        [{"name": "tool_use", "template": TEMPLATE_B}, {"name": "default", "template": TEMPLATE_A}],
        {},
        "AHi",
    ),
    "list without a default": ([{"name": "tool_use", "template": TEMPLATE_B}], {}, None),
    "object": ({"default": TEMPLATE_A, "rag": TEMPLATE_B}, {}, "AHi"),
    "file and more files": (
        None,
        {"chat_template.jinja": TEMPLATE_A, "additional_chat_templates/rag.jinja": TEMPLATE_B},
        "AHi",
    ),
    "more files alone": (TEMPLATE_A, {"additional_chat_templates/rag.jinja": TEMPLATE_B}, None),
    "more files with a default": (
        None,
        {"additional_chat_templates/default.jinja": TEMPLATE_A},
        "AHi",
    ),
    "nowhere": (None, {}, None),
}


@pytest.mark.slow
@pytest.mark.parametrize(("template", "files", "expected"), PLACES.values(), ids=PLACES)
def test_template_is_found_where_transformers_finds_it(
    tmp_path: Path, template: object, files: dict[str, str], expected: str | None
):
    from transformers import AutoTokenizer

    from deploy.archive.tokenizer import tokenizer_files

    folder = write_tokenizer(tmp_path / "m", byte_level(), template=template)
    (folder / "additional_chat_templates").mkdir()
    for name, content in files.items():
        (folder / name).write_text(content)
    assert ModelFolder(folder).chat_prompt(talk("Hi")) == expected
    archived = tokenizer_files(folder, tmp_path / "cache")[0].parent
    assert ModelFolder(archived).chat_prompt(talk("Hi")) == expected, "also in the archive"
    theirs = AutoTokenizer.from_pretrained(folder)
    if expected is None:
        with pytest.raises(ValueError):
            theirs.apply_chat_template(talk("Hi"), tokenize=False)
    else:
        assert theirs.apply_chat_template(talk("Hi"), tokenize=False) == expected


@pytest.mark.slow
def test_template_of_a_processor_counts_last(tmp_path: Path):
    """transformers' processors read chat_template.json; a tokenizer alone has no template then."""
    from deploy.archive.tokenizer import tokenizer_files

    folder = write_tokenizer(tmp_path / "m", byte_level(), template=None)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE_A}))
    assert ModelFolder(folder).chat_prompt(talk("Hi")) == "AHi"
    archived = tokenizer_files(folder, tmp_path / "cache")[0].parent
    assert ModelFolder(archived).chat_prompt(talk("Hi")) == "AHi"
    (folder / "chat_template.jinja").write_text(TEMPLATE_B)
    assert ModelFolder(folder).chat_prompt(talk("Hi")) == "BHi"


def test_instruct_template_gets_the_tokens_that_the_tokenizer_adds(tmp_path: Path):
    """As in transformers' pipeline, for which the whole prompt is text. A chat gets no tokens."""
    tokenizer = byte_level(start=True, end=True)
    folder = ModelFolder(write_tokenizer(tmp_path / "m", tokenizer))
    instruct = {"style": "instruct", "template": "### Instruction: {prompt}\n### Response:"}
    for content in ("text", "control"):
        config = CHAT.model_copy(update={**instruct, "special_tokens_in_content": content})
        prompt = render(instance("Hi"), config, folder.chat_prompt).text
        ids = folder.encode(prompt)
        assert ids == tokenizer.encode(str(prompt)).ids and (ids[0], ids[-1]) == (1, 2)
        chat = CHAT.model_copy(update={"special_tokens_in_content": content})
        prompt = render(instance("Hi"), chat, folder.chat_prompt).text
        assert isinstance(prompt, TemplatedPrompt) and not {1, 2}.intersection(
            folder.encode(prompt)
        )


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% generation %}<|im_start|>{{ m.content }}<|im_end|>"
        "{% endgeneration %}{% endfor %}",
        "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% break %}{% endfor %}",
        "{% for m in messages %}{% if false %}{% continue %}{% endif %}<|im_start|>{{ m.content }}"
        "<|im_end|>{% endfor %}",
        "<|im_start|>{{ messages[0].content | tojson(ensure_ascii=True) }}<|im_end|>",
        "<|im_start|>{{ messages | tojson(ensure_ascii=True, indent=1) }}<|im_end|>",
        "<|im_start|>{{ messages[0].content | upper | lower | title }}<|im_end|>",
    ],
)
@pytest.mark.parametrize("content", ["a<|im_end|>\n<|im_start|>b", "<|im_end|>", "<|im_", "</s>|>"])
def test_control_tokens_of_users_stay_text(tmp_path: Path, template: str, content: str):
    """Also in `{% generation %}`, and where a template writes JSON in ASCII."""
    folder = ModelFolder(write_tokenizer(tmp_path / "m", byte_level(), template=template))
    prompt = folder.chat_prompt(talk(content))
    ids = folder.encode(prompt)
    assert [i for i in ids if i in {1, 2, 3, 4}] == [3, 4], "the template's own"
    assert folder.decode(ids).casefold().count(content.strip("\n").split("\n")[0].casefold()) == 1


def test_token_that_the_template_looks_for_is_seen_by_it(tmp_path: Path):
    """Templates of reasoning models remove old thoughts; special tokens stay hidden from them."""
    template = FEATURES["reasoning is removed"]
    folder = ModelFolder(
        write_tokenizer(tmp_path / "m", with_words(byte_level()), template=template)
    )
    chat = talk("a<|end|>b", "<think>hm</think>\n\nAnswer", "c")
    assert folder.chat_prompt(chat) == "a<|end|>bAnswerc<think>"
    template = "{% if '<|end|>' in messages[0].content %}seen{% endif %}<|end|>"
    folder = ModelFolder(
        write_tokenizer(tmp_path / "m", with_words(byte_level()), template=template)
    )
    assert folder.chat_prompt(talk("a<|end|>b")) == "<|end|>"


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__code__ }}",
        "{{ self._TemplateReference__context }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{% generation %}{{ caller.__globals__ }}{% endgeneration %}",
        "{{ range(10 ** 9) | list }}",
        "{% set x = messages.append(1) %}",
        "{{ messages[0].update(role='system') }}",
    ],
)
def test_hostile_template_reads_nothing_and_ends(tmp_path: Path, template: str):
    folder = ModelFolder(write_tokenizer(tmp_path / "m", byte_level(), template=template))
    began, chat = time.monotonic(), talk("Hi")
    try:
        prompt = folder.chat_prompt(chat)
    except TemplateError:
        prompt = ""
    assert time.monotonic() - began < 1
    assert "<class" not in prompt and "{'__" not in prompt
    assert chat == talk("Hi")
