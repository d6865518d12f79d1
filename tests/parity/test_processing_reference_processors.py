"""Thirty pictures of all shapes through the image processors of transformers, and through ours."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import AddedToken
from tokenizers import Tokenizer as InnerTokenizer
from transformers import Idefics3Processor, PreTrainedTokenizerFast, SmolVLMProcessor, SmolVLMVideoProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from edgevlm.families.folder import ModelFolder
from edgevlm.families.reading import read_image_spec
from edgevlm.processing.chat import ChatTemplate
from edgevlm.processing.hub_config import preprocessor_config
from edgevlm.processing.image_spec import ImageSpec
from edgevlm.processing.images import load_image
from edgevlm.processing.processor import Processor, PromptSpec
from edgevlm.processing.tokenizer import Tokenizer
from edgevlm.processing.views import picture_views

HOW_MANY = {"coco": 9, "coco640": 5, "sroie": 6, "nlvr": 2, "easyvqa": 1, "flickr8k": 2}
NONE = ImageSpec(height=1, width=1, fit="stretch")  # read where a folder says nothing: no reference agrees with it
SAME = 1e-6  # of the range from black to white: the same filter, and single precision afterwards
ONE_LEVEL = 1 / 255 + SAME  # strips, of which the reference resizes far more than it keeps

FASTVLM = {"size": {"shortest_edge": 1024}, "crop_size": 1024, "image_mean": [0.0] * 3, "image_std": [1.0] * 3}
ONE_VIEW: dict[str, tuple[Any, dict[str, Any]]] = {
    "clip": (CLIPImageProcessorPil, {}),
    "clip-336": (CLIPImageProcessorPil, {"size": 336, "crop_size": {"height": 336, "width": 336}}),
    "fastvlm-center-crop": (CLIPImageProcessorPil, FASTVLM),
    "llava": (LlavaImageProcessorPil, {"size": {"shortest_edge": 336}, "crop_size": 336}),
    "llava-pad": (LlavaImageProcessorPil, {"do_pad": True}),
    "siglip": (SiglipImageProcessorPil, {"size": {"height": 384, "width": 384}}),
    "siglip-unnormalised": (SiglipImageProcessorPil, {"do_normalize": False}),
    "vit": (ViTImageProcessorPil, {"size": {"height": 224, "width": 160}, "do_convert_rgb": True}),
}
TILES = {"size": {"longest_edge": 512}, "max_image_size": {"longest_edge": 128}}
TILED: dict[str, tuple[Any, dict[str, Any]]] = {
    "idefics3": (Idefics3ImageProcessorPil, TILES),
    "smolvlm": (SmolVLMImageProcessorPil, TILES),
    "smolvlm-one-tile": (SmolVLMImageProcessorPil, {**TILES, "do_image_splitting": False}),
}


@pytest.fixture(scope="module")
def pictures(test_data: Path) -> list[Image.Image]:
    """Narrow to wide of every source, then what no source has: a palette, a large one, two strips, odd sides."""
    folder = test_data / "data"
    by_source: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in (folder / "data.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        by_source[row["source"]].append(row)
    found = []
    for source, count in HOW_MANY.items():
        rows = sorted(by_source[source], key=lambda row: (row["width"] / row["height"], row["id"]))
        chosen = [rows[round(place)] for place in np.linspace(0, len(rows) - 1, count)]
        found += [Image.open(folder / row["file"]) for row in chosen]
    photo = found[HOW_MANY["coco"]]
    found += [photo.quantize(64), photo.resize((2611, 1900)), photo.crop((0, 99, 427, 104)), photo.crop((7, 0, 9, 640))]
    return [*found, photo.crop((5, 5, 56, 48))]


def written(processor: Any, folder: Path) -> ModelFolder:
    processor.save_pretrained(folder)
    return ModelFolder(folder)


def difference(reference: Any, ours: Any, spec: ImageSpec) -> float:
    """The largest, in units of the range from black to white."""
    found, expected = np.asarray(ours, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    assert found.shape == expected.shape
    return float(np.abs((found - expected) * np.asarray(spec.std)[:, None, None]).max())


def test_the_pictures_are_of_all_shapes(pictures: list[Image.Image]) -> None:
    ratios = [picture.width / picture.height for picture in pictures]
    assert len(pictures) == 30
    assert min(ratios) < 0.01
    assert max(ratios) > 50
    assert {picture.mode for picture in pictures} == {"RGB", "L", "P"}


@pytest.mark.parametrize("name", ONE_VIEW)
def test_one_view_is_the_references(name: str, pictures: list[Image.Image], tmp_path: Path) -> None:
    kind, settings = ONE_VIEW[name]
    processor = kind(**settings)
    spec = read_image_spec(written(processor, tmp_path), default=NONE)
    for picture in pictures[2::4] if spec.height == 1024 else pictures:
        reference = processor(picture, return_tensors="np")["pixel_values"]
        is_strip = max(picture.size) > 16 * min(picture.size) and spec.fit == "center-crop"
        limit = ONE_LEVEL if is_strip else SAME
        assert difference(reference, picture_views(load_image(picture), spec)[0], spec) <= limit, picture


def test_the_first_view_of_llava_next_is_the_references(pictures: list[Image.Image], tmp_path: Path) -> None:
    processor = LlavaNextImageProcessorPil()
    spec = read_image_spec(written(processor, tmp_path), default=NONE)
    for picture in pictures:
        reference = processor(picture, return_tensors="np")["pixel_values"][0, :1]
        assert difference(reference, picture_views(load_image(picture), spec)[0], spec) <= SAME, picture


@pytest.mark.parametrize("name", TILED)
def test_tiles_are_the_references(name: str, pictures: list[Image.Image], tmp_path: Path) -> None:
    kind, settings = TILED[name]
    processor = kind(**settings)
    spec = read_image_spec(written(processor, tmp_path), default=NONE)
    grids = set()
    for picture in pictures:
        reference = processor(picture, return_tensors="np", return_row_col_info=True)
        views, grid = picture_views(load_image(picture), spec)
        assert difference(reference["pixel_values"][0], views, spec) <= SAME, picture
        rows_and_columns = (reference["rows"][0][0] or 1, reference["cols"][0][0] or 1)
        assert grid == rows_and_columns
        grids.add(grid)
    assert (grids == {(1, 1)}) == (name == "smolvlm-one-tile")


def test_tiles_as_large_as_published_are_the_references(pictures: list[Image.Image], tmp_path: Path) -> None:
    processor = SmolVLMImageProcessorPil(size={"longest_edge": 2048}, max_image_size={"longest_edge": 512})
    spec = read_image_spec(written(processor, tmp_path), default=NONE)
    for picture in pictures[::7]:
        reference = processor(picture, return_tensors="np")["pixel_values"][0]
        assert difference(reference, picture_views(load_image(picture), spec)[0], spec) <= SAME, picture


@pytest.mark.parametrize("name", TILED)
def test_a_tiled_spec_survives_the_hubs_format(name: str, tmp_path: Path) -> None:
    kind, settings = TILED[name]
    spec = read_image_spec(written(kind(**settings), tmp_path), default=NONE)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor_config(spec)))
    assert "edgevlm_differences" not in preprocessor_config(spec)
    assert read_image_spec(ModelFolder(tmp_path), default=NONE) == spec
    assert kind.from_pretrained(tmp_path).to_dict()["size"] == kind(**settings).to_dict()["size"]


SMOLVLM_TEMPLATE = """\
<|im_start|>
{%- for message in messages -%}
    {{ message.role | capitalize }}{{ ':' if message.content[0].type == 'image' else ': ' }}
    {%- for part in message.content -%}{{ '<image>' if part.type == 'image' else part.text }}{%- endfor -%}
    {{ '<end_of_utterance>\\n' }}
{%- endfor -%}
{{ 'Assistant:' if add_generation_prompt else '' }}"""


@pytest.fixture(scope="module", params=["gpt2", "qwen2"])
def inner_tokenizer(request: pytest.FixtureRequest, test_data: Path) -> InnerTokenizer:
    inner = InnerTokenizer.from_file(str(test_data / "tokenizers" / request.param / "tokenizer.json"))
    places = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    names = ["<|im_start|>", "<global-img>", *places, "<fake_token_around_image>", "<image>", "<end_of_utterance>"]
    inner.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return inner


@pytest.mark.parametrize("kind", [Idefics3Processor, SmolVLMProcessor])
@pytest.mark.parametrize("splits", [True, False])
def test_prompts_are_the_references(
    kind: Any,
    splits: bool,
    inner_tokenizer: InnerTokenizer,
    pictures: list[Image.Image],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(processing_smolvlm, "num2words", str)  # spells the seconds of videos, which none of these is
    image_processor = SmolVLMImageProcessorPil(**TILES, do_image_splitting=splits)
    if kind is Idefics3Processor:
        image_processor = Idefics3ImageProcessorPil(**TILES, do_image_splitting=splits)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner_tokenizer)
    more = {} if kind is Idefics3Processor else {"video_processor": SmolVLMVideoProcessor()}
    reference = kind(image_processor, tokenizer, image_seq_len=9, chat_template=SMOLVLM_TEMPLATE, **more)
    ours = Processor(
        image_spec=read_image_spec(written(image_processor, tmp_path), default=NONE),
        prompt_spec=PromptSpec(image_token="<image>", num_vision_tokens=9, stop_token_ids=(1,), layout="idefics3"),
        tokenizer=Tokenizer(InnerTokenizer.from_str(inner_tokenizer.to_str())),
        template=ChatTemplate(SMOLVLM_TEMPLATE),
    )
    image, text = {"type": "image"}, {"type": "text", "text": "What's on 2 shelves?\n\nSay it."}
    for pair in zip(pictures[::3], pictures[1::3], strict=False):
        messages = [
            {"role": "user", "content": [image, text]},
            {"role": "assistant", "content": [text]},
            {"role": "user", "content": [text, image]},
        ]
        prompt = reference.apply_chat_template(messages, add_generation_prompt=True)
        expected = reference(images=[*map(load_image, pair)], text=prompt, add_special_tokens=False)["input_ids"][0]
        prepared = [ours.prepare(picture) for picture in pair]
        found = ours.input_ids(messages, grids=[one.grid for one in prepared])
        assert list(found) == list(expected)
        places = sum(ours.num_vision_tokens(one.grid) for one in prepared)
        assert len(ours.image_positions(found)) == places == 9 * sum(len(one.pixel_values) for one in prepared)
