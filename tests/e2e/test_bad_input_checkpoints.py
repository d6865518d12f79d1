"""Checkpoints of other makes that cannot be loaded: one line, the right code, and what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

Refused = Callable[..., str]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def shard(folder: Path) -> None:
    """Put the weights into two files with an index."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = list(tensors)
    shards = {name: f"model-{index % 2}.safetensors" for index, name in enumerate(names)}
    for file in set(shards.values()):
        save_file({name: tensors[name] for name in names if shards[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": shards}))


def lead_elsewhere(folder: Path) -> None:
    shard(folder)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["decoder.norm.weight"] = "../secret.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


def lose_a_shard(folder: Path) -> None:
    shard(folder)
    (folder / "model-1.safetensors").unlink()


def list_too_much(folder: Path) -> None:
    shard(folder)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["decoder.extra.weight"] = "model-0.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


def pickle_only(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def claim_a_huge_header(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((1 << 60).to_bytes(8, "little") + b"{}")


def leave_a_pointer(folder: Path) -> None:
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\n")


@pytest.mark.parametrize(
    ("damage", "code", "words"),
    [
        (lead_elsewhere, 7, "'../secret.safetensors'; expected a .safetensors file in the same folder"),
        (lose_a_shard, 7, "1 of 2 shards missing (model-1.safetensors)"),
        (list_too_much, 7, "1 tensors lacking: decoder.extra.weight (not in model-0.safetensors)"),
        (pickle_only, 3, ("pickled weights (pytorch_model.bin)", "python -c 'import torch")),
        (claim_a_huge_header, 7, "a header of 1,152,921,504,606,846,976 bytes in a file of 10"),
        (leave_a_pointer, 7, "run `git lfs pull`"),
    ],
)
def test_weights_that_cannot_be_read_are_told(
    tmp_path: Path,
    checkpoint: Path,
    refused: Refused,
    damage: Callable[[Path], None],
    code: int,
    words: str | tuple[str, ...],
) -> None:
    damage(checkpoint)
    refused(code, words, "export", checkpoint, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--image-size", "33"], 3, "take a multiple of"),
        (["--image-size", "0"], 2, "--image-size"),
        (["--image-fit", "squeeze"], 2, "image_fit must be one of pad, center-crop, stretch"),
        (["--image-splitting"], 3, "this model never cuts pictures into tiles"),
        (["--vision-tokens", "5"], 3, "this model always has 4"),
        (["--max-context", "4096"], 3, "this model was made for 128 at most"),
        (["--max-context", "8"], 5, "a context of 8 is too short to verify"),
        (["--revision", "main"], 2, "is no hub id, so it has no revision 'main'"),
    ],
)
def test_what_a_model_cannot_be_is_told(
    tmp_path: Path, checkpoint: Path, refused: Refused, options: list[str], code: int, words: str
) -> None:
    refused(code, words, "export", checkpoint, tmp_path / "out", *options)


def test_a_hub_id_without_a_hub_is_told(
    tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))
    offline = "does not exist as a folder, nor whole in the hub's cache, and this is offline"
    refused(2, offline, "export", "someone/nothing", tmp_path / "out")
    refused(2, offline, "export", "someone/nothing@v1", tmp_path / "out", "--offline")
    refused(3, "Did you mean 'nano'", "export", "nanu", tmp_path / "out")
