"""What we export, parsed and built by TensorRT-RTX: each kind of graph in each precision.

Weights are random and most models narrow, since what a parser refuses is an operator, a type or a shape.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import edgevlm
from edgevlm.bundle.manifest import PartFile
from edgevlm.bundle.read import Bundle, read_bundle
from edgevlm.bundle.recipe import Recipe, read_recipe
from edgevlm.export.engine_profiles import recipe_of
from edgevlm.export.parts import Part, split
from edgevlm.export.target import Extras, Lowering
from edgevlm.export.to_tensorrt import TensorRtTarget
from edgevlm.models.vlm import Vlm
from edgevlm.quant.decoder import quantize_decoder
from edgevlm.shapes.config import (
    DecoderConfig,
    FastVitConfig,
    FusionConfig,
    MlpConfig,
    UnshuffleConfig,
    VitConfig,
    VlmConfig,
)

pytestmark = pytest.mark.vendor

CONTEXT, LONG_CONTEXT = 1024, 32_768
EXPLAINED = (
    "has Int64 binding",  # write_indices is int64 in ONNX; TensorRT asks that what is bound be int64, too
    "scales to fp32",  # of rounded convolutions: float16 ones, exactly, as their kernels want them
)

DECODER = DecoderConfig(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=CONTEXT,
    attention_bias=True,
)
QWEN2 = DecoderConfig(
    vocab_size=151_936,
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=32_768,
    attention_bias=True,
)
SIGLIP = VitConfig(
    image_size=224, patch_size=16, hidden_size=192, intermediate_size=768, num_hidden_layers=2, num_attention_heads=3
)
CLIP = replace(SIGLIP, hidden_act="quick_gelu", class_token=True, pre_layernorm=True, post_layernorm=False)
ROUNDED = ("int4-b64-rtn", "int4-b128-rtn", "nvfp4-rtn")  # weights alone
SHALLOW = (1, 1, 1, 1, 1)  # FastViTHD with one block a stage


def model_of(vision: VitConfig | FastVitConfig, projector: MlpConfig | UnshuffleConfig, **others: Any) -> Vlm:
    torch.manual_seed(0)
    model = Vlm(VlmConfig(vision=vision, projector=projector, **{"decoder": DECODER, **others}))
    model.initialize(0)
    return model


def part_of(model: Vlm, name: str) -> Part:
    return next(part for part in split(model) if part.name == name)


def pictures(side: int, num: int = 1) -> Extras:
    return Extras(feeds=[{"pixel_values": np.random.default_rng(0).random((num, 3, side, side), np.float32)}])


def first_call(config: DecoderConfig, num_rows: int) -> dict[str, NDArray[Any]]:
    """Inputs of a decoder that has read nothing yet."""
    cache = np.zeros((1, config.num_key_value_heads, 0, config.head_dim), np.float32)
    names = [f"past_key_values.{i}.{kind}" for i in range(config.num_hidden_layers) for kind in ("key", "value")]
    rows = np.random.default_rng(0).standard_normal((1, num_rows, config.hidden_size), np.float32)
    return {"inputs_embeds": rows, "write_indices": np.zeros(1, np.int64), **dict.fromkeys(names, cache)}


def check(
    builder: Any,
    folder: Path,
    file: PartFile,
    recipe: Recipe | None = None,
    *,
    in_place: bool = False,
    layers: bool = False,
) -> Any:
    """Build one graph with the profiles of its recipe; nothing that the library says may be unexplained."""
    profiles = (recipe or recipe_of([file], CONTEXT, ())).of(file.part, in_place=in_place).profiles
    graph, shapes = folder / (file.in_place if in_place else file.file), [profile.shapes for profile in profiles]
    outcome = builder.build(graph, shapes, layers=layers)
    assert not outcome.error
    assert {text for text in outcome.messages if not any(known in text for known in EXPLAINED)} == set()
    assert outcome.engine_bytes
    return outcome


@pytest.mark.parametrize("precision", ["fp16", "int8", "fp8"])
@pytest.mark.parametrize("side", [256, 512, 1024])
def test_fastvithd(tensorrt_rtx: Any, side: int, precision: str, tmp_path: Path) -> None:
    widths = (48, 96, 192, 384, 768)
    model = model_of(FastVitConfig(image_size=side, depths=SHALLOW, widths=widths), MlpConfig())
    part = part_of(model, "vision_encoder")
    check(tensorrt_rtx, tmp_path, TensorRtTarget(Lowering()).lower(part, tmp_path, precision, pictures(side)))


@pytest.mark.slow
def test_fastvithd_in_full_depth(tensorrt_rtx: Any, tmp_path: Path) -> None:
    part = part_of(model_of(FastVitConfig(), MlpConfig()), "vision_encoder")
    check(tensorrt_rtx, tmp_path, TensorRtTarget(Lowering()).lower(part, tmp_path, "fp16"))


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "fp8"])
@pytest.mark.parametrize(
    ("vision", "projector"), [(CLIP, MlpConfig()), (SIGLIP, UnshuffleConfig())], ids=["clip", "siglip"]
)
def test_transformers(
    tensorrt_rtx: Any, vision: VitConfig, projector: MlpConfig | UnshuffleConfig, precision: str, tmp_path: Path
) -> None:
    part = part_of(model_of(vision, projector), "vision_encoder")
    extras = pictures(vision.image_size)
    check(tensorrt_rtx, tmp_path, TensorRtTarget(Lowering()).lower(part, tmp_path, precision, extras))


@pytest.mark.parametrize("precision", ["fp16", "int8", "fp8"])
def test_a_compressor_and_pre_fusion(tensorrt_rtx: Any, precision: str, tmp_path: Path) -> None:
    """LLaVA-Mini's two graphs; the fusion, which is read once a prompt, stays float16."""
    fusion = FusionConfig(num_layers=2, grid_size=2, resolution_ratio=2)
    model = model_of(replace(CLIP, image_size=64), MlpConfig(), fusion=fusion)
    for name, chosen, extras in (("vision_encoder", precision, pictures(64, 5)), ("fusion", "fp16", Extras())):
        part = part_of(model, name)
        check(tensorrt_rtx, tmp_path, TensorRtTarget(Lowering()).lower(part, tmp_path, chosen, extras))


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32", *ROUNDED, "int8-static", "fp8"])
def test_a_decoder_of_both_kinds(tensorrt_rtx: Any, precision: str, tmp_path: Path) -> None:
    """In place, TensorRT must know the cache for one: else it would copy all of it at every token."""
    model = model_of(replace(CLIP, image_size=64), MlpConfig())
    quantized = quantize_decoder(model, precision, target="tensorrt") if precision in ROUNDED else None
    extras = Extras(max_context=CONTEXT, quantized=quantized, feeds=[first_call(DECODER, 8)])
    file = TensorRtTarget(Lowering()).lower(part_of(model, "decoder_model_merged"), tmp_path, precision, extras)
    rows = check(tensorrt_rtx, tmp_path, file, layers=True)
    in_place = check(tensorrt_rtx, tmp_path, file, in_place=True, layers=True)
    assert in_place.layers["KV_CACHE_UPDATE"] == 2 * DECODER.num_hidden_layers
    assert "KV_CACHE_UPDATE" not in rows.layers


def test_a_decoder_with_a_long_context(tensorrt_rtx: Any, tmp_path: Path) -> None:
    model = model_of(
        replace(CLIP, image_size=64), MlpConfig(), decoder=replace(DECODER, max_position_embeddings=LONG_CONTEXT)
    )
    part = part_of(model, "decoder_model_merged")
    file = TensorRtTarget(Lowering()).lower(part, tmp_path, "fp16", Extras(max_context=LONG_CONTEXT))
    for in_place in (False, True):
        check(tensorrt_rtx, tmp_path, file, recipe_of([file], LONG_CONTEXT, ()), in_place=in_place)


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The shipped model with both halves in float16 and rounded, as a user exports it."""
    out = tmp_path_factory.mktemp("nano") / "nano.bundle"
    bundle = edgevlm.export_bundle(
        "nano",
        target="tensorrt",
        out=out,
        encoder_precision="fp16,int8",
        decoder_precision="fp16,int4-rtn",
        calib_samples=4,
    )
    return read_bundle(bundle)


def test_every_graph_of_an_exported_bundle(tensorrt_rtx: Any, nano: Bundle) -> None:
    """With the recipe that the bundle carries."""
    recipe = read_recipe(nano)
    files = [file for file in nano.manifest.parts if file.part != "embed_tokens"]
    built = {(file.part, file.precision) for file in files}
    assert built == {
        *(("vision_encoder", name) for name in ("fp16", "int8")),
        *(("decoder_model_merged", name) for name in ("fp16", "int4-b128-rtn")),
    }
    for file in files:
        check(tensorrt_rtx, nano.root, file, recipe)
        if file.in_place:
            check(tensorrt_rtx, nano.root, file, recipe, in_place=True)


@pytest.mark.slow
def test_a_decoder_of_qwen2s_shape(tensorrt_rtx: Any, tmp_path: Path) -> None:
    """Half a billion parameters: its engines keep their weights once for each pair of profiles that lays them anew."""
    part = part_of(model_of(replace(CLIP, image_size=64), MlpConfig(), decoder=QWEN2), "decoder_model_merged")
    file = TensorRtTarget(Lowering()).lower(part, tmp_path, "fp16", Extras(max_context=CONTEXT))
    weights = sum((tmp_path / name).stat().st_size for name in file.files if name.endswith("_data"))
    del part
    for in_place in (False, True):
        assert check(tensorrt_rtx, tmp_path, file, in_place=in_place).engine_bytes < 3 * weights


def test_a_graph_that_is_no_graph_is_an_error_with_a_reason(tensorrt_rtx: Any, tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    outcome = tensorrt_rtx.build(tmp_path / "broken.onnx")
    assert "cannot read it" in outcome.error
    assert not outcome.engine_bytes


def test_a_build_that_dies_fails_alone(tensorrt_rtx: Any, tmp_path: Path) -> None:
    without_libraries = type(tensorrt_rtx)(tmp_path)
    with pytest.raises(AssertionError, match="the build ended with"):
        without_libraries.build(tmp_path / "any.onnx")
