"""A bundle for TensorRT of a few kilobytes: graphs that run, but are no model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgevlm.bundle.golden import save_golden
from edgevlm.bundle.manifest import DecoderShape, Manifest, PartFile, RowTable, TensorSpec
from edgevlm.bundle.recipe import PartRecipe, Profile, Recipe, write_recipe
from edgevlm.bundle.write import write_manifest, write_sums

CONTEXT, WIDTH, VOCABULARY = 16, 4, 8
DECODER = "tensorrt/decoder_model_merged"
CACHE = ("past_key_values.0.key", "past_key_values.0.value")


def write_trt_bundle(
    root: Path, *, encoders: tuple[str, ...] = ("fp16",), decoders: tuple[str, ...] = ("fp16",)
) -> Path:
    """Write the bundle into the folder ``root``; every precision has the same graph, in a file of its own."""
    (root / "tensorrt").mkdir(parents=True)
    parts = [_encoder(root, precision) for precision in encoders]
    parts += [_table(root), *(_decoder(root, precision) for precision in decoders)]
    write_recipe(root, _recipe())
    (root / "tokenizer.json").write_text("{}", encoding="utf-8")
    save_golden(root, {"pixel_values": np.zeros((1, 3, 2, 2), np.float32)}, {"prompt": "how many?"})
    manifest = Manifest(
        name="tiny",
        family="test",
        parts=tuple(parts),
        image={"height": 2, "width": 2, "fit": "pad"},
        prompt={"image_token": "<image>"},
        num_vision_tokens=4,
        decoder=DecoderShape(1, 1, 2, WIDTH, VOCABULARY),
        max_context=CONTEXT,
    )
    write_manifest(root, manifest)
    write_sums(root)
    return root


def _recipe() -> Recipe:
    def encoder(batch: int) -> Profile:
        shape = (batch, 3, 2, 2)
        return Profile(name=f"batch-{batch}", shapes={"pixel_values": ((1, 3, 2, 2), shape, shape)})

    def decoder(name: str, batch: int, longest: int, least_past: int) -> Profile:
        shapes = {
            "inputs_embeds": ((1, 1, WIDTH), (batch, longest, WIDTH), (batch, longest, WIDTH)),
            "write_indices": ((1,), (batch,), (batch,)),
        }
        cache = ((1, 1, least_past, 2), (batch, 1, CONTEXT, 2), (batch, 1, CONTEXT, 2))
        return Profile(name=name, shapes=shapes | dict.fromkeys(CACHE, cache))

    def profiles(least_past: int) -> PartRecipe:
        sizes = (("decode", 1, 1), ("prefill", 1, CONTEXT), ("decode-batch-2", 2, 1))
        return PartRecipe(profiles=tuple(decoder(name, batch, longest, least_past) for name, batch, longest in sizes))

    return Recipe(
        max_context=CONTEXT,
        parts={
            "vision_encoder": PartRecipe(profiles=(encoder(1), encoder(2), encoder(4))),
            "decoder_model_merged": profiles(1),
        },
        in_place={"decoder_model_merged": profiles(CONTEXT)},
    )


def _encoder(root: Path, precision: str) -> PartFile:
    inputs, outputs = [("pixel_values", ["batch_size", 3, 2, 2])], [("image_features", ["batch_size", 4, 3])]
    nodes = [
        helper.make_node("Reshape", ["pixel_values", "shape"], ["flat"]),
        helper.make_node("Transpose", ["flat"], ["image_features"], perm=[0, 2, 1]),
    ]
    shape = numpy_helper.from_array(np.array([0, 3, 4], np.int64), "shape")
    name = f"tensorrt/vision_encoder_{precision}.onnx"
    _save(root / name, nodes, inputs, outputs, [shape], opset=21)
    return _part("vision_encoder", precision, name, inputs, outputs)


def _table(root: Path) -> PartFile:
    rows = np.arange(VOCABULARY * WIDTH, dtype="<f4").reshape(VOCABULARY, WIDTH) / 8
    name = "tensorrt/embed_tokens.onnx"
    (root / f"{name}_data").write_bytes(rows.tobytes())
    inputs, outputs = [("input_ids", ["batch_size", "length"])], [("inputs_embeds", ["batch_size", "length", WIDTH])]
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["inputs_embeds"])]
    _save(root / name, nodes, inputs, outputs, [numpy_helper.from_array(rows, "table")], opset=21)
    table = RowTable(file=f"{name}_data", offset=0, dtype="float32", num_rows=VOCABULARY, num_columns=WIDTH)
    return _part("embed_tokens", "fp16", name, inputs, outputs, extra_files=(f"{name}_data",), table=table)


def _decoder(root: Path, precision: str) -> PartFile:
    """Keys and values are halves of the rows themselves; logits are the last row's product with the weights."""
    stem = f"{DECODER}_{precision.replace('-', '_')}"
    weights = np.arange(WIDTH * VOCABULARY, dtype=np.float32).reshape(WIDTH, VOCABULARY)
    (root / f"{stem}.onnx_data").write_bytes(weights.tobytes())
    inputs = [("inputs_embeds", ["batch_size", "length", WIDTH]), ("write_indices", ["batch_size"])]
    past = [(name, ["batch_size", 1, "past", 2]) for name in CACHE]
    new = [(f"present.0.{half}", ["batch_size", 1, "length", 2]) for half in ("key", "value")]
    whole = [(name, ["batch_size", 1, CONTEXT, 2]) for name in CACHE]
    present = [(name, ["batch_size", 1, CONTEXT, 2]) for name, _ in new]
    logits = [("logits", ["batch_size", 1, VOCABULARY])]
    outputs = [*logits, *new]
    _save(root / f"{stem}.onnx", _decoder_nodes(in_place=False), [*inputs, *past], outputs, _constants(stem), opset=21)
    in_place = f"{stem}_in_place.onnx"
    nodes = _decoder_nodes(in_place=True)
    _save(root / in_place, nodes, [*inputs, *whole], [*logits, *present], _constants(stem), opset=24)
    extra = (f"{stem}.onnx_data", in_place)
    part = _part("decoder_model_merged", precision, f"{stem}.onnx", [*inputs, *past], outputs, extra_files=extra)
    return PartFile(**{**vars(part), "cache": "rows", "in_place": in_place})


def _decoder_nodes(*, in_place: bool) -> list[onnx.NodeProto]:
    nodes = [
        helper.make_node("Unsqueeze", ["inputs_embeds", "one"], ["four"]),
        helper.make_node("Split", ["four"], ["keys", "values"], axis=3, num_outputs=2),
        helper.make_node("Slice", ["inputs_embeds", "minus", "end", "one"], ["last"]),
        helper.make_node("MatMul", ["last", "weights"], ["logits"]),
    ]
    for half, rows, past in zip(("key", "value"), ("keys", "values"), CACHE, strict=True):
        out = f"present.0.{half}"
        if in_place:
            nodes.append(helper.make_node("TensorScatter", [past, rows, "write_indices"], [out], axis=2))
        else:
            nodes.append(helper.make_node("Identity", [rows], [out]))
    return nodes


def _constants(stem: str) -> list[onnx.TensorProto]:
    numbers = {"one": [1], "minus": [-1], "end": [2**31 - 1]}
    constants = [numpy_helper.from_array(np.array(value, np.int64), name) for name, value in numbers.items()]
    weights = onnx.TensorProto(name="weights", data_type=TensorProto.FLOAT, dims=[WIDTH, VOCABULARY])
    weights.data_location = TensorProto.EXTERNAL
    weights.external_data.add(key="location", value=f"{Path(stem).name}.onnx_data")
    return [*constants, weights]


def _save(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: list[tuple[str, list[int | str]]],
    outputs: list[tuple[str, list[int | str]]],
    initializers: list[onnx.TensorProto],
    *,
    opset: int,
) -> None:
    values = [
        [helper.make_tensor_value_info(name, _kind(name), shape) for name, shape in side] for side in (inputs, outputs)
    ]
    graph = helper.make_graph(nodes, "tiny", *values, initializer=initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=11)
    path.write_bytes(model.SerializeToString())


def _kind(name: str) -> int:
    return int(TensorProto.INT64 if _dtype(name) == "int64" else TensorProto.FLOAT)


def _dtype(name: str) -> str:
    return "int64" if name in ("write_indices", "input_ids") else "float32"


def _part(
    part: str,
    precision: str,
    file: str,
    inputs: list[tuple[str, list[int | str]]],
    outputs: list[tuple[str, list[int | str]]],
    **others: object,
) -> PartFile:
    specs = [tuple(TensorSpec(name, _dtype(name), tuple(shape)) for name, shape in side) for side in (inputs, outputs)]
    return PartFile(
        part=part,
        target="tensorrt",
        precision=precision,
        file=file,
        inputs=specs[0],
        outputs=specs[1],
        **others,  # type: ignore[arg-type]
    )
