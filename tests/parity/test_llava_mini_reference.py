"""LLaVA-Mini against a second implementation, written from its formulas around transformers' own layers.

The reference runs vision, compressed and text rows jointly, with the placeholder, token id 0 and padding in place and
masked; ours runs the picture first, then the text that is left, and puts the rest back.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from edgevlm.families.folder import ModelFolder
from edgevlm.families.llava_mini import FAMILY
from edgevlm.families.tensors import StoredTensor, read_headers
from edgevlm.models.vision.reparameterize import bake
from edgevlm.models.vlm import Vlm
from edgevlm.models.weights import empty_model, load_weights, placed

IMAGE = -200
SIDE, PATCH, WIDTH, D, VOCABULARY = 32, 8, 64, 64, 300
GRID = SIDE // PATCH
ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": D,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
}
CLIP = {
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
}


class Compressor(nn.Module):
    """The state of the released one; the width's heads are 8."""

    def __init__(self, side: int, width: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(side * side, width))
        self.register_buffer("pos_embed", torch.from_numpy(positions(side, width)))
        self.attn = nn.MultiheadAttention(width, 8, batch_first=True)
        self.ln_q, self.ln_kv = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, features: Tensor) -> Tensor:
        C, g = math.isqrt(len(self.query)), math.isqrt(features.shape[1])
        table = self.pos_embed.T.reshape(1, -1, C, C)
        stretched = F.interpolate(table, (g, g), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
        values = self.ln_kv(features)
        queries = (self.ln_q(self.query) + self.pos_embed).expand(len(features), -1, -1)
        return self.attn(queries, values + stretched, values)[0]


def positions(side: int, width: int) -> np.ndarray:
    """Written out entry by entry: half the channels for the column, half for the row; sines before cosines."""
    quarter, table = width // 4, np.zeros((side * side, width), np.float32)
    for row in range(side):
        for column in range(side):
            for axis, place in enumerate((column, row)):
                for i in range(quarter):
                    angle = place / 10_000 ** (i / quarter)
                    table[row * side + column, axis * 2 * quarter + i] = math.sin(angle)
                    table[row * side + column, axis * 2 * quarter + quarter + i] = math.cos(angle)
    return table


class Reference(nn.Module):
    """One or more prompts with one picture or video each, padded on the right with an id above 0."""

    def __init__(self, side: int, ratio: int, llama: dict[str, object], clip: dict[str, object]) -> None:
        super().__init__()
        self.ratio = ratio
        config = LlamaConfig(
            **{name: value for name, value in llama.items() if name != "rope_theta"},
            rope_parameters={"rope_type": "llama3", "rope_theta": llama["rope_theta"], **ROPE},
            attn_implementation="eager",
            tie_word_embeddings=False,
        )
        width = int(str(clip["hidden_size"]))
        self.lm = LlamaForCausalLM(config)
        self.prefusion_layers = nn.ModuleList(LlamaDecoderLayer(config, index) for index in range(4))
        self.rotary = LlamaRotaryEmbedding(config)
        self.compressor = Compressor(side, width)
        self.projector = nn.Sequential(
            nn.Linear(width, config.hidden_size), nn.GELU(), nn.Linear(config.hidden_size, config.hidden_size)
        )
        self.tower = CLIPVisionModel(CLIPVisionConfig(**clip))

    def original_state(self) -> dict[str, Tensor]:
        """Every tensor under the name that the released checkpoint has for it."""
        parts = {
            "": self.lm,
            "model.prefusion_layers.": self.prefusion_layers,
            "model.compressor.": self.compressor,
            "model.mm_projector.": self.projector,
            "model.vision_tower.vision_tower.vision_model.": self.tower,
        }
        return {prefix + name: value for prefix, part in parts.items() for name, value in part.state_dict().items()}

    def vision(self, views: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (1, M, D) of all views, and the K compressed ones, of (S, 3, H, W)."""
        features = self.tower(views, output_hidden_states=True).hidden_states[-2][:, 1:]
        if len(views) == 1:
            return self.projector(features), self.projector(self.compressor(features))
        n, g = self.ratio, math.isqrt(features.shape[1])
        raster = torch.zeros(n * g, n * g, features.shape[2])
        for crop in range(n * n):
            for patch in range(g * g):
                raster[crop // n * g + patch // g, crop % n * g + patch % g] = features[crop, patch]
        crops = raster.flatten(0, 1).unsqueeze(0)
        rows = torch.cat((self.projector(crops), self.projector(features[-1:])), dim=1)
        return rows, self.projector(self.compressor(crops))

    def joint(self, vision: Tensor, compressed: Tensor, ids: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
        """Compressed rows and text rows [1, T, D] after the pre-fusion; what is not kept has its embedding."""
        text = self.lm.model.embed_tokens(ids.clamp(min=0))
        kept = (ids * ~answers) > 0
        before, K = vision.shape[1] + compressed.shape[1], compressed.shape[1]
        keep = torch.cat((torch.ones(len(ids), before, dtype=torch.bool), kept), dim=1)
        places = (keep.cumsum(1) - 1).masked_fill(~keep, 1)
        hidden = torch.cat((vision.expand(len(ids), -1, -1), compressed.expand(len(ids), -1, -1), text), dim=1)
        total = hidden.shape[1]
        allowed = torch.ones(total, total, dtype=torch.bool).tril() & keep[:, None, None, :]
        mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
        rotary = self.rotary(hidden, places)
        for layer in self.prefusion_layers:
            hidden = layer(hidden, attention_mask=mask, position_ids=places, position_embeddings=rotary)
        return hidden[:, before - K : before], torch.where(kept.unsqueeze(-1), hidden[:, before:], text)

    def llm_input(self, frames: list[Tensor], ids: Tensor, answers: Tensor | None = None) -> list[Tensor]:
        """The rows that the decoder reads, one (T, D) per prompt, of one picture or video for all of them."""
        answers = torch.zeros_like(ids, dtype=torch.bool) if answers is None else answers
        seen = [self.joint(*self.vision(views), ids, answers) for views in frames]
        tokens = torch.cat([tokens for tokens, _ in seen], dim=1)
        text = torch.stack([text for _, text in seen]).mean(0)
        rows = []
        for number, prompt in enumerate(ids):
            place = int((prompt == IMAGE).nonzero()[0, 0])
            rows.append(torch.cat((text[number, :place], tokens[number], text[number, place + 1 :])))
        return rows


@torch.no_grad()
def reference(side: int, ratio: int, spread_out: Callable[..., nn.Module]) -> Reference:
    return spread_out(Reference(side, ratio, LLAMA, CLIP))  # type: ignore[return-value]


def write_config(folder: Path, side: int, ratio: int) -> None:
    mm = {
        "mm_vision_tower": "tower",
        "mm_hidden_size": WIDTH,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_projector_type": "mlp2x_gelu",
        "mm_patch_merge_type": "flat",
        "compressor_size": side,
        "prefusion_layer_num": 4,
        "resolution_ratio": ratio,
    }
    rope = {"rope_scaling": {"rope_type": "llama3", **ROPE}}
    values = {"model_type": "llava_mini_llama", "tie_word_embeddings": False, **LLAMA, **rope, **mm}
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "tower").mkdir()
    (folder / "tower" / "config.json").write_text(json.dumps({"model_type": "clip_vision_model", **CLIP}))


def ours(model: Reference, side: int, folder: Path) -> Vlm:
    """Our model with the reference's weights, through a checkpoint in the original layout."""
    write_config(folder, side, model.ratio)
    tensors = {name: tensor.contiguous() for name, tensor in model.original_state().items()}
    save_file(tensors, folder / "model.safetensors")
    config = FAMILY.config(ModelFolder(folder))
    return load_weights(config, read_headers(folder), FAMILY, torch.float32, where=str(folder)).eval()


def our_rows(model: Vlm, frames: list[Tensor], ids: Tensor, answers: Tensor | None = None) -> Tensor:
    """The decoder's rows (T, D) for one prompt: what is not fused is left out and put back."""
    left_out = (ids <= 0) if answers is None else (ids <= 0) | answers
    text = model.embed_tokens(ids.clamp(min=0))
    seen = [model.encode_fused(views) for views in frames]
    text[~left_out] = torch.stack([model.fuse(cache, text[None, ~left_out]) for _, cache in seen]).mean(0)[0]
    place = int((ids == IMAGE).nonzero()[0, 0])
    return torch.cat((text[:place], *(tokens[0] for tokens, _ in seen), text[place + 1 :]))


def prompt(length: int, place: int, seed: int) -> Tensor:
    """Random ids with the placeholder at ``place`` and two tokens of id 0, one on either side."""
    ids = torch.randint(1, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))
    ids[[max(0, place - 2), min(length - 1, place + 2)]] = 0
    ids[place] = IMAGE
    return ids


def pixels(views: int, seed: int) -> Tensor:
    return torch.randn(views, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("side", "ratio"), [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (3, 2), (2, 3), (4, 1)])
@torch.no_grad()
def test_rows_and_logits_equal_the_reference(
    side: int, ratio: int, spread_out: Callable[..., nn.Module], assert_close: Callable[..., float], tmp_path: Path
) -> None:
    theirs = reference(side, ratio, spread_out)
    model = ours(theirs, side, tmp_path)
    views, ids = pixels(model.config.num_views, 1), prompt(17, 6, 2)
    (expected,) = theirs.llm_input([views], ids[None])
    for found in (our_rows(model, [views], ids), our_rows(bake(model), [views], ids)):
        assert_close(found, expected, 5e-6)
        logits = theirs.lm(inputs_embeds=expected[None]).logits
        assert_close(model(found[None]), logits)


@pytest.mark.parametrize(
    ("ratio", "num_frames"), [(1, 1), (2, 1), (1, 3), (2, 2)], ids=["image", "hd", "video", "hd-video"]
)
@torch.no_grad()
def test_logits_and_ten_greedy_steps_equal_the_reference(
    ratio: int,
    num_frames: int,
    spread_out: Callable[..., nn.Module],
    assert_same_steps: Callable[..., list[int]],
    tmp_path: Path,
) -> None:
    """What the model says goes on behind the fused rows as plain embeddings."""
    theirs = reference(2, ratio, spread_out)
    model, ids = ours(theirs, 2, tmp_path), prompt(17, 6, 2)
    frames = [pixels(model.config.num_views, seed) for seed in range(num_frames)]
    (rows,) = theirs.llm_input(frames, ids[None])

    def logits(generated: list[int]) -> Tensor:
        after = theirs.lm.model.embed_tokens(torch.tensor(generated, dtype=torch.long))
        return theirs.lm(inputs_embeds=torch.cat((rows, after))[None]).logits[0]

    assert_same_steps(model, our_rows(model, frames, ids)[None], logits)


@pytest.mark.parametrize("place", [0, 9])
@torch.no_grad()
def test_the_placeholder_may_be_first_or_last(
    place: int, spread_out: Callable[..., nn.Module], assert_close: Callable[..., float], tmp_path: Path
) -> None:
    theirs = reference(1, 1, spread_out)
    model, views, ids = ours(theirs, 1, tmp_path), pixels(1, 1), prompt(10, place, 3)
    assert_close(our_rows(model, [views], ids), theirs.llm_input([views], ids[None])[0], 5e-6)


@pytest.mark.parametrize("ratio", [1, 2])
@torch.no_grad()
def test_a_video_is_the_mean_of_its_text_and_all_of_its_tokens(
    ratio: int, spread_out: Callable[..., nn.Module], assert_close: Callable[..., float], tmp_path: Path
) -> None:
    theirs = reference(2, ratio, spread_out)
    model, ids = ours(theirs, 2, tmp_path), prompt(12, 4, 5)
    frames = [pixels(model.config.num_views, seed) for seed in range(5)]
    (expected,) = theirs.llm_input(frames, ids[None])
    assert expected.shape == (12 - 1 + 5 * 4, D)
    assert_close(our_rows(model, frames, ids), expected, 5e-6)


@torch.no_grad()
def test_a_batch_padded_on_the_right_equals_its_prompts_alone(
    spread_out: Callable[..., nn.Module], assert_close: Callable[..., float], tmp_path: Path
) -> None:
    theirs = reference(2, 1, spread_out)
    model, views, prompts = ours(theirs, 2, tmp_path), pixels(1, 1), [prompt(15, 5, 6), prompt(9, 3, 7)]
    padded = torch.full((2, 15), 7)
    for row, ids in zip(padded, prompts, strict=True):
        row[: len(ids)] = ids
    both = theirs.llm_input([views], padded)
    for expected, ids in zip(both, prompts, strict=True):
        assert_close(our_rows(model, [views], ids), expected[: len(ids) + 3], 5e-6)


@torch.no_grad()
def test_training_leaves_answers_and_padding_out(
    spread_out: Callable[..., nn.Module], assert_close: Callable[..., float], tmp_path: Path
) -> None:
    theirs = reference(2, 1, spread_out)
    model, ids = ours(theirs, 2, tmp_path), prompt(16, 5, 8)[None]
    answers = torch.zeros_like(ids, dtype=torch.bool)
    answers[:, 9:12] = True
    (expected,) = theirs.llm_input([pixels(1, 1)], ids, answers)
    assert_close(our_rows(model, [pixels(1, 1)], ids[0], answers[0]), expected, 5e-6)
    kept = (ids > 0) & ~answers
    tokens, rows = model.forward_fused(pixels(1, 1)[None], model.embed_tokens(ids.clamp(min=0)), kept)
    assert_close(torch.cat((rows[0, :5], tokens[0], rows[0, 6:])), expected, 5e-6)


@torch.no_grad()
def test_the_released_model_has_732_tensors_and_every_one_has_its_place(tmp_path: Path) -> None:
    llama = {
        **LLAMA,
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
    write_config(tmp_path, 1, 1)
    values = json.loads((tmp_path / "config.json").read_text())
    tower = "openai/clip-vit-large-patch14-336"
    (tmp_path / "config.json").write_text(json.dumps({**values, **llama, "mm_vision_tower": tower}))
    config = FAMILY.config(ModelFolder(tmp_path))
    clip = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    model = empty_model(config)
    with torch.device("meta"):
        state = Reference(1, 1, llama, {**clip, "image_size": 336, "patch_size": 14}).original_state()
    assert len(state) == 732
    assert "model.vision_tower.vision_tower.vision_model.pre_layrnorm.weight" in state
    tensors = {
        name: StoredTensor(name=name, dtype="F16", shape=tuple(tensor.shape), file=tmp_path, offset=0)
        for name, tensor in state.items()
    }
    sources, unknown = placed(tensors, FAMILY, config, where="released")
    assert unknown == []
    found = {name: source.shape for name, source in sources.items()}
    assert found == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert round((sizes["decoder"] + sizes["embed_tokens"] + sizes["lm_head"]) / 1e9, 3) == 8.030
    fusion = model.fusion
    assert fusion is not None
    assert round(sum(p.numel() for p in fusion.layers.parameters()) / 1e6, 1) == 872.4
    assert round(sum(p.numel() for p in fusion.compressor.parameters()) / 1e6, 1) == 4.2
    assert round(sizes["projector"] / 1e6, 1) == 21.0


@torch.no_grad()
def test_the_weights_decide_how_many_queries_there_are(spread_out: Callable[..., nn.Module], tmp_path: Path) -> None:
    theirs = reference(3, 1, spread_out)
    ours(theirs, 3, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "compressor_size": 1}))
    config = FAMILY.config(ModelFolder(tmp_path))
    assert config.num_vision_tokens == 9
