"""Rounding an encoder: ranges, scales, calibration pictures, and what float16 refuses."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from PIL import Image

from edgevlm.core.errors import ConfigError, DoesNotFitError, InputError, UnsupportedError
from edgevlm.export.calibration import calibration_pixels
from edgevlm.export.encoder_int8 import quantize_static, refuse_dynamic, rounded_weight
from edgevlm.export.half_graph import CHUNK, half_tensor, to_half
from edgevlm.export.ranges import NUM_SAMPLED, Seen, _seen, best_range
from edgevlm.models.checkpoint import load_model
from edgevlm.processing.processor import Processor
from edgevlm.quant.calibration import calibration_samples, pictures_in


def seen(sample: list[float], num_each: int = 1) -> Seen:
    values = np.array(sample, np.float32)
    return Seen(np.array([values.min(), values.max()]), values, num_each)


def product(weight: np.ndarray, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Model:
    """A graph of one product: ``pixel_values`` [1, K] times ``weight`` [K, N]."""
    tensor = ir.tensor(weight, name="weight")
    source = ir.Value(name="pixel_values", shape=ir.Shape([1, len(weight)]), type=ir.TensorType(dtype))
    constant = ir.Value(
        name="weight", shape=ir.Shape(weight.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    node = ir.node("MatMul", [source, constant], name="product")
    node.outputs[0].name, node.outputs[0].type = "image_features", ir.TensorType(dtype)
    graph = ir.Graph(
        [source], node.outputs, nodes=[node], initializers=[constant], opset_imports={"": 21}, name="product"
    )
    return ir.Model(graph, ir_version=10)


@pytest.fixture(scope="module")
def processor() -> Processor:
    return load_model("nano").processor


def test_a_range_of_even_values_is_their_extremes_and_zero() -> None:
    assert best_range(seen(np.linspace(1, 255, 255).tolist())) == (0.0, 255.0)
    assert best_range(seen(np.linspace(-255, -1, 255).tolist())) == (-255.0, 0.0)


def test_a_rare_large_value_is_cut_and_a_frequent_one_is_not() -> None:
    small = np.linspace(0, 1, 2000).tolist()
    rare, frequent = best_range(seen([*small, 2.0], 100_000)), best_range(seen([*small, *200 * [2.0]]))
    assert frequent[1] == 2.0
    extremes = Seen(np.array([0.0, 2.0], np.float32), np.array(small, np.float32), 100_000)
    assert best_range(extremes)[1] < 1.5 < rare[1]


def squares_of_any_size() -> ir.Model:
    """``pixel_values`` [1, 3, height, width] times itself, whose sizes are known in each call alone."""
    shape = ir.Shape([1, 3, "height", "width"])
    source = ir.Value(name="pixel_values", shape=shape, type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("Mul", [source, source], name="square")
    node.outputs[0].name, node.outputs[0].type = "square", ir.TensorType(ir.DataType.FLOAT)
    return ir.Model(ir.Graph([source], node.outputs, nodes=[node], opset_imports={"": 21}, name="g"), ir_version=10)


def test_a_sample_is_small_whatever_the_size_of_the_picture() -> None:
    batches = [np.full((1, 3, side, side), value, np.float32) for side, value in ((8, 1.0), (400, 2.0))]
    found = _seen(squares_of_any_size(), ["square"], batches)["square"]
    small, large = 3 * 8 * 8, 3 * 400 * 400
    assert found.extremes.tolist() == [1.0, 4.0, 1.0, 4.0]
    assert found.sample.size <= small + 2 * NUM_SAMPLED
    assert found.sample[:small].tolist() == small * [1.0]
    each = np.asarray(found.num_each)
    assert set(each[:small]) == {1}
    assert abs(each[small:].sum() - large) <= each[-1]


def test_a_full_disk_while_ranges_are_found_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ir, "save", full)
    with pytest.raises(DoesNotFitError, match=r"edgevlm-ranges.*TMPDIR"):
        _seen(squares_of_any_size(), ["square"], [np.ones((1, 3, 8, 8), np.float32)])


def test_a_tensor_of_zeros_has_a_range() -> None:
    assert best_range(seen([0.0, 0.0])) == (0.0, 0.0)


def test_weights_have_a_scale_for_each_output_channel() -> None:
    codes, scale = rounded_weight(np.array([[127.0, 1.0], [-63.5, -0.5], [0.0, 0.0]], np.float32), axis=1)
    assert scale.tolist() == [1.0, np.float32(1 / 127)]
    assert codes.tolist() == [[127, 127], [-64, -64], [0, 0]]


def test_int8_needs_pictures_that_fit() -> None:
    weight = np.ones((4, 2), np.float32)
    with pytest.raises(UnsupportedError, match="needs pictures"):
        quantize_static(product(weight), [])
    with pytest.raises(UnsupportedError, match="cannot read"):
        quantize_static(product(weight), [np.ones((1, 5), np.float32)])
    with pytest.raises(UnsupportedError, match="not finite"):
        quantize_static(product(weight), [np.full((1, 4), np.inf, np.float32)])


def test_a_graph_without_weights_cannot_be_quantized() -> None:
    model = product(np.ones((4, 2), np.float32))
    model.graph[0].op_type = "Mul"
    with pytest.raises(UnsupportedError, match="no convolution"):
        quantize_static(model, [np.ones((1, 4), np.float32)])


def test_an_encoder_in_dynamic_int8_is_refused_with_the_reason() -> None:
    refuse_dynamic("int8")
    with pytest.raises(UnsupportedError, match="slower than in float; take"):
        refuse_dynamic("int8-dynamic")


def test_a_weight_beyond_float16_is_named() -> None:
    with pytest.raises(UnsupportedError, match=r"weight holds 7e\+04.*fp32"):
        to_half(product(np.array([[7e4]], np.float32)))


def test_masks_keep_their_infinity() -> None:
    lowest = np.finfo(np.float32).min
    mask = half_tensor(ir.tensor(np.array([0.0, lowest, -np.inf], np.float32)))
    assert mask.numpy().tolist() == [0.0, -65504.0, -np.inf]


def test_every_piece_of_a_large_weight_is_narrowed_and_looked_at() -> None:
    weight = np.linspace(-2, 2, 2 * CHUNK + 5, dtype=np.float32).reshape(1, -1)
    assert np.array_equal(half_tensor(ir.tensor(weight)).numpy(), weight.astype(np.float16))
    weight[0, -1] = 7e4
    with pytest.raises(UnsupportedError, match=r"holds 7e\+04"):
        half_tensor(ir.tensor(weight))


def test_inputs_stay_float32_unless_told() -> None:
    usual, inside = (product(np.ones((4, 2), np.float32)) for _ in range(2))
    to_half(usual)
    to_half(inside, keep=("image_features",))
    assert [usual.graph.inputs[0].dtype, usual.graph.outputs[0].dtype] == 2 * [ir.DataType.FLOAT]
    assert [inside.graph.inputs[0].dtype, inside.graph.outputs[0].dtype] == [ir.DataType.FLOAT16, ir.DataType.FLOAT]
    assert [value.name for value in usual.graph.outputs] == ["image_features"]


def test_calibration_draws_other_scenes_for_another_seed(processor: Processor) -> None:
    one, again, other = (calibration_pixels(processor, None, 2, seed) for seed in (0, 0, 1))
    assert [pixels.shape for pixels in one] == 2 * [(1, 3, 128, 128)]
    assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))
    assert not np.array_equal(one[0], other[0])
    assert not np.array_equal(one[0], one[1])


def test_calibration_reads_a_folder(processor: Processor, tmp_path: Path) -> None:
    for index in range(5):
        Image.new("RGB", (40, 30), (50 * index, 0, 0)).save(tmp_path / f"{index}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    assert len(calibration_pixels(processor, tmp_path, 32, 0)) == 5
    chosen = [path.name for path in pictures_in(tmp_path, 3, 0)]
    assert chosen == sorted(chosen)
    assert len(set(chosen)) == 3
    assert [sample.image for sample in calibration_samples(tmp_path, 3, 0)] == pictures_in(tmp_path, 3, 0)


def test_a_folder_without_pictures_or_with_a_bad_one_is_refused(processor: Processor, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no picture"):
        calibration_pixels(processor, tmp_path, 4, 0)
    with pytest.raises(InputError, match="is no folder"):
        calibration_pixels(processor, tmp_path / "missing", 4, 0)
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    with pytest.raises(InputError, match=r"bad\.png"):
        calibration_pixels(processor, tmp_path, 4, 0)
    with pytest.raises(ConfigError, match="1 picture or more"):
        calibration_pixels(processor, None, 0, 0)
