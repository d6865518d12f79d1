"""Idefics3 and SmolVLM: a SigLIP encoder, pixel shuffle and one Linear, a Llama decoder, pictures cut into tiles.

Source: Laurençon et al. 2024, arXiv:2408.12637; Marafioti et al. 2025, arXiv:2504.05299.
"""

from __future__ import annotations

from edgevlm.core.config import from_mapping
from edgevlm.core.errors import UnsupportedError
from edgevlm.families.decoders import decoder_config, place_decoder
from edgevlm.families.encoders import place_vit, vision_config
from edgevlm.families.family import Family, Placement, Placements
from edgevlm.families.folder import ModelFolder
from edgevlm.families.reading import read_image_spec, read_stop_ids, read_template, read_tokenizer
from edgevlm.families.templates import AS_PARTS
from edgevlm.families.values import table
from edgevlm.processing.chat import ChatTemplate
from edgevlm.processing.image_spec import ImageSpec
from edgevlm.processing.processor import Processor, PromptSpec
from edgevlm.processing.split import Idefics3Tiles
from edgevlm.shapes.config import UnshuffleConfig, VitConfig, VlmConfig

IMAGE_TOKEN = "<image>"
END_OF_UTTERANCE = "<end_of_utterance>"
# What transformers leaves out of a file because its classes say so: of the encoder, and of the whole.
VISION_DEFAULTS = {"hidden_size": 1152, "num_attention_heads": 16, "image_size": 224, "patch_size": 32}
SCALE_FACTOR = 2
LONGEST_TILES = 4  # tiles along the longer side, where preprocessor_config.json says nothing
# These models sort the fractions i / n of a side into buckets in single precision.  On grids of so many patches a side
# two neighbours fall into one bucket; none of them, and none above MAX_GRID, belongs to a published model.
SHARED_POSITIONS = frozenset({19, 25, 29, 31, 38, 40, 41, 43, 47, 49, 50, 54, 55, 58, 59, 61, 62})
MAX_GRID = 64
PROJECTION = "model.connector.modality_projection.proj.weight"

TEMPLATE = (
    "<|im_start|>{% for message in messages %}"
    "{{ message['role'] | capitalize }}{{ ':' if message['content'][0]['type'] == 'image' else ': ' }}"
    "{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def config(folder: ModelFolder) -> VlmConfig:
    """The model that config.json describes.  Raises UnsupportedError for positions that no plain table holds."""
    values, where = folder.config, str(folder.path / "config.json")
    text = table(values, "text_config", where=where)
    decoder = decoder_config(
        {**text, "tie_word_embeddings": bool(values.get("tie_word_embeddings", False))},
        text.get("model_type", "llama"),
        where=f"{where}: text_config",
    )
    vision = vision_config(
        {**VISION_DEFAULTS, **table(values, "vision_config", where=where)},
        "siglip_vision_model",
        feature_layer=None,
        where=f"{where}: vision_config",
    )
    check_positions(vision, where=where)
    one_linear = {"factor": values.get("scale_factor", SCALE_FACTOR), "num_layers": 1, "bias": False}
    projector = from_mapping(UnshuffleConfig, one_linear, strict=True, where=f"{where}: scale_factor")
    model_type = str(values.get("model_type", "idefics3"))
    return VlmConfig(vision=vision, projector=projector, decoder=decoder, model_type=model_type)


def check_positions(vision: VitConfig, *, where: str) -> None:
    """Raise UnsupportedError unless the patches of a full tile read the positions 0, 1, 2, … of the table."""
    side = vision.grid_size
    if side in SHARED_POSITIONS or side > MAX_GRID:
        raise UnsupportedError(
            f"{where}: a grid of {side}x{side} patches, on which neighbours share a position in the original; "
            f"expected one such as 26x26 or 32x32"
        )


def processor(folder: ModelFolder, config: VlmConfig) -> Processor:
    """Tiles and prompts as the checkpoint's files say, else as SmolVLM was trained."""
    tokenizer = read_tokenizer(folder, placeholder=IMAGE_TOKEN)
    template = read_template(folder, TEMPLATE)
    return Processor(
        image_spec=tiles(folder, config),
        prompt_spec=PromptSpec(
            image_token=IMAGE_TOKEN,
            num_vision_tokens=config.num_vision_tokens,
            stop_token_ids=read_stop_ids(folder, tokenizer, known=(END_OF_UTTERANCE,)),
            layout="idefics3",
        ),
        tokenizer=tokenizer,
        template=ChatTemplate(AS_PARTS + template.source, template.special_tokens),
    )


def tiles(folder: ModelFolder, config: VlmConfig) -> ImageSpec:
    """How pictures are cut: as preprocessor_config.json says, else into LONGEST_TILES a side at most."""
    side = config.vision.image_size
    default = ImageSpec(
        height=side,
        width=side,
        fit="stretch",
        filter="lanczos",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        split=Idefics3Tiles(longest_edge=LONGEST_TILES * side),
    )
    return read_image_spec(folder, default=default)


def place(name: str, config: VlmConfig) -> Placements | None:
    """Where a tensor of ``Idefics3ForConditionalGeneration`` or ``SmolVLMForConditionalGeneration`` goes."""
    if name == PROJECTION:
        return (Placement(name="projector.1.weight"),)
    assert isinstance(config.vision, VitConfig)
    vision = place_vit(name, prefix="model.vision_model.", config=config.vision)
    return place_decoder(name, prefix="model.text_model.") if vision is None else vision


FAMILY = Family(name="idefics3", config=config, processor=processor, place=place, tiles=tiles)
