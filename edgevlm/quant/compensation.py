"""Rounding that makes up for itself: what one input's rounded weights get wrong, the inputs after it correct.

The second moments of a layer's inputs, H = mean of x xᵀ, say which inputs come together.  Columns are rounded one after
the other; the error of each, divided by its entry of the upper Cholesky factor U of H⁻¹, is taken off the columns still
to come in the proportions of its row of U.  Every group's range is searched when its turn comes, on what is left of it.

Source: GPTQ, Frantar et al. 2022, arXiv:2210.17323.  H is cut into spans of neighbouring inputs, so that wide layers
take bounded memory; between spans nothing is made up for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from edgevlm.quant.search import Codes, Fit

MAX_SPAN = 1024  # inputs
AT_ONCE = 16  # columns whose errors reach the rest of their group together
SPAN_STEP = 128  # the largest group, so that none lies in two spans
DAMPING = 0.03  # of the mean second moment, added to each, so that U stays finite; 0.01 to 0.1 lose the same

FactoredSpan: TypeAlias = tuple[Tensor, Tensor]  # U [S, S] and how much each input counts, filled up
FitGroup: TypeAlias = Callable[[Tensor, Tensor], Fit]  # groups [n, 1, group_size] and counts [1, group_size]


def num_spans(num_inputs: int) -> tuple[int, int]:
    """How many spans, and how many inputs each has; the last is filled up."""
    width = min(-(-num_inputs // SPAN_STEP) * SPAN_STEP, MAX_SPAN)
    return -(-num_inputs // width), width


def factored_spans(moments: Tensor, num_inputs: int) -> list[FactoredSpan]:
    """What ``compensated`` needs of second moments [P, S, S] as ``num_spans`` cuts them, whatever rows it is given."""
    width = moments.shape[-1]
    found = []
    for start, moment in zip(range(0, num_inputs, width), moments, strict=True):
        num = min(width, num_inputs - start)
        found.append((factored(moment[:num, :num]), moment.diagonal() + DAMPING))  # as much as U takes it for
    return found


def compensated(
    rows: Tensor, spans: Sequence[FactoredSpan], group_size: int, span: Codes, fit: FitGroup
) -> tuple[Tensor, Fit]:
    """Codes [n, K] and ranges of ``rows`` [n, K], whose inputs ``spans`` cut."""
    codes: list[Tensor] = []
    fits: list[Fit] = []
    for part, (factor, counts) in zip(rows.split([len(each) for each, _ in spans], dim=1), spans, strict=True):
        rest, num = part.clone(), part.shape[1]
        for start in range(0, num, group_size):
            end = min(start + group_size, num)
            group = rest[:, start:end]
            filled: Tensor = F.pad(group, (0, start + group_size - end))
            fits.append(fit(filled.unsqueeze(1), counts[None, start : start + group_size]))
            found, errors = _columns(group, factor[start:end, start:end], span, fits[-1])
            rest[:, end:] -= errors @ factor[start:end, end:]
            codes.append(found)
    return torch.cat(codes, dim=1), _joined(fits)


def factored(moment: Tensor) -> Tensor:
    """U of H⁻¹ = Uᵀ U, upper triangular, for the damped second moments H [S, S]."""
    wide = moment.double()
    mean = wide.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    damped = wide / mean + DAMPING * torch.eye(len(wide), dtype=torch.float64)
    upper: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    return upper.float()


def _columns(group: Tensor, factor: Tensor, span: Codes, fit: Fit) -> tuple[Tensor, Tensor]:
    """Codes [n, g] of a group's columns, which change as errors reach them, and the errors [n, g] for what follows.

    Errors go to the next few columns at once and to the others of the group a few columns at a time: the same sums, in
    products of matrices.
    """
    columns = group.T.contiguous()  # a column's weights side by side
    codes, errors = torch.empty_like(columns), torch.empty_like(columns)
    for start in range(0, len(columns), AT_ONCE):
        end = min(start + AT_ONCE, len(columns))
        for j in range(start, end):
            codes[j] = fit.codes(columns[j, :, None, None], span)[:, 0, 0]
            errors[j] = (columns[j] - fit.values(codes[j, :, None])[:, 0]) / factor[j, j]
            columns[j + 1 : end].addr_(factor[j, j + 1 : end], errors[j], alpha=-1)
        columns[end:] -= factor[start:end, end:].T @ errors[start:end]
    return codes.T, errors.T


def _joined(fits: list[Fit]) -> Fit:
    """The ranges of all groups, each [n, 1] before."""
    points = [fit.zero_points for fit in fits if fit.zero_points is not None]
    scales = torch.cat([fit.scales for fit in fits], dim=1)
    return Fit(scales=scales, zero_points=torch.cat(points, dim=1) if points else None)
