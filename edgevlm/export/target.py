"""What every export target does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgevlm.bundle.manifest import PartFile
from edgevlm.export.parts import Part
from edgevlm.quant.decoder import QuantizedDecoder


@dataclass(frozen=True, kw_only=True)
class Lowering:
    """How parts are lowered.

    ``half_storage``: weights that float16 holds exactly are stored so; the numbers stay the same.
    ``plain``: decoders of standard operators alone, for engines that do not know ONNX Runtime's own.
    ``static_batch``: one picture at a time, for engines that want every size fixed.
    """

    half_storage: bool = False
    plain: bool = False
    static_batch: bool = False


@dataclass(frozen=True, kw_only=True)
class Extras:
    """What the lowering of one part needs beside the part.

    ``quantized``: codes of a decoder, for the precisions that have some.  ``suffix``: what the file's name has behind
    the part's, None for the precision's usual one.  ``calibration``: pictures (1, 3, H, W) as the encoder gets them,
    for an encoder in int8.  ``feeds``: inputs of the part's float32 graph, for graphs that say of every tensor which
    type it has.  ``max_context``: rows that the decoder's kv cache may hold, by default what the model can.
    ``tell_scales`` is told the scales of what comes into a decoder's matrices, where lowering finds them.
    """

    quantized: QuantizedDecoder | None = None
    suffix: str | None = None
    calibration: Sequence[NDArray[np.float32]] | None = None
    feeds: Sequence[Mapping[str, NDArray[Any]]] = ()
    max_context: int | None = None
    tell_scales: Callable[[Mapping[str, float]], None] = lambda scales: None


class Target(Protocol):
    """Lowers one part to one file, by tracing it or by writing the graph directly."""

    def __init__(self, lowering: Lowering) -> None: ...

    def lower(self, part: Part, root: Path, precision: str = "fp32", extras: Extras | None = None) -> PartFile:
        """Write the part's file below the bundle folder ``root`` and say what it is."""
        ...
