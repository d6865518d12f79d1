"""What a benchmark asks: a new picture each time, the same words, and as much warm-up as it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import count, cycle, pairwise
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

from edgevlm.bench.measurement import Repetition, WarmUp, Workload
from edgevlm.core.errors import UsageError
from edgevlm.evaluation.scenes import make_scene, render
from edgevlm.processing.chat import user_message
from edgevlm.processing.images import ImageSource
from edgevlm.processing.picture import Grid
from edgevlm.runtimes.answer import Answer
from edgevlm.runtimes.vlm import RuntimeVlm

PROMPT = "Describe the picture."
# What lengthens a prompt: one of which two copies cost two tokens, then the others for what is missing.
FILLERS = (" the", " a", " is", " and", " of", " in", " again", "a", ".")
SCENE_SEED = 20_777  # a series of its own, that no training set or suite draws from
SMALLEST_SCENE = 16

SETTLED_WITHIN = 0.02
WARM_UP_AT_LEAST, WARM_UP_AT_MOST = 3, 20


@dataclass(frozen=True)
class Picture:
    """What one repetition asks about."""

    name: str
    source: ImageSource


def scene_pictures(size: int, seed: int = SCENE_SEED) -> Iterator[Picture]:
    """Endless distinct pictures of ``size`` x ``size`` pixels, as PNG files in memory."""
    for index in count():
        file = BytesIO()
        Image.fromarray(render(make_scene(seed, index), max(size, SMALLEST_SCENE))).save(file, "PNG")
        yield Picture(f"scene {index}", file.getvalue())


def given_pictures(images: Sequence[ImageSource]) -> Iterator[Picture]:
    """The given images in turn, without end."""
    named = [Picture(image_name(image, i), image) for i, image in enumerate(images)]
    return cycle(named)


def image_name(image: ImageSource, index: int = 0) -> str:
    """The file's name, or ``image 3`` for one that never was a file."""
    if not isinstance(image, (str, Path)):
        return f"image {index}"
    return Path(image).name.encode("utf-8", "replace").decode("utf-8")


def num_distinct(images: Sequence[ImageSource]) -> int:
    """How many of the images differ: files by path, bytes by content, others one by one."""
    return len({image if isinstance(image, (str, Path, bytes)) else id(image) for image in images})


def prompt_of_length(vlm: RuntimeVlm, num_tokens: int, prompt: str = PROMPT) -> str:
    """``prompt``, lengthened until a question about one scene has ``num_tokens`` tokens, vision included.

    The count is exact wherever the vocabulary has a filler that costs a single token, else as near below as
    fillers come; every repetition of a measurement records what it was.  Raises UsageError where the vision
    tokens and ``prompt`` alone are more, or the context is shorter.
    """
    grid = scene_grid(vlm)
    shortest = prompt_tokens(vlm, prompt, grid)
    if not shortest <= num_tokens <= vlm.max_context:
        raise UsageError(
            f"a prompt of {num_tokens} tokens is not possible: {vlm.name} needs {shortest} for a picture "
            f"and the shortest question, and its context holds {vlm.max_context}"
        )
    for filler in sorted(FILLERS, key=lambda one: abs(prompt_tokens(vlm, prompt + 2 * one, grid) - shortest - 2)):
        prompt = _filled(vlm, prompt, filler, num_tokens, grid)
    return prompt


def _filled(vlm: RuntimeVlm, prompt: str, filler: str, num_tokens: int, grid: Grid) -> str:
    """``prompt`` and as many fillers as ``num_tokens`` leaves room for; each one costs a token or more."""
    low, high = 0, num_tokens - prompt_tokens(vlm, prompt, grid)
    while low < high:
        middle = (low + high + 1) // 2
        fits = prompt_tokens(vlm, prompt + filler * middle, grid) <= num_tokens
        low, high = (middle, high) if fits else (low, middle - 1)
    return prompt + filler * low


def warm_up(ask: Callable[[], Repetition]) -> WarmUp:
    """Repeat ``ask`` until three consecutive medians agree within 2 %: at least 3, at most 20 times."""
    times_ms: list[float] = []
    while len(times_ms) < WARM_UP_AT_MOST and not is_settled(times_ms):
        times_ms.append(ask().end_to_end_ms)
    return WarmUp(num_repetitions=len(times_ms), settled=is_settled(times_ms))


def is_settled(times: Sequence[float]) -> bool:
    """Whether the last three running medians (each of three values) lie within 2 % of each other."""
    if len(times) < WARM_UP_AT_LEAST:
        return False
    ends = range(len(times) - 2, len(times) + 1)
    medians = [median(times[max(0, end - 3) : end]) for end in ends]
    return max(medians) <= min(medians) * (1 + SETTLED_WITHIN)


def ask_once(vlm: RuntimeVlm, work: Workload, picture: Picture) -> Repetition:
    """One question, timed by the clock of the runtime."""
    answer = vlm.ask(
        picture.source,
        work.prompt,
        max_tokens=work.num_new_tokens,
        use_image_cache=work.image_cache,
        ignore_eos=True,  # every repetition is as long as the others
    )
    return repetition(picture.name, answer)


def repetition(image: str, answer: Answer) -> Repetition:
    """What an answer says about time."""
    times, moments = answer.timings, answer.timings.token_times_ms
    return Repetition(
        image=image,
        stages_ms=dict(times.stages_ms),
        ttft_user_ms=times.ttft_user_ms,
        ttft_engine_ms=times.ttft_engine_ms,
        tpot_ms=times.tpot_ms,
        end_to_end_ms=times.end_to_end_ms,
        token_gaps_ms=tuple(after - before for before, after in pairwise(moments)),
        num_prompt_tokens=answer.num_prompt_tokens,
        num_vision_tokens=answer.num_vision_tokens,
        num_new_tokens=len(answer.token_ids),
        finish_reason=answer.finish_reason,
        image_from_cache=answer.image_from_cache,
    )


def prompt_tokens(vlm: RuntimeVlm, prompt: str, grid: Grid) -> int:
    """How many tokens a question about one picture of ``grid`` tiles has, vision included."""
    return len(vlm.processor.input_ids([user_message(prompt, num_images=1)], grids=[grid]))


def scene_grid(vlm: RuntimeVlm) -> Grid:
    """The rows and columns of tiles that a scene of the model's own size is cut into."""
    image = vlm.processor.image_spec
    if image.split is None:
        return (1, 1)
    side = max(image.height, image.width, SMALLEST_SCENE)
    return vlm.processor.prepare(np.zeros((side, side, 3), np.uint8)).grid
