"""A bundle as one file, and back.  The file is a plain tar, byte for byte the same for the same bundle."""

from __future__ import annotations

import os
import shutil
import tarfile
from pathlib import Path, PurePosixPath
from typing import IO

from edgevlm.bundle.paths import MANIFEST_FILE, SUMS_FILE, check_name, same_file_key
from edgevlm.bundle.read import Bundle, read_bundle, read_sums
from edgevlm.core.errors import DoesNotFitError, InputError, IntegrityError, UsageError
from edgevlm.core.files import atomic_directory, atomic_file

MAX_MEMBERS = 10_000
CHUNK_BYTES = 1 << 20


def pack(bundle_dir: Path | str, file: Path | str, *, overwrite: bool = False) -> Path:
    """Write the checked bundle in ``bundle_dir`` to ``file`` and return its path.

    Only files that ``SHA256SUMS`` lists travel; what else lies in the folder stays there.
    Raises what ``read_bundle`` raises; UsageError when ``file`` exists and ``overwrite`` is false, or lies
    inside the bundle.
    """
    bundle, file = read_bundle(bundle_dir), Path(file)
    if file.exists() and not overwrite:
        raise UsageError(f"{file} exists already: choose another name or pass --overwrite")
    if bundle.root in file.resolve().parents:
        raise UsageError(f"{file} lies inside the bundle: choose another folder")
    with atomic_file(file) as scratch, tarfile.open(scratch, "w", format=tarfile.PAX_FORMAT) as archive:
        for name in sorted({*read_sums(bundle.root), SUMS_FILE}, key=lambda name: (name != MANIFEST_FILE, name)):
            path = bundle.path(name)
            with path.open("rb") as stream:
                archive.addfile(_member(name, path), stream)
    return file


def unpack(file: Path | str, folder: Path | str, *, overwrite: bool = False) -> Bundle:
    """Write the bundle in ``file`` to ``folder``, check every hash, and return it opened.

    Raises InputError when ``file`` is no packed bundle, IntegrityError when it holds links, devices, names
    that leave the folder or stand twice, sizes beyond the file, or a damaged bundle; DoesNotFitError when the
    disk is too small.  Nothing is left behind then.
    """
    file, folder = Path(file), Path(folder)
    with _opened(file) as stream, atomic_directory(folder, overwrite=overwrite, marker=MANIFEST_FILE) as scratch:
        _extract(file, stream, scratch)
        if not (scratch / MANIFEST_FILE).is_file():
            raise InputError(f"{file} is not a packed bundle: it holds no {MANIFEST_FILE}")
        manifest = _checked(file, scratch).manifest
    return Bundle(Path(os.path.realpath(folder)), manifest)


def _opened(file: Path) -> IO[bytes]:
    try:
        return file.open("rb")
    except OSError as error:
        raise InputError(
            f"cannot read {file} ({error.strerror}): give the file that `edgevlm bundle pack` wrote"
        ) from error


def _checked(file: Path, scratch: Path) -> Bundle:
    """The bundle in ``scratch``; what is wrong with it is told of ``file``, since ``scratch`` will be gone."""
    try:
        return read_bundle(scratch)
    except IntegrityError as error:
        raise IntegrityError(str(error).replace(str(scratch), str(file))) from error


def _member(name: str, path: Path) -> tarfile.TarInfo:
    """A header without time, owner and permissions, so the same bundle always gives the same file."""
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.mtime = path.stat().st_size, 0o644, 0
    return member


def _extract(file: Path, stream: IO[bytes], scratch: Path) -> None:
    try:
        with tarfile.open(fileobj=stream, mode="r:") as archive:
            members = _checked_members(file, archive)
            _check_room(scratch, sum(member.size for member in members.values()))
            for name, member in members.items():
                _write_member(archive, member, scratch / name)
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise InputError(f"{file} is not a packed bundle, or is cut short: {error}") from error


def _checked_members(file: Path, archive: tarfile.TarFile) -> dict[str, tarfile.TarInfo]:
    """Every file in the archive by its safe name; what is wrong is found before a byte is written."""
    left = file.stat().st_size
    members: dict[str, tarfile.TarInfo] = {}
    seen: set[str] = set()
    for member in archive:
        if member.isdir():
            continue
        _check_kind(file, member)
        left -= member.size
        if member.size < 0 or left < 0:
            raise IntegrityError(f"{file}: {member.name!r} claims {member.size:,} bytes, more than the whole file")
        name = check_name(member.name.removeprefix("./"))
        if (key := same_file_key(name)) in seen:
            raise IntegrityError(f"{file}: {name!r} stands there twice")
        seen.add(key)
        members[name] = member
        if len(members) > MAX_MEMBERS:
            raise IntegrityError(f"{file}: more than {MAX_MEMBERS:,} files")
    for name in members:
        if any(same_file_key(folder.as_posix()) in seen for folder in PurePosixPath(name).parents):
            raise IntegrityError(f"{file}: {name!r} lies below a name that is a file")
    return members


def _check_kind(file: Path, member: tarfile.TarInfo) -> None:
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
        raise IntegrityError(f"{file}: {member.name!r} is a link or a special file; a bundle holds plain files only")


def _check_room(scratch: Path, needed: int) -> None:
    free = shutil.disk_usage(scratch).free
    if needed > free:
        raise DoesNotFitError(f"{scratch.parent}: the bundle needs {needed:,} bytes, the disk has {free:,} left")


def _write_member(archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    source = archive.extractfile(member)
    if source is None:
        raise tarfile.ReadError(f"{member.name} cannot be read")
    with source, path.open("xb") as target:
        shutil.copyfileobj(source, target, CHUNK_BYTES)
    if path.stat().st_size != member.size:
        raise tarfile.ReadError(f"{member.name} ends early")
