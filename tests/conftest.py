"""Fixtures shared by all tests. Ports start at 7180, so that a server on 7080 is left alone."""

import os
import shutil
from pathlib import Path

import pytest

from deploy.archive import build_archive
from deploy.export import EXPORTS
from deploy.server import Server
from deploy.weights import get_weights
from tests import tiny

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real model's folder."""
    return get_weights("smollm2-135m")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.random_model(tmp_path_factory.mktemp("models") / "tiny", tiny.LLAMA)


@pytest.fixture(scope="session")
def smollm2_server(smollm2: Path, tmp_path_factory: pytest.TempPathFactory):
    """The real model behind a real TorchServe, with the engine that is chosen on a CPU."""
    archive = build_archive("smollm2-135m", smollm2, store=tmp_path_factory.mktemp("store"))
    with Server(archive, port=7180) as server:
        yield server


@pytest.fixture(scope="session")
def smollm2_transformers_server(smollm2: Path, tmp_path_factory: pytest.TempPathFactory):
    """The same with the other engine."""
    store = tmp_path_factory.mktemp("store")
    archive = build_archive("smollm2-135m", smollm2, engine="transformers", store=store)
    with Server(archive, port=7210) as server:
        yield server


@pytest.fixture(scope="session")
def tiny_server(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory):
    """A tiny model behind a real TorchServe: for everything where the text does not matter."""
    store = tmp_path_factory.mktemp("store")
    archive = build_archive("tiny", tiny_llama, engine="transformers", store=store)
    with Server(archive, port=7190) as server:
        yield server


@pytest.fixture(scope="session")
def tiny_openvino_server(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory):
    """The same with the other engine."""
    store = tmp_path_factory.mktemp("store")
    archive = build_archive("tiny", tiny_llama, engine="openvino", store=store)
    with Server(archive, port=7220) as server:
        yield server
    for folder in EXPORTS.glob("tiny-*"):
        shutil.rmtree(folder)
