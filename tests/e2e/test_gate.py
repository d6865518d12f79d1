"""The gate catches what silently makes an export another model, and names the stage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from edgevlm.bundle.read import read_bundle
from edgevlm.bundle.write import write_sums
from edgevlm.cli.app import app
from edgevlm.core.config import from_mapping
from edgevlm.export import writing
from edgevlm.export.parts import Part, split
from edgevlm.models.decoder import rotary_table
from edgevlm.models.vlm import Vlm
from edgevlm.shapes.config import VlmConfig
from edgevlm.verify import verify_bundle

Edit = Callable[[str, np.ndarray], np.ndarray]


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def edit_weights(bundle: Path, part: str, edits: dict[str, Edit]) -> None:
    """Change weights of a part by name, and make the hashes fit again."""
    path = bundle / "onnx" / f"{part}.onnx"
    model = ir.load(path)
    for name, edit in edits.items():
        value = model.graph.initializers[name]
        assert value.const_value is not None
        value.const_value = ir.tensor(edit(name, value.const_value.numpy()), name=name)
    ir.save(model, path)
    reseal(bundle)


def scale_rows(bundle: Path) -> None:
    """Scale the rows of the embedding where they lie in their file."""
    table = read_bundle(bundle, check=False).manifest.part("embed_tokens").table
    assert table is not None
    shape = (table.num_rows, table.num_columns)
    rows = np.memmap(bundle / table.file, table.dtype, "r+", table.offset, shape)
    rows *= 1.05
    rows.flush()
    reseal(bundle)


def edit_image_spec(bundle: Path, **changes: object) -> None:
    manifest = json.loads((bundle / "edgevlm.json").read_text())
    manifest["image"].update(changes)
    (bundle / "edgevlm.json").write_text(json.dumps(manifest))
    reseal(bundle)


def reseal(bundle: Path) -> None:
    """Fit lengths and hashes to the changed files: the damage is to the numbers, not to the copy."""
    manifest = json.loads((bundle / "edgevlm.json").read_text())
    manifest["file_bytes"] = {name: (bundle / name).stat().st_size for name in manifest["file_bytes"]}
    (bundle / "edgevlm.json").write_text(json.dumps(manifest))
    write_sums(bundle)


def assert_caught(bundle: Path, stage: str) -> None:
    result = CliRunner().invoke(app, ["verify", str(bundle), "-q"])
    assert result.exit_code == 4
    assert f"stage {stage} differs from PyTorch" in result.stderr


def scale(name: str, weight: np.ndarray) -> np.ndarray:
    return weight * np.float32(1.05)


def matrices(bundle: Path, part: str) -> list[str]:
    """Names of a part's float weights with two or more axes."""
    graph = ir.load(bundle / "onnx" / f"{part}.onnx").graph
    return [
        str(name)
        for name, value in graph.initializers.items()
        if value.const_value is not None
        and value.const_value.dtype == ir.DataType.FLOAT
        and len(value.const_value.shape) > 1
    ]


@pytest.fixture
def wrong_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exporter that lowers another weight than the model has."""

    def split_wrongly(model: Vlm, **options: bool) -> tuple[Part, ...]:
        parts = split(model, **options)
        decoder = next(part for part in parts if part.name == "decoder_model_merged")
        projection = decoder.model.decoder.layers[0].mlp.down_proj  # type: ignore[union-attr]
        assert isinstance(projection, nn.Linear)
        projection.weight = nn.Parameter(projection.weight * 1.05)  # a new one: the reference keeps the old one
        return parts

    monkeypatch.setattr(writing, "split", split_wrongly)


@pytest.mark.usefixtures("wrong_decoder")
@pytest.mark.parametrize("keep", [False, True])
def test_an_export_of_another_model_leaves_nothing_but_on_request(
    tiny_checkpoint: Path, tmp_path: Path, keep: bool
) -> None:
    out, failed = tmp_path / "out", tmp_path / "out.failed"
    command = ["export", str(tiny_checkpoint), str(out), "-q", *(["--keep"] if keep else [])]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 4
    assert "stage prefill_logits differs from PyTorch" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ([failed.name] if keep else [])
    if keep:
        assert f"kept in {failed}" in result.stderr
        assert verify_bundle(failed).broken is not None


def test_a_golden_folder_without_cases_proves_nothing(bundle: Path) -> None:
    meta = json.loads((bundle / "golden" / "golden.json").read_text())
    (bundle / "golden" / "golden.json").write_text(json.dumps({**meta, "prompts": [], "task": None}))
    reseal(bundle)
    result = CliRunner().invoke(app, ["verify", str(bundle), "-q"])
    assert result.exit_code == 7
    assert "holds no case" in result.stderr


def test_a_damaged_golden_picture_is_damage_of_the_bundle(bundle: Path) -> None:
    (bundle / "golden" / "0.png").write_bytes(b"no picture")
    reseal(bundle)
    result = CliRunner().invoke(app, ["verify", str(bundle), "-q"])
    assert result.exit_code == 7
    assert "golden/ is damaged" in result.stderr


def test_an_untouched_bundle_passes(bundle: Path) -> None:
    result = CliRunner().invoke(app, ["verify", str(bundle), "--json", "-q"])
    assert result.exit_code == 0
    verification = json.loads(result.stdout)
    assert verification["passed"]
    assert all(stage["max_abs"] <= 1e-4 for stage in verification["stages"])


def test_every_matrix_of_the_encoder_and_the_decoder_counts(bundle: Path, tiny_bundle: Path) -> None:
    """Scaling any one of them by 1.05 is caught in the stage that computes with it."""
    stages = {"vision_encoder": "image_features", "decoder_model_merged": "prefill_logits"}
    for part, stage in stages.items():
        for name in matrices(tiny_bundle, part):
            if name.startswith("rotary"):
                continue
            shutil.copytree(tiny_bundle, bundle, dirs_exist_ok=True)
            edit_weights(bundle, part, {name: scale})
            broken = verify_bundle(bundle).broken
            assert broken is not None, f"{name} scaled by 1.05 was not caught"
            assert broken.stage == stage, name


@pytest.mark.parametrize(
    "weight", ["lm_head.weight", "layers.1.mlp.down_proj.weight", "layers.0.self_attn.qkv_proj.weight"]
)
def test_a_scaled_weight_exits_with_4(bundle: Path, weight: str) -> None:
    edit_weights(bundle, "decoder_model_merged", {weight: scale})
    assert_caught(bundle, "prefill_logits")


def test_scaled_rows_of_the_embedding_exit_with_4(bundle: Path) -> None:
    scale_rows(bundle)
    assert_caught(bundle, "inputs_embeds")


def test_swapped_weights_are_caught(bundle: Path) -> None:
    names = ["layers.0.mlp.down_proj.weight", "layers.1.mlp.down_proj.weight"]
    graph = ir.load(bundle / "onnx" / "decoder_model_merged.onnx").graph
    weights = {name: np.array(graph.initializers[name].const_value.numpy()) for name in names}  # type: ignore[union-attr]
    edit_weights(
        bundle,
        "decoder_model_merged",
        {n: lambda name, _: weights[names[1 - names.index(name)]] for n in names},
    )
    assert_caught(bundle, "prefill_logits")


def test_another_rotary_base_is_caught(bundle: Path) -> None:
    config = from_mapping(
        VlmConfig, json.loads((bundle / "config.json").read_text()), strict=False, where="config.json"
    )
    decoder = replace(config.decoder, rope_theta=500_000.0)
    cosine, sine = (t[0, 0].numpy() for t in rotary_table(torch.arange(128).unsqueeze(0), decoder))
    edit_weights(bundle, "decoder_model_merged", {"rotary.cosine": lambda *_: cosine, "rotary.sine": lambda *_: sine})
    assert_caught(bundle, "prefill_logits")


@pytest.mark.parametrize(
    "change",
    [
        {"mean": [0.48, 0.46, 0.41]},
        {"mean": [0.505, 0.5, 0.5]},
        {"std": [0.229, 0.224, 0.225]},
        {"filter": "bilinear"},
        {"filter": "lanczos"},
        {"fit": "stretch"},
        {"channel_order": "bgr"},
        {"pad_color": [0, 0, 0]},
        {"antialias": False},
    ],
    ids=str,
)
def test_other_preprocessing_is_caught(bundle: Path, change: dict[str, object]) -> None:
    edit_image_spec(bundle, **change)
    assert_caught(bundle, "pixels")


def test_another_chat_template_is_caught(bundle: Path) -> None:
    template = bundle / "chat_template.jinja"
    template.write_text(template.read_text().replace("'<|assistant|>'", "'<|user|>'"))
    reseal(bundle)
    assert_caught(bundle, "input_ids")


def test_a_stage_of_another_shape_or_with_nan_is_broken(bundle: Path) -> None:
    edit_weights(bundle, "decoder_model_merged", {"lm_head.weight": lambda _, weight: weight * np.float32(np.nan)})
    result = CliRunner().invoke(app, ["verify", str(bundle), "-q"])
    assert result.exit_code == 4
    assert "holds NaN or infinity" in result.stderr
