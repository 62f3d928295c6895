"""What the command lines of this package share."""

import argparse
import functools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from deploy.common.paths import UserError
from handler.config import ConfigError

Main = Callable[[list[str] | None], None]


def command(main: Main) -> Callable[[list[str] | None], int]:
    """Make `main` return an exit status, and say in one line what the reader can mend."""

    @functools.wraps(main)
    def run(arguments: list[str] | None = None) -> int:
        try:
            main(arguments)
        except (UserError, ConfigError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("\nstopped")
            return 130  # what a shell reports for a program that Ctrl-C ended
        return 0

    return run


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line: to whoever typed `make serve ENGINE=x` usage is noise."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def app_parser(
    name: str, description: str, actions: list[str] | None = None
) -> argparse.ArgumentParser:
    """A parser with what every command about an app's weights takes, after an action if any."""
    parser = _Parser(prog=f"python -m {name}", description=description)
    if actions:
        parser.add_argument("action", choices=actions)
    parser.add_argument("app", type=_name, help="a name in handler/apps, or any with --model-dir")
    parser.add_argument("--model-dir", type=Path, help="a folder in Hugging Face layout to use")
    parser.add_argument("--shape-only", action="store_true", help="random weights of true size")
    return parser


def _name(text: str) -> str:
    """An APP becomes a file name, an argument and a part of a URL."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", text):
        raise argparse.ArgumentTypeError(f"APP={text}: use letters, digits and . _ - only")
    return text


def port_number(text: str) -> int:
    """A server's first port: four more belong to it (those of a container stay inside)."""
    if not text.isdecimal() or not 1024 <= int(text) <= 65_531:
        raise argparse.ArgumentTypeError(f"PORT={text}: use a number from 1024 to 65531")
    return int(text)
