"""What stays float32 in a float16 graph because its values leave float16's range."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from edgevlm.core.errors import UnsupportedError
from edgevlm.export.half_graph import BRAIN, FLOAT, HALF, half_tensor, to_half
from edgevlm.export.overflow import overflowing_nodes

SMALL = {"x": np.array([[1.0, 2.0]], np.float32)}
Float = NDArray[np.float32]


def graph(nodes: Collection[onnx.NodeProto], *outputs: str, **weights: NDArray[Any]) -> ir.Model:
    """``x`` [B, 2] to ``outputs``, else ``y``; every node is called like its first output."""
    for node in nodes:
        node.name = node.output[0]
    made = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", 2])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs or ("y",)],
        initializer=[onnx.numpy_helper.from_array(weight, name) for name, weight in weights.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


def hill() -> ir.Model:
    """A product that is a hundred thousand in its middle and small again at its end."""
    nodes = [
        helper.make_node("MatMul", ["x", "up"], ["large"]),
        helper.make_node("Transpose", ["large"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["down", "turned"], ["small"]),
        helper.make_node("Abs", ["small"], ["y"]),
    ]
    up, down = np.array([[3e4, 1.0], [3e4, -1.0]], np.float32), np.array([[1e-5, 1e-1]], np.float32)
    return graph(nodes, up=up, down=down)


def run(model: ir.Model, feed: dict[str, Float] = SMALL) -> Float:
    """Node by node in numpy: ONNX Runtime computes float16 in float32 on a CPU and overflows nowhere."""
    with np.errstate(over="ignore", invalid="ignore"):
        found: Any = ReferenceEvaluator(ir.to_proto(model)).run(None, feed)
    return np.asarray(found[0])


def test_a_hill_is_found_with_all_that_climbs_it() -> None:
    assert overflowing_nodes(hill(), [SMALL]) == ("large", "turned", "small")
    assert overflowing_nodes(hill(), [{"x": SMALL["x"] / 100}]) == ()
    assert overflowing_nodes(hill(), [{"x": SMALL["x"] / 100}], largest=500.0) == ("large", "turned", "small")


def test_islands_compute_what_float32_does() -> None:
    expected, half, islands = run(hill()), hill(), hill()
    to_half(half)
    to_half(islands, islands=overflowing_nodes(hill(), [SMALL]))
    assert np.isfinite(expected).all()
    assert not np.isfinite(run(half)).any()
    assert run(islands) == pytest.approx(expected, rel=2e-3)
    types = {value.name: value.dtype for node in islands.graph for value in node.outputs}
    assert [types["large"], types["small"], types["y.inside"], types["y"]] == [FLOAT, FLOAT, HALF, FLOAT]
    assert {value.dtype for value in islands.graph.initializers.values()} == {FLOAT}


def test_names_that_a_graph_lacks_are_ignored() -> None:
    model = hill()
    to_half(model, islands=("of", "another", "graph"))
    assert {value.dtype for value in model.graph.initializers.values()} == {HALF}


def test_what_moves_values_passes_on_wide_ones_that_were_not_seen() -> None:
    nodes = [
        helper.make_node("Mul", ["x", "scale"], ["large"]),
        helper.make_node("Split", ["large"], ["left", "right"], axis=1, num_outputs=2),
        helper.make_node("Neg", ["left"], ["a"]),
        helper.make_node("Neg", ["right"], ["b"]),
        helper.make_node("Tanh", ["a"], ["c"]),
    ]
    model = graph(nodes, "b", "c", scale=np.array([[1.0, 3e4]], np.float32))
    assert overflowing_nodes(model, [SMALL]) == ("large", "left", "a", "b")


def test_a_mask_is_no_overflow() -> None:
    """Scores beside -32768 or float32's lowest would count as wide, and every attention with them."""
    for hidden in (-32768.0, float(np.finfo(np.float32).min), -np.inf):
        nodes = [
            helper.make_node("Greater", ["x", "limit"], ["seen"]),
            helper.make_node("Where", ["seen", "zero", "hidden"], ["mask"]),
            helper.make_node("Add", ["x", "mask"], ["masked"]),
            helper.make_node("Softmax", ["masked"], ["y"]),
        ]
        numbers = {"limit": 1.5, "zero": 0.0, "hidden": hidden}
        model = graph(nodes, **{name: np.array(number, np.float32) for name, number in numbers.items()})
        assert overflowing_nodes(model, [SMALL]) == ()
        kept = model.graph.initializers["hidden"].const_value
        assert kept is not None
        assert kept.numpy() == np.float32(hidden)


def test_a_weight_beyond_float16_makes_an_island() -> None:
    model = graph([helper.make_node("Mul", ["x", "heavy"], ["y"])], heavy=np.array([[1e5, 0.0]], np.float32))
    tiny = {"x": SMALL["x"] / 1e4}
    islands = overflowing_nodes(model, [tiny])
    expected = run(model, tiny)
    assert islands == ("y",)
    to_half(model, islands=islands)
    assert run(model, tiny).tolist() == expected.tolist()


def test_squares_are_wide_anyway_and_not_listed() -> None:
    nodes = [
        helper.make_node("Pow", ["x", "two"], ["squares"]),
        helper.make_node("ReduceMean", ["squares"], ["mean"]),
        helper.make_node("Sqrt", ["mean"], ["root"]),
        helper.make_node("Div", ["x", "root"], ["y"]),
    ]
    model = graph(nodes, two=np.array(2.0, np.float32))
    assert overflowing_nodes(model, [{"x": SMALL["x"] * 1e3}]) == ()


def test_empty_tensors_have_no_magnitude() -> None:
    assert overflowing_nodes(hill(), [{"x": np.zeros((0, 2), np.float32)}]) == ()


def test_what_cannot_be_judged_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="at least one"):
        overflowing_nodes(hill(), [])
    with pytest.raises(UnsupportedError, match="x is not finite"):
        overflowing_nodes(hill(), [{"x": np.array([[np.inf, 1.0]], np.float32)}, SMALL])
    with pytest.raises(UnsupportedError, match="the graph cannot read"):
        overflowing_nodes(hill(), [{"x": np.ones((1, 3), np.float32)}])


def test_a_key_beyond_float16_is_refused() -> None:
    model = graph(
        [helper.make_node("Mul", ["x", "k"], ["present.0.key"])], "present.0.key", k=np.array([[9e4, 1]], np.float32)
    )
    with pytest.raises(UnsupportedError, match=r"present.0.key holds 9e\+04.*bf16"):
        overflowing_nodes(model, [SMALL])


def rounded(scale: float) -> ir.Model:
    """``hill`` of codes: what is read is rounded to 8 bits before the product that goes down."""
    nodes = [
        helper.make_node("MatMul", ["x", "up"], ["large"]),
        helper.make_node("QuantizeLinear", ["large", "scale", "zero"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "scale"], ["read"]),
        helper.make_node("DequantizeLinear", ["weight", "step"], ["down"]),
        helper.make_node("MatMul", ["read", "down"], ["y"]),
    ]
    return graph(
        nodes,
        up=np.array([[3e4, 1.0], [3e4, -1.0]], np.float32),
        scale=np.array(scale, np.float32),
        zero=np.array(0, np.int8),
        weight=np.array([[100], [50]], np.int8),
        step=np.array(1e-7, np.float32),
    )


def test_codes_that_float32_nodes_read_are_float32_on_both_sides() -> None:
    expected, model = run(rounded(800.0)), rounded(800.0)
    to_half(model, islands=("large", "y"))
    assert "Cast" not in {node.op_type for node in model.graph}
    assert run(model).tolist() == expected.tolist()


def test_codes_that_float16_nodes_read_share_one_scale() -> None:
    model = rounded(800.0)
    to_half(model, islands=("large",))
    readers = [node for node in model.graph if model.graph.initializers["scale"] in node.inputs]
    assert [node.op_type for node in readers] == ["QuantizeLinear", "DequantizeLinear"]
    assert model.graph.initializers["scale"].dtype == HALF


def test_bfloat16_keeps_what_needs_precision() -> None:
    nodes = [
        helper.make_node("Pow", ["x", "two"], ["squares"]),
        helper.make_node("ReduceMean", ["squares"], ["mean"]),
        helper.make_node("Sqrt", ["mean"], ["root"]),
        helper.make_node("Div", ["x", "root"], ["normed"]),
        helper.make_node("Mul", ["normed", "weight"], ["norm"]),
        helper.make_node("MatMul", ["norm", "matrix"], ["y"]),
    ]
    matrix = np.full((2, 2), 1e6, np.float32)
    model = graph(nodes, two=np.array(2.0, np.float32), weight=np.ones(2, np.float32), matrix=matrix)
    to_half(model, dtype=BRAIN)
    types = {value.name: value.dtype for node in model.graph for value in node.outputs}
    assert [types[name] for name in ("squares", "mean", "root", "normed", "norm")] == 5 * [FLOAT]
    assert [types["norm.half"], types["y.inside"], types["y"]] == [BRAIN, BRAIN, FLOAT]
    assert model.graph.initializers["matrix"].dtype == BRAIN


def test_bfloat16_rounds_and_keeps_masks_finite() -> None:
    lowest = np.finfo(np.float32).min
    found = half_tensor(ir.tensor(np.array([1.0, 1 + 2**-9, lowest, -np.inf, 1e30], np.float32)), BRAIN)
    values = found.numpy().astype(np.float32)
    assert found.dtype == BRAIN
    assert values[[0, 1]].tolist() == [1.0, 1.0]
    assert values[2] == pytest.approx(lowest, rel=0.01)
    assert values[3] == -np.inf
    assert values[4] == pytest.approx(1e30, rel=0.01)
