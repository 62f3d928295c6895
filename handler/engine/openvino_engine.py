"""OpenVINO GenAI's continuous-batching pipeline: the fast engine on a CPU.

It has paged attention, so nothing is padded or copied when sequences join. The weights have 8 or 4
bits; they were quantized when the archive was made (`deploy.archive.export`). The pipeline runs in
the handler's thread: `step()` holds the interpreter lock, so any other thread would starve.

It needs neither torch nor transformers. Not here: draft models, several devices.
"""

import logging
import time
from collections.abc import Hashable, Set
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import openvino
import openvino.opset13 as ops
import openvino_genai as genai

from handler.config import EngineConfig, OpenVINOConfig
from handler.engine import EngineLoad, Messages, ParameterError, Progress, Sampling, Tools
from handler.engine.folder import ModelFolder
from handler.engine.json_schema import for_xgrammar, read_schema, tokens_for_xgrammar
from handler.engine.partial_blocks import PartialBlocks
from handler.engine.positions import context
from handler.engine.self_check import RECORD, Record, check_record
from handler.engine.sequence import Sequence, new_sequence
from handler.engine.waiting import SHARE, Waiting
from handler.memory import GIB, check_memory

logger = logging.getLogger(__name__)

_NGRAM = 3
"""Longest run of tokens that prompt lookup looks for in the earlier text."""

_STEPS_OF_A_PART = 4
"""Steps in which a part of a long prompt is prefilled. Short prompts wait until it is. Fewer steps
leave more tokens of the last step unused."""

_GOOD = (genai.GenerationStatus.RUNNING, genai.GenerationStatus.FINISHED)

_BLOCK_TOKENS = 32
"""Tokens in a block of the pipeline's KV cache on a CPU. A test fills the cache that follows."""

_SMALLEST_TOP_P = 1e-30
"""The pipeline reads it in 32 bits, where a smaller one can be 0, which it rejects. The likeliest
token alone has a higher probability, so the result is the same."""


_OTHER_ENGINE = "serve the model with ENGINE=transformers"


@dataclass
class _Running:
    """A sequence in the pipeline.

    `handle` belongs to a request with the first `end` tokens of the prompt. If these are not all,
    its only purpose is to put them into the prefix cache. `begin` tokens were there before.
    """

    sequence: Sequence
    generation: genai.GenerationConfig
    handle: "genai.GenerationHandle"  # only the type stubs have it
    begin: int
    end: int

    @property
    def in_prefill(self) -> bool:
        """Whether it has no token yet."""
        return not self.sequence.completion_tokens and not self.sequence.finish_reason

    @property
    def may_share(self) -> bool:
        """Whether the last block of its prompt is not its own yet. It is after the second token."""
        return (
            len(self.sequence.token_ids) < self.sequence.prompt_tokens + 2 and not self.part_is_done
        )

    @property
    def is_part(self) -> bool:
        """Whether the request has only a part of the prompt."""
        return self.end < self.sequence.prompt_tokens

    @property
    def part_is_done(self) -> bool:
        """Whether the next part can be added."""
        finished = self.handle.get_status() == genai.GenerationStatus.FINISHED
        return self.in_prefill and self.is_part and finished


class OpenVINOEngine:
    """See `handler.engine.Engine` for the contract of the public methods.

    The pipeline prefills prompts in the order in which it gets them, one after the other. So
    sequences wait here, and the pipeline gets only as many as fill its next step. With prefix
    caching it gets long prompts in parts, and short prompts go between the parts.
    """

    def __init__(self, weights: Path, config: EngineConfig, *, exact_cache: bool = False) -> None:
        """Load the model. With `exact_cache`, keys and values are not rounded to 16 bits."""
        settings = config.openvino
        options = properties(config) | _speculation(settings)
        if exact_cache:
            options["KV_CACHE_PRECISION"] = "f32"
        self.folder = ModelFolder(weights)
        self.end_tokens = self.folder.end_tokens(config.stop_tokens)
        model = sum(path.stat().st_size for path in weights.glob("*.bin"))
        self._pipeline = genai.ContinuousBatchingPipeline(
            weights, self._vocabulary(), _scheduler(config, weights, model), "CPU", **options
        )
        self._step_tokens = settings.max_num_batched_tokens
        self._prefix_caching = _caches_prefixes(settings)
        self._waiting = Waiting()
        self._generations: dict[Hashable, genai.GenerationConfig] = {}
        """Of the waiting sequences."""
        self._running: dict[Hashable, _Running] = {}
        """In the pipeline, in its order."""
        self._ended: list[Sequence] = []
        """Ended before they were in the pipeline; not reported yet."""
        self._dropped: list[_Running] = []
        """Of sequences that were dropped in their prefill, which must not be cancelled yet."""
        self._lookup = settings.prompt_lookup
        self._submitted = 0
        self._alive = True
        self.cache_tokens = self._warm_up()
        # A block can end up to 32 texts before another takes it, so each token may be an end.
        self._partial_blocks = PartialBlocks(_BLOCK_TOKENS, self.cache_tokens)
        _check_memory(settings)
        wanted, cut = context(self.folder.config, config.max_context)
        self.max_context = min(wanted, self.cache_tokens - self._lookup)
        if self.max_context < wanted:
            cut = f" instead of {wanted}, to fit into the cache"
        self.description = (
            f"engine openvino, {settings.precision}, device cpu, "
            f"{config.threads or 'all'} threads, batch {config.max_batch}, "
            f"KV cache {settings.cache_gb} GB for {self.cache_tokens} tokens, "
            f"context {self.max_context}{cut}"
            + (f", prompt lookup of {self._lookup} tokens" if self._lookup else "")
        )
        if config.self_check:
            self.description += f", {self._self_check(weights / RECORD)}"

    def submit(self, key: Hashable, prompt: str, sampling: Sampling, *, stream: bool) -> int:
        _check(sampling)
        end_tokens: Set[int] = self.end_tokens
        if read_schema(sampling, lambda: self.folder.reader):
            end_tokens = end_tokens or {0}  # as `_generation`
        sequence = new_sequence(
            key,
            prompt,
            sampling,
            stream=stream,
            folder=self.folder,
            max_context=self.max_context,
            vocabulary=self.folder.vocabulary(),
            end_tokens=end_tokens,
        )
        self._generations[key] = _generation(
            sampling, sequence.max_new_tokens, sequence.end_tokens, self._lookup
        )
        self._waiting.add(sequence)
        return sequence.prompt_tokens

    def advance(self, seconds: float) -> list[Progress]:
        deadline = time.monotonic() + seconds
        while self._waiting or self._running:
            if self._ready():
                break
            try:
                self._admit()
                self._pipeline.step()
            except Exception:  # the state of the pipeline is unknown now
                logger.exception("the pipeline failed with %d sequences", self.unfinished)
                self._alive = False
                self._ended += self._waiting.clear()
                for sequence in [*self._ended, *(r.sequence for r in self._running.values())]:
                    sequence.end("error")
            else:
                self._read()
            if time.monotonic() >= deadline:
                break
        return self._collect()

    def expire(self, key: Hashable) -> None:
        if sequence := self._waiting.remove(key):
            self._ended.append(sequence)
        elif key in self._running:
            sequence = self._running[key].sequence
            self._stop(self._running[key])
        if sequence:
            sequence.end("timeout")

    def cancel(self, key: Hashable) -> None:
        self._waiting.remove(key)
        self._generations.pop(key, None)
        self._ended = [sequence for sequence in self._ended if sequence.key != key]
        if key in self._running:
            self._stop(self._remove(key))

    def alive(self) -> bool:
        return self._alive

    def chat_prompt(self, messages: Messages, tools: Tools | None = None) -> str | None:
        return self.folder.chat_prompt(messages, tools)

    @property
    def unfinished(self) -> int:
        return len(self._waiting) + len(self._running) + len(self._ended)

    @property
    def waiting_tokens(self) -> int:
        return self._waiting.prompt_tokens

    @property
    def load(self) -> EngineLoad:
        # In percent, after the last step. Blocks of ended sequences, which stay in the prefix cache
        # until others need them, do not count. How much of a prompt was there, GenAI does not say.
        use = self._pipeline.get_metrics().cache_usage / 100 if self._running else 0.0
        return EngineLoad(len(self._running), len(self._waiting), self.waiting_tokens, use)

    def _ready(self) -> bool:
        return bool(self._ended) or any(r.sequence.urgent for r in self._running.values())

    def _admit(self) -> None:
        """Add waiting sequences to the pipeline, until their prompts fill its next step."""
        for long in [running for running in self._running.values() if running.part_is_done]:
            self._let_shorter_in(long.sequence)
            if self._is_ready(long.sequence, begin=long.end):
                self._add(long.sequence, long.generation, begin=long.end)
        while self._prefill_tokens() < self._step_tokens:
            idle = not self._running and not self._dropped
            sequence = self._waiting.take(self._room(), idle=idle, ready=self._is_ready)
            if not sequence:
                return
            self._add(sequence, self._generations.pop(sequence.key))

    def _is_ready(self, sequence: Sequence, begin: int = 0) -> bool:
        """Return whether the next part of its prompt can be prefilled beside what is prefilled now.

        See `handler.engine.partial_blocks`.
        """
        if not self._prefix_caching:
            return True
        tokens = sequence.token_ids[: self._part_end(sequence, begin)]
        others = [*self._dropped, *(r for r in self._running.values() if r.may_share)]
        texts = self._texts()
        return not any(
            self._partial_blocks.clash(tokens, other.sequence.token_ids[: other.end], texts)
            for other in others
        )

    def _texts(self) -> list[list[int]]:
        """Return what the cache has of the sequences that generate."""
        return [
            _in_cache(r.sequence) for r in self._running.values() if r.sequence.completion_tokens
        ]

    def _let_shorter_in(self, long: Sequence) -> None:
        """Let short prompts, as many as fill a step, go before the next part of a long one."""
        longest = min(long.prompt_tokens // SHARE, self._step_tokens)
        added = 0
        while added < self._step_tokens:
            short = self._waiting.take(
                self._room(), idle=False, longest=longest, ready=self._is_ready
            )
            if not short:
                return
            self._add(short, self._generations.pop(short.key))
            added += short.prompt_tokens

    def _prefill_tokens(self) -> int:
        """Return the prompt tokens in the pipeline of sequences that have no token yet.

        Those of dropped sequences count: the pipeline prefills them before what comes next.
        """
        in_prefill = [r for r in self._running.values() if r.in_prefill]
        return sum(r.end - r.begin for r in [*in_prefill, *self._dropped])

    def _part_end(self, sequence: Sequence, begin: int) -> int:
        """Return where the part of a prompt ends that begins at `begin`: after a whole block."""
        if not self._prefix_caching:
            return sequence.prompt_tokens
        decoding = sum(not running.in_prefill for running in self._running.values())
        tokens = _STEPS_OF_A_PART * max(self._step_tokens - decoding, 0)
        end = begin + max(tokens // _BLOCK_TOKENS, 1) * _BLOCK_TOKENS
        return min(end, sequence.prompt_tokens)

    def _stop(self, running: _Running) -> None:
        """Let the pipeline drop a sequence.

        GenAI registers a block of the prefix cache when it allocates it. Cancelled in the middle of
        a block, a prefill would leave a block there that is not computed, for the next prompt
        that begins alike. So a prefill is cancelled after it is complete.
        """
        if self._prefix_caching and not running.sequence.completion_tokens:
            self._dropped.append(running)
        else:
            running.handle.cancel()

    def _room(self) -> int:
        """Return the tokens that the cache can hold beside the longest text of what runs."""
        held = sum(r.sequence.room for r in self._running.values())
        return self.cache_tokens - held - sum(r.end + 1 for r in self._dropped)

    def _add(self, sequence: Sequence, generation: genai.GenerationConfig, begin: int = 0) -> None:
        """Add a sequence to the pipeline, behind all others, or the next part of its prompt."""
        sequence.start()
        self._running.pop(sequence.key, None)
        end = self._part_end(sequence, begin)
        ids = openvino.Tensor(np.array([sequence.token_ids[:end]], dtype=np.int64))
        part = end < sequence.prompt_tokens
        request = _generation(Sampling(), 1, frozenset(), self._lookup) if part else generation
        self._submitted += 1
        try:
            handle = self._pipeline.add_request(self._submitted, ids, request)
        except Exception:  # only this sequence is lost
            logger.exception("the pipeline rejected a sequence")
            sequence.end("error")
            self._ended.append(sequence)
            return
        self._running[sequence.key] = _Running(sequence, generation, handle, begin, end)
        if self._prefix_caching:
            for text in self._texts():  # it keeps the block of a text that is being generated
                if sequence.token_ids[: len(text)] == text:
                    self._partial_blocks.add(text)
            self._partial_blocks.add(sequence.token_ids[:end])

    def _read(self) -> None:
        """Read the new tokens of every sequence from the pipeline."""
        for dropped in list(self._dropped):
            handle = dropped.handle
            if handle.can_read() or handle.get_status() != genai.GenerationStatus.RUNNING:
                handle.cancel()
                self._dropped.remove(dropped)
        for running in self._running.values():
            sequence, handle = running.sequence, running.handle
            if running.is_part:
                if handle.get_status() not in _GOOD:
                    sequence.end("error")
                continue
            while handle.can_read():
                # Empty if the pipeline gave the sequence up, for example for lack of cache.
                for output in handle.read().values():
                    values = output.generated_log_probs
                    for token, value in zip(output.generated_ids, values, strict=True):
                        if not sequence.finish_reason:
                            if running.generation.logprobs:
                                sequence.logprobs.append(self.folder.logprob(token, value))
                            sequence.append(token)
            status = handle.get_status()
            if status == genai.GenerationStatus.RUNNING:
                if sequence.finish_reason:
                    handle.cancel()  # a stop string ended it; the pipeline does not know them
            elif not sequence.finish_reason:
                sequence.end("stop" if status == genai.GenerationStatus.FINISHED else "error")

    def _collect(self) -> list[Progress]:
        sequences = [*self._ended, *(running.sequence for running in self._running.values())]
        out = [s.progress() for s in sequences if s.pending or s.finish_reason]
        for progress in out:
            if progress.finish_reason:
                self._generations.pop(progress.key, None)
                if progress.key in self._running:
                    self._remove(progress.key)
        self._ended = []
        return out

    def _remove(self, key: Hashable) -> _Running:
        """Take out a sequence that has ended. Its text stays in the prefix cache."""
        running = self._running.pop(key)
        if self._prefix_caching and running.sequence.completion_tokens:
            self._partial_blocks.add(_in_cache(running.sequence))
        return running

    def _self_check(self, record: Path) -> str:
        """Repeat the check that was recorded after the export; return the result for the log."""
        if not record.is_file():
            return "no self-check, because the archive was made without it"
        return check_record(self, self.folder.encode, Record.read(record))

    def _vocabulary(self) -> genai.Tokenizer:
        """Return the tokens by id, as GenAI needs them for JSON schemas; none if not known.

        GenAI reads them from the constants of a node with this name in a detokenizer's model. It
        calls the model once. Text is decoded elsewhere.
        """
        tokens = tokens_for_xgrammar(self.folder.reader, self.end_tokens or {0})
        tokens = tokens[: self.folder.vocabulary()]
        lengths = np.array([len(token) for token in tokens], dtype=np.int64)
        ends = lengths.cumsum()
        ids = ops.parameter([-1, -1], np.int64)
        parts = [ops.reshape(ids, ops.constant([-1]), False)]
        for values in (ends - lengths, ends, np.frombuffer(b"".join(tokens), np.uint8)):
            parts.append(ops.constant(values.astype(np.int64)))
        node = ops.concat(parts, 0)
        node.set_friendly_name("VocabDecoder")
        with TemporaryDirectory() as path:
            openvino.save_model(openvino.Model([node], [ids]), f"{path}/openvino_detokenizer.xml")
            return genai.Tokenizer(path)

    def _warm_up(self) -> int:
        """Run one short request, since the first forward pass compiles and allocates.

        Returns:
            The tokens that the KV cache holds. The request took one block of it.
        """
        token = next(iter(self.end_tokens), 0)
        request = openvino.Tensor(np.array([[token] * 8], dtype=np.int64))
        generation = _generation(Sampling(), 2, frozenset(), self._lookup)  # no early end
        # Without the handle the pipeline would drop the request and run nothing.
        handle = self._pipeline.add_request(0, request, generation)
        percent = 0.0
        while handle.get_status() == genai.GenerationStatus.RUNNING:
            self._pipeline.step()
            percent = max(percent, self._pipeline.get_metrics().cache_usage)
        return round(100 / percent) * _BLOCK_TOKENS


def _in_cache(sequence: Sequence) -> list[int]:
    """Return the tokens of a sequence that generates whose keys and values are in the cache."""
    return sequence.token_ids[:-1]


def _check(sampling: Sampling) -> None:
    """Reject what GenAI lacks or does wrong.

    Raises:
        ParameterError: names the other engine.
    """
    if sampling.logprobs:
        raise ParameterError(
            "logprobs",
            "asks for other tokens than the chosen one, which the engine openvino does not report: "
            f"use 0 for the chosen token alone, or {_OTHER_ENGINE}",
        )
    for name in ("presence_penalty", "frequency_penalty"):
        if getattr(sampling, name):
            # GenAI 2026.4 moves a logit towards zero, so it makes repetition likelier where the
            # logit is negative. A test notices when this changes.
            raise ParameterError(
                name,
                "must be 0 with the engine openvino, which would make some tokens likelier "
                f"instead: use repetition_penalty, or {_OTHER_ENGINE}",
            )


def _generation(
    sampling: Sampling, max_new_tokens: int, end_tokens: Set[int], lookup: int = 0
) -> genai.GenerationConfig:
    config = genai.GenerationConfig()
    config.max_new_tokens = max_new_tokens
    # GenAI takes an empty set for the end token of the model's files, or for -1, which it rejects.
    config.stop_token_ids = set(end_tokens) or {0}
    config.eos_token_id = min(config.stop_token_ids)
    config.ignore_eos = not end_tokens
    if lookup:
        config.num_assistant_tokens, config.max_ngram_size = lookup, _NGRAM
    config.repetition_penalty = sampling.repetition_penalty
    # GenAI reports the chosen token's value, before penalties, temperature and filters.
    config.logprobs = int(sampling.logprobs is not None)
    if sampling.json_schema is not None:
        config.structured_output_config = genai.StructuredOutputConfig(
            json_schema=for_xgrammar(sampling.json_schema)
        )
    config.do_sample = sampling.temperature > 0
    if config.do_sample:
        config.temperature = sampling.temperature
        config.top_p = max(sampling.top_p, _SMALLEST_TOP_P)
        if sampling.top_k:
            config.top_k = sampling.top_k
        config.min_p = sampling.min_p
        config.rng_seed = sampling.random_state
    return config


def properties(config: EngineConfig) -> dict[str, str | int]:
    """Return OpenVINO's settings for the model."""
    chosen: dict[str, str | int] = {
        # On processors with bfloat16 OpenVINO would choose it. An early export then answered
        # wrongly; today's does not, but only SmolLM2 was checked. See LOG.md.
        "INFERENCE_PRECISION_HINT": config.openvino.inference_precision,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": config.openvino.dynamic_quantization,
    }
    if config.threads:
        chosen["INFERENCE_NUM_THREADS"] = config.threads
    return chosen


def _speculation(config: OpenVINOConfig) -> dict[str, bool]:
    """Return the setting for prompt lookup, which holds for all requests of a pipeline."""
    return {"prompt_lookup": True} if config.prompt_lookup else {}


def _caches_prefixes(settings: OpenVINOConfig) -> bool:
    """Return whether the pipeline has a prefix cache: not together with prompt lookup.

    GenAI 2026.4.1 keeps the hash of a block that was filled with guessed tokens when they turn out
    wrong. A later prompt with these tokens would get the block, whose keys and values are others.
    """
    return settings.prefix_caching and not settings.prompt_lookup


def _check_memory(settings: OpenVINOConfig, **sizes: int) -> None:
    """Make sure that the KV cache fits into memory when it is full.

    Args:
        settings: the engine's.
        sizes: `model` in bytes before it is loaded; nothing afterwards, when this process has
            reserved the cache but not used it.
    """
    parts = {f"the {name}": size for name, size in sizes.items()}
    parts["the KV cache"] = int(settings.cache_gb * GIB)
    setting = f"app.engine.openvino.cache_gb: {settings.cache_gb}"
    check_memory(setting, parts, reserved=not sizes)


def _scheduler(config: EngineConfig, weights: Path, model: int = 0) -> genai.SchedulerConfig:
    settings = config.openvino
    _check_memory(settings, model=model)
    scheduler = genai.SchedulerConfig()
    if settings.cache_gb == int(settings.cache_gb):
        scheduler.cache_size = int(settings.cache_gb)
    else:
        size = _token_bytes(weights) * _BLOCK_TOKENS
        scheduler.num_kv_blocks = max(int(settings.cache_gb * GIB / size), 1)
    scheduler.max_num_seqs = config.max_batch
    scheduler.max_num_batched_tokens = settings.max_num_batched_tokens
    scheduler.dynamic_split_fuse = True  # a long prompt is prefilled in pieces, beside decoding
    scheduler.enable_prefix_caching = _caches_prefixes(settings)
    return scheduler


def _token_bytes(weights: Path) -> int:
    """Return the bytes that keys and values of one token take.

    The exported model has a variable [sequences, heads, tokens, width] for the keys and one for the
    values of each layer. The pipeline holds them in 16 bits.
    """
    model = openvino.Core().read_model(weights / "openvino_model.xml")
    shapes = [variable.get_info().data_shape for variable in model.get_variables()]
    return sum(2 * shape[1].get_length() * shape[3].get_length() for shape in shapes)
