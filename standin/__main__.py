"""Run the local Vertex AI until Ctrl-C.

    python -m standin [--scale 0.01] [--seed 0] [--folder build/vertex] [--runner process]

Prints the lines that lead the SDK, gcloud and curl in another terminal to it.
"""

import argparse
import shlex
import signal
import sys
from pathlib import Path

from deploy.common.cli import command
from deploy.common.paths import UserError
from standin.local import Standin


@command
def main(arguments: list[str] | None) -> None:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m standin", description="local Vertex AI")
    parser.add_argument("--scale", type=float, default=0.05, help="of the platform's durations")
    parser.add_argument("--limit-scale", type=float, help="of time limits (default: 0.1 at least)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keep keys and logs here")
    parser.add_argument("--runner", choices=("docker", "process"))
    parser.add_argument("--region", default="europe-west4")
    parser.add_argument("--port", type=int, default=0, help="of the proxy door")
    options = vars(parser.parse_args(arguments))
    for stop in (signal.SIGINT, signal.SIGTERM):  # a shell may have told us to ignore Ctrl-C
        signal.signal(stop, signal.default_int_handler)
    standin = Standin(options.pop("scale"), options.pop("seed"), options.pop("runner"), **options)
    with standin:
        for name, value in standin.environment.items():
            print(f"export {name}={shlex.quote(value)}")
        print("# paste these lines into another terminal; there, deploy as ever")
        print(
            f"# running ({standin.runner}); Ctrl-C stops it and everything it started", flush=True
        )
        code = standin._process.wait()
        log = standin.folder / "standin.log"
        text = log.read_text(errors="replace") if log.exists() else ""
        raise UserError(f"the stand-in ended with code {code}\n{text}")


if __name__ == "__main__":
    sys.exit(main())
