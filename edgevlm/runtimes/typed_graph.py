"""A typed graph as a float32 graph that rounds as its types say, for an engine that computes in float32 anyway.

ONNX Runtime's CPU kernels of float16 are mostly float32 ones between Casts, of which it drops those in the middle: a
number beyond 65504 passes where a GPU gets infinity, and of bfloat16 it computes next to nothing.  So every node that
computes is followed by a pair of Casts, to the type that its output had and back.  That rounds where a GPU rounds if
it runs node by node; what its kernels do in one go it may round less often.

Constants keep their files: a Cast stands behind each one that is narrow, which ONNX Runtime computes when it loads.
Numbers of FLOAT4E2M1, which it cannot read, become FLOAT8E4M3FN, which holds every one of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgevlm.core.errors import UnsupportedError
from edgevlm.core.optional import require

FLOAT, FLOAT16, BFLOAT16, FLOAT8E4M3FN, FLOAT4E2M1 = 1, 10, 16, 17, 23  # of TensorProto.DataType
NARROW = (FLOAT16, BFLOAT16)
TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype", "softmax_precision")
MOVING = frozenset(  # give on what they were given: nothing to round
    (
        *("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Expand", "Tile", "Pad", "Where"),
        *("Concat", "Split", "Slice", "Gather", "GatherND", "GatherElements", "TensorScatter"),
        *("Constant", "ConstantOfShape", "DepthToSpace", "SpaceToDepth", "Trilu"),
        *("Max", "Min", "MaxPool", "GlobalMaxPool", "ReduceMax", "ReduceMin", "Relu", "Neg", "Abs"),
    )
)
PAST = "past_key_values."  # rows that the graph itself has rounded


@dataclass(frozen=True, eq=False)
class RoundingGraph:
    """A graph without its external files, which lie in ``folder``; ``widened``: external constants, by name, in
    FLOAT8E4M3FN as bytes."""

    model: bytes
    folder: Path
    widened: Mapping[str, Any]


def rounding_graph(file: Path) -> RoundingGraph:
    """The graph in ``file`` in float32, rounding to the types that its tensors had; its inputs and outputs are float32.

    Raises MissingLibraryError without onnx, UnsupportedError for a graph with branches or loops, or with a tensor whose
    type nobody can know.
    """
    onnx = require("onnx")
    model = onnx.load(str(file), load_external_data=False)
    rounding = _Rounding(model, file.parent)
    rounding.run()
    return RoundingGraph(model.SerializeToString(), file.parent, rounding.widened)


@dataclass(eq=False)
class _Rounding:
    """One graph on its way, in place."""

    model: Any
    folder: Path
    widened: dict[str, Any] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)  # of narrow tensors that come in wide under another name

    def run(self) -> None:
        graph, types = self.model.graph, self._types()
        nodes = [*self._inputs(), *self._constants()]
        for node in graph.node:
            nodes += self._node(node, types)
        del graph.node[:], graph.value_info[:]
        graph.node.extend(nodes)
        for value in graph.output:
            _declare_float(value)

    def _types(self) -> dict[str, int]:
        """The element type of every tensor that somebody declares or that can be inferred."""
        inferred = require("onnx").shape_inference.infer_shapes(self.model).graph
        values = (*inferred.input, *inferred.value_info, *inferred.output)
        declared = {value.name: int(value.type.tensor_type.elem_type) for value in values}
        return declared | {constant.name: int(constant.data_type) for constant in inferred.initializer}

    def _inputs(self) -> Iterator[Any]:
        """What rounds narrow inputs, which come in float32; not the rows of the kv cache, which are round."""
        for value in self.model.graph.input:
            dtype = int(value.type.tensor_type.elem_type)
            _declare_float(value)
            if dtype in NARROW and not value.name.startswith(PAST):
                self.names[value.name] = wide = f"{value.name}.rounded"
                yield from _rounded(value.name, wide, dtype)

    def _constants(self) -> Iterator[Any]:
        for constant in self.model.graph.initializer:
            if constant.data_type in NARROW:
                self.names[constant.name] = wide = f"{constant.name}.wide"
                yield _cast(constant.name, wide, FLOAT)
            if constant.data_type == FLOAT4E2M1:
                self._widen_codes(constant)

    def _widen_codes(self, constant: Any) -> None:
        onnx, helper = require("onnx"), require("onnx.numpy_helper")
        codes = helper.to_array(constant, base_dir=str(self.folder))
        as_bytes = codes.astype(onnx.helper.tensor_dtype_to_np_dtype(FLOAT8E4M3FN)).view("uint8")
        external = constant.data_location == onnx.TensorProto.EXTERNAL
        constant.data_type = FLOAT8E4M3FN
        if external:  # too large to stand in the model
            self.widened[constant.name] = as_bytes
            return
        for name in ("int32_data", "raw_data"):
            constant.ClearField(name)
        constant.raw_data = as_bytes.tobytes()

    def _node(self, node: Any, types: Mapping[str, int]) -> Iterator[Any]:
        """``node`` in float32, and behind it what rounds its outputs."""
        _widen_attributes(node)
        node.input[:] = [self.names.get(name, name) for name in node.input]
        behind: list[Any] = []
        for index, name in enumerate(node.output):
            if not name or node.op_type in MOVING:
                continue
            if name not in types:
                raise UnsupportedError(f"{node.op_type} ({node.name}): nobody can know the type of its output {name}")
            if types[name] in NARROW:
                node.output[index] = f"{name}.exact"
                behind += _rounded(f"{name}.exact", name, types[name])
        yield node
        yield from behind


def _widen_attributes(node: Any) -> None:
    """Types and constants that a node speaks of."""
    onnx, helper = require("onnx"), require("onnx.numpy_helper")
    for attribute in node.attribute:
        if attribute.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS):
            raise UnsupportedError(f"{node.op_type} ({node.name}): a graph with branches cannot be run in its types")
        if attribute.name in TYPE_ATTRIBUTES and attribute.i in NARROW:
            attribute.i = FLOAT
        if attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type in NARROW:
            wide = helper.to_array(attribute.t).astype("float32")
            attribute.t.CopyFrom(helper.from_array(wide, attribute.t.name))


def _rounded(name: str, rounded: str, dtype: int) -> list[Any]:
    """Nodes that round the float32 tensor ``name`` to ``dtype`` and give it in float32 again."""
    return [_cast(name, f"{rounded}.narrow", dtype), _cast(f"{rounded}.narrow", rounded, FLOAT)]


def _cast(name: str, output: str, dtype: int) -> Any:
    return require("onnx").helper.make_node("Cast", [name], [output], name=f"{output}.cast", to=dtype)


def _declare_float(value: Any) -> None:
    if value.type.tensor_type.elem_type in NARROW:
        value.type.tensor_type.elem_type = FLOAT
