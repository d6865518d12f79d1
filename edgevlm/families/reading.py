"""What a checkpoint's own files say about its pictures, its prompts and its tokens."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from edgevlm.core.config import from_mapping, shown
from edgevlm.core.errors import ConfigError, UnsupportedError
from edgevlm.families.folder import ModelFolder
from edgevlm.families.values import known_name
from edgevlm.processing.chat import ChatTemplate
from edgevlm.processing.fit import PILLOW_FILTERS
from edgevlm.processing.image_spec import Filter, ImageSpec
from edgevlm.processing.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

Values = Mapping[str, Any]

FILTERS: Mapping[int, Filter] = {int(resample): name for name, resample in PILLOW_FILTERS.items()}
RESCALE = 1 / 255
LARGEST = 1e6  # no mean or deviation of colours is as far from 0
CLIP_COLOURS = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
HALVES = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}

# What an image processor of transformers does where preprocessor_config.json leaves a key out.
SHORTEST_THEN_CROP: Values = {
    "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "resample": 3,
    **CLIP_COLOURS,
}
SQUARE: Values = {"size": {"height": 224, "width": 224}, **HALVES}
TILES: Values = {"size": {"longest_edge": 1456}, "max_image_size": {"longest_edge": 364}, "resample": 1, **HALVES}
DEFAULTS: Mapping[str, Values] = {
    "CLIPImageProcessor": SHORTEST_THEN_CROP,
    "LlavaImageProcessor": SHORTEST_THEN_CROP,
    "LlavaNextImageProcessor": SHORTEST_THEN_CROP,
    "SiglipImageProcessor": {**SQUARE, "resample": 3},
    "ViTImageProcessor": {**SQUARE, "resample": 2},
    "Idefics3ImageProcessor": TILES,
    "SmolVLMImageProcessor": TILES,
}
TILED = ("Idefics3ImageProcessor", "SmolVLMImageProcessor")
SHORTEST_BY_DEFAULT = ("CLIPImageProcessor", "LlavaImageProcessor", "LlavaNextImageProcessor")


def read_image_spec(folder: ModelFolder, *, default: ImageSpec) -> ImageSpec:
    """The preprocessing that preprocessor_config.json describes, ``default`` where there is no such file.

    Of LLaVA-NeXT's tiles only the whole picture is taken.  What stands elsewhere (``image_aspect_ratio`` of LLaVA's
    config) is the family's affair.  Raises UnsupportedError for what an ImageSpec cannot say.
    """
    values = folder.json("preprocessor_config.json") or folder.json("processor_config.json").get("image_processor")
    if not isinstance(values, Mapping) or not values:
        return default
    name = "preprocessor_config.json" if folder.has("preprocessor_config.json") else "processor_config.json"
    where = f"{folder.path}: {name}"
    kind = _kind(values, where)
    values = {**DEFAULTS[kind], **{key: value for key, value in values.items() if value is not None}}
    _check_steps(values, where)
    mean_and_std = _mean_and_std(values, where)
    read = _tiles if kind in TILED else _whole if kind == "LlavaNextImageProcessor" else _one
    geometry = read(kind, values, where)
    table = {**geometry, **mean_and_std, "filter": _filter(values, where)}
    return from_mapping(ImageSpec, table, strict=True, where=where)


def read_template(folder: ModelFolder, default: str) -> ChatTemplate:
    """The folder's own chat template, else the one with the source ``default``."""
    return ChatTemplate.from_folder(folder.path, default)


def read_tokenizer(folder: ModelFolder, *, placeholder: str) -> Tokenizer:
    """The folder's tokenizer, in which ``placeholder`` is a special token, added at the end if it was none.

    Raises IntegrityError where there is none, UnsupportedError for one that cannot be read.
    """
    return Tokenizer.from_folder(folder.path).with_special(placeholder)


def read_stop_ids(folder: ModelFolder, tokenizer: Tokenizer, *, known: Sequence[str] = ()) -> tuple[int, ...]:
    """The ids that end an answer: of generation_config.json, else config.json, and the tokenizer's ``eos_token``.

    Tokens that a family is ``known`` to end with come first, whatever the files say.  What the vocabulary does not
    have is left out.  Raises ConfigError when nothing is left.
    """
    family = [tokenizer.token_id(token) for token in known if tokenizer.has(token)]
    text_config = folder.config.get("text_config")
    sources = (folder.json("generation_config.json"), folder.config, text_config or {})
    listed = next((ids for ids in (_eos_ids(source) for source in sources) if ids), [])
    settings = folder.json("tokenizer_config.json").get("eos_token")
    text = settings.get("content") if isinstance(settings, Mapping) else settings
    named = [tokenizer.token_id(text)] if isinstance(text, str) and tokenizer.has(text) else []
    if listed and not any(has_id(tokenizer, id) for id in listed):
        logger.warning("%s: eos_token_id is %s, which the tokenizer does not have", folder.path, shown(listed))
    stops = [*family, *(id for id in [*listed, *named] if has_id(tokenizer, id))]
    if not stops:
        raise ConfigError(
            f"{folder.path}: no file names a token of the vocabulary that ends an answer; "
            f"write its id as eos_token_id into generation_config.json"
        )
    return tuple(dict.fromkeys(stops))


def has_id(tokenizer: Tokenizer, id: object) -> bool:
    """Whether ``id``, whatever a file has there, is that of a token."""
    return type(id) is int and 0 <= id < 2**31 and tokenizer.token(id) is not None


def mean_color(mean: Sequence[float]) -> tuple[int, int, int]:
    """The ``mean`` of R, G and B in [0, 1] as the colour of bars beside a picture, 0 to 255."""
    red, green, blue = (int(min(max(value, 0.0), 1.0) * 255) for value in mean)
    return red, green, blue


def _eos_ids(values: object) -> list[int]:
    found = values.get("eos_token_id") if isinstance(values, Mapping) else None
    return [id for id in (found if isinstance(found, list) else [found]) if type(id) is int]


def _kind(values: Values, where: str) -> str:
    """The class's name without what its back end adds (Fast, Pil), in the spelling of today."""
    found = values.get("image_processor_type") or values.get("feature_extractor_type") or "none"
    if isinstance(found, str):
        found = found.removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")
    return known_name("image_processor_type", found, DEFAULTS, where=where)


def _check_steps(values: Values, where: str) -> None:
    for step in ("do_resize", "do_rescale"):
        if not values.get(step, True):
            raise UnsupportedError(f"{where}: {step} is false, but every picture must be resized and scaled to 0..1")
    factor = values.get("rescale_factor", RESCALE)
    if not isinstance(factor, float) or not abs(factor - RESCALE) <= 1e-9:
        raise UnsupportedError(f"{where}: rescale_factor must be 1/255 = {RESCALE}; found {shown(factor)}")


def _mean_and_std(values: Values, where: str) -> dict[str, Any]:
    if not values.get("do_normalize", True):
        return {}
    return {"mean": _three(values["image_mean"], where), "std": _three(values["image_std"], where)}


def _three(value: Any, where: str) -> list[float]:
    three = value if isinstance(value, list) else [value] * 3
    if len(three) != 3 or not all(type(number) in (int, float) and abs(number) < LARGEST for number in three):
        raise UnsupportedError(f"{where}: image_mean and image_std must be three numbers; found {shown(value)}")
    return [float(number) for number in three]


def _filter(values: Values, where: str) -> Filter:
    resample = values["resample"]
    if type(resample) is not int or resample not in FILTERS:
        raise UnsupportedError(
            f"{where}: resample must be one of {', '.join(map(str, FILTERS))}; found {shown(resample)}"
        )
    return FILTERS[resample]


def _one(kind: str, values: Values, where: str) -> dict[str, Any]:
    """One view: padded to a square, cropped from the middle, or stretched."""
    size = _size(values["size"], where, "shortest_edge" if kind in SHORTEST_BY_DEFAULT else "")
    crop = _sides(values["crop_size"], where) if values.get("do_center_crop") else None
    if kind == "LlavaImageProcessor" and values.get("do_pad"):
        colour = mean_color(_three(values["image_mean"], where))
        return {**_target(_padded(size, where), crop, where), "fit": "pad", "pad_color": colour}
    if "shortest_edge" not in size:
        return {**_target(_sides(size, where), crop, where), "fit": "stretch"}
    edge = size["shortest_edge"]
    if crop is None:
        raise UnsupportedError(
            f"{where}: the shorter side becomes {shown(edge)} and nothing is cropped, but sizes must be fixed"
        )
    return {**_target((edge, edge), crop, where), "fit": "center-crop"}


def _padded(size: Mapping[str, int], where: str) -> tuple[int, int]:
    edge = size.get("shortest_edge")
    return _sides(size, where) if edge is None else (edge, edge)


def _target(resized: tuple[int, int], crop: tuple[int, int] | None, where: str) -> dict[str, Any]:
    if crop is not None and crop != resized:
        raise UnsupportedError(
            f"{where}: pictures are resized to {resized[0]} x {resized[1]} and then cropped to {crop[0]} x {crop[1]}; "
            f"only equal sizes are supported"
        )
    return {"height": resized[0], "width": resized[1]}


def _whole(kind: str, values: Values, where: str) -> dict[str, Any]:
    """The first view of LLaVA-NeXT: the whole picture, stretched to the square of the encoder."""
    height, width = _padded(_size(values["size"], where, "shortest_edge"), where)
    crop = _sides(values["crop_size"], where) if values.get("do_center_crop") else None
    return {**_target((height, width), crop, where), "fit": "stretch"}


def _tiles(kind: str, values: Values, where: str) -> dict[str, Any]:
    size, tile = _size(values["size"], where, "longest_edge"), _size(values["max_image_size"], where, "longest_edge")
    if "longest_edge" not in size or "longest_edge" not in tile:
        raise UnsupportedError(f"{where}: size and max_image_size of a {kind} must each name a longest_edge")
    split = {
        "type": "idefics3",
        "longest_edge": size["longest_edge"],
        "enabled": bool(values.get("do_image_splitting", True)),
    }
    side = tile["longest_edge"]
    return {"height": side, "width": side, "fit": "stretch", "split": split}


def _size(size: object, where: str, lone: str) -> Mapping[str, int]:
    """A size with exactly the keys height and width, shortest_edge, or longest_edge; a number means ``lone``."""
    if type(size) is int:
        return {lone: size} if lone else {"height": size, "width": size}
    if not isinstance(size, Mapping) or any(type(value) is not int for value in size.values() if value is not None):
        raise UnsupportedError(f"{where}: a size is a number of pixels or a table of them; found {shown(size)}")
    given = {name: value for name, value in size.items() if value is not None}
    if set(given) not in ({"height", "width"}, {"shortest_edge"}, {"longest_edge"}):
        raise UnsupportedError(f"{where}: a size names height and width, or one edge; found {shown(size)}")
    return given


def _sides(size: object, where: str) -> tuple[int, int]:
    sides = _size(size, where, "")
    if "height" not in sides:
        raise UnsupportedError(f"{where}: pictures must get a fixed height and width; found {shown(size)}")
    return sides["height"], sides["width"]
