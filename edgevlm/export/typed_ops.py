"""The decoder's layers for TensorRT: standard operators, and a kv cache that is told where it ends.

There is no mask.  ``write_indices`` [B] says how many rows the cache holds of each sequence; new row i stands behind
them, at that number plus i.  Two graphs are written of one decoder:

    rows        keys are past ones with the new rows behind them, of the past only the first ``write_indices`` are
                seen, and ``present`` is the new rows alone, for the runtime to copy.  Every TensorRT reads it.
    in place    ``TensorScatter`` of opset 24 writes the new rows into the past, whose length is the whole context:
                ``present`` is that buffer.  TensorRT 10.15 and later, and TensorRT-RTX, keep it in one place.

The second is the first with its mask and its caches exchanged, so whatever was done to the first, such as rounding,
holds for both, and both read their weights from one file.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgevlm.bundle.manifest import TensorSpec
from edgevlm.export.clean_graph import drop_unused
from edgevlm.export.contrib_ops import length
from edgevlm.export.graph_writer import GraphWriter
from edgevlm.export.parts import Part
from edgevlm.export.plain_ops import StandardOps
from edgevlm.shapes.config import DecoderConfig

PAST, PRESENT = "past_key_values.", "present."
SEEN = "mask.seen"
IN_PLACE_OPSET, IN_PLACE_IR = 24, 11


class TypedOps(StandardOps):
    """Norms, attention and SiLU of one graph of the kind "rows".

    Its inputs are ``embeds`` (B, T, D), ``written`` (B) and caches like ``past`` (B, K, S, size).
    """

    def __init__(
        self, writer: GraphWriter, config: DecoderConfig, embeds: ir.Value, written: ir.Value, past: ir.Value
    ) -> None:
        rows = length(writer, embeds, "rows")
        numbers = writer.one("Range", [writer.integer(0), rows, writer.integer(1)], "rows.numbers")
        starts = writer.one("Unsqueeze", [written, writer.integers(1)], "rows.starts")
        positions = writer.one("Add", [starts, numbers], "positions")
        super().__init__(writer, config, positions, _seen(writer, numbers, rows, written, past))

    def _present(self, keys: list[ir.Value], new: list[ir.Value]) -> list[ir.Value]:
        return new


def _seen(writer: GraphWriter, numbers: ir.Value, rows: ir.Value, written: ir.Value, past: ir.Value) -> ir.Value:
    """Whether a row sees a key [B, 1, T, S + T]: of the past what is written, of the new rows those up to itself."""
    zero, one = writer.integer(0), writer.integer(1)
    shape = writer.one("Shape", [past], "past.shape")
    old = writer.one("Gather", [shape, writer.integer(2)], "past.length", axis=0)
    total = writer.one("Add", [old, rows], "keys.length")
    keys = writer.one("Range", [zero, total, one], "keys.numbers")
    ends = writer.one("Unsqueeze", [written, writer.integers(1, 2, 3)], "past.ends")
    filled = writer.one("Less", [keys, ends], "mask.filled")
    behind = writer.one("Sub", [keys, old], "keys.behind")
    column = writer.one("Unsqueeze", [numbers, writer.integers(1)], "rows.column")
    is_new = writer.one("GreaterOrEqual", [behind, zero], "mask.new")
    causal = writer.one("LessOrEqual", [behind, column], "mask.causal")
    upto = writer.one("And", [is_new, causal], "mask.upto")
    return writer.one("Or", [filled, upto], SEEN)


def typed_part(part: Part) -> Part:
    """The decoder ``part`` with the tensors that TensorRT's graphs have: of the kind "rows", in float32."""
    written = TensorSpec(name="write_indices", dtype="int64", shape=("batch_size",))
    inputs = [written if spec.name == "attention_mask" else spec for spec in part.inputs]
    outputs = [replace(spec, shape=_of_rows(spec)) if spec.name.startswith(PRESENT) else spec for spec in part.outputs]
    return replace(part, inputs=inputs, outputs=outputs)


def _of_rows(spec: TensorSpec) -> tuple[int | str, ...]:
    """The shape of a present tensor that holds new rows alone."""
    return tuple("sequence" if size == "total_sequence" else size for size in spec.shape)


def keep_in_place(model: ir.Model, max_context: int) -> None:
    """Make of the graph "rows" the one whose caches of ``max_context`` rows are written in place."""
    graph = model.graph
    inputs = {value.name or "": value for value in graph.inputs}
    _see_up_to_itself(graph, max_context)
    for index, new in enumerate(graph.outputs):
        if (name := new.name or "").startswith(PRESENT):
            past = inputs[PAST + name.removeprefix(PRESENT)]
            graph.outputs[index] = _written_into(graph, past, new, inputs["write_indices"], max_context)
    graph.sort()
    drop_unused(graph)
    graph.opset_imports[""] = IN_PLACE_OPSET
    model.ir_version = IN_PLACE_IR


def past_joined(graph: ir.Graph) -> list[ir.Value]:
    """Keys and values of the graph "rows" that are past and new rows side by side, in the cache's own type."""
    return [_joined(value) for value in graph.inputs if (value.name or "").startswith(PAST)]


def _see_up_to_itself(graph: ir.Graph, max_context: int) -> None:
    """Exchange the mask [B, 1, T, S]: a row sees every row of the cache that stands no later than itself."""
    values = {value.name: value for node in graph for value in node.outputs}
    keys = _constant(graph, np.arange(max_context, dtype=np.int64), "context.numbers")
    axes = _constant(graph, np.array([1, 3], np.int64), "context.axes")
    column = ir.Node("", "Unsqueeze", [values["positions"], axes], num_outputs=1, name="node.context.column")
    seen = ir.Node("", "LessOrEqual", [keys, column.outputs[0]], num_outputs=1, name="node.context.seen")
    column.outputs[0].name, seen.outputs[0].name = "context.column", "context.seen"
    ir.convenience.replace_all_uses_with(values[SEEN], seen.outputs[0])
    graph.extend([column, seen])


def _written_into(graph: ir.Graph, past: ir.Value, new: ir.Value, written: ir.Value, max_context: int) -> ir.Value:
    """The buffer ``past`` (B, K, max_context, size) with the rows of ``new``, in place of past and new side by side."""
    assert past.shape is not None
    past.shape = ir.Shape([*past.shape[:2], max_context, past.shape[3]])
    present = ir.Value(name=new.name, shape=ir.Shape(past.shape), type=past.type)
    attributes = ir.convenience.convert_attributes({"axis": 2, "mode": "linear"})
    new.name = f"{new.name}.rows"
    scatter = ir.Node("", "TensorScatter", [past, new, written], attributes, outputs=[present])
    scatter.name = f"node.{present.name}"
    graph.append(scatter)
    ir.convenience.replace_all_uses_with(_joined(past), present)
    return present


def _joined(past: ir.Value) -> ir.Value:
    """What the graph "rows" looks at: ``past`` with the new rows behind it."""
    found = [node for node, _ in past.uses() if node.op_type == "Concat"]
    assert len(found) == 1, f"{past.name}: {len(found)} nodes put new rows behind it"
    return found[0].outputs[0]


def _constant(graph: ir.Graph, array: NDArray[np.int64], name: str) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
