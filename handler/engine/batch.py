"""The running batch of the `transformers` engine: sequences that share one forward pass.

Sequences of different lengths are aligned at their right edge: the shorter ones are padded on
the left, and the attention mask hides the padding. A sequence joins by being padded to the
batch's length (or the batch to its), and leaves by having its row removed, so a short request
never waits for a long one.

Shapes: B sequences, T cached positions, H key-value heads, D head dimension.
"""

from dataclasses import dataclass, field
from typing import cast

import torch
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from handler.engine.generation import GenerationLoop
from handler.engine.sequence import Sequence


@dataclass
class Batch:
    """Row i of every tensor belongs to `sequences[i]`. `last` [B] holds the newest token ids, not
    yet in the cache; `mask` [B, T] is 1 where the cache holds a real token. A batch with a
    `GenerationLoop` holds one sequence.
    """

    sequences: list[Sequence] = field(default_factory=list)
    last: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    mask: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.long))
    cache: DynamicCache | GenerationLoop = field(default_factory=DynamicCache)

    def __len__(self) -> int:
        return len(self.sequences)

    def join(self, other: "Batch") -> None:
        """Add all sequences of `other`, which must not be used afterwards."""
        if not self.sequences:
            self.sequences, self.last, self.mask = other.sequences, other.last, other.mask
            self.cache = other.cache
            return
        length = max(self.mask.shape[1], other.mask.shape[1])
        masks = [pad(b.mask, (length - b.mask.shape[1], 0)) for b in (self, other)]
        for mine, theirs in zip(_layers(self.cache), _layers(other.cache), strict=True):
            for name in ("keys", "values"):
                halves = [cast(torch.Tensor, getattr(layer, name)) for layer in (mine, theirs)]
                held = max(half.shape[2] for half in halves)
                setattr(mine, name, torch.cat([_left_pad(half, held) for half in halves]))
            _set_length(mine, length)
        self.mask = torch.cat(masks)
        self.last = torch.cat([self.last, other.last])
        self.sequences = self.sequences + other.sequences

    def keep(self, indices: list[int]) -> None:
        """Keep only these sequences, and drop the left padding that none of them needs."""
        if len(indices) == len(self.sequences):
            return
        if not indices:
            self.sequences, self.cache = [], DynamicCache()
            self.last, self.mask = self.last[:0], self.mask[:0, :0]
            return
        index = torch.tensor(indices)
        self.sequences = [self.sequences[i] for i in indices]
        self.last, self.mask = self.last[index], self.mask[index]
        unused = int(self.mask.argmax(dim=1).min())  # argmax: the first 1 of each row
        self.mask = self.mask[:, unused:]
        length = self.mask.shape[1]
        for layer in _layers(self.cache):
            for name in ("keys", "values"):
                tensor = cast(torch.Tensor, getattr(layer, name))
                setattr(layer, name, tensor[index.to(tensor.device), :, -length:])
            _set_length(layer, length)


def can_batch(cache: DynamicCache) -> bool:
    """Return whether each layer's cache is [B, H, n, D] tensors, which `join` relies on.

    n is T, or less in layers with a sliding window. State-space layers hold other tensors.
    """
    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    return all(type(layer) in plain and layer.get_seq_length() > 0 for layer in _layers(cache))


def _layers(cache: DynamicCache | GenerationLoop) -> list[DynamicLayer]:
    return cast(list[DynamicLayer], cast(DynamicCache, cache).layers)


def _left_pad(tensor: torch.Tensor, length: int) -> torch.Tensor:
    return pad(tensor, (0, 0, length - tensor.shape[2], 0))


def _set_length(layer: DynamicLayer, length: int) -> None:
    """Set the number of positions of a layer with a sliding window, which holds only the last."""
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = length
