"""Any causal language model of the transformers library, on CPU, GPUs or with offload.

Continuous batching in the open: one `forward` a step for all running sequences, new ones are
prefilled and join between steps (`batch.py`). It needs nothing of a model but `forward` with a
key-value cache, so it also runs models that accelerate has spread over RAM and disk, which
transformers' own continuous batching does not; LOG.md has both measured against each other.

Not here: paged attention, chunked prefill, speculative decoding.
"""

import inspect
import logging
import time
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn.functional import pad
from transformers import AutoTokenizer, DynamicCache

from handler.config import EngineConfig
from handler.engine import Progress, PromptError, Sampling
from handler.engine.batch import Batch, can_batch
from handler.engine.loading import context_length, device_summary, end_tokens, load_model
from handler.engine.sampling import Sampler
from handler.engine.text import TextStream

logger = logging.getLogger(__name__)

_MAX_FAILURES = 3
"""Forward passes that may fail in a row before the engine counts as dead."""


@dataclass
class _Sequence:
    key: Hashable
    ids: list[int]
    prompt_tokens: int
    max_new_tokens: int
    sampler: Sampler
    text: TextStream
    stream: bool
    pending: str = ""
    finish_reason: str | None = None
    shown: bool = False
    submitted: float = field(default_factory=time.monotonic)
    started: float = 0.0

    @property
    def completion_tokens(self) -> int:
        return len(self.ids) - self.prompt_tokens

    def progress(self) -> Progress:
        """Hand out what is new."""
        text, self.pending = self.pending, ""
        self.shown = self.shown or bool(text)
        waited = self.started - self.submitted
        return Progress(self.key, text, self.completion_tokens, self.finish_reason, waited)


class TransformersEngine:
    """See `handler.engine.Engine` for the contract of the public methods."""

    def __init__(self, weights: Path, config: EngineConfig) -> None:
        if config.threads:
            torch.set_num_threads(config.threads)
        self.config = config
        self.tokenizer = AutoTokenizer.from_pretrained(weights, local_files_only=True)
        self.model = load_model(weights, config)
        limit = context_length(self.model.config)
        self.max_context = min(config.max_context or limit, limit)
        self._eos = end_tokens(self.model, self.tokenizer, config.stop_tokens)
        self._takes_positions = "position_ids" in inspect.signature(self.model.forward).parameters
        self._waiting: deque[_Sequence] = deque()
        self._batch = Batch()
        self._done: list[_Sequence] = []
        self._failures = 0
        self._max_batch = config.max_batch if self._warm_up() else 1
        self.description = (
            f"engine transformers, {config.dtype}, device {device_summary(self.model)}, "
            f"{torch.get_num_threads()} threads, batch {self._max_batch}, "
            f"context {self.max_context}"
        )

    def submit(self, key: Hashable, prompt: str, sampling: Sampling, *, stream: bool) -> int:
        ids = self.tokenizer(prompt)["input_ids"]
        if not ids:
            raise PromptError("is empty: give at least one token of text")
        if len(ids) >= self.max_context:
            raise PromptError(
                f"has {len(ids)} tokens; at most {self.max_context - 1} fit into the context of "
                f"{self.max_context} with room for one new token"
            )
        self._waiting.append(
            _Sequence(
                key=key,
                ids=ids,
                prompt_tokens=len(ids),
                max_new_tokens=min(sampling.max_new_tokens, self.max_context - len(ids)),
                sampler=Sampler(sampling),
                text=TextStream(self._decode, ids, sampling.stop),
                stream=stream,
            )
        )
        return len(ids)

    def advance(self, seconds: float) -> list[Progress]:
        deadline = time.monotonic() + seconds
        while self._waiting or self._batch:
            self._prefill()  # one group, then a step for all: neither can starve the other
            self._decode_step()
            if self._ready() or time.monotonic() >= deadline:
                break
        return self._collect()

    def cancel(self, key: Hashable) -> None:
        self._waiting = deque(s for s in self._waiting if s.key != key)
        self._done = [s for s in self._done if s.key != key]
        self._batch.keep([i for i, row in enumerate(self._batch.rows) if row.key != key])

    def alive(self) -> bool:
        return self._failures < _MAX_FAILURES

    def chat_prompt(self, messages: list[dict[str, str]]) -> str | None:
        if not self.tokenizer.chat_template:
            return None
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        # Some templates write the start token that the tokenizer will add by itself.
        start = self.tokenizer.bos_token_id
        adds_start = start is not None and self.tokenizer("")["input_ids"][:1] == [start]
        return text.removeprefix(self.tokenizer.bos_token) if adds_start else text

    @property
    def running(self) -> int:
        """Sequences that hold a place in the batch."""
        return len(self._batch)

    def _ready(self) -> bool:
        """Whether somebody has been waiting for what there is now."""
        return bool(self._done) or any(
            row.stream and row.pending and not row.shown for row in self._batch.rows
        )

    def _prefill(self) -> None:
        """Run waiting prompts through the model, as many as fit, and let them join the batch."""
        group: list[_Sequence] = []
        longest = 0
        while self._waiting and len(self._batch) + len(group) < self._max_batch:
            longest = max(longest, self._waiting[0].prompt_tokens)
            if group and longest * (len(group) + 1) > self.config.max_prefill_tokens:
                break
            group.append(self._waiting.popleft())
        if not group:
            return
        longest = max(row.prompt_tokens for row in group)
        try:
            ids = torch.zeros(len(group), longest, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for i, row in enumerate(group):
                row.started = time.monotonic()
                ids[i, longest - row.prompt_tokens :] = torch.tensor(row.ids)
                mask[i, longest - row.prompt_tokens :] = 1
            cache = DynamicCache(config=self.model.config)
            last = self._append(group, self._forward(ids, mask, cache))
        except Exception as error:  # nothing but these prompts is lost
            self._fail(group, error)
        else:
            self._batch.join(Batch(group, last, mask, cache))
            self._retire()

    def _decode_step(self) -> None:
        """One new token for every running sequence."""
        batch = self._batch
        if not batch:
            return
        try:
            batch.mask = pad(batch.mask, (0, 1), value=1)
            logits = self._forward(batch.last[:, None], batch.mask, batch.cache)
            batch.last = self._append(batch.rows, logits)
        except Exception as error:  # must not take the server down
            self._fail(batch.rows, error)
            self._batch = Batch()
        else:
            self._retire()

    def _retire(self) -> None:
        """Take finished rows out of the batch."""
        rows = self._batch.rows
        self._done += [row for row in rows if row.finish_reason]
        self._batch.keep([i for i, row in enumerate(rows) if not row.finish_reason])

    @torch.inference_mode()
    def _forward(self, ids: torch.Tensor, mask: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        """Logits [B, vocabulary] after the last of `ids` [B, n], given `mask` [B, T + n]."""
        device = self.model.device
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        if self._takes_positions:
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            inputs["position_ids"] = positions.to(device)
        # Only the last position's logits: all of them would be T x vocabulary floats a sequence.
        out = self.model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        self._failures = 0
        return out.logits[:, -1]

    def _append(self, rows: list[_Sequence], logits: torch.Tensor) -> torch.Tensor:
        """Choose a token for each row, record it, and return them all [B]."""
        largest = logits.argmax(-1).tolist()
        for i, row in enumerate(rows):
            try:
                token = largest[i] if row.sampler.plain else row.sampler.choose(row.ids, logits[i])
            except RuntimeError as error:  # logits that are not numbers: this row's trouble alone
                logger.error("sampling failed", exc_info=error)
                row.finish_reason = "error"
                continue
            row.ids.append(token)
            if token in self._eos:
                row.finish_reason = "stop"
            else:
                row.pending += row.text.push(token)
                if row.text.stopped:
                    row.finish_reason = "stop"
                elif row.completion_tokens >= row.max_new_tokens:
                    row.finish_reason = "length"
            if row.finish_reason:
                row.pending += row.text.finish()
        return torch.tensor([row.ids[-1] for row in rows])

    def _collect(self) -> list[Progress]:
        """Hand out finished sequences and new text."""
        rows = self._done + [row for row in self._batch.rows if row.pending]
        self._done = []
        return [row.progress() for row in rows]

    def _fail(self, rows: list[_Sequence], error: Exception) -> None:
        self._failures += 1
        logger.error("forward pass failed for %d sequences", len(rows), exc_info=error)
        for row in rows:
            row.finish_reason = "error"
        self._done += rows

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _warm_up(self) -> bool:
        """Run two tokens through the model; return whether its cache can be batched."""
        cache = DynamicCache(config=self.model.config)
        token = torch.tensor([[next(iter(self._eos), 0)]])
        self._forward(token, torch.ones(1, 1, dtype=torch.long), cache)
        self._forward(token, torch.ones(1, 2, dtype=torch.long), cache)
        return can_batch(cache)
