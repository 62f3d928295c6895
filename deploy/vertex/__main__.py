"""Deploy an app on Vertex AI, send requests to it, and remove it again.

    python -m deploy.vertex plan smollm2-135m       # show resources and their price
    python -m deploy.vertex deploy smollm2-135m     # push the image and deploy it
    python -m deploy.vertex cleanup smollm2-135m    # remove everything, and prove it

The settings are in deploy/vertex/vertex.yaml. The credentials are Google's application-default ones
(`gcloud auth application-default login`). No key file is read or written.
"""

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deploy.common import cli
from deploy.common.paths import UserError
from deploy.vertex import texts
from deploy.vertex.changes import check_canary
from deploy.vertex.config import CONFIG, VertexSettings, load_settings
from deploy.vertex.gauges import check_gauges
from deploy.vertex.push import push as push_image

if TYPE_CHECKING:  # importing the SDK takes seconds, and `plan` does not need it
    from deploy.vertex.deployer import Deployer

Config = Annotated[
    Path, typer.Option(show_default=False, help="Settings instead of deploy/vertex/vertex.yaml.")
]
Project = Annotated[str | None, typer.Option(help="Instead of GCP_PROJECT and the settings'.")]
Region = Annotated[str | None, typer.Option(help="Instead of GCP_REGION and the settings'.")]
Tag = Annotated[str, typer.Option(help="The tag of the image to push.")]

app = cli.app(__doc__)


@app.command()
def plan(
    app: cli.App, config: Config = CONFIG, project: Project = None, region: Region = None
) -> None:
    """Show the resources that deploy creates, and their price. Needs no network."""
    print(texts.plan(_settings(config, project, region), app))


@app.command()
def push(
    app: cli.App,
    tag: Tag = "pro",
    config: Config = CONFIG,
    project: Project = None,
    region: Region = None,
) -> None:
    """Push the image into Artifact Registry and print its address."""
    print(push_image(_settings(config, project, region), app, tag))


@app.command()
def deploy(
    app: cli.App,
    canary: Annotated[
        int | None, typer.Option(metavar="PERCENT", help="The image's share of the requests.")
    ] = None,
    image: Annotated[
        str | None,
        typer.Option(
            help="An image that is in the registry already. It is not checked as push does: for "
            "its architecture, for missing weights, for weights besides artifact_uri."
        ),
    ] = None,
    tag: Tag = "pro",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan, do nothing.")] = False,
    config: Config = CONFIG,
    project: Project = None,
    region: Region = None,
) -> None:
    """Push the image and deploy it. You pay from now on, until undeploy or cleanup."""
    settings = _settings(config, project, region)
    check_canary(canary)  # before the minutes that a push can take
    if dry_run:
        print(texts.plan(settings, app))
        return
    check_gauges(settings, app)
    with _deployer(settings, app) as deployer:
        host = deployer.deploy(image or push_image(settings, app, tag), canary)
        print(f"{app} serves requests at https://{host}, {texts.methods(settings)}")


@app.command()
def test(
    app: cli.App, config: Config = CONFIG, project: Project = None, region: Region = None
) -> None:
    """Send a request in every way that the endpoint has and print the responses."""
    settings = _settings(config, project, region)
    print(f"{texts.limits(settings)}; {texts.methods(settings)}")
    with _google_errors():
        from deploy.vertex.predict import EXAMPLE, predict_in_every_way

        for way, response in predict_in_every_way(settings, app, EXAMPLE).items():
            print(f"{way}:")
            for value in response if isinstance(response, list) else [response]:
                print(f"  {json.dumps(value)}")


@app.command()
def status(
    app: cli.App, config: Config = CONFIG, project: Project = None, region: Region = None
) -> None:
    """Show the app's resources, what is running on them, and what you pay for."""
    settings = _settings(config, project, region)
    with _deployer(settings, app) as deployer:
        print(texts.status(settings, app, deployer.resources()))
        if served := deployer.served():
            print(f"{texts.limits(served[0])}; {texts.methods(served[0])}")


@app.command()
def logs(
    app: cli.App, config: Config = CONFIG, project: Project = None, region: Region = None
) -> None:
    """Print the commands that show the replicas' logs."""
    print(texts.how_to_read_logs(_settings(config, project, region), app))


@app.command()
def token(
    app: cli.App,
    print_it: Annotated[
        bool, typer.Option("--print", help="Print a token, valid for an hour, and nothing else.")
    ] = False,
    config: Config = CONFIG,
    project: Project = None,
    region: Region = None,
) -> None:
    """Show what an access token is for and the base_url of OpenAI clients, or print a token."""
    if print_it:  # only then: what a terminal or a log of CI keeps must not contain one
        with _google_errors():
            from deploy.vertex.credentials import access_token

            print(access_token())
        return
    settings = _settings(config, project, region)
    with _deployer(settings, app) as deployer:
        served = deployer.served()
    if served is None:
        raise UserError(
            f"nothing of {app} is deployed in {settings.region}; run `make deploy APP={app}`"
        )
    print(texts.token_use(served[0], app, served[1]))


@app.command()
def rollback(
    app: cli.App, config: Config = CONFIG, project: Project = None, region: Region = None
) -> None:
    """Go back to what served before the last deployment."""
    with _deployer(_settings(config, project, region), app) as deployer:
        deployer.rollback()


@app.command()
def undeploy(
    app: cli.App, config: Config = CONFIG, project: Project = None, region: Region = None
) -> None:
    """Stop the replicas, so that you no longer pay for them."""
    with _deployer(_settings(config, project, region), app) as deployer:
        deployer.undeploy()


@app.command()
def cleanup(
    app: cli.App, config: Config = CONFIG, project: Project = None, region: Region = None
) -> None:
    """Remove everything of the app, and list again to prove it."""
    settings = _settings(config, project, region)
    with _deployer(settings, app) as deployer:
        deployer.cleanup()
        print(texts.what_cleanup_keeps(settings, app))


def _settings(config: Path, project: str | None, region: str | None) -> VertexSettings:
    return load_settings(config, project=project or None, region=region or None)


@contextmanager
def _google_errors() -> Iterator[None]:
    """Turn Google's errors into one line."""
    try:
        from google.api_core.exceptions import GoogleAPICallError
    except ImportError as error:
        raise UserError(f"Google's SDK is not installed ({error}); run `make setup`") from error
    logging.getLogger("google.cloud.aiplatform").setLevel(logging.WARNING)
    try:
        yield
    except GoogleAPICallError as error:
        code = error.grpc_status_code.name if error.grpc_status_code else error.code
        raise UserError(f"{code}: {error.message}") from error


@contextmanager
def _deployer(settings: VertexSettings, app: str) -> Iterator["Deployer"]:
    """A deployer that reports on the terminal; at Ctrl-C say that Google goes on."""
    with _google_errors():
        from deploy.vertex.deployer import Deployer

        deployer = Deployer(settings, app, *_reporters())
        try:
            yield deployer
        except KeyboardInterrupt:
            begun = ", ".join(deployer.begun) or "nothing in this run"
            print(
                f"\nThis does not stop Google. Begun: {begun}. You pay for what is deployed or "
                f"being deployed in {settings.parent} ({texts.hourly(settings)}) until you run\n"
                f"  python -m deploy.vertex cleanup {app} --project {settings.project_id} "
                f"--region {settings.region}",
                file=sys.stderr,
            )
            raise


def _reporters() -> tuple[Callable[[str], object], Callable[[str], object] | None]:
    """Print each step on its own line with the seconds; show progress on a terminal only."""
    began = time.monotonic()
    wipe = "\r\x1b[K" if sys.stdout.isatty() else ""

    def report(line: str) -> None:
        print(f"{wipe}{time.monotonic() - began:5.0f} s  {line}", flush=True)

    def progress(line: str) -> None:
        print(f"{wipe}         {line}", end="", flush=True)

    return report, progress if wipe else None


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit status."""
    return cli.run(app, "deploy.vertex", arguments)


if __name__ == "__main__":
    sys.exit(main())
