"""For which sizes TensorRT makes the engines of a bundle: one picture or sequence at a time, two, or four."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

from edgevlm.bundle.manifest import PartFile
from edgevlm.bundle.recipe import PartRecipe, Profile, Recipe, past_buckets

BATCHES = (1, 2, 4)
USUAL_ROWS = 256  # of a prompt with one picture
PREFILL_ROWS = 1024  # new ones in one call, of all sequences together; a runtime reads a longer prompt piece by piece

Sizes: TypeAlias = tuple[int, int, int]  # the least, the usual and the largest


def recipe_of(files: Sequence[PartFile], max_context: int, sides: Sequence[int]) -> Recipe:
    """The recipe of these parts; ``sides``: pixels of the pictures that an encoder of free sizes is to serve."""
    first = {file.part: file for file in reversed(files) if file.part != "embed_tokens"}
    whole = (max_context, max_context, max_context)
    return Recipe(
        max_context=max_context,
        parts={name: PartRecipe(profiles=tuple(_profiles(file, max_context, sides))) for name, file in first.items()},
        in_place={
            name: PartRecipe(profiles=tuple(_decoder(file, max_context, past=whole)))
            for name, file in first.items()
            if file.in_place
        },
    )


def _profiles(file: PartFile, max_context: int, sides: Sequence[int]) -> Iterator[Profile]:
    """Those of the graph ``file.file``."""
    if file.part == "vision_encoder":
        return _encoder(file, sides)
    if file.part == "fusion":
        return _text(file, max_context)
    return _decoder(file, max_context, past=_bucket_sizes(max_context))


def _bucket_sizes(max_context: int) -> Sizes:
    buckets = past_buckets(max_context)
    return buckets[0], buckets[len(buckets) // 2], buckets[-1]


def _encoder(file: PartFile, sides: Sequence[int]) -> Iterator[Profile]:
    """Every number of pictures at every size; one profile where the graph leaves no choice."""
    free = {size for spec in file.inputs for size in spec.shape if isinstance(size, str)}
    for batch in BATCHES if "batch_size" in free else (1,):
        for side in sides if "height" in free else (None,):
            sizes: Mapping[str, int] = {"batch_size": batch, **({"height": side, "width": side} if side else {})}
            name = f"batch-{batch}" if side is None else f"batch-{batch}-{side}"
            yield _profile(name, file, {key: (size, size, size) for key, size in sizes.items()})


def _text(file: PartFile, max_context: int) -> Iterator[Profile]:
    yield _profile("text", file, {"sequence": (1, min(USUAL_ROWS, max_context), max_context)})


def _decoder(file: PartFile, max_context: int, past: Sizes) -> Iterator[Profile]:
    """One row a sequence, and many, since the kernels that are best for them differ.

    Scores and mask have a number for every new row and every row of the context, so that new rows are few where the
    context is long: an engine sets the memory aside that its largest shapes take.
    """
    for batch in BATCHES:
        most = min(PREFILL_ROWS // batch, max_context)
        for name, sequence in {"decode": (1, 1, 1), "prefill": (1, min(USUAL_ROWS, most), most)}.items():
            sizes = {"batch_size": (batch, batch, batch), "sequence": sequence, "past_sequence": past}
            yield _profile(name if batch == 1 else f"{name}-batch-{batch}", file, sizes)


def _profile(name: str, file: PartFile, sizes: Mapping[str, Sizes]) -> Profile:
    """The shapes of every input of ``file`` that has a free size."""
    return Profile(
        name=name,
        shapes={
            spec.name: tuple(
                tuple(size if isinstance(size, int) else sizes[size][place] for size in spec.shape)
                for place in range(3)
            )
            for spec in file.inputs
            if not all(isinstance(size, int) for size in spec.shape)
        },
    )
