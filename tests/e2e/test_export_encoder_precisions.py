"""Encoders in every precision through the command line: tiles handed over together, and one view a call."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from edgevlm.cli.app import app
from edgevlm.models.checkpoint import Checkpoint, load_model
from edgevlm.runtimes.open import open_bundle

WriteTokenizer = Callable[..., Path]
TILE = 32
TOKENS = [
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
    "<|im_start|>",
    "<end_of_utterance>",
    *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)),
]
VISION = {
    "image_size": TILE,
    "patch_size": 4,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TEXT = {
    "vocab_size": 288,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
ALLOWED = {"fp32": 1e-5, "fp16": 5e-3, "int8": 6e-2}  # relative L2 of two random layers


@torch.no_grad()
def write(folder: Path, kind: str, tokenizer: WriteTokenizer) -> Path:
    """A checkpoint of Idefics3 or SmolVLM whose pictures become four tiles and the whole."""
    import transformers

    make_config, make_model = (
        getattr(transformers, f"{kind}{name}") for name in ("Config", "ForConditionalGeneration")
    )
    text = transformers.LlamaConfig(**TEXT)  # type: ignore[arg-type]
    model = make_model(make_config(vision_config=VISION, text_config=text, scale_factor=2, image_token_id=256))
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.named_parameters():
        noise = torch.randn(tensor.shape, generator=generator)
        matrix = tensor.dim() > 1
        tensor.copy_(noise * tensor[0].numel() ** -0.5 if matrix else 0.2 * noise + float(name.endswith("weight")))
    model.save_pretrained(folder)
    tokenizer(folder, {token: 256 + id for id, token in enumerate(TOKENS)}, eos_token="<end_of_utterance>")
    sizes = {"size": {"longest_edge": 2 * TILE}, "max_image_size": {"longest_edge": TILE}}
    images = {"image_processor_type": "Idefics3ImageProcessor", **sizes}
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    return folder


@pytest.fixture(
    scope="module",
    params=[("Idefics3", False), ("SmolVLM", False), ("SmolVLM", True)],
    ids=["idefics3", "smolvlm", "smolvlm one view a call"],
)
def exported(
    request: pytest.FixtureRequest, tiny_tokenizer: WriteTokenizer, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Checkpoint, Path, bool]:
    """A checkpoint, the bundle that the command line makes of it, and whether its batch is fixed."""
    kind, static = request.param
    folder = tmp_path_factory.mktemp(kind)
    checkpoint = write(folder / "checkpoint", kind, tiny_tokenizer)
    options = ["--encoder-precision", "fp32,fp16,int8", "--calib-samples", "8", "-q"]
    arguments = ["export", str(checkpoint), str(folder / "bundle"), *options, *(["--static-batch"] if static else [])]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return load_model(checkpoint), folder / "bundle", static


def encoders(bundle: Path) -> list[dict[str, Any]]:
    manifest = json.loads((bundle / "edgevlm.json").read_text())
    return [part for part in manifest["parts"] if part["part"] == "vision_encoder"]


def test_every_precision_takes_the_batch_that_was_asked_for(exported: tuple[Checkpoint, Path, bool]) -> None:
    _, bundle, static = exported
    assert [part["precision"] for part in encoders(bundle)] == ["fp32", "fp16", "int8"]
    assert {part["inputs"][0]["shape"][0] for part in encoders(bundle)} == {1 if static else "batch_size"}


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("precision", ALLOWED)
def test_tiles_are_encoded_as_in_pytorch(precision: str, runtime: str, exported: tuple[Checkpoint, Path, bool]) -> None:
    if runtime == "openvino":
        pytest.importorskip("openvino")
    checkpoint, bundle, _ = exported
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8))
    pixels = checkpoint.processor.pixels(picture)
    assert len(pixels) > 1
    with checkpoint.open().exclusive() as session:
        expected = session.encode(pixels).tokens
    with (
        open_bundle(bundle, encoder_precision=precision, encoder_runtime=runtime) as vlm,
        vlm.exclusive() as session,
    ):
        found = session.encode(pixels).tokens
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error < ALLOWED[precision]
    assert (error > 1e-5) == (precision != "fp32")
