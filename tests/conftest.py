"""Fixtures shared by all tests. Ports start at 7180, so that a server on 7080 is left alone."""

import os
import shutil
from pathlib import Path

import pytest

from deploy.archive.build import build_archive
from deploy.archive.export import EXPORTS
from deploy.torchserve.server import Server
from deploy.weights.fetch import get_weights
from tests import tiny

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real model's folder."""
    return get_weights("smollm2-135m")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exports bear its name; that of this process keeps other tests' out."""
    return tiny.random_model(tmp_path_factory.mktemp("models") / f"tiny-{os.getpid()}", tiny.LLAMA)


@pytest.fixture(scope="session")
def serve(tmp_path_factory: pytest.TempPathFactory):
    """A real TorchServe for some weights: name, weights, engine (None: the app's choice), port."""

    def server(name: str, weights: Path, engine: str | None, port: int) -> Server:
        store = tmp_path_factory.mktemp("store")
        return Server(
            build_archive(name, weights, engine={"name": engine} if engine else None, store=store),
            port=port,
        )

    return server


@pytest.fixture(scope="session")
def smollm2_server(smollm2: Path, serve):
    """The real model, with the engine that is chosen on a CPU."""
    with serve("smollm2-135m", smollm2, None, 7180) as server:
        yield server


@pytest.fixture(scope="session")
def smollm2_transformers_server(smollm2: Path, serve):
    """The same with the other engine."""
    with serve("smollm2-135m", smollm2, "transformers", 7210) as server:
        yield server


@pytest.fixture(scope="session")
def tiny_server(tiny_llama: Path, serve):
    """A tiny model: for everything where the text does not matter."""
    with serve("tiny", tiny_llama, "transformers", 7190) as server:
        yield server


@pytest.fixture(scope="session")
def tiny_openvino_server(tiny_llama: Path, serve):
    """The same with the other engine."""
    with serve("tiny", tiny_llama, "openvino", 7220) as server:
        yield server
    for folder in EXPORTS.glob(f"{tiny_llama.name}-*"):
        shutil.rmtree(folder)
