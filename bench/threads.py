"""Does a second thread pay?  Measure the shipped bundle with one thread and with two, and compare.

    python bench/threads.py [FOLDER]

Writes two runs (JSON Lines) and one report to FOLDER, `runs/threads` by default.
"""

from __future__ import annotations

import sys
from pathlib import Path

import edgevlm
from edgevlm.bench.comparing import compare
from edgevlm.bench.measurement import Measurement
from edgevlm.bench.record import write_measurement
from edgevlm.bench.report import write_report


def main(folder: Path) -> None:
    """Two runs, one comparison, one report."""
    one, two = (measure_with(threads, folder) for threads in (1, 2))
    print(compare(one, two, names=("1 thread", "2 threads")))
    report = folder / "threads.html"
    write_report(report, {"1 thread": one, "2 threads": two})
    print(f"\n{report}")


def measure_with(threads: int, folder: Path) -> Measurement:
    """One run, kept as it was measured."""
    with edgevlm.open_bundle("nano", runtime="onnxruntime", threads=threads) as vlm:
        measurement = edgevlm.measure(vlm)
    write_measurement(folder / f"{threads}-threads.jsonl", measurement)
    return measurement


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/threads"))
