"""Which range of values each tensor of a graph takes on given pictures.

The graph runs in ONNX Runtime with a few more nodes: of every tensor in question it gives the extremes and an even
sample of its values, so that memory stays that of one picture.  The range is then chosen so that rounding to 8 bits
costs the least squared error.  Extremes count as single values: a tensor with a few large ones, which transformers
need, keeps them where they matter and loses them where they do not.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgevlm.core.errors import UnsupportedError

Float: TypeAlias = NDArray[np.float32]
Range: TypeAlias = tuple[float, float]

NUM_SAMPLED = 4096  # values of a tensor and batch
SHARES = tuple(np.linspace(1.0, 0.3, 36).tolist())  # of the extremes, tried on each side
LEVELS = 255


@dataclass(frozen=True, eq=False)
class Seen:
    """What a tensor was: its extremes in every batch, and a sample whose values stand for ``num_each`` each."""

    extremes: Float
    sample: Float
    num_each: int


def observed_ranges(model: ir.Model, values: Sequence[ir.Value], batches: Sequence[Float]) -> dict[ir.Value, Range]:
    """(low, high) of each of ``values`` over ``batches`` of the graph's only input.

    Raises UnsupportedError without batches, for pictures that the graph cannot read, and for values that are not
    finite.
    """
    if not batches:
        raise UnsupportedError("int8 needs pictures to find its ranges from; give at least one")
    seen = _seen(model, [value.name or "" for value in values], batches)
    return {value: best_range(seen[value.name or ""]) for value in values}


def best_range(seen: Seen) -> Range:
    """The range (low, high), zero included, whose 256 levels round with the least squared error.

    One side is chosen after the other.
    """
    values = np.concatenate((seen.extremes, seen.sample))
    weights = np.concatenate((np.ones(seen.extremes.size), np.full(seen.sample.size, seen.num_each)))
    low, high = min(float(seen.extremes.min()), 0.0), max(float(seen.extremes.max()), 0.0)

    def cost(bounds: Range) -> float:
        return float(weights @ np.square(_rounded(values, bounds) - values))

    low, high = min(((low, high * share) for share in SHARES), key=cost)
    return min(((low * share, high) for share in SHARES), key=cost)


def _rounded(values: Float, bounds: Range) -> Float:
    """``values`` as 8 bits with these bounds hold them."""
    step = (bounds[1] - bounds[0]) / LEVELS or 1.0
    zero = round(-bounds[0] / step)
    codes = np.clip(np.rint(values / step) + zero, 0, LEVELS)
    return np.asarray((codes - zero) * step, np.float32)


def _seen(model: ir.Model, names: Sequence[str], batches: Sequence[Float]) -> dict[str, Seen]:
    watched, steps = _watched(model, names)
    kinds = [f"{name}.{kind}" for name in names for kind in ("low", "high", "sample")]
    rows = _outputs(watched, kinds, batches)
    found = {}
    for index, name in enumerate(names):
        low, high, sample = (np.concatenate([row[3 * index + kind].ravel() for row in rows]) for kind in range(3))
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise UnsupportedError(f"{name} is not finite on a calibration picture: take fp32 for this encoder")
        found[name] = Seen(np.concatenate((low, high)), sample, steps[name])
    return found


def _outputs(model: ir.Model, names: Sequence[str], batches: Sequence[Float]) -> list[list[Float]]:
    """The named outputs for every batch."""
    import onnxruntime

    with tempfile.TemporaryDirectory(prefix="edgevlm-ranges-") as folder:
        path = Path(folder) / "watched.onnx"
        ir.save(model, path, external_data=f"{path.name}_data")
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        source = session.get_inputs()[0].name
        try:
            return [session.run(list(names), {source: batch}) for batch in batches]
        except Exception as error:
            found = " ".join(str(error).split())[:300]
            raise UnsupportedError(f"the encoder cannot read a calibration picture: {found}") from error


def _watched(model: ir.Model, names: Sequence[str]) -> tuple[ir.Model, dict[str, int]]:
    """A copy of ``model`` that also gives ``{name}.low``, ``.high`` and ``.sample``, and how far apart samples lie."""
    model = model.clone()
    graph = model.graph
    values = {value.name: value for value in (*graph.inputs, *(output for node in graph for output in node.outputs))}
    steps = {name: _step(values[name]) for name in names}
    for name in names:
        nodes = _watching_nodes(graph, values[name], name, steps[name])
        graph.extend(nodes)
        graph.outputs.extend(node.outputs[0] for node in nodes[1:])
    return model, steps


def _step(value: ir.Value) -> int:
    """How far apart the sampled values of a batch of one lie; odd, so as not to sample one column."""
    sizes = [size for size in (value.shape or ()) if isinstance(size, int)]
    return math.prod(sizes) // NUM_SAMPLED | 1


def _watching_nodes(graph: ir.Graph, value: ir.Value, name: str, step: int) -> list[ir.Node]:
    """``value`` in one row, then its least, its greatest and every ``step``-th number."""
    flat = _node("Reshape", [value, _integer(graph, f"{name}.flat.shape", -1)], f"{name}.flat")
    row = flat.outputs[0]
    bounds = [_integer(graph, f"{name}.{label}", number) for label, number in _slice_bounds(step)]
    return [
        flat,
        _node("ReduceMin", [row], f"{name}.low", keepdims=0),
        _node("ReduceMax", [row], f"{name}.high", keepdims=0),
        _node("Slice", [row, *bounds], f"{name}.sample"),
    ]


def _slice_bounds(step: int) -> tuple[tuple[str, int], ...]:
    return (("from", 0), ("to", np.iinfo(np.int64).max), ("axis", 0), ("step", step))


def _integer(graph: ir.Graph, name: str, number: int) -> ir.Value:
    tensor = ir.tensor(np.array([number], np.int64), name=name)
    value = ir.Value(name=name, shape=ir.Shape([1]), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _node(kind: str, inputs: Sequence[ir.Value], name: str, **attributes: int) -> ir.Node:
    output = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT))
    return ir.Node(
        "", kind, inputs, ir.convenience.convert_attributes(attributes), outputs=[output], name=f"node.{name}"
    )
