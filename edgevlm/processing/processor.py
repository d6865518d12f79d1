"""What stands between a user and a session: pictures to ``pixel_values``, messages to ``input_ids``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np

from edgevlm.core.config import from_mapping
from edgevlm.core.errors import ConfigError, InputError, UnsupportedError
from edgevlm.processing.chat import ChatTemplate, Message, check_messages, num_images
from edgevlm.processing.frames import square_frame
from edgevlm.processing.guard import Guard
from edgevlm.processing.image_spec import ImageSpec
from edgevlm.processing.images import ImageLimits, ImageSource, load_image
from edgevlm.processing.layout import Layout, layout_tokens, num_tiles, picture_text
from edgevlm.processing.picture import Grid, Picture
from edgevlm.processing.resample import Float, Ints
from edgevlm.processing.split import Idefics3Tiles, NanoVlmTiles, most_tiles
from edgevlm.processing.tokenizer import Tokenizer
from edgevlm.processing.views import picture_views

MAX_VISION_TOKENS = 65_536  # for one view; no decoder reads as many


@dataclass(frozen=True, kw_only=True)
class PromptSpec:
    """Where a picture stands in a prompt, and which tokens end an answer.

    The template writes ``image_token`` once per picture; the decoder sees ``num_vision_tokens`` of it for every
    view.  ``layout`` says what else stands around those: ``plain`` nothing, the others the tokens that name tiles.
    """

    image_token: str
    num_vision_tokens: int
    stop_token_ids: tuple[int, ...]
    layout: Layout = "plain"

    def __post_init__(self) -> None:
        if not self.image_token:
            raise ConfigError("prompt image_token must not be empty: the chat template writes it per picture")
        if self.num_vision_tokens < 1:
            raise ConfigError(f"prompt num_vision_tokens must be 1 or more; found {self.num_vision_tokens}")
        if self.num_vision_tokens > MAX_VISION_TOKENS:
            raise ConfigError(
                f"prompt num_vision_tokens must be at most {MAX_VISION_TOKENS:,} for one view; found more"
            )
        if any(id < 0 for id in self.stop_token_ids):
            raise ConfigError(f"prompt stop_token_ids must be 0 or more; found {list(self.stop_token_ids)}")
        if self.layout not in get_args(Layout):
            raise ConfigError(f"prompt layout must be one of {', '.join(get_args(Layout))}; found {self.layout!r}")


@dataclass(frozen=True, kw_only=True)
class Processor:
    """The preprocessing of one model.

    Raises ConfigError when the tokenizer lacks the image token or one that names a tile, and when tiles and the
    layout of the prompt do not belong together.
    """

    image_spec: ImageSpec
    prompt_spec: PromptSpec
    tokenizer: Tokenizer
    template: ChatTemplate
    limits: ImageLimits = field(default_factory=ImageLimits)
    guard: Guard = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        spec, split, most = self.prompt_spec, self.image_spec.split, self.most_tiles
        if most != (1, 1) and split is not None and split.type != spec.layout:
            raise ConfigError(f"image split {split.type} needs the prompt layout {split.type}; found {spec.layout}")
        names = layout_tokens(spec.layout, most)
        object.__setattr__(self, "guard", Guard(self.tokenizer, self.template, spec.image_token, names))

    @classmethod
    def from_folder(cls, folder: str | Path, image: Mapping[str, Any], prompt: Mapping[str, Any]) -> Processor:
        """The processor of the bundle or checkpoint in ``folder``, with the two mappings of its manifest.

        Raises ConfigError for a mapping or template that cannot be used, IntegrityError without a tokenizer.
        """
        return cls(
            image_spec=from_mapping(ImageSpec, image, strict=True, where="image"),
            prompt_spec=from_mapping(PromptSpec, prompt, strict=True, where="prompt"),
            tokenizer=Tokenizer.from_folder(folder),
            template=ChatTemplate.from_folder(folder),
        )

    @property
    def most_tiles(self) -> Grid:
        """The most rows and columns of tiles that a picture can have."""
        return most_tiles(self.image_spec.split, (self.image_spec.height, self.image_spec.width))

    @property
    def image_token_id(self) -> int:
        """The id that stands where vision rows go."""
        return self.tokenizer.token_id(self.prompt_spec.image_token)

    def prepare(self, source: ImageSource) -> Picture:
        """The views of a picture; raises what ``load_image`` raises, InputError for one too small to cut."""
        return Picture.of(*picture_views(load_image(source, self.limits), self.image_spec))

    def prepare_video(self, frames: Sequence[ImageSource]) -> Picture:
        """The views of ``frames``, chosen by ``sample_frames``, one frame after another.

        Raises UnsupportedError for a model that cuts pictures into tiles, whose prompts have no place for frames.
        """
        if not frames:
            raise InputError("a video has at least one frame; found none")
        if isinstance(self.image_spec.split, (Idefics3Tiles, NanoVlmTiles)):
            raise UnsupportedError("this model cuts pictures into tiles and reads no video; ask about single frames")
        squares = (square_frame(load_image(frame, self.limits), self.image_spec) for frame in frames)
        views = [picture_views(square, self.image_spec)[0] for square in squares]
        return Picture.of(np.concatenate(views), (len(frames), 1))

    def pixels(self, source: ImageSource) -> Float:
        """``pixel_values`` [S, 3, height, width] of a picture; raises what ``prepare`` raises."""
        return self.prepare(source).pixel_values

    def num_vision_tokens(self, grid: Grid = (1, 1)) -> int:
        """How many places for vision rows a picture with ``grid`` has in a prompt."""
        return self.prompt_spec.num_vision_tokens * num_tiles(self.prompt_spec.layout, grid)

    def input_ids(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        grids: Sequence[Grid] | None = None,
    ) -> Ints:
        """Ids [T] of ``messages``, with ``num_vision_tokens(grid)`` image ids in the place of each picture.

        ``grids`` are those of the pictures in order, (1, 1) each by default.  Text in the messages never becomes
        a control token, the image token included.  Raises InputError for malformed messages, ConfigError for a
        template that fails or loses a picture.
        """
        ids = np.asarray(self._short_ids(messages, add_generation_prompt, grids), dtype=np.int64)
        return np.repeat(ids, self._num_rows(ids))

    def answer_positions(self, messages: Sequence[Message], grids: Sequence[Grid] | None = None) -> Ints:
        """The positions in ``input_ids(messages, grids=grids)`` of what the assistant has said before.

        An answer begins after the assistant's header and ends with the token that ended it.
        """
        ids = self._short_ids(messages, True, grids)
        is_answer = np.zeros(len(ids), dtype=bool)
        for turn in (turn for turn, message in enumerate(messages) if message["role"] == "assistant"):
            is_answer[slice(*self._answer_span(messages, turn, grids, ids))] = True
        return np.flatnonzero(np.repeat(is_answer, self._num_rows(np.asarray(ids)))).astype(np.int64)

    def _answer_span(
        self, messages: Sequence[Message], turn: int, grids: Sequence[Grid] | None, ids: Sequence[int]
    ) -> tuple[int, int]:
        start = _common(ids, self._short_ids(messages, True, grids, until=turn)) if turn else 0
        stops = (place for place in range(start, len(ids)) if ids[place] in self.prompt_spec.stop_token_ids)
        end = _common(ids, self._short_ids(messages, False, grids, until=turn + 1))
        return start, min(end, next(stops, end - 1) + 1)

    def _short_ids(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        grids: Sequence[Grid] | None,
        until: int | None = None,
    ) -> list[int]:
        """The ids of the messages ``until`` a turn, with one image id for each view."""
        check_messages(messages)
        pictures, spoken = self._picture_texts(num_images(messages), grids), messages[:until]
        return self.guard.encode(spoken, add_generation_prompt, pictures[: num_images(spoken)])

    def _picture_texts(self, count: int, grids: Sequence[Grid] | None) -> list[str]:
        """What stands in the prompt for each of ``count`` pictures, with one image token for each view."""
        grids = [(1, 1)] * count if grids is None else grids
        if len(grids) != count or any(min(grid) < 1 for grid in grids):
            raise InputError(f"the messages speak of {count} pictures; found the grids {list(grids)}")
        (rows, columns), layout = self.most_tiles, self.prompt_spec.layout
        if layout != "plain" and any(grid[0] > rows or grid[1] > columns for grid in grids):
            raise InputError(f"pictures have at most {rows} x {columns} tiles; found the grids {list(grids)}")
        token = self.prompt_spec.image_token
        return [picture_text(layout, grid, token, index, count) for index, grid in enumerate(grids)]

    def _num_rows(self, short_ids: Ints) -> Ints:
        """How many rows each of ``short_ids`` stands for."""
        return np.where(short_ids == self.image_token_id, self.prompt_spec.num_vision_tokens, 1)

    def image_positions(self, input_ids: Ints) -> Ints:
        """The positions in ``input_ids`` [T] where vision rows go, in order."""
        return np.flatnonzero(input_ids == self.image_token_id).astype(np.int64)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids at the beginning are the same."""
    pairs = zip(one, other, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
