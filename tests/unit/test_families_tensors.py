"""Headers of weights: what is read, and everything that is refused before a byte of a tensor is."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from edgevlm.core.errors import InputError, IntegrityError, UnsupportedError
from edgevlm.families import tensors
from edgevlm.families.folder import ModelFolder
from edgevlm.families.tensors import INDEX, WEIGHTS, read_header, read_headers, weight_files

TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(4, np.int64), "c": np.ones((), np.float16)}


def raw(folder: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A file with ``header``, which claims to be ``length`` bytes long."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file = folder / WEIGHTS
    file.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return file


def sharded(folder: Path, **changes: str | None) -> None:
    """``a`` in the first shard, ``b`` and ``c`` in the second, and an index with ``changes``."""
    save_file({"a": TENSORS["a"]}, folder / "model-1.safetensors")
    save_file({"b": TENSORS["b"], "c": TENSORS["c"]}, folder / "model-2.safetensors")
    places: dict[str, Any] = {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-2.safetensors"}
    listed = {name: place for name, place in {**places, **changes}.items() if place is not None}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 58}, "weight_map": listed}))


def test_names_types_shapes_and_places_are_read(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / WEIGHTS, metadata={"format": "np"})
    found = read_headers(tmp_path)
    assert {name: (t.dtype, t.shape, t.num_bytes) for name, t in found.items()} == {
        "a": ("F32", (2, 3), 24),
        "b": ("I64", (4,), 32),
        "c": ("F16", (), 2),
    }
    data = (tmp_path / WEIGHTS).read_bytes()
    assert data[found["a"].offset :][:24] == TENSORS["a"].tobytes()


def test_shards_are_read_as_one(tmp_path: Path) -> None:
    sharded(tmp_path)
    found = read_headers(tmp_path)
    assert {name: tensor.file.name for name, tensor in found.items()} == {
        "a": "model-1.safetensors",
        "b": "model-2.safetensors",
        "c": "model-2.safetensors",
    }
    assert [file.name for file in weight_files(found.values())] == ["model-1.safetensors", "model-2.safetensors"]


def test_an_index_tells_the_names_where_shards_are_not_there(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "model-1.safetensors").unlink()
    folder = ModelFolder(tmp_path)
    assert folder.tensor_names == {"a", "b", "c"}
    assert (folder.tensor("a"), folder.tensor("nothing")) == (None, None)
    found = folder.tensor("b")
    assert found is not None
    assert found.shape == (4,)
    with pytest.raises(IntegrityError, match="1 of 2 shards missing"):
        _ = folder.tensors


def test_one_header_is_read_once_for_all_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(TENSORS, tmp_path / WEIGHTS)
    folder = ModelFolder(tmp_path)
    counted = Mock(side_effect=read_header)
    monkeypatch.setattr(tensors, "read_header", counted)
    assert folder.tensor_names == {"a", "b", "c"}
    assert folder.tensor("c") is folder.tensors["c"]
    counted.assert_called_once_with(tmp_path / WEIGHTS)


@pytest.mark.parametrize(
    ("header", "data", "length", "complaint"),
    [
        (b"", b"", 10**15, "a header of 1,000,000,000,000,000 bytes in a file of 8"),
        (b"{", b"", None, "Expecting property name"),
        ([1], b"", None, "the header is no JSON object"),
        (b"\xff\xfe", b"", None, "codec can't decode"),
        ({"a": 1}, b"", None, "a has no place"),
        ({"a": {"dtype": "F4", "shape": [1], "data_offsets": [0, 4]}}, b"1234", None, "a is of type 'F4'"),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"1234", None, "a has no shape"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}, b"12345678", None, "a does not lie where"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"12345678", None, "a does not lie where"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"12345", None, "bytes where its header"),
        ({"a": {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 2**64]}}, b"", None, "bytes where its header"),
        (b'{"a": 1, "a": 1}', b"", None, "a stands twice"),
        (b"[" * 100_000, b"", None, "recursion"),
    ],
)
def test_a_damaged_header_is_refused(
    tmp_path: Path, header: object, data: bytes, length: int | None, complaint: str
) -> None:
    with pytest.raises(IntegrityError, match=complaint):
        read_header(raw(tmp_path, header, data, length))


def test_a_cut_file_and_a_pointer_are_told_apart(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / WEIGHTS)
    data = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(data[:-1])
    with pytest.raises(IntegrityError, match="not a readable safetensors file"):
        read_headers(tmp_path)
    (tmp_path / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    with pytest.raises(IntegrityError, match="git lfs pull"):
        read_headers(tmp_path)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"a": "../model-1.safetensors"}, "expected a .safetensors file in the same folder"),
        ({"a": "/etc/passwd"}, "expected a .safetensors file in the same folder"),
        ({"a": "sub\\x.safetensors"}, "expected a .safetensors file in the same folder"),
        ({"a": "model-1.bin"}, "expected a .safetensors file in the same folder"),
        ({"a": "model-3.safetensors"}, r"1 of 2 shards missing \(model-3.safetensors\)"),
        ({"d": "model-1.safetensors"}, r"1 tensors lacking: d \(not in model-1.safetensors\)"),
        ({"c": None}, r"1 tensors that it does not list: c \(in model-2.safetensors\)"),
        ({"b": "model-1.safetensors"}, r"lacking: b \(not in model-1.*not list: b \(in model-2"),
    ],
)
def test_an_index_at_odds_with_its_shards_is_refused(
    tmp_path: Path, changes: dict[str, str | None], complaint: str
) -> None:
    sharded(tmp_path, **changes)
    with pytest.raises(IntegrityError, match=complaint):
        read_headers(tmp_path)


def test_an_index_without_a_map_is_refused(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text('{"weight_map": {}}')
    with pytest.raises(IntegrityError, match="no weight_map"):
        read_headers(tmp_path)


def test_the_command_for_a_pickle_converts_it(tmp_path: Path) -> None:
    folder = tmp_path / "it's a model"
    folder.mkdir()
    torch.save({"a": torch.arange(3.0), "b": torch.ones(2, 2).T}, folder / "pytorch_model.bin")
    torch.save({"lr": 1}, folder / "training_args.bin")
    with pytest.raises(UnsupportedError, match=r"pickled weights \(pytorch_model.bin\), which can run code") as raised:
        read_headers(folder)
    command = shlex.split(str(raised.value).split("convert them once: ")[1])
    subprocess.run([sys.executable, *command[1:]], check=True)
    assert load_file(folder / WEIGHTS)["a"].tolist() == [0, 1, 2]


def test_pickles_in_llamas_pieces_need_transformers(tmp_path: Path) -> None:
    (tmp_path / "consolidated.00.pth").write_bytes(b"never read")
    with pytest.raises(UnsupportedError, match="save_pretrained"):
        read_headers(tmp_path)


def test_no_weights_are_told_with_what_is_there(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "adapter.safetensors")
    with pytest.raises(InputError, match=r"holds adapter.safetensors, but neither model.safetensors nor model.*index"):
        read_headers(tmp_path)
