"""`make archive`: the model archive of an APP.

python -m deploy.archive smollm2-135m                      # a directory, the default
python -m deploy.archive smollm2-135m --format zip-store   # one .mar file
"""

import sys

from deploy.archive.build import build_app
from deploy.archive.options import Engine, Format
from deploy.archive.pack import DIRECTORY
from deploy.common import cli

app = cli.app(__doc__)


@app.command()
def archive(
    name: cli.App,
    model_dir: cli.ModelDir = None,
    shape_only: cli.ShapeOnly = False,
    format: Format = DIRECTORY,
    engine: Engine = None,
) -> None:
    """Make the model archive of an APP."""
    build_app(
        name, model_dir=model_dir, shape_only=shape_only, archive_format=format, engine=engine
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; see the module's docstring."""
    return cli.run(app, "deploy.archive", arguments)


if __name__ == "__main__":
    sys.exit(main())
