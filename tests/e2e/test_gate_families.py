"""The gate for models that see a picture in several views: fused with the text, or cut into tiles."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from edgevlm.bundle.golden import load_golden
from edgevlm.bundle.write import write_sums
from edgevlm.export.pipeline import export_bundle
from edgevlm.models.checkpoint import load_model, save_native
from edgevlm.models.vlm import Vlm
from edgevlm.runtimes.open import open_bundle
from edgevlm.runtimes.video import Video
from edgevlm.shapes.config import MlpConfig
from edgevlm.shapes.fusion import FusionConfig
from edgevlm.verify import golden, verify_bundle
from edgevlm.verify.stages import StageResult

Change = Callable[[dict[str, Any]], None]


def derived(checkpoint: Path, folder: Path, fusion: FusionConfig | None, change: Change) -> Path:
    """A checkpoint like ``checkpoint`` with ``fusion``, random weights, and a processor.json that ``change`` edits."""
    shutil.copytree(checkpoint, folder)
    config = load_model(checkpoint).model.config
    if fusion is not None:
        config = replace(config, fusion=fusion, projector=MlpConfig())
    model = Vlm(config)
    model.initialize(0)
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    save_native(model, folder, dtype=torch.float32)
    processor = json.loads((folder / "processor.json").read_text())
    processor["suite"] = ""
    change(processor)
    (folder / "processor.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture(scope="module", params=[pytest.param(1, marks=pytest.mark.slow), 2], ids=["one view", "five views"])
def fused_bundle(
    request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    ratio = request.param

    def change(processor: dict[str, Any]) -> None:
        processor["prompt"]["num_vision_tokens"] = 4
        if ratio > 1:
            processor["image"]["split"] = {"type": "crops", "per_side": ratio}

    fusion = FusionConfig(num_layers=2, grid_size=2, num_heads=4, resolution_ratio=ratio)
    folder = tmp_path_factory.mktemp("fused")
    checkpoint = derived(tiny_checkpoint, folder / "checkpoint", fusion, change)
    return export_bundle(checkpoint, out=folder / "fused.bundle")


@pytest.fixture(scope="module")
def tiled_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    def change(processor: dict[str, Any]) -> None:
        processor["image"] |= {"fit": "stretch", "split": {"type": "nanovlm", "longest_edge": 96, "enlarge": True}}
        processor["prompt"]["layout"] = "nanovlm"

    folder = tmp_path_factory.mktemp("tiled")
    checkpoint = derived(tiny_checkpoint, folder / "checkpoint", None, change)
    add_tile_tokens(checkpoint)
    return export_bundle(checkpoint, out=folder / "tiled.bundle")


def add_tile_tokens(checkpoint: Path) -> None:
    """Make room in the tiny tokenizer for the tokens that name tiles, in the place of its longest words."""
    names = ["<|global_image|>", *(f"<row_{r}_col_{c}>" for r in (1, 2, 3) for c in (1, 2, 3))]
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    model = tokenizer["model"]
    for name in names:
        *_, (left, right) = (pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"])
        model["merges"].pop()
        id = model["vocab"].pop(left + right)
        tokenizer["added_tokens"].append(
            {
                "id": id,
                "content": name,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        )
        model["vocab"][name] = id
    tokenizer["added_tokens"].sort(key=lambda token: token["id"])
    (checkpoint / "tokenizer.json").write_text(json.dumps(tokenizer))


def stages_of(bundle: Path) -> dict[str, StageResult]:
    verification = verify_bundle(bundle)
    verification.require()
    return {result.stage: result for result in verification.stages}


def scale_a_weight(bundle: Path, part: str, copy: Path, number: int) -> tuple[Path, str]:
    """A copy of ``bundle`` in which one matrix of ``part`` is 1.05 times as large; its name."""
    broken = Path(shutil.copytree(bundle, copy))
    path = broken / "onnx" / f"{part}.onnx"
    model = ir.load(path)
    values = [value for value in model.graph.initializers.values() if is_matrix(value)]
    value = values[number % len(values)]
    assert value.const_value is not None
    value.const_value = ir.tensor(value.const_value.numpy() * np.float32(1.05), name=value.name)
    ir.save(model, path)
    manifest = json.loads((broken / "edgevlm.json").read_text())
    manifest["file_bytes"] = {name: (broken / name).stat().st_size for name in manifest["file_bytes"]}
    (broken / "edgevlm.json").write_text(json.dumps(manifest))
    write_sums(broken)
    return broken, str(value.name)


def is_matrix(value: ir.Value) -> bool:
    tensor = value.const_value
    return tensor is not None and tensor.dtype == ir.DataType.FLOAT and len(tensor.shape) == 2


def test_a_fused_bundle_passes_with_a_stage_of_its_own(fused_bundle: Path) -> None:
    stages = stages_of(fused_bundle)
    names = list(stages)
    assert names.index("inputs_embeds") < names.index("fused_embeds") < names.index("prefill_logits")
    fused = stages["fused_embeds"]
    assert fused.max_abs < 2e-6 * max(1.0, fused.max_reference or 0.0)


@pytest.mark.parametrize("number", range(4))
def test_a_changed_weight_of_the_fusion_is_caught_there(fused_bundle: Path, tmp_path: Path, number: int) -> None:
    broken, name = scale_a_weight(fused_bundle, "fusion", tmp_path / "broken", number)
    found = verify_bundle(broken).broken
    assert found is not None, f"{name} scaled by 1.05 was not caught"
    assert found.stage == "fused_embeds"
    assert "fusion" in found.cause


def test_a_fused_bundle_answers_as_pytorch_does(fused_bundle: Path, tmp_path: Path) -> None:
    picture = fused_bundle / "golden" / "0.png"
    checkpoint = load_model(fused_bundle.parent / "checkpoint")
    with open_bundle(fused_bundle) as vlm, checkpoint.open() as reference:
        for source in (picture, Video(frames=[picture, fused_bundle / "golden" / "1.png"]), None):
            found, expected = (one.ask(source, "What is it?", max_tokens=16) for one in (vlm, reference))
            assert found.token_ids == expected.token_ids
            assert found.num_prompt_tokens == expected.num_prompt_tokens
        chats = [one.chat() for one in (vlm, reference)]
        for prompt, image in (("What is it?", picture), ("And now?", None)):
            found, expected = (chat.ask(prompt, image, max_tokens=16) for chat in chats)
            assert found.token_ids == expected.token_ids


def test_golden_pictures_of_a_tiled_model_make_several_tiles_but_few(tiled_bundle: Path) -> None:
    stages_of(tiled_bundle)
    tensors, _ = load_golden(tiled_bundle)
    counts = [len(tensors[f"{number}.pixel_values"]) for number in range(2)]
    assert max(counts) > 1
    assert max(counts) <= golden.MOST_TILES


def test_tiles_in_another_order_are_caught(tiled_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgevlm.processing import views

    original = views.picture_views

    def reversed_views(*arguments: Any) -> Any:
        pixels, grid = original(*arguments)
        return np.ascontiguousarray(pixels[::-1]), grid

    monkeypatch.setattr("edgevlm.processing.processor.picture_views", reversed_views)
    broken = verify_bundle(tiled_bundle).broken
    assert broken is not None
    assert broken.stage == "pixels"
