"""Open a bundle, or refuse it: nothing is loaded from a folder that fails a check."""

from __future__ import annotations

import logging
import os
import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from edgevlm.bundle.hash_cache import HashCache
from edgevlm.bundle.manifest import Manifest, parse_manifest
from edgevlm.bundle.paths import (
    GOLDEN_FOLDER,
    MANIFEST_FILE,
    META_FILE,
    RECIPE_FILE,
    SUMS_FILE,
    TENSORS_FILE,
    check_name,
    inside,
    plain_files,
    same_file_key,
)
from edgevlm.core.config import read_json, read_text
from edgevlm.core.errors import InputError, IntegrityError, translate_disk_errors

logger = logging.getLogger(__name__)

MAX_TEXT_BYTES = 16 << 20
READ_BY_NAME = (  # beside the manifest's own files: where one stands, SHA256SUMS must cover it
    *("config.json", "generation_config.json", "preprocessor_config.json", "verify.json"),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json"),
    *(RECIPE_FILE, META_FILE, TENSORS_FILE, f"{GOLDEN_FOLDER}/[!.]*.png"),
)


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder and what its manifest says."""

    root: Path
    manifest: Manifest

    def path(self, relative: str) -> Path:
        """A file of the bundle.  Raises IntegrityError when ``relative`` leaves the folder."""
        return inside(self.root, relative)


def read_bundle(path: Path | str, *, check: bool = True) -> Bundle:
    """The bundle in the folder ``path``, checked.

    Schema, missing parts, lengths, links and names that leave the folder are always checked.  ``check``
    compares every file with ``SHA256SUMS`` as well: in full the first time, later by size and time
    (see ``hash_cache``).

    Raises InputError when there is no bundle at ``path`` or none that may be read, IntegrityError when there is
    one not to be trusted.
    """
    with translate_disk_errors(str(path), reading=True):
        root = _folder(Path(path))
        present = dict(plain_files(root))
        manifest = parse_manifest(_small_json(root / MANIFEST_FILE), where=str(root / MANIFEST_FILE))
        _check_parts(root, manifest, present)
        sums = read_sums(root)
        _check_coverage(root, manifest, present, sums)
        if check:
            _check_hashes(root, sums)
    return Bundle(root, manifest)


def read_sums(root: Path) -> dict[str, str]:
    """``SHA256SUMS`` as name -> hash.

    Raises IntegrityError when it is missing, malformed or lists unsafe names.
    """
    file = root / SUMS_FILE
    if not file.is_file():
        raise IntegrityError(
            f"{root}: {SUMS_FILE} is missing, so nothing in the bundle can be checked: export it again"
        )
    sums: dict[str, str] = {}
    for number, line in enumerate(_small_text(file).splitlines(), start=1):
        match = re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line)
        if not match:
            raise IntegrityError(f"{file}: line {number} is not '<sha256>  <file>'")
        if check_name(match[2]) in sums:
            raise IntegrityError(f"{file}: {match[2]} is listed twice")
        sums[match[2]] = match[1]
    return sums


def _folder(path: Path) -> Path:
    """The real folder of the bundle, or an error that says what stands there instead."""
    if not os.path.lexists(path):
        raise InputError(f"no bundle at {path}: give the folder that `edgevlm export` wrote")
    if path.is_file():
        if tarfile.is_tarfile(path):
            raise InputError(f"{path} is a packed bundle: run `edgevlm bundle unpack {path} FOLDER` first")
        raise InputError(f"{path} is a file, not a bundle: give the folder that `edgevlm export` wrote")
    if not path.is_dir():
        raise InputError(f"{path} is not a folder (a link that leads nowhere?)")
    if (path / MANIFEST_FILE).is_file():
        return Path(os.path.realpath(path))
    if (path / SUMS_FILE).is_file():
        raise IntegrityError(f"{path}: {MANIFEST_FILE} is missing: copy or export the bundle again")
    if (path / "config.json").is_file():
        raise InputError(f"{path} looks like a checkpoint, not a bundle: run `edgevlm export {path} OUT` first")
    raise InputError(f"{path} is not a bundle: it holds no {MANIFEST_FILE}")


def _check_parts(root: Path, manifest: Manifest, present: dict[str, Path]) -> None:
    for name in manifest.files():
        if name not in present:
            raise IntegrityError(f"{root}: {name} is missing: copy or export the bundle again")
        expected, found = manifest.file_bytes.get(name), present[name].stat().st_size
        if expected is not None and found != expected:
            raise IntegrityError(f"{root}: {name} has {found:,} bytes, expected {expected:,}: copy it again")


def _check_coverage(root: Path, manifest: Manifest, present: dict[str, Path], sums: dict[str, str]) -> None:
    """Every file that any room reads must have its hash, and every hash its file."""
    for name in (MANIFEST_FILE, *manifest.files(), *filter(_is_read_by_name, present)):
        if name not in sums:
            raise IntegrityError(f"{root}: {name} is not listed in {SUMS_FILE}, so it cannot be checked")
    for name in sums:
        if name not in present:
            raise IntegrityError(
                f"{root}: {name} is listed in {SUMS_FILE} but missing: copy or export the bundle again"
            )
    if len({same_file_key(name) for name in sums}) != len(sums):
        raise IntegrityError(f"{root}: {SUMS_FILE} lists names that differ in upper and lower case only")


def _is_read_by_name(name: str) -> bool:
    """In any spelling that some file system takes for one of the names; other strays are nobody's affair."""
    return any(fnmatchcase(same_file_key(name), pattern) for pattern in READ_BY_NAME)


def _check_hashes(root: Path, sums: dict[str, str]) -> None:
    cache = HashCache.of_user()
    try:
        for name, expected in sums.items():
            logger.debug("checking %s", name)
            if cache.sha256(inside(root, name)) != expected:
                raise IntegrityError(f"{root}: {name} was changed or damaged (its SHA-256 differs): copy it again")
    finally:
        cache.save()


def _small_json(file: Path) -> dict[str, object]:
    _check_small(file)
    with _damaged():
        return read_json(file)


def _small_text(file: Path) -> str:
    _check_small(file)
    with _damaged():
        return read_text(file)


@contextmanager
def _damaged() -> Iterator[None]:
    """Wrong content is a damaged bundle; a file that this user may not read is not."""
    try:
        yield
    except InputError as error:
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from None
        raise IntegrityError(str(error)) from error


def _check_small(file: Path) -> None:
    if file.stat().st_size > MAX_TEXT_BYTES:
        raise IntegrityError(f"{file}: {file.stat().st_size:,} bytes is no manifest (at most {MAX_TEXT_BYTES:,})")
