"""The running batch of the `transformers` engine: sequences that share one forward pass.

Sequences of different lengths are aligned at their right edge: the shorter ones are padded on
the left, and the attention mask hides the padding. A sequence joins by being padded to the
batch's length (or the batch to its), and leaves by having its row taken out, so a short request
never waits for a long one.

Shapes: B sequences, T cached positions, H key-value heads, D head dimension.
"""

from dataclasses import dataclass, field

import torch
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


@dataclass
class Batch:
    """`rows[i]` is whatever the engine keeps for sequence i; `last` [B] holds the newest token
    ids, not yet in the cache; `mask` [B, T] is 1 where the cache holds a real token.
    """

    rows: list = field(default_factory=list)
    last: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    mask: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.long))
    cache: DynamicCache | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def join(self, other: "Batch") -> None:
        """Take in all sequences of `other`, which must not be used afterwards."""
        if not self.rows:
            self.rows, self.last, self.mask = other.rows, other.last, other.mask
            self.cache = other.cache
            return
        length = max(self.mask.shape[1], other.mask.shape[1])
        masks = [pad(b.mask, (length - b.mask.shape[1], 0)) for b in (self, other)]
        for mine, theirs in zip(self.cache.layers, other.cache.layers, strict=True):
            mine.keys = torch.cat([_left_pad(mine.keys, length), _left_pad(theirs.keys, length)])
            mine.values = torch.cat(
                [_left_pad(mine.values, length), _left_pad(theirs.values, length)]
            )
        self.mask = torch.cat(masks)
        self.last = torch.cat([self.last, other.last])
        self.rows = self.rows + other.rows

    def keep(self, indices: list[int]) -> None:
        """Keep only these sequences, and drop the left padding that none of them needs."""
        if len(indices) == len(self.rows):
            return
        if not indices:
            self.rows, self.cache = [], None
            self.last, self.mask = self.last[:0], self.mask[:0, :0]
            return
        index = torch.tensor(indices)
        self.rows = [self.rows[i] for i in indices]
        self.last, self.mask = self.last[index], self.mask[index]
        unused = int(self.mask.argmax(dim=1).min())  # argmax: the first 1 of each row
        self.mask = self.mask[:, unused:]
        for layer in self.cache.layers:
            at = index.to(layer.keys.device)
            layer.keys = layer.keys[at, :, unused:]
            layer.values = layer.values[at, :, unused:]


def can_batch(cache: DynamicCache) -> bool:
    """Whether the cache is plain [B, H, T, D] tensors in every layer, which `join` relies on.

    Sliding-window and state-space layers are not; such models are served one sequence at a time.
    """
    return all(type(layer) is DynamicLayer for layer in cache.layers)


def _left_pad(tensor: torch.Tensor, length: int) -> torch.Tensor:
    return pad(tensor, (0, 0, length - tensor.shape[2], 0))
