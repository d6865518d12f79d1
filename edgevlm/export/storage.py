"""How graphs lie on the disk: weights beside the graph, where a runtime can map them into memory."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx_ir as ir

from edgevlm.bundle.manifest import RowTable
from edgevlm.export.graph_writer import LEAST_HALVED

EXTERNAL_ABOVE_BYTES = 16 << 20  # of all weights: smaller graphs are one file, easier to look at and to send
LEAST_EXTERNAL_BYTES = 1 << 10  # of one tensor: what is smaller is read at once, with the graph
PAGE_BYTES = 4096  # where weights begin that are at least so large: a mapping starts at a page
DTYPES = {ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16"}


def save_graph(model: ir.Model, path: Path, *, external: bool | None = None) -> tuple[str, ...]:
    """Write ``model`` to ``path``, one tensor after the other, and its weights to ``<path>_data`` when they are large.

    ``external`` decides whatever their size.  Returns the names of the files beside ``path``.
    """
    path.parent.mkdir(exist_ok=True)
    if not (num_bytes(model) > EXTERNAL_ABOVE_BYTES if external is None else external):
        ir.save(model, path)
        return ()
    name = f"{path.name}_data"
    ir.save(
        model,
        path,
        external_data=name,
        size_threshold_bytes=LEAST_EXTERNAL_BYTES - 1,
        alignment=PAGE_BYTES,
        align_threshold=PAGE_BYTES - 1,
    )
    return (name,)


def num_bytes(model: ir.Model) -> int:
    """What all weights take."""
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)


def row_table(root: Path, file: str, tensor_name: str) -> RowTable:
    """Where the rows of a matrix lie that the graph ``file`` below ``root`` keeps in a file beside it."""
    path = root / file
    tensor = ir.load(path).graph.initializers[tensor_name].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    num_rows, num_columns = tensor.shape.numpy()
    return RowTable(
        file=(Path(file).parent / os.fspath(tensor.location)).as_posix(),
        offset=tensor.offset or 0,
        dtype=DTYPES[tensor.dtype],
        num_rows=num_rows,
        num_columns=num_columns,
    )


def store_half(model: ir.Model) -> None:
    """Keep every float32 weight that float16 holds exactly as float16, followed by a Cast."""
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < LEAST_HALVED:
            continue
        wide = tensor.numpy()
        with np.errstate(over="ignore"):
            narrow = wide.astype(np.float16)
        if np.array_equal(narrow.astype(np.float32), wide):
            _replace_by_cast(model.graph, value, ir.tensor(narrow, name=f"{name}.half"), name)


def _replace_by_cast(graph: ir.Graph, value: ir.Value, tensor: ir.TensorProtocol, name: str) -> None:
    stored = ir.Value(
        name=tensor.name, shape=ir.Shape(value.shape or ()), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    attributes = ir.convenience.convert_attributes({"to": int(ir.DataType.FLOAT)})
    cast = ir.Node("", "Cast", [stored], attributes, num_outputs=1, name=f"node.{name}.widen")
    cast.outputs[0].name, cast.outputs[0].shape, cast.outputs[0].type = (
        f"{name}.wide",
        value.shape,
        value.type,
    )
    ir.convenience.replace_all_uses_with(value, cast.outputs[0])
    del graph.initializers[name]
    graph.register_initializer(stored)
    graph.insert_before(graph[0], cast)
