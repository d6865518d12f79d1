"""Full hashes are read once: a file with the same size and times as when it was hashed is taken as unchanged.

The cache is a convenience.  When it is missing, damaged or cannot be written, files are simply hashed again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from edgevlm.core.errors import EdgeVLMError
from edgevlm.core.files import atomic_file, cache_folder

logger = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
MAX_ENTRIES = 4096
SETTLED_NS = 3_000_000_000  # a file younger than this may change again within the clock's tick (FAT: 2 s)


class HashCache:
    """SHA-256 by absolute path, valid while the file's size, modification and change time stay the same."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._entries = _load(file)
        self._changed = False

    @classmethod
    def of_user(cls) -> HashCache:
        """The cache in this user's cache folder."""
        return cls(cache_folder() / "hashes.json")

    def sha256(self, path: Path) -> str:
        """The hash of ``path`` in hexadecimal: remembered, or read now and remembered for the next time."""
        key, state = os.path.abspath(path), _state(path)
        known = self._entries.get(key)
        if known is not None and known[:-1] == state:
            return str(known[-1])
        digest = sha256(path)
        if time.time_ns() - max(state[1:]) > SETTLED_NS and _state(path) == state:
            self._entries[key] = [*state, digest]
            self._changed = True
        return digest

    def save(self) -> None:
        """Write the cache, without the files that are gone; a failure is only logged."""
        if not self._changed:
            return
        alive = {key: entry for key, entry in self._entries.items() if os.path.exists(key)}
        newest = dict(list(alive.items())[-MAX_ENTRIES:])
        try:
            with atomic_file(self.file) as scratch:
                scratch.write_text(json.dumps(newest), encoding="utf-8")
        except (OSError, EdgeVLMError) as error:
            logger.debug("hash cache not written: %s", error)


def sha256(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _state(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _load(file: Path) -> dict[str, list[Any]]:
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return {key: entry for key, entry in entries.items() if _is_entry(entry)} if isinstance(entries, dict) else {}


def _is_entry(entry: object) -> bool:
    return isinstance(entry, list) and len(entry) == 4 and isinstance(entry[-1], str)
