"""Any causal language model of the transformers library, on CPU, GPUs or with offload.

Continuous batching, written out: one `forward` a step for all running sequences; new ones are
prefilled and join between steps (`batch.py`). Of a model it needs only `forward` with a key-value
cache. So it also runs models that accelerate has spread over RAM and disk, which transformers' own
continuous batching does not; LOG.md compares the two.

A prompt of more than `max_prefill_tokens` is prefilled in chunks, with a decode step for the others
after each. So no forward pass takes long, and short prompts may go between the chunks.

Models that cache more than keys and values, such as Mamba, run one sequence at a time, in
transformers' own loop (`generation.py`). A short trial decides which models do, not their names.

Not here: paged attention, speculative decoding.
"""

import inspect
import logging
import math
import time
from collections.abc import Hashable, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from llguidance import LLTokenizer
from torch.nn.functional import pad
from transformers import DynamicCache

from handler.config import EngineConfig
from handler.engine import EngineLoad, Messages, Progress, Sampling, Tools
from handler.engine.batch import Batch, can_batch
from handler.engine.folder import ModelFolder
from handler.engine.generation import GenerationLoop
from handler.engine.json_schema import read_schema
from handler.engine.loading import device_summary, load_model, vocabulary
from handler.engine.positions import context
from handler.engine.reference import score
from handler.engine.sampling import Sampler, logprobs
from handler.engine.self_check import SERVE_ANYWAY, SelfCheckError, compare, complete, prompts
from handler.engine.sequence import Sequence, new_sequence
from handler.engine.waiting import SHARE, Waiting

logger = logging.getLogger(__name__)

_DISTANCES = {"float32": 0.05, "float16": 0.1, "bfloat16": 0.2}
"""How far the logits of a sequence in a batch may be from its own, by dtype; see `_distance`."""

_MAX_FAILURES = 3
"""Forward passes that may fail in a row before the engine counts as dead."""


@dataclass
class _LongPrefill:
    """A prompt whose first `done` tokens are in the cache."""

    sequence: Sequence
    cache: DynamicCache | GenerationLoop
    done: int = 0
    interrupted: bool = False
    """Whether the last forward pass was for others."""


class TransformersEngine:
    """See `handler.engine.Engine` for the contract of the public methods."""

    def __init__(self, weights: Path, config: EngineConfig) -> None:
        if config.threads:
            torch.set_num_threads(config.threads)
        self.config = config
        self.folder = ModelFolder(weights)
        self.model = load_model(weights, config.transformers)
        self.max_context, cut = context(self.folder.config, config.max_context)
        self.end_tokens = self.folder.end_tokens(config.stop_tokens)
        self._takes_positions = "position_ids" in inspect.signature(self.model.forward).parameters
        self._vocabulary = vocabulary(self.model)
        self._waiting = Waiting()
        self._long: _LongPrefill | None = None
        self._batch = Batch()
        self._done: list[Sequence] = []
        self._samplers: dict[Hashable, Sampler] = {}
        self._failures = 0
        self._max_batch = config.max_batch
        self._max_prefill: float = config.transformers.max_prefill_tokens
        self._alone = False
        if not self._can_batch():
            self._serve_alone()
        checked = f", {self._self_check()}" if config.self_check else ""
        self.description = (
            f"engine transformers, {config.transformers.dtype}, "
            f"device {device_summary(self.model)}, {torch.get_num_threads()} threads, "
            f"batch {self._max_batch}, context {self.max_context}{cut}{checked}"
        )

    def submit(self, key: Hashable, prompt: str, sampling: Sampling, *, stream: bool) -> int:
        grammar = read_schema(sampling, lambda: self._reader)
        end_tokens: Set[int] = self.end_tokens
        if grammar and self._reader and not end_tokens:  # then the library chose one
            end_tokens = {self._reader.eos_token}
        sequence = new_sequence(
            key,
            prompt,
            sampling,
            stream=stream,
            folder=self.folder,
            max_context=self.max_context,
            vocabulary=self._vocabulary,
            end_tokens=end_tokens,
        )
        self._waiting.add(sequence)
        self._samplers[key] = Sampler(sampling, sequence.prompt_tokens, grammar)
        return sequence.prompt_tokens

    def advance(self, seconds: float) -> list[Progress]:
        deadline = time.monotonic() + seconds
        while (self._waiting or self._long or self._batch) and not self._ready():
            self._prefill()  # one pass, then a step for all, so that neither starves
            self._decode_step()
            if time.monotonic() >= deadline:
                break
        return self._collect()

    def expire(self, key: Hashable) -> None:
        if sequence := self._waiting.remove(key):
            self._done.append(sequence)
        elif self._long and self._long.sequence.key == key:
            sequence, self._long = self._long.sequence, None
            self._done.append(sequence)
        else:
            sequence = next((s for s in self._batch.sequences if s.key == key), None)
        if sequence:
            sequence.end("timeout")
            self._retire()

    def cancel(self, key: Hashable) -> None:
        self._waiting.remove(key)
        if self._long and self._long.sequence.key == key:
            self._long = None
        self._done = [s for s in self._done if s.key != key]
        self._batch.keep([i for i, s in enumerate(self._batch.sequences) if s.key != key])
        self._samplers.pop(key, None)

    def alive(self) -> bool:
        return self._failures < _MAX_FAILURES

    def chat_prompt(self, messages: Messages, tools: Tools | None = None) -> str | None:
        return self.folder.chat_prompt(messages, tools)

    @property
    def unfinished(self) -> int:
        return len(self._waiting) + bool(self._long) + len(self._batch) + len(self._done)

    @property
    def waiting_tokens(self) -> int:
        return self._waiting.prompt_tokens

    @property
    def load(self) -> EngineLoad:
        running = len(self._batch) + bool(self._long)
        held = sum(len(sequence.token_ids) for sequence in self._batch.sequences)
        held += self._long.done if self._long else 0
        use = held / (self._max_batch * self.max_context)
        # It has no prefix cache.
        return EngineLoad(running, len(self._waiting), self.waiting_tokens, use, 0)

    @cached_property
    def _reader(self) -> LLTokenizer | None:
        """The tokenizer for JSON schemas, made for the first request with one."""
        return self.folder.token_reader(self.end_tokens)

    def _ready(self) -> bool:
        return bool(self._done) or any(s.urgent for s in self._batch.sequences)

    def _prefill(self) -> None:
        """Run one forward pass of prompts: a group of waiting ones, or a chunk of a long one."""
        limit = self._max_prefill
        group: list[Sequence] = []
        if self._long is None:
            group = self._next_group(math.inf)
            if group and group[0].prompt_tokens > limit:
                group[0].start()
                self._long = _LongPrefill(group[0], self._new_cache())
                group = []
        elif not self._long.interrupted:
            group = self._next_group(min(limit, self._long.sequence.prompt_tokens // SHARE))
            self._long.interrupted = bool(group)
        if group:
            self._prefill_group(group)
        elif self._long:
            self._prefill_chunk(self._long)

    def _next_group(self, longest: float) -> list[Sequence]:
        """Take waiting sequences for one forward pass. A prompt too long for it comes alone."""
        limit = self._max_prefill
        running = [*self._batch.sequences, *([self._long.sequence] if self._long else [])]
        room = self._max_batch * self.max_context - sum(sequence.room for sequence in running)
        group: list[Sequence] = []
        widest = 0
        while len(running) + len(group) < self._max_batch and widest * (len(group) + 1) <= limit:
            idle = not running and not group
            sequence = self._waiting.take(room, idle=idle, longest=longest)
            if not sequence:
                break
            group.append(sequence)
            room -= sequence.room
            widest = max(widest, sequence.prompt_tokens)
            longest = min(longest, limit // (len(group) + 1))
        return group

    def _prefill_group(self, group: list[Sequence]) -> None:
        """Run whole prompts through the model; they join the batch."""
        longest = max(sequence.prompt_tokens for sequence in group)
        try:
            ids = torch.zeros(len(group), longest, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for i, sequence in enumerate(group):
                sequence.start()
                start = longest - sequence.prompt_tokens
                ids[i, start:] = torch.tensor(sequence.token_ids)
                mask[i, start:] = 1
            cache = self._new_cache()
            last = self._append(group, self._forward(ids, mask, cache))
        except Exception as error:  # only these prompts are lost
            self._fail(group, error)
        else:
            self._batch.join(Batch(group, last, mask, cache))
            self._retire()

    def _prefill_chunk(self, long: _LongPrefill) -> None:
        """Run the next tokens of a long prompt through the model; after the last ones it joins."""
        sequence, long.interrupted = long.sequence, False
        end = int(min(long.done + self._max_prefill, sequence.prompt_tokens))
        try:
            ids = torch.tensor([sequence.token_ids[long.done : end]])
            mask = torch.ones(1, end, dtype=torch.long)
            logits = self._forward(ids, mask, long.cache)
            long.done = end
            if end < sequence.prompt_tokens:
                return
            last = self._append([sequence], logits)
        except Exception as error:  # only this prompt is lost
            self._fail([sequence], error)
        else:
            self._batch.join(Batch([sequence], last, mask, long.cache))
            self._retire()
        self._long = None

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
    def _forward(
        self, ids: torch.Tensor, mask: torch.Tensor, cache: DynamicCache | GenerationLoop
    ) -> torch.Tensor:
        """Logits [B, vocabulary] after the last of `ids` [B, n], given `mask` [B, T + n]."""
        device = self.model.device
        if isinstance(cache, GenerationLoop):
            logits = cache.forward(ids.to(device))
            self._failures = 0
            return logits
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
        largest, likeliest = (values.tolist() for values in logits.max(-1))
        for i, sequence in enumerate(sequences):
            sampler = self._samplers[sequence.key]
            try:
                if not math.isfinite(largest[i]):
                    raise ArithmeticError("the logits are not numbers (NaN or infinity)")
                token = likeliest[i]
                if not sampler.plain:
                    token = sampler.choose(sequence.token_ids, logits[i])
            except (ArithmeticError, RuntimeError) as error:  # only this sequence fails
                logger.error("no token for a sequence: %s", error)
                sequence.end("error")
            else:
                if sampler.logprobs is not None:
                    chosen, *top = logprobs(logits[i], token, sampler.logprobs)
                    sequence.logprobs.append(self.folder.logprob(*chosen, top))
                sequence.append(token, last=sampler.complete)
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

    def _self_check(self) -> str:
        """Compare with the model's own choices; return the result for the log.

        Raises:
            SelfCheckError: the engine is wrong even with one sequence at a time.
        """
        if "disk" in getattr(self.model, "hf_device_map", {}).values():
            return "no self-check, because layers are on disk"
        begin = time.monotonic()
        texts, note = prompts(
            *(self.folder.encode, self.folder.config, self.max_context),
            *(self.model.num_parameters(), self._vocabulary),
        )
        alone = ""
        if self._max_batch > 1:
            try:
                self._compare(texts, together=True)
            except SelfCheckError as error:
                logger.warning("%s; serving one sequence at a time", error)
                self._serve_alone()
                alone = " with one sequence at a time"
        try:
            self._compare(texts, together=False)
        except SelfCheckError as error:
            raise SelfCheckError(f"{error}; {SERVE_ANYWAY}") from error
        passed = f"self-check passed in {time.monotonic() - begin:.1f} s{alone}"
        return f"{passed} ({note})" if note else passed

    def _compare(self, texts: list[str], *, together: bool) -> None:
        for completion in complete(self, texts, self.folder.encode, together=together):
            gaps = score(self.model, completion.prompt, completion.generated).gaps
            compare(completion, gaps, self.config.transformers.dtype, self.folder.decode)

    def _new_cache(self) -> DynamicCache | GenerationLoop:
        return GenerationLoop(self.model) if self._alone else DynamicCache(config=self.model.config)

    def _serve_alone(self) -> None:
        """Serve one sequence at a time, in the loop of `generate`, which takes whole prompts."""
        self._alone, self._max_batch, self._max_prefill = True, 1, math.inf

    def _can_batch(self) -> bool:
        """Return whether a sequence gets the same logits in a batch as in `generate`.

        In the batch, it is padded, and its prompt comes in two chunks.

        Raises:
            ValueError: the model cannot generate, or its logits are not numbers.
        """
        rows = self._vocabulary
        ids = torch.arange(rows // 2, rows // 2 + 14).remainder(rows).view(2, 7)
        mask = torch.ones_like(ids)
        mask[0, :2] = 0  # the first row is the shorter sequence
        alone = GenerationLoop(self.model)
        try:
            expected = [self._forward(ids[:1, i:j], mask, alone)[0] for i, j in [(2, 6), (6, 7)]]
        except Exception as error:
            name = type(self.model).__name__
            raise ValueError(
                f"{name} cannot generate with the transformers engine: {error}"
            ) from error
        if not all(logits.max().isfinite() for logits in expected):
            raise ValueError(
                "the model's logits are not numbers (NaN): its weights are damaged, or too large "
                f"for app.engine.transformers.dtype: {self.config.transformers.dtype}"
            )
        cache = DynamicCache(config=self.model.config)
        try:
            parts = [(0, 3), (3, 6), (6, 7)]
            got = [self._forward(ids[:, i:j], mask[:, :j], cache)[0] for i, j in parts][1:]
        except Exception as error:
            logger.info("this model cannot be batched: %s", error)
            return False
        if getattr(self.model.config.get_text_config(), "attn_temperature_tuning", False):
            return False  # it depends on the position in the cache, which counts padding
        tolerance = _DISTANCES[self.config.transformers.dtype]
        pairs = zip(got, expected, strict=True)
        return can_batch(cache) and all(_distance(*pair) <= tolerance for pair in pairs)


def _distance(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Return how far logits are from the expected ones, in standard deviations of these."""
    finite = expected.isfinite()  # some models give minus infinity to ids that are no tokens
    difference = (logits - expected)[finite].float()
    return float(difference.square().mean().sqrt() / expected[finite].float().std())
