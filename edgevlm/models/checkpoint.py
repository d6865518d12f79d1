"""A checkpoint becomes a model that answers: config.json beside safetensors, nothing that could run code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from edgevlm.core.config import to_json
from edgevlm.core.errors import ConfigError, UsageError
from edgevlm.core.files import atomic_file, write_text
from edgevlm.families.detect import family_of
from edgevlm.families.folder import ModelFolder
from edgevlm.families.hub import find_model
from edgevlm.families.tensors import WEIGHTS, weight_files
from edgevlm.models.as_session import TorchSession, fusion_shape
from edgevlm.models.changes import Changes
from edgevlm.models.vlm import Vlm
from edgevlm.models.weights import load_weights
from edgevlm.processing.processor import Processor
from edgevlm.runtimes.vlm import RuntimeVlm
from edgevlm.shapes.config import VlmConfig

DTYPES: Mapping[str, torch.dtype | None] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "keep": None,
}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model with what it was trained to read: its image specification, tokenizer and chat template.

    ``source`` is the repository on the hub, or the folder's name, ``revision`` the repository's commit.
    """

    model: Vlm
    processor: Processor
    name: str
    family: str
    folder: Path
    suite: str = ""  # the evaluation suite that the model was trained for, if any
    source: str = ""
    revision: str = ""
    files: tuple[Path, ...] = ()  # of the weights
    max_context: int = 0

    def open(self) -> RuntimeVlm:
        """The PyTorch model ready to answer, like a bundle that ``open_bundle`` opens.

        Raises UsageError for one that was not loaded in float32.
        """
        config, dtype = self.model.config, self.model.embed_tokens.weight.dtype
        if dtype != torch.float32:
            raise UsageError(f"{self.name} was loaded in {dtype}; to ask it, load it in float32, the default")
        return RuntimeVlm(
            TorchSession(self.model, max_context=self.max_context or None),
            self.processor,
            name=self.name,
            max_context=self.max_context,
            fusion=fusion_shape(config),
            vocab_size=config.decoder.vocab_size,
            info={"runtime": "torch", "library": "torch", "version": torch.__version__, "device": "cpu"},
        )


def load_model(
    model: str | Path,
    *,
    revision: str | None = None,
    offline: bool = False,
    dtype: str = "float32",
    image_size: int | None = None,
    image_fit: str | None = None,
    image_splitting: bool | None = None,
    vision_tokens: int | None = None,
    max_context: int | None = None,
) -> Checkpoint:
    """The model in a folder, of a shipped name or of a hub id (``owner/name@revision``), ready to answer.

    Weights are cast to ``dtype`` (float32, float16, bfloat16), or stay as they are stored ("keep").  ``offline``
    takes a hub's model from the cache.  The other arguments change what the checkpoint says: see ``Changes``.

    Raises what ``find_model`` raises; UnsupportedError for a family that nobody has written, pickled weights or a
    change that this model cannot follow; IntegrityError for weights that are damaged or do not fit the config.
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype must be one of {', '.join(DTYPES)}; found {dtype!r}")
    changes = Changes(
        image_size=image_size,
        image_fit=image_fit,
        image_splitting=image_splitting,
        vision_tokens=vision_tokens,
        max_context=max_context,
    )
    found = find_model(model, revision=revision, offline=offline)
    folder = ModelFolder(found.folder)
    family = family_of(folder)
    config = changes.of_config(family.config(folder))
    tensors = folder.tensors
    files = weight_files(tensors.values())
    net = load_weights(config, tensors, family, DTYPES[dtype], where=str(files[0] if len(files) == 1 else folder.path))
    processor = changes.of_processor(family.processor(folder, net.config), net.config)
    check_agreement(processor, net.config, where=str(folder.path))
    return Checkpoint(
        model=net.eval(),
        processor=processor,
        name=found.name,
        family=family.name,
        folder=folder.path,
        suite=family.suite(folder),
        source=found.source,
        revision=found.revision,
        files=files,
        max_context=max_context or net.config.decoder.max_position_embeddings,
    )


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
            raise ConfigError(f"{where}: the preprocessing has {name} {found}, config.json describes {expected}")
    num_rows = processor.tokenizer.vocab_size
    if processor.image_token_id == num_rows - 1:  # it stands for rows that the encoder gives, and needs none
        num_rows -= 1
    if num_rows > config.decoder.vocab_size:
        raise ConfigError(
            f"{where}: the tokenizer has {processor.tokenizer.vocab_size} entries, the decoder only "
            f"{config.decoder.vocab_size} (rows of its embedding)"
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
