"""The environment in which the workers of the engine `vllm` run."""

import importlib.util
import sys
from pathlib import Path

from deploy.common.paths import UserError
from tools.setup_env import vllm_python


def worker_python(engine: str) -> Path:
    """Return the interpreter for the workers of an engine.

    Raises:
        UserError: it is the engine vllm, which is not installed; the message names the command.
    """
    here = Path(sys.executable)
    if engine != "vllm" or importlib.util.find_spec("vllm"):
        return here
    if python := vllm_python():
        return python
    raise UserError(
        "ENGINE=vllm: vLLM is not installed, or its lock has changed since; run "
        "`make setup ENGINE=vllm` (with TORCH=cuda for a GPU)"
    )
