"""ONNX files that another exporter wrote, in the layout of transformers.js: found, understood and copied."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from edgevlm.bundle.manifest import PARTS, PartFile, TensorSpec
from edgevlm.bundle.paths import check_name, inside
from edgevlm.core.errors import InputError, IntegrityError, UnsupportedError

SUFFIXES: Mapping[str, str] = {
    "fp32": "",
    "fp16": "_fp16",
    "int8": "_int8",
    "q8": "_quantized",
    "q4": "_q4",
}  # of transformers.js, by the name of a precision there
DECODER_PRECISIONS: Mapping[str, str] = {
    "fp32": "fp32",
    "fp16": "fp16",
    "int8": "int8-dynamic",
    "q8": "int8-dynamic",
    "q4": "int4",
}
OTHER_PRECISIONS: Mapping[str, str] = {"fp32": "fp32", "fp16": "fp16", "int8": "int8", "q8": "int8"}
FOLDERS = ("onnx", ".")
REQUIRED: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "vision_encoder": (("pixel_values",), ("image_features",)),
    "embed_tokens": (("input_ids",), ("inputs_embeds",)),
    "decoder_model_merged": (("inputs_embeds", "attention_mask", "past_key_values.0.key"), ("logits", "present.0.key")),
}
TILE_MASK = "pixel_attention_mask"  # Idefics3's: which pixels of a tile are no padding
TYPES = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.INT64: "int64",
    ir.DataType.BOOL: "bool",
}


@dataclass(frozen=True)
class ForeignGraph:
    """One part as it was found: its ``file``, what is in it, and the name of its precision there."""

    part: str
    file: Path
    precision: str
    model: ir.Model


def find_graphs(folder: Path, wishes: Mapping[str, str | None]) -> tuple[ForeignGraph, ...]:
    """The graph of each part, in the precision that ``wishes`` names for it, else the first of SUFFIXES that is there.

    Raises InputError where one is missing, UnsupportedError where a graph is another part's or of another layout.
    """
    return tuple(_find(folder, part, wishes.get(part)) for part in PARTS)


def copy_graph(graph: ForeignGraph, root: Path, image_side: int) -> PartFile:
    """Bring the graph into the bundle at ``root`` and say what it is.

    Files are copied as they are, data beside them included; only an encoder that wants Idefics3's five axes and mask is
    given an input of four.
    """
    target = root / "onnx" / f"{graph.part}{SUFFIXES[graph.precision]}.onnx"
    target.parent.mkdir(exist_ok=True)
    if graph.part == "vision_encoder" and _takes_tiles(graph.model):
        extra = _save_with_four_axes(graph, target, image_side)
    else:
        extra = _copy(graph, target)
    return PartFile(
        part=graph.part,
        target="onnx",
        precision=precisions_of(graph.part)[graph.precision],
        file=f"onnx/{target.name}",
        extra_files=tuple(f"onnx/{name}" for name in extra),
        inputs=tuple(_spec(value) for value in graph.model.graph.inputs),
        outputs=tuple(_spec(value) for value in graph.model.graph.outputs),
        cache="grown",
    )


def sizes_of(graph: ForeignGraph, name: str, num_axes: int) -> tuple[int | str, ...]:
    """The declared shape of the input or output ``name``; a free size is its own name.

    Raises UnsupportedError where it has no shape, or not so many axes.
    """
    values = {value.name: value for value in (*graph.model.graph.inputs, *graph.model.graph.outputs)}
    shape = _spec(values[name]).shape
    if len(shape) != num_axes:
        found = f"{len(shape)} axes" if shape else "no shape"
        raise UnsupportedError(
            f"{graph.file}: {name} declares {found}, expected {num_axes} axes: export it again with shapes, or add "
            "them with onnx.shape_inference"
        )
    return shape


def num_layers(graph: ForeignGraph) -> int:
    """How many layers have a kv cache."""
    names = [value.name or "" for value in graph.model.graph.inputs]
    return sum(name.startswith("past_key_values.") and name.endswith(".key") for name in names)


def precisions_of(part: str) -> Mapping[str, str]:
    """Our name for each precision that a file of ``part`` may have there."""
    return DECODER_PRECISIONS if part == "decoder_model_merged" else OTHER_PRECISIONS


def _find(folder: Path, part: str, wish: str | None) -> ForeignGraph:
    known = precisions_of(part)
    if wish is not None and wish not in known:
        raise UnsupportedError(f"no {part} of precision {wish!r} can be imported; known: {', '.join(known)}")
    for precision in known if wish is None else (wish,):
        for place in FOLDERS:
            file = folder / place / f"{part}{SUFFIXES[precision]}.onnx"
            if file.is_file():
                return _opened(part, file, precision)
    name = f"{part}{'' if wish is None else SUFFIXES[wish]}.onnx"
    raise InputError(
        f"{folder}: no {name}, neither in onnx/ nor beside config.json; expected the files of transformers.js: "
        f"{', '.join(PARTS)}"
    )


def _opened(part: str, file: Path, precision: str) -> ForeignGraph:
    try:
        model = ir.load(file)
    except Exception as error:  # protobuf's own, of many kinds
        raise IntegrityError(
            f"{file}: not an ONNX file ({' '.join(str(error).split())[:200]}); copy it again"
        ) from error
    found = ({value.name for value in model.graph.inputs}, {value.name for value in model.graph.outputs})
    for kind, names, needed in zip(("input", "output"), found, REQUIRED[part], strict=True):
        missing = [name for name in needed if name not in names]
        if missing:
            shown = ", ".join(sorted(name or "?" for name in names)[:6])
            raise UnsupportedError(f"{file}: a {part} has an {kind} {missing[0]}, this graph only {shown}")
    return ForeignGraph(part, file, precision, model)


def _copy(graph: ForeignGraph, target: Path) -> list[str]:
    """Copy the file and its data, from behind links if need be, as hubs' caches have them; the names of the latter."""
    shutil.copyfile(graph.file, target)
    names = sorted({str(tensor.location) for tensor in _tensors(graph.model) if isinstance(tensor, ir.ExternalTensor)})
    for name in names:
        source, beside = graph.file.parent / check_name(name), inside(target.parent, name)
        if not source.is_file():
            raise IntegrityError(f"{graph.file}: its data {name} is missing: copy the folder again")
        beside.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, beside)
    return names


def _tensors(model: ir.Model) -> Iterator[Any]:
    """Every weight and constant, those inside of If and Loop included."""
    graphs = [model.graph]
    for node in model.graph.all_nodes():
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                graphs.append(attribute.as_graph())
            elif attribute.type == ir.AttributeType.TENSOR:
                yield attribute.as_tensor()
    for graph in graphs:
        yield from (value.const_value for value in graph.initializers.values() if value.const_value is not None)


def _takes_tiles(model: ir.Model) -> bool:
    pixels = next(value for value in model.graph.inputs if value.name == "pixel_values")
    return pixels.shape is not None and len(pixels.shape) == 5


def _save_with_four_axes(graph: ForeignGraph, target: Path, side: int) -> list[str]:
    """Save with ``pixel_values`` (S, 3, H, W), all of whose pixels count; the names of the files beside it."""
    model = graph.model
    inputs = {value.name: value for value in model.graph.inputs}
    pixels, mask = inputs["pixel_values"], inputs.get(TILE_MASK)
    nodes = [_unsqueezed(model, pixels, side)]
    if mask is not None:
        nodes += _all_pixels(model, pixels, mask)
        model.graph.inputs.remove(mask)
    model.graph.insert_before(model.graph[0], nodes)
    external = f"{target.name}_data" if any(isinstance(one, ir.ExternalTensor) for one in _tensors(model)) else None
    ir.save(model, target, external_data=external)
    return [external] if external else []


def _unsqueezed(model: ir.Model, pixels: ir.Value, side: int) -> ir.Node:
    node = ir.Node("", "Unsqueeze", [pixels, _constant(model, "views.axis", np.array([0], np.int64))], num_outputs=1)
    tiles = node.outputs[0]
    tiles.name, tiles.shape, tiles.type = "pixel_values.tiles", pixels.shape, pixels.type
    for user, index in tuple(pixels.uses()):
        if user is not node:
            user.replace_input_with(index, tiles)
    pixels.shape = ir.Shape(["batch_size", 3, side, side])
    return node


def _all_pixels(model: ir.Model, pixels: ir.Value, mask: ir.Value) -> list[ir.Node]:
    """``mask`` (1, S, H, W) as a constant: true wherever there is a pixel."""
    shape = ir.Node("", "Shape", [pixels], num_outputs=1)
    sizes = ir.Node(
        "", "Gather", [shape.outputs[0], _constant(model, "mask.axes", np.array([0, 2, 3], np.int64))], num_outputs=1
    )
    one = _constant(model, "mask.one", np.array([1], np.int64))
    joined = ir.Node(
        "", "Concat", [one, sizes.outputs[0]], ir.convenience.convert_attributes({"axis": 0}), num_outputs=1
    )
    true = ir.tensor(np.array([True]), name="mask.true")
    filled = ir.Node(
        "", "ConstantOfShape", [joined.outputs[0]], ir.convenience.convert_attributes({"value": true}), num_outputs=1
    )
    for number, node in enumerate((shape, sizes, joined, filled)):
        node.outputs[0].name = f"{TILE_MASK}.{number}"
    ir.convenience.replace_all_uses_with(mask, filled.outputs[0])
    return [shape, sizes, joined, filled]


def _constant(model: ir.Model, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def _spec(value: ir.Value) -> TensorSpec:
    """As manifests describe tensors; a size without a name gets that of its axis."""
    shape = () if value.shape is None else tuple(value.shape)
    sizes = tuple(
        size if isinstance(size, int) else str(size.value or f"axis_{axis}") for axis, size in enumerate(shape)
    )
    dtype = TYPES.get(value.dtype, "other") if value.dtype is not None else "other"
    return TensorSpec(name=value.name or "?", dtype=dtype, shape=sizes)
