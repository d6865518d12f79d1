"""``preprocessor_config.json``: an ImageSpec in the words of transformers and transformers.js."""

from __future__ import annotations

from typing import Any

from edgevlm.processing.fit import PILLOW_FILTERS
from edgevlm.processing.image_spec import ImageSpec


def preprocessor_config(spec: ImageSpec) -> dict[str, Any]:
    """The content of ``preprocessor_config.json`` for ``spec``.

    Where the hub's format cannot say what ``spec`` says, ``edgevlm_differences`` lists it, one sentence each;
    without that key transformers computes the same pixels.
    """
    size = {"height": spec.height, "width": spec.width}
    crops = spec.fit == "center-crop"
    config: dict[str, Any] = {
        "image_processor_type": "LlavaImageProcessor" if spec.fit == "pad" else "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": min(spec.height, spec.width)} if crops else size,
        "resample": int(PILLOW_FILTERS[spec.filter]),
        "do_center_crop": crops,
        "crop_size": size,
        "do_pad": spec.fit == "pad",
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
    }
    differences = hub_differences(spec)
    return {**config, "edgevlm_differences": list(differences)} if differences else config


def hub_differences(spec: ImageSpec) -> tuple[str, ...]:
    """What a reader of ``preprocessor_config`` will do otherwise than ``spec`` says, one sentence each."""
    is_square = spec.height == spec.width
    mean_color = tuple(int(value * 255) for value in spec.mean)
    cases = {
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
