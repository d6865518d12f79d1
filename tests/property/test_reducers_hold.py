"""What holds for every token reducer."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from edgevlm.models.projectors.mlp import AveragePool, SpaceToDepth


@given(factor=st.integers(1, 4), cells=st.integers(1, 4), width=st.integers(1, 5), batch=st.integers(1, 3))
def test_space_to_depth_is_a_permutation(factor: int, cells: int, width: int, batch: int) -> None:
    side = factor * cells
    tokens = torch.randperm(batch * side * side * width).view(batch, side * side, width)
    folded = SpaceToDepth(factor)(tokens)
    assert folded.shape == (batch, cells * cells, width * factor**2)
    assert torch.equal(folded.flatten().sort().values, tokens.flatten().sort().values)


@given(factor=st.integers(1, 4), cells=st.integers(1, 4), width=st.integers(1, 5))
def test_pooling_keeps_the_mean(factor: int, cells: int, width: int) -> None:
    tokens = torch.randn(1, (factor * cells) ** 2, width, dtype=torch.float64)
    torch.testing.assert_close(AveragePool(factor)(tokens).mean(1), tokens.mean(1))
