"""A model split into the graphs that a bundle holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from edgevlm.bundle.manifest import TensorSpec
from edgevlm.core.errors import UnsupportedError
from edgevlm.export.heads import cache_head_size
from edgevlm.models.vision.reparameterize import bake
from edgevlm.models.vlm import Vlm
from edgevlm.shapes.config import FastVitConfig, HybridConfig, MlpConfig, VlmConfig
from edgevlm.shapes.fusion import FusionConfig
from edgevlm.shapes.model_cost import num_fusion_rows

PartName = Literal["vision_encoder", "fusion", "embed_tokens", "decoder_model_merged"]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One graph to be: the modules that it computes with, and its tensors by name, type and shape.

    A string in a shape is a size that may differ from call to call.  ``examples`` are values of such sizes that a
    tracer may try; 2 is as good as any for those that it does not name.
    """

    name: PartName
    model: Vlm
    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]
    examples: Mapping[str, int] = field(default_factory=dict)


class VisionEncoder(nn.Module):
    """Encoder and projector as one: ``pixel_values`` (B, 3, H, W) to ``image_features`` (B, N, D)."""

    def __init__(self, model: Vlm) -> None:
        super().__init__()
        self.vision_encoder, self.projector = model.vision_encoder, model.projector

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.projector(self.vision_encoder(pixel_values))


class FusedVisionEncoder(nn.Module):
    """``pixel_values`` (S, 3, H, W) of one picture's views to ``image_features`` (1, K, D) and ``fusion_cache``."""

    def __init__(self, model: Vlm) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        return self.model.encode_fused(pixel_values)


class TextFusion(nn.Module):
    """``inputs_embeds`` (1, T, D) and ``fusion_cache`` to ``fused_embeds`` (1, T, D)."""

    def __init__(self, model: Vlm) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs_embeds: Tensor, fusion_cache: Tensor) -> Tensor:
        return self.model.fuse(fusion_cache, inputs_embeds)


def traced_module(part: Part) -> nn.Module:
    """What computes a part that is traced: all but the decoder."""
    if part.name == "embed_tokens":
        return part.model.embed_tokens
    if part.name == "fusion":
        return TextFusion(part.model)
    return VisionEncoder(part.model) if part.model.fusion is None else FusedVisionEncoder(part.model)


def split(model: Vlm, *, static_batch: bool = False, free_sizes: bool = False) -> tuple[Part, ...]:
    """The parts of ``model``, its encoder in inference form.

    ``static_batch``: the encoder reads one view a call.  ``free_sizes``: it reads any height and width that its stride
    divides; raises UnsupportedError for an encoder whose picture has one size.
    """
    model = bake(model)
    config = model.config
    D = config.decoder.hidden_size
    ids = TensorSpec(name="input_ids", dtype="int64", shape=("batch_size", "sequence"))
    embeds = TensorSpec(name="inputs_embeds", dtype="float32", shape=("batch_size", "sequence", D))
    return (
        *_seeing_parts(model, static_batch, free_sizes),
        Part(name="embed_tokens", model=model, inputs=(ids,), outputs=(embeds,)),
        _decoder_part(model, embeds),
    )


def _seeing_parts(model: Vlm, static_batch: bool, free_sizes: bool) -> tuple[Part, ...]:
    if free_sizes:
        check_free_sizes(model.config)
    if model.config.fusion is not None:  # its graphs read all the views of one picture at once, whatever is asked
        return _fused_parts(model, model.config.fusion)
    batch = 1 if static_batch else "batch_size"  # the name by which transformers.js knows it
    return (_free_vision_part(model, batch) if free_sizes else _vision_part(model, batch),)


def check_free_sizes(config: VlmConfig) -> None:
    """Raise UnsupportedError unless one graph of the encoder can serve pictures of several sizes.

    It can where convolutions alone tell positions apart and the projector works row by row: FastViT and the hybrid
    encoder with the MLP projector.
    """
    vision, projector = config.vision, config.projector
    if isinstance(vision, (FastVitConfig, HybridConfig)) and isinstance(projector, MlpConfig) and not config.fusion:
        return
    behind = "pre-fusion" if config.fusion else f"the projector {projector.type!r}"
    raise UnsupportedError(
        f"the encoder {vision.type!r} with {behind} reads pictures of one size; free sizes need a fastvit or hybrid "
        f"encoder with an mlp projector: export once for each --image-size instead"
    )


def _vision_part(model: Vlm, batch: int | str) -> Part:
    config = model.config
    size, N, D = config.vision.image_size, config.num_vision_tokens, config.decoder.hidden_size
    pixels = TensorSpec(name="pixel_values", dtype="float32", shape=(batch, 3, size, size))
    features = TensorSpec(name="image_features", dtype="float32", shape=(batch, N, D))
    return Part(name="vision_encoder", model=model, inputs=(pixels,), outputs=(features,))


def _free_vision_part(model: Vlm, batch: int | str) -> Part:
    """Height and width differ in the tracer's example, lest it takes all pictures for squares."""
    vision, D = model.config.vision, model.config.decoder.hidden_size
    stride = vision.image_size // vision.grid_size
    pixels = TensorSpec(name="pixel_values", dtype="float32", shape=(batch, 3, "height", "width"))
    features = TensorSpec(name="image_features", dtype="float32", shape=(batch, "num_vision_tokens", D))
    examples = {"height": 4 * stride, "width": 3 * stride}
    return Part(name="vision_encoder", model=model, inputs=(pixels,), outputs=(features,), examples=examples)


def _fused_parts(model: Vlm, fusion: FusionConfig) -> tuple[Part, Part]:
    """One picture at a time: its views at once, then the text of one prompt."""
    config, decoder = model.config, model.config.decoder
    size, D = config.vision.image_size, decoder.hidden_size
    rows = (num_fusion_rows(config, fusion), decoder.head_dim)
    cache_shape = (fusion.num_layers, 2, decoder.num_key_value_heads, *rows)
    pixels = TensorSpec(name="pixel_values", dtype="float32", shape=(config.num_views, 3, size, size))
    tokens = TensorSpec(name="image_features", dtype="float32", shape=(1, config.num_vision_tokens, D))
    cache = TensorSpec(name="fusion_cache", dtype="float32", shape=cache_shape)
    text, fused = (
        TensorSpec(name=name, dtype="float32", shape=(1, "sequence", D)) for name in ("inputs_embeds", "fused_embeds")
    )
    return (
        Part(name="vision_encoder", model=model, inputs=(pixels,), outputs=(tokens, cache)),
        Part(name="fusion", model=model, inputs=(text, cache), outputs=(fused,)),
    )


def _decoder_part(model: Vlm, embeds: TensorSpec) -> Part:
    config = model.config.decoder
    mask = TensorSpec(name="attention_mask", dtype="int64", shape=("batch_size", "total_sequence"))
    logits = TensorSpec(name="logits", dtype="float32", shape=("batch_size", 1, config.vocab_size))
    return Part(
        name="decoder_model_merged",
        model=model,
        inputs=(embeds, mask, *_cache(model, "past_key_values", "past_sequence")),
        outputs=(logits, *_cache(model, "present", "total_sequence")),
    )


def _cache(model: Vlm, prefix: str, length: str) -> list[TensorSpec]:
    config = model.config.decoder
    shape = ("batch_size", config.num_key_value_heads, length, cache_head_size(config))
    return [
        TensorSpec(name=f"{prefix}.{layer}.{kind}", dtype="float32", shape=shape)
        for layer in range(config.num_hidden_layers)
        for kind in ("key", "value")
    ]
