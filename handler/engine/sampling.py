"""Choose the next token of one sequence. The filters are those of transformers."""

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from handler.engine import Sampling
from handler.engine.json_schema import Grammar

_UNLIKELY = -9999.0
"""OpenAI's log-probability of a token that is out of the question. JSON has no minus infinity."""


class CountPenalty(LogitsProcessor):
    """OpenAI's presence and frequency penalties, which transformers lacks.

    They lower the logits of the tokens that the completion has so far; the prompt's do not count,
    as in vLLM.
    """

    def __init__(self, presence: float, frequency: float, prompt_tokens: int) -> None:
        self._presence, self._frequency, self._begin = presence, frequency, prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores [1, vocabulary] after the tokens [1, n]."""
        tokens, counts = input_ids[0, self._begin :].unique(return_counts=True)
        scores = scores.clone()
        scores[0, tokens] -= self._presence + self._frequency * counts
        return scores


def logits_processors(sampling: Sampling, prompt_tokens: int = 0) -> LogitsProcessorList:
    """Return the chain that `generate` would build for these settings, in its order.

    OpenAI's penalties follow that for repetition, as in vLLM.
    """
    chain = LogitsProcessorList()
    if sampling.repetition_penalty != 1.0:
        chain.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.presence_penalty or sampling.frequency_penalty:
        penalties = (sampling.presence_penalty, sampling.frequency_penalty)
        chain.append(CountPenalty(*penalties, prompt_tokens))
    if sampling.temperature > 0:
        if sampling.temperature != 1.0:
            chain.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k > 0:
            chain.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1.0:
            chain.append(TopPLogitsWarper(sampling.top_p))
        if sampling.min_p > 0:
            chain.append(MinPLogitsWarper(sampling.min_p))
    return chain


def logprobs(logits: torch.Tensor, token: int, top: int) -> list[tuple[int, float]]:
    """Return ids and log-probabilities: of the token, then of the `top` likeliest ones.

    The probabilities are the model's, before penalties, temperature and filters: as in OpenAI's API
    and, by default, in vLLM.
    """
    values = logits.float().log_softmax(-1)
    best = values.topk(min(top, len(values)))
    pairs = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return [(i, max(value, _UNLIKELY)) for i, value in [(token, float(values[token])), *pairs]]


class Sampler:
    """Draws tokens for one sequence from its own random state.

    The state belongs to the sequence, not to the batch. So the same seed gives the same completion,
    no matter what else runs in the batch.

    Args:
        sampling: the request's parameters.
        prompt_tokens: the length of the prompt, which penalties skip.
        grammar: the state of the completion in its JSON schema, if it has one.
    """

    def __init__(
        self, sampling: Sampling, prompt_tokens: int = 0, grammar: Grammar | None = None
    ) -> None:
        self.greedy = sampling.temperature == 0
        self._chain = logits_processors(sampling, prompt_tokens)
        self._grammar = grammar
        self.plain = self.greedy and not self._chain and not grammar
        """Whether the choice is always the largest logit."""
        self.logprobs = sampling.logprobs
        self._generator = torch.Generator().manual_seed(sampling.random_state)

    def choose(self, token_ids: list[int], logits: torch.Tensor) -> int:
        """Return the next token id, given all ids so far and the logits [vocabulary]."""
        # transformers annotates these with torch's legacy types, which no tensor has.
        ids, scores = torch.tensor([token_ids]), logits.float().cpu()[None]
        if self._grammar:  # before the filters, so that they leave allowed tokens
            allowed = torch.from_numpy(self._grammar.allowed(scores.shape[-1]))
            scores = scores.masked_fill(~allowed, -torch.inf)
        scores = self._chain(ids, scores)  # type: ignore[arg-type]
        if self.greedy:
            token = int(scores.argmax())
        else:
            token = int(torch.multinomial(scores.softmax(-1)[0], 1, generator=self._generator))
        if self._grammar:
            self._grammar.add(token)
        return token

    @property
    def complete(self) -> bool:
        """Whether the JSON schema is fulfilled, and nothing more may follow."""
        return self._grammar is not None and self._grammar.complete
