"""Outputs appear whole or not at all; and where small things are remembered."""

from __future__ import annotations

import errno
import glob
import os
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edgevlm.core.errors import UsageError, translate_disk_errors

LOCK_WAIT_S = 10.0  # a swap takes milliseconds; who holds a folder for longer, as flock(1) may, is not swapping
CANNOT_SYNC = (
    errno.EINVAL,
    errno.ENOTSUP,
    errno.EBADF,
    errno.EACCES,
    errno.EPERM,
)  # the file system cannot, not will not


@contextmanager
def atomic_directory(path: Path, *, overwrite: bool = False, marker: str | None = None) -> Iterator[Path]:
    """Yield an empty sibling folder that becomes ``path`` when the block ends well.

    Whatever stood at ``path`` stays until then, and stays for good when the block fails.  An empty folder may
    be replaced at any time; with ``marker`` a folder is only overwritten when it holds a file of that name: a
    slip of the keyboard cannot delete anything else.  A link is followed: what it points to is replaced.
    Siblings that a killed process left behind are removed.

    Raises UsageError when ``path`` exists and ``overwrite`` is false or forbidden, DoesNotFitError on a full
    disk.
    """
    path = Path(os.path.realpath(path))
    with translate_disk_errors(str(path)):
        _refuse_to_replace(path, overwrite, marker)
        _make_folder(path.parent)
        _check_name(path)
        with _alone_in(path.parent):
            _sweep(path)
            scratch = _sibling(path, f".{secrets.token_hex(4)}.partial")
            scratch.mkdir()
            handle = _hold(scratch)
        try:
            yield scratch
            _sync_tree(scratch)
            with _alone_in(path.parent):
                _refuse_to_replace(path, overwrite, marker)  # someone else may have been faster
                _swap(scratch, path)
            _sync(path.parent)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            if handle is not None:
                os.close(handle)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a sibling file name that replaces ``path`` when the block ends well.

    The sibling is an empty file with the same ending.  In the end it has the permissions of the file that it
    replaces, or a new file's usual ones, whatever wrote it.  A link is followed.

    Raises UsageError when ``path`` is a folder or a device, DoesNotFitError on a full disk.
    """
    path = Path(os.path.realpath(path))
    with translate_disk_errors(str(path)):
        if path.exists() and not path.is_file():
            raise UsageError(f"{path} is {'a folder' if path.is_dir() else 'not a plain file'}: choose another name")
        _make_folder(path.parent)
        _check_name(path)
        scratch = _sibling(path, f".{secrets.token_hex(4)}.partial{path.suffix[:20]}")
        try:
            scratch.touch(exist_ok=False)
            usual = scratch.stat().st_mode
            yield scratch
            scratch.chmod(stat.S_IMODE(path.stat().st_mode if path.exists() else usual))
            _sync(scratch)
            scratch.replace(path)
            _sync(path.parent)
        finally:
            scratch.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` at once, as UTF-8 with ``\\n`` line ends on every system."""
    with atomic_file(path) as scratch:
        scratch.write_bytes(text.encode("utf-8"))


def cache_folder() -> Path:
    """Where this user's caches live: ``EDGEVLM_CACHE``, or the platform's usual place.  It need not exist."""
    if chosen := os.environ.get("EDGEVLM_CACHE"):
        return Path(chosen).absolute()
    if sys.platform == "darwin":
        base = Path(os.path.expanduser("~/Library/Caches"))
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or os.path.expanduser("~/AppData/Local"))
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME", ""))
        if not base.is_absolute():  # the XDG specification asks to ignore a relative one
            base = Path(os.path.expanduser("~/.cache"))
    return base / "edgevlm"


def _refuse_to_replace(path: Path, overwrite: bool, marker: str | None) -> None:
    if not os.path.lexists(path) or (path.is_dir() and not any(path.iterdir())):
        return
    if not overwrite:
        raise UsageError(f"{path} exists already: choose another name or pass --overwrite (in Python, overwrite=True)")
    here, home = Path(os.path.realpath(os.curdir)), Path(os.path.realpath(os.path.expanduser("~")))
    if path in (here, *here.parents, home, *home.parents):
        raise UsageError(f"{path} holds the current or the home folder and is never replaced: choose another name")
    if marker and not (path / marker).is_file():
        raise UsageError(f"{path} holds no {marker}, so it is not replaced: choose another name or remove it yourself")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(f"{folder} cannot be a folder, because part of it is a file: choose another name") from error


def _check_name(path: Path) -> None:
    """Fail now where renaming to ``path`` would fail in the end: the name may be too long for this disk."""
    with suppress(FileNotFoundError):
        os.lstat(path)


def _sibling(path: Path, ending: str) -> Path:
    """A hidden name beside ``path``; long names are cut, since file systems allow 255 bytes."""
    return path.with_name(f".{path.name[:40]}{ending}")


def _swap(scratch: Path, path: Path) -> None:
    """Put ``scratch`` at ``path``; a folder cannot be renamed over a full one, so the old one steps aside."""
    if not path.exists():
        scratch.rename(path)
        return
    old = scratch.with_suffix(".old")
    try:
        path.rename(old)
        scratch.rename(path)
    finally:
        if not os.path.lexists(path):
            old.rename(path)  # it failed or was interrupted in between
        elif old.is_dir():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.unlink(missing_ok=True)


def _sweep(path: Path) -> None:
    """Remove unfinished folders for ``path`` whose process has ended; where folders cannot be locked, none."""
    for left in path.parent.glob(f"{glob.escape(_sibling(path, '').name)}.????????.partial"):
        handle = _hold(left) if left.is_dir() and not left.is_symlink() else None
        if handle is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(handle)


def _hold(folder: Path) -> int | None:
    """An open handle that keeps ``folder`` locked as long as this process lives; None where another one has it."""
    if sys.platform == "win32":
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        held = _try_lock(handle)
    except OSError:  # some network file systems do not lock folders
        held = False
    if held:
        return handle
    os.close(handle)
    return None


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Let no other process look and swap in ``folder`` meanwhile, where the system has such locks."""
    if sys.platform == "win32":
        yield
        return
    handle, deadline = os.open(folder, os.O_RDONLY), time.monotonic() + LOCK_WAIT_S
    try:
        with suppress(OSError):  # some network file systems do not lock folders
            while not _try_lock(handle) and time.monotonic() < deadline:
                time.sleep(0.02)
        yield
    finally:
        os.close(handle)


def _try_lock(handle: int) -> bool:
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _sync_tree(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            _sync(Path(parent, name))
        _sync(Path(parent))


def _sync(path: Path) -> None:
    """Ask the disk to keep ``path`` before a rename makes it visible: a device may lose power at any time."""
    if os.name != "posix" or path.is_symlink() or not (path.is_file() or path.is_dir()):
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in CANNOT_SYNC:
            raise
    finally:
        os.close(handle)
