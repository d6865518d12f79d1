"""ONNX in the layout and with the tensor names that transformers.js and ONNX Runtime GenAI use."""

from __future__ import annotations

import contextlib
import io
import logging
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from edgevlm.bundle.manifest import PartFile
from edgevlm.core.errors import UnsupportedError
from edgevlm.export.decoder_graph import OPSETS, decoder_graph
from edgevlm.export.parts import Part, traced_module
from edgevlm.export.target import Lowering

EXTERNAL_ABOVE_BYTES = 1 << 30  # one protobuf file ends at 2 GiB; large weights go to a file beside it


class OnnxTarget:
    """One ``onnx/<part>.onnx`` per part, in float32.

    With ``half_storage`` weights that float16 holds exactly are stored so: half the file, the same numbers,
    since the runtime widens them once when it loads.
    """

    def __init__(self, lowering: Lowering) -> None:
        self.lowering = lowering

    def lower(self, part: Part, root: Path) -> PartFile:
        """Write the part's graph and say what it is."""
        graph = decoder_graph(part) if part.name == "decoder_model_merged" else traced_graph(part)
        strip_notes(graph)
        if self.lowering.half_storage:
            store_half(graph)
        (root / "onnx").mkdir(exist_ok=True)
        path = root / "onnx" / f"{part.name}.onnx"
        external = f"{path.name}_data" if _num_bytes(graph) > EXTERNAL_ABOVE_BYTES else None
        ir.save(graph, path, external_data=external)
        return PartFile(
            part=part.name,
            target="onnx",
            precision="fp32",
            file=f"onnx/{path.name}",
            extra_files=(f"onnx/{external}",) if external else (),
            inputs=tuple(part.inputs),
            outputs=tuple(part.outputs),
        )


def traced_graph(part: Part) -> ir.Model:
    """The part as ``torch.onnx`` sees it, with the part's own names and free sizes."""
    example = tuple(_example(spec.shape, spec.dtype) for spec in part.inputs)
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
                opset_version=OPSETS[""],
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


def store_half(model: ir.Model) -> None:
    """Keep every float32 weight that float16 holds exactly as float16, followed by a Cast."""
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < 64:
            continue
        wide = tensor.numpy()
        with np.errstate(over="ignore"):
            narrow = wide.astype(np.float16)
        if np.array_equal(narrow.astype(np.float32), wide):
            _replace_by_cast(model.graph, value, narrow, name)


def _replace_by_cast(graph: ir.Graph, value: ir.Value, narrow: np.ndarray, name: str) -> None:
    tensor = ir.tensor(narrow, name=f"{name}.half")
    stored = ir.Value(
        name=tensor.name, shape=ir.Shape(narrow.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    attributes = ir.convenience.convert_attributes({"to": int(ir.DataType.FLOAT)})
    cast = ir.Node("", "Cast", [stored], attributes, num_outputs=1, name=f"node.{name}.widen")
    cast.outputs[0].name, cast.outputs[0].shape, cast.outputs[0].type = (
        f"{name}.wide",
        value.shape,
        value.type,
    )
    ir.convenience.replace_all_uses_with(value, cast.outputs[0])
    del graph.initializers[name]
    graph.register_initializer(stored)
    graph.insert_before(graph[0], cast)


def _example(shape: tuple[int | str, ...], dtype: str) -> Tensor:
    """A tensor of 2 wherever the size is free: the tracer takes 1 for a constant."""
    sizes = [size if isinstance(size, int) else 2 for size in shape]
    return torch.zeros(sizes, dtype=torch.int64 if dtype == "int64" else torch.float32)


def _name_free_sizes(model: ir.Model, part: Part) -> None:
    """Give free sizes the names that the part declares instead of the tracer's own."""
    specs = {spec.name: spec for spec in (*part.inputs, *part.outputs)}
    for value in (*model.graph.inputs, *model.graph.outputs):
        assert value.name is not None
        value.shape = ir.Shape(list(specs[value.name].shape))


def _num_bytes(model: ir.Model) -> int:
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports its steps on stdout and warns of libraries that are not needed."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
