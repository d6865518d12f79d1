"""EdgeVLM's own checkpoints: the names of the model's modules are the names in the file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgevlm.core.config import from_mapping, read_json
from edgevlm.families.family import Family, Placement, Placements
from edgevlm.families.folder import ModelFolder
from edgevlm.processing.processor import Processor
from edgevlm.shapes.config import VlmConfig

PROCESSOR = "processor.json"


@dataclass(frozen=True, kw_only=True)
class ProcessorFile:
    """What ``processor.json`` of a native checkpoint holds."""

    image: dict[str, Any]
    prompt: dict[str, Any]
    suite: str = ""


def native_config(folder: ModelFolder) -> VlmConfig:
    """The config as ``save_native`` wrote it."""
    return from_mapping(VlmConfig, folder.config, strict=False, where=str(folder.path / "config.json"))


def native_processor(folder: ModelFolder, config: VlmConfig) -> Processor:
    """The processor as training wrote it down."""
    file = _processor_file(folder)
    return Processor.from_folder(folder.path, file.image, file.prompt)


def place(name: str, config: VlmConfig) -> Placements:
    """Where it is called the same."""
    return (Placement(name=name),)


def suite(folder: ModelFolder) -> str:
    """The suite that the model was trained for."""
    return _processor_file(folder).suite


def _processor_file(folder: ModelFolder) -> ProcessorFile:
    path = folder.path / PROCESSOR
    return from_mapping(ProcessorFile, read_json(path), strict=True, where=str(path))


FAMILY = Family(name="edgevlm", config=native_config, processor=native_processor, place=place, suite=suite)
