"""One stand-in for all tests of this folder: gRPC reads its certificates once per process."""

from collections.abc import Iterator

import pytest

from deploy.standin.local import Standin


@pytest.fixture(scope="session")
def standin() -> Iterator[Standin]:
    """A stand-in that starts commands as processes, 500 times as fast as the platform."""
    with Standin(scale=0.002, runner="process") as running:
        yield running
