"""The gate of rounded files: what a broken packing or kernel would do is caught in the stage that it breaks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from typer.testing import CliRunner

from edgevlm.bundle.read import read_bundle
from edgevlm.cli.app import app
from edgevlm.export import writing
from edgevlm.export.pipeline import export_bundle
from edgevlm.models.vlm import Vlm
from edgevlm.quant.decoder import QuantizedDecoder
from edgevlm.quant.fake import fake_quantized
from edgevlm.runtimes.choices import Wishes
from edgevlm.verify import Verification, verify_all, verify_bundle

Reseal = Callable[..., None]
Edit = Callable[[np.ndarray], np.ndarray]

DAMAGE: dict[str, tuple[str, str, Edit]] = {  # precision, the end of the tensors' names, what is done to each
    "swapped halves of bytes": ("int4-b32-asym", "weight_q", lambda q: (q << 4) | (q >> 4)),
    "blocks shifted by one": ("int4-b32-asym", "weight_q", lambda q: np.roll(q, 1, axis=1)),
    "zero points off by one": ("int4-b32-asym", "weight_points", lambda p: p + np.uint8(0x11)),
    "scales of other rows": ("int4-b32-asym", "weight_scales", lambda s: np.roll(s, 1, axis=0)),
    "scales a fifth too large": ("int4-b32-asym", "weight_scales", lambda s: s * np.float32(1.2)),
    "columns of other rows": ("int8-dynamic", "weight_q", lambda q: np.roll(q, 1, axis=1)),
    "channel scales off": ("int8-dynamic", "weight_scales", lambda s: s * np.float32(1.2)),
}


@pytest.fixture(scope="module")
def rounded_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both halves in every kind that this machine computes, without a task, whose questions take long."""
    folder = tmp_path_factory.mktemp("rounded")
    checkpoint = Path(shutil.copytree(tiny_checkpoint, folder / "checkpoint"))
    processor = json.loads((checkpoint / "processor.json").read_text())
    (checkpoint / "processor.json").write_text(json.dumps({**processor, "suite": ""}))
    return export_bundle(
        checkpoint,
        out=folder / "rounded.bundle",
        encoder_precision=("fp32", "int8", "fp16"),
        decoder_precision="int4-b32-asym,int8-dynamic,int8,fp16",
        calib_samples=4,
    )


@pytest.fixture
def bundle(rounded_bundle: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(rounded_bundle, tmp_path / "bundle"))


def edit(bundle: Path, part: str, precision: str, ending: str, change: Edit, reseal: Reseal) -> None:
    path = bundle / read_bundle(bundle, check=False).manifest.part(part, precision=precision).file
    model = ir.load(path)
    names = [str(name) for name in model.graph.initializers if str(name).endswith(ending)]
    assert names
    for name in names:
        value = model.graph.initializers[name]
        assert value.const_value is not None
        value.const_value = ir.tensor(np.ascontiguousarray(change(value.const_value.numpy())), name=name)
    ir.save(model, path)
    reseal(bundle)


def test_every_combination_of_an_untouched_bundle_passes(rounded_bundle: Path) -> None:
    found = verify_all(rounded_bundle)
    assert [(one.encoder_precision, one.precision) for one in found] == [
        ("fp32", "int4-b32-asym"),
        ("fp32", "int8-dynamic"),
        ("fp32", "int8-b32"),
        ("fp32", "fp16"),
        ("int8", "int4-b32-asym"),
        ("fp16", "int4-b32-asym"),
    ]
    for one in found:
        assert one.require().passed
        stages = {stage.stage: stage for stage in one.stages}
        assert stages["answer_logits"].measure == "kl"
        assert stages["greedy_ids"].note


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_to_codes_scales_and_zero_points_is_caught(bundle: Path, reseal: Reseal, damage: str) -> None:
    precision, ending, change = DAMAGE[damage]
    edit(bundle, "decoder_model_merged", precision, ending, change, reseal)
    result = CliRunner().invoke(app, ["verify", str(bundle), "--decoder-precision", precision, "-q"])
    assert result.exit_code == 4, result.output
    assert f"fp32 encoder with {precision} decoder: stage prefill_logits differs from PyTorch" in result.stderr


def test_damage_to_one_precision_is_not_blamed_on_another(bundle: Path, reseal: Reseal) -> None:
    precision, ending, change = DAMAGE["swapped halves of bytes"]
    edit(bundle, "decoder_model_merged", precision, ending, change, reseal)
    assert verify_bundle(bundle, Wishes(decoder_precision="int8-dynamic")).passed
    assert CliRunner().invoke(app, ["verify", str(bundle), "--all", "-q"]).exit_code == 4


def test_a_wrong_scale_of_a_rounded_encoder_is_caught(bundle: Path, reseal: Reseal) -> None:
    def louder(scale: np.ndarray) -> np.ndarray:
        return (scale * 1.2).astype(scale.dtype)

    edit(bundle, "vision_encoder", "int8", "scale", louder, reseal)
    broken = verify_bundle(bundle, Wishes(encoder_precision="int8")).broken
    assert broken is not None
    assert broken.stage == "image_features"


def test_a_half_precision_weight_that_changed_is_caught(bundle: Path, reseal: Reseal) -> None:
    edit(bundle, "decoder_model_merged", "fp16", "o_proj.weight", lambda w: w * w.dtype.type(1.2), reseal)
    broken = verify_bundle(bundle, Wishes(decoder_precision="fp16")).broken
    assert broken is not None
    assert broken.stage == "prefill_logits"


def test_a_bundle_without_references_of_its_own_is_judged_by_what_rounding_costs(bundle: Path, reseal: Reseal) -> None:
    strip_own_references(bundle)
    reseal(bundle)
    verification: Verification = verify_bundle(bundle)
    stages = {stage.stage: stage for stage in verification.stages}
    assert verification.passed
    assert stages["prefill_logits"].measure == "kl"


def strip_own_references(bundle: Path) -> None:
    from edgevlm.bundle.golden import load_golden, save_golden

    tensors, meta = load_golden(bundle)
    save_golden(bundle, {name: tensor for name, tensor in tensors.items() if name.count(".") == 1}, meta)


@pytest.fixture
def wrong_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exporter whose int8 file is not what PyTorch computes with the same codes."""

    def other(model: Vlm, quantized: QuantizedDecoder) -> Vlm:
        reference = fake_quantized(model, quantized)
        if quantized.precision == "int8-b32":
            projection = reference.decoder.layers[0].mlp.down_proj  # type: ignore[union-attr]
            projection.weight.data = projection.weight.data * 1.5  # type: ignore[union-attr, operator]
        return reference

    monkeypatch.setattr(writing, "fake_quantized", other)


@pytest.mark.usefixtures("wrong_reference")
def test_one_failed_precision_fails_the_export_and_is_named(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["export", str(checkpoint), str(out), "--decoder-precision", "fp32,int8", "--calib-samples", "1", "-q"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 4, result.output
    assert "fp32 encoder with int8-b32 decoder: stage prefill_logits differs" in result.stderr
    assert not out.exists()
