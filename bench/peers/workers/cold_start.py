"""A process that does one thing: open a bundle and know the first token of a prompt of 64.

    python -m bench.peers.workers.cold_start '{"model": BUNDLE, "threads": 2, "token_ids": [...]}'

``"choices"`` are further arguments of ``open_bundle``.

Prints one JSON line.  With ``"watch_memory": true`` the peak of PSS is sampled, and the times mean little.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter_ns
from typing import Any

STARTED = perf_counter_ns()
STATUS = Path("/proc/self/status")
ROLLUP = Path("/proc/self/smaps_rollup")
PARTS = ("Pss", "Pss_Anon", "Pss_File", "Rss")


def main(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Milliseconds since Python began to run this file, and bytes."""
    import numpy as np

    import edgevlm
    from edgevlm.bench.memory import watch_peak

    imported_ms = _ms()
    choices: dict[str, Any] = arguments.get("choices", {})
    with ExitStack() as stack:
        peak = stack.enter_context(watch_peak()) if arguments.get("watch_memory") else None
        vlm = edgevlm.open_bundle(arguments["model"], threads=arguments["threads"], **choices)
        opened_ms = _ms()
        rows = vlm.session.embed(np.asarray([arguments["token_ids"]], np.int64))
        token = int(vlm.session.prefill(rows).argmax())
        first_token_ms, memory = _ms(), memory_parts()
    return {
        "imported_ms": imported_ms,
        "opened_ms": opened_ms,
        "first_token_ms": first_token_ms,
        "token": token,
        "precisions": vlm.info["precisions"],
        "memory": memory,
        "peak_pss_bytes": peak.peak_bytes if peak else None,
    }


def memory_parts() -> dict[str, int]:
    """What this process holds now, by kind, and the most that was ever resident (VmHWM, mapped files included)."""
    values = {**_values(ROLLUP, PARTS), **_values(STATUS, ("VmHWM",))}
    return {f"{name.lower()}_bytes": size for name, size in values.items()}


def _values(file: Path, names: tuple[str, ...]) -> dict[str, int]:
    try:
        lines = [line.split() for line in file.read_text(encoding="ascii").splitlines()]
    except OSError:  # a system without /proc
        return {}
    return {words[0][:-1]: int(words[1]) * 1024 for words in lines if words[0][:-1] in names}


def _ms() -> float:
    return (perf_counter_ns() - STARTED) / 1e6


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
