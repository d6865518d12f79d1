"""FastVLM as transformers saves it, and the same weights as Apple calls them, give what transformers computes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import FastVlmConfig, FastVlmForConditionalGeneration

import edgevlm
from edgevlm.bundle.read import read_bundle
from edgevlm.core.errors import IntegrityError
from edgevlm.families.fastvlm_original import timm_name
from edgevlm.models.checkpoint import Checkpoint, load_model
from edgevlm.models.vision.fastvit import FastVit
from edgevlm.processing.chat import user_message
from edgevlm.shapes.fastvit import MCI
from edgevlm.verify import verify_bundle

Fill = Callable[..., nn.Module]
Close = Callable[..., float]
Steps = Callable[..., list[int]]

SIDE, NUM_TOKENS, STEPS = 256, 16, 10
IDS = {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258}
IMAGE_ID = 259  # as in Apple's folders, the tokenizer does not have it and gets it as its last token
NARROW = {"layers": (1, 2, 1, 1, 2), "embed_dims": (16, 32, 64, 64, 128)}
TEXT = {
    "model_type": "qwen2",
    "vocab_size": 270,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 258,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "tie_word_embeddings": False,
}
CROPPED = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": SIDE},
    "resample": 3,
    "crop_size": {"height": SIDE, "width": SIDE},
    "image_mean": [0.0, 0.0, 0.0],
    "image_std": [1.0, 1.0, 1.0],
}
LLAVA = {
    "model_type": "llava_qwen2",
    "mm_vision_tower": f"mobileclip_l_{SIDE}",
    "mm_hidden_size": 256,
    "mm_projector_type": "mlp2x_gelu",
    "image_aspect_ratio": "pad",
    "mm_use_im_start_end": False,
    "mm_vision_select_layer": -2,
    "mm_patch_merge_type": "flat",
    "tokenizer_model_max_length": 8192,
}
# Apple's flat list of modules: what stands at each index.
FLAT = {
    "stages.0.blocks": 0,
    "stages.1.downsample": 1,
    "stages.1.blocks": 2,
    "stages.2.downsample": 3,
    "stages.2.blocks": 4,
    "stages.3.downsample": 5,
    "stages.3.pos_emb": 6,
    "stages.3.blocks": 7,
    "stages.4.downsample": 8,
    "stages.4.pos_emb": 9,
    "stages.4.blocks": 10,
}
APPLE = (
    (r"^stem\.", "patch_embed."),
    (r"^final_conv\.", "conv_exp."),
    (r"se\.fc1\.", "se.reduce."),
    (r"se\.fc2\.", "se.expand."),
    (r"\.mlp\.", ".convffn."),
    (r"\.gamma$", ""),
    (r"(proj\.0)\.reparam_conv\.", r"\1.lkb_reparam."),
    (r"large_conv\.", "lkb_origin."),
    (r"conv_kxk\.", "rbr_conv."),
    (r"conv_scale\.", "rbr_scale."),
    (r"identity\.", "rbr_skip."),
    (r"pos_enc\.", "pe."),
)


@dataclass(frozen=True)
class Pair:
    """transformers' model, and ours of the folder that it saved; one picture and one question to both."""

    reference: nn.Module
    checkpoint: Checkpoint
    pixels: Tensor  # (1, 3, H, W)
    ids: Tensor  # (1, T)


@pytest.fixture(scope="module", params=[True, False], ids=["reparameterized", "train"])
def pair(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_tokenizer: Callable[..., Path],
    spread_out_norms: Fill,
) -> Pair:
    folder = tmp_path_factory.mktemp("fastvlm")
    arguments = {**NARROW, "inference_mode": request.param}
    vision = {"model_type": "timm_wrapper", "architecture": "fastvit_mci3", "hidden_size": 256, "num_classes": 0}
    config = FastVlmConfig(
        vision_config={**vision, "model_args": arguments},
        text_config=TEXT,
        image_token_index=IMAGE_ID,
        attn_implementation="eager",
    )
    reference = spread_out_norms(FastVlmForConditionalGeneration(config))
    spread_out_norms(reference.model.vision_tower, gain=2.0 if request.param else 1.5)
    reference.model.language_model.embed_tokens.weight.data.mul_(8.0)  # rows of the size of the vision tokens
    reference.save_pretrained(folder)
    tiny_tokenizer(folder, IDS, eos_token="<|im_end|>")
    (folder / "preprocessor_config.json").write_text(json.dumps(CROPPED))
    checkpoint = load_model(folder)
    ids = checkpoint.processor.input_ids([user_message("What is it?", num_images=1)])
    pixels = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    return Pair(reference, checkpoint, pixels, torch.from_numpy(ids)[None])


def rows(pair: Pair) -> Tensor:
    """Our prompt: embeddings (1, T, D) with the vision tokens in their places."""
    model = pair.checkpoint.model
    embeds = model.embed_tokens(pair.ids).clone()
    embeds[:, pair.ids[0] == IMAGE_ID] = model.encode(pair.pixels)
    return embeds


def reference_ids(pair: Pair) -> list[int]:
    made = pair.reference.generate(
        input_ids=pair.ids,
        attention_mask=torch.ones_like(pair.ids),
        pixel_values=pair.pixels,
        do_sample=False,
        max_new_tokens=STEPS,
        min_new_tokens=STEPS,
        eos_token_id=None,
    )
    return made[0, pair.ids.shape[1] :].tolist()


@torch.no_grad()
def test_features_and_vision_tokens_equal_those_of_transformers(pair: Pair, assert_close: Close) -> None:
    expected = pair.reference.model.get_image_features(pair.pixels)
    model = pair.checkpoint.model
    features = expected.last_hidden_state.flatten(2).transpose(1, 2)
    assert 0.5 < features.abs().max() < 50.0
    assert_close(model.vision_encoder(pair.pixels), features)
    tokens = expected.pooler_output
    assert_close(model.encode(pair.pixels), tokens if isinstance(tokens, Tensor) else torch.stack(list(tokens)))


@torch.no_grad()
def test_logits_equal_those_of_transformers(pair: Pair, assert_close: Close) -> None:
    expected = pair.reference(input_ids=pair.ids, pixel_values=pair.pixels).logits
    assert expected.abs().max() > 1.0
    assert_close(pair.checkpoint.model(rows(pair)), expected)


@torch.no_grad()
def test_the_picture_matters(pair: Pair) -> None:
    expected = pair.reference(input_ids=pair.ids, pixel_values=pair.pixels).logits[0, -1]
    other = pair.reference(input_ids=pair.ids, pixel_values=1 - pair.pixels).logits[0, -1]
    assert (expected - other).abs().max() > 1e-2


@torch.no_grad()
def test_logits_of_ten_steps_and_greedy_ids_equal_those_of_transformers(pair: Pair, assert_same_steps: Steps) -> None:
    def reference(generated: list[int]) -> Tensor:
        ids = torch.cat((pair.ids, torch.tensor([generated], dtype=torch.long)), 1)
        return pair.reference(input_ids=ids, pixel_values=pair.pixels).logits[0]

    assert assert_same_steps(pair.checkpoint.model, rows(pair), reference) == reference_ids(pair)


def apple_name(name: str) -> str:
    """Apple's name of a tensor that timm calls ``name``."""
    for prefix, index in FLAT.items():
        name = re.sub(rf"^{re.escape(prefix)}\.", f"network.{index}.", name)
    for theirs, apples in APPLE:
        name = re.sub(theirs, apples, name)
    return re.sub(r"^(network\.\d+\.)pos_emb\.", r"\1", name)


def llava_name(name: str) -> str:
    """A tensor of transformers' FastVLM as LLaVA's layout calls it."""
    if name.startswith("model.vision_tower.timm_model."):
        return "model.vision_tower.vision_tower.model." + apple_name(name.split("timm_model.")[1])
    name = name.replace("multi_modal_projector.linear_1", "mm_projector.0")
    return name.replace("multi_modal_projector.linear_2", "mm_projector.2").replace("language_model.", "")


@pytest.fixture
def original(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same weights in Apple's layout, whose vision tower is known by its name alone: here that of a narrow one."""
    if not pair.checkpoint.model.config.vision.reparameterized:
        pytest.skip("Apple published the form for inference")
    narrow = replace(MCI["fastvit_mci3"], depths=NARROW["layers"], widths=NARROW["embed_dims"])
    monkeypatch.setitem(MCI, "fastvit_mci3", narrow)
    tensors = load_file(pair.checkpoint.folder / "model.safetensors")
    named = {llava_name(name): tensor.clone() for name, tensor in tensors.items()}
    named["model.vision_tower.vision_tower.model.head.proj"] = torch.zeros(256, 8)
    save_file(named, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**TEXT, **LLAVA}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(pair.checkpoint.folder / name, tmp_path / name)
    return tmp_path


def test_apples_names_load_to_the_same_model(pair: Pair, original: Path) -> None:
    model, ours = load_model(original).model, pair.checkpoint.model
    assert model.config == replace(ours.config, model_type="llava_qwen2")
    expected = ours.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_of_two_layouts_one_pads_and_one_crops(pair: Pair, original: Path) -> None:
    padded, cropped = load_model(original).processor, pair.checkpoint.processor
    assert (padded.image_spec.fit, cropped.image_spec.fit) == ("pad", "center-crop")
    assert padded.image_spec == replace(cropped.image_spec, fit="pad")
    assert load_model(original, image_fit="center-crop").processor.image_spec == cropped.image_spec
    assert padded.image_spec.pad_color == (0, 0, 0)
    assert padded.prompt_spec == cropped.prompt_spec


@pytest.mark.parametrize("layout", ["transformers", "apple"])
def test_either_layout_becomes_a_bundle_that_passes_the_gate(
    layout: str, pair: Pair, original: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = original if layout == "apple" else pair.checkpoint.folder
    root = edgevlm.export_bundle(folder, out=tmp_path_factory.mktemp("fastvlm") / "out")
    assert read_bundle(root).manifest.family == {"apple": "llava_qwen2", "transformers": "fast_vlm"}[layout]
    assert verify_bundle(root).passed


def test_a_name_that_no_fastvlm_has_is_reported(original: Path) -> None:
    tensors = load_file(original / "model.safetensors")
    tensors["model.vision_tower.vision_tower.model.network.11.0.layer_scale"] = torch.zeros(8, 1, 1)
    save_file(tensors, original / "model.safetensors")
    with pytest.raises(IntegrityError, match=r"network\.11\.0\.layer_scale"):
        load_model(original)


@pytest.mark.parametrize(("folded", "num_keys"), [(True, 628), (False, 1529)])
def test_every_name_of_apples_encoder_is_known(folded: bool, num_keys: int) -> None:
    config = replace(MCI["fastvit_mci3"], reparameterized=folded)
    with torch.device("meta"):
        ours = list(FastVit(config).state_dict())
    apples = [apple_name(name) for name in ours]
    assert len(set(apples)) == num_keys
    assert not set(apples) & set(ours)
    assert [timm_name(name, config) for name in apples] == ours
