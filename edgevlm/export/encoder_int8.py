"""An encoder's graph in 8 bits, for arithmetic in 8 bits: weights per output channel, activations per tensor.

Whatever is computed in 8 bits stands between QuantizeLinear and DequantizeLinear nodes (QDQ), which ONNX Runtime,
OpenVINO and TensorRT fuse into their own kernels; every other runtime computes the same numbers slowly.  Weights are
symmetric int8; activations uint8 with a zero point, since what leaves a GELU is nearly all above zero.

Convolutions and products with constant weights are quantized.  Depthwise convolutions stay float: they move bytes and
hardly compute, and their channels differ too much for one scale.  So do products of two activations in attention,
softmax, norms, sums, and the two small convolutions of a squeeze-and-excite gate.  So does a product that reads rows
just joined: OpenVINO rounds before the Concat, gives every row a zero point of its own, and fails to multiply them.

On x86 without VNNI (before Ice Lake and Zen 4) ONNX Runtime adds pairs of products in 16 bits, which can saturate:
verify such a machine's bundle there, or take fp32.

Sources: Jacob et al. 2018, arXiv:1712.05877; Nagel et al. 2021, arXiv:2106.08295.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgevlm.core.errors import UnsupportedError
from edgevlm.export.ranges import Float, Range, observed_ranges

WEIGHT_AXIS: Mapping[str, int] = {"Conv": 0, "MatMul": 1, "Gemm": 1}  # of the output channels
WEIGHT_CODES = 127  # either side of zero, so that -w is as good as w
DYNAMIC = (
    "int8-dynamic is for decoders: an encoder that looks for its ranges anew in every call is slower than in float; "
    "take --encoder-precision int8 (ranges found once, from pictures) or fp16"
)


@dataclass(frozen=True, kw_only=True)
class StaticReport:
    """What became of a graph: names of the layers in 8 bits and in float, and the range of each tensor.

    ``input_scales``: of what comes into each layer in 8 bits, by its name, where codes are symmetric.
    """

    quantized: tuple[str, ...]
    kept_float: tuple[str, ...]
    ranges: Mapping[str, Range]
    num_batches: int
    input_scales: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))


def quantize_static(model: ir.Model, batches: Sequence[Float], *, depthwise: bool = False) -> StaticReport:
    """Put ``model`` in 8 bits, in place, its ranges those of ``batches`` of ``pixel_values`` [S, 3, H, W] float32.

    The graph reads the views of the batches in their order, as many a call as it wants, one if it leaves that open.
    ``depthwise``: those convolutions, too.  Raises UnsupportedError without pictures, for pictures that the graph
    cannot read or that give infinite values, for a graph without any layer to quantize, and for one that reads more
    than pictures (the text half of a model with pre-fusion, which is small and stays float).
    """
    if len(model.graph.inputs) != 1:
        names = ", ".join(value.name or "" for value in model.graph.inputs)
        raise UnsupportedError(
            f"int8 is for graphs that read pictures alone, this one reads {names}: take fp16 or fp32"
        )
    candidates = [node for node in model.graph if layer_weight(node) is not None]
    layers = [node for node in candidates if is_dense(node, depthwise) and not _reads_joined_rows(node)]
    if not layers:
        raise UnsupportedError("no convolution or product with constant weights to put in 8 bits: take fp16 or fp32")
    ranges = observed_ranges(model, list(dict.fromkeys(_seams(layers))), _calls(model, batches))
    writer = SeamWriter(model.graph, {value: _scale_of(found) for value, found in ranges.items()})
    for node in layers:
        writer.quantize(node)
    writer.drop_unused_weights()
    return StaticReport(
        quantized=tuple(node.name or "" for node in layers),
        kept_float=tuple(node.name or "" for node in candidates if node not in layers),
        ranges={value.name or "": found for value, found in ranges.items()},
        num_batches=len(batches),
    )


def _calls(model: ir.Model, batches: Sequence[Float]) -> list[Float]:
    """The views of ``batches`` in groups as large as the graph reads at once; a rest that fills no group is left."""
    shape = model.graph.inputs[0].shape
    first = None if shape is None else shape[0]
    size = first if isinstance(first, int) else 1
    groups = (batch[start : start + size] for batch in batches for start in range(0, len(batch) - size + 1, size))
    return [np.ascontiguousarray(group, np.float32) for group in groups]


def refuse_dynamic(precision: str) -> None:
    """Raise UnsupportedError for a precision whose ranges are found anew in every call."""
    if precision == "int8-dynamic":
        raise UnsupportedError(DYNAMIC)


def layer_weight(node: ir.Node) -> ir.Value | None:
    """The constant weight of a convolution or product, if it has one."""
    if node.op_type not in WEIGHT_AXIS or node.domain not in ("", "ai.onnx") or len(node.inputs) < 2:
        return None
    weight = node.inputs[1]
    if weight is None or weight.const_value is None or weight.const_value.dtype != ir.DataType.FLOAT:
        return None
    return weight if node.op_type == "Conv" or len(weight.const_value.shape) == 2 else None


def is_dense(node: ir.Node, depthwise: bool = False) -> bool:
    """Whether 8 bits pay for a convolution or product with a constant weight."""
    alpha, transposed = node.attributes.get_float("alpha", 1.0), node.attributes.get_int("transA", 0)
    if node.op_type != "Conv":
        return node.op_type == "MatMul" or (alpha, transposed) == (1.0, 0)
    weight, source = layer_weight(node), node.inputs[0]
    assert weight is not None
    assert weight.const_value is not None
    assert source is not None
    is_depthwise = node.attributes.get_int("group", 1) > 1 and weight.const_value.shape[1] == 1
    is_gate = source.shape is not None and list(source.shape[2:]) == [1, 1]
    return (depthwise or not is_depthwise) and not is_gate


def _reads_joined_rows(node: ir.Node) -> bool:
    source = node.inputs[0]
    producer = None if source is None or node.op_type == "Conv" else source.producer()
    return producer is not None and producer.op_type == "Concat"


def _seams(layers: Sequence[ir.Node]) -> Iterator[ir.Value]:
    """The activations to round: what layers read, and what convolutions write.

    ONNX Runtime has no convolution from 8 bits to float, for products it has.
    """
    for node in layers:
        assert node.inputs[0] is not None
        yield node.inputs[0]
        if node.op_type == "Conv":
            yield _written(node)


def _written(node: ir.Node) -> ir.Value:
    """What leaves a convolution, the ReLU behind it included."""
    output = node.outputs[0]
    users = [user for user, _ in output.uses()]
    return users[0].outputs[0] if len(users) == 1 and users[0].op_type == "Relu" else output


class SeamWriter:
    """Puts QuantizeLinear and DequantizeLinear where layers in 8 bits begin and end.

    ``scales``: scale and zero point of every value that is rounded.
    """

    code = ir.DataType.UINT8  # of activations

    def __init__(self, graph: ir.Graph, scales: Mapping[ir.Value, tuple[float, int]]) -> None:
        self.graph, self.scales = graph, scales
        self.rounded: dict[ir.Value, ir.Value] = {}
        self.exact: dict[ir.Value, ir.Value] = {}  # and back
        self.weights: dict[tuple[ir.Value, int], tuple[ir.Value, NDArray[np.float32]]] = {}

    def quantize(self, node: ir.Node) -> None:
        """Let ``node`` read rounded numbers; of a convolution, round what it writes as well."""
        source, weight = node.inputs[0], node.inputs[1]
        assert source is not None
        assert weight is not None
        source = self.exact.get(source, source)
        rounded, weight_scale = self._weight(node, weight)
        node.replace_input_with(0, self._activation(source))
        node.replace_input_with(1, rounded)
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            bias = self._bias(node, node.inputs[2], self.scales[source][0] * weight_scale)
            node.replace_input_with(2, bias)
        if node.op_type == "Conv":
            self._round_output(_written(node))

    def _activation(self, value: ir.Value) -> ir.Value:
        """``value`` through 8 bits, one pair of nodes whoever reads it."""
        if value not in self.rounded:
            self.rounded[value] = self._pair(value)
            self.exact[self.rounded[value]] = value
        return self.rounded[value]

    def _round_output(self, value: ir.Value) -> None:
        """Let all who read ``value`` read it rounded."""
        rounded = self._activation(value)
        for user, index in tuple(value.uses()):
            if user.op_type != "QuantizeLinear":
                user.replace_input_with(index, rounded)
        for index, output in enumerate(tuple(self.graph.outputs)):
            if output is value:
                value.name, rounded.name = f"{value.name}.inside", value.name
                self.graph.outputs[index] = rounded

    def _pair(self, value: ir.Value) -> ir.Value:
        scale, zero_point = self.scales[value]
        scales = [
            self._constant(np.array(scale, np.float32), f"{value.name}.scale"),
            self._constant(np.array(zero_point, self.code.numpy()), f"{value.name}.zero_point"),
        ]
        codes = ir.Value(name=f"{value.name}.codes", shape=value.shape, type=ir.TensorType(self.code))
        rounded = ir.Value(name=f"{value.name}.rounded", shape=value.shape, type=ir.TensorType(ir.DataType.FLOAT))
        nodes = [
            ir.Node("", "QuantizeLinear", [value, *scales], outputs=[codes], name=f"node.{codes.name}"),
            ir.Node("", "DequantizeLinear", [codes, *scales], outputs=[rounded], name=f"node.{rounded.name}"),
        ]
        producer = value.producer()
        if producer is None:
            self.graph.insert_before(self.graph[0], nodes)
        else:
            self.graph.insert_after(producer, nodes)
        return rounded

    def _weight(self, node: ir.Node, value: ir.Value) -> tuple[ir.Value, NDArray[np.float32]]:
        """The weight as rounded to int8, and its scale for each output channel."""
        axis = output_axis(node)
        if (value, axis) not in self.weights:
            assert value.const_value is not None
            codes, scale = rounded_weight(value.const_value.numpy(), axis)
            zero_point = np.zeros(scale.shape, np.int8)
            self.weights[value, axis] = self._dequantized(node, value, codes, scale, zero_point, axis), scale
        return self.weights[value, axis]

    def _bias(self, node: ir.Node, value: ir.Value, scale: NDArray[np.float32]) -> ir.Value:
        """The bias in units of what the 8 bit products are counted in."""
        assert value.const_value is not None
        limit = 2.0**31 - 128  # the largest that float32 and int32 both hold
        codes = np.clip(np.rint(value.const_value.numpy().astype(np.float64) / scale), -limit, limit).astype(np.int32)
        return self._dequantized(node, value, codes, scale.astype(np.float32), np.zeros(scale.shape, np.int32), 0)

    def _dequantized(
        self,
        node: ir.Node,
        value: ir.Value,
        codes: NDArray[np.generic] | ir.TensorProtocol,
        scale: NDArray[np.float32],
        zero_point: NDArray[np.generic],
        axis: int,
    ) -> ir.Value:
        name = f"{node.name}.{value.name}"
        inputs = [
            self._constant(codes, f"{name}.codes"),
            self._constant(scale, f"{name}.scale"),
            self._constant(zero_point, f"{name}.zero_point"),
        ]
        output = ir.Value(name=f"{name}.rounded", shape=value.shape, type=ir.TensorType(ir.DataType.FLOAT))
        attributes = [ir.AttrInt64("axis", axis)]
        dequantize = ir.Node("", "DequantizeLinear", inputs, attributes, outputs=[output], name=f"node.{output.name}")
        self.graph.insert_before(node, dequantize)
        return output

    def _constant(self, numbers: NDArray[np.generic] | ir.TensorProtocol, name: str) -> ir.Value:
        tensor = ir.tensor(numbers, name=name) if isinstance(numbers, np.ndarray) else numbers
        shape = ir.Shape(tensor.shape.numpy())
        value = ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def drop_unused_weights(self) -> None:
        """Forget the float weights that nobody reads any more."""
        for name, value in list(self.graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del self.graph.initializers[name]


def output_axis(node: ir.Node) -> int:
    """The axis of a layer's weight along which its output channels lie."""
    is_transposed = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
    return 0 if is_transposed else WEIGHT_AXIS[node.op_type]


def rounded_weight(weight: NDArray[np.float32], axis: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Codes of ``weight`` and one scale for each of its channels along ``axis``; value = code · scale."""
    others = tuple(index for index in range(weight.ndim) if index != axis)
    largest = np.abs(weight).max(axis=others)
    scale = (np.where(largest > 0, largest, 1.0) / WEIGHT_CODES).astype(np.float32)
    shape = [-1 if index == axis else 1 for index in range(weight.ndim)]
    codes = np.clip(np.rint(weight / scale.reshape(shape)), -WEIGHT_CODES, WEIGHT_CODES)
    return codes.astype(np.int8), scale


def _scale_of(found: Range) -> tuple[float, int]:
    """Scale and zero point of uint8 codes whose range holds ``found`` and zero."""
    low, high = min(found[0], 0.0), max(found[1], 0.0)
    scale = float(np.float32((high - low) / 255)) or 1.0
    return scale, round(-low / scale)
