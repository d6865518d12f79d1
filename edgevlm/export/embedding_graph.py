"""The embedding as an ONNX graph: rows looked up by token ids."""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor

from edgevlm.core.errors import UnsupportedError
from edgevlm.export.contrib_ops import ContribOps
from edgevlm.export.decoder_graph import assemble, graph_value
from edgevlm.export.graph_writer import GraphWriter, is_half
from edgevlm.export.parts import Part

TABLE = "embed_tokens.weight"
LARGEST = torch.finfo(torch.float16).max


def embedding_graph(part: Part, *, half: bool, half_storage: bool) -> ir.Model:
    """The ONNX model of an ``embed_tokens`` part, its rows in float16 when ``half`` or when nothing is lost by it.

    The rows come out in float32.  Raises UnsupportedError when float16 cannot hold them.
    """
    weight = part.model.embed_tokens.weight.detach()
    if half:
        _check_half(weight)
    narrow = half or (half_storage and is_half(weight))
    writer = GraphWriter()
    inputs = {spec.name: graph_value(spec) for spec in part.inputs}
    dtype = ir.DataType.FLOAT16 if narrow else ir.DataType.FLOAT
    torch_dtype = torch.float16 if narrow else torch.float32
    table = writer.lazy(lambda: weight.to(torch_dtype).numpy(), tuple(weight.shape), dtype, TABLE)
    rows = writer.one("Gather", [table, inputs["input_ids"]], "rows", axis=0)
    if narrow:
        rows = writer.cast(rows, ir.DataType.FLOAT, "rows.wide")
    return assemble(writer, part, inputs, {part.outputs[0].name: rows}, {"": ContribOps.opsets[""]})


def _check_half(weight: Tensor) -> None:
    largest = float(torch.stack(weight.aminmax()).abs().max())
    if not largest <= LARGEST:
        raise UnsupportedError(
            f"{TABLE} holds {largest:.3g}, float16 ends at {LARGEST:.0f}: take --precision fp32 for this part"
        )
