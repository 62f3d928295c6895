"""vLLM's engine: the fast one on a GPU.

`LLMEngine` runs in the handler's thread: `step()` schedules, computes and returns, and no other
process or port is involved. Weights are those that the transformers engine gets. Prompts go in as
token ids, and token ids come out, so all engines share one tokenizer and one rule for stop strings.

vLLM admits requests in the order in which it gets them. So sequences wait here (`waiting.py`), and
vLLM gets only as many as fill its next step and fit into its cache with their longest completions.
It never has to interrupt one and compute it again for lack of room. A long prompt takes at most
three quarters of a step, so short prompts are prefilled beside it.

Not here: adapters (LoRA), several GPUs, draft models.
"""

import logging
import math
import os
import time
from collections.abc import Hashable, Iterator, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from llguidance import LLTokenizer

from handler.config import EngineConfig
from handler.engine import (
    EngineLoad,
    FinishReason,
    Messages,
    ParameterError,
    Progress,
    PromptError,
    Sampling,
    Tools,
)
from handler.engine.folder import ModelFolder
from handler.engine.json_schema import Grammar, for_guidance, read_schema
from handler.engine.positions import context
from handler.engine.reference import gaps_elsewhere
from handler.engine.self_check import SERVE_ANYWAY, SelfCheckError, compare, complete, prompts
from handler.engine.sequence import Sequence, new_sequence
from handler.engine.waiting import SHARE, Waiting
from handler.memory import GIB, MemoryLimitError, check_memory

# vLLM reads these when it is imported.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # It sends nothing about its use, and asks no server for files.
    **{"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"},
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # `positions.py` decides
    # TorchServe obeys some lines on its worker's stdout.
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
}
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from vllm import EngineArgs, RequestOutput, SamplingParams
from vllm import __version__ as vllm_version
from vllm.inputs.engine import tokens_input
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.v1.engine.llm_engine import LLMEngine

logger = logging.getLogger(__name__)

_SMALLEST_TOP_P = 1e-30
"""The sampler reads it in 32 bits, where a smaller one can be 0. The likeliest token alone has a
higher probability, so the result is the same."""

_UNLIKELY = -9999.0
"""OpenAI's log-probability of a token that is out of the question. JSON has no minus infinity."""

_REFERENCE_BYTES = 4e9
"""The largest weights for which the self-check loads the model a second time, on the CPU."""

_MOST_LOGPROBS = 20
"""Likeliest tokens beside the chosen one, as in OpenAI's API."""


@dataclass
class _Request:
    """What vLLM gets for a sequence. `grammar` follows the completion of one with a schema."""

    parameters: SamplingParams
    grammar: Grammar | None
    request_id: str = ""
    """A number, with which vLLM reports on the sequence; empty before it has it."""


class VLLMEngine:
    """See `handler.engine.Engine` for the contract of the public methods."""

    def __init__(self, weights: Path, config: EngineConfig) -> None:
        self.folder = ModelFolder(weights)
        self.end_tokens = self.folder.end_tokens(config.stop_tokens)
        wanted, cut = context(self.folder.config, config.max_context)
        with _threads(config.threads):
            self._engine = _start(weights, config, wanted)
        settings = self._engine.vllm_config
        blocks = settings.cache_config.num_gpu_blocks or 0
        self._block_tokens = settings.cache_config.block_size
        self.cache_tokens = (blocks - 1) * self._block_tokens  # vLLM keeps one empty
        self.max_context = min(settings.model_config.max_model_len, self.cache_tokens)
        if self.max_context < wanted:
            cut = f" instead of {wanted}, to fit into the cache"
        self._vocabulary = settings.model_config.get_vocab_size()
        self._step_tokens = settings.scheduler_config.max_num_batched_tokens
        self._part_tokens = settings.scheduler_config.long_prefill_token_threshold
        self._max_batch = config.max_batch
        self._waiting = Waiting()
        self._requests: dict[Hashable, _Request] = {}
        """Of all sequences that wait or run."""
        self._running: dict[Hashable, Sequence] = {}
        self._keys: dict[str, Hashable] = {}
        """Of the running sequences, by request id."""
        self._ended: list[Sequence] = []
        """Ended before vLLM had them; not reported yet."""
        self._submitted = 0
        self._cached_prompt_tokens = 0
        self._alive = True
        self._precision = str(settings.model_config.dtype).removeprefix("torch.")
        self.description = (
            f"engine vllm {vllm_version}, {self._precision}, device {current_platform.device_type}"
            + (f", {torch.get_num_threads()} threads" if current_platform.is_cpu() else "")
            + f", batch {config.max_batch}, KV cache for {self.cache_tokens} tokens, "
            f"context {self.max_context}{cut}"
        )
        self._warm_up()
        if config.self_check:
            self.description += f", {self._self_check(weights)}"

    def submit(self, key: Hashable, prompt: str, sampling: Sampling, *, stream: bool) -> int:
        if (sampling.logprobs or 0) > _MOST_LOGPROBS:
            raise ParameterError("logprobs", f"must be at most {_MOST_LOGPROBS}")
        grammar = read_schema(sampling, lambda: self._reader)
        sequence = new_sequence(
            key,
            prompt,
            sampling,
            stream=stream,
            folder=self.folder,
            max_context=self.max_context,
            vocabulary=self._vocabulary,
            end_tokens=self.end_tokens | self._schema_end if grammar else self.end_tokens,
        )
        self._requests[key] = _Request(_parameters(sampling, sequence), grammar)
        self._waiting.add(sequence)
        return sequence.prompt_tokens

    def advance(self, seconds: float) -> list[Progress]:
        deadline = time.monotonic() + seconds
        while (self._waiting or self._running) and not self._ready():
            try:
                self._admit()
                outputs = self._engine.step()
            except Exception:  # the state of vLLM is unknown now
                logger.exception("vLLM failed with %d sequences", self.unfinished)
                self._alive = False
                self._ended += self._waiting.clear()
                for sequence in [*self._ended, *self._running.values()]:
                    sequence.end("error")
            else:
                for output in outputs:
                    if isinstance(output, RequestOutput):
                        self._read(output)
            if time.monotonic() >= deadline:
                break
        return self._collect()

    def expire(self, key: Hashable) -> None:
        if sequence := self._waiting.remove(key):
            self._ended.append(sequence)
        elif sequence := self._running.get(key):
            self._abort(key)
        if sequence:
            sequence.end("timeout")

    def cancel(self, key: Hashable) -> None:
        self._waiting.remove(key)
        self._ended = [sequence for sequence in self._ended if sequence.key != key]
        if self._running.pop(key, None):
            self._abort(key)
        self._requests.pop(key, None)

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
        # Blocks that only the prefix cache holds do not count: vLLM gives them to others.
        core = getattr(self._engine.engine_core, "engine_core")  # noqa: B009 -- of this client only
        use = core.scheduler.kv_cache_manager.usage if self._running else 0.0
        return EngineLoad(
            *(len(self._running), len(self._waiting), self.waiting_tokens),
            *(use, self._cached_prompt_tokens),
        )

    @cached_property
    def _reader(self) -> LLTokenizer | None:
        """The tokenizer for JSON schemas, made for the first request with one."""
        return self.folder.token_reader(self.end_tokens | self._schema_end)

    @cached_property
    def _schema_end(self) -> Set[int]:
        """The token with which vLLM ends a completion that has a schema, if its tokenizer says."""
        end = self._engine.get_tokenizer().eos_token_id
        if end is None and self.folder.reader:
            end = self.folder.reader.eos_token
        return set() if end is None else {end}

    def _ready(self) -> bool:
        return bool(self._ended) or any(s.urgent for s in self._running.values())

    def _admit(self) -> None:
        """Give vLLM waiting sequences, until their prompts fill its next step."""
        while len(self._running) < self._max_batch:
            prefills = [s.prompt_tokens for s in self._running.values() if not s.completion_tokens]
            free = self._step_tokens - sum(min(tokens, self._part_tokens) for tokens in prefills)
            if free <= 0:
                return
            longest = math.inf
            if max(prefills, default=0) > self._part_tokens:  # only short ones beside a long one
                longest = min(free, max(prefills) // SHARE)
            sequence = self._waiting.take(self._room(), idle=not self._running, longest=longest)
            if not sequence:
                return
            self._add(sequence)

    def _room(self) -> int:
        """Return the tokens that the cache can hold beside the longest text of what runs."""
        blocks = sum(math.ceil(s.room / self._block_tokens) for s in self._running.values())
        return self.cache_tokens - blocks * self._block_tokens

    def _add(self, sequence: Sequence) -> None:
        """Give vLLM a sequence, behind all others."""
        sequence.start()
        request = self._requests[sequence.key]
        prompt = tokens_input(sequence.token_ids)
        self._submitted += 1
        request.request_id = str(self._submitted)
        try:
            self._engine.add_request(request.request_id, prompt, request.parameters)
        except Exception:  # only this sequence is lost
            logger.exception("vLLM rejected a sequence")
            sequence.end("error")
            self._ended.append(sequence)
        else:
            self._running[sequence.key] = sequence
            self._keys[request.request_id] = sequence.key

    def _abort(self, key: Hashable) -> None:
        """Let vLLM drop a sequence."""
        request_id = self._requests[key].request_id
        if self._keys.pop(request_id, None) is not None:
            self._engine.abort_request([request_id])

    def _read(self, output: RequestOutput) -> None:
        """Read the new tokens of a sequence."""
        key = self._keys.get(output.request_id)
        if key is None:  # aborted
            return
        sequence, request = self._running[key], self._requests[key]
        if not sequence.completion_tokens:
            self._cached_prompt_tokens += output.num_cached_tokens or 0
        (new,) = output.outputs
        for i, token in enumerate(new.token_ids):
            if sequence.finish_reason:
                break
            if new.logprobs is not None:
                found = {j: max(entry.logprob, _UNLIKELY) for j, entry in new.logprobs[i].items()}
                top = sorted(found.items(), key=lambda entry: -entry[1])
                wanted = request.parameters.logprobs or 0
                sequence.logprobs.append(self.folder.logprob(token, found[token], top[:wanted]))
            if request.grammar is None:
                sequence.append(token)
            elif token in sequence.end_tokens and not request.grammar.accepting:
                logger.error("vLLM ended a completion that does not fulfill its schema")
                sequence.end("error")
            else:
                request.grammar.add(token)
                sequence.append(token, last=request.grammar.complete)
        if output.finished:
            self._keys.pop(output.request_id)
            sequence.end(_REASONS.get(str(new.finish_reason), "error"))
        elif sequence.finish_reason:  # vLLM does not know our stop strings
            self._abort(key)

    def _collect(self) -> list[Progress]:
        sequences = [*self._ended, *self._running.values()]
        out = [s.progress() for s in sequences if s.pending or s.finish_reason]
        for progress in out:
            if progress.finish_reason:
                self._requests.pop(progress.key, None)
                self._running.pop(progress.key, None)
        self._ended = []
        return out

    def _warm_up(self) -> None:
        """Run one short request with a schema, if the tokenizer allows them.

        The first one builds two tables of the vocabulary, ours and vLLM's, which takes seconds.
        """
        if self._reader:
            sampling = Sampling(max_new_tokens=1, json_schema="{}")
            with suppress(PromptError, ParameterError):  # of tokenizers without such tokens
                self.submit("warm-up", "{", sampling, stream=False)
            while self.unfinished:
                self.advance(1)

    def _self_check(self, weights: Path) -> str:
        """Compare with the choices of the model in transformers; return the result for the log.

        Raises:
            SelfCheckError: vLLM generates different text.
        """
        size = sum(path.stat().st_size for path in weights.iterdir())
        if size > _REFERENCE_BYTES:
            return f"no self-check, because the weights have more than {_REFERENCE_BYTES / 1e9} GB"
        begin = time.monotonic()
        texts, note = prompts(
            *(self.folder.encode, self.folder.config, self.max_context, size // 2),
            self._vocabulary,
        )
        found = [
            completion
            for together in (True, False)
            for completion in complete(self, texts, self.folder.encode, together=together)
        ]
        try:
            # vLLM changes classes of transformers, so this process cannot load the model again.
            gaps = gaps_elsewhere(weights, [(each.prompt, each.generated) for each in found])
        except MemoryLimitError:
            return "no self-check, because the model does not fit into memory a second time"
        except RuntimeError as error:
            raise SelfCheckError(
                f"the self-check could not run ({error}); {SERVE_ANYWAY}"
            ) from error
        try:
            for completion, each in zip(found, gaps, strict=True):
                compare(completion, each, self._precision, self.folder.decode)
        except SelfCheckError as error:
            raise SelfCheckError(f"{error}; {SERVE_ANYWAY}") from error
        passed = f"self-check passed in {time.monotonic() - begin:.1f} s"
        return f"{passed} ({note})" if note else passed


_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length"}


def _parameters(sampling: Sampling, sequence: Sequence) -> SamplingParams:
    schema = sampling.json_schema
    sampled = sampling.temperature > 0
    return SamplingParams(
        max_tokens=sequence.max_new_tokens,
        temperature=sampling.temperature,
        top_p=max(sampling.top_p, _SMALLEST_TOP_P) if sampled else 1.0,
        top_k=sampling.top_k if sampled else 0,
        min_p=sampling.min_p if sampled else 0.0,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        seed=sampling.random_state if sampled else None,
        # Ours, which may be fewer or more than those that vLLM finds in the model's files.
        stop_token_ids=sorted(sequence.end_tokens),
        ignore_eos=True,
        logprobs=sampling.logprobs,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        structured_outputs=(
            None if schema is None else StructuredOutputsParams(json=for_guidance(schema))
        ),
    )


def _start(weights: Path, config: EngineConfig, max_context: int) -> LLMEngine:
    """Load the model.

    Raises:
        ValueError: vLLM has no room for it, or does not know it.
    """
    settings = config.vllm
    on_cpu = current_platform.is_cpu()
    step_tokens = max(settings.max_num_batched_tokens, config.max_batch)
    if on_cpu:
        parts = {"the model": sum(path.stat().st_size for path in weights.iterdir())}
        parts["the KV cache"] = int(settings.cache_gb * GIB)
        check_memory(f"app.engine.vllm.cache_gb: {settings.cache_gb}", parts)
    eager = on_cpu if settings.enforce_eager is None else settings.enforce_eager
    chosen = EngineArgs(
        model=str(weights),
        dtype=settings.dtype,
        max_model_len=max_context,
        max_num_seqs=config.max_batch,
        max_num_batched_tokens=step_tokens,
        long_prefill_token_threshold=min(max(step_tokens * 3 // 4, 1), max_context),
        enable_prefix_caching=settings.prefix_caching,
        enforce_eager=eager,
        gpu_memory_utilization=settings.gpu_memory,
        kv_cache_memory_bytes=int(settings.cache_gb * GIB) if on_cpu else None,
        max_logprobs=_MOST_LOGPROBS,
        structured_outputs_config={"backend": "guidance"},  # the library that checks schemas
        generation_config="vllm",  # the model's defaults are not ours
        disable_log_stats=True,
        use_tqdm_on_load=False,
        trust_remote_code=False,
    ).create_engine_config()
    # As if no length had been chosen: then vLLM takes what fits into the cache, and raises no error
    # if it is less than `max_model_len`.
    chosen.model_config.original_max_model_len = -1
    return LLMEngine.from_vllm_config(chosen, disable_log_stats=True)


@contextmanager
def _threads(threads: int | None) -> Iterator[None]:
    """Let vLLM compute with these threads.

    On a CPU it replaces torch's function to set them by one that does nothing.
    """
    set_num_threads = torch.set_num_threads
    if threads:
        set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads
