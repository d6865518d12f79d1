"""A bundle of a few bytes: right in form, nothing that runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgevlm.bundle.golden import save_golden
from edgevlm.bundle.manifest import PARTS, DecoderShape, Manifest, PartFile, TensorSpec
from edgevlm.bundle.write import write_manifest, write_sums


@pytest.fixture
def tiny_manifest() -> Manifest:
    return Manifest(
        name="tiny",
        family="test",
        parts=tuple(
            PartFile(
                part=part,
                target="onnx",
                precision="fp32",
                file=f"onnx/{part}.onnx",
                inputs=(TensorSpec("x", "float32", ("batch", 3)),),
                outputs=(TensorSpec("y", "float32", ("batch", 4)),),
            )
            for part in PARTS
        ),
        image={"height": 8, "width": 8, "fit": "pad"},
        prompt={"image_token": "<image>"},
        num_vision_tokens=4,
        decoder=DecoderShape(2, 1, 4, 8, 16),
        max_context=32,
        provenance={"tool": "test"},
    )


@pytest.fixture
def write_tiny(tiny_manifest: Manifest) -> Callable[[Path], Path]:
    """Writes the bundle into a folder and returns the folder."""

    def write(root: Path) -> Path:
        (root / "onnx").mkdir(parents=True)
        for number, part in enumerate(PARTS):
            (root / f"onnx/{part}.onnx").write_bytes(bytes([number]) * (10 + number))
        (root / "tokenizer.json").write_text("{}", encoding="utf-8")
        save_golden(root, {"pixel_values": np.zeros((1, 3, 2, 2), np.float32)}, {"prompt": "how many?"})
        write_manifest(root, tiny_manifest)
        write_sums(root)
        return root

    return write


@pytest.fixture
def tiny_bundle(tmp_path: Path, write_tiny: Callable[[Path], Path]) -> Path:
    return write_tiny(tmp_path / "tiny.bundle")
