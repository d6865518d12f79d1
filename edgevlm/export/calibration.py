"""Pictures from which an encoder in 8 bits learns its ranges."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgevlm.core.errors import ConfigError
from edgevlm.evaluation.scenes import make_scene, render
from edgevlm.processing.processor import Processor
from edgevlm.quant.calibration import pictures_in

FIRST_SERIES = 1_000_000  # of scenes, so that no seed meets those that models are trained or scored on


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
