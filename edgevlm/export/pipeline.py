"""A checkpoint becomes a bundle: load, record the reference, lower each part, verify, and only then appear."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from edgevlm.bundle.paths import MANIFEST_FILE
from edgevlm.bundle.write import write_sums
from edgevlm.core.config import to_json, to_plain
from edgevlm.core.errors import DISK_FULL, ConfigError, DoesNotFitError, ParityError, UsageError
from edgevlm.core.files import atomic_directory, write_text
from edgevlm.export import TARGETS
from edgevlm.export.precisions import Precisions, precisions
from edgevlm.export.provenance import Calibration
from edgevlm.export.sizes import bundle_bytes
from edgevlm.export.target import Lowering
from edgevlm.export.writing import Plan, Report, check_image_sizes, step_names, write_bundle
from edgevlm.models.checkpoint import load_model
from edgevlm.processing.chat import user_message
from edgevlm.quant.calibration import pictures_in
from edgevlm.runtimes.choices import CHECKERS, RUNTIME_OF, Wishes
from edgevlm.verify import Verification, verify_all


def export_bundle(
    model: str | Path,
    *,
    target: str = "onnx",
    out: str | Path,
    overwrite: bool = False,
    half_storage: bool = False,
    encoder_precision: str | Sequence[str] | None = None,
    decoder_precision: str | Sequence[str] | None = None,
    plain: bool = False,
    static_batch: bool = False,
    calib: str | Path | None = None,
    calib_samples: int = 32,
    seed: int = 0,
    keep: bool = False,
    report: Report = lambda step: None,
    revision: str | None = None,
    offline: bool = False,
    image_size: int | Sequence[int] | None = None,
    image_fit: str | None = None,
    image_splitting: bool | None = None,
    vision_tokens: int | None = None,
    max_context: int | None = None,
) -> Path:
    """Export ``model`` (folder, shipped name or hub id) to the folder ``out``, which appears only when it is whole.

    ``encoder_precision`` and ``decoder_precision`` are one name or several (a list, or joined by commas); each makes
    a file, and the first is what opens by default; None is what the ``target`` is usually in, fp32 for onnx and fp16
    for tensorrt.  ``half_storage`` stores weights that float16 holds exactly in
    half the bytes, ``plain`` writes decoders of standard operators alone, ``static_batch`` encoders of one picture
    at a time.  What rounds is fitted to ``calib_samples`` pictures of the folder ``calib``, or to generated scenes
    that follow from ``seed``.  The arguments from ``revision`` on are those of ``load_model``, which see; but of
    ``image_size`` there may be several, for which one encoder is written, and the first is what opens by default.

    ``report`` is told each of ``steps`` as it begins, and of long ones how far they are, behind a colon: ``calibrate: 5
    of 32``.  Raises what ``load_model`` raises; ConfigError for a precision
    that means nothing; DoesNotFitError when the disk is too small; ParityError when the export is not the same model:
    with ``keep`` the failed bundle then stays beside ``out`` as ``<out>.failed``.
    """
    lowers = TARGETS[target]
    wanted, sides = precisions(encoder_precision, decoder_precision, target), _sides(image_size)
    lowering = Lowering(half_storage=half_storage, plain=plain, static_batch=static_batch)
    plan = Plan(
        target=lowers(lowering),
        lowering=lowering,
        precisions=wanted,
        calibration=_calibration(wanted, calib, calib_samples, seed),
        image_sizes=sides if len(sides) > 1 else (),
        report=report,
    )
    out = Path(out)
    with atomic_directory(out, overwrite=overwrite, marker=MANIFEST_FILE) as root:
        report("load")
        checkpoint = load_model(
            model,
            revision=revision,
            offline=offline,
            image_size=sides[0] if sides else None,
            image_fit=image_fit,
            image_splitting=image_splitting,
            vision_tokens=vision_tokens,
            max_context=max_context,
        )
        check_image_sizes(checkpoint.model.config, plan.image_sizes)
        checkpoint.processor.input_ids([user_message("?", num_images=1)])  # a template that fails should fail now
        _check_room(root, out, bundle_bytes(checkpoint.model, wanted, half_storage=half_storage))
        write_bundle(checkpoint, plan, root)
        del checkpoint
        report("verify")
        _verify(root, out, keep, CHECKERS.get(RUNTIME_OF.get(target, "")))
    return out


def steps(wanted: Precisions) -> tuple[str, ...]:
    """What ``export_bundle`` reports, in order; ``fusion`` only where the model has one."""
    return ("load", *step_names(wanted), "verify")


def _sides(image_size: int | Sequence[int] | None) -> tuple[int, ...]:
    if image_size is None:
        return ()
    sides = (image_size,) if isinstance(image_size, int) else tuple(image_size)
    if not sides or min(sides) < 1 or len(set(sides)) != len(sides):
        raise UsageError(f"image_size is one number of pixels, or several that differ; found {list(sides)}")
    return sides


def _calibration(wanted: Precisions, folder: str | Path | None, num_samples: int, seed: int) -> Calibration:
    if num_samples < 1:
        raise ConfigError(f"calibration needs at least one picture, got {num_samples}")
    if folder is not None and not wanted.calibrates:
        raise ConfigError("nothing is calibrated in these precisions: leave the folder of pictures away")
    if folder is not None:
        pictures_in(Path(folder), num_samples, seed)  # what is wrong with it should be known before the work begins
    return Calibration(folder=None if folder is None else Path(folder), num_samples=num_samples, seed=seed)


def _check_room(root: Path, out: Path, needed: int) -> None:
    free = shutil.disk_usage(root).free
    if needed > free:
        raise DoesNotFitError(f"{out}: the bundle takes about {needed:,} bytes, {free:,} are free: {DISK_FULL}")


def _verify(root: Path, out: Path, keep: bool, runtime: str | None) -> None:
    """Run the gate on every combination and write its record; a bundle that fails stays only on request.

    ``runtime``: what proves parts whose own runtime may want a device that is not here.
    """
    verifications = verify_all(root, wishes=Wishes(runtime=runtime), check=False)
    default, *variants = (_without_place(verification) for verification in verifications)
    record = {**to_plain(default), "variants": [to_plain(variant) for variant in variants]}
    write_text(root / "verify.json", to_json(record))
    write_sums(root)
    try:
        for verification in (default, *variants):
            verification.require()
    except ParityError as error:
        if not keep:
            raise
        failed = out.with_name(f"{out.name}.failed")
        with atomic_directory(failed, overwrite=True, marker=MANIFEST_FILE) as kept:
            shutil.copytree(root, kept, dirs_exist_ok=True)
        raise ParityError(f"{error}. The bundle is kept in {failed}") from error


def _without_place(verification: Verification) -> Verification:
    """The record must not hold where this machine keeps the bundle, nor a hash that the record itself changes."""
    runtime = {name: value for name, value in verification.runtime.items() if not name.startswith("bundle")}
    return replace(verification, runtime=runtime)
