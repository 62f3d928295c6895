"""What is on Vertex AI, as plain values. The deployer reads it; `changes` compares it. No SDK."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

Fields = Mapping[str, Any]
"""A message of the API as nested plain values. A field that is not set is absent."""

BACK = " back"
"""The end of the display name of what `rollback` deployed. Of others it can be ` after 3`."""


@dataclass(frozen=True)
class ModelVersion:
    """An uploaded version of the app's model."""

    number: int
    container: Fields
    """Its `container_spec`."""
    artifact_uri: str = ""


@dataclass(frozen=True)
class DeployedModel:
    """A model version with replicas at an endpoint."""

    id: str
    version: int
    traffic: int
    """Percent of the endpoint's requests."""
    machines: Fields
    """Its `dedicated_resources`."""
    service_account: str = ""
    name: str = ""
    """Its display name, which tells `rollback` what served before."""

    @property
    def previous(self) -> int | None:
        """The version that served most requests when this one was deployed.

        Vertex AI stores this nowhere else: an undeployed model leaves no trace, and the number of a
        version says when it was uploaded, not when it served.
        """
        found = re.search(r" after (\d+)$", self.name)
        return int(found[1]) if found else None

    @property
    def is_rollback(self) -> bool:
        """Whether `rollback` deployed it."""
        return self.name.endswith(BACK)


@dataclass(frozen=True)
class Endpoint:
    """An endpoint and what is deployed there, oldest first."""

    name: str
    labels: Mapping[str, str]
    dedicated: bool = True
    inference_timeout: int = 0
    host: str = ""
    """Where it takes requests: its own host name, or the region's."""
    deployed: tuple[DeployedModel, ...] = ()

    @property
    def traffic(self) -> dict[str, int]:
        """ID -> percent of the requests, without those that get none."""
        return {model.id: model.traffic for model in self.deployed if model.traffic}


@dataclass(frozen=True)
class Model:
    """A model in the registry, without its versions."""

    name: str
    labels: Mapping[str, str]
    default_version: str


@dataclass(frozen=True)
class RunningOperation:
    """A long-running operation that is not done."""

    name: str
    kind: str
    """`DeployModel`, `UploadModel`, ..."""


@dataclass(frozen=True)
class State:
    """What `deploy`, `rollback` and `undeploy` start from: the resources with the app's own IDs."""

    endpoint: Endpoint | None = None
    versions: tuple[ModelVersion, ...] = ()
    """Newest first."""
    operations: tuple[RunningOperation, ...] = ()


class Resource(NamedTuple):
    """Something on Vertex AI that this program made."""

    kind: str
    """`endpoint`, `deployed model`, `model` or `operation`."""
    name: str
    app: str
    detail: str
    billed: bool
    """Whether you pay for it."""


@dataclass(frozen=True)
class Inventory:
    """What `status` and `cleanup` start from: every resource with our labels."""

    endpoints: tuple[Endpoint, ...] = ()
    models: tuple[Model, ...] = ()
    operations: tuple[RunningOperation, ...] = ()

    def resources(self, app: str | None = None) -> Iterator[Resource]:
        """One entry for each resource. `app` names the owner of the running operations."""
        for endpoint in self.endpoints:
            owner = endpoint.labels["app"]
            host = endpoint.host if endpoint.dedicated else f"{endpoint.host} (shared)"
            yield Resource("endpoint", endpoint.name, owner, host, False)
            for model in endpoint.deployed:
                name, detail = f"{endpoint.name} {model.id}", _deployment(model)
                yield Resource("deployed model", name, owner, detail, True)
        for entry in self.models:
            detail = f"default version {entry.default_version}"
            yield Resource("model", entry.name, entry.labels["app"], detail, False)
        for operation in self.operations:
            billed = operation.kind == "DeployModel"
            yield Resource("operation", operation.name, app or "", operation.kind, billed)


def _deployment(model: DeployedModel) -> str:
    size = model.machines
    return (
        f"version {model.version}, {model.traffic} % of requests, "
        f"{size.get('min_replica_count', 0)} to {size.get('max_replica_count', 0)} x "
        f"{size.get('machine_spec', {}).get('machine_type', '')}"
    )
