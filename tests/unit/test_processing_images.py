"""Pictures of every kind come out upright, RGB and within limits, or as one clear line."""

from __future__ import annotations

import struct
import warnings
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgevlm.core.errors import ConfigError, DoesNotFitError, InputError
from edgevlm.processing import images
from edgevlm.processing.images import FORMATS, ImageLimits, load_image

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def gradient(width: int = 32, height: int = 24) -> Image.Image:
    x, y = np.meshgrid(np.arange(width) * 255 // width, np.arange(height) * 255 // height)
    return Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8))


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_path_text_bytes_pillow_and_array_give_the_same_picture(tmp_path: Path) -> None:
    file = tmp_path / "picture.png"
    gradient().save(file)
    expected = np.asarray(gradient())
    for source in (file, str(file), file.read_bytes(), gradient(), expected):
        assert np.array_equal(np.asarray(load_image(source)), expected)


@pytest.mark.parametrize("format", sorted(set(FORMATS) & set(images._formats())))
def test_every_allowed_format_opens(format: str) -> None:
    if format not in Image.SAVE:
        pytest.skip(f"this Pillow does not write {format}")
    image = load_image(encoded(gradient(), format))
    assert (image.mode, image.size) == ("RGB", (32, 24))


def test_one_pixel_is_a_picture() -> None:
    assert load_image(encoded(Image.new("RGB", (1, 1), RED), "PNG")).getpixel((0, 0)) == RED


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_honoured(format: str, orientation: int) -> None:
    upright = Image.new("RGB", (64, 32), RED)
    upright.paste(GREEN, (0, 0, 16, 16))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the Image.Transpose that stores it this way
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[images.EXIF_ORIENTATION] = orientation
    options = {"quality": 95, "subsampling": 0} if format == "JPEG" else {}
    loaded = load_image(encoded(stored, format, exif=exif, **options))
    assert loaded.size == (64, 32)
    difference = np.abs(np.asarray(loaded, dtype=int) - np.asarray(upright, dtype=int))
    assert difference.mean() < 3


def test_loading_what_was_loaded_does_not_turn_it_again() -> None:
    exif = Image.Exif()
    exif[images.EXIF_ORIENTATION] = 6
    once = load_image(encoded(gradient(), "JPEG", exif=exif))
    assert np.array_equal(np.asarray(load_image(once)), np.asarray(once))


def test_damaged_exif_is_ignored() -> None:
    assert load_image(encoded(gradient(), "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff")).size == (32, 24)


def test_sixteen_bit_grey_keeps_its_range() -> None:
    levels = np.array([[0, 257, 32_896, 65_535]], dtype=np.uint16)
    image = load_image(encoded(Image.fromarray(levels), "PNG"))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_one_bit_is_black_and_white() -> None:
    image = load_image(encoded(gradient().convert("1"), "PNG"))
    assert set(np.asarray(image).ravel().tolist()) == {0, 255}


def test_cmyk_jpeg_keeps_its_colours() -> None:
    image = load_image(encoded(Image.new("RGB", (8, 8), GREEN).convert("CMYK"), "JPEG"))
    red, green, blue = np.asarray(image)[4, 4].tolist()
    assert green > 240
    assert max(red, blue) < 15


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_alpha_shows_the_background(mode: str) -> None:
    image = Image.new(mode, (2, 1))
    assert load_image(image).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(image, background=BLUE).getpixel((1, 0)) == BLUE


def test_half_alpha_is_half_background() -> None:
    image = encoded(Image.new("RGBA", (1, 1), (255, 0, 0, 128)), "PNG")
    assert load_image(image, background=(0, 0, 255)).getpixel((0, 0)) == (128, 0, 127)


def test_palette_with_transparency_shows_the_background() -> None:
    image = Image.new("P", (2, 1), 0)
    image.putpalette([*RED, *GREEN])
    image.putpixel((1, 0), 1)
    loaded = load_image(encoded(image, "PNG", transparency=0))
    assert [loaded.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), GREEN]


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_an_animation(format: str) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in (RED, GREEN, BLUE)]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert load_image(data).getpixel((4, 4)) == RED


def test_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file") as error:
        load_image(tmp_path / "nowhere.jpg")
    assert "nowhere.jpg" in one_line(error)


def test_folder_empty_file_and_device_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    for source, word in ((tmp_path, "folder"), (tmp_path / "empty.png", "empty"), ("/dev/null", "regular")):
        with pytest.raises(InputError, match=word):
            load_image(source)


@pytest.mark.parametrize("name", ["a\0b.png", "x" * 5000])
def test_impossible_names_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"cannot be read|no such file") as error:
        load_image(name)
    one_line(error)


@pytest.mark.parametrize(
    "data",
    [b"hello, this is text\n" * 9, b"%PDF-1.7\n" + b"x" * 99, b"\x00", b"<svg xmlns='x'/>", b"\xff" * 512],
    ids=["text", "pdf", "byte", "svg", "noise"],
)
def test_what_is_no_picture_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "file.jpg").write_bytes(data)
    with pytest.raises(InputError, match=r"file\.jpg: not a picture") as error:
        load_image(tmp_path / "file.jpg")
    one_line(error)


@pytest.mark.parametrize("format", ["EPS", "ICO", "TGA", "PCX"])
def test_formats_off_the_list_are_refused(format: str) -> None:
    with pytest.raises(InputError, match="not a picture"):
        load_image(encoded(gradient(), format))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_truncated_file_is_one_clear_line(format: str) -> None:
    data = encoded(gradient(256, 256), format)
    with pytest.raises(InputError, match=r"damaged or cut off|not a picture") as error:
        load_image(data[: len(data) // 2])
    one_line(error)


def test_huge_pictures_are_refused_by_their_header() -> None:
    with pytest.raises(InputError, match=r"400,000,000 pixels, allowed are 128,000,000"):
        load_image(png_header(20_000, 20_000))
    with pytest.raises(InputError, match=r"11,400 x 11,400 pixels, allowed are 128,000,000"):
        load_image(png_header(11_400, 11_400))  # Pillow itself would only warn
    with pytest.raises(InputError, match=r"1 x 40,000 pixels"):
        load_image(png_header(1, 40_000))


def test_limits_can_be_set() -> None:
    data = encoded(gradient(), "PNG")
    with pytest.raises(InputError, match="32 x 24 pixels, allowed are 100 in all"):
        load_image(data, ImageLimits(max_pixels=100))
    with pytest.raises(InputError, match="bytes, allowed are 10"):
        load_image(data, ImageLimits(max_bytes=10))
    with pytest.raises(InputError, match="the array: 32 x 24"):
        load_image(np.asarray(gradient()), ImageLimits(max_side=31))
    with pytest.raises(ConfigError, match="1 or more"):
        ImageLimits(max_bytes=0)


def test_too_many_bytes_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "big.png").write_bytes(b"x" * 100)
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail("was read"))
    with pytest.raises(InputError, match="100 bytes, allowed are 99"):
        load_image(tmp_path / "big.png", ImageLimits(max_bytes=99))


@pytest.mark.parametrize("error", [SyntaxError("x"), ValueError("x"), struct.error("x"), EOFError(), KeyError(1)])
def test_whatever_pillow_raises_becomes_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Image.Image) -> None:
        raise error

    monkeypatch.setattr(Image.Image, "load", fail)
    with pytest.raises(InputError, match="the picture: damaged or cut off") as found:
        load_image(Image.new("RGB", (2, 2)))
    one_line(found)


def test_short_memory_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Image.Image) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "load", fail)
    with pytest.raises(DoesNotFitError, match="not enough memory"):
        load_image(Image.new("RGB", (2, 2)))


def test_pillows_warnings_do_not_reach_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # 768 pixels: a warning, not an error
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(encoded(gradient(), "PNG")).size == (32, 24)


@pytest.mark.parametrize(
    "levels",
    [
        np.zeros((4, 4, 3), dtype=np.float32),
        np.zeros((4, 4, 2), dtype=np.uint8),
        np.zeros((3, 4, 5), dtype=np.uint8),
        np.zeros(4, dtype=np.uint8),
        np.zeros((0, 4, 3), dtype=np.uint8),
    ],
)
def test_arrays_of_another_kind_are_refused(levels: Any) -> None:
    with pytest.raises(InputError, match="a picture in an array is uint8"):
        load_image(levels)


def test_grey_arrays_are_pictures() -> None:
    levels = np.arange(6, dtype=np.uint8).reshape(2, 3)
    assert np.array_equal(np.asarray(load_image(levels))[..., 2], levels)


def test_arrays_with_alpha_show_the_background() -> None:
    levels = np.array([[[*RED, 255], [*RED, 0]]], dtype=np.uint8)
    loaded = load_image(levels, background=BLUE)
    assert [loaded.getpixel((x, 0)) for x in (0, 1)] == [RED, BLUE]
    assert np.array_equal(np.asarray(load_image(levels)), np.asarray(load_image(Image.fromarray(levels))))


@pytest.mark.parametrize("level", [200, 70_000])
def test_pixels_without_a_white_are_refused(level: int) -> None:
    whole = Image.new("I", (2, 2), level)
    for source in (Image.new("F", (2, 2)), whole, encoded(whole, "TIFF")):
        with pytest.raises(InputError, match="do not say what white is"):
            load_image(source)


@pytest.mark.parametrize("format", ["PNG", "PPM", "TIFF"])
def test_sixteen_bit_grey_is_read_from_every_format_that_has_it(format: str) -> None:
    levels = np.array([[0, 32_896, 65_535]], dtype=np.uint16)
    assert np.asarray(load_image(encoded(Image.fromarray(levels), format)))[0, :, 1].tolist() == [0, 128, 255]


def test_other_objects_are_refused() -> None:
    with pytest.raises(InputError, match="found int"):
        load_image(5)  # type: ignore[arg-type]
