"""Training form to inference form: branches, batch norms and residuals become one convolution each.

A module that can be written as another one has a method ``fold`` that returns it.  What checkpoints keep even in
their inference form, but no exported graph needs, goes by a method ``bake``.
"""

from __future__ import annotations

import copy
from itertools import chain
from typing import Literal, TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def reparameterize(module: Module) -> Module:
    """A copy of ``module`` in inference form: each part with a method ``fold`` is replaced by what that returns.

    It computes the same and cannot be trained further.  Tensors that do not change are shared with ``module``.
    """
    folded = _copy_of_structure(module)
    replace_children(folded, "fold")
    return folded.eval()


def bake(module: Module) -> Module:
    """``reparameterize``, and each part with a method ``bake`` replaced by what that returns: the form for export."""
    baked = reparameterize(module)
    replace_children(baked, "bake")
    return baked


def replace_children(module: nn.Module, verb: Literal["fold", "bake"]) -> None:
    """Replace, below ``module`` and in place, every part that has the method ``verb``."""
    for name, child in module.named_children():
        if hasattr(child, verb):
            setattr(module, name, getattr(child, verb)())
        else:
            replace_children(child, verb)


def _copy_of_structure(module: Module) -> Module:
    """New modules around the same tensors: of a large decoder beside the encoder there need be no second one."""
    shared = {id(tensor): tensor for tensor in chain(module.parameters(), module.buffers())}
    return copy.deepcopy(module, shared)
