"""Trace a model into OpenVINO's graph, with optimum-intel.

    python -m deploy.archive.trace weights/ folder/

`export.py` runs it. The checkpoint is loaded in float16, so a weight takes two bytes in memory and
in the file. What transformers computes in float32 when it loads a model stays float32, above all
the frequencies of RoPE: `optimum-cli` rounds them to float16, and the angle of a position is the
frequency times the position. LOG.md has the effect.
"""

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from optimum.exporters.openvino import main_export
from optimum.intel import OVConfig

from deploy.common import cli

app = cli.app(__doc__)


@app.command()
def command(
    weights: Annotated[Path, typer.Argument(metavar="WEIGHTS")],
    target: Annotated[Path, typer.Argument(metavar="TARGET")],
) -> None:
    """Trace the model of a folder in Hugging Face layout."""
    trace(weights, target)


def trace(weights: Path, target: Path) -> None:
    """Write `openvino_model.xml` and its weights into a folder."""
    main_export(
        str(weights),
        target,
        task="text-generation-with-past",
        local_files_only=True,
        model_loading_kwargs={"torch_dtype": torch.float16},
        ov_config=OVConfig(),  # without it, a large model would be quantized here
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; see the module's docstring."""
    return cli.run(app, "deploy.archive.trace", arguments)


if __name__ == "__main__":
    sys.exit(main())
