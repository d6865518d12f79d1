"""A model split into the graphs that a bundle holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from edgevlm.bundle.manifest import TensorSpec
from edgevlm.models.vision.hybrid import reparameterize
from edgevlm.models.vlm import Vlm

PartName = Literal["vision_encoder", "embed_tokens", "decoder_model_merged"]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One graph to be: the modules that it computes with, and its tensors by name, type and shape.

    A string in a shape is a size that may differ from call to call.
    """

    name: PartName
    model: Vlm
    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]


class VisionEncoder(nn.Module):
    """Encoder and projector as one: ``pixel_values`` (B, 3, H, W) to ``image_features`` (B, N, D)."""

    def __init__(self, model: Vlm) -> None:
        super().__init__()
        self.vision_encoder, self.projector = model.vision_encoder, model.projector

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.projector(self.vision_encoder(pixel_values))


def split(model: Vlm) -> tuple[Part, ...]:
    """The parts of ``model``, its encoder in inference form."""
    model = reparameterize(model)
    config = model.config
    size, N, D = config.vision.image_size, config.num_vision_tokens, config.decoder.hidden_size
    pixels = TensorSpec(name="pixel_values", dtype="float32", shape=("batch", 3, size, size))
    features = TensorSpec(name="image_features", dtype="float32", shape=("batch", N, D))
    ids = TensorSpec(name="input_ids", dtype="int64", shape=("batch", "sequence"))
    embeds = TensorSpec(name="inputs_embeds", dtype="float32", shape=("batch", "sequence", D))
    return (
        Part(name="vision_encoder", model=model, inputs=(pixels,), outputs=(features,)),
        Part(name="embed_tokens", model=model, inputs=(ids,), outputs=(embeds,)),
        _decoder_part(model, embeds),
    )


def _decoder_part(model: Vlm, embeds: TensorSpec) -> Part:
    config = model.config.decoder
    mask = TensorSpec(name="attention_mask", dtype="int64", shape=("batch", "total_sequence"))
    logits = TensorSpec(name="logits", dtype="float32", shape=("batch", 1, config.vocab_size))
    return Part(
        name="decoder_model_merged",
        model=model,
        inputs=(embeds, mask, *_cache(model, "past_key_values", "past_sequence")),
        outputs=(logits, *_cache(model, "present", "total_sequence")),
    )


def _cache(model: Vlm, prefix: str, length: str) -> list[TensorSpec]:
    config = model.config.decoder
    shape = ("batch", config.num_key_value_heads, length, config.head_dim)
    return [
        TensorSpec(name=f"{prefix}.{layer}.{kind}", dtype="float32", shape=shape)
        for layer in range(config.num_hidden_layers)
        for kind in ("key", "value")
    ]
