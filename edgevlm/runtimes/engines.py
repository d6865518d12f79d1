"""What a back end opens: single parts of a bundle, so that each part may run on another back end.

``composed.py`` makes one ``Session`` of them.  Arrays that come back are the caller's to keep and change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from edgevlm.bundle.manifest import PartFile
from edgevlm.bundle.read import Bundle
from edgevlm.runtimes.session import Float, ImageFeatures, Ints


class Encoder(Protocol):
    """The part ``vision_encoder``."""

    def encode(self, pixel_values: Float) -> ImageFeatures:
        """As ``Session.encode``."""
        ...

    def close(self) -> None: ...


class TextFusion(Protocol):
    """The part ``fusion``."""

    def fuse(self, features: ImageFeatures, inputs_embeds: Float) -> Float:
        """As ``Session.fuse``."""
        ...

    def close(self) -> None: ...


class Embedding(Protocol):
    """The part ``embed_tokens``: a table of rows, or a graph where nothing says where the rows lie."""

    def embed(self, input_ids: Ints) -> Float:
        """Token ids ``[1, T]`` to ``[1, T, D]``."""
        ...

    def write_row(self, token: int, row: Float) -> None:
        """The embedding of one token into ``row`` ``[1, 1, D]``; no allocation."""
        ...

    def close(self) -> None: ...


class DecoderEngine(Protocol):
    """The part ``decoder_model_merged`` with one kv cache."""

    @property
    def max_context(self) -> int: ...

    @property
    def position(self) -> int: ...

    def prefill(self, inputs_embeds: Float) -> Float:
        """As ``Session.prefill``."""
        ...

    def decode(self, token: int) -> Float:
        """As ``Session.decode``; the engine was opened with the ``Embedding`` that it reads."""
        ...

    def rewind(self, position: int) -> None:
        """As ``Session.rewind``."""
        ...

    def close(self) -> None: ...


class BackEnd(Protocol):
    """A library that runs parts, on one device with so many threads.  ``RUNTIMES`` lists the classes.

    It is made with ``(device: str | None, threads: int | None)`` and says in ``info`` what it runs on.  ``target``: the
    export target whose parts it reads.  A part that it cannot run raises UnsupportedError.
    """

    target: ClassVar[str]

    def __init__(self, *, device: str | None = None, threads: int | None = None) -> None: ...

    @property
    def info(self) -> Mapping[str, Any]:
        """Library, version, device and threads: what a measurement must carry."""
        ...

    def open_encoder(self, bundle: Bundle, part: PartFile) -> Encoder: ...

    def open_fusion(self, bundle: Bundle, part: PartFile) -> TextFusion: ...

    def open_embedding(self, bundle: Bundle, part: PartFile) -> Embedding: ...

    def open_decoder(self, bundle: Bundle, part: PartFile, embedding: Embedding) -> DecoderEngine: ...
