"""A bundle's folder, unchanged, answers in transformers.js as it does here: LLaVA, FastVLM, SmolVLM, Idefics3, nano."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from edgevlm.bundle.manifest import PartFile
from edgevlm.cli.app import app
from edgevlm.export.hub_files import graph_files, patches
from edgevlm.export.pipeline import export_bundle

QUESTION = "What is it?"
TILE = 32
TEXT: dict[str, Any] = {
    "vocab_size": 288,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
VIT: dict[str, Any] = {
    "image_size": TILE,
    "patch_size": 8,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
PLACES = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
IDEFICS_TOKENS = ["<image>", "<fake_token_around_image>", "<global-img>", "<|im_start|>", "<end_of_utterance>", *PLACES]
IDEFICS_IDS = {token: 256 + number for number, token in enumerate(IDEFICS_TOKENS)}
Tokens = Callable[..., Path]


@torch.no_grad()
def saved(model: nn.Module, folder: Path) -> None:
    """Weights of ordinary size: matrices keep the scale of what they map, tables and norms count."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if "embed_tokens" in name:
            tensor.copy_(noise)
        elif name.endswith("running_var"):
            tensor.copy_(1 + 0.2 * noise.abs())
        elif name.endswith("gamma"):
            tensor.copy_(0.1 * noise)
        elif tensor.dim() > 1:
            tensor.copy_(1.4 * noise * tensor[0].numel() ** -0.5)
        else:
            tensor.copy_(0.2 * noise + float(name.endswith("weight")))
    model.save_pretrained(folder)  # type: ignore[operator]


def llava(folder: Path, tokens: Tokens) -> None:
    """CLIP and Llama; the tokenizer writes ``<s>`` too, as Llama's does."""
    from tokenizers import Tokenizer, processors
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(vision_config=CLIPVisionConfig(**VIT), text_config=LlamaConfig(**TEXT), image_token_index=258)
    saved(LlavaForConditionalGeneration(config), folder)
    tokens(folder, {"<s>": 256, "</s>": 257}, bos_token="<s>", eos_token="</s>")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    tokenizer.save(str(folder / "tokenizer.json"))


def fastvlm(folder: Path, tokens: Tokens) -> None:
    """A narrow FastViTHD and Qwen2; pictures are padded to a square."""
    from transformers import FastVlmConfig, FastVlmForConditionalGeneration, Qwen2Config

    arguments = {"layers": (1, 1, 1, 1, 1), "embed_dims": (16, 32, 64, 64, 64), "inference_mode": True}
    vision = {"model_type": "timm_wrapper", "architecture": "fastvit_mci3", "hidden_size": 128, "num_classes": 0}
    config = FastVlmConfig(
        vision_config={**vision, "model_args": arguments}, text_config=Qwen2Config(**TEXT), image_token_index=259
    )
    saved(FastVlmForConditionalGeneration(config), folder)
    tokens(folder, {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258}, eos_token="<|im_end|>")
    square = {"height": 128, "width": 128}
    images = {"image_processor_type": "LlavaImageProcessor", "do_pad": True, "size": square, "crop_size": square}
    levels = {"image_mean": [0.0, 0.0, 0.0], "image_std": [1.0, 1.0, 1.0], "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps({**images, **levels}))


def idefics3(folder: Path, tokens: Tokens, kind: str = "Idefics3", tiles_per_side: int = 1) -> None:
    """SigLIP and Llama; with one tile a side nothing is resized."""
    import transformers

    make_config, make_model = (
        getattr(transformers, f"{kind}{name}") for name in ("Config", "ForConditionalGeneration")
    )
    text = transformers.LlamaConfig(**TEXT)
    vision = {**VIT, "patch_size": 4}
    saved(make_model(make_config(vision_config=vision, text_config=text, scale_factor=2, image_token_id=256)), folder)
    tokens(folder, IDEFICS_IDS, eos_token="<end_of_utterance>")
    sizes = {"size": {"longest_edge": tiles_per_side * TILE}, "max_image_size": {"longest_edge": TILE}}
    images = {"image_processor_type": "Idefics3ImageProcessor", **sizes}
    (folder / "preprocessor_config.json").write_text(json.dumps(images))


def smolvlm(folder: Path, tokens: Tokens) -> None:
    idefics3(folder, tokens, kind="SmolVLM", tiles_per_side=2)


def noise(height: int, width: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


CASES: dict[str, tuple[Callable[[Path, Tokens], None], np.ndarray[Any, Any]]] = {
    "llava": (llava, noise(32, 32)),
    "fastvlm": (fastvlm, noise(80, 128)),  # padded to the encoder's 128 pixels, so that nothing is resized
    "idefics3": (idefics3, noise(32, 32)),
    "smolvlm": (smolvlm, np.full((50, 90, 3), (200, 30, 90), np.uint8)),  # one colour stays it, whatever resizes it
}


@pytest.fixture(scope="session")
def node_modules(root: Path) -> Path:
    """The folder of npm packages; EDGEVLM_NODE_MODULES names another than runtimes/web/node_modules."""
    folder = Path(os.environ.get("EDGEVLM_NODE_MODULES") or root / "runtimes" / "web" / "node_modules")
    if shutil.which("node") is None:
        pytest.skip("node is not installed: nothing here can run transformers.js")
    if not (folder / "@huggingface" / "transformers" / "package.json").is_file():
        pytest.skip(f"no transformers.js in {folder}: run `npm install --ignore-scripts` in runtimes/web")
    return folder


def ask(root: Path, node_modules: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run ``ask.mjs`` as a user does."""
    command = ["node", str(root / "runtimes" / "web" / "ask.mjs"), *map(str, arguments)]
    environment = {**os.environ, "EDGEVLM_NODE_MODULES": str(node_modules)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def ours(bundle: Path, picture: Path, question: str, *options: str) -> dict[str, Any]:
    """What ``edgevlm run`` answers."""
    arguments = ["--image", str(picture), "--prompt", question, "--max-tokens", "12", "--json", *options]
    result = CliRunner().invoke(app, ["run", str(bundle), *arguments])
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


@pytest.fixture(scope="module", params=list(CASES))
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokens
) -> tuple[str, Path, Path]:
    """A family's name, a bundle of it, and a picture."""
    write, pixels = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "checkpoint").mkdir()
    write(folder / "checkpoint", tiny_tokenizer)
    Image.fromarray(pixels).save(folder / "picture.png")
    return request.param, export_bundle(folder / "checkpoint", out=folder / "model.bundle"), folder / "picture.png"


def test_the_folder_of_a_bundle_answers_alike_in_transformers_js(
    exported: tuple[str, Path, Path], root: Path, node_modules: Path
) -> None:
    _, bundle, picture = exported
    expected = ours(bundle, picture, QUESTION)
    result = ask(root, node_modules, bundle, picture, QUESTION, "--max-tokens", "12", "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["num_prompt_tokens"] == expected["num_prompt_tokens"]
    assert found["token_ids"] == expected["token_ids"]
    assert len(set(found["token_ids"])) > 2, "an answer of one token for ever would say little"
    assert result.stderr == ""


WORDS = {"q4": "int4-b128", "q8": "int8-dynamic", "int8": "int8-b32", "fp16": "fp16"}  # theirs and ours


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokens) -> Callable[[str], Path]:
    """The folder of a family, with a bundle in which only the embedding of float16 decoders is there."""

    def write(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family)
        (folder / "checkpoint").mkdir()
        CASES[family][0](folder / "checkpoint", tiny_tokenizer)
        Image.fromarray(CASES[family][1]).save(folder / "picture.png")
        wishes: dict[str, Any] = {"encoder_precision": "fp32,fp16,int8", "decoder_precision": ",".join(WORDS.values())}
        export_bundle(folder / "checkpoint", out=folder / "model.bundle", calib_samples=2, **wishes)
        return folder

    return functools.cache(write)


@pytest.mark.parametrize("family", ["llava", "fastvlm", "smolvlm"])
@pytest.mark.parametrize(("encoder", "decoder"), [("fp32", "q4"), ("fp32", "q8"), ("int8", "int8"), ("fp16", "fp16")])
def test_every_precision_answers_alike(
    family: str, encoder: str, decoder: str, rounded: Callable[[str], Path], root: Path, node_modules: Path
) -> None:
    """The ids of random weights.  A float16 encoder is not asked for with q8.

    Its features differ between onnxruntime-node 1.30 and Python's 1.31 (by 2e-4 of the largest), and rounding
    activations to 8 bits makes other words of that.
    """
    folder = rounded(family)
    bundle, picture = folder / "model.bundle", folder / "picture.png"
    theirs = ("--encoder", encoder, "--decoder", decoder, "--max-tokens", "12", "--json")
    result = ask(root, node_modules, bundle, picture, QUESTION, *theirs)
    assert (result.returncode, result.stderr) == (0, "")
    names = ("--encoder-precision", encoder, "--decoder-precision", WORDS[decoder])
    assert json.loads(result.stdout)["token_ids"] == ours(bundle, picture, QUESTION, *names)["token_ids"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--decoder", "int4"), "has no decoder_model_merged in int4: ask for q4, q8, int8, fp16"),
        (("--decoder", "fp32"), "has no decoder_model_merged in fp32"),
        (("--encoder", "q8"), "has no vision_encoder in q8: ask for fp32, fp16, int8"),
    ],
)
def test_a_precision_that_the_bundle_lacks_is_refused(
    options: tuple[str, str], words: str, rounded: Callable[[str], Path], root: Path, node_modules: Path
) -> None:
    """transformers.js itself takes the default, in silence, for a word that it does not know."""
    folder = rounded("llava")
    result = ask(root, node_modules, folder / "model.bundle", folder / "picture.png", QUESTION, *options)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert words in result.stderr


def test_ask_says_in_one_line_what_is_missing(root: Path, node_modules: Path, tmp_path: Path) -> None:
    cases = (
        ((tmp_path / "no.bundle", "a.png", "Why?"), 2, "no bundle at"),
        (("a", "b"), 2, "usage: node ask.mjs BUNDLE IMAGE QUESTION"),
        (("a", "b", "c", "--max-tokens", "x"), 2, "usage: node ask.mjs"),
    )
    for arguments, code, words in cases:
        result = ask(root, node_modules, *arguments)
        assert (result.returncode, result.stdout, result.stderr.count("\n")) == (code, "", 1)
        assert words in result.stderr


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_missing_packages_come_with_the_command_that_installs_them(
    root: Path, tmp_path: Path, tiny_bundle: Path
) -> None:
    Image.fromarray(noise(32, 32)).save(tmp_path / "picture.png")
    result = ask(root, tmp_path, tiny_bundle, tmp_path / "picture.png", QUESTION)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (6, "", 1)
    assert "npm install --ignore-scripts" in result.stderr


def part_file(part: str, suffix: str, precision: str, *, data: bool = False) -> PartFile:
    file = f"onnx/{part}{suffix}.onnx"
    extra = (f"{file}_data",) if data else ()
    return PartFile(part=part, target="onnx", precision=precision, file=file, extra_files=extra, inputs=(), outputs=())


def test_config_json_names_the_default_precision_and_the_graphs_with_data_beside_them() -> None:
    parts = (
        part_file("vision_encoder", "_int8", "int8"),
        part_file("vision_encoder", "", "fp32", data=True),
        part_file("decoder_model_merged", "_q4", "int4-b128", data=True),
        part_file("decoder_model_merged", "_int4_b32_asym", "int4-b32-asym", data=True),  # no name for it there
    )
    assert graph_files(parts) == {
        "dtype": {"vision_encoder": "int8", "decoder_model_merged": "q4"},
        "use_external_data_format": {"vision_encoder.onnx": 1, "decoder_model_merged_q4.onnx": 1},
    }


@given(side=st.integers(1, 2048), num_tokens=st.integers(1, 5000))
def test_every_number_of_placeholders_can_be_written_as_patches(side: int, num_tokens: int) -> None:
    patch, further = patches(side, num_tokens)
    assert patch >= 1
    assert further >= 0
    assert (side // patch) ** 2 + further == num_tokens


def test_patches_are_the_models_own_where_the_grid_is_a_square() -> None:
    assert patches(336, 576) == (14, 0)  # LLaVA-1.5
    assert patches(1024, 256) == (64, 0)  # FastVLM
    assert patches(32, 17) == (8, 1)  # a row behind the grid's
