"""Joining matrix products changes the shape of the work, not its result."""

from pathlib import Path

import numpy as np
import openvino
import pytest
from openvino import opset13 as ops

from deploy.archive.compress import compress, merge_matmuls

CORE = openvino.Core()
RANDOM = np.random.default_rng(0)


def product(x, outputs: int, *, transposed: bool = True):
    shape = (outputs, 8) if transposed else (8, outputs)
    weight = openvino.op.Constant(RANDOM.standard_normal(shape).astype(np.float16))
    return ops.matmul(x, ops.convert(weight, "f32"), False, transposed)


def model_of(make) -> openvino.Model:
    x = ops.parameter([-1, 8], np.float32)
    return openvino.Model([ops.result(node) for node in make(x)], [x])


def answers(model: openvino.Model) -> list[np.ndarray]:
    x = np.linspace(-1, 1, 24, dtype=np.float32).reshape(3, 8)
    # In float32 throughout: by default a processor with bfloat16 rounds differently by shape.
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    return list(CORE.compile_model(model, "CPU", exact)(x).values())


def products_in(model: openvino.Model) -> int:
    return sum(op.get_type_name() == "MatMul" for op in model.get_ops())


def test_products_of_one_input_become_one():
    model = model_of(lambda x: [product(x, 4), product(x, 2), product(x, 6)])
    before = answers(model)
    assert merge_matmuls(model) == 3 and products_in(model) == 1
    after = answers(model)
    assert [a.shape for a in after] == [(3, 4), (3, 2), (3, 6)]
    for a, b in zip(after, before, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: [product(x, 4), product(ops.relu(x), 4)],
        lambda x: [product(x, 4), product(x, 4, transposed=False)],
        lambda x: [product(x, 4), ops.matmul(x, x, False, True)],
    ],
    ids=["other input", "other layout", "no weight"],
)
def test_what_is_left_alone(make):
    model = model_of(make)
    before = answers(model)
    assert merge_matmuls(model) == 0 and products_in(model) == 2
    for a, b in zip(answers(model), before, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 1e-3), ("int8", 0.05)])
def test_compress_writes_a_model_that_answers_alike(
    precision: str, tolerance: float, tmp_path: Path
):
    model = model_of(lambda x: [product(x, 64), product(x, 64)])
    before = answers(model)
    openvino.save_model(model, tmp_path / "source.xml", compress_to_fp16=False)
    compress(tmp_path / "source.xml", tmp_path / "target.xml", precision, 64)
    made = CORE.read_model(tmp_path / "target.xml")
    assert products_in(made) == 1
    for a, b in zip(answers(made), before, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max())
