"""How much each input of a matrix counts, and which come together, while the model answers questions.

An error e in one weight adds e · x to the output, so over many inputs x it counts with the mean of x²; two errors
d and e of one output's weights count together with the mean of d · x · e · y.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from edgevlm.core.errors import InputError, UsageError, translate_disk_errors
from edgevlm.evaluation.scenes import make_scene, questions, render
from edgevlm.evaluation.suites import HELD_OUT_SEEDS
from edgevlm.models.checkpoint import Checkpoint
from edgevlm.models.vlm import Vlm
from edgevlm.processing.images import ImageSource
from edgevlm.quant.compensation import num_spans
from edgevlm.quant.decoder import HEAD, linear_layers

NUM_SAMPLES = 32
FIRST_SERIES = 1000  # of scenes: none that a shipped model is trained or scored on
SCENE_SIZE = 384  # pixels square; every model brings pictures to its own size
PROMPTS = (
    "Describe the picture.",
    "What is in the picture?",
    "How many objects are there?",
    "What does the sign say?",
)
PICTURES = frozenset((".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".qoi", ".tif", ".tiff", ".webp"))
SAME_INPUTS = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}  # layers that read what another reads
ROWS_AT_ONCE = 128
MAX_TOKENS = 12  # of each answer: some rows that the model wrote itself, few enough for a large one on a CPU

Report = Callable[[int, int], None]  # told (samples done, samples in all) after each


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """One question about one picture."""

    image: ImageSource
    prompt: str


def importance(
    checkpoint: Checkpoint, samples: Sequence[Sample], *, report: Report = lambda done, total: None
) -> dict[str, Tensor]:
    """Second moments [P, S, S] of the inputs of every matrix that is rounded, by module path, float32.

    The rows are those of prompts and answers: vision tokens, text, and what the model itself writes; for the head the
    last row alone, since no other reaches it.  Raises UsageError without samples, and what asking raises.
    """
    if not samples:
        raise UsageError("calibration needs at least one sample (--calib-samples)")
    with checkpoint.open() as vlm, watched(checkpoint.model) as seen:
        for done, sample in enumerate(samples, start=1):
            vlm.ask(sample.image, sample.prompt, max_tokens=MAX_TOKENS)
            report(done, len(samples))
    means = {id(moments): moments.mean() for moments in seen.values()}
    return {path: means[id(moments)] for path, moments in seen.items()}


def calibration_samples(folder: Path | None = None, num: int = NUM_SAMPLES, seed: int = 0) -> list[Sample]:
    """``num`` questions about generated scenes, or about the pictures of ``folder``; ``seed`` picks which.

    Raises InputError for a folder without pictures, UsageError for fewer than one sample or a negative seed.
    """
    if num < 1 or seed < 0:
        raise UsageError(f"calibration needs at least one sample and a seed of at least 0, got {num} and {seed}")
    return _of_scenes(num, seed) if folder is None else _of_folder(folder, num, seed)


def pictures_in(folder: Path, num: int, seed: int) -> list[Path]:
    """At most ``num`` of the pictures in ``folder`` and below, which ``seed`` picks, in the order of their names.

    Both halves of a model are calibrated with these.  Raises InputError for what is no folder or holds no picture.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; --calib takes one with pictures that look like those to come")
    with translate_disk_errors(f"reading {folder}", reading=True):
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES and path.is_file())
    if not paths:
        kinds = " ".join(sorted(PICTURES))
        raise InputError(f"{folder} holds no picture ({kinds}): give a folder with some (--calib), or leave it out")
    return sorted(random.Random(seed).sample(paths, min(num, len(paths))))


class SecondMoments:
    """Sums of x xᵀ over rows x, within spans of neighbouring inputs [P, S, S], and the number of rows.

    Rows are gathered and counted many at a time: the sums are far larger than a row.
    """

    def __init__(self, num_inputs: int) -> None:
        self.num_inputs, (num, self.width) = num_inputs, num_spans(num_inputs)
        self.total = torch.zeros(num, self.width, self.width)
        self.num_rows = 0
        self._waiting: list[Tensor] = []
        self._is_mean = False

    def add(self, rows: Tensor) -> None:
        """Count rows (…, K)."""
        assert not self._is_mean
        flat = rows.detach().float().flatten(0, -2)
        self._waiting.append(flat)
        self.num_rows += len(flat)
        if sum(map(len, self._waiting)) >= ROWS_AT_ONCE:
            self._count()

    def mean(self) -> Tensor:
        """Second moments [P, S, S], float32, in the memory of the sums: no row can be added any more."""
        if not self._is_mean:
            self._count()
            self.total /= max(1, self.num_rows)
            self._is_mean = True
        return self.total

    def _count(self) -> None:
        if not self._waiting:
            return
        rows, self._waiting = torch.cat(self._waiting), []
        filled: Tensor = F.pad(rows, (0, len(self.total) * self.width - self.num_inputs))
        spans = filled.view(len(rows), -1, self.width).transpose(0, 1)
        self.total.baddbmm_(spans.transpose(1, 2), spans)


@contextmanager
def watched(model: Vlm) -> Iterator[Mapping[str, SecondMoments]]:
    """Record, while the block runs, what comes into every matrix that is rounded."""
    seen = {HEAD: SecondMoments(model.head_weight.shape[1])}
    with ExitStack() as hooks:
        for path, layer in linear_layers(model):
            block, _, name = path.rpartition(".")
            if name in SAME_INPUTS:
                seen[path] = seen[f"{block}.{SAME_INPUTS[name]}"]
                continue
            seen[path] = SecondMoments(layer.in_features)
            hooks.callback(_watch_inputs(layer, seen[path]).remove)
        hooks.callback(_watch_last_row(model.decoder, seen[HEAD]).remove)
        yield seen


def _watch_inputs(layer: nn.Module, moments: SecondMoments) -> RemovableHandle:
    return layer.register_forward_pre_hook(lambda _, inputs: moments.add(inputs[0]))


def _watch_last_row(decoder: nn.Module, moments: SecondMoments) -> RemovableHandle:
    return decoder.register_forward_hook(lambda _, inputs, hidden: moments.add(hidden[:, -1:]))


def _of_scenes(num: int, seed: int) -> list[Sample]:
    """A scene each, with one of its questions or a request to describe it."""
    series = FIRST_SERIES + seed
    assert series not in HELD_OUT_SEEDS
    return [_of_scene(series, index) for index in range(num)]


def _of_scene(series: int, index: int) -> Sample:
    scene = make_scene(series, index)
    prompts = [PROMPTS[0], *(question.prompt for question in questions(scene))]
    return Sample(image=render(scene, SCENE_SIZE), prompt=prompts[index % len(prompts)])


def _of_folder(folder: Path, num: int, seed: int) -> list[Sample]:
    """The folder's pictures, again from the start with other questions where there are fewer than ``num``."""
    paths = pictures_in(folder, num, seed)
    turns = ((index, *divmod(index, len(paths))) for index in range(num))
    return [Sample(image=paths[place], prompt=PROMPTS[(index + turn) % len(PROMPTS)]) for index, turn, place in turns]
