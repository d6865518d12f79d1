"""From a bundle on disk to a model that answers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgevlm.bundle.manifest import Manifest, PartFile
from edgevlm.bundle.read import Bundle, read_bundle
from edgevlm.core.errors import IntegrityError
from edgevlm.core.registry import Registry
from edgevlm.processing.image_spec import ImageSpec
from edgevlm.processing.processor import Processor
from edgevlm.processing.split import Crops
from edgevlm.runtimes.choices import Choices, PartChoice, Wishes, part_for, target_of, usual_choices
from edgevlm.runtimes.composed import ComposedSession, Engines
from edgevlm.runtimes.embedding_table import EmbeddingTable
from edgevlm.runtimes.engines import BackEnd, Embedding
from edgevlm.runtimes.heap import use_huge_pages
from edgevlm.runtimes.tuned import sums_hash, tuned_choices
from edgevlm.runtimes.vlm import RuntimeVlm
from edgevlm.shipped import find_bundle

RUNTIMES: Registry[type[BackEnd]] = Registry(
    "runtime",
    {
        "onnxruntime": "edgevlm.runtimes.on_onnxruntime:OnnxRuntime",
        "openvino": "edgevlm.runtimes.on_openvino:OpenVino",
        "openvino-bf16": "edgevlm.runtimes.on_openvino:OpenVinoBf16",
        "tensorrt": "edgevlm.runtimes.on_tensorrt:TensorRt",
        "tensorrt-on-cpu": "edgevlm.runtimes.typed_on_cpu:TensorRtOnCpu",
    },
    group="edgevlm.runtimes",
)


def open_bundle(
    path: str | Path,
    runtime: str | None = None,
    *,
    encoder_runtime: str | None = None,
    decoder_runtime: str | None = None,
    device: str | None = None,
    encoder_precision: str | None = None,
    decoder_precision: str | None = None,
    threads: int | None = None,
    optimize: str | None = None,
    image_size: int | None = None,
    huge_pages: bool | None = None,
    check: bool = True,
) -> RuntimeVlm:
    """Load a bundle, given as a folder or as a shipped name such as ``nano``.

    ``runtime`` and ``device`` are for both halves, ``encoder_runtime`` (the fusion included) and ``decoder_runtime``
    go before it; the precisions are those that the bundle holds.  What is not said comes from the bundle's tune.json
    where it knows this machine, for the goal ``optimize`` (ttft, throughput, memory) or the one it was tuned for; else
    it is ONNX Runtime on the CPU's physical cores, or TensorRT for a bundle that holds nothing else, with the bundle's
    first precision.  ``image_size``: pixels a side,
    where the bundle was exported for several; by default the first of them.  ``huge_pages``: on Linux, lay what
    was loaded into huge pages, see ``heap.use_huge_pages``; answers come some percent faster, opening takes longer.
    ``check`` compares every file with its hash the first time.

    Raises UnsupportedError for an unknown runtime or device, or for a target, precision or image size that the bundle
    lacks, MissingLibraryError when a library is not installed, UsageError for a goal that nothing was tuned for,
    IntegrityError for a damaged bundle or one whose parts disagree.
    """
    wishes = Wishes(
        runtime=runtime,
        encoder_runtime=encoder_runtime,
        decoder_runtime=decoder_runtime,
        device=device,
        encoder_precision=encoder_precision,
        decoder_precision=decoder_precision,
        threads=threads,
        optimize=optimize,
        image_size=image_size,
        huge_pages=huge_pages,
    )
    return open_as_wished(path, wishes, check=check)


def open_as_wished(path: str | Path, wishes: Wishes, *, check: bool = True) -> RuntimeVlm:
    """What ``open_bundle`` does, with everything that was wished in one value."""
    bundle = read_bundle(find_bundle(str(path)), check=check)
    tuned = tuned_choices(bundle, wishes.optimize, known=RUNTIMES)
    usual = usual_choices(bundle.manifest)
    vlm = open_chosen(bundle, wishes.over(tuned or usual, usual), image_size=wishes.image_size)
    if wishes.huge_pages:
        vlm.info["huge_page_bytes"] = _in_huge_pages(vlm)
    return vlm


def _in_huge_pages(vlm: RuntimeVlm) -> int:
    try:
        return use_huge_pages()
    except BaseException:
        vlm.close()
        raise


def open_chosen(bundle: Bundle, choices: Choices, *, image_size: int | None = None) -> RuntimeVlm:
    """``bundle`` with exactly these ``choices``, whatever was tuned; raises what ``open_bundle`` raises."""
    manifest = bundle.manifest.at_image_size(image_size)
    bundle = replace(bundle, manifest=manifest)
    halves = _Halves(bundle, choices)
    processor = Processor.from_folder(bundle.root, manifest.image, manifest.prompt)
    _check_agreement(manifest, processor)
    session = ComposedSession(halves.open())
    return RuntimeVlm(
        session,
        processor,
        name=manifest.name,
        max_context=manifest.max_context,
        info={**halves.info(), **_describe(bundle)},
        fusion=manifest.fusion,
        vocab_size=manifest.decoder.vocab_size,
    )


class _Halves:
    """The files and back ends of encoder and decoder; one back end where both were chosen alike."""

    def __init__(self, bundle: Bundle, choices: Choices) -> None:
        self._bundle, self._choices = bundle, choices
        encoder, decoder = choices.encoder, choices.decoder
        self._encoder = _part(bundle.manifest, "vision_encoder", encoder)
        self._decoder = _part(bundle.manifest, "decoder_model_merged", decoder)
        self._decoder_runs = _back_end(decoder)
        alike = replace(encoder, precision=None) == replace(decoder, precision=None)
        self._encoder_runs = self._decoder_runs if alike else _back_end(encoder)

    @property
    def _parts(self) -> list[PartFile]:
        fusion = [self._beside("fusion", self._encoder)] if self._bundle.manifest.fusion else []
        return [self._encoder, *fusion, self._beside("embed_tokens", self._decoder), self._decoder]

    def open(self) -> Engines:
        """Load every part that runs."""
        bundle, (_, *fusion, rows, _) = self._bundle, self._parts
        with ExitStack() as opened:  # a part that fails must not leave the ones before it in a device's memory
            encoder = self._encoder_runs.open_encoder(bundle, self._encoder)
            opened.callback(encoder.close)
            text_fusion = self._encoder_runs.open_fusion(bundle, fusion[0]) if fusion else None
            if text_fusion is not None:
                opened.callback(text_fusion.close)
            embedding = self._open_embedding(rows)
            opened.callback(embedding.close)
            decoder = self._decoder_runs.open_decoder(bundle, self._decoder, embedding)
            opened.pop_all()
        return Engines(encoder=encoder, fusion=text_fusion, embedding=embedding, decoder=decoder)

    def info(self) -> dict[str, Any]:
        """What a measurement must say: of the decoder at the top, of the encoder below."""
        encoder = {"runtime": self._choices.encoder.runtime, **self._encoder_runs.info}
        return {
            "runtime": self._choices.decoder.runtime,
            **self._decoder_runs.info,
            "encoder": {**encoder, "precision": self._encoder.precision},
            "precisions": {part.part: part.precision for part in self._parts},
            "targets": {part.part: part.target for part in self._parts},
        }

    def _beside(self, name: str, chosen: PartFile) -> PartFile:
        """The part ``name`` in the precision of ``chosen`` where the bundle has it, else its first.

        Rows in a file are read without an engine, so those of another target will do as well.
        """
        manifest = self._bundle.manifest
        same = [part for part in manifest.parts if part.part == name]
        targets = [chosen.target, *(part.target for part in same if part.table is not None)]
        target = next((one for one in targets if any(part.target == one for part in same)), chosen.target)
        found = {part.precision for part in same if part.target == target}
        return manifest.part(name, target, chosen.precision if chosen.precision in found else None)

    def _open_embedding(self, part: PartFile) -> Embedding:
        """The rows as they lie in their file; an engine only where nothing says where that is."""
        if part.table is not None:
            return EmbeddingTable(self._bundle, part.table)
        return self._decoder_runs.open_embedding(self._bundle, part)


def _part(manifest: Manifest, name: str, choice: PartChoice) -> PartFile:
    """The part that the runtime of ``choice`` reads."""
    target = target_of(RUNTIMES[choice.runtime])
    return part_for(manifest, name, target=target, precision=choice.precision, runtime=choice.runtime)


def _back_end(choice: PartChoice) -> BackEnd:
    return RUNTIMES[choice.runtime](device=choice.device, threads=choice.threads)


def _check_agreement(manifest: Manifest, processor: Processor) -> None:
    """Raises IntegrityError where preprocessing, prompt, vision encoder and fusion speak of different sizes."""
    expected = manifest.num_vision_tokens
    found = processor.prompt_spec.num_vision_tokens
    if found != expected:
        raise _disagreement(manifest, f"the prompt has {found} vision tokens per image, the manifest {expected}")
    for part in manifest.parts:
        if not part.file.endswith(".onnx"):  # others may lay their tensors out in another way
            continue
        if part.part == "vision_encoder":
            _check_encoder(manifest, part, processor.image_spec)
        if part.part == "fusion":
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
    for encoder in manifest.parts:  # every precision of it may be asked to run with this fusion
        if (encoder.part, encoder.target) == ("vision_encoder", part.target):
            _check_fusion_cache(manifest, encoder, part)


def _check_fusion_cache(manifest: Manifest, encoder: PartFile, fusion: PartFile) -> None:
    given, taken = (_shapes(one).get("fusion_cache", ()) for one in (encoder, fusion))
    if not given:
        raise _disagreement(manifest, f"{fusion.file} reads a fusion_cache, which {encoder.file} does not give")
    pairs = zip(given, taken, strict=False)
    if len(given) != len(taken) or any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in pairs):
        raise _disagreement(
            manifest,
            f"{encoder.file} gives a fusion_cache of {_by(given)}, {fusion.file} takes {_by(taken) or 'none'}",
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
    return {
        "bundle": str(bundle.root),
        "bundle_sha256": sums_hash(bundle.root),
        "family": bundle.manifest.family,
    }
