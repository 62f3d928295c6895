"""Engines on tiny models, for tests that run with each engine that is installed here."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deploy.archive.export import export
from deploy.common.paths import ROOT
from handler.config import engine_config
from handler.engine import Engine, create_engine
from tests import tiny

LIBRARIES = {"transformers": "transformers", "openvino": "openvino_genai", "vllm": "vllm"}
ENGINES = list(LIBRARIES)
_kept: list[Engine] = []
"""vLLM's engines. One that is collected ends what all engines of the process share."""

NO_VLLM = "vLLM is not installed: make setup ENGINE=vllm"


def need(kind: str) -> Any:
    """Return an engine's library; skip the test if this environment does not have it."""
    other = f"the engine {kind} is not installed in this environment"
    return pytest.importorskip(LIBRARIES[kind], reason=NO_VLLM if kind == "vllm" else other)


def tiny_weights(kind: str, name: str, folder: Path) -> Path:
    """Write a tiny model that an engine can serve."""
    if kind != "vllm":
        return tiny.random_model(folder, getattr(tiny, name))
    # In another process, because vLLM changes classes of transformers when it loads a model.
    program = "import sys, pathlib; from tests import tiny; "
    program += "tiny.random_model(pathlib.Path(sys.argv[1]), tiny.VLLM[sys.argv[2]])"
    subprocess.run([sys.executable, "-c", program, folder, name], cwd=ROOT, check=True)
    return folder


def load_engine(kind: str, weights: Path, cache: Path | None = None, **settings: Any) -> Engine:
    """Load an engine that computes in the precision of tests: exact, if it can be.

    Args:
        kind: the engine.
        weights: a folder in Hugging Face layout.
        cache: where exports go, if not to the usual place.
        settings: fields of `app.engine`.
    """
    need(kind)
    sections = {"openvino": {"precision": "fp16"}, "vllm": {"dtype": "float32"}}
    for section, fields in sections.items():
        settings[section] = fields | settings.get(section, {})
    config = engine_config(name=kind, **settings)
    if kind == "openvino":
        weights = export(weights, config, cache) if cache else export(weights, config)
    engine = create_engine(weights, config)
    if kind == "vllm":
        _kept.append(engine)
    return engine
