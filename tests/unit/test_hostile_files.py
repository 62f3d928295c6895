"""Files from others that try to run code, or to be written outside of their folder."""

import importlib.util
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.archive.export import export
from deploy.common.paths import ROOT, UserError
from handler.config import engine_config
from handler.engine import create_engine
from tests import tiny

pytestmark = pytest.mark.slow


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def trapped(tmp_path: Path) -> tuple[Path, Path]:
    """A model whose weights are a pickle that runs code, and the folder which that code makes."""
    import torch

    weights, sprung = tiny.random_model(tmp_path / "model", tiny.LLAMA), tmp_path / "sprung"
    for path in weights.glob("*.safetensors*"):
        path.unlink()
    torch.save({"lm_head.weight": Trap(sprung)}, weights / "pytorch_model.bin")
    return weights, sprung


def test_trap_works(trapped: tuple[Path, Path]):
    """Without protection the code runs, so the tests below can fail."""
    import torch

    weights, sprung = trapped
    torch.load(weights / "pytorch_model.bin", weights_only=False)
    assert sprung.exists()


def test_transformers_engine_runs_no_code_of_a_pickle(trapped: tuple[Path, Path]):
    weights, sprung = trapped
    with pytest.raises(pickle.UnpicklingError):
        create_engine(weights, engine_config(name="transformers"))
    assert not sprung.exists()


def test_export_runs_no_code_of_a_pickle(trapped: tuple[Path, Path], tmp_path: Path):
    weights, sprung = trapped
    with pytest.raises(UserError):
        export(weights, engine_config(name="openvino"), tmp_path / "exports")
    assert not sprung.exists()


@pytest.mark.parametrize("name", ["../outside", "a/../../outside", "/outside", "a/b/../../../x"])
def test_object_of_cloud_storage_is_not_written_outside_of_the_store(name: str, tmp_path: Path):
    spec = importlib.util.spec_from_file_location("fetch", ROOT / "docker" / "fetch.py")
    fetch = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fetch)
    store = tmp_path / "store"

    class Blob:
        def __init__(self, name: str) -> None:
            self.name = name

        def download_to_filename(self, path: Path) -> None:
            path.write_text("content")

    assert fetch._download(Blob("model/good"), "model/good", store) == 7
    with pytest.raises(ValueError, match="would be written outside of"):
        fetch._download(Blob(name), name, store)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["good"]
