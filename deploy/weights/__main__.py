"""`make model`: get an APP's weights.

python -m deploy.weights smollm2-135m
python -m deploy.weights dolly-v2-3b --shape-only     # random weights of the true size
python -m deploy.weights my-model --model-dir ~/my-model
"""

import sys

from deploy.common import cli
from deploy.common.paths import shown
from deploy.weights.fetch import get_weights
from deploy.weights.folder import RANDOM, source_of, weight_files

app = cli.app(__doc__)


@app.command()
def weights(
    name: cli.App, model_dir: cli.ModelDir = None, shape_only: cli.ShapeOnly = False
) -> None:
    """Get an APP's weights: a checked folder in Hugging Face layout."""
    folder = get_weights(name, model_dir=model_dir, shape_only=shape_only)
    size = sum(p.stat().st_size for p in weight_files(folder)) / 1e6
    note = f" ({RANDOM})" if source_of(folder).get("source") == RANDOM else ""
    print(f"{name}{note}: {size:,.0f} MB in {shown(folder)}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; see the module's docstring."""
    return cli.run(app, "deploy.weights", arguments)


if __name__ == "__main__":
    sys.exit(main())
