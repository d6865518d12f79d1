"""The recorded cases of a bundle, read back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgevlm.bundle.golden import load_golden
from edgevlm.core.errors import IntegrityError
from edgevlm.verify import golden


@dataclass(frozen=True, kw_only=True)
class GoldenCase:
    """A recorded case: its picture's file, its prompt, and every stage's tensors.

    ``own`` holds, per precision that rounds, what the same rounding gives in PyTorch; of decoders also without the
    rounding of activations (``golden.unrounded``).
    """

    picture: Path
    prompt: str
    tensors: golden.Tensors
    own: Mapping[str, golden.Tensors]


def golden_cases(root: Path, image_size: int | None = None) -> list[GoldenCase]:
    """The cases of the bundle at ``root``; with ``image_size`` those whose picture becomes so many pixels a side.

    Raises IntegrityError when ``golden/`` lacks something that ``golden.record`` writes.
    """
    tensors, meta = load_golden(root)
    cases = []
    try:
        prompts = meta["prompts"]
        sides = meta.get("image_sizes") or [image_size] * len(prompts)
        for number, (prompt, side) in enumerate(zip(prompts, sides, strict=True)):
            if image_size not in (None, side):
                continue
            cases.append(
                GoldenCase(
                    picture=golden.picture(root, number),
                    prompt=prompt,
                    tensors={name: tensors[f"{number}.{name}"] for name in golden.TENSORS},
                    own=_own(tensors, number),
                )
            )
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(f"{root}: golden/ is incomplete ({error}): export the bundle again") from error
    if not cases:
        raise IntegrityError(f"{root}: golden/ holds no case, so nothing can be compared: export the bundle again")
    return cases


def _own(tensors: golden.Tensors, number: int) -> dict[str, golden.Tensors]:
    """Of names such as ``0.int4-b128.prefill_logits``: by what stands in the middle, then by stage."""
    found: dict[str, golden.Tensors] = {}
    for name, tensor in tensors.items():
        case, *middle, stage = name.split(".")
        if case == str(number) and middle:
            found.setdefault(".".join(middle), {})[stage] = tensor
    return found
