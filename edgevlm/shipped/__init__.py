"""What the package brings along: models small enough to ship, as weights and as ready bundles."""

from __future__ import annotations

import os
from pathlib import Path

from edgevlm.core.errors import InputError, UnsupportedError, UsageError
from edgevlm.core.registry import unknown_name

HERE = Path(__file__).parent
MODELS = ("nano",)
WANTED = f"give a checkpoint's folder, or a shipped name ({', '.join(MODELS)}), or a hub id (owner/name)"
DEMO_IMAGE = HERE / "demo.png"


def find_bundle(bundle: str | Path) -> Path:
    """The bundle that ``bundle`` names: a shipped name, or the folder itself, whatever stands there.

    Raises UnsupportedError for a bare name that is neither, UsageError for one that is both.
    """
    return _shipped(bundle, "bundle", ".bundle") or Path(bundle)


def find_weights(model: str | Path) -> Path:
    """The folder of weights that ``model`` names: a shipped name, or a folder with config.json.

    Raises like ``find_bundle``, and InputError for a path without a model.
    """
    folder = _shipped(model, "model", "") or Path(model)
    if (folder / "edgevlm.json").is_file():
        raise InputError(f"{folder} is a bundle, not a model: give the checkpoint that it was exported from")
    if not (folder / "config.json").is_file():
        found = "is a folder without config.json" if folder.is_dir() else "does not exist"
        raise InputError(f"{folder} {found}: {WANTED}")
    return folder


def require_writable(root: Path, what: str, *, instead: str) -> None:
    """Raises UsageError where ``what`` cannot be written into the bundle ``root``, before minutes are spent on it.

    ``instead``: what to do about it.
    """
    if root.is_relative_to(HERE):
        raise UsageError(f"{root.name} belongs to the package: {instead}")
    if root.is_dir() and not os.access(root, os.W_OK):
        raise UsageError(f"{root} may not be written, so no {what} can lie there: {instead}")


def _shipped(name: str | Path, kind: str, suffix: str) -> Path | None:
    """Where the shipped model called ``name`` stands; None for a path.  A ``Path`` is always a path."""
    if isinstance(name, Path) or os.path.basename(name) != name:
        return None
    if name not in MODELS:
        if os.path.lexists(name):
            return None
        raise UnsupportedError(unknown_name(f"shipped {kind}, nor a folder,", name, list(MODELS)))
    if os.path.lexists(name):
        raise UsageError(f"{name!r} is a shipped {kind} and also stands in this folder: write ./{name} for the latter")
    return HERE / f"{name}{suffix}"
