"""`make serve` and `make quickstart`.

python -m deploy.torchserve serve smollm2-135m         # archive and serve, until Ctrl-C
python -m deploy.torchserve quickstart smollm2-135m    # archive, serve, send one request, stop
"""

import json
import sys
import time
from pathlib import Path

from deploy.archive.build import build_app
from deploy.archive.options import Engine, Format
from deploy.archive.pack import DIRECTORY, archive_path
from deploy.common import cli
from deploy.common.paths import shown
from deploy.torchserve.client import SAMPLE_REQUEST, predict
from deploy.torchserve.server import PORT, Server, ServerError

app = cli.app(__doc__)


@app.command()
def serve(
    name: cli.App,
    model_dir: cli.ModelDir = None,
    shape_only: cli.ShapeOnly = False,
    format: Format = DIRECTORY,
    engine: Engine = None,
    port: cli.Port = PORT,
) -> None:
    """Archive an APP and serve it until Ctrl-C, or until it cannot serve any more."""
    server = _archive(name, model_dir, shape_only, format, engine, port)
    print(f"starting; the log is {shown(server.log)}", flush=True)
    with server:
        test = f"make test APP={server.name} PORT={server.port}"
        print(f"ready: POST {server.url}   (test: {test}; stop: Ctrl-C)", flush=True)
        print(f"base URL for clients of OpenAI's API: {server.openai_url}", flush=True)
        reason = server.watch()
        raise ServerError(f"{reason}. {server.log_end()}")


@app.command()
def quickstart(
    name: cli.App,
    model_dir: cli.ModelDir = None,
    shape_only: cli.ShapeOnly = False,
    format: Format = DIRECTORY,
    engine: Engine = None,
    port: cli.Port = PORT,
) -> None:
    """Archive an APP, serve it, send one request and stop."""
    server = _archive(name, model_dir, shape_only, format, engine, port)
    print("starting TorchServe ...", flush=True)
    began = time.monotonic()
    with server:
        print(f"ready after {time.monotonic() - began:.1f} s; POST {server.url}", flush=True)
        response = predict(server.url, SAMPLE_REQUEST)
        server.stop(grace=0)  # nothing is in flight; a clean exit of Java takes a second more
    print(json.dumps(SAMPLE_REQUEST))
    print(json.dumps(response, indent=2, ensure_ascii=False))


def _archive(
    name: str, model_dir: Path | None, shape_only: bool, format: str, engine: str | None, port: int
) -> Server:
    """Make the archive; return the server for it, not yet started."""
    server = Server(archive_path(name, format), port=port)
    server.check_ports()  # before the minutes that weights may take
    build_app(
        name, model_dir=model_dir, shape_only=shape_only, archive_format=format, engine=engine
    )
    return server


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; see the module's docstring."""
    return cli.run(app, "deploy.torchserve", arguments)


if __name__ == "__main__":
    sys.exit(main())
