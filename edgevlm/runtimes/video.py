"""What can be asked about besides a single picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgevlm.core.errors import InputError
from edgevlm.processing.images import ImageSource


@dataclass(frozen=True, kw_only=True, eq=False)
class Video:
    """Pictures in the order of time, sampled already; models are trained with one a second.

    ``edgevlm.processing.frames.sample_frames`` says which of a video's frames those are.
    """

    frames: Sequence[ImageSource]

    def __post_init__(self) -> None:
        if not len(self.frames):
            raise InputError("the video has no frames: give at least one picture")
