"""Check that an engine generates what its model says, before anyone is served.

An export can lose a part of a model, and a cache can be wrong for a family of models. Neither
raises an error: the server generates wrong text. So an engine generates a few tokens for a short
and a long prompt, in a batch and alone, and each token is compared with the model's choice there.

The model's choice comes from one forward pass over the whole text, without a cache and without a
batch (`reference.py`), which needs torch. The `openvino` engine is compared with it when the
archive is made (`deploy/archive/verify.py`). The archive has a record of that, and at each start
the engine has to generate the recorded tokens.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from handler.engine import Engine, PromptError, Sampling

RECORD = "self_check.json"
"""The file in an archive's weights with the result of the check after the export."""

TOKENS = (16, 8)
"""Tokens that are generated for the short and the long prompt: the first by prefill, the others by
decode steps. The short prompt gets more, so that its last tokens are decoded beside those of the
long prompt, whose prefill takes some steps."""

_SHORT = "Once upon a time"
_USUAL_LENGTH = 128
"""Tokens of the long prompt for a model without a window: several blocks of each engine's cache."""
_LONGEST = 1024
_PAST_THE_WINDOW = 32
_OPERATIONS = 1e11
"""Floating-point operations that the prefill of the long prompt may take: two seconds of a slow
core. A model of a billion parameters gets 50 tokens."""
_SHORTEST = 24

_SENTENCES = (
    "The harbour was quiet when the first boat came in with {} boxes of fish.",
    "At half past {} the teacher opened the window and asked for silence.",
    "A train with {} wagons left the station, and nobody waved.",
    "In the library there were {} books about rivers, but only one about rain.",
    "She counted {} stars, lost her place, and began again.",
    "The recipe asks for {} eggs, some flour, and a little patience.",
    "After {} days of wind the old bridge was closed to all cars.",
)

TOLERANCE = 0.1
"""How far below the model's first choice a token may be where all is computed in float32, in
standard deviations of the logits at that place. Over 58 exports of tiny models, even with keys and
values in 16 bits, 52 were within 0.01, and those that had lost a part at 0.48 or more (LOG.md)."""

MEAN_TOLERANCES = {"float16": 0.3, "fp16": 0.3, "bfloat16": 0.5, "int8": 0.5, "int4": 2.0}
"""The same for other precisions, as a mean over all tokens. Their rounding hides a lost part of a
model: it can send a token to other experts, or add up over the layers (LOG.md). So this finds gross
errors."""

_OTHER_PROCESSOR = {"fp16": 0.4, "int8": 0.7, "int4": 3.0}
"""By precision: the difference between the model's first and second choice, in standard deviations,
below which another processor may generate a different token than the recorded one."""


SERVE_ANYWAY = "app.engine.self_check: false in the app's YAML serves it anyway"


class SelfCheckError(ValueError):
    """An engine generates different text than its model."""


class DamagedModelError(ValueError):
    """The model itself has no choice of a token, so no engine can serve it."""


@dataclass(frozen=True)
class Completion:
    """The ids of one prompt and of the generated tokens. `beside` is "alone" or "in a batch"."""

    text: str
    prompt: list[int]
    generated: list[int]
    beside: str


def prompts(
    encode: Callable[[str], list[int]],
    config: dict[str, Any],
    max_context: int,
    parameters: int,
    vocabulary: int | None = None,
) -> tuple[list[str], str]:
    """Return a short and a long prompt, and what they do not cover.

    The long one exceeds the attention window, unless that would take too many operations.

    Args:
        encode: text -> token ids.
        config: the content of `config.json`.
        max_context: the most tokens of a sequence.
        parameters: how many the model has; large models get shorter prompts.
        vocabulary: the rows of the embedding; words with other tokens are left out.
    """
    window = _window(config, max_context)
    wanted = window + _PAST_THE_WINDOW if window else _USUAL_LENGTH
    affordable = max(_SHORTEST, min(_LONGEST, int(_OPERATIONS / (2 * max(parameters, 1)))))
    length = max(1, min(wanted, affordable, max_context - max(TOKENS) - 1))
    note = f"the window of {window} tokens was not reached" if window and length < window else ""

    def known(text: str) -> list[str]:
        words = text.split()
        return [w for w in words if not vocabulary or max(encode(f" {w}"), default=0) < vocabulary]

    sentences = [known(sentence) for sentence in _SENTENCES]
    short = _cut(" ".join(known(_SHORT)) or _SHORT, encode, max_context)
    return [short, _cut(_text(sentences, encode, length), encode, max_context)], note


_WINDOWS = ("window", "chunk_size", "chunk_length", "local_attention")
"""Parts of the names that configurations use for the length of an attention window."""


def _window(config: dict[str, Any], max_context: int) -> int:
    """Return the largest attention window that is smaller than the context; 0 if there is none."""
    settings = config.get("text_config") or config
    found = [
        value
        for name, value in settings.items()
        if isinstance(value, int) and any(part in name for part in _WINDOWS)
    ]
    return max((value for value in found if 1 < value < max_context), default=0)


def _text(sentences: list[list[str]], encode: Callable[[str], list[int]], length: int) -> str:
    """Return a text of about `length` tokens, made of sentences with numbers.

    It is shorter if the tokenizer makes one token of a whole sentence, as some do of letters that
    they do not know.
    """
    words: list[str] = []
    tokens = 0
    for count in range(length):
        number = str(count * 37 % 89 + 2)
        words += [word.format(number) for word in sentences[count % len(sentences)]]
        before, tokens = tokens, len(encode(" ".join(words)))
        if not before < tokens < length:
            break
    while len(words) > 1 and len(encode(" ".join(words[:-1]))) >= length:
        words.pop()
    return " ".join(words) or _SHORT


def _cut(text: str, encode: Callable[[str], list[int]], max_context: int) -> str:
    """Return the beginning of a text that leaves room in the context for the generated tokens."""
    while len(text) > 1 and len(encode(text)) > max_context - max(TOKENS) - 1:
        text = text[:-1]
    return text


def complete(
    engine: Engine, texts: Sequence[str], encode: Callable[[str], list[int]], *, together: bool
) -> list[Completion]:
    """Generate tokens for each prompt: for all in one batch, or for one prompt at a time.

    Raises:
        SelfCheckError: the engine fails on a prompt.
    """
    if not together:
        return [
            Completion(text, encode(text), _generate(engine, {text: count})[0], "alone")
            for text, count in zip(texts, TOKENS, strict=True)
        ]
    tokens = _generate(engine, dict(zip(texts, TOKENS, strict=True)))
    return [
        Completion(text, encode(text), generated, "in a batch")
        for text, generated in zip(texts, tokens, strict=True)
    ]


def _generate(engine: Engine, counts: dict[str, int]) -> list[list[int]]:
    generated: dict[str, list[int]] = {}
    for text, count in counts.items():
        generated[text] = []
        sampling = Sampling(max_new_tokens=count, ignore_eos=True)
        try:
            engine.submit(text, text, sampling, stream=False)
        except PromptError as error:
            raise SelfCheckError(f"self-check: the prompt {_shown(text)} {error}") from error
    while engine.unfinished:
        for progress in engine.advance(1):
            generated[progress.key] += progress.token_ids
            if progress.finish_reason == "error":
                raise SelfCheckError(
                    f"self-check: the engine fails on the prompt {_shown(progress.key)}"
                )
    return list(generated.values())


def compare(
    completion: Completion,
    gaps: Sequence[float],
    precision: str,
    decode: Callable[[list[int]], str],
) -> None:
    """Make sure that each generated token is the model's choice, or within the tolerance.

    Args:
        completion: what an engine generated.
        gaps: for each token, how far it is below the model's first choice; see `TOLERANCE`.
        precision: "float32" or a key of `MEAN_TOLERANCES`.
        decode: token ids -> text.

    Raises:
        SelfCheckError: a token is not; the message names the first.
        DamagedModelError: the model's logits are not numbers, or all the same.
    """
    place = f"{_shown(completion.text)} ({len(completion.prompt)} tokens, {completion.beside})"
    for i, gap in enumerate(gaps):
        if math.isnan(gap):
            raise DamagedModelError(
                f"self-check: the model's logits after the prompt {place} are all the same or not "
                "numbers (NaN); its weights are damaged, or too large for this precision"
            )
        if precision == "float32" and gap > TOLERANCE:
            raise SelfCheckError(
                f"self-check: this engine generates different text than the model: after the "
                f"prompt {place}, token {i + 1} is {decode([completion.generated[i]])!r}, which is "
                f"{gap:.1f} standard deviations of the logits below the model's choice; "
                f"{TOLERANCE} are allowed"
            )
    mean = sum(gaps) / len(gaps)
    if mean > MEAN_TOLERANCES.get(precision, math.inf):
        raise SelfCheckError(
            f"self-check: the weights in {precision} generate different text than the model: after "
            f"the prompt {place}, the tokens of {decode(completion.generated)!r} are on average "
            f"{mean:.1f} standard deviations of the logits below the model's choices; "
            f"{MEAN_TOLERANCES[precision]} are allowed"
        )


@dataclass(frozen=True)
class Record:
    """The result of the check after an export, and what an engine has to generate at a start.

    `largest_gap` is that of the model before quantization. `margins[c][i]` is how far the model's
    second choice is below its first at token i of completion c.
    """

    engine: str
    precision: str
    reference: str
    largest_gap: float
    note: str
    completions: list[Completion]
    margins: list[list[float]]

    def write(self, path: Path) -> None:
        """Write the record as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Record":
        """Read a record that `write` made."""
        values = json.loads(path.read_text())
        values["completions"] = [Completion(**each) for each in values["completions"]]
        return cls(**values)


def check_record(engine: Engine, encode: Callable[[str], list[int]], record: Record) -> str:
    """Make sure that an engine generates the recorded tokens; return one line for the log.

    Raises:
        SelfCheckError: a token differs; the message names the first.
    """
    begin = time.monotonic()
    texts = list(dict.fromkeys(completion.text for completion in record.completions))
    found = complete(engine, texts, encode, together=True)
    found += complete(engine, texts, encode, together=False)
    for mine, recorded, margins in zip(found, record.completions, record.margins, strict=True):
        if mine.prompt != recorded.prompt:
            raise SelfCheckError(
                f"self-check: the tokens of the prompt {_shown(mine.text)} are {mine.prompt}, but "
                f"were {recorded.prompt} when the archive was made; run make archive again"
            )
        for i, (token, expected) in enumerate(zip(mine.generated, recorded.generated, strict=True)):
            if token != expected and margins[i] > _OTHER_PROCESSOR[record.precision]:
                raise SelfCheckError(
                    "self-check: this engine generates different tokens than when the archive was "
                    f"made: after the prompt {_shown(mine.text)} ({len(mine.prompt)} tokens, "
                    f"{mine.beside}), token {i + 1} is {token}, but was {expected}; run make "
                    "archive again"
                )
            if token != expected:
                break
    return f"self-check passed in {time.monotonic() - begin:.1f} s"


def _shown(text: str) -> str:
    return repr(text if len(text) <= 30 else f"{text[:30]}...")
