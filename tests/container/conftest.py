"""The images, built once for all tests. Without Docker or podman these tests are skipped.

CI sets REQUIRE_DOCKER=1: there a missing container runtime is a failure.
"""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.common.paths import UserError
from deploy.image.build import build_image
from deploy.image.run import container_name, run_container
from deploy.image.runtime import container_runtime

APP = "smollm2-135m"
PORT = 7240


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    try:
        container_runtime()
    except UserError as error:
        if os.environ.get("REQUIRE_DOCKER"):
            raise
        skip = pytest.mark.skip(reason=f"no container runtime: {error}")
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(skip)


def docker(*arguments: str, check: bool = True) -> str:
    run = subprocess.run([container_runtime(), *arguments], capture_output=True, text=True)
    assert run.returncode == 0 or not check, run.stderr
    return run.stdout.strip()


@pytest.fixture(scope="session")
def lean(smollm2: Path) -> str:
    """The image without torch."""
    return build_image(APP, smollm2, tag="lean-test", target="cpu-lean")


@pytest.fixture(scope="session")
def bare(smollm2: Path) -> str:
    """The image without torch and without weights."""
    return build_image(APP, smollm2, tag="bare-test", target="cpu-lean", baked=False)


@pytest.fixture(scope="session")
def full(smollm2: Path) -> str:
    """The image with both engines."""
    return build_image(APP, smollm2, tag="full-test", target="cpu")


@pytest.fixture
def container(lean: str) -> Iterator[str]:
    """A container of the lean image as `make run` starts it, with 3 GB of memory."""
    secret = {"HF_TOKEN": "a-secret", "DATABASE_URL": "a-secret"}
    name = run_container(APP, tag="lean-test", port=PORT, memory="3g", environment=secret)
    yield name
    docker("rm", "--force", name)


@pytest.fixture(autouse=True)
def remove_container(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    docker("rm", "--force", container_name(APP), check=False)
