"""A training run, in memory and in its folder.

``checkpoint.safetensors`` holds the weights, both AdamW moments and the step that they belong to; it is replaced as a
whole, so a run that is killed goes on from the last one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from edgevlm.core.files import atomic_file
from edgevlm.distill.data import Encode
from edgevlm.distill.facts import FactsHead
from edgevlm.distill.recipe import TrainRecipe
from edgevlm.models.vlm import Vlm

CHECKPOINT = "checkpoint.safetensors"
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


def save(run: Run, folder: Path) -> None:
    """Write weights and optimizer moments, then the step that they belong to, in one file each."""
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
