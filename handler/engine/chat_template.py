"""Render a model's chat template exactly as transformers does, without importing transformers.

A lean image has no transformers. tests/unit/test_chat_templates.py compares the two.
"""

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from handler.engine import Messages, Tools

SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
"""Names of special tokens that every template may use, if the model has them."""


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: the template's text. If it has an error, only `render` fails, so plain prompts
            still work.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self._error: Exception | None = None
        try:
            self._template = _environment().from_string(source)
        except Exception as error:  # also SyntaxError, as for `{% break %}` outside of a loop
            self._error = error

    def render(
        self, messages: Messages, special_tokens: dict[str, str], tools: Tools | None = None
    ) -> str:
        """Return the text of a conversation, up to the assistant's turn.

        Raises:
            Exception: the template has an error, or rejects these messages.
        """
        if self._error is not None:
            raise self._error.with_traceback(None)
        # None, not undefined: templates test `tools is not none`.
        options = {"tools": tools, "documents": None, "add_generation_prompt": True}
        return self._template.render(messages=messages, **options, **special_tokens)

    def reads(self, token: str) -> bool:
        """Return whether the template looks for a token in messages, such as `</think>`."""
        quoted = rf"""(?:'{re.escape(token)}'|"{re.escape(token)}")"""
        compared = rf"{quoted}\s+(not\s+)?in\b|{quoted}\s*[!=]=|[!=]=\s*{quoted}"
        named = rf"\w\(\s*{quoted}|\bset\s+\w+\s*=\s*{quoted}"  # an argument, or a variable
        return bool(re.search(f"{compared}|{named}", self._source))


def read_chat_template(folder: Path, settings: dict[str, Any]) -> ChatTemplate | None:
    """Find a model's chat template; None if it has none.

    Files take precedence over the entry in tokenizer_config.json. Of several templates, the one
    named `default` counts. chat_template.json, which transformers' processors read, comes last.

    Args:
        folder: the model's.
        settings: the content of its tokenizer_config.json.
    """
    named: Any = {
        path.stem: path.read_text("utf-8")
        for path in sorted(folder.glob("additional_chat_templates/*.jinja"))
    }
    file = folder / "chat_template.jinja"
    if file.is_file():
        named["default"] = file.read_text("utf-8")
    named = named or settings.get("chat_template")
    older = folder / "chat_template.json"
    if named is None and older.is_file():
        named = json.loads(older.read_text("utf-8")).get("chat_template")
    if isinstance(named, list):
        named = {entry["name"]: entry["template"] for entry in named}
    source = named.get("default") if isinstance(named, dict) else named
    return None if source is None else ChatTemplate(source)


def special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """Return the special tokens that a template may write, by name.

    They are the usual ones and the model's own, such as `image_token`. A name without a token
    stays undefined, because templates test `pad_token is defined`.

    Args:
        settings: the content of tokenizer_config.json, and what special_tokens_map.json overrides.
    """
    own = settings.get("model_specific_special_tokens") or {}
    extra = settings.get("extra_special_tokens")
    entries = settings | own | (extra if isinstance(extra, dict) else {})
    names = [*SPECIAL_TOKENS, *own, *(extra if isinstance(extra, dict) else ())]
    names += [name for name in settings if name.endswith("_token")]
    tokens = {name: text_of(entries.get(name)) for name in names}
    return {name: token for name, token in tokens.items() if isinstance(token, str)}


def text_of(token: Any) -> Any:
    """Read a special token of tokenizer_config.json: a string, or an object around one."""
    return token.get("content") if isinstance(token, dict) else token


class _Generation(Extension):
    """`{% generation %}` marks what the assistant writes, for training. It renders its content.

    The content is the body of a call, as in transformers, so variables set there end with it.
    """

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Macro) -> str:
        return caller()


def _environment() -> ImmutableSandboxedEnvironment:
    """Make the environment that templates are written for.

    Sandboxed, because a template is code from a download.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_template_error
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment


def _tojson(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON. Jinja's own filter escapes `<`, for HTML."""
    return json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_template_error(message: str) -> None:
    raise TemplateError(message)
