"""What the builder of an image is sent."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from deploy.common.paths import ROOT
from deploy.image.runtime import container_runtime
from tests.unit.test_secrets import SECRET, plant

pytestmark = pytest.mark.slow


def test_build_context_leaves_out_secrets(tmp_path: Path):
    """Build with the project's .dockerignore, and look at what the builder was sent."""
    context = tmp_path / "context"
    for name in ("docker", "handler", "deploy"):
        shutil.copytree(ROOT / name, context / name, ignore=shutil.ignore_patterns("__pycache__"))
    weights = context / "build" / "image" / "prepared" / "x" / "weights"
    weights.mkdir(parents=True)
    (weights / "config.json").write_text("{}")
    (weights.parent / "model-config.yaml").write_text("{}")
    (context / "build" / "image" / "wheels").mkdir()
    for name in ("", "docker", "handler", "deploy"):
        plant(context / name)
    recipe = tmp_path / "Dockerfile"
    recipe.write_text('FROM scratch\nCOPY . /\nCMD ["/x"]\n')
    ignored = (ROOT / "docker" / "Dockerfile.dockerignore").read_text()
    (tmp_path / "Dockerfile.dockerignore").write_text(ignored)
    tag = f"serving-llms/context-test:{os.getpid()}"
    program = container_runtime()

    def docker(*arguments: object) -> bytes:
        variables = os.environ | {"DOCKER_BUILDKIT": "1"}
        command = [program, *map(str, arguments)]
        return subprocess.run(command, env=variables, check=True, capture_output=True).stdout

    docker("build", "--quiet", "--file", recipe, "--tag", tag, context)
    container = docker("create", tag).decode().strip()
    try:
        (tmp_path / "sent.tar").write_bytes(docker("export", container))
    finally:
        docker("rm", container)
        docker("image", "rm", tag)
    sent = tmp_path / "sent"
    shutil.unpack_archive(tmp_path / "sent.tar", sent)
    secret = SECRET.encode()
    files = [path for path in sent.rglob("*") if path.is_file() and secret in path.read_bytes()]
    assert not files, files
    for name in ("handler/engine/text.py", "handler/apps/defaults.yaml", "docker/locks/cpu.txt"):
        assert (sent / name).is_file(), name
    assert (sent / weights.relative_to(context) / "config.json").is_file()
    assert (sent / "build/image/wheels").is_dir()
