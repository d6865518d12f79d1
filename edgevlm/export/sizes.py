"""How many bytes a bundle will take, before anything is written."""

from __future__ import annotations

from torch import nn

from edgevlm.export.precisions import Precisions
from edgevlm.models.vlm import Vlm
from edgevlm.quant.schemes import bits_per_weight, head_scheme, scheme_of

FLOAT_BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0}


def bundle_bytes(model: Vlm, wanted: Precisions, *, half_storage: bool = False) -> int:
    """What the weights take in all graphs together; the head and the layers of a pre-fusion have their own copies."""
    exact = 2.0 if half_storage else 4.0  # bytes of a weight that is stored as it is
    float_bytes = FLOAT_BYTES | {"fp32": exact}
    total = sum(_encoder_bytes(model, precision, float_bytes) for precision in wanted.encoder)
    if model.fusion is not None:
        total += sum(_num_weights(model.fusion.layers) * float_bytes[precision] for precision in wanted.fusion)
    total += sum(model.embed_tokens.weight.numel() * float_bytes[precision] for precision in wanted.embedding)
    target = wanted.target
    return int(total + sum(_decoder_bytes(model, precision, target, float_bytes) for precision in wanted.decoder))


def _encoder_bytes(model: Vlm, precision: str, float_bytes: dict[str, float]) -> float:
    """In 8 bits everything counts as rounded, though depthwise convolutions are not: they are few weights."""
    modules = [model.vision_encoder, model.projector, *([] if model.fusion is None else [model.fusion])]
    return sum(_num_weights(module) for module in modules) * float_bytes.get(precision, 1.0)


def _decoder_bytes(model: Vlm, precision: str, target: str, float_bytes: dict[str, float]) -> float:
    scheme, head = scheme_of(precision, target), model.head_weight
    if scheme is None:
        return (_num_weights(model.decoder) + head.numel()) * float_bytes[precision]
    rounded = 0.0
    for module in model.decoder.modules():
        if isinstance(module, nn.Linear):
            rounded += module.weight.numel() * bits_per_weight(scheme, module.in_features) / 8
    rounded += head.numel() * bits_per_weight(head_scheme(scheme), head.shape[1]) / 8
    matrices = sum(module.weight.numel() for module in model.decoder.modules() if isinstance(module, nn.Linear))
    return rounded + 4.0 * (_num_weights(model.decoder) - matrices)


def _num_weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
