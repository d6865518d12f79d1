"""For which sizes engines are built: what a recipe may say, and what export writes into it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from edgevlm.bundle.manifest import PartFile, TensorSpec
from edgevlm.bundle.paths import RECIPE_FILE
from edgevlm.bundle.recipe import PartRecipe, Profile, Recipe, past_buckets, write_recipe
from edgevlm.core.config import from_mapping, read_json
from edgevlm.core.errors import ConfigError, UnsupportedError
from edgevlm.export.engine_profiles import PREFILL_ROWS, recipe_of

QWEN2_HEADS, QWEN2_CONTEXT = 14, 32_768  # of the decoder with half a billion parameters


def part(name: str, *inputs: TensorSpec) -> PartFile:
    return PartFile(
        part=name, target="tensorrt", precision="fp16", file=f"tensorrt/{name}.onnx", inputs=inputs, outputs=()
    )


def spec(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name, "float32", shape)


ENCODER = part("vision_encoder", spec("pixel_values", "batch_size", 3, 64, 64))
FREE = part("vision_encoder", spec("pixel_values", "batch_size", 3, "height", "width"))
STATIC = part("vision_encoder", spec("pixel_values", 5, 3, 64, 64))
FUSION = part("fusion", spec("inputs_embeds", 1, "sequence", 32), spec("fusion_cache", 2, 2, 1, 17, 8))
DECODER = replace(
    part(
        "decoder_model_merged",
        spec("inputs_embeds", "batch_size", "sequence", 32),
        spec("write_indices", "batch_size"),
        spec("past_key_values.0.key", "batch_size", 2, "past_sequence", 16),
    ),
    cache="rows",
    in_place="tensorrt/in_place.onnx",
    extra_files=("tensorrt/in_place.onnx",),
)


@pytest.mark.parametrize(
    ("max_context", "buckets"),
    [(100, (100,)), (256, (256,)), (512, (256, 512)), (1500, (256, 512, 1024, 1500)), (2048, (256, 512, 1024, 2048))],
)
def test_buckets_double_up_to_the_context(max_context: int, buckets: tuple[int, ...]) -> None:
    assert past_buckets(max_context) == buckets


def test_a_decoder_is_built_for_one_row_and_many_of_one_two_and_four_sequences() -> None:
    recipe = recipe_of([DECODER], 2048, ())
    profiles = {profile.name: profile.shapes for profile in recipe.of("decoder_model_merged").profiles}
    assert list(profiles) == [
        *("decode", "prefill", "decode-batch-2", "prefill-batch-2", "decode-batch-4", "prefill-batch-4")
    ]
    assert profiles["decode"]["past_key_values.0.key"] == ((1, 2, 256, 16), (1, 2, 1024, 16), (1, 2, 2048, 16))
    assert profiles["prefill-batch-2"]["inputs_embeds"] == ((2, 1, 32), (2, 256, 32), (2, 512, 32))
    assert profiles["prefill"]["inputs_embeds"] == ((1, 1, 32), (1, 256, 32), (1, 1024, 32))
    assert profiles["prefill"]["past_key_values.0.key"] == profiles["decode"]["past_key_values.0.key"]
    assert profiles["decode-batch-4"]["write_indices"] == ((4,), (4,), (4,))


@pytest.mark.parametrize("in_place", [False, True])
def test_scores_of_a_long_context_stay_small(in_place: bool) -> None:
    recipe = recipe_of([DECODER], QWEN2_CONTEXT, ()).of("decoder_model_merged", in_place=in_place)
    for profile in recipe.profiles:
        batch, new, _ = profile.shapes["inputs_embeds"][2]
        past = profile.shapes["past_key_values.0.key"][2][2]
        assert past == QWEN2_CONTEXT
        assert batch * new <= PREFILL_ROWS
        assert batch * QWEN2_HEADS * new * (past + new) * 2 < 2e9  # bytes of one layer's scores in float16


@pytest.mark.parametrize("max_context", [1, 100, 300])
def test_a_prompt_is_no_longer_than_a_short_context(max_context: int) -> None:
    for profile in recipe_of([DECODER], max_context, ()).of("decoder_model_merged").profiles:
        assert profile.shapes["inputs_embeds"][2][1] <= max_context


def test_a_cache_that_is_written_in_place_has_one_length() -> None:
    recipe = recipe_of([DECODER], 300, ()).of("decoder_model_merged", in_place=True)
    for profile in recipe.profiles:
        assert {shape[2] for shape in profile.shapes["past_key_values.0.key"]} == {300}
        assert profile.shapes["inputs_embeds"][2][1] == (
            1 if "decode" in profile.name else min(300, PREFILL_ROWS // profile.batch)
        )


def test_an_encoder_is_built_for_every_number_and_size_of_pictures() -> None:
    one = recipe_of([ENCODER, DECODER], 256, ()).of("vision_encoder").profiles
    assert [(profile.name, profile.shapes["pixel_values"][0]) for profile in one] == [
        *(("batch-1", (1, 3, 64, 64)), ("batch-2", (2, 3, 64, 64)), ("batch-4", (4, 3, 64, 64)))
    ]
    several = recipe_of([FREE], 256, (64, 96)).of("vision_encoder").profiles
    assert [profile.name for profile in several] == [f"batch-{n}-{side}" for n in (1, 2, 4) for side in (64, 96)]
    assert several[1].shapes["pixel_values"] == ((1, 3, 96, 96),) * 3
    static = recipe_of([STATIC], 256, ()).of("vision_encoder").profiles
    assert [(profile.name, profile.shapes) for profile in static] == [("batch-1", {})]


def test_a_fusion_reads_any_text_that_fits() -> None:
    (profile,) = recipe_of([FUSION], 128, ()).of("fusion").profiles
    assert profile.shapes == {"inputs_embeds": ((1, 1, 32), (1, 128, 32), (1, 128, 32))}


def test_a_recipe_is_read_as_it_was_written(tmp_path: Path) -> None:
    recipe = recipe_of([ENCODER, FUSION, DECODER], 512, ())
    write_recipe(tmp_path, recipe)
    assert from_mapping(Recipe, read_json(tmp_path / RECIPE_FILE), strict=True, where="here") == recipe


def test_a_recipe_knows_how_much_is_taken_at_once() -> None:
    profiles = recipe_of([DECODER], 512, ()).of("decoder_model_merged").profiles
    assert [profile.batch for profile in profiles] == [1, 1, 2, 2, 4, 4]


@pytest.mark.parametrize("shapes", [((1, 2),), ((1, 2), (1, 3), (1,)), ((2, 2), (1, 2), (3, 2)), ((0,), (1,), (2,))])
def test_shapes_that_do_not_grow_are_refused(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ConfigError, match="least, usual and largest"):
        Profile(name="decode", shapes={"rows": shapes})


def test_profiles_need_names_of_their_own() -> None:
    with pytest.raises(ConfigError, match="different names"):
        PartRecipe(profiles=(Profile(name="a"), Profile(name="a")))


def test_a_part_without_a_recipe_is_told_with_those_that_have_one() -> None:
    recipe = recipe_of([ENCODER], 256, ())
    with pytest.raises(UnsupportedError, match="no engine for fusion; it has vision_encoder"):
        recipe.of("fusion")
    with pytest.raises(UnsupportedError, match="no in-place engine for vision_encoder; it has no part"):
        recipe.of("vision_encoder", in_place=True)
