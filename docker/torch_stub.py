"""The module `torch` in the image without torch (target cpu-lean).

A worker of TorchServe 0.12 imports torch in one file, ts/protocol/otf_message_handler.py, and uses
two names of it for handlers that return tensors. Ours returns bytes. Any other name raises
AttributeError, and `import torch.x` raises ImportError.
"""


class Tensor:
    """A class without instances, so that `isinstance(response, torch.Tensor)` is False."""


def save(*_: object) -> None:
    """Fail; TorchServe does not call this for bytes."""
    raise RuntimeError("this image has no torch; use the target cpu")
