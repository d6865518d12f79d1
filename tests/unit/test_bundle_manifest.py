from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from edgevlm.bundle.manifest import SCHEMA_VERSION, ImageSize, Manifest, parse_manifest
from edgevlm.core.config import to_json
from edgevlm.core.errors import ConfigError, IntegrityError, UnsupportedError

Change = Callable[[dict[str, Any]], Any]


def plain(manifest: Manifest) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(to_json(manifest))
    return values


def test_a_manifest_survives_writing_and_reading(tiny_manifest: Manifest) -> None:
    assert parse_manifest(plain(tiny_manifest), where="edgevlm.json") == tiny_manifest


def test_a_newer_schema_asks_for_an_upgrade(tiny_manifest: Manifest) -> None:
    values = {**plain(tiny_manifest), "schema": SCHEMA_VERSION + 1, "invented_later": True}
    with pytest.raises(IntegrityError, match=r"newer EdgeVLM \(schema 2, this one reads 1\): upgrade"):
        parse_manifest(values, where="edgevlm.json")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.pop("schema"), "not the manifest of a bundle"),
        (lambda m: m.update(schema="1"), "not the manifest of a bundle"),
        (lambda m: m.update(schema=True), "not the manifest of a bundle"),
        (lambda m: m.update(schema=0), "not the manifest of a bundle"),
        (lambda m: m.pop("decoder"), "missing decoder"),
        (lambda m: m.update(extra=1), "no key named 'extra'"),
        (lambda m: m.update(max_context="32"), "max_context must be int"),
        (lambda m: m.update(max_context=0), "must be positive"),
        (lambda m: m.update(name=""), "needs a name"),
        (lambda m: m["decoder"].update(num_layers=-1), "num_layers must be positive"),
        (lambda m: m["parts"].pop(), "no file for part decoder_model_merged"),
        (lambda m: m["parts"].append(m["parts"][0]), "listed twice"),
        (lambda m: m["parts"][0].update(part="vision_tower"), "no part named 'vision_tower'.*vision_encoder"),
        (lambda m: m["parts"][0].update(file="../a.onnx"), "may leave the bundle's folder"),
        (lambda m: m["parts"][0].update(extra_files=["/etc/passwd"]), "may leave the bundle's folder"),
        (lambda m: m["parts"][0]["inputs"][0].update(shape=[1.5]), "int or str; found 1.5"),
        (lambda m: m["parts"][0]["inputs"][0].update(shape=[-1]), "positive number or a name"),
        (lambda m: m.update(image=[1]), "image must be a table"),
        (lambda m: m.update(file_bytes={"a": "b"}), "file_bytes: a must be int"),
        (lambda m: m.update(image_sizes=[{"image_size": 8}]), "num_vision_tokens"),
        (lambda m: m.update(image_sizes=[{"image_size": 8, "num_vision_tokens": 0}]), "pixels and vision tokens"),
        (lambda m: m.update(image_sizes=[{"image_size": 8, "num_vision_tokens": 4}] * 2), "names a size twice"),
        (lambda m: m.update(image_sizes=[{"image_size": 16, "num_vision_tokens": 16}]), "image_sizes begins with"),
        (lambda m: m.update(image_sizes=[{"image_size": 8, "num_vision_tokens": 5}]), "image_sizes begins with"),
    ],
)
def test_a_wrong_manifest_is_refused_in_one_sentence(tiny_manifest: Manifest, change: Change, words: str) -> None:
    values = plain(tiny_manifest)
    change(values)
    with pytest.raises(IntegrityError, match=words):
        parse_manifest(values, where="edgevlm.json")


def test_a_part_is_found_by_name_target_and_precision(tiny_manifest: Manifest) -> None:
    half = replace(tiny_manifest.parts[0], precision="fp16", file="onnx/vision_encoder_fp16.onnx")
    manifest = replace(tiny_manifest, parts=(*tiny_manifest.parts, half))
    assert manifest.part("vision_encoder").precision == "fp32"
    assert manifest.part("vision_encoder", precision="fp16") == half
    assert manifest.targets() == ("onnx",)
    assert manifest.files()[-1] == half.file


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("vision_tower",), "no part named 'vision_tower'"),
        (("vision_encoder", "tensorrt"), "was not exported for 'tensorrt'; the bundle holds onnx"),
        (("vision_encoder", "onnx", "int8"), "has no precision 'int8'; it has fp32"),
    ],
)
def test_a_part_that_is_not_there_names_what_is(
    tiny_manifest: Manifest, arguments: tuple[str, ...], words: str
) -> None:
    with pytest.raises(UnsupportedError, match=words):
        tiny_manifest.part(*arguments)


def test_a_manifest_is_read_at_each_size_that_it_lists(tiny_manifest: Manifest) -> None:
    sizes = (ImageSize(image_size=8, num_vision_tokens=4), ImageSize(image_size=16, num_vision_tokens=16))
    manifest = replace(tiny_manifest, image_sizes=sizes)
    assert parse_manifest(plain(manifest), where="edgevlm.json") == manifest
    assert manifest.at_image_size(None) == manifest.at_image_size(8) == manifest
    larger = manifest.at_image_size(16)
    assert (larger.image, larger.num_vision_tokens) == ({"height": 16, "width": 16, "fit": "pad"}, 16)
    assert larger.prompt == {"image_token": "<image>", "num_vision_tokens": 16}
    with pytest.raises(UnsupportedError, match="no pictures of 12 pixels a side; it was exported for 8, 16"):
        manifest.at_image_size(12)


def test_a_manifest_of_one_size_is_read_at_that(tiny_manifest: Manifest) -> None:
    assert tiny_manifest.at_image_size(8) == tiny_manifest
    with pytest.raises(UnsupportedError, match="it was exported for 8"):
        tiny_manifest.at_image_size(16)


def test_a_manifest_cannot_be_built_for_another_schema(tiny_manifest: Manifest) -> None:
    with pytest.raises(ConfigError, match="schema must be 1, found 2"):
        replace(tiny_manifest, schema=2)
