"""The reference of a quantized layer rounds as ONNX Runtime's kernels do: one node at a time, random weights."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from edgevlm.quant.fake import RoundedLinear
from edgevlm.quant.rounding import QuantizedWeight, round_weight
from edgevlm.quant.schemes import scheme_of

NUM_OUTPUTS = 24
WEIGHT_ONLY = ["int4-b32", "int4-b128", "int4-b64-asym", "int4-b32-rtn", "int8-b32", "int8-b128"]

# The same whole-number products in another order of additions, some hundred of them: about 1e-6 of the largest output.
CLOSE = 5e-6


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(NUM_OUTPUTS, 256, generator=torch.Generator().manual_seed(0)) / 16


@pytest.fixture
def inputs() -> Tensor:
    """Rows with an outlier, for which it matters what shares a scale with what."""
    rows = torch.randn(3, 256, generator=torch.Generator().manual_seed(1))
    rows[1, 40] = 30.0
    return rows


@pytest.mark.parametrize("precision", WEIGHT_ONLY)
def test_weight_only_layer_rounds_as_matmulnbits(precision: str, weight: Tensor, inputs: Tensor) -> None:
    quantized, bias = _rounded(weight, precision), torch.linspace(-1, 1, NUM_OUTPUTS)
    found = _computed(RoundedLinear(quantized, bias, _scheme(precision)), inputs)
    expected = _run(_matmul_nbits(quantized, bias), inputs)
    assert np.abs(found - expected).max() < CLOSE * np.abs(expected).max()


@pytest.mark.parametrize("precision", WEIGHT_ONLY)
def test_inputs_that_do_not_fill_the_last_block_count_fully(precision: str, weight: Tensor, inputs: Tensor) -> None:
    short, rows = weight[:, :200], inputs[:, :200].contiguous()
    quantized = _rounded(short, precision)
    found = _computed(RoundedLinear(quantized, None, _scheme(precision)), rows)
    expected = _run(_matmul_nbits(quantized, torch.zeros(NUM_OUTPUTS)), rows)
    assert np.abs(found - expected).max() < CLOSE * np.abs(expected).max()


def test_rounding_of_activations_is_not_too_small_to_be_seen(weight: Tensor, inputs: Tensor) -> None:
    quantized = _rounded(weight, "int4-b32")
    exact = (inputs @ quantized.dequantize().T).numpy()
    expected = _run(_matmul_nbits(quantized, torch.zeros(NUM_OUTPUTS)), inputs)
    assert np.abs(exact - expected).max() > 100 * CLOSE * np.abs(expected).max()


def test_dynamic_layer_rounds_as_dynamicquantizematmul(weight: Tensor, inputs: Tensor) -> None:
    quantized, bias = _rounded(weight, "int8-dynamic"), torch.linspace(-1, 1, NUM_OUTPUTS)
    found = _computed(RoundedLinear(quantized, bias, _scheme("int8-dynamic")), inputs)
    expected = _run(_dynamic(quantized, bias), inputs)
    assert np.abs(found - expected).max() < CLOSE * np.abs(expected).max()


def _scheme(precision: str):  # type: ignore[no-untyped-def]
    scheme = scheme_of(precision)
    assert scheme is not None
    return scheme


def _rounded(weight: Tensor, precision: str) -> QuantizedWeight:
    return round_weight(weight, _scheme(precision))


@torch.no_grad()
def _computed(layer: RoundedLinear, inputs: Tensor) -> NDArray[np.float32]:
    return layer(inputs).numpy()


def _matmul_nbits(quantized: QuantizedWeight, bias: Tensor) -> onnx.ModelProto:
    """One node, packed from the definition of the operator: rows of blocks, the lower nibble first."""
    N, K = quantized.codes.shape
    (_, G), block = quantized.scales.shape, quantized.group_size
    codes = np.full((N, G * block), 2 ** (quantized.bits - 1), np.uint8)
    codes[:, :K] = quantized.codes.numpy()
    tensors = {"B": _nibbles(codes, quantized.bits).reshape(N, G, -1), "scales": quantized.scales.numpy()}
    if quantized.zero_points is not None:
        points = np.zeros((N, G + G % 2), np.uint8)
        points[:, :G] = quantized.zero_points.numpy()
        tensors["zero_points"] = _nibbles(points, quantized.bits)
    names = ["A", "B", "scales", "zero_points" if "zero_points" in tensors else "", "", "bias"]
    node = helper.make_node(
        "MatMulNBits",
        names,
        ["Y"],
        domain="com.microsoft",
        K=K,
        N=N,
        bits=quantized.bits,
        block_size=block,
        accuracy_level=4,
    )
    return _model(node, {**tensors, "bias": bias.numpy()}, K)


def _nibbles(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    return codes if bits == 8 else codes[:, ::2] | codes[:, 1::2] << 4


def _dynamic(quantized: QuantizedWeight, bias: Tensor) -> onnx.ModelProto:
    codes = np.ascontiguousarray(quantized.codes.numpy().T)
    tensors = {"B": codes, "scales": quantized.scales[:, 0].numpy(), "bias": bias.numpy()}
    node = helper.make_node("DynamicQuantizeMatMul", ["A", "B", "scales", "", "bias"], ["Y"], domain="com.microsoft")
    return _model(node, tensors, codes.shape[0])


def _model(node: onnx.NodeProto, tensors: dict[str, NDArray[np.generic]], num_inputs: int) -> onnx.ModelProto:
    graph = helper.make_graph(
        [node],
        "one node",
        [helper.make_tensor_value_info("A", TensorProto.FLOAT, ["rows", num_inputs])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, ["rows", NUM_OUTPUTS])],
        [numpy_helper.from_array(tensor, name) for name, tensor in tensors.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _run(model: onnx.ModelProto, inputs: Tensor) -> NDArray[np.float32]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"A": inputs.numpy()})[0]  # type: ignore[no-any-return]
