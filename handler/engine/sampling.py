"""Choose the next token of one sequence. The filters are those of transformers."""

import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from handler.engine import Sampling


def logits_processors(sampling: Sampling) -> LogitsProcessorList:
    """Return the chain that `generate` would build for these settings, in its order."""
    chain = LogitsProcessorList()
    if sampling.repetition_penalty != 1.0:
        chain.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature > 0:
        if sampling.temperature != 1.0:
            chain.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k > 0:
            chain.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1.0:
            chain.append(TopPLogitsWarper(sampling.top_p))
    return chain


class Sampler:
    """Draws tokens for one sequence from its own random state.

    The state belongs to the sequence, not to the batch. So the same seed gives the same completion,
    no matter what else runs in the batch.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.greedy = sampling.temperature == 0
        self.plain = self.greedy and sampling.repetition_penalty == 1.0
        """Whether the choice is always the largest logit."""
        self._chain = logits_processors(sampling)
        self._generator = torch.Generator().manual_seed(sampling.random_state)

    def choose(self, token_ids: list[int], logits: torch.Tensor) -> int:
        """Return the next token id, given all ids so far and the logits [vocabulary]."""
        # transformers annotates these with torch's legacy types, which no tensor has.
        ids, scores = torch.tensor([token_ids]), logits.float().cpu()[None]
        scores = self._chain(ids, scores)  # type: ignore[arg-type]
        if self.greedy:
            return int(scores.argmax())
        return int(torch.multinomial(scores.softmax(-1)[0], 1, generator=self._generator))
