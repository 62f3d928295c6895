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
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.functional import pad
from transformers import DynamicCache

from handler.config import EngineConfig
from handler.engine import Progress, Sampling
from handler.engine.batch import Batch, can_batch
from handler.engine.folder import ModelFolder
from handler.engine.loading import device_summary, load_model
from handler.engine.sampling import Sampler
from handler.engine.sequence import Sequence, new_sequence

logger = logging.getLogger(__name__)

_MAX_FAILURES = 3
"""Forward passes that may fail in a row before the engine counts as dead."""


class _Row(NamedTuple):
    sequence: Sequence
    sampler: Sampler


class TransformersEngine:
    """See `handler.engine.Engine` for the contract of the public methods."""

    def __init__(self, weights: Path, config: EngineConfig) -> None:
        if config.threads:
            torch.set_num_threads(config.threads)
        self.config = config
        self.folder = ModelFolder(weights)
        self.model = load_model(weights, config.transformers)
        limit = self.folder.context_length()
        self.max_context = min(config.max_context or limit, limit)
        self._ends = self.folder.end_tokens(config.stop_tokens)
        self._takes_positions = "position_ids" in inspect.signature(self.model.forward).parameters
        self._waiting: deque[_Row] = deque()
        self._batch = Batch()
        self._done: list[_Row] = []
        self._failures = 0
        self._max_batch = config.max_batch if self._warm_up() else 1
        self.description = (
            f"engine transformers, {config.transformers.dtype}, "
            f"device {device_summary(self.model)}, {torch.get_num_threads()} threads, "
            f"batch {self._max_batch}, context {self.max_context}"
        )

    def submit(self, key: Hashable, prompt: str, sampling: Sampling, *, stream: bool) -> int:
        sequence = new_sequence(
            key,
            prompt,
            sampling,
            stream=stream,
            folder=self.folder,
            max_context=self.max_context,
            ends=self._ends,
        )
        self._waiting.append(_Row(sequence, Sampler(sampling)))
        return sequence.prompt_tokens

    def advance(self, seconds: float) -> list[Progress]:
        deadline = time.monotonic() + seconds
        while self._waiting or self._batch:
            self._prefill()  # one group, then a step for all: neither can starve the other
            self._decode_step()
            if self._ready() or time.monotonic() >= deadline:
                break
        return self._collect()

    def cancel(self, key: Hashable) -> None:
        self._waiting = deque(row for row in self._waiting if row.sequence.key != key)
        self._done = [row for row in self._done if row.sequence.key != key]
        self._batch.keep([i for i, r in enumerate(self._batch.rows) if r.sequence.key != key])

    def alive(self) -> bool:
        return self._failures < _MAX_FAILURES

    def chat_prompt(self, messages: list[dict[str, str]]) -> str | None:
        return self.folder.chat_prompt(messages)

    @property
    def running(self) -> int:
        """Sequences that hold a place in the batch."""
        return len(self._batch)

    def _ready(self) -> bool:
        return bool(self._done) or any(row.sequence.urgent for row in self._batch.rows)

    def _prefill(self) -> None:
        """Run waiting prompts through the model, as many as fit, and let them join the batch."""
        group: list[_Row] = []
        longest = 0
        while self._waiting and len(self._batch) + len(group) < self._max_batch:
            longest = max(longest, self._waiting[0].sequence.prompt_tokens)
            if group and longest * (len(group) + 1) > self.config.transformers.max_prefill_tokens:
                break
            group.append(self._waiting.popleft())
        if not group:
            return
        longest = max(row.sequence.prompt_tokens for row in group)
        try:
            ids = torch.zeros(len(group), longest, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for i, row in enumerate(group):
                row.sequence.start()
                start = longest - row.sequence.prompt_tokens
                ids[i, start:] = torch.tensor(row.sequence.ids)
                mask[i, start:] = 1
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
        self._done += [row for row in rows if row.sequence.finish_reason]
        self._batch.keep([i for i, row in enumerate(rows) if not row.sequence.finish_reason])

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

    def _append(self, rows: list[_Row], logits: torch.Tensor) -> torch.Tensor:
        """Choose a token for each row, record it, and return them all [B]."""
        largest = logits.argmax(-1).tolist()
        for i, (sequence, sampler) in enumerate(rows):
            try:
                token = largest[i] if sampler.plain else sampler.choose(sequence.ids, logits[i])
            except RuntimeError as error:  # logits that are not numbers: this row's trouble alone
                logger.error("sampling failed", exc_info=error)
                sequence.end("error")
            else:
                sequence.append(token)
        return torch.tensor([row.sequence.ids[-1] for row in rows])

    def _collect(self) -> list[Progress]:
        """Hand out finished sequences and new text."""
        rows = self._done + [row for row in self._batch.rows if row.sequence.pending]
        self._done = []
        return [row.sequence.progress() for row in rows]

    def _fail(self, rows: list[_Row], error: Exception) -> None:
        self._failures += 1
        logger.error("forward pass failed for %d sequences", len(rows), exc_info=error)
        for row in rows:
            row.sequence.end("error")
        self._done += rows

    def _warm_up(self) -> bool:
        """Run two tokens through the model; return whether its cache can be batched."""
        cache = DynamicCache(config=self.model.config)
        token = torch.tensor([[next(iter(self._ends), 0)]])
        self._forward(token, torch.ones(1, 1, dtype=torch.long), cache)
        self._forward(token, torch.ones(1, 2, dtype=torch.long), cache)
        return can_batch(cache)
