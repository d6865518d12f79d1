"""What stands between a user and a session: pictures to ``pixel_values``, messages to ``input_ids``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgevlm.core.config import from_mapping
from edgevlm.core.errors import ConfigError
from edgevlm.processing.chat import ChatTemplate, Message, check_messages, num_images
from edgevlm.processing.guard import Guard
from edgevlm.processing.image_spec import ImageSpec
from edgevlm.processing.images import ImageLimits, ImageSource, load_image, pixel_values
from edgevlm.processing.resample import Float, Ints
from edgevlm.processing.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class PromptSpec:
    """Where a picture stands in a prompt, and which tokens end an answer.

    The template writes ``image_token`` once per picture; the decoder sees ``num_vision_tokens`` of it.
    """

    image_token: str
    num_vision_tokens: int
    stop_token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.image_token:
            raise ConfigError("prompt image_token must not be empty: the chat template writes it per picture")
        if self.num_vision_tokens < 1:
            raise ConfigError(f"prompt num_vision_tokens must be 1 or more; found {self.num_vision_tokens}")
        if any(id < 0 for id in self.stop_token_ids):
            raise ConfigError(f"prompt stop_token_ids must be 0 or more; found {list(self.stop_token_ids)}")


@dataclass(frozen=True, kw_only=True)
class Processor:
    """The preprocessing of one model.  Raises ConfigError when the tokenizer lacks the image token."""

    image_spec: ImageSpec
    prompt_spec: PromptSpec
    tokenizer: Tokenizer
    template: ChatTemplate
    limits: ImageLimits = field(default_factory=ImageLimits)
    guard: Guard = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "guard", Guard(self.tokenizer, self.template, self.prompt_spec.image_token))

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
    def image_token_id(self) -> int:
        """The id that stands where vision rows go."""
        return self.tokenizer.token_id(self.prompt_spec.image_token)

    def pixels(self, source: ImageSource) -> Float:
        """``pixel_values`` [1, 3, height, width] of a picture; raises what ``load_image`` raises."""
        return pixel_values(load_image(source, self.limits), self.image_spec)

    def input_ids(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> Ints:
        """Ids [T] of ``messages``, with ``num_vision_tokens`` image ids in the place of each picture.

        Text in the messages never becomes a control token, the image token included.  Raises InputError for
        malformed messages, ConfigError for a template that fails or loses a picture.
        """
        check_messages(messages)
        ids = np.asarray(self.guard.encode(messages, add_generation_prompt), dtype=np.int64)
        is_image = ids == self.image_token_id
        found, expected = int(is_image.sum()), num_images(messages)
        if found != expected:
            raise ConfigError(
                f"the chat template wrote {found} of {expected} {self.prompt_spec.image_token!r}; "
                f"it must write one for each picture in the messages"
            )
        return np.repeat(ids, np.where(is_image, self.prompt_spec.num_vision_tokens, 1))

    def image_positions(self, input_ids: Ints) -> Ints:
        """The positions in ``input_ids`` [T] where vision rows go, in order."""
        return np.flatnonzero(input_ids == self.image_token_id).astype(np.int64)
