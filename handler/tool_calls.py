"""The functions that a model may call: those in its prompt, and the calls in its completion.

This module has no list of models. `engine/abilities.py` finds out how a chat template writes a
call, and models write calls as their template does. A call that can be read is a JSON object with
the name and the arguments, alone or in a list, after a marker or as the whole completion. The
templates of Qwen 2.5 and 3, Llama 3, Mistral and Cohere write these. A completion without such a
call is content, as in vLLM.
"""

import json
import secrets
import string
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from handler.engine import Tools
from handler.engine.abilities import ToolFormat
from handler.engine.folder import ModelFolder
from handler.engine.text import overlap


class ToolCall(NamedTuple):
    """A call in a completion; `arguments` is the text of a JSON object."""

    name: str
    arguments: str


class ToolError(ValueError):
    """Tools that cannot be used here.

    Args:
        field: of the request, such as `tools`.
        message: what is wrong with it; it completes a sentence that begins with the field's name.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class Reader:
    """Separates the content of one completion from its calls, as it is generated.

    The results of `push`, followed by the first result of `finish`, are the content. So a stream
    has the same content as a plain response. This class takes all text as content.
    """

    def push(self, text: str, token_ids: list[int]) -> str:
        """Take what is new, and return the content that is now certain."""
        return text

    def finish(self) -> tuple[str, list[ToolCall]]:
        """Return the rest of the content, and the calls. Call once, after the last `push`."""
        return "", []


@dataclass(frozen=True)
class RequestedTools:
    """The tools of a request.

    Args:
        tools: as in OpenAI's API, and as chat templates read them.
        mode: "auto": the model may call one; "required": it must; "none": its prompt has no tools.
        name: the one to call, with the mode "required".
        parallel: whether a completion may have more than one call.
        prefix: where the request stands in the body, with a point; for error messages.
    """

    tools: Tools
    mode: Literal["auto", "required", "none"] = "auto"
    name: str | None = None
    parallel: bool = True
    prefix: str = ""


class ToolUse:
    """How one model serves the tools of a request.

    Raises:
        ToolError: it cannot.
    """

    def __init__(self, folder: ModelFolder, requested: RequestedTools) -> None:
        self._folder, self._requested = folder, requested
        self.shown = None if requested.mode == "none" else requested.tools
        """The tools for the prompt; None if it has none."""
        self.json_schema: str | None = None
        """The JSON schema that the completion has to fulfill, if a call is required."""
        if self.shown is None:
            return
        field = f"{requested.prefix}tools"
        if not folder.abilities.tools:
            raise ToolError(
                field, "this model's chat template does not support tools; leave them out"
            )
        if requested.mode == "required":
            self.json_schema = json.dumps(_forced_schema(requested))
        elif folder.abilities.format is None:
            raise ToolError(
                field,
                "the server cannot read the format in which this model writes calls; set "
                'tool_choice to "required" or to a function, which makes the calls JSON',
            )

    def reader(self) -> Reader:
        """Return what reads one completion."""
        requested, format = self._requested, self._folder.abilities.format
        if self.json_schema is not None:
            return _ForcedReader(requested.name)
        if self.shown is None or format is None:
            return Reader()
        names = {tool["function"]["name"] for tool in self.shown}
        return _CallReader(self._folder, format, names, parallel=requested.parallel)


def new_call_id() -> str:
    """Return an id for a call: nine letters and digits, which Mistral's templates require."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


class _ForcedReader(Reader):
    """Reads what a JSON schema forced: the arguments, or a list of objects with `name`, too."""

    def __init__(self, name: str | None) -> None:
        self._name, self._text = name, ""

    def push(self, text: str, token_ids: list[int]) -> str:
        self._text += text
        return ""

    def finish(self) -> tuple[str, list[ToolCall]]:
        try:
            value, _ = _decode(self._text.lstrip())
            if self._name is not None:
                return "", [_call(self._name, value)]
            return "", [_call(item["name"], item["arguments"]) for item in value]
        except ValueError:  # it ended at its limit, so the rest of the JSON is missing
            return self._text, []


class _CallReader(Reader):
    """Reads calls as the model's template writes them."""

    def __init__(
        self, folder: ModelFolder, format: ToolFormat, names: set[str], *, parallel: bool
    ) -> None:
        self._decode, self._format, self._names = folder.decode, format, names
        self._parallel = parallel
        self._token = folder.special_token(format.marker) if format.marker else None
        self._text, self._given = "", 0
        self._ids: list[int] = []

    def push(self, text: str, token_ids: list[int]) -> str:
        self._text += text
        self._ids += token_ids
        end = self._certain()
        if not self._given and not self._text[:end].strip():  # blank content before a call is none
            return ""
        begin, self._given = self._given, end
        return self._text[begin:end]

    def finish(self) -> tuple[str, list[ToolCall]]:
        try:
            content, calls = self._split()
        except ValueError:
            return self._text[self._given :], []
        rest = content[self._given :] if content.strip() else ""
        return rest, calls if self._parallel else calls[:1]

    def _certain(self) -> int:
        """Return how much of the text is content for certain."""
        marker = self._format.marker
        if self._token is not None:
            return self._given if self._token in self._ids else len(self._text)
        if not marker:
            return 0 if self._text.lstrip()[:1] in ("", "{") else len(self._text)
        at = self._text.find(marker, self._given)
        return at if at >= 0 else len(self._text) - overlap(self._text, marker)

    def _split(self) -> tuple[str, list[ToolCall]]:
        """Return the content and the calls, as `{...}`, `[{...}, {...}]` or `{...}; {...}`.

        Raises:
            ValueError: there are no calls, or one is broken.
        """
        marker, text = self._format.marker, self._marked_text()
        content, _, rest = text.partition(marker) if marker else ("", "", text)
        items: list[Any] = []
        rest = rest.strip()
        while rest:
            value, rest = _decode(rest)
            items += value if isinstance(value, list) else [value]
            rest = rest.lstrip("; \n")
            if marker and (rest.startswith(marker) or rest[:1] not in "{["):
                rest = rest.partition(marker)[2].lstrip()  # leaves out what is not marked
        if not items:
            raise ValueError("there are no calls")
        return content, [self._call(item) for item in items]

    def _marked_text(self) -> str:
        """Return the text with its markers, also if they are special tokens, which have none."""
        if self._token is None:
            return self._text
        runs: list[list[int]] = [[]]
        for token in self._ids:
            if token == self._token:
                runs.append([])
            else:
                runs[-1].append(token)
        marked = self._format.marker.join(self._decode(run) for run in runs)
        # Some tokenizers drop the space at the beginning of what they decode.
        blank = self._text[: len(self._text) - len(self._text.lstrip())]
        return blank + marked.lstrip()

    def _call(self, item: Any) -> ToolCall:
        function = item.get("function", item) if isinstance(item, dict) else None
        if not isinstance(function, dict):
            raise ValueError("a call is not an object")
        keys = (self._format.arguments, "arguments", "parameters")
        arguments = next((function[key] for key in keys if key in function), None)
        call = _call(function.get(self._format.name), arguments)
        if not self._format.marker and call.name not in self._names:
            raise ValueError("an object with a name is not a call")
        return call


def _call(name: Any, arguments: Any) -> ToolCall:
    """Return a call; ValueError if it is none, or could not be sent."""
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        raise ValueError("a call needs a name, and an object of arguments")
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    (name + text).encode()  # half a surrogate pair is not UTF-8
    return ToolCall(name, text)


def _decode(text: str) -> tuple[Any, str]:
    """Return the JSON value at the beginning of a text, and the rest of the text."""
    try:
        value, end = json.JSONDecoder(parse_constant=_no_number).raw_decode(text)
        return value, text[end:]
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_COMBINED = {"$ref", "allOf", "anyOf", "oneOf", "const", "enum"}
"""Keys of JSON schemas that say what the type is."""


def _forced_schema(requested: RequestedTools) -> dict[str, Any]:
    """Return the JSON schema of one function's arguments, or that of a list of calls.

    In the list, the schemas of the arguments are in `$defs`, so the references in them change.
    """
    calls, definitions = [], {}
    for i, function in enumerate(tool["function"] for tool in requested.tools):
        schema = function["parameters"]
        if schema.get("type", "object") != "object":
            field = f"{requested.prefix}tools[{i}].function.parameters"
            raise ToolError(field, 'should be a schema of the type "object"')
        if not schema.keys() & _COMBINED:
            schema = {"type": "object"} | schema
        if function["name"] == requested.name:
            return schema
        place = f"function{i}"
        for key in ("$defs", "definitions"):
            for name, definition in schema.pop(key, {}).items():
                definitions[f"{place}_{name}"] = _moved(definition, place)
        definitions[place] = _moved(schema, place)
        calls.append(
            {
                "type": "object",
                "properties": {
                    "name": {"const": function["name"]},
                    "arguments": {"$ref": f"#/$defs/{place}"},
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    limit = {} if requested.parallel else {"maxItems": 1}
    items = {"anyOf": calls} if len(calls) > 1 else calls[0]
    return {"type": "array", "minItems": 1, **limit, "items": items, "$defs": definitions}


def _moved(schema: Any, place: str) -> Any:
    """Return a part of a JSON schema that is now below `#/$defs`.

    Args:
        schema: the part.
        place: the name of its root there; the root's own definitions begin with it.
    """
    if isinstance(schema, list):
        return [_moved(item, place) for item in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(value, place) for key, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        _, *parts = reference.split("/")
        own = len(parts) > 1 and parts[0] in ("$defs", "definitions")
        name = f"{place}_{parts[1]}" if own else place
        moved["$ref"] = "/".join(["#/$defs", name, *(parts[2:] if own else parts)])
    return moved
