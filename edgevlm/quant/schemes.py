"""What a precision means: how many bits a decoder's weights keep, in which groups, and what activations become.

A precision is a name that people type, made of words joined by "-":

    fp32  fp16
    int8  int8-b64  int8-b128          weights alone, one scale per block of inputs (default: 32)
    int8-dynamic                       weights per output channel, activations per call
    int4  int4-b32  int4-b64  int4-b128  int4-b128-asym  int4-b128-head8  int4-b32-rtn
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, TypeAlias

from edgevlm.core.errors import ConfigError

FLOATS = ("fp32", "fp16")
GROUP_SIZES = (32, 64, 128)
INT8_GROUP_SIZE, INT4_GROUP_SIZE = 32, 128  # where a name says nothing

DYNAMIC = "int8-dynamic"
INT8 = re.compile(r"int8(?:-b(?P<block>\d+))?")
INT4 = re.compile(r"int4(?:-b(?P<block>\d+))?(?P<asym>-asym)?(?P<head8>-head8)?(?P<rtn>-rtn)?")
KNOWN = "fp32, fp16, int8[-b32|-b64|-b128], int8-dynamic, int4[-b32|-b64|-b128][-asym][-head8][-rtn]"


@dataclass(frozen=True, kw_only=True)
class WeightOnly:
    """Round weights to ``bits``, one scale per ``group_size`` inputs; activations stay as they are.

    ``symmetric``: codes stand for -2^(b-1) … 2^(b-1) - 1 times the scale; else every group has a zero point, too.
    ``search``: choose scales by the error that they cause, not by the largest weight alone.
    ``head_bits``: of the output head, where it keeps more than the rest.
    """

    bits: Literal[4, 8] = 4
    group_size: int = 128
    symmetric: bool = True
    search: bool = True
    head_bits: Literal[4, 8] | None = None

    def __post_init__(self) -> None:
        if self.bits not in (4, 8) or self.head_bits not in (None, 4, 8):
            raise ConfigError(f"bits must be 4 or 8, got {self.bits} (head {self.head_bits})")
        if self.group_size not in GROUP_SIZES:
            raise ConfigError(f"a block has 32, 64 or 128 weights, got {self.group_size}")


@dataclass(frozen=True, kw_only=True)
class DynamicInt8:
    """Weights in 8 bits, symmetric, one scale per output channel; activations in 8 bits with a scale per call."""


Scheme: TypeAlias = WeightOnly | DynamicInt8


def scheme_of(precision: str) -> Scheme | None:
    """How ``precision`` rounds a decoder's weights; None for the float ones.

    Raises ConfigError for a name that means nothing, with the names that do.
    """
    if precision in FLOATS:
        return None
    if precision == DYNAMIC:
        return DynamicInt8()
    if found := INT8.fullmatch(precision):
        return WeightOnly(bits=8, group_size=int(found["block"] or INT8_GROUP_SIZE))
    if found := INT4.fullmatch(precision):
        return WeightOnly(
            bits=4,
            group_size=int(found["block"] or INT4_GROUP_SIZE),
            symmetric=not found["asym"],
            search=not found["rtn"],
            head_bits=8 if found["head8"] else None,
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


def head_scheme(scheme: Scheme) -> Scheme:
    """How the output head is rounded: in ``head_bits`` where the scheme has them, in 8 always symmetrically."""
    if isinstance(scheme, DynamicInt8) or scheme.head_bits is None:
        return scheme
    symmetric = scheme.symmetric if scheme.head_bits == 4 else True
    return WeightOnly(bits=scheme.head_bits, group_size=scheme.group_size, symmetric=symmetric, search=scheme.search)


def bits_per_weight(scheme: Scheme, in_features: int) -> float:
    """Bits of one weight in a row of ``in_features``, its share of float32 scales and packed zero points included."""
    if isinstance(scheme, DynamicInt8):
        return 8 + 32 / in_features
    num_groups = -(-in_features // scheme.group_size)
    extra = 32 + (0 if scheme.symmetric else scheme.bits)
    return (num_groups * scheme.group_size * scheme.bits + num_groups * extra) / in_features
