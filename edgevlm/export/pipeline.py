"""A checkpoint becomes a bundle: load, lower each part, record the reference, verify, and only then appear."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from edgevlm.bundle.hash_cache import sha256
from edgevlm.bundle.manifest import SCHEMA_VERSION, DecoderShape, Manifest, PartFile
from edgevlm.bundle.paths import MANIFEST_FILE
from edgevlm.bundle.write import write_manifest, write_sums
from edgevlm.core.config import to_json
from edgevlm.core.errors import ParityError
from edgevlm.core.files import atomic_directory, write_text
from edgevlm.core.optional import versions
from edgevlm.export import TARGETS
from edgevlm.export.parts import split
from edgevlm.export.target import Lowering
from edgevlm.models.checkpoint import WEIGHTS, Checkpoint, load_model
from edgevlm.processing.hub_config import preprocessor_config
from edgevlm.verify import golden, verify_bundle

STEPS = ("load", "vision_encoder", "embed_tokens", "decoder_model_merged", "golden", "verify")
COPIED = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)
LIBRARIES = (
    "edgevlm",
    "torch",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "numpy",
    "pillow",
    "tokenizers",
)

Report = Callable[[str], None]  # told the name of each of STEPS as it begins


def export_bundle(
    model: str | Path,
    *,
    target: str = "onnx",
    out: str | Path,
    overwrite: bool = False,
    half_storage: bool = False,
    keep: bool = False,
    report: Report = lambda step: None,
) -> Path:
    """Export ``model`` (folder or shipped name) to the bundle folder ``out``, which appears only when it is whole.

    ``half_storage`` stores weights that float16 holds exactly in half the bytes.  Raises ParityError when
    the export is not the same model; with ``keep`` the failed bundle then stays beside ``out`` as
    ``<out>.failed``.
    """
    lowering = TARGETS[target](Lowering(half_storage=half_storage))
    out = Path(out)
    with atomic_directory(out, overwrite=overwrite, marker=MANIFEST_FILE) as root:
        report("load")
        checkpoint = load_model(model)
        _copy_texts(checkpoint, root)
        files = []
        for part in split(checkpoint.model):
            report(part.name)
            files.append(lowering.lower(part, root))
        write_manifest(root, _manifest(checkpoint, files))
        report("golden")
        golden.record(checkpoint.open(), root, checkpoint.suite)
        write_sums(root)
        report("verify")
        _verify(root, out, keep)
    return out


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


def _manifest(checkpoint: Checkpoint, parts: list[PartFile]) -> Manifest:
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
            head_size=config.decoder.head_dim,
            hidden_size=config.decoder.hidden_size,
            vocab_size=config.decoder.vocab_size,
        ),
        max_context=config.decoder.max_position_embeddings,
        suite=checkpoint.suite,
        provenance=_provenance(checkpoint),
    )


def _provenance(checkpoint: Checkpoint) -> dict[str, Any]:
    """Where the weights came from and what lowered them."""
    return {
        "source": checkpoint.name,
        "weights": {WEIGHTS: sha256(checkpoint.folder / WEIGHTS)},
        "versions": {"python": platform.python_version(), **versions(LIBRARIES)},
    }


def _copy_texts(checkpoint: Checkpoint, root: Path) -> None:
    """The tokenizer, configs and template as the checkpoint has them, and the image specification as hubs write it."""
    for name in COPIED:
        if (checkpoint.folder / name).is_file():
            shutil.copyfile(checkpoint.folder / name, root / name)
    write_text(root / "preprocessor_config.json", to_json(preprocessor_config(checkpoint.processor.image_spec)))
