"""The API's messages: made from the settings, and turned into the plain values of `state`."""

import datetime
import json
from typing import Any, cast

from google.cloud.aiplatform_v1 import types

from deploy.vertex.config import VertexSettings
from deploy.vertex.state import DeployedModel, Endpoint, Fields, Model, ModelVersion

CPU_METRIC = "aiplatform.googleapis.com/prediction/online/cpu/utilization"
GPU_METRIC = "aiplatform.googleapis.com/prediction/online/accelerator/duty_cycle"
ARTIFACTS_DIGEST = "ARTIFACTS_DIGEST"
"""The container's variable with the digits of `artifacts.digest_of`."""


def container_spec(
    settings: VertexSettings, app: str, image_uri: str, artifacts_digest: str = ""
) -> types.ModelContainerSpec:
    """The container of a model version."""
    variables = dict(settings.environment)
    if artifacts_digest:
        variables[ARTIFACTS_DIGEST] = artifacts_digest
    spec = types.ModelContainerSpec(
        image_uri=image_uri,
        command=settings.command,
        args=settings.args,
        env=[types.EnvVar(name=key, value=value) for key, value in variables.items()],
        ports=[types.Port(container_port=settings.port)],
        predict_route=settings.route_for(app),
        health_route=settings.health_route,
        deployment_timeout=datetime.timedelta(seconds=settings.deployment_timeout),
        shared_memory_size_mb=settings.shared_memory_mb,
    )
    if settings.startup_probe:
        spec.startup_probe = types.Probe(
            exec_=types.Probe.ExecAction(command=settings.startup_probe),
            period_seconds=settings.startup_probe_period,
            timeout_seconds=settings.startup_probe_timeout,
            failure_threshold=settings.startup_probe_failures,
        )
    return spec


def model_to_upload(
    settings: VertexSettings, app: str, container: Fields, artifact_uri: str
) -> types.Model:
    """The model whose upload makes a new version."""
    return types.Model(
        display_name=settings.resource_id(app),
        labels=settings.labels_for(app),
        container_spec=types.ModelContainerSpec.from_json(json.dumps(container)),
        artifact_uri=artifact_uri,
    )


def endpoint_to_create(settings: VertexSettings, app: str) -> types.Endpoint:
    """An endpoint with its own host name: 10 MB a request, streaming, up to an hour."""
    timeout = datetime.timedelta(seconds=settings.inference_timeout)
    return types.Endpoint(
        display_name=settings.resource_id(app),
        labels=settings.labels_for(app),
        dedicated_endpoint_enabled=True,
        client_connection_config=types.ClientConnectionConfig(inference_timeout=timeout),
    )


def dedicated_resources(settings: VertexSettings) -> types.DedicatedResources:
    """The machines of the replicas, how many there are, and when Vertex AI adds one."""
    machine = types.MachineSpec(machine_type=settings.machine_type)
    targets = {CPU_METRIC: settings.target_cpu}
    if settings.accelerator_type:
        machine.accelerator_type = getattr(types.AcceleratorType, settings.accelerator_type)
        machine.accelerator_count = settings.accelerator_count
        targets[GPU_METRIC] = settings.target_gpu
    return types.DedicatedResources(
        machine_spec=machine,
        min_replica_count=settings.min_replicas,
        max_replica_count=settings.max_replicas,
        spot=settings.spot,
        autoscaling_metric_specs=[
            types.AutoscalingMetricSpec(metric_name=name, target=target)
            for name, target in targets.items()
        ],
    )


def model_to_deploy(
    settings: VertexSettings, app: str, version: int, name_suffix: str = ""
) -> types.DeployedModel:
    """A version on the machines of the settings."""
    return types.DeployedModel(
        model=f"{settings.model_name(app)}@{version}",
        display_name=f"{settings.resource_id(app)}-{version}{name_suffix}",
        service_account=settings.service_account or "",
        dedicated_resources=dedicated_resources(settings),
    )


def endpoint_state(message: types.Endpoint) -> Endpoint:
    """What we compare and show of an endpoint, with its deployed models, oldest first."""
    traffic = dict(message.traffic_split)
    in_order = sorted(message.deployed_models, key=lambda m: (m.create_time, version_of(m)))
    # proto-plus converts the field, which its types do not say.
    timeout = cast(datetime.timedelta, message.client_connection_config.inference_timeout)
    return Endpoint(
        name=message.name,
        labels=dict(message.labels),
        dedicated=message.dedicated_endpoint_enabled,
        inference_timeout=int(timeout.total_seconds()),
        host=message.dedicated_endpoint_dns,
        deployed=tuple(
            DeployedModel(
                id=model.id,
                version=version_of(model),
                traffic=traffic.get(model.id, 0),
                machines=fields(model.dedicated_resources),
                service_account=model.service_account,
                name=model.display_name,
            )
            for model in in_order
        ),
    )


def model_state(message: types.Model) -> Model:
    """What we show of a model in the registry."""
    return Model(message.name, dict(message.labels), message.version_id)


def version_state(message: types.Model) -> ModelVersion:
    """What we compare of a version."""
    return ModelVersion(
        int(message.version_id), fields(message.container_spec), message.artifact_uri
    )


def version_of(deployed: types.DeployedModel) -> int:
    """The number of the model version that is deployed."""
    return int(deployed.model_version_id or deployed.model.partition("@")[2] or 1)


def fields(message: Any) -> Fields:
    """Turn any message into plain values, without what is not set."""
    values: Fields = type(message).to_dict(
        message, use_integers_for_enums=False, always_print_fields_with_no_presence=False
    )
    return values
