from __future__ import annotations

import errno
import pickle
from pathlib import Path

import pytest

from edgevlm.core import errors
from edgevlm.core.errors import (
    DoesNotFitError,
    EdgeVLMError,
    InputError,
    MissingLibraryError,
    UsageError,
    translate_disk_errors,
)


def all_errors(kind: type[EdgeVLMError]) -> list[type[EdgeVLMError]]:
    return [kind, *(deeper for child in kind.__subclasses__() for deeper in all_errors(child))]


def test_every_error_stands_in_the_tree_with_its_exit_code() -> None:
    assert errors.__doc__
    for kind in (kind for kind in all_errors(EdgeVLMError) if kind.__module__ == errors.__name__):
        line = next(line for line in errors.__doc__.splitlines() if f"{kind.__name__} " in line)
        told = [int(word) for word in line.split() if word.isdigit()]
        assert told in ([kind.exit_code], [])
        assert told or kind.exit_code == UsageError.exit_code


def test_a_missing_library_tells_the_command_and_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(MissingLibraryError("torch", "pip install torch")))
    assert str(error) == "torch is not installed: pip install torch"
    assert (error.library, error.fix) == ("torch", "pip install torch")


@pytest.mark.parametrize(
    ("raised", "expected", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), DoesNotFitError, "no space left"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), DoesNotFitError, "no space left"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), DoesNotFitError, "no space left"),
        (PermissionError(errno.EACCES, "Permission denied", "/a/b"), UsageError, "/a/b: permission denied"),
        (OSError(errno.EROFS, "Read-only file system"), UsageError, "read-only"),
        (OSError(errno.ENAMETOOLONG, "File name too long"), UsageError, "too long"),
    ],
)
def test_disk_errors_become_one_clear_error(raised: Exception, expected: type[Exception], words: str) -> None:
    with pytest.raises(expected, match=words) as caught, translate_disk_errors("out"):
        raise raised
    assert caught.value.__cause__ is raised


def test_what_cannot_be_read_is_not_sent_to_another_folder() -> None:
    denied = PermissionError(errno.EACCES, "Permission denied", "/a/b")
    with (
        pytest.raises(InputError, match=r"^/a/b: permission denied; make it readable for this user"),
        translate_disk_errors("bundle", reading=True),
    ):
        raise denied


@pytest.mark.parametrize("raised", [InputError("bad"), ValueError("bug"), OSError(errno.EIO, "I/O error")])
def test_other_errors_pass_unchanged(raised: Exception) -> None:
    with pytest.raises(type(raised)) as caught, translate_disk_errors("out"):
        raise raised
    assert caught.value is raised


def test_core_imports_nothing_but_the_standard_library_and_itself(root: Path) -> None:
    for file in (root / "edgevlm/core").glob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert not [word for word in ("psutil", "numpy", "typer", "rich") if f"import {word}" in text], file
