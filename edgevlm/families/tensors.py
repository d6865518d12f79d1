"""What a checkpoint's weights are called, of which type and shape, and where they lie: headers alone, no PyTorch.

A safetensors file is eight bytes that give the length of a JSON header, the header, and the bytes of the tensors
without a gap between them.  Pickles (``.bin``, ``.pt``, ``.pth``) are never opened: they can run code.
"""

from __future__ import annotations

import json
import math
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgevlm.core.config import read_json
from edgevlm.core.errors import InputError, IntegrityError, UnsupportedError

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_NAMED = 5  # of a list, in a message
ITEM_BYTES: Mapping[str, int] = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
NO_WEIGHTS = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scheduler.bin")
LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor that lies in ``file`` at byte ``offset``; ``dtype`` is spelled as the file spells it (``BF16``)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int

    @property
    def num_elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """How many bytes of the file it takes."""
        return self.num_elements * ITEM_BYTES[self.dtype]


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint in ``folder`` by name, from model.safetensors or from all shards of its index.

    Raises InputError where there are no weights, UnsupportedError (with the command that converts them) where
    there are only pickles, IntegrityError for files that are damaged, missing, or at odds with the index.
    """
    if (folder / WEIGHTS).is_file():
        return {tensor.name: tensor for tensor in read_header(folder / WEIGHTS)}
    if not (folder / INDEX).is_file():
        raise _no_weights(folder)
    listed = _read_index(folder / INDEX)
    found = [tensor for file in _shards(folder) for tensor in read_header(file)]
    _check_index(folder / INDEX, listed, found)
    return {tensor.name: tensor for tensor in found}


def listed_files(folder: Path) -> tuple[str, ...]:
    """The names of the files that hold the weights of ``folder``, there or not: those of its index, if it has one."""
    if (folder / INDEX).is_file() and not (folder / WEIGHTS).is_file():
        return tuple(sorted(set(_read_index(folder / INDEX).values())))
    return (WEIGHTS,)


def read_index(folder: Path) -> dict[str, str]:
    """The file in which each tensor of ``folder`` lies, there or not; empty without an index.

    Raises IntegrityError for one that names anything but plain files beside it.
    """
    return _read_index(folder / INDEX) if (folder / INDEX).is_file() else {}


def weight_files(tensors: Iterable[StoredTensor]) -> tuple[Path, ...]:
    """The files in which ``tensors`` lie, each once."""
    return tuple(dict.fromkeys(tensor.file for tensor in tensors))


def read_header(file: Path) -> list[StoredTensor]:
    """The tensors of one safetensors file, in the order of their bytes.  Raises IntegrityError when it is damaged."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            if start and LFS_POINTER.startswith(start):
                raise IntegrityError(f"{file} is a Git LFS pointer, not the weights: run `git lfs pull` in its folder")
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
            header = json.loads(stream.read(length).decode("utf-8"), object_pairs_hook=_without_repeats)
        return _parse(header, file, 8 + length, size)
    except (ValueError, RecursionError, OSError) as error:
        raise IntegrityError(f"{file} is not a readable safetensors file ({error}); fetch it again") from error


def _parse(header: Any, file: Path, start: int, size: int) -> list[StoredTensor]:
    """Raises ValueError unless the tensors fill the file from ``start`` to its end, one after the other."""
    if not isinstance(header, dict):
        raise ValueError("the header is no JSON object")
    entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
    tensors, end = [], start
    for name, entry in sorted(entries, key=lambda item: _offsets(*item)):
        tensor = StoredTensor(name=name, dtype=_dtype(name, entry), shape=_shape(name, entry), file=file, offset=end)
        if _offsets(name, entry) != (end - start, end - start + tensor.num_bytes):
            raise ValueError(f"{name} does not lie where it should")
        end += tensor.num_bytes
        tensors.append(tensor)
    if end != size:
        raise ValueError(f"{size:,} bytes where its header describes {end:,}")
    return tensors


def _offsets(name: str, entry: Any) -> tuple[int, int]:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise ValueError(f"{name} has no place in the file")
    return offsets[0], offsets[1]


def _dtype(name: str, entry: Mapping[str, Any]) -> str:
    dtype = entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ValueError(f"{name} is of type {dtype!r}; known: {', '.join(ITEM_BYTES)}")
    return dtype


def _shape(name: str, entry: Mapping[str, Any]) -> tuple[int, ...]:
    shape = entry.get("shape")
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        raise ValueError(f"{name} has no shape")
    return tuple(shape)


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        name = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{name} stands twice in the header")
    return result


def _read_index(file: Path) -> dict[str, str]:
    """The shard of each tensor.  Raises IntegrityError for anything but plain file names beside the index."""
    listed = read_json(file).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise IntegrityError(f"{file} has no weight_map that says where each tensor lies; fetch it again")
    for name, shard in listed.items():
        if not isinstance(shard, str) or not _is_plain_name(shard):
            raise IntegrityError(f"{file}: {name} lies in {shard!r}; expected a .safetensors file in the same folder")
    return listed


def _is_plain_name(name: str) -> bool:
    return name.endswith(".safetensors") and not any(letter in name for letter in "/\\:\0") and name.isprintable()


def _shards(folder: Path) -> list[Path]:
    names = listed_files(folder)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise IntegrityError(
            f"{folder}: {len(missing)} of {len(names)} shards missing ({_some(missing)}); fetch them again"
        )
    return [folder / name for name in names]


def _check_index(file: Path, listed: Mapping[str, str], found: Iterable[StoredTensor]) -> None:
    """Raise IntegrityError unless each tensor lies in the shard that the index names, and in no other."""
    places = {(tensor.name, tensor.file.name) for tensor in found}
    lacking = [f"{name} (not in {shard})" for name, shard in listed.items() if (name, shard) not in places]
    extra = [f"{name} (in {shard})" for name, shard in sorted(places - set(listed.items()))]
    complaints = [f"{len(lacking)} tensors lacking: {_some(lacking)}"] if lacking else []
    complaints += [f"{len(extra)} tensors that it does not list: {_some(extra)}"] if extra else []
    if complaints:
        raise IntegrityError(f"{file} and its shards are at odds: {'; '.join(complaints)}; fetch them again")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


def _no_weights(folder: Path) -> InputError | UnsupportedError:
    pickles = sorted(
        path for path in folder.glob("*") if path.suffix in PICKLES and path.name not in NO_WEIGHTS and path.is_file()
    )
    if pickles:
        names = _some([path.name for path in pickles])
        return UnsupportedError(
            f"{folder} holds pickled weights ({names}), which can run code and are not opened. "
            f"Where you trust them, convert them once: {conversion_command(folder, pickles)}"
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        return InputError(
            f"{folder} holds {_some(others)}, but neither {WEIGHTS} nor {INDEX}, which says what is in which shard; "
            "fetch or copy it, too"
        )
    return InputError(f"{folder / WEIGHTS} is missing: a model folder holds config.json and {WEIGHTS}")


def conversion_command(folder: Path, pickles: Iterable[Path]) -> str:
    """The command that writes model.safetensors from ``pickles``; PyTorch reads them without running their code.

    Files of Llama's own release (``consolidated.*.pth``) cut every matrix, so that only transformers puts them
    together.
    """
    files = [str(path) for path in pickles]
    if any(Path(name).name.startswith("consolidated.") for name in files):
        code = (
            "from transformers import AutoModelForImageTextToText as M; "
            f"M.from_pretrained({json.dumps(str(folder))}).save_pretrained({json.dumps(f'{folder}-safetensors')})"
        )
        return f"python -c {shlex.quote(code)} (needs the same model in transformers' layout)"
    code = (
        "import torch, safetensors.torch as s; s.save_file({k: v.clone().contiguous() "
        f"for f in {json.dumps(files)} "
        'for k, v in torch.load(f, map_location="cpu", weights_only=True).items()}, '
        f"{json.dumps(str(folder / WEIGHTS))})"
    )
    return f"python -c {shlex.quote(code)}"
