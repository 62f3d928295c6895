"""The parts that command lines share: recurring arguments, and errors in one line.

    app = cli.app(__doc__)

    @app.command()
    def archive(name: cli.App, model_dir: cli.ModelDir = None) -> None: ...

    def main(arguments: list[str] | None = None) -> int:
        return cli.run(app, "deploy.archive", arguments)

Exit status 2 is a usage error, 1 an error that the user can fix (`UserError`, `ConfigError`).
"""

import os
import re
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Annotated

import click
import typer

from deploy.common.paths import UserError
from handler.config import ConfigError, check_name


def _app_name(text: str) -> str:
    try:
        return check_name(text)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error


def _port(value: str | int) -> int:
    """Read a server's port; its metrics are two ports higher."""
    text = str(value)
    if not text.isdecimal() or not 1024 <= int(text) <= 65_533:
        raise typer.BadParameter(f"PORT={text}: use a number from 1024 to 65533")
    return int(text)


INTERRUPTED = 130
"""What a shell reports for a program that Ctrl-C ended; Typer turns KeyboardInterrupt into it."""

App = Annotated[
    str,
    typer.Argument(
        metavar="APP",
        callback=_app_name,
        help="A name in handler/apps, or the name you gave your own model.",
    ),
]
ModelDir = Annotated[Path | None, typer.Option(help="A folder in Hugging Face layout to use.")]
ShapeOnly = Annotated[bool, typer.Option("--shape-only", help="Random weights of the true size.")]
Port = Annotated[
    int,
    typer.Option(parser=_port, metavar="PORT", help="The port of predictions; metrics use PORT+2."),
]


def app(docstring: str | None) -> typer.Typer:
    """Make a command line without Typer's completion, colors and tracebacks.

    Args:
        docstring: the module's, which becomes the help of a program with several commands. Examples
            that begin with `python -m` keep their lines.
    """
    return typer.Typer(
        help=re.sub(r"\n\n(?= *python -m)", "\n\n\b\n", docstring or ""),
        context_settings={"max_content_width": 100},
        add_completion=False,
        no_args_is_help=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )


def stop_in_order() -> None:
    """Turn the signals that end a program into KeyboardInterrupt, so that it cleans up first.

    A closed terminal sends SIGHUP; `kill` and service managers send SIGTERM. A shell that starts a
    program in the background makes it ignore Ctrl-C. `nohup` makes it ignore SIGHUP, which stays.
    """
    if threading.current_thread() is not threading.main_thread():
        return  # Python sets signal handlers only there
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, _hang_up)


def _hang_up(number: int, frame: FrameType | None) -> None:
    """Interrupt once: the kernel and the shell both send SIGHUP when a terminal closes."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _instead_of_app(app: typer.Typer, arguments: list[str] | None) -> bool:
    """Return whether there is an option in place of the APP, as in `make archive APP=-x`."""
    place = 1 if len(app.registered_commands) > 1 else 0
    words = sys.argv[1:] if arguments is None else arguments
    return words[place : place + 1] != [] and words[place].startswith("-")


def run(app: typer.Typer, program: str, arguments: list[str] | None = None) -> int:
    """Run a command line and return its exit status; print what the user can fix in one line.

    Args:
        app: the commands.
        program: the module, as in `python -m program`.
        arguments: instead of those of this process.
    """
    # Libraries read it when they are imported, in child processes too (SECURITY.md).
    os.environ.setdefault("DO_NOT_TRACK", "1")
    stop_in_order()
    try:
        status = typer.main.get_command(app).main(
            args=arguments, prog_name=f"python -m {program}", standalone_mode=False
        )
    except click.NoSuchOption as error:
        hint = "; an APP's name begins with a letter or a digit"
        text = error.format_message().rstrip(".")
        print(f"error: {text}{hint if _instead_of_app(app, arguments) else ''}", file=sys.stderr)
        return 2
    except click.ClickException as error:
        print(f"error: {error.format_message()}", file=sys.stderr)
        return 2
    except (UserError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except click.Abort:
        status = INTERRUPTED
    if status == INTERRUPTED:
        with suppress(OSError):  # the terminal may be gone
            print("\nstopped", flush=True)
    return status if isinstance(status, int) else 0
