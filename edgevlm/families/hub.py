"""Where a model stands: a folder, a name that the package ships, or a repository on the Hugging Face hub.

A path that exists is always a path, and a name without a slash never asks the network.  Of a repository only
configs, tokenizer, template, licence and safetensors are fetched: no pickle, no Python.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from edgevlm.core.errors import EdgeVLMError, InputError, UsageError, translate_disk_errors
from edgevlm.core.optional import require
from edgevlm.families.detect import family_of
from edgevlm.families.folder import ModelFolder
from edgevlm.families.licence import FILES as LICENCE_FILES
from edgevlm.families.tensors import PICKLES, WEIGHTS, listed_files
from edgevlm.shipped import find_weights

logger = logging.getLogger(__name__)

MAX_ID_LETTERS = 96
PART = r"\w(?:[\w.-]*\w)?"
HUB_ID = re.compile(rf"({PART}/{PART})(?:@([\w./-]+))?", re.ASCII)
FILE_ENDINGS = (".bundle", ".json", ".safetensors", ".tar", ".git")  # nobody's repository
LICENCES = tuple("".join(f"[{letter.upper()}{letter}]" for letter in name) + "*" for name in LICENCE_FILES)
SMALL_FILES = ("*.json", "*.jinja", "*.txt", "tokenizer.model", "README.md", *LICENCES)
IGNORED = (
    "*/*",  # such as onnx/ and original/: the same model once more
    *(f"*{ending}" for ending in (*PICKLES, ".py")),
)


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model's ``folder`` and where that came from; ``revision`` is the commit of a hub's repository, else empty."""

    folder: Path
    name: str
    source: str
    revision: str = ""


@dataclass(frozen=True)
class HubId:
    """A repository ``owner/name``, and the branch, tag or commit that is wanted."""

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repository + (f"@{self.revision}" if self.revision else "")


def find_model(
    model: str | Path, *, revision: str | None = None, offline: bool = False, weights: bool = True
) -> ModelSource:
    """The folder of ``model``: a path, a shipped name, or a hub id ``owner/name`` or ``owner/name@revision``.

    A repository is fetched into the hub library's own cache, at ``revision``; a download that broke off continues.
    ``offline`` takes what is there already.  Without ``weights`` all but these is fetched.

    Raises what ``find_weights`` raises; InputError for a repository or revision that is not there, not open to this
    user, or out of reach; MissingLibraryError without huggingface_hub; UnsupportedError, before any weight is
    fetched, for a family that nobody has written.
    """
    wanted = hub_id(model, revision)
    if wanted is None:
        if revision is not None:
            raise UsageError(f"{model} is no hub id, so it has no revision {revision!r}; expected owner/name")
        folder = find_weights(model)
        name = folder.resolve().name
        return ModelSource(folder=folder, name=name, source=name)
    folder = _fetch(wanted, offline, weights)
    name = wanted.repository.partition("/")[2]
    return ModelSource(folder=folder, name=name, source=wanted.repository, revision=folder.name)


def hub_id(model: str | Path, revision: str | None = None) -> HubId | None:
    """The repository that ``model`` names; None for a path, which a ``Path`` and whatever exists always is.

    Raises UsageError for two different revisions.
    """
    if isinstance(model, Path) or os.path.lexists(model) or model.endswith(FILE_ENDINGS):
        return None
    match = HUB_ID.fullmatch(model)
    if match is None or ".." in model or "--" in match[1] or len(match[1]) > MAX_ID_LETTERS:
        return None
    if revision and match[2] and revision != match[2]:
        raise UsageError(f"{model} and revision {revision!r}: give one of the two")
    return HubId(match[1], revision or match[2])


def _fetch(wanted: HubId, offline: bool, weights: bool) -> Path:
    """The snapshot's folder, whose name is the commit; weights only of a family that we have."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when the library is imported
    hub = require("huggingface_hub")
    folder = _snapshot(hub, wanted, SMALL_FILES, offline)
    if not (folder / "config.json").is_file():
        raise InputError(f"{wanted} on the hub has no config.json: it is no model, or one for another library")
    family_of(ModelFolder(folder))
    if weights:
        _snapshot(hub, HubId(wanted.repository, folder.name), listed_files(folder), offline)
        _check_weights(folder, wanted, offline)
    return folder


def _snapshot(hub: ModuleType, wanted: HubId, patterns: Sequence[str], offline: bool) -> Path:
    """The folder with the files that fit ``patterns``."""
    if not logger.isEnabledFor(logging.WARNING):
        require("huggingface_hub.utils").disable_progress_bars()
    constants = require("huggingface_hub.constants")
    with translate_disk_errors(f"the hub's cache ({constants.HF_HUB_CACHE})"):
        try:
            folder = hub.snapshot_download(
                wanted.repository,
                revision=wanted.revision,
                allow_patterns=list(patterns),
                ignore_patterns=list(IGNORED),
                local_files_only=offline,
            )
        except Exception as error:
            told = _explained(error, wanted, constants.ENDPOINT, offline or bool(constants.HF_HUB_OFFLINE))
            if told is None:
                raise
            raise told from error
    return Path(folder)


def _explained(error: Exception, wanted: HubId, address: str, offline: bool) -> EdgeVLMError | None:
    """What ``error`` means to who asked; None for one that we do not know."""
    errors, page = require("huggingface_hub.errors"), f"{address}/{wanted.repository}"
    log_in = "`hf auth login`, or HF_TOKEN in the environment"
    if isinstance(error, errors.GatedRepoError):
        return InputError(f"{wanted} is gated: accept its terms at {page}, then log in ({log_in})")
    if isinstance(error, errors.RepositoryNotFoundError):
        return InputError(
            f"{wanted} does not exist: neither a folder here nor a public repository at {address}. "
            f"Check the spelling; for a private one log in ({log_in})"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(f"{wanted.repository} has no revision {wanted.revision!r}: see {page}/tree/main")
    if isinstance(error, errors.LocalEntryNotFoundError):
        return InputError(_not_here(wanted, offline, error))
    if isinstance(error, errors.HfHubHTTPError):
        status = getattr(getattr(error, "response", None), "status_code", "no status")
        return InputError(f"{wanted}: the hub refuses ({status}): try again later, or log in ({log_in})")
    if type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "requests", "hf_xet"):
        return InputError(
            f"{wanted}: the download broke off ({_first_line(error)}): run the command again, it goes on from there"
        )
    return None


def _not_here(wanted: HubId, offline: bool, error: Exception) -> str:
    if offline:
        return (
            f"{wanted} does not exist as a folder, nor whole in the hub's cache, and this is offline (HF_HUB_OFFLINE, "
            f"or offline=True): fetch it once with `hf download {wanted.repository}`, or give a folder"
        )
    reason = _first_line(error.__cause__ or error)
    return f"{wanted} does not exist as a folder, and the hub cannot be reached ({reason}): give a folder, or go online"


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0][:200] if text else type(error).__name__


def _check_weights(folder: Path, wanted: HubId, offline: bool) -> None:
    missing = [name for name in listed_files(folder) if not (folder / name).is_file()]
    if not missing:
        return
    if offline:
        raise InputError(
            f"{wanted}: the hub's cache lacks {', '.join(missing[:5])}, and this is offline; go online once"
        )
    raise InputError(
        f"{wanted} holds no {missing[0]}; pickled weights are never fetched. Where it has a branch with safetensors "
        f"(often refs/pr/N), give that as the revision; else download it and convert it to {WEIGHTS} yourself"
    )
