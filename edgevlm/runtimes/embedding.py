"""From a prompt to the rows that the decoder reads: text embedded, pictures encoded, the one fused with the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from edgevlm.processing.picture import Picture
from edgevlm.runtimes.clock import StageClock
from edgevlm.runtimes.image_cache import ImageCache
from edgevlm.runtimes.prompt_rows import PromptRows
from edgevlm.runtimes.session import Float, ImageFeatures, Ints, Session

Encode: TypeAlias = Callable[[str, Float], ImageFeatures]  # from a key and the pixels under it


class CachedEncoder:
    """``Session.encode`` for pixels that ``cache`` does not know yet; counts how often that was."""

    def __init__(self, session: Session, cache: ImageCache) -> None:
        self._session, self._cache = session, cache
        self.num_encoded = 0

    def __call__(self, key: str, pixel_values: Float) -> ImageFeatures:
        known = self._cache.get(key)
        if known is None:
            known = self._session.encode(pixel_values)
            self.num_encoded += 1
            self._cache.put(key, known)
        return known


def embed_prompt(session: Session, prompt: PromptRows, encode: Encode, clock: StageClock, start: int = 0) -> Float:
    """The prompt's rows from ``start`` on, ``[1, T - start, D]``, as ``Session.prefill`` takes them.

    Fused text depends on all fused text before it, so a prompt with fused text is always computed whole.
    """
    if prompt.fused is not None:
        return _fused(session, prompt, prompt.fused, encode, clock)[:, start:]
    tokens = [encode(picture.key, picture.pixel_values).tokens for picture in prompt.pictures_after(start)]
    embeds = session.embed(prompt.ids_to_embed()[None, start:])
    with clock.stage("embed"):
        prompt.place(tokens, embeds, start)
    return embeds


def _fused(session: Session, prompt: PromptRows, fused: Ints, encode: Encode, clock: StageClock) -> Float:
    """Every row; fused text is the mean over what it becomes with each frame, of which one is held at a time.

    Source: LLaVA-Mini, arXiv:2501.03895; a picture is a video of one frame.
    """
    embeds = session.embed(prompt.ids_to_embed()[None])
    text = embeds[:, fused]
    total, tokens = np.zeros(text.shape, np.float64), []
    frames = frames_of(prompt.pictures[0])
    for key, pixel_values in frames:
        features = encode(key, pixel_values)
        tokens.append(features.tokens)
        if len(fused):
            total += session.fuse(features, text)
    with clock.stage("embed"):
        embeds[:, fused] = total / len(frames)
        prompt.place([np.concatenate(tokens, axis=1)], embeds, 0)
    return embeds


def frames_of(picture: Picture) -> list[tuple[str, Float]]:
    """The views of each frame under a key of their own; a picture that is no video is its only frame."""
    rows, columns = picture.grid
    if rows * columns == 1:
        return [(picture.key, picture.pixel_values)]
    parts = np.split(picture.pixel_values, rows * columns)
    return [(f"{picture.key}/{number}", part) for number, part in enumerate(parts)]
