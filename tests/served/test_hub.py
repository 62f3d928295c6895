"""`make model` and `make archive` for gpt2, from a server that speaks the Hub's protocol.

The weights are random, of GPT-2's true shape and size; the code that moves them is the real one.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest

from deploy.common.paths import ROOT
from deploy.torchserve.server import Server
from deploy.weights.fetch import get_weights
from handler.config import load_app
from tests.hub_server import Hub

pytestmark = pytest.mark.served

APP = load_app("gpt2")
SIZE = 2 * 124_439_808  # GPT-2's parameters, in bfloat16


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What openai-community/gpt2 holds, in kind: weights in three formats, texts, a README."""
    models = tmp_path_factory.mktemp("hub")
    folder = get_weights("gpt2", shape_only=True, models=models)
    (folder / "SOURCE.json").unlink()
    (folder / "tf_model.h5").write_bytes(b"not wanted" * 50_000)
    (folder / "README.md").write_text("# GPT-2\n")
    (folder / "pytorch_model.bin").write_bytes(b"not wanted either" * 50_000)
    return folder


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the repository's code with nothing made in it, using our environment."""
    copy = tmp_path / "checkout"
    copy.mkdir()
    for name in ("handler", "deploy", "Makefile", "pyproject.toml", "requirements.lock"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, copy / name)
    return copy


def make(checkout: Path, hub: Hub, *arguments: str, **environment: str):
    command = ["make", "-o", "setup", *arguments, f"VENV={ROOT / '.venv'}"]
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "MAKE"))}
    variables |= {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(checkout / "hf"),
        "PYTHONPATH": str(checkout),
    }
    variables |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return subprocess.run(
        command, cwd=checkout, env=variables | environment, capture_output=True, text=True
    )


def test_interrupted_download_is_resumed_archived_and_served(repository: Path, checkout: Path):
    with Hub(repository, APP.weights.repo, APP.weights.revision) as hub:
        hub.cut_after = 50_000_000
        first = make(checkout, hub, "model", "APP=gpt2", HF_TOKEN="hf_notasecret")
        assert first.returncode != 0
        assert "Traceback" not in first.stderr, first.stderr
        error = first.stderr.strip().splitlines()[-2]
        assert (
            error.startswith("error: openai-community/gpt2: ") and "the download resumes" in error
        )
        assert not (checkout / "models" / "gpt2").exists()
        assert hub.cut_after <= hub.sent < hub.cut_after + 10_000_000

        hub.cut_after = hub.status = None
        second = make(checkout, hub, "model", "APP=gpt2")
        assert second.returncode == 0, second.stderr
        resumed = int(hub.ranges[-1].removeprefix("bytes=").removesuffix("-"))
        assert 30_000_000 < resumed <= 50_000_000, hub.ranges  # written in pieces of 10 MB
        assert hub.tokens == {None, "Bearer hf_notasecret"}
        total = sum(p.stat().st_size for p in repository.glob("*.safetensors"))
        assert SIZE < total < SIZE + 1_000_000
        assert total <= hub.sent < total + 20_000_000, "the resumed file was sent from its start"

        requests = len(hub.requests)
        third = make(checkout, hub, "archive", "APP=gpt2")
        assert third.returncode == 0, third.stderr
        assert len(hub.requests) == requests, "a complete folder asks the Hub for nothing"
    assert not any("h5" in r or ".bin" in r or "README" in r for r in hub.requests)

    with Server(checkout / "model_store" / "gpt2", port=7200) as server:
        body = {"instances": ["The Eiffel tower"], "parameters": {"max_new_tokens": 8}}
        response = httpx.post(server.url, json=body, timeout=60)
    assert response.status_code == 200, response.text
    assert response.json()["predictions"][0].startswith("The Eiffel tower")


@pytest.fixture
def small_hub(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tiny_llama
    with Hub(folder, APP.weights.repo, APP.weights.revision) as hub:
        yield hub


def run_model(checkout: Path, hub: Hub, **environment: str) -> str:
    run = make(checkout, hub, "model", "APP=gpt2", **environment)
    assert run.returncode != 0 and "Traceback" not in run.stderr, run.stderr
    errors = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, run.stderr
    assert not (checkout / "models" / "gpt2").exists()
    return errors[0]


def test_wrong_hash_is_an_error(small_hub: Hub, checkout: Path):
    small_hub.corrupt = True
    assert "does not have the hash that the repository states" in run_model(checkout, small_hub)
    small_hub.corrupt = False
    assert make(checkout, small_hub, "model", "APP=gpt2").returncode == 0


def test_server_error_says_to_repeat_later(small_hub: Hub, checkout: Path):
    small_hub.status = 500
    assert "answered 500. Try again later" in run_model(checkout, small_hub)


def test_missing_access_names_the_token(small_hub: Hub, checkout: Path):
    small_hub.repo = "somebody/else"
    assert "HF_TOKEN" in run_model(checkout, small_hub)


def test_unknown_revision_is_an_error(small_hub: Hub, checkout: Path):
    small_hub.revision = "0" * 40
    assert "has no revision 607a30d7" in run_model(checkout, small_hub)


def test_missing_network_names_the_alternatives(small_hub: Hub, checkout: Path):
    error = run_model(checkout, small_hub, HF_ENDPOINT="http://127.0.0.1:9")
    assert "SHAPE_ONLY=1" in error and "MODEL_DIR=path" in error and "127.0.0.1:9" in error


def test_repository_without_weights_is_an_error(small_hub: Hub, checkout: Path, tmp_path: Path):
    small_hub.folder = tmp_path / "texts"
    small_hub.folder.mkdir()
    (small_hub.folder / "config.json").write_text("{}")
    assert "no *.safetensors and no *.bin" in run_model(checkout, small_hub)


def test_download_records_its_source(small_hub: Hub, checkout: Path):
    assert make(checkout, small_hub, "model", "APP=gpt2").returncode == 0
    source = json.loads((checkout / "models" / "gpt2" / "SOURCE.json").read_text())
    assert source["repo"] == "openai-community/gpt2"
    assert source["revision"] == APP.weights.revision
