"""Stand-ins for Vertex AI: one without Docker for the whole folder, one with Docker.

CI sets REQUIRE_DOCKER=1, which makes a missing Docker or docker-registry a failure.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.common.paths import UserError
from deploy.vertex import operations
from standin.local import Standin
from tests.vertex.gapic import Client
from tests.vertex.preloaded import FIRST_POLL, LONGEST_POLL

SCALE, LIMIT_SCALE = 0.0001, 0.05
"""The platform needs 24 ms for a deployment instead of 4 minutes; probes are 0.1 s apart, which is
their minimum; the limit of 60 s on shared endpoints is 3 s."""


@pytest.fixture(scope="package", autouse=True)
def polls_often() -> Iterator[None]:
    """Have the deployer poll as often as the stand-ins are fast: hundreds of times the platform."""
    with pytest.MonkeyPatch.context() as patch:  # the fixture would end before a test's own patches
        patch.setattr(operations, "FIRST_POLL", FIRST_POLL)
        patch.setattr(operations, "LONGEST_POLL", LONGEST_POLL)
        yield


@pytest.fixture(scope="package")
def standin() -> Iterator[Standin]:
    """Without Docker, for all tests of this folder."""
    with Standin(SCALE, runner="process", limit_scale=LIMIT_SCALE) as standin:
        yield standin


@pytest.fixture(scope="module")
def docker_standin() -> Iterator[Standin]:
    """With Docker and its own registry, for one module."""
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


@pytest.fixture(scope="package")
def clients(standin: Standin, code: str) -> dict[str, Client]:
    """The SDK's clients by transport. A test that deploys uses `client` or `grpc_client`."""
    image = standin.add_image("small")
    return {name: Client(standin, name, image, code) for name in ("grpc", "rest")}


@pytest.fixture(params=["grpc", "rest"])
def client(clients: dict[str, Client], request: pytest.FixtureRequest) -> Iterator[Client]:
    """The SDK's clients on either transport; deletes all resources after the test."""
    yield clients[request.param]
    clients["grpc"].delete_everything()


@pytest.fixture
def grpc_client(clients: dict[str, Client]) -> Iterator[Client]:
    """The SDK's clients on the default transport; deletes all resources after the test."""
    yield clients["grpc"]
    clients["grpc"].delete_everything()


@pytest.fixture(scope="module")
def quick_standin() -> Iterator[Standin]:
    """Without Docker, for the deployer's tests: 500 times as fast as the platform."""
    with Standin(scale=0.002, runner="process") as standin:
        yield standin
