"""What the tracer writes in a roundabout way, said directly.

FastViTHD's graph comes with batch norms folded, each GELU and layer norm one node, and no Cast.  Attention is clumsy.
To transpose the keys, PyTorch's exporter takes their shape apart, flattens, transposes and puts the shape together
again; as one Transpose, ONNX Runtime fuses it into the product behind it and OpenVINO recognizes attention.  And it
scales both queries and keys by a root of the scale; the keys alone will do (and ONNX Runtime 1.31 fails to load a
float16 graph of FastViT that scales its queries).
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import onnx_ir as ir

Size: TypeAlias = int | tuple[ir.Value, int]  # a number, or an axis of a value
RANK = 4  # of keys: batch, heads, rows, head size
SWAPPED = (0, 1, 3, 2)


def clean(model: ir.Model) -> None:
    """Simplify a traced graph in place; it computes the same numbers."""
    for node in tuple(model.graph):
        keys = _keys_transposed_by(node)
        if keys is not None:
            _transpose_at_once(model.graph, node, keys)
    for node in tuple(model.graph):
        if node.op_type == "MatMul":
            _scale_once(model.graph, node)
    drop_unused(model.graph)


def _keys_transposed_by(last: ir.Node) -> ir.Value | None:
    """The keys (B, heads, rows, size) of which ``last`` makes (B, heads, size, rows) by two reshapes."""
    turn = _producer(last, 0) if last.op_type == "Reshape" else None
    if turn is None or turn.op_type != "Transpose" or list(turn.attributes["perm"].as_ints()) != [0, 2, 1]:
        return None
    first = _producer(turn, 0)
    keys = first.inputs[0] if first is not None and first.op_type == "Reshape" else None
    if first is None or keys is None or keys.shape is None or len(keys.shape) != RANK:
        return None
    batch, heads, rows, size = (_axis(keys, axis) for axis in range(RANK))
    flat, whole = _sizes(first.inputs[1]), _sizes(last.inputs[1])
    return keys if flat[-2:] == (rows, size) and len(flat) == 3 and whole == (batch, heads, size, rows) else None


def _producer(node: ir.Node, index: int) -> ir.Node | None:
    value = node.inputs[index]
    return None if value is None else value.producer()


def _axis(value: ir.Value, axis: int) -> Size:
    assert value.shape is not None
    size = value.shape[axis]
    return size if isinstance(size, int) else (value, axis)


def _sizes(value: ir.Value | None) -> tuple[Size, ...]:
    """The sizes that a shape tensor holds, as far as they can be read; () otherwise."""
    if value is None:
        return ()
    if value.const_value is not None:
        return tuple(int(size) for size in value.const_value.numpy().ravel())
    node = value.producer()
    if node is not None and node.op_type == "Concat":
        parts = [_sizes(part) for part in node.inputs]
        return tuple(size for part in parts for size in part) if all(parts) else ()
    return _sliced(node) if node is not None and node.op_type == "Slice" else ()


def _sliced(node: ir.Node) -> tuple[Size, ...]:
    """A slice of a value's shape."""
    source = _producer(node, 0)
    shaped = source.inputs[0] if source is not None and source.op_type == "Shape" else None
    bounds = [value.const_value for value in node.inputs[1:3] if value is not None and value.const_value is not None]
    if shaped is None or shaped.shape is None or len(bounds) != 2 or len(node.inputs) > 4:
        return ()
    start, end = (int(np.clip(bound.numpy().item(), -(2**31), 2**31)) for bound in bounds)
    return tuple(_axis(shaped, axis) for axis in range(len(shaped.shape))[start:end])


def _transpose_at_once(graph: ir.Graph, last: ir.Node, keys: ir.Value) -> None:
    old = last.outputs[0]
    assert keys.shape is not None
    shape = ir.Shape([keys.shape[axis] for axis in SWAPPED])
    output = ir.Value(name=f"{old.name}.transposed", shape=shape, type=keys.type)
    attributes = [ir.AttrInt64s("perm", SWAPPED)]
    graph.insert_before(
        last, ir.Node("", "Transpose", [keys], attributes, outputs=[output], name=f"node.{output.name}")
    )
    ir.convenience.replace_all_uses_with(old, output)


def _scale_once(graph: ir.Graph, product: ir.Node) -> None:
    """Where both factors were multiplied by one constant, multiply the right one by its square."""
    left, right = _producer(product, 0), _producer(product, 1)
    if left is None or right is None or left.op_type != "Mul" or right.op_type != "Mul":
        return
    constant = left.inputs[1]
    if (
        constant is None
        or constant is not right.inputs[1]
        or constant.const_value is None
        or constant.const_value.size != 1
    ):
        return
    number = constant.const_value.numpy()
    tensor = ir.tensor(number * number, name=f"{constant.name}.squared")
    if tensor.name not in graph.initializers:
        graph.register_initializer(
            ir.Value(name=tensor.name, shape=constant.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        )
    keys = right.outputs[0]
    scaled = ir.Value(
        name=f"{keys.name}.scaled", shape=right.inputs[0].shape if right.inputs[0] else None, type=keys.type
    )
    factors = [right.inputs[0], graph.initializers[f"{constant.name}.squared"]]
    graph.insert_before(product, ir.Node("", "Mul", factors, outputs=[scaled], name=f"node.{scaled.name}"))
    product.replace_input_with(0, left.inputs[0])
    product.replace_input_with(1, scaled)


def drop_unused(graph: ir.Graph) -> None:
    """Forget nodes and weights that nobody reads, the last ones first."""
    for node in reversed(tuple(graph)):
        if not any(output.uses() or output.is_graph_output() for output in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
