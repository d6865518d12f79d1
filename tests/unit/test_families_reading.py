"""The files beside a checkpoint's weights, in all the spellings of the hub."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as InnerTokenizer
from tokenizers import models, pre_tokenizers

from edgevlm.core.errors import ConfigError, EdgeVLMError, IntegrityError, UnsupportedError
from edgevlm.families.folder import ModelFolder
from edgevlm.families.reading import (
    CLIP_COLOURS,
    read_image_spec,
    read_stop_ids,
    read_template,
    read_tokenizer,
)
from edgevlm.processing.chat import user_message
from edgevlm.processing.hub_config import preprocessor_config
from edgevlm.processing.image_spec import ImageSpec
from edgevlm.processing.split import Idefics3Tiles
from edgevlm.processing.tokenizer import Tokenizer

DEFAULT = ImageSpec(height=3, width=3, fit="stretch")
CLIP_MEAN, CLIP_STD = (tuple(values) for values in CLIP_COLOURS.values())
HALF = (0.5, 0.5, 0.5)
FASTVLM = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 1024},
    "crop_size": {"height": 1024, "width": 1024},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "image_mean": [0.0, 0.0, 0.0],
    "image_std": [1, 1, 1],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
}
SMOLVLM = {
    "image_processor_type": "Idefics3ImageProcessor",
    "size": {"longest_edge": 2048},
    "max_image_size": {"longest_edge": 512},
    "do_image_splitting": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 1,
}


def folder_with(path: Path, **files: Any) -> ModelFolder:
    for name, values in {"config": {}, **files}.items():
        (path / f"{name}.json").write_text(json.dumps(values), encoding="utf-8")
    return ModelFolder(path)


def spec_of(path: Path, values: dict[str, Any]) -> ImageSpec:
    return read_image_spec(folder_with(path, preprocessor_config=values), default=DEFAULT)


def clip(**changes: Any) -> ImageSpec:
    values = {"height": 224, "width": 224, "fit": "center-crop", "mean": CLIP_MEAN, "std": CLIP_STD, **changes}
    return ImageSpec(**values)


# pictures


def test_without_a_file_the_default_counts(tmp_path: Path) -> None:
    assert read_image_spec(folder_with(tmp_path), default=DEFAULT) is DEFAULT


def test_a_file_of_transformers_5_is_read(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, processor_config={"image_processor": FASTVLM, "processor_class": "X"})
    assert read_image_spec(folder, default=DEFAULT).height == 1024


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (FASTVLM, ImageSpec(height=1024, width=1024, fit="center-crop")),
        ({"image_processor_type": "CLIPImageProcessor"}, clip()),
        ({"image_processor_type": "CLIPImageProcessorFast", "size": 336, "crop_size": 336}, clip(
            height=336, width=336)),
        ({"image_processor_type": "CLIPImageProcessorPil", "size": {"shortest_edge": 224, "height": None}}, clip()),
        ({"feature_extractor_type": "CLIPFeatureExtractor", "do_normalize": False}, ImageSpec(
            height=224, width=224, fit="center-crop")),
        ({"image_processor_type": "CLIPImageProcessor", "do_center_crop": False, "size": {"height": 9, "width": 7}},
            clip(height=9, width=7, fit="stretch")),
        ({"image_processor_type": "LlavaImageProcessorFast", "do_pad": True, "resample": 2}, clip(
            fit="pad", filter="bilinear", pad_color=(122, 116, 104))),
        ({"image_processor_type": "LlavaNextImageProcessor", "do_pad": True}, clip(fit="stretch")),
        ({"image_processor_type": "SiglipImageProcessor", "size": 384}, ImageSpec(
            height=384, width=384, fit="stretch", mean=HALF, std=HALF)),
        ({"image_processor_type": "ViTImageProcessor", "image_mean": 0.25, "do_center_crop": None}, ImageSpec(
            height=224, width=224, fit="stretch", filter="bilinear", mean=(0.25,) * 3, std=HALF)),
        (SMOLVLM, ImageSpec(
            height=512, width=512, fit="stretch", filter="lanczos", mean=HALF, std=HALF, split=Idefics3Tiles())),
        ({"image_processor_type": "SmolVLMImageProcessorFast", "do_image_splitting": False}, ImageSpec(
            height=364, width=364, fit="stretch", filter="lanczos", mean=HALF, std=HALF,
            split=Idefics3Tiles(longest_edge=1456, enabled=False))),
    ],
)  # fmt: skip
def test_preprocessing_is_read(values: dict[str, Any], expected: ImageSpec, tmp_path: Path) -> None:
    assert spec_of(tmp_path, values) == expected


@pytest.mark.parametrize(
    "spec",
    [
        clip(),
        clip(fit="pad", pad_color=(122, 116, 104)),
        clip(fit="stretch", width=100, filter="box"),
        ImageSpec(height=512, width=512, fit="stretch", filter="lanczos", split=Idefics3Tiles()),
    ],
)
def test_what_is_written_for_the_hub_is_read_back(spec: ImageSpec, tmp_path: Path) -> None:
    assert spec_of(tmp_path, preprocessor_config(spec)) == spec


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"image_processor_type": "PixtralImageProcessor"},
            "named 'PixtralImageProcessor'; known: CLIP",
        ),
        ({"image_processor_type": None}, "no image_processor_type named 'none'"),
        ({"do_resize": False}, "do_resize is false"),
        ({"do_rescale": False}, "do_rescale is false"),
        ({"rescale_factor": 1 / 127.5}, "must be 1/255"),
        ({"rescale_factor": "1/255"}, "must be 1/255"),
        ({"rescale_factor": float("nan")}, "must be 1/255"),
        ({"image_mean": [0.5, 0.5, 10**400]}, "must be three numbers"),
        ({"resample": 9}, "resample must be one of"),
        ({"resample": True}, "resample must be one of"),
        ({"do_center_crop": False}, "sizes must be fixed"),
        ({"crop_size": 896}, "1024 x 1024 and then cropped to 896 x 896"),
        ({"crop_size": {"height": 1024, "width": 512}}, "cropped to 1024 x 512"),
        ({"size": {"shortest_edge": 1024, "longest_edge": 2048}}, "height and width, or one edge"),
        ({"size": {"longest_edge": 1024}}, "fixed height and width"),
        ({"size": "large"}, "number of pixels or a table"),
        ({"size": {"height": 2.5, "width": 2}}, "number of pixels or a table"),
        ({"image_mean": [0.5, 0.5]}, "must be three numbers"),
        ({"image_mean": ["a", "b", "c"]}, "must be three numbers"),
        ({**SMOLVLM, "size": {"height": 512, "width": 512}}, "must each name a longest_edge"),
    ],
)
def test_preprocessing_that_no_spec_can_say_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=message):
        spec_of(tmp_path, {**FASTVLM, **changes})


@pytest.mark.parametrize(
    "changes", [{"size": -1, "crop_size": -1}, {"image_std": [0, 1, 1]}, {**SMOLVLM, "size": {"longest_edge": 1000}}]
)
def test_values_outside_the_spec_are_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"preprocessor_config\.json: image"):
        spec_of(tmp_path, {**FASTVLM, **changes})


# prompts

DEFAULT_TEMPLATE = "{% for m in messages %}{{ bos_token }}{% for p in m.content %}<image>{% endfor %}{% endfor %}"
OWN_TEMPLATE = "own {% for p in messages[0].content if p.type == 'image' %}<image>{% endfor %}"


def test_a_folders_own_template_goes_first(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, processor_config={"chat_template": OWN_TEMPLATE})
    assert read_template(folder, DEFAULT_TEMPLATE).source == OWN_TEMPLATE
    (tmp_path / "chat_template.jinja").write_text(f"jinja {OWN_TEMPLATE}")
    assert read_template(folder, DEFAULT_TEMPLATE).source.startswith("jinja own")


def test_without_a_template_the_default_has_the_tokenizers_tokens(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, tokenizer_config={"bos_token": {"content": "<s>"}})
    assert read_template(folder, DEFAULT_TEMPLATE).render([user_message("a", num_images=1)]) == "<s><image><image>"


# tokens

LETTERS = {character: id for id, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


def older_files(path: Path, **settings: Any) -> ModelFolder:
    """A vocabulary of bytes with one merge, as GPT-2 stores it."""
    (path / "merges.txt").write_text("#version: 0.2\nh i\n", encoding="utf-8")
    values = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|end|>", **settings}
    return folder_with(path, vocab={**LETTERS, "hi": 256}, tokenizer_config=values)


def test_a_tokenizer_is_built_from_the_older_files(tmp_path: Path) -> None:
    detailed = {"258": {"content": "<|pad|>", "special": True}, "257": {"content": "<tool>", "lstrip": True}}
    tokenizer = read_tokenizer(older_files(tmp_path, added_tokens_decoder=detailed), placeholder="<image>")
    ids = [tokenizer.token_id(token) for token in ("hi", "<tool>", "<|pad|>", "<|end|>", "<image>")]
    assert ids == [256, 257, 258, 259, 260]
    assert tokenizer.encode("hi  <tool>hi") == [256, 257, 256]  # lstrip swallows the blanks
    special = {name for name, token in tokenizer.added_tokens.items() if token.special}
    assert special == {"<|pad|>", "<|end|>", "<image>"}


def test_a_placeholder_that_is_there_keeps_its_id_and_becomes_special(tmp_path: Path) -> None:
    inner = InnerTokenizer(models.BPE({**LETTERS, "<image>": 256}, []))
    inner.add_tokens(["<image>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = read_tokenizer(folder_with(tmp_path), placeholder="<image>")
    assert tokenizer.token_id("<image>") == 256
    assert tokenizer.added_tokens["<image>"].special
    assert tokenizer.with_special("<image>") is tokenizer


def test_sentencepiece_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\n")
    with pytest.raises(UnsupportedError, match=r"AutoTokenizer.*save_pretrained"):
        read_tokenizer(folder_with(tmp_path), placeholder="<image>")


@pytest.mark.parametrize("name", ["$(id)", "it's", 'say "x"', "`id`", "a b;c", "\x1b[2J"])
def test_the_way_out_is_one_command_whatever_the_folder_is_called(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(b"\n")
    with pytest.raises(UnsupportedError) as raised:
        Tokenizer.from_folder(folder)
    command = str(raised.value).partition("into the folder: ")[2]
    python, option, code = shlex.split(command)
    assert (python, option) == ("python", "-c")
    assert repr(str(folder)) in code
    assert command.isprintable()
    compile(code, "command", "exec")


def test_another_kind_of_bpe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"names CLIPTokenizer; .*Qwen2Tokenizer and GPT2Tokenizer"):
        read_tokenizer(older_files(tmp_path, tokenizer_class="CLIPTokenizer"), placeholder="<image>")


@pytest.mark.parametrize(
    ("settings", "merges", "message"),
    [
        ({"added_tokens_decoder": {"300": {"content": "<x>"}}}, "h i\n", "should have id 300, but gets 257"),
        ({"added_tokens_decoder": {"three": {"content": "<x>"}}}, "h i\n", "not a tokenizer"),
        ({"added_tokens_decoder": {"257": {}}}, "h i\n", "not a tokenizer"),
        ({}, "h i j\n", "must hold two tokens"),
        ({}, "h €\n", "not a tokenizer"),
    ],
)
def test_older_files_that_contradict_each_other_are_refused(
    settings: dict[str, Any], merges: str, message: str, tmp_path: Path
) -> None:
    folder = older_files(tmp_path, **settings)
    (tmp_path / "merges.txt").write_text(merges, encoding="utf-8")
    with pytest.raises(IntegrityError, match=message):
        read_tokenizer(folder, placeholder="<image>")


def test_a_saved_tokenizer_opens_alone(tmp_path: Path) -> None:
    tokenizer = read_tokenizer(older_files(tmp_path), placeholder="<image>")
    (tmp_path / "bundle").mkdir()
    tokenizer.save(tmp_path / "bundle" / "tokenizer.json")
    opened = Tokenizer.from_folder(tmp_path / "bundle")
    assert opened.encode("hi <image>") == tokenizer.encode("hi <image>")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config": {"eos_token_id": [7, 5]}, "config": {"eos_token_id": 6}}, (7, 5, 257)),
        ({"generation_config": {"eos_token_id": None}, "config": {"eos_token_id": 6}}, (6, 257)),
        ({"config": {"text_config": {"eos_token_id": 9}}}, (9, 257)),
        ({"config": {"eos_token_id": [257, 257, 128_002, -3, True, "5"]}}, (257,)),
        ({"config": {"text_config": "none"}}, (257,)),
    ],
)
def test_stop_ids_come_from_the_nearest_file_and_the_tokenizer(
    files: dict[str, Any], expected: tuple[int, ...], tmp_path: Path
) -> None:
    older_files(tmp_path)
    folder = folder_with(tmp_path, **files)
    assert read_stop_ids(folder, read_tokenizer(folder, placeholder="<image>")) == expected


def test_the_tokens_that_a_family_ends_with_come_first_and_are_enough(tmp_path: Path) -> None:
    folder = older_files(tmp_path, eos_token=None)
    tokenizer = read_tokenizer(folder, placeholder="<end>")
    end = tokenizer.token_id("<end>")
    assert read_stop_ids(folder, tokenizer, known=("<end>", "<elsewhere>")) == (end,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, end]}))
    assert read_stop_ids(ModelFolder(tmp_path), tokenizer, known=("<end>",)) == (end, 7)


def test_a_folder_that_ends_no_answer_is_refused(tmp_path: Path) -> None:
    folder = older_files(tmp_path, eos_token=None)
    with pytest.raises(ConfigError, match="no file names a token"):
        read_stop_ids(folder, read_tokenizer(folder, placeholder="<image>"))


@pytest.mark.parametrize("content", ["", "[]", "{", '{"image_processor": 3}', "null"])
def test_damaged_files_are_errors_of_ours(content: str, tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    for name in ("preprocessor_config.json", "vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(EdgeVLMError):
        read_image_spec(folder, default=DEFAULT)
    with pytest.raises(EdgeVLMError):
        read_tokenizer(folder, placeholder="<image>")
