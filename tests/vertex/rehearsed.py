"""What the tests of the deployer share: settings for a small server, and one app per test."""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

from google.cloud import aiplatform

from deploy.vertex.config import VertexSettings, load_settings
from deploy.vertex.deployer import Deployer
from deploy.vertex.predict import predict_in_every_way
from standin.local import Standin

SERVER = Path(__file__).parent / "small_server.py"
BODY: dict[str, Any] = {"instances": ["a", "b"], "parameters": {"echo": True}}
SHARED: dict[str, Any] = {"dedicated": False, "inference_timeout": None}
INVOKE: dict[str, Any] = {"invoke_route_prefix": "/*", "predict_route": None}
CHANGES = {
    *("UploadModel", "DeleteModel", "CreateEndpoint", "UpdateEndpoint", "DeleteEndpoint"),
    *("DeployModel", "MutateDeployedModel", "UndeployModel"),
}


def small(**overrides: Any) -> VertexSettings:
    """The settings of deploy/vertex/vertex.yaml, with a server that is ready at once."""
    given: dict[str, Any] = {
        "command": [sys.executable, str(SERVER)],
        "predict_route": "/predict",
        "health_route": "/health",
        "startup_probe": [],
        "max_replicas": 1,
    }
    settings = load_settings(**given)
    # A keyword None of `load_settings` keeps the file's value.
    return VertexSettings(**settings.model_dump() | overrides)


class Rehearsed:
    """The app of one test: commands on it, and the requests that they made."""

    def __init__(self, standin: Standin, app: str) -> None:
        self.standin, self.app = standin, app
        self.lines: list[str] = []
        standin.add_image(app)

    def deployer(self, **overrides: Any) -> Deployer:
        return Deployer(small(**overrides), self.app, self.lines.append)

    def image(self, tag: str = "1") -> str:
        return small().image_uri(self.app, tag)

    def deploy(self, tag: str = "1", canary: int | None = None, **overrides: Any) -> str:
        return self.deployer(**overrides).deploy(self.image(tag), canary)

    def predict(self, body: dict[str, Any], **overrides: Any) -> dict[str, Any]:
        return predict_in_every_way(small(**overrides), self.app, body)

    def changes(self) -> list[str]:
        """The methods of all calls so far that changed something."""
        return [c["method"] for c in self.standin.calls() if c["method"] in CHANGES]

    def shares(self) -> dict[str, int]:
        """Version -> percent of the requests, for every deployed model."""
        endpoint = aiplatform.Endpoint(small().endpoint_name(self.app))
        split = endpoint.traffic_split
        return {model.model_version_id: split.get(model.id, 0) for model in endpoint.list_models()}

    def answers(self, count: int) -> Counter[str]:
        """Version -> how many of `count` requests it answered."""
        endpoint = aiplatform.Endpoint(small().endpoint_name(self.app))
        return Counter(
            str(endpoint.predict(BODY["instances"]).model_version_id) for _ in range(count)
        )
