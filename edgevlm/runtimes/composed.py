"""One ``Session`` of parts, each on the back end that was chosen for it."""

from __future__ import annotations

from dataclasses import dataclass

from edgevlm.core.errors import UnsupportedError, UsageError
from edgevlm.runtimes.engines import DecoderEngine, Embedding, Encoder, TextFusion
from edgevlm.runtimes.session import Float, ImageFeatures, Ints


@dataclass(frozen=True, kw_only=True)
class Engines:
    """The opened parts of one bundle; ``fusion`` only where the model has pre-fusion."""

    encoder: Encoder
    fusion: TextFusion | None
    embedding: Embedding
    decoder: DecoderEngine

    def close(self) -> None:
        """Give everything back."""
        for engine in (self.encoder, self.fusion, self.embedding, self.decoder):
            if engine is not None:
                engine.close()


class ComposedSession:
    """A ``Session`` over opened parts; it owns them, and ``close`` gives them back."""

    def __init__(self, engines: Engines) -> None:
        self._engines: Engines | None = engines
        self._max_context = engines.decoder.max_context

    @property
    def max_context(self) -> int:
        return self._max_context

    @property
    def position(self) -> int:
        return self._engines.decoder.position if self._engines else 0

    def encode(self, pixel_values: Float) -> ImageFeatures:
        return self._opened().encoder.encode(pixel_values)

    def fuse(self, features: ImageFeatures, inputs_embeds: Float) -> Float:
        fusion = self._opened().fusion
        if fusion is None or features.fusion_cache is None:
            raise UnsupportedError("this model has no pre-fusion: its text rows go to the decoder as they are")
        return fusion.fuse(features, inputs_embeds)

    def embed(self, input_ids: Ints) -> Float:
        return self._opened().embedding.embed(input_ids)

    def prefill(self, inputs_embeds: Float) -> Float:
        return self._opened().decoder.prefill(inputs_embeds)

    def decode(self, token: int) -> Float:
        return self._opened().decoder.decode(token)

    def rewind(self, position: int) -> None:
        self._opened().decoder.rewind(position)

    def close(self) -> None:
        engines, self._engines = self._engines, None
        if engines is not None:
            engines.close()

    def _opened(self) -> Engines:
        if self._engines is None:
            raise UsageError("this session is closed: open the bundle again")
        return self._engines
