"""A training run, in memory and in its folder.

``checkpoint.safetensors`` holds the weights, both AdamW moments and the step that they belong to; it is replaced as a
whole, so a run that is killed goes on from the last one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from edgevlm.core.config import read_json, to_json
from edgevlm.core.errors import ConfigError
from edgevlm.core.files import atomic_file, write_text
from edgevlm.distill.data import Encode
from edgevlm.distill.facts import FactsHead
from edgevlm.distill.recipe import TrainRecipe
from edgevlm.models.vlm import Vlm

CHECKPOINT = "checkpoint.safetensors"
RECIPE = "recipe.json"
LEARNED = ("seed", "mean", "std", "model", "data", "optimization")  # what the weights depend on
MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW remembers of each parameter


@dataclass
class Run:
    """Everything that changes while a model learns."""

    recipe: TrainRecipe
    model: Vlm
    facts: FactsHead
    optimizer: torch.optim.AdamW
    encode: Encode
    pictures: NDArray[np.uint8]
    rank: int = 0
    world: int = 1
    step: int = 0

    def parameters(self) -> list[torch.nn.Parameter]:
        """All that the optimizer moves, in the order that a checkpoint numbers them."""
        return [*self.model.parameters(), *self.facts.parameters()]


def keep_recipe(recipe: TrainRecipe, folder: Path) -> None:
    """Note in ``folder`` what is trained there.  Raises ConfigError when that is another recipe.

    Only the length of the run may change: everything else would make the steps before and after two models.
    """
    path, now = folder / RECIPE, json.loads(to_json(recipe))
    if path.exists():
        before = read_json(path)
        changed = [name for name in LEARNED if _without_length(now[name]) != _without_length(before.get(name))]
        if changed:
            raise ConfigError(
                f"{folder} holds a run with another {', '.join(changed)}: take a new folder, or the recipe in {path}"
            )
    write_text(path, to_json(recipe))


def _without_length(value: object) -> object:
    if not isinstance(value, dict):
        return value
    return {name: part for name, part in value.items() if name not in ("steps", "decay_steps")}


def save(run: Run, folder: Path) -> None:
    """Write weights, optimizer moments and the step that they belong to."""
    tensors = {f"model.{name}": tensor for name, tensor in run.model.state_dict().items()}
    tensors |= {f"facts.{name}": tensor for name, tensor in run.facts.state_dict().items()}
    for index, parameter in enumerate(run.parameters()):
        for name in MOMENTS:
            tensors[f"optimizer.{index}.{name}"] = run.optimizer.state[parameter][name]
    with atomic_file(folder / CHECKPOINT) as scratch:
        save_file(
            {name: tensor.detach().contiguous() for name, tensor in tensors.items()},
            scratch,
            metadata={"step": str(run.step)},
        )


def resume(run: Run, folder: Path) -> None:
    """Continue from the folder's checkpoint, if there is one."""
    path = folder / CHECKPOINT
    if not path.exists():
        return
    tensors = load_file(path)
    run.model.load_state_dict({name[6:]: tensor for name, tensor in tensors.items() if name.startswith("model.")})
    run.facts.load_state_dict({name[6:]: tensor for name, tensor in tensors.items() if name.startswith("facts.")})
    run.step = _saved_step(path)
    for index, parameter in enumerate(run.parameters()):
        moments = {name: tensors[f"optimizer.{index}.{name}"] for name in MOMENTS}
        layout = {name: torch.empty_like(parameter).copy_(tensor) for name, tensor in moments.items()}
        run.optimizer.state[parameter] = {"step": torch.tensor(float(run.step)), **layout}


def _saved_step(path: Path) -> int:
    with safe_open(str(path), "pt") as file:
        return int(file.metadata()["step"])
