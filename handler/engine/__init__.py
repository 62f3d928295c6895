"""The engine protocol: what the handler needs from anything that generates text.

An engine runs in the handler's thread. It works only inside `advance`, which the handler calls
once a tick, for about `llm_handler.TICK_SECONDS`. A background thread would compete with the
handler for the interpreter lock. An engine without sequences uses no CPU.

Not here: HTTP, JSON and prompt formats. See `request.py` and `prompt.py`.
"""

import builtins
import secrets
from collections.abc import Hashable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    from handler.config import EngineConfig
    from handler.engine.folder import ModelFolder

FinishReason = Literal["stop", "length", "timeout", "error"]
"""Why a completion ended: by an end token or a stop string; at `max_new_tokens` or the end of the
context; at the request's deadline; by a failure."""

Messages = list[dict[str, Any]]
"""The turns of a conversation in OpenAI's shape: each has `role` and `content`, a text. A turn of
the assistant may have `tool_calls` whose `arguments` are objects; one of a tool has `tool_call_id`.
"""

Tools = list[dict[str, Any]]
"""The functions that a model may call, as OpenAI's `tools` and chat templates have them."""


class SequenceKey(NamedTuple):
    """The key of the handler's sequences: TorchServe's request id, and the instance's index."""

    request_id: str
    instance_index: int


@dataclass(frozen=True)
class Sampling:
    """How one sequence is decoded. Values are validated by `request.Parameters`.

    `temperature` 0 is greedy decoding; then `top_p`, `top_k` and `seed` have no effect.
    `top_k` 0 keeps the whole vocabulary. Without a `seed` every run draws other tokens. With
    `ignore_eos` the model's end token does not end the completion, so every completion has
    `max_new_tokens` tokens: for benchmarks.

    `logprobs` is the number of likeliest tokens to report at each step besides the chosen one;
    None reports nothing. `json_schema` is the text of a JSON schema that the completion fulfills;
    None leaves the text free, and "{}" allows any JSON object or array.
    """

    max_new_tokens: int = 50
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    json_schema: str | None = None

    @property
    def random_state(self) -> int:
        """The 32-bit seed for a generator: derived from `seed`, or random without one.

        The generators of both engines read only the lower 32 bits of a seed. The upper ones are
        multiplied by an odd number modulo 2^32, which keeps them distinct, and mixed in. So seeds
        below 2^32 stay the same, and seeds with the same lower half give different results.
        """
        if self.seed is None:
            return secrets.randbits(32)
        upper, lower = divmod(self.seed, 2**32)
        return lower ^ (upper * 0x9E3779B1 % 2**32)  # 2^32 divided by the golden ratio


class TokenLogprob(NamedTuple):
    """A generated token, its natural-log probability, and the likeliest tokens at its step.

    `text` is what the tokenizer makes of this token alone, with U+FFFD for a part of a character;
    `bytes` is the token's part of the completion, None if the tokenizer does not say. `top` is
    empty unless the request asked for it; each entry's own `top` is empty.
    """

    token_id: int
    text: str
    logprob: float
    top: tuple["TokenLogprob", ...] = ()
    bytes: "builtins.bytes | None" = None


@dataclass
class Progress:
    """What happened to one sequence in one call of `advance`.

    `key` is the one that `submit` got. `text` is what is new since the last `Progress` of the same
    key; all texts of a key joined are its completion. `completion_tokens` is the total so far.
    `queue_seconds` is the time between `submit` and the first forward pass. `finish_reason` is None
    while the sequence runs; "error" means that the engine failed on it and has logged why.
    `token_ids` are the generated tokens that no earlier `Progress` of the key had, and `logprobs`
    has one entry for each of them if the request asked for it. `first_token_at` is when the
    first one existed, on the clock of `time.monotonic`, whether or not its text was reported.
    """

    key: Any
    text: str
    completion_tokens: int
    finish_reason: FinishReason | None = None
    queue_seconds: float = 0.0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    first_token_at: float | None = None


class PromptError(ValueError):
    """A prompt that the engine cannot run: without tokens, or longer than the context."""


class ParameterError(ValueError):
    """A parameter that this engine or this model cannot fulfill, such as a wrong schema.

    Args:
        parameter: the name of a field of `Sampling`.
        message: what is wrong with it; it completes a sentence that begins with the field's name.
    """

    def __init__(self, parameter: str, message: str) -> None:
        super().__init__(message)
        self.parameter = parameter


class EngineLoad(NamedTuple):
    """How busy an engine is.

    `cache_use` is the part of its KV cache that sequences hold, from 0 to 1; 0 if it has no limit.
    `cached_prompt_tokens` counts, since the start, prompt tokens that the prefix cache had; None
    if the engine does not know.
    """

    running: int
    waiting: int
    waiting_tokens: int
    cache_use: float = 0.0
    cached_prompt_tokens: int | None = None


class Engine(Protocol):
    """Generates text for many sequences at once. Use it from one thread only."""

    description: str
    """One line for the start-up log: engine, precision, device, threads, limits."""

    max_context: int
    """The most tokens of one sequence, prompt and completion together."""

    folder: "ModelFolder"
    """The model's folder: what its tokenizer and its chat template can do."""

    @property
    def unfinished(self) -> int:
        """The number of sequences that wait, run, or have an end to report."""
        ...

    @property
    def waiting_tokens(self) -> int:
        """The prompt tokens of the sequences that wait for their prefill to begin."""
        ...

    @property
    def load(self) -> EngineLoad:
        """How busy the engine is now."""
        ...

    def submit(self, key: Hashable, prompt: str, sampling: Sampling, *, stream: bool) -> int:
        """Queue one sequence and return its prompt length in tokens.

        With `stream`, `advance` returns as soon as the first text of the sequence exists.

        Raises:
            PromptError: the prompt is empty or does not fit; nothing is queued.
            ParameterError: the engine cannot fulfill a parameter; nothing is queued.
        """
        ...

    def advance(self, seconds: float) -> list[Progress]:
        """Decode until something is ready, or about `seconds` have passed."""
        ...

    def expire(self, key: Hashable) -> None:
        """End a sequence with the text so far; `advance` reports it with finish reason `timeout`.

        Unknown keys are ignored, as are sequences that have ended.
        """
        ...

    def cancel(self, key: Hashable) -> None:
        """Drop a sequence and free what it holds. Unknown keys are ignored."""
        ...

    def alive(self) -> bool:
        """Return False if the engine cannot recover and its process should be replaced."""
        ...

    def chat_prompt(self, messages: Messages, tools: Tools | None = None) -> str | None:
        """Write messages in the model's chat template; None if it has none."""
        ...


def create_engine(weights: Path, config: "EngineConfig") -> Engine:
    """Load the engine that `config.name` asks for: the slow part of a worker's start."""
    if config.name == "openvino":
        from handler.engine.openvino_engine import OpenVINOEngine

        return OpenVINOEngine(weights, config)
    if config.name == "transformers":
        from handler.engine.transformers_engine import TransformersEngine

        return TransformersEngine(weights, config)
    if config.name == "vllm":
        if find_spec("vllm") is None:
            raise ValueError(
                "app.engine.name: vllm is not installed in this environment; install it with make "
                "setup ENGINE=vllm, or use openvino or transformers"
            )
        from handler.engine.vllm_engine import VLLMEngine

        return VLLMEngine(weights, config)
    raise ValueError(
        f"app.engine.name: {config.name!r} is not an engine; use openvino, transformers or vllm"
    )
