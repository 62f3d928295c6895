"""Deploy an app on Vertex AI, ask it, and remove it again.

    python -m deploy.vertex plan smollm2-135m         # what would be made, its price; no network
    python -m deploy.vertex deploy smollm2-135m       # push the image, deploy it; make deploy
    python -m deploy.vertex deploy smollm2-135m --canary 20
    python -m deploy.vertex test smollm2-135m         # also push, status, logs, token, rollback
    python -m deploy.vertex cleanup smollm2-135m      # remove everything, and prove it

The steps are in `vertex_steps`, the settings in `vertex.yaml`. Credentials are Google's
application-default ones (`gcloud auth application-default login`); no key file is read or written.
"""

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.archive.pack import archive_path
from deploy.common.cli import app_parser, command
from deploy.common.paths import MODEL_STORE, UserError, shown
from deploy.image.lookup import WEIGHTS_LABEL, how_to_build, image_name, inspect_image, labels_of
from deploy.image.push import push_image
from deploy.torchserve.client import server_sent_events
from deploy.vertex.config import CONFIG, Settings, load_settings
from deploy.vertex.plan import delete_images, hourly, how_to_read_logs, plan

if TYPE_CHECKING:  # `plan` needs no SDK, and importing it takes seconds
    from deploy.vertex.deployer import Vertex

ASKED = {
    "instances": ["How to prepare a spanish omelette:"],
    "parameters": {"max_new_tokens": 20, "temperature": 0},
}


def push(
    settings: Settings, app: str, tag: str = "pro", report: Callable[[str], Any] = print
) -> str:
    """Push an app's image into Artifact Registry and return its address there.

    The tag there is ours and the first digits of the image's digest: another build is another tag,
    so that `deploy` sees that it is another image.

    The stand-in for Vertex AI names its own registry in VERTEX_REGISTRY: the image goes there, its
    address for Vertex AI stays the same. Without Docker it has none, and serves the archive.

    Raises:
        UserError: no container engine, no such image or archive, an image that Vertex AI could not
            run as the settings are, or the registry refused.
    """
    registry = os.environ.get("VERTEX_REGISTRY")
    if "VERTEX_STANDIN" in os.environ and not registry:
        archive = archive_path(app, "no-archive", MODEL_STORE)
        if not archive.exists():
            raise UserError(f"without Docker the stand-in needs it: run `make archive APP={app}`")
        report(f"no Docker: the stand-in will serve {shown(archive)} as a process")
        return settings.image_uri(app, tag)
    local, found = image_name(app, tag), inspect_image(app, tag)
    architecture = found["Architecture"]
    if architecture != "amd64" and not registry:
        raise UserError(
            f"{local} is for {architecture}, and Vertex AI's machines are amd64; build it with "
            "DOCKER_DEFAULT_PLATFORM=linux/amd64, or in Cloud Build (deploy/vertex/cloudbuild.yaml)"
        )
    weights = labels_of(found).get(WEIGHTS_LABEL)
    if weights == "none" and not settings.artifact_uri:
        raise UserError(
            f"artifact_uri: none given, and {local} has no weights; name their folder in Cloud "
            f"Storage in deploy/vertex/vertex.yaml, or build them in: {how_to_build(app, tag)}"
        )
    if weights == "baked" and settings.artifact_uri:
        raise UserError(
            f"artifact_uri: {settings.artifact_uri} given, and {local} has weights in it, which "
            "would be served instead; give none, or build it without: "
            f"{how_to_build(app, tag, 'BAKED=no')}"
        )
    there = f"{tag}-{found['Id'].removeprefix('sha256:')[:12]}"
    uri = settings.image_uri(app, there)
    folder = settings.image_folder()
    if registry:
        folder = f"{registry}/{folder.split('/', 1)[1]}"
    report(f"push {local} to {folder}")
    try:
        push_image(app, folder, tag, remote_tag=there)
    except UserError as error:
        raise UserError(
            f"{error}\nIs there a repository, and may docker write there? `gcloud artifacts "
            f"repositories create {settings.repository} --repository-format=docker --location="
            f"{settings.region}`, `gcloud auth configure-docker {settings.region}-docker.pkg.dev`"
        ) from error
    return uri


def ask(vertex: "Vertex", app: str, body: dict) -> dict[str, Any]:
    """Send a request in all three ways.

    Args:
        vertex: the project and region.
        app: the APP.
        body: `{"instances": [...], "parameters": {...}}`.

    Returns:
        `predict`: the predictions. `raw_predict`: the container's own JSON.
        `stream_raw_predict`: the server-sent events.

    Raises:
        UserError: an error came back; its message. (The SDK raises a bare ValueError for the first
            and looks at no status for the others.)
    """
    from google.api_core.exceptions import NotFound
    from google.cloud import aiplatform

    endpoint = aiplatform.Endpoint(vertex.settings.endpoint_name(app))
    headers = {"Content-Type": "application/json"}
    try:
        predicted = endpoint.predict(body["instances"], parameters=body.get("parameters"))
    except NotFound as error:
        raise UserError(f"nothing of {app} is deployed; `make deploy APP={app}` does it") from error
    except ValueError as error:
        if "no model is deployed" in str(error):  # an endpoint is there: after `undeploy`, say
            raise UserError(
                f"nothing of {app} is deployed any more; `make deploy APP={app}` does it"
            ) from error
        raise UserError(f"predict: {error}") from error
    raw = endpoint.raw_predict(json.dumps(body).encode(), headers)
    if raw.status_code != 200:
        raise UserError(f"raw_predict: {raw.status_code}: {raw.text.strip()}")
    streamed = body | {"parameters": body.get("parameters", {}) | {"stream": True}}
    lines = list(endpoint.stream_raw_predict(json.dumps(streamed).encode(), headers))
    events = list(server_sent_events(lines, "stream_raw_predict"))
    if not events:
        raise UserError(f"stream_raw_predict: {b' '.join(lines).decode().strip() or 'no answer'}")
    return {
        "predict": predicted.predictions,
        "raw_predict": raw.json(),
        "stream_raw_predict": events,
    }


def status(vertex: "Vertex", app: str) -> str:
    """What is there of an app, what goes on, and what of it bills."""
    from deploy.vertex.deployer import what_is_there

    found = list(what_is_there(vertex, app))
    if not found:
        return f"nothing of {app} in {vertex.parent}"
    lines = [f"{one.kind}: {one.name}, {one.detail}" for one in found]
    billing = sum(one.bills for one in found)
    if billing:
        each = hourly(vertex.settings)
        lines.append(f"{billing} of these bill; as the settings are, {each} each")
    return "\n".join(lines)


def what_is_kept(settings: Settings, app: str) -> str:
    """What cleanup leaves, because others may use it, and the commands that remove it."""
    lines = [f"Artifact Registry keeps the images: {delete_images(settings, app)}"]
    if settings.artifact_uri:
        remove = f"gcloud storage rm --recursive {settings.artifact_uri}"
        lines.append(
            "Cloud Storage keeps the archive, and the bucket bills until you remove the folder "
            f"with all that is in it: {remove}"
        )
    return "\n".join(lines)


def token() -> str:
    """An access token of the application-default credentials, for curl. Valid for an hour."""
    from google.auth.transport.requests import Request

    from deploy.vertex.client import default_credentials

    credentials = default_credentials()
    credentials.refresh(Request())
    return credentials.token


# ---- the command line

ACTIONS = (
    "plan",
    *("push", "deploy", "test", "status", "logs", "token"),
    *("rollback", "undeploy", "cleanup"),
)


def act(vertex: "Vertex", options: argparse.Namespace) -> None:
    """The actions that talk to Vertex AI."""
    from deploy.vertex import deployer as steps

    app, name = options.app, options.action
    if name == "deploy":
        steps.check_canary(options.canary)  # before the minutes that a push may take
        uri = options.image or push(vertex.settings, app, options.tag)
        endpoint = steps.deploy(vertex, app, uri, options.canary)
        print(f"{app} answers at https://{endpoint.dedicated_endpoint_dns}")
    elif name == "test":
        for way, answer in ask(vertex, app, ASKED).items():
            print(f"{way}:")
            for one in answer if isinstance(answer, list) else [answer]:
                print(f"  {json.dumps(one)}")
    elif name == "status":
        print(status(vertex, app))
    else:
        {"rollback": steps.rollback, "undeploy": steps.undeploy, "cleanup": steps.cleanup}[name](
            vertex, app
        )
        if name == "cleanup":
            print(what_is_kept(vertex.settings, app))


@contextmanager
def telling_what_bills(vertex: "Vertex", app: str) -> Iterator[None]:
    """Say at Ctrl-C that Google goes on, and turn Google's errors into one line."""
    from google.api_core.exceptions import GoogleAPICallError

    try:
        yield
    except KeyboardInterrupt:
        begun = ", ".join(vertex.begun) or "nothing in this run"
        print(
            f"\nStopping here stops nothing at Google. Begun: {begun}. What is deployed or being "
            f"deployed in {vertex.parent} bills ({hourly(vertex.settings)}) until you run\n"
            f"  python -m deploy.vertex cleanup {app} --project {vertex.settings.project} "
            f"--region {vertex.settings.region}",
            file=sys.stderr,
        )
        raise
    except GoogleAPICallError as error:
        code = error.grpc_status_code.name if error.grpc_status_code else error.code
        raise UserError(f"{code}: {error.message}") from error


def reporters() -> tuple[Callable[[str], Any], Callable[[str], Any] | None]:
    """How steps and waiting are shown: each on a line with the seconds; on a terminal, live."""
    began = time.monotonic()
    wipe = "\r\x1b[K" if sys.stdout.isatty() else ""

    def report(line: str) -> None:
        print(f"{wipe}{time.monotonic() - began:5.0f} s  {line}", flush=True)

    def tick(line: str) -> None:
        print(f"{wipe}         {line}", end="", flush=True)

    return report, tick if wipe else None


@command
def main(arguments: list[str] | None) -> None:
    """The command line; see the module's docstring."""
    parser = app_parser("deploy.vertex", "deploy an app on Vertex AI", actions=[*ACTIONS])
    parser.add_argument(
        "--config", type=Path, default=CONFIG, help="instead of deploy/vertex/vertex.yaml"
    )
    parser.add_argument("--project", help="instead of GCP_PROJECT and vertex.yaml")
    parser.add_argument("--region", help="instead of vertex.yaml's")
    parser.add_argument("--canary", type=int, metavar="PERCENT", help="of requests; deploy only")
    parser.add_argument(
        *("--image",),
        help="an image that is in the registry already; deploy only. What push refuses is not "
        "looked for in it: another architecture, no weights, or weights beside artifact_uri",
    )
    parser.add_argument("--tag", default="pro", help="of the image that is pushed")
    parser.add_argument("--dry-run", action="store_true", help="show the plan, do nothing")
    options = parser.parse_args(arguments)
    settings = load_settings(
        options.config, project=options.project or None, region=options.region or None
    )
    logging.getLogger("google.cloud.aiplatform").setLevel(logging.WARNING)
    if options.action == "plan" or options.dry_run:
        print(plan(settings, options.app))
    elif options.action == "push":
        print(push(settings, options.app, options.tag))
    elif options.action == "logs":
        print(how_to_read_logs(settings, options.app))
    elif options.action == "token":
        print(token())
    else:
        from deploy.vertex.deployer import Vertex

        vertex = Vertex(settings, *reporters())
        with telling_what_bills(vertex, options.app):
            act(vertex, options)


if __name__ == "__main__":
    sys.exit(main())
