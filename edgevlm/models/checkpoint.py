"""Weights on disk: config.json beside safetensors, nothing that could run code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from edgevlm.core.config import to_json
from edgevlm.core.errors import ConfigError, InputError, IntegrityError
from edgevlm.core.files import atomic_file, write_text
from edgevlm.families.detect import family_of
from edgevlm.families.family import Family, Placement
from edgevlm.families.folder import ModelFolder
from edgevlm.models.as_session import TorchSession
from edgevlm.models.vlm import Vlm
from edgevlm.processing.processor import Processor
from edgevlm.runtimes.vlm import RuntimeVlm
from edgevlm.shapes.config import VlmConfig
from edgevlm.shipped import find_weights

WEIGHTS = "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model with what it was trained to read: its image specification, tokenizer and chat template."""

    model: Vlm
    processor: Processor
    name: str
    family: str
    folder: Path
    suite: str = ""  # the evaluation suite that the model was trained for, if any

    def open(self) -> RuntimeVlm:
        """The PyTorch model ready to answer, like a bundle that ``open_bundle`` opens."""
        max_context = self.model.config.decoder.max_position_embeddings
        return RuntimeVlm(
            TorchSession(self.model),
            self.processor,
            name=self.name,
            max_context=max_context,
            info={"runtime": "torch", "library": "torch", "version": torch.__version__, "device": "cpu"},
        )


def load_model(model: str | Path) -> Checkpoint:
    """The model in a folder, or of a shipped name, in float32 and ready to answer.

    Raises InputError when there is no such model, UnsupportedError for a family that nobody has written,
    IntegrityError for damaged weights.
    """
    folder = ModelFolder(find_weights(model))
    family = family_of(folder)
    config = family.config(folder)
    net = Vlm(config)
    weights = folder.path / WEIGHTS
    fill(net, placed(read_tensors(weights), family, config), where=str(weights))
    processor = family.processor(folder, config)
    check_agreement(processor, config, where=str(folder.path))
    return Checkpoint(
        model=net.eval(),
        processor=processor,
        name=folder.path.resolve().name,
        family=family.name,
        folder=folder.path,
        suite=family.suite(folder),
    )


def placed(tensors: Mapping[str, Tensor], family: Family, config: VlmConfig) -> dict[str, Tensor]:
    """The tensors of a checkpoint under the names of our model; unknown ones keep theirs."""
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        places = family.place(name, config)
        if places is None:
            result[name] = tensor
            continue
        result |= {where.name: changed(tensor, where) for where in places}
    return result


def changed(tensor: Tensor, where: Placement) -> Tensor:
    """``tensor`` as ``where`` wants it."""
    while where.squeeze and tensor.dim() > 1 and tensor.shape[0] == 1:
        tensor = tensor[0]
    number, total = where.part
    if total > 1:
        tensor = tensor.chunk(total)[number]
    return tensor.T if where.transpose else tensor


def check_agreement(processor: Processor, config: VlmConfig, *, where: str) -> None:
    """Raise ConfigError unless the processor feeds the model what its config describes."""
    side, image = config.vision.image_size, processor.image_spec
    facts = (
        ("image height", image.height, side),
        ("image width", image.width, side),
        ("num_vision_tokens", processor.prompt_spec.num_vision_tokens, config.num_vision_tokens),
    )
    for name, found, expected in facts:
        if found != expected:
            raise ConfigError(f"{where}: processor.json has {name} {found}, config.json describes {expected}")
    if processor.tokenizer.vocab_size > config.decoder.vocab_size:
        raise ConfigError(
            f"{where}: the tokenizer has {processor.tokenizer.vocab_size} entries, the decoder only "
            f"{config.decoder.vocab_size} (vocab_size in config.json)"
        )


def save_native(model: Vlm, folder: Path, *, dtype: torch.dtype = torch.float16) -> None:
    """Write config.json and the weights as ``dtype``."""
    write_text(folder / "config.json", to_json(model.config))
    tensors = {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in model.state_dict().items()
    }
    with atomic_file(folder / WEIGHTS) as scratch:
        save_file(tensors, scratch)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file.  Raises InputError when it is missing, IntegrityError when damaged."""
    if not path.is_file():
        raise InputError(f"{path} is missing: a model folder holds config.json and {WEIGHTS}")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise IntegrityError(f"{path} is not a readable safetensors file ({error}); fetch it again") from error


def fill(module: nn.Module, tensors: Mapping[str, Tensor], *, where: str) -> None:
    """Copy ``tensors`` into ``module``; IntegrityError names what is missing, left over or of another shape."""
    expected = module.state_dict()
    complaints = [f"missing {name}" for name in expected if name not in tensors]
    complaints += [f"unexpected {name}" for name in tensors if name not in expected]
    complaints += [
        f"{name} is {tuple(tensors[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    if complaints:
        more = f" and {len(complaints) - 5} more" if len(complaints) > 5 else ""
        raise IntegrityError(f"{where} does not fit its config.json: {'; '.join(complaints[:5])}{more}")
    module.load_state_dict(tensors)
