"""Rows of an embedding read from their file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgevlm.bundle.manifest import DecoderShape, Manifest, PartFile, RowTable
from edgevlm.bundle.read import Bundle
from edgevlm.core.errors import ConfigError, IntegrityError, UsageError
from edgevlm.runtimes.embedding_table import DTYPES, EmbeddingTable

ROWS = np.array([[0.5, -1, 2], [3, 4, 5], [-6, 7.25, 8], [9, 10, 11]], np.float32)  # float16 holds them exactly


def table(dtype: str, offset: int = 5) -> RowTable:
    return RowTable(file="rows.bin", offset=offset, dtype=dtype, num_rows=4, num_columns=3)


def write(root: Path, dtype: str, offset: int = 5) -> Bundle:
    (root / "rows.bin").write_bytes(b"\xff" * offset + ROWS.astype(DTYPES[dtype]).tobytes())
    parts = [
        PartFile(part=name, target="onnx", precision="fp32", file=f"{name}.onnx", inputs=(), outputs=())
        for name in ("vision_encoder", "embed_tokens", "decoder_model_merged")
    ]
    manifest = Manifest(
        name="rows",
        family="test",
        parts=tuple(parts),
        image={},
        prompt={},
        num_vision_tokens=1,
        decoder=DecoderShape(1, 1, 1, 3, 4),
        max_context=1,
    )
    return Bundle(root, manifest)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 4, 5, 4096])
def test_rows_come_from_their_place_in_the_file(tmp_path: Path, dtype: str, offset: int) -> None:
    embedding = EmbeddingTable(write(tmp_path, dtype, offset), table(dtype, offset))
    found = embedding.embed(np.array([[3, 0, 3]]))
    assert (found.dtype, found.shape) == (np.float32, (1, 3, 3))
    assert found[0].tolist() == [[9, 10, 11], [0.5, -1, 2], [9, 10, 11]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_row_is_written_where_the_caller_wants_it(tmp_path: Path, dtype: str) -> None:
    row = np.zeros((1, 1, 3), np.float32)
    EmbeddingTable(write(tmp_path, dtype), table(dtype)).write_row(2, row)
    assert row[0, 0].tolist() == [-6, 7.25, 8]


def test_rows_belong_to_the_caller(tmp_path: Path) -> None:
    embedding = EmbeddingTable(write(tmp_path, "float32"), table("float32"))
    embedding.embed(np.array([[1]]))[:] = 0
    assert embedding.embed(np.array([[1]]))[0, 0].tolist() == [3, 4, 5]


@pytest.mark.parametrize("token", [-1, 4, 2**40])
def test_a_token_without_a_row_is_refused_rather_than_wrapped(tmp_path: Path, token: int) -> None:
    embedding = EmbeddingTable(write(tmp_path, "float32"), table("float32"))
    with pytest.raises(ConfigError, match=f"token id {token} has no row among the 4"):
        embedding.embed(np.array([[1, token]]))
    with pytest.raises(ConfigError, match=f"token id {token} has no row"):
        embedding.write_row(token, np.zeros((1, 1, 3), np.float32))


def test_a_table_that_ends_behind_its_file_is_refused(tmp_path: Path) -> None:
    bundle = write(tmp_path, "float32", offset=0)
    with pytest.raises(IntegrityError, match=r"from byte 1 on end behind the file's 48 bytes"):
        EmbeddingTable(bundle, table("float32", offset=1))
    EmbeddingTable(bundle, table("float32", offset=0))


def test_an_empty_or_missing_file_is_refused(tmp_path: Path) -> None:
    bundle = write(tmp_path, "float32")
    (tmp_path / "rows.bin").write_bytes(b"")
    with pytest.raises(IntegrityError, match="0 bytes"):
        EmbeddingTable(bundle, table("float32"))
    with pytest.raises(IntegrityError, match=r"other\.bin is missing"):
        EmbeddingTable(bundle, replace(table("float32"), file="other.bin"))


def test_a_closed_table_says_so(tmp_path: Path) -> None:
    embedding = EmbeddingTable(write(tmp_path, "float32"), table("float32"))
    embedding.close()
    with pytest.raises(UsageError, match="closed"):
        embedding.embed(np.array([[1]]))
