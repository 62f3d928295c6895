"""What the deployer relies on, asked of the stand-in and, if you say so, of the real Vertex AI.

    GCP_PROJECT=my-project VERTEX_REAL=1 pytest tests/vertex/test_contract.py

The latter costs a quarter of an hour of one small machine; it needs credentials, and Docker with
the image of `make build-pro`. Each test runs on both and says the same of both: where the stand-in
guesses, the real run tells.
"""

import json
import os
import uuid
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import requests
from google.api_core import exceptions as errors
from google.cloud import aiplatform

from deploy import vertex as commands
from deploy.vertex_config import Settings, load_settings
from deploy.vertex_steps import Vertex, cleanup, deploy, what_is_there

APP = f"contract-{uuid.uuid4().hex[:6]}"


class Platform(NamedTuple):
    """Where the tests run: settings, an image for them, and what to ask of it."""

    settings: Settings
    image: str
    body: dict[str, Any]
    vertex: Vertex
    google: bool


def _google() -> Platform:
    if os.environ.get("VERTEX_REAL") != "1":
        pytest.skip("the real Vertex AI costs money: set VERTEX_REAL=1 to test it")
    if not os.environ.get("GCP_PROJECT"):
        pytest.skip("the real Vertex AI needs a project: set GCP_PROJECT")
    served = "smollm2-135m"
    settings = load_settings(predict_route=f"/predictions/{served}", max_replicas=1)
    vertex = Vertex(settings)
    return Platform(settings, commands.push(settings, served), commands.ASKED, vertex, True)
