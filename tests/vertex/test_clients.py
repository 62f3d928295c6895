"""Google's own clients, unchanged, against the stand-in: the SDK, gcloud, and curl.

What they know of the stand-in is its environment variables, nothing else.
"""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from google.cloud import aiplatform

from deploy.vertex import token
from tests.vertex.helpers import BODY, LABELS, Rehearsal

HEADERS = {"Content-Type": "application/json"}


def test_the_sdk_by_its_convenient_classes(rehearsal: Rehearsal):
    settings = rehearsal.settings
    aiplatform.init(project=settings.project, location=settings.region)
    model = aiplatform.Model.upload(
        display_name="by-sdk",
        labels=LABELS,
        serving_container_image_uri=rehearsal.image(),
        serving_container_command=settings.command,
        serving_container_predict_route=settings.route_for("small"),
        serving_container_health_route=settings.health_route,
        serving_container_ports=[settings.port],
        serving_container_shared_memory_size_mb=256,
        serving_container_deployment_timeout=600,
    )
    assert model.supported_deployment_resources_types and model.version_id == "1"
    endpoint = aiplatform.Endpoint.create(
        display_name="by-sdk", labels=LABELS, dedicated_endpoint_enabled=True
    )
    model.deploy(endpoint=endpoint, machine_type="n2-standard-4", traffic_percentage=100)
    predicted = endpoint.predict(BODY["instances"], parameters=BODY["parameters"])
    raw = endpoint.raw_predict(json.dumps(BODY).encode(), HEADERS)
    assert raw.status_code == 200 and raw.json()["predictions"] == predicted.predictions
    with ThreadPoolExecutor(16) as pool:
        many = list(pool.map(lambda _: endpoint.predict(BODY["instances"]), range(16)))
    assert {one.deployed_model_id for one in many} == {predicted.deployed_model_id}
    endpoint.undeploy_all()
    endpoint.delete()
    model.delete()
    assert aiplatform.Endpoint.list() == [] and aiplatform.Model.list() == []
