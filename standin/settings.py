"""What one stand-in is set to, and how the platform's times shrink."""

from dataclasses import dataclass
from pathlib import Path

PROJECT_NUMBER = "100000000001"
"""Vertex AI answers with the project's number in resource names, whatever the request named."""

READY = "ready.json"
"""In the folder, as soon as the doors are open: where they are."""


@dataclass(frozen=True)
class Settings:
    """One stand-in's settings.

    Args:
        folder: where keys, logs and journals go.
        scale: what the platform's own durations and probe periods are multiplied by.
        limit_scale: what time limits of requests and deployments are multiplied by. Real models
            run at real speed, so this is larger.
        seed: of identifiers and of the choice between models that share traffic.
        runner: "docker" or "process".
        project: the project's ID.
        region: what the environment names; the stand-in answers for every region of Vertex AI.
    """

    folder: Path
    scale: float = 1.0
    limit_scale: float = 1.0
    seed: int = 0
    runner: str = "process"
    project: str = "standin-project"
    region: str = "europe-west4"
    number: str = PROJECT_NUMBER


def write_private(path: Path, text: str) -> None:
    """Write a file that nobody else can read."""
    path.touch(mode=0o600)
    path.write_text(text)
