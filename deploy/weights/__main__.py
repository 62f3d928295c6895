"""`make model`: get an APP's weights.

python -m deploy.weights smollm2-135m
python -m deploy.weights dolly-v2-3b --shape-only     # random weights of the true size
python -m deploy.weights my-model --model-dir ~/my-model
"""

import sys

from deploy.common.cli import app_parser, command
from deploy.common.paths import shown
from deploy.weights.fetch import get_weights
from deploy.weights.folder import RANDOM, source_of, weight_files


@command
def main(arguments: list[str] | None) -> None:
    """The command line; see the module's docstring."""
    options = app_parser("deploy.weights", "get an APP's weights").parse_args(arguments)
    folder = get_weights(options.app, model_dir=options.model_dir, shape_only=options.shape_only)
    size = sum(p.stat().st_size for p in weight_files(folder)) / 1e6
    note = f" ({RANDOM})" if source_of(folder).get("source") == RANDOM else ""
    print(f"{options.app}{note}: {size:,.0f} MB in {shown(folder)}")


if __name__ == "__main__":
    sys.exit(main())
