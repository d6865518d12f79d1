from __future__ import annotations

import io
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgevlm.bundle import pack as pack_module
from edgevlm.bundle.pack import pack, unpack
from edgevlm.core.errors import DoesNotFitError, InputError, IntegrityError, UsageError

Edit = Callable[[tarfile.TarFile], object]


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def add(name: str, content: bytes = b"x", kind: bytes = tarfile.REGTYPE, link: str = "") -> Edit:
    """Adds one member of our choice to an archive."""
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, link, len(content) if kind == tarfile.REGTYPE else 0
    return lambda archive: archive.addfile(member, io.BytesIO(content))


def claim(size: int) -> Edit:
    """Adds a member whose header claims ``size`` bytes that are not there."""

    def write(archive: tarfile.TarFile) -> None:
        member = tarfile.TarInfo("onnx/huge.onnx")
        member.size = size
        assert archive.fileobj is not None
        archive.fileobj.write(member.tobuf(tarfile.PAX_FORMAT))

    return write


@pytest.fixture
def packed(tiny_bundle: Path, tmp_path: Path) -> Path:
    return pack(tiny_bundle, tmp_path / "tiny.tar")


def test_a_bundle_survives_packing_and_unpacking(tiny_bundle: Path, packed: Path, tmp_path: Path) -> None:
    bundle = unpack(packed, tmp_path / "again")
    assert bundle.root == (tmp_path / "again").resolve()
    assert contents(bundle.root) == contents(tiny_bundle)


def test_the_same_bundle_gives_the_same_bytes_whoever_packs_it_and_when(
    tiny_bundle: Path, packed: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_bundle, tmp_path / "copy")
    os.utime(tmp_path / "copy/edgevlm.json", (1, 1))
    (tmp_path / "copy/edgevlm.json").chmod(0o600)
    assert pack(tmp_path / "copy", tmp_path / "copy.tar").read_bytes() == packed.read_bytes()
    with tarfile.open(packed) as archive:
        members = archive.getmembers()
    assert members[0].name == "edgevlm.json"
    assert [(member.mtime, member.uid, member.uname) for member in members] == [(0, 0, "")] * len(members)


def test_a_damaged_bundle_is_not_packed(tiny_bundle: Path, tmp_path: Path) -> None:
    (tiny_bundle / "tokenizer.json").write_text("[]")
    with pytest.raises(IntegrityError, match=r"tokenizer\.json was changed"):
        pack(tiny_bundle, tmp_path / "tiny.tar")
    assert names(tmp_path) == ["tiny.bundle"]


def test_only_files_with_a_hash_travel(tiny_bundle: Path, packed: Path, tmp_path: Path) -> None:
    for name in ("secret.txt", "golden/.DS_Store", "onnx/old.onnx"):
        (tiny_bundle / name).write_text("private")
    assert pack(tiny_bundle, tmp_path / "again.tar").read_bytes() == packed.read_bytes()


def test_packing_overwrites_only_when_asked_and_never_into_the_bundle(tiny_bundle: Path, packed: Path) -> None:
    with pytest.raises(UsageError, match="exists already"):
        pack(tiny_bundle, packed)
    pack(tiny_bundle, packed, overwrite=True)
    with pytest.raises(UsageError, match="lies inside the bundle"):
        pack(tiny_bundle, tiny_bundle / "onnx/tiny.tar")


def test_unpacking_overwrites_a_bundle_when_asked_and_nothing_else(packed: Path, tmp_path: Path) -> None:
    unpack(packed, tmp_path / "out")
    with pytest.raises(UsageError, match="exists already"):
        unpack(packed, tmp_path / "out")
    unpack(packed, tmp_path / "out", overwrite=True)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/1.jpg").write_text("dear")
    with pytest.raises(UsageError, match="is not replaced"):
        unpack(packed, tmp_path / "photos", overwrite=True)
    assert names(tmp_path / "photos") == ["1.jpg"]


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (add("../escape"), "may leave"),
        (add("/tmp/escape"), "may leave"),
        (add("onnx/../../escape"), "may leave"),
        (add("..\\escape"), "not a plain file name"),
        (add("C:escape"), "not a plain file name"),
        (add("a\nb"), "not a plain file name"),
        (add("link", kind=tarfile.SYMTYPE, link="/etc/passwd"), "is a link or a special file"),
        (add("hard", kind=tarfile.LNKTYPE, link="edgevlm.json"), "is a link or a special file"),
        (add("device", kind=tarfile.CHRTYPE), "is a link or a special file"),
        (add("pipe", kind=tarfile.FIFOTYPE), "is a link or a special file"),
        (add("hole", kind=tarfile.GNUTYPE_SPARSE), "is a link or a special file"),
        (add("edgevlm.json"), "stands there twice"),
        (add("EdgeVLM.json"), "stands there twice"),
        (add("tokenizer.json/below"), "lies below a name that is a file"),
        (claim(1 << 40), "claims 1,099,511,627,776 bytes, more than the whole file"),
        (add("tokenizer.jso"), None),
    ],
)
def test_a_dangerous_archive_is_refused_and_leaves_nothing(
    packed: Path, tmp_path: Path, edit: Edit, words: str | None
) -> None:
    with tarfile.open(packed, "a") as archive:
        edit(archive)
    if words is None:  # a stray file is no danger
        unpack(packed, tmp_path / "out")
        return
    with pytest.raises(IntegrityError, match=words):
        unpack(packed, tmp_path / "deep/out")
    assert names(tmp_path) == ["deep", "tiny.bundle", "tiny.tar"]
    assert names(tmp_path / "deep") == []


@pytest.mark.parametrize("share", [0.0, 0.02, 0.2, 0.4])
def test_an_archive_that_is_cut_short_is_refused_and_leaves_nothing(packed: Path, tmp_path: Path, share: float) -> None:
    content = packed.read_bytes()
    packed.write_bytes(content[: int(len(content) * share)])
    with pytest.raises((InputError, IntegrityError)):
        unpack(packed, tmp_path / "out")
    assert names(tmp_path) == ["tiny.bundle", "tiny.tar"]


def test_every_changed_byte_of_a_file_is_found(packed: Path, tmp_path: Path) -> None:
    content = bytearray(packed.read_bytes())
    content[content.index(b"\1" * 11)] = 7
    packed.write_bytes(content)
    with pytest.raises(IntegrityError, match="was changed or damaged"):
        unpack(packed, tmp_path / "out")
    assert names(tmp_path) == ["tiny.bundle", "tiny.tar"]


@pytest.mark.parametrize("content", [b"", b"hello", b"\x1f\x8b" + b"x" * 600, b"\0" * 10240])
def test_a_file_that_is_no_bundle_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(InputError, match="not a packed bundle"):
        unpack(tmp_path / "x.tar", tmp_path / "out")
    with pytest.raises(InputError, match="cannot read"):
        unpack(tmp_path / "none.tar", tmp_path / "out")
    with pytest.raises(InputError, match="cannot read"):
        unpack(tmp_path, tmp_path / "out")
    assert names(tmp_path) == ["x.tar"]


def test_an_archive_by_another_tar_is_read(tiny_bundle: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "other.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        archive.add(tiny_bundle, arcname="./")
    assert contents(unpack(tmp_path / "other.tar", tmp_path / "out").root) == contents(tiny_bundle)


def test_too_many_files_and_too_little_room_are_told_before_writing(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=1))
    with pytest.raises(DoesNotFitError, match="the disk has 1 left"):
        unpack(packed, tmp_path / "out")
    monkeypatch.setattr(pack_module, "MAX_MEMBERS", 3)
    with pytest.raises(IntegrityError, match="more than 3 files"):
        unpack(packed, tmp_path / "out")
    assert names(tmp_path) == ["tiny.bundle", "tiny.tar"]


def test_an_interrupt_while_packing_or_unpacking_leaves_nothing(
    tiny_bundle: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pack_module.shutil, "copyfileobj", interrupt)
    monkeypatch.setattr(tarfile.TarFile, "addfile", interrupt)
    with pytest.raises(KeyboardInterrupt):
        unpack(packed, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        pack(tiny_bundle, tmp_path / "new.tar")
    assert names(tmp_path) == ["tiny.bundle", "tiny.tar"]
