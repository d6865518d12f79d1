"""What tests of other projects' checkpoints share: spread-out weights and how far results may be apart."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

Spread = Callable[..., nn.Module]
Close = Callable[..., float]


@pytest.fixture
def spread_out() -> Spread:
    """Fill a model with weights of ordinary size: fresh ones hide errors, being small, norms 1 and biases 0."""

    @torch.no_grad()
    def fill(model: nn.Module, seed: int = 0) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
            fresh = parameter.dim() > 1 or name.endswith("embedding")  # the others begin as 0 or 1 and stay near it
            parameter.copy_(noise * fan_in**-0.5 if fresh else parameter + 0.2 * noise)
        return model.eval()

    return fill


@pytest.fixture(scope="session")
def spread_out_norms() -> Spread:
    """Fill an encoder of batch norms and layer scales: fresh scales of 1e-5 mute whole blocks, norms do nothing.

    With ``gain`` 1 values stay of order 1 through 44 blocks; fewer blocks need more for the picture to come through.
    """

    @torch.no_grad()
    def fill(model: nn.Module, seed: int = 0, gain: float = 1.0) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        for module in model.modules():
            spread = 0.7 * gain if isinstance(module, nn.Conv2d) else 0.7
            statistics = module.named_buffers() if isinstance(module, nn.BatchNorm2d) else ()
            for name, tensor in [*module.named_parameters(recurse=False), *statistics]:
                normal = isinstance(module, nn.BatchNorm2d) or (name == "weight" and tensor.dim() == 1)
                if name == "gamma":
                    tensor.normal_(0, 0.1, generator=generator)
                elif name == "running_var":
                    tensor.uniform_(0.5, 2.0, generator=generator)
                elif name == "weight" and normal:
                    tensor.uniform_(0.5, 1.5, generator=generator)
                elif name == "weight":
                    tensor.normal_(0, spread * tensor[0].numel() ** -0.5, generator=generator)
                elif tensor.is_floating_point():
                    tensor.normal_(0, 0.2 if normal else 0.1, generator=generator)
        return model.eval()

    return fill


@pytest.fixture
def assert_close() -> Close:
    """Assert that no value is further from the reference than ``tolerance`` of its largest; gives the distance."""

    def check(found: Tensor, reference: Tensor, tolerance: float = 2e-5) -> float:
        assert found.shape == reference.shape
        scale = max(1.0, float(reference.abs().max()))
        distance = float((found - reference).abs().max()) / scale
        assert distance <= tolerance, f"{distance:.2e} of {scale:.2f}, allowed {tolerance:.0e}"
        return distance

    return check
