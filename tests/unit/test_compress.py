"""Compressing an exported model keeps its outputs."""

from pathlib import Path

import numpy as np
import openvino
import pytest
from openvino import opset13 as ops

from deploy.archive.compress import compress, merge_matmuls

pytestmark = pytest.mark.slow

CORE = openvino.Core()
RANDOM = np.random.default_rng(0)


def matmul(x, outputs: int, *, transposed: bool = True):
    shape = (outputs, 8) if transposed else (8, outputs)
    weight = openvino.op.Constant(RANDOM.standard_normal(shape).astype(np.float16))
    return ops.matmul(x, ops.convert(weight, "f32"), False, transposed)


def model_of(make) -> openvino.Model:
    x = ops.parameter([-1, 8], np.float32)
    return openvino.Model([ops.result(node) for node in make(x)], [x])


def outputs_of(model: openvino.Model) -> list[np.ndarray]:
    x = np.linspace(-1, 1, 24, dtype=np.float32).reshape(3, 8)
    # In float32 throughout: by default a processor with bfloat16 rounds differently by shape.
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    return list(CORE.compile_model(model, "CPU", exact)(x).values())


def count_matmuls(model: openvino.Model) -> int:
    return sum(op.get_type_name() == "MatMul" for op in model.get_ops())


def test_matmuls_with_the_same_input_are_merged():
    model = model_of(lambda x: [matmul(x, 4), matmul(x, 2), matmul(x, 6)])
    before = outputs_of(model)
    assert merge_matmuls(model) == 3 and count_matmuls(model) == 1
    after = outputs_of(model)
    assert [a.shape for a in after] == [(3, 4), (3, 2), (3, 6)]
    for a, b in zip(after, before, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: [matmul(x, 4), matmul(ops.relu(x), 4)],
        lambda x: [matmul(x, 4), matmul(x, 4, transposed=False)],
        lambda x: [matmul(x, 4), ops.matmul(x, x, False, True)],
    ],
    ids=["other input", "other layout", "no weight"],
)
def test_other_matmuls_are_not_merged(make):
    model = model_of(make)
    before = outputs_of(model)
    assert merge_matmuls(model) == 0 and count_matmuls(model) == 2
    for a, b in zip(outputs_of(model), before, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 1e-3), ("int8", 0.05)])
def test_compressed_model_has_nearly_the_same_outputs(
    precision: str, tolerance: float, tmp_path: Path
):
    model = model_of(lambda x: [matmul(x, 64), matmul(x, 64)])
    before = outputs_of(model)
    openvino.save_model(model, tmp_path / "source.xml", compress_to_fp16=False)
    compress(tmp_path / "source.xml", tmp_path / "target.xml", precision, 64)
    made = CORE.read_model(tmp_path / "target.xml")
    assert count_matmuls(made) == 1
    for a, b in zip(outputs_of(made), before, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max())
