"""Bundles of several precisions: what is written, under which names, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from edgevlm.cli.app import app
from edgevlm.core.errors import ConfigError, UnsupportedError
from edgevlm.export.pipeline import steps
from edgevlm.export.precisions import both_halves, precisions, suffixes
from edgevlm.export.sizes import bundle_bytes
from edgevlm.models.checkpoint import load_model
from edgevlm.runtimes.open import open_bundle
from edgevlm.shipped import DEMO_IMAGE
from edgevlm.verify import verify_all


def test_one_command_writes_every_precision_and_proves_each(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--encoder-precision", "fp32,int8", "--decoder-precision", "int4,int8-dynamic", "--calib-samples", "2"]
    result = CliRunner().invoke(app, ["export", str(checkpoint), str(out), "--json", "-q", *options])
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)["verify"]
    assert (record["encoder_precision"], record["precision"], record["passed"]) == ("fp32", "int4-b128", True)
    assert [(one["encoder_precision"], one["precision"]) for one in record["variants"]] == [
        ("fp32", "int8-dynamic"),
        ("int8", "int4-b128"),
    ]
    manifest = json.loads((out / "edgevlm.json").read_text())
    assert [(part["precision"], part["file"]) for part in manifest["parts"]] == [
        ("fp32", "onnx/vision_encoder.onnx"),
        ("int8", "onnx/vision_encoder_int8.onnx"),
        ("fp16", "onnx/embed_tokens_fp16.onnx"),
        ("int4-b128", "onnx/decoder_model_merged_q4.onnx"),
        ("int8-dynamic", "onnx/decoder_model_merged_quantized.onnx"),
    ]
    assert_provenance(manifest["provenance"])
    assert_own_references(out)
    with open_bundle(out, encoder_precision="int8", decoder_precision="int8-dynamic") as vlm:
        assert isinstance(vlm.ask(DEMO_IMAGE, "How many?", max_tokens=3).text, str)


def assert_provenance(provenance: dict[str, Any]) -> None:
    assert provenance["rounding"]["int4-b128"]["scheme"] == "WeightOnly"
    assert provenance["rounding"]["int4-b128"]["group_size"] == 128
    assert provenance["rounding"]["int8-dynamic"] == {"scheme": "DynamicInt8"}
    assert provenance["calibration"]["num_samples"] == 2


def assert_own_references(bundle: Path) -> None:
    names = load_file(bundle / "golden" / "golden.safetensors")
    for case in (0, 1):
        assert f"{case}.int8.image_features" in names
        for precision in ("int4-b128", "int4-b128.unrounded", "int8-dynamic", "int8-dynamic.unrounded"):
            assert names[f"{case}.{precision}.decode_logits"].shape[0] == 2
            assert names[f"{case}.{precision}.prefill_logits"].ndim == 1


@pytest.mark.slow
def test_nano_answers_as_well_in_four_bits(tmp_path: Path) -> None:
    out = tmp_path / "nano"
    assert CliRunner().invoke(app, ["export", "nano", str(out), "--precision", "int4", "-q"]).exit_code == 0
    record = json.loads((out / "verify.json").read_text())
    assert record["task"]["num_questions"] == 512
    assert record["task"]["reference_accuracy"] > 0.8
    assert record["task"]["accuracy"] > record["task"]["reference_accuracy"] - 0.03
    assert all(one.passed for one in verify_all(out))


def test_the_first_file_of_a_kind_has_the_usual_name_and_the_next_its_own() -> None:
    names = ("fp32", "fp16", "int4-b128", "int4-b32-asym", "int8-b32", "int8-dynamic", "int8-b64")
    found = suffixes(names)
    assert {name: suffix for name, suffix in found.items() if suffix is not None} == {
        "int4-b32-asym": "_int4_b32_asym",
        "int8-b64": "_int8_b64",
    }


@pytest.mark.parametrize(
    ("decoder", "embedding"),
    [
        ("fp32", ("fp32",)),
        ("int4", ("fp16",)),
        ("int4,fp32", ("fp32",)),
        ("int4,fp16", ("fp16",)),
        ("fp16,int8,fp32", ("fp16", "fp32")),
    ],
)
def test_a_float_decoder_has_its_own_embedding_and_rounded_ones_share_it(
    decoder: str, embedding: tuple[str, ...]
) -> None:
    assert precisions("fp32", decoder).embedding == embedding


@pytest.mark.parametrize(
    ("precision", "halves"),
    [
        ("fp32", ("fp32", "fp32")),
        ("fp16", ("fp16", "fp16")),
        ("int8", ("int8", "int8")),
        ("int8-dynamic", ("fp32", "int8-dynamic")),
        ("int4", ("fp32", "int4")),
    ],
)
def test_one_precision_for_both_halves_leaves_to_the_encoder_what_it_can(
    precision: str, halves: tuple[str, str]
) -> None:
    assert both_halves(precision) == halves


@pytest.mark.parametrize(
    ("encoder", "decoder", "error", "words"),
    [
        ("fp32", "int3", ConfigError, "int3"),
        ("int4", "fp32", ConfigError, "encoder precision"),
        ("fp32", "bf16", ConfigError, "not stored but computed"),
        ("bf16", "fp32", ConfigError, "openvino-bf16"),
        ("fp32", "int4,int4-b128", ConfigError, "comes twice"),
        ("fp32,", "fp32", ConfigError, "empty encoder precision"),
        ("fp32", "", ConfigError, "empty decoder precision"),
        ("int8-dynamic", "fp32", UnsupportedError, "slower than"),
    ],
)
def test_precisions_that_make_no_sense_are_refused(
    encoder: str, decoder: str, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        precisions(encoder, decoder)


def test_pictures_for_nothing_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    command = ["export", str(checkpoint), str(tmp_path / "out"), "--calib", str(tmp_path), "-q"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert "nothing is calibrated in these precisions" in result.stderr
    assert not (tmp_path / "out").exists()


def test_the_steps_are_those_of_every_file() -> None:
    wanted = precisions("fp32,int8", "int4,fp32")
    assert steps(wanted) == (
        *("load", "golden", "calibrate", "vision_encoder", "vision_encoder int8", "fusion", "embed_tokens"),
        *("decoder_model_merged int4-b128", "decoder_model_merged", "verify"),
    )


def test_a_bundle_of_fewer_bits_needs_less_room(checkpoint: Path) -> None:
    model = load_model(checkpoint).model
    num_bytes = [bundle_bytes(model, precisions("fp32", decoder)) for decoder in ("fp32", "fp16", "int8", "int4")]
    assert num_bytes == sorted(num_bytes, reverse=True)
    assert bundle_bytes(model, precisions("fp32", "fp32,int4")) > num_bytes[0]
