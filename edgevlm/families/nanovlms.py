"""The models of the NanoVLMs paper, which published no weights: configs to train from, and what stands beside them.

Their checkpoints are EdgeVLM's own (``model_type`` edgevlm), so no line of the registry is theirs.

Source: Agarwalla et al. 2025, arXiv:2502.07838, tables 1 and 2.  The paper states the sizes in SIZES.  The rest (MLPs
of 4 times the width, biases, an untied head, the vocabulary, 255 positions for text) is chosen so that the parameters
and their shares come out as in its tables: 5.3, 15.1 and 24.7 million.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from edgevlm.core.config import to_json
from edgevlm.core.errors import ConfigError, UnsupportedError
from edgevlm.core.files import write_text
from edgevlm.core.registry import unknown_name
from edgevlm.families.native import PROCESSOR, ProcessorFile
from edgevlm.processing.chat import ChatTemplate
from edgevlm.processing.image_spec import ImageSpec
from edgevlm.processing.processor import PromptSpec
from edgevlm.processing.tokenizer import Tokenizer
from edgevlm.shapes.config import DecoderConfig, MlpConfig, StemVitConfig, VlmConfig
from edgevlm.shapes.stem_vit import MLP_RATIO

TEXT_POSITIONS = 255
IMAGE_TOKEN = "<|image|>"
HALVES = (0.5, 0.5, 0.5)

# For a text that goes on where the user's ends; the answer ends with the tokenizer's own last token.
CONTINUATION_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{- '<|image|>' -}}{%- else -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- if message['role'] == 'assistant' -%}{{- eos_token -}}{%- endif -%}"
    "{%- endfor -%}"
)


@dataclass(frozen=True, kw_only=True)
class Size:
    """One row of the paper's table 1."""

    num_blocks: int
    num_layers: int
    num_heads: int  # of the decoder, and here of the encoder, too
    head_size: int
    image_width: int


SIZES: Mapping[str, Size] = {
    "mini": Size(num_blocks=1, num_layers=4, num_heads=8, head_size=12, image_width=400),
    "base": Size(num_blocks=3, num_layers=8, num_heads=8, head_size=16, image_width=512),
    "large": Size(num_blocks=5, num_layers=10, num_heads=16, head_size=12, image_width=512),
}


def nanovlms(
    name: Literal["mini", "base", "large"],
    *,
    vocab_size: int = 2048,
    connector: Literal["mlp4", "linear"] = "mlp4",
    stem: Literal["patch", "image"] = "patch",
    visual_tokens: Literal["cls", "all"] = "cls",
) -> VlmConfig:
    """The paper's model ``name``, to be trained on continuations: a picture, the start of a text, the rest of it.

    ``connector`` is what the paper says (linear, then GELU) or what its parameter counts say (mlp4).  Pixels are
    normalized with a mean and a deviation of 0.5.  Raises UnsupportedError for another name.
    """
    if name not in SIZES:
        raise UnsupportedError(unknown_name("NanoVLMs model", name, list(SIZES)))
    size = SIZES[name]
    vision = StemVitConfig(
        hidden_size=size.image_width,
        num_hidden_layers=size.num_blocks,
        num_attention_heads=size.num_heads,
        stem=stem,
        visual_tokens=visual_tokens,
    )
    projector = MlpConfig(num_layers=1, final_gelu=True)
    if connector == "mlp4":
        projector = MlpConfig(hidden_size=MLP_RATIO * size.image_width)
    return VlmConfig(vision=vision, projector=projector, decoder=_decoder(size, vocab_size, vision.grid_size**2))


def write_processor(folder: Path, config: VlmConfig) -> None:
    """Write processor.json and the chat template beside the tokenizer in ``folder``, as ``config`` is to be asked.

    Pictures are stretched to the encoder's square.  A prompt is the picture and a text that the answer goes on with,
    up to the tokenizer's ``eos_token``.  Raises IntegrityError without a tokenizer, ConfigError for one that lacks
    IMAGE_TOKEN or an ``eos_token``.
    """
    tokenizer, side = Tokenizer.from_folder(folder), config.vision.image_size
    end = ChatTemplate.from_folder(folder, CONTINUATION_TEMPLATE).special_tokens.get("eos_token")
    if end is None:
        raise ConfigError(f"{folder}: tokenizer_config.json names no eos_token; expected the one that ends an answer")
    tokenizer.token_id(IMAGE_TOKEN)  # raises
    image = ImageSpec(height=side, width=side, fit="stretch", filter="bicubic", mean=HALVES, std=HALVES)
    prompt = PromptSpec(
        image_token=IMAGE_TOKEN,
        num_vision_tokens=config.num_vision_tokens,
        stop_token_ids=(tokenizer.token_id(end),),
    )
    write_text(folder / "chat_template.jinja", CONTINUATION_TEMPLATE)
    write_text(folder / PROCESSOR, to_json(ProcessorFile(image=asdict(image), prompt=asdict(prompt))))


def _decoder(size: Size, vocab_size: int, num_vision_tokens: int) -> DecoderConfig:
    width = size.num_heads * size.head_size
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=MLP_RATIO * width,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_heads,
        head_dim=size.head_size,
        max_position_embeddings=TEXT_POSITIONS + num_vision_tokens,
        rms_norm_eps=1e-5,
        attention_bias=True,
        output_bias=True,
        tie_word_embeddings=False,
        norm="layer",
        mlp="gelu",
        positions="learned",
    )
