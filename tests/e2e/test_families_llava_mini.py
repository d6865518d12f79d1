"""A tiny LLaVA-Mini in the original layout, from its files to answers: the same from PyTorch and from ONNX."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from edgevlm.cli.app import app
from edgevlm.core.errors import InputError, IntegrityError, UnsupportedError
from edgevlm.families.folder import ModelFolder
from edgevlm.families.llava_mini import FAMILY, SYSTEM
from edgevlm.models.checkpoint import Checkpoint, load_model
from edgevlm.processing.chat import user_message
from edgevlm.processing.split import Crops
from edgevlm.runtimes.open import open_bundle
from edgevlm.runtimes.video import Video

WriteTokenizer = Callable[..., Path]

TOKENS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
]
VOCABULARY, D, WIDTH, KV = 256 + len(TOKENS), 64, 32, 32
END, IMAGE = VOCABULARY - 1, VOCABULARY
QUESTION = "What is this! A cat?"  # in a byte-level vocabulary "!" is token id 0
# Llama 3's templates: the first wrote the assistant's header always, later ones when asked, somebody's may not at all.
HEADER = "<|start_header_id|>assistant<|end_header_id|>\n\n"
ALWAYS = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim "
    "+ '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
WHEN_ASKED = ALWAYS.replace("{{ '<|start", "{% if add_generation_prompt %}{{ '<|start") + "{% endif %}"
NEVER = ALWAYS[: ALWAYS.rindex("{{ '<|start")]


def tensors(side: int, seed: int = 0) -> dict[str, Tensor]:
    """Random weights by the released checkpoint's names, in half precision but for the vision encoder."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}

    def matrix(name: str, *shape: int) -> None:
        found[name] = torch.randn(shape, generator=generator) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.2)

    def norm(name: str, width: int, *, bias: bool = False) -> None:
        found[f"{name}.weight"] = 1 + 0.2 * torch.randn(width, generator=generator)
        if bias:
            matrix(f"{name}.bias", width)

    def linear(name: str, outputs: int, inputs: int, *, bias: bool = False) -> None:
        matrix(f"{name}.weight", outputs, inputs)
        if bias:
            matrix(f"{name}.bias", outputs)

    for layer in [*(f"model.layers.{i}" for i in range(2)), *(f"model.prefusion_layers.{i}" for i in range(3))]:
        for part, outputs in (("q", D), ("k", KV), ("v", KV), ("o", D)):
            linear(f"{layer}.self_attn.{part}_proj", outputs, D)
        linear(f"{layer}.mlp.gate_proj", 96, D)
        linear(f"{layer}.mlp.up_proj", 96, D)
        linear(f"{layer}.mlp.down_proj", D, 96)
        norm(f"{layer}.input_layernorm", D)
        norm(f"{layer}.post_attention_layernorm", D)
    norm("model.norm", D)
    matrix("model.embed_tokens.weight", VOCABULARY, D)
    matrix("lm_head.weight", VOCABULARY, D)
    found["lm_head.weight"] *= 4  # clear winners
    linear("model.mm_projector.0", D, WIDTH, bias=True)
    linear("model.mm_projector.2", D, D, bias=True)
    compressor = "model.compressor"
    matrix(f"{compressor}.query", side * side, WIDTH)
    matrix(f"{compressor}.pos_embed", side * side, WIDTH)
    matrix(f"{compressor}.attn.in_proj_weight", 3 * WIDTH, WIDTH)
    matrix(f"{compressor}.attn.in_proj_bias", 3 * WIDTH)
    linear(f"{compressor}.attn.out_proj", WIDTH, WIDTH, bias=True)
    norm(f"{compressor}.ln_q", WIDTH, bias=True)
    norm(f"{compressor}.ln_kv", WIDTH, bias=True)
    found = {name: tensor.half() for name, tensor in found.items()}
    tower = "model.vision_tower.vision_tower.vision_model"
    matrix(f"{tower}.embeddings.class_embedding", WIDTH)
    found[f"{tower}.embeddings.patch_embedding.weight"] = torch.randn(WIDTH, 3, 8, 8, generator=generator) * 0.07
    matrix(f"{tower}.embeddings.position_embedding.weight", 17, WIDTH)
    norm(f"{tower}.pre_layrnorm", WIDTH, bias=True)
    norm(f"{tower}.post_layernorm", WIDTH, bias=True)
    for layer in (f"{tower}.encoder.layers.{i}" for i in range(2)):
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(f"{layer}.self_attn.{part}", WIDTH, WIDTH, bias=True)
        linear(f"{layer}.mlp.fc1", 64, WIDTH, bias=True)
        linear(f"{layer}.mlp.fc2", WIDTH, 64, bias=True)
        norm(f"{layer}.layer_norm1", WIDTH, bias=True)
        norm(f"{layer}.layer_norm2", WIDTH, bias=True)
    return found


def write(
    folder: Path, tokenizer: WriteTokenizer, *, side: int = 1, template: str | None = ALWAYS, **changes: object
) -> Path:
    """The whole checkpoint, its config changed by ``changes``."""
    config: dict[str, object] = {
        "model_type": "llava_mini_llama",
        "architectures": ["LlavaMiniLlamaForCausalLM"],
        "vocab_size": VOCABULARY,
        "hidden_size": D,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "tokenizer_model_max_length": 400,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "tie_word_embeddings": False,
        "eos_token_id": [257],
        "mm_vision_tower": "openai/tiny-clip",
        "mm_hidden_size": WIDTH,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_projector_type": "mlp2x_gelu",
        "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False,
        "compressor_size": side,
        "prefusion_layer_num": 3,
    }
    tower = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    (folder / "tiny-clip").mkdir(parents=True)
    (folder / "tiny-clip" / "config.json").write_text(json.dumps({**tower, "image_size": 32, "patch_size": 8}))
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    special = {token: 256 + number for number, token in enumerate(TOKENS)}
    settings = {} if template is None else {"chat_template": template}
    tokenizer(folder, special, bos_token=TOKENS[0], eos_token=TOKENS[-1], **settings)
    save_file(tensors(side), folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module", params=[(1, 1), (2, 2)], ids=["one token", "high resolution"])
def pair(
    request: pytest.FixtureRequest, tiny_tokenizer: WriteTokenizer, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Checkpoint, Path]:
    """A checkpoint, and the bundle that the command line makes of it."""
    side, ratio = request.param
    folder = tmp_path_factory.mktemp("mini")
    write(folder / "checkpoint", tiny_tokenizer, side=side, resolution_ratio=ratio)
    arguments = ["export", str(folder / "checkpoint"), "-o", str(folder / "bundle"), "-q"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return load_model(folder / "checkpoint"), folder / "bundle"


@pytest.fixture(scope="module")
def rounded_bundle(tiny_tokenizer: WriteTokenizer, tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Path]:
    """A checkpoint of high resolution, and a bundle with its encoder in int8 and fp16."""
    folder = tmp_path_factory.mktemp("rounded")
    write(folder / "checkpoint", tiny_tokenizer, side=2, resolution_ratio=2)
    paths = [str(folder / "checkpoint"), "-o", str(folder / "bundle")]
    options = ["--encoder-precision", "int8,fp16", "--calib-samples", "8", "-q"]
    result = CliRunner().invoke(app, ["export", *paths, *options])
    assert result.exit_code == 0, result.output
    return load_model(folder / "checkpoint"), folder / "bundle"


def picture(seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (90, 120, 3), np.uint8)
    return Image.fromarray(pixels).resize((480, 360), Image.Resampling.BICUBIC)


@torch.no_grad()
def greedy(checkpoint: Checkpoint, image: Image.Image | None, question: str, num: int) -> list[int]:
    """Written down from the formulas: fuse all text but id 0, put it back, decode with plain embeddings."""
    model, processor = checkpoint.model, checkpoint.processor
    ids = torch.from_numpy(processor.input_ids([user_message(question, num_images=int(image is not None))]))
    rows = model.embed_tokens(torch.where(ids == IMAGE, 0, ids))
    if image is not None:
        tokens, cache = model.encode_fused(torch.from_numpy(processor.prepare(image).pixel_values))
        kept = (ids != 0) & (ids != IMAGE)
        rows[kept] = model.fuse(cache, rows[None, kept])[0]
        rows[ids == IMAGE] = tokens[0]
    answer: list[int] = []
    while len(answer) < num:
        token = int(model(rows[None])[0, -1].argmax())
        if token in processor.prompt_spec.stop_token_ids:
            break
        answer.append(token)
        rows = torch.cat((rows, model.embed_tokens(torch.tensor([token]))))
    return answer


def test_answers_of_pytorch_onnx_and_the_formulas_are_equal(pair: tuple[Checkpoint, Path]) -> None:
    checkpoint, bundle = pair
    with open_bundle(bundle) as vlm, checkpoint.open() as reference:
        for image, question in ((picture(), QUESTION), (picture(1), "!!"), (None, QUESTION)):
            expected = greedy(checkpoint, image, question, 12)
            assert len(expected) > 2
            for one in (vlm, reference):
                answer = one.ask(image, question, max_tokens=12)
                assert list(answer.token_ids) == expected
        seen, unseen = (vlm.ask(image, QUESTION, max_tokens=12).token_ids for image in (picture(), picture(1)))
        assert seen != unseen


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_rounded_encoder_leaves_the_fusion_float(runtime: str, rounded_bundle: tuple[Checkpoint, Path]) -> None:
    """Five views joined row by row, one encoder in 8 and one in 16 bits: either runs in either runtime."""
    checkpoint, bundle = rounded_bundle
    if runtime == "openvino":
        pytest.importorskip("openvino")
    parts = [(part["part"], part["precision"]) for part in json.loads((bundle / "edgevlm.json").read_text())["parts"]]
    assert [precision for part, precision in parts if part == "vision_encoder"] == ["int8", "fp16"]
    assert [precision for part, precision in parts if part == "fusion"] == ["fp32", "fp16"]
    pixels = checkpoint.processor.pixels(picture())
    with checkpoint.open().exclusive() as session:
        expected = session.encode(pixels).tokens
    for precision, allowed in (("int8", 0.08), ("fp16", 5e-3)):
        with (
            open_bundle(bundle, encoder_precision=precision, encoder_runtime=runtime) as vlm,
            vlm.exclusive() as session,
        ):
            found = session.encode(pixels).tokens
        assert 0 < np.linalg.norm(found - expected) / np.linalg.norm(expected) < allowed


def test_a_video_and_a_second_turn_are_answered_alike(pair: tuple[Checkpoint, Path]) -> None:
    checkpoint, bundle = pair
    with open_bundle(bundle) as vlm, checkpoint.open() as reference:
        video = Video(frames=[picture(seed) for seed in range(3)])
        found, expected = (one.ask(video, QUESTION, max_tokens=12) for one in (vlm, reference))
        assert found.token_ids == expected.token_ids
        assert found.num_vision_tokens == 3 * checkpoint.model.config.num_vision_tokens
        chats = vlm.chat(), reference.chat()
        for image, question in ((picture(), QUESTION), (None, "And now!")):
            found, expected = (chat.ask(question, image, max_tokens=12) for chat in chats)
            assert found.token_ids == expected.token_ids
        with pytest.raises(InputError, match="one picture or video"):
            chats[0].ask("And this?", picture(1))


def test_the_checkpoint_is_read_as_its_files_say(pair: tuple[Checkpoint, Path]) -> None:
    checkpoint, _ = pair
    config, processor = checkpoint.model.config, checkpoint.processor
    assert config.fusion is not None
    ratio = config.fusion.resolution_ratio
    assert (config.fusion.num_layers, config.fusion.grid_size, config.fusion.skip_token_zero) == (3, ratio, True)
    assert config.decoder.max_position_embeddings == 400
    assert sorted(processor.prompt_spec.stop_token_ids) == [257, 260, 261]
    assert processor.image_spec.fit == "center-crop"
    assert processor.image_spec.split == (Crops(per_side=2) if ratio == 2 else None)
    assert processor.prepare(picture()).pixel_values.shape == (config.num_views, 3, 32, 32)


@pytest.mark.parametrize("template", [ALWAYS, WHEN_ASKED, NEVER, None], ids=["always", "asked", "never", "none"])
def test_prompts_have_one_begin_the_system_text_and_an_open_turn(
    template: str | None, tiny_tokenizer: WriteTokenizer, tmp_path: Path
) -> None:
    folder = ModelFolder(write(tmp_path / "model", tiny_tokenizer, template=template))
    processor = FAMILY.processor(folder, FAMILY.config(folder))
    turn = "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>"
    start = "<|begin_of_text|>" + turn.format("system", SYSTEM)
    asked = turn.format("user", "<image>\nWhat?")
    question = user_message("What?", num_images=1)
    assert processor.template.render([question]) == start + asked + HEADER
    chat = [question, {"role": "assistant", "content": "A cat."}, user_message("Sure?")]
    expected = start + asked + turn.format("assistant", "A cat.") + turn.format("user", "Sure?") + HEADER
    assert processor.template.render(chat) == expected
    own = [{"role": "system", "content": "Be brief."}, question]
    assert processor.template.render(own) == "<|begin_of_text|>" + turn.format("system", "Be brief.") + asked + HEADER
    ids = processor.input_ids([question]).tolist()
    assert ids.count(256) == 1
    assert ids.count(IMAGE) == 1


def test_what_an_earlier_answer_said_is_not_fused(tiny_tokenizer: WriteTokenizer, tmp_path: Path) -> None:
    checkpoint = load_model(write(tmp_path / "model", tiny_tokenizer))
    chat = [user_message("What?", num_images=1), {"role": "assistant", "content": "A cat."}, user_message("Sure?")]
    ids = checkpoint.processor.input_ids(chat)
    answer = ids[checkpoint.processor.answer_positions(chat)]
    assert answer[-1] == END
    assert checkpoint.processor.tokenizer.decode(answer[:-1].tolist()) == "A cat."


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio is 'anyres'; expected 'square' or 'pad'"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type is 'spatial_unpad'; expected 'flat'"),
        ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear'; expected 'mlp2x_gelu'"),
        ({"mm_vision_select_feature": "cls_patch"}, "expected 'patch'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end is True; expected False"),
    ],
)
def test_settings_that_the_original_does_not_survive_are_refused(
    changes: dict[str, object], words: str, tiny_tokenizer: WriteTokenizer, tmp_path: Path
) -> None:
    folder = write(tmp_path / "model", tiny_tokenizer, **changes)
    with pytest.raises(UnsupportedError, match=words):
        FAMILY.config(ModelFolder(folder))


def test_padding_is_in_the_mean_colour(tiny_tokenizer: WriteTokenizer, tmp_path: Path) -> None:
    folder = ModelFolder(write(tmp_path / "model", tiny_tokenizer, image_aspect_ratio="pad"))
    spec = FAMILY.processor(folder, FAMILY.config(folder)).image_spec
    assert (spec.fit, spec.pad_color) == ("pad", (122, 116, 104))


def test_a_missing_tensor_of_the_compressor_is_named(tiny_tokenizer: WriteTokenizer, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", tiny_tokenizer)
    weights = load_file(folder / "model.safetensors")
    del weights["model.compressor.attn.in_proj_bias"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(IntegrityError, match="compressor"):
        load_model(folder)
