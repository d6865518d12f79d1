"""Round the shipped model in several ways: what each takes, and how often it then answers as before.

    python quant/compare_precisions.py

A few questions only, so that it ends soon; docs/quantization.md has the same with many.
"""

from __future__ import annotations

from dataclasses import replace

from edgevlm.evaluation import Suite, is_match, scenes_suite
from edgevlm.models.checkpoint import Checkpoint, load_model
from edgevlm.quant.calibration import calibration_samples, importance
from edgevlm.quant.decoder import quantize_decoder
from edgevlm.quant.fake import fake_quantized

PRECISIONS = ("int8", "int8-dynamic", "int4-b32-rtn", "int4-b32", "int4-b128", "int4-b128-asym-head8")
NUM_SCENES, PER_SCENE = 8, 2


def main() -> None:
    """One line for each precision."""
    nano, suite = load_model("nano"), scenes_suite(NUM_SCENES, per_scene=PER_SCENE)
    counts = importance(nano, calibration_samples(num=8))
    reference = answers(nano, suite)
    print(f"{'precision':22}{'decoder bytes':>14}{'right':>7}{'as fp32':>9}   of {len(reference)} questions")
    print(f"{'fp32':22}{'':>14}{num_right(suite, reference):>7}{len(reference):>9}")
    for precision in PRECISIONS:
        quantized = quantize_decoder(nano.model, precision, importance=counts)
        found = answers(replace(nano, model=fake_quantized(nano.model, quantized)), suite)
        same = sum(a == b for a, b in zip(found, reference, strict=True))
        print(f"{quantized.precision:22}{quantized.num_bytes:>14,}{num_right(suite, found):>7}{same:>9}", flush=True)


def answers(checkpoint: Checkpoint, suite: Suite) -> list[str]:
    """What the model says to every question of the suite, greedily."""
    images = [suite.image(index) for index in range(suite.num_images)]
    with checkpoint.open() as vlm:
        return [vlm.ask(images[item.image_index], item.question.prompt, max_tokens=16).text for item in suite.items]


def num_right(suite: Suite, found: list[str]) -> int:
    """How many of the answers are the right ones."""
    return sum(is_match(answer, item.question.answer) for answer, item in zip(found, suite.items, strict=True))


if __name__ == "__main__":
    main()
