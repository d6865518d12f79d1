"""A folder of ONNX files that another exporter wrote becomes a bundle, and gains the gate, the runtime and the bench.

The files are those that transformers.js reads: ``vision_encoder``, ``embed_tokens`` and ``decoder_model_merged``, in
``onnx/`` or beside config.json, with the tokenizer and the preprocessing of the model they were made from.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from edgevlm.bundle.hash_cache import sha256
from edgevlm.bundle.manifest import DecoderShape, Manifest, PartFile
from edgevlm.bundle.paths import MANIFEST_FILE
from edgevlm.bundle.write import write_manifest, write_sums
from edgevlm.core.config import to_json, to_plain
from edgevlm.core.errors import InputError, IntegrityError, UnsupportedError
from edgevlm.core.files import atomic_directory, write_text
from edgevlm.core.optional import versions
from edgevlm.export.foreign_graphs import ForeignGraph, copy_graph, find_graphs, num_layers, sizes_of
from edgevlm.export.texts import copy_licence, write_folder_texts
from edgevlm.families.detect import family_of
from edgevlm.families.folder import ModelFolder
from edgevlm.families.licence import read_licence
from edgevlm.models.changes import Changes
from edgevlm.processing.processor import Processor
from edgevlm.runtimes.open import open_bundle
from edgevlm.shapes.config import VlmConfig
from edgevlm.verify import golden, verify_bundle
from edgevlm.verify.thresholds import FLOATS

logger = logging.getLogger(__name__)

ITSELF = "the imported files themselves: later runs are compared with the first, nothing with PyTorch"


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """What a folder holds, read by the family that its config.json names."""

    folder: ModelFolder
    family: str
    config: VlmConfig
    processor: Processor
    graphs: Sequence[ForeignGraph]


def import_bundle(
    folder: Path | str,
    out: Path | str,
    *,
    model: str | Path | None = None,
    encoder: str | None = None,
    decoder: str | None = None,
    max_context: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Make a bundle at ``out`` of the ONNX files in ``folder``.

    ``encoder`` and ``decoder`` name a precision of the files, in transformers.js' words (fp32, fp16, int8, q8, q4), by
    default the first that is there.  With ``model``, the checkpoint that they were made from, the gate compares them
    with PyTorch; without, it records what they compute now, and verify.json says so.

    Raises InputError for a folder without the files, UnsupportedError for a family or layout that nobody has written
    and for a ``max_context`` beyond the model's, UsageError for one below 1, IntegrityError for files that do not
    belong together, ParityError when they are not the ``model``.
    """
    if (Path(folder) / MANIFEST_FILE).is_file():
        raise InputError(f"{folder} is a bundle already: open it as it is")
    found = _read(Path(folder), encoder, decoder)
    Changes(max_context=max_context).of_config(found.config)  # refuses a context that the model does not have
    with atomic_directory(Path(out), overwrite=overwrite, marker=MANIFEST_FILE) as root:
        parts = tuple(copy_graph(graph, root, found.config.vision.image_size) for graph in found.graphs)
        write_folder_texts(found.folder, found.config, found.processor, root, parts)
        copy_licence(found.folder.path, root, read_licence(found.folder.path))
        write_manifest(root, _manifest(found, parts, max_context))
        write_sums(root)
        reference = _record(root, parts, model, max_context)
        write_sums(root)
        verification = verify_bundle(root, check=False)
        runtime = {name: value for name, value in verification.runtime.items() if not name.startswith("bundle")}
        record = {**to_plain(replace(verification, runtime=runtime)), "reference": reference}
        write_text(root / "verify.json", to_json(record))
        write_sums(root)
        verification.require()
    return Path(out)


def _read(path: Path, encoder: str | None, decoder: str | None) -> Foreign:
    folder = ModelFolder(path)
    family = family_of(folder)
    config = family.config(folder)
    if config.fusion is not None:
        raise UnsupportedError(f"{path}: a model with pre-fusion has a fourth graph; export its checkpoint instead")
    wishes: Mapping[str, str | None] = {"vision_encoder": encoder, "decoder_model_merged": decoder}
    graphs = find_graphs(path, wishes)
    return Foreign(
        folder=folder,
        family=family.name,
        config=config,
        processor=family.processor(folder, config),
        graphs=graphs,
    )


def _manifest(found: Foreign, parts: tuple[PartFile, ...], max_context: int | None) -> Manifest:
    licence = read_licence(found.folder.path)
    return Manifest(
        name=found.folder.path.resolve().name,
        family=found.family,
        parts=parts,
        image=asdict(found.processor.image_spec),
        prompt=asdict(found.processor.prompt_spec),
        num_vision_tokens=found.config.num_vision_tokens,
        decoder=_decoder_shape(found),
        model=to_plain(found.config),
        max_context=max_context or found.config.decoder.max_position_embeddings,
        provenance={
            "source": found.folder.path.resolve().name,
            "imported": {graph.file.name: sha256(graph.file) for graph in found.graphs},
            **({"licence": asdict(licence)} if licence else {}),
            "versions": {"python": platform.python_version(), **versions(("edgevlm", "onnx-ir", "onnxruntime"))},
        },
    )


def _decoder_shape(found: Foreign) -> DecoderShape:
    """What config.json says, where the graph does not say otherwise.

    Raises IntegrityError where the two cannot be of one model: another number of layers, or another width.
    """
    graph = next(graph for graph in found.graphs if graph.part == "decoder_model_merged")
    config = found.config.decoder
    cache = sizes_of(graph, "past_key_values.0.key", 4)
    rows, logits = (sizes_of(graph, name, 3) for name in ("inputs_embeds", "logits"))
    facts = (
        ("layers", num_layers(graph), config.num_hidden_layers),
        ("numbers a row", rows[-1], config.hidden_size),
        ("key-value heads", cache[1], config.num_key_value_heads),
    )
    for name, given, expected in facts:
        if isinstance(given, int) and given != expected:
            raise IntegrityError(f"{graph.file}: the decoder has {given} {name}, config.json says {expected}")
    return DecoderShape(
        num_layers=config.num_hidden_layers,
        num_key_value_heads=config.num_key_value_heads,
        head_size=cache[3] if isinstance(cache[3], int) else config.head_dim,
        hidden_size=config.hidden_size,
        vocab_size=logits[-1] if isinstance(logits[-1], int) else config.vocab_size,
    )


def _record(root: Path, parts: Sequence[PartFile], model: str | Path | None, max_context: int | None) -> str:
    """Write ``golden/`` and say what it was recorded from."""
    if model is None:
        logger.warning("no --model: the gate compares later runs with the files as they are now, not with PyTorch")
        with open_bundle(root, check=False) as vlm:
            golden.record(vlm, root, "")
        return ITSELF
    from edgevlm.models.checkpoint import load_model

    checkpoint = load_model(model, max_context=max_context)
    recording = golden.recorded(checkpoint.open(), checkpoint.suite)
    _add_roundings(recording, root, parts)
    recording.save(root)
    return f"PyTorch, {checkpoint.name}"


def _add_roundings(recording: golden.Recording, root: Path, parts: Sequence[PartFile]) -> None:
    """What the files themselves compute now is the reference of how they round, which only their maker knows.

    Whether they round too much, the gate sees by PyTorch's own logits.
    """
    rounded = {part.part: part.precision for part in parts if part.precision not in FLOATS}
    with open_bundle(root, check=False) as vlm, vlm.exclusive() as session:
        if "vision_encoder" in rounded:
            recording.add_encoder(rounded["vision_encoder"], lambda pixels: session.encode(pixels).tokens)
        if "decoder_model_merged" in rounded:
            recording.add_decoder(rounded["decoder_model_merged"], session)
