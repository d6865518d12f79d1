"""Bundles that are damaged, foreign or dangerous."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgevlm.bundle.pack import pack

Refused = Callable[..., str]
Reseal = Callable[..., None]

KINDS = (
    *("onnx/vision_encoder.onnx", "onnx/embed_tokens.onnx", "onnx/decoder_model_merged.onnx"),
    *("tokenizer.json", "chat_template.jinja", "preprocessor_config.json", "config.json", "verify.json"),
    *("golden/golden.safetensors", "golden/golden.json", "golden/0.png"),
    *("edgevlm.json", "SHA256SUMS"),
)


def flip_a_byte(file: Path, at: int | None = None) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("name", KINDS)
def test_a_flipped_byte_is_found_in_every_kind_of_file(bundle: Path, refused: Refused, name: str) -> None:
    flip_a_byte(bundle / name)
    refused(7, str(bundle), "run", bundle, "--prompt", "x")


@pytest.mark.parametrize("verb", ["verify", "eval", "bench"])
def test_every_verb_that_opens_a_bundle_checks_it(bundle: Path, refused: Refused, verb: str) -> None:
    flip_a_byte(bundle / "tokenizer.json")
    refused(7, "tokenizer.json was changed or damaged (its SHA-256 differs): copy it again", verb, bundle)


def test_a_damaged_bundle_is_not_packed(tmp_path: Path, bundle: Path, refused: Refused) -> None:
    flip_a_byte(bundle / "onnx" / "embed_tokens.onnx")
    refused(7, "was changed or damaged", "bundle", "pack", bundle, tmp_path / "bundle.tar")


@pytest.mark.parametrize("name", KINDS)
def test_a_missing_file_is_named(bundle: Path, refused: Refused, name: str) -> None:
    (bundle / name).unlink()
    refused(7, (name, "missing", "export"), "run", bundle, "--prompt", "x")


@pytest.mark.parametrize("name", ["../evil.onnx", "/etc/passwd", "onnx\\..\\..\\evil.onnx", "C:evil.onnx", "a/../b"])
def test_a_path_outside_the_folder_is_refused(bundle: Path, refused: Refused, reseal: Reseal, name: str) -> None:
    def point_outside(manifest: Any) -> None:
        manifest["parts"][0]["file"] = name

    reseal(bundle, point_outside)
    refused(7, f"{name!r} ", "run", bundle, "--prompt", "x")
    refused(7, f"{name!r} ", "run", bundle, "--prompt", "x", "--no-check")


def test_a_hash_for_a_file_outside_is_refused(bundle: Path, refused: Refused) -> None:
    with (bundle / "SHA256SUMS").open("a") as sums:
        sums.write(f"{'0' * 64}  ../secret\n")
    refused(7, "'../secret' may leave the bundle's folder", "bundle", "show", bundle)


@pytest.mark.parametrize("name", ["tokenizer.json", "onnx/embed_tokens.onnx", "notes.txt"])
def test_a_link_is_refused_wherever_it_leads(tmp_path: Path, bundle: Path, refused: Refused, name: str) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes((bundle / name).read_bytes() if (bundle / name).exists() else b"")
    (bundle / name).unlink(missing_ok=True)
    (bundle / name).symlink_to(outside)
    refused(7, f"{name} is a link; a bundle holds plain files only", "run", bundle, "--prompt", "x")


def test_a_newer_schema_says_upgrade(bundle: Path, refused: Refused, reseal: Reseal) -> None:
    reseal(bundle, lambda manifest: manifest.update(schema=99))
    refused(7, "written by a newer EdgeVLM (schema 99, this one reads 1): upgrade", "run", bundle, "--prompt", "x")


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (lambda m: m.pop("decoder"), 7, "missing decoder"),
        (lambda m: m.update(surprise=1), 7, "no key named 'surprise'"),
        (lambda m: m.update(schema="1"), 7, "not the manifest of a bundle"),
        (lambda m: m["decoder"].update(num_layers=9), 7, "promises a kv cache of 9 layers"),
        (lambda m: m["parts"][0].update(target="coreml"), 3, "was exported for coreml only"),
        (lambda m: m["image"].update(height=-1), 2, "image height must be 1 to"),
        (lambda m: m["prompt"].update(image_token="<nope>"), 2, "the tokenizer has no token '<nope>'"),
        (lambda m: m.update(max_context=10**13), 5, ("not enough memory", "smaller model")),
    ],
    ids=["no decoder", "unknown key", "schema", "layers", "target", "height", "image token", "memory"],
)
def test_a_manifest_that_cannot_be_used_is_told_and_why(
    bundle: Path, refused: Refused, reseal: Reseal, change: Callable[[Any], object], code: int, words: str
) -> None:
    reseal(bundle, change)
    refused(code, words, "run", bundle, "--prompt", "x")


@pytest.mark.parametrize("name", ["onnx/vision_encoder.onnx", "onnx/decoder_model_merged.onnx", "tokenizer.json"])
def test_a_file_that_is_not_what_it_should_be_is_told_with_fitting_hashes(
    bundle: Path, refused: Refused, reseal: Reseal, name: str
) -> None:
    (bundle / name).write_bytes((bundle / name).read_bytes()[:100])
    reseal(bundle)
    refused(7, (name, "copy"), "run", bundle, "--prompt", "x")


def test_golden_tensors_that_cannot_be_read_are_told(bundle: Path, refused: Refused, reseal: Reseal) -> None:
    flip_a_byte(bundle / "golden" / "golden.safetensors", at=10)
    reseal(bundle)
    refused(7, "the golden tensors cannot be read", "verify", bundle)


def test_golden_answers_that_are_incomplete_are_told(bundle: Path, refused: Refused, reseal: Reseal) -> None:
    (bundle / "golden" / "golden.json").write_text("{}")
    reseal(bundle)
    refused(7, "golden", "verify", bundle)
    refused(7, "golden", "bench", bundle)


def test_what_is_no_bundle_is_told_with_what_to_give(
    tmp_path: Path, tiny_bundle: Path, checkpoint: Path, refused: Refused
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    packed = pack(tiny_bundle, tmp_path / "bundle.tar")
    for path, words in {
        tmp_path / "none": "no bundle at",
        tmp_path / "folder": "is not a bundle: it holds no edgevlm.json",
        tmp_path / "file": "is a file, not a bundle",
        packed: f"is a packed bundle: run `edgevlm bundle unpack {packed} FOLDER` first",
        checkpoint: f"looks like a checkpoint, not a bundle: run `edgevlm export {checkpoint} OUT` first",
    }.items():
        refused(2, words, "run", path, "--prompt", "x")


# -- packed bundles -----------------------------------------------------------------------------------------


@pytest.fixture
def packed(tiny_bundle: Path, tmp_path: Path) -> Path:
    return pack(tiny_bundle, tmp_path / "packed.tar")


def test_a_packed_bundle_cut_off_or_damaged_leaves_nothing(tmp_path: Path, packed: Path, refused: Refused) -> None:
    whole, out = packed.read_bytes(), tmp_path / "out"
    weights = whole.index(b"onnx/decoder_model_merged.onnx", 8192) + 4096  # behind the manifest, which names it too
    for data, code in {
        whole[: len(whole) // 2]: 7,
        b"": 2,
        b"no archive" * 1000: 2,
        whole[:weights] + bytes([whole[weights] ^ 1]) + whole[weights + 1 :]: 7,
    }.items():
        packed.write_bytes(data)
        line = refused(code, str(packed), "bundle", "unpack", packed, out)
        assert ".partial" not in line


def test_unpacking_keeps_what_stands_there(tmp_path: Path, tiny_bundle: Path, packed: Path, refused: Refused) -> None:
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "chapter.txt").write_text("years of work")
    refused(2, "exists already: choose another name or pass --overwrite", "bundle", "unpack", packed, thesis)
    refused(2, "holds no edgevlm.json, so it is not replaced", "bundle", "unpack", packed, thesis, "--overwrite")
    refused(2, "part of it is a file", "bundle", "unpack", packed, thesis / "chapter.txt" / "out")
    refused(2, "exists already", "bundle", "pack", tiny_bundle, packed)


def test_a_bundle_survives_a_damaged_successor(tmp_path: Path, bundle: Path, packed: Path, refused: Refused) -> None:
    packed.write_bytes(packed.read_bytes()[: packed.stat().st_size // 2])
    refused(7, "more than the whole file", "bundle", "unpack", packed, bundle, "--overwrite")


def test_a_copy_that_shed_its_golden_folder_still_says_so(bundle: Path, refused: Refused, reseal: Reseal) -> None:
    shutil.rmtree(bundle / "golden")
    reseal(bundle)
    refused(7, "golden/golden.safetensors is missing, so it cannot be verified", "verify", bundle)
    assert json.loads((bundle / "edgevlm.json").read_text())["schema"] == 1
