"""`make archive`: the model archive of an APP.

python -m deploy.archive smollm2-135m                      # a directory, the default
python -m deploy.archive smollm2-135m --format zip-store   # one .mar file
"""

import sys

from deploy.archive.build import add_archive_options, build_app
from deploy.common.cli import app_parser, command


@command
def main(arguments: list[str] | None) -> None:
    """The command line; see the module's docstring."""
    parser = app_parser("deploy.archive", "make a model archive")
    add_archive_options(parser)
    build_app(parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
