"""Folders of ONNX files in the layout of transformers.js become bundles: graphs that another exporter traced."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

from edgevlm.bundle.read import read_bundle
from edgevlm.cli.app import app
from edgevlm.core.errors import EdgeVLMError, InputError, IntegrityError, ParityError, UnsupportedError, UsageError
from edgevlm.export.importing import import_bundle
from edgevlm.models.checkpoint import load_model
from edgevlm.runtimes.open import open_bundle
from edgevlm.shipped import find_bundle

Tokens = Callable[..., Path]
TILE, QUESTION = 32, "What is it?"
TEXT: dict[str, Any] = {
    "vocab_size": 288,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "attn_implementation": "eager",
}
VISION: dict[str, Any] = {
    "image_size": TILE,
    "patch_size": 4,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
PLACES = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
TOKENS = ["<image>", "<fake_token_around_image>", "<global-img>", "<|im_start|>", "<end_of_utterance>", *PLACES]


class Encoder(nn.Module):
    """As the community's SmolVLM files: five axes, and a mask of the pixels that count."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, pixel_attention_mask: Tensor) -> Tensor:
        tiles = pixel_values.flatten(0, 1) * pixel_attention_mask.flatten(0, 1)[:, None]
        vision = self.model.model.vision_model
        patches = vision.embeddings.patch_embedding(tiles).flatten(2).transpose(1, 2)
        placed = patches + vision.embeddings.position_embedding.weight  # what the original's buckets come to
        hidden = vision.encoder(inputs_embeds=placed).last_hidden_state
        features: Tensor = self.model.model.connector(vision.post_layernorm(hidden))
        return features


class Decoder(nn.Module):
    """As optimum's decoder_model_merged: positions from outside, a new present for every past, all logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, inputs_embeds: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        from transformers import DynamicCache

        cache: Any = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        columns = torch.arange(attention_mask.shape[1])
        seen = (columns <= position_ids[:, None, :, None]) & (attention_mask[:, None, None, :] > 0)
        mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
        text = self.model.model.text_model
        hidden = text(
            inputs_embeds=inputs_embeds, attention_mask=mask, position_ids=position_ids, past_key_values=cache
        ).last_hidden_state
        grown = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        return (self.model.lm_head(hidden), *grown)


def names(prefix: str) -> list[str]:
    return [f"{prefix}.{layer}.{kind}" for layer in range(2) for kind in ("key", "value")]


def trace(module: nn.Module, inputs: dict[str, Tensor], outputs: list[str], free: dict[str, Any], file: Path) -> None:
    """With PyTorch's older exporter, as optimum does it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            tuple(inputs.values()),
            str(file),
            input_names=list(inputs),
            output_names=outputs,
            dynamic_axes=free,
            opset_version=17,
            dynamo=False,
        )


def trace_all(model: Any, folder: Path) -> None:
    """The three files."""
    folder.mkdir()
    pixels = {"pixel_values": torch.rand(1, 2, 3, TILE, TILE), "pixel_attention_mask": torch.ones(1, 2, TILE, TILE) > 0}
    free: dict[str, Any] = {name: {0: "batch_size", 1: "num_images"} for name in pixels}
    trace(
        Encoder(model),
        pixels,
        ["image_features"],
        {**free, "image_features": {0: "images"}},
        folder / "vision_encoder.onnx",
    )
    ids = {"input_ids": torch.zeros(1, 3, dtype=torch.int64)}
    axes: dict[int, str] = {0: "batch_size", 1: "sequence_length"}
    embedding = model.model.text_model.embed_tokens
    trace(embedding, ids, ["inputs_embeds"], {"input_ids": axes, "inputs_embeds": axes}, folder / "embed_tokens.onnx")
    rows = {
        "inputs_embeds": torch.rand(1, 3, 64),
        "attention_mask": torch.ones(1, 8, dtype=torch.int64),
        "position_ids": torch.arange(5, 8)[None],
        **{name: torch.rand(1, 2, 5, 16) for name in names("past_key_values")},
    }
    free = dict.fromkeys(("inputs_embeds", "position_ids", "logits"), axes)
    free["attention_mask"] = {0: "batch_size", 1: "total_sequence_length"}
    free |= {name: {0: "batch_size", 2: "past_sequence_length"} for name in names("past_key_values")}
    free |= {name: {0: "batch_size", 2: "total_sequence_length"} for name in names("present")}
    trace(Decoder(model), rows, ["logits", *names("present")], free, folder / "decoder_model_merged.onnx")


@torch.no_grad()
def filled(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator)
            scale = 1.0 if "embed_tokens" in name else 1.4 * noise[0].numel() ** -0.5
            tensor.copy_(noise * scale if tensor.dim() > 1 else 0.2 * noise + float(name.endswith("weight")))
    return model.eval()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokens) -> Path:
    """A SmolVLM as transformers saves it, and in ``onnx/`` the files that a tracer made of it."""
    from transformers import LlamaConfig, SmolVLMConfig, SmolVLMForConditionalGeneration

    folder = tmp_path_factory.mktemp("smolvlm")
    text = LlamaConfig(**TEXT)
    config = SmolVLMConfig(vision_config=VISION, text_config=text, scale_factor=2, image_token_id=256)
    model = filled(SmolVLMForConditionalGeneration(config), 0)
    model.save_pretrained(folder)  # type: ignore[operator]
    trace_all(model, folder / "onnx")
    tiny_tokenizer(folder, {token: 256 + n for n, token in enumerate(TOKENS)}, eos_token="<end_of_utterance>")
    sizes = {"size": {"longest_edge": 2 * TILE}, "max_image_size": {"longest_edge": TILE}}
    images = {"image_processor_type": "Idefics3ImageProcessor", **sizes}
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    return folder


@pytest.fixture
def graphs(checkpoint: Path, tmp_path: Path) -> Path:
    """The folder without its weights, to damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "SmolVLM-ONNX", ignore=shutil.ignore_patterns("*.safetensors")))


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8))


def test_traced_graphs_pass_the_gate_against_pytorch_and_answer_as_it_does(
    checkpoint: Path, graphs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "imported.bundle"
    result = CliRunner().invoke(app, ["bundle", "import", str(graphs), str(out), "--model", str(checkpoint), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["name"] == "SmolVLM-ONNX"
    record = json.loads((out / "verify.json").read_text())
    assert record["passed"]
    assert record["reference"].startswith("PyTorch")
    parts = read_bundle(out).manifest.parts
    assert {part.cache for part in parts if part.part == "decoder_model_merged"} == {"grown"}
    with open_bundle(out) as vlm:
        found = vlm.ask(picture(), QUESTION, max_tokens=16)
    expected = load_model(checkpoint).open().ask(picture(), QUESTION, max_tokens=16)
    assert found.num_vision_tokens > 64  # tiles, and the whole
    assert found.token_ids == expected.token_ids
    assert len(set(found.token_ids)) > 2


def test_without_the_checkpoint_the_record_says_what_it_was_compared_with(graphs: Path, tmp_path: Path) -> None:
    out = import_bundle(graphs, tmp_path / "imported.bundle")
    record = json.loads((out / "verify.json").read_text())
    assert record["passed"]
    assert "nothing with PyTorch" in record["reference"]
    assert read_bundle(out).manifest.provenance["imported"].keys() == {
        path.name for path in (graphs / "onnx").iterdir()
    }


def test_a_rounded_decoder_is_judged_by_pytorchs_logits(checkpoint: Path, graphs: Path, tmp_path: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic

    plain = graphs / "onnx" / "decoder_model_merged.onnx"
    quantize_dynamic(plain, plain.with_name("decoder_model_merged_quantized.onnx"), per_channel=True)
    out = import_bundle(graphs, tmp_path / "imported.bundle", model=checkpoint, decoder="q8")
    record = json.loads((out / "verify.json").read_text())
    assert (record["passed"], record["precision"]) == (True, "int8-dynamic")
    kl = {stage["stage"]: stage["kl"] for stage in record["stages"]}["answer_logits"]
    assert 0 < kl < 0.05  # it rounds, and PyTorch is what tells


def test_files_of_other_weights_are_no_bundle(checkpoint: Path, graphs: Path, tmp_path: Path) -> None:
    from transformers import SmolVLMForConditionalGeneration

    other = filled(SmolVLMForConditionalGeneration.from_pretrained(checkpoint, attn_implementation="eager"), 1)
    shutil.rmtree(graphs / "onnx")
    trace_all(other, graphs / "onnx")
    with pytest.raises(ParityError, match="image_features"):
        import_bundle(graphs, tmp_path / "imported.bundle", model=checkpoint)
    assert not (tmp_path / "imported.bundle").exists()


def lose_a_part(folder: Path) -> None:
    (folder / "onnx" / "embed_tokens.onnx").unlink()


def mix_parts_up(folder: Path) -> None:
    shutil.copyfile(folder / "onnx" / "embed_tokens.onnx", folder / "onnx" / "decoder_model_merged.onnx")


def cut_a_file(folder: Path) -> None:
    file = folder / "onnx" / "embed_tokens.onnx"
    file.write_bytes(file.read_bytes()[:1000])


def lose_a_shape(folder: Path) -> None:
    file = folder / "onnx" / "decoder_model_merged.onnx"
    model = onnx.load(file)
    next(value for value in model.graph.output if value.name == "logits").type.tensor_type.ClearField("shape")
    onnx.save(model, file)


def lose_a_layer(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 3
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (lose_a_part, InputError, "no embed_tokens.onnx"),
        (mix_parts_up, UnsupportedError, "has an input inputs_embeds"),
        (cut_a_file, IntegrityError, "not an ONNX file"),
        (lose_a_layer, IntegrityError, "the decoder has 2 layers, config.json says 3"),
        (lose_a_shape, UnsupportedError, "logits declares no shape, expected 3 axes"),
    ],
)
def test_a_folder_that_cannot_be_imported_is_refused(
    damage: Callable[[Path], None], error: type[EdgeVLMError], words: str, graphs: Path, tmp_path: Path
) -> None:
    damage(graphs)
    with pytest.raises(error, match=words):
        import_bundle(graphs, tmp_path / "imported.bundle")
    assert not (tmp_path / "imported.bundle").exists()


def test_what_is_a_bundle_already_is_not_imported(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a bundle already"):
        import_bundle(find_bundle("nano"), tmp_path / "out")


def test_a_folder_of_links_as_hubs_caches_are_is_copied(graphs: Path, tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    file = graphs / "onnx" / "decoder_model_merged.onnx"
    onnx.save(onnx.load(file), file, save_as_external_data=True, location=f"{file.name}_data", size_threshold=0)
    for number, path in enumerate(path for path in sorted(graphs.rglob("*")) if path.is_file()):
        path.rename(blobs / str(number))
        path.symlink_to(blobs / str(number))
    out = import_bundle(graphs, tmp_path / "imported.bundle")
    copied = out / "onnx" / f"{file.name}_data"
    assert copied.is_file()
    assert not copied.is_symlink()


@pytest.mark.parametrize(
    ("max_context", "error", "words"), [(0, UsageError, "at least 1"), (10**6, UnsupportedError, "was made for")]
)
def test_a_context_that_the_model_does_not_have_is_refused(
    max_context: int, error: type[EdgeVLMError], words: str, graphs: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        import_bundle(graphs, tmp_path / "imported.bundle", max_context=max_context)


def test_a_precision_that_is_not_there_is_named(graphs: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no decoder_model_merged_q4\.onnx"):
        import_bundle(graphs, tmp_path / "imported.bundle", decoder="q4")
