"""Typed graphs on an engine that computes in float32: what is rounded, what overflows, and what cannot be run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgevlm.core.errors import MissingLibraryError, UnsupportedError
from edgevlm.runtimes.ort_devices import device_of
from edgevlm.runtimes.ort_graph import session_options
from edgevlm.runtimes.typed_graph import rounding_graph
from edgevlm.runtimes.typed_on_cpu import _let_read

FLOAT, HALF, BRAIN = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16
OPSETS = [helper.make_opsetid("", 23), helper.make_opsetid("other", 1)]
NUMPY = {FLOAT: np.float32, HALF: np.float16, BRAIN: ml_dtypes.bfloat16}


def saved(
    folder: Path,
    nodes: Sequence[Any],
    dtype: int,
    *,
    constants: Sequence[Any] = (),
    shape: Sequence[int | str] = ("n",),
    external: bool = False,
) -> Path:
    """A graph from x to y, both of ``dtype``."""
    x, y = (helper.make_tensor_value_info(name, dtype, shape) for name in ("x", "y"))
    graph = helper.make_graph(list(nodes), "g", [x], [y], initializer=list(constants))
    model = helper.make_model(graph, opset_imports=OPSETS, ir_version=11)
    path = folder / "g.onnx"
    onnx.save_model(model, str(path), save_as_external_data=external, location="g.onnx_data", size_threshold=64)
    return path


def run(path: Path, numbers: NDArray[Any]) -> NDArray[np.float32]:
    graph = rounding_graph(path)
    options = session_options("vision_encoder", 1, device_of("cpu"))
    held = _let_read(options, graph)
    session = onnxruntime.InferenceSession(graph.model, options, providers=["CPUExecutionProvider"])
    found: NDArray[np.float32] = session.run(["y"], {"x": numbers.astype(np.float32)})[0]
    assert held is not None
    return found


def node(kind: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> Any:
    return helper.make_node(kind, list(inputs), list(outputs), **attributes)


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
def test_every_node_rounds_as_its_output_is_typed(tmp_path: Path, dtype: int) -> None:
    path = saved(tmp_path, [node("Mul", "xx", ["a"]), node("Add", ["a", "x"], ["y"])], dtype)
    x = np.linspace(-3, 3, 101).astype(NUMPY[dtype]).astype(np.float32)
    narrow = NUMPY[dtype]
    expected = ((x * x).astype(narrow).astype(np.float32) + x).astype(narrow).astype(np.float32)
    assert np.array_equal(run(path, x), expected)


def test_what_leaves_float16_becomes_infinite_as_on_a_gpu(tmp_path: Path) -> None:
    path = saved(tmp_path, [node("Mul", "xx", ["a"]), node("Sqrt", ["a"], ["y"])], HALF)
    x = np.array([300.0, 2.0], np.float16)
    as_it_is = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(["y"], {"x": x})[0]
    assert as_it_is.tolist() == [300.0, 2.0]  # onnxruntime leaves the Casts between its float32 kernels out
    assert run(path, x).tolist() == [np.inf, 2.0]


def test_nodes_in_float32_stay_exact(tmp_path: Path) -> None:
    nodes = [
        node("Cast", ["x"], ["wide"], to=FLOAT),
        node("Mul", ["wide", "wide"], ["squares"]),
        node("Sqrt", ["squares"], ["roots"]),
        node("Cast", ["roots"], ["y"], to=HALF),
    ]
    assert run(saved(tmp_path, nodes, HALF), np.array([300.0])).tolist() == [300.0]


def test_inputs_are_rounded_but_not_the_rows_of_the_cache(tmp_path: Path) -> None:
    path = saved(tmp_path, [node("Identity", ["x"], ["y"])], HALF)
    assert run(path, np.array([1 + 2.0**-12])).tolist() == [1.0]
    model = onnx.load(path)
    model.graph.input[0].name = model.graph.node[0].input[0] = "past_key_values.0.key"
    onnx.save(model, path)
    kinds = [one.op_type for one in onnx.load_from_string(rounding_graph(path).model).graph.node]
    assert kinds == ["Identity"]


def test_constants_of_nodes_and_files_keep_their_numbers(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.arange(64, dtype=np.float16) / 7, "w")
    nodes = [
        node("Constant", [], ["c"], value=numpy_helper.from_array(np.array([0.1], np.float16))),
        node("Mul", ["x", "w"], ["a"]),
        node("Add", ["a", "c"], ["y"]),
    ]
    path = saved(tmp_path, nodes, HALF, constants=[weight], shape=(64,), external=True)
    x = np.ones(64, np.float16)
    expected = ((np.arange(64, dtype=np.float16) / 7).astype(np.float32) + np.float16(0.1)).astype(np.float16)
    assert np.array_equal(run(path, x), expected.astype(np.float32))


@pytest.mark.parametrize("external", [False, True])
def test_codes_of_four_bits_are_read(tmp_path: Path, external: bool) -> None:
    generator = np.random.default_rng(0)
    codes = helper.make_tensor(
        "codes", TensorProto.FLOAT4E2M1, [32, 32], generator.integers(0, 256, 512).astype(np.uint8).tobytes(), raw=True
    )
    blocks = (generator.random((2, 32)) + 0.5).astype(ml_dtypes.float8_e4m3fn)
    scales = helper.make_tensor("scales", TensorProto.FLOAT8E4M3FN, [2, 32], blocks.tobytes(), raw=True)
    nodes = [
        node("DequantizeLinear", ["scales", "global"], ["wide"]),
        node("DequantizeLinear", ["codes", "wide"], ["w"], axis=0, block_size=16),
        node("Mul", ["x", "w"], ["y"]),
    ]
    whole = numpy_helper.from_array(np.array(0.01, np.float16), "global")
    path = saved(tmp_path, nodes, HALF, constants=[codes, scales, whole], shape=(32, 32), external=external)
    assert bool(rounding_graph(path).widened) == external
    scale = (blocks.astype(np.float32) * np.float32(np.float16(0.01))).astype(np.float16).astype(np.float32)
    weights = numpy_helper.to_array(codes).astype(np.float32) * scale.repeat(16, axis=0)
    expected = weights.astype(np.float16).astype(np.float32)
    assert np.array_equal(run(path, np.ones((32, 32), np.float16)), expected)


def test_quantized_matmuls_are_computed_as_they_are_written(tmp_path: Path) -> None:
    scale, zero = (numpy_helper.from_array(array, name) for array, name in QUANTIZATION)
    nodes = [node("QuantizeLinear", ["x", "s", "z"], ["q"]), node("DequantizeLinear", ["q", "s"], ["y"])]
    found = run(saved(tmp_path, nodes, HALF, constants=[scale, zero]), np.array([0.26, 1000.0, -1000.0], np.float16))
    step = np.float16(0.1)
    assert found.tolist() == [float(np.float16(step * n)) for n in (3, 127, -128)]


QUANTIZATION = ((np.array(0.1, np.float16), "s"), (np.array(0, np.int8), "z"))


def test_without_onnx_the_command_that_brings_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, [node("Identity", ["x"], ["y"])], HALF)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingLibraryError, match=r"onnx .*pip install 'edgevlm\[workshop\]'"):
        rounding_graph(path)


def test_graphs_with_branches_are_refused(tmp_path: Path) -> None:
    y = helper.make_tensor_value_info("y", HALF, ["n"])
    branch = helper.make_graph([node("Identity", ["x"], ["y"])], "branch", [], [y])
    yes = numpy_helper.from_array(np.array(True), "yes")
    path = saved(tmp_path, [node("If", ["yes"], ["y"], then_branch=branch, else_branch=branch)], HALF, constants=[yes])
    with pytest.raises(UnsupportedError, match=r"If .* branches"):
        rounding_graph(path)


def test_a_type_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    nodes = [node("Riddle", ["x"], ["a"], domain="other"), node("Identity", ["a"], ["y"])]
    with pytest.raises(UnsupportedError, match=r"Riddle .* the type of its output a"):
        rounding_graph(saved(tmp_path, nodes, HALF))
