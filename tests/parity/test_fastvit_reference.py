"""Our FastViT against timm's: FastViTHD at full size, and its siblings of the MobileCLIP family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import timm
import torch
from torch import Tensor, nn

from edgevlm.core.errors import ConfigError
from edgevlm.models.vision.fastvit import FastVit
from edgevlm.models.vision.reparameterize import bake, reparameterize
from edgevlm.shapes.config import FastVitConfig
from edgevlm.shapes.fastvit import MCI

Fill = Callable[..., nn.Module]
Close = Callable[..., float]

NUM_KEYS = {"train": 1529, "reparameterized": 628, "baked": 402}
NUM_PARAMETERS = {"train": 122_875_584, "reparameterized": 122_714_208, "baked": 122_672_352}
SIBLINGS = ("fastvit_mci0", "fastvit_mci1", "fastvit_mci2", "fastvit_mci4")
DEPTHS, WIDTHS = (1, 2, 1, 1, 2), (16, 32, 64, 64, 128)  # a narrow sibling


@dataclass(frozen=True)
class Pair:
    """timm's encoder and ours in three forms, with the same weights."""

    reference: nn.Module
    train: FastVit
    reparameterized: FastVit
    baked: FastVit


def make_pair(name: str, fill: Fill, config: FastVitConfig, gain: float = 1.0) -> Pair:
    sizes = {"layers": config.depths, "embed_dims": config.widths}
    reference = fill(timm.create_model(name, num_classes=0, **sizes), gain=gain)
    ours = FastVit(config).eval()
    ours.load_state_dict(reference.state_dict())
    return Pair(reference, ours, reparameterize(ours), bake(ours))


@pytest.fixture(scope="module")
def pair(spread_out_norms: Fill) -> Pair:
    """FastViTHD."""
    return make_pair("fastvit_mci3", spread_out_norms, MCI["fastvit_mci3"])


@pytest.fixture
def narrow(spread_out_norms: Fill) -> Pair:
    """FastViTHD with fewer channels and blocks."""
    config = FastVitConfig(depths=DEPTHS, widths=WIDTHS)
    return make_pair("fastvit_mci3", spread_out_norms, config, gain=1.5)


def rows(reference: nn.Module, pixels: Tensor) -> Tensor:
    """timm's map after its last convolution, as rows."""
    return reference.forward_features(pixels).flatten(2).transpose(1, 2)


@torch.no_grad()
@pytest.mark.parametrize("width", [256, 384])
def test_features_equal_those_of_timm(pair: Pair, assert_close: Close, width: int) -> None:
    pixels = torch.rand(1, 3, 256, width, generator=torch.Generator().manual_seed(1))
    expected = rows(pair.reference, pixels)
    assert 1.0 < expected.abs().max() < 100.0  # neither muted nor blown up
    assert expected.shape == (1, 4 * width // 64, 3072)
    for form in NUM_KEYS:
        assert_close(getattr(pair, form)(pixels), expected, 1e-5)


@torch.no_grad()
def test_in_double_precision_every_form_is_the_same_map(narrow: Pair) -> None:
    pixels = torch.rand(1, 3, 128, 192, dtype=torch.float64)
    expected = rows(narrow.reference.double(), pixels)
    ours = narrow.train.double()
    for found in (ours(pixels), reparameterize(ours)(pixels), bake(ours)(pixels)):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", SIBLINGS)
def test_the_mobileclip_siblings_equal_those_of_timm(name: str, spread_out_norms: Fill, assert_close: Close) -> None:
    stages = len(MCI[name].widths)
    config = replace(MCI[name], depths=DEPTHS[:stages], widths=WIDTHS[:stages])
    pair = make_pair(name, spread_out_norms, config, gain=1.5)
    pixels = torch.rand(2, 3, 2 * config.stride, 3 * config.stride)
    expected = rows(pair.reference, pixels)
    assert (expected[0] - expected[1]).abs().max() > 0.05  # the picture comes through
    for found in (pair.train(pixels), pair.reparameterized(pixels), pair.baked(pixels)):
        assert_close(found, expected, 1e-5)


@pytest.mark.parametrize("inference_mode", [False, True], ids=["train", "reparameterized"])
@pytest.mark.parametrize("name", MCI)
def test_tensors_are_called_as_timm_calls_them(name: str, inference_mode: bool) -> None:
    with torch.device("meta"):
        reference = timm.create_model(name, num_classes=0, inference_mode=inference_mode).state_dict()
        ours = FastVit(replace(MCI[name], reparameterized=inference_mode)).state_dict()
    assert {key: tensor.shape for key, tensor in ours.items()} == {key: t.shape for key, t in reference.items()}


@torch.no_grad()
def test_timm_takes_our_folded_weights(narrow: Pair, assert_close: Close) -> None:
    sizes = {"layers": DEPTHS, "embed_dims": WIDTHS}
    folded = timm.create_model("fastvit_mci3", num_classes=0, inference_mode=True, **sizes).eval()
    folded.load_state_dict(narrow.reparameterized.state_dict())
    pixels = torch.rand(1, 3, 128, 128)
    assert_close(narrow.reparameterized(pixels), rows(folded, pixels), 1e-6)


@pytest.mark.parametrize("form", NUM_KEYS)
def test_counts_are_those_of_fastvithd(pair: Pair, form: str) -> None:
    encoder = getattr(pair, form)
    assert len(encoder.state_dict()) == NUM_KEYS[form]
    assert sum(parameter.numel() for parameter in encoder.parameters()) == NUM_PARAMETERS[form]


def test_the_form_for_export_has_no_buffers(pair: Pair) -> None:
    assert not list(pair.baked.buffers())
    assert bake(pair.baked).state_dict().keys() == pair.baked.state_dict().keys()  # nothing is left to do


@torch.no_grad()
def test_folding_leaves_the_model_it_began_with(narrow: Pair) -> None:
    pixels = torch.rand(1, 3, 64, 64)
    before, names = narrow.train(pixels), list(narrow.train.state_dict())
    bake(narrow.train)
    assert list(narrow.train.state_dict()) == names
    assert torch.equal(narrow.train(pixels), before)


def test_folding_shares_the_tensors_that_do_not_change(narrow: Pair) -> None:
    wide = "stages.4.blocks.0.mlp.fc1.weight"
    assert narrow.baked.state_dict()[wide].data_ptr() == narrow.train.state_dict()[wide].data_ptr()


def test_sides_that_the_stride_does_not_divide_are_refused(narrow: Pair) -> None:
    with pytest.raises(ConfigError, match="are 100x128; this encoder needs sides that are multiples of 64"):
        narrow.baked(torch.zeros(1, 3, 100, 128))
