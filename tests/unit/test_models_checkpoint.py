"""Checkpoints: what is loaded is what was saved, and everything else is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgevlm.core.errors import ConfigError, InputError, IntegrityError, UnsupportedError
from edgevlm.models.checkpoint import WEIGHTS, load_model, save_native


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors by name (``__`` for a dot); None removes one."""
    tensors = load_file(folder / WEIGHTS)
    for name, tensor in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    save_file(tensors, folder / WEIGHTS)


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_saving_and_loading_keeps_every_value(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = load_model(tiny_checkpoint).model
    save_native(model, tmp_path, dtype=torch.float32)
    again = load_file(tmp_path / WEIGHTS)
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


def test_a_missing_weight_is_named(folder: Path) -> None:
    rewrite(folder, decoder__norm__weight=None)
    with pytest.raises(IntegrityError, match=r"missing decoder\.norm\.weight"):
        load_model(folder)


def test_a_misshapen_and_an_unexpected_weight_are_named(folder: Path) -> None:
    rewrite(folder, decoder__norm__weight=torch.zeros(3), extra=torch.zeros(1))
    with pytest.raises(IntegrityError, match=r"unexpected extra; decoder\.norm\.weight is \(3,\)"):
        load_model(folder)


def test_truncated_weights_are_refused(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])
    with pytest.raises(IntegrityError, match="not a readable safetensors file"):
        load_model(folder)


def test_absent_weights_are_named(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    with pytest.raises(InputError, match=r"model\.safetensors is missing"):
        load_model(folder)


def test_an_unknown_family_names_the_known_ones(folder: Path) -> None:
    edit_config(folder, model_type="edgevln")
    with pytest.raises(UnsupportedError, match="Did you mean 'edgevlm'"):
        load_model(folder)


def test_a_config_without_a_decoder_says_so(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["decoder"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="missing decoder"):
        load_model(folder)


@pytest.mark.parametrize(
    ("table", "name", "complaint"),
    [
        ("image", "height", "image height 64, config.json describes 32"),
        ("prompt", "num_vision_tokens", "num_vision_tokens 64, config.json describes 4"),
    ],
)
def test_a_processor_for_another_model_is_refused(folder: Path, table: str, name: str, complaint: str) -> None:
    processor = json.loads((folder / "processor.json").read_text())
    processor[table][name] = 64
    (folder / "processor.json").write_text(json.dumps(processor))
    with pytest.raises(ConfigError, match=complaint):
        load_model(folder)


def test_an_unknown_name_is_unsupported_and_a_missing_path_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="Did you mean 'nano'"):
        load_model("nanu")
    with pytest.raises(InputError, match="does not exist: give a checkpoint"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(InputError, match="a folder without config"):
        load_model(tmp_path)
