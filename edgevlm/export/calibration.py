"""Pictures from which an encoder in 8 bits learns its ranges."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgevlm.core.errors import ConfigError, InputError, translate_disk_errors
from edgevlm.evaluation.scenes import make_scene, render
from edgevlm.processing.processor import Processor

FIRST_SERIES = 1_000_000  # of scenes, so that no seed meets those that models are trained or scored on
SUFFIXES = frozenset((".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".qoi", ".tif", ".tiff", ".webp"))


def calibration_pixels(processor: Processor, folder: Path | None, num: int, seed: int) -> list[NDArray[np.float32]]:
    """``pixel_values`` [S, 3, H, W] of ``num`` pictures, prepared as the model reads them, one array a picture.

    The pictures are those of ``folder``, or generated scenes if there is none; where the folder has more than ``num``,
    ``seed`` chooses.  Raises InputError for a folder without pictures or a file that is no picture, ConfigError for
    a number below 1.
    """
    if num < 1 or seed < 0:
        raise ConfigError(f"calibration takes 1 picture or more and a seed of 0 or more; found {num} and {seed}")
    if folder is None:
        side = processor.image_spec.height
        scenes = (make_scene(FIRST_SERIES + seed, index) for index in range(num))
        return [processor.pixels(render(scene, side)) for scene in scenes]
    return [processor.pixels(path) for path in pictures_in(folder, num, seed)]


def pictures_in(folder: Path, num: int, seed: int) -> Sequence[Path]:
    """At most ``num`` of the pictures directly in ``folder``, in the order of their names."""
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; --calib takes one with pictures that look like those to come")
    with translate_disk_errors(f"reading {folder}", reading=True):
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        raise InputError(f"{folder} has no pictures ({', '.join(sorted(SUFFIXES))}); calibration needs at least one")
    return sorted(random.Random(seed).sample(paths, min(num, len(paths))))
