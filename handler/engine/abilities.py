"""What a model's chat template can write besides texts: tools, calls of them, further roles.

A template says so nowhere, and most drop what they do not know without an error. So it is tried: it
writes a few short conversations, and what is missing from its text is not supported.
"""

import json
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jinja2 import TemplateError

from handler.engine import Messages, Tools

Render = Callable[[Messages, Tools | None], str]

_NAME, _KEY, _VALUE, _TEXT, _ROLE = (
    f"probe_{part}" for part in ("name", "key", "value", "text", "role")
)
_TOOLS: Tools = [
    {
        "type": "function",
        "function": {
            "name": _NAME,
            "description": "1",
            "parameters": {
                "type": "object",
                "properties": {_KEY: {"type": "string", "description": "1"}},
                "required": [_KEY],
            },
        },
    }
]
_USER = {"role": "user", "content": "1"}
_ID = "probeid01"
"""An id of a call. Mistral's templates reject all but nine letters and digits."""

_TAG = re.compile(r"(<[^/<>\s][^<>\s]*>|\[\w+\])\s*(?:\[\s*)?\Z")
"""A word in brackets at the end of a text, and the beginning of a list after it."""


class ToolFormat(NamedTuple):
    """How a model writes a call: `{NAME: "f", ARGUMENTS: {...}}`, alone or in a list.

    The object may be the `function` of another one. `marker` comes before it, as `<tool_call>` or
    `[TOOL_CALLS]`; it is empty if nothing does.
    """

    marker: str
    name: str
    arguments: str


class CallStyle(NamedTuple):
    """How a template reads calls: `arguments` as JSON text or objects, what `content` is empty."""

    as_text: bool
    empty: str | None


@dataclass(frozen=True)
class Abilities:
    """What a chat template writes. `rendered` are the texts that showed it."""

    tools: bool = False
    calls: CallStyle | None = None
    format: ToolFormat | None = None
    roles: frozenset[str] = frozenset()
    rendered: list[str] = field(default_factory=list)

    def fit(self, messages: Messages, tools: Tools | None) -> Messages:
        """Return the messages as the template reads them.

        A `developer` is the `system` of templates that do not know the role.

        Raises:
            TemplateError: the template would leave something out.
        """
        if tools and not self.tools:
            raise TemplateError("it writes no tools")
        names: dict[str, str] = {}
        return [self._fit(message, names) for message in messages]

    def _fit(self, message: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
        role, calls = message["role"], message.get("tool_calls")
        if role == "developer" and role not in self.roles:
            if "system" not in self.roles:
                raise TemplateError("it writes no messages of the roles developer and system")
            return message | {"role": "system"}
        if role == "tool":
            if role not in self.roles:
                raise TemplateError("it writes no messages of the role tool")
            named = names.get(message.get("tool_call_id", ""))
            return ({"name": named} if named else {}) | message
        if not calls:
            return message
        if self.calls is None:
            raise TemplateError("it writes no tool_calls")
        names |= {call["id"]: call["function"]["name"] for call in calls if "id" in call}
        return _calling(calls, message.get("content") or None, self.calls)


def examine(render: Render) -> Abilities:
    """Find out what a chat template writes; it takes a few milliseconds."""
    rendered = []

    def written(messages: Messages, tools: Tools | None = None) -> str:
        with suppress(Exception):  # some templates reject some messages
            rendered.append(render(messages, tools))
            return rendered[-1]
        return ""

    for roles in (["user"], ["user", "assistant", "user"], ["system", "user"]):
        written([{"role": role, "content": "1"} for role in roles])

    begin = written([_USER], _TOOLS)
    tools = _NAME in begin and _KEY in begin
    answer = {"role": "tool", "tool_call_id": _ID, "name": _NAME, "content": _TEXT}
    function = {"name": _NAME, "arguments": {_KEY: _VALUE}}
    call = {"id": _ID, "type": "function", "function": function}
    style = format = None
    turn: dict[str, Any] = {"role": "assistant", "content": "1"}
    for as_text, empty in ((False, ""), (False, None), (True, None), (True, "")):
        tried = CallStyle(as_text, empty)
        calling = _calling([call], None, tried)
        text = written([_USER, calling, answer], _TOOLS if tools else None)
        shown = text[len(_common(begin, text)) :] if tools else text
        if _NAME in shown and _VALUE in shown:
            style, turn = tried, calling
            format = _format(begin, text) if tools else None
            break

    def reads(role: str, before: Messages, after: Messages) -> bool:
        texts = []
        for name in (role, _ROLE):
            message = answer | {"role": name} if before else {"role": name, "content": _TEXT}
            texts.append(written([*before, message, *after]))
        shown = _TEXT in texts[0]
        return shown and texts[0].lower() != texts[1].lower().replace(_ROLE, role)

    known = set()
    if _TEXT in written([{"role": "system", "content": _TEXT}, _USER]):
        known.add("system")
    if reads("developer", [], [_USER]):
        known.add("developer")
    # Models that call tools may know the role although the template does not name it.
    if (style and _TEXT in text) or reads("tool", [_USER, turn], []):
        known.add("tool")
    return Abilities(tools, style, format, frozenset(known), rendered)


def _calling(calls: list[Any], content: str | None, style: CallStyle) -> dict[str, Any]:
    """Return a turn of the assistant that has calls, as a template of this style reads it."""
    if style.as_text:
        calls = [
            call
            | {
                "function": call["function"]
                | {"arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)}
            }
            for call in calls
        ]
    content = style.empty if content is None else content
    return {"role": "assistant", "content": content, "tool_calls": calls}


def _format(begin: str, text: str) -> ToolFormat | None:
    """Find the call in a text; None if it is not a JSON object with the name and the arguments.

    Args:
        begin: the conversation up to the assistant's turn.
        text: the conversation with the turn that holds the call.
    """
    start = len(_common(begin, text))
    position = text.find(f'"{_NAME}"', start)
    while (position := text.rfind("{", start, max(position, 0))) >= 0:
        with suppress(ValueError):
            call, _ = json.JSONDecoder().raw_decode(text, position)
            call = call.get("function", call)
            name = [key for key, value in call.items() if value == _NAME]
            arguments = [key for key, value in call.items() if value == {_KEY: _VALUE}]
            tag = _TAG.search(text, 0, position)
            marked = tag and tag.end(1) > start
            if name and arguments and (marked or not text[start:position].strip(" \n[")):
                return ToolFormat(tag[1] if tag and marked else "", name[0], arguments[0])
    return None


def _common(one: str, other: str) -> str:
    """Return the beginning that two texts share."""
    length = min(len(one), len(other))
    same = (i for i in range(length) if one[i] != other[i])
    return one[: next(same, length)]
