"""Images that `deploy.vertex push` rejects, because Vertex AI could not run them."""

import hashlib
import io
import json
import subprocess
import tarfile
from collections.abc import Callable, Iterator

import pytest

from deploy.common.paths import UserError
from deploy.image.lookup import WEIGHTS_LABEL, image_name
from deploy.image.runtime import container_runtime
from deploy.vertex.config import load_settings
from deploy.vertex.push import push
from tests.container.conftest import docker

pytestmark = pytest.mark.slow

APP, TAG = "foreign", "pro"


@pytest.fixture
def load() -> Iterator[Callable]:
    """Load an empty image with a given architecture and labels into the container runtime."""

    def load_image(architecture: str, labels: dict[str, str] | None) -> None:
        layer = io.BytesIO()
        tarfile.open(fileobj=layer, mode="w").close()
        digest = hashlib.sha256(layer.getvalue()).hexdigest()
        config = {
            "architecture": architecture,
            "os": "linux",
            "config": {"Labels": labels},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
        }
        name = image_name(APP, TAG)
        manifest = [{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]
        files = {"layer.tar": layer.getvalue(), "config.json": json.dumps(config).encode()}
        files["manifest.json"] = json.dumps(manifest).encode()
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            for path, content in files.items():
                entry = tarfile.TarInfo(path)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
        subprocess.run([container_runtime(), "load"], input=archive.getvalue(), check=True)

    yield load_image
    docker("image", "rm", image_name(APP, TAG), check=False)


def test_rejects_another_architecture(load):
    load("arm64", {WEIGHTS_LABEL: "baked"})
    reports = []
    with pytest.raises(UserError, match=r"foreign:pro is for arm64, and the replicas.* are amd64"):
        push(load_settings(project="a-project"), APP, TAG, reports.append)
    assert reports == []


def test_rejects_image_without_weights_and_artifact_uri(load):
    load("amd64", {WEIGHTS_LABEL: "none"})
    reports = []
    with pytest.raises(UserError, match=r"artifact_uri: none given, and .*foreign:pro has no wei"):
        push(load_settings(project="a-project"), APP, TAG, reports.append)
    assert reports == []


def test_rejects_image_with_weights_and_artifact_uri(load):
    """The container would serve its own weights and silently ignore the others."""
    load("amd64", {WEIGHTS_LABEL: "baked"})
    reports = []
    settings = load_settings(project="a-project", artifact_uri="gs://bucket/folder")
    message = (
        r"artifact_uri: gs://bucket/folder given, and .*foreign:pro contains weights.* build it "
        r"without: `make build-pro APP=foreign BAKED=no`"
    )
    with pytest.raises(UserError, match=message):
        push(settings, APP, TAG, reports.append)
    assert reports == []


@pytest.mark.parametrize(
    ("labels", "artifact_uri"),
    [
        ({WEIGHTS_LABEL: "none"}, "gs://bucket/folder"),
        ({WEIGHTS_LABEL: "baked"}, None),
        (None,) * 2,
    ],
)
def test_pushes_other_images(load, labels, artifact_uri):
    """The registry is port 9 of this machine, where no server listens."""
    load("amd64", labels)
    reports = []
    with pytest.raises(UserError, match=r"push 127\.0\.0\.1:9/a-project/serving/foreign:pro-"):
        settings = load_settings(
            project="a-project", artifact_uri=artifact_uri, push_registry="127.0.0.1:9"
        )
        push(settings, APP, TAG, reports.append)
    assert len(reports) == 1 and "foreign:pro" in reports[0]


def test_missing_image():
    with pytest.raises(UserError, match=r"there is no image .*foreign:pro; build one with `make b"):
        push(load_settings(project="a-project"), APP, TAG)
