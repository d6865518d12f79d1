"""What calibration asks, and what it counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from edgevlm.core.errors import InputError, UsageError
from edgevlm.models.checkpoint import Checkpoint, load_model
from edgevlm.quant.calibration import SecondMoments, calibration_samples, importance, watched
from edgevlm.quant.decoder import quantized_matrices
from edgevlm.quant.rounding import counted


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint: Path) -> Checkpoint:
    return load_model(tiny_checkpoint)


def test_importance_is_the_mean_of_squares_and_products_of_what_comes_in(tiny: Checkpoint) -> None:
    layer = tiny.model.get_submodule("decoder.layers.0.mlp.down_proj")
    rows = torch.zeros(1, 384, 128)
    rows[..., 0], rows[..., 1] = 1.0, 2.0
    rows[:, ::2, 2] = 3.0
    with watched(tiny.model) as seen, torch.no_grad():
        layer(rows[:, :100])
        layer(rows[:, 100:])
    found = seen["decoder.layers.0.mlp.down_proj"].mean()[0, :3, :3]
    torch.testing.assert_close(found, torch.tensor([[1.0, 2.0, 1.5], [2.0, 4.0, 3.0], [1.5, 3.0, 4.5]]))
    assert not layer._forward_pre_hooks


def test_wide_inputs_are_counted_in_spans() -> None:
    moments, rows = SecondMoments(1100), torch.randn(7, 1100, generator=torch.Generator().manual_seed(0))
    moments.add(rows)
    found = moments.mean() * 7
    assert found.shape == (2, 1024, 1024)
    torch.testing.assert_close(found[1, :76, :76], rows[:, 1024:].T @ rows[:, 1024:])
    assert found[1, 76:].abs().max() == 0


def test_rows_counted_at_once_or_one_by_one_are_the_same() -> None:
    rows = torch.randn(300, 96, generator=torch.Generator().manual_seed(0))
    at_once, singly = SecondMoments(96), SecondMoments(96)
    at_once.add(rows)
    for row in rows:
        singly.add(row[None])
    torch.testing.assert_close(singly.mean(), at_once.mean())
    torch.testing.assert_close(at_once.mean()[0, :96, :96], rows.T @ rows / 300)


def test_head_counts_the_last_row_alone(tiny: Checkpoint) -> None:
    rows = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0))
    with watched(tiny.model) as seen, torch.no_grad():
        hidden = tiny.model.decoder(rows)
    torch.testing.assert_close(seen["lm_head"].mean()[0].diagonal()[:64], hidden[0, -1].square())


def test_every_rounded_matrix_gets_its_importance(tiny: Checkpoint) -> None:
    told: list[tuple[int, int]] = []
    found = importance(tiny, calibration_samples(num=2), report=lambda done, total: told.append((done, total)))
    matrices = dict(quantized_matrices(tiny.model))
    assert found.keys() == matrices.keys()
    counts = {path: counted(moments, matrices[path].shape[1]) for path, moments in found.items()}
    assert all(each is not None and bool((each > 0).all()) and bool(each.isfinite().all()) for each in counts.values())
    assert torch.equal(found["decoder.layers.0.mlp.gate_proj"], found["decoder.layers.0.mlp.up_proj"])
    assert told == [(1, 2), (2, 2)]


def test_samples_follow_from_the_seed_alone() -> None:
    first, same, other = (calibration_samples(num=3, seed=seed) for seed in (0, 0, 1))
    pictures = [np.stack([np.asarray(sample.image) for sample in samples]) for samples in (first, same, other)]
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])
    assert [sample.prompt for sample in first] == [sample.prompt for sample in same]


def test_pictures_of_a_folder_are_asked_about_again_until_there_are_enough(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    for name in ("a.png", "below/b.JPG"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    found = [sample.image for sample in calibration_samples(tmp_path, num=5)]
    assert {Path(str(image)).name for image in found} == {"a.png", "b.JPG"}
    assert len(found) == 5


def test_folder_without_pictures_is_an_error_that_says_what_counts_as_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no picture \(.*\.bmp"):
        calibration_samples(tmp_path)


def test_picture_that_cannot_be_read_is_named(tiny: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"broken\.png"):
        importance(tiny, calibration_samples(tmp_path, num=1))


@pytest.mark.parametrize(("num", "seed"), [(0, 0), (4, -1)])
def test_no_samples_and_negative_seeds_are_refused(num: int, seed: int) -> None:
    with pytest.raises(UsageError, match="at least"):
        calibration_samples(num=num, seed=seed)


def test_calibration_without_samples_is_refused(tiny: Checkpoint) -> None:
    with pytest.raises(UsageError, match="at least one sample"):
        importance(tiny, [])
