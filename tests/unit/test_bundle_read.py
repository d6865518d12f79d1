from __future__ import annotations

import errno
import io
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgevlm.bundle import hash_cache
from edgevlm.bundle.golden import load_golden, save_golden
from edgevlm.bundle.hash_cache import HashCache
from edgevlm.bundle.manifest import Manifest
from edgevlm.bundle.pack import pack
from edgevlm.bundle.read import read_bundle
from edgevlm.bundle.write import write_manifest, write_sums
from edgevlm.core.errors import ConfigError, InputError, IntegrityError

ENCODER = "onnx/vision_encoder.onnx"


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def edit(root: Path, **changes: object) -> None:
    """Change the manifest and write the sums anew, as somebody would who means it."""
    manifest = json.loads((root / "edgevlm.json").read_text())
    (root / "edgevlm.json").write_text(json.dumps({**manifest, **changes}))
    write_sums(root)


def test_a_bundle_opens_and_knows_its_files(tiny_bundle: Path, tiny_manifest: Manifest) -> None:
    bundle = read_bundle(tiny_bundle)
    assert bundle.manifest.file_bytes[ENCODER] == 10
    assert (bundle.manifest.name, bundle.manifest.parts) == ("tiny", tiny_manifest.parts)
    assert bundle.path(ENCODER).read_bytes() == b"\0" * 10


def test_a_bundle_opens_through_a_link_to_its_folder(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tiny_bundle)
    assert read_bundle(tmp_path / "link").root == tiny_bundle.resolve()


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum here")
def test_the_sums_are_those_of_sha256sum(tiny_bundle: Path) -> None:
    done = subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=tiny_bundle, capture_output=True)
    assert done.returncode == 0


@pytest.mark.parametrize(
    "name",
    [
        "../a",
        "/etc/passwd",
        "a/../../b",
        "",
        "a//b",
        "./a",
        "a\\..\\b",
        "C:/a",
        "C:a",
        "a\nb",
        "a\0b",
        "a/..",
        "a/ /b",
    ],
)
def test_a_path_never_leaves_the_folder(tiny_bundle: Path, name: str) -> None:
    with pytest.raises(IntegrityError):
        read_bundle(tiny_bundle).path(name)


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda root: (root / ENCODER).unlink(), f"{ENCODER} is missing"),
        (lambda root: (root / ENCODER).write_bytes(b"\0" * 9), f"{ENCODER} has 9 bytes, expected 10"),
        (
            lambda root: (root / "tokenizer.json").unlink(),
            "tokenizer.json is listed in SHA256SUMS but missing",
        ),
        (lambda root: (root / "SHA256SUMS").unlink(), "SHA256SUMS is missing"),
        (lambda root: (root / "SHA256SUMS").write_text("abc  edgevlm.json\n"), "line 1 is not"),
        (
            lambda root: (root / "SHA256SUMS").write_text(f"{'0' * 64}  ../x\n"),
            "may leave the bundle's folder",
        ),
        (lambda root: (root / "SHA256SUMS").write_text(f"{'0' * 64}  a\n" * 2), "a is listed twice"),
        (
            lambda root: (root / "SHA256SUMS").write_text(f"{'0' * 64}  edgevlm.json\n"),
            "is not listed in SHA256SUMS",
        ),
        (lambda root: (root / "config.json").write_text("{}"), "config.json is not listed in SHA256SUMS"),
        (lambda root: (root / "chat_template.json").write_text("{}"), "chat_template.json is not listed"),
        (lambda root: (root / "Chat_Template.JSON").write_text("{}"), "Chat_Template.JSON is not listed"),
        (lambda root: (root / "verify.json").write_text("{}"), "verify.json is not listed"),
        (lambda root: (root / "golden/new.png").write_text("x"), "golden/new.png is not listed"),
        (lambda root: (root / "edgevlm.json").write_text("{"), "not valid JSON"),
        (lambda root: (root / "edgevlm.json").write_text("[]"), "expected a JSON object"),
        (lambda root: (root / "edgevlm.json").write_bytes(b"\xff\xfe"), "not UTF-8"),
        (lambda root: edit(root, schema=99), "schema 99, this one reads 1"),
        (lambda root: edit(root, parts=[]), "no file for part"),
    ],
)
def test_a_damaged_bundle_is_refused_with_and_without_hashes(
    tiny_bundle: Path, damage: Callable[[Path], object], words: str, check: bool
) -> None:
    damage(tiny_bundle)
    with pytest.raises(IntegrityError, match=words):
        read_bundle(tiny_bundle, check=check)


@pytest.mark.parametrize("name", [ENCODER, "tokenizer.json", "golden/golden.safetensors", "golden/golden.json"])
def test_a_flipped_byte_is_found_wherever_it_is(tiny_bundle: Path, name: str) -> None:
    read_bundle(tiny_bundle)
    flip_a_byte(tiny_bundle / name)
    with pytest.raises(IntegrityError, match=f"{name} was changed or damaged"):
        read_bundle(tiny_bundle)
    read_bundle(tiny_bundle, check=False)


@pytest.mark.parametrize("name", [ENCODER, "onnx", "unrelated"])
def test_links_are_refused(tiny_bundle: Path, tmp_path: Path, name: str) -> None:
    if (tiny_bundle / name).exists():
        shutil.move(tiny_bundle / name, tmp_path / "elsewhere")
    (tiny_bundle / name).symlink_to(tmp_path / "elsewhere")
    for check in (True, False):
        with pytest.raises(IntegrityError, match="is a link"):
            read_bundle(tiny_bundle, check=check)
    with pytest.raises(IntegrityError, match="is a link"):
        write_sums(tiny_bundle)


def test_a_pipe_in_the_folder_is_refused(tiny_bundle: Path) -> None:
    os.mkfifo(tiny_bundle / "pipe")
    with pytest.raises(IntegrityError, match="neither a file nor a folder"):
        read_bundle(tiny_bundle)


LITTER = (".DS_Store", "golden/.DS_Store", "golden/._0.png", "onnx/Thumbs.db", "desktop.ini")


@pytest.mark.parametrize("name", [*LITTER, "golden/notes.txt", "README.md"])
def test_files_that_nobody_reads_may_lie_there(tiny_bundle: Path, name: str) -> None:
    (tiny_bundle / name).write_text("x")
    assert read_bundle(tiny_bundle).manifest.name == "tiny"


@pytest.mark.parametrize("name", LITTER)
def test_what_a_file_manager_leaves_gets_no_hash(tiny_bundle: Path, name: str) -> None:
    before = (tiny_bundle / "SHA256SUMS").read_text()
    (tiny_bundle / name).write_text("x")
    write_sums(tiny_bundle)
    assert (tiny_bundle / "SHA256SUMS").read_text() == before


@pytest.mark.parametrize("name", ["edgevlm.json", "SHA256SUMS", ENCODER])
def test_a_file_that_may_not_be_read_is_told_as_such(
    tiny_bundle: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = io.open

    def deny(file: Any, *arguments: Any, **options: Any) -> Any:
        if file == tiny_bundle / name:
            raise PermissionError(errno.EACCES, "Permission denied", str(file))
        return original(file, *arguments, **options)

    monkeypatch.setattr(io, "open", deny)
    with pytest.raises(InputError, match=f"{name}: permission denied; make it readable for this user"):
        read_bundle(tiny_bundle)


def test_what_is_no_bundle_is_told_with_advice(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint/config.json").write_text("{}")
    (tmp_path / "file").write_text("x")
    (tmp_path / "nowhere").symlink_to("gone")
    packed = pack(tiny_bundle, tmp_path / "tiny.tar")
    cases = {
        tmp_path / "none": "no bundle at",
        tmp_path: "holds no edgevlm.json",
        tmp_path / "checkpoint": "looks like a checkpoint.*edgevlm export",
        tmp_path / "file": "is a file, not a bundle",
        tmp_path / "nowhere": "is not a folder",
        packed: "is a packed bundle: run `edgevlm bundle unpack",
    }
    for path, words in cases.items():
        with pytest.raises(InputError, match=words):
            read_bundle(path)


def test_an_absurd_manifest_is_not_read(tiny_bundle: Path) -> None:
    with (tiny_bundle / "edgevlm.json").open("ab") as stream:
        stream.truncate(17 << 20)
    with pytest.raises(IntegrityError, match="is no manifest"):
        read_bundle(tiny_bundle)


def test_a_manifest_is_not_written_before_its_files(tmp_path: Path, tiny_manifest: Manifest) -> None:
    with pytest.raises(IntegrityError, match=f"{ENCODER}.*was not written"):
        write_manifest(tmp_path, tiny_manifest)
    assert list(tmp_path.iterdir()) == []


# -- the hash cache -----------------------------------------------------------------------------------------


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of files that are read in full; fresh files count as settled."""
    read: list[str] = []
    original = hash_cache.sha256

    def counting(path: Path) -> str:
        read.append(path.name)
        return original(path)

    monkeypatch.setattr(hash_cache, "sha256", counting)
    monkeypatch.setattr(hash_cache, "SETTLED_NS", -1)
    return read


def test_the_second_opening_reads_no_file_in_full(tiny_bundle: Path, hashed: list[str]) -> None:
    read_bundle(tiny_bundle)
    assert len(hashed) == 7
    read_bundle(tiny_bundle)
    assert len(hashed) == 7


def test_only_the_file_that_changed_is_read_again(tiny_bundle: Path, hashed: list[str]) -> None:
    read_bundle(tiny_bundle)
    os.utime(tiny_bundle / ENCODER, (1, 1))
    hashed.clear()
    read_bundle(tiny_bundle)
    assert hashed == ["vision_encoder.onnx"]


def test_a_change_that_hides_its_time_is_found_all_the_same(tiny_bundle: Path, hashed: list[str]) -> None:
    read_bundle(tiny_bundle)
    before = (tiny_bundle / ENCODER).stat()
    flip_a_byte(tiny_bundle / ENCODER)
    os.utime(tiny_bundle / ENCODER, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(IntegrityError, match="was changed"):
        read_bundle(tiny_bundle)


def test_new_sums_do_not_trust_old_answers(tiny_bundle: Path, hashed: list[str]) -> None:
    read_bundle(tiny_bundle)
    text = (tiny_bundle / "SHA256SUMS").read_text()
    (tiny_bundle / "SHA256SUMS").write_text(text.replace(text[:64], "0" * 64, 1))
    with pytest.raises(IntegrityError, match="was changed"):
        read_bundle(tiny_bundle)


def test_a_file_written_just_now_is_not_remembered(tiny_bundle: Path, tmp_path: Path) -> None:
    cache = HashCache(tmp_path / "hashes.json")
    cache.sha256(tiny_bundle / ENCODER)
    cache.save()
    assert not (tmp_path / "hashes.json").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"a": 1, "b": [1, 2]}', b"\xff", b"[" * 100_000])
def test_a_damaged_cache_is_as_good_as_none(tiny_bundle: Path, content: bytes, hashed: list[str]) -> None:
    cache = HashCache.of_user().file
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_bytes(content)
    read_bundle(tiny_bundle)
    assert len(hashed) == 7
    assert len(json.loads(cache.read_text())) == 7


def test_a_cache_that_cannot_be_written_is_no_error(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hashed: list[str]
) -> None:
    (tmp_path / "blocked").write_text("a file where the folder should be")
    monkeypatch.setenv("EDGEVLM_CACHE", str(tmp_path / "blocked"))
    assert read_bundle(tiny_bundle).manifest.name == "tiny"


def test_files_that_are_gone_leave_the_cache(tiny_bundle: Path, tmp_path: Path, hashed: list[str]) -> None:
    cache = HashCache(tmp_path / "hashes.json")
    cache.sha256(tiny_bundle / ENCODER)
    (tiny_bundle / ENCODER).unlink()
    cache.sha256(tiny_bundle / "tokenizer.json")
    cache.save()
    assert [Path(key).name for key in json.loads((tmp_path / "hashes.json").read_text())] == ["tokenizer.json"]


# -- golden tensors -----------------------------------------------------------------------------------------


def test_golden_tensors_come_back_as_they_were(tmp_path: Path) -> None:
    tensors = {
        "pixel_values": np.arange(12, dtype=np.float32).reshape(3, 4).T,
        "input_ids": np.array([[1, 2]], np.int64),
        "half": np.array([0.5], np.float16),
        "scalar": np.array(3, np.int64),
    }
    save_golden(tmp_path, tensors, {"prompt": "wie viele Äpfel?", "ids": (1, 2)})
    loaded, meta = load_golden(tmp_path)
    assert meta == {"prompt": "wie viele Äpfel?", "ids": [1, 2]}
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(loaded[name], tensor)
        assert loaded[name].dtype == tensor.dtype


@pytest.mark.parametrize("tensors", [{}, {"words": np.array(["a"])}, {"objects": np.array([None])}])
def test_golden_tensors_are_numbers(tmp_path: Path, tensors: dict[str, NDArray[Any]]) -> None:
    with pytest.raises(ConfigError, match="golden tensors"):
        save_golden(tmp_path, tensors, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda golden: (golden / "golden.safetensors").unlink(),
        lambda golden: (golden / "golden.safetensors").write_bytes(b"\xff" * 20),
        lambda golden: (golden / "golden.safetensors").write_bytes(b""),
        lambda golden: (golden / "golden.json").write_text("{"),
        lambda golden: (golden / "golden.json").unlink(),
    ],
)
def test_damaged_golden_tensors_are_told(tiny_bundle: Path, damage: Callable[[Path], object]) -> None:
    damage(tiny_bundle / "golden")
    with pytest.raises(IntegrityError, match="golden"):
        load_golden(tiny_bundle)
