"""What the package brings along: models small enough to ship, as weights and as ready bundles."""

from __future__ import annotations

from pathlib import Path

from edgevlm.core.errors import InputError
from edgevlm.core.registry import unknown_name

HERE = Path(__file__).parent
MODELS = ("nano",)
DEMO_IMAGE = HERE / "demo.png"


def find_weights(model: str) -> Path:
    """The folder of weights that ``model`` names: a shipped name, or a folder with config.json."""
    return _find(model, HERE / model, "config.json", "model")


def find_bundle(bundle: str) -> Path:
    """The bundle that ``bundle`` names: a shipped name, or a folder with edgevlm.json."""
    return _find(bundle, HERE / f"{bundle}.bundle", "edgevlm.json", "bundle")


def _find(name: str, shipped: Path, marker: str, kind: str) -> Path:
    if name in MODELS:
        return shipped
    folder = Path(name)
    if (folder / marker).is_file():
        return folder
    if folder.is_dir():
        raise InputError(f"{folder} is no {kind} folder: it holds no {marker}")
    raise InputError(f"{unknown_name(f'{kind} folder or shipped {kind}', name, list(MODELS))}")
