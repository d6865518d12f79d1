"""What may be asked of a checkpoint that is not what it was trained with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast, get_args

from edgevlm.core.errors import UnsupportedError, UsageError
from edgevlm.families.reading import mean_color
from edgevlm.processing.image_spec import Fit, ImageSpec
from edgevlm.processing.processor import Processor
from edgevlm.processing.split import Crops
from edgevlm.shapes.config import QueriesConfig, VlmConfig
from edgevlm.shapes.resize import at_image_size


@dataclass(frozen=True, kw_only=True)
class Changes:
    """Wishes that change a config or a processor; None leaves what the checkpoint says.

    ``image_size`` pixels a side, ``image_fit`` of pictures that are not square, ``image_splitting`` into tiles,
    ``vision_tokens`` a picture, ``max_context`` rows.  Raises UsageError for values that no model has.
    """

    image_size: int | None = None
    image_fit: str | None = None
    image_splitting: bool | None = None
    vision_tokens: int | None = None
    max_context: int | None = None

    def __post_init__(self) -> None:
        for name in ("image_size", "vision_tokens", "max_context"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, found {value}")
        if self.image_fit is not None and self.image_fit not in get_args(Fit):
            raise UsageError(f"image_fit must be one of {', '.join(get_args(Fit))}; found {self.image_fit!r}")

    def of_config(self, config: VlmConfig) -> VlmConfig:
        """``config`` as wished.  Raises UnsupportedError, saying what this model can do."""
        if self.image_size is not None:
            config = at_image_size(config, self.image_size)
        if self.vision_tokens is not None:
            config = with_vision_tokens(config, self.vision_tokens)
        return config if self.max_context is None else with_context(config, self.max_context)

    def of_processor(self, processor: Processor, config: VlmConfig) -> Processor:
        """``processor`` as wished, for a model of ``config``.  Raises UnsupportedError."""
        image, prompt = processor.image_spec, processor.prompt_spec
        if self.image_size is not None:
            image = replace(image, height=self.image_size, width=self.image_size)
        if self.image_fit is not None:
            image = _with_fit(image, self.image_fit)
        if self.image_splitting is not None:
            image = _with_splitting(image, self.image_splitting)
        if self.image_size is not None or self.vision_tokens is not None:
            prompt = replace(prompt, num_vision_tokens=config.num_vision_tokens)
        if (image, prompt) == (processor.image_spec, processor.prompt_spec):
            return processor
        return replace(processor, image_spec=image, prompt_spec=prompt)


def with_vision_tokens(config: VlmConfig, num: int) -> VlmConfig:
    """``config`` with ``num`` tokens a picture, as many as there are learned queries at most (MQT)."""
    projector = config.projector
    if num == config.num_vision_tokens:
        return config
    if not isinstance(projector, QueriesConfig) or config.fusion is not None:
        raise UnsupportedError(f"{num} vision tokens: this model always has {config.num_vision_tokens}")
    if num > projector.table_size:
        raise UnsupportedError(f"{num} vision tokens: this model has {projector.table_size} at most")
    return replace(config, projector=replace(projector, num_queries=num))


def with_context(config: VlmConfig, max_context: int) -> VlmConfig:
    """``config`` for at most ``max_context`` rows; a table of learned positions keeps its length."""
    decoder = config.decoder
    if max_context > decoder.max_position_embeddings:
        raise UnsupportedError(
            f"a context of {max_context}: this model was made for {decoder.max_position_embeddings} at most"
        )
    if decoder.positions != "rotary":
        return config
    return replace(config, decoder=replace(decoder, max_position_embeddings=max_context))


def _with_fit(image: ImageSpec, fit: str) -> ImageSpec:
    """``image`` with another fit; bars get the mean colour, which the model sees as zeros."""
    if fit == image.fit:
        return image
    if image.split is not None:
        raise UnsupportedError(f"image fit {fit}: this model cuts pictures into tiles and always fits {image.fit}")
    color = mean_color(image.mean) if fit == "pad" else image.pad_color
    return replace(image, fit=cast(Fit, fit), pad_color=color)


def _with_splitting(image: ImageSpec, wanted: bool) -> ImageSpec:
    split = image.split
    if split is None or isinstance(split, Crops):
        always = "never cuts pictures into tiles" if split is None else "always sees a picture's crops"
        if wanted == (split is not None):
            return image
        raise UnsupportedError(f"image splitting {'on' if wanted else 'off'}: this model {always}")
    return replace(image, split=replace(split, enabled=wanted))
