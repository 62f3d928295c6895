"""A model's folder apart from its weights: tokenizer, chat template, end tokens, context length.

It is read with the `tokenizers` library alone. So all engines read text in the same way, and an
engine that needs neither torch nor transformers does not wait for their imports.
"""

import json
import logging
from collections.abc import Collection, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from llguidance import LLTokenizer
from tokenizers import Tokenizer

from handler.engine import Messages, TokenLogprob, Tools
from handler.engine.abilities import examine
from handler.engine.chat_template import read_chat_template, special_tokens, text_of
from handler.engine.special import ControlTokens, Shield, TemplatedPrompt
from handler.engine.text import Decoder

logger = logging.getLogger(__name__)

_SAMPLE = '{"a": [1, "b c"]}'
"""Its tokens show whether their bytes are known."""


class ModelFolder:
    """The parts of a folder in Hugging Face layout that are not weights.

    Args:
        path: holds `config.json`, `tokenizer.json` and `tokenizer_config.json`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.config = self._read_json("config.json")
        self._tokenizer_config = self._read_tokenizer_config()
        self._tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        # Settings of a training run. transformers ignores them unless a caller enables them.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # With this setting, special tokens are plain text, even those that a template wrote.
        self._splits_special = bool(self._tokenizer_config.get("split_special_tokens"))
        self._tokenizer.encode_special_tokens = self._splits_special
        cleans = bool(self._tokenizer_config.get("clean_up_tokenization_spaces"))
        self.decode = Decoder(self._tokenizer, clean_up=cleans)
        self._template = read_chat_template(path, self._tokenizer_config)
        self._special_tokens = special_tokens(self._tokenizer_config)
        self.abilities = examine(self._render)
        reads = self._template.reads if self._template else lambda _: False
        self._control = ControlTokens(
            self._tokenizer, self._named_tokens(), self.abilities.rendered, reads
        )

    def encode(self, text: str) -> list[int]:
        """Return token ids, with the start token if the tokenizer adds one.

        In a `TemplatedPrompt`, control tokens count only where the template wrote them. The
        tokenizer adds no token to a `complete` one.
        """
        if isinstance(text, TemplatedPrompt):
            if not self._splits_special:
                return self._control.encode(text)
            return self._tokenizer.encode(text, add_special_tokens=not text.complete).ids
        return self._tokenizer.encode(text).ids

    def chat_prompt(self, messages: Messages, tools: Tools | None = None) -> TemplatedPrompt | None:
        """Write messages in the model's chat template, up to its turn; None if it has none.

        Raises:
            TemplateSyntaxError: the template has an error.
            TemplateError: the template rejects these messages.
        """
        if self._template is None:
            return None
        shield = Shield(self._control)
        try:
            messages = self.abilities.fit(messages, tools)
            return shield.restore(self._render(*shield.hide(messages, tools)))
        except TemplateSyntaxError:
            raise
        except Exception as error:  # its message may quote a message
            raise TemplateError(str(shield.restore(str(error)))) from error

    def _render(self, messages: Messages, tools: Tools | None = None) -> str:
        if self._template is None:
            return ""
        return self._template.render(messages, self._special_tokens, tools)

    def special_token(self, text: str) -> int | None:
        """Return the id of a token that `decode` leaves out; None if there is no such token."""
        token = self._tokenizer.token_to_id(text)
        return token if token is not None and self.decode.leaves_out(token) else None

    def token(self, token_id: int) -> str | None:
        """Return the text of one token, special or not; None if there is no such token."""
        return self._tokenizer.id_to_token(token_id)

    def logprob(
        self, token_id: int, value: float, top: Iterable[tuple[int, float]] = ()
    ) -> TokenLogprob:
        """Return the entry for a token, and for the likeliest ones beside it."""
        special = self.decode.leaves_out(token_id)
        known = not special and token_id < len(self.token_bytes)
        raw = self.token_bytes[token_id] if known else None
        text = (self.token(token_id) or "") if raw is None else raw.decode("utf-8", "replace")
        return TokenLogprob(
            token_id, text, value, tuple(self.logprob(*entry) for entry in top), raw
        )

    def token_reader(self, end_tokens: Collection[int] = ()) -> LLTokenizer | None:
        """Return the tokenizer for structured output; None if the library cannot read it.

        Without `slices`, which halve the time of a mask and double that of this.
        """
        try:
            reader = LLTokenizer(
                self._tokenizer.to_str(), eos_token=sorted(end_tokens) or None, slices=[]
            )
        except Exception as error:
            logger.info("no structured output for this tokenizer: %s", error)
            return None
        ids = self._tokenizer.encode(_SAMPLE, add_special_tokens=False).ids
        text = reader.decode_bytes(ids).decode("utf-8", "replace")
        return reader if text.strip() == _SAMPLE else None

    @cached_property
    def reader(self) -> LLTokenizer | None:
        """The tokenizer for structured output, with the end tokens that the library chooses."""
        return self.token_reader()

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes of each token, by id; empty if they are not known."""
        reader = self.reader
        return [reader.decode_bytes([i]) for i in range(reader.vocab_size)] if reader else []

    def vocabulary(self) -> int | None:
        """Return the number of ids that the model has an embedding for; None if not stated."""
        for config in (self.config, self.config.get("text_config") or {}):
            if size := config.get("vocab_size"):
                return int(size)
        return None

    def end_tokens(self, extra: list[str]) -> set[int]:
        """Return the token ids that end a completion: the model's, the tokenizer's, the app's.

        `extra` are texts that must be one token of this vocabulary, such as dolly's "### End".

        Raises:
            ValueError: a text of `extra` is not a single token.
        """
        ends: set[Any] = set()
        for file in ("generation_config.json", "config.json"):
            value = self._read_json(file).get("eos_token_id")
            ends.update(value if isinstance(value, list) else [] if value is None else [value])
        if token := text_of(self._tokenizer_config.get("eos_token")):
            ends.add(self._tokenizer.token_to_id(token))
        ends.discard(None)  # the vocabulary may lack it
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
        for name in (
            "additional_special_tokens",
            "extra_special_tokens",
            "model_specific_special_tokens",
        ):
            more = settings.get(name) or []
            tokens += more.values() if isinstance(more, dict) else more
        tokens += [t for t in settings.get("added_tokens_decoder", {}).values() if t.get("special")]
        return {text for token in tokens if isinstance(text := text_of(token), str)}

    def _read_tokenizer_config(self) -> dict[str, Any]:
        """Read tokenizer_config.json, and the file that held the special tokens before it did."""
        settings = self._read_json("tokenizer_config.json")
        if "added_tokens_decoder" in settings:  # then transformers does not read the older file
            return settings
        return settings | self._read_json("special_tokens_map.json")

    def _read_json(self, name: str) -> dict[str, Any]:
        path = self._path / name
        return json.loads(path.read_text("utf-8")) if path.is_file() else {}
