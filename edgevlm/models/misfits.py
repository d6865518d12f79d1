"""What does not fit between a checkpoint and its config, told in the checkpoint's own names."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Protocol

import torch
from torch import nn

from edgevlm.core.errors import IntegrityError
from edgevlm.families.tensors import StoredTensor

MAX_NAMED = 3  # of each kind
LEFT_OUT = "num_batches_tracked"  # a count of training steps that many files lack


class Placed(Protocol):
    """A tensor of a file with the shape and type that it has in the model."""

    @property
    def stored(self) -> StoredTensor: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...


def check_fit(module: nn.Module, sources: Mapping[str, Placed], unknown: Sequence[str], *, where: str) -> None:
    """Raise IntegrityError unless ``sources`` are the tensors of ``module``, and nothing is ``unknown``.

    The message counts what is missing, unexpected or misshapen, and names some of each with what is like it.
    """
    expected = module.state_dict()
    missing = [name for name in expected if name not in sources and not name.endswith(LEFT_OUT)]
    left = [*unknown, *(placed.stored.name for name, placed in sources.items() if name not in expected)]
    wrong = [
        _wrong(name, sources[name], tensor)
        for name, tensor in expected.items()
        if name in sources and not _fits(sources[name], tensor)
    ]
    if not (missing or left or wrong):
        return
    named = {name: placed.stored.name for name, placed in sources.items() if name in expected}
    groups = (
        _absent_parts(expected, sources),
        _some([_missing(name, named, left) for name in missing[:MAX_NAMED]], len(missing)),
        _some([f"unexpected {name}" for name in left[:MAX_NAMED]], len(left)),
        _some(wrong[:MAX_NAMED], len(wrong)),
    )
    sizes = {"missing": len(missing), "unexpected": len(left), "misshapen": len(wrong)}
    counts = ", ".join(f"{count} {kind}" for kind, count in sizes.items() if count)
    raise IntegrityError(f"{where} does not fit its config.json ({counts}): {'; '.join(filter(None, groups))}")


def _absent_parts(expected: Mapping[str, object], sources: Mapping[str, Placed]) -> str:
    """The parts of several tensors of which the file holds none."""
    parts = Counter(name.split(".")[0] for name in expected)
    found = {name.split(".")[0] for name in sources}
    absent = [part for part, count in parts.items() if count > 1 and part not in found]
    return f"nothing of {', '.join(absent)} is in the file" if absent else ""


def name_in_file(name: str, named: Mapping[str, str]) -> str:
    """What ``name`` of our model would be called in a file, after its nearest neighbour in ``named``; empty if unclear.

    ``named`` maps our names to the file's.  Of ``decoder.layers.3.norm.weight`` and a neighbour
    ``decoder.layers.3.mlp.weight`` in ``model.layers.3.mlp.weight`` the former is ``model.layers.3.norm.weight``.
    """
    neighbours = sorted(named, key=lambda other: _num_shared(name, other), reverse=True)
    for other in neighbours[:8]:
        shared = _num_shared(name, other)
        kept = _num_shared(other, named[other], step=-1)
        first = len(other.split(".")) - kept  # from here on both call it the same
        if shared >= first and kept:
            parts = named[other].split(".")
            return ".".join([*parts[: len(parts) - kept], *name.split(".")[first:]])
    return ""


def _missing(name: str, named: Mapping[str, str], left: Sequence[str]) -> str:
    theirs = name_in_file(name, named)
    source = f" (from {theirs})" if theirs and theirs != name else ""
    close = [  # a tensor that has no place is likely the one that is looked for
        *difflib.get_close_matches(theirs or name, left, n=1, cutoff=0.8),
        *difflib.get_close_matches(theirs or name, list(named.values()), n=1),
    ]
    return f"missing {name}{source}" + (f", nearest in the file: {close[0]}" if close else "")


def _wrong(name: str, placed: Placed, expected: torch.Tensor) -> str:
    stored = placed.stored
    becomes = f", which gives {name} {placed.shape}" if placed.shape != stored.shape else ""
    kind = "" if _same_kind(placed.dtype, expected.dtype) else f" {stored.dtype}"
    wanted = "" if not kind else f" {str(expected.dtype).removeprefix('torch.')}"
    return f"{stored.name} is {stored.shape}{kind}{becomes}, expected {tuple(expected.shape)}{wanted}"


def _fits(placed: Placed, expected: torch.Tensor) -> bool:
    return placed.shape == tuple(expected.shape) and _same_kind(placed.dtype, expected.dtype)


def _same_kind(one: torch.dtype, other: torch.dtype) -> bool:
    return one.is_floating_point == other.is_floating_point


def _some(shown: Sequence[str], total: int) -> str:
    more = f"; and {total - len(shown)} more" if total > len(shown) else ""
    return "; ".join(shown) + more


def _num_shared(one: str, other: str, *, step: int = 1) -> int:
    """How many parts of two dotted names are the same, from the front (``step`` -1: from the back)."""
    pairs = zip(one.split(".")[::step], other.split(".")[::step], strict=False)
    return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
