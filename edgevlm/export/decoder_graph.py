"""The decoder as an ONNX graph, written node by node.

One graph serves prefill and decode.  Attention is ``GroupQueryAttention`` with rotary positions inside; its
past and present may be one shared buffer, so nothing is copied from token to token.  Only the last row
reaches the head.

Operators of the ``com.microsoft`` domain are documented in ONNX Runtime's ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgevlm.bundle.manifest import TensorSpec
from edgevlm.core.errors import UnsupportedError
from edgevlm.export.parts import Part
from edgevlm.models.decoder import Attention, Decoder, DecoderLayer, RMSNorm, SwiGLU, rotary_table
from edgevlm.shapes.config import DecoderConfig

OPSETS = {"": 21, "com.microsoft": 1}
IR_VERSION = 10
CONTRIB = "com.microsoft"
LAST_INDEX = np.iinfo(np.int64).max


class GraphWriter:
    """Collects nodes and constants; names follow the PyTorch modules, so that a graph can be read beside the model."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self.constants: dict[str, ir.Value] = {}

    def op(
        self,
        kind: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        *,
        domain: str = "",
        num_outputs: int,
        attributes: Mapping[str, int | float],
    ) -> list[ir.Value]:
        """Add one node; its outputs are called ``name``, ``name.1``, …"""
        outputs = [ir.Value(name=name if index == 0 else f"{name}.{index}") for index in range(num_outputs)]
        node = ir.Node(
            domain,
            kind,
            inputs,
            ir.convenience.convert_attributes(dict(attributes)),
            outputs=outputs,
            name=f"node.{name}",
        )
        self.nodes.append(node)
        return outputs

    def one(
        self,
        kind: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        *,
        domain: str = "",
        **attributes: int | float,
    ) -> ir.Value:
        """A node with one output."""
        return self.op(kind, inputs, name, domain=domain, num_outputs=1, attributes=attributes)[0]

    def constant(self, array: NDArray[np.generic], name: str) -> ir.Value:
        """An initializer."""
        if name not in self.constants:
            tensor = ir.tensor(array, name=name)
            self.constants[name] = ir.Value(
                name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
        return self.constants[name]

    def weight(self, tensor: Tensor, name: str) -> ir.Value:
        """A float32 initializer."""
        return self.constant(np.ascontiguousarray(tensor.detach().float().numpy()), name)

    def linear(self, hidden: ir.Value, layers: Sequence[nn.Linear], name: str) -> ir.Value:
        """``hidden`` times the weights of ``layers`` side by side, plus their biases if they have any."""
        weight = torch.cat([layer.weight for layer in layers]).T
        product = self.one("MatMul", [hidden, self.weight(weight, f"{name}.weight")], f"{name}.product")
        biases = [layer.bias for layer in layers if layer.bias is not None]
        if not biases:
            return product
        return self.one("Add", [product, self.weight(torch.cat(tuple(biases)), f"{name}.bias")], f"{name}.sum")


def decoder_graph(part: Part) -> ir.Model:
    """The ONNX model of a ``decoder_model_merged`` part."""
    model = part.model
    config, decoder = model.config.decoder, model.decoder
    if config.head_dim % 16:
        raise UnsupportedError(
            f"GroupQueryAttention turns heads whose size is a multiple of 16, this decoder's is {config.head_dim}"
        )
    writer = GraphWriter()
    inputs = {spec.name: graph_value(spec) for spec in part.inputs}
    lengths = _lengths(writer, inputs["attention_mask"], config)
    residual, branch = inputs["inputs_embeds"], None
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


def _lengths(writer: GraphWriter, mask: ir.Value, config: DecoderConfig) -> list[ir.Value]:
    """What GroupQueryAttention wants to know: last position per sequence, total length, cosines and sines."""
    one = writer.constant(np.array([1], np.int64), "one")
    seen = writer.one("ReduceSum", [mask, one], "mask.sum", keepdims=0)
    last = writer.one("Sub", [seen, one], "mask.last")
    seqlens = writer.one("Cast", [last], "seqlens_k", to=int(ir.DataType.INT32))
    shape = writer.one("Shape", [mask], "mask.shape")
    total = writer.one("Gather", [shape, writer.constant(np.array(1, np.int64), "one.scalar")], "mask.length", axis=0)
    total_length = writer.one("Cast", [total], "total_sequence_length", to=int(ir.DataType.INT32))
    positions = torch.arange(config.max_position_embeddings).unsqueeze(0)
    cosine, sine = rotary_table(positions, config.head_dim, config.rope_theta)
    return [
        seqlens,
        total_length,
        writer.weight(cosine[0, 0], "rotary.cosine"),
        writer.weight(sine[0, 0], "rotary.sine"),
    ]


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
    writer: GraphWriter, residual: ir.Value, branch: ir.Value | None, norm: RMSNorm, name: str
) -> tuple[ir.Value, ir.Value]:
    """Add ``branch`` to ``residual`` and norm the sum; returns the norm and the sum."""
    weight = writer.weight(norm.weight, f"{name}.weight")
    if branch is None:
        return writer.one("SimplifiedLayerNormalization", [residual, weight], name, axis=-1, epsilon=norm.eps), residual
    normed, _, _, total = writer.op(
        "SkipSimplifiedLayerNormalization",
        [residual, branch, weight],
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
    packed = writer.linear(hidden, [attention.q_proj, attention.k_proj, attention.v_proj], f"{name}.qkv_proj")
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
            "do_rotary": 1,
        },
    )
    return writer.linear(mixed, [attention.o_proj], f"{name}.o_proj"), [present_key, present_value]


def _normed_heads(
    writer: GraphWriter, attention: Attention, packed: ir.Value, config: DecoderConfig, name: str
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Query, key and value apart, the first two with each head normed (Qwen3)."""
    heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    sizes = writer.constant(np.array([heads * size, kv_heads * size, kv_heads * size], np.int64), "qkv.sizes")
    query, key, value = writer.op("Split", [packed, sizes], f"{name}.split", num_outputs=3, attributes={"axis": -1})
    query = _norm_each_head(writer, query, attention.q_norm, size, f"{name}.q_norm")
    key = _norm_each_head(writer, key, attention.k_norm, size, f"{name}.k_norm")
    return query, key, value


def _norm_each_head(writer: GraphWriter, rows: ir.Value, norm: RMSNorm, size: int, name: str) -> ir.Value:
    apart = writer.constant(np.array([0, 0, -1, size], np.int64), "heads.apart")
    joined = writer.constant(np.array([0, 0, -1], np.int64), "heads.joined")
    heads = writer.one("Reshape", [rows, apart], f"{name}.apart")
    normed, _ = _add_norm(writer, heads, None, norm, name)
    return writer.one("Reshape", [normed, joined], f"{name}.joined")


def _mlp(writer: GraphWriter, mlp: SwiGLU, hidden: ir.Value, name: str) -> ir.Value:
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
