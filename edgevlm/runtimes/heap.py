"""What a program asks of the system about memory: to take back what is free, and to lay the rest in huge pages."""

from __future__ import annotations

import ctypes
import errno
import sys
from collections.abc import Iterator
from pathlib import Path

from edgevlm.core.errors import DoesNotFitError, UnsupportedError

HUGE = 2 << 20  # bytes of a huge page where a small one has 4 kB
MADV_COLLAPSE = 25  # Linux 6.1: make huge pages of the small ones in a range, now


def give_back() -> None:
    """Return the heap's free pages to the system, where the C library can (glibc); elsewhere nothing happens.

    Loading a graph frees as much as a third of what it allocated, in pieces that the library keeps for later: 170 MB
    for an encoder of 505 MB of weights.
    """
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def use_huge_pages(maps: Path = Path("/proc/self/maps")) -> int:
    """Lay the memory that this process holds into huge pages; returns the bytes of the ranges that were.

    What is read whole for every token, as weights are, then needs one entry of the processor's address tables for 512.
    It takes 1.5 to 3 s for a gigabyte.  Raises UnsupportedError where the system cannot, DoesNotFitError where it
    finds no 2 MB in one piece.
    """
    madvise = getattr(ctypes.CDLL(None, use_errno=True), "madvise", None) if sys.platform == "linux" else None
    if madvise is None:
        raise UnsupportedError("huge pages on demand are a service of Linux: leave --huge-pages out")
    num_bytes, refusals = 0, set[int]()
    for start, end in _own_ranges(maps):
        if madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_COLLAPSE) == 0:
            num_bytes += end - start
        else:
            refusals.add(ctypes.get_errno())
    if num_bytes == 0 and errno.ENOMEM in refusals:
        raise DoesNotFitError("no 2 MB of memory lie in one piece: close other programs, or leave --huge-pages out")
    if num_bytes == 0:
        raise UnsupportedError("this system makes no huge pages on demand (Linux 6.1 does): leave --huge-pages out")
    return num_bytes


def _own_ranges(maps: Path) -> Iterator[tuple[int, int]]:
    """Writable memory without a file behind it, cut to whole huge pages."""
    for line in maps.read_text().splitlines():
        addresses, rights, *_, inode, name = (*line.split(maxsplit=5), "")[:6]
        if rights.startswith("rw") and inode == "0" and name.strip() in ("", "[heap]"):
            first, last = (int(address, 16) for address in addresses.split("-"))
            start, end = -(-first // HUGE) * HUGE, last // HUGE * HUGE
            if start < end:
                yield start, end
