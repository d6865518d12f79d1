"""The reference of a quantized graph: PyTorch with the same rounded weights, and activations rounded as kernels do.

What remains between it and an engine is the order of additions, so a broken kernel or a wrong packing cannot hide
behind the error that rounding itself makes.
"""

from __future__ import annotations

import copy
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgevlm.models.decoder import Decoder
from edgevlm.models.vlm import Vlm
from edgevlm.quant.decoder import HEAD, QuantizedDecoder
from edgevlm.quant.floats import to_e4m3
from edgevlm.quant.rounding import QuantizedWeight
from edgevlm.quant.schemes import DynamicInt8, Float4, Scheme, Static

INT8_LOWEST, INT8_LARGEST, UINT8_LARGEST = -128, 127, 255


def fake_quantized(model: Vlm, quantized: QuantizedDecoder) -> Vlm:
    """``model`` computing as its quantized graph does; everything that is not rounded is shared with it, not copied.

    Embeddings of ids stay as they are, also where the head is tied to them.  The graph computes logits of the last
    row of each sequence alone: with dynamic activations, whose scale depends on the whole call, ask for no more
    (``TorchSession`` does).
    """
    return FakeQuantizedVlm(model, quantized).train(model.training)


class FakeQuantizedVlm(Vlm):
    """A ``Vlm`` put together from another one's parts."""

    def __init__(self, model: Vlm, quantized: QuantizedDecoder) -> None:
        nn.Module.__init__(self)  # not Vlm's, which would make fresh parts
        self.config = model.config
        self.vision_encoder, self.projector = model.vision_encoder, model.projector
        self.embed_tokens, self.fusion = model.embed_tokens, model.fusion
        self.decoder = _shared_copy(model.decoder)
        for path, weight in quantized.weights.items():
            if path != HEAD:
                layer = self.get_submodule(path)
                assert isinstance(layer, nn.Linear)
                self.set_submodule(path, _rounded(quantized, path, weight, layer.bias))
        head = quantized.weights.get(HEAD)
        self.lm_head = model.lm_head if head is None else _rounded(quantized, HEAD, head, None)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (…, D) to logits (…, V), through a head that rounds its inputs, too."""
        return super().logits(hidden) if self.lm_head is None else self.lm_head(hidden)


class RoundedLinear(nn.Linear):
    """A linear layer of rounded weights that rounds its inputs first, if kernels of its scheme do.

    ``input_scale``: of the inputs, where the scheme is ``Static``.
    """

    def __init__(
        self, weight: QuantizedWeight, bias: Tensor | None, scheme: Scheme, input_scale: float | None = None
    ) -> None:
        values = weight.dequantize()
        super().__init__(values.shape[1], values.shape[0], bias=bias is not None, device="meta")
        self.weight = nn.Parameter(values, requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias.detach().float(), requires_grad=False)
        self.group_size, self.scheme, self.input_scale = weight.group_size, scheme, input_scale

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(self._round_inputs(input))

    def _round_inputs(self, inputs: Tensor) -> Tensor:
        """As the kernels do: those of TensorRT leave the inputs of weights in blocks as they are."""
        if isinstance(self.scheme, Static):
            assert self.input_scale is not None
            return round_static(inputs, self.input_scale, self.scheme)
        if isinstance(self.scheme, DynamicInt8):
            return round_per_call(inputs)
        if isinstance(self.scheme, Float4) or self.scheme.half_scales:
            return inputs
        return round_in_blocks(inputs, self.group_size)


def round_static(inputs: Tensor, scale: float, scheme: Static) -> Tensor:
    """``inputs`` as ``QuantizeLinear`` with this scale, and no zero point, rounds them to int8 or E4M3."""
    if scheme.format == "fp8":
        return to_e4m3(inputs / scale).to(inputs.dtype) * scale
    return (inputs / scale).round().clamp(INT8_LOWEST, INT8_LARGEST) * scale


def round_in_blocks(inputs: Tensor, group_size: int) -> Tensor:
    """``inputs`` (…, K) as ``MatMulNBits`` with ``accuracy_level`` 4 reads them: every block of a row in int8.

    A block's largest magnitude becomes 127; the last block may be short.
    """
    K = inputs.shape[-1]
    padded: Tensor = F.pad(inputs, (0, -K % group_size))
    blocks = padded.unflatten(-1, (-1, group_size))
    scales = blocks.abs().amax(-1, keepdim=True) / INT8_LARGEST
    codes = (blocks / torch.where(scales > 0, scales, 1.0)).round()
    rounded: Tensor = (codes * scales).flatten(-2)
    return rounded[..., :K]


def round_per_call(inputs: Tensor) -> Tensor:
    """``inputs`` as ``DynamicQuantizeLinear`` rounds them: the whole tensor in uint8, with 0 in its range."""
    low, high = inputs.min().clamp(max=0), inputs.max().clamp(min=0)
    scale = (high - low) / UINT8_LARGEST
    scale = torch.where(scale > 0, scale, 1.0)
    zero = (-low / scale).round().clamp(0, UINT8_LARGEST)
    return ((inputs / scale).round().add(zero).clamp(0, UINT8_LARGEST) - zero) * scale


def _rounded(quantized: QuantizedDecoder, path: str, weight: QuantizedWeight, bias: Tensor | None) -> RoundedLinear:
    return RoundedLinear(weight, bias, quantized.scheme, quantized.input_scales.get(path))


def _shared_copy(decoder: Decoder) -> Decoder:
    """Modules of its own around the same tensors."""
    tensors = chain(decoder.parameters(), decoder.buffers())
    return copy.deepcopy(decoder, {id(tensor): tensor for tensor in tensors})
