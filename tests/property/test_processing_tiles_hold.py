"""What holds for the tiles of every picture."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import cache

import numpy as np
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import decoders, models, pre_tokenizers

from edgevlm.core.errors import InputError
from edgevlm.processing.chat import ChatTemplate, user_message
from edgevlm.processing.frames import sample_frames
from edgevlm.processing.image_spec import ImageSpec
from edgevlm.processing.picture import Grid
from edgevlm.processing.processor import Processor, PromptSpec
from edgevlm.processing.split import Crops, Idefics3Tiles, NanoVlmTiles, Split
from edgevlm.processing.tokenizer import Tokenizer
from edgevlm.processing.views import idefics3_sizes, nanovlm_size

SIDES = st.integers(1, 32_768)
TILES = [(512, 2048), (364, 1456), (384, 1536), (512, 8192), (64, 64)]  # a tile's side and the longest edge
FEW = 3
TOKENS = ["<image>", "<global-img>", "<|global_image|>", "<fake_token_around_image>"]
TOKENS += [f"<row_{row}_col_{column}>" for row in range(1, FEW + 1) for column in range(1, FEW + 1)]


@settings(max_examples=300, deadline=None)
@given(SIDES, SIDES, st.sampled_from(TILES))
@example(1, 32_768, (512, 2048))
@example(32_768, 32_767, (512, 8192))
def test_idefics3_sizes_are_whole_tiles_that_a_vocabulary_can_name(height: int, width: int, sides: Grid) -> None:
    tile, longest = sides
    first, second = idefics3_sizes((height, width), (tile, tile), longest)
    assert max(first) == min(longest, 4096)
    assert min(first) >= 1
    assert all(side % tile == 0 and tile <= side <= longest for side in second)
    assert all(grown - tile < shrunk <= grown + tile for shrunk, grown in zip(first, second, strict=True))
    if min(first) > 1:  # a side less than two pixels off: cut to a whole number, then to an even one
        assert abs(first[0] * width - first[1] * height) <= 2 * max(height, width)


@settings(max_examples=300, deadline=None)
@given(SIDES, SIDES, st.sampled_from(TILES), st.booleans())
@example(273, 364, (512, 2048), True)
def test_nanovlm_sizes_are_those_of_exact_fractions_or_a_tile_more(
    height: int, width: int, sides: Grid, enlarge: bool
) -> None:
    tile, longest = sides
    found = nanovlm_size((height, width), (tile, tile), NanoVlmTiles(longest_edge=longest, enlarge=enlarge))
    long, short = max(height, width), min(height, width)
    edge = longest if enlarge else min(longest, math.ceil(Fraction(long, tile)) * tile)
    exact = Fraction(short * edge, long * tile)
    other = min(math.ceil(short * (edge / long) / tile) * tile, edge)
    assert found == ((other, edge) if width >= height else (edge, other))
    assert other == math.ceil(exact) * tile or (exact.denominator == 1 and other == (exact + 1) * tile)
    assert all(side % tile == 0 and tile <= side <= longest for side in found)


@cache
def processor(layout: str, num_vision_tokens: int) -> Processor:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(models.BPE({character: id for id, character in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(TOKENS)
    splits: dict[str, Split] = {
        "idefics3": Idefics3Tiles(longest_edge=4 * FEW),
        "nanovlm": NanoVlmTiles(longest_edge=4 * FEW),
        "plain": Crops(per_side=2),
    }
    return Processor(
        image_spec=ImageSpec(height=4, width=4, fit="stretch", split=splits[layout]),
        prompt_spec=PromptSpec(
            image_token="<image>",
            num_vision_tokens=num_vision_tokens,
            stop_token_ids=(),
            layout=layout,  # type: ignore[arg-type]
        ),
        tokenizer=Tokenizer(inner),
        template=ChatTemplate(
            "{% for part in messages[0].content %}{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}"
        ),
    )


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["idefics3", "nanovlm"]),
    st.integers(1, 5),
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=3),
    st.lists(st.sampled_from([*TOKENS, "a", "\n", "<row_", "1_col_1>", "<", "image>", " "]), max_size=6).map("".join),
)
def test_prompts_have_one_place_for_every_vision_token(
    layout: str, num_vision_tokens: int, sizes: list[tuple[int, int]], text: str
) -> None:
    ours = processor(layout, num_vision_tokens)
    pictures = [ours.prepare(Image.new("RGB", size)) for size in sizes]
    ids = ours.input_ids([user_message(text, num_images=len(sizes))], grids=[one.grid for one in pictures])
    views = sum(len(one.pixel_values) for one in pictures)
    assert len(ours.image_positions(ids)) == num_vision_tokens * views
    assert sum(ours.num_vision_tokens(one.grid) for one in pictures) == num_vision_tokens * views
    assert ours.tokenizer.decode(ids, skip_special_tokens=False).endswith(text)
    plain = ours.input_ids([user_message("", num_images=len(sizes))], grids=[one.grid for one in pictures])
    controls = [ours.tokenizer.token_id(token) for token in TOKENS]
    assert np.isin(ids, controls).sum() == np.isin(plain, controls).sum()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 4))
def test_a_video_of_crops_has_a_place_for_every_frame(width: int, height: int, num_frames: int) -> None:
    ours = processor("plain", 3)
    video = ours.prepare_video([Image.new("RGB", (width, height))] * num_frames)
    assert (len(video.pixel_values), ours.num_vision_tokens(video.grid)) == (5 * num_frames, 3 * num_frames)
    if min(width, height) < 2:
        try:
            ours.prepare(Image.new("RGB", (width, height)))
        except InputError:
            return
        raise AssertionError("a picture one pixel wide was cut in two")


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 100_000), st.floats(0.01, 1000))
def test_sampled_frames_are_frames_in_order(num_frames: int, fps: float) -> None:
    indices = sample_frames(num_frames, fps)
    assert len(indices) == max(1, min(num_frames, int(num_frames // fps)))
    assert all(0 <= index < num_frames for index in indices)
    assert list(indices) == sorted(indices)
