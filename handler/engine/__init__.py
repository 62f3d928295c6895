"""The engine protocol: what the handler needs from anything that generates text.

An engine is driven inline. Nothing runs between two calls of `advance`: the handler lends the
engine its thread for about 50 ms at a time. A background thread would compete with the handler
for the interpreter lock, and an engine nobody asks anything of costs no CPU.

Out of scope here: HTTP, JSON, prompt formats. See `request.py` and `prompt.py`.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from handler.config import EngineConfig

FinishReason = Literal["stop", "length", "error"]


@dataclass(frozen=True)
class Sampling:
    """How one sequence is decoded. Values are validated by `request.Parameters`.

    `temperature` 0 is greedy decoding; then `top_p`, `top_k` and `seed` have no effect.
    `top_k` 0 keeps the whole vocabulary. Without a `seed` every run draws anew. `ignore_eos` goes
    on after the model's end token, so that every completion has `max_new_tokens`: for benchmarks.
    """

    max_new_tokens: int = 50
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    ignore_eos: bool = False


@dataclass
class Progress:
    """What became of one sequence in one call of `advance`.

    `text` is what is new since the last `Progress` of the same key; all texts of a key joined are
    its completion. `completion_tokens` is the total so far. `queue_seconds` is the time between
    `submit` and the first forward pass (openvino tells of nothing earlier than the first token).
    `finish_reason` is None while the sequence runs; "error" means that the engine failed on it and
    has logged why.
    """

    key: Hashable
    text: str
    completion_tokens: int
    finish_reason: FinishReason | None = None
    queue_seconds: float = 0.0


class PromptError(ValueError):
    """A prompt the engine cannot take: empty after tokenization, or longer than the context."""


class Engine(Protocol):
    """Generates text for many sequences at once. Not thread-safe, and need not be."""

    description: str
    """One line for the start-up log: engine, precision, device, threads, limits."""

    max_context: int
    """Tokens that prompt and completion of one sequence may take together."""

    def submit(self, key: Hashable, prompt: str, sampling: Sampling, *, stream: bool) -> int:
        """Queue one sequence and return its prompt length in tokens.

        A streamed sequence makes `advance` return as soon as its first text exists.

        Raises:
            PromptError: the prompt is empty or does not fit; nothing is queued.
        """
        ...

    def advance(self, seconds: float) -> list[Progress]:
        """Decode until something is ready, or about `seconds` have passed."""
        ...

    def cancel(self, key: Hashable) -> None:
        """Forget a sequence and free what it holds. Unknown keys are ignored."""
        ...

    def alive(self) -> bool:
        """False once the engine cannot generate any more and its process should be replaced."""
        ...

    def chat_prompt(self, messages: list[dict[str, str]]) -> str | None:
        """Render messages with the model's chat template; None if it has none."""
        ...


def create_engine(weights: Path, config: "EngineConfig") -> Engine:
    """Load the engine that `config.name` asks for. This is the slow part of a worker's start."""
    if config.name == "openvino":
        from handler.engine.openvino_engine import OpenVINOEngine

        return OpenVINOEngine(weights, config)
    if config.name == "transformers":
        from handler.engine.transformers_engine import TransformersEngine

        return TransformersEngine(weights, config)
    raise ValueError(
        f"app.engine.name: {config.name!r} is not an engine; use openvino or transformers"
    )
