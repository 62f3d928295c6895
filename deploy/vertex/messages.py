"""The API's messages: made from the settings, and turned into the plain values of `state`."""

import datetime
import json
from typing import Any, cast

from google.cloud.aiplatform_v1 import types

from deploy.vertex.config import VertexSettings, api_host
from deploy.vertex.state import DeployedModel, Endpoint, Fields, Model, ModelVersion

METRICS = {
    "target_cpu": "aiplatform.googleapis.com/prediction/online/cpu/utilization",
    "target_gpu": "aiplatform.googleapis.com/prediction/online/accelerator/duty_cycle",
    "target_gpu_dcgm": "prometheus.googleapis.com/vertex_dcgm_fi_dev_gpu_util",
    "target_requests_per_minute": "aiplatform.googleapis.com/prediction/online/request_count",
    "target_kv_cache": "prometheus.googleapis.com/vertex_vllm_gpu_cache_usage_perc",
    "target_requests_waiting": "prometheus.googleapis.com/vertex_vllm_num_requests_waiting",
}
"""Setting -> the metric that Vertex AI scales by. Source: models.py of google-cloud-aiplatform
2.7.0, and https://cloud.google.com/vertex-ai/docs/predictions/autoscaling for the units."""
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
        invoke_route_prefix=settings.invoke_route_prefix or "",
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
    """The endpoint: with its own host name and timeout, or one that shares the region's."""
    endpoint = types.Endpoint(
        display_name=settings.resource_id(app),
        labels=settings.labels_for(app),
        dedicated_endpoint_enabled=settings.dedicated,
    )
    if settings.dedicated:
        timeout = datetime.timedelta(seconds=settings.request_seconds)
        endpoint.client_connection_config = types.ClientConnectionConfig(inference_timeout=timeout)
    return endpoint


def dedicated_resources(settings: VertexSettings) -> types.DedicatedResources:
    """The machines of the replicas, how many there are, and when Vertex AI adds one."""
    machine = types.MachineSpec(machine_type=settings.machine_type)
    if settings.accelerator_type:
        machine.accelerator_type = getattr(types.AcceleratorType, settings.accelerator_type)
        machine.accelerator_count = settings.accelerator_count
    return types.DedicatedResources(
        machine_spec=machine,
        min_replica_count=settings.min_replicas,
        max_replica_count=settings.max_replicas,
        spot=settings.spot,
        autoscaling_metric_specs=[
            types.AutoscalingMetricSpec(metric_name=METRICS[name], target=target)
            for name, target in settings.targets.items()
        ],
    )


def machines(resources: types.DedicatedResources) -> Fields:
    """Plain values to compare: the order of the metrics has no meaning."""
    values = dict(fields(resources))
    if "autoscaling_metric_specs" in values:
        values["autoscaling_metric_specs"].sort(key=lambda spec: spec["metric_name"])
    return values


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


def model_to_rescale(identifier: str, resources: Fields) -> types.DeployedModel:
    """A deployed model with other numbers of replicas or other metrics."""
    return types.DeployedModel(
        id=identifier,
        dedicated_resources=types.DedicatedResources.from_json(json.dumps(resources)),
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
        host=message.dedicated_endpoint_dns or api_host(message.name.split("/")[3]),
        deployed=tuple(
            DeployedModel(
                id=model.id,
                version=version_of(model),
                traffic=traffic.get(model.id, 0),
                machines=machines(model.dedicated_resources),
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
