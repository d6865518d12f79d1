"""A float32 graph computed in float16 or bfloat16.

Weights become narrow when the file is written, one at a time, so that no second copy of the model lies in memory.
What float16's range or ONNX's types forbid stays float32 between two Casts: squares and their means (a row of values
above 256 would overflow), trigonometry of positions, and what hangs on them by arithmetic with constants alone, such
as an RMS norm's epsilon.  bfloat16 has float32's range but eight significant bits, so the same nodes stay float32 for
their precision, and with them the division by a root that ends a norm.

Islands are further nodes that stay float32, because their values leave float16's range: `overflow.py` finds them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import DTypeLike, NDArray

from edgevlm.core.errors import UnsupportedError

FLOAT, HALF, BRAIN = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16
NARROW: Mapping[ir.DataType, DTypeLike] = {HALF: np.float16, BRAIN: ml_dtypes.bfloat16}
LARGEST = 65504.0  # in float16; what is larger becomes infinite
LARGEST_OF: Mapping[ir.DataType, float] = {HALF: LARGEST, BRAIN: 3.3895313892515355e38}
CHUNK = 1 << 20  # numbers that are narrowed together
CACHE = ("past_key_values.", "present.")

SQUARES = ("Pow", "Sqrt", "Reciprocal", "ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2", "ReduceProd")
WIDE = frozenset((*SQUARES, "Exp", "Log", "Sin", "Cos", "Range", "CumSum", "DynamicQuantizeLinear"))
FOLLOWING = frozenset(("Add", "Sub", "Mul", "Div", "Neg", "Clip"))  # wide where every other operand is constant
ROOTS = frozenset(("Sqrt", "Reciprocal"))  # of a norm: in bfloat16 what divides by them is wide, too
NEVER_ISLANDS = frozenset(("TensorScatter",))  # it writes into the kv cache, which has one type
ALWAYS_FLOAT_INPUTS: Mapping[str, tuple[int, ...]] = {"Resize": (2,), "Upsample": (1,), "DynamicQuantizeMatMul": (0, 2)}
ALWAYS_FLOAT_OUTPUTS: Mapping[str, tuple[int, ...]] = {  # statistics, and what DynamicQuantizeMatMul computes
    "LayerNormalization": (1, 2),
    "SimplifiedLayerNormalization": (1,),
    "SkipLayerNormalization": (1, 2),
    "SkipSimplifiedLayerNormalization": (1, 2),
    "DynamicQuantizeMatMul": (0,),
}
INT64_OUTPUTS = frozenset(("Shape", "Size", "NonZero", "ArgMax", "ArgMin"))
COMPARISONS = ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "IsNaN", "IsInf")
BOOL_OUTPUTS = frozenset((*COMPARISONS, "And", "Or", "Not", "Xor"))
TYPE_GIVING_INPUT: Mapping[str, int] = {"Where": 1, "DequantizeLinear": 1, "QuantizeLinear": 2}


def to_half(
    model: ir.Model,
    *,
    keep: Collection[str] | None = None,
    islands: Collection[str] = (),
    dtype: ir.DataType = HALF,
) -> None:
    """Turn the whole graph to ``dtype``, float16 or bfloat16, in place.

    The graph's inputs and outputs in ``keep`` stay float32 behind a Cast; by default all but the kv cache.  Nodes
    named in ``islands`` compute in float32 between Casts; names that the graph lacks are ignored, since graphs of one
    part share a list.  A weight beyond 65504 that is to become float16 raises UnsupportedError that names it; so does
    a graph with branches or loops.
    """
    kept = _kept(model.graph) if keep is None else frozenset(keep)
    Halving(model.graph, kept, frozenset(islands), dtype).run()


def usually_wide(graph: ir.Graph) -> frozenset[str]:
    """Names of the nodes that stay float32 in every float16 graph, without islands."""
    halving = Halving(graph, frozenset(), frozenset(), HALF)
    halving.find_wide_nodes()
    return frozenset(node.name or "" for node in halving.wide)


def _kept(graph: ir.Graph) -> frozenset[str]:
    names = (value.name or "" for value in (*graph.inputs, *graph.outputs))
    return frozenset(name for name in names if not name.startswith(CACHE))


class Halving:
    """One graph on its way to a narrow type: what is float32 now, what stays so, and the Casts between."""

    def __init__(self, graph: ir.Graph, keep: frozenset[str], islands: frozenset[str], dtype: ir.DataType) -> None:
        assert dtype in NARROW, f"{dtype.name} is no narrow float type"
        self.graph, self.keep, self.islands, self.dtype = graph, keep, islands, dtype
        self.nodes = tuple(graph)
        self.types = element_types(graph)
        self.wide: set[ir.Node] = set()
        self.casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self.outputs = {value: value.name for value in graph.outputs}

    def run(self) -> None:
        self.find_wide_nodes()
        wide_outputs = {value for node in self.nodes for value in node.outputs if self._output_type(value) == FLOAT}
        floats = {value for value, dtype in self.types.items() if dtype == FLOAT}
        for value in floats - wide_outputs:
            if not (value.is_graph_input() and value.name in self.keep):
                self._narrow(value)
        for node in self.nodes:
            self._convert_attributes(node)
            self._cast_inputs(node, floats)
        for index, value in enumerate(tuple(self.graph.outputs)):
            if value in floats:
                self._settle_output(index, value)
        self._drop_unused_weights()

    def find_wide_nodes(self) -> None:
        """Fill ``wide``; UnsupportedError for a graph with branches or loops."""
        for node in self.nodes:
            if any(
                attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
                for attribute in node.attributes.values()
            ):
                raise UnsupportedError(
                    f"{node.op_type} ({node.name}): a graph with branches cannot be turned to fp16; take fp32"
                )
            if self._stays_wide(node):
                self.wide.add(node)
        for node in reversed(self.nodes):  # what makes another's scales comes after it
            if node.op_type == "DequantizeLinear":
                self._widen_for_readers(node)

    def _stays_wide(self, node: ir.Node) -> bool:
        """Whether ``node``, whose inputs' producers are settled, computes in float32."""
        if node.op_type in WIDE or (node.name in self.islands and node.op_type not in NEVER_ISLANDS):
            return True
        varying = [value for value in node.inputs if value is not None and not self._is_constant(value)]
        from_wide = [value.producer() in self.wide for value in varying]
        if self.dtype == BRAIN and node.op_type in ("Div", "Mul") and self._reads_root(varying):
            return True
        return node.op_type in FOLLOWING and bool(varying) and all(from_wide)

    def _reads_root(self, values: Collection[ir.Value]) -> bool:
        producers = (value.producer() for value in values)
        return any(producer is not None and producer.op_type in ROOTS for producer in producers)

    def _widen_for_readers(self, node: ir.Node) -> None:
        """Let codes that only float32 nodes read become float32, so that no Cast stands between.

        A QuantizeLinear before shares its scale with all that undo it, so these have one type.
        """
        rounding = node.inputs[0].producer() if node.inputs[0] is not None else None
        undoing = [node] if rounding is None else [reader for reader, _ in rounding.outputs[0].uses()]
        if all(self._serves_wide_nodes(reader) for reader in undoing):
            self.wide.update(undoing)
            self.wide.update([] if rounding is None else [rounding])

    def _serves_wide_nodes(self, node: ir.Node) -> bool:
        readers = [reader for value in node.outputs for reader, _ in value.uses()]
        final = any(value.is_graph_output() for value in node.outputs)
        return bool(readers) and not final and all(reader in self.wide for reader in readers)

    def _is_constant(self, value: ir.Value) -> bool:
        producer = value.producer()
        return value.is_initializer() or (producer is not None and producer.op_type == "Constant")

    def _output_type(self, value: ir.Value) -> ir.DataType | None:
        """The float type that a node's output will have; None for what is no float32 now."""
        node = value.producer()
        assert node is not None
        if self.types.get(value) != FLOAT:
            return None
        always = value.index() in ALWAYS_FLOAT_OUTPUTS.get(node.op_type, ())
        return FLOAT if node in self.wide or always else self.dtype

    def _narrow(self, value: ir.Value) -> None:
        """Declare ``value`` narrow; a weight that only wide nodes read stays as it is."""
        if value.is_initializer():
            if all(self._wants(node, index) == FLOAT for node, index in value.uses()) and not value.is_graph_output():
                return
            assert value.const_value is not None
            value.const_value = half_tensor(value.const_value, self.dtype)
        value.type = ir.TensorType(self.dtype)

    def _wants(self, node: ir.Node, index: int) -> ir.DataType:
        always = index in ALWAYS_FLOAT_INPUTS.get(node.op_type, ())
        return FLOAT if node in self.wide or always else self.dtype

    def _convert_attributes(self, node: ir.Node) -> None:
        """Tensors and types that attributes speak of."""
        if node in self.wide:
            return
        if node.op_type == "Cast" and node.attributes["to"].as_int() == FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", int(self.dtype))
        for name, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == FLOAT:
                node.attributes[name] = ir.AttrTensor(name, half_tensor(attribute.as_tensor(), self.dtype))
        if node.op_type == "Constant" and "value_float" in node.attributes:
            number = np.array(node.attributes.pop("value_float").as_float(), np.float32)
            node.attributes["value"] = ir.AttrTensor("value", half_tensor(ir.tensor(number), self.dtype))
        if node.op_type == "ConstantOfShape" and "value" not in node.attributes:
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(np.zeros(1, NARROW[self.dtype])))

    def _cast_inputs(self, node: ir.Node, floats: set[ir.Value]) -> None:
        if node.op_type == "Cast":  # reads whatever it gets
            return
        for index, value in enumerate(node.inputs):
            if value is not None and value in floats and self._now(value) != self._wants(node, index):
                node.replace_input_with(index, self._cast(value, self._wants(node, index)))

    def _now(self, value: ir.Value) -> ir.DataType:
        """The float type that ``value`` has by now."""
        if value.producer() is None:
            return self.dtype if value.dtype == self.dtype else FLOAT
        return self._output_type(value) or self.dtype

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """``value`` as ``dtype``: one Cast, whoever reads it."""
        if (value, dtype) not in self.casts:
            name = f"{value.name}.{'wide' if dtype == FLOAT else 'half'}"
            node = cast_node(value, dtype, name)
            producer = value.producer()
            if producer is None:
                self.graph.insert_before(self.graph[0], node)
            else:
                self.graph.insert_after(producer, node)
            self.casts[value, dtype] = node.outputs[0]
        return self.casts[value, dtype]

    def _settle_output(self, index: int, value: ir.Value) -> None:
        """Give the graph's output the type that the caller wants, under its own name."""
        name = self.outputs[value]
        wanted = FLOAT if name in self.keep else self.dtype
        if self._now(value) == wanted:
            value.type = ir.TensorType(wanted)
            return
        outside = self._cast(value, wanted)
        if not value.is_graph_input():
            value.name, outside.name = f"{name}.inside", name
        outside.shape = value.shape
        self.graph.outputs[index] = outside

    def _drop_unused_weights(self) -> None:
        for name, value in list(self.graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del self.graph.initializers[name]


def cast_node(value: ir.Value, dtype: ir.DataType, name: str) -> ir.Node:
    """A Cast of ``value`` whose output is called ``name``."""
    output = ir.Value(name=name, shape=value.shape, type=ir.TensorType(dtype))
    return ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(dtype))], outputs=[output], name=f"node.{name}")


def half_tensor(tensor: ir.TensorProtocol, dtype: ir.DataType = HALF) -> ir.TensorProtocol:
    """``tensor`` as ``dtype``, made when the file is written; UnsupportedError at once if it does not fit."""
    if dtype == HALF:
        _halved(tensor, dtype)
    shape = ir.Shape(tensor.shape.numpy())
    return ir.LazyTensor(partial(_halved, tensor, dtype), dtype, shape, name=tensor.name)


def _halved(tensor: ir.TensorProtocol, dtype: ir.DataType) -> ir.TensorProtocol:
    """Piece by piece, so that nothing else of the tensor's size lies in memory."""
    wide = tensor.numpy()
    flat, narrow = wide.reshape(-1), np.empty(wide.size, NARROW[dtype])
    for start in range(0, wide.size, CHUNK):
        piece = slice(start, start + CHUNK)
        narrow[piece] = _narrowed(flat[piece], dtype, tensor.name)
    return ir.tensor(narrow.reshape(wide.shape), name=tensor.name)


def _narrowed(wide: NDArray[np.float32], dtype: ir.DataType, name: str | None) -> NDArray[Any]:
    """Infinity stays what it is; float32's own extremes, of which masks are made, become the narrow type's."""
    with np.errstate(over="ignore"):
        narrow = wide.astype(NARROW[dtype])
    overflows = np.isinf(narrow) & np.isfinite(wide)
    if not overflows.any():
        return narrow
    if dtype == HALF and np.any(np.abs(wide[overflows]) < np.finfo(np.float32).max):
        raise UnsupportedError(
            f"{name or 'a constant'} holds {np.abs(wide[overflows]).max():.3g}, float16 ends at {LARGEST:.0f}: "
            f"take --precision fp32 for this part"
        )
    return np.where(overflows, np.copysign(np.float32(LARGEST_OF[dtype]), wide), narrow).astype(NARROW[dtype])


def element_types(graph: ir.Graph) -> dict[ir.Value, ir.DataType]:
    """The element type of every value: as declared, else as its operator makes it of its inputs'."""
    types: dict[ir.Value, ir.DataType] = {}
    for value in (*graph.inputs, *graph.initializers.values()):
        dtype = value.const_value.dtype if value.const_value is not None else value.dtype
        if dtype is not None:
            types[value] = dtype
    for node in graph:
        for index, value in enumerate(node.outputs):
            dtype = value.dtype or _made_type(node, index, types)
            if dtype is not None:
                types[value] = dtype
    return types


def _made_type(node: ir.Node, index: int, types: Mapping[ir.Value, ir.DataType]) -> ir.DataType | None:
    """What the operator's output ``index`` is made of, where nobody declared it."""
    kind = node.op_type
    if kind in INT64_OUTPUTS or (kind == "TopK" and index == 1):
        return ir.DataType.INT64
    if kind in BOOL_OUTPUTS:
        return ir.DataType.BOOL
    if kind in ("MatMulInteger", "ConvInteger"):
        return ir.DataType.INT32
    if kind == "DynamicQuantizeLinear":
        return FLOAT if index == 1 else ir.DataType.UINT8
    if kind == "Cast":
        return ir.DataType(node.attributes["to"].as_int())
    if kind in ("Constant", "ConstantOfShape"):
        return _constant_type(node)
    if index in ALWAYS_FLOAT_OUTPUTS.get(kind, ()):
        return FLOAT
    giving = TYPE_GIVING_INPUT.get(kind, 0)
    value = node.inputs[giving] if giving < len(node.inputs) else None
    return None if value is None else types.get(value)


def _constant_type(node: ir.Node) -> ir.DataType | None:
    if "value" in node.attributes:
        return node.attributes["value"].as_tensor().dtype
    if "value_int" in node.attributes or "value_ints" in node.attributes:
        return ir.DataType.INT64
    return FLOAT
