"""Freed memory goes back to the system."""

from __future__ import annotations

import sys

import psutil
import pytest

from edgevlm.runtimes.heap import give_back


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc gives memory back on demand")
def test_what_was_freed_no_longer_counts_for_this_process() -> None:
    pieces = [bytes(4000) for _ in range(25_000)]  # 100 MB in pieces that the heap keeps
    last = bytes(4000)
    del pieces
    before = psutil.Process().memory_info().rss
    give_back()
    after = psutil.Process().memory_info().rss
    assert before - after > 50e6
    assert len(last) == 4000


def test_where_the_c_library_cannot_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    give_back()
