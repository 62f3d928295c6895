"""The worker's program, without TorchServe's Java."""

import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).parents[2] / "deploy" / "torchserve" / "worker.py"

TENSOR = """
import sys
from deploy.torchserve.worker import import_torchserve
import_torchserve()
from ts.protocol.otf_message_handler import create_predict_response
assert b"text" in create_predict_response([b"text"], {0: "1"}, "", 200)
assert "torch" not in sys.modules
import torch
import torch.nn
assert torch.nn.Linear(1, 1)(torch.ones(1)).shape == (1,)
saved = create_predict_response([torch.ones(3)], {0: "1"}, "", 200)
assert b"PK" in saved and b"archive/data.pkl" in saved
"""

WITHOUT = """
import sys
from deploy.torchserve.worker import import_torchserve

class Missing:
    @staticmethod
    def find_spec(name, *_):
        if name == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}")

import_torchserve()
sys.meta_path.insert(0, Missing)
from ts.protocol import otf_message_handler
assert not isinstance(b"", otf_message_handler.torch.Tensor)
import torch
"""


def test_worker_starts_without_importing_torch():
    command = [sys.executable, "-X", "importtime", WORKER, "--help"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "--sock-type" in run.stdout
    imported = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines()}
    assert "ts.model_loader" in imported
    assert not {name for name in imported if name.split(".")[0] == "torch"}


@pytest.mark.slow  # imports torch
def test_handlers_that_return_tensors_work_as_before():
    command = [sys.executable, "-c", TENSOR]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr


def test_worker_without_torch_installed_says_that_torch_is_missing():
    """An `import torch` in the image without it raises the usual error."""
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 1
    assert "ModuleNotFoundError: No module named 'torch'" in run.stderr
