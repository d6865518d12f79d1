"""Names of files inside a bundle: relative, plain, and the same file on every system."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from edgevlm.core.errors import IntegrityError

MANIFEST_FILE = "edgevlm.json"
SUMS_FILE = "SHA256SUMS"
GOLDEN_FOLDER = "golden"
TENSORS_FILE = f"{GOLDEN_FOLDER}/golden.safetensors"
META_FILE = f"{GOLDEN_FOLDER}/golden.json"
RECIPE_FILE = "tensorrt/build.json"
ENGINES_FOLDER = "tensorrt/engines"  # built on the device, for it alone: no file of the bundle's own
MAX_NAME_BYTES = 240
LITTER = (".DS_Store", "Thumbs.db", "desktop.ini")


def check_name(name: str) -> str:
    """``name`` itself, when it is a plain relative path with forward slashes.

    Raises IntegrityError for anything that could reach outside the folder on any system: absolute paths,
    ``..``, backslashes, drive letters and streams (``C:``), control characters.
    """
    if not name or len(name.encode("utf-8", "surrogatepass")) > MAX_NAME_BYTES:
        raise IntegrityError(f"a file name in the bundle is empty or too long: {name[:60]!r}")
    if any(character in name for character in "\\:") or any(ord(character) < 32 for character in name):
        raise IntegrityError(f"{name!r} is not a plain file name: no backslash, colon or control character")
    if any(part in ("", ".", "..") or part != part.strip() or part.endswith(".") for part in name.split("/")):
        raise IntegrityError(f"{name!r} may leave the bundle's folder: expected a relative path such as onnx/a.onnx")
    return name


def same_file_key(name: str) -> str:
    """Equal for names that a file system which ignores case or Unicode form would take for one file."""
    return unicodedata.normalize("NFC", name).casefold()


def inside(root: Path, name: str) -> Path:
    """The file ``name`` below ``root``.

    Raises IntegrityError when it leaves the folder or passes through a link.
    """
    path = root / PurePosixPath(check_name(name))
    for step in (path, *path.parents):
        if step == root:
            break
        if step.is_symlink():
            raise IntegrityError(f"{step} is a link; a bundle holds plain files only (copy it with `cp -rL`)")
    return path


def is_litter(name: str) -> bool:
    """Whether a file manager or a file system left the file ``name`` there: it belongs to no bundle."""
    last = PurePosixPath(name).name
    return last.startswith("._") or last in LITTER


def plain_files(root: Path) -> Iterator[tuple[str, Path]]:
    """Every file below ``root`` as (name, path), sorted by name; engines, which ``edgevlm build`` keeps there, apart.

    Raises IntegrityError for a link or anything else that is neither file nor folder.
    """
    for path in sorted(root.rglob("*"), key=lambda path: path.relative_to(root).as_posix()):
        if path.relative_to(root).as_posix().startswith(f"{ENGINES_FOLDER}/"):
            continue  # a build in another process writes and renames there
        if path.is_symlink():
            raise IntegrityError(f"{path} is a link; a bundle holds plain files only (copy it with `cp -rL`)")
        if path.is_file():
            yield path.relative_to(root).as_posix(), path
        elif not path.is_dir():
            raise IntegrityError(f"{path} is neither a file nor a folder")
