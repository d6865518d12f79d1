from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from edgevlm.core import files
from edgevlm.core.errors import DoesNotFitError, UsageError
from edgevlm.core.files import atomic_directory, atomic_file, cache_folder, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def half_write(path: Path, failure: type[BaseException]) -> None:
    with atomic_directory(path, overwrite=True) as scratch:
        (scratch / "deep").mkdir()
        (scratch / "deep/x").write_text("1")
        raise failure


def test_a_folder_appears_whole_when_the_block_ends(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "a/b/out") as scratch:
        (scratch / "x").write_text("1")
        assert not (tmp_path / "a/b/out").exists()
        assert scratch.name.endswith(".partial")
    assert names(tmp_path / "a/b") == ["out"]
    assert (tmp_path / "a/b/out/x").read_text() == "1"


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit, MemoryError])
def test_nothing_is_left_when_the_block_fails(tmp_path: Path, failure: type[BaseException]) -> None:
    with pytest.raises(failure):
        half_write(tmp_path / "out", failure)
    assert names(tmp_path) == []


def test_what_stood_there_stays_when_the_block_fails(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old").write_text("1")
    with pytest.raises(ValueError):
        half_write(tmp_path / "out", ValueError)
    assert names(tmp_path / "out") == ["old"]


def test_what_stood_there_is_replaced_only_when_asked(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old").write_text("1")
    with pytest.raises(UsageError, match=r"exists already.*--overwrite"), atomic_directory(tmp_path / "out"):
        pass
    with atomic_directory(tmp_path / "out", overwrite=True) as scratch:
        (scratch / "new").write_text("2")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["new"]


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with atomic_directory(tmp_path / "out") as scratch:
        (scratch / "new").write_text("2")
    assert names(tmp_path / "out") == ["new"]


def test_overwrite_never_deletes_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/1.jpg").write_text("dear")
    with (
        pytest.raises(UsageError, match=r"holds no edgevlm\.json"),
        atomic_directory(tmp_path / "photos", overwrite=True, marker="edgevlm.json"),
    ):
        pass
    assert names(tmp_path / "photos") == ["1.jpg"]


@pytest.mark.parametrize("place", [".", "..", "/", "~"])
def test_overwrite_never_deletes_where_the_user_stands_or_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (tmp_path / "home/work").mkdir(parents=True)
    (tmp_path / "home/work/x").write_text("1")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "home/work")
    with (
        pytest.raises(UsageError, match="never replaced"),
        atomic_directory(Path(place).expanduser(), overwrite=True),
    ):
        pass
    assert (tmp_path / "home/work/x").exists()


def test_a_folder_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    ours = atomic_directory(tmp_path / "out")
    ours.__enter__()
    write_text(tmp_path / "out/theirs", "2")
    with pytest.raises(UsageError, match="exists already"):
        ours.__exit__(None, None, None)
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["theirs"]


def test_a_link_is_followed_and_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    (tmp_path / "big/old").write_text("1")
    (tmp_path / "out").symlink_to(tmp_path / "big")
    with atomic_directory(tmp_path / "out", overwrite=True) as scratch:
        (scratch / "new").write_text("2")
    assert (tmp_path / "out").is_symlink()
    assert names(tmp_path / "big") == ["new"]


def test_a_link_that_leads_nowhere_gets_its_target(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "later")
    with atomic_directory(tmp_path / "out") as scratch:
        (scratch / "new").write_text("2")
    assert names(tmp_path / "later") == ["new"]


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, text: str, **_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with (
        pytest.raises(DoesNotFitError, match="out: no space left"),
        atomic_directory(tmp_path / "out") as scratch,
    ):
        (scratch / "x").write_text("1")
    assert names(tmp_path) == []


def test_a_disk_that_is_found_full_when_flushing_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DoesNotFitError):
        write_text(tmp_path / "a.txt", "1")
    with pytest.raises(DoesNotFitError), atomic_directory(tmp_path / "out") as scratch:
        (scratch / "x").write_bytes(b"1")
    assert names(tmp_path) == []


def test_a_file_system_that_cannot_flush_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(handle: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", cannot)
    write_text(tmp_path / "a.txt", "1")
    assert (tmp_path / "a.txt").read_text() == "1"


def test_the_old_folder_comes_back_when_the_last_rename_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old").write_text("1")
    rename = Path.rename

    def fails_for_scratch(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_for_scratch)
    with pytest.raises(KeyboardInterrupt), atomic_directory(tmp_path / "out", overwrite=True):
        pass
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["old"]


def test_a_killed_process_leaves_only_a_hidden_partial_sibling(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path; from edgevlm.core.files import atomic_directory\n"
        "with atomic_directory(Path(sys.argv[1])) as scratch:\n"
        "    (scratch / 'x').write_text('1'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "out")], check=False)
    [left] = names(tmp_path)
    assert left.startswith(".out.")
    assert left.endswith(".partial")


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a.txt", "1")
        with atomic_directory(tmp_path / "out"):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750


def test_a_replaced_file_keeps_its_permissions(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("secret")
    (tmp_path / "a.txt").chmod(0o600)
    write_text(tmp_path / "a.txt", "new")
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o600
    assert (tmp_path / "a.txt").read_text() == "new"


def test_a_file_is_replaced_only_when_the_block_ends_well(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("old")
    writing = atomic_file(tmp_path / "a.png")
    scratch = writing.__enter__()
    assert scratch.suffix == ".png"
    scratch.write_text("half")
    assert not writing.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)  # the interrupt goes on
    assert names(tmp_path) == ["a.png"]
    assert (tmp_path / "a.png").read_text() == "old"


def test_a_file_behind_a_link_is_replaced_and_the_link_stays(tmp_path: Path) -> None:
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "a.txt").symlink_to("real.txt")
    write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new"


@pytest.mark.parametrize(("place", "words"), [("folder", "is a folder"), ("pipe", "is not a plain file")])
def test_a_folder_or_a_device_is_never_replaced_by_a_file(tmp_path: Path, place: str, words: str) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match=words):
        write_text(tmp_path / place, "x")
    assert names(tmp_path) == ["folder", "pipe"]


def test_a_parent_that_is_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for write in (
        lambda: write_text(tmp_path / "file/a.txt", "1"),
        lambda: write_text(tmp_path / "file/b/a", "1"),
    ):
        with pytest.raises(UsageError, match="part of it is a file"):
            write()


def test_long_names_leave_room_for_the_sibling(tmp_path: Path) -> None:
    write_text(tmp_path / ("a" * 250 + ".txt"), "1")
    with pytest.raises(UsageError, match="too long"):
        write_text(tmp_path / ("a" * 300), "1")


def test_the_cache_folder_follows_the_platform(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGEVLM_CACHE", str(tmp_path / "here"))
    assert cache_folder() == tmp_path / "here"
    monkeypatch.delenv("EDGEVLM_CACHE")
    monkeypatch.setattr(files.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg/edgevlm"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache/edgevlm"
    monkeypatch.setattr(files.sys, "platform", "darwin")
    assert cache_folder() == tmp_path / "Library/Caches/edgevlm"


def test_the_next_output_removes_what_a_killed_process_left(tmp_path: Path) -> None:
    left, others = tmp_path / ".out.0123abcd.partial", tmp_path / ".output.0123abcd.partial"
    for folder in (left, others):
        folder.mkdir()
        (folder / "half").write_text("x")
    with atomic_directory(tmp_path / "out"):
        assert not left.exists()
    assert others.exists()


def two_at_once(path: Path) -> None:
    with atomic_directory(path) as first, atomic_directory(path) as second:
        (second / "whole").write_text("x")
        assert first.exists()


def test_an_output_that_is_being_written_is_not_removed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exists already"):
        two_at_once(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
