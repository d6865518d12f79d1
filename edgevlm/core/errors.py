"""Every deliberate failure, with the exit code that the command line gives it.

    EdgeVLMError                 1   unexpected
    ├── UsageError               2   the command or a call was wrong
    │   ├── ConfigError              a field of a config or recipe
    │   └── InputError               an image, prompt or file that cannot be read
    ├── UnsupportedError         3   a model, target or op that nobody has written
    ├── ParityError              4   the exported model is not the same model
    ├── DoesNotFitError          5   memory, disk or context is too small
    ├── MissingLibraryError      6   a library or tool is not installed
    ├── IntegrityError           7   a bundle is damaged, foreign or dangerous
    ├── DeviceError              8   busy, throttled or in the wrong power mode
    └── BenchmarkError           9   a measurement that means nothing

130 is an interrupt (Ctrl-C).  A message says what was found, what was expected and what to do next.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED = 130
DISK_FULL = "no space left on the disk; free some or choose another folder"
FILE_TOO_LARGE = "larger than a file may be on this disk or for this user; choose another folder"
OUT_OF_MEMORY = "out of memory: close other programs or take a smaller model"


class EdgeVLMError(Exception):
    """Something went wrong that we foresaw; ``exit_code`` is what the command line returns."""

    exit_code = 1


class UsageError(EdgeVLMError):
    """The command or the call was wrong."""

    exit_code = 2


class ConfigError(UsageError):
    """A config or recipe holds a value that cannot be used."""


class InputError(UsageError):
    """An image, a prompt or a file cannot be read."""


class UnsupportedError(EdgeVLMError):
    """Nobody has written this model, target, back end or operation yet."""

    exit_code = 3


class ParityError(EdgeVLMError):
    """The exported model disagrees with the PyTorch model."""

    exit_code = 4


class DoesNotFitError(EdgeVLMError):
    """Memory, disk or context is too small; says how much is missing, and where."""

    exit_code = 5


class MissingLibraryError(EdgeVLMError):
    """A library or tool is not installed, or cannot be loaded; carries the command that fixes it."""

    exit_code = 6

    def __init__(self, library: str, fix: str, reason: str = "is not installed") -> None:
        self.library, self.fix, self.reason = library, fix, reason
        super().__init__(f"{library} {reason}: {fix}")

    def __reduce__(self) -> tuple[type[MissingLibraryError], tuple[str, str, str]]:
        return type(self), (self.library, self.fix, self.reason)


class IntegrityError(EdgeVLMError):
    """A bundle is damaged, from a newer version, or reaches outside its folder."""

    exit_code = 7


class DeviceError(EdgeVLMError):
    """The device is busy, throttled or in the wrong power mode."""

    exit_code = 8


class BenchmarkError(EdgeVLMError):
    """A measurement that means nothing."""

    exit_code = 9


@contextmanager
def translate_disk_errors(what: str, *, reading: bool = False) -> Iterator[None]:
    """Turn a full disk, a forbidden folder or an impossible name into one clear error about ``what``.

    What cannot be read (``reading``) is InputError; what cannot be written is UsageError or DoesNotFitError.
    """
    try:
        yield
    except EdgeVLMError:
        raise
    except Exception as error:
        if is_disk_full(error):
            raise DoesNotFitError(f"{what}: {DISK_FULL}") from error
        if _is_too_large(error):
            raise DoesNotFitError(f"{what}: {FILE_TOO_LARGE}") from error
        if isinstance(error, OSError) and (reason := _refusal(error)):
            place = f"{error.filename or what}: {reason}"
            if reading:
                raise InputError(f"{place}; make it readable for this user, or give another") from error
            raise UsageError(f"{place}; choose another folder") from error
        raise


def is_disk_full(error: BaseException) -> bool:
    """Whether ``error`` says that a disk or a quota is full.

    Writers in C++ and Rust (safetensors, protobuf) raise their own types, so their text counts as well.
    """
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "No space left on device" in str(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory is short; PyTorch says so with a RuntimeError."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in text or "not enough memory" in text)
    )


def _is_too_large(error: Exception) -> bool:
    """FAT ends at 4 GiB a file, and a user may have a limit (``ulimit -f``)."""
    return error.errno == errno.EFBIG if isinstance(error, OSError) else "File too large" in str(error)


def _refusal(error: OSError) -> str | None:
    if isinstance(error, PermissionError):
        return "permission denied"
    reasons = {
        errno.EROFS: "the disk is read-only",
        errno.ENAMETOOLONG: "the name is too long",
        errno.ELOOP: "links that point at each other",
    }
    return reasons.get(error.errno or 0)
