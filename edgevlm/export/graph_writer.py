"""An ONNX graph written node by node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


class GraphWriter:
    """Collects nodes and constants; names follow the PyTorch modules, so that a graph can be read beside the model."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self.constants: dict[str, ir.Value] = {}

    def op(
        self,
        kind: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        *,
        domain: str = "",
        num_outputs: int,
        attributes: Mapping[str, int | float],
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
        **attributes: int | float,
    ) -> ir.Value:
        """A node with one output."""
        return self.op(kind, inputs, name, domain=domain, num_outputs=1, attributes=attributes)[0]

    def constant(self, array: NDArray[np.generic], name: str) -> ir.Value:
        """An initializer."""
        if name not in self.constants:
            tensor = ir.tensor(array, name=name)
            self.constants[name] = ir.Value(
                name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
        return self.constants[name]

    def weight(self, tensor: Tensor, name: str) -> ir.Value:
        """A float32 initializer."""
        return self.constant(np.ascontiguousarray(tensor.detach().float().numpy()), name)

    def linear(self, hidden: ir.Value, layers: Sequence[nn.Linear], name: str) -> ir.Value:
        """``hidden`` times the weights of ``layers`` side by side, plus their biases if they have any."""
        weight = torch.cat([layer.weight for layer in layers]).T
        product = self.one("MatMul", [hidden, self.weight(weight, f"{name}.weight")], f"{name}.product")
        biases = [layer.bias for layer in layers if layer.bias is not None]
        if not biases:
            return product
        return self.one("Add", [product, self.weight(torch.cat(tuple(biases)), f"{name}.bias")], f"{name}.sum")
