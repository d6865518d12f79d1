"""Linear layers as nodes: in float, or with the codes that ``edgevlm.quant`` chose.

Layers that read the same rows become one product, their outputs side by side.  With ONNX Runtime's own operators codes
go to ``MatMulNBits`` (weights alone, 4 or 8 bits) and ``DynamicQuantizeMatMul`` (8 bits, activations too), documented
in its ContribOperators.md.  In the plain dialect they go through ``DequantizeLinear`` in blocks and ``MatMulInteger``,
which ONNX Runtime recognizes and turns into those two.  4-bit floats take two ``DequantizeLinear``, one of the scales
and one of the weights, which TensorRT reads (from 10.8) as NVFP4; they want opset 23.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from edgevlm.export.graph_writer import GraphWriter
from edgevlm.quant.floats import to_e4m3
from edgevlm.quant.rounding import QuantizedWeight

CONTRIB = "com.microsoft"
INT8_ACTIVATIONS = 4  # accuracy_level of MatMulNBits: rows rounded to 8 bits block by block, 1.6 to 1.9 times as fast
NIBBLE = 4
CHUNK = 1 << 20  # codes that are packed together


@dataclass(frozen=True, kw_only=True)
class Projection:
    """A linear layer: its ``path`` below the Vlm, and what gives its weight (N, K)."""

    path: str
    num_outputs: int
    num_inputs: int
    weight: Callable[[], Tensor]
    bias: Tensor | None = None


def projection(path: str, layer: nn.Linear) -> Projection:
    """``layer`` as it stands at ``path``."""
    bias = None if layer.bias is None else layer.bias.detach()
    return Projection(
        path=path,
        num_outputs=layer.out_features,
        num_inputs=layer.in_features,
        weight=lambda: layer.weight.detach(),
        bias=bias,
    )


class MatMuls:
    """Writes linear layers: with codes where ``quantized`` has some for them, else in float."""

    def __init__(self, writer: GraphWriter, quantized: Mapping[str, QuantizedWeight], *, plain: bool) -> None:
        self.writer, self.quantized, self.plain = writer, quantized, plain

    def linear(self, hidden: ir.Value, layers: Sequence[Projection], name: str) -> ir.Value:
        """``hidden`` (…, K) times the weights of ``layers`` side by side, plus their biases if they have any."""
        weights = [self.quantized[layer.path] for layer in layers if layer.path in self.quantized]
        if not weights:
            return self._float(hidden, layers, name)
        assert len(weights) == len(layers), f"{name}: only some of its layers have codes"
        assert all(w.codes.shape == (p.num_outputs, p.num_inputs) for w, p in zip(weights, layers, strict=True)), name
        assert len({(w.bits, w.group_size, w.zero_points is None) for w in weights}) == 1, f"{name}: schemes differ"
        codes = Codes(weights)
        if codes.per_channel:
            return (self._integer if self.plain else self._dynamic)(hidden, codes, layers, name)
        return (self._dequantized if self.plain else self._blocked)(hidden, codes, layers, name)

    def _float(self, hidden: ir.Value, layers: Sequence[Projection], name: str) -> ir.Value:
        shape = (layers[0].num_inputs, sum(layer.num_outputs for layer in layers))
        weight = self.writer.columns(lambda: [layer.weight() for layer in layers], shape, f"{name}.weight")
        return self._plus_bias(self.writer.one("MatMul", [hidden, weight], f"{name}.product"), layers, name)

    def _blocked(self, hidden: ir.Value, codes: Codes, layers: Sequence[Projection], name: str) -> ir.Value:
        """``MatMulNBits``: a row's blocks one after the other, two 4-bit codes to the byte, the lower half first."""
        N, G, bits, size = codes.num_outputs, codes.num_groups, codes.bits, codes.group_size
        inputs: list[ir.Value | None] = [
            hidden,
            self.writer.lazy(codes.blocks, (N, G, size * bits // 8), ir.DataType.UINT8, f"{name}.weight_q"),
            self.writer.lazy(codes.scales, (N, G), ir.DataType.FLOAT, f"{name}.weight_scales"),
        ]
        if codes.has_zero_points:
            shape = (N, -(-G * bits // 8))
            inputs.append(self.writer.lazy(codes.packed_points, shape, ir.DataType.UINT8, f"{name}.weight_points"))
        if bias := self._bias(layers, name):
            inputs += [None] * (5 - len(inputs)) + [bias]
        attributes = {"K": codes.num_inputs, "N": N, "bits": bits, "block_size": size}
        return self.writer.one(
            "MatMulNBits", inputs, f"{name}.product", domain=CONTRIB, accuracy_level=INT8_ACTIVATIONS, **attributes
        )

    def _dynamic(self, hidden: ir.Value, codes: Codes, layers: Sequence[Projection], name: str) -> ir.Value:
        """``DynamicQuantizeMatMul``: 8 bits on both sides, activations with one scale for the whole call."""
        inputs = [hidden, self._int8(codes, name), self._channel_scales(codes, name), None, self._bias(layers, name)]
        while inputs[-1] is None:
            inputs.pop()
        return self.writer.one("DynamicQuantizeMatMul", inputs, f"{name}.product", domain=CONTRIB)

    def _dequantized(self, hidden: ir.Value, codes: Codes, layers: Sequence[Projection], name: str) -> ir.Value:
        """Weights (K, N) in blocks along K, widened in the graph; K is filled up, since engines want whole blocks."""
        N, G = codes.num_outputs, codes.num_groups
        K = G * codes.group_size
        inputs = [
            self.writer.lazy(codes.transposed, (K, N), codes.dtype, f"{name}.weight_q"),
            self._float4_scales(codes, name)
            if codes.global_scale
            else self.writer.lazy(lambda: codes.scales().T.copy(), (G, N), ir.DataType.FLOAT, f"{name}.weight_scales"),
        ]
        if codes.has_zero_points:
            inputs.append(self.writer.lazy(codes.transposed_points, (G, N), codes.dtype, f"{name}.weight_points"))
        weight = self.writer.one("DequantizeLinear", inputs, f"{name}.weight", axis=0, block_size=codes.group_size)
        if codes.num_inputs < K:
            room = self.writer.integers(0, 0, 0, 0, 0, K - codes.num_inputs)
            hidden = self.writer.one("Pad", [hidden, room], f"{name}.filled")
        return self._plus_bias(self.writer.one("MatMul", [hidden, weight], f"{name}.product"), layers, name)

    def _float4_scales(self, codes: Codes, name: str) -> ir.Value:
        """Scales (G, N), 8-bit floats widened in the graph."""
        assert codes.global_scale is not None
        shape = (codes.num_groups, codes.num_outputs)
        narrow = self.writer.lazy(codes.transposed_scales, shape, ir.DataType.FLOAT8E4M3FN, f"{name}.weight_scales_q")
        return self.writer.one(
            "DequantizeLinear", [narrow, self.writer.number(codes.global_scale)], f"{name}.weight_scales"
        )

    def _integer(self, hidden: ir.Value, codes: Codes, layers: Sequence[Projection], name: str) -> ir.Value:
        """8 bits on both sides: round the activations, multiply whole numbers, scale."""
        writer = self.writer
        rounded, scale, zero = writer.op(
            "DynamicQuantizeLinear", [hidden], f"{name}.rounded", num_outputs=3, attributes={}
        )
        whole = writer.one("MatMulInteger", [rounded, self._int8(codes, name), zero], f"{name}.whole")
        both = writer.one("Mul", [scale, self._channel_scales(codes, name)], f"{name}.scales")
        product = writer.one("Mul", [writer.cast(whole, ir.DataType.FLOAT, f"{name}.wide"), both], f"{name}.product")
        return self._plus_bias(product, layers, name)

    def _int8(self, codes: Codes, name: str) -> ir.Value:
        shape = (codes.num_inputs, codes.num_outputs)
        return self.writer.lazy(codes.transposed, shape, ir.DataType.INT8, f"{name}.weight_q")

    def _channel_scales(self, codes: Codes, name: str) -> ir.Value:
        return self.writer.lazy(codes.scales, (codes.num_outputs,), ir.DataType.FLOAT, f"{name}.weight_scales")

    def _plus_bias(self, product: ir.Value, layers: Sequence[Projection], name: str) -> ir.Value:
        bias = self._bias(layers, name)
        return product if bias is None else self.writer.one("Add", [product, bias], f"{name}.sum")

    def _bias(self, layers: Sequence[Projection], name: str) -> ir.Value | None:
        biases = [layer.bias for layer in layers if layer.bias is not None]
        return self.writer.weight(torch.cat(biases), f"{name}.bias") if biases else None


class Codes:
    """The codes of several weights, one's rows below the other's, in the layouts that operators read.

    Every method packs anew, so that a large tensor exists only while it is saved.
    """

    def __init__(self, weights: Sequence[QuantizedWeight]) -> None:
        first = weights[0]
        self._weights = weights
        self.bits, self.group_size, self.has_zero_points = first.bits, first.group_size, first.zero_points is not None
        self.global_scale = first.global_scale
        assert all(weight.global_scale == self.global_scale for weight in weights), "one scale for a whole decoder"
        self.num_outputs = sum(len(weight.codes) for weight in weights)
        self.num_inputs, self.num_groups = first.codes.shape[1], first.scales.shape[1]

    @property
    def per_channel(self) -> bool:
        """Signed codes with one scale per output, whose activations are rounded, too."""
        return self._weights[0].codes.dtype == torch.int8

    @property
    def dtype(self) -> ir.DataType:
        """Of the codes in ``DequantizeLinear``: unsigned beside zero points, else signed, or a float."""
        if self.global_scale:
            return ir.DataType.FLOAT4E2M1
        return ir.DataType[f"{'UINT' if self.has_zero_points else 'INT'}{self.bits}"]

    def blocks(self) -> NDArray[np.uint8]:
        """``(N, G, group_size · bits / 8)``, a short last block filled up with what stands for zero."""
        missing = self.num_groups * self.group_size - self.num_inputs
        middle = 1 << (self.bits - 1)
        row_bytes = self.num_groups * self.group_size * self.bits // 8
        packed, start = torch.empty(self.num_outputs, row_bytes, dtype=torch.uint8), 0
        for weight in self._weights:
            for rows in weight.codes.split(max(1, CHUNK // self.num_inputs)):
                packed[start : start + len(rows)] = _packed(F.pad(rows, (0, missing), value=middle), self.bits)
                start += len(rows)
        return _array(packed)

    def packed_points(self) -> NDArray[np.uint8]:
        """Zero points ``(N, ceil(G · bits / 8))``."""
        odd = self.num_groups % 2 if self.bits == NIBBLE else 0
        return _array(_packed(F.pad(self._points(), (0, odd)), self.bits))

    def scales(self) -> NDArray[np.float32]:
        """``(N, G)``."""
        return torch.cat([weight.scales for weight in self._weights]).float().numpy()

    def transposed_scales(self) -> NDArray[np.generic]:
        """``(G, N)`` as E4M3 numbers, which the ``global_scale`` brings to their size."""
        assert self.global_scale is not None
        scales = torch.cat([weight.scales for weight in self._weights]).T / self.global_scale
        return _array(to_e4m3(scales.contiguous()).view(torch.uint8)).view(ir.DataType.FLOAT8E4M3FN.numpy())

    def transposed(self) -> NDArray[np.generic]:
        """``(G · group_size, N)``, signed unless there are zero points; of 4 bits two to the byte over all of it."""
        codes = torch.zeros(self.num_groups * self.group_size, self.num_outputs, dtype=torch.uint8)
        start = 0
        for weight in self._weights:
            codes[: self.num_inputs, start : start + len(weight.codes)] = weight.codes.view(torch.uint8).T
            start += len(weight.codes)
        if not (self.has_zero_points or self.per_channel or self.global_scale):
            codes ^= 1 << (self.bits - 1)  # from an offset of half the range to two's complement
        return self._flat(codes)

    def transposed_points(self) -> NDArray[np.generic]:
        """Zero points ``(G, N)``."""
        return self._flat(self._points().T)

    def _points(self) -> Tensor:
        return torch.cat([weight.zero_points for weight in self._weights if weight.zero_points is not None])

    def _flat(self, codes: Tensor) -> NDArray[np.generic]:
        if self.bits != NIBBLE:
            return _array(codes).view(np.int8 if self.dtype == ir.DataType.INT8 else np.uint8)
        flat = codes.flatten()
        return _array(_packed(F.pad(flat, (0, len(flat) % 2)), self.bits))


def _packed(codes: Tensor, bits: int) -> Tensor:
    """4-bit codes (…, n) as bytes (…, n / 2), the lower half first; 8-bit ones as they are."""
    if bits != NIBBLE:
        return codes
    packed = codes[..., 1::2] << NIBBLE
    packed |= codes[..., 0::2] & 15
    return packed


def _array(codes: Tensor) -> NDArray[np.uint8]:
    return np.ascontiguousarray(codes.numpy())
