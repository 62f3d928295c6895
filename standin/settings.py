"""The settings of one stand-in."""

from dataclasses import dataclass
from pathlib import Path

PROJECT_NUMBER = "100000000001"
"""Vertex AI's responses name the project by its number, even if the request used its ID."""

READY = "ready.json"
"""File in the folder with the ports; it exists as soon as the stand-in takes requests."""


@dataclass(frozen=True)
class StandinSettings:
    """The settings of one stand-in.

    Args:
        folder: where keys, logs and journals go.
        scale: factor for the platform's own durations and probe periods.
        limit_scale: factor for time limits of requests and deployments. Models run at real speed,
            so it is larger than `scale`.
        seed: of identifiers and of the choice between models that share traffic.
        runner: "docker" or "process".
        project: the project's ID.
        region: the region in the environment variables; the stand-in answers for every region.
        project_number: the project's number in resource names.
    """

    folder: Path
    scale: float = 1.0
    limit_scale: float = 1.0
    seed: int = 0
    runner: str = "process"
    project: str = "standin-project"
    region: str = "europe-west4"
    project_number: str = PROJECT_NUMBER


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read."""
    path.touch(mode=0o600)
    path.write_text(text)
