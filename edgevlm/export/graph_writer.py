"""An ONNX graph written node by node, its weights left in the model until they are saved."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

CHUNK = 1 << 22  # weights that are looked at together: a large tensor is never copied to be looked at
LEAST_HALVED = 64  # numbers: below this a Cast costs more than it saves

Attribute: TypeAlias = "int | float | Sequence[int]"


class GraphWriter:
    """Collects nodes and constants; names follow the PyTorch modules, so that a graph can be read beside the model.

    With ``half_storage`` weights that float16 holds exactly are stored so and widened by a Cast.
    """

    def __init__(self, *, half_storage: bool = False) -> None:
        self.half_storage = half_storage
        self.nodes: list[ir.Node] = []
        self.constants: dict[str, ir.Value] = {}
        self._widened: dict[str, ir.Value] = {}

    def op(
        self,
        kind: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        *,
        domain: str = "",
        num_outputs: int,
        attributes: Mapping[str, Attribute],
    ) -> list[ir.Value]:
        """Add one node; its outputs are called ``name``, ``name.1``, …"""
        outputs = [ir.Value(name=name if index == 0 else f"{name}.{index}") for index in range(num_outputs)]
        node = ir.Node(
            domain,
            kind,
            inputs,
            ir.convenience.convert_attributes(dict(attributes)),
            outputs=outputs,
            name=f"node.{name}",
        )
        self.nodes.append(node)
        return outputs

    def one(
        self,
        kind: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        *,
        domain: str = "",
        **attributes: Attribute,
    ) -> ir.Value:
        """A node with one output."""
        return self.op(kind, inputs, name, domain=domain, num_outputs=1, attributes=attributes)[0]

    def cast(self, value: ir.Value, dtype: ir.DataType, name: str) -> ir.Value:
        """``value`` as ``dtype``."""
        return self.one("Cast", [value], name, to=int(dtype))

    def constant(self, array: NDArray[np.generic], name: str) -> ir.Value:
        """A small initializer, such as a shape."""
        if name not in self.constants:
            self._add(ir.tensor(array, name=name), name)
        return self.constants[name]

    def integers(self, *numbers: int) -> ir.Value:
        """Those numbers, as a vector of int64."""
        return self.constant(np.array(numbers, np.int64), f"[{', '.join(map(str, numbers))}]")

    def integer(self, number: int) -> ir.Value:
        """That number, as a scalar of int64."""
        return self.constant(np.array(number, np.int64), str(number))

    def number(self, value: float) -> ir.Value:
        """That number, as a scalar of float32."""
        return self.constant(np.array(value, np.float32), f"{value!r}.float")

    def lazy(
        self, make: Callable[[], NDArray[np.generic]], shape: Sequence[int], dtype: ir.DataType, name: str
    ) -> ir.Value:
        """A large initializer, which ``make`` gives when it is saved; of 4-bit types, two to the byte."""

        def tensor() -> ir.TensorProtocol:
            if dtype.bitwidth < 8:
                return ir.PackedTensor(make().reshape(-1).view(np.uint8), dtype, shape=shape, name=name)
            return ir.tensor(make().reshape(shape), name=name)

        if name not in self.constants:
            self._add(ir.LazyTensor(tensor, dtype, ir.Shape(shape), name=name), name)
        return self.constants[name]

    def weight(self, tensor: Tensor, name: str) -> ir.Value:
        """The numbers of ``tensor`` as float32."""
        return self._floats(lambda: [tensor], lambda dtype: tensor.detach().to(dtype), tuple(tensor.shape), name)

    def columns(self, tensors: Callable[[], Sequence[Tensor]], shape: tuple[int, int], name: str) -> ir.Value:
        """The float32 matrix of ``shape`` whose columns are the rows of ``tensors``, one tensor's beside the other's.

        The tensors are asked for when they are saved and written straight to their places: there is one copy, once.
        """
        return self._floats(tensors, lambda dtype: _side_by_side(tensors(), shape, dtype), shape, name)

    def _floats(
        self,
        sources: Callable[[], Sequence[Tensor]],
        make: Callable[[torch.dtype], Tensor],
        shape: Sequence[int],
        name: str,
    ) -> ir.Value:
        if name in self._widened:
            return self._widened[name]
        if not (self.half_storage and math.prod(shape) >= LEAST_HALVED and all(map(is_half, sources()))):
            return self.lazy(lambda: _array(make(torch.float32)), shape, ir.DataType.FLOAT, name)
        stored = self.lazy(lambda: _array(make(torch.float16)), shape, ir.DataType.FLOAT16, f"{name}.half")
        self._widened[name] = self.cast(stored, ir.DataType.FLOAT, f"{name}.wide")
        return self._widened[name]

    def _add(self, tensor: ir.TensorProtocol, name: str) -> None:
        shape = ir.Shape(tensor.shape.numpy())
        self.constants[name] = ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)


def is_half(tensor: Tensor) -> bool:
    """Whether float16 holds every number of ``tensor`` exactly."""
    rows = tensor.detach() if tensor.dim() > 1 else tensor.detach().unsqueeze(0)
    chunks = rows.split(max(1, CHUNK // max(1, rows[0].numel())))
    return all(torch.equal(chunk.half().float(), chunk) for chunk in chunks)


def _array(tensor: Tensor) -> NDArray[np.generic]:
    return np.ascontiguousarray(tensor.numpy())


def _side_by_side(tensors: Sequence[Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    joined, start = torch.empty(shape, dtype=dtype), 0
    for tensor in tensors:
        joined[:, start : start + len(tensor)] = tensor.detach().T
        start += len(tensor)
    return joined
