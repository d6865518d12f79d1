"""Which range of values each tensor of a graph takes on given pictures.

The graph runs in ONNX Runtime with a few more nodes: of every tensor in question it gives the extremes and an even
sample of its values, so that memory stays that of one picture.  The range is then chosen so that rounding to 8 bits
costs the least squared error.  Extremes count as single values: a tensor with a few large ones, which transformers
need, keeps them where they matter and loses them where they do not.

Symmetric codes have one bound on both sides of zero; codes that are floats take the largest value as it is.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgevlm.core.errors import UnsupportedError, translate_disk_errors

Float: TypeAlias = NDArray[np.float32]
Range: TypeAlias = tuple[float, float]
Made = TypeVar("Made")
Feed: TypeAlias = Mapping[str, NDArray[Any]]  # what a call of a graph reads, by name

NUM_SAMPLED = 4096  # values of a tensor and batch
SHARES = tuple(np.linspace(1.0, 0.3, 36).tolist())  # of the extremes, tried on each side
LEVELS = 255
SYMMETRIC_CODES = 127  # either side of zero
KINDS = ("low", "high", "sample", "step")
CONSTANTS = {
    "row": -1,
    "share": 2 * NUM_SAMPLED,
    "two": 2,
    "one": 1,
    "from": 0,
    "to": np.iinfo(np.int64).max,
    "axis": 0,
}  # of the nodes that watch a value


@dataclass(frozen=True, eq=False)
class Seen:
    """What a tensor was: its extremes in every batch, and a sample whose values stand for ``num_each`` each.

    ``num_each`` is one number, or one for each value where the batches were of several sizes.
    """

    extremes: Float
    sample: Float
    num_each: int | NDArray[np.int64]


def observed_ranges(model: ir.Model, values: Sequence[ir.Value], batches: Sequence[Float]) -> dict[ir.Value, Range]:
    """(low, high) of each of ``values`` over ``batches`` of the graph's only input.

    Raises UnsupportedError without batches, for pictures that the graph cannot read, and for values that are not
    finite.
    """
    if not batches:
        raise UnsupportedError("int8 needs pictures to find its ranges from; give at least one")
    return observed(model, values, feeds_of(model, batches), best_range)


def observed(
    model: ir.Model,
    values: Sequence[ir.Value],
    feeds: Sequence[Feed],
    choose: Callable[[Seen], Made],
    part: str = "the encoder",
) -> dict[ir.Value, Made]:
    """What ``choose`` makes of each of ``values`` over ``feeds``; raises as ``observed_ranges``, of ``part``."""
    seen = _seen_in(model, [value.name or "" for value in values], feeds, part)
    return {value: choose(seen[value.name or ""]) for value in values}


def feeds_of(model: ir.Model, batches: Sequence[Float]) -> list[Feed]:
    """A feed for each of ``batches`` of the graph's only input."""
    source = model.graph.inputs[0].name or ""
    return [{source: batch} for batch in batches]


def best_range(seen: Seen) -> Range:
    """The range (low, high), zero included, whose 256 levels round with the least squared error.

    One side is chosen after the other.
    """
    values, weights = _weighted(seen)
    low, high = min(float(seen.extremes.min()), 0.0), max(float(seen.extremes.max()), 0.0)

    def cost(bounds: Range) -> float:
        return float(weights @ np.square(_rounded(values, bounds) - values))

    low, high = min(((low, high * share) for share in SHARES), key=cost)
    return min(((low * share, high) for share in SHARES), key=cost)


def best_bound(seen: Seen) -> Range:
    """The range (-bound, bound) whose 127 levels on either side of zero round with the least squared error."""
    values, weights = _weighted(seen)
    largest = float(np.abs(seen.extremes).max())

    def cost(bound: float) -> float:
        step = bound / SYMMETRIC_CODES or 1.0
        rounded = np.clip(np.rint(values / step), -SYMMETRIC_CODES - 1, SYMMETRIC_CODES) * step
        return float(weights @ np.square(rounded - values))

    bound = min((largest * share for share in SHARES), key=cost)
    return -bound, bound


def largest_bound(seen: Seen) -> Range:
    """The range (-bound, bound) that holds everything."""
    bound = float(np.abs(seen.extremes).max())
    return -bound, bound


def _weighted(seen: Seen) -> tuple[Float, NDArray[np.int64]]:
    """Extremes and sample, and for how many values each stands."""
    values = np.concatenate((seen.extremes, seen.sample))
    ones = np.ones(seen.extremes.size, np.int64)
    return values, np.concatenate((ones, np.broadcast_to(seen.num_each, seen.sample.shape)))


def _rounded(values: Float, bounds: Range) -> Float:
    """``values`` as 8 bits with these bounds hold them."""
    step = (bounds[1] - bounds[0]) / LEVELS or 1.0
    zero = round(-bounds[0] / step)
    codes = np.clip(np.rint(values / step) + zero, 0, LEVELS)
    return np.asarray((codes - zero) * step, np.float32)


def _seen(model: ir.Model, names: Sequence[str], batches: Sequence[Float]) -> dict[str, Seen]:
    return _seen_in(model, names, feeds_of(model, batches), "the encoder")


def _seen_in(model: ir.Model, names: Sequence[str], feeds: Sequence[Feed], part: str) -> dict[str, Seen]:
    wanted = [f"{name}.{kind}" for name in names for kind in KINDS]
    rows = list(outputs_of(_watched(model, names), wanted, feeds, part))
    return {
        name: _joined(name, [row[index : index + len(KINDS)] for row in rows], part) for name, index in _places(names)
    }


def _places(names: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Every name, and where its outputs begin."""
    return zip(names, range(0, len(KINDS) * len(names), len(KINDS)), strict=True)


def _joined(name: str, batches: Sequence[Sequence[NDArray[Any]]], part: str) -> Seen:
    """The outputs of every batch as one."""
    low, high, samples, steps = zip(*batches, strict=True)
    extremes = np.array([*low, *high], np.float32)
    if not np.isfinite(extremes).all():
        raise UnsupportedError(f"{name} is not finite on a calibration picture: take fp32 for {part}")
    num_each = [np.full(sample.size, step.item()) for sample, step in zip(samples, steps, strict=True)]
    return Seen(extremes, np.concatenate(samples), np.concatenate(num_each))


def outputs_of(
    model: ir.Model, names: Sequence[str], feeds: Iterable[Mapping[str, NDArray[Any]]], part: str = "the encoder"
) -> Iterator[list[NDArray[Any]]]:
    """The graph's outputs called ``names``, for one feed after the other.

    Raises UnsupportedError, which speaks of ``part``, where ONNX Runtime cannot run the graph; DoesNotFitError on a
    full disk.
    """
    import onnxruntime

    with tempfile.TemporaryDirectory(prefix="edgevlm-ranges-") as folder:
        path = Path(folder) / "watched.onnx"
        with translate_disk_errors(f"{folder} (TMPDIR names another place), {part} while it is calibrated"):
            ir.save(model, path, external_data=f"{path.name}_data")
        try:
            session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            for feed in feeds:
                found: Any = session.run(list(names), dict(feed))
                yield found
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise UnsupportedError(f"{part} cannot read a calibration picture: {reason}") from error


def _watched(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """A copy of ``model`` that also gives ``{name}.low``, ``.high``, ``.sample``, and ``.step`` between samples."""
    model = model.clone()
    graph = model.graph
    values = {value.name: value for value in (*graph.inputs, *(output for node in graph for output in node.outputs))}
    for name in names:
        nodes = {node.outputs[0].name: node for node in _watching_nodes(graph, values[name], name)}
        graph.extend(nodes.values())
        graph.outputs.extend(nodes[f"{name}.{kind}"].outputs[0] for kind in KINDS)
    return model


def _watching_nodes(graph: ir.Graph, value: ir.Value, name: str) -> list[ir.Node]:
    """``value`` in one row, its least, its greatest, and numbers an odd step apart, so as not to sample one column.

    The graph itself counts its values, since their number is known only then where heights and widths are free.
    """
    constants = {label: _integer(graph, f"{name}.{label}", number) for label, number in CONSTANTS.items()}
    flat = new_node("Reshape", [value, constants["row"]], f"{name}.flat")
    row = flat.outputs[0]
    size = new_node("Shape", [row], f"{name}.size", ir.DataType.INT64)
    pairs = new_node("Div", [size.outputs[0], constants["share"]], f"{name}.pairs", ir.DataType.INT64)
    even = new_node("Mul", [pairs.outputs[0], constants["two"]], f"{name}.even", ir.DataType.INT64)
    step = new_node("Add", [even.outputs[0], constants["one"]], f"{name}.step", ir.DataType.INT64)
    bounds = [constants["from"], constants["to"], constants["axis"], step.outputs[0]]
    low = new_node("ReduceMin", [row], f"{name}.low", keepdims=0)
    high = new_node("ReduceMax", [row], f"{name}.high", keepdims=0)
    return [flat, size, pairs, even, step, low, high, new_node("Slice", [row, *bounds], f"{name}.sample")]


def _integer(graph: ir.Graph, name: str, number: int) -> ir.Value:
    tensor = ir.tensor(np.array([number], np.int64), name=name)
    value = ir.Value(name=name, shape=ir.Shape([1]), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def new_node(
    kind: str, inputs: Sequence[ir.Value], name: str, dtype: ir.DataType = ir.DataType.FLOAT, **attributes: int
) -> ir.Node:
    """A node of a standard operator whose one output is called ``name``."""
    output = ir.Value(name=name, type=ir.TensorType(dtype))
    return ir.Node(
        "", kind, inputs, ir.convenience.convert_attributes(attributes), outputs=[output], name=f"node.{name}"
    )
