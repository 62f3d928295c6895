"""Tools in chat templates, and the calls in completions.

The templates are trl's, which come from the most widely trained models, and those in the code of
locked packages. Each that writes tools has to render them as transformers does, and what it writes
for calls has to be read as these calls.
"""

import json
import re
import time
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from tokenizers import AddedToken, Tokenizer

from handler import doors, openai
from handler.config import load_app
from handler.engine import Messages, Progress, SequenceKey
from handler.engine.abilities import ToolFormat, examine
from handler.engine.folder import ModelFolder
from handler.engine.text import TextStream
from handler.errors import RequestError
from handler.request import Request, default_parameters
from handler.response import ActiveRequest
from handler.tool_calls import (
    Reader,
    RequestedTools,
    ToolCall,
    ToolError,
    ToolUse,
    _CallReader,
)
from tests.unit.test_chat_templates import CODE, THOUGHTS, TRL, WORDS
from tests.unit.test_llm_handler import Worker
from tests.vocabularies import CHATML, byte_level, write_tokenizer

TEMPLATES = {name: text for name, text in (CODE | TRL).items() if not name.endswith("_training")}

COVERED = [
    "trl, llama3_1",
    "trl, llama3_2",
    "trl, qwen2_5",
    "trl, qwen3",
    "trl, qwen3_instruct_2507",
    "trl, qwen3_vl",
    "transformers, processing_llama4, 0",
    "optimum-intel, utils, 12",  # Falcon
    "optimum-intel, utils, 13",  # Mistral
    "optimum-intel, utils, 14",  # Qwen
]
"""Templates whose calls are JSON objects."""
REFUSED = {
    **dict.fromkeys([f"trl, gemma4{v}" for v in ("", "_v2", "_v3", "_v4", "_v5")], "own notation"),
    "trl, diffusion_gemma": "own notation",
    "trl, glm4moe": "tags",
    "trl, muse_glimmer": "tags",
    **dict.fromkeys([f"trl, qwen3_{v}" for v in ("5_nothink", "5_think", "6", "8")], "tags"),
    **dict.fromkeys(
        [f"trl, nemotron_3_{v}" for v in ("5_lightning", "nano", "super", "ultra")], "tags"
    ),
    **dict.fromkeys([f"trl, lfm2_{v}" for v in ("2_5", "2_5_v2", "2_5_vl", "v2")], "Python"),
    "optimum-intel, utils, 3": "Python",  # MiniCPM
    "trl, lfm2": "writes no calls",
    "trl, gptoss": "channels",
}
"""Templates that write tools, and the format of calls that is not read."""

NAME = "get_weather"
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": NAME,
        "description": "The weather in a place; \"metric\" <units> & 'quotes'.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Where"},
                "days": {"type": "integer", "enum": [1, 2]},
                "tags": {"type": "array", "items": {"type": "string"}},
            },
            "required": ["city"],
        },
    },
}
OTHER = {
    "type": "function",
    "function": {
        "name": "now",
        "description": "The time.",
        "parameters": {"type": "object", "properties": {}},
    },
}
TOOLS = [TOOL, OTHER]
ARGUMENTS = {
    "city": 'Łódź "x" </b> {y} [z]; \\n\n',
    "days": 2,
    "tags": ["a", ""],
    "deep": {"k": [{}]},
}


def called(*arguments: dict[str, Any], name: str = NAME, content: str = "") -> dict[str, Any]:
    """Return a turn of the assistant with a call for each set of arguments."""
    calls = [
        {"id": f"callid{i:03}", "type": "function", "function": {"name": name, "arguments": a}}
        for i, a in enumerate(arguments)
    ]
    return {"role": "assistant", "content": content, "tool_calls": calls}


def result(content: str = "sunny", i: int = 0) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"callid{i:03}", "name": NAME, "content": content}


USER = {"role": "user", "content": "Weather?"}
ANSWER = {"role": "assistant", "content": "Sunny."}
SYSTEM = {"role": "system", "content": "Be brief."}
CHATS: dict[str, Messages] = {
    "question": [USER],
    "system": [SYSTEM, USER],
    "call": [USER, called({"city": "Łódź"}), result()],
    "two turns": [USER, called({"city": "a"}), result(), called({"city": "b"}), result("{}")],
    "two calls": [USER, called({"city": "a"}, {"city": "b"}), result(), result("b", 1)],
    "content and call": [USER, called(ARGUMENTS, content="I look."), result()],
    "all": [SYSTEM, USER, called({"city": "a"}), result(), ANSWER, USER],
}


SPECIAL = ["[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"]
SPECIAL += ["[/TOOL_RESULTS]", "<|python_start|>", "<|python_end|>", "<|eot|>"]
NOT_SPECIAL = [*THOUGHTS, "<tool_response>", "</tool_response>"]
CONTROL = [*WORDS, *SPECIAL, *NOT_SPECIAL]


@cache
def tokenizer(*, special: bool) -> Tokenizer:
    """Make a tokenizer with the tokens of many models; either all are special, or as in Qwen."""
    made = byte_level()
    made.add_special_tokens(CONTROL if special else [*WORDS, *SPECIAL])
    made.add_tokens([AddedToken(text, normalized=False) for text in NOT_SPECIAL if not special])
    return made


Make = Callable[..., ModelFolder]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Make a folder with a template."""

    def folder(template: str | None, *, special: bool = False) -> ModelFolder:
        made = tokenizer(special=special)
        return ModelFolder(write_tokenizer(tmp_path, made, template=template))

    return folder


def use(folder: ModelFolder, **options: Any) -> ToolUse:
    return ToolUse(folder, RequestedTools(**{"tools": TOOLS} | options))


def read(reader: Reader, pieces: Iterable[tuple[str, list[int]]]) -> tuple[str, list[ToolCall]]:
    """Return the content and the calls of a completion that comes in pieces."""
    content = "".join(reader.push(text, ids) for text, ids in pieces)
    rest, calls = reader.finish()
    return content + rest, calls


def generated(folder: ModelFolder, turn: dict[str, Any]) -> list[int]:
    """Return the tokens with which the model would write a turn."""
    prompt = folder.chat_prompt([USER], TOOLS)
    text = folder.chat_prompt([USER, turn], TOOLS)
    assert prompt and text
    same = next(i for i in range(len(text)) if text[: i + 1] != prompt[: i + 1])
    completion = text[same:]
    ids = folder._tokenizer.encode(completion, add_special_tokens=False).ids
    ends = [folder._tokenizer.token_to_id(t) for t in ("<|im_end|>", "<|eot_id|>", "</s>")]
    ends.append(folder._tokenizer.token_to_id("<|eot|>"))
    return ids[: next(i for i, token in enumerate(ids) if token in ends)]


def pieces(folder: ModelFolder, ids: list[int]) -> list[tuple[str, list[int]]]:
    """Return what an engine reports of a completion, token by token."""
    stream = TextStream(folder.decode, [], ())
    return [*((stream.push(token), [token]) for token in ids), (stream.finish(), [])]


QWEN, LLAMA, MISTRAL = "trl, qwen3", "trl, llama3_1", "optimum-intel, utils, 13"
NO_THOUGHT = "<think>\n\n</think>"


def test_formats_of_all_templates(make: Make):
    """Which templates have tools, and which of them write calls that are read."""
    found = {name: make(template).abilities for name, template in TEMPLATES.items()}
    assert {n for n, a in found.items() if a.format} == set(COVERED)
    assert {n for n, a in found.items() if a.tools and not a.format} == set(REFUSED)
    assert {n for n, a in found.items() if a.tools and not a.calls} == {"trl, lfm2"}


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("name", COVERED)
def test_calls_are_read_as_the_template_writes_them(make: Make, name: str, special: bool):
    """Write a turn, then read it, whether the marker is a special token or not."""
    folder = make(TEMPLATES[name], special=special)
    for arguments in (ARGUMENTS, {}, {"city": "<tool_call>" * (not special) + "{[TOOL"}):
        expected = ToolCall(NAME, json.dumps(arguments, ensure_ascii=False))
        ids = generated(folder, called(arguments))
        for report in (pieces(folder, ids), [(folder.decode(ids), ids)]):
            content, calls = read(use(folder).reader(), report)
            assert calls == [expected] and content.strip() in ("", NO_THOUGHT)
    try:
        ids = generated(folder, called({"city": "a"}, {"city": "b"}))
    except TemplateError:
        assert "llama" in name
    else:
        two = [ToolCall(NAME, '{"city": "a"}'), ToolCall(NAME, '{"city": "b"}')]
        assert read(use(folder).reader(), pieces(folder, ids))[1] == two
        alone = use(folder, parallel=False).reader()
        assert read(alone, pieces(folder, ids))[1] == two[:1]
    ids = generated(folder, called({}, content="I look."))
    content, calls = read(use(folder).reader(), pieces(folder, ids))
    assert calls == [ToolCall(NAME, "{}")]
    drops_content = name in (LLAMA, "trl, llama3_2", MISTRAL)
    assert content.removeprefix(NO_THOUGHT).strip() == ("" if drops_content else "I look.")


NO_CALLS = {
    "text": "The weather is fine.",
    "empty": "",
    "blank": " \n",
    "JSON": '{"city": "a"}',
    "a name that is no tool's": '{"name": "Bob", "arguments": {}, "parameters": {}}',
    "marker alone": "<tool_call>",
    "not closed": '<tool_call>{"name": "now", "arguments": {',
    "not JSON": "<tool_call>{'name': 'now', 'arguments': {}}</tool_call>",
    "no name": '<tool_call>{"arguments": {}}</tool_call>',
    "no arguments": '<tool_call>{"name": "now"}</tool_call>',
    "empty name": '<tool_call>{"name": "", "arguments": {}}</tool_call>',
    "arguments are no object": '<tool_call>{"name": "now", "arguments": "{}"}</tool_call>',
    "name is no text": '<tool_call>{"name": 1, "arguments": {}}</tool_call>',
    "no object": '<tool_call>"now"</tool_call>',
    "list": "<tool_call>[]</tool_call>",
    "not a number": '<tool_call>{"name": "now", "arguments": {"x": NaN}}</tool_call>',
    "too large a number": '<tool_call>{"name": "now", "arguments": {"x": 1e999}}</tool_call>',
    "half a surrogate pair": '<tool_call>{"name": "now", "arguments": {"x": "\\ud800"}}',
    "deep": '<tool_call>{"name": "now", "arguments": ' + '{"x":' * 5_000,
    "second is broken": '<tool_call>{"name": "now", "arguments": {}}</tool_call><tool_call>{',
    "beginning of a marker": "a <tool_c",
    "text after an object": '{"name": "now", "parameters": {}} is a call',
}


@pytest.mark.parametrize("name", [QWEN, LLAMA, MISTRAL])
def test_text_without_a_call_is_content(make: Make, name: str):
    """The completion is content as a whole, in a stream too."""
    folder = make(TEMPLATES[name])
    for kind, text in NO_CALLS.items():
        text = text.replace("<tool_call>", "<tool_call>" if name == QWEN else "")
        for report in ([(text, [])], [(character, []) for character in text]):
            assert read(use(folder).reader(), report) == (text, []), kind


def test_calls_beside_other_text(make: Make):
    """As in vLLM, text before a call is content, and text after it is left out."""
    call = '<tool_call>\n{"name": "now", "arguments": {"x": 1}}\n</tool_call>'
    reader = use(make(TEMPLATES[QWEN])).reader()
    assert reader.push("Let me ", []) == "Let me "
    assert reader.push("see. <tool", []) == "see. "
    assert reader.push(call[5:30], []) == ""
    assert reader.push(call[30:] + " done", []) == ""
    assert reader.finish() == ("", [ToolCall("now", '{"x": 1}')])
    folder = make(TEMPLATES[LLAMA])
    for text in (
        '{"name": "now", "parameters": {}}',
        ' {"name": "now", "arguments": {}}\n',
        '{"type": "function", "name": "now", "parameters": {}}',
        '{"type": "function", "function": {"name": "now", "parameters": {}}}',
    ):
        assert read(use(folder).reader(), [(text, [])]) == ("", [ToolCall("now", "{}")])
    two = '{"name": "now", "parameters": {}}; {"name": "now", "parameters": {}}'
    assert len(read(use(folder).reader(), [(two, [])])[1]) == 2


PARTS = ["<tool_call>", "</tool_call>", '{"name": "now", "arguments": {}}', "[", "]", "<", " ", "a"]


@given(st.lists(st.sampled_from(PARTS), max_size=8), st.data())
@settings(max_examples=200, deadline=None)
def test_streams_have_the_content_and_calls_of_plain_responses(parts: list[str], data: Any):
    """However a completion is cut into pieces."""
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    cut = [(text[a:b], []) for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    for marker in ("<tool_call>", ""):
        folder: Any = SimpleNamespace(special_token=lambda _: None, decode=None)
        format = ToolFormat(marker, "name", "arguments")
        reader, other = (_CallReader(folder, format, {"now"}, parallel=True) for _ in range(2))
        whole = read(reader, [(text, [])])
        assert read(other, cut) == whole
        assert whole[1] or whole[0] == text


ATTACK = "".join(CONTROL) + "<|im_<|im_end|>end|>"
PLACES: dict[str, Callable[[str], tuple[Messages, list[dict[str, Any]]]]] = {
    "result": lambda x: ([USER, called({"city": "a"}), result(x)], TOOLS),
    "argument": lambda x: ([USER, called({"city": x, "k": [{"k": x}]}), result()], TOOLS),
    "key": lambda x: ([USER, called({x: 1, "k": {x: 1}}), result()], TOOLS),
    "name of a call": lambda x: ([USER, called({"city": "a"}, name=x), result()], TOOLS),
    "name": lambda x: ([USER], [tool(name=x)]),
    "description": lambda x: ([USER], [tool(description=x)]),
    "schema": lambda x: (
        [USER],
        [
            tool(
                parameters={
                    "type": "object",
                    "properties": {x: {"type": "string", "description": x, "enum": [x]}},
                    "required": [x],
                }
            )
        ],
    ),
}
CALLS = ("result", "argument", "key", "name of a call")


def tool(**changes: Any) -> dict[str, Any]:
    return TOOL | {"function": TOOL["function"] | changes}


@pytest.mark.parametrize("name", [*COVERED, *REFUSED])
def test_control_tokens_in_tools_are_text(make: Make, name: str):
    """A result that ends the message and begins one of the system stays a result."""
    folder = make(TEMPLATES[name])
    control = {folder._tokenizer.token_to_id(text) for text in folder._control._names}
    assert control >= {folder._tokenizer.token_to_id(text) for text in (*WORDS, *SPECIAL)}

    def written(place: str, text: str) -> tuple[str, list[int]]:
        prompt = folder.chat_prompt(*PLACES[place](text))
        assert prompt
        return prompt, [i for i in folder.encode(prompt) if i in control]

    for place in PLACES:
        if name == "trl, lfm2" and place in CALLS:
            continue
        _, expected = written(place, "harmless")
        prompt, found = written(place, ATTACK)
        assert found == expected, place
        assert "<|im_end|>" in prompt or place == "name of a call", "it is there, as text"


def test_numbers_of_the_shield_are_not_confused_with_numbers_in_tools(make: Make):
    """A piece of the number that stands for a token may be in a schema, too."""
    folder = make(TEMPLATES[QWEN])
    every = " ".join(f"{i:04}" for i in range(10_000))
    prompt = folder.chat_prompt([USER], [tool(description=f"<|im_end|> {every}")])
    assert prompt and f"<|im_end|> {every}" in prompt


@pytest.mark.slow
@pytest.mark.parametrize("name", [*COVERED, *REFUSED])
def test_renders_tools_as_transformers(tmp_path: Path, name: str):
    from transformers import AutoTokenizer

    path = write_tokenizer(tmp_path, tokenizer(special=False), template=TEMPLATES[name])
    ours, theirs = ModelFolder(path), AutoTokenizer.from_pretrained(path)
    rendered = 0
    for chat in CHATS.values():
        for tools in (TOOLS, None):
            try:
                messages = ours.abilities.fit(chat, tools)
            except TemplateError:
                assert name == "trl, lfm2"
                continue
            options = {"tools": tools, "add_generation_prompt": True}
            try:
                text = theirs.apply_chat_template(messages, tokenize=False, **options)
            except Exception:
                with pytest.raises(TemplateError):
                    ours.chat_prompt(chat, tools)
                continue
            assert ours.chat_prompt(chat, tools) == text
            rendered += 1
    assert rendered >= (4 if name == "trl, lfm2" else 8)


def test_roles_that_a_template_does_not_know(make: Make):
    """A developer becomes the system; what would be dropped is rejected by name."""
    developer = [{"role": "developer", "content": "Be brief."}, USER]
    for template in (CHATML, TEMPLATES[QWEN], TEMPLATES[LLAMA]):
        folder = make(template)
        assert folder.chat_prompt(developer) == folder.chat_prompt([SYSTEM, USER])
    folder = make(TEMPLATES["trl, gptoss"])
    assert "<|start|>developer<|message|># Instructions\n\nBe brief." in folder.chat_prompt(
        developer
    )
    folder = make(
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    for chat, error in {
        "roles developer and system": developer,
        "role tool": [USER, result()],
        "no tool_calls": [USER, called({}), USER],
    }.items():
        with pytest.raises(TemplateError, match=chat):
            folder.chat_prompt(error)
    folder = make(CHATML)
    with pytest.raises(TemplateError, match="it writes no messages of the role tool"):
        folder.chat_prompt([USER, result()])
    with pytest.raises(TemplateError, match="it writes no tools"):
        folder.chat_prompt([USER], TOOLS)


def test_result_gets_the_name_of_its_call(make: Make):
    """Clients of OpenAI's API send the id alone, but some templates write the name."""
    folder = make(
        "{% for m in messages %}{{ m.name }}{{ m.content }}{% for c in m.tool_calls %}"
        "{{ c.function.name }}{{ c.function.arguments }}{% endfor %}{% endfor %}"
    )
    answer = {name: value for name, value in result().items() if name != "name"}
    prompt = folder.chat_prompt([USER, called({}), answer])
    assert prompt and prompt.endswith(f"{NAME}sunny")


@pytest.mark.parametrize("name", ["trl, deepseekv3", "trl, deepseek_r1_distill"])
def test_arguments_are_text_where_the_template_wants_text(make: Make, name: str):
    prompt = make(TEMPLATES[name]).chat_prompt([USER, called({"city": "Łódź"}), result()])
    assert prompt and '{"city": "Łódź"}' in prompt and "sunny" in prompt


def test_examining_a_template_takes_little_time(make: Make):
    for name in (QWEN, "trl, nemotron_3_ultra", "trl, gemma4_v5"):
        folder = make(TEMPLATES[name])
        times = []
        for _ in range(3):
            began = time.perf_counter()
            assert examine(folder._render).tools
            times.append(time.perf_counter() - began)
        assert min(times) < 0.05


def test_models_without_tools_are_named(make: Make):
    with pytest.raises(ToolError, match="chat template does not support tools") as refused:
        use(make(CHATML))
    assert refused.value.field == "tools"
    for template in (None, "{% for m in messages %}"):
        with pytest.raises(ToolError, match="does not support tools"):
            use(make(template))
    folder = make(TEMPLATES["trl, qwen3_6"])
    with pytest.raises(ToolError, match="server cannot read the format"):
        use(folder)
    assert use(folder, mode="required").json_schema
    assert use(folder, mode="none").shown is None
    assert use(make(CHATML), mode="none").shown is None


NESTED = {
    "properties": {"at": {"$ref": "#/$defs/Point"}, "next": {"$ref": "#"}},
    "required": ["at"],
    "additionalProperties": False,
    "$defs": {
        "Point": {
            "type": "object",
            "properties": {"x": {"$ref": "#/$defs/X"}},
            "required": ["x"],
        },
        "X": {"type": "integer"},
    },
}


def test_schema_of_forced_calls(make: Make):
    """References in the schemas of functions still hold, also if two have the same name."""
    folder = make(TEMPLATES[QWEN])
    point = tool(name="point", parameters=NESTED)
    text = tool(
        name="text", parameters=NESTED | {"$defs": NESTED["$defs"] | {"X": {"type": "string"}}}
    )
    schema = json.loads(use(folder, mode="required", tools=[point, text]).json_schema or "")
    jsonschema.Draft202012Validator.check_schema(schema)
    valid = jsonschema.Draft202012Validator(schema).is_valid

    def one(name: str, x: object, **more: object) -> dict[str, Any]:
        return {"name": name, "arguments": {"at": {"x": x}} | more}

    assert valid([one("point", 1)]) and valid([one("text", "a"), one("point", 1)])
    assert valid([one("point", 1, next={"at": {"x": 2}})])
    for wrong in (
        [],
        {},
        [one("point", "a")],
        [one("text", 1)],
        [one("other", 1)],
        [one("point", 1, more=1)],
        [one("point", 1, next={"at": {"x": "a"}})],
        [one("point", 1) | {"more": 1}],
    ):
        assert not valid(wrong)
    alone = use(folder, mode="required", tools=[point, text], parallel=False)
    assert json.loads(alone.json_schema or "")["maxItems"] == 1
    named = use(folder, mode="required", name="text", tools=[point, text])
    assert (
        json.loads(named.json_schema or "") == {"type": "object"} | text["function"]["parameters"]
    )
    with pytest.raises(ToolError, match="of the type") as refused:
        use(folder, mode="required", tools=[point, tool(parameters={"type": "string"})])
    assert refused.value.field == "tools[1].function.parameters"


def test_forced_calls_are_read(make: Make):
    folder = make(TEMPLATES[QWEN])
    reader = use(folder, mode="required").reader()
    text = (
        ' [{"name": "now", "arguments": {}}, {"name": "get_weather", "arguments": {"city": "ł"}}]'
    )
    assert read(reader, [(c, []) for c in text]) == (
        "",
        [ToolCall("now", "{}"), ToolCall(NAME, '{"city": "ł"}')],
    )
    named = {"mode": "required", "name": NAME}
    assert read(use(folder, **named).reader(), [('{"city": "a"}', [])]) == (
        "",
        [ToolCall(NAME, '{"city": "a"}')],
    )
    assert read(use(folder, **named).reader(), [('{"city": "a', [])]) == ('{"city": "a', [])


APP = load_app("my-own-model", local=True)
DEFAULTS = default_parameters(APP)


def chat(**fields: Any) -> Request:
    body = {"messages": [USER], "tools": TOOLS} | fields
    return openai.parse_chat(body, APP, DEFAULTS, "model")


def test_tools_of_a_request():
    """Templates read them without what only OpenAI's API knows."""
    strict = {"type": "function", "function": {"strict": True, "name": "now", "parameters": None}}
    requested = chat(tools=[TOOL, strict], parallel_tool_calls=False).tools
    plain = {"name": "now", "parameters": {"type": "object", "properties": {}}}
    expected = [TOOL, {"type": "function", "function": plain}]
    assert requested == RequestedTools(expected, parallel=False)
    named = {"type": "function", "function": {"name": "now"}}
    for choice, mode, name in (
        ("auto", "auto", None),
        ("none", "none", None),
        ("required", "required", None),
        (named, "required", "now"),
        (None, "auto", None),
    ):
        requested = chat(tool_choice=choice).tools
        assert requested and (requested.mode, requested.name) == (mode, name)
    assert chat(tools=[]).tools is None and chat(tools=None, tool_choice="auto").tools is None
    through_predict = {"@requestFormat": "chatCompletions", "messages": [USER], "tools": TOOLS}
    requested = doors.parse("", {"instances": [through_predict]}, APP, DEFAULTS, "model").tools
    assert requested and requested.prefix == "instances[0]."


@pytest.mark.parametrize(
    ("fields", "field", "text"),
    [
        ({"tools": {}}, "tools", "a list of up to 128 tools"),
        ({"tools": [TOOL] * 129}, "tools", "a list of up to 128 tools"),
        (
            {"tools": [{"type": "custom", "custom": {}}]},
            "tools[0].type",
            'should be "function", not',
        ),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "is missing"),
        ({"tools": [tool(name="a b")]}, "tools[0].function.name", "1 to 128 letters"),
        ({"tools": [tool(name="a\n")]}, "tools[0].function.name", "1 to 128 letters"),
        ({"tools": [tool(parameters=[])]}, "tools[0].function.parameters", "a JSON schema"),
        ({"tools": [tool(more=1)]}, "tools[0].function.more", "is not known here"),
        ({"tools": [TOOL, TOOL]}, "tools[1].function.name", "already the name of another tool"),
        ({"tool_choice": "any"}, "tool_choice", '"none", "auto", "required" or {'),
        ({"tool_choice": {"type": "function"}}, "tool_choice", '"none", "auto", "required" or {'),
        (
            {"tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice.function.name",
            "is not one of the tools: get_weather, now",
        ),
        ({"tools": None, "tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls", "true or false"),
        (
            {"response_format": {"type": "json_object"}},
            "response_format",
            'is not supported together with tools; leave one out, or set "tool_choice": "none"',
        ),
    ],
)
def test_wrong_tools_are_named(fields: dict[str, Any], field: str, text: str):
    with pytest.raises(RequestError) as rejected:
        chat(**fields)
    assert rejected.value.field == field and text in rejected.value.message


CALL_IDS = re.compile("[a-zA-Z0-9]{9}")


def answers(request: Request, reader: Reader, *texts: str) -> list[Any]:
    """Return what is sent if the engine generates these texts, one a tick."""
    active, key = ActiveRequest(request), SequenceKey("id", 0)
    active.add(key, 5, "", reader)
    bodies = b""
    for i, text in enumerate(texts):
        reason: Any = "stop" if i == len(texts) - 1 else None
        active.update(Progress(key, text, i + 1, reason, token_ids=[i]))
        if response := active.take_response():
            bodies += response.body
    events = bodies.decode().removesuffix("\n\n").split("\n\n")
    return [json.loads(e) for e in (e.removeprefix("data: ") for e in events) if e != "[DONE]"]


def test_response_with_calls(make: Make):
    folder = make(TEMPLATES[QWEN])
    call = '<tool_call>\n{"name": "now", "arguments": {"x": "ł"}}\n</tool_call>'
    for before, content in (("", None), ("\n", None), ("I look.\n", "I look.\n")):
        texts = [before, call[:20], call[20:] + "\n", call]
        (body,) = answers(chat(), use(folder).reader(), *texts)
        choice = body["choices"][0]
        assert choice["finish_reason"] == "tool_calls"
        calls = choice["message"].pop("tool_calls")
        assert choice["message"] == {"role": "assistant", "content": content, "refusal": None}
        assert len({call["id"] for call in calls}) == 2
        assert all(CALL_IDS.fullmatch(call.pop("id")) for call in calls)
        function = {"name": "now", "arguments": '{"x": "ł"}'}
        assert calls == [{"type": "function", "function": function}] * 2

        chunks = [c["choices"][0] for c in answers(chat(stream=True), use(folder).reader(), *texts)]
        deltas = [chunk["delta"] for chunk in chunks]
        assert deltas[0]["role"] == "assistant"
        assert "".join(delta.get("content") or "" for delta in deltas) == (content or "")
        assert content or deltas[0]["content"] is None
        streamed = [call for delta in deltas for call in delta.get("tool_calls", [])]
        assert [call.pop("index") for call in streamed] == [0, 1]
        assert all(CALL_IDS.fullmatch(call.pop("id")) for call in streamed)
        assert streamed == calls
        assert chunks[-1]["finish_reason"] == "tool_calls" and chunks[-1]["delta"] == {}
        assert all(chunk["finish_reason"] is None for chunk in chunks[:-1])


def test_response_without_calls(make: Make):
    folder = make(TEMPLATES[QWEN])
    (body,) = answers(chat(), use(folder).reader(), "Hel", "lo <tool_call>{")
    message = {"role": "assistant", "content": "Hello <tool_call>{", "refusal": None}
    assert body["choices"][0]["message"] == message
    assert body["choices"][0]["finish_reason"] == "stop"
    chunks = answers(chat(stream=True), use(folder).reader(), "Hel", "lo <tool_call>{", "")
    content = [chunk["choices"][0]["delta"].get("content") for chunk in chunks]
    assert content == ["Hel", "lo ", "<tool_call>{"]


def test_app_with_its_own_prompt_style_has_no_tools(monkeypatch: pytest.MonkeyPatch):
    """Its prompts do not come from the chat template, so the tools would not be in them."""
    worker = Worker(monkeypatch).handler
    style = {"style": "instruct", "template": "{prompt}"}
    prompt = worker.app.prompt.model_copy(update=style)
    worker.app = worker.app.model_copy(update={"prompt": prompt})
    with pytest.raises(
        RequestError, match=r"^instances\[0\]\.tools: this app does not support tools"
    ):
        worker._use_tools(RequestedTools(TOOLS, prefix="instances[0]."))
