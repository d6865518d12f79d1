"""What the gate allows, which case counts, and which pictures it asks about."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgevlm.processing.split import Crops, Idefics3Tiles, Split
from edgevlm.verify import golden
from edgevlm.verify.stages import StageResult, compare, worst
from edgevlm.verify.thresholds import FP32, Threshold


def test_what_is_allowed_grows_with_the_largest_value() -> None:
    threshold = Threshold(max_abs=0.5, relative=0.1, reason="test")
    assert threshold.allowed(np.array([1, -20, 3], np.float32)) == 2.5
    assert threshold.allowed(np.zeros(3, np.float32)) == 0.5


@pytest.mark.parametrize("stage", ["image_features", "fused_embeds", "prefill_logits", "decode_logits"])
def test_a_thousandth_of_the_largest_value_is_never_allowed(stage: str) -> None:
    reference = np.array([40.0, -3.0], np.float32)
    wrong = reference + np.float32(0.04)
    assert not compare(stage, reference, wrong, FP32[stage].allowed(reference)).passed


def test_rows_that_are_looked_up_may_not_differ_at_all() -> None:
    assert FP32["inputs_embeds"].allowed(np.array([100.0], np.float32)) == 0


def test_the_record_holds_the_largest_value_of_the_reference() -> None:
    result = compare("image_features", np.array([1, -7], np.float32), np.array([1, -7], np.float32), 0.1)
    assert result.max_reference == 7


def case(max_abs: float, tolerance: float, passed: bool = True) -> StageResult:
    return StageResult(stage="image_features", max_abs=max_abs, tolerance=tolerance, passed=passed)


def test_of_several_cases_the_one_nearest_to_its_own_limit_is_shown() -> None:
    assert worst([case(5, 100), case(2, 10)]).max_abs == 2
    assert worst([case(9, 10), case(11, 100, passed=False)]).max_abs == 11


@dataclass
class CuttingProcessor:
    """One tile for every 100 x 100 pixels that a picture has, and the whole where it is more than one."""

    split: Split | None

    @property
    def image_spec(self) -> Any:
        return SimpleNamespace(split=self.split)

    def pixels(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        count = -(-image.shape[0] // 100) * -(-image.shape[1] // 100)
        return np.zeros((count + (count > 1), 3, 1, 1), np.float32)


def test_of_a_tiled_models_pictures_those_with_the_most_but_not_too_many_tiles_are_asked_about() -> None:
    processor: Any = CuttingProcessor(Idefics3Tiles())
    wide, tall = golden.cases(processor)
    assert wide.image.shape[:2] == (200, 400)  # 9 tiles; 300 x 400 would have 13
    assert tall.image.shape[:2] == (120, 84)


@pytest.mark.parametrize("split", [None, Crops()])
def test_every_other_model_is_asked_about_the_whole_pictures(split: Split | None) -> None:
    processor: Any = CuttingProcessor(split)
    assert [case.image.shape[:2] for case in golden.cases(processor)] == [(300, 400), (120, 84)]
