"""`make serve` and `make quickstart`.

python -m deploy.torchserve smollm2-135m                 # archive and serve, until Ctrl-C
python -m deploy.torchserve smollm2-135m --quickstart    # one request, then stop
"""

import json
import signal
import sys
import time

from deploy.archive.build import add_archive_options, build_app
from deploy.archive.pack import archive_path
from deploy.common.cli import app_parser, command, port_number
from deploy.common.paths import shown
from deploy.torchserve.client import predict
from deploy.torchserve.server import OMELETTE, PORT, Server, ServerError


def _serve(server: Server) -> None:
    """Serve until Ctrl-C or SIGTERM, or until the server dies."""
    print(f"starting; the log is {shown(server.log)}", flush=True)
    with server:
        target = f"make test APP={server.name} PORT={server.port}"
        print(f"ready: POST {server.url}   (ask: {target}; stop: Ctrl-C)", flush=True)
        code = server.process.wait()
        raise ServerError(f"TorchServe ended with code {code}. {server.last_words()}")


def _quickstart(server: Server) -> None:
    print("starting TorchServe ...", flush=True)
    began = time.monotonic()
    with server:
        print(f"ready after {time.monotonic() - began:.1f} s; asking {server.url}", flush=True)
        reply = predict(server.url, OMELETTE)
    print(json.dumps(OMELETTE))
    print(json.dumps(reply, indent=2, ensure_ascii=False))


@command
def main(arguments: list[str] | None) -> None:
    """The command line; see the module's docstring."""
    parser = app_parser("deploy.torchserve", "archive and serve an app")
    add_archive_options(parser)
    parser.add_argument("--port", type=port_number, default=PORT)
    parser.add_argument("--quickstart", action="store_true", help="one request, then stop")
    options = parser.parse_args(arguments)
    for stop in (signal.SIGINT, signal.SIGTERM):  # a shell may have told us to ignore Ctrl-C
        signal.signal(stop, signal.default_int_handler)
    server = Server(archive_path(options.app, options.format), port=options.port)
    server.check_ports()  # before the minutes that weights may take
    build_app(options)
    (_quickstart if options.quickstart else _serve)(server)


if __name__ == "__main__":
    sys.exit(main())
