"""The platform's limits and durations, each with its source. Times are in seconds, sizes in bytes.

The deployer has its own tables: a stand-in that shared them could not find a mistake in them.
"""

REGIONS = frozenset(
    """
    africa-south1
    asia-east1 asia-east2 asia-northeast1 asia-northeast2 asia-northeast3 asia-south1 asia-south2
    asia-southeast1 asia-southeast2
    australia-southeast1 australia-southeast2
    europe-central2 europe-north1 europe-north2 europe-southwest1 europe-west1 europe-west2
    europe-west3 europe-west4 europe-west6 europe-west8 europe-west9 europe-west12
    me-central1 me-central2 me-west1
    northamerica-northeast1 northamerica-northeast2
    southamerica-east1 southamerica-west1
    us-central1 us-east1 us-east4 us-east5 us-east7 us-south1 us-west1 us-west2 us-west3 us-west4
    us-west8
    """.split()  # noqa: SIM905 - 42 lines as a list
)
"""`SUPPORTED_REGIONS` of the SDK without "global"; a test compares them. Importing them would take
seconds."""

QUOTA_NAMES = {
    "NVIDIA_TESLA_T4": "custom_model_serving_nvidia_t4_gpus",
    "NVIDIA_TESLA_V100": "custom_model_serving_nvidia_v100_gpus",
    "NVIDIA_TESLA_P100": "custom_model_serving_nvidia_p100_gpus",
    "NVIDIA_TESLA_P4": "custom_model_serving_nvidia_p4_gpus",
    "NVIDIA_L4": "custom_model_serving_nvidia_l4_gpus",
    "NVIDIA_TESLA_A100": "custom_model_serving_nvidia_a100_gpus",
    "NVIDIA_A100_80GB": "custom_model_serving_nvidia_a100_80gb_gpus",
    "NVIDIA_H100_80GB": "custom_model_serving_nvidia_h100_gpus",
}
"""Accelerator -> the quota that its replicas use. Source: gcloud 528, model_garden_utils.py."""

SHARED_BYTES = 1_572_864
"""1.5 MB. https://cloud.google.com/vertex-ai/docs/quotas#request_quotas"""
SHARED_SECONDS = 60.0
DEDICATED_BYTES = 10 * 1024 * 1024
"""https://cloud.google.com/vertex-ai/docs/predictions/choose-endpoint-type"""
DEDICATED_SECONDS = 600.0
DEDICATED_MAX_SECONDS = 3600.0
DEPLOYMENT_SECONDS = 1800.0
"""Without `deploymentTimeout`. Our guess: the reference names no default."""
DEPLOYMENT_MAX_SECONDS = 7200.0
SHM_MB = 64
"""Docker's and Kubernetes's default for /dev/shm; for Vertex AI it is our guess."""

PROBE_PERIOD = 10.0
STARTUP_TIMEOUT = 1.0
HEALTH_TIMEOUT = 10.0
FAILURES = 4
"""Probes in a row. https://cloud.google.com/vertex-ai/docs/predictions/custom-container-requirements
(liveness: 4 attempts, 10 s apart, then a restart; health: 4 failures take a replica out)."""
CRASHES = 3
"""Exits of a container after which the deployment fails. Our guess."""

DURATIONS = {
    "UploadModel": 60.0,
    "CreateEndpoint": 10.0,
    "DeployModel": 240.0,
    "UndeployModel": 60.0,
    "MutateDeployedModel": 60.0,
    "DeleteModel": 5.0,
    "DeleteModelVersion": 5.0,
    "DeleteEndpoint": 5.0,
}
"""The platform's own time, without the container's. Our guess, from published reports: minutes for
a deployment, about one minute for an upload."""

INT32 = 2**31 - 1
AUTOSCALING_METRICS = {
    "aiplatform.googleapis.com/prediction/online/cpu/utilization": 100,
    "aiplatform.googleapis.com/prediction/online/accelerator/duty_cycle": 100,
    "aiplatform.googleapis.com/prediction/online/request_count": INT32,
    "prometheus.googleapis.com/vertex_dcgm_fi_dev_gpu_util": 100,
    "prometheus.googleapis.com/vertex_vllm_gpu_cache_usage_perc": 100,
    "prometheus.googleapis.com/vertex_vllm_num_requests_waiting": INT32,
}
"""Metric -> its largest target: percent, or a number for each replica.
https://cloud.google.com/vertex-ai/docs/predictions/autoscaling"""
PUBSUB_METRIC = "pubsub.googleapis.com/subscription/num_undelivered_messages"
GPU_METRICS = (
    "aiplatform.googleapis.com/prediction/online/accelerator/duty_cycle",
    "prometheus.googleapis.com/vertex_dcgm_fi_dev_gpu_util",
)
"""Those that a machine without accelerators does not have. That they are rejected is our guess."""

CPU_FAMILIES = ("n1-", "n2-", "n2d-", "e2-", "c2-", "c2d-", "c3-")
N1_GPUS = ("NVIDIA_TESLA_T4", "NVIDIA_TESLA_V100", "NVIDIA_TESLA_P100", "NVIDIA_TESLA_P4")
GPU_MACHINES = {
    **{f"g2-standard-{n}": ("NVIDIA_L4", 1) for n in (4, 8, 12, 16, 32)},
    "g2-standard-24": ("NVIDIA_L4", 2),
    "g2-standard-48": ("NVIDIA_L4", 4),
    "g2-standard-96": ("NVIDIA_L4", 8),
    **{f"a2-highgpu-{n}g": ("NVIDIA_TESLA_A100", n) for n in (1, 2, 4, 8)},
    "a2-megagpu-16g": ("NVIDIA_TESLA_A100", 16),
    **{f"a2-ultragpu-{n}g": ("NVIDIA_A100_80GB", n) for n in (1, 2, 4, 8)},
    **{f"a3-highgpu-{n}g": ("NVIDIA_H100_80GB", n) for n in (1, 2, 4, 8)},
}
"""Machine type -> its accelerator and their number.
https://cloud.google.com/vertex-ai/docs/predictions/configure-compute"""

QUOTAS = {
    "custom_model_serving_cpus": 64,
    "custom_model_serving_nvidia_t4_gpus": 2,
    "custom_model_serving_nvidia_l4_gpus": 2,
    "custom_model_serving_nvidia_h100_gpus": 0,
}
"""Per region; a metric that is not listed is 0. Roughly a new project's; find yours at
https://console.cloud.google.com/iam-admin/quotas. The names are real."""


def machine_problem(machine: str, accelerator: str, count: int) -> str | None:
    """Return why a machine type does not go with an accelerator; None if it does.

    Args:
        machine: the machine type, such as n1-standard-4.
        accelerator: a name of the API's `AcceleratorType`, or "".
        count: the number of accelerators.
    """
    if not machine:
        return "machine_type is required."
    if bool(accelerator) != bool(count):
        return "accelerator_type and accelerator_count go together."
    if machine in GPU_MACHINES:
        needed, needed_count = GPU_MACHINES[machine]
        if (accelerator, count) != (needed, needed_count):
            return (
                f'Machine type "{machine}" needs accelerator_type {needed} and accelerator_count '
                f"{needed_count}, not {accelerator or 'none'} and {count}."
            )
        return None
    if not machine.startswith(CPU_FAMILIES):
        return f'Machine type "{machine}" is not supported.'
    if accelerator and (not machine.startswith("n1-") or accelerator not in N1_GPUS):
        return f'Accelerator "{accelerator}" is not supported for machine type "{machine}".'
    return None


def usage(machine: str, accelerator: str, count: int, replicas: int) -> dict[str, int]:
    """Return quota metric -> amount that the replicas use."""
    if accelerator:
        return {QUOTA_NAMES.get(accelerator, accelerator): count * replicas}
    cpus = machine.rsplit("-", 1)[-1]
    return {"custom_model_serving_cpus": (int(cpus) if cpus.isdecimal() else 1) * replicas}


def over_quota(used: dict[str, int]) -> list[str]:
    """Return the metrics whose quota is exceeded."""
    return [metric for metric, amount in used.items() if amount > QUOTAS.get(metric, 0)]
