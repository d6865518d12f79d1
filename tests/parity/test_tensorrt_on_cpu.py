"""Bundles for TensorRT on the CPU: the same model as the ONNX bundle, by either of the decoder's graphs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgevlm.bundle.read import read_bundle
from edgevlm.bundle.write import write_manifest, write_sums
from edgevlm.core.errors import IntegrityError, UnsupportedError
from edgevlm.export.parts import split
from edgevlm.export.target import Extras, Lowering
from edgevlm.export.to_tensorrt import TensorRtTarget
from edgevlm.models.checkpoint import load_model
from edgevlm.runtimes.open import open_bundle
from edgevlm.runtimes.session import Float, Session
from edgevlm.shipped import find_bundle
from edgevlm.verify.stages import relative_l2

PRECISIONS = ("fp32", "fp16", "bf16")
CLOSE = {"fp32": 1e-5, "fp16": 0.01, "bf16": 0.03}  # relative L2 to float32: the rows of verify/thresholds.py
ON_CPU = "tensorrt-on-cpu"


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nano for ONNX and for TensorRT in one bundle; of its rows, only those of the ONNX target."""
    root = tmp_path_factory.mktemp("both") / "nano.bundle"
    shutil.copytree(find_bundle("nano"), root)
    manifest, target = read_bundle(root).manifest, TensorRtTarget(Lowering())
    (root / "tensorrt").mkdir()
    typed = [
        target.lower(part, root, precision, Extras(max_context=manifest.max_context))
        for part in split(load_model("nano").model)
        if part.name != "embed_tokens"
        for precision in PRECISIONS
    ]
    write_manifest(root, replace(manifest, parts=(*manifest.parts, *typed)))
    write_sums(root)
    return root


@contextmanager
def session(bundle: Path, runtime: str, precision: str = "fp32", device: str | None = None) -> Iterator[Session]:
    with (
        open_bundle(
            bundle, decoder_runtime=runtime, decoder_precision=precision, device=device, encoder_runtime=runtime
        ) as vlm,
        vlm.exclusive() as opened,
    ):
        yield opened


def walk(opened: Session, rows: Float) -> NDArray[np.float32]:
    """Logits of a prompt, of tokens beyond a bucket of 256 rows, and of others behind a part of the prompt."""
    found = [opened.prefill(rows[:, :250])]
    found += [opened.decode(token) for token in range(5, 15)]
    opened.rewind(100)
    found += [opened.decode(7), opened.prefill(rows[:, 250:])]
    opened.rewind(0)
    found.append(opened.prefill(rows[:, :3]))
    return np.stack(found)


@pytest.fixture(scope="module")
def rows(both: Path) -> Float:
    width, generator = read_bundle(both).manifest.decoder.hidden_size, np.random.default_rng(0)
    return generator.standard_normal((1, 290, width)).astype(np.float32)


@pytest.fixture(scope="module")
def expected(both: Path, rows: Float) -> NDArray[np.float32]:
    with session(both, "onnxruntime") as opened:
        return walk(opened, rows)


@pytest.mark.parametrize("device", [None, "in-place"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_row_of_the_cache_is_where_it_belongs(
    both: Path, rows: Float, expected: NDArray[np.float32], precision: str, device: str | None
) -> None:
    with session(both, ON_CPU, precision, device) as opened:
        found = walk(opened, rows)
    for one, other in zip(expected, found, strict=True):
        assert relative_l2(one, other) < CLOSE[precision]
    if precision != "fp32":
        assert relative_l2(expected, found) > 1e-5  # it does round


def test_both_graphs_of_a_decoder_round_alike(both: Path, rows: Float) -> None:
    found: list[Any] = []
    for device in (None, "in-place"):
        with session(both, ON_CPU, "fp16", device) as opened:
            found.append(walk(opened, rows))
    assert relative_l2(*found) < 1e-3


def test_halves_may_be_read_from_different_targets(both: Path) -> None:
    picture, question = both / "golden" / "0.png", "What color is the circle?"
    answers, targets = set(), []
    for encoder, decoder in (("onnxruntime", ON_CPU), (ON_CPU, "onnxruntime")):
        with open_bundle(both, encoder_runtime=encoder, decoder_runtime=decoder) as vlm:
            answers.add(vlm.ask(picture, question).text)
            targets.append(vlm.info["targets"])
    assert len(answers) == 1
    typed = {"vision_encoder": "tensorrt", "embed_tokens": "onnx", "decoder_model_merged": "onnx"}
    assert targets[1] == typed
    assert targets[0] == {"vision_encoder": "onnx", "embed_tokens": "onnx", "decoder_model_merged": "tensorrt"}


def test_the_typed_encoder_gives_the_same_features(both: Path) -> None:
    pixels = np.random.default_rng(1).standard_normal((1, 3, 96, 96)).astype(np.float32)
    side = int(read_bundle(both).manifest.image["height"])
    pixels = np.resize(pixels, (1, 3, side, side))
    with session(both, "onnxruntime") as opened:
        expected = opened.encode(pixels).tokens
    for precision in PRECISIONS:
        with open_bundle(both, ON_CPU, encoder_precision=precision) as vlm, vlm.exclusive() as opened:
            assert relative_l2(expected, opened.encode(pixels).tokens) < CLOSE[precision]


def test_what_the_bundle_lacks_is_named(both: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"for tensorrt has no precision 'int4'; it has fp32, fp16, bf16"):
        open_bundle(both, ON_CPU, decoder_precision="int4")
    shorter = shutil.copytree(both, tmp_path / "shorter")
    manifest = read_bundle(shorter).manifest
    write_manifest(shorter, replace(manifest, max_context=manifest.max_context - 1))
    write_sums(shorter)
    with pytest.raises(IntegrityError, match=r"_in_place.onnx: its kv cache has .* rows, the manifest promises"):
        open_bundle(shorter, ON_CPU, device="in-place")
    without = tuple(replace(part, in_place="") for part in manifest.parts)
    write_manifest(shorter, replace(manifest, parts=without))
    write_sums(shorter)
    with pytest.raises(UnsupportedError, match="no decoder that fills its cache in place"):
        open_bundle(shorter, ON_CPU, device="in-place")


def test_a_damaged_graph_is_refused_in_one_line(both: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(both, tmp_path / "damaged")
    file = damaged / read_bundle(damaged).manifest.part("decoder_model_merged", "tensorrt", "fp16").file
    file.write_bytes(b"\x08\x0a" + bytes(file.stat().st_size - 2))
    write_sums(damaged)
    with pytest.raises(IntegrityError, match=r"cannot be loaded \(.*\); copy or export the bundle again") as raised:
        open_bundle(damaged, ON_CPU, decoder_precision="fp16")
    assert "\n" not in str(raised.value)
