"""Everything in a bundle that needs PyTorch: the reference, and each part in each precision."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from edgevlm.bundle.manifest import SCHEMA_VERSION, DecoderShape, ImageSize, Manifest, PartFile
from edgevlm.bundle.recipe import write_recipe
from edgevlm.bundle.write import write_manifest, write_sums
from edgevlm.core.config import to_plain
from edgevlm.export.calibration import calibration_pixels
from edgevlm.export.engine_profiles import recipe_of
from edgevlm.export.heads import cache_head_size
from edgevlm.export.heard import Feeds, Heard, listen
from edgevlm.export.parts import Part, check_free_sizes, split
from edgevlm.export.precisions import Precisions, suffixes
from edgevlm.export.provenance import Calibration, provenance
from edgevlm.export.references import keep_activations, unfused_encoder
from edgevlm.export.target import Extras, Lowering, Target
from edgevlm.export.texts import write_texts
from edgevlm.export.typed_ops import typed_part
from edgevlm.families.licence import Licence, read_licence
from edgevlm.models.as_session import TorchSession, fusion_shape
from edgevlm.models.changes import Changes
from edgevlm.models.checkpoint import Checkpoint
from edgevlm.models.vlm import Vlm
from edgevlm.quant.calibration import calibration_samples, importance
from edgevlm.quant.decoder import QuantizedDecoder, quantize_decoder
from edgevlm.quant.fake import fake_quantized
from edgevlm.quant.schemes import Static
from edgevlm.shapes.config import VlmConfig
from edgevlm.shapes.resize import at_image_size
from edgevlm.verify import golden

logger = logging.getLogger(__name__)

Report: TypeAlias = Callable[[str], None]
ROUNDED_ENCODERS = ("int8", "fp8")
LONG_CONTEXT = 4096  # rows; a longer kv cache is worth a word
FEW_SAMPLES = 8  # to see what overflows float16, with a margin
PARTS = ("vision_encoder", "fusion", "embed_tokens", "decoder_model_merged")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is made of a checkpoint.

    ``image_sizes``: pixels a side, where one encoder is to serve several; the first is the checkpoint's.
    """

    target: Target
    lowering: Lowering
    precisions: Precisions
    calibration: Calibration
    report: Report
    image_sizes: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False, kw_only=True)
class Work:
    """A checkpoint on its way into the folder ``root``.

    ``importance``: of each matrix's inputs, for decoders that choose their scales.  ``pixels``: pictures by which an
    encoder finds its ranges.  ``heard``: what each part reads, for graphs that are typed.  ``recording``: what PyTorch
    computes, to which every rounding adds its own reference.
    """

    checkpoint: Checkpoint
    plan: Plan
    root: Path
    recording: golden.Recording
    importance: Mapping[str, Tensor] | None
    pixels: list[NDArray[np.float32]] | None
    heard: Heard | None

    def lower(self, part: Part) -> Iterator[PartFile]:
        """The part in every precision."""
        lower = self._decoder if part.name == "decoder_model_merged" else self._traced
        for precision in self.plan.precisions.of(part.name):
            self.plan.report(step_name(part.name, precision))
            yield lower(part, precision)

    def _traced(self, part: Part, precision: str) -> PartFile:
        """An encoder, its fusion, or the embedding."""
        rounds = part.name == "vision_encoder" and precision in ROUNDED_ENCODERS
        extras = Extras(calibration=self.pixels if rounds else None, feeds=self._feeds(part))
        file = self.plan.target.lower(part, self.root, precision, extras)
        if rounds:
            self.recording.add_encoder(precision, unfused_encoder(self.root, file))
        return file

    def _decoder(self, part: Part, precision: str) -> PartFile:
        """One copy of the weights at a time: codes, packed and then kept only as the reference's weights."""
        static = isinstance(self.plan.precisions.schemes.get(precision), Static)
        scales = dict[str, float]()
        quantized = None if static else self._quantized(precision)
        extras = Extras(
            quantized=quantized,
            suffix=suffixes(self.plan.precisions.decoder)[precision],
            feeds=self._feeds(typed_part(part)),
            max_context=self.checkpoint.max_context,
            tell_scales=scales.update,
        )
        file = self.plan.target.lower(part, self.root, precision, extras)
        if static:  # codes are written by the ranges that lowering finds; the reference rounds by the same
            quantized = self._quantized(precision, scales)
        if quantized is not None:
            reference = fake_quantized(self.checkpoint.model, quantized)
            del quantized, extras  # as many bytes as there are weights
            self.recording.add_decoder(precision, self._session(reference))
            self.recording.add_decoder(golden.unrounded(precision), self._session(keep_activations(reference)))
        return file

    def _feeds(self, part: Part) -> Sequence[Feeds]:
        return () if self.heard is None else self.heard.feeds(part)

    def _session(self, model: Vlm) -> TorchSession:
        return TorchSession(model, max_context=self.checkpoint.max_context or None)

    def _quantized(self, precision: str, scales: Mapping[str, float] | None = None) -> QuantizedDecoder | None:
        """The decoder's codes; ``scales`` are those of activations that are rounded by scales found once."""
        if precision not in self.plan.precisions.schemes:
            return None
        step = step_name("decoder_model_merged", precision)

        def report(done: int, total: int) -> None:
            self.plan.report(f"{step}: {done / total:.0%}")

        return quantize_decoder(
            self.checkpoint.model,
            precision,
            target=self.plan.precisions.target,
            importance=self.importance,
            input_scales=scales,
            report=report,
        )


def step_name(part: str, precision: str) -> str:
    """What a step of an export is called: the part, and its precision where it is no plain float32."""
    return part if precision == "fp32" else f"{part} {precision}"


def step_names(precisions: Precisions) -> tuple[str, ...]:
    """Every step that ``write_bundle`` may report, in order."""
    lowered = (step_name(part, precision) for part in PARTS for precision in precisions.of(part))
    return ("golden", *(["calibrate"] if precisions.calibrates else []), *lowered)


def check_image_sizes(config: VlmConfig, sides: Sequence[int]) -> None:
    """Raise UnsupportedError unless one encoder can serve pictures of all ``sides``, in pixels; none need it."""
    for side in sides:
        at_image_size(config, side)
    if sides:
        check_free_sizes(config)


def write_bundle(checkpoint: Checkpoint, plan: Plan, root: Path) -> None:
    """Write texts, graphs, manifest and ``golden/`` into ``root``; afterwards the checkpoint has no weights."""
    licence = read_licence(checkpoint.folder)
    _tell(checkpoint, licence)
    if plan.precisions.is_typed and checkpoint.max_context > LONG_CONTEXT:
        _tell_of_context(checkpoint)
    plan.report("golden")
    num_scenes = golden.TASK_SCENES if plan.precisions.is_exact else golden.MANY_SCENES
    sized = [checkpoint, *(_resized(checkpoint, side) for side in plan.image_sizes[1:])]
    others = (other.open() for other in sized[1:])
    recording = golden.recorded(checkpoint.open(), checkpoint.suite, num_scenes=num_scenes, others=others)
    parts = split(checkpoint.model, static_batch=plan.lowering.static_batch, free_sizes=bool(plan.image_sizes))
    work = _calibrated(sized, plan, root, recording)
    files = [file for part in parts for file in work.lower(part)]
    write_texts(checkpoint, root, licence, files)
    if plan.precisions.is_typed:
        write_recipe(root, recipe_of(files, checkpoint.max_context, plan.image_sizes))
    write_manifest(root, replace(_manifest(checkpoint, files, plan, licence), image_sizes=_image_sizes(sized)))
    recording.save(root)
    write_sums(root)
    _release(checkpoint.model, *(part.model for part in parts))


def _resized(checkpoint: Checkpoint, side: int) -> Checkpoint:
    """The same model, whose encoder takes any size, behind preprocessing and prompts for ``side`` pixels."""
    config = at_image_size(checkpoint.model.config, side)
    return replace(checkpoint, processor=Changes(image_size=side).of_processor(checkpoint.processor, config))


def _image_sizes(sized: Sequence[Checkpoint]) -> tuple[ImageSize, ...]:
    """What the manifest says of them; nothing of a single one."""
    sizes = [(one.processor.image_spec.height, one.processor.prompt_spec.num_vision_tokens) for one in sized]
    found = tuple(ImageSize(image_size=side, num_vision_tokens=num) for side, num in sizes)
    return found if len(found) > 1 else ()


def _calibrated(sized: Sequence[Checkpoint], plan: Plan, root: Path, recording: golden.Recording) -> Work:
    """The work, with what roundings are fitted to, where some are: an encoder to pictures of every size."""
    checkpoint, precisions, calibration = sized[0], plan.precisions, plan.calibration
    if precisions.calibrates:
        plan.report("calibrate")
    pixels = heard = None
    if precisions.rounds_encoder or precisions.listens:
        source = (calibration.folder, _num_heard(plan), calibration.seed)
        pixels = [pixels for one in sized for pixels in calibration_pixels(one.processor, *source)]

    def report(done: int, total: int) -> None:
        plan.report(f"calibrate: {done} of {total}")

    if precisions.listens:
        samples = calibration_samples(calibration.folder, _num_heard(plan), calibration.seed)
        heard = listen(checkpoint, samples, pixels or (), report)
    counts = None
    if precisions.search:
        samples = calibration_samples(calibration.folder, calibration.num_samples, calibration.seed)
        counts = importance(checkpoint, samples, report=report)
    return Work(
        checkpoint=checkpoint,
        plan=plan,
        root=root,
        recording=recording,
        importance=counts,
        pixels=pixels,
        heard=heard,
    )


def _num_heard(plan: Plan) -> int:
    """How many pictures the ranges of values are looked up on: where none of them is rounded by, a few will do."""
    num = plan.calibration.num_samples
    return num if plan.precisions.rounds_encoder or plan.precisions.rounds_activations else min(num, FEW_SAMPLES)


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


def _tell_of_context(checkpoint: Checkpoint) -> None:
    """The whole kv cache is set aside on the device, and engines are built for the scores over all of it."""
    decoder, rows = checkpoint.model.config.decoder, checkpoint.max_context
    row_bytes = 2 * 2 * decoder.num_hidden_layers * decoder.num_key_value_heads * cache_head_size(decoder)
    logger.info(
        "a context of %s rows: in float16 its kv cache takes up to %.0f MB on the device, and the scores of a prompt "
        "grow with it; --max-context %d takes %.0f MB",
        *(f"{rows:,}", rows * row_bytes / 1e6, LONG_CONTEXT, LONG_CONTEXT * row_bytes / 1e6),
    )


def _manifest(checkpoint: Checkpoint, parts: list[PartFile], plan: Plan, licence: Licence | None) -> Manifest:
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
        provenance=provenance(checkpoint, licence, plan.precisions, plan.calibration),
    )
