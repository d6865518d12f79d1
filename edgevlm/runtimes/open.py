"""From a bundle on disk to a model that answers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edgevlm.bundle.manifest import Manifest, PartFile
from edgevlm.bundle.read import Bundle, read_bundle
from edgevlm.core.errors import IntegrityError
from edgevlm.core.registry import Registry
from edgevlm.processing.image_spec import ImageSpec
from edgevlm.processing.processor import Processor
from edgevlm.processing.split import Crops
from edgevlm.runtimes.session import BundleSession
from edgevlm.runtimes.vlm import RuntimeVlm
from edgevlm.shipped import find_bundle

RUNTIMES: Registry[Callable[..., BundleSession]] = Registry(
    "runtime",
    {"onnxruntime": "edgevlm.runtimes.on_onnxruntime:OnnxRuntimeSession"},
    group="edgevlm.runtimes",
)


def open_bundle(
    path: str | Path, runtime: str = "onnxruntime", *, threads: int | None = None, check: bool = True
) -> RuntimeVlm:
    """Load a bundle, given as a folder or as a shipped name such as ``nano``.

    ``check`` compares every file with its hash the first time.  Raises UnsupportedError for an unknown
    ``runtime``, MissingLibraryError when its library is not installed, IntegrityError for a damaged bundle
    or one whose parts disagree.
    """
    back_end = RUNTIMES[runtime]
    bundle = read_bundle(find_bundle(str(path)), check=check)
    manifest = bundle.manifest
    processor = Processor.from_folder(bundle.root, manifest.image, manifest.prompt)
    _check_agreement(manifest, processor)
    session = back_end(bundle, threads=threads)
    info = {"runtime": runtime, **session.info, **_describe(bundle)}
    return RuntimeVlm(
        session,
        processor,
        name=manifest.name,
        max_context=manifest.max_context,
        info=info,
        fusion=manifest.fusion,
        vocab_size=manifest.decoder.vocab_size,
    )


def _check_agreement(manifest: Manifest, processor: Processor) -> None:
    """Raises IntegrityError where preprocessing, prompt, vision encoder and fusion speak of different sizes."""
    expected = manifest.num_vision_tokens
    found = processor.prompt_spec.num_vision_tokens
    if found != expected:
        raise _disagreement(manifest, f"the prompt has {found} vision tokens per image, the manifest {expected}")
    for part in manifest.parts:
        if (part.part, part.target) == ("vision_encoder", "onnx"):  # others may lay their tensors out in another way
            _check_encoder(manifest, part, processor.image_spec)
        if (part.part, part.target) == ("fusion", "onnx"):
            _check_fusion(manifest, part)


def _check_encoder(manifest: Manifest, part: PartFile, image: ImageSpec) -> None:
    shapes, size, expected = _shapes(part), (image.height, image.width), manifest.num_vision_tokens
    if _differ(taken := shapes.get("pixel_values", ())[-2:], size):
        raise _disagreement(manifest, f"pictures become {_by(size)} pixels, {part.file} takes {_by(taken)}")
    views = image.split.per_side**2 + 1 if isinstance(image.split, Crops) else 1
    if _differ(taken := shapes.get("pixel_values", ())[:1], (views,)):
        raise _disagreement(manifest, f"pictures become {views} views, {part.file} takes {taken[0]}")
    if _differ(given := shapes.get("image_features", ())[1:2], (expected,)):
        raise _disagreement(manifest, f"{part.file} gives {given[0]} vision tokens, the manifest says {expected}")
    if manifest.fusion is None and "fusion_cache" in shapes:
        raise _disagreement(manifest, f"{part.file} gives a fusion_cache, but no part fusion reads it")


def _check_fusion(manifest: Manifest, part: PartFile) -> None:
    encoder = manifest.part("vision_encoder", part.target)
    given, taken = (_shapes(one).get("fusion_cache", ()) for one in (encoder, part))
    if not given:
        raise _disagreement(manifest, f"{part.file} reads a fusion_cache, which {encoder.file} does not give")
    pairs = zip(given, taken, strict=False)
    if len(given) != len(taken) or any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in pairs):
        raise _disagreement(
            manifest, f"{encoder.file} gives a fusion_cache of {_by(given)}, {part.file} takes {_by(taken) or 'none'}"
        )


def _shapes(part: PartFile) -> dict[str, tuple[int | str, ...]]:
    return {tensor.name: tensor.shape for tensor in (*part.inputs, *part.outputs)}


def _differ(sizes: Sequence[int | str], expected: Sequence[int]) -> bool:
    """Whether a size that is a number is another one; names stand for any."""
    return any(isinstance(one, int) and one != other for one, other in zip(sizes, expected, strict=False))


def _by(sizes: Sequence[int | str]) -> str:
    return " x ".join(map(str, sizes))


def _disagreement(manifest: Manifest, what: str) -> IntegrityError:
    return IntegrityError(f"{manifest.name}: {what}: export the bundle again")


def _describe(bundle: Bundle) -> dict[str, Any]:
    """What a measurement must say about the bundle."""
    sums = bundle.root / "SHA256SUMS"
    return {
        "bundle": str(bundle.root),
        "bundle_sha256": hashlib.sha256(sums.read_bytes()).hexdigest() if sums.is_file() else None,
        "family": bundle.manifest.family,
        "precisions": {part.part: part.precision for part in reversed(bundle.manifest.parts)},  # the first counts
    }
