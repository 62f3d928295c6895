"""Read control tokens only where a template wrote them; in what a user wrote they are text.

A tokenizer turns the text `<|im_end|>` into the token that ends a turn, even if a user wrote it. So
a user could end their own message and begin a system message. Therefore a second tokenizer knows
the control tokens under other, random names. What the template wrote is renamed, what users wrote
is not, and one call encodes both together, so all other tokens are the same as before.
"""

import json
import re
import secrets
from collections.abc import Callable, Collection
from typing import Any

from tokenizers import Tokenizer

from handler.engine import Messages, Tools


class TemplatedPrompt(str):
    """A prompt whose control tokens count only where the template wrote them.

    Args:
        parts: texts by the template and by users, in turn; the template's is the first.
        complete: whether the template wrote every special token, so that the tokenizer adds none.
            True for chat templates; a template around an instruction leaves out the start token.
    """

    parts: tuple[str, ...]
    complete: bool

    def __new__(cls, *parts: str, complete: bool = False) -> "TemplatedPrompt":
        prompt = super().__new__(cls, "".join(parts))
        prompt.parts, prompt.complete = parts, complete
        return prompt

    def trusting_users(self) -> "TemplatedPrompt":
        """Return this prompt, in which control tokens of users count, too."""
        return TemplatedPrompt(str(self), complete=self.complete)


class ControlTokens:
    """The control tokens of one tokenizer: its special tokens, and those that the template writes.

    Other added tokens, such as a run of spaces, are what the tokenizer makes of them in every text.
    So is a token that the vocabulary builds from ordinary text.

    Args:
        tokenizer: the model's.
        named: tokens that other files of the model call special.
        rendered: some texts by the chat template, to see which tokens it writes.
        reads: whether the chat template looks for a token in messages, as for `</think>`. Then the
            template has to see the token in contents, unless it is special.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        named: Collection[str],
        rendered: Collection[str],
        reads: Callable[[str], bool],
    ) -> None:
        state = json.loads(tokenizer.to_str())
        merged = _merged(state["model"])
        self._names: dict[str, str] = {}
        self._read: set[str] = set()
        conditions = {}
        for token in state["added_tokens"]:
            text = token["content"]
            alone = rf"(?<!\w{re.escape(text)})(?!\w)"  # no letter before or after it
            conditions[text] = alone if token["single_word"] else ""
            if len(text.strip()) < 2 or text in merged:
                continue
            written = not text.strip().isalnum() and any(text in other for other in rendered)
            special = token["special"] or text in named
            if special or written:
                if not special and reads(text):
                    self._read.add(text)
                self._names[text] = token["content"] = f"q{secrets.token_hex(16)}q"
        _rename(state["model"], self._names)
        self._tokenizer, self._renamed = tokenizer, Tokenizer.from_str(json.dumps(state))
        normalized = any(t["normalized"] for t in state["added_tokens"])
        self._depends = normalized and tokenizer.normalizer is not None
        self._ids = {tokenizer.token_to_id(text) for text in self._names}
        self._added = re.compile(_longest_of(conditions) or "(?!)")
        self._heads = {text[:n] for text in self._names for n in range(1, len(text))}
        self._tails = {text[-n:] for text in self._names for n in range(1, len(text))}
        self._longest = max((len(text) for text in self._names), default=0)
        self.digits = frozenset().union(*(_pieces(text) for text in rendered))
        """Pieces of digits that the template writes, as in a year."""

    def encode(self, prompt: TemplatedPrompt) -> list[int]:
        """Return token ids; those of control tokens only where the template wrote them."""
        matched = self._matched(prompt) if self._depends else None
        parts, begin = list(prompt.parts), 0
        for i, part in enumerate(prompt.parts):
            if i % 2 == 0:
                parts[i] = self._rename(part, begin, matched)
            begin += len(part)
        return self._renamed.encode("".join(parts), add_special_tokens=not prompt.complete).ids

    def find(self, text: str, *, whole: bool = False, shown: bool = False) -> list[tuple[int, int]]:
        """Return where `text` has a control token, or a part of one at its beginning or end.

        Text beside a part may complete it: the template's, or that of another message.

        Args:
            text: by a user.
            whole: find no parts.
            shown: find no token that the template has to see.
        """
        hidden = self._names.keys() - self._read if shown else self._names.keys()
        found = [m.span() for m in self._added.finditer(text) if m[0] in hidden]
        if whole:
            return _joined(found)
        begin, end = len(text) - len(text.lstrip()), len(text.rstrip())
        for n in range(min(self._longest, end - begin), 0, -1):
            if text[begin : begin + n] in self._tails:
                found.append((begin, begin + n))
                break
        for n in range(min(self._longest, end - begin), 0, -1):
            if text[end - n : end] in self._heads:
                found.append((end - n, end))
                break
        return _joined(found)

    def _matched(self, prompt: str) -> set[int]:
        """Return the positions that the model's tokenizer reads as parts of control tokens.

        With some normalizers it reads a token only after a space, as in the first Llama.
        """
        encoding = self._tokenizer.encode(prompt)
        spans = (
            span
            for token, span in zip(encoding.ids, encoding.offsets, strict=True)
            if token in self._ids
        )
        return {position for span in spans for position in range(*span)}

    def _rename(self, part: str, begin: int, matched: set[int] | None) -> str:
        """Rename the control tokens in a part of the prompt that begins at `begin`."""

        def name(match: re.Match[str]) -> str:
            read = matched is None or begin + match.end() - 1 in matched
            return self._names.get(match[0], match[0]) if read else match[0]

        return self._added.sub(name, part)


_TYPES = frozenset(
    ("function", "object", "array", "string", "integer", "number", "boolean", "null")
)

_PIECE = 4
"""Digits in a row that count as a piece of a Shield's number."""


class Shield:
    """Hides the control tokens in the messages and tools of one request from their template.

    It replaces each with a number that no user can guess and that survives what templates do with
    text: trim it, look for words in it, change its case.
    """

    def __init__(self, control: ControlTokens) -> None:
        self._control = control
        for _ in range(100):  # nearly always once: most templates write no number but a year
            number = str(10**18 + secrets.randbelow(9 * 10**18))
            self._pieces = _pieces(number) | _pieces(number[::-1])
            """What is left of our number where a template takes it apart, or reverses it."""
            if self._pieces.isdisjoint(control.digits):
                break
        self._key = f"{number}_"  # ASCII, which `tojson(ensure_ascii=True)` does not change
        self._hidden: list[str] = []

    def hide(self, messages: Messages, tools: Tools | None) -> tuple[Messages, Tools | None]:
        """Return messages and tools with numbers in place of control tokens, also in keys.

        Templates compare the roles with words of theirs, and clients can send no other roles.
        They look for tokens in contents, but not in what comes from or describes a tool.
        """
        hidden = [
            {
                key: value if key == "role" else self._hide(value, shown=_looked_at(key, message))
                for key, value in message.items()
            }
            for message in messages
        ]
        hidden_tools = self._hide(tools)
        if self._hidden:
            said = json.dumps([messages, tools], ensure_ascii=False)
            self._pieces = frozenset(piece for piece in self._pieces if piece not in said)
        return hidden, hidden_tools

    def restore(self, text: str) -> TemplatedPrompt:
        """Return a text with the control tokens back in their places, as text by a user.

        Raises:
            ValueError: the template took one apart, so that a part of our number is left.
        """
        parts = re.split(f"{self._key}([0-9]+)_", text)
        if self._hidden and any(p in part for part in parts[::2] for p in self._pieces):
            raise ValueError("it takes a control token in a message apart; leave the token out")
        parts[1::2] = [self._hidden[int(number)] for number in parts[1::2]]
        return TemplatedPrompt(*parts, complete=True)

    def _hide(self, value: Any, *, shown: bool = False) -> Any:
        if isinstance(value, str):
            # Templates compare the types in a JSON schema with words of theirs, too.
            return self._hide_in(value, whole=value in _TYPES, shown=shown)
        if isinstance(value, list):
            return [self._hide(item) for item in value]
        if isinstance(value, dict):  # templates read keys by name, as in `function.parameters`
            return {self._hide_in(k, whole=True): self._hide(v) for k, v in value.items()}
        return value

    def _hide_in(self, text: str, *, whole: bool, shown: bool = False) -> str:
        pieces, done = [], 0
        for begin, end in self._control.find(text, whole=whole, shown=shown):
            pieces += [text[done:begin], f"{self._key}{len(self._hidden)}_"]
            self._hidden.append(text[begin:end])
            done = end
        return "".join([*pieces, text[done:]])


def _pieces(text: str) -> frozenset[str]:
    """Return each run of `_PIECE` digits in a text."""
    runs = (run[0] for run in re.finditer("[0-9]+", text))
    return frozenset(run[i : i + _PIECE] for run in runs for i in range(len(run) - _PIECE + 1))


def _looked_at(key: str, message: dict[str, Any]) -> bool:
    return key == "content" and message["role"] != "tool"


def _joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return spans in order, with those that overlap as one."""
    joined: list[tuple[int, int]] = []
    for begin, end in sorted(spans):
        if joined and begin < joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((begin, end))
    return joined


def _longest_of(conditions: dict[str, str]) -> str:
    """Return an expression for the longest of some texts, which is what the tokenizer matches.

    It is a tree, so that a thousand tokens are not tried one by one at each position of a prompt.

    Args:
        conditions: text -> what must hold after it, as an expression.
    """
    tree: dict[str, Any] = {}
    for text, condition in conditions.items():
        node = tree
        for character in text:
            node = node.setdefault(character, {})
        node[""] = condition
    return _expression(tree)


def _expression(node: dict[str, Any]) -> str:
    branches = [re.escape(c) + _expression(below) for c, below in node.items() if c]
    if "" in node:
        branches.append(node[""])  # last: only if nothing longer matches
    return f"(?:{'|'.join(branches)})" if len(branches) > 1 else "".join(branches)


def _merged(model: dict[str, Any]) -> set[str]:
    """Return the tokens that a BPE model builds from shorter ones."""
    return {"".join(pair) for pair in model.get("merges", [])}


def _rename(model: dict[str, Any], names: dict[str, str]) -> None:
    """Give tokens of a vocabulary other names, so that no text but the name gives their ids."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(text, text): i for text, i in vocabulary.items()}
    else:
        model["vocab"] = [[names.get(text, text), score] for text, score in vocabulary]
    if "unk_token" in model:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
