"""Run the local Vertex AI until Ctrl-C.

Prints the lines that direct the SDK, gcloud and curl in another terminal to it.
"""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from deploy.common import cli
from deploy.common.paths import UserError
from standin.local import Standin

app = cli.app(__doc__)


@app.command()
def run(
    scale: Annotated[float, typer.Option(help="Factor for the platform's own durations.")] = 0.05,
    limit_scale: Annotated[
        float | None, typer.Option(help="Factor for time limits; SCALE, but at least 0.1.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of identifiers and of the traffic split.")] = 0,
    folder: Annotated[Path | None, typer.Option(help="Keep keys and logs here.")] = None,
    runner: Annotated[
        Literal["docker", "process"] | None,
        typer.Option(help="What runs models; docker if it is installed."),
    ] = None,
    region: Annotated[str, typer.Option(help="Region in the printed lines.")] = "europe-west4",
    port: Annotated[int, typer.Option(help="The proxy's port; 0 for any free one.")] = 0,
) -> None:
    """Run the local Vertex AI until Ctrl-C; print the lines that direct clients to it."""
    standin = Standin(
        scale, seed, runner, limit_scale=limit_scale, region=region, folder=folder, port=port
    )
    with standin:
        for name, value in standin.environment.items():
            print(f"export {name}={shlex.quote(value)}")
        print("# paste these lines into another terminal and deploy there as usual")
        print(
            f"# running ({standin.runner}); Ctrl-C stops it and everything it started", flush=True
        )
        code = standin.wait()
        log = standin.folder / "standin.log"
        text = log.read_text(errors="replace") if log.exists() else ""
        raise UserError(f"the stand-in ended with code {code}\n{text}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    return cli.run(app, "standin", arguments)


if __name__ == "__main__":
    sys.exit(main())
