"""ONNX in the layout and with the tensor names that transformers.js and ONNX Runtime GenAI use."""

from __future__ import annotations

import contextlib
import io
import logging
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor

from edgevlm.bundle.manifest import PartFile, TensorSpec
from edgevlm.core.errors import UnsupportedError
from edgevlm.export.clean_graph import clean
from edgevlm.export.decoder_graph import DTYPES, Writing, decoder_graph
from edgevlm.export.embedding_graph import TABLE, embedding_graph
from edgevlm.export.encoder_int8 import quantize_static
from edgevlm.export.free_views import take_views
from edgevlm.export.half_graph import to_half
from edgevlm.export.parts import Part, traced_module
from edgevlm.export.storage import row_table, save_graph, store_half
from edgevlm.export.target import Extras, Lowering

OPSET = 21
USUAL_SUFFIXES = {"fp32": "", "fp16": "_fp16", "int8": "_int8", "int8-dynamic": "_quantized", "int4": "_q4"}
FLOATS = ("fp32", "fp16")
READ_IN_VIEWS = ("idefics3", "smolvlm")  # whose processors hand over (B, S, 3, H, W)


class OnnxTarget:
    """One ``onnx/<part><suffix>.onnx`` per part and precision.

    With ``half_storage`` weights of an fp32 graph that float16 holds exactly are stored so: half the file, the same
    numbers, since the runtime widens them once when it loads.
    """

    def __init__(self, lowering: Lowering) -> None:
        self.lowering = lowering

    def lower(self, part: Part, root: Path, precision: str = "fp32", extras: Extras | None = None) -> PartFile:
        """Write the part's graph and say what it is.

        Raises UnsupportedError for a precision that the part cannot have.
        """
        extras = extras or Extras()
        graph = self._graph(part, precision, extras)
        strip_notes(graph)
        is_table = part.name == "embed_tokens"
        name = f"{part.name}{self._suffix(part, precision, extras)}.onnx"
        beside = save_graph(graph, root / "onnx" / name, external=True if is_table else None)
        return PartFile(
            part=part.name,
            target="onnx",
            precision=precision,
            file=f"onnx/{name}",
            extra_files=tuple(f"onnx/{other}" for other in beside),
            inputs=as_written(part.inputs, graph.graph.inputs),
            outputs=as_written(part.outputs, graph.graph.outputs),
            cache="grown" if self._is_plain(part) else "shared",
            table=row_table(root, f"onnx/{name}", TABLE) if is_table else None,
        )

    def _graph(self, part: Part, precision: str, extras: Extras) -> ir.Model:
        half_storage = self.lowering.half_storage and precision == "fp32"
        if part.name == "decoder_model_merged":
            return self._decoder(part, precision, extras, half_storage)
        if part.name == "embed_tokens":
            _check_precision(part, precision, FLOATS)
            return embedding_graph(part, half=precision == "fp16", half_storage=half_storage)
        _check_precision(part, precision, (*FLOATS, "int8"))
        graph = traced_graph(part)
        clean(graph)
        if part.name == "vision_encoder" and part.model.config.model_type in READ_IN_VIEWS:
            take_views(graph)
        if precision == "fp16":
            to_half(graph)
        elif precision == "int8":
            quantize_static(graph, extras.calibration or ())
        elif half_storage:
            store_half(graph)
        return graph

    def _decoder(self, part: Part, precision: str, extras: Extras, half_storage: bool) -> ir.Model:
        if precision in FLOATS:
            half = precision == "fp16"
            writing = Writing(plain=self.lowering.plain, half=half, half_storage=half_storage)
            graph = decoder_graph(part, writing)
            if half:
                to_half(graph)
            return graph
        if extras.quantized is None:
            raise UnsupportedError(
                f"{part.name} in {precision} needs codes, which edgevlm.quant makes: none were given"
            )
        assert extras.quantized.precision == precision, f"{precision} from codes of {extras.quantized.precision}"
        return decoder_graph(part, Writing(quantized=extras.quantized.weights, plain=self.lowering.plain))

    def _suffix(self, part: Part, precision: str, extras: Extras) -> str:
        usual = USUAL_SUFFIXES[precision.split("-b")[0]]
        chosen = usual if extras.suffix is None else extras.suffix
        return f"{chosen}_plain" if self._is_plain(part) else chosen

    def _is_plain(self, part: Part) -> bool:
        return self.lowering.plain and part.name == "decoder_model_merged"


def _check_precision(part: Part, precision: str, known: Sequence[str]) -> None:
    if precision not in known:
        raise UnsupportedError(f"{part.name} cannot be exported in {precision!r}; it can in {', '.join(known)}")


def as_written(specs: Sequence[TensorSpec], values: Sequence[ir.Value]) -> tuple[TensorSpec, ...]:
    """``specs`` with the element types that the graph has by now."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    found = {value.name: names[value.dtype] for value in values if value.dtype is not None}
    return tuple(replace(spec, dtype=found[spec.name]) for spec in specs)


def traced_graph(part: Part) -> ir.Model:
    """The part as ``torch.onnx`` sees it, with the part's own names and free sizes."""
    example = tuple(_example(spec, part.examples) for spec in part.inputs)
    free = tuple(
        {axis: torch.export.Dim.DYNAMIC for axis, size in enumerate(spec.shape) if isinstance(size, str)}
        for spec in part.inputs
    )
    try:
        with _quiet():
            program = torch.onnx.export(
                traced_module(part).eval(),
                example,
                input_names=[spec.name for spec in part.inputs],
                output_names=[spec.name for spec in part.outputs],
                dynamic_shapes=free,
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
    except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
        reason = textwrap.shorten(str(error.__cause__ or error), 300, placeholder=" ...")
        raise UnsupportedError(f"{part.name}: PyTorch cannot export it to ONNX: {reason}") from error
    assert program is not None
    _name_free_sizes(program.model, part)
    return program.model


def strip_notes(model: ir.Model) -> None:
    """Drop what the tracer noted for its own developers: stack traces with this machine's paths."""
    graph = model.graph
    for thing in (model, graph, *graph, *graph.inputs, *graph.outputs, *graph.initializers.values()):
        thing.metadata_props.clear()
        thing.doc_string = None


def _example(spec: TensorSpec, sizes: Mapping[str, int]) -> Tensor:
    """Zeros, with 2 for a free size that ``sizes`` does not know: the tracer takes 1 for a constant."""
    shape = [size if isinstance(size, int) else sizes.get(size, 2) for size in spec.shape]
    return torch.zeros(shape, dtype=torch.int64 if spec.dtype == "int64" else torch.float32)


def _name_free_sizes(model: ir.Model, part: Part) -> None:
    """Give free sizes the names that the part declares instead of the tracer's own."""
    specs = {spec.name: spec for spec in (*part.inputs, *part.outputs)}
    for value in (*model.graph.inputs, *model.graph.outputs):
        assert value.name is not None
        value.shape = ir.Shape(list(specs[value.name].shape))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports its steps on stdout and warns of libraries that are not needed."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
