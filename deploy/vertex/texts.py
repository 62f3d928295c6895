"""Texts about a deployment that need no network, no credentials and no SDK."""

import textwrap
from collections.abc import Sequence

from deploy.vertex.config import VertexSettings
from deploy.vertex.state import Resource

WIDTH = 90
"""Columns of the plan's lines, if the names allow it: notebooks and terminals do not wrap them."""

QUOTA_NAMES = {
    accelerator: f"custom_model_serving_nvidia_{short}_gpus"
    for accelerator, short in {
        "NVIDIA_TESLA_T4": "t4",
        "NVIDIA_TESLA_V100": "v100",
        "NVIDIA_TESLA_P100": "p100",
        "NVIDIA_TESLA_P4": "p4",
        "NVIDIA_L4": "l4",
        "NVIDIA_TESLA_A100": "a100",
        "NVIDIA_A100_80GB": "a100_80gb",
        "NVIDIA_H100_80GB": "h100",
    }.items()
}
"""Accelerator -> the quota that its replicas use. Source: gcloud 528, model_garden_utils.py."""


def plan(settings: VertexSettings, app: str) -> str:
    """Describe every resource that `deploy` creates, its cost if known, and the quota to check.

    Works without a project.
    """
    notes = []
    if not settings.project:
        settings = settings.model_copy(update={"project": "PROJECT"})
        notes = ["project: not given yet; export GCP_PROJECT=..."]
    region, size = settings.region, f"{settings.min_replicas} to {settings.max_replicas}"
    machine = f"{size} x {settings.machine_type}{' (spot)' if settings.spot else ''}"
    quota = "custom_model_serving_cpus"
    if settings.accelerator_type:
        machine += f" with {settings.accelerator_count} x {settings.accelerator_type}"
        quota = QUOTA_NAMES[settings.accelerator_type]
    artifacts = [("artifacts", settings.artifact_uri, "storage, likewise, in its bucket's region")]
    rows = [
        ("image", settings.image_uri(app, "TAG"), "storage, by the gigabyte and month"),
        *(artifacts if settings.artifact_uri else []),
        ("model", settings.model_name(app), "nothing"),
        ("endpoint", settings.endpoint_name(app), "nothing by itself"),
        ("replicas", machine, hourly(settings)),
        ("logs", "stdout and stderr of the replicas", "by volume, above a free allowance"),
    ]
    lines = [f"{'region':11}{region}"]
    wrap = textwrap.TextWrapper(WIDTH, " " * 11, " " * 11, break_on_hyphens=False)
    for name, what, cost in rows:
        lines += [f"{name:11}{what}", *wrap.wrap(f"cost: {cost}")]
    labels = ", ".join(f"{key}={value}" for key, value in settings.labels_for(app).items())
    lines += [
        *notes,
        f"labels: {labels}",
        f"quota to check: aiplatform.googleapis.com/{quota} in {region},",
        "  at https://console.cloud.google.com/iam-admin/quotas",
        "You pay for replicas from deploy to undeploy or cleanup, even when they are idle.",
    ]
    return "\n".join(lines)


def hourly(settings: VertexSettings) -> str:
    """Describe what the replicas cost per hour, and the source of the price."""
    prices = settings.prices
    each = prices.per_hour.get(settings.machine_type)
    if each is None or (settings.accelerator_type and not settings.machine_type.startswith("g2-")):
        return f"price of {settings.machine_type} unknown; see the price list"
    least, most = (f"${each * n:.2f}" for n in (settings.min_replicas, settings.max_replicas))
    state = "verified" if prices.verified else "unverified"
    spot = ", before the discount for spot" if settings.spot else ""
    away = f"; {settings.region} may differ" if settings.region != prices.region else ""
    source = f"{prices.region} on {prices.date}, {state}{away}{spot}"
    return f"{least} to {most} per hour ({source})"


def how_to_read_logs(settings: VertexSettings, app: str) -> str:
    """The commands that show the logs of an app's replicas. stderr is shown as ERROR there."""
    place = (
        'resource.type="aiplatform.googleapis.com/Endpoint" '
        f'resource.labels.endpoint_id="{settings.resource_id(app)}" '
        f'resource.labels.location="{settings.region}"'
    )
    project = settings.project_id
    return (
        f"gcloud logging read '{place}' --project={project} --limit=50 --freshness=1h\n"
        f"gcloud beta logging tail '{place}' --project={project}"
    )


def delete_images(settings: VertexSettings, app: str) -> str:
    """The command that removes an app's images. Until then you pay for their storage."""
    address = settings.image_uri(app, "").rstrip(":")
    return f"gcloud artifacts docker images delete {address} --delete-tags"


def status(settings: VertexSettings, app: str, resources: Sequence[Resource]) -> str:
    """Describe an app's resources, what is running on them, and what you pay for."""
    if not resources:
        return f"nothing of {app} in {settings.parent}"
    lines = [f"{resource.kind}: {resource.name}, {resource.detail}" for resource in resources]
    if billed := sum(resource.billed for resource in resources):
        lines.append(f"you pay for {billed} of these; with these settings, {hourly(settings)} each")
    return "\n".join(lines)


def what_cleanup_keeps(settings: VertexSettings, app: str) -> str:
    """What `cleanup` leaves, because others may use it, and the commands that remove it."""
    lines = [f"Artifact Registry keeps the images: {delete_images(settings, app)}"]
    if settings.artifact_uri:
        remove = f"gcloud storage rm --recursive {settings.artifact_uri}"
        lines.append(
            "Cloud Storage keeps the archive. You pay for its storage until you remove the folder "
            f"and everything in it: {remove}"
        )
    return "\n".join(lines)
