"""How much memory this process holds, and which counter says so."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROLLUP = Path("/proc/self/smaps_rollup")
INTERVAL_S = 0.01


@dataclass
class Peak:
    """The highest of ``num_samples`` readings of the counter ``kind``.

    ``system_bytes``: by how much the memory that is available on this machine fell at most, whoever took it.
    """

    kind: str = "RSS"
    peak_bytes: int = 0
    num_samples: int = 0
    system_bytes: int = 0
    _available_bytes: int = field(default_factory=lambda: int(psutil.virtual_memory().available), repr=False)
    _stop: threading.Event = field(default_factory=threading.Event, repr=False)

    def sample(self) -> None:
        """Read the counter once."""
        self.kind, now = memory_now()
        self.peak_bytes = max(self.peak_bytes, now)
        self.system_bytes = max(self.system_bytes, self._available_bytes - int(psutil.virtual_memory().available))
        self.num_samples += 1

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            self.sample()


def memory_now(rollup: Path = ROLLUP) -> tuple[str, int]:
    """The name of the counter and its value in bytes: PSS where Linux offers it, else RSS.

    PSS counts a page that n processes share as one n-th, so the sizes of several processes add up.
    """
    pss = _pss(rollup)
    return ("PSS", pss) if pss is not None else ("RSS", int(psutil.Process().memory_info().rss))


@contextmanager
def watch_peak() -> Iterator[Peak]:
    """Sample memory from a thread while the block runs; do not time the block."""
    peak = Peak()
    peak.sample()
    watcher = threading.Thread(target=peak._run, name="edgevlm-memory", daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        peak._stop.set()
        watcher.join()
        peak.sample()


def _pss(rollup: Path) -> int | None:
    try:
        lines = rollup.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    except (OSError, ValueError, IndexError, StopIteration):
        return None
