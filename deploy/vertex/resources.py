"""The resources on Vertex AI, one function for each thing that is done to one of them.

Which of them to do, and in which order, is the business of `vertex_steps`.
"""

import datetime
import hashlib
import os
import re
from typing import Any

from google.api_core.exceptions import BadRequest, GoogleAPIError, NotFound
from google.auth.exceptions import GoogleAuthError
from google.cloud import storage
from google.cloud.aiplatform_v1 import types

from deploy.common.paths import UserError
from deploy.vertex.client import READ, Vertex
from deploy.vertex.config import MANAGED_BY

CPU_METRIC = "aiplatform.googleapis.com/prediction/online/cpu/utilization"
GPU_METRIC = "aiplatform.googleapis.com/prediction/online/accelerator/duty_cycle"
ARTIFACTS_DIGEST = "ARTIFACTS_DIGEST"
BACK = " back"
"""The end of the display name of what `rollback` deployed; of the others it may be ` after 3`."""
NOT_FILLED_IN = {
    *("command", "args", "env", "startup_probe", "exec_"),
    *("spot", "accelerator_type", "accelerator_count"),
}
"""Fields, at any depth, that the service leaves empty if we do."""


# ---- the model and its versions


def container(vertex: Vertex, app: str, image_uri: str) -> types.ModelContainerSpec:
    """What the settings say about an image's container."""
    settings = vertex.settings
    spec = types.ModelContainerSpec(
        image_uri=image_uri,
        command=settings.command,
        args=settings.args,
        env=[types.EnvVar(name=key, value=value) for key, value in settings.environment.items()],
        ports=[types.Port(container_port=settings.port)],
        predict_route=settings.route_for(app),
        health_route=settings.health_route,
        deployment_timeout=datetime.timedelta(seconds=settings.deployment_timeout),
        shared_memory_size_mb=settings.shared_memory_mb,
    )
    if digest := artifacts_digest(vertex):
        spec.env.append(types.EnvVar(name=ARTIFACTS_DIGEST, value=digest))
    if settings.startup_probe:
        spec.startup_probe = types.Probe(
            exec_=types.Probe.ExecAction(command=settings.startup_probe),
            period_seconds=settings.startup_probe_period,
            timeout_seconds=settings.startup_probe_timeout,
            failure_threshold=settings.startup_probe_failures,
        )
    return spec


def artifacts_digest(vertex: Vertex) -> str:
    """Digits that tell what is in the folder that `artifact_uri` names; empty if it names none.

    Vertex AI copies the folder when a version is uploaded. With the digits in the version's
    environment, where nobody can change them, another archive in the same folder is seen.

    Raises:
        UserError: the folder is empty, or may not be listed.
    """
    uri = vertex.settings.artifact_uri
    if not uri or ("VERTEX_STANDIN" in os.environ and "STORAGE_EMULATOR_HOST" not in os.environ):
        return ""  # the stand-in has no Cloud Storage, and lets nobody out to Google's
    bucket, _, folder = uri.removeprefix("gs://").partition("/")
    client = storage.Client(project=vertex.settings.project, credentials=vertex.credentials)
    try:
        blobs = list(client.list_blobs(bucket, prefix=f"{folder}/" if folder else None))
    except (GoogleAPIError, GoogleAuthError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"artifact_uri: {uri} cannot be listed: {reason}") from error
    found = sorted((b.name, b.crc32c, b.md5_hash) for b in blobs if not b.name.endswith("/"))
    if not found:
        raise UserError(f"artifact_uri: {uri} given, and there is nothing; copy an archive there")
    return hashlib.sha256(repr(found).encode()).hexdigest()[:12]


def versions(vertex: Vertex, app: str) -> list[int]:
    """The numbers of a model's versions, newest first."""
    try:
        pages = vertex.models.list_model_versions(name=vertex.settings.model_name(app), **READ)
    except NotFound:
        return []
    return sorted((int(model.version_id) for model in pages), reverse=True)


def find_or_upload(vertex: Vertex, app: str, image_uri: str) -> str:
    """The version that is this image with these settings; uploaded if there is none."""
    wanted, name = container(vertex, app, image_uri), vertex.settings.model_name(app)
    artifacts = vertex.settings.artifact_uri or ""
    known = versions(vertex, app)
    for number in known:
        model = vertex.models.get_model(name=f"{name}@{number}", **READ)
        if within(wanted, model.container_spec) and model.artifact_uri == artifacts:
            return str(number)
    request = types.UploadModelRequest(
        parent=vertex.parent,
        model=types.Model(
            display_name=vertex.settings.resource_id(app),
            labels=vertex.settings.labels_for(app),
            container_spec=wanted,
            artifact_uri=artifacts,
        ),
    )
    if known:
        request.parent_model = name
    else:
        request.model_id = vertex.settings.resource_id(app)
    step = f"upload version {max(known, default=0) + 1} of model {name.rsplit('/', 1)[1]}"
    return vertex.finish(step, vertex.models.upload_model(request)).model_version_id


def within(wanted: Any, actual: Any) -> bool:
    """Whether every field that is set in one message is the same in another.

    The service fills in more than it was given, such as defaults of probes. What it never fills in
    is the same also where it is not set: a setting that was taken away is a change.
    """
    return _within(type(wanted).pb(wanted), type(actual).pb(actual))


def _within(wanted: Any, actual: Any) -> bool:
    fields = {field.name: field for field, _ in wanted.ListFields()}
    fields |= {field.name: field for field, _ in actual.ListFields() if field.name in NOT_FILLED_IN}
    for name, field in fields.items():
        one, other = getattr(wanted, name), getattr(actual, name)
        if field.message_type is None or field.is_repeated:
            same = one == other
        else:
            same = _within(one, other)
        if not same:
            return False
    return True


# ---- the endpoint and what is deployed there


def get_endpoint(vertex: Vertex, app: str) -> types.Endpoint | None:
    """An app's endpoint as it is now; None if there is none."""
    try:
        return vertex.endpoints.get_endpoint(name=vertex.settings.endpoint_name(app), **READ)
    except NotFound:
        return None


def create_endpoint(vertex: Vertex, app: str) -> types.Endpoint:
    """Make an app's endpoint, with a host name of its own: 10 MB, streaming, up to an hour.

    Raises:
        AlreadyExists: it is there, or being made.
    """
    settings = vertex.settings
    timeout = datetime.timedelta(seconds=settings.inference_timeout)
    request = types.CreateEndpointRequest(
        parent=vertex.parent,
        endpoint_id=settings.resource_id(app),
        endpoint=types.Endpoint(
            display_name=settings.resource_id(app),
            labels=settings.labels_for(app),
            dedicated_endpoint_enabled=True,
            client_connection_config=types.ClientConnectionConfig(inference_timeout=timeout),
        ),
    )
    step = f"create endpoint {settings.resource_id(app)}"
    vertex.finish(step, vertex.endpoints.create_endpoint(request))
    return get_endpoint(vertex, app)


def check_endpoint(vertex: Vertex, endpoint: types.Endpoint) -> None:
    """Make sure that an endpoint that is there is one of ours, as the settings want it.

    Raises:
        UserError: it is not.
    """
    wanted = vertex.settings.inference_timeout
    given = int(endpoint.client_connection_config.inference_timeout.total_seconds())
    if endpoint.labels.get("managed-by") != MANAGED_BY or not endpoint.dedicated_endpoint_enabled:
        raise UserError(f"{endpoint.name} is there and was not made by this program")
    if given != wanted:
        raise UserError(
            f"inference_timeout: {wanted} in the settings, {given} at {endpoint.name}; "
            "it is fixed when the endpoint is made: run cleanup first, or keep the old value"
        )


def deployed_at(endpoint: types.Endpoint | None) -> list[types.DeployedModel]:
    """What is deployed at an endpoint, in the order in which it was."""
    found = list(endpoint.deployed_models) if endpoint else []
    return sorted(found, key=lambda one: (one.create_time, int(version_of(one))))


def version_of(deployed: types.DeployedModel) -> str:
    """The number of the model's version behind a deployed model."""
    return deployed.model_version_id or deployed.model.partition("@")[2] or "1"


def previous_of(deployed: types.DeployedModel) -> str | None:
    """The version that had the requests when `deploy` put this one beside it, by its name.

    Nothing else on Vertex AI tells: what is undeployed leaves no trace, and a version's number says
    when it was uploaded, not when it served.
    """
    found = re.search(r" after (\d+)$", deployed.display_name)
    return found and found[1]


def brought_back(deployed: types.DeployedModel) -> bool:
    """Whether `rollback` deployed it."""
    return deployed.display_name.endswith(BACK)


def traffic_of(endpoint: types.Endpoint, deployed: types.DeployedModel) -> int:
    """The per cent of an endpoint's requests that a deployed model gets."""
    return dict(endpoint.traffic_split).get(deployed.id, 0)


def wanted_deployment(vertex: Vertex, app: str, version: str) -> types.DeployedModel:
    """What the settings say should be deployed."""
    settings = vertex.settings
    machine = types.MachineSpec(machine_type=settings.machine_type)
    targets = {CPU_METRIC: settings.target_cpu}
    if settings.accelerator_type:
        machine.accelerator_type = types.AcceleratorType[settings.accelerator_type]
        machine.accelerator_count = settings.accelerator_count
        targets[GPU_METRIC] = settings.target_gpu
    return types.DeployedModel(
        model=f"{settings.model_name(app)}@{version}",
        display_name=f"{settings.resource_id(app)}-{version}",
        service_account=settings.service_account or "",
        dedicated_resources=types.DedicatedResources(
            machine_spec=machine,
            min_replica_count=settings.min_replicas,
            max_replica_count=settings.max_replicas,
            spot=settings.spot,
            autoscaling_metric_specs=[
                types.AutoscalingMetricSpec(metric_name=name, target=target)
                for name, target in targets.items()
            ],
        ),
    )


def matching(endpoint: types.Endpoint, wanted: types.DeployedModel) -> types.DeployedModel | None:
    """The deployed model that is the same version on the same machines, if there is one."""
    for one in deployed_at(endpoint):
        same = version_of(one) == version_of(wanted)
        same &= one.service_account == wanted.service_account
        if same and within(wanted.dedicated_resources, one.dedicated_resources):
            return one
    return None


def deploy_model(
    vertex: Vertex, endpoint: types.Endpoint, wanted: types.DeployedModel, split: dict[str, int]
) -> None:
    """Start replicas and wait until they answer. In `split`, "0" stands for the new ones.

    Raises:
        GoogleAPICallError: no quota, no such machine, or the model server never became ready.
    """
    size = wanted.dedicated_resources
    step = (
        f"deploy version {version_of(wanted)} on {size.min_replica_count} x "
        f"{size.machine_spec.machine_type}, {split['0']} % of requests"
    )
    request = {"endpoint": endpoint.name, "deployed_model": wanted, "traffic_split": split}
    vertex.finish(step, vertex.endpoints.deploy_model(request))


def set_traffic(vertex: Vertex, endpoint: types.Endpoint, split: dict[str, int]) -> None:
    """Say which deployed model gets how many per cent of the requests."""
    complete = dict.fromkeys((one.id for one in endpoint.deployed_models), 0) | split
    versions = {one.id: version_of(one) for one in endpoint.deployed_models}
    shares = ", ".join(f"version {versions[key]} {value} %" for key, value in split.items())
    vertex.begun.append(f"requests: {shares}")
    vertex.report(vertex.begun[-1])
    vertex.endpoints.update_endpoint(
        endpoint=types.Endpoint(name=endpoint.name, traffic_split=complete),
        update_mask={"paths": ["traffic_split"]},
    )


def undeploy_model(
    vertex: Vertex,
    endpoint: types.Endpoint,
    deployed: types.DeployedModel,
    split: dict[str, int] | None = None,
) -> None:
    """Stop a deployed model's replicas. `split` says who takes its requests."""
    request = {"endpoint": endpoint.name, "deployed_model_id": deployed.id}
    if split:
        request["traffic_split"] = split
    step = f"undeploy version {version_of(deployed)}"
    vertex.finish(step, vertex.endpoints.undeploy_model(request))


def undeploy_all(vertex: Vertex, endpoint: types.Endpoint) -> None:
    """Stop everything at an endpoint: first what has no requests, last what has most."""
    found = sorted(endpoint.deployed_models, key=lambda one: traffic_of(endpoint, one))
    for one in found[:-1]:
        split = {found[-1].id: 100} if traffic_of(endpoint, one) else None
        undeploy_model(vertex, endpoint, one, split)
    for one in found[-1:]:
        undeploy_model(vertex, endpoint, one)


def delete(vertex: Vertex, kind: str, name: str) -> None:
    """Delete a model with all its versions, or an endpoint. What is gone already is fine.

    What cannot be deleted yet is reported; the caller lists what is left.
    """
    call = {"endpoint": vertex.endpoints.delete_endpoint, "model": vertex.models.delete_model}[kind]
    try:
        vertex.finish(f"delete {kind} {name.rsplit('/', 1)[1]}", call(name=name))
    except NotFound:
        pass
    except BadRequest as error:  # FAILED_PRECONDITION: in use
        vertex.report(f"{kind} {name.rsplit('/', 1)[1]} cannot be deleted: {error.message}")


def ours(vertex: Vertex, app: str | None, kind: str) -> list:
    """The `endpoints` or `models` in the region with our labels; of all apps if None is named.

    The labels are compared here, not in the request's filter: a filter that is understood in
    another way than we mean would make an empty list, and cleanup would believe it.
    """
    if kind == "endpoints":
        found = vertex.endpoints.list_endpoints(parent=vertex.parent, **READ)
    else:
        found = vertex.models.list_models(parent=vertex.parent, **READ)
    owner = {"managed-by": MANAGED_BY}
    if app:
        owner["app"] = vertex.settings.labels_for(app)["app"]
    return [one for one in found if owner.items() <= dict(one.labels).items()]
