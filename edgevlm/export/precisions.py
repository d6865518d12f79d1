"""Which files a bundle gets: one encoder and one decoder per precision, the first of each being the default."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from edgevlm.core.errors import ConfigError
from edgevlm.core.registry import unknown_name
from edgevlm.export.encoder_int8 import refuse_dynamic
from edgevlm.quant.schemes import (
    ENCODERS,
    FLOATS,
    Float4,
    Scheme,
    Static,
    WeightOnly,
    decoder_precision,
    encoder_precision,
    scheme_of,
)

DEFAULTS: Mapping[str, str] = MappingProxyType({"tensorrt": "fp16"})  # of both halves; of other targets fp32
WIDER = MappingProxyType({"int8": "fp16", "fp8": "fp16"})  # what a typed graph computes the rest of a rounded one in
TYPED = MappingProxyType({"int8": "int8-static"})  # what a decoder is in a bundle that is to be in 8 bits
BF16 = "bf16 is not stored but computed: export fp32, and take a runtime that computes in bf16 (openvino-bf16)"


@dataclass(frozen=True, kw_only=True)
class Precisions:
    """Of either half for ``target``, in their one spelling, the default first."""

    encoder: tuple[str, ...] = ("fp32",)
    decoder: tuple[str, ...] = ("fp32",)
    target: str = "onnx"

    @property
    def is_typed(self) -> bool:
        """Whether graphs say of every tensor which type it is computed in."""
        return self.target == "tensorrt"

    @property
    def fusion(self) -> tuple[str, ...]:
        """Of the text's layers that see the picture: as the encoder, but never below float."""
        if self.is_typed:
            return _once(WIDER.get(precision, precision) for precision in self.encoder)
        return _once(precision if precision in FLOATS else "fp32" for precision in self.encoder)

    @property
    def embedding(self) -> tuple[str, ...]:
        """Of the embedding: a float decoder's own.  Others take float16 rows, unless float32 ones are there.

        Half a step of float16 is 2^-11 of a value, a hundredth of what 8 bits round away; the file has half the size.
        """
        own = _once(precision for precision in self.decoder if precision in FLOATS)
        return own or ("fp16",)

    @property
    def schemes(self) -> dict[str, Scheme]:
        """How weights are rounded, for each decoder that rounds them."""
        found = {precision: scheme_of(precision, self.target) for precision in self.decoder}
        return {precision: scheme for precision, scheme in found.items() if scheme is not None}

    @property
    def search(self) -> bool:
        """Whether some decoder chooses its scales by the error that they cause."""
        return any(isinstance(scheme, (WeightOnly, Float4)) and scheme.search for scheme in self.schemes.values())

    @property
    def rounds_encoder(self) -> bool:
        """Whether an encoder is rounded by the ranges that pictures give it."""
        return not {"int8", "fp8"}.isdisjoint(self.encoder)

    @property
    def listens(self) -> bool:
        """Whether graphs are fitted to the inputs that they get: where float16 is too narrow, how activations round."""
        return self.is_typed and not {"fp32", "bf16"}.issuperset((*self.encoder, *self.decoder))

    @property
    def rounds_activations(self) -> bool:
        """Whether some half rounds activations by ranges that are found once."""
        return self.rounds_encoder or any(isinstance(scheme, Static) for scheme in self.schemes.values())

    @property
    def calibrates(self) -> bool:
        """Whether something is rounded, or kept wide, by what pictures and questions make of it."""
        return self.search or self.rounds_encoder or self.listens

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


def precisions(
    encoder: str | Sequence[str] | None, decoder: str | Sequence[str] | None, target: str = "onnx"
) -> Precisions:
    """What was asked for, each half a name, names joined by commas, a list of names, or None for the target's default.

    Raises ConfigError for a name that means nothing, that the target lacks or that comes twice, UnsupportedError for
    one that makes no sense.
    """
    usual = default_precision(target)
    encoder, decoder = (usual if wish is None else wish for wish in (encoder, decoder))
    return Precisions(
        encoder=_unlike("encoder", [_encoder(name, target) for name in _names("encoder", encoder)]),
        decoder=_unlike("decoder", [_decoder(name, target) for name in _names("decoder", decoder)]),
        target=target,
    )


def default_precision(target: str) -> str:
    """What both halves are exported in where nothing is said."""
    return DEFAULTS.get(target, "fp32")


def both_halves(precision: str, target: str = "onnx") -> tuple[str, str]:
    """Encoder and decoder of a bundle that is to be ``precision``: 4 bits and activations are the decoder's affair.

    Of typed graphs int8 means activations, too, in both halves.
    """
    if target == "tensorrt":
        kind = precision.removesuffix("-static")
        return kind if kind in ENCODERS[target] else default_precision(target), TYPED.get(precision, precision)
    kind = precision.split("-")[0]
    encoder = kind if kind in ENCODERS["onnx"] and precision != "int8-dynamic" else "fp32"
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


def _encoder(name: str, target: str) -> str:
    if target in ENCODERS and target != "onnx":
        return encoder_precision(name, target)
    if name == "bf16":
        raise ConfigError(BF16)
    refuse_dynamic(name)
    if name not in ENCODERS["onnx"]:
        raise ConfigError(unknown_name("encoder precision", name, ENCODERS["onnx"]))
    return name


def _decoder(name: str, target: str) -> str:
    if target in ENCODERS and target != "onnx":
        return decoder_precision(name, target)
    if name == "bf16":
        raise ConfigError(BF16)
    return decoder_precision(name, "onnx")


def _unlike(half: str, names: list[str]) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise ConfigError(f"a precision of the {half} comes twice in {', '.join(names)}: each makes one file")
    return tuple(names)


def _once(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))
