"""What a user may change of a checkpoint's processor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from edgevlm.families.folder import ModelFolder
from edgevlm.families.native import FAMILY
from edgevlm.families.reading import mean_color
from edgevlm.models.changes import Changes
from edgevlm.processing.image_spec import Fit


@pytest.mark.parametrize(
    ("mean", "fit", "color"),
    [
        ((0.48145466, 0.4578275, 0.40821073), "center-crop", (122, 116, 104)),
        ((0.0, 0.0, 0.0), "stretch", (0, 0, 0)),
        ((0.5, 0.5, 0.5), "pad", (1, 2, 3)),  # as the checkpoint says
    ],
)
def test_bars_that_a_user_asks_for_have_the_mean_colour(
    tiny_checkpoint: Path, mean: tuple[float, float, float], fit: Fit, color: tuple[int, int, int]
) -> None:
    folder = ModelFolder(tiny_checkpoint)
    config = FAMILY.config(folder)
    processor = FAMILY.processor(folder, config)
    image = replace(processor.image_spec, mean=mean, fit=fit, pad_color=(1, 2, 3))
    changed = Changes(image_fit="pad").of_processor(replace(processor, image_spec=image), config)
    assert (changed.image_spec.fit, changed.image_spec.pad_color) == ("pad", color)


def test_a_mean_beyond_all_colours_is_a_colour() -> None:
    assert mean_color((-1.0, 0.5, 7.0)) == (0, 127, 255)
