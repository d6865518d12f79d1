"""The kv cache takes memory as it is filled, and says when there is none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from edgevlm.bench.memory import memory_now
from edgevlm.core.errors import DoesNotFitError
from edgevlm.models.kv_cache import KVCache
from edgevlm.shapes.config import DecoderConfig

CONFIG = DecoderConfig(
    vocab_size=16,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=64,
    max_position_embeddings=131_072,
)


def test_rows_that_nobody_has_written_take_no_memory() -> None:
    before = memory_now()[1]
    cache = KVCache(replace(CONFIG, max_position_embeddings=32_768))
    rows = torch.ones(1, 4, 3, 64)
    keys, values = cache.append(7, rows, rows)
    grown = memory_now()[1] - before
    assert torch.equal(keys, rows)
    assert torch.equal(values, rows)
    assert cache.keys.nbytes == 8 * 4 * 32_768 * 64 * 4
    assert grown < cache.keys.nbytes / 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_type_begins_with_zeros(dtype: torch.dtype) -> None:
    cache = KVCache(CONFIG, max_context=5, batch=2, dtype=dtype)
    assert cache.keys.shape == cache.values.shape == (8, 2, 4, 5, 64)
    assert cache.keys.dtype == dtype
    assert not cache.keys.any()


@pytest.mark.parametrize("max_context", [2**45, 2**60, 2**80])
def test_more_rows_than_any_memory_holds_are_refused_with_their_bytes(max_context: int) -> None:
    num_bytes = 2 * 8 * 4 * max_context * 64 * 4
    with pytest.raises(DoesNotFitError, match=f"takes {num_bytes:,} bytes.*--max-context"):
        KVCache(CONFIG, max_context=max_context)
