"""The embedding as rows in a file: a look-up that maps memory and needs no engine."""

from __future__ import annotations

import mmap

import numpy as np

from edgevlm.bundle.manifest import RowTable
from edgevlm.bundle.read import Bundle
from edgevlm.core.errors import ConfigError, InputError, IntegrityError, UsageError
from edgevlm.runtimes.session import Float, Ints

DTYPES = {"float32": "<f4", "float16": "<f2"}


class EmbeddingTable:
    """An ``Embedding`` that reads rows where ``table`` says that they lie.

    The file is mapped: only the pages of rows that were asked for take memory, and the system may drop them again.
    Rows of float16 are widened one by one.  Raises IntegrityError for a table that ends behind its file.
    """

    def __init__(self, bundle: Bundle, table: RowTable) -> None:
        self._rows: np.ndarray | None = _mapped(bundle, table)

    def embed(self, input_ids: Ints) -> Float:
        """The rows, copied out of the mapping, in float32; the caller keeps them."""
        rows = self._opened()
        largest, smallest = int(input_ids.max(initial=0)), int(input_ids.min(initial=0))
        if smallest < 0 or largest >= len(rows):
            raise _no_such_token(smallest if smallest < 0 else largest, len(rows))
        return rows[input_ids].astype(np.float32, copy=False)

    def write_row(self, token: int, row: Float) -> None:
        """The embedding of ``token`` into ``row`` ``[1, 1, D]``."""
        rows = self._opened()
        if not 0 <= token < len(rows):
            raise _no_such_token(token, len(rows))
        row[0, 0] = rows[token]

    def close(self) -> None:
        """Give the mapping back, once nobody holds a view of it."""
        self._rows = None

    def _opened(self) -> np.ndarray:
        if self._rows is None:
            raise UsageError("this embedding is closed: open the bundle again")
        return self._rows


def _mapped(bundle: Bundle, table: RowTable) -> np.ndarray:
    """The rows ``[V, D]``, read-only."""
    path = bundle.path(table.file)
    dtype = np.dtype(DTYPES[table.dtype])
    count = table.num_rows * table.num_columns
    try:
        with path.open("rb") as stream:
            size = path.stat().st_size
            if table.offset + count * dtype.itemsize > size:
                raise IntegrityError(
                    f"{path}: the embedding's {table.num_rows:,} rows of {table.num_columns} {table.dtype} from byte "
                    f"{table.offset:,} on end behind the file's {size:,} bytes: copy or export the bundle again"
                )
            mapping = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError as error:
        raise IntegrityError(f"{path} is missing: copy or export the bundle again") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    flat = np.frombuffer(mapping, dtype, count, table.offset)  # any offset will do: NumPy reads unaligned rows, too
    return flat.reshape(table.num_rows, table.num_columns)


def _no_such_token(token: int, num_rows: int) -> ConfigError:
    return ConfigError(f"token id {token} has no row among the {num_rows:,} of the embedding")
