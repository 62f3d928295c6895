"""The content of the images."""

import json
import re

import pytest

from deploy.common.paths import ROOT
from deploy.image.report import bytes_by_part, table
from tests.container.conftest import docker
from tools.lock import IMAGE_LOCKS, IMAGES, LOCK
from tools.setup_env import locked_blocks

pytestmark = pytest.mark.slow

LOCKED = locked_blocks(LOCK.read_text())


def inside(image: str, command: str) -> str:
    return docker("run", "--rm", "--entrypoint", "/bin/sh", image, "-c", command)


@pytest.mark.parametrize(("kind", "most"), [("lean", 550), ("full", 1250)])
def test_size_limit(kind, most, request):
    image = request.getfixturevalue(kind)
    parts = bytes_by_part(image)
    report = {image: {"parts": dict(parts), "total": parts.total()}}
    assert (parts.total() - parts["weights"]) / 1e6 < most, table(report)


@pytest.mark.parametrize("kind", ["lean", "full"])
def test_image_has_no_tool_cache_or_secret(kind, request):
    image = request.getfixturevalue(kind)
    assert not inside(image, "command -v gcc cc make pip pip3 curl wget git ssh gpg javac || true")
    unwanted = inside(
        image,
        "find / -xdev \\( -name '*.a' -o -name '*.h' -o -path '*/tests/*.py' -o -name '*.pem' "
        "-o -name 'id_rsa*' -o -name '.netrc' -o -name '.git' -o -name '*.whl' "
        "-o -path '/root/.cache/*' -o -path '/var/lib/apt/lists/*_*' \\) 2>/dev/null "
        "| grep -v -e certifi/cacert.pem -e grpc/_cython || true",
    )
    assert not unwanted
    history = docker("history", "--no-trunc", "--format", "{{.CreatedBy}}", image)
    assert not re.search(r"token|password|secret|key=", history, re.IGNORECASE)
    # No setuid program, with which another user could become root.
    assert not inside(
        image, "find / -xdev -perm -4000 -user root -path '/opt/*' 2>/dev/null || true"
    )


@pytest.mark.parametrize("kind", ["lean", "full"])
def test_image_has_no_analytics(kind, request):
    """Without this package, OpenVINO reports nothing and keeps no id."""
    packages = inside(
        request.getfixturevalue(kind), "ls /opt/venv/lib/python3.11/site-packages"
    ).split()
    assert "openvino" in packages
    assert not [name for name in packages if name.startswith("openvino_telemetry")]


def test_bytecode_of_imported_modules_only(full):
    count = "find /opt/venv -name '*.{}' | wc -l"
    sources, compiled = (int(inside(full, count.format(kind))) for kind in ("py", "pyc"))
    assert 500 < compiled < sources / 2


def test_lean_image_has_no_torch(lean):
    packages = inside(lean, "ls /opt/venv/lib/python3.11/site-packages").split()
    assert "openvino" in packages
    assert not {"torch", "transformers"} & set(packages)


@pytest.mark.parametrize("kind", ["lean", "full", "bare"])
def test_labels_and_user(kind, request):
    config = json.loads(docker("image", "inspect", request.getfixturevalue(kind)))[0]["Config"]
    labels = config["Labels"]
    assert config["User"] == "1000" and list(config["ExposedPorts"]) == ["7080/tcp"]
    assert re.fullmatch(r"[0-9a-f]{40}", labels["org.opencontainers.image.revision"])
    assert labels["serving-llms.weights"] == ("none" if kind == "bare" else "baked")
    assert config["Healthcheck"]["Test"] == ["CMD", "/opt/serving/ready"]


@pytest.mark.parametrize("image", IMAGES)
def test_locks_of_the_image_agree_with_the_projects_lock(image):
    """Two have CUDA's packages beside it; everything that both name is the same version."""
    blocks = locked_blocks((IMAGE_LOCKS / f"{image}.txt").read_text())
    for name, block in blocks.items():
        assert "--hash=sha256:" in block
        if name in LOCKED and name != "torch":
            assert block.split()[0] == LOCKED[name].split()[0]
        else:
            assert image in ("gpu", "torch-cuda"), name
    torch = (IMAGE_LOCKS / "torch.txt").read_text()
    assert torch in LOCKED["torch"] and "+cpu" in torch


def test_dockerfile_pins_every_version():
    text = (ROOT / "docker" / "Dockerfile").read_text()
    assert ":latest" not in text and "# syntax" not in text
    assert not re.findall(r"\bADD\b|curl |wget ", text)
    for install in re.findall(r"apt-get install .*", text):
        assert "--no-install-recommends" in install
    assert text.count("apt-get update") == text.count("rm -rf /var/lib/apt/lists/*")
