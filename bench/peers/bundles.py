"""What a bundle of EdgeVLM holds, for the workers that open one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgevlm.bundle.manifest import Manifest, PartFile
from edgevlm.bundle.read import read_bundle
from edgevlm.shipped import find_bundle

ENCODER, DECODER = "vision_encoder", "decoder_model_merged"
RUNTIMES = ("runtime", "encoder_runtime", "decoder_runtime")
PRECISIONS = {"encoder_precision": ENCODER, "decoder_precision": DECODER}
CACHE_NUMBER_BYTES = 4


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a bundle's folder, or of a shipped bundle; nothing is checked."""
    return read_bundle(find_bundle(str(folder)), check=False).manifest


def choices_of(arguments: Mapping[str, Any], manifest: Manifest) -> dict[str, str]:
    """What ``open_bundle`` is told: ``int4`` stands for the bundle's first precision of that kind."""
    found = {name: str(arguments[name]) for name in RUNTIMES if arguments.get(name)}
    for name, part in PRECISIONS.items():
        if arguments.get(name):
            found[name] = chosen(manifest, part, arguments[name]).precision
    return found


def chosen(manifest: Manifest, part: str, precision: str | None) -> PartFile:
    """The bundle's first file of a part in ``precision``, or in the first precision of that kind, or its first.

    Raises SystemExit where there is none.
    """
    files = [one for one in manifest.parts if one.part == part]
    same = [one for one in files if one.precision == precision]
    kind = [one for one in files if precision is None or one.precision.split("-b")[0] == precision]
    for found in (*same, *kind):
        return found
    raise SystemExit(f"no {part} in {precision}; the bundle has {', '.join(one.precision for one in files)}")


def accounted_bytes(manifest: Manifest, precision: str) -> dict[str, int]:
    """The files of the parts that are opened, and the kv cache: what memory must at least hold."""
    parts = {part.part: part for part in reversed(manifest.parts)}  # the first of each kind is the default
    parts[DECODER] = chosen(manifest, DECODER, precision)
    files = {name for part in parts.values() for name in part.files}
    shape = manifest.decoder
    numbers = 2 * shape.num_layers * shape.num_key_value_heads * manifest.max_context * shape.head_size
    weights = sum(manifest.file_bytes.get(name, 0) for name in files)
    return {"weights_bytes": weights, "cache_bytes": numbers * CACHE_NUMBER_BYTES}
