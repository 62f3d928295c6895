"""Any causal language model of the transformers library, on CPU, GPUs or with offload.

Continuous batching, written out: one `forward` a step for all running sequences; new ones are
prefilled and join between steps (`batch.py`). Of a model it needs only `forward` with a key-value
cache. So it also runs models that accelerate has spread over RAM and disk, which transformers' own
continuous batching does not; LOG.md compares the two.

Not here: paged attention, chunked prefill, speculative decoding.
"""

import inspect
import logging
import time
from collections import deque
from collections.abc import Hashable
from pathlib import Path

import torch
from torch.nn.functional import pad
from transformers import DynamicCache

from handler.config import EngineConfig
from handler.engine import Messages, Progress, Sampling
from handler.engine.batch import Batch, can_batch
from handler.engine.folder import ModelFolder
from handler.engine.loading import device_summary, load_model
from handler.engine.sampling import Sampler
from handler.engine.sequence import Sequence, new_sequence

logger = logging.getLogger(__name__)

_MAX_FAILURES = 3
"""Forward passes that may fail in a row before the engine counts as dead."""


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
        self.end_tokens = self.folder.end_tokens(config.stop_tokens)
        self._takes_positions = "position_ids" in inspect.signature(self.model.forward).parameters
        self._waiting: deque[Sequence] = deque()
        self._batch = Batch()
        self._done: list[Sequence] = []
        self._samplers: dict[Hashable, Sampler] = {}
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
            end_tokens=self.end_tokens,
        )
        self._waiting.append(sequence)
        self._samplers[key] = Sampler(sampling)
        return sequence.prompt_tokens

    def advance(self, seconds: float) -> list[Progress]:
        deadline = time.monotonic() + seconds
        while self._waiting or self._batch:
            self._prefill()  # one group, then a step for all, so that neither starves
            self._decode_step()
            if self._ready() or time.monotonic() >= deadline:
                break
        return self._collect()

    def cancel(self, key: Hashable) -> None:
        self._waiting = deque(s for s in self._waiting if s.key != key)
        self._done = [s for s in self._done if s.key != key]
        self._batch.keep([i for i, s in enumerate(self._batch.sequences) if s.key != key])
        self._samplers.pop(key, None)

    def alive(self) -> bool:
        return self._failures < _MAX_FAILURES

    def chat_prompt(self, messages: Messages) -> str | None:
        return self.folder.chat_prompt(messages)

    @property
    def unfinished(self) -> int:
        return len(self._waiting) + len(self._batch) + len(self._done)

    def _ready(self) -> bool:
        return bool(self._done) or any(s.urgent for s in self._batch.sequences)

    def _prefill(self) -> None:
        """Run waiting prompts through the model, as many as fit, and let them join the batch."""
        group: list[Sequence] = []
        longest = 0
        while self._waiting and len(self._batch) + len(group) < self._max_batch:
            longest = max(longest, self._waiting[0].prompt_tokens)
            if group and longest * (len(group) + 1) > self.config.transformers.max_prefill_tokens:
                break
            group.append(self._waiting.popleft())
        if not group:
            return
        longest = max(sequence.prompt_tokens for sequence in group)
        try:
            ids = torch.zeros(len(group), longest, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for i, sequence in enumerate(group):
                sequence.start()
                start = longest - sequence.prompt_tokens
                ids[i, start:] = torch.tensor(sequence.token_ids)
                mask[i, start:] = 1
            cache = DynamicCache(config=self.model.config)
            last = self._append(group, self._forward(ids, mask, cache))
        except Exception as error:  # only these prompts are lost
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
            batch.last = self._append(batch.sequences, logits)
        except Exception as error:  # only this batch is lost, not the server
            self._fail(batch.sequences, error)
            self._batch = Batch()
        else:
            self._retire()

    def _retire(self) -> None:
        """Remove finished sequences from the batch."""
        sequences = self._batch.sequences
        self._done += [s for s in sequences if s.finish_reason]
        self._batch.keep([i for i, s in enumerate(sequences) if not s.finish_reason])

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

    def _append(self, sequences: list[Sequence], logits: torch.Tensor) -> torch.Tensor:
        """Choose a token for each sequence, record it, and return them all [B]."""
        largest = logits.argmax(-1).tolist()
        for i, sequence in enumerate(sequences):
            sampler = self._samplers[sequence.key]
            try:
                token = largest[i]
                if not sampler.plain:
                    token = sampler.choose(sequence.token_ids, logits[i])
            except RuntimeError as error:  # logits that are not numbers: only this sequence fails
                logger.error("sampling failed", exc_info=error)
                sequence.end("error")
            else:
                sequence.append(token)
        return torch.tensor([sequence.token_ids[-1] for sequence in sequences])

    def _collect(self) -> list[Progress]:
        """Report finished sequences and new text."""
        progress = [s.progress() for s in self._done]
        for sequence in self._done:
            self._samplers.pop(sequence.key, None)
        self._done = []
        return progress + [s.progress() for s in self._batch.sequences if s.pending]

    def _fail(self, sequences: list[Sequence], error: Exception) -> None:
        self._failures += 1
        logger.error("forward pass failed for %d sequences", len(sequences), exc_info=error)
        for sequence in sequences:
            sequence.end("error")
        self._done += sequences

    def _warm_up(self) -> bool:
        """Run two tokens through the model; return whether its cache can be batched."""
        cache = DynamicCache(config=self.model.config)
        token = torch.tensor([[next(iter(self.end_tokens), 0)]])
        self._forward(token, torch.ones(1, 1, dtype=torch.long), cache)
        self._forward(token, torch.ones(1, 2, dtype=torch.long), cache)
        return can_batch(cache)
