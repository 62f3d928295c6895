"""The SDK's generated clients, which its convenience classes call, with short waits."""

from typing import Any

import requests
from google.api_core.operation import Operation
from google.auth import default
from google.auth.transport.requests import AuthorizedSession
from google.cloud import aiplatform_v1 as v1

from deploy.common.waiting import wait_until
from standin.local import Standin

MACHINE = {"machine_type": "n1-standard-2"}


class Client:
    """All services on one transport, for one region of a stand-in."""

    def __init__(
        self, standin: Standin, transport: str, image: str, code: str, credentials: Any = None
    ) -> None:
        self.standin, self.transport, self.image, self.code = standin, transport, image, code
        self.host = f"{standin.region}-aiplatform.googleapis.com"
        self.parent = f"projects/{standin.project}/locations/{standin.region}"
        options = {
            "client_options": {"api_endpoint": self.host},
            "transport": transport,
            "credentials": credentials,
        }
        self.models = v1.ModelServiceClient(**options)
        self.endpoints = v1.EndpointServiceClient(**options)
        self.predictions = v1.PredictionServiceClient(**options)

    def spec(self, **more: Any) -> dict:
        """Return the specification of a container that runs the small server. `env` is a dict."""
        env = more.pop("env", {})
        return {
            "image_uri": self.image,
            "command": ["python3", "-c", self.code],
            "predict_route": "/predict",
            "health_route": "/ping",
            "ports": [{"container_port": 8080}],
            "env": [{"name": k, "value": str(v)} for k, v in env.items()],
        } | more

    def upload(self, model: dict | None = None, **spec: Any) -> str:
        """Upload a model; return its name."""
        body = {"display_name": "small", "container_spec": self.spec(**spec)} | (model or {})
        operation = self.models.upload_model(parent=self.parent, model=v1.Model(body))
        return finish(operation).model

    def endpoint(self, *, dedicated: bool = False, **more: Any) -> v1.Endpoint:
        body = {"display_name": "small", "dedicated_endpoint_enabled": dedicated} | more
        operation = self.endpoints.create_endpoint(parent=self.parent, endpoint=v1.Endpoint(body))
        return self.endpoints.get_endpoint(name=finish(operation).name)

    def deploy(
        self,
        endpoint: str,
        model: str,
        *,
        split: dict | None = None,
        machine: dict | None = None,
        count: int = 1,
        most: int = 0,
    ) -> str:
        """Deploy a model; return the deployed model's ID."""
        operation = self.start_deploy(
            endpoint, model, split=split, machine=machine, count=count, most=most
        )
        return finish(operation).deployed_model.id

    def start_deploy(
        self,
        endpoint: str,
        model: str,
        *,
        split: dict | None = None,
        machine: dict | None = None,
        count: int = 1,
        most: int = 0,
    ) -> Operation:
        """Start to deploy a model; return the operation."""
        resources: dict[str, Any] = {"machine_spec": machine or MACHINE, "min_replica_count": count}
        resources["max_replica_count"] = most or count
        return self.endpoints.deploy_model(
            endpoint=endpoint,
            deployed_model=v1.DeployedModel({"model": model, "dedicated_resources": resources}),
            traffic_split={"0": 100} if split is None else split,
        )

    def running(self, *, dedicated: bool = False, count: int = 1, **spec: Any) -> v1.Endpoint:
        """Create an endpoint and deploy the small server at it."""
        endpoint = self.endpoint(dedicated=dedicated)
        self.deploy(endpoint.name, self.upload(**spec), count=count)
        return endpoint

    def predict(self, endpoint: str, **parameters: Any) -> dict:
        """Request one prediction on a shared endpoint; return it and the deployed model's ID."""
        instances: Any = ["x"]  # proto-plus converts both to protobuf's Value, and Values back
        values: Any = parameters or None
        response = self.predictions.predict(
            endpoint=endpoint, instances=instances, parameters=values
        )
        prediction: Any = response.predictions[0]
        return dict(prediction) | {"deployed_model_id": response.deployed_model_id}

    def delete_everything(self) -> None:
        """Undeploy and delete everything in the region."""
        for endpoint in self.endpoints.list_endpoints(parent=self.parent):
            left = {d.id for d in endpoint.deployed_models}
            for number in list(left):
                left.discard(number)
                split = {other: 100 if i == 0 else 0 for i, other in enumerate(sorted(left))}
                finish(
                    self.endpoints.undeploy_model(
                        endpoint=endpoint.name, deployed_model_id=number, traffic_split=split
                    )
                )
            finish(self.endpoints.delete_endpoint(name=endpoint.name))
        for model in self.models.list_models(parent=self.parent):
            finish(self.models.delete_model(name=model.name))


def finish(operation: Operation, seconds: float = 60) -> Any:
    """Wait for an operation without the SDK's growing pauses; return its result."""
    wait_until(operation.done, seconds, interval=0.01)
    return operation.result(timeout=1)


def session() -> requests.Session:
    """Return a session for plain REST, with a token as `gcloud auth print-access-token` prints."""
    credentials, _ = default(scopes=["https://www.googleapis.com/auth/cloud-platform"])
    return AuthorizedSession(credentials)
