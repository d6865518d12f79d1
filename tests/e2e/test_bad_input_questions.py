"""Pictures and prompts that cannot be used, and odd ones that can."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from edgevlm.cli.app import app

Refused = Callable[..., str]


def noise(mode: str = "RGB") -> Image.Image:
    return Image.effect_noise((64, 48), 50).convert(mode)


def answer(bundle: Path, picture: Path) -> str:
    """What the bundle says about the picture; an exit code other than 0 fails."""
    options = ["--prompt", "What is it?", "--max-tokens", "4", "-q"]
    result = CliRunner().invoke(app, ["run", str(bundle), "--image", str(picture), *options])
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


def truncated_jpeg(path: Path) -> None:
    noise().save(path, "JPEG")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def blank_png(path: Path, side: int) -> None:
    """A valid square PNG of one bit a pixel, without holding the pixels."""
    packer, row = zlib.compressobj(1), bytes(1 + (side + 7) // 8)
    data = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", data), (b"IEND", b"")]
    packed = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))


@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        ("none.jpg", lambda path: None, ("none.jpg: no such file", "give the path")),
        ("text.jpg", lambda path: path.write_text("hello"), ("text.jpg: not a picture", "expected AVIF, BMP")),
        ("folder.png", Path.mkdir, "folder.png: a folder; give one picture"),
        ("empty.png", Path.touch, "empty.png: empty, 0 bytes; expected a picture"),
        ("cut.jpg", truncated_jpeg, ("cut.jpg: damaged or cut off", "copy or save it again")),
        ("huge.png", lambda path: blank_png(path, 20_000), ("400,000,000 pixels, allowed are 128,000,000", "smaller")),
        ("long.png", lambda path: Image.new("L", (40_000, 1)).save(path), "40,000 x 1 pixels, allowed"),
        ("float.tiff", lambda path: noise("F").save(path), "float.tiff: floating-point pixels"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value[:12] else "",
)
def test_a_picture_that_cannot_be_used_is_told_and_why(
    tmp_path: Path, tiny_bundle: Path, refused: Refused, name: str, make: Callable[[Path], object], words: str
) -> None:
    make(tmp_path / name)
    refused(2, words, "run", tiny_bundle, "--image", tmp_path / name, "--prompt", "What is it?")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_refused_before_anybody_waits_for_it(tmp_path: Path, tiny_bundle: Path, refused: Refused) -> None:
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    refused(2, "not a regular file; give a picture", "run", tiny_bundle, "--image", pipe, "--prompt", "x")


def test_odd_pictures_are_answered(tmp_path: Path, tiny_bundle: Path) -> None:
    pictures = {
        "one pixel.png": Image.new("RGB", (1, 1), "red"),
        "cmyk.jpg": noise("CMYK"),
        "grey.png": noise("L"),
        "16 bit.png": Image.fromarray((np.arange(64 * 48, dtype=np.uint16) * 20).reshape(48, 64)),
        "palette.png": noise("P"),
        "alpha.png": noise("RGBA"),
        "grey alpha.png": noise("LA"),
        "wide.png": noise().resize((2000, 2)),
    }
    for name, picture in pictures.items():
        picture.save(tmp_path / name)
        assert answer(tiny_bundle, tmp_path / name) != "\n", name


def test_of_an_animation_the_first_frame_is_seen(tmp_path: Path, tiny_bundle: Path) -> None:
    frames = [Image.new("RGB", (32, 32), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "animated.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "still.gif")
    assert answer(tiny_bundle, tmp_path / "animated.gif") == answer(tiny_bundle, tmp_path / "still.gif")


@pytest.mark.parametrize("name", ["two\nlines.png", "\x1b[31mred.png", "blank .png", "ünï 🍎.png", "--help"])
def test_a_picture_may_have_any_name(tmp_path: Path, tiny_bundle: Path, refused: Refused, name: str) -> None:
    line = refused(2, "no such file", "run", tiny_bundle, "--image", tmp_path / name, "--prompt", "x")
    assert line[:-1].isprintable()
    noise().save(tmp_path / name, "PNG")
    assert answer(tiny_bundle, tmp_path / name)


@pytest.mark.parametrize(
    ("prompt", "code", "words"),
    [
        ("", 2, "the prompt is empty: ask something"),
        (" \n\t", 2, "the prompt is empty: ask something"),
        ("word " * 300, 5, ("(4 of them vision tokens)", "holds 128: shorten the prompt")),
        ("half \udc80", 2, "half a character at position"),
    ],
    ids=["empty", "blank", "too long", "not Unicode"],
)
def test_a_prompt_that_cannot_be_used_is_told_and_why(
    tmp_path: Path, tiny_bundle: Path, refused: Refused, prompt: str, code: int, words: str
) -> None:
    noise().save(tmp_path / "picture.png")
    refused(code, words, "run", tiny_bundle, "--image", tmp_path / "picture.png", "--prompt", prompt)


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--max-tokens", "0", "max_tokens must be 1 or more, got 0"),
        ("--temperature", "nan", "temperature must be 0 (greedy) or more, got nan"),
        ("--top-p", "2", "top_p must be above 0 and at most 1"),
        ("--top-k", "-1", "top_k must be 0 (off) or more"),
        ("--threads", "0", "threads must be 1 to 256, got 0"),
        ("--threads", "99999", "threads must be 1 to 256, got 99999"),
        ("--stop", "", "a stop string is empty"),
        ("--max-tokens", "many", "Invalid value for '--max-tokens'"),
    ],
)
def test_an_option_out_of_range_is_told(
    tiny_bundle: Path, refused: Refused, option: str, value: str, words: str
) -> None:
    refused(2, words, "run", tiny_bundle, "--prompt", "x", option, value)


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may read everything")
def test_a_picture_that_may_not_be_read_is_told(tmp_path: Path, tiny_bundle: Path, refused: Refused) -> None:
    noise().save(tmp_path / "private.png")
    (tmp_path / "private.png").chmod(0)
    options = ["--image", str(tmp_path / "private.png"), "--prompt", "x"]
    result = CliRunner().invoke(app, ["run", str(tiny_bundle), *options])
    assert result.exit_code == 2
    assert "cannot be read (Permission denied)" in result.stderr
