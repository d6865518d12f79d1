"""Measure a model that answers: warm-up, repetitions, memory, and everything they depend on."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from edgevlm.bench import machine
from edgevlm.bench.measurement import (
    GIVEN_IMAGES,
    HEADLINE,
    Conditions,
    Measurement,
    Memory,
    Repetition,
    Workload,
)
from edgevlm.bench.memory import watch_peak
from edgevlm.bench.workload import (
    PROMPT,
    SCENE_SEED,
    Picture,
    ask_once,
    given_pictures,
    image_name,
    num_distinct,
    scene_pictures,
    warm_up,
)
from edgevlm.bundle.manifest import PartFile
from edgevlm.bundle.read import read_bundle
from edgevlm.core.errors import BenchmarkError, UsageError
from edgevlm.processing.images import ImageSource
from edgevlm.runtimes.vlm import RuntimeVlm
from edgevlm.verify import golden_answers_match

BFLOAT16_BYTES = 2  # of a number in the cache of an engine that computes in bfloat16, whatever the file says

Check = Callable[[RuntimeVlm], "str | None"]  # the complaint about a wrong golden answer, None when it is right


def measure(
    vlm: RuntimeVlm,
    *,
    image: ImageSource | Sequence[ImageSource] | None = None,
    prompt: str | None = None,
    repetitions: int = 20,
    max_tokens: int = 32,
    check: Check | None = None,
    command: str | None = None,
    on_repetition: Callable[[], object] = lambda: None,
) -> Measurement:
    """Time ``repetitions`` answers of ``max_tokens`` tokens, after a warm-up.

    Without ``image`` every picture is a new one from the scene generator, in the model's own size.  Given
    images are asked about in turn with the image cache off, so that the vision encoder works every time;
    where they repeat, warm-up included, the regime is ``warm-given-images``.  ``check`` looks at golden
    answers first; without it those of the bundle, if ``vlm`` came from one.  ``command`` is recorded;
    ``on_repetition`` is called after every timed repetition.

    Raises BenchmarkError when the golden answer is wrong or a picture came from the cache, InputError for an
    image or a prompt that cannot be used.
    """
    if repetitions < 1:
        raise UsageError(f"repetitions must be 1 or more, got {repetitions}")
    command, images = command or shlex.join(sys.argv), _as_sequence(image)
    work = _workload(vlm, images, PROMPT if prompt is None else prompt, repetitions, max_tokens)
    pictures = given_pictures(images) if images else scene_pictures(_native_size(vlm))
    started, golden = datetime.now(timezone.utc), _check_golden(vlm, check or _check_of(vlm))
    warm = warm_up(lambda: ask_once(vlm, work, next(pictures)))
    clocks_before = machine.clocks_mhz()
    with machine.watch_other_load() as load:
        timed = tuple(_timed(vlm, work, pictures, repetitions, on_repetition))
    surroundings = _Surroundings(started, golden, clocks_before, machine.clocks_mhz(), load.share)
    return Measurement(
        workload=replace(work, regime=_regime(images, warm.num_repetitions + repetitions)),
        warm_up=warm,
        memory=_memory(vlm, lambda: ask_once(vlm, work, next(pictures))),
        conditions=_conditions(vlm, command, surroundings),
        repetitions=timed,
    )


@dataclass(frozen=True)
class _Surroundings:
    """What was seen around the timed repetitions, and cannot be asked for afterwards."""

    started: datetime
    golden: str
    clocks_mhz_before: tuple[float, ...]
    clocks_mhz_after: tuple[float, ...]
    other_load: float | None


def _conditions(vlm: RuntimeVlm, command: str, seen: _Surroundings) -> Conditions:
    return Conditions(
        started=seen.started.isoformat(timespec="seconds"),
        command=command,
        model=vlm.name,
        golden=seen.golden,
        bundle_sha256=vlm.info.get("bundle_sha256"),
        runtime={key: value for key, value in vlm.info.items() if key != "bundle_sha256"},
        device=machine.device(),
        versions=machine.versions(),
        clocks_mhz_before=seen.clocks_mhz_before,
        clocks_mhz_after=seen.clocks_mhz_after,
        other_load=seen.other_load,
    )


def _regime(images: Sequence[ImageSource], num_answers: int) -> str:
    """Given images are new ones only where no answer, warm-up included, sees one for a second time."""
    return HEADLINE if not images or num_distinct(images) >= num_answers else GIVEN_IMAGES


def _as_sequence(image: ImageSource | Sequence[ImageSource] | None) -> list[ImageSource]:
    if image is None:
        return []
    return list(image) if isinstance(image, (list, tuple)) else [image]  # type: ignore[list-item]


def _workload(
    vlm: RuntimeVlm, images: Sequence[ImageSource], prompt: str, repetitions: int, max_tokens: int
) -> Workload:
    if images:
        origin = ", ".join(image_name(one, i) for i, one in enumerate(images)) + ", image cache off"
        distinct = num_distinct(images)
    else:
        size = _native_size(vlm)
        origin = f"scene generator, seed {SCENE_SEED}, {size} x {size} PNG"
        distinct = repetitions
    return Workload(
        prompt=prompt,
        images=origin,
        num_distinct_images=min(distinct, repetitions),
        image_cache=not images,
        num_new_tokens=max_tokens,
    )


def _native_size(vlm: RuntimeVlm) -> int:
    return max(vlm.processor.image_spec.height, vlm.processor.image_spec.width)


def _check_of(vlm: RuntimeVlm) -> Check | None:
    return golden_answers_match if vlm.info.get("bundle") else None


def _check_golden(vlm: RuntimeVlm, check: Check | None) -> str:
    if check is None:
        return "not checked"
    complaint = check(vlm)
    if complaint is not None:
        raise BenchmarkError(f"{vlm.name} does not give its golden answer, so its speed means nothing: {complaint}")
    return "matched"


def _timed(
    vlm: RuntimeVlm,
    work: Workload,
    pictures: Iterator[Picture],
    repetitions: int,
    on_repetition: Callable[[], object],
) -> Iterator[Repetition]:
    """The repetitions; their pictures are drawn beforehand, to leave the machine alone between them."""
    for picture in list(islice(pictures, repetitions)):
        one = ask_once(vlm, work, picture)
        if one.image_from_cache:
            raise BenchmarkError(f"{picture.name} came from the image cache, so it was not a new image")
        if one.num_new_tokens == 0:
            raise BenchmarkError(f"the answer about {picture.name} is empty, so there is nothing to time")
        on_repetition()
        yield one


def _memory(vlm: RuntimeVlm, ask: Callable[[], object]) -> Memory:
    """The peak during one more answer, which is not timed."""
    with watch_peak() as peak:
        ask()
    weights, cache = accounted_bytes(vlm.info)
    return Memory(
        kind=peak.kind,
        peak_bytes=peak.peak_bytes,
        num_samples=peak.num_samples,
        weights_bytes=weights,
        cache_bytes=cache,
    )


def accounted_bytes(info: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Bytes of the files that were opened and of a full kv cache, by the manifest; ``info`` is that of the model."""
    if info.get("bundle") is None:
        return None, None
    manifest = read_bundle(Path(info["bundle"]), check=False).manifest
    targets = info.get("targets", {})
    parts = {name: manifest.part(name, targets.get(name, "onnx"), one) for name, one in info["precisions"].items()}
    files = {name for part in parts.values() for name in _opened_files(part)}
    shape, number = manifest.decoder, _cache_number_bytes(parts["decoder_model_merged"], info)
    numbers = 2 * shape.num_layers * shape.num_key_value_heads * manifest.max_context * shape.head_size
    return sum(manifest.file_bytes.get(name, 0) for name in files), numbers * number


def _opened_files(part: PartFile) -> tuple[str, ...]:
    """Rows that lie in a file of their own are looked up there, without the graph."""
    return part.files if part.table is None else (part.table.file,)


def _cache_number_bytes(decoder: PartFile, info: Mapping[str, Any]) -> int:
    if info.get("computes_in") == "bf16":
        return BFLOAT16_BYTES
    kinds = {tensor.dtype for tensor in decoder.inputs if tensor.name.startswith("past_key_values.")}
    return max(BFLOAT16_BYTES if kind == "bfloat16" else np.dtype(kind).itemsize for kind in kinds or {"float32"})
