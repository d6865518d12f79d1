"""Does a build take the memory that EdgeVLM predicts?  Predicted beside measured, for TensorRT-RTX's builder.

    python bench/tensorrt_build_memory.py [FILE] [--small]

Writes random FastViTHD encoders and decoders of Qwen2-0.5B's shape, builds each ahead of time on this machine's CPU,
one process a build, and notes the most resident memory during it.  What the process held when the libraries were
loaded counts: the prediction speaks of the whole build.  FILE is bench/results/tensorrt_build_memory.json by default;
``--small`` takes a decoder of four layers alone.  Needs the two packages of tests/rtx/builder.py, and 10 GB of memory
without ``--small``.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgevlm.bench.machine import device
from edgevlm.bundle.manifest import PartFile
from edgevlm.core.config import to_json
from edgevlm.core.files import write_text
from edgevlm.export.engine_profiles import recipe_of
from edgevlm.export.parts import split
from edgevlm.export.target import Extras, Lowering
from edgevlm.export.to_tensorrt import TensorRtTarget
from edgevlm.models.vlm import Vlm
from edgevlm.quant.decoder import quantize_decoder
from edgevlm.runtimes.trt.memory import Work, predicted_build
from edgevlm.shapes.config import DecoderConfig, FastVitConfig, MlpConfig, VlmConfig

HERE = Path(__file__).resolve().parent
CONTEXT = 2048
MIB = 1 << 20
QWEN2 = DecoderConfig(
    vocab_size=151_936,
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=32_768,
    attention_bias=True,
)
SMALL = replace(QWEN2, vocab_size=32_000, num_hidden_layers=4)
ROUNDED = ("int4-b128-rtn",)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One build: what lies in its files, in its engine, in memory at most, and what was predicted, in MiB."""

    graph: str
    precision: str
    num_profiles: int
    weights_mib: int
    engine_mib: int
    predicted_mib: int
    peak_mib: int
    seconds: float


def main(file: Path, *, small: bool) -> None:
    """Build all, print a line for each, and keep them in ``file``."""
    harness = load_harness()
    if reason := harness.missing():
        sys.exit(reason)
    with tempfile.TemporaryDirectory(prefix="edgevlm-rtx-") as folder:
        libraries = Path(folder) / "libraries"
        libraries.mkdir()
        builder = harness.assemble(libraries)
        rows = list(show(measured(builder, Path(folder), small=small)))
    record = {"machine": device(), "packages": harness.PACKAGES, "builds": rows}
    write_text(file, to_json(record))


def load_harness() -> Any:
    """tests/rtx/builder.py, which belongs to no package."""
    name = "edgevlm_rtx_builder"
    spec = importlib.util.spec_from_file_location(name, HERE.parent / "tests/rtx/builder.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def measured(builder: Any, folder: Path, *, small: bool) -> Iterator[Row]:
    """A row for every graph and for every number of profiles that `edgevlm build` may choose."""
    for side in () if small else (256, 512, 1024):
        model = model_of(FastVitConfig(image_size=side), SMALL)
        file = lower(model, "vision_encoder", "fp16", folder)
        yield from builds(builder, folder, file, f"FastViTHD, {side} pixels", (1, 2, 4))
    for precision in ("fp16", "int4-b128-rtn"):
        model = model_of(FastVitConfig(depths=(1,) * 5, widths=(32,) * 5), SMALL if small else QWEN2)
        file = lower(model, "decoder_model_merged", precision, folder)
        del model
        shape = "four layers of Qwen2-0.5B" if small else "Qwen2-0.5B"
        yield from builds(builder, folder, file, f"{shape}, rows, prefill alone", (1,), only="prefill")
        yield from builds(builder, folder, file, f"{shape}, rows", (1, 4))
        yield from builds(builder, folder, file, f"{shape}, in place", (1,), in_place=True)


def model_of(vision: FastVitConfig, decoder: DecoderConfig) -> Vlm:
    """A model of random weights."""
    model = Vlm(VlmConfig(vision=vision, projector=MlpConfig(), decoder=decoder))
    model.initialize(0)
    return model


def lower(model: Vlm, name: str, precision: str, folder: Path) -> PartFile:
    """One part in one precision, below ``folder``."""
    quantized = quantize_decoder(model, precision, target="tensorrt") if precision in ROUNDED else None
    part = next(part for part in split(model) if part.name == name)
    return TensorRtTarget(Lowering()).lower(part, folder, precision, Extras(max_context=CONTEXT, quantized=quantized))


def builds(
    builder: Any,
    folder: Path,
    file: PartFile,
    graph: str,
    batches: Sequence[int],
    *,
    in_place: bool = False,
    only: str = "",
) -> Iterator[Row]:
    """One build for the profiles up to each of ``batches``, or for the one named ``only``."""
    path = folder / (file.in_place if in_place else file.file)
    sizes = [path.stat().st_size, *((folder / name).stat().st_size for name in file.files if name.endswith("_data"))]
    profiles = recipe_of([file], CONTEXT, ()).of(file.part, in_place=in_place).profiles
    for batch in batches:
        chosen = [profile for profile in profiles if profile.name == only or not only]
        shapes = [profile.shapes for profile in chosen if largest_batch(profile.shapes, file) <= batch]
        outcome = builder.build(path, shapes)
        assert not outcome.error, outcome.error
        yield Row(
            graph=graph,
            precision=file.precision,
            num_profiles=len(shapes),
            weights_mib=sum(sizes) // MIB,
            engine_mib=outcome.engine_bytes // MIB,
            predicted_mib=predicted_mib(file, sum(sizes), len(shapes)),
            peak_mib=outcome.peak_bytes // MIB,
            seconds=outcome.seconds,
        )


def predicted_mib(file: PartFile, weight_bytes: int, num_profiles: int) -> int:
    """What `edgevlm build` would say of the host's memory."""
    work = Work(
        part=file.part,
        precision=file.precision,
        weight_bytes=weight_bytes,
        num_profiles=num_profiles,
        ahead_of_time=True,
    )
    return predicted_build(work).host_bytes // MIB


def largest_batch(shapes: Mapping[str, Sequence[Sequence[int]]], file: PartFile) -> int:
    """Pictures or sequences at once in a profile."""
    return shapes[file.inputs[0].name][2][0]


def show(rows: Iterator[Row]) -> Iterator[Row]:
    """The rows, printed as they come."""
    print(
        f"{'graph':34}{'precision':>15}{'profiles':>10}{'weights':>9}{'engine':>8}{'predicted':>11}{'peak':>7}{'s':>8}"
    )
    for row in rows:
        print(
            f"{row.graph:34}{row.precision:>15}{row.num_profiles:>10}{row.weights_mib:>9}{row.engine_mib:>8}"
            f"{row.predicted_mib:>11}{row.peak_mib:>7}{row.seconds:>8.1f}",
            flush=True,
        )
        yield row


if __name__ == "__main__":
    names = [argument for argument in sys.argv[1:] if argument != "--small"]
    target = Path(names[0]) if names else HERE / "results"
    main(target / "tensorrt_build_memory.json", small="--small" in sys.argv)
