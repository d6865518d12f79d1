"""What a precision means: how many bits a decoder's weights keep, in which groups, and what activations become.

A precision is a name that people type, made of words joined by "-":

    fp32  fp16
    int8  int8-b64  int8-b128          weights alone, one scale per block of inputs (default: 32)
    int8-dynamic                       weights per output channel, activations per call
    int4  int4-b32  int4-b64  int4-b128  int4-b128-asym  int4-b128-head8  int4-b32-rtn
    int8-static  fp8                   weights per output channel, activations per tensor by ranges found once
    nvfp4  nvfp4-rtn                   weights alone, 4-bit floats, an 8-bit float as the scale of every 16 inputs

Not every target has every one: ``DECODERS`` and ``ENCODERS`` say which.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import ClassVar, Literal, TypeAlias

from edgevlm.core.errors import ConfigError

FLOATS = ("fp32", "fp16")
BF16 = "bf16"
GROUP_SIZES = (32, 64, 128)
INT8_GROUP_SIZE, INT4_GROUP_SIZE = 32, 128  # where a name says nothing

DYNAMIC = "int8-dynamic"
INT8 = re.compile(r"int8(?:-b(?P<block>\d+))?")
INT4 = re.compile(r"int4(?:-b(?P<block>\d+))?(?P<asym>-asym)?(?P<head8>-head8)?(?P<rtn>-rtn)?")
NVFP4 = re.compile(r"nvfp4(?P<rtn>-rtn)?")
STATIC: Mapping[str, Literal["int8", "fp8"]] = MappingProxyType({"int8-static": "int8", "fp8": "fp8"})

# What each target can have, as a person would type it; behind it, what its canonical names look like.
DECODERS: Mapping[str, tuple[str, re.Pattern[str]]] = MappingProxyType(
    {
        "onnx": (
            "fp32, fp16, int8[-b32|-b64|-b128], int8-dynamic, int4[-b32|-b64|-b128][-asym][-head8][-rtn]",
            re.compile(r"fp32|fp16|int8-b\d+|int8-dynamic|int4-.*"),
        ),
        "tensorrt": (
            "fp16, fp32, bf16, int4[-b64|-b128][-rtn], int8-static, fp8, nvfp4[-rtn]",
            re.compile(r"fp16|fp32|bf16|int4-b(64|128)(-rtn)?|int8-static|fp8|nvfp4(-rtn)?"),
        ),
    }
)
ENCODERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"onnx": (*FLOATS, "int8"), "tensorrt": ("fp16", "fp32", BF16, "int8", "fp8")}
)
KNOWN = f"{DECODERS['onnx'][0]}; for tensorrt {DECODERS['tensorrt'][0]}"


@dataclass(frozen=True, kw_only=True)
class WeightOnly:
    """Round weights to ``bits``, one scale per ``group_size`` inputs; activations stay as they are.

    ``symmetric``: codes stand for -2^(b-1) … 2^(b-1) - 1 times the scale; else every group has a zero point, too.
    ``search``: choose scales by the error that they cause, not by the largest weight alone.
    ``head_bits``: of the output head, where it keeps more than the rest.
    ``half_scales``: scales are positive numbers of float16, as TensorRT reads them; else float32 of either sign.
    """

    bits: Literal[4, 8] = 4
    group_size: int = 128
    symmetric: bool = True
    search: bool = True
    head_bits: Literal[4, 8] | None = None
    half_scales: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (4, 8) or self.head_bits not in (None, 4, 8):
            raise ConfigError(f"bits must be 4 or 8, got {self.bits} (head {self.head_bits})")
        if self.group_size not in GROUP_SIZES:
            raise ConfigError(f"a block has 32, 64 or 128 weights, got {self.group_size}")


@dataclass(frozen=True, kw_only=True)
class DynamicInt8:
    """Weights in 8 bits, symmetric, one scale per output channel; activations in 8 bits with a scale per call."""


@dataclass(frozen=True, kw_only=True)
class Static:
    """Weights in ``format``, symmetric, one scale per output channel; activations too, one scale per tensor.

    Those scales follow from ranges that calibration finds once.  All are numbers of float16.
    """

    format: Literal["int8", "fp8"] = "int8"


@dataclass(frozen=True, kw_only=True)
class Float4:
    """Round weights to 4-bit floats (E2M1), activations stay as they are.

    Every 16 inputs have an 8-bit float (E4M3) times ``global_scale`` as their scale.  That is a power of two, one for
    a whole decoder, so that float16 holds every rounded weight exactly; larger weights than 2688 of it are cut off.
    ``search``: choose scales by the error that they cause, not by the largest weight alone.
    """

    group_size: ClassVar[int] = 16

    search: bool = True
    global_scale: float = 2.0**-11


Scheme: TypeAlias = WeightOnly | DynamicInt8 | Static | Float4


def scheme_of(precision: str, target: str = "onnx") -> Scheme | None:
    """How ``precision`` rounds a decoder's weights for ``target``; None for the float ones.

    Raises ConfigError for a name that means nothing, with the names that do.
    """
    if precision in (*FLOATS, BF16):
        return None
    if precision == DYNAMIC:
        return DynamicInt8()
    if precision in STATIC:
        return Static(format=STATIC[precision])
    if found := NVFP4.fullmatch(precision):
        return Float4(search=not found["rtn"])
    if found := INT8.fullmatch(precision):
        return WeightOnly(bits=8, group_size=int(found["block"] or INT8_GROUP_SIZE))
    if found := INT4.fullmatch(precision):
        return WeightOnly(
            bits=4,
            group_size=int(found["block"] or INT4_GROUP_SIZE),
            symmetric=not found["asym"],
            search=not found["rtn"],
            head_bits=8 if found["head8"] else None,
            half_scales=target == "tensorrt",
        )
    raise ConfigError(f"no decoder precision named {precision!r}; known: {KNOWN}")


def canonical(precision: str) -> str:
    """The one spelling of ``precision``, with every default written out: ``int4`` to ``int4-b128``.

    Raises ConfigError like ``scheme_of``.
    """
    scheme = scheme_of(precision)
    if not isinstance(scheme, WeightOnly):
        return precision
    words = [f"int{scheme.bits}", f"b{scheme.group_size}"]
    words += ["asym"] * (not scheme.symmetric) + ["head8"] * (scheme.head_bits == 8) + ["rtn"] * (not scheme.search)
    return "-".join(words)


def decoder_precision(name: str, target: str) -> str:
    """The one spelling of ``name``, which ``target`` must have.  Raises ConfigError that names what it has."""
    precision, (known, pattern) = canonical(name), DECODERS[target]
    if not pattern.fullmatch(precision):
        raise ConfigError(f"{target} bundles have no decoder in {name}; they have {known}")
    return precision


def encoder_precision(name: str, target: str) -> str:
    """``name``, which ``target`` must have for encoders.  Raises ConfigError that names what it has."""
    if name not in ENCODERS[target]:
        raise ConfigError(f"{target} bundles have no encoder in {name!r}; they have {', '.join(ENCODERS[target])}")
    return name


def head_scheme(scheme: Scheme) -> Scheme:
    """How the output head is rounded: in ``head_bits`` where the scheme has them, in 8 always symmetrically."""
    if not isinstance(scheme, WeightOnly) or scheme.head_bits is None:
        return scheme
    symmetric = scheme.symmetric if scheme.head_bits == 4 else True
    return replace(scheme, bits=scheme.head_bits, symmetric=symmetric, head_bits=None)


def bits_per_weight(scheme: Scheme, in_features: int) -> float:
    """Bits of one weight in a row of ``in_features``, its share of scales and packed zero points included."""
    if isinstance(scheme, (DynamicInt8, Static)):
        return 8 + (32 if isinstance(scheme, DynamicInt8) else 16) / in_features
    num_groups = -(-in_features // scheme.group_size)
    if isinstance(scheme, Float4):
        return num_groups * (4 * scheme.group_size + 8) / in_features
    extra = (16 if scheme.half_scales else 32) + (0 if scheme.symmetric else scheme.bits)
    return (num_groups * scheme.group_size * scheme.bits + num_groups * extra) / in_features
