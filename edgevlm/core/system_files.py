"""Small readers for the files of ``/proc``, ``/sys`` and ``/etc``: what cannot be read is empty or None."""

from __future__ import annotations

from pathlib import Path


def text_of(path: Path) -> str:
    """The stripped text of a system file, empty where there is none; device-tree strings end in a NUL."""
    try:
        return path.read_bytes().decode("utf-8", "replace").strip("\0 \t\n")
    except (OSError, ValueError):
        return ""


def field_of(text: str, name: str, separator: str = ":") -> str:
    """The rest of the line that begins with ``name`` and the separator."""
    for line in text.splitlines():
        key, found, value = line.strip().partition(separator)
        if found and key.strip() == name:
            return value.strip()
    return ""


def number_of(text: str) -> int | None:
    """``text`` as a number that is not negative, None where it is something else."""
    return int(text) if text.isascii() and text.isdigit() else None


def kilobytes_of(meminfo: str, name: str) -> int | None:
    """Bytes of the line ``name`` in the text of ``/proc/meminfo``."""
    number = number_of(field_of(meminfo, name).removesuffix("kB").strip())
    return None if number is None else number * 1024
