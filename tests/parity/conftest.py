"""What tests of other projects' checkpoints share: spread-out weights and how far results may be apart."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from edgevlm.models.kv_cache import KVCache
from edgevlm.models.vlm import Vlm

Spread = Callable[..., nn.Module]
Close = Callable[..., float]
Steps = Callable[..., list[int]]
NUM_STEPS = 10


@pytest.fixture
def spread_out() -> Spread:
    """Fill a model with weights of ordinary size: fresh ones hide errors, being small, norms 1 and biases 0."""

    @torch.no_grad()
    def fill(model: nn.Module, seed: int = 0) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
            fresh = parameter.dim() > 1 or name.endswith("embedding")
            if name.endswith("bias"):
                parameter.zero_()  # PyTorch's own begin at random
            parameter.copy_(noise * fan_in**-0.5 if fresh else parameter + 0.2 * noise)  # near 0 or 1 as it begins
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


@pytest.fixture
def assert_same_steps(assert_close: Close) -> Steps:
    """Assert that the logits of a prompt, of ten decode steps and the greedy ids are the reference's; gives the ids.

    ``rows`` (1, T, D) are the prompt's embeddings as ours, ``reference`` gives the logits (T + n, V) of the prompt and
    n ids behind it, all anew.
    """

    def check(model: Vlm, rows: Tensor, reference: Callable[[list[int]], Tensor], tolerance: float = 2e-5) -> list[int]:
        cache, ids = KVCache(model.config.decoder), list[int]()
        found, expected = model(rows, cache)[0], reference(ids)
        assert_close(found, expected, tolerance)
        for _ in range(NUM_STEPS):
            ids.append(int(expected[-1].argmax()))
            assert int(found[-1].argmax()) == ids[-1]
            found, expected = model(model.embed_tokens(torch.tensor([[ids[-1]]])), cache)[0], reference(ids)
            assert_close(found, expected[-1:], tolerance)
        assert int(found[-1].argmax()) == int(expected[-1].argmax())
        assert len(set(ids)) > 1  # one token for ever would say little
        return ids

    return check
