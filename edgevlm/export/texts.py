"""What a bundle holds beside its graphs: tokenizer, template, configs and the licence."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgevlm.bundle.manifest import PartFile
from edgevlm.core.config import read_text, to_json
from edgevlm.core.errors import EdgeVLMError
from edgevlm.core.files import write_text
from edgevlm.export import hub_files
from edgevlm.families.folder import ModelFolder
from edgevlm.families.licence import Licence
from edgevlm.models.checkpoint import Checkpoint
from edgevlm.processing.processor import Processor
from edgevlm.processing.tokenizer import Tokenizer
from edgevlm.shapes.config import VlmConfig

TOKENIZER, TEMPLATE = "tokenizer.json", "chat_template.jinja"


def write_texts(checkpoint: Checkpoint, root: Path, licence: Licence | None, parts: Sequence[PartFile] = ()) -> None:
    """Write what the checkpoint's processor works with, in the names and formats of the hub.

    ``parts`` are the graphs of the bundle, which config.json names for transformers.js.
    """
    source = ModelFolder(checkpoint.folder)
    write_folder_texts(source, checkpoint.model.config, checkpoint.processor, root, parts)
    copy_licence(checkpoint.folder, root, licence)


def write_folder_texts(
    source: ModelFolder, config: VlmConfig, processor: Processor, root: Path, parts: Sequence[PartFile]
) -> None:
    """The same from the files in ``source``; a tokenizer or template that already is the processor's stays as it is."""
    _write_tokenizer(source.path, processor.tokenizer, root)
    _write_template(source.path, processor, root)
    for name, values in hub_tables(source, config, processor, parts).items():
        write_text(root / name, to_json(values))


def copy_licence(folder: Path, root: Path, licence: Licence | None) -> None:
    """The files in which the licence stands."""
    for name in licence.files if licence else ():
        if (folder / name).is_file():
            shutil.copyfile(folder / name, root / name)


def hub_tables(
    folder: ModelFolder, config: VlmConfig, processor: Processor, parts: Sequence[PartFile]
) -> dict[str, dict[str, Any]]:
    """The content of every JSON file that hubs put beside a model, by its name.

    A model that transformers.js has no class for keeps its own config.json.
    """
    web = hub_files.web_model(config, processor)
    tables = {
        "tokenizer_config.json": hub_files.tokenizer_json(folder.json("tokenizer_config.json"), processor),
        "generation_config.json": hub_files.generation_json(folder.json("generation_config.json"), processor),
        "preprocessor_config.json": hub_files.preprocessor_json(processor, web),
    }
    if web is None:
        return {**tables, "config.json": dict(folder.config)}
    return {
        **tables,
        "config.json": hub_files.config_json(folder.config, config, processor, web, parts),
        "processor_config.json": hub_files.processor_json(processor, web),
    }


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, root: Path) -> None:
    """A placeholder that was added, or a vocabulary in another format, is not in the checkpoint's own file."""
    if (folder / TOKENIZER).is_file() and _is_same(folder, tokenizer):
        shutil.copyfile(folder / TOKENIZER, root / TOKENIZER)
    else:
        tokenizer.save(root / TOKENIZER)


def _is_same(folder: Path, tokenizer: Tokenizer) -> bool:
    try:
        stored = Tokenizer.from_folder(folder)
    except EdgeVLMError:
        return False
    return (stored.vocab_size, stored.added_tokens) == (tokenizer.vocab_size, tokenizer.added_tokens)


def _write_template(folder: Path, processor: Processor, root: Path) -> None:
    template, path = processor.template, folder / TEMPLATE
    if path.is_file() and read_text(path) == template.source:
        shutil.copyfile(path, root / TEMPLATE)
    else:
        write_text(root / TEMPLATE, template.source)
