"""LLaVA in both of its layouts: a folder as others save it, loaded by us, gives what transformers computes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    SiglipVisionConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from edgevlm.families.folder import ModelFolder
from edgevlm.families.llava import FAMILY
from edgevlm.models.checkpoint import Checkpoint, load_model
from edgevlm.models.vlm import Vlm

SIDE = 32
ONE_TILE = [[0, 0]]  # a grid without tiles leaves the picture as a whole
IDS = {"<s>": 256, "</s>": 257, "<image>": 258}
VISION = {
    "image_size": SIDE,
    "patch_size": 8,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
TEXT = {
    "vocab_size": 272,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": IDS["<s>"],
    "eos_token_id": IDS["</s>"],
    "pad_token_id": None,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0},
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CLIP = (CLIPVisionConfig(**VISION), "default", -2)
SIGLIP = (SiglipVisionConfig(**VISION, vision_use_head=False), "full", -1)
MODELS: Mapping[str, tuple[Any, tuple[Any, str, int], str, dict[str, Any]]] = {
    "clip-llama": (LlavaConfig, CLIP, "llama", {}),
    "clip-llama3": (LlavaConfig, CLIP, "llama", {"rope_parameters": LLAMA3}),
    "siglip-qwen2": (LlavaConfig, SIGLIP, "qwen2", {"tie_word_embeddings": True}),
    "siglip-qwen3": (LlavaConfig, SIGLIP, "qwen3", {"head_dim": 24}),
    "next-clip-mistral": (LlavaNextConfig, CLIP, "mistral", {"sliding_window": None}),
}
LAYOUTS = ("as saved", "in shards", "transformers 5", "transformers 4", "original")
Close = Callable[..., float]
Steps = Callable[..., list[int]]


@dataclass(frozen=True)
class Pair:
    """transformers' model and ours, of one folder, with one prompt of a picture."""

    reference: nn.Module
    checkpoint: Checkpoint
    pixels: Tensor
    ids: Tensor


def make_reference(name: str) -> nn.Module:
    kind, (vision, strategy, layer), text, changes = MODELS[name]
    config = kind(
        vision_config=vision,
        text_config=AutoConfig.for_model(text, **{**TEXT, **changes}),
        image_token_index=IDS["<image>"],
        vision_feature_select_strategy=strategy,
        vision_feature_layer=layer,
        attn_implementation="eager",
        tie_word_embeddings=changes.get("tie_word_embeddings", False),
        **({"image_grid_pinpoints": ONE_TILE} if kind is LlavaNextConfig else {}),
    )
    return LlavaForConditionalGeneration(config) if kind is LlavaConfig else LlavaNextForConditionalGeneration(config)


def older_name(name: str) -> str:
    """Where transformers 4 kept what transformers 5 calls ``name``."""
    name = name.replace("model.vision_tower.", "vision_tower.vision_model.")
    name = name.replace("model.language_model.", "language_model.model.").replace("lm_head.", "language_model.lm_head.")
    return name.replace("model.multi_modal_projector.", "multi_modal_projector.").replace("model.image_n", "image_n")


def original_name(name: str) -> str:
    """Where LLaVA's own project keeps it."""
    name = name.replace("model.vision_tower.", "model.vision_tower.vision_tower.vision_model.")
    name = name.replace("model.multi_modal_projector.linear_1", "model.mm_projector.0")
    return name.replace("model.multi_modal_projector.linear_2", "model.mm_projector.2").replace("language_model.", "")


def write(reference: nn.Module, folder: Path, layout: str) -> None:
    """Weights and config.json as a project of that layout leaves them."""
    reference.save_pretrained(folder, **({"max_shard_size": "60KB"} if layout == "in shards" else {}))
    if layout in ("as saved", "in shards"):
        return
    rename = {"transformers 4": older_name, "original": original_name}.get(layout, str)
    skipped = ("lm_head.weight",) if reference.config.tie_word_embeddings else ()
    tensors = {rename(name): value for name, value in reference.state_dict().items() if name not in skipped}
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    if layout == "original":
        write_original_config(folder)


def write_original_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "tiny-clip").mkdir(exist_ok=True)
    (folder / "tiny-clip" / "config.json").write_text(json.dumps(config["vision_config"]))
    extra = {
        "model_type": "llava_llama",
        "mm_vision_tower": "someone/tiny-clip",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "pad",
    }
    (folder / "config.json").write_text(json.dumps({**config["text_config"], **extra, **changes}))


def prompt_ids(num_tokens: int) -> Tensor:
    before, after = [IDS["<s>"], *b"USER: "], list(b"What is it? ASSISTANT:")
    return torch.tensor([[*before, *[IDS["<image>"]] * num_tokens, *after]])


@pytest.fixture
def load(
    tmp_path: Path, tiny_tokenizer: Callable[..., Path], spread_out: Callable[..., nn.Module]
) -> Callable[[str, str], Pair]:
    """The pair of a model in a layout."""

    def make(name: str, layout: str) -> Pair:
        reference = spread_out(make_reference(name))
        write(reference, tmp_path, layout)
        tiny_tokenizer(tmp_path, IDS, bos_token="<s>", eos_token="</s>")
        pixels = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
        num_tokens = 16 + isinstance(reference, LlavaNextForConditionalGeneration)
        return Pair(reference, load_model(tmp_path), pixels, prompt_ids(num_tokens))

    return make


def picture_inputs(pair: Pair) -> dict[str, Any]:
    """The picture as transformers' forward wants it: of LLaVA-NeXT as a stack of one tile."""
    if isinstance(pair.reference, LlavaForConditionalGeneration):
        return {"pixel_values": pair.pixels}
    return {"pixel_values": pair.pixels[None], "image_sizes": torch.tensor([[SIDE, SIDE]])}


def reference_tokens(pair: Pair) -> Tensor:
    """transformers' vision tokens (1, N, D)."""
    return pair.reference.model.get_image_features(**picture_inputs(pair)).pooler_output[0][None]


def reference_logits(pair: Pair, generated: list[int]) -> Tensor:
    """transformers' logits (T, V) of the prompt and what came after; it refuses another number of image tokens."""
    ids = torch.cat((pair.ids, torch.tensor([generated], dtype=torch.long)), 1)
    return pair.reference(input_ids=ids, **picture_inputs(pair)).logits[0]


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *((name, "as saved") for name in MODELS),
        *(("clip-llama", layout) for layout in LAYOUTS[1:]),
        ("siglip-qwen2", "transformers 4"),
        ("next-clip-mistral", "transformers 4"),
    ],
)
@torch.no_grad()
def test_vision_tokens_logits_and_ten_greedy_steps_equal_transformers(
    name: str, layout: str, load: Callable[[str, str], Pair], assert_close: Close, assert_same_steps: Steps
) -> None:
    pair = load(name, layout)
    ours = pair.checkpoint.model
    assert_close(ours.encode(pair.pixels), reference_tokens(pair))
    rows = ours.embed_tokens(pair.ids)
    rows[pair.ids == IDS["<image>"]] = ours.encode(pair.pixels)[0]
    assert_same_steps(ours, rows, partial(reference_logits, pair))


@torch.no_grad()
def test_a_single_tile_ends_with_a_row_unless_the_config_says_so(
    load: Callable[[str, str], Pair], tmp_path: Path
) -> None:
    pair = load("next-clip-mistral", "as saved")
    ours = pair.checkpoint.model
    assert torch.equal(ours.encode(pair.pixels)[0, -1], pair.reference.model.image_newline)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "use_image_newline_parameter": False}))
    without = load_model(tmp_path)
    assert without.processor.prompt_spec.num_vision_tokens == 16
    assert torch.equal(without.model.encode(pair.pixels), ours.encode(pair.pixels)[:, :16])


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_has_its_place_in_either_layout(name: str) -> None:
    reference = make_reference(name)
    folder = ModelFolder(Path())
    folder.__dict__["config"] = json.loads(reference.config.to_json_string())
    config = FAMILY.config(folder)
    names = list(reference.state_dict())
    assert all(FAMILY.place(name, config) is not None for name in names)
    assert [FAMILY.place(older_name(name), config) for name in names] == [FAMILY.place(name, config) for name in names]
    assert FAMILY.place("model.qformer.query", config) is None
    assert FAMILY.place("multi_modal_projector.linear_3.weight", config) is None


def test_llava_1_5_of_full_size_has_the_shapes_of_transformers(tmp_path: Path) -> None:
    clip = {"image_size": 336, "patch_size": 14, "hidden_size": 1024, "intermediate_size": 4096}
    config = {
        "model_type": "llava",
        "vision_config": {
            "model_type": "clip_vision_model",
            **clip,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
        },
        "text_config": {"model_type": "llama", "vocab_size": 32_064, "rms_norm_eps": 1e-5},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = FAMILY.config(ModelFolder(tmp_path))
    with torch.device("meta"):
        reference = LlavaForConditionalGeneration(LlavaConfig.from_pretrained(tmp_path))
        model = Vlm(ours)
    places = {name: FAMILY.place(name, ours) for name in reference.state_dict()}
    shapes = {p.name: reference.state_dict()[name].shape for name, found in places.items() for p in found or ()}
    assert shapes == {name: tensor.shape for name, tensor in model.state_dict().items()}
    unused = [name for name, found in places.items() if found == ()]
    assert len(unused) == 16 + 2  # the 24th block and the norm behind it
    assert ours.num_vision_tokens == 576


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (75, 100, 3), dtype=np.uint8))


@pytest.mark.parametrize("processor", [CLIPImageProcessorPil, LlavaImageProcessorPil])
def test_pixels_are_those_of_the_folders_image_processor(
    processor: Any, load: Callable[[str, str], Pair], tmp_path: Path
) -> None:
    size = {"shortest_edge": SIDE}
    extra = {"do_pad": True} if processor is LlavaImageProcessorPil else {}
    reference = processor(size=size, crop_size={"height": SIDE, "width": SIDE}, **extra)
    reference.save_pretrained(tmp_path)
    found = load("clip-llama", "as saved").checkpoint.processor.pixels(picture())
    expected = reference(picture(), return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_original_layout_pads_with_the_mean_colour(load: Callable[[str, str], Pair], tmp_path: Path) -> None:
    size = {"height": SIDE, "width": SIDE}
    reference = LlavaImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size, do_pad=True)
    found = load("clip-llama", "original").checkpoint.processor.pixels(picture())
    expected = reference(picture(), return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert expected[0, 0, 0].std() < 1e-6 < expected[0, 0, 16].std()  # a picture between two bars
