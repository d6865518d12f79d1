"""What the package brings along: models small enough to ship, as weights and as ready bundles."""

from __future__ import annotations

from pathlib import Path

from edgevlm.core.errors import InputError, UnsupportedError
from edgevlm.core.registry import unknown_name

HERE = Path(__file__).parent
MODELS = ("nano",)
DEMO_IMAGE = HERE / "demo.png"


def find_bundle(bundle: str) -> Path:
    """The bundle that ``bundle`` names: a shipped name, or the folder itself, whatever stands there.

    Raises UnsupportedError for a bare name that is neither.
    """
    if bundle in MODELS:
        return HERE / f"{bundle}.bundle"
    return _folder(bundle, "bundle")


def find_weights(model: str) -> Path:
    """The folder of weights that ``model`` names: a shipped name, or a folder with config.json.

    Raises UnsupportedError for a bare name that is neither, InputError for a path without a model.
    """
    if model in MODELS:
        return HERE / model
    folder = _folder(model, "model")
    if (folder / "edgevlm.json").is_file():
        raise InputError(f"{folder} is a bundle, not a model: give the checkpoint that it was exported from")
    if not (folder / "config.json").is_file():
        found = "is a folder without config.json" if folder.is_dir() else "does not exist"
        raise InputError(f"{folder} {found}: give a checkpoint's folder, or a shipped name ({', '.join(MODELS)})")
    return folder


def _folder(name: str, kind: str) -> Path:
    """``name`` as a path, unless it looks like a misspelt shipped name."""
    folder = Path(name)
    if len(folder.parts) == 1 and not folder.suffix and not folder.exists():
        raise UnsupportedError(unknown_name(f"shipped {kind}, nor a folder,", name, list(MODELS)))
    return folder
