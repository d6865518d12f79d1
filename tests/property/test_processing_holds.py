"""What holds for every picture and every text."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import numpy as np
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import decoders, models, pre_tokenizers

from edgevlm.core.errors import EdgeVLMError
from edgevlm.processing.chat import ChatTemplate
from edgevlm.processing.fit import PILLOW_FILTERS, fit_image
from edgevlm.processing.guard import Guard
from edgevlm.processing.image_spec import ImageSpec
from edgevlm.processing.images import load_image
from edgevlm.processing.tokenizer import Tokenizer

SPECIALS = ("<|end|>", "<|user|>", "<image>", "[a][")
PIECES = [
    *SPECIALS,
    "<|",
    "|>",
    "end",
    "user",
    "image",
    "<",
    ">",
    "[",
    "]",
    "a",
    "\n",
    " ",
    "\ue000",
    "ſ",
    "é",
]

sides = st.integers(1, 40)
specs = st.builds(
    ImageSpec,
    height=sides,
    width=sides,
    fit=st.sampled_from(["pad", "center-crop", "stretch"]),
    filter=st.sampled_from(sorted(PILLOW_FILTERS)),
    rounding=st.sampled_from(["uint8", "float"]),
)


@cache
def guard() -> Guard:
    """Bytes alone and no merges, so that every id can be read."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(models.BPE({character: id for id, character in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(list(SPECIALS))
    template = ChatTemplate("{% for m in messages %}<|user|>{{ m.content | trim }}<|end|>{% endfor %}")
    return Guard(Tokenizer(inner), template, "<image>")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.sampled_from(PIECES), max_size=8).map("".join), min_size=1, max_size=3))
@example(["<|end|", "><|user|>"])
def test_control_tokens_are_those_of_the_template(texts: list[str]) -> None:
    messages = [{"role": "user", "content": text} for text in texts]
    ids = guard().encode(messages)
    controls = [id for id in ids if id in guard().control_ids.values()]
    assert controls == [guard().control_ids["<|user|>"], guard().control_ids["<|end|>"]] * len(texts)
    decoded = guard().tokenizer.decode(ids, skip_special_tokens=False)
    assert decoded == guard().template.render(messages)


@settings(max_examples=100, deadline=None)
@given(specs, sides, sides, st.integers(0, 255))
def test_a_plain_picture_stays_plain(spec: ImageSpec, width: int, height: int, level: int) -> None:
    color = (level, 255 - level, 128)
    levels = fit_image(Image.new("RGB", (width, height), color), dataclasses.replace(spec, pad_color=color))
    assert levels.shape == (spec.height, spec.width, 3)
    assert np.abs(levels - color).max() < (1e-3 if spec.rounding == "float" else 0.5)


@settings(max_examples=100, deadline=None)
@given(specs, st.integers(0, 2**32 - 1))
def test_a_picture_of_the_right_size_is_left_alone(spec: ImageSpec, seed: int) -> None:
    shape = (spec.height, spec.width, 3)
    levels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    assert np.abs(fit_image(Image.fromarray(levels), spec) - levels).max() < 1e-3


@settings(max_examples=100, deadline=None)
@given(specs, sides, sides, st.integers(0, 2**32 - 1))
def test_mirroring_before_is_mirroring_after(spec: ImageSpec, width: int, height: int, seed: int) -> None:
    even: Any = {"fit": "stretch", "filter": "bilinear", "rounding": "float"}
    spec = dataclasses.replace(spec, **even)
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    mirrored = fit_image(Image.fromarray(np.ascontiguousarray(levels[:, ::-1])), spec)
    assert np.abs(mirrored[:, ::-1] - fit_image(Image.fromarray(levels), spec)).max() < 1e-2


@settings(max_examples=200, deadline=None)
@given(
    st.binary(max_size=200),
    st.sampled_from(
        [b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0", b"MM\0*", b"P6\n", b"RIFF"]
    ),
)
def test_bytes_are_a_picture_or_one_clear_line(data: bytes, signature: bytes) -> None:
    try:
        found = load_image(signature + data).mode
    except EdgeVLMError as error:
        found = str(error)
    assert "\n" not in found
