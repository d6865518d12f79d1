"""What every row of a kv cache stands for, so that two prompts can share their beginning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from edgevlm.bundle.manifest import FusionShape
from edgevlm.core.errors import EdgeVLMError, InputError
from edgevlm.processing.chat import Message
from edgevlm.processing.picture import Picture
from edgevlm.processing.processor import Processor
from edgevlm.runtimes.session import Float, Ints

# A token id, the n-th vision token of the picture with this key, or a token that has seen that picture.
Row: TypeAlias = int | tuple[str, int] | tuple[str, str, int]


@dataclass(frozen=True, eq=False, kw_only=True)
class PromptRows:
    """A prompt ready for the decoder: its ids ``[T]``, and where the vision tokens of its pictures go.

    ``counts``: vision tokens per picture.  ``fused``: positions of the text that sees the picture before the
    decoder does, None where nothing is fused.  Raises EdgeVLMError when places and pictures do not match.
    """

    ids: Ints
    positions: Ints
    pictures: tuple[Picture, ...]
    counts: tuple[int, ...]
    fused: Ints | None = None

    def __post_init__(self) -> None:
        if len(self.counts) != len(self.pictures) or sum(self.counts) != len(self.positions):
            raise EdgeVLMError(
                f"the prompt has {len(self.positions)} places for the vision tokens of {len(self.pictures)} images, "
                f"which have {sum(self.counts)}: the bundle's chat template must name every image once"
            )

    def __len__(self) -> int:
        return len(self.ids)

    def ids_to_embed(self) -> Ints:
        """The ids ``[T]`` with 0 in the places of vision tokens, whose id need not have an embedding."""
        ids: Ints = self.ids.copy()
        ids[self.positions] = 0
        return ids

    def text_ids(self) -> list[int]:
        """The ids that are text."""
        return [int(token) for token in np.delete(self.ids, self.positions)]

    def rows(self) -> list[Row]:
        """One entry per row; two prompts with equal entries put equal rows into a kv cache.

        A fused row also depends on the fused text before it, which is in the entries before it.
        """
        rows: list[Row] = [int(token) for token in self.ids]
        vision = ((picture.key, n) for picture, num in zip(self.pictures, self.counts, strict=True) for n in range(num))
        for position, row in zip(self.positions, vision, strict=True):
            rows[position] = row
        for position in () if self.fused is None else self.fused:
            rows[position] = (self.pictures[0].key, "text", int(self.ids[position]))
        return rows

    def pictures_after(self, start: int) -> tuple[Picture, ...]:
        """The pictures with vision tokens at or after row ``start``."""
        return self.pictures[self._first_after(start) :]

    def place(self, tokens: Sequence[Float], embeds: Float, start: int) -> None:
        """Overwrite the image rows of ``embeds`` ``[1, T - start, D]``.

        ``tokens`` are those of ``pictures_after(start)``, each ``[1, N, D]``.  Raises EdgeVLMError when an
        image has another number of vision tokens than the prompt has places.
        """
        for one, expected in zip(tokens, self.counts[self._first_after(start) :], strict=True):
            if one.shape[1] != expected:
                raise EdgeVLMError(
                    f"the vision encoder returned {one.shape[1]} vision tokens for {expected} places: "
                    "the bundle's manifest and graph disagree, export it again"
                )
        if tokens:
            positions = self.positions[self.positions >= start]
            embeds[0, positions - start] = np.concatenate(tokens, axis=1)[0, -len(positions) :]

    def _first_after(self, start: int) -> int:
        """The number of the first picture that ends after row ``start``."""
        num_before = np.searchsorted(self.positions, start)
        return int(np.searchsorted(np.cumsum(self.counts), num_before, side="right"))


def prompt_rows(
    processor: Processor, messages: Sequence[Message], pictures: Sequence[Picture], fusion: FusionShape | None = None
) -> PromptRows:
    """The prompt of a conversation about ``pictures``, in order.

    Raises what ``Processor.input_ids`` raises; InputError for several pictures and a model with ``fusion``.
    """
    grids = [picture.grid for picture in pictures]
    ids = processor.input_ids(messages, grids=grids)
    positions = processor.image_positions(ids)
    fused = None
    if fusion is not None and pictures:
        _check_alone(pictures)
        answers = processor.answer_positions(messages, grids=grids)
        fused = fused_positions(ids, np.concatenate([positions, answers]), fusion)
    return PromptRows(
        ids=ids,
        positions=positions,
        pictures=tuple(pictures),
        counts=tuple(processor.num_vision_tokens(grid) for grid in grids),
        fused=fused,
    )


def fused_positions(ids: Ints, left_out: Ints, fusion: FusionShape) -> Ints:
    """Positions of the text that is fused: all but ``left_out``, and but token id 0 where ``fusion`` skips that."""
    keep = ids != 0 if fusion.skip_token_zero else np.ones(len(ids), bool)
    keep[left_out] = False
    return np.flatnonzero(keep).astype(np.int64)


def _check_alone(pictures: Sequence[Picture]) -> None:
    if len(pictures) > 1:
        raise InputError(
            f"{len(pictures)} pictures in one conversation, but this model reads one picture or video, with which its "
            "text is fused: reset the chat (/reset on the command line, Chat.reset() in Python) before the next one"
        )


def common_prefix(old: Sequence[Row], new: Sequence[Row]) -> int:
    """How many rows at the beginning are the same."""
    pairs = zip(old, new, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(old), len(new)))
