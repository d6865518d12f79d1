"""New processes that open a bundle and know one token: how long it takes, and what memory it takes."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter_ns
from typing import Any

from bench.peers.artifacts import BUNDLE, COLD_START_TOKENS
from bench.peers.bundles import accounted_bytes, choices_of, read_manifest
from bench.peers.environments import OWN, ROOT, environment_variables, python_of
from bench.peers.rounds import Plan, Say, prompt_ids

FIGURES = ("started_to_ended_ms", "imported_ms", "opened_ms", "first_token_ms")
REPETITIONS = 6  # of each: the fewest that give an interval


@dataclass
class ColdStarts:
    """One value per process of every figure, with the files in the page cache and without, and one for memory."""

    warm: dict[str, list[float]] = field(default_factory=dict)
    from_disk: dict[str, list[float]] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    left_out: str = ""


def run_cold_starts(folder: Path, plan: Plan, precision: str, say: Say) -> ColdStarts:
    """By turns from the page cache and from the disk; the first start, which checks every hash, is not counted."""
    bundle, found = folder / "weights" / BUNDLE, ColdStarts()
    if not bundle.exists():
        found.left_out = f"no {bundle}: compare.py weights"
        return found
    try:
        manifest = read_manifest(bundle)
        arguments = {
            "model": str(bundle),
            "threads": plan.threads,
            "token_ids": prompt_ids(0, COLD_START_TOKENS),
            "choices": choices_of({"decoder_precision": precision}, manifest),
        }
        start(folder, arguments)
        for number in range(REPETITIONS):
            say(f"cold start {number + 1} of {REPETITIONS}")
            _add(found.warm, start(folder, arguments))
            _forget_pages(bundle)
            _add(found.from_disk, start(folder, arguments))
        watched = start(folder, {**arguments, "watch_memory": True})
        found.memory = {**watched["memory"], "peak_pss_bytes": watched["peak_pss_bytes"]}
        found.memory |= accounted_bytes(manifest, watched["precisions"])
    except SystemExit as error:
        found.left_out = str(error)
    except subprocess.CalledProcessError as error:
        found.left_out = " ".join(str(error.stderr)[-600:].split())
    return found


def start(folder: Path, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """One process, from its start to its end."""
    command = [str(python_of(OWN, folder)), "-m", "bench.peers.workers.cold_start", json.dumps(arguments)]
    started = perf_counter_ns()
    ran = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment_variables(folder)
    )
    answer: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return {**answer, "started_to_ended_ms": (perf_counter_ns() - started) / 1e6}


def _add(figures: dict[str, list[float]], answer: Mapping[str, Any]) -> None:
    for name in FIGURES:
        figures.setdefault(name, []).append(float(answer[name]))


def _forget_pages(folder: Path) -> None:
    """Ask the system to drop the files of ``folder`` from memory, as after a reboot."""
    for file in _files(folder):
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def _files(folder: Path) -> Iterator[Path]:
    found: Sequence[Path] = sorted(path for path in folder.rglob("*") if path.is_file())
    yield from found
