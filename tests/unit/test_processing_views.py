"""Pictures become views, grids become prompts."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import tokenizers
from PIL import Image
from tokenizers import decoders, models, pre_tokenizers

from edgevlm.core.config import from_mapping
from edgevlm.core.errors import ConfigError, InputError, UnsupportedError
from edgevlm.processing.chat import ChatTemplate, Message, user_message
from edgevlm.processing.frames import sample_frames
from edgevlm.processing.hub_config import preprocessor_config
from edgevlm.processing.image_spec import ImageSpec
from edgevlm.processing.images import pixel_values
from edgevlm.processing.layout import Layout
from edgevlm.processing.picture import Picture
from edgevlm.processing.processor import Processor, PromptSpec
from edgevlm.processing.split import Crops, Idefics3Tiles, NanoVlmTiles, Split
from edgevlm.processing.tokenizer import Tokenizer
from edgevlm.processing.views import idefics3_sizes, nanovlm_size, picture_views

TEMPLATE = """\
{%- for message in messages -%}
    [{{ message.role }}]
    {%- if message.content is string -%}
        {{ message.content }}
    {%- else -%}
        {%- for part in message.content -%}{{ '<image>' if part.type == 'image' else part.text }}{%- endfor -%}
    {%- endif -%}
    [end]
{%- endfor -%}
{{ '[assistant]' if add_generation_prompt else '' }}"""
PLACES = [f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)]
CONTROLS = ["[user]", "[assistant]", "[end]", "<image>", "<global-img>", "<|global_image|>"]
CONTROLS += ["<fake_token_around_image>", *PLACES]


def colours(width: int, height: int) -> Image.Image:
    """A different colour everywhere."""
    rng = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def tiled(split: Split | None, side: int = 8) -> ImageSpec:
    return ImageSpec(height=side, width=side, fit="stretch", filter="bicubic", split=split)


def byte_tokenizer() -> Tokenizer:
    """Bytes alone and the control tokens, so that ids can be read."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(models.BPE({character: id for id, character in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_tokens(CONTROLS)  # not special: a guard must know them all the same
    return Tokenizer(inner)


def processor(layout: Layout, split: Split | None, *, num_vision_tokens: int = 2) -> Processor:
    tokenizer = byte_tokenizer()
    stops = (tokenizer.token_id("[end]"),)
    return Processor(
        image_spec=tiled(split),
        prompt_spec=PromptSpec(
            image_token="<image>", num_vision_tokens=num_vision_tokens, stop_token_ids=stops, layout=layout
        ),
        tokenizer=tokenizer,
        template=ChatTemplate(TEMPLATE),
    )


def read(processor: Processor, messages: list[Message], **arguments: Any) -> str:
    return processor.tokenizer.decode(processor.input_ids(messages, **arguments), skip_special_tokens=False)


# views


def test_without_a_split_there_is_one_view() -> None:
    image = colours(20, 11)
    views, grid = picture_views(image, tiled(None))
    assert grid == (1, 1)
    assert (views == pixel_values(image, tiled(None))).all()


def test_idefics3_tiles_stand_row_by_row_and_the_whole_picture_last() -> None:
    image = colours(48, 24)  # a picture that needs no resize
    views, grid = picture_views(image, tiled(Idefics3Tiles(longest_edge=48)))
    assert grid == (3, 6)
    assert views.shape == (19, 3, 8, 8)
    levels = np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / np.float32(255)
    for place in range(18):
        top, left = 8 * (place // 6), 8 * (place % 6)
        assert np.allclose(views[place], levels[:, top : top + 8, left : left + 8], atol=1e-6)
    assert np.allclose(views[-1], pixel_values(image, tiled(None))[0])


def test_nanovlm_tiles_have_the_whole_picture_first() -> None:
    image = colours(48, 24)
    views, grid = picture_views(image, tiled(NanoVlmTiles(longest_edge=48)))
    assert grid == (3, 6)
    assert np.allclose(views[1, :, :, :] * 255, np.asarray(image).transpose(2, 0, 1)[:, :8, :8], atol=1e-4)
    assert np.allclose(views[-1] * 255, np.asarray(image).transpose(2, 0, 1)[:, -8:, -8:], atol=1e-4)
    smooth = ImageSpec(height=8, width=8, fit="stretch", filter="bilinear", rounding="float")
    assert np.allclose(views[0], pixel_values(image, smooth)[0], atol=1e-6)


@pytest.mark.parametrize("kind", [Idefics3Tiles, NanoVlmTiles])
def test_splitting_can_be_switched_off(kind: Any) -> None:
    views, grid = picture_views(colours(50, 20), tiled(kind(longest_edge=48, enabled=False)))
    assert (views.shape, grid) == ((1, 3, 8, 8), (1, 1))


def test_nanovlm_enlarges_only_if_asked() -> None:
    assert nanovlm_size((100, 300), (512, 512), NanoVlmTiles()) == (1024, 2048)
    assert nanovlm_size((100, 300), (512, 512), NanoVlmTiles(enlarge=False)) == (512, 512)
    assert nanovlm_size((900, 600), (512, 512), NanoVlmTiles(enlarge=False)) == (1024, 1024)
    assert nanovlm_size((9000, 600), (512, 512), NanoVlmTiles(enlarge=False)) == (2048, 512)
    views, grid = picture_views(colours(7, 5), tiled(NanoVlmTiles(longest_edge=48, enlarge=False)))
    assert (len(views), grid) == (1, (1, 1))


def test_nanovlm_keeps_squares_square() -> None:
    for side in range(1, 3000):
        assert nanovlm_size((side, side), (512, 512), NanoVlmTiles()) == (2048, 2048)


def test_nanovlm_rounds_as_its_reference_does() -> None:
    assert nanovlm_size((480, 640), (512, 512), NanoVlmTiles()) == (1536, 2048)
    assert nanovlm_size((273, 364), (512, 512), NanoVlmTiles()) == (2048, 2048)  # 273 * (2048 / 364) > 1536


def test_idefics3_sizes_of_known_pictures() -> None:
    assert idefics3_sizes((1080, 1920), (512, 512), 2048) == ((1152, 2048), (1536, 2048))
    assert idefics3_sizes((300, 200), (512, 512), 2048) == ((2048, 1366), (2048, 1536))
    assert idefics3_sizes((1, 9000), (512, 512), 2048) == ((1, 2048), (512, 2048))
    assert idefics3_sizes((4000, 4000), (512, 512), 8192) == ((4096, 4096), (4096, 4096))


def test_crops_are_views_by_themselves_and_the_whole_picture_is_last() -> None:
    image = colours(21, 13)  # one column and one row are lost
    spec = ImageSpec(height=6, width=6, fit="center-crop", split=Crops(per_side=2))
    one = ImageSpec(height=6, width=6, fit="center-crop")
    views, grid = picture_views(image, spec)
    boxes = [(0, 0, 10, 6), (10, 0, 20, 6), (0, 6, 10, 12), (10, 6, 20, 12)]
    assert grid == (1, 1)
    assert (views == np.concatenate([pixel_values(part, one) for part in [*map(image.crop, boxes), image]])).all()


def test_a_picture_too_small_to_cut_is_refused() -> None:
    spec = ImageSpec(height=6, width=6, fit="center-crop", split=Crops(per_side=3))
    with pytest.raises(InputError, match="2 x 9 pixels cannot be cut into 3 x 3"):
        picture_views(colours(2, 9), spec)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": {"type": "mosaic"}}, "split"),
        ({"split": {"type": "idefics3", "longest_edge": "48"}}, "longest_edge must be int"),
        ({"split": {"type": "idefics3", "longest_edge": 0}}, "from 1 to 16384; found 0"),
        ({"split": {"type": "idefics3", "longest_edge": 50}}, "multiple of the tile's 8 x 8; found 50"),
        ({"split": {"type": "idefics3", "longest_edge": 16_384}}, "at most 16 times"),
        ({"split": {"type": "idefics3", "longest_edge": 48, "tile": 8}}, "no key named 'tile'"),
        ({"split": {"type": "nanovlm", "longest_edge": 48}, "fit": "pad"}, "stretch where split makes tiles"),
        ({"split": {"type": "nanovlm", "longest_edge": 48}, "antialias": False}, "true where split makes tiles"),
        ({"split": {"type": "nanovlm", "longest_edge": 48}, "rounding": "float"}, "uint8 where split makes tiles"),
        ({"split": {"type": "crops", "per_side": 1}}, "from 2 to 16; found 1"),
        ({"split": {"type": "crops", "per_side": 999}}, "from 2 to 16; found 999"),
        ({"split": 3}, "split"),
    ],
)
def test_hostile_splits_are_refused(changes: dict[str, Any], message: str) -> None:
    values = {"height": 8, "width": 8, "fit": "stretch", **changes}
    with pytest.raises(ConfigError, match=message):
        from_mapping(ImageSpec, values, strict=True, where="image")


def test_odd_tiles_could_make_one_row_too_many_and_are_refused() -> None:
    with pytest.raises(ConfigError, match="even, and a multiple"):
        tiled(Idefics3Tiles(longest_edge=21), side=7)


@pytest.mark.parametrize("split", [None, Idefics3Tiles(longest_edge=48), NanoVlmTiles(longest_edge=16), Crops()])
def test_a_spec_survives_the_manifest(split: Split | None) -> None:
    assert from_mapping(ImageSpec, asdict(tiled(split)), strict=True, where="image") == tiled(split)


@pytest.mark.parametrize(
    ("split", "difference"),
    [
        (NanoVlmTiles(longest_edge=48), "not cut into tiles"),
        (Crops(per_side=3), "The 9 crops before the whole picture are missing."),
    ],
)
def test_the_hubs_format_lists_what_it_cannot_say(split: Split, difference: str) -> None:
    assert difference in " ".join(preprocessor_config(tiled(split))["edgevlm_differences"])


# pictures and videos


def test_pictures_with_equal_pixels_and_grids_have_one_key() -> None:
    pixels = np.zeros((4, 3, 2, 2), np.float32)
    assert Picture.of(pixels, (2, 2)).key == Picture.of(pixels.copy(), (2, 2)).key
    others = [
        Picture.of(pixels, (4, 1)),
        Picture.of(pixels + 1, (2, 2)),
        Picture.of(pixels.reshape(2, 3, 4, 2), (2, 2)),
    ]
    assert len({one.key for one in [Picture.of(pixels, (2, 2)), *others]}) == 4


def test_a_prepared_picture_has_as_many_views_as_its_prompt_has_places() -> None:
    ours = processor("nanovlm", NanoVlmTiles(longest_edge=24))
    picture = ours.prepare(colours(48, 20))
    assert picture.grid == (2, 3)
    assert ours.num_vision_tokens(picture.grid) == 2 * len(picture.pixel_values) == 14
    assert (ours.pixels(colours(48, 20)) == picture.pixel_values).all()


def test_frames_are_the_middles_of_seconds() -> None:
    assert sample_frames(90, 30) == (15, 44, 74)
    assert sample_frames(10, 30) == (4,)
    assert sample_frames(1, 24) == (0,)
    assert sample_frames(5, 1) == (0, 1, 2, 2, 3)
    assert sample_frames(4, 0.1) == (0, 1, 2, 2)
    for frames, fps in [(0, 30), (5, 0), (5, -1), (5, float("inf")), (5, float("nan"))]:
        with pytest.raises(InputError, match="a video has frames"):
            sample_frames(frames, fps)


def test_a_video_is_its_frames_squashed_to_the_encoders_size() -> None:
    ours = processor("plain", None)
    frames = [colours(16, 32), colours(24, 8)]
    video = ours.prepare_video(frames)
    assert (video.grid, video.pixel_values.shape) == ((2, 1), (2, 3, 8, 8))
    corners = np.asarray(frames[0])[::4, ::2].transpose(2, 0, 1)
    assert np.allclose(video.pixel_values[0] * 255, corners, atol=1e-4)
    assert ours.num_vision_tokens(video.grid) == 4
    with pytest.raises(InputError, match="at least one frame"):
        ours.prepare_video([])


def test_crops_of_a_video_are_cut_from_the_squashed_frame() -> None:
    ours = processor("plain", Crops(per_side=2))
    video = ours.prepare_video([colours(16, 32)] * 3)
    assert (video.grid, video.pixel_values.shape) == ((3, 1), (15, 3, 8, 8))
    whole = Image.fromarray((video.pixel_values[4] * 255).round().astype(np.uint8).transpose(1, 2, 0))
    assert np.allclose(video.pixel_values[0], pixel_values(whole.crop((0, 0, 4, 4)), tiled(None))[0])


def test_a_model_with_tiles_reads_no_video() -> None:
    with pytest.raises(UnsupportedError, match="reads no video"):
        processor("idefics3", Idefics3Tiles(longest_edge=24)).prepare_video([colours(9, 9)])


# prompts


def test_a_plain_prompt_has_placeholders_for_every_cell() -> None:
    messages = [user_message("Hm?", num_images=2)]
    expected = "[user]<image><image><image><image><image><image><image><image>Hm?[end][assistant]"
    assert read(processor("plain", None), messages, grids=[(3, 1), (1, 1)]) == expected


def test_an_idefics3_prompt_names_its_tiles() -> None:
    ours = processor("idefics3", Idefics3Tiles(longest_edge=24))
    fake = "<fake_token_around_image>"
    whole = f"{fake}<global-img><image><image>{fake}"
    rows = ["".join(f"{fake}<row_{row}_col_{column}><image><image>" for column in (1, 2, 3)) + "\n" for row in (1, 2)]
    messages = [user_message("Hm?", num_images=2)]
    found = read(ours, messages, grids=[(2, 3), (1, 1)])
    assert found == f"[user]{rows[0]}{rows[1]}\n{whole}{whole}Hm?[end][assistant]"


def test_a_nanovlm_prompt_numbers_several_pictures() -> None:
    ours = processor("nanovlm", NanoVlmTiles(longest_edge=24))
    whole = "<|global_image|><image><image>"
    tiles = "<row_1_col_1><image><image><row_2_col_1><image><image>"
    one, two = [user_message("Hm?", num_images=1)], [user_message("Hm?", num_images=2)]
    assert read(ours, one, grids=[(2, 1)]) == f"[user]{whole}{tiles}Hm?[end][assistant]"
    assert read(ours, one) == f"[user]{whole}Hm?[end][assistant]"
    expected = f"[user]<image: 0>{whole}{tiles}<image: 1>{whole}Hm?[end][assistant]"
    assert read(ours, two, grids=[(2, 1), (1, 1)]) == expected


@pytest.mark.parametrize("token", CONTROLS[3:])
def test_users_cannot_write_the_tokens_of_tiles(token: str) -> None:
    layout: Layout = "nanovlm" if token == "<|global_image|>" else "idefics3"
    split = NanoVlmTiles(longest_edge=24) if layout == "nanovlm" else Idefics3Tiles(longest_edge=24)
    ours = processor(layout, split)
    clean, foul = (ours.input_ids([user_message(text, num_images=1)], grids=[(3, 3)]) for text in ("", token))
    control = ours.tokenizer.token_id(token)
    assert (foul == control).sum() == (clean == control).sum() > 0
    assert ours.tokenizer.decode(foul, skip_special_tokens=False).endswith(f"{token}[end][assistant]")


def test_grids_must_fit_the_pictures_and_the_vocabulary() -> None:
    ours = processor("idefics3", Idefics3Tiles(longest_edge=24))
    messages = [user_message("Hm?", num_images=1)]
    for grids in ([], [(1, 1), (1, 1)], [(0, 1)]):
        with pytest.raises(InputError, match="speak of 1 pictures"):
            ours.input_ids(messages, grids=grids)
    with pytest.raises(InputError, match="at most 3 x 3 tiles"):
        ours.input_ids(messages, grids=[(4, 1)])
    with pytest.raises(ConfigError, match="no token '<row_"):
        processor("idefics3", Idefics3Tiles(longest_edge=32))


@pytest.mark.parametrize(
    ("layout", "split"), [("idefics3", Idefics3Tiles(longest_edge=24)), ("nanovlm", NanoVlmTiles(longest_edge=24))]
)
def test_a_split_that_is_switched_off_makes_one_view(layout: Layout, split: Split) -> None:
    assert isinstance(split, (Idefics3Tiles, NanoVlmTiles))
    picture = processor(layout, replace(split, enabled=False)).prepare(colours(48, 20))
    assert (len(picture.pixel_values), picture.grid) == (1, (1, 1))
    assert len(processor(layout, split).prepare(colours(48, 20)).pixel_values) == 7


def test_tiles_and_layout_must_belong_together() -> None:
    with pytest.raises(ConfigError, match="split idefics3 needs the prompt layout idefics3; found plain"):
        processor("plain", Idefics3Tiles(longest_edge=24))
    with pytest.raises(ConfigError, match="layout must be one of plain, idefics3, nanovlm; found 'mosaic'"):
        processor("mosaic", None)  # type: ignore[arg-type]


def test_more_vision_tokens_than_any_decoder_reads_are_refused() -> None:
    with pytest.raises(ConfigError, match="at most 65,536 for one view"):
        PromptSpec(image_token="<image>", num_vision_tokens=10**12, stop_token_ids=())


def test_earlier_answers_are_found() -> None:
    ours = processor("plain", None)
    messages = [
        user_message("a?", num_images=1),
        {"role": "assistant", "content": "bc"},
        user_message("d[end]"),
        {"role": "assistant", "content": "[end]"},
        user_message("e"),
    ]
    ids = ours.input_ids(messages, grids=[(2, 1)])
    positions = ours.answer_positions(messages, grids=[(2, 1)])
    assert ours.tokenizer.decode(ids[positions], skip_special_tokens=False) == "bc[end][end][end]"
    assert len(positions) == len("bc") + 1 + len("[end]") + 1  # what the user wrote as text are five bytes
    assert ours.answer_positions(messages[:1]).tolist() == []


def test_answers_end_before_a_header_that_a_template_always_appends() -> None:
    ours = processor("plain", None)
    always = ChatTemplate(TEMPLATE.replace("if add_generation_prompt else ''", ""))
    ours = Processor(
        image_spec=ours.image_spec, prompt_spec=ours.prompt_spec, tokenizer=ours.tokenizer, template=always
    )
    messages = [user_message("a"), {"role": "assistant", "content": "bc"}, user_message("d")]
    found = ours.input_ids(messages)[ours.answer_positions(messages)]
    assert ours.tokenizer.decode(found, skip_special_tokens=False) == "bc[end]"
