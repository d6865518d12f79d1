"""A checkpoint becomes a bundle: load, lower each part, record the reference, verify, and only then appear."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path

from edgevlm.bundle.manifest import SCHEMA_VERSION, DecoderShape, Manifest, PartFile
from edgevlm.bundle.paths import MANIFEST_FILE
from edgevlm.bundle.write import write_manifest, write_sums
from edgevlm.core.config import to_json, to_plain
from edgevlm.core.errors import DISK_FULL, DoesNotFitError, ParityError
from edgevlm.core.files import atomic_directory, write_text
from edgevlm.export import TARGETS
from edgevlm.export.heads import cache_head_size
from edgevlm.export.parts import split
from edgevlm.export.provenance import provenance
from edgevlm.export.target import Lowering, Target
from edgevlm.export.texts import write_texts
from edgevlm.families.licence import Licence, read_licence
from edgevlm.models.as_session import fusion_shape
from edgevlm.models.checkpoint import Checkpoint, load_model
from edgevlm.models.vlm import Vlm
from edgevlm.processing.chat import user_message
from edgevlm.verify import golden, verify_bundle

logger = logging.getLogger(__name__)

STEPS = ("load", "vision_encoder", "fusion", "embed_tokens", "decoder_model_merged", "golden", "verify")

Report = Callable[[str], None]  # told the name of each of STEPS as it begins; fusion only where the model has one


def export_bundle(
    model: str | Path,
    *,
    target: str = "onnx",
    out: str | Path,
    overwrite: bool = False,
    half_storage: bool = False,
    keep: bool = False,
    report: Report = lambda step: None,
    revision: str | None = None,
    offline: bool = False,
    image_size: int | None = None,
    image_fit: str | None = None,
    image_splitting: bool | None = None,
    vision_tokens: int | None = None,
    max_context: int | None = None,
) -> Path:
    """Export ``model`` (folder, shipped name or hub id) to the folder ``out``, which appears only when it is whole.

    ``half_storage`` stores weights that float16 holds exactly in half the bytes.  The arguments from ``revision`` on
    are those of ``load_model``, which see.

    Raises what ``load_model`` raises; DoesNotFitError when the disk is too small; ParityError when the export is not
    the same model: with ``keep`` the failed bundle then stays beside ``out`` as ``<out>.failed``.
    """
    lowering = TARGETS[target](Lowering(half_storage=half_storage))
    out = Path(out)
    with atomic_directory(out, overwrite=overwrite, marker=MANIFEST_FILE) as root:
        report("load")
        checkpoint = load_model(
            model,
            revision=revision,
            offline=offline,
            image_size=image_size,
            image_fit=image_fit,
            image_splitting=image_splitting,
            vision_tokens=vision_tokens,
            max_context=max_context,
        )
        checkpoint.processor.input_ids([user_message("?", num_images=1)])  # a template that fails should fail now
        _check_room(root, out, _bundle_bytes(checkpoint.model, half_storage))
        _write(checkpoint, lowering, root, report)
        del checkpoint
        report("verify")
        _verify(root, out, keep)
    return out


def _write(checkpoint: Checkpoint, lowering: Target, root: Path, report: Report) -> None:
    """Everything in the bundle that needs PyTorch."""
    licence = read_licence(checkpoint.folder)
    _tell(checkpoint, licence)
    write_texts(checkpoint, root, licence)
    files, parts = [], split(checkpoint.model)
    for part in parts:
        report(part.name)
        files.append(lowering.lower(part, root))
    write_manifest(root, _manifest(checkpoint, files, licence))
    report("golden")
    golden.record(checkpoint.open(), root, checkpoint.suite)
    write_sums(root)
    _release(checkpoint.model, *(part.model for part in parts))


def _release(*models: Vlm) -> None:
    """Give back the memory of the weights: the gate loads them once more, into the runtime.

    Dropping the models is not enough, because torch.onnx keeps the graphs that it traced and all tensors in them.
    """
    for model in models:
        for tensor in chain(model.parameters(), model.buffers()):
            tensor.data = tensor.data.new_empty(0)


def _tell(checkpoint: Checkpoint, licence: Licence | None) -> None:
    """Whoever converts weights makes a derivative of them; some licences allow that for research only."""
    if licence is not None:
        logger.log(logging.WARNING if licence.restricted else logging.INFO, "licence of the weights: %s", licence)
    elif checkpoint.family != "edgevlm":
        logger.info("licence of the weights: the checkpoint states none; ask its authors before you pass it on")


def _check_room(root: Path, out: Path, needed: int) -> None:
    free = shutil.disk_usage(root).free
    if needed > free:
        raise DoesNotFitError(f"{out}: the bundle takes about {needed:,} bytes, {free:,} are free: {DISK_FULL}")


def _bundle_bytes(model: Vlm, half_storage: bool) -> int:
    """What the weights take in the graphs; a tied head and the layers of a pre-fusion stand in two."""
    twice = model.head_weight.nbytes if model.lm_head is None else 0
    if model.fusion is not None:
        twice += sum(parameter.nbytes for parameter in model.fusion.layers.parameters())
    num_bytes = sum(parameter.nbytes for parameter in model.parameters()) + twice
    return num_bytes // 2 if half_storage else num_bytes


def _verify(root: Path, out: Path, keep: bool) -> None:
    """Run the gate and write its record; a bundle that fails stays only on request."""
    verification = verify_bundle(root, check=False)
    runtime = {name: value for name, value in verification.runtime.items() if not name.startswith("bundle")}
    write_text(root / "verify.json", to_json(replace(verification, runtime=runtime)))
    write_sums(root)
    try:
        verification.require()
    except ParityError as error:
        if not keep:
            raise
        failed = out.with_name(f"{out.name}.failed")
        with atomic_directory(failed, overwrite=True, marker=MANIFEST_FILE) as kept:
            shutil.copytree(root, kept, dirs_exist_ok=True)
        raise ParityError(f"{error}. The bundle is kept in {failed}") from error


def _manifest(checkpoint: Checkpoint, parts: list[PartFile], licence: Licence | None) -> Manifest:
    config = checkpoint.model.config
    return Manifest(
        schema=SCHEMA_VERSION,
        name=checkpoint.name,
        family=checkpoint.family,
        parts=tuple(parts),
        image=asdict(checkpoint.processor.image_spec),
        prompt=asdict(checkpoint.processor.prompt_spec),
        num_vision_tokens=config.num_vision_tokens,
        decoder=DecoderShape(
            num_layers=config.decoder.num_hidden_layers,
            num_key_value_heads=config.decoder.num_key_value_heads,
            head_size=cache_head_size(config.decoder),
            hidden_size=config.decoder.hidden_size,
            vocab_size=config.decoder.vocab_size,
        ),
        fusion=fusion_shape(config),
        model=to_plain(config),
        max_context=checkpoint.max_context,
        suite=checkpoint.suite,
        provenance=provenance(checkpoint, licence),
    )
