"""``preprocessor_config.json``: an ImageSpec in the words of transformers and transformers.js."""

from __future__ import annotations

from typing import Any

from edgevlm.processing.fit import PILLOW_FILTERS
from edgevlm.processing.image_spec import ImageSpec
from edgevlm.processing.split import Crops, Idefics3Tiles, NanoVlmTiles


def preprocessor_config(spec: ImageSpec) -> dict[str, Any]:
    """The content of ``preprocessor_config.json`` for ``spec``.

    Where the hub's format cannot say what ``spec`` says, ``edgevlm_differences`` lists it, one sentence each;
    without that key transformers computes the same pixels.
    """
    config = _tiled(spec, spec.split) if isinstance(spec.split, Idefics3Tiles) else _whole(spec)
    differences = hub_differences(spec)
    return {**config, "edgevlm_differences": list(differences)} if differences else config


def _whole(spec: ImageSpec) -> dict[str, Any]:
    size = {"height": spec.height, "width": spec.width}
    crops = spec.fit == "center-crop"
    return {
        "image_processor_type": "LlavaImageProcessor" if spec.fit == "pad" else "CLIPImageProcessor",
        "size": {"shortest_edge": min(spec.height, spec.width)} if crops else size,
        "do_center_crop": crops,
        "crop_size": size,
        "do_pad": spec.fit == "pad",
        **_levels(spec),
    }


def _tiled(spec: ImageSpec, split: Idefics3Tiles) -> dict[str, Any]:
    return {
        "image_processor_type": "Idefics3ImageProcessor",
        "size": {"longest_edge": split.longest_edge},
        "max_image_size": {"longest_edge": max(spec.height, spec.width)},
        "do_image_splitting": split.enabled,
        "do_pad": True,
        **_levels(spec),
    }


def _levels(spec: ImageSpec) -> dict[str, Any]:
    return {
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": int(PILLOW_FILTERS[spec.filter]),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
    }


def hub_differences(spec: ImageSpec) -> tuple[str, ...]:
    """What a reader of ``preprocessor_config`` will do otherwise than ``spec`` says, one sentence each."""
    is_square = spec.height == spec.width
    mean_color = tuple(int(value * 255) for value in spec.mean)
    is_tiled = isinstance(spec.split, (Idefics3Tiles, NanoVlmTiles))
    views = spec.split.per_side**2 if isinstance(spec.split, Crops) else 0
    cases = {
        "Tiles are square.": is_tiled and not is_square,
        "Large pictures are not cut into tiles, and the whole picture stands alone.": (
            isinstance(spec.split, NanoVlmTiles) and spec.split.enabled
        ),
        f"The {views} crops before the whole picture are missing.": views > 0,
        "transformers.js stretches instead of padding.": spec.fit == "pad",
        "Padding goes to a square, not to the proportions of the target.": spec.fit == "pad" and not is_square,
        f"The pad colour is the mean, {mean_color}, not {spec.pad_color}.": spec.fit == "pad"
        and spec.pad_color != mean_color,
        "The shorter side of the picture becomes the shorter side of the target, which may not cover it.": (
            spec.fit == "center-crop" and not is_square
        ),
        "Antialiasing is always on.": not spec.antialias and spec.filter != "nearest",
        "Nearest reads the pixel under the centre.": not spec.antialias and spec.filter == "nearest",
        "Pixels are rounded to whole levels after the resize.": spec.rounding == "float" and spec.filter != "nearest",
        "Channels stay in the order red, green, blue.": spec.channel_order == "bgr",
    }
    return tuple(sentence for sentence, differs in cases.items() if differs)
