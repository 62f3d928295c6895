"""Fixtures shared by all tests. Ports start at 7180, so that a server on 7080 is left alone.

`make fast` deselects the marks `slow` and `served`. Importing torch, transformers, OpenVINO or
Google's SDK takes seconds, so a module that needs one of them to run at all is marked as a whole
(`pytestmark = pytest.mark.slow`) and is then not even imported.
"""

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deploy.archive.build import build_archive
from deploy.archive.export import EXPORTS
from deploy.archive.tokenizer import TOKENIZERS
from deploy.torchserve.server import Server
from deploy.weights.fetch import get_weights

os.environ.setdefault("HF_HUB_OFFLINE", "1")

FAST = "not slow and not served"
"""The `-m` expression of `make fast`."""

MARKED_AS_A_WHOLE = re.compile(r"^pytestmark = \[?\s*pytest\.mark\.(slow|served)\b", re.MULTILINE)

Serve = Callable[[str, Path, str | None, int], Server]
"""Name, weights, engine (None: the app's choice) and port of a TorchServe."""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Skip the import of a module whose tests `make fast` would all deselect."""
    if config.option.markexpr == FAST and collection_path.suffix == ".py":
        return bool(MARKED_AS_A_WHOLE.search(collection_path.read_text())) or None
    return None


@pytest.fixture(autouse=True)
def no_slow_import(pytestconfig: pytest.Config, slow_imports: set[str]) -> Iterator[None]:
    """Fail the first test of `make fast` that imports a library which takes seconds to import."""
    yield
    imported = slow_imports.intersection(sys.modules)
    if pytestconfig.option.markexpr == FAST and imported:
        slow_imports.difference_update(imported)
        pytest.fail(f"imports {', '.join(sorted(imported))}: mark the test or its module as slow")


@pytest.fixture(scope="session")
def slow_imports() -> set[str]:
    """Libraries that `make fast` must not import and has not imported so far."""
    return {"torch", "transformers", "openvino", "google.cloud.aiplatform"}


def remove_exports(name: str) -> None:
    """Remove the exports of a test's model, with the records of their checks."""
    for path in EXPORTS.glob(f"{name}-*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real model's folder."""
    return get_weights("smollm2-135m")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tiny model. Exports carry its name, so the process id keeps those of other runs apart."""
    from tests import tiny  # imports torch

    name = f"tiny-{os.getpid()}"
    yield tiny.random_model(tmp_path_factory.mktemp("models") / name, tiny.LLAMA)
    for folder in TOKENIZERS.glob(f"{name}-*"):
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Serve:
    """A function that makes a real TorchServe for some weights."""

    def server(name: str, weights: Path, engine: str | None, port: int) -> Server:
        store = tmp_path_factory.mktemp("store")
        return Server(
            build_archive(name, weights, engine={"name": engine} if engine else None, store=store),
            port=port,
        )

    return server


@pytest.fixture(scope="session")
def smollm2_server(smollm2: Path, serve: Serve) -> Iterator[Server]:
    """The real model with the engine chosen for a CPU."""
    with serve("smollm2-135m", smollm2, None, 7180) as server:
        yield server


@pytest.fixture(scope="session")
def smollm2_transformers_server(smollm2: Path, serve: Serve) -> Iterator[Server]:
    """The real model with the transformers engine."""
    with serve("smollm2-135m", smollm2, "transformers", 7210) as server:
        yield server


@pytest.fixture(scope="session")
def tiny_server(tiny_llama: Path, serve: Serve) -> Iterator[Server]:
    """A tiny model with the transformers engine, for tests that do not read the completions."""
    with serve("tiny", tiny_llama, "transformers", 7190) as server:
        yield server


@pytest.fixture(scope="session")
def tiny_openvino_server(tiny_llama: Path, serve: Serve) -> Iterator[Server]:
    """A tiny model with the openvino engine."""
    with serve("tiny", tiny_llama, "openvino", 7220) as server:
        yield server
    remove_exports(tiny_llama.name)
