"""Write the manifest and the hashes: the last two steps of every export."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from edgevlm.bundle.hash_cache import sha256
from edgevlm.bundle.manifest import Manifest
from edgevlm.bundle.paths import MANIFEST_FILE, SUMS_FILE, check_name, inside, is_litter, plain_files
from edgevlm.core.config import to_json
from edgevlm.core.errors import IntegrityError
from edgevlm.core.files import write_text


def write_manifest(root: Path, manifest: Manifest) -> Manifest:
    """Write ``edgevlm.json`` and return what was written: ``manifest`` with the length of every part's files.

    Raises IntegrityError when a part's file is not in ``root`` yet.
    """
    missing = [name for name in manifest.files() if not inside(root, name).is_file()]
    if missing:
        raise IntegrityError(f"{root}: the manifest names {', '.join(missing)}, which was not written")
    sizes = {name: inside(root, name).stat().st_size for name in manifest.files()}
    complete = replace(manifest, file_bytes=sizes)
    write_text(root / MANIFEST_FILE, to_json(complete))
    return complete


def write_sums(root: Path) -> Path:
    """Write ``SHA256SUMS`` over every file in ``root``, but for what file managers leave, and return its path.

    ``sha256sum -c SHA256SUMS`` checks it.  Raises IntegrityError when the folder holds a link or a name that
    cannot travel.
    """
    files = [(name, path) for name, path in plain_files(root) if name != SUMS_FILE and not is_litter(name)]
    lines = [f"{sha256(path)}  {check_name(name)}\n" for name, path in files]
    write_text(root / SUMS_FILE, "".join(lines))
    return root / SUMS_FILE
