"""From a checkpoint to a bundle: split the model, lower each part, prove that it is still the same model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgevlm.core.registry import Registry

if TYPE_CHECKING:
    from edgevlm.export.target import Target

TARGETS: Registry[type[Target]] = Registry(
    "export target",
    {"onnx": "edgevlm.export.to_onnx:OnnxTarget", "tensorrt": "edgevlm.export.to_tensorrt:TensorRtTarget"},
    group="edgevlm.targets",
)
