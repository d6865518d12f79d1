"""A trained model becomes a checkpoint that the rest of EdgeVLM loads."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from tokenizers import Tokenizer

from edgevlm.core.config import to_json
from edgevlm.core.files import write_text
from edgevlm.distill.recipe import TrainRecipe
from edgevlm.distill.vocabulary import END, IMAGE
from edgevlm.families.native import ProcessorFile
from edgevlm.models.checkpoint import save_native
from edgevlm.models.vision.reparameterize import reparameterize
from edgevlm.models.vlm import Vlm
from edgevlm.processing.image_spec import ImageSpec
from edgevlm.processing.processor import PromptSpec
from edgevlm.shapes.config import FastVitConfig, HybridConfig

PAD_COLOR = (128, 128, 128)


def publish(model: Vlm, recipe: TrainRecipe, folder: Path) -> None:
    """Make the run's folder a checkpoint: weights in inference form as float16, config and processor."""
    model = reparameterize(model)
    if isinstance(recipe.model.vision, (FastVitConfig, HybridConfig)):
        model.config = replace(recipe.model, vision=replace(recipe.model.vision, reparameterized=True))
    save_native(model, folder)
    write_text(folder / "processor.json", to_json(processor_file(recipe, folder)))


def processor_file(recipe: TrainRecipe, folder: Path) -> ProcessorFile:
    """What the model was trained to read: pictures padded to a square, and the run's own tokenizer."""
    size = recipe.model.vision.image_size
    vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    image = ImageSpec(
        height=size,
        width=size,
        fit="pad",
        filter="bicubic",
        mean=recipe.mean,
        std=recipe.std,
        pad_color=PAD_COLOR,
    )
    prompt = PromptSpec(
        image_token=IMAGE, num_vision_tokens=recipe.model.num_vision_tokens, stop_token_ids=(vocabulary[END],)
    )
    return ProcessorFile(image=asdict(image), prompt=asdict(prompt), suite=recipe.suite)
