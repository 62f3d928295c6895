"""A model's folder apart from its weights: tokenizer, chat template, end tokens, context length.

It is read with the `tokenizers` library alone. So all engines read text in the same way, and an
engine that needs neither torch nor transformers does not wait for their imports.
"""

import json
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from handler.engine import Messages
from handler.engine.special import ControlTokens, Shield, TemplatedPrompt

_PROBES = [["user"], ["user", "assistant", "user"], ["system", "user"]]
"""Roles of the conversations that show which tokens a chat template writes."""


class ModelFolder:
    """The parts of a folder in Hugging Face layout that are not weights.

    Args:
        path: holds `config.json`, `tokenizer.json` and `tokenizer_config.json`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.config = self._read_json("config.json")
        self._tokenizer_config = self._read_json("tokenizer_config.json")
        self._tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        self._template = self._chat_template()
        rendered = []
        for roles in _PROBES:
            with suppress(Exception):  # some templates reject some roles
                messages = [{"role": role, "content": "1"} for role in roles]
                rendered.append(self._render(messages) or "")
        self._control = ControlTokens(self._tokenizer, self._named_tokens(), rendered)

    def encode(self, text: str) -> list[int]:
        """Return token ids, with the start token if the tokenizer adds one.

        In a `TemplatedPrompt` control tokens count only where the template wrote them.
        """
        if isinstance(text, TemplatedPrompt):
            return self._control.encode(text)
        return self._tokenizer.encode(text).ids

    def decode(self, token_ids: list[int]) -> str:
        """Return text, without special tokens."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    def chat_prompt(self, messages: Messages) -> TemplatedPrompt | None:
        """Write messages in the model's chat template, up to its turn; None if it has none.

        Raises:
            TemplateError: the template rejects these messages.
        """
        shield = Shield(self._control)
        try:
            text = self._render(shield.hide(messages))
        except Exception as error:  # its message may quote a message
            raise TemplateError(str(shield.restore(str(error)))) from error
        return None if text is None else shield.restore(text)

    def _render(self, messages: Messages) -> str | None:
        if self._template is None:
            return None
        special = {
            name: _text(self._tokenizer_config.get(name)) or ""
            for name in ("bos_token", "eos_token", "unk_token", "pad_token")
        }
        text = self._template.render(messages=messages, add_generation_prompt=True, **special)
        # Some templates write the start token, which the tokenizer adds anyway.
        start = special["bos_token"]
        adds_start = bool(start) and self.encode("")[:1] == [self._tokenizer.token_to_id(start)]
        return text.removeprefix(start) if adds_start else text

    def context_length(self) -> int:
        """Return the positions the architecture was made for (`n_positions` in GPT-2's config).

        Raises:
            ValueError: the configuration names none; the app's YAML must.
        """
        for config in (self.config, self.config.get("text_config") or {}):
            for name in ("max_position_embeddings", "n_positions", "max_sequence_length"):
                if length := config.get(name):
                    return int(length)
        raise ValueError("config.json names no context length: set app.engine.max_context")

    def end_tokens(self, extra: list[str]) -> set[int]:
        """Return the token ids that end a completion: the model's, the tokenizer's, the app's.

        `extra` are texts that must be one token of this vocabulary, such as dolly's "### End".

        Raises:
            ValueError: a text of `extra` is not a single token.
        """
        ends: set[int] = set()
        for file in ("generation_config.json", "config.json"):
            value = self._read_json(file).get("eos_token_id")
            ends.update(value if isinstance(value, list) else [] if value is None else [value])
        if token := _text(self._tokenizer_config.get("eos_token")):
            ends.add(self._tokenizer.token_to_id(token))
        for text in extra:
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
            if len(ids) != 1:
                raise ValueError(
                    f"app.engine.stop_tokens: {text!r} is {len(ids)} tokens in this vocabulary, "
                    "not one; use app.parameters.stop for strings"
                )
            ends.add(ids[0])
        return ends

    def _named_tokens(self) -> set[str]:
        """Return the texts of the tokens to which tokenizer_config.json gives a purpose."""
        settings = self._tokenizer_config
        tokens = [value for name, value in settings.items() if name.endswith("_token")]
        for name in ("additional_special_tokens", "extra_special_tokens"):
            more = settings.get(name) or []
            tokens += more.values() if isinstance(more, dict) else more
        tokens += [t for t in settings.get("added_tokens_decoder", {}).values() if t.get("special")]
        return {text for token in tokens if isinstance(text := _text(token), str)}

    def _read_json(self, name: str) -> dict[str, Any]:
        path = self._path / name
        return json.loads(path.read_text()) if path.is_file() else {}

    def _chat_template(self) -> Template | None:
        file = self._path / "chat_template.jinja"
        source = file.read_text() if file.is_file() else None
        source = source or self._tokenizer_config.get("chat_template")
        if isinstance(source, list):  # several by name
            named = {entry["name"]: entry["template"] for entry in source}
            source = named.get("default")
        if not source:
            return None
        # The environment that templates are written for. Source: transformers' documentation,
        # "Writing a chat template". Sandboxed, because a template is code from a download.
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = lambda value, **options: json.dumps(
            value, ensure_ascii=False, **options
        )
        environment.globals["raise_exception"] = _raise_template_error
        environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
        return environment.from_string(source)


def _raise_template_error(message: str) -> None:
    raise TemplateError(message)


def _text(token: Any) -> Any:
    """Read a special token of tokenizer_config.json: a string, or an object around one."""
    return token.get("content") if isinstance(token, dict) else token
