"""One encoder for pictures of several sizes, from export to answer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from edgevlm.bundle.golden import load_golden
from edgevlm.cli.app import app
from edgevlm.core.optional import is_installed
from edgevlm.export.pipeline import export_bundle
from edgevlm.models.checkpoint import load_model, save_native
from edgevlm.models.vlm import Vlm
from edgevlm.runtimes.choices import Wishes
from edgevlm.runtimes.open import open_bundle
from edgevlm.shapes.config import FastVitConfig, HybridConfig, MlpConfig
from edgevlm.shipped import DEMO_IMAGE
from edgevlm.verify import golden, verify_all, verify_bundle
from edgevlm.verify.gate import golden_answers_match

FASTVIT = FastVitConfig(
    image_size=64, depths=(1, 1, 1), widths=(16, 32, 64), num_attention_stages=1, head_dim=16, num_gated_downsamples=1
)
HYBRID = HybridConfig(image_size=32, widths=(16, 32), depths=(1, 1))
SIZES: dict[str, tuple[HybridConfig | FastVitConfig, dict[int, int]]] = {  # tokens by pixels a side
    "hybrid": (HYBRID, {32: 16, 64: 64}),
    "fastvit": (FASTVIT, {64: 16, 128: 64}),
}
QUESTION = "How many?"
NEEDS_OPENVINO = pytest.mark.skipif(
    not is_installed("openvino"), reason="openvino is not installed: pip install 'edgevlm[openvino]'"
)


def with_encoder(checkpoint: Path, vision: HybridConfig | FastVitConfig, num_vision_tokens: int) -> Path:
    """The checkpoint with another encoder and an MLP behind it, weights random."""
    config = load_model(checkpoint).model.config
    decoder = replace(config.decoder, max_position_embeddings=256)
    model = Vlm(replace(config, vision=vision, projector=MlpConfig(), decoder=decoder))
    model.initialize(0)
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    save_native(model, checkpoint, dtype=torch.float32)
    processor = json.loads((checkpoint / "processor.json").read_text())
    processor["image"] |= {"height": vision.image_size, "width": vision.image_size}
    processor["prompt"] |= {"num_vision_tokens": num_vision_tokens}
    (checkpoint / "processor.json").write_text(json.dumps(processor))
    return checkpoint


@pytest.fixture
def flexible(checkpoint: Path) -> Path:
    """A checkpoint whose encoder takes any size."""
    return with_encoder(checkpoint, HYBRID, 16)


@pytest.fixture(scope="module")
def exported(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The checkpoint, and its bundle for 32 and 64 pixels with encoders of two precisions.  Copy before you damage."""
    folder = tmp_path_factory.mktemp("sizes")
    checkpoint = with_encoder(Path(shutil.copytree(tiny_checkpoint, folder / "checkpoint")), HYBRID, 16)
    options = ["--image-size", "32,64", "--encoder-precision", "fp32,int8", "--calib-samples", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(golden, "MANY_SCENES", golden.TASK_SCENES)  # the score is not the point here
        result = CliRunner().invoke(app, ["export", str(checkpoint), str(folder / "out"), *options, "-q"])
    assert result.exit_code == 0, result.output
    return checkpoint, folder / "out"


def manifest(bundle: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((bundle / "edgevlm.json").read_text())
    return values


@pytest.mark.parametrize("name", SIZES)
def test_one_bundle_answers_as_pytorch_does_at_each_size(name: str, checkpoint: Path, tmp_path: Path) -> None:
    vision, sizes = SIZES[name]
    with_encoder(checkpoint, vision, sizes[vision.image_size])
    bundle = export_bundle(checkpoint, out=tmp_path / "out", image_size=tuple(sizes))
    written = manifest(bundle)
    assert written["image_sizes"] == [{"image_size": side, "num_vision_tokens": num} for side, num in sizes.items()]
    assert written["parts"][0]["inputs"][0]["shape"] == ["batch_size", 3, "height", "width"]
    for side, num in sizes.items():
        expected = load_model(checkpoint, image_size=side).open().ask(DEMO_IMAGE, QUESTION, max_tokens=12)
        with open_bundle(bundle, image_size=side) as vlm:
            found = vlm.ask(DEMO_IMAGE, QUESTION, max_tokens=12)
        assert found.token_ids == expected.token_ids
        assert found.num_vision_tokens == expected.num_vision_tokens == num
    with open_bundle(bundle) as vlm:
        assert vlm.ask(DEMO_IMAGE, QUESTION, max_tokens=2).num_vision_tokens == sizes[vision.image_size]


def test_the_gate_covers_every_size_and_encoder(exported: tuple[Path, Path]) -> None:
    bundle = exported[1]
    record = json.loads((bundle / "verify.json").read_text())
    covered = [(one["image_size"], one["encoder_precision"]) for one in (record, *record["variants"])]
    assert covered == [(32, "fp32"), (32, "int8"), (64, "fp32"), (64, "int8")]
    tensors, meta = load_golden(bundle)
    assert meta["image_sizes"] == [32, 32, 64]
    assert tensors["2.pixel_values"].shape == (1, 3, 64, 64)
    assert tensors["2.int8.image_features"].shape == tensors["2.image_features"].shape == (1, 64, 64)
    assert record["task"] is not None
    assert [one["task"] is None for one in record["variants"]] == [False, True, True]


def test_a_fault_at_one_size_is_found_there_and_named(exported: tuple[Path, Path], tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(exported[1], tmp_path / "bundle"))
    file = bundle / "golden" / "golden.safetensors"
    tensors = load_file(file)
    tensors["2.image_features"] = tensors["2.image_features"] * np.float32(1.01)
    save_file(tensors, file)
    passed = {(one.image_size, one.encoder_precision): one.passed for one in verify_all(bundle, check=False)}
    assert passed == {(32, "fp32"): True, (32, "int8"): True, (64, "fp32"): False, (64, "int8"): True}
    result = CliRunner().invoke(app, ["verify", str(bundle), "--no-check", "--image-size", "64", "-q"])
    assert result.exit_code == 4
    assert "fp32 encoder with fp32 decoder at 64 pixels: stage image_features" in result.stderr


@NEEDS_OPENVINO
def test_openvino_reads_the_chosen_size(exported: tuple[Path, Path]) -> None:
    for side in (32, 64):
        verification = verify_bundle(exported[1], Wishes(runtime="openvino", image_size=side))
        assert (verification.passed, verification.image_size) == (True, side)


def test_the_flag_chooses_for_a_bundle_and_for_pytorch(exported: tuple[Path, Path]) -> None:
    checkpoint, bundle = exported
    question = ["--image", str(DEMO_IMAGE), "--prompt", QUESTION, "--max-tokens", "8", "--json", "-q"]
    answers = []
    for model, flags in ((bundle, []), (checkpoint, ["--runtime", "torch"])):
        result = CliRunner().invoke(app, ["run", str(model), "--image-size", "64", *flags, *question])
        assert result.exit_code == 0, result.output
        answers.append(json.loads(result.stdout))
    assert answers[0]["num_vision_tokens"] == answers[1]["num_vision_tokens"] == 64
    assert answers[0]["token_ids"] == answers[1]["token_ids"]


def test_a_benchmark_compares_with_the_cases_of_its_size(exported: tuple[Path, Path]) -> None:
    with open_bundle(exported[1], image_size=64) as vlm:
        assert golden_answers_match(vlm) is None


def test_a_size_that_is_not_there_is_told_with_those_that_are(
    exported: tuple[Path, Path], tiny_bundle: Path, refused: Callable[..., str]
) -> None:
    words = ("no pictures of 48 pixels a side; it was exported for 32, 64",)
    refused(3, words, "run", exported[1], "--prompt", "Hello", "--image-size", "48")
    refused(3, words, "verify", exported[1], "--image-size", "48")
    refused(3, "it was exported for 32", "verify", tiny_bundle, "--image-size", "64")
    refused(2, "either --all or a precision or size", "verify", exported[1], "--all", "--image-size", "64")


@pytest.mark.parametrize(
    ("sizes", "code", "words"),
    [
        ("32,", 2, "several joined by commas (512,1024); found '32,'"),
        ("32,0", 2, "--image-size"),
        ("32,32", 2, "several that differ; found [32, 32]"),
        ("32,36", 3, "image size 36"),
    ],
)
def test_sizes_that_mean_nothing_are_refused(
    flexible: Path, tmp_path: Path, refused: Callable[..., str], sizes: str, code: int, words: str
) -> None:
    refused(code, words, "export", flexible, tmp_path / "out", "--image-size", sizes)


def test_an_encoder_that_cannot_says_why(checkpoint: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    words = "free sizes need a fastvit or hybrid encoder with an mlp projector"
    refused(3, words, "export", checkpoint, tmp_path / "out", "--image-size", "32,64")


def test_a_context_too_short_for_the_largest_size_is_told(
    flexible: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    options = ["--image-size", "32,64", "--max-context", "64"]
    refused(5, "a context of 64 is too short", "export", flexible, tmp_path / "out", *options)


def test_a_bundle_of_one_size_says_nothing_of_sizes_and_opens_at_its_own(tiny_bundle: Path) -> None:
    assert manifest(tiny_bundle)["image_sizes"] == []
    assert "image_sizes" not in json.loads((tiny_bundle / "golden" / "golden.json").read_text())
    with open_bundle(tiny_bundle, image_size=32) as vlm:
        assert vlm.processor.image_spec.height == 32


def test_a_bundle_from_before_there_were_sizes_opens(bundle: Path, reseal: Callable[..., None]) -> None:
    reseal(bundle, lambda values: values.pop("image_sizes"))
    with open_bundle(bundle) as vlm:
        assert isinstance(vlm.ask(DEMO_IMAGE, QUESTION, max_tokens=2).text, str)
