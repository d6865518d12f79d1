"""Foreign checkpoints with CLIP become bundles that pass the gate and answer: LLaVA, and Matryoshka queries."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import edgevlm
from edgevlm.bundle.read import read_bundle
from edgevlm.families.card import bundle_card

IDS = {"<s>": 256, "</s>": 257}
CLIP = {
    "model_type": "clip_vision_model",
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 272,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 257,
}
TOWER = "model.vision_tower.vision_tower.vision_model."


def shapes_of_clip(prefix: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the encoder, its second block included, which LLaVA does not use."""
    C, inner = 64, 96
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.class_embedding": (C,),
        "embeddings.patch_embedding.weight": (C, 3, 8, 8),
        "embeddings.position_embedding.weight": (17, C),
    }
    squares = {f"self_attn.{name}_proj": (C, C) for name in ("q", "k", "v", "out")}
    matrices = {**squares, "mlp.fc1": (inner, C), "mlp.fc2": (C, inner)}
    for layer in range(2):
        start = f"encoder.layers.{layer}."
        shapes |= {f"{start}{name}.weight": shape for name, shape in matrices.items()}
        shapes |= {f"{start}{name}.bias": shape[:1] for name, shape in matrices.items()}
        shapes |= {f"{start}layer_norm{n}.{kind}": (C,) for n in (1, 2) for kind in ("weight", "bias")}
    shapes |= {f"{name}.{kind}": (C,) for name in ("pre_layrnorm", "post_layernorm") for kind in ("weight", "bias")}
    return {prefix + name: shape for name, shape in shapes.items()}


def shapes_of_llama(prefix: str, head: str) -> dict[str, tuple[int, ...]]:
    D, inner, key = 48, 96, 24
    matrices = {"self_attn.q_proj": (D, D), "self_attn.k_proj": (key, D), "self_attn.v_proj": (key, D)}
    matrices |= {"self_attn.o_proj": (D, D), "mlp.gate_proj": (inner, D), "mlp.up_proj": (inner, D)}
    matrices |= {"mlp.down_proj": (D, inner)}
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}embed_tokens.weight": (272, D), f"{prefix}norm.weight": (D,)}
    for layer in range(2):
        start = f"{prefix}layers.{layer}."
        shapes |= {f"{start}{name}.weight": shape for name, shape in matrices.items()}
        shapes |= {f"{start}{name}.weight": (D,) for name in ("input_layernorm", "post_attention_layernorm")}
    return {**shapes, head: (272, D)}


def shapes_of_queries(prefix: str) -> dict[str, tuple[int, ...]]:
    C = 64
    shapes: dict[str, tuple[int, ...]] = {"query": (256, C), "pos_embed": (256, C), "proj": (C, 48)}
    shapes |= {"attn.in_proj_weight": (3 * C, C), "attn.in_proj_bias": (3 * C,)}
    shapes |= {"attn.out_proj.weight": (C, C), "attn.out_proj.bias": (C,)}
    shapes |= {f"{name}.{kind}": (C,) for name in ("ln_q", "ln_k", "ln_v") for kind in ("weight", "bias")}
    return {prefix + name: shape for name, shape in shapes.items()}


def random_tensors(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Weights of ordinary size: matrices keep the scale of what they map, norms and biases are not trivial."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        is_norm = "norm" in name and name.endswith("weight")
        tensors[name] = noise[0].numel() ** -0.5 * noise if len(shape) > 1 else is_norm + 0.2 * noise
    return tensors


def llava(folder: Path) -> None:
    """As llava-hf's files are: names of transformers 4, in two shards with an index."""
    linears = {"linear_1.weight": (48, 64), "linear_1.bias": (48,), "linear_2.weight": (48, 48), "linear_2.bias": (48,)}
    shapes = shapes_of_clip("vision_tower.vision_model.")
    shapes |= {f"multi_modal_projector.{name}": shape for name, shape in linears.items()}
    shapes |= shapes_of_llama("language_model.model.", "language_model.lm_head.weight")
    tensors = list(random_tensors(shapes).items())
    index = {}
    for number, part in enumerate((tensors[:20], tensors[20:]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file(dict(part), folder / file)
        index |= {name: file for name, _ in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config = {"model_type": "llava", "vision_config": CLIP, "text_config": LLAMA, "vision_feature_layer": -2}
    (folder / "config.json").write_text(json.dumps(config))


def llava_next(folder: Path) -> None:
    """One tile, and the row behind it."""
    llava(folder)
    save_file({"image_newline": torch.linspace(-1, 1, 48)}, folder / "newline.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["image_newline"] = "newline.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "llava_next"}))


def llava_original(folder: Path) -> None:
    """As the first authors' code writes it, the encoder among the weights."""
    linears = {"0.weight": (48, 64), "0.bias": (48,), "2.weight": (48, 48), "2.bias": (48,)}
    shapes = shapes_of_clip(TOWER) | {f"model.mm_projector.{name}": shape for name, shape in linears.items()}
    save_file(random_tensors(shapes | shapes_of_llama("model.", "lm_head.weight")), folder / "model.safetensors")
    (folder / "tiny-clip").mkdir()
    (folder / "tiny-clip" / "config.json").write_text(json.dumps(CLIP))
    extra = {"model_type": "llava_llama", "mm_vision_tower": "tiny-clip", "mm_projector_type": "mlp2x_gelu"}
    (folder / "config.json").write_text(json.dumps({**LLAMA, **extra, "mm_vision_select_layer": -2}))


def mqt(folder: Path) -> None:
    """As the released code writes it, with a budget of nine tokens."""
    shapes = shapes_of_clip(TOWER) | shapes_of_queries("model.query_abstractor.")
    save_file(random_tensors(shapes | shapes_of_llama("model.", "lm_head.weight")), folder / "model.safetensors")
    (folder / "tiny-clip").mkdir()
    (folder / "tiny-clip" / "config.json").write_text(json.dumps(CLIP))
    extra = {"model_type": "llava", "mm_vision_tower": "tiny-clip", "num_visual_tokens": 9}
    (folder / "config.json").write_text(json.dumps({**LLAMA, **extra}))


def operators(file: Path) -> set[str]:
    """The kinds of nodes in a graph."""
    return {node.op_type for node in onnx.load(file, load_external_data=False).graph.node}


@pytest.mark.parametrize(
    ("write", "family", "num_tokens"),
    [(llava, "llava", 16), (llava_next, "llava", 17), (llava_original, "llava_llama", 16), (mqt, "mqt", 9)],
)
def test_a_checkpoint_becomes_a_bundle_that_passes_the_gate_and_answers(
    write: Any, family: str, num_tokens: int, tmp_path: Path, tiny_tokenizer: Callable[..., Path]
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    write(folder)
    tiny_tokenizer(folder, IDS, bos_token="<s>", eos_token="</s>")
    root = edgevlm.export_bundle(folder, out=tmp_path / "model.bundle")
    manifest = read_bundle(root).manifest
    assert (manifest.family, manifest.num_vision_tokens) == (family, num_tokens)
    assert operators(root / manifest.parts[0].file).isdisjoint({"Resize", "Einsum", "If", "Loop"})
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    with edgevlm.open_bundle(root) as vlm:
        found = vlm.ask(picture, "What is it?", max_tokens=8).text
    assert found == edgevlm.load_model(folder).open().ask(picture, "What is it?", max_tokens=8).text


def test_a_bundle_has_the_card_of_the_model_as_it_was_exported(
    tmp_path: Path, tiny_tokenizer: Callable[..., Path]
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    mqt(folder)  # its encoder is described in a folder of its own, which no bundle holds
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))  # the weights know better
    tiny_tokenizer(folder, IDS, bos_token="<s>", eos_token="</s>")
    options: dict[str, Any] = {"vision_tokens": 4, "max_context": 300}
    bundle = read_bundle(edgevlm.export_bundle(folder, out=tmp_path / "model.bundle", **options))
    card = bundle_card(bundle)
    assert (card.name, card.family, card.vision_tokens, card.max_context) == ("model", "mqt", 4, 300)
    assert {part.part: part.type for part in card.parts}["lm_head"] == "own weights"
    assert card.config == edgevlm.load_model(folder, **options).model.config
