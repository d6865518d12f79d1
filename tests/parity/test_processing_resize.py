"""Our resize against Pillow, against torch, and against the reference processors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgevlm.processing.fit import PILLOW_FILTERS, fit_image
from edgevlm.processing.hub_config import preprocessor_config
from edgevlm.processing.image_spec import ImageSpec
from edgevlm.processing.images import pixel_values

SIZES = [
    (640, 480),
    (97, 211),
    (20, 30),
    (64, 64),
    (300, 7),
]  # width, height; larger and smaller than 64 x 48
ONE_LEVEL = 1.0  # two roundings to 8 bits, one after each pass
FLOAT_LEVEL = 2e-3  # of 255: single precision sums of up to a few hundred products


def picture(size: tuple[int, int]) -> Image.Image:
    """Waves with noise on top, far enough from 0 and 255 that no kernel overshoots them."""
    rng = np.random.default_rng(size[0])
    x, y = np.meshgrid(np.linspace(0, 9, size[0]), np.linspace(0, 7, size[1]))
    waves = np.stack([np.sin(x), np.cos(y), np.sin(x * y)], axis=-1) * 50 + 128
    return Image.fromarray(np.clip(waves + rng.normal(0, 8, waves.shape), 60, 195).astype(np.uint8))


def spec(**changes: Any) -> ImageSpec:
    return ImageSpec(**{"height": 48, "width": 64, "fit": "stretch", **changes})


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("filter", PILLOW_FILTERS)
def test_float_resize_is_pillow_before_rounding(filter: Any, size: tuple[int, int]) -> None:
    image = picture(size)
    ours = fit_image(image, spec(filter=filter, rounding="float"))
    channels = [channel.convert("F").resize((64, 48), PILLOW_FILTERS[filter]) for channel in image.split()]
    assert np.abs(ours - np.stack([np.asarray(channel) for channel in channels], axis=-1)).max() < FLOAT_LEVEL


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("filter", PILLOW_FILTERS)
@pytest.mark.parametrize("fit", ["stretch", "pad", "center-crop"])
def test_the_two_executions_agree_within_one_level(fit: Any, filter: Any, size: tuple[int, int]) -> None:
    rounded = fit_image(picture(size), spec(fit=fit, filter=filter, pad_color=(80, 180, 120)))
    exact = fit_image(picture(size), spec(fit=fit, filter=filter, pad_color=(80, 180, 120), rounding="float"))
    assert np.abs(rounded - np.clip(np.rint(exact), 0, 255)).max() <= ONE_LEVEL


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("filter", "antialias"),
    [("bilinear", True), ("bicubic", True), ("bilinear", False), ("bicubic", False), ("nearest", False)],
)
def test_float_resize_is_torch_interpolate(filter: Any, antialias: bool, size: tuple[int, int]) -> None:
    torch = pytest.importorskip("torch")
    image = picture(size)
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].double()
    options = {} if filter == "nearest" else {"antialias": antialias, "align_corners": False}
    expected = torch.nn.functional.interpolate(tensor, (48, 64), mode=filter, **options)
    ours = fit_image(image, spec(filter=filter, antialias=antialias, rounding="float"))
    assert np.abs(ours - expected[0].permute(1, 2, 0).numpy()).max() < FLOAT_LEVEL


@pytest.mark.parametrize("size", SIZES)
def test_rounding_without_antialias_is_torch_rounded(size: tuple[int, int]) -> None:
    ours = fit_image(picture(size), spec(antialias=False))
    exact = fit_image(picture(size), spec(antialias=False, rounding="float"))
    assert np.array_equal(ours, np.clip(np.rint(exact), 0, 255))


@pytest.mark.parametrize("size", [(640, 480), (97, 211), (200, 3000)])
def test_padding_in_strips_is_padding_at_once(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgevlm.processing.fit.STRIP_PIXELS", 5_000)
    image, side = picture(size), max(size)
    canvas = Image.new("RGB", (side, side), (1, 2, 3))
    canvas.paste(image, ((side - size[0]) // 2, (side - size[1]) // 2))
    expected = np.asarray(canvas.resize((56, 56), Image.Resampling.BICUBIC))
    ours = fit_image(image, spec(height=56, width=56, fit="pad", pad_color=(1, 2, 3)))
    assert np.array_equal(ours, expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("changes", [{"fit": "stretch"}, {"fit": "center-crop", "width": 48}], ids=["stretch", "crop"])
def test_clip_processor_reads_our_hub_file_and_agrees(changes: dict[str, Any], size: tuple[int, int]) -> None:
    reference = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    wanted = spec(**changes, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))
    processor = reference.CLIPImageProcessorPil(**preprocessor_config(wanted))
    expected = processor(picture(size), return_tensors="np")["pixel_values"]
    assert np.abs(pixel_values(picture(size), wanted) - expected).max() < 1e-5


@pytest.mark.parametrize("size", SIZES)
def test_llava_processor_reads_our_hub_file_and_pads_alike(size: tuple[int, int]) -> None:
    reference = pytest.importorskip("transformers.models.llava.image_processing_pil_llava")
    wanted = spec(fit="pad", width=48)
    processor = reference.LlavaImageProcessorPil(**preprocessor_config(wanted))
    expected = processor(picture(size), return_tensors="np")["pixel_values"]
    assert np.abs(pixel_values(picture(size), wanted) - expected).max() < 1e-6


def test_padding_a_tall_picture_cheaply_is_one_level_off(monkeypatch: pytest.MonkeyPatch) -> None:
    image, wanted = picture((40, 700)), spec(height=56, width=56, fit="pad", pad_color=(80, 180, 120))
    exact = fit_image(image, wanted)
    monkeypatch.setattr("edgevlm.processing.fit.MAX_CANVAS_PIXELS", 100)
    assert np.abs(fit_image(image, wanted) - exact).max() <= ONE_LEVEL
