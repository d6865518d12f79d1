"""nanoVLM (github.com/huggingface/nanoVLM): SigLIP, pixel shuffle and one Linear, SmolLM2, in names of its own.

config.json is one flat table without ``model_type``, and its later keys tell how a picture enters the prompt:

    222M   nothing                       the vision tokens come before the text, which has no placeholder
    450M   vlm_extra_tokens              a placeholder in the text
    460M   max_img_size as well          tiles, each behind a token that names its place
           lm_chat_template              ChatML instead of "Question: … Answer:"
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from edgevlm.core.config import from_mapping
from edgevlm.core.errors import ConfigError, InputError, UnsupportedError
from edgevlm.families.family import NOT_NEEDED, Family, Placement, Placements, thirds
from edgevlm.families.folder import ModelFolder
from edgevlm.families.hub import HUB_ID
from edgevlm.families.reading import read_stop_ids, read_tokenizer
from edgevlm.families.templates import AS_PARTS
from edgevlm.processing.chat import ChatTemplate
from edgevlm.processing.image_spec import ImageSpec
from edgevlm.processing.processor import Processor, PromptSpec
from edgevlm.processing.split import NanoVlmTiles
from edgevlm.processing.tokenizer import Tokenizer
from edgevlm.shapes.checks import check_heads, check_positive
from edgevlm.shapes.config import DecoderConfig, UnshuffleConfig, VitConfig, VlmConfig

IMAGE_TOKEN = "<|image|>"
GLOBAL_TOKEN = "<|global_image|>"
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")  # either will do

# Pictures first, wherever the messages have them: the oldest models know no other place.
QUESTION = AS_PARTS + (
    "{% for message in messages %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<|image|>{% endfor %}"
    "{% endfor %}"
    "{% for message in messages %}"
    "{% set text = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join %}"
    "{{ 'Question: ' + text + ' Answer:' if message['role'] == 'user' else ' ' + text + '\n' }}"
    "{% endfor %}"
)
# nanoVLM's own templates add strings, in which its code has written the placeholders already.
AS_TEXT = AS_PARTS + (
    "{% set spoken = namespace(turns=[]) %}{% for message in messages %}"
    "{% set text %}{% for part in message['content'] %}"
    "{{ '<|image|>' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}{% endset %}"
    "{% set spoken.turns = spoken.turns + [{'role': message['role'], 'content': text}] %}"
    "{% endfor %}{% set messages = spoken.turns %}"
)

# Inside ``vision_encoder.`` and ``decoder.``; N is a block's number.
RENAMED: Mapping[str, str] = {
    "vision_encoder.patch_embedding.conv": "vision_encoder.patch_embedding",
    "vision_encoder.blocks.N.ln1": "vision_encoder.layers.N.layer_norm1",
    "vision_encoder.blocks.N.ln2": "vision_encoder.layers.N.layer_norm2",
    "vision_encoder.blocks.N.attn.out_proj": "vision_encoder.layers.N.self_attn.out_proj",
    "vision_encoder.blocks.N.mlp.fc1": "vision_encoder.layers.N.fc1",
    "vision_encoder.blocks.N.mlp.fc2": "vision_encoder.layers.N.fc2",
    "vision_encoder.layer_norm": "vision_encoder.post_layernorm",
    "MP.proj": "projector.1",
    "decoder.blocks.N.norm1": "decoder.layers.N.input_layernorm",
    "decoder.blocks.N.norm2": "decoder.layers.N.post_attention_layernorm",
    "decoder.blocks.N.attn.q_proj": "decoder.layers.N.self_attn.q_proj",
    "decoder.blocks.N.attn.k_proj": "decoder.layers.N.self_attn.k_proj",
    "decoder.blocks.N.attn.v_proj": "decoder.layers.N.self_attn.v_proj",
    "decoder.blocks.N.attn.out_proj": "decoder.layers.N.self_attn.o_proj",
    "decoder.blocks.N.mlp.gate_proj": "decoder.layers.N.mlp.gate_proj",
    "decoder.blocks.N.mlp.up_proj": "decoder.layers.N.mlp.up_proj",
    "decoder.blocks.N.mlp.down_proj": "decoder.layers.N.mlp.down_proj",
    "decoder.norm": "decoder.norm",
    "decoder.token_embedding": "embed_tokens",
    "decoder.head": "lm_head",
}
FUSED = "vision_encoder.blocks.N.attn.qkv_proj"
POSITIONS = "vision_encoder.patch_embedding.position_embedding"
BLOCK = re.compile(r"(?<=\.blocks\.)\d+(?=\.)")


@dataclass(frozen=True, kw_only=True)
class NanoVlmFile:
    """What config.json of a nanoVLM checkpoint says, as far as it matters."""

    vit_hidden_dim: int
    vit_inter_dim: int
    vit_patch_size: int
    vit_img_size: int
    vit_n_heads: int
    vit_n_blocks: int
    vit_ln_eps: float = 1e-6
    vit_cls_flag: bool = False
    lm_hidden_dim: int
    lm_inter_dim: int
    lm_rms_eps: float
    lm_re_base: float
    lm_max_position_embeddings: int
    lm_vocab_size: int
    lm_n_heads: int
    lm_n_kv_heads: int
    lm_n_blocks: int
    lm_attn_scaling: float = 1.0
    lm_tie_weights: bool = True
    lm_tokenizer: str = ""
    lm_base_vocab_size: int = 0
    lm_eos_token_id: int | None = None
    lm_chat_template: str | None = None
    mp_pixel_shuffle_factor: int
    mp_image_token_length: int | None = None
    max_img_size: int | None = None
    resize_to_max_side_len: bool = False
    vlm_extra_tokens: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_positive(self, "lm_n_heads", "lm_hidden_dim")
        check_heads(self, self.lm_hidden_dim, self.lm_n_heads)
        if self.vit_cls_flag:
            raise UnsupportedError("vit_cls_flag is true; a picture that is its class token alone is not supported")
        if self.lm_attn_scaling != 1.0:
            raise UnsupportedError(f"lm_attn_scaling is {self.lm_attn_scaling}; expected 1.0, plain rotary positions")
        if self.has_tiles and self.vlm_extra_tokens.get("global_image_token") != GLOBAL_TOKEN:
            raise UnsupportedError(f"tiles without the token {GLOBAL_TOKEN!r} for the whole picture are not supported")

    @property
    def has_tiles(self) -> bool:
        """Whether pictures are cut into tiles."""
        return self.max_img_size is not None and bool(self.vlm_extra_tokens)


def config(folder: ModelFolder) -> VlmConfig:
    """The model that config.json describes.  Raises UnsupportedError for settings that no published model has."""
    file = _file(folder)
    vision = VitConfig(
        image_size=file.vit_img_size,
        patch_size=file.vit_patch_size,
        hidden_size=file.vit_hidden_dim,
        intermediate_size=file.vit_inter_dim,
        num_hidden_layers=file.vit_n_blocks,
        num_attention_heads=file.vit_n_heads,
        layer_norm_eps=file.vit_ln_eps,
    )
    decoder = DecoderConfig(
        vocab_size=file.lm_vocab_size,
        hidden_size=file.lm_hidden_dim,
        intermediate_size=file.lm_inter_dim,
        num_hidden_layers=file.lm_n_blocks,
        num_attention_heads=file.lm_n_heads,
        num_key_value_heads=file.lm_n_kv_heads,
        head_dim=file.lm_hidden_dim // file.lm_n_heads,
        max_position_embeddings=file.lm_max_position_embeddings,
        rms_norm_eps=file.lm_rms_eps,
        rope_theta=file.lm_re_base,
        tie_word_embeddings=file.lm_tie_weights,
    )
    projector = UnshuffleConfig(factor=file.mp_pixel_shuffle_factor, num_layers=1, bias=False)
    config = VlmConfig(vision=vision, projector=projector, decoder=decoder, model_type="nanovlm")
    if file.mp_image_token_length not in (None, config.num_vision_tokens):
        raise ConfigError(
            f"{folder.path / 'config.json'}: mp_image_token_length is {file.mp_image_token_length}, "
            f"but its encoder and pixel shuffle give {config.num_vision_tokens}"
        )
    return config


def processor(folder: ModelFolder, config: VlmConfig) -> Processor:
    """Pixels from 0 to 1, without mean and deviation, and the prompt that the config's keys imply.

    Raises InputError when nobody has put the tokenizer's files beside the weights.
    """
    file = _file(folder)
    tokenizer = _tokenizer(folder, file)
    return Processor(
        image_spec=tiles(folder, config),
        prompt_spec=PromptSpec(
            image_token=IMAGE_TOKEN,
            num_vision_tokens=config.num_vision_tokens,
            stop_token_ids=_stop_ids(folder, file, tokenizer),
            layout="nanovlm" if file.has_tiles else "plain",
        ),
        tokenizer=tokenizer,
        template=ChatTemplate(AS_TEXT + file.lm_chat_template if file.lm_chat_template else QUESTION),
    )


def tiles(folder: ModelFolder, config: VlmConfig) -> ImageSpec:
    """A square that gives up the proportions, or bicubic tiles of one."""
    file, side = _file(folder), config.vision.image_size
    if not file.has_tiles:
        return ImageSpec(height=side, width=side, fit="stretch", filter="bilinear")
    assert file.max_img_size is not None
    split = NanoVlmTiles(longest_edge=file.max_img_size, enlarge=file.resize_to_max_side_len)
    return ImageSpec(height=side, width=side, fit="stretch", filter="bicubic", split=split)


def place(name: str, config: VlmConfig) -> Placements | None:
    """Where a tensor goes; of a tied pair a file mostly holds the head alone."""
    if name == "decoder.rotary_embd.inv_freq":  # follows from lm_re_base
        return NOT_NEEDED
    if name == POSITIONS:
        return (Placement(name="vision_encoder.position_embedding", squeeze=True),)
    module, _, kind = name.rpartition(".")
    number = BLOCK.search(module)
    general = BLOCK.sub("N", module, count=1)
    if general == FUSED and number:
        inside = f"vision_encoder.layers.{number[0]}.self_attn"
        return thirds(inside, kind)
    if general not in RENAMED:
        return None
    renamed = RENAMED[general].replace(".N.", f".{number[0]}." if number else ".N.")
    return (Placement(name=f"{renamed}.{kind}"),)


def _file(folder: ModelFolder) -> NanoVlmFile:
    return from_mapping(NanoVlmFile, folder.config, strict=False, where=str(folder.path / "config.json"))


def _tokenizer(folder: ModelFolder, file: NanoVlmFile) -> Tokenizer:
    """The language model's tokenizer with nanoVLM's tokens behind its own, in the order of the config."""
    if not any(map(folder.has, TOKENIZER_FILES)):
        raise InputError(
            f"{folder.path} holds no tokenizer, nanoVLM saves none: put tokenizer.json and tokenizer_config.json of "
            f"{_whose(file)} beside config.json{_how_to_fetch(file, folder)}"
        )
    if not file.vlm_extra_tokens:
        return read_tokenizer(folder, placeholder=IMAGE_TOKEN)
    tokens = tuple(file.vlm_extra_tokens.values())
    tokenizer = read_tokenizer(folder, placeholder=tokens[0]).with_special(*tokens[1:])
    _check_ids(tokenizer, tokens, file, where=str(folder.path))
    return tokenizer


def _stop_ids(folder: ModelFolder, file: NanoVlmFile, tokenizer: Tokenizer) -> tuple[int, ...]:
    """What the tokenizer's files say, and what the oldest configs said."""
    if file.lm_eos_token_id is None:
        return read_stop_ids(folder, tokenizer)
    with suppress(ConfigError):
        return tuple(dict.fromkeys((*read_stop_ids(folder, tokenizer), file.lm_eos_token_id)))
    return (file.lm_eos_token_id,)


def _check_ids(tokenizer: Tokenizer, tokens: tuple[str, ...], file: NanoVlmFile, *, where: str) -> None:
    """Raise ConfigError unless the extra tokens have the rows of the embedding that were trained for them."""
    if IMAGE_TOKEN not in tokens:
        raise UnsupportedError(f"{where}: vlm_extra_tokens has no {IMAGE_TOKEN!r}")
    first = file.lm_base_vocab_size or file.lm_vocab_size - len(tokens)
    for id, token in enumerate(tokens, start=first):
        if (found := tokenizer.token_id(token)) != id:
            raise ConfigError(
                f"{where}: {token!r} gets id {found}, config.json implies {id}; "
                f"the tokenizer must be that of {_whose(file)}"
            )


def _whose(file: NanoVlmFile) -> str:
    """The repository that the tokenizer is from; whatever else stands there, without what a terminal obeys."""
    if not file.lm_tokenizer:
        return "its language model"
    return file.lm_tokenizer if HUB_ID.fullmatch(file.lm_tokenizer) else repr(file.lm_tokenizer)


def _how_to_fetch(file: NanoVlmFile, folder: ModelFolder) -> str:
    """A command for the user's shell, so only for what can be a repository."""
    if not HUB_ID.fullmatch(file.lm_tokenizer):
        return ""
    names = "tokenizer.json tokenizer_config.json"
    return f", as `hf download {file.lm_tokenizer} {names} --local-dir {shlex.quote(str(folder.path))}` does"


FAMILY = Family(name="nanovlm", config=config, processor=processor, place=place, tiles=tiles)
