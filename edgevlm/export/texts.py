"""What a bundle holds beside its graphs: tokenizer, template, configs and the licence."""

from __future__ import annotations

import shutil
from pathlib import Path

from edgevlm.core.config import read_text, to_json
from edgevlm.core.errors import EdgeVLMError
from edgevlm.core.files import write_text
from edgevlm.families.licence import Licence
from edgevlm.models.checkpoint import Checkpoint
from edgevlm.processing.hub_config import preprocessor_config
from edgevlm.processing.processor import Processor
from edgevlm.processing.tokenizer import Tokenizer

COPIED = ("config.json", "tokenizer_config.json", "generation_config.json")
TOKENIZER, TEMPLATE, TOKENIZER_CONFIG = "tokenizer.json", "chat_template.jinja", "tokenizer_config.json"


def write_texts(checkpoint: Checkpoint, root: Path, licence: Licence | None) -> None:
    """Write what the checkpoint's processor works with, in the names and formats of the hub.

    A file that already says so is copied byte by byte.
    """
    folder, processor = checkpoint.folder, checkpoint.processor
    for name in (*COPIED, *(licence.files if licence else ())):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, root / name)
    _write_tokenizer(folder, processor.tokenizer, root)
    _write_template(folder, processor, root)
    write_text(root / "preprocessor_config.json", to_json(preprocessor_config(processor.image_spec)))


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
    if not (root / TOKENIZER_CONFIG).exists() and template.special_tokens:
        write_text(root / TOKENIZER_CONFIG, to_json(template.special_tokens))
