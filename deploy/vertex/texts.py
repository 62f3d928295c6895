"""Texts about a deployment that need no network, no credentials and no SDK."""

import sys
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
    artifacts = [
        ("artifacts", settings.artifact_uri or "", "storage, likewise, in its bucket's region")
    ]
    rows: list[tuple[str, str, str]] = [
        ("image", settings.image_uri(app, "TAG"), "storage, by the gigabyte and month"),
        *(artifacts if settings.artifact_uri else []),
        ("model", settings.model_name(app), "nothing"),
        ("endpoint", settings.endpoint_name(app), "nothing by itself"),
        ("requests", limits(settings), ""),
        ("methods", methods(settings), ""),
        ("replicas", machine, hourly(settings)),
        ("scaling", scaling(settings), ""),
        ("logs", "stdout and stderr of the replicas", "by volume, above a free allowance"),
    ]
    lines = [f"{'region':11}{region}"]
    wrap = textwrap.TextWrapper(WIDTH, " " * 11, " " * 11, break_on_hyphens=False)
    for name, what, cost in rows:
        # Names of resources stay on one line, so that they can be copied.
        lines += [f"{name:11}{what}", *wrap.wrap(f"cost: {cost}")] if cost else _row(name, what)
    labels = ", ".join(f"{key}={value}" for key, value in settings.labels_for(app).items())
    lines += [
        *notes,
        *([open_paths(settings)] if settings.invoke_route_prefix else []),
        f"labels: {labels}",
        f"quota to check: aiplatform.googleapis.com/{quota} in {region},",
        "  at https://console.cloud.google.com/iam-admin/quotas",
        "You pay for replicas from deploy to undeploy or cleanup, even when they are idle.",
    ]
    return "\n".join(lines)


def _row(name: str, what: str) -> list[str]:
    return textwrap.wrap(what, WIDTH, initial_indent=f"{name:11}", subsequent_indent=" " * 11)


def limits(settings: VertexSettings) -> str:
    """Describe what one request to the endpoint may be."""
    if settings.dedicated:
        return f"dedicated endpoint: 10 MB, {settings.request_seconds} s, streaming"
    return f"shared endpoint: 1.5 MB, {settings.request_seconds} s, no streaming"


def methods(settings: VertexSettings) -> str:
    """Name the methods through which clients reach the container."""
    if settings.invoke_route_prefix:
        return "/invoke/PATH (preview); :predict, :rawPredict and :streamRawPredict are off"
    if settings.dedicated:
        return ":predict, :rawPredict, :streamRawPredict"
    return ":predict, :rawPredict"


def open_paths(settings: VertexSettings) -> str:
    """Warn that `invoke` opens the container's port."""
    return (
        f'invoke_route_prefix "{settings.invoke_route_prefix}": every path of port {settings.port} '
        "but the root is\n  open to everyone who may send predictions"
    )


def scaling(settings: VertexSettings) -> str:
    """Describe what decides how many replicas there are."""
    texts = [
        f"{name.removeprefix('target_').replace('_', ' ')} {target}"
        + ("" if name.startswith("target_requests") else " %")
        for name, target in settings.targets.items()
    ]
    return f"for each replica: {', '.join(texts)}"


def openai_url(settings: VertexSettings, app: str, host: str) -> str:
    """The base URL for clients of OpenAI's API, of an endpoint with `invoke_route_prefix`.

    Args:
        settings: the project and region.
        app: the APP.
        host: the endpoint's host name.
    """
    return f"https://{host}/v1/{settings.endpoint_name(app)}/invoke/v1"


def token_use(settings: VertexSettings, app: str, host: str) -> str:
    """Say what an access token is for, and which address clients take. It contains no token.

    Args:
        settings: the type of the endpoint and the methods that it has.
        app: the APP.
        host: the endpoint's host name.
    """
    get = f"{sys.executable} -m deploy.vertex token {app} --print"
    endpoint = f"https://{host}/v1/{settings.endpoint_name(app)}"
    if settings.invoke_route_prefix:
        return (
            "An access token is the API key of every OpenAI client. It is valid for an hour.\n"
            f"  base_url: {openai_url(settings, app, host)}\n"
            f"  api_key:  $({get})\n"
            f"  model:    {app}"
        )
    streams = "\n  streamed: send it to :streamRawPredict" if settings.dedicated else ""
    remedy = (
        'set invoke_route_prefix: "/*" and deploy again'
        if settings.dedicated
        else 'run `make cleanup`, set dedicated: true and invoke_route_prefix: "/*", then deploy'
    )
    return (
        f"This endpoint has no base_url for OpenAI clients; {remedy}.\n"
        "OpenAI's chat in an instance works without it:\n"
        f'  curl {endpoint}:rawPredict -H "Authorization: Bearer $({get})" \\\n'
        "    -H 'Content-Type: application/json' -d '"
        '{"instances": [{"@requestFormat": "chatCompletions", "messages": '
        '[{"role": "user", "content": "Hello"}]}]}\'' + streams
    )


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
