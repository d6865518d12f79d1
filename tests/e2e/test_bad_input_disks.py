"""Disks that are full: one line, exit code 5, and what stood there before."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edgevlm.bench.record import read_measurement
from edgevlm.bundle.pack import pack
from edgevlm.cli.app import app

Refused = Callable[..., str]

SIZE, LEFT = 4 << 20, 32 << 10  # bytes of the disk, and how many of them a test may use
FULL = "no space left on the disk; free some or choose another folder"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own; skipped where this user may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "edgevlm-test", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path, left: int = LEFT) -> None:
    """Leave ``left`` bytes."""
    (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - left))


def test_an_export_to_a_full_disk_leaves_the_old_bundle(
    disk: Path, checkpoint: Path, tiny_bundle: Path, refused: Refused
) -> None:
    shutil.copytree(tiny_bundle, disk / "old")
    fill(disk)
    refused(5, FULL, "export", checkpoint, disk / "old", "--overwrite")


def test_too_small_a_disk_is_told_before_anything_is_unpacked(
    disk: Path, tmp_path: Path, tiny_bundle: Path, refused: Refused
) -> None:
    packed = pack(tiny_bundle, tmp_path / "packed.tar")
    fill(disk)
    refused(5, ("the bundle needs", "the disk has 32,768 left"), "bundle", "unpack", packed, disk / "new")


def test_a_disk_that_fills_while_unpacking_leaves_the_old_bundle(
    disk: Path, tmp_path: Path, tiny_bundle: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = pack(tiny_bundle, tmp_path / "packed.tar")
    shutil.copytree(tiny_bundle, disk / "old")
    fill(disk)
    monkeypatch.setattr("edgevlm.bundle.pack._check_room", lambda *_: None)  # somebody else fills it meanwhile
    refused(5, FULL, "bundle", "unpack", packed, disk / "old", "--overwrite")


def test_packing_to_a_full_disk_leaves_nothing(disk: Path, tiny_bundle: Path, refused: Refused) -> None:
    fill(disk)
    refused(5, FULL, "bundle", "pack", tiny_bundle, disk / "new.tar")


def test_a_report_on_a_full_disk_leaves_the_old_one(disk: Path, run_file: Path, refused: Refused) -> None:
    (disk / "report.html").write_text("the old one")
    fill(disk, left=0)
    refused(5, FULL, "report", run_file, "-o", disk / "report.html")


def test_a_run_that_cannot_be_saved_is_still_shown(
    disk: Path, tiny_bundle: Path, run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgevlm.bench.measuring.measure", lambda *_, **__: read_measurement(run_file))
    (disk / "run.jsonl").write_text("the old one")
    fill(disk, left=0)
    result = CliRunner().invoke(
        app, ["bench", str(tiny_bundle), "--save", str(disk / "run.jsonl"), "--overwrite", "-q"]
    )
    assert (result.exit_code, result.stderr) == (5, f"error: {disk / 'run.jsonl'}: {FULL}\n")
    assert "2 repetitions" in result.stdout
    assert (disk / "run.jsonl").read_text() == "the old one"
    assert len(list(disk.iterdir())) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on the size of a file here")
def test_a_file_larger_than_allowed_is_told(tmp_path: Path, run_file: Path, refused: Refused) -> None:
    """What FAT does above 4 GiB; it needs no right to mount, so it stands in for a full disk as well."""
    import resource

    (tmp_path / "report.html").write_text("the old one")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        refused(5, "larger than a file may be", "report", run_file, "-o", tmp_path / "report.html")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.skipif(os.name != "posix", reason="no file modes here")
def test_what_an_export_writes_may_be_read_by_whoever_may_read_the_folder(tiny_bundle: Path) -> None:
    files = [path for path in tiny_bundle.rglob("*") if path.is_file()]
    usual = (tiny_bundle / "edgevlm.json").stat().st_mode
    assert {path.name for path in files if path.stat().st_mode != usual} == set()
