"""Make an exported model faster: fewer matrix multiplications with smaller weights.

    python -m deploy.archive.compress exported/openvino_model.xml folder/openvino_model.xml int8

`export.py` runs it. First, weights become float16. Then matrix multiplications with the same input
become one: query, key and value of an attention layer; gate and up of an MLP. At one token a step,
the overhead of a small multiplication costs as much as the multiplication. Then nncf quantizes the
weights. LOG.md has the effect of each.
"""

import logging
import sys
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import click
import nncf
import numpy as np
import openvino
import typer
from openvino import opset13 as ops

from deploy.common import cli

PRECISIONS = ("int8", "int4", "fp16")
INT4_GROUP = 64
"""Weights that share a scale. It divides the width of nearly every model."""


def shrink_matrices(model: openvino.Model) -> None:
    """Store constant matrices in float16 where that loses nothing, in place.

    The weights were loaded in float16, but some come out of the trace in float32, among them those
    of experts. What transformers computes, such as sines of positions, needs float32.
    """
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Constant" or node.get_element_type() != openvino.Type.f32:
            continue
        if sum(size > 1 for size in node.shape) < 2:
            continue
        with np.errstate(over="ignore"):
            small = node.data.astype(np.float16)
        if np.array_equal(small, node.data):
            constant = openvino.op.Constant(small)
            constant.set_friendly_name(node.get_friendly_name())
            node.output(0).replace(_decompressed(constant).output(0))


def merge_matmuls(model: openvino.Model) -> int:
    """Merge matrix multiplications that share their input, in place, and split the results again.

    Changes only those with a constant, transposed weight [outputs, inputs] in float16.

    Returns:
        How many matrix multiplications went into larger ones.
    """
    by_input: dict[tuple, list[tuple[openvino.Node, openvino.Node]]] = defaultdict(list)
    for node in model.get_ordered_ops():
        if node.get_type_name() == "MatMul" and (weight := _weight(node)):
            source = node.input_value(0)
            name = source.get_node().get_friendly_name()
            key = name, source.get_index(), weight.get_element_type()
            by_input[key].append((node, weight))
    merged = 0
    for matmuls in by_input.values():
        if len(matmuls) > 1:
            _merge(matmuls)
            merged += len(matmuls)
    model.validate_nodes_and_infer_types()
    return merged


def _weight(matmul: openvino.Node) -> openvino.Node | None:
    """Return the constant weight if it has the usual form, a float16 Constant and a Convert."""
    convert = matmul.input_value(1).get_node()
    if convert.get_type_name() != "Convert":
        return None
    weight = convert.input_value(0).get_node()
    attributes = matmul.get_attributes()
    transposed = attributes["transpose_b"] and not attributes["transpose_a"]
    constant = weight.get_type_name() == "Constant" and len(weight.shape) == 2
    return weight if transposed and constant else None


def _merge(matmuls: list[tuple[openvino.Node, openvino.Node]]) -> None:
    """Replace (matrix multiplication, weight) pairs by one multiplication and a split."""
    nodes, weights = zip(*matmuls, strict=True)
    joined = openvino.op.Constant(np.concatenate([weight.data for weight in weights]))
    joined.set_friendly_name(f"{weights[0].get_friendly_name()}.merged")
    merged = ops.matmul(nodes[0].input_value(0), _decompressed(joined), False, True)
    merged.set_friendly_name(f"{nodes[0].get_friendly_name()}.merged")
    sizes = ops.constant(np.array([weight.shape[0] for weight in weights], dtype=np.int64))
    parts = ops.variadic_split(merged, ops.constant(np.int64(-1)), sizes)
    for index, node in enumerate(nodes):
        node.output(0).replace(parts.output(index))


def _decompressed(constant: openvino.Node) -> openvino.Node:
    convert = ops.convert(constant, "f32")
    convert.get_rt_info()["decompression_0"] = ""  # "keep the constant small in memory"
    return convert


def compress(source: Path, target: Path, precision: str, group_size: int) -> None:
    """Merge and quantize one model file.

    Args:
        source: openvino_model.xml, as `trace.py` writes it.
        target: the file to write; its folder exists.
        precision: "int8" (one scale for each output), "int4" (one for each group; embedding and
            output layer stay in int8) or "fp16" (merged only).
        group_size: for int4; -1 is one scale for each output.
    """
    model = openvino.Core().read_model(source)
    shrink_matrices(model)
    merge_matmuls(model)
    if precision == "int8":
        model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
    elif precision == "int4":
        mode = nncf.CompressWeightsMode.INT4_SYM
        model = nncf.compress_weights(model, mode=mode, ratio=1.0, group_size=group_size)
    openvino.save_model(model, target, compress_to_fp16=False)


app = cli.app(__doc__)


@app.command()
def command(
    source: Annotated[Path, typer.Argument(metavar="SOURCE")],
    target: Annotated[Path, typer.Argument(metavar="TARGET")],
    precision: Annotated[str, typer.Argument(click_type=click.Choice(PRECISIONS))],
    group_size: Annotated[int, typer.Option(help="Weights that share a scale.")] = INT4_GROUP,
) -> None:
    """Merge the matrix multiplications of an exported model and quantize its weights."""
    nncf.set_log_level(logging.WARNING)
    compress(source, target, precision, group_size)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; see the module's docstring."""
    return cli.run(app, "deploy.archive.compress", arguments)


if __name__ == "__main__":
    sys.exit(main())
