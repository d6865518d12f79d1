"""What a program asks of the system about memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from edgevlm.core.errors import UnsupportedError
from edgevlm.runtimes.heap import give_back, use_huge_pages

HUGE_AFTER = """
import re
from pathlib import Path
from edgevlm.core.errors import EdgeVLMError
from edgevlm.runtimes.heap import use_huge_pages

def huge_kilobytes():
    return int(re.search(r"AnonHugePages:\\s+(\\d+)", Path("/proc/self/smaps_rollup").read_text())[1])

held, before = bytearray(b"x") * (64 << 20), huge_kilobytes()
try:
    made = use_huge_pages()
except EdgeVLMError as error:
    print("cannot:", error)
else:
    print(made >> 20, (huge_kilobytes() - before) >> 10, held == bytearray(b"x") * (64 << 20))
"""


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


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages on demand are a service of Linux")
def test_what_a_process_holds_comes_to_lie_in_huge_pages_unchanged() -> None:
    told = subprocess.run([sys.executable, "-c", HUGE_AFTER], capture_output=True, text=True, check=True).stdout
    if told.startswith("cannot:"):
        pytest.skip(f"this machine {told.strip()}")
    made, more, same = told.split()
    assert int(made) >= 60
    assert int(more) >= 50
    assert same == "True"


def test_ranges_with_files_behind_them_are_left_alone(tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    maps.write_text("7f0000000000-7f0010000000 rw-s 00000000 08:01 42 /a model.onnx_data\n")
    with pytest.raises(UnsupportedError, match="leave --huge-pages out"):
        use_huge_pages(maps)


def test_other_systems_say_that_they_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(UnsupportedError, match="Linux"):
        use_huge_pages()
