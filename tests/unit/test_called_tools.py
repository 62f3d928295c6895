"""OpenAI's client calls a tool of a tiny model, through the handler and both engines.

The model has the chat template of Qwen 3. It has learned two turns: it calls the tool, and it
answers from the result. With random weights instead, a JSON schema forces a call.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest

import handler.llm_handler
from deploy.archive.export import export
from deploy.weights.random_weights import byte_tokenizer
from handler.config import engine_config
from handler.engine import create_engine
from handler.engine.folder import ModelFolder
from handler.llm_handler import LLMHandler
from tests import tiny
from tests.unit.test_chat_templates import TRL
from tests.unit.test_llm_handler import FakeContext
from tests.vocabularies import byte_level, write_tokenizer

pytestmark = pytest.mark.slow

TEMPLATE = TRL["trl, qwen3_instruct_2507"]
TOKENS = ["<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"]
PARAMETERS = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
TOOL: Any = {"type": "function", "function": {"name": "square", "parameters": PARAMETERS}}
QUESTION: Any = [{"role": "user", "content": "7?"}]
CALL = {"name": "square", "arguments": {"n": 7}}
MODEL = tiny.LLAMA | {"max_position_embeddings": 2048}


def with_template(folder: Path) -> Path:
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that calls the tool, and answers from its result."""
    folder = tmp_path_factory.mktemp("m")
    byte_tokenizer(TOKENS).save_pretrained(folder / "tokenizer")
    reads = ModelFolder(with_template(folder / "tokenizer"))
    call = {"type": "function", "id": "123456789", "function": CALL}
    turns = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    turns += [{"role": "tool", "tool_call_id": "123456789", "content": "49"}]
    first, second = (reads.chat_prompt(QUESTION + more, [TOOL]) for more in ([], turns))
    written = f"Well.\n<tool_call>\n{json.dumps(CALL)}\n</tool_call>"
    pairs = {str(first): written, str(second): "It is 49."}
    weights = tiny.taught_model(folder / "weights", MODEL, TOKENS, pairs, end="<|endoftext|>")
    return with_template(weights)


Client = Callable[[Any], openai.OpenAI]


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Client:
    """OpenAI's client of a handler with an engine; each of its requests runs to its end."""

    def connect(engine: Any) -> openai.OpenAI:
        monkeypatch.setattr(handler.llm_handler, "create_engine", lambda *_: engine)
        context: Any = FakeContext()
        worker = LLMHandler()
        worker.initialize(context)

        def respond(request: httpx.Request) -> httpx.Response:
            context.paths["id"], pieces = request.url.path, []
            while True:
                context.request_ids, context.statuses, context.headers = {0: "id"}, {}, {}
                (piece,) = worker.handle([{"body": request.content}], context)
                if not context.request_ids:
                    continue
                pieces.append(piece)
                if context.stopping_criteria[0](piece) is not False:
                    break
            headers = {name: value for (_, name), value in context.headers.items()}
            return httpx.Response(context.statuses[0], headers=headers, content=b"".join(pieces))

        transport = httpx.Client(transport=httpx.MockTransport(respond))
        return openai.OpenAI(
            base_url="http://server/v1", api_key="none", max_retries=0, http_client=transport
        )

    return connect


def load(kind: str, weights: Path, cache: Path) -> Any:
    config = engine_config(name=kind, openvino={"precision": "fp16"})
    folder = export(weights, config, cache) if kind == "openvino" else weights
    return create_engine(folder, config)


@pytest.fixture(scope="module", params=["transformers", "openvino"])
def engine(
    request: pytest.FixtureRequest, taught: Path, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    return load(request.param, taught, tmp_path_factory.mktemp("export"))


def test_client_calls_a_tool_and_gets_the_answer(client: Client, engine: Any):
    """Plain and streamed: the client puts the pieces of the call together."""
    api = client(engine)
    options: Any = {"model": "model", "tools": [TOOL], "temperature": 0, "max_tokens": 200}
    first = api.chat.completions.create(messages=QUESTION, **options).choices[0]
    assert first.finish_reason == "tool_calls" and first.message.content == "Well.\n"
    (call,) = first.message.tool_calls or ()
    assert call.type == "function" and call.function.name == "square"
    assert json.loads(call.function.arguments) == {"n": 7}

    with api.chat.completions.stream(messages=QUESTION, **options) as stream:
        events = list(stream)
        last = stream.get_final_completion().choices[0]
    assert last.finish_reason == "tool_calls" and last.message.content == "Well.\n"
    (streamed,) = last.message.tool_calls or ()
    assert streamed.function.to_dict() | {"parsed_arguments": None} == {
        "name": "square",
        "arguments": '{"n": 7}',
        "parsed_arguments": None,
    }
    assert [e.type for e in events].count("tool_calls.function.arguments.done") == 1

    result = {"role": "tool", "tool_call_id": call.id, "content": "49"}
    messages = [*QUESTION, {"role": "assistant", "tool_calls": [call.to_dict()]}, result]
    second = api.chat.completions.create(messages=messages, **options).choices[0]
    assert second.finish_reason == "stop" and second.message.tool_calls is None
    assert second.message.content == "It is 49."


def other(**parameters: Any) -> Any:
    return {"type": "function", "function": {"name": "other", "parameters": parameters}}


TREE = {
    "properties": {"root": {"$ref": "#/$defs/Node"}, "kind": {"enum": ["a", "b"]}},
    "required": ["root", "kind"],
    "additionalProperties": False,
    "$defs": {
        "Node": {
            "type": "object",
            "properties": {"leaf": {"type": "boolean"}},
            "required": ["leaf"],
            "additionalProperties": False,
        }
    },
}


def test_forced_calls_fulfill_their_schema(client: Client, engine: Any):
    """Also of a model that would write something else: here at a high temperature."""
    api = client(engine)
    tools = [TOOL, other(**TREE)]
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    named: Any = {"type": "function", "function": {"name": "other"}}
    called = set()
    for seed in range(12):
        choice = api.chat.completions.create(
            model="model",
            messages=[{"role": "user", "content": f"{seed}?"}],
            tools=tools,
            tool_choice=named if seed % 2 else "required",
            parallel_tool_calls=False,
            max_tokens=300,
            temperature=1.5,
            seed=seed,
        ).choices[0]
        assert choice.finish_reason == "tool_calls" and choice.message.content is None
        (call,) = choice.message.tool_calls or ()
        assert call.type == "function"
        jsonschema.validate(json.loads(call.function.arguments), schemas[call.function.name])
        called.add((seed % 2, call.function.name))
    assert called >= {(1, "other"), (0, "square")} and (1, "square") not in called


def test_forced_calls_are_streamed(client: Client, engine: Any):
    with client(engine).chat.completions.stream(
        model="model",
        messages=QUESTION,
        tools=[other(**TREE)],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=300,
        temperature=0,
    ) as stream:
        kinds = [event.type for event in stream]
        choice = stream.get_final_completion().choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    assert "content.delta" not in kinds and "tool_calls.function.arguments.done" in kinds
    (call,) = choice.message.tool_calls or ()
    jsonschema.validate(json.loads(call.function.arguments), TREE)


def test_wrong_schema_of_a_tool_is_named(client: Client, engine: Any):
    wrong = other(properties={"x": {"type": "strange"}})
    with pytest.raises(openai.BadRequestError) as rejected:
        client(engine).chat.completions.create(
            model="model", messages=QUESTION, tools=[wrong], tool_choice="required"
        )
    assert rejected.value.param == "tools" and engine.unfinished == 0


def test_model_without_tools_is_named(client: Client, taught: Path, tmp_path: Path):
    engine = load("transformers", taught, tmp_path)
    engine.folder = ModelFolder(write_tokenizer(tmp_path / "plain", byte_level()))
    with pytest.raises(openai.BadRequestError) as rejected:
        client(engine).chat.completions.create(model="model", messages=QUESTION, tools=[TOOL])
    assert rejected.value.param == "tools"
    assert "this model's chat template does not support tools" in rejected.value.message
