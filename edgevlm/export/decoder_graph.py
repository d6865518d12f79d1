"""The decoder as an ONNX graph, written node by node.

One graph serves prefill and decode, and only the last row reaches the head.  What a layer is stands here; the
operators it is written in stand in a dialect: ``contrib_ops`` for ONNX Runtime and whoever knows its operators,
``plain_ops`` for everyone else, ``typed_ops`` for TensorRT.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol, TypeAlias

import numpy as np
import onnx_ir as ir
from torch import nn

from edgevlm.bundle.manifest import TensorSpec
from edgevlm.export.contrib_ops import ContribOps
from edgevlm.export.graph_writer import GraphWriter
from edgevlm.export.heads import head_norm, into_heads, out_of_heads
from edgevlm.export.matmuls import MatMuls, Projection, projection
from edgevlm.export.parts import Part
from edgevlm.export.plain_ops import PlainOps
from edgevlm.export.typed_ops import TypedOps
from edgevlm.models.decoder import Attention, DecoderLayer, GeluMlp, RMSNorm, SwiGLU
from edgevlm.models.vlm import Vlm
from edgevlm.quant.rounding import QuantizedWeight

IR_VERSION = 10
LAST_INDEX = np.iinfo(np.int64).max
DTYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
    "int64": ir.DataType.INT64,
}

Norm: TypeAlias = RMSNorm | nn.LayerNorm


class Dialect(Protocol):
    """How norms, attention and SiLU are written."""

    opsets: Mapping[str, int]

    def positions(self) -> ir.Value:
        """Where every row stands [B, T]."""
        ...

    def add_norm(self, residual: ir.Value, branch: ir.Value | None, norm: Norm, name: str) -> tuple[ir.Value, ir.Value]:
        """Add ``branch`` to ``residual`` and norm the sum; returns the norm and the sum."""
        ...

    def attend(
        self, packed: ir.Value, norms: Sequence[RMSNorm], past: Sequence[ir.Value], name: str
    ) -> tuple[ir.Value, list[ir.Value]]:
        """Query, key and value side by side to mixed values, and the present key and value."""
        ...

    def silu(self, rows: ir.Value, name: str) -> ir.Value:
        """``x · sigmoid(x)``."""
        ...


@dataclass(frozen=True, kw_only=True)
class Writing:
    """How a decoder is written: with the codes of ``quantized`` layers, by their paths below the Vlm, or in float.

    ``plain``: in standard operators alone.  ``typed``: so, with a kv cache that TensorRT can keep; such a part reads
    ``write_indices`` in place of a mask.  ``half``: to be turned to float16.  ``half_storage``: floats that float16
    holds exactly are stored so.
    """

    quantized: Mapping[str, QuantizedWeight] = field(default_factory=lambda: MappingProxyType({}))
    plain: bool = False
    typed: bool = False
    half: bool = False
    half_storage: bool = False


def decoder_graph(part: Part, writing: Writing | None = None) -> ir.Model:
    """The ONNX model of a ``decoder_model_merged`` part."""
    writing = writing or Writing()
    inputs = {spec.name: graph_value(spec) for spec in part.inputs}
    author = DecoderAuthor(part.model, inputs, writing)
    return assemble(author.writer, part, inputs, author.write(), author.dialect.opsets)


class DecoderAuthor:
    """Writes the graph of one decoder: its layers as the model has them, its operators from the dialect."""

    def __init__(self, model: Vlm, inputs: Mapping[str, ir.Value], writing: Writing) -> None:
        self.model, self.config, self.inputs = model, model.config.decoder, inputs
        self.writer = GraphWriter(half_storage=writing.half_storage)
        self.matmuls = MatMuls(self.writer, writing.quantized, plain=writing.plain or writing.typed)
        self.dialect = self._dialect(writing)

    def _dialect(self, writing: Writing) -> Dialect:
        writer, config, embeds = self.writer, self.config, self.inputs["inputs_embeds"]
        if writing.typed:
            past = self.inputs["past_key_values.0.key"]
            return TypedOps(writer, config, embeds, self.inputs["write_indices"], past)
        mask = self.inputs["attention_mask"]
        if writing.plain:
            return PlainOps(writer, config, embeds, mask)
        return ContribOps(writer, config, embeds, mask, half=writing.half)

    def write(self) -> dict[str, ir.Value]:
        """All nodes; returns the graph's outputs by name."""
        residual, branch = self._placed(self.inputs["inputs_embeds"]), None
        outputs: dict[str, ir.Value] = {}
        for index, layer in enumerate(self.model.decoder.layers):
            assert isinstance(layer, DecoderLayer)
            past = [self.inputs[f"past_key_values.{index}.{kind}"] for kind in ("key", "value")]
            residual, branch, present = self._layer(layer, residual, branch, past, f"layers.{index}")
            outputs |= {f"present.{index}.{kind}": value for kind, value in zip(("key", "value"), present, strict=True)}
        outputs["logits"] = self._head(residual, branch)
        return outputs

    def _placed(self, embeds: ir.Value) -> ir.Value:
        """Rows plus the learned vectors of their positions, if the model has them."""
        if self.config.positions != "learned":
            return embeds
        table = self.writer.weight(self.model.decoder.embed_positions.weight, "embed_positions.weight")
        vectors = self.writer.one("Gather", [table, self.dialect.positions()], "embed_positions", axis=0)
        return self.writer.one("Add", [embeds, vectors], "placed")

    def _layer(
        self, layer: DecoderLayer, residual: ir.Value, branch: ir.Value | None, past: Sequence[ir.Value], name: str
    ) -> tuple[ir.Value, ir.Value, list[ir.Value]]:
        """Residual, the branch still to be added to it, and the layer's present key and value."""
        add_norm = self.dialect.add_norm
        normed, residual = add_norm(residual, branch, layer.input_layernorm, f"{name}.input_layernorm")
        mixed, present = self._attention(layer.self_attn, normed, past, f"{name}.self_attn")
        normed, residual = add_norm(residual, mixed, layer.post_attention_layernorm, f"{name}.post_attention_layernorm")
        return residual, self._mlp(layer.mlp, normed, f"{name}.mlp"), present

    def _attention(
        self, attention: Attention, hidden: ir.Value, past: Sequence[ir.Value], name: str
    ) -> tuple[ir.Value, list[ir.Value]]:
        config = self.config
        layers = (attention.q_proj, attention.k_proj, attention.v_proj)
        projections = [
            into_heads(f"decoder.{name}.{kind}", layer, config)
            for kind, layer in zip(("q_proj", "k_proj", "v_proj"), layers, strict=True)
        ]
        norms = [head_norm(norm, config) for norm in (attention.q_norm, attention.k_norm)] if config.qk_norm else []
        packed = self.matmuls.linear(hidden, projections, f"{name}.qkv_proj")
        mixed, present = self.dialect.attend(packed, norms, past, name)
        output = out_of_heads(f"decoder.{name}.o_proj", attention.o_proj, config)
        return self.matmuls.linear(mixed, [output], f"{name}.o_proj"), present

    def _mlp(self, mlp: SwiGLU | GeluMlp, hidden: ir.Value, name: str) -> ir.Value:
        if isinstance(mlp, SwiGLU):
            return self._gated_mlp(mlp, hidden, name)
        inner = self._linear(hidden, {"fc1": mlp.fc1}, name, "fc1")
        return self._linear(self.writer.one("Gelu", [inner], f"{name}.gelu"), {"fc2": mlp.fc2}, name, "fc2")

    def _gated_mlp(self, mlp: SwiGLU, hidden: ir.Value, name: str) -> ir.Value:
        both = self._linear(hidden, {"gate_proj": mlp.gate_proj, "up_proj": mlp.up_proj}, name, "gate_up_proj")
        width = mlp.gate_proj.out_features
        sizes = self.writer.integers(width, width)
        gate, up = self.writer.op("Split", [both, sizes], f"{name}.split", num_outputs=2, attributes={"axis": -1})
        gated = self.writer.one("Mul", [self.dialect.silu(gate, name), up], f"{name}.gated")
        return self._linear(gated, {"down_proj": mlp.down_proj}, name, "down_proj")

    def _linear(self, hidden: ir.Value, layers: Mapping[str, nn.Linear], above: str, name: str) -> ir.Value:
        """The ``layers`` of the module ``above`` side by side, called ``name``."""
        projections = [projection(f"decoder.{above}.{kind}", layer) for kind, layer in layers.items()]
        return self.matmuls.linear(hidden, projections, f"{above}.{name}")

    def _head(self, residual: ir.Value, branch: ir.Value | None) -> ir.Value:
        last = self._last_row(residual, "residual")
        rest = None if branch is None else self._last_row(branch, "branch")
        normed, _ = self.dialect.add_norm(last, rest, self.model.decoder.norm, "norm")
        weight = self.model.head_weight
        head = Projection(path="lm_head", num_outputs=weight.shape[0], num_inputs=weight.shape[1], weight=weight.detach)
        return self.matmuls.linear(normed, [head], "lm_head")

    def _last_row(self, rows: ir.Value, name: str) -> ir.Value:
        bounds = [self.writer.integers(number) for number in (-1, LAST_INDEX, 1)]
        return self.writer.one("Slice", [rows, *bounds], f"{name}.last")


def assemble(
    writer: GraphWriter,
    part: Part,
    inputs: Mapping[str, ir.Value],
    outputs: Mapping[str, ir.Value],
    opsets: Mapping[str, int],
) -> ir.Model:
    """Close the graph with the part's own tensor names, types and shapes."""
    for spec in part.outputs:
        value, declared = outputs[spec.name], graph_value(spec)
        value.name, value.shape, value.type = declared.name, declared.shape, declared.type
    graph = ir.Graph(
        list(inputs.values()),
        [outputs[spec.name] for spec in part.outputs],
        nodes=writer.nodes,
        initializers=list(writer.constants.values()),
        opset_imports=dict(opsets),
        name=part.name,
    )
    return ir.Model(graph, ir_version=IR_VERSION, producer_name="edgevlm")


def graph_value(spec: TensorSpec) -> ir.Value:
    """A graph's input or output as ``spec`` declares it."""
    return ir.Value(name=spec.name, shape=ir.Shape(list(spec.shape)), type=ir.TensorType(DTYPES[spec.dtype]))
