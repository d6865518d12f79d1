"""A torchvision that was compiled for CUDA becomes importable beside a PyTorch for the CPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

OPERATORS = ("nms", "qnms")
_kept: list[Any] = []  # a library's operators live as long as it does


def define_missing_operators() -> None:
    """Give torch the signatures of torchvision's two compiled operators where its library does not load.

    Without them neither torchvision nor timm nor transformers' models import.  Nothing here calls them.
    """
    import torch

    if _loads("torchvision"):
        return
    library = torch.library.Library("torchvision", "DEF")
    for operator in OPERATORS:
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept.append(library)


def _loads(package: str) -> bool:
    """Whether there is nothing to mend: ``package`` is absent, or its operators fit this PyTorch."""
    import torch

    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return True
    try:
        for library in Path(spec.origin).parent.glob("_C.*"):
            torch.ops.load_library(library)
    except OSError:
        return False
    return hasattr(getattr(torch.ops, package), "nms")
