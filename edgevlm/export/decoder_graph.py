"""The decoder as an ONNX graph, written node by node.

One graph serves prefill and decode.  Attention is ``GroupQueryAttention``, with rotary positions inside if the model
has them; its past and present may be one shared buffer, so nothing is copied from token to token.  Only the last row
reaches the head.

Operators of the ``com.microsoft`` domain are documented in ONNX Runtime's ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np
import onnx_ir as ir
from torch import Tensor, nn

from edgevlm.bundle.manifest import TensorSpec
from edgevlm.export.graph_writer import GraphWriter
from edgevlm.export.heads import cache_head_size, head_norm, into_heads, out_of_heads, rotary_caches
from edgevlm.export.parts import Part
from edgevlm.models.decoder import Attention, Decoder, DecoderLayer, GeluMlp, RMSNorm, SwiGLU
from edgevlm.shapes.config import DecoderConfig

OPSETS = {"": 21, "com.microsoft": 1}
IR_VERSION = 10
CONTRIB = "com.microsoft"
LAST_INDEX = np.iinfo(np.int64).max

Norm: TypeAlias = RMSNorm | nn.LayerNorm


def decoder_graph(part: Part) -> ir.Model:
    """The ONNX model of a ``decoder_model_merged`` part."""
    model = part.model
    config, decoder = model.config.decoder, model.decoder
    writer = GraphWriter()
    inputs = {spec.name: graph_value(spec) for spec in part.inputs}
    seen = _seen(writer, inputs["attention_mask"])
    lengths = _lengths(writer, inputs["attention_mask"], seen)
    residual, branch = inputs["inputs_embeds"], None
    if config.positions == "learned":
        residual = _add_positions(writer, residual, seen, decoder.embed_positions.weight)
    else:
        lengths += _rotary(writer, config)
    outputs: dict[str, ir.Value] = {}
    for index, layer in enumerate(decoder.layers):
        assert isinstance(layer, DecoderLayer)
        past = [inputs[f"past_key_values.{index}.{kind}"] for kind in ("key", "value")]
        residual, branch, present = _layer(writer, layer, residual, branch, past, lengths, config, f"layers.{index}")
        outputs |= {f"present.{index}.{kind}": value for kind, value in zip(("key", "value"), present, strict=True)}
    outputs["logits"] = _head(writer, decoder, residual, branch, model.head_weight)
    return assemble(writer, part, inputs, outputs)


def assemble(writer: GraphWriter, part: Part, inputs: dict[str, ir.Value], outputs: dict[str, ir.Value]) -> ir.Model:
    """Close the graph with the part's own tensor names, types and shapes."""
    for spec in part.outputs:
        value, declared = outputs[spec.name], graph_value(spec)
        value.name, value.shape, value.type = declared.name, declared.shape, declared.type
    graph = ir.Graph(
        list(inputs.values()),
        [outputs[spec.name] for spec in part.outputs],
        nodes=writer.nodes,
        initializers=list(writer.constants.values()),
        opset_imports=OPSETS,
        name=part.name,
    )
    return ir.Model(graph, ir_version=IR_VERSION, producer_name="edgevlm")


def graph_value(spec: TensorSpec) -> ir.Value:
    """A graph's input or output as ``spec`` declares it."""
    dtype = ir.DataType[{"float32": "FLOAT", "float16": "FLOAT16", "int64": "INT64"}[spec.dtype]]
    return ir.Value(name=spec.name, shape=ir.Shape(list(spec.shape)), type=ir.TensorType(dtype))


def _seen(writer: GraphWriter, mask: ir.Value) -> ir.Value:
    """Rows [B] of each sequence, those in the kv cache included."""
    one = writer.constant(np.array([1], np.int64), "one")
    return writer.one("ReduceSum", [mask, one], "mask.sum", keepdims=0)


def _lengths(writer: GraphWriter, mask: ir.Value, seen: ir.Value) -> list[ir.Value]:
    """What GroupQueryAttention wants to know: last position per sequence and total length."""
    last = writer.one("Sub", [seen, writer.constant(np.array([1], np.int64), "one")], "mask.last")
    seqlens = writer.one("Cast", [last], "seqlens_k", to=int(ir.DataType.INT32))
    total = _length(writer, mask, "mask")
    total_length = writer.one("Cast", [total], "total_sequence_length", to=int(ir.DataType.INT32))
    return [seqlens, total_length]


def _length(writer: GraphWriter, value: ir.Value, name: str) -> ir.Value:
    """The size of the second axis, a scalar."""
    shape = writer.one("Shape", [value], f"{name}.shape")
    return writer.one("Gather", [shape, writer.constant(np.array(1, np.int64), "one.scalar")], f"{name}.length", axis=0)


def _rotary(writer: GraphWriter, config: DecoderConfig) -> list[ir.Value]:
    cosine, sine = rotary_caches(config)
    return [writer.weight(cosine, "rotary.cosine"), writer.weight(sine, "rotary.sine")]


def _add_positions(writer: GraphWriter, embeds: ir.Value, seen: ir.Value, weight: Tensor) -> ir.Value:
    """Rows plus the learned vectors of their positions, which begin where the kv cache ends."""
    zero, one = (
        writer.constant(np.array(number, np.int64), f"{name}.scalar") for number, name in ((0, "zero"), (1, "one"))
    )
    num_rows = _length(writer, embeds, "rows")
    start = writer.one("Max", [writer.one("Sub", [seen, num_rows], "rows.before"), zero], "rows.start")
    starts = writer.one("Unsqueeze", [start, writer.constant(np.array([1], np.int64), "one")], "rows.starts")
    steps = writer.one("Range", [zero, num_rows, one], "rows.steps")
    positions = writer.one("Add", [starts, steps], "positions")
    table = writer.weight(weight, "embed_positions.weight")
    return writer.one("Add", [embeds, writer.one("Gather", [table, positions], "embed_positions", axis=0)], "placed")


def _layer(
    writer: GraphWriter,
    layer: DecoderLayer,
    residual: ir.Value,
    branch: ir.Value | None,
    past: Sequence[ir.Value],
    lengths: Sequence[ir.Value],
    config: DecoderConfig,
    name: str,
) -> tuple[ir.Value, ir.Value, list[ir.Value]]:
    """Residual, the branch still to be added to it, and the layer's present key and value."""
    normed, residual = _add_norm(writer, residual, branch, layer.input_layernorm, f"{name}.input_layernorm")
    mixed, present = _attention(writer, layer.self_attn, normed, past, lengths, config, f"{name}.self_attn")
    normed, residual = _add_norm(
        writer, residual, mixed, layer.post_attention_layernorm, f"{name}.post_attention_layernorm"
    )
    return residual, _mlp(writer, layer.mlp, normed, f"{name}.mlp"), present


def _add_norm(
    writer: GraphWriter, residual: ir.Value, branch: ir.Value | None, norm: Norm, name: str
) -> tuple[ir.Value, ir.Value]:
    """Add ``branch`` to ``residual`` and norm the sum; returns the norm and the sum."""
    weights = [writer.weight(norm.weight, f"{name}.weight")]
    kind = "SimplifiedLayerNormalization"
    if isinstance(norm, nn.LayerNorm):
        weights.append(writer.weight(norm.bias, f"{name}.bias"))
        kind = "LayerNormalization"
    if branch is None:
        return writer.one(kind, [residual, *weights], name, axis=-1, epsilon=norm.eps), residual
    normed, _, _, total = writer.op(
        f"Skip{kind}",
        [residual, branch, *weights],
        name,
        domain=CONTRIB,
        num_outputs=4,
        attributes={"epsilon": norm.eps},
    )
    return normed, total


def _attention(
    writer: GraphWriter,
    attention: Attention,
    hidden: ir.Value,
    past: Sequence[ir.Value],
    lengths: Sequence[ir.Value],
    config: DecoderConfig,
    name: str,
) -> tuple[ir.Value, list[ir.Value]]:
    projections = [into_heads(layer, config) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
    packed = writer.linear(hidden, projections, f"{name}.qkv_proj")
    query, key, value = (
        _normed_heads(writer, attention, packed, config, name) if config.qk_norm else (packed, None, None)
    )
    mixed, present_key, present_value = writer.op(
        "GroupQueryAttention",
        [query, key, value, *past, *lengths],
        f"{name}.mixed",
        domain=CONTRIB,
        num_outputs=3,
        attributes={
            "num_heads": config.num_attention_heads,
            "kv_num_heads": config.num_key_value_heads,
            "do_rotary": int(config.positions == "rotary"),
            "scale": config.head_dim**-0.5,
        },
    )
    output = writer.linear(mixed, [out_of_heads(attention.o_proj, config)], f"{name}.o_proj")
    return output, [present_key, present_value]


def _normed_heads(
    writer: GraphWriter, attention: Attention, packed: ir.Value, config: DecoderConfig, name: str
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Query, key and value apart, the first two with each head normed (Qwen3)."""
    heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, cache_head_size(config)
    sizes = writer.constant(np.array([heads * size, kv_heads * size, kv_heads * size], np.int64), "qkv.sizes")
    query, key, value = writer.op("Split", [packed, sizes], f"{name}.split", num_outputs=3, attributes={"axis": -1})
    query = _norm_each_head(writer, query, head_norm(attention.q_norm, config), size, f"{name}.q_norm")
    key = _norm_each_head(writer, key, head_norm(attention.k_norm, config), size, f"{name}.k_norm")
    return query, key, value


def _norm_each_head(writer: GraphWriter, rows: ir.Value, norm: RMSNorm, size: int, name: str) -> ir.Value:
    apart = writer.constant(np.array([0, 0, -1, size], np.int64), "heads.apart")
    joined = writer.constant(np.array([0, 0, -1], np.int64), "heads.joined")
    heads = writer.one("Reshape", [rows, apart], f"{name}.apart")
    normed, _ = _add_norm(writer, heads, None, norm, name)
    return writer.one("Reshape", [normed, joined], f"{name}.joined")


def _mlp(writer: GraphWriter, mlp: SwiGLU | GeluMlp, hidden: ir.Value, name: str) -> ir.Value:
    if isinstance(mlp, SwiGLU):
        return _gated_mlp(writer, mlp, hidden, name)
    inner = writer.linear(hidden, [mlp.fc1], f"{name}.fc1")
    return writer.linear(writer.one("Gelu", [inner], f"{name}.gelu"), [mlp.fc2], f"{name}.fc2")


def _gated_mlp(writer: GraphWriter, mlp: SwiGLU, hidden: ir.Value, name: str) -> ir.Value:
    both = writer.linear(hidden, [mlp.gate_proj, mlp.up_proj], f"{name}.gate_up_proj")
    width = mlp.gate_proj.out_features
    sizes = writer.constant(np.array([width, width], np.int64), "gate_up.sizes")
    gate, up = writer.op("Split", [both, sizes], f"{name}.split", num_outputs=2, attributes={"axis": -1})
    opened = writer.one("Mul", [gate, writer.one("Sigmoid", [gate], f"{name}.sigmoid")], f"{name}.silu")
    return writer.linear(writer.one("Mul", [opened, up], f"{name}.gated"), [mlp.down_proj], f"{name}.down_proj")


def _head(
    writer: GraphWriter, decoder: Decoder, residual: ir.Value, branch: ir.Value | None, weight: Tensor
) -> ir.Value:
    last = [_last_row(writer, rows, name) for rows, name in ((residual, "residual"), (branch, "branch")) if rows]
    normed, _ = _add_norm(writer, last[0], last[1] if branch else None, decoder.norm, "norm")
    return writer.one("MatMul", [normed, writer.weight(weight.T, "lm_head.weight")], "logits")


def _last_row(writer: GraphWriter, rows: ir.Value, name: str) -> ir.Value:
    bounds: Iterable[tuple[str, int]] = (("last.start", -1), ("last.end", LAST_INDEX), ("last.axis", 1))
    constants = [writer.constant(np.array([number], np.int64), label) for label, number in bounds]
    return writer.one("Slice", [rows, *constants], f"{name}.last")
