"""An image spec is data that is checked, and pixel_values does what it says."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgevlm.core.config import from_mapping, to_json
from edgevlm.core.errors import ConfigError, InputError
from edgevlm.processing.fit import fit_image
from edgevlm.processing.hub_config import preprocessor_config
from edgevlm.processing.image_spec import ImageSpec
from edgevlm.processing.images import pixel_values


@pytest.mark.parametrize(
    "changes",
    [
        {"height": 0},
        {"width": 20_000},
        {"height": True},
        {"fit": "crop"},
        {"filter": "cubic"},
        {"antialias": 1},
        {"antialias": False, "filter": "lanczos"},
        {"rounding": "int8"},
        {"mean": (0.5, 0.5)},
        {"mean": (0.0, 0.0, float("nan"))},
        {"std": (1.0, 1.0, 0.0)},
        {"pad_color": (0, 0, 256)},
        {"pad_color": (0.5, 0, 0)},
        {"channel_order": "rbg"},
    ],
)
def test_values_that_cannot_be_used_are_refused(changes: dict[str, Any]) -> None:
    name = next(reversed(changes))
    with pytest.raises(ConfigError, match=f"image {name} must be .*; found "):
        ImageSpec(**{"height": 8, "width": 8, "fit": "stretch", **changes})


def test_a_spec_survives_json() -> None:
    spec = ImageSpec(height=8, width=9, fit="pad", mean=(0.1, 0.2, 0.3), pad_color=(1, 2, 3))
    assert from_mapping(ImageSpec, json.loads(to_json(spec)), strict=True, where="test") == spec


def test_mean_std_and_channel_order() -> None:
    image = Image.new("RGB", (4, 4), (255, 51, 0))
    spec = ImageSpec(height=4, width=4, fit="stretch", mean=(0.5, 0.2, 0.25), std=(0.5, 1.0, 0.25))
    values = pixel_values(image, spec)
    assert (values.shape, values.dtype) == ((1, 3, 4, 4), np.float32)
    assert values[0, :, 0, 0] == pytest.approx([1.0, 0.0, -1.0], abs=1e-6)
    swapped = pixel_values(image, dataclasses.replace(spec, channel_order="bgr"))
    assert np.array_equal(swapped, values[:, ::-1])


@pytest.mark.parametrize("rounding", ["uint8", "float"])
def test_pad_centres_the_picture_on_the_pad_colour(rounding: Any) -> None:
    spec = ImageSpec(height=4, width=4, fit="pad", filter="box", rounding=rounding, pad_color=(9, 8, 7))
    levels = fit_image(Image.new("RGB", (4, 1), (200, 100, 50)), spec)
    assert levels[:, 0, 0].tolist() == [9, 200, 9, 9]  # of 3 rows of padding 1 above, 2 below
    levels = fit_image(Image.new("RGB", (2, 4), (200, 100, 50)), spec)
    assert levels[0, :, 1].tolist() == [8, 100, 100, 8]


def test_centre_crop_keeps_the_middle() -> None:
    image = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(1, 6).repeat(2, 0) * 10).convert("RGB")
    spec = ImageSpec(height=2, width=2, fit="center-crop", filter="box")
    assert fit_image(image, spec)[0, :, 0].tolist() == [20, 30]


def test_stretch_gives_up_proportions() -> None:
    image = Image.fromarray(np.array([[0, 100, 50, 150]], dtype=np.uint8)).convert("RGB")
    spec = ImageSpec(height=1, width=2, fit="stretch", filter="box")
    assert fit_image(image, spec)[0, :, 0].tolist() == [50, 100]


def test_nearest_reads_the_corner_without_antialias_and_the_centre_with_it() -> None:
    image = Image.fromarray(np.array([[1, 2, 3, 4]], dtype=np.uint8)).convert("RGB")
    spec = ImageSpec(height=1, width=2, fit="stretch", filter="nearest")
    assert fit_image(image, spec)[0, :, 0].tolist() == [2, 4]
    assert fit_image(image, dataclasses.replace(spec, antialias=False))[0, :, 0].tolist() == [1, 3]


@pytest.mark.parametrize("fit", ["pad", "center-crop", "stretch"])
@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1), (3, 2)])
@pytest.mark.parametrize("rounding", ["uint8", "float"])
def test_extreme_shapes_fit(fit: Any, size: tuple[int, int], rounding: Any) -> None:
    spec = ImageSpec(height=16, width=24, fit=fit, rounding=rounding, filter="bilinear", pad_color=(255, 0, 0))
    levels = fit_image(Image.new("RGB", size, (255, 0, 0)), spec)
    assert levels.shape == (16, 24, 3)
    assert np.abs(levels - (255, 0, 0)).max() < 1e-3


def test_a_picture_too_thin_to_pad_is_refused() -> None:
    spec = ImageSpec(height=1, width=100, fit="pad")
    with pytest.raises(InputError, match="too long and thin"):
        fit_image(Image.new("RGB", (1, 1000)), spec)


def test_pixel_values_wants_rgb() -> None:
    with pytest.raises(InputError, match="load_image converts it"):
        pixel_values(Image.new("L", (2, 2)), ImageSpec(height=2, width=2, fit="stretch"))


def test_what_the_hub_cannot_say_is_listed() -> None:
    plain = ImageSpec(height=8, width=8, fit="stretch")
    assert "edgevlm_differences" not in preprocessor_config(plain)
    for changes in ({"antialias": False}, {"rounding": "float"}, {"channel_order": "bgr"}, {"fit": "pad"}):
        config = preprocessor_config(dataclasses.replace(plain, **changes))  # type: ignore[arg-type]
        assert len(config["edgevlm_differences"]) == 1
