"""OpenVINO GenAI's continuous-batching pipeline: the fast engine on a CPU.

It has paged attention, so nothing is padded or copied when sequences join. The weights have 8 or 4
bits; they were quantized when the archive was made (`deploy.archive.export`). The pipeline runs in
the handler's thread: `step()` holds the interpreter lock, so any other thread would starve.

It needs neither torch nor transformers. Not here: draft models, several devices.
"""

import logging
import secrets
import time
from collections.abc import Hashable, Set
from pathlib import Path

import numpy as np
import openvino
import openvino_genai as genai
import psutil

from handler.config import EngineConfig, OpenVINOConfig
from handler.engine import Messages, Progress, Sampling
from handler.engine.folder import ModelFolder
from handler.engine.sequence import Sequence, new_sequence

logger = logging.getLogger(__name__)

_NGRAM = 3
"""Longest run of tokens that prompt lookup looks for in the earlier text."""


class OpenVINOEngine:
    """See `handler.engine.Engine` for the contract of the public methods."""

    def __init__(self, weights: Path, config: EngineConfig) -> None:
        settings = config.openvino
        self.folder = ModelFolder(weights)
        limit = self.folder.context_length()
        self.max_context = min(config.max_context or limit, limit)
        self.end_tokens = self.folder.end_tokens(config.stop_tokens)
        self._pipeline = genai.ContinuousBatchingPipeline(
            weights, _scheduler(config), "CPU", properties(config) | _speculation(settings)
        )
        self._sequences: dict[Hashable, tuple[Sequence, genai.GenerationHandle]] = {}
        self._lookup = settings.prompt_lookup
        self._submitted = 0
        self._alive = True
        self.description = (
            f"engine openvino, {settings.precision}, device cpu, "
            f"{config.threads or 'all'} threads, batch {config.max_batch}, "
            f"KV cache {settings.cache_gb} GB, context {self.max_context}"
            + (f", prompt lookup of {self._lookup} tokens" if self._lookup else "")
        )
        self._warm_up()

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
        handle = self._pipeline.add_request(
            self._submitted,
            openvino.Tensor(np.array([sequence.token_ids], dtype=np.int64)),
            _generation(sampling, sequence.max_new_tokens, sequence.end_tokens, self._lookup),
        )
        self._submitted += 1
        self._sequences[key] = sequence, handle
        return sequence.prompt_tokens

    def advance(self, seconds: float) -> list[Progress]:
        deadline = time.monotonic() + seconds
        while self._sequences:
            try:
                self._pipeline.step()
            except Exception:  # the state of the pipeline is unknown now
                logger.exception("the pipeline failed with %d sequences", len(self._sequences))
                self._alive = False
                for sequence, _ in self._sequences.values():
                    sequence.end("error")
            else:
                self._read()
            urgent = any(sequence.urgent for sequence, _ in self._sequences.values())
            if urgent or time.monotonic() >= deadline:
                break
        return self._collect()

    def cancel(self, key: Hashable) -> None:
        if key in self._sequences:
            self._sequences.pop(key)[1].cancel()

    def alive(self) -> bool:
        return self._alive

    def chat_prompt(self, messages: Messages) -> str | None:
        return self.folder.chat_prompt(messages)

    @property
    def unfinished(self) -> int:
        return len(self._sequences)

    def _read(self) -> None:
        """Read the new tokens of every sequence from the pipeline."""
        for sequence, handle in self._sequences.values():
            while handle.can_read():
                if not sequence.started_at:
                    sequence.start()
                for token in next(iter(handle.read().values())).generated_ids:
                    if not sequence.finish_reason:
                        sequence.append(token)
            status = handle.get_status()
            if status == genai.GenerationStatus.RUNNING:
                if sequence.finish_reason:
                    handle.cancel()  # a stop string ended it; the pipeline does not know them
            elif not sequence.finish_reason:
                sequence.end("stop" if status == genai.GenerationStatus.FINISHED else "error")

    def _collect(self) -> list[Progress]:
        out = [s.progress() for s, _ in self._sequences.values() if s.pending or s.finish_reason]
        for progress in out:
            if progress.finish_reason:
                del self._sequences[progress.key]
        return out

    def _warm_up(self) -> None:
        """Run one short request, since the first forward pass compiles and allocates."""
        token = next(iter(self.end_tokens), 0)
        request = openvino.Tensor(np.array([[token] * 8], dtype=np.int64))
        self._pipeline.add_request(
            0, request, _generation(Sampling(), 2, self.end_tokens, self._lookup)
        )
        self._submitted = 1
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()


def _generation(
    sampling: Sampling, max_new_tokens: int, end_tokens: Set[int], lookup: int = 0
) -> genai.GenerationConfig:
    config = genai.GenerationConfig()
    config.max_new_tokens = max_new_tokens
    config.stop_token_ids = set(end_tokens)
    config.ignore_eos = not end_tokens  # else the end token of the model's files counts
    if lookup:
        config.num_assistant_tokens, config.max_ngram_size = lookup, _NGRAM
    config.repetition_penalty = sampling.repetition_penalty
    config.do_sample = sampling.temperature > 0
    if config.do_sample:
        config.temperature = sampling.temperature
        config.top_p = sampling.top_p
        if sampling.top_k:
            config.top_k = sampling.top_k
        seed = sampling.seed
        config.rng_seed = secrets.randbits(63) if seed is None else seed
    return config


def properties(config: EngineConfig) -> dict[str, str | int]:
    """Return OpenVINO's settings for the model."""
    chosen: dict[str, str | int] = {
        # On processors with bfloat16 OpenVINO computes in it by default. That is not faster here,
        # and SmolLM2 then answers wrongly what the capital of France is; see LOG.md.
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": config.openvino.dynamic_quantization,
    }
    if config.threads:
        chosen["INFERENCE_NUM_THREADS"] = config.threads
    return chosen


def _speculation(config: OpenVINOConfig) -> dict[str, bool]:
    """Return the setting for prompt lookup, which holds for all requests of a pipeline."""
    return {"prompt_lookup": True} if config.prompt_lookup else {}


def _scheduler(config: EngineConfig) -> genai.SchedulerConfig:
    settings = config.openvino
    memory = psutil.virtual_memory().total
    if settings.cache_gb * 2**30 > memory:
        raise ValueError(
            f"app.engine.openvino.cache_gb: {settings.cache_gb} does not fit: this machine has "
            f"{memory / 2**30:.1f} GiB of memory, and the model needs some of it"
        )
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = settings.cache_gb
    scheduler.max_num_seqs = config.max_batch
    scheduler.max_num_batched_tokens = settings.max_num_batched_tokens
    scheduler.dynamic_split_fuse = True  # a long prompt is prefilled in pieces, beside decoding
    scheduler.enable_prefix_caching = settings.prefix_caching
    return scheduler
