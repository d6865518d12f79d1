"""A model's card: what it is made of and what it costs, from its configs alone, without tokenizer and weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from edgevlm.bundle.paths import MANIFEST_FILE
from edgevlm.bundle.read import Bundle
from edgevlm.core.config import from_mapping
from edgevlm.core.errors import ConfigError, EdgeVLMError, IntegrityError
from edgevlm.families.detect import family_of
from edgevlm.families.family import Family
from edgevlm.families.folder import ModelFolder
from edgevlm.processing.image_spec import ImageSpec
from edgevlm.processing.layout import num_tiles
from edgevlm.processing.split import Idefics3Tiles, NanoVlmTiles
from edgevlm.processing.views import grid_of
from edgevlm.shapes.config import FastVitConfig, HybridConfig, VlmConfig
from edgevlm.shapes.model_cost import (
    BITS,
    cache_bytes_per_token,
    fusion_cache_bytes,
    num_parameters,
    part_costs,
    published_flops,
    weight_bytes,
)
from edgevlm.shapes.resize import at_image_size

PICTURES = ((512, 512), (480, 640), (1080, 1920), (3024, 4032), (3508, 2480))  # height, width
SIDES = (224, 256, 336, 384, 448, 512, 768, 1024, 1536, 2048)  # pixels


@dataclass(frozen=True, kw_only=True)
class PartCard:
    """One part: the ``type`` of its config, its parameters, and its operations up to the first token."""

    part: str
    type: str
    parameters: int
    linear_flops: int
    attention_flops: int


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a model costs for one picture of ``image_size`` and a prompt of ``prompt_tokens``, one tile where it tiles.

    ``flops`` counts what our graphs compute; ``published_flops`` as LLaVA-Mini's tables do (no attention products,
    the head on every row).  Bytes of weights are those of all parts in one precision, without scales.
    ``vision_tokens_by_picture`` (height x width) is for models that cut pictures into tiles, else empty.
    """

    name: str
    family: str
    image_size: int
    prompt_tokens: int
    parts: tuple[PartCard, ...]
    parameters: int
    flops: int
    published_flops: int
    weight_bytes: Mapping[str, int]
    vision_tokens: int
    vision_tokens_by_image_size: Mapping[int, int]
    vision_tokens_by_picture: Mapping[str, int]
    cache_bytes_per_token: Mapping[str, int]
    fusion_cache_bytes_per_image: Mapping[str, int]
    max_context: int
    config: VlmConfig


def make_card(folder: ModelFolder, *, name: str = "", image_size: int | None = None, prompt_tokens: int = 43) -> Card:
    """The card of the checkpoint in ``folder``, by default under the folder's name; the weights are not opened.

    Raises what reading a config raises, and UnsupportedError for an ``image_size`` that the encoder cannot take.
    """
    family = family_of(folder)
    config = family.config(folder)
    name = name or folder.path.resolve().name
    return _card(name, family.name, config, _tiles(family, folder, config), image_size, prompt_tokens)


def bundle_card(bundle: Bundle, *, image_size: int | None = None, prompt_tokens: int = 43) -> Card:
    """The card of the model as it was exported into ``bundle``; raises what ``make_card`` raises, and IntegrityError.

    A bundle from before manifests held the model's config is read by its config.json.
    """
    manifest, where = bundle.manifest, str(bundle.root / MANIFEST_FILE)
    try:
        image = from_mapping(ImageSpec, manifest.image, strict=True, where=f"{where}: image")
        config = (
            from_mapping(VlmConfig, manifest.model, strict=True, where=f"{where}: model") if manifest.model else None
        )
    except ConfigError as error:
        raise IntegrityError(str(error)) from error
    if config is None:
        folder = ModelFolder(bundle.root)
        config = at_image_size(family_of(folder).config(folder), image.height)
    card = _card(manifest.name, manifest.family, config, image, image_size, prompt_tokens)
    return replace(card, max_context=manifest.max_context)


def _card(
    name: str, family: str, config: VlmConfig, image: ImageSpec | None, image_size: int | None, prompt_tokens: int
) -> Card:
    config = config if image_size is None else at_image_size(config, image_size)
    costs = part_costs(config, text_tokens=prompt_tokens)
    parameters = num_parameters(config)
    return Card(
        name=name,
        family=family,
        image_size=config.vision.image_size,
        prompt_tokens=prompt_tokens,
        parts=tuple(
            PartCard(
                part=part,
                type=part_type(config, part),
                parameters=cost.parameters,
                linear_flops=cost.linear_flops,
                attention_flops=cost.attention_flops,
            )
            for part, cost in costs.items()
        ),
        parameters=parameters,
        flops=sum(cost.flops for cost in costs.values()),
        published_flops=published_flops(config, text_tokens=prompt_tokens),
        weight_bytes={precision: weight_bytes(parameters, precision) for precision in BITS},
        vision_tokens=config.num_vision_tokens,
        vision_tokens_by_image_size=tokens_by_image_size(config),
        vision_tokens_by_picture=tokens_by_picture(image, config),
        cache_bytes_per_token={one: cache_bytes_per_token(config.decoder, one) for one in ("fp32", "fp16")},
        fusion_cache_bytes_per_image={one: fusion_cache_bytes(config, one) for one in ("fp32", "fp16")},
        max_context=config.decoder.max_position_embeddings,
        config=config,
    )


def part_type(config: VlmConfig, part: str) -> str:
    """What kind of part it is, in a word."""
    kinds = {
        "vision_encoder": config.vision.type,
        "projector": config.projector.type,
        "fusion": config.fusion.type if config.fusion else "",
        "decoder": f"{config.decoder.num_hidden_layers} layers",
        "lm_head": "tied" if config.decoder.tie_word_embeddings else "own weights",
    }
    return kinds.get(part, "")


def tokens_by_image_size(config: VlmConfig) -> dict[int, int]:
    """Vision tokens of a picture at each size that the encoder takes, its own included."""
    own = config.vision.image_size
    if not isinstance(config.vision, (FastVitConfig, HybridConfig)):
        return {own: config.num_vision_tokens}
    unit = config.vision.stride * config.projector.factor
    sides = sorted({own, *(side for side in SIDES if side % unit == 0)})
    return {side: at_image_size(config, side).num_vision_tokens for side in sides}


def tokens_by_picture(image: ImageSpec | None, config: VlmConfig) -> dict[str, int]:
    """Vision tokens of pictures that cameras and documents have, where ``image`` cuts them into tiles."""
    if image is None or not isinstance(image.split, (Idefics3Tiles, NanoVlmTiles)):
        return {}
    grids = {f"{height}x{width}": grid_of((height, width), image) for height, width in PICTURES}
    layout = image.split.type
    return {name: config.num_vision_tokens * num_tiles(layout, grid) for name, grid in grids.items()}


def _tiles(family: Family, folder: ModelFolder, config: VlmConfig) -> ImageSpec | None:
    """How pictures are cut; None where they are not, or where nobody can say: a card needs config.json alone."""
    if family.tiles is None:
        return None
    try:
        return family.tiles(folder, config)
    except EdgeVLMError:
        return None
