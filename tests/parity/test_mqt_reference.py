"""Matryoshka queries against PyTorch's own multi-head attention, and what makes them foldable and sliceable."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from edgevlm.core.errors import ConfigError, UnsupportedError
from edgevlm.families.mqt import num_queries, place_queries
from edgevlm.models.checkpoint import load_model
from edgevlm.models.projectors.queries import QueryProjector
from edgevlm.models.vision.reparameterize import bake
from edgevlm.processing.chat import user_message
from edgevlm.shapes.config import DecoderConfig, QueriesConfig, VitConfig, VlmConfig

WIDTH, D, HEADS, SIDE = 128, 48, 16, 24
DECODER = DecoderConfig(
    vocab_size=300,
    hidden_size=D,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=12,
    max_position_embeddings=512,
    tie_word_embeddings=False,
)
TOWER = VitConfig(
    image_size=SIDE * 2,
    patch_size=2,
    hidden_size=WIDTH,
    intermediate_size=WIDTH,
    num_hidden_layers=1,
    num_attention_heads=4,
    layer_norm_eps=1e-5,
    hidden_act="quick_gelu",
    class_token=True,
    pre_layernorm=True,
    post_layernorm=False,
)
CONFIG = VlmConfig(vision=TOWER, projector=QueriesConfig(), decoder=DECODER)
Spread = Callable[..., nn.Module]
Close = Callable[..., float]


class Abstractor(nn.Module):
    """A second implementation, with the names and shapes of the released checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(256, WIDTH))
        self.pos_embed = nn.Parameter(torch.zeros(256, WIDTH))
        self.attn = nn.MultiheadAttention(WIDTH, HEADS)
        self.ln_q, self.ln_k, self.ln_v = (nn.LayerNorm(WIDTH, eps=1e-6) for _ in range(3))
        self.proj = nn.Parameter(torch.zeros(WIDTH, D))

    def forward(self, features: Tensor, m: int) -> tuple[Tensor, Tensor]:
        """``(B, 576, WIDTH)`` to ``(B, m, D)``, and the weights of attention ``(B, heads, m, 576)``."""
        grid = self.pos_embed.T.reshape(1, WIDTH, 16, 16)
        grown = F.interpolate(grid, (SIDE, SIDE), mode="bicubic", align_corners=False)[0].flatten(1).T
        query = self.ln_q(self.query + self.pos_embed)[:m]
        B = len(features)
        out, weights = self.attn(
            query[:, None].repeat(1, B, 1),
            self.ln_k(grown)[:, None].repeat(1, B, 1),
            self.ln_v(features).transpose(0, 1),
            average_attn_weights=False,
        )
        return out.transpose(0, 1) @ self.proj, weights


@pytest.fixture
def reference(spread_out: Spread) -> nn.Module:
    return spread_out(Abstractor())


@pytest.fixture
def ours(reference: nn.Module) -> QueryProjector:
    """Ours with the reference's weights, each of which has its place."""
    projector = QueryProjector(CONFIG)
    weights = {}
    for name, tensor in reference.state_dict().items():
        for where in place_queries(name) or ():
            part = tensor.chunk(where.part[1])[where.part[0]]
            weights[where.name.removeprefix("projector.")] = part.T if where.transpose else part
    projector.load_state_dict(weights)
    return projector.eval()


@pytest.fixture
def features() -> Tensor:
    return 2 * torch.randn(2, SIDE**2, WIDTH, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("m", [1, 7, 36, 256])
@torch.no_grad()
def test_tokens_equal_those_of_multi_head_attention(
    reference: nn.Module, ours: QueryProjector, features: Tensor, m: int, assert_close: Close
) -> None:
    ours.num_queries = m
    assert_close(ours(features), reference(features, m)[0], 1e-5)


@torch.no_grad()
def test_the_attention_does_not_look_at_the_picture(
    reference: nn.Module, ours: QueryProjector, features: Tensor, assert_close: Close
) -> None:
    _, weights = reference(features, 256)
    assert torch.equal(weights[0], weights[1])
    assert_close(ours.mixing(), weights[0], 1e-6)
    assert float(ours.mixing().std(dim=-1).max()) > 1e-4  # nor is it flat: all places alike would hide mistakes


@torch.no_grad()
def test_fewer_tokens_are_the_first_of_many(ours: QueryProjector, features: Tensor, assert_close: Close) -> None:
    every = ours(features)
    for m in (1, 2, 63, 255):
        ours.num_queries = m
        assert_close(ours(features), every[:, :m], 1e-6)


@pytest.mark.parametrize("m", [3, 256])
@torch.no_grad()
def test_the_baked_form_computes_the_same(ours: QueryProjector, features: Tensor, m: int, assert_close: Close) -> None:
    ours.num_queries = m
    baked = bake(nn.Sequential(ours))
    assert not hasattr(baked[0], "query")
    assert_close(baked(features), ours(features), 1e-5)


def test_a_budget_is_a_number_up_to_all_or_a_stage_of_training() -> None:
    found = [num_queries(value, where="") for value in (1, 36, 256, "144", "first_stage", "second_stage", None)]
    assert found == [1, 36, 256, 144, 256, 256, 256]


@pytest.mark.parametrize("value", [0, 257, -1, "many", 2.5, True, [3]])
def test_any_other_budget_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="expected 1 to 256, or first_stage or second_stage for all"):
        num_queries(value, where="config.json")


def test_the_checkpoint_has_thirteen_tensors_of_queries(reference: nn.Module) -> None:
    names = list(reference.state_dict())
    assert len(names) == 13
    assert all(place_queries(name) for name in names)
    assert place_queries("attn.bias_k") is None


def test_queries_fill_a_square_and_no_more_are_asked_for() -> None:
    with pytest.raises(ConfigError, match="must be a square such as 256, got 250"):
        QueriesConfig(num_queries=2, table_size=250)
    with pytest.raises(ConfigError, match="num_queries must be 1 to 256, got 257"):
        QueriesConfig(num_queries=257)
    with pytest.raises(ConfigError, match="does not divide by 7 heads"):
        QueryProjector(replace(CONFIG, projector=QueriesConfig(num_heads=7)))


def write_checkpoint(folder: Path, tower: nn.Module, abstractor: nn.Module, decoder: nn.Module) -> None:
    """A checkpoint as the released code writes it: positions in half precision, a stage's word for the budget."""
    tensors = {f"model.vision_tower.vision_tower.vision_model.{k}": v for k, v in tower.state_dict().items()}
    tensors |= {f"model.query_abstractor.{k}": v for k, v in abstractor.state_dict().items()}
    tensors["model.query_abstractor.pos_embed"] = abstractor.pos_embed.half()
    tensors |= decoder.state_dict()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "tiny-clip").mkdir()
    (folder / "tiny-clip" / "config.json").write_text(json.dumps(tower.config.to_diff_dict()))
    config = {
        **decoder.config.to_dict(),
        "model_type": "llava_llama",
        "mm_vision_tower": "tiny-clip",
        "mm_vision_select_layer": -2,
        "num_visual_tokens": "second_stage",
    }
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(("asked", "m"), [(None, 256), (36, 36)])
@torch.no_grad()
def test_a_checkpoint_gives_the_tokens_logits_and_ten_greedy_steps_of_its_parts(
    asked: int | None,
    m: int,
    reference: nn.Module,
    tmp_path: Path,
    tiny_tokenizer: Callable[..., Path],
    spread_out: Spread,
    assert_close: Close,
    assert_same_steps: Callable[..., list[int]],
) -> None:
    reference.pos_embed.copy_(reference.pos_embed.half())  # what is stored, and so what the model computes with
    vision = {"image_size": 48, "patch_size": 2, "hidden_size": WIDTH, "intermediate_size": 64}
    tower = CLIPVisionModel(CLIPVisionConfig(**vision, num_hidden_layers=2, num_attention_heads=4))
    sizes = {"vocab_size": 272, "hidden_size": D, "intermediate_size": 64, "num_hidden_layers": 1}
    decoder = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, max_position_embeddings=512))
    tower, decoder = spread_out(tower), spread_out(decoder)
    write_checkpoint(tmp_path, tower, reference, decoder)
    tiny_tokenizer(tmp_path, {"<s>": 256, "</s>": 257}, bos_token="<s>", eos_token="</s>")
    checkpoint = load_model(tmp_path, vision_tokens=asked)
    model, processor = checkpoint.model, checkpoint.processor
    pixels = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    tokens = reference(tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:], m)[0]
    assert_close(model.encode(pixels), tokens)

    ids = torch.from_numpy(processor.input_ids([user_message("What is it?", num_images=1)]))
    is_image, table = ids == processor.image_token_id, decoder.get_input_embeddings()
    theirs, rows = table(ids), model.embed_tokens(ids)
    theirs[is_image], rows[is_image] = tokens[0], model.encode(pixels)[0]

    def logits(generated: list[int]) -> Tensor:
        after = table(torch.tensor(generated, dtype=torch.long))
        return decoder(inputs_embeds=torch.cat((theirs, after))[None]).logits[0]

    assert_same_steps(model, rows[None], logits)
    assert (checkpoint.family, checkpoint.processor.prompt_spec.num_vision_tokens) == ("mqt", m)
    with pytest.raises(UnsupportedError, match="256 at most"):
        load_model(tmp_path, vision_tokens=257)
