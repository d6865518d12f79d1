"""Which files a bundle gets: one encoder and one decoder per precision, the first of each being the default."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from edgevlm.core.errors import ConfigError
from edgevlm.core.registry import unknown_name
from edgevlm.export.encoder_int8 import refuse_dynamic
from edgevlm.quant.schemes import FLOATS, Scheme, WeightOnly, canonical, scheme_of

ENCODERS = (*FLOATS, "int8")
BF16 = "bf16 is not stored but computed: export fp32, and take a runtime that computes in bf16 (openvino-bf16)"


@dataclass(frozen=True, kw_only=True)
class Precisions:
    """Of either half, in their one spelling, the default first."""

    encoder: tuple[str, ...] = ("fp32",)
    decoder: tuple[str, ...] = ("fp32",)

    @property
    def fusion(self) -> tuple[str, ...]:
        """Of the text's layers that see the picture: as the encoder, but never below float."""
        return _once(precision if precision in FLOATS else "fp32" for precision in self.encoder)

    @property
    def embedding(self) -> tuple[str, ...]:
        """Of the embedding: a float decoder's own.  Rounded decoders take float16 rows, unless others are there.

        Half a step of float16 is 2^-11 of a value, a hundredth of what 8 bits round away; the file has half the size.
        """
        own = _once(precision for precision in self.decoder if precision in FLOATS)
        return own or ("fp16",)

    @property
    def schemes(self) -> dict[str, Scheme]:
        """How weights are rounded, for each decoder that rounds them."""
        found = {precision: scheme_of(precision) for precision in self.decoder}
        return {precision: scheme for precision, scheme in found.items() if scheme is not None}

    @property
    def search(self) -> bool:
        """Whether some decoder chooses its scales by the error that they cause."""
        return any(isinstance(scheme, WeightOnly) and scheme.search for scheme in self.schemes.values())

    @property
    def calibrates(self) -> bool:
        """Whether something is rounded by what pictures and questions make of it."""
        return self.search or "int8" in self.encoder

    @property
    def is_exact(self) -> bool:
        """Whether every file computes in float32."""
        return set(self.encoder) == set(self.decoder) == {"fp32"}

    def of(self, part: str) -> tuple[str, ...]:
        """The precisions in which ``part`` is lowered."""
        by_part = {
            "vision_encoder": self.encoder,
            "fusion": self.fusion,
            "embed_tokens": self.embedding,
            "decoder_model_merged": self.decoder,
        }
        return by_part[part]


def precisions(encoder: str | Sequence[str], decoder: str | Sequence[str]) -> Precisions:
    """What was asked for, each half a name, names joined by commas, or a list of names.

    Raises ConfigError for a name that means nothing or comes twice, UnsupportedError for one that makes no sense.
    """
    return Precisions(
        encoder=_unlike("encoder", [_encoder(name) for name in _names("encoder", encoder)]),
        decoder=_unlike("decoder", [_decoder(name) for name in _names("decoder", decoder)]),
    )


def both_halves(precision: str) -> tuple[str, str]:
    """Encoder and decoder of a bundle that is to be ``precision``: 4 bits and activations are the decoder's affair."""
    kind = precision.split("-")[0]
    encoder = kind if kind in ENCODERS and precision != "int8-dynamic" else "fp32"
    return encoder, precision


def suffixes(names: Sequence[str]) -> dict[str, str | None]:
    """What a decoder file of each precision is called; None for the usual ending of its kind.

    ``_int8`` and ``_q4`` can be had once; the next file of the kind is called by its full name.
    """
    seen, found = set[str](), dict[str, str | None]()
    for name in names:
        kind = name.split("-b")[0]
        found[name] = f"_{name.replace('-', '_')}" if kind in seen else None
        seen.add(kind)
    return found


def _names(half: str, wish: str | Sequence[str]) -> list[str]:
    names = [name.strip() for name in (wish.split(",") if isinstance(wish, str) else wish)]
    if not names or not all(names):
        raise ConfigError(f"an empty {half} precision: give one or more, joined by commas")
    return names


def _encoder(name: str) -> str:
    if name == "bf16":
        raise ConfigError(BF16)
    refuse_dynamic(name)
    if name not in ENCODERS:
        raise ConfigError(unknown_name("encoder precision", name, ENCODERS))
    return name


def _decoder(name: str) -> str:
    if name == "bf16":
        raise ConfigError(BF16)
    return canonical(name)


def _unlike(half: str, names: list[str]) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise ConfigError(f"a precision of the {half} comes twice in {', '.join(names)}: each makes one file")
    return tuple(names)


def _once(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))
