"""Which nodes of a graph float16 cannot hold: those that make or read values beyond its range.

The float32 graph runs in ONNX Runtime on calibration inputs and gives, of every float tensor, the least and the
greatest value, so that memory stays that of one input.  A tensor that comes near float16's end is wide: what makes it
and what reads it computes in float32, since a Cast of it would be infinite too.  What only moves values about, such as
a Slice, passes on wide ones even where none was seen behind it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgevlm.core.errors import UnsupportedError
from edgevlm.export.half_graph import CACHE, FLOAT, LARGEST, NEVER_ISLANDS, element_types, usually_wide
from edgevlm.export.ranges import new_node, outputs_of

Array: TypeAlias = NDArray[Any]

USUAL = LARGEST / 4  # calibration sees a few inputs, others may hold larger values
HIDING = -1e4  # a single constant below it hides what a row may not see, as the extremes of float32 do
BOUNDS = {"ReduceMin": "low", "ReduceMax": "high"}
MOVING = frozenset(
    (
        *("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Expand", "Tile", "Pad", "Slice"),
        *("Split", "Gather", "GatherElements", "GatherND", "DepthToSpace", "SpaceToDepth", "Concat"),
    )
)  # their first input's values, unchanged; Concat: those of all


def overflowing_nodes(
    model: ir.Model, feeds: Sequence[Mapping[str, Array]], *, largest: float = USUAL
) -> tuple[str, ...]:
    """Names of the nodes, in the graph's order, that ``to_half`` should keep float32: its ``islands``.

    ``feeds`` are the float32 graph's inputs by name; a tensor whose magnitude exceeds ``largest`` on one of them counts
    as wide, and so does a weight beyond 65504.  Nodes that are float32 in every float16 graph are left out.  Raises
    UnsupportedError without feeds, for values that are not finite, and for keys or values of the kv cache beyond 65504.
    """
    if not feeds:
        raise UnsupportedError("float16 needs calibration inputs to find what overflows; give at least one")
    graph = model.graph
    magnitudes = _magnitudes(model, feeds, largest)
    _check_cache(graph, magnitudes)
    wide = {name for name, magnitude in magnitudes.items() if magnitude > largest}
    _follow(graph, wide)
    wide.update(_heavy_constants(graph))
    known = usually_wide(graph)
    found = (node for node in graph if _touches(node, wide) and node.op_type not in NEVER_ISLANDS)
    return tuple(_name(node) for node in found if _name(node) not in known)


def _magnitudes(model: ir.Model, feeds: Iterable[Mapping[str, Array]], largest: float) -> dict[str, float]:
    """The largest magnitude of every float tensor that is no constant."""
    names = [value.name or "" for value in _varying(model.graph)]
    outputs = [f"{name}.{bound}" for name in names for bound in BOUNDS.values()]
    highest = np.zeros(len(outputs), np.float64)
    for found in outputs_of(_watched(model, names, largest), outputs, feeds, part="the graph"):
        extremes = np.abs(np.array(found, np.float64))
        extremes[[np.isinf(extremes[i]) and _is_empty(found, i) for i in range(len(found))]] = 0.0
        highest = np.maximum(highest, extremes)
    magnitudes = dict(zip(names, highest.reshape(-1, len(BOUNDS)).max(axis=1).tolist(), strict=True))
    for name, magnitude in magnitudes.items():
        if not np.isfinite(magnitude):
            raise UnsupportedError(f"{name} is not finite on a calibration input: take fp32 or bf16 for this part")
    return magnitudes


def _is_empty(found: Sequence[Array], index: int) -> bool:
    """Whether the tensor of bound ``index`` has no values: then its least is above its greatest."""
    first = index - index % len(BOUNDS)
    return bool(found[first] > found[first + 1])


def _varying(graph: ir.Graph) -> Iterator[ir.Value]:
    """Float inputs and what nodes make of them."""
    types = element_types(graph)
    made = (value for node in graph if node.op_type != "Constant" for value in node.outputs)
    for value in (*graph.inputs, *made):
        if types.get(value) == FLOAT and value.name and not value.name.startswith(CACHE[0]):
            yield value


def _watched(model: ir.Model, names: Sequence[str], largest: float) -> ir.Model:
    """A copy of ``model`` that also gives ``{name}.low`` and ``{name}.high``."""
    model = model.clone()
    graph = model.graph
    values = {value.name: value for value in (*graph.inputs, *(output for node in graph for output in node.outputs))}
    _soften_masks(graph, largest)
    for name in names:
        for kind, bound in BOUNDS.items():
            node = new_node(kind, [values[name]], f"{name}.{bound}", keepdims=0)
            graph.append(node)
            graph.outputs.append(node.outputs[0])
    return model


def _soften_masks(graph: ir.Graph, largest: float) -> None:
    """Let constants that hide keys hide them with half of ``largest``: what is added to them is what counts."""
    for value, tensor in _constants(graph):
        numbers = tensor.numpy()
        hiding = _hides(numbers)
        if not hiding.any():
            continue
        softer = ir.tensor(np.where(hiding, np.float32(-largest / 2), numbers), name=tensor.name)
        producer = value.producer()
        if producer is None:
            value.const_value = softer
        else:
            producer.attributes.clear()
            producer.attributes["value"] = ir.AttrTensor("value", softer)


def _hides(numbers: Array) -> NDArray[np.bool_]:
    """Which of ``numbers`` stand for "do not look": extremes of float32, and a lone number below ``HIDING``."""
    limit = HIDING if numbers.size == 1 else np.finfo(np.float32).min / 2
    return np.asarray(numbers < limit)


def _constants(graph: ir.Graph) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
    """Float weights and constants, with their values."""
    for value in graph.initializers.values():
        if value.const_value is not None and value.const_value.dtype == FLOAT:
            yield value, value.const_value
    for node in graph:
        if node.op_type == "Constant" and "value" in node.attributes:
            tensor = node.attributes["value"].as_tensor()
            if tensor.dtype == FLOAT:
                yield node.outputs[0], tensor
        elif node.op_type == "Constant" and "value_float" in node.attributes:
            number = np.array(node.attributes["value_float"].as_float(), np.float32)
            yield node.outputs[0], ir.tensor(number)


def _heavy_constants(graph: ir.Graph) -> Iterator[str]:
    """Names of the constants that float16 cannot hold; float32's extremes become its own."""
    for value, tensor in _constants(graph):
        numbers = tensor.numpy()
        magnitude = max(float(numbers.max()), -float(numbers.min())) if numbers.size else 0.0
        if LARGEST < magnitude < np.finfo(np.float32).max:
            yield value.name or ""


def _check_cache(graph: ir.Graph, magnitudes: Mapping[str, float]) -> None:
    for value in graph.outputs:
        name = value.name or ""
        if name.startswith(CACHE[1]) and magnitudes.get(name, 0.0) > LARGEST:
            raise UnsupportedError(
                f"{name} holds {magnitudes[name]:.3g}, a kv cache in float16 ends at {LARGEST:.0f}: take bf16 or fp32"
            )


def _follow(graph: ir.Graph, wide: set[str]) -> None:
    """Add what moving nodes make of wide tensors."""
    for node in graph:
        sources = node.inputs if node.op_type == "Concat" else node.inputs[:1]
        if node.op_type in MOVING and any(source is not None and source.name in wide for source in sources):
            wide.update(value.name or "" for value in node.outputs)


def _touches(node: ir.Node, wide: set[str]) -> bool:
    values = (*node.inputs, *node.outputs)
    return any(value is not None and value.name in wide for value in values)


def _name(node: ir.Node) -> str:
    assert node.name, f"a {node.op_type} has no name: nothing could be said about it"
    return node.name
