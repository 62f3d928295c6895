"""What the tests of the deployer share: settings for a small server, and one app for each test."""

import sys
from pathlib import Path
from typing import Any

from google.cloud import aiplatform

from deploy.vertex.config import Settings, load_settings
from deploy.vertex.deployer import Vertex, deploy
from standin.local import Standin

SERVER = Path(__file__).parent / "small_server.py"
BODY = {"instances": ["a", "b"], "parameters": {"echo": True}}
CHANGES = {
    *("UploadModel", "DeleteModel", "CreateEndpoint", "UpdateEndpoint", "DeleteEndpoint"),
    *("DeployModel", "UndeployModel"),
}


def small(**overrides: Any) -> Settings:
    """The settings of deploy/vertex/vertex.yaml, with a server that is ready at once."""
    given = {
        "command": [sys.executable, str(SERVER)],
        "predict_route": "/predict",
        "health_route": "/health",
        "startup_probe": [],
        "max_replicas": 1,
    }
    return load_settings(**given | overrides)


class Rehearsed:
    """An app of one test: what is done to it, and what the platform was asked."""

    def __init__(self, standin: Standin, app: str) -> None:
        self.standin, self.app, self.lines = standin, app, []
        standin.add_image(app)

    def vertex(self, **overrides: Any) -> Vertex:
        return Vertex(small(**overrides), self.lines.append)

    def image(self, tag: str = "1") -> str:
        return small().image_uri(self.app, tag)

    def deploy(self, tag: str = "1", canary: int | None = None, **overrides: Any) -> Any:
        return deploy(self.vertex(**overrides), self.app, self.image(tag), canary)

    def changes(self) -> list[str]:
        """The calls so far that changed something."""
        return [c["method"] for c in self.standin.calls() if c["method"] in CHANGES]

    def shares(self) -> dict[str, int]:
        """Version -> per cent, of what is deployed."""
        endpoint = aiplatform.Endpoint(small().endpoint_name(self.app))
        split = endpoint.traffic_split
        return {one.model_version_id: split.get(one.id, 0) for one in endpoint.list_models()}

    def answers(self, count: int) -> dict[str, int]:
        """Version -> how many of some requests it answered."""
        endpoint = aiplatform.Endpoint(small().endpoint_name(self.app))
        seen: dict[str, int] = {}
        for _ in range(count):
            version = endpoint.predict(BODY["instances"]).model_version_id
            seen[version] = seen.get(version, 0) + 1
        return seen
