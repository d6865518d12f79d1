"""Graphs in 8 bits for TensorRT: weights and activations symmetric, in int8 or in 8-bit floats (E4M3).

TensorRT knows no zero points.  Weights have a scale for each output channel, activations one for each tensor, from
ranges that calibration finds; rounded is what layers read, and nothing else, as TensorRT's documentation asks: biases
stay float, and what a layer writes is rounded where the next one reads it.  Every scale is a positive number that
float16 holds, so that ``to_half`` changes none.

Convolutions and products with constant weights are quantized, in encoders and in decoders.  Depthwise convolutions,
the small convolutions of squeeze-and-excite gates, attention, softmax and norms stay float.  So does, in int8, a
product whose rows have outliers: a scale that holds one number 32 times as large as the root mean square leaves few
codes for the others (the gated rows of a SwiGLU, whose first token is often such a one).  In E4M3 only convolutions
of one group are quantized whose channels come in sixteens, as the tensor cores read them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from edgevlm.core.errors import UnsupportedError
from edgevlm.export.encoder_int8 import SeamWriter, StaticReport, is_dense, layer_weight, output_axis
from edgevlm.export.ranges import Feed, Range, Seen, best_bound, largest_bound, observed
from edgevlm.quant.floats import E4M3_LARGEST, half_scales, power_of_two
from edgevlm.quant.rounding import QuantizedWeight, round_weight
from edgevlm.quant.schemes import Static

CHANNELS = 16  # that a convolution in E4M3 takes at once
INT8_LARGEST = 127
OUTLIER = 32.0  # times the root mean square
JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
CODES = {"int8": ir.DataType.INT8, "fp8": ir.DataType.FLOAT8E4M3FN}


def quantize_static_symmetric(model: ir.Model, feeds: Sequence[Feed], format: Literal["int8", "fp8"]) -> StaticReport:
    """Put the float32 ``model`` in 8 bits, in place; ranges are those of ``feeds``, each a call's inputs by name.

    Raises UnsupportedError without feeds, for feeds that the graph cannot read or that give infinite values, and for a
    graph without any layer to quantize.
    """
    part = model.graph.name or "the graph"
    if not feeds:
        raise UnsupportedError(f"{format} needs pictures to find its ranges from; give at least one")
    candidates = [node for node in model.graph if layer_weight(node) is not None]
    layers = [node for node in candidates if is_dense(node) and _has_kernel(node, format)]
    if not layers:
        raise UnsupportedError(f"{part}: no layer with constant weights to put in {format}: take fp16 or fp32")
    seen = observed(model, list(dict.fromkeys(map(_source, layers))), feeds, lambda seen: seen, part)
    sources = {node: _source(node) for node in layers if not _loses(node, seen[_source(node)], format)}
    choose = best_bound if format == "int8" else largest_bound
    ranges = {value: choose(seen[value]) for value in dict.fromkeys(sources.values())}
    scales = {value: activation_scale(found, format) for value, found in ranges.items()}
    writer = SymmetricWriter(model.graph, scales, format)
    for node in sources:
        writer.quantize(node)
    writer.drop_unused_weights()
    return StaticReport(
        quantized=tuple(node.name or "" for node in sources),
        kept_float=tuple(node.name or "" for node in candidates if node not in sources),
        ranges={value.name or "": found for value, found in ranges.items()},
        num_batches=len(feeds),
        input_scales={node.name or "": scales[value] for node, value in sources.items()},
    )


def decoder_scales(report: StaticReport) -> dict[str, float]:
    """The scale of what comes into each matrix of a decoder, by its module's path below the ``Vlm``."""
    found = {}
    for name, scale in report.input_scales.items():
        above, _, kind = name.removeprefix("node.").removesuffix(".product").rpartition(".")
        for layer in JOINED.get(kind, (kind,)):
            found[f"decoder.{above}.{layer}" if above else layer] = scale
    return found


def activation_scale(found: Range, format: Literal["int8", "fp8"]) -> float:
    """The scale of a tensor whose values lie in ``found``; 1 for a tensor of zeros."""
    bound = max(abs(found[0]), abs(found[1]))
    if not bound:
        return 1.0
    return power_of_two(bound / E4M3_LARGEST) if format == "fp8" else _half_scale(bound / INT8_LARGEST)


def _half_scale(scale: float) -> float:
    return float(half_scales(torch.tensor([scale])))


def _loses(node: ir.Node, seen: Seen, format: Literal["int8", "fp8"]) -> bool:
    """Whether most of what ``node`` reads would fall into a few codes."""
    if format == "fp8" or node.op_type == "Conv":
        return False
    mean_square = float(np.square(seen.sample, dtype=np.float64).mean())
    return float(np.abs(seen.extremes).max()) > OUTLIER * mean_square**0.5


def _source(node: ir.Node) -> ir.Value:
    assert node.inputs[0] is not None
    return node.inputs[0]


def _has_kernel(node: ir.Node, format: Literal["int8", "fp8"]) -> bool:
    """In int8 for every layer."""
    if node.op_type != "Conv" or format == "int8":
        return True
    weight = layer_weight(node)
    assert weight is not None
    assert weight.const_value is not None
    channels = weight.const_value.shape.numpy()[:2]
    return node.attributes.get_int("group", 1) == 1 and all(size % CHANNELS == 0 for size in channels)


class SymmetricWriter(SeamWriter):
    """Puts QuantizeLinear and DequantizeLinear before layers in 8 bits, whose codes have no zero point."""

    def __init__(self, graph: ir.Graph, scales: Mapping[ir.Value, float], format: Literal["int8", "fp8"]) -> None:
        super().__init__(graph, {value: (scale, 0) for value, scale in scales.items()})
        self.scheme, self.code = Static(format=format), CODES[format]

    def quantize(self, node: ir.Node) -> None:
        """Let ``node`` read rounded numbers and a rounded weight."""
        weight = node.inputs[1]
        assert weight is not None
        node.replace_input_with(0, self._activation(_source(node)))
        node.replace_input_with(1, self._weight(node, weight)[0])

    def _weight(self, node: ir.Node, value: ir.Value) -> tuple[ir.Value, NDArray[np.float32]]:
        """The weight, whose codes are made when the graph is saved, and its scale for each output channel."""
        axis, tensor = output_axis(node), value.const_value
        if (value, axis) not in self.weights:
            assert tensor is not None
            scale = _rounded(tensor, axis, self.scheme).scales[:, 0].numpy()
            shape = ir.Shape(tensor.shape.numpy())
            codes = ir.LazyTensor(lambda: self._codes(tensor, axis), self.code, shape, name=value.name)
            zero_point = np.zeros(scale.shape, self.code.numpy())
            self.weights[value, axis] = self._dequantized(node, value, codes, scale, zero_point, axis), scale
        return self.weights[value, axis]

    def _codes(self, tensor: ir.TensorProtocol, axis: int) -> ir.TensorProtocol:
        rows = _rounded(tensor, axis, self.scheme).codes
        shape = tensor.shape.numpy()
        codes = rows.view(torch.uint8).view(shape) if axis == 0 else rows.view(torch.uint8).T.contiguous()
        return ir.tensor(codes.numpy().view(self.code.numpy()), name=tensor.name)


def _rounded(tensor: ir.TensorProtocol, axis: int, scheme: Static) -> QuantizedWeight:
    """The weight with its output channels in rows; other axes lie one behind the other."""
    weight = torch.from_numpy(np.array(tensor.numpy()))
    return round_weight(weight.flatten(1) if axis == 0 else weight.T.contiguous(), scheme)
