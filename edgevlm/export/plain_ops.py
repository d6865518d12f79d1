"""The decoder's layers in standard operators of opset 21, for engines that do not know ONNX Runtime's own.

Present keys and values are past ones with the new rows behind them.  Heads that share a key head lie below each other
in one matrix, so that keys and values are never repeated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import onnx_ir as ir
from torch import nn

from edgevlm.export.contrib_ops import length, plain_silu, split_heads
from edgevlm.export.graph_writer import GraphWriter
from edgevlm.export.heads import cache_head_size, rotary_caches
from edgevlm.models.decoder import RMSNorm
from edgevlm.shapes.config import DecoderConfig

UNSEEN = -32768.0  # added to the score of a key that a row may not see: the softmax gives 0, and float16 holds it


class StandardOps:
    """Norms, attention and SiLU of one graph, wherever its rows stand and whatever they see.

    ``positions`` (B, T) of the rows; ``seen`` (B, 1, T, S): whether a row may look at a key.
    """

    opsets: Mapping[str, int] = MappingProxyType({"": 21})

    def __init__(self, writer: GraphWriter, config: DecoderConfig, positions: ir.Value, seen: ir.Value) -> None:
        self.writer, self.config = writer, config
        self._positions = positions
        self._hidden = self._unseen(seen)
        self._turns = self._rotary() if config.positions == "rotary" else None

    def positions(self) -> ir.Value:
        """Where every row stands [B, T] among those of its sequence that are not padding."""
        return self._positions

    def add_norm(
        self, residual: ir.Value, branch: ir.Value | None, norm: RMSNorm | nn.LayerNorm, name: str
    ) -> tuple[ir.Value, ir.Value]:
        """Add ``branch`` to ``residual`` and norm the sum; returns the norm and the sum."""
        writer = self.writer
        if branch is not None:
            residual = writer.one("Add", [residual, branch], f"{name}.residual")
        weight = writer.weight(norm.weight, f"{name}.weight")
        if isinstance(norm, nn.LayerNorm):
            inputs = [residual, weight, writer.weight(norm.bias, f"{name}.bias")]
            return writer.one("LayerNormalization", inputs, name, axis=-1, epsilon=norm.eps), residual
        squares = writer.one("Pow", [residual, writer.number(2.0)], f"{name}.squares")
        mean = writer.one("ReduceMean", [squares, writer.integers(-1)], f"{name}.mean", keepdims=1)
        root = writer.one("Sqrt", [writer.one("Add", [mean, writer.number(norm.eps)], f"{name}.safe")], f"{name}.root")
        normed = writer.one("Div", [residual, root], f"{name}.normed")
        return writer.one("Mul", [normed, weight], name), residual

    def attend(
        self, packed: ir.Value, norms: Sequence[RMSNorm], past: Sequence[ir.Value], name: str
    ) -> tuple[ir.Value, list[ir.Value]]:
        """Query, key and value side by side to mixed values (B, T, heads · size), present key and value.

        ``norms`` of each query and key head, if the model has them.
        """
        writer, config = self.writer, self.config
        apart = zip(split_heads(writer, packed, config, name), ("query", "key", "value"), strict=True)
        query, key, value = (self._heads(rows, f"{name}.{kind}") for rows, kind in apart)
        if norms:
            query, _ = self.add_norm(query, None, norms[0], f"{name}.q_norm")
            key, _ = self.add_norm(key, None, norms[1], f"{name}.k_norm")
        query, key = self._turned(query, f"{name}.query"), self._turned(key, f"{name}.key")
        query = writer.one("Mul", [query, writer.number(config.head_dim**-0.5)], f"{name}.query.scaled")
        keys = [
            writer.one("Concat", [old, new], f"{name}.present.{kind}", axis=2)
            for old, new, kind in zip(past, (key, value), ("key", "value"), strict=True)
        ]
        return self._mixed(query, keys, name), self._present(keys, [key, value])

    def silu(self, rows: ir.Value, name: str) -> ir.Value:
        """``x · sigmoid(x)``."""
        return plain_silu(self.writer, rows, name)

    def _present(self, keys: list[ir.Value], new: list[ir.Value]) -> list[ir.Value]:
        """What the kv cache gets: the ``keys`` and values that were looked at, old and ``new``."""
        return keys

    def _unseen(self, seen: ir.Value) -> ir.Value:
        """What the scores of a key head [B, 1, heads per key · T, S] get: 0 where a row may look, else ``UNSEEN``."""
        writer = self.writer
        hidden = writer.one("Where", [seen, writer.number(0.0), writer.number(UNSEEN)], "mask.hidden")
        group = self.config.num_attention_heads // self.config.num_key_value_heads
        return writer.one("Concat", [hidden] * group, "mask.hidden.group", axis=2) if group > 1 else hidden

    def _rotary(self) -> tuple[ir.Value, ir.Value]:
        """Cosine and sine [B, 1, T, size / 2] of every row's position."""
        names = ("cosine", "sine")
        cosine, sine = (
            self._looked_up(self.writer.weight(table, f"rotary.{name}"), name)
            for table, name in zip(rotary_caches(self.config), names, strict=True)
        )
        return cosine, sine

    def _looked_up(self, table: ir.Value, name: str) -> ir.Value:
        rows = self.writer.one("Gather", [table, self._positions], f"rows.{name}", axis=0)
        return self.writer.one("Unsqueeze", [rows, self.writer.integers(1)], f"rows.{name}.wide")

    def _heads(self, rows: ir.Value, name: str) -> ir.Value:
        """(B, T, heads · size) to (B, heads, T, size)."""
        shape = self.writer.integers(0, 0, -1, cache_head_size(self.config))
        apart = self.writer.one("Reshape", [rows, shape], f"{name}.apart")
        return self.writer.one("Transpose", [apart], f"{name}.heads", perm=[0, 2, 1, 3])

    def _turned(self, heads: ir.Value, name: str) -> ir.Value:
        """Heads turned by their rows' positions: element i with element i + size / 2."""
        if self._turns is None:
            return heads
        writer, (cosine, sine), half = self.writer, self._turns, cache_head_size(self.config) // 2
        first, second = writer.op(
            "Split", [heads, writer.integers(half, half)], f"{name}.halves", num_outputs=2, attributes={"axis": -1}
        )

        def times(value: ir.Value, table: ir.Value, label: str) -> ir.Value:
            return writer.one("Mul", [value, table], f"{name}.{label}")

        lower = writer.one("Sub", [times(first, cosine, "a"), times(second, sine, "b")], f"{name}.lower")
        upper = writer.one("Add", [times(second, cosine, "c"), times(first, sine, "d")], f"{name}.upper")
        return writer.one("Concat", [lower, upper], f"{name}.turned", axis=-1)

    def _mixed(self, query: ir.Value, present: Sequence[ir.Value], name: str) -> ir.Value:
        """Attention of the heads (B, H, T, size) to the ``present`` (B, K, S, size), as rows (B, T, H · size)."""
        key, value = present
        writer, config, size = self.writer, self.config, cache_head_size(self.config)
        below = writer.integers(0, config.num_key_value_heads, -1, size)
        grouped = writer.one("Reshape", [query, below], f"{name}.grouped")
        keys = writer.one("Transpose", [key], f"{name}.keys", perm=[0, 1, 3, 2])
        scores = writer.one("MatMul", [grouped, keys], f"{name}.scores")
        masked = writer.one("Add", [scores, self._hidden], f"{name}.masked")
        shares = writer.one("Softmax", [masked], f"{name}.shares", axis=-1)
        mixed = writer.one("MatMul", [shares, value], f"{name}.mixed.grouped")
        beside = writer.integers(0, config.num_attention_heads, -1, size)
        heads = writer.one("Reshape", [mixed, beside], f"{name}.mixed.heads")
        rows = writer.one("Transpose", [heads], f"{name}.mixed.rows", perm=[0, 2, 1, 3])
        return writer.one("Reshape", [rows, writer.integers(0, 0, -1)], f"{name}.mixed")


class PlainOps(StandardOps):
    """The same behind ``mask`` (B, S), which tells real rows from padding; of ``embeds`` (B, T, D) only T counts."""

    def __init__(self, writer: GraphWriter, config: DecoderConfig, embeds: ir.Value, mask: ir.Value) -> None:
        rows, total = length(writer, embeds, "rows"), length(writer, mask, "mask")
        before = writer.one("Sub", [total, rows], "rows.before")
        super().__init__(writer, config, _counted(writer, mask, before, total), _causal(writer, mask, before, total))


def _counted(writer: GraphWriter, mask: ir.Value, before: ir.Value, total: ir.Value) -> ir.Value:
    """Positions [B, T]: of the last T rows of ``mask``, how many real ones stand before each."""
    counted = writer.one("CumSum", [mask, writer.integer(1)], "mask.counted")
    last = writer.one("Sub", [counted, writer.integer(1)], "mask.places")
    places = writer.one("Max", [last, writer.integer(0)], "mask.positions")
    start = writer.one("Unsqueeze", [before, writer.integers(0)], "rows.start")
    end = writer.one("Unsqueeze", [total, writer.integers(0)], "rows.end")
    return writer.one("Slice", [places, start, end, writer.integers(1)], "positions")


def _causal(writer: GraphWriter, mask: ir.Value, before: ir.Value, total: ir.Value) -> ir.Value:
    """Whether a row sees a key [B, 1, T, S]: real ones up to itself."""
    rows = writer.one("Range", [before, total, writer.integer(1)], "rows.numbers")
    keys = writer.one("Range", [writer.integer(0), total, writer.integer(1)], "keys.numbers")
    column = writer.one("Unsqueeze", [rows, writer.integers(1)], "rows.column")
    causal = writer.one("LessOrEqual", [keys, column], "mask.causal")
    real = writer.cast(mask, ir.DataType.BOOL, "mask.real")
    wide = writer.one("Unsqueeze", [real, writer.integers(1, 2)], "mask.wide")
    return writer.one("And", [wide, causal], "mask.seen")
