"""``edgevlm export --target tensorrt``: graphs, recipe and manifest, proved without a GPU."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from edgevlm.bundle.read import read_bundle
from edgevlm.bundle.recipe import read_recipe
from edgevlm.bundle.write import write_sums
from edgevlm.cli.app import app
from edgevlm.core.errors import ConfigError, IntegrityError, UnsupportedError
from edgevlm.export import writing
from edgevlm.export.pipeline import export_bundle
from edgevlm.export.precisions import both_halves, precisions
from edgevlm.models.checkpoint import load_model, save_native
from edgevlm.models.vlm import Vlm
from edgevlm.runtimes.open import open_bundle
from edgevlm.shapes.config import MlpConfig
from edgevlm.shapes.fusion import FusionConfig
from edgevlm.shipped import DEMO_IMAGE
from edgevlm.verify import golden

Refused = Callable[..., str]


@pytest.fixture(scope="module")
def told(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The tiny checkpoint, exported on the command line, and what that said."""
    out = tmp_path_factory.mktemp("tensorrt") / "tiny.bundle"
    result = CliRunner().invoke(app, ["export", str(tiny_checkpoint), str(out), "--target", "tensorrt", "-q"])
    assert result.exit_code == 0, result.output
    return out, result.stdout


@pytest.fixture
def typed(told: tuple[Path, str]) -> Path:
    return told[0]


def parts(bundle: Path) -> dict[str, dict[str, Any]]:
    return {part["part"]: part for part in json.loads((bundle / "edgevlm.json").read_text())["parts"]}


def test_it_says_what_comes_next(told: tuple[Path, str]) -> None:
    out, text = told
    assert "for tensorrt, 3 parts" in text
    assert text.splitlines()[-1] == (
        f"next: copy {out} to the device, then: edgevlm build {out} && "
        f"edgevlm run {out} --image PICTURE --prompt QUESTION"
    )


def test_both_halves_are_float16_unless_something_is_said(typed: Path) -> None:
    found = parts(typed)
    assert {(part["target"], part["precision"]) for part in found.values()} == {("tensorrt", "fp16")}
    decoder = found["decoder_model_merged"]
    assert (decoder["file"], decoder["cache"]) == ("tensorrt/decoder_model_merged_fp16.onnx", "rows")
    assert decoder["in_place"] == "tensorrt/decoder_model_merged_fp16_in_place.onnx"
    assert set(decoder["extra_files"]) == {decoder["in_place"], f"{decoder['file']}_data"}
    assert decoder["kept_wide"] == []
    names = [tensor["name"] for tensor in decoder["inputs"]]
    assert names[:3] == ["inputs_embeds", "write_indices", "past_key_values.0.key"]
    assert {tensor["dtype"] for tensor in decoder["inputs"][2:]} == {"float16"}
    assert decoder["outputs"][1]["shape"] == ["batch_size", 1, "sequence", 32]  # new rows alone
    assert found["embed_tokens"]["table"]["dtype"] == "float16"


def test_both_graphs_of_the_decoder_are_proved(typed: Path) -> None:
    record = json.loads((typed / "verify.json").read_text())
    checked = [(one["runtime"]["runtime"], one["runtime"]["kv_cache"]) for one in (record, *record["variants"])]
    assert checked == [("tensorrt-on-cpu", "rows"), ("tensorrt-on-cpu", "in place")]
    assert all(one["passed"] for one in (record, *record["variants"]))


def test_the_recipe_names_every_engine_and_is_hashed(typed: Path) -> None:
    recipe = read_recipe(read_bundle(typed))
    assert recipe.max_context == 128
    assert set(recipe.parts) == {"vision_encoder", "decoder_model_merged"}
    assert set(recipe.in_place) == {"decoder_model_merged"}
    (encoder, *_) = recipe.of("vision_encoder").profiles
    assert (encoder.name, encoder.shapes) == ("batch-1", {"pixel_values": ((1, 3, 32, 32),) * 3})
    assert "tensorrt/build.json" in (typed / "SHA256SUMS").read_text()


def test_what_was_looked_at_to_find_overflows_is_recorded(typed: Path) -> None:
    assert "calibration" in json.loads((typed / "edgevlm.json").read_text())["provenance"]


def test_files_of_the_hub_name_no_graph(typed: Path) -> None:
    """transformers.js reads folders that hold onnx/; here there is nothing for it, and nothing tells it otherwise."""
    assert "decoder_model_merged" not in (typed / "config.json").read_text()
    assert not (typed / "onnx").exists()


def test_what_a_long_context_takes_is_told_before_the_work(
    tiny_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(golden, "recorded", stop)
    for most, told in ((127, 1), (128, 0)):  # the checkpoint has 128 rows
        caplog.clear()
        monkeypatch.setattr(writing, "LONG_CONTEXT", most)
        with caplog.at_level(logging.INFO, "edgevlm"), pytest.raises(KeyboardInterrupt):
            export_bundle(tiny_checkpoint, target="tensorrt", out=tmp_path / f"{most}.bundle")
        assert caplog.text.count("a context of 128 rows") == caplog.text.count("--max-context 127") == told


def test_a_damaged_recipe_is_refused(typed: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(typed, tmp_path / "copy")
    (copy / "tensorrt" / "build.json").write_text('{"schema": 1, "parts": {}}')
    with pytest.raises(IntegrityError, match=r"build\.json was changed"):
        read_bundle(copy)
    write_sums(copy)
    with pytest.raises(IntegrityError, match="missing max_context"):
        read_recipe(read_bundle(copy))


def test_a_bundle_for_onnx_has_no_recipe(tiny_bundle: Path) -> None:
    with pytest.raises(UnsupportedError, match="export it with --target tensorrt"):
        read_recipe(read_bundle(tiny_bundle))


@pytest.mark.slow
def test_a_shorter_context_is_the_caches_own(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = export_bundle(tiny_checkpoint, target="tensorrt", out=tmp_path / "short", max_context=96)
    recipe = read_recipe(read_bundle(out))
    assert recipe.of("decoder_model_merged", in_place=True).profiles[0].shapes["past_key_values.0.key"][0][2] == 96


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoder", "decoder"),
    [("fp32,bf16", "fp32,bf16"), ("fp16,int8", "int4,int4-b64-rtn,int8-static"), ("fp8", "fp8,nvfp4")],
)
def test_every_precision_is_proved(encoder: str, decoder: str, tmp_path: Path) -> None:
    out, options = tmp_path / "out", ["--encoder-precision", encoder, "--decoder-precision", decoder]
    calibration = ["--calib-samples", "8"] if encoder != "fp32,bf16" else []
    arguments = ["export", "nano", str(out), "-t", "tensorrt", "-q", "--json", *options, *calibration]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)["verify"]
    found = [one["precision"] for one in (record, *record["variants"])]
    assert set(found) == set(precisions(encoder, decoder, "tensorrt").decoder)
    with open_bundle(out, "tensorrt-on-cpu") as vlm:
        assert vlm.ask(DEMO_IMAGE, "How many objects are there?", max_tokens=3).text


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [1, 2])
def test_a_model_with_pre_fusion_is_proved(ratio: int, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Its encoder reads all the views of a picture at once, and its text sees them before the decoder."""
    checkpoint = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    fusion = FusionConfig(num_layers=2, grid_size=2, num_heads=4, resolution_ratio=ratio)
    config = replace(load_model(checkpoint).model.config, fusion=fusion, projector=MlpConfig())
    model = Vlm(config)
    model.initialize(0)
    save_native(model, checkpoint, dtype=torch.float32)
    processor = json.loads((checkpoint / "processor.json").read_text()) | {"suite": ""}
    processor["prompt"]["num_vision_tokens"] = 4
    if ratio > 1:
        processor["image"]["split"] = {"type": "crops", "per_side": ratio}
    (checkpoint / "processor.json").write_text(json.dumps(processor))
    out = export_bundle(checkpoint, target="tensorrt", out=tmp_path / "fused")
    assert parts(out)["fusion"]["precision"] == "fp16"
    recipe = read_recipe(read_bundle(out))
    assert recipe.of("fusion").profiles[0].shapes["inputs_embeds"][2][1] == 128
    assert recipe.of("vision_encoder").profiles[0].shapes == {}


def test_half_words_mean_what_the_target_has() -> None:
    assert both_halves("int8", "tensorrt") == ("int8", "int8-static")
    assert both_halves("fp8", "tensorrt") == ("fp8", "fp8")
    assert both_halves("int4", "tensorrt") == ("fp16", "int4")
    assert both_halves("nvfp4", "tensorrt") == ("fp16", "nvfp4")
    assert both_halves("bf16", "tensorrt") == ("bf16", "bf16")
    assert both_halves("int4") == ("fp32", "int4")


def test_what_is_not_said_follows_from_the_target() -> None:
    assert precisions(None, None, "tensorrt").of("vision_encoder") == ("fp16",)
    assert precisions(None, None).of("decoder_model_merged") == ("fp32",)
    wanted = precisions("int8,bf16", "int8-static,bf16", "tensorrt")
    assert wanted.of("fusion") == ("fp16", "bf16")
    assert wanted.of("embed_tokens") == ("fp16",)


@pytest.mark.parametrize(
    ("target", "encoder", "decoder", "words"),
    [
        ("tensorrt", "fp16", "int8", "int8-static"),
        ("tensorrt", "fp16", "int8-dynamic", "nvfp4"),
        ("tensorrt", "fp16", "int4-b128-asym", "int4"),
        ("tensorrt", "int4", "fp16", "fp16, fp32, bf16, int8, fp8"),
        ("onnx", "fp32", "nvfp4", "int8-dynamic"),
        ("onnx", "fp8", "fp32", "fp16, fp32, int8"),
        ("onnx", "bf16", "fp32", "openvino-bf16"),
        ("onnx", "fp32", "bf16", "openvino-bf16"),
    ],
)
def test_a_precision_that_a_target_lacks_is_told_with_those_it_has(
    target: str, encoder: str, decoder: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        precisions(encoder, decoder, target)


def test_an_unknown_target_is_told_with_the_known_ones(tiny_checkpoint: Path, tmp_path: Path, refused: Refused) -> None:
    refused(3, ("tensorrt", "Did you mean"), "export", tiny_checkpoint, tmp_path / "out", "--target", "tensor-rt")


def test_the_runtime_of_another_target_says_what_reads_the_bundle(typed: Path) -> None:
    with pytest.raises(UnsupportedError, match="--runtime tensorrt, or tensorrt-on-cpu"):
        open_bundle(typed, "onnxruntime")


def test_it_answers_as_the_checkpoint_does(typed: Path, tiny_checkpoint: Path) -> None:
    with open_bundle(typed, "tensorrt-on-cpu") as vlm, load_model(tiny_checkpoint).open() as reference:
        found, expected = (one.ask(DEMO_IMAGE, "How many?", max_tokens=8, ignore_eos=True) for one in (vlm, reference))
        assert found.token_ids == expected.token_ids
