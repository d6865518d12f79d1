"""nanoVLM's and LLaVA-Mini's views, written a second time from their formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from edgevlm.processing.frames import square_frame
from edgevlm.processing.image_spec import ImageSpec
from edgevlm.processing.split import NanoVlmTiles
from edgevlm.processing.views import picture_views

TILE, LONGEST = 64, 256
SIZES = [(640, 480), (97, 211), (64, 64), (300, 7), (1, 90), (1000, 999), (63, 65), (128, 64)]  # width, height


def noise(size: tuple[int, int]) -> Image.Image:
    rng = np.random.default_rng(size)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def second_opinion(image: Image.Image, enlarge: bool) -> tuple[torch.Tensor, tuple[int, int]]:
    """Pillow's bicubic to whole tiles, then torch: the tiles by reshaping, the whole view by its smooth bilinear."""
    long, short = max(image.size), min(image.size)
    edge = LONGEST if enlarge else min(LONGEST, math.ceil(long / TILE) * TILE)
    other = math.ceil(short * (edge / long) / TILE) * TILE
    width, height = (edge, other) if image.width >= image.height else (other, edge)
    levels = np.array(image.resize((width, height), Image.Resampling.BICUBIC))
    pixels = torch.from_numpy(levels).permute(2, 0, 1).float() / 255
    rows, columns = height // TILE, width // TILE
    tiles = pixels.reshape(3, rows, TILE, columns, TILE).permute(1, 3, 0, 2, 4).reshape(-1, 3, TILE, TILE)
    if rows * columns == 1:
        return tiles, (1, 1)
    whole = torch.nn.functional.interpolate(pixels[None], (TILE, TILE), mode="bilinear", antialias=True)
    return torch.cat([whole, tiles]), (rows, columns)


@pytest.mark.parametrize("enlarge", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_nanovlm_views_are_those_of_the_formula(size: tuple[int, int], enlarge: bool) -> None:
    split = NanoVlmTiles(longest_edge=LONGEST, enlarge=enlarge)
    spec = ImageSpec(height=TILE, width=TILE, fit="stretch", filter="bicubic", split=split)
    expected, expected_grid = second_opinion(noise(size), enlarge)
    views, grid = picture_views(noise(size), spec)
    assert grid == expected_grid
    assert views.shape == expected.shape
    assert np.abs(views - expected.numpy()).max() <= 2e-6


@pytest.mark.parametrize("size", SIZES)
def test_frames_are_resized_as_torch_does(size: tuple[int, int]) -> None:
    frame = noise(size)
    pixels = torch.from_numpy(np.array(frame)).permute(2, 0, 1)[None].float()
    expected = torch.nn.functional.interpolate(pixels, (48, 48), mode="nearest").to(torch.uint8)[0].permute(1, 2, 0)
    found = np.asarray(square_frame(frame, ImageSpec(height=48, width=48, fit="center-crop")))
    assert (found == expected.numpy()).all()
