"""Make an exported model faster: fewer and smaller matrix multiplications. Run by `export.py`.

    python -m deploy.archive.compress exported/openvino_model.xml folder/openvino_model.xml int8

Two steps. Matrix products with the same input become one (query, key and value of an attention
layer; gate and up of an MLP), because at one token a step what surrounds a small product costs as
much as the product. Then nncf quantizes the weights. What each is worth is in LOG.md.
"""

import argparse
import logging
from collections import defaultdict
from pathlib import Path

import nncf
import numpy as np
import openvino
from openvino import opset13 as ops

INT4_GROUP = 64
"""Weights that share a scale. It divides the width of nearly every model."""


def merge_products(model: openvino.Model) -> int:
    """Join matrix products that share their input, in place; the results are split again.

    Only products with a constant, transposed weight [outputs, inputs] in one dtype are touched.

    Returns:
        How many products went into larger ones.
    """
    by_input: dict[tuple, list[openvino.Node]] = defaultdict(list)
    for node in model.get_ordered_ops():
        if node.get_type_name() == "MatMul" and (weight := _weight(node)):
            source = node.input_value(0)
            name = source.get_node().get_friendly_name()
            by_input[name, source.get_index(), weight.get_element_type()].append(node)
    merged = 0
    for products in by_input.values():
        if len(products) > 1:
            _merge(products)
            merged += len(products)
    model.validate_nodes_and_infer_types()
    return merged


def _weight(product: openvino.Node) -> openvino.Node | None:
    """The constant a product multiplies with, if it has the usual form: halves, then a Convert."""
    convert = product.input_value(1).get_node()
    if convert.get_type_name() != "Convert":
        return None
    weight = convert.input_value(0).get_node()
    attributes = product.get_attributes()
    usual = attributes["transpose_b"] and not attributes["transpose_a"]
    constant = weight.get_type_name() == "Constant" and len(weight.shape) == 2
    return weight if usual and constant else None


def _merge(products: list[openvino.Node]) -> None:
    weights = [_weight(product) for product in products]
    joined = openvino.op.Constant(np.concatenate([weight.data for weight in weights]))
    joined.set_friendly_name(f"{weights[0].get_friendly_name()}.merged")
    convert = ops.convert(joined, "f32")
    convert.get_rt_info()["decompression_0"] = ""  # "keep the constant small in memory"
    product = ops.matmul(products[0].input_value(0), convert, False, True)
    product.set_friendly_name(f"{products[0].get_friendly_name()}.merged")
    sizes = ops.constant(np.array([weight.shape[0] for weight in weights], dtype=np.int64))
    parts = ops.variadic_split(product, ops.constant(np.int64(-1)), sizes)
    for index, old in enumerate(products):
        old.output(0).replace(parts.output(index))


def compress(source: Path, target: Path, precision: str, group_size: int) -> None:
    """Merge and quantize one model file.

    Args:
        source: openvino_model.xml with weights in halves.
        target: the file to write; its folder exists.
        precision: "int8" (one scale for each output), "int4" (one for each group; embedding and
            output layer stay in int8) or "fp16" (merged only).
        group_size: for int4; -1 is one scale for each output.
    """
    model = openvino.Core().read_model(source)
    merge_products(model)
    if precision == "int8":
        model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
    elif precision == "int4":
        mode = nncf.CompressWeightsMode.INT4_SYM
        model = nncf.compress_weights(model, mode=mode, ratio=1.0, group_size=group_size)
    openvino.save_model(model, target, compress_to_fp16=False)


def main() -> None:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m deploy.archive.compress")
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("precision", choices=["int8", "int4", "fp16"])
    parser.add_argument("--group-size", type=int, default=INT4_GROUP)
    options = parser.parse_args()
    nncf.set_log_level(logging.WARNING)
    compress(options.source, options.target, options.precision, options.group_size)


if __name__ == "__main__":
    main()
