"""The worker's program: TorchServe's own, which imports torch only for handlers that use it.

TorchServe's Java starts it as `ts/model_service_worker.py` (`launch.py`). A worker of TorchServe
0.12 imports torch in one file, for handlers that return tensors. That takes a second, and without
torch a worker could not start. Our handler returns bytes.
"""

import importlib
import runpy
import sys
from types import ModuleType
from typing import Any


class NoTensor:
    """A class without instances: before torch is imported, nothing is a tensor."""


class TorchOnceImported(ModuleType):
    """What TorchServe knows as `torch`: the real module as soon as a handler has imported it."""

    def __getattr__(self, name: str) -> Any:
        """Return a name of torch."""
        if name == "Tensor" and "torch" not in sys.modules:
            return NoTensor
        return getattr(importlib.import_module("torch"), name)


def import_torchserve() -> None:
    """Import TorchServe's file without torch. Later imports of torch get the real one."""
    sys.modules["torch"] = TorchOnceImported("torch")
    importlib.import_module("ts.protocol.otf_message_handler")
    del sys.modules["torch"]


if __name__ == "__main__":
    del sys.path[0]  # the folder of this file
    import_torchserve()
    runpy.run_module("ts.model_service_worker", run_name="__main__", alter_sys=True)
