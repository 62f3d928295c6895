"""Stands where torch would be, in the image without torch (target cpu-lean).

TorchServe 0.12 imports torch in one file on a worker's path, ts/protocol/otf_message_handler.py,
and uses two names of it there, for handlers that answer tensors. Ours answers bytes. Anything else
that asks this module for something gets an AttributeError, and `import torch.x` an ImportError.
"""


class Tensor:
    """Nothing is one: `isinstance(answer, torch.Tensor)` is False."""


def save(*_: object) -> None:
    """Never called for bytes."""
    raise RuntimeError("this image has no torch; use the target cpu")
