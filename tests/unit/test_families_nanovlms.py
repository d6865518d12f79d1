"""The NanoVLMs paper's sizes, as configs and in recipes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from edgevlm.core.config import from_mapping, from_recipe, to_plain
from edgevlm.core.errors import ConfigError, UnsupportedError
from edgevlm.distill.recipe import TrainRecipe
from edgevlm.distill.vocabulary import END, save_tokenizer, train_tokenizer
from edgevlm.families.nanovlms import nanovlms, write_processor
from edgevlm.models.checkpoint import load_model
from edgevlm.models.vlm import Vlm
from edgevlm.shapes.config import DecoderConfig, Llama3Scaling, StemVitConfig, VlmConfig

# Parameters in all, in millions, and percent in encoder, connector and decoder.
SIZES = {"mini": (5.33, (69, 15, 16)), "base": (15.14, (77, 9, 14)), "large": (24.72, (73, 6, 21))}

RECIPE = """
name = "nanovlms-mini"

[model.vision]
type = "stem_vit"
hidden_size = 400
num_hidden_layers = 1
num_attention_heads = 8

[model.projector]
type = "mlp"
hidden_size = 1600

[model.decoder]
vocab_size = 2048
hidden_size = 96
intermediate_size = 384
num_hidden_layers = 4
num_attention_heads = 8
num_key_value_heads = 8
head_dim = 12
max_position_embeddings = 256
rms_norm_eps = 1e-5
attention_bias = true
output_bias = true
tie_word_embeddings = false
norm = "layer"
mlp = "gelu"
positions = "learned"

[data]
num_scenes = 64

[optimization]
steps = 2
warmup_steps = 1
decay_steps = 1
"""


def num_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("stem", ["patch", "image"])
@pytest.mark.parametrize("name", SIZES)
def test_sizes_and_shares_are_those_of_the_paper(name: str, stem: str) -> None:
    with torch.device("meta"):
        model = Vlm(nanovlms(name, stem=stem))  # type: ignore[arg-type]
    total = num_parameters(model)
    encoder, connector = num_parameters(model.vision_encoder), num_parameters(model.projector)
    shares = [round(100 * part / total) for part in (encoder, connector, total - encoder - connector)]
    assert (round(total / 1e6, 2), tuple(shares)) == SIZES[name]


def test_options_change_the_connector_and_the_number_of_vision_tokens() -> None:
    with torch.device("meta"):
        literal = Vlm(nanovlms("mini", connector="linear"))
    assert num_parameters(literal.projector) == 400 * 96 + 96
    everything = nanovlms("base", visual_tokens="all", vocab_size=8000)
    assert everything.num_vision_tokens == 196
    assert everything.decoder.max_position_embeddings - 196 == 255
    assert everything.decoder.vocab_size == 8000
    assert nanovlms("base").num_vision_tokens == 1


def test_a_recipe_can_name_the_mini_model(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    assert from_recipe(TrainRecipe, path).model == nanovlms("mini")


@pytest.mark.parametrize("name", SIZES)
def test_a_config_survives_being_written(name: str) -> None:
    config = nanovlms(name, connector="linear", stem="image", visual_tokens="all")  # type: ignore[arg-type]
    assert from_mapping(VlmConfig, to_plain(config), strict=True, where="test") == config


def test_another_size_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="known: base, large, mini"):
        nanovlms("huge")  # type: ignore[arg-type]


def documented_lines() -> str:
    """The Python of the section that says how to build one."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
    section = text.split("## NanoVLMs: building one\n")[1].split("\n## ")[0]
    (lines,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return str(lines)


def test_the_documented_lines_build_a_model_that_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (60, 40), "red").save("kitchen.jpg")
    exec(documented_lines(), {})
    assert capsys.readouterr().out.endswith("\n")
    checkpoint = load_model(tmp_path / "nanovlms-mini")
    image, prompt = checkpoint.processor.image_spec, checkpoint.processor.prompt_spec
    assert checkpoint.model.config == nanovlms("mini")
    assert (image.height, image.fit, image.mean, image.std) == (224, "stretch", (0.5,) * 3, (0.5,) * 3)
    assert prompt.num_vision_tokens == 1
    assert prompt.stop_token_ids == (checkpoint.processor.tokenizer.token_id(END),)


def test_a_tokenizer_without_an_end_or_a_picture_is_refused(tmp_path: Path) -> None:
    save_tokenizer(train_tokenizer(["a cat"], 300), tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|nowhere|>"}))
    with pytest.raises(ConfigError, match=r"no token '<\|nowhere\|>'"):
        write_processor(tmp_path, nanovlms("mini"))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="names no eos_token"):
        write_processor(tmp_path, nanovlms("mini"))
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace("<|image|>", "<|photo|>"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    with pytest.raises(ConfigError, match=r"no token '<\|image\|>'"):
        write_processor(tmp_path, nanovlms("mini"))


def test_weights_of_the_encoder_follow_from_the_seed() -> None:
    """Processes that train together start from the same weights."""
    config = nanovlms("mini", vocab_size=8)
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        models.append(Vlm(config))
        models[-1].initialize(0)
    pairs = zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True)
    assert [name for (name, first), second in pairs if not torch.equal(first, second)] == []


def test_a_stem_needs_an_even_patch_that_divides_the_picture() -> None:
    with pytest.raises(ConfigError, match="patch_size must be even"):
        StemVitConfig(image_size=30, patch_size=15, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    with pytest.raises(ConfigError, match="not a multiple of patch_size 16"):
        StemVitConfig(image_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)


def test_decoders_refuse_what_cannot_be_computed() -> None:
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 7, "max_position_embeddings": 8}
    with pytest.raises(ConfigError, match="head_dim must be even for rotary positions, got 7"):
        DecoderConfig(**sizes, **heads)
    assert DecoderConfig(**sizes, **heads, positions="learned").head_dim == 7
    with pytest.raises(ConfigError, match=r"high_freq_factor \(1.0\) above low_freq_factor"):
        Llama3Scaling(high_freq_factor=1.0)
