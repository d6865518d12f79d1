"""What rounding alone does, computed slowly and as it is written: the references of kernels that round and fuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from torch import nn

from edgevlm.bundle.manifest import PartFile
from edgevlm.models.vlm import Vlm
from edgevlm.quant.fake import RoundedLinear

Float: TypeAlias = NDArray[np.float32]
SILENT = 4  # errors come as exceptions


def keep_activations(model: Vlm) -> Vlm:
    """``model``, a reference with rounded weights, changed to leave what comes into them as it is.

    Engines differ in that: ONNX Runtime rounds the inputs of a product to 8 bits, OpenVINO may compute in float.
    """
    for path, layer in list(model.named_modules()):
        if isinstance(layer, RoundedLinear):
            model.set_submodule(path, _plain(layer))
    return model


def unfused_encoder(root: Path, file: PartFile) -> Callable[[Float], Float]:
    """A function from one picture's views (S, 3, H, W) to its tokens (1, N, D): rounded values between float layers.

    ONNX Runtime with every optimization off computes each convolution in float32 between a DequantizeLinear and a
    QuantizeLinear.
    """
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = SILENT
    graph = ort.InferenceSession(str(root / file.file), options, providers=["CPUExecutionProvider"])
    first = next(spec.shape[0] for spec in file.inputs if spec.name == "pixel_values")
    num_views = first if isinstance(first, int) else 1

    def tokens(views: Float) -> Float:
        return np.asarray(graph.run(["image_features"], {"pixel_values": views})[0], np.float32)

    def encode(pixel_values: Float) -> Float:
        starts = range(0, len(pixel_values), num_views)
        return np.concatenate([tokens(pixel_values[start : start + num_views]) for start in starts], axis=1)

    return encode


def _plain(layer: RoundedLinear) -> nn.Linear:
    plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    plain.weight, plain.bias = layer.weight, layer.bias
    return plain
