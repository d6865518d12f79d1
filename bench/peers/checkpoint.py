"""The weights that every engine computes with: FastVLM-0.5B's shapes, random values, and its decoder alone.

Speed does not depend on the values.  Two folders come of it, as the reference library keeps them: the whole model, and
its decoder as a Qwen2 model for engines that read text alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

IMAGE_SIZE = 512  # pixels a side: 64 vision tokens
SPECIAL = {"<|endoftext|>": 151_643, "<|im_start|>": 151_644, "<|im_end|>": 151_645, "<image>": 151_646}
NUM_TOKENS = 151_647
TEXT: Mapping[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 152_000,
    "max_position_embeddings": 32_768,
    "rope_theta": 1_000_000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": 151_643,
    "eos_token_id": 151_645,
}
VISION: Mapping[str, Any] = {
    "model_type": "timm_wrapper",
    "architecture": "fastvit_mci3",
    "model_args": {"inference_mode": True},
    "hidden_size": 3072,
    "num_classes": 0,
}
CONFIG: Mapping[str, Any] = {
    "model_type": "fast_vlm",
    "image_token_index": 151_646,
    "image_seq_length": (IMAGE_SIZE // 64) ** 2,
    "vision_config": dict(VISION),
    "text_config": dict(TEXT),
    "tie_word_embeddings": False,
}
PREPROCESSING: Mapping[str, Any] = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": IMAGE_SIZE},
    "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    "resample": 3,
    "image_mean": [0.0, 0.0, 0.0],
    "image_std": [1.0, 1.0, 1.0],
}
LANGUAGE_MODEL = "model.language_model."
WEIGHTS_FILE = "model.safetensors"
BYTES = {"F16": 2}
SENTENCES = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|im_start|>assistant\n",
    "Describe the picture. What is on the table? How many red cups are there, and what lies behind them?",
    " the a is and of in again one two three left right above below cup box ball table green blue red.",
)


def write_checkpoint(folder: Path) -> None:
    """The whole model, as the hub has it but for the values of its weights: 1.5 GB, one tensor in memory at a time."""
    shapes = {name: shape for name, shape in reference_shapes().items() if not name.endswith("num_batches_tracked")}
    folder.mkdir(parents=True, exist_ok=True)
    _write_tensors(folder / WEIGHTS_FILE, shapes, _random_tensors(shapes))
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING), encoding="utf-8")
    _write_texts(folder, CONFIG)


def write_text_model(checkpoint: Path, folder: Path) -> None:
    """The decoder of ``checkpoint`` with its own values, under the names of ``Qwen2ForCausalLM``."""
    from safetensors import safe_open

    folder.mkdir(parents=True, exist_ok=True)
    with safe_open(checkpoint / WEIGHTS_FILE, "pt") as stored:
        names = {text_name(name): name for name in stored.keys() if text_name(name)}  # noqa: SIM118 - no mapping
        shapes = {name: tuple(stored.get_slice(theirs).get_shape()) for name, theirs in names.items()}
        _write_tensors(folder / WEIGHTS_FILE, shapes, (stored.get_tensor(theirs) for theirs in names.values()))
    _write_texts(folder, {**TEXT, "architectures": ["Qwen2ForCausalLM"], "torch_dtype": "float16"})


def text_name(name: str) -> str:
    """What ``Qwen2ForCausalLM`` calls a tensor of the whole model; empty where it has none."""
    if name.startswith(LANGUAGE_MODEL):
        return f"model.{name.removeprefix(LANGUAGE_MODEL)}"
    return name if name == "lm_head.weight" else ""


def reference_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the whole model as transformers has it."""
    from bench.peers.torchvision_operators import define_missing_operators

    define_missing_operators()
    import torch
    from transformers import FastVlmConfig, FastVlmForConditionalGeneration

    config = FastVlmConfig(**{name: value for name, value in CONFIG.items() if name != "model_type"})
    with torch.device("meta"):
        model = FastVlmForConditionalGeneration(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def header_of(shapes: Mapping[str, tuple[int, ...]], dtype: str = "F16") -> bytes:
    """What a safetensors file of these tensors, in this order, begins with."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + BYTES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8, so that they can be mapped
    return len(text).to_bytes(8, "little") + text


def _write_tensors(file: Path, shapes: Mapping[str, tuple[int, ...]], tensors: Iterator[Tensor]) -> None:
    import torch

    with file.open("wb") as out:
        out.write(header_of(shapes))
        for tensor in tensors:
            out.write(tensor.to(torch.float16).contiguous().view(torch.uint8).numpy().tobytes())


def _random_tensors(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Tensor]:
    """Norms near 1 and matrices that keep the size of what they multiply, so that every tensor counts."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            yield _lifelike(name, noise * math.prod(shape[1:]) ** -0.5)
        else:
            yield _lifelike(name, noise * 0.1 + float(name.endswith("weight")))


def _lifelike(name: str, values: Tensor) -> Tensor:
    """Variances above 0, small layer scales, and mixers that leave most of what they mix as it is."""
    if name.endswith("running_var"):
        return 1.0 + values.square()
    if name.endswith("gamma"):
        return 0.1 * values
    if name.endswith(("token_mixer.reparam_conv.weight", "pos_emb.reparam_conv.weight")):
        middle = values.shape[-1] // 2
        values = 0.3 * values
        values[:, :, middle, middle] += 1.0
    return values


def _write_texts(folder: Path, config: Mapping[str, Any]) -> None:
    """config.json and a tokenizer that spells the prompts of this comparison in about as many tokens as Qwen2's."""
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "model_max_length": 32_768}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "tokenizer.json").write_text(_tokenizer(), encoding="utf-8")


def _tokenizer() -> str:
    """Byte-level BPE of ``SENTENCES``, filled up to the size of the vocabulary with words that no text spells."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=letters, min_frequency=1, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    names = {id: token for token, id in SPECIAL.items()}
    filled = {names.get(id, f"w{id}"): id for id in range(len(learned["vocab"]), NUM_TOKENS)}
    merges = [tuple(pair) for pair in learned["merges"]]
    tokenizer.model = models.BPE({**learned["vocab"], **filled}, merges)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return str(tokenizer.to_str())
