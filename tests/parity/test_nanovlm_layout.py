"""nanoVLM: checkpoints with its names, against a second implementation written from the description of its layout.

The reference below reads the checkpoint's own tensors and knows nothing of our modules.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from edgevlm.core.errors import ConfigError, InputError, IntegrityError, UnsupportedError
from edgevlm.families.detect import model_type
from edgevlm.families.folder import ModelFolder
from edgevlm.families.nanovlm import FAMILY
from edgevlm.models.checkpoint import Checkpoint, load_model
from edgevlm.models.vlm import Vlm
from edgevlm.processing.chat import user_message

Config = dict[str, Any]
Tensors = dict[str, Tensor]

CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
IMAGE = {"image_token": "<|image|>"}
GRID = {f"r{row}c{column}": f"<row_{row}_col_{column}>" for row in range(1, 9) for column in range(1, 9)}
TILES = {**IMAGE, "global_image_token": "<|global_image|>", **GRID}
BASE = {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258}
BASE_SIZE, SIDE = 259, 32

# The three generations of config.json, as small as they can be: what is left out of the first came later.
TINY: Config = {
    "vit_hidden_dim": 48,
    "vit_inter_dim": 96,
    "vit_patch_size": 4,
    "vit_img_size": SIDE,
    "vit_n_heads": 4,
    "vit_dropout": 0.0,
    "vit_n_blocks": 2,
    "vit_ln_eps": 1e-6,
    "vit_cls_flag": False,
    "vit_model_type": "google/siglip-base-patch16-224",
    "lm_hidden_dim": 64,
    "lm_inter_dim": 96,
    "lm_rms_eps": 1e-5,
    "lm_re_base": 100_000,
    "lm_max_position_embeddings": 512,
    "lm_vocab_size": BASE_SIZE,
    "lm_n_heads": 4,
    "lm_n_kv_heads": 2,
    "lm_dropout": 0.0,
    "lm_n_blocks": 2,
    "lm_attn_scaling": 1.0,
    "lm_eos_token_id": 256,
    "lm_tie_weights": True,
    "lm_tokenizer": "HuggingFaceTB/cosmo2-tokenizer",
    "mp_pixel_shuffle_factor": 2,
}
VARIANTS: Mapping[str, Config] = {
    "222M": {},
    "450M": {
        "lm_base_vocab_size": BASE_SIZE,
        "lm_vocab_size": BASE_SIZE + 1,
        "vlm_extra_tokens": IMAGE,
        "mp_image_token_length": 16,
    },
    "460M": {
        "lm_base_vocab_size": BASE_SIZE,
        "lm_vocab_size": BASE_SIZE + 66,
        "vlm_extra_tokens": TILES,
        "mp_image_token_length": 16,
        "lm_chat_template": CHATML,
        "max_img_size": 2 * SIDE,
        "resize_to_max_side_len": True,
    },
}
# What the published configs change of the real size, and the totals their authors print.
REAL_135M = {"lm_hidden_dim": 576, "lm_inter_dim": 1536, "lm_n_heads": 9, "lm_n_kv_heads": 3, "lm_n_blocks": 30}
REAL_360M = {"lm_hidden_dim": 960, "lm_inter_dim": 2560, "lm_n_heads": 15, "lm_n_kv_heads": 5, "lm_n_blocks": 32}
REAL_VIT = {"vit_hidden_dim": 768, "vit_inter_dim": 3072, "vit_patch_size": 16, "vit_n_heads": 12, "vit_n_blocks": 12}
REAL: Mapping[str, tuple[Config, int, int]] = {
    "222M": ({**REAL_135M, "vit_img_size": 224, "lm_vocab_size": 49_152}, 222_081_600, 49),
    "450M": (
        {
            **REAL_360M,
            "vit_img_size": 256,
            "lm_vocab_size": 49_153,
            "lm_base_vocab_size": 49_152,
            "mp_image_token_length": 64,
        },
        450_614_400,
        64,
    ),
    "460M": (
        {
            **REAL_360M,
            "vit_img_size": 512,
            "lm_vocab_size": 49_218,
            "lm_base_vocab_size": 49_152,
            "mp_pixel_shuffle_factor": 4,
            "mp_image_token_length": 64,
            "max_img_size": 2048,
        },
        460_113_984,
        64,
    ),
}


def shapes(c: Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a file, in which the embedding stands under the name of the head alone."""
    V, P, D, heads = c["vit_hidden_dim"], c["vit_patch_size"], c["lm_hidden_dim"], c["lm_n_heads"]
    kv = D // heads * c["lm_n_kv_heads"]
    vision, text, s = "vision_encoder.", "decoder.", c["mp_pixel_shuffle_factor"]
    found: dict[str, tuple[int, ...]] = {
        f"{vision}patch_embedding.conv.weight": (V, 3, P, P),
        f"{vision}patch_embedding.conv.bias": (V,),
        f"{vision}patch_embedding.position_embedding": (1, (c["vit_img_size"] // P) ** 2, V),
        f"{vision}layer_norm.weight": (V,),
        f"{vision}layer_norm.bias": (V,),
        "MP.proj.weight": (D, V * s * s),
        f"{text}head.weight": (c["lm_vocab_size"], D),
        f"{text}rotary_embd.inv_freq": (D // heads // 2,),
        f"{text}norm.weight": (D,),
    }
    linears = {"attn.qkv_proj": (3 * V, V), "attn.out_proj": (V, V)}
    linears |= {"mlp.fc1": (c["vit_inter_dim"], V), "mlp.fc2": (V, c["vit_inter_dim"])}
    for n in range(c["vit_n_blocks"]):
        for name, shape in {**linears, "ln1": (V,), "ln2": (V,)}.items():
            found |= {f"{vision}blocks.{n}.{name}.weight": shape, f"{vision}blocks.{n}.{name}.bias": shape[:1]}
    matrices = {"attn.q_proj": (D, D), "attn.k_proj": (kv, D), "attn.v_proj": (kv, D), "attn.out_proj": (D, D)}
    matrices |= dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (c["lm_inter_dim"], D))
    matrices |= {"mlp.down_proj": (D, c["lm_inter_dim"])}
    for n in range(c["lm_n_blocks"]):
        for name, shape in {**matrices, "norm1": (D,), "norm2": (D,)}.items():
            found[f"{text}blocks.{n}.{name}.weight"] = shape
    return found


def random_tensors(c: Config, seed: int = 3) -> Tensors:
    """Weights of ordinary size: norms that are not 1, biases that are not 0; this seed's answers have several words."""
    generator = torch.Generator().manual_seed(seed)
    tensors: Tensors = {}
    for name, shape in shapes(c).items():
        noise = torch.randn(shape, generator=generator)
        is_norm = ".norm" in name or "ln" in name or "layer_norm" in name
        fan_in = math.prod(shape[1:]) if len(shape) > 1 and "position" not in name else 1
        tensors[name] = 1.0 + 0.2 * noise if is_norm and name.endswith("weight") else noise * fan_in**-0.5
    D = c["lm_hidden_dim"] // c["lm_n_heads"]
    tensors["decoder.rotary_embd.inv_freq"] = c["lm_re_base"] ** -(torch.arange(0, D, 2) / D)
    return tensors


def reference_features(t: Tensors, c: Config, pixels: Tensor) -> Tensor:
    """(B, 3, S, S) to what the encoder gives (B, grid², width): pre-norm blocks, one norm at the end."""
    width, heads = c["vit_hidden_dim"], c["vit_n_heads"]
    patch, at = "vision_encoder.patch_embedding", "vision_encoder"
    norm = lambda x, name: F.layer_norm(x, (width,), t[f"{name}.weight"], t[f"{name}.bias"], c["vit_ln_eps"])  # noqa: E731
    linear = lambda x, name: F.linear(x, t[f"{name}.weight"], t[f"{name}.bias"])  # noqa: E731
    x = F.conv2d(pixels, t[f"{patch}.conv.weight"], t[f"{patch}.conv.bias"], stride=c["vit_patch_size"])
    x = x.flatten(2).mT + t[f"{patch}.position_embedding"]
    for n in range(c["vit_n_blocks"]):
        block = f"{at}.blocks.{n}"
        q, k, v = linear(norm(x, f"{block}.ln1"), f"{block}.attn.qkv_proj").split(width, -1)
        q, k, v = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in (q, k, v))
        weights = (q @ k.mT / math.sqrt(width // heads)).softmax(-1)
        x = x + linear((weights @ v).transpose(1, 2).flatten(2), f"{block}.attn.out_proj")
        inner = F.gelu(linear(norm(x, f"{block}.ln2"), f"{block}.mlp.fc1"), approximate="tanh")
        x = x + linear(inner, f"{block}.mlp.fc2")
    return norm(x, f"{at}.layer_norm")


def reference_tokens(t: Tensors, c: Config, pixels: Tensor) -> Tensor:
    """(B, 3, S, S) to vision tokens (B, N, D): each s x s square of features, row by row, becomes one."""
    features, s = reference_features(t, c, pixels), c["mp_pixel_shuffle_factor"]
    side = math.isqrt(features.shape[1])
    cells = features.unflatten(1, (side, side))
    rows = [
        torch.cat([cells[:, i * s + di, j * s + dj] for di in range(s) for dj in range(s)], -1)
        for i in range(side // s)
        for j in range(side // s)
    ]
    return torch.stack(rows, 1) @ t["MP.proj.weight"].mT


def reference_logits(t: Tensors, c: Config, x: Tensor) -> Tensor:
    """Rows (T, D) to logits (T, V): RMS norms, rotated halves, every key head for a group of queries, a tied head."""
    D, heads = c["lm_hidden_dim"], c["lm_n_heads"]
    size, group, T = D // heads, heads // c["lm_n_kv_heads"], len(x)
    angles = torch.arange(T)[:, None] * t["decoder.rotary_embd.inv_freq"]
    turn = torch.polar(torch.ones_like(angles), angles)
    norm = lambda x, name: F.rms_norm(x, (D,), t[f"{name}.weight"], c["lm_rms_eps"])  # noqa: E731

    def rotate(y: Tensor) -> Tensor:
        turned = torch.complex(y[..., : size // 2], y[..., size // 2 :]) * turn
        return torch.cat([turned.real, turned.imag], -1)

    hidden_from = torch.ones(T, T, dtype=torch.bool).triu(1)
    for n in range(c["lm_n_blocks"]):
        block = f"decoder.blocks.{n}"
        inner = norm(x, f"{block}.norm1")
        q, k, v = (
            (inner @ t[f"{block}.attn.{p}_proj.weight"].mT).unflatten(-1, (-1, size)).transpose(0, 1) for p in "qkv"
        )
        k, v = (y.repeat_interleave(group, 0) for y in (rotate(k), v))
        scores = (rotate(q) @ k.mT / math.sqrt(size)).masked_fill(hidden_from, -torch.inf)
        x = x + (scores.softmax(-1) @ v).transpose(0, 1).flatten(1) @ t[f"{block}.attn.out_proj.weight"].mT
        inner = norm(x, f"{block}.norm2")
        gate, up = (inner @ t[f"{block}.mlp.{p}_proj.weight"].mT for p in ("gate", "up"))
        x = x + (F.silu(gate) * up) @ t[f"{block}.mlp.down_proj.weight"].mT
    return norm(x, "decoder.norm") @ t["decoder.head.weight"].mT


def write_checkpoint(folder: Path, c: Config, tiny_tokenizer: Callable[..., Path] | None = None) -> Tensors:
    tensors = random_tensors(c)
    (folder / "config.json").write_text(json.dumps(c))
    metadata = {"decoder.token_embedding.weight": "decoder.head.weight", "format": "pt"}
    save_file(tensors, folder / "model.safetensors", metadata)
    if tiny_tokenizer is not None:
        # an instruct tokenizer's own template must not be taken for nanoVLM's
        tiny_tokenizer(folder, BASE, eos_token="<|im_end|>", chat_template="{{ messages[0]['nothing'] }}")
    return tensors


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def config(variant: str) -> Config:
    return {**TINY, **VARIANTS[variant]}


@pytest.fixture
def folder(tmp_path: Path, config: Config, tiny_tokenizer: Callable[..., Path]) -> Path:
    write_checkpoint(tmp_path, config, tiny_tokenizer)
    return tmp_path


def picture(height: int = 90, width: int = 100) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def question(checkpoint: Checkpoint) -> tuple[Tensor, Tensor]:
    """Pixels (S, 3, H, W) and ids (T,) of a question about a picture."""
    prepared = checkpoint.processor.prepare(picture())
    ids = checkpoint.processor.input_ids([user_message("What is it?", num_images=1)], grids=[prepared.grid])
    return torch.from_numpy(prepared.pixel_values), torch.from_numpy(ids)


@torch.no_grad()
def test_features_tokens_and_ten_greedy_steps_are_those_of_the_description(
    folder: Path, config: Config, assert_close: Callable[..., float], assert_same_steps: Callable[..., list[int]]
) -> None:
    tensors, checkpoint = random_tensors(config), load_model(folder)
    ours, (pixels, ids) = checkpoint.model, question(checkpoint)
    assert_close(ours.vision_encoder(pixels), reference_features(tensors, config, pixels))
    expected = reference_tokens(tensors, config, pixels)
    assert_close(ours.encode(pixels), expected)

    is_image = ids == checkpoint.processor.image_token_id
    text_ids = torch.where(is_image, 0, ids)
    table = tensors["decoder.head.weight"]
    rows, ours_rows = table[text_ids].clone(), ours.embed_tokens(text_ids)
    rows[is_image], ours_rows[is_image] = expected.flatten(0, 1), ours.encode(pixels).flatten(0, 1)

    def reference(generated: list[int]) -> Tensor:
        return reference_logits(tensors, config, torch.cat([rows, table[generated]]))

    assert_same_steps(ours, ours_rows[None], reference)


def test_a_prompt_is_written_as_the_generation_was_trained(folder: Path, variant: str) -> None:
    processor = load_model(folder).processor
    messages = [user_message("What is it?", num_images=1)]
    image, tiles = "<|image|>" * 16, [(1, 1), (1, 2)]
    if variant == "460M":
        one, two = (
            processor.tokenizer.decode(processor.input_ids(messages, grids=[grid]), skip_special_tokens=False)
            for grid in tiles
        )
        start, end = "<|im_start|>user\n", "What is it?<|im_end|>\n<|im_start|>assistant\n"
        assert one == f"{start}<|global_image|>{image}{end}"
        assert two == f"{start}<|global_image|>{image}<row_1_col_1>{image}<row_1_col_2>{image}{end}"
        return
    ids = processor.input_ids(messages)
    assert processor.tokenizer.decode(ids, skip_special_tokens=False) == f"{image}Question: What is it? Answer:"
    assert processor.image_positions(ids).tolist() == list(range(16))


def test_a_conversation_keeps_every_word(folder: Path, variant: str) -> None:
    processor = load_model(folder).processor
    messages = [
        user_message("One?", num_images=1),
        {"role": "assistant", "content": "A cat."},
        user_message("Which?"),
    ]
    found = processor.tokenizer.decode(processor.input_ids(messages).tolist(), skip_special_tokens=False)
    image = "<|image|>" * 16
    if variant == "460M":
        turns = (("user", f"<|global_image|>{image}One?"), ("assistant", "A cat."), ("user", "Which?"))
        expected = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)
        assert found == expected + "<|im_start|>assistant\n"
    else:
        assert found == f"{image}Question: One? Answer: A cat.\nQuestion: Which? Answer:"


def test_pixels_are_neither_centred_nor_scaled(folder: Path, variant: str) -> None:
    prepared = load_model(folder).processor.prepare(picture(60, 64))
    if variant == "460M":  # 64 wide already: four tiles behind the whole picture
        assert prepared.grid == (2, 2)
        assert prepared.pixel_values.shape == (5, 3, SIDE, SIDE)
    else:
        resized = picture(60, 64).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        np.testing.assert_allclose(prepared.pixel_values[0], np.asarray(resized).transpose(2, 0, 1) / 255, atol=1e-6)
    assert prepared.pixel_values.min() >= 0.0
    assert 0.4 < prepared.pixel_values.mean() < 0.6


def test_tokens_of_nanovlm_get_the_rows_behind_the_language_model(folder: Path, variant: str) -> None:
    tokenizer = load_model(folder).processor.tokenizer
    assert tokenizer.token_id("<|image|>") == BASE_SIZE  # in the oldest outside the embedding, which never sees it
    if variant == "460M":
        assert tokenizer.token_id("<|global_image|>") == BASE_SIZE + 1
        assert tokenizer.token_id("<row_1_col_1>") == BASE_SIZE + 2
        assert tokenizer.token_id("<row_8_col_8>") == BASE_SIZE + 65


def test_answers_end_with_the_tokenizers_end_or_the_configs(folder: Path) -> None:
    assert load_model(folder).processor.prompt_spec.stop_token_ids == (258, 256)


def test_a_folder_without_a_tokenizer_says_which_one_to_put_there(tmp_path: Path, config: Config) -> None:
    write_checkpoint(tmp_path, config)
    assert model_type(ModelFolder(tmp_path)) == "nanovlm"
    with pytest.raises(InputError, match=r"put tokenizer\.json .* of HuggingFaceTB/cosmo2-tokenizer beside config"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "name", ["x; touch y", "$(id)/x", "--repo-type/x", "a/b\x1b[2J", "../x", "a/b c", "a/b\n", "a/b/c", "nobody"]
)
def test_what_is_no_repository_gets_into_no_command(tmp_path: Path, name: str) -> None:
    write_checkpoint(tmp_path, {**TINY, "lm_tokenizer": name})
    with pytest.raises(InputError) as raised:
        load_model(tmp_path)
    assert "hf download" not in str(raised.value)
    assert f"of {name!r} beside config.json" in str(raised.value)
    assert str(raised.value).isprintable()


def test_the_command_that_fetches_a_tokenizer_is_one_that_a_shell_takes(tmp_path: Path) -> None:
    folder = tmp_path / "it's $(id)"
    folder.mkdir()
    write_checkpoint(folder, TINY)
    with pytest.raises(InputError) as raised:
        load_model(folder)
    command = str(raised.value).split("`")[1]
    files = ["tokenizer.json", "tokenizer_config.json"]
    assert shlex.split(command) == ["hf", "download", TINY["lm_tokenizer"], *files, "--local-dir", str(folder)]


def test_the_embedding_is_found_under_either_name(tmp_path: Path, tiny_tokenizer: Callable[..., Path]) -> None:
    tensors = write_checkpoint(tmp_path, TINY, tiny_tokenizer)
    embedding = tensors.pop("decoder.head.weight")
    save_file({**tensors, "decoder.token_embedding.weight": embedding}, tmp_path / "model.safetensors")
    assert torch.equal(load_model(tmp_path).model.embed_tokens.weight, embedding)


@pytest.mark.parametrize("is_one", [True, False])
def test_of_a_pair_that_the_config_calls_tied_the_numbers_decide(
    tmp_path: Path, tiny_tokenizer: Callable[..., Path], is_one: bool
) -> None:
    tensors = write_checkpoint(tmp_path, TINY, tiny_tokenizer)
    head = tensors["decoder.head.weight"]
    embedding = head.clone() if is_one else torch.randn_like(head)
    save_file({**tensors, "decoder.token_embedding.weight": embedding}, tmp_path / "model.safetensors")
    model = load_model(tmp_path).model
    assert (model.lm_head is None) is is_one
    assert torch.equal(model.embed_tokens.weight, embedding)
    assert torch.equal(model.head_weight, head)


def test_an_untied_head_stays_one(tmp_path: Path, tiny_tokenizer: Callable[..., Path]) -> None:
    tensors = write_checkpoint(tmp_path, {**TINY, "lm_tie_weights": False}, tiny_tokenizer)
    with pytest.raises(IntegrityError, match=r"missing embed_tokens\.weight"):
        load_model(tmp_path)
    embedding = torch.randn_like(tensors["decoder.head.weight"])
    save_file({**tensors, "decoder.token_embedding.weight": embedding}, tmp_path / "model.safetensors")
    model = load_model(tmp_path).model
    assert torch.equal(model.head_weight, tensors["decoder.head.weight"])
    assert torch.equal(model.embed_tokens.weight, embedding)


@pytest.mark.parametrize(
    ("changes", "error", "complaint"),
    [
        ({"vit_cls_flag": True}, UnsupportedError, "vit_cls_flag"),
        ({"lm_attn_scaling": 1.5}, UnsupportedError, r"lm_attn_scaling is 1\.5"),
        ({"mp_image_token_length": 64}, ConfigError, "mp_image_token_length is 64, but .* give 16"),
        ({"lm_n_heads": 5}, ConfigError, "width 64 does not divide by 5 heads"),
        ({"max_img_size": 64, "vlm_extra_tokens": IMAGE}, UnsupportedError, "tiles without the token"),
        ({"vlm_extra_tokens": IMAGE, "lm_base_vocab_size": 300}, ConfigError, "gets id 259, config.json implies 300"),
        ({"vlm_extra_tokens": {"image_token": "<img>"}, "lm_vocab_size": 260}, UnsupportedError, "has no '<|image|>'"),
    ],
)
def test_what_no_published_model_has_is_refused(
    tmp_path: Path, tiny_tokenizer: Callable[..., Path], changes: Config, error: type[Exception], complaint: str
) -> None:
    write_checkpoint(tmp_path, TINY, tiny_tokenizer)
    (tmp_path / "config.json").write_text(json.dumps({**TINY, **changes}))
    folder = ModelFolder(tmp_path)
    with pytest.raises(error, match=complaint.replace("|", r"\|")):
        FAMILY.processor(folder, FAMILY.config(folder))


@pytest.mark.parametrize("variant", REAL)
def test_published_sizes_have_the_published_number_of_parameters(tmp_path: Path, variant: str) -> None:
    changes, count, num_tokens = REAL[variant]
    values = {**TINY, **VARIANTS[variant], **REAL_VIT, **changes}
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = FAMILY.config(ModelFolder(tmp_path))
    with torch.device("meta"):
        model = Vlm(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert config.num_vision_tokens == num_tokens
    found = shapes(values)
    places = [place.name for name in found for place in FAMILY.place(name, config) or ()]
    assert set(places) == {*model.state_dict(), "lm_head.weight"} - {"embed_tokens.weight"}  # of the pair, the head
    assert len(places) == len(set(places))
    assert variant != "460M" or len(found) == 441
