"""Stand-ins for Vertex AI: one without Docker for the whole folder, one with Docker.

CI sets REQUIRE_DOCKER=1: there a missing Docker or docker-registry is a failure.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.common.paths import UserError
from deploy.vertex import operations
from standin.local import Standin
from tests.vertex.gapic import Client

SCALE, LIMIT_SCALE = 0.001, 0.05
"""Deploying takes 0.24 s, probes come every 0.1; 60 s on the shared endpoint become 3."""


@pytest.fixture(scope="package", autouse=True)
def looks_often() -> Iterator[None]:
    """The stand-ins are hundreds of times as fast as the platform: the deployer looks oftener."""
    with pytest.MonkeyPatch.context() as patch:  # not the fixture: a test's own undoes itself first
        patch.setattr(operations, "FIRST_POLL", 0.02)
        yield


@pytest.fixture(scope="package")
def standin() -> Iterator[Standin]:
    """Without Docker; os.environ leads to it until the last test of this folder."""
    with Standin(SCALE, runner="process", limit_scale=LIMIT_SCALE) as standin:
        yield standin


@pytest.fixture(scope="module")
def docker_standin() -> Iterator[Standin]:
    """With Docker and its own registry; os.environ leads to it until the module's last test."""
    try:
        standin = Standin(SCALE, runner="docker")
    except UserError as error:
        if os.environ.get("REQUIRE_DOCKER"):
            raise
        pytest.skip(f"no Docker with a registry: {error}")
    with standin:
        yield standin


@pytest.fixture(scope="session")
def code() -> str:
    """The small model server, to be passed to `python3 -c`."""
    return (Path(__file__).parent / "small_server.py").read_text()


@pytest.fixture(params=["grpc", "rest"])
def client(standin: Standin, request: pytest.FixtureRequest, code: str) -> Iterator[Client]:
    """The SDK's clients on either transport; what a test makes with it is deleted after it."""
    client = Client(standin, request.param, standin.add_image("small"), code)
    yield client
    client.delete_everything()


@pytest.fixture
def grpc_client(standin: Standin, code: str) -> Iterator[Client]:
    """The same on the default transport alone."""
    client = Client(standin, "grpc", standin.add_image("small"), code)
    yield client
    client.delete_everything()


@pytest.fixture(scope="module")
def quick_standin() -> Iterator[Standin]:
    """Without Docker, for the deployer's tests: 500 times as fast as the platform."""
    with Standin(scale=0.002, runner="process") as standin:
        yield standin
