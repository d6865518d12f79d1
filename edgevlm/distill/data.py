"""Batches of scenes: one picture, many questions, packed into one sequence.

    <|user|> <|image|>·N | question <|assistant|> answer <|end|> | question <|assistant|> answer <|end|> | …

Every block sees the prefix and itself, at the positions it would have alone, so a picture is encoded once
for all its questions and the decoder learns what it will be asked at run time.  In a *chained* sequence the
blocks follow each other as the turns of one conversation.  Everything follows from (seed, step, rank), so a
resumed run sees the same.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.pool import Pool
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgevlm.core.files import atomic_file
from edgevlm.distill.recipe import TrainRecipe
from edgevlm.distill.vocabulary import ASSISTANT, END, IMAGE, USER
from edgevlm.evaluation.scenes import (
    GENERATOR_VERSION,
    Question,
    Scene,
    caption,
    make_scene,
    questions,
    render,
)
from edgevlm.evaluation.scenes.asking import CAPTION_KIND, CAPTION_PROMPT

Encode = Callable[[str], list[int]]
IGNORED = -100
LENGTH_STEP = 32  # kernels are prepared, and memory kept, per shape


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Pictures (B, 3, S, S), packed ids, targets and positions (B, T), who sees whom (B, 1, T, T), and the scenes."""

    pixel_values: Tensor
    input_ids: Tensor
    targets: Tensor  # the next id where the loss looks, IGNORED elsewhere
    positions: Tensor
    mask: Tensor
    scenes: tuple[Scene, ...]


@dataclass(frozen=True, kw_only=True)
class Packed:
    """One sequence before padding; ``blocks`` is 0 for rows that every later row sees."""

    input_ids: list[int]
    targets: list[int]
    positions: list[int]
    blocks: list[int]


def pack(asked: Sequence[Question], encode: Encode, num_vision_tokens: int, *, chained: bool) -> Packed:
    """The prefix and one block per question."""
    ids = encode(USER) + encode(IMAGE) * num_vision_tokens
    targets, positions, blocks = [IGNORED] * len(ids), list(range(len(ids))), [0] * len(ids)
    start = len(ids)
    for number, question in enumerate(asked, start=1):
        turn = encode(USER) if chained and number > 1 else []
        prompt = turn + encode(question.prompt) + encode(ASSISTANT)
        answer = encode(question.answer) + encode(END)
        block = prompt + answer
        first = len(ids) if chained else start
        ids += block
        targets += [IGNORED] * (len(prompt) - 1) + answer + [IGNORED]
        positions += range(first, first + len(block))
        blocks += [0 if chained else number] * len(block)
    return Packed(input_ids=ids, targets=targets, positions=positions, blocks=blocks)


def collate(packed: Sequence[Packed], pixel_values: Tensor, scenes: Sequence[Scene]) -> Batch:
    """Pad to the longest sequence, rounded up so that few shapes occur; nobody sees the padding."""
    longest = max(len(one.input_ids) for one in packed)
    T = -(-longest // LENGTH_STEP) * LENGTH_STEP

    def padded(rows: Sequence[list[int]], fill: int) -> Tensor:
        return torch.tensor([row + [fill] * (T - len(row)) for row in rows])

    blocks = padded([one.blocks for one in packed], -1)
    seen, seeing = blocks.unsqueeze(1), blocks.unsqueeze(2)
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    return Batch(
        pixel_values=pixel_values,
        input_ids=padded([one.input_ids for one in packed], 0),
        targets=padded([one.targets for one in packed], IGNORED),
        positions=padded([one.positions for one in packed], 0),
        mask=(causal & ((seen == 0) | (seen == seeing))).unsqueeze(1),
        scenes=tuple(scenes),
    )


def shuffled_with_caption(scene: Scene, generator: np.random.Generator, *, captioned: float) -> list[Question]:
    """The scene's questions in a new order, now and then with a request to describe it."""
    asked = list(questions(scene))
    if generator.random() < captioned:
        asked.append(Question(kind=CAPTION_KIND, prompt=CAPTION_PROMPT, answer=caption(scene)))
    return [asked[index] for index in generator.permutation(len(asked))]


def normalized(
    pictures: NDArray[np.uint8],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    contrast: Tensor | None = None,
) -> Tensor:
    """Pictures (B, S, S, 3) as pixel values (B, 3, S, S); ``contrast`` (B, 2) holds a factor and an offset."""
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    if contrast is not None:
        factor, offset = contrast[:, 0].view(-1, 1, 1, 1), contrast[:, 1].view(-1, 1, 1, 1)
        pixels = ((pixels - 0.5) * factor + 0.5 + offset).clamp(0, 1)
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def rendered(recipe: TrainRecipe, folder: Path) -> NDArray[np.uint8]:
    """All pictures (num_scenes, size, size, 3), memory-mapped; drawn once on every core, then kept in ``folder``."""
    num_scenes, seed, size = recipe.data.num_scenes, recipe.data.seed, recipe.model.vision.image_size
    path = folder / f"scenes-v{GENERATOR_VERSION}-{seed}-{num_scenes}-{size}.npy"
    if not path.exists():
        header = {"descr": "|u1", "fortran_order": False, "shape": (num_scenes, size, size, 3)}
        jobs = ((seed, index, size) for index in range(num_scenes))
        with atomic_file(path) as scratch, scratch.open("wb") as file, _pool() as pool:
            np.lib.format.write_array_header_1_0(file, header)
            for picture in pool.imap(_draw, jobs, chunksize=64):
                file.write(picture)
    return np.load(path, mmap_mode="r")


def _pool() -> Pool:
    """A process per core; Ctrl-C is for the one that waits for them."""
    return get_context("spawn").Pool(os.cpu_count(), signal.signal, (signal.SIGINT, signal.SIG_IGN))


def _draw(job: tuple[int, int, int]) -> bytes:
    seed, index, size = job
    return render(make_scene(seed, index), size).tobytes()
