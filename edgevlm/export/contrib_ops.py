"""The decoder's layers in ONNX Runtime's own operators, which few nodes and no copies make fast.

Attention is ``GroupQueryAttention``, with rotary positions inside if the model has them; its past and present may be
one shared buffer.  Residuals are added inside the norms.  All are documented in ONNX Runtime's ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import onnx_ir as ir
from torch import nn

from edgevlm.export.graph_writer import GraphWriter
from edgevlm.export.heads import cache_head_size, rotary_caches
from edgevlm.export.matmuls import CONTRIB
from edgevlm.models.decoder import RMSNorm
from edgevlm.shapes.config import DecoderConfig


class ContribOps:
    """Norms, attention and SiLU of one graph whose inputs are ``embeds`` (B, T, D) and ``mask`` (B, S)."""

    opsets: Mapping[str, int] = MappingProxyType({"": 21, CONTRIB: 1})

    def __init__(
        self, writer: GraphWriter, config: DecoderConfig, embeds: ir.Value, mask: ir.Value, *, half: bool = False
    ) -> None:
        """``half``: the graph will be turned to float16."""
        self.writer, self.config, self._embeds, self._half = writer, config, embeds, half
        self._seen = writer.one("ReduceSum", [mask, writer.integers(1)], "mask.sum", keepdims=0)
        last = writer.one("Sub", [self._seen, writer.integers(1)], "mask.last")
        total = length(writer, mask, "mask")
        self._lengths = [
            writer.cast(last, ir.DataType.INT32, "seqlens_k"),
            writer.cast(total, ir.DataType.INT32, "total_sequence_length"),
        ]
        if config.positions == "rotary":
            cosine, sine = rotary_caches(config)
            self._lengths += [writer.weight(cosine, "rotary.cosine"), writer.weight(sine, "rotary.sine")]

    def positions(self) -> ir.Value:
        """Where every row stands [B, T]: behind the rows that the kv cache holds."""
        writer = self.writer
        num_rows = length(writer, self._embeds, "rows")
        before = writer.one("Sub", [self._seen, num_rows], "rows.before")
        start = writer.one("Max", [before, writer.integer(0)], "rows.start")
        starts = writer.one("Unsqueeze", [start, writer.integers(1)], "rows.starts")
        steps = writer.one("Range", [writer.integer(0), num_rows, writer.integer(1)], "rows.steps")
        return writer.one("Add", [starts, steps], "positions")

    def add_norm(
        self, residual: ir.Value, branch: ir.Value | None, norm: RMSNorm | nn.LayerNorm, name: str
    ) -> tuple[ir.Value, ir.Value]:
        """Add ``branch`` to ``residual`` and norm the sum; returns the norm and the sum."""
        weights = [self.writer.weight(norm.weight, f"{name}.weight")]
        kind = "SimplifiedLayerNormalization"
        if isinstance(norm, nn.LayerNorm):
            weights.append(self.writer.weight(norm.bias, f"{name}.bias"))
            kind = "LayerNormalization"
        if branch is None:
            return self.writer.one(kind, [residual, *weights], name, axis=-1, epsilon=norm.eps), residual
        normed, mean, deviation, total = self.writer.op(
            f"Skip{kind}",
            [residual, branch, *weights],
            name,
            domain=CONTRIB,
            num_outputs=4,
            attributes={"epsilon": norm.eps},
        )
        mean.name = deviation.name = ""  # left out: nobody reads them, and writing them takes 1 to 2 % of a token
        return normed, total

    def attend(
        self, packed: ir.Value, norms: Sequence[RMSNorm], past: Sequence[ir.Value], name: str
    ) -> tuple[ir.Value, list[ir.Value]]:
        """Query, key and value side by side to mixed values (B, T, heads · size), present key and value.

        ``norms`` of each query and key head, if the model has them.
        """
        config = self.config
        query, key, value = self._normed_heads(packed, norms, name) if norms else (packed, None, None)
        mixed, *present = self.writer.op(
            "GroupQueryAttention",
            [query, key, value, *past, *self._lengths],
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
        return mixed, present

    def silu(self, rows: ir.Value, name: str) -> ir.Value:
        """``x · sigmoid(x)``, in one node where the engines that read it do so in float32."""
        if self._half:  # OpenVINO fails on QuickGelu of float16, and ONNX Runtime joins the two where it pays
            return plain_silu(self.writer, rows, name)
        return self.writer.one("QuickGelu", [rows], f"{name}.silu", domain=CONTRIB, alpha=1.0)

    def _normed_heads(
        self, packed: ir.Value, norms: Sequence[RMSNorm], name: str
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Query, key and value apart, the first two with each head normed (Qwen3)."""
        query, key, value = split_heads(self.writer, packed, self.config, name)
        query, key = (
            self._norm_each_head(rows, norm, f"{name}.{kind}")
            for rows, norm, kind in zip((query, key), norms, ("q_norm", "k_norm"), strict=True)
        )
        return query, key, value

    def _norm_each_head(self, rows: ir.Value, norm: RMSNorm, name: str) -> ir.Value:
        writer = self.writer
        heads = writer.one("Reshape", [rows, writer.integers(0, 0, -1, cache_head_size(self.config))], f"{name}.apart")
        normed, _ = self.add_norm(heads, None, norm, name)
        return writer.one("Reshape", [normed, writer.integers(0, 0, -1)], f"{name}.joined")


def plain_silu(writer: GraphWriter, rows: ir.Value, name: str) -> ir.Value:
    """``x · sigmoid(x)`` in two nodes."""
    return writer.one("Mul", [rows, writer.one("Sigmoid", [rows], f"{name}.sigmoid")], f"{name}.silu")


def length(writer: GraphWriter, value: ir.Value, name: str) -> ir.Value:
    """The size of the second axis, a scalar."""
    shape = writer.one("Shape", [value], f"{name}.shape")
    return writer.one("Gather", [shape, writer.integer(1)], f"{name}.length", axis=0)


def split_heads(writer: GraphWriter, packed: ir.Value, config: DecoderConfig, name: str) -> list[ir.Value]:
    """Query, key and value (B, T, heads · size) of rows that hold them side by side."""
    heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, cache_head_size(config)
    sizes = writer.integers(heads * size, kv_heads * size, kv_heads * size)
    return writer.op("Split", [packed, sizes], f"{name}.split", num_outputs=3, attributes={"axis": -1})
