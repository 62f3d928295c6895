"""What to change on Vertex AI: pure functions from a state to a list of changes. No SDK.

`Deployer` reads the state and applies the changes in their order. It can be killed between any two
of them: the next run reads the state again and finds the changes that are left.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from deploy.common.paths import UserError
from deploy.vertex.config import MANAGED_BY
from deploy.vertex.state import (
    BACK,
    DeployedModel,
    Endpoint,
    Fields,
    Inventory,
    ModelVersion,
    State,
)

NEW = "0"
"""In a traffic split, Vertex AI's own ID for the model that is being deployed."""

KEPT_EMPTY = {
    *("command", "args", "env", "startup_probe", "exec_"),
    *("spot", "accelerator_type", "accelerator_count", "invoke_route_prefix"),
}
"""Fields, at any depth, that the service leaves empty if we do."""


SCALING = ("min_replica_count", "max_replica_count", "autoscaling_metric_specs")
"""Fields of `dedicated_resources` that Vertex AI changes while the replicas serve."""


@dataclass(frozen=True)
class Wanted:
    """What should be deployed."""

    container: Fields
    """The version's `container_spec`."""
    artifact_uri: str
    machines: Fields
    """The deployed model's `dedicated_resources`."""
    service_account: str
    inference_timeout: int
    """Seconds; 0 for a shared endpoint, where it cannot be set."""
    canary: int | None = None
    """Percent of the requests. None: all, and other deployed models are undeployed."""
    dedicated: bool = True


@dataclass(frozen=True)
class UploadVersion:
    """Upload a container as a new version of the model."""

    container: Fields
    artifact_uri: str
    number: int
    """The expected one; Vertex AI assigns it."""


@dataclass(frozen=True)
class CreateEndpoint:
    """Create the app's endpoint."""


@dataclass(frozen=True)
class DeployVersion:
    """Start replicas of a version and wait until they are ready."""

    version: int | None
    """None: the version that an earlier change uploads."""
    name_suffix: str
    """For `rollback`: what served before, or that this is a rollback."""
    traffic: dict[str, int]
    """ID -> percent, with NEW for these replicas."""


@dataclass(frozen=True)
class Rescale:
    """Change how many replicas of a deployed model there are, and what decides it."""

    id: str
    version: int
    machines: Fields
    """The new `dedicated_resources`."""
    fields: tuple[str, ...]
    """Those of SCALING that differ."""


@dataclass(frozen=True)
class SetTraffic:
    """Distribute the requests among the deployed models."""

    traffic: dict[str, int]
    """ID -> percent, for every deployed model."""
    versions: dict[str, int]
    """ID -> version, of those that get requests."""


@dataclass(frozen=True)
class Undeploy:
    """Stop the replicas of a deployed model."""

    endpoint: str
    id: str
    version: int
    traffic: dict[str, int] | None = None
    """Who takes its requests; None if it gets none, or if it is the last."""


@dataclass(frozen=True)
class DeleteEndpoint:
    """Delete an endpoint without deployed models."""

    name: str


@dataclass(frozen=True)
class DeleteModel:
    """Delete a model with all its versions."""

    name: str


Change = (
    UploadVersion
    | CreateEndpoint
    | DeployVersion
    | Rescale
    | SetTraffic
    | Undeploy
    | DeleteEndpoint
    | DeleteModel
)


def check_canary(canary: int | None) -> None:
    """Reject a value that is not a share of the requests.

    Raises:
        UserError: it is neither None nor a whole number from 1 to 99.
    """
    if canary is not None and not (type(canary) is int and 1 <= canary <= 99):
        raise UserError(f"canary: {canary!r} given; should be a whole number from 1 to 99, or none")


def deployment(state: State, wanted: Wanted) -> list[Change]:
    """Changes after which the wanted version gets its share of the requests.

    Raises:
        UserError: the endpoint is not ours, has another type or timeout, or a canary has nothing
            beside it that the same requests reach.
    """
    endpoint, changes = state.endpoint, list[Change]()
    if endpoint:
        _check_endpoint(endpoint, wanted)
    deployed = endpoint.deployed if endpoint else ()
    if wanted.canary and not deployed:
        raise UserError(
            f"canary: {wanted.canary} given, and nothing is deployed that could take the rest"
        )
    version = next((v.number for v in state.versions if _is_wanted(v, wanted)), None)
    if version is None:
        newest = max((v.number for v in state.versions), default=0)
        changes.append(UploadVersion(wanted.container, wanted.artifact_uri, newest + 1))
    if not endpoint:
        changes.append(CreateEndpoint())
    same = [model for model in deployed if model.version == version]
    present = next((model for model in same if _runs_as(model, wanted)), None)
    if not present and not wanted.canary:
        present = next((model for model in same if _scales_to(model, wanted)), None)
        if present:
            changes.append(_rescale(present, wanted))
    others = [model for model in deployed if model is not present]
    busiest = max(others, key=lambda model: model.traffic, default=None)
    share = wanted.canary or 100
    traffic = {present.id if present else NEW: share}
    if wanted.canary and busiest:
        _check_same_doors(state, busiest, wanted)
        traffic[busiest.id] = 100 - share
    elif wanted.canary:
        raise UserError(
            f"canary: {wanted.canary} given, and version {version} of this image is the only one "
            "deployed; build another image, or name another one with --image or --tag (TAG=)"
        )
    if not present:
        suffix = ""
        if busiest:
            # The same version on other machines takes the place of the old deployment.
            inherited = busiest.previous if busiest.version == version else None
            suffix = f" after {inherited or busiest.version}"
        changes.append(DeployVersion(version, suffix, {m.id: 0 for m in others} | traffic))
    return changes + (_distribute(endpoint, traffic) if endpoint else [])


def rollback(state: State, app: str) -> tuple[str, list[Change]]:
    """Changes that go back to what served before the last deployment, and a line about them.

    Raises:
        UserError: there is nothing to go back to.
    """
    endpoint = state.endpoint
    if not endpoint or not endpoint.deployed:
        raise UserError(f"rollback: nothing of {app} is deployed")
    *others, newest = endpoint.deployed
    if others and newest.is_rollback:
        line = f"back to version {newest.version}, which an earlier run began"
        line += _note_of_doors(state, newest.version)
        return line, _distribute(endpoint, {newest.id: 100})
    if others:
        busiest = max(others, key=lambda model: model.traffic)
        line = f"back from version {newest.version} to {busiest.version}"
        line += _note_of_doors(state, busiest.version)
        return line, _distribute(endpoint, {busiest.id: 100})
    target = _version_before(newest, state.versions)
    if target is None:
        raise UserError(
            f"rollback: version {newest.version} of {app} is the first one known; deploy the image "
            "that you want instead"
        )
    traffic = {NEW: 100}
    line = f"back from version {newest.version} to {target}, which is deployed again"
    line += _note_of_doors(state, target)
    return line, [
        DeployVersion(target, BACK, {newest.id: 0} | traffic),
        *_distribute(endpoint, traffic),
    ]


def other_doors(state: State, container: Fields) -> str | None:
    """A line about clients that must change, if another container takes other requests.

    Args:
        state: with what serves now.
        container: what will serve.
    """
    wanted, busiest = container.get("invoke_route_prefix", ""), _busiest(state)
    prefix = _prefix(state, busiest) if busiest else None
    if busiest is None or prefix is None or prefix == wanted:
        return None
    return (
        f"invoke_route_prefix: {wanted or 'none'}, and {prefix or 'none'} at version "
        f"{busiest.version}, which serves now and stops: clients must change from "
        f"{_doors(prefix)} to {_doors(wanted)}"
    )


def served_prefix(state: State) -> str | None:
    """The `invoke_route_prefix` of what gets most requests; None if nothing is deployed."""
    busiest = _busiest(state)
    return (_prefix(state, busiest) or "") if busiest else None


def _busiest(state: State) -> DeployedModel | None:
    deployed = state.endpoint.deployed if state.endpoint else ()
    return max(deployed, key=lambda model: model.traffic, default=None)


def undeploy(endpoint: Endpoint) -> list[Change]:
    """Stop every deployed model of an endpoint, those with the fewest requests first."""
    by_traffic = sorted(endpoint.deployed, key=lambda model: model.traffic)
    return [
        Undeploy(
            endpoint.name,
            model.id,
            model.version,
            {by_traffic[-1].id: 100} if model.traffic and model is not by_traffic[-1] else None,
        )
        for model in by_traffic
    ]


def removal(inventory: Inventory) -> list[Change]:
    """Remove everything: deployed models, then endpoints, then models."""
    changes: list[Change] = []
    for endpoint in inventory.endpoints:
        changes += [*undeploy(endpoint), DeleteEndpoint(endpoint.name)]
    return changes + [DeleteModel(model.name) for model in inventory.models]


def includes(actual: Fields, wanted: Fields) -> bool:
    """Whether every field that is set in `wanted` has the same value in `actual`.

    The service fills in fields that it was not given, such as defaults of probes. A field in
    KEPT_EMPTY is compared also where `wanted` does not set it: a removed setting is a change.
    """
    for name in {*wanted, *(KEPT_EMPTY & actual.keys())}:
        here, there = wanted.get(name), actual.get(name)
        if isinstance(here, dict) or isinstance(there, dict):
            if not includes(there or {}, here or {}):
                return False
        elif here != there:
            return False
    return True


def _is_wanted(version: ModelVersion, wanted: Wanted) -> bool:
    same_artifacts = version.artifact_uri == wanted.artifact_uri
    return same_artifacts and includes(version.container, wanted.container)


def _runs_as(model: DeployedModel, wanted: Wanted) -> bool:
    same_account = model.service_account == wanted.service_account
    return same_account and includes(model.machines, wanted.machines)


def _scales_to(model: DeployedModel, wanted: Wanted) -> bool:
    """Whether only fields in SCALING differ."""
    same_account = model.service_account == wanted.service_account
    return same_account and includes(_fixed(model.machines), _fixed(wanted.machines))


def _fixed(machines: Fields) -> Fields:
    return {name: value for name, value in machines.items() if name not in SCALING}


def _rescale(model: DeployedModel, wanted: Wanted) -> Rescale:
    here, there = wanted.machines, model.machines
    differ = tuple(name for name in SCALING if here.get(name) != there.get(name))
    return Rescale(model.id, model.version, here, differ)


def _prefix(state: State, model: DeployedModel) -> str | None:
    """The `invoke_route_prefix` of a deployed model; None if its version is not known."""
    for version in state.versions:
        if version.number == model.version:
            return str(version.container.get("invoke_route_prefix", ""))
    return None


def _note_of_doors(state: State, version: int) -> str:
    """What `other_doors` says about a known version, to append; empty if nothing changes."""
    container = next((v.container for v in state.versions if v.number == version), None)
    line = None if container is None else other_doors(state, container)
    return f"; {line}" if line else ""


def _doors(prefix: str) -> str:
    return ".../invoke/PATH" if prefix else ":predict, :rawPredict and :streamRawPredict"


def _check_same_doors(state: State, busiest: DeployedModel, wanted: Wanted) -> None:
    """Make sure that the same requests reach a canary and the version beside it."""
    prefix, here = _prefix(state, busiest), wanted.container.get("invoke_route_prefix", "")
    if prefix is not None and prefix != here:
        raise UserError(
            f"canary: {wanted.canary} given, and version {busiest.version} beside it has "
            f"invoke_route_prefix {prefix or 'none'}, not {here or 'none'}: it takes "
            f"{_doors(prefix)}, and the canary {_doors(here)}, so every request would fail at one "
            "of them; deploy without a canary"
        )


def _check_endpoint(endpoint: Endpoint, wanted: Wanted) -> None:
    """Make sure that an existing endpoint is one of ours, as the settings want it."""
    if endpoint.labels.get("managed-by") != MANAGED_BY:
        raise UserError(f"{endpoint.name} exists and was not made by this program")
    if endpoint.dedicated != wanted.dedicated:
        here, there = (str(value).lower() for value in (wanted.dedicated, endpoint.dedicated))
        raise UserError(
            f"dedicated: {here} in the settings, {there} at {endpoint.name}; it cannot change "
            "after an endpoint is created: run cleanup first, after which requests fail until the "
            "next deploy, or keep the old value"
        )
    if endpoint.inference_timeout != wanted.inference_timeout:
        raise UserError(
            f"inference_timeout: {wanted.inference_timeout} in the settings, "
            f"{endpoint.inference_timeout} at {endpoint.name}; it cannot change after an endpoint "
            "is created: run cleanup first, or keep the old value"
        )


def _version_before(newest: DeployedModel, known: Sequence[ModelVersion]) -> int | None:
    """The version that served before; if that is not known, the next lower number."""
    numbers = {version.number for version in known}
    if newest.previous in numbers - {newest.version}:
        return newest.previous
    return max((number for number in numbers if number < newest.version), default=None)


def _distribute(endpoint: Endpoint, traffic: dict[str, int]) -> list[Change]:
    """Split the requests as given, and stop the models that get none: they would cost money."""
    return list(_distribution(endpoint, traffic))


def _distribution(endpoint: Endpoint, traffic: dict[str, int]) -> Iterator[Change]:
    if NEW not in traffic and endpoint.traffic != traffic:
        versions = {model.id: model.version for model in endpoint.deployed if model.id in traffic}
        yield SetTraffic({model.id: 0 for model in endpoint.deployed} | traffic, versions)
    for model in endpoint.deployed:
        if model.id not in traffic:
            yield Undeploy(endpoint.name, model.id, model.version)
