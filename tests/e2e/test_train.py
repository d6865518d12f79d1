"""``edgevlm train``: a run that is stopped and resumed equals one that never stopped; its folder exports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from edgevlm.cli.app import app
from edgevlm.core.config import from_recipe
from edgevlm.distill import trainer
from edgevlm.distill.recipe import TrainRecipe
from edgevlm.models.checkpoint import load_model

RECIPE = """
name = "tiny"
log_every = 1
save_every = 2

[model.vision]
type = "hybrid"
image_size = 32
widths = [16, 32]
depths = [1, 1]

[model.projector]
type = "pool"
factor = 2

[model.decoder]
vocab_size = 512
hidden_size = 64
intermediate_size = 64
num_hidden_layers = 1
num_attention_heads = 1
num_key_value_heads = 1
head_dim = 64
max_position_embeddings = 256

[data]
num_scenes = 16

[optimization]
steps = 4
batch_images = 4
warmup_steps = 1
decay_steps = 1
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


def train(recipe: Path, folder: Path) -> None:
    cache = recipe.parent / "cache"
    result = CliRunner().invoke(app, ["train", str(recipe), str(folder), "--cache", str(cache)])
    assert result.exit_code == 0, result.stderr


def test_a_resumed_run_equals_an_uninterrupted_one(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(recipe, tmp_path / "whole")

    class PowerError(Exception):
        """As if the power went."""

    def die(run: trainer.Run, *_: object) -> None:
        if run.step == 3:
            raise PowerError

    plan = from_recipe(TrainRecipe, recipe)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_log", die)
        with pytest.raises(PowerError):
            trainer.train(plan, tmp_path / "cut", recipe.parent / "cache", report=lambda _: None)
    train(recipe, tmp_path / "cut")
    whole, cut = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


RANK = """
import os, sys
from pathlib import Path
from safetensors.torch import save_file
from edgevlm.core.config import from_recipe
from edgevlm.distill.recipe import TrainRecipe
from edgevlm.distill.trainer import train

if __name__ == "__main__":
    folder = Path(sys.argv[2])
    model = train(from_recipe(TrainRecipe, Path(sys.argv[1])), folder, folder / "cache", report=lambda _: None)
    weights = {name: tensor.detach().contiguous() for name, tensor in model.named_parameters()}
    save_file(weights, folder / f"rank{os.environ['RANK']}.safetensors")
"""


def test_two_processes_end_with_the_same_weights(recipe: Path, tmp_path: Path) -> None:
    """They see different pictures, so without shared gradients they would part at the first step."""
    (tmp_path / "rank.py").write_text(RANK)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, str(tmp_path / "rank.py"), str(recipe), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, second = (load_file(tmp_path / "run" / f"rank{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_is_not_resumed_with_another_recipe(recipe: Path, tmp_path: Path) -> None:
    train(recipe, tmp_path / "run")
    recipe.write_text(RECIPE.replace("batch_images = 4", "batch_images = 8"))
    result = CliRunner().invoke(app, ["train", str(recipe), str(tmp_path / "run")])
    assert result.exit_code == 2
    assert "holds a run with another optimization" in result.stderr


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("num_scenes = 16", "num_scenes = 2"), "batch_images (4) exceeds num_scenes (2)"),
        (("num_scenes = 16", "num_scenes = 16\nseed = 2"), "names scenes that scores are taken on"),
        (("vocab_size = 512", "vocab_size = 100"), "vocab_size must be at least 261"),
        (("max_position_embeddings = 256", "max_position_embeddings = 32"), "of text"),
        (("log_every = 1", "log_every = 0"), "log_every must be at least 1"),
        (("log_every = 1", 'suite = "scnes"'), "Did you mean 'scenes'"),
        (("warmup_steps = 1", "warmup_steps = -1"), "cannot be negative"),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else "",
)
def test_a_recipe_that_cannot_work_is_refused_at_once(
    recipe: Path, tmp_path: Path, change: tuple[str, str], complaint: str
) -> None:
    recipe.write_text(RECIPE.replace(*change))
    result = CliRunner().invoke(app, ["train", str(recipe), str(tmp_path / "run")])
    assert result.exit_code == 2
    assert complaint in result.stderr
    assert not (tmp_path / "run").exists()


def test_the_folder_of_a_run_is_a_checkpoint_in_inference_form(recipe: Path, tmp_path: Path) -> None:
    train(recipe, tmp_path / "run")
    checkpoint = load_model(tmp_path / "run")
    assert checkpoint.suite == "scenes"
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in checkpoint.model.modules())


def test_an_unknown_key_of_a_recipe_is_named(recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(RECIPE.replace("batch_images", "batch_size"))
    result = CliRunner().invoke(app, ["train", str(recipe), str(tmp_path / "run")])
    assert result.exit_code == 2
    assert "no key named 'batch_size'" in result.stderr
