"""What FastViT is built of: sums of linear branches while it trains, one convolution each afterwards.

Modules are called as timm calls them, so that its checkpoints need no renaming.
Sources: RepVGG, arXiv:2101.03697; MobileOne, arXiv:2206.04040; RepLKNet, arXiv:2203.06717; conditional positions,
arXiv:2102.10882; squeeze-and-excite, arXiv:1709.01507.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Kernel: TypeAlias = tuple[Tensor, Tensor]  # weight (outputs, inputs / groups, k, k) and bias (outputs)


class PlainConv(nn.Module):
    """One convolution with bias, where there were branches; then squeeze-and-excite and GELU where those had them."""

    def __init__(self, conv: nn.Conv2d, se: nn.Module | None = None, act: nn.Module | None = None) -> None:
        super().__init__()
        self.reparam_conv = conv
        self.se = se or nn.Identity()
        self.act = act or nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        return self.act(self.se(self.reparam_conv(features)))


class ConvNorm(nn.Module):
    """A convolution without bias, padded by half its kernel, then batch norm."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int, *, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        padding = kernel_size // 2
        self.conv = nn.Conv2d(inputs, outputs, kernel_size, stride=stride, padding=padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, features: Tensor) -> Tensor:
        return self.bn(self.conv(features))

    def kernel(self) -> Kernel:
        """The kernel of the one convolution that does both."""
        return folded_norm(self.conv.weight, self.bn)


class SqueezeExcite(nn.Module):
    """Weigh channels by what all pixels together say: ``x · sigmoid(fc2(relu(fc1(mean(x)))))``."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        mean = features.mean((2, 3), keepdim=True)  # a pool of the picture's size would export as a constant
        return features * self.fc2(F.relu(self.fc1(mean))).sigmoid()


class MobileOne(nn.Module):
    """``act(se(conv-norm(x) + scaled(x) + norm(x)))`` of MobileOne, with the branches that it has.

    ``scale_branch`` is a 1x1 conv-norm beside a larger kernel; the bare norm exists wherever shapes allow it.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel_size: int,
        *,
        stride: int = 1,
        groups: int = 1,
        scale_branch: bool = True,
        se: nn.Module | None = None,
        act: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.stride, self.groups = stride, groups
        self.conv_kxk = nn.ModuleList([ConvNorm(inputs, outputs, kernel_size, stride=stride, groups=groups)])
        self.conv_scale: ConvNorm | None = None
        self.identity: nn.BatchNorm2d | None = None
        if scale_branch and kernel_size > 1:
            self.conv_scale = ConvNorm(inputs, outputs, 1, stride=stride, groups=groups)
        if inputs == outputs and stride == 1:
            self.identity = nn.BatchNorm2d(inputs)
        self.se = se or nn.Identity()
        self.act = act or nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        total = self.main(features)
        for branch in (self.conv_scale, self.identity):
            if branch is not None:
                total = total + branch(features)
        return self.act(self.se(total))

    @property
    def main(self) -> ConvNorm:
        """The branch of the full kernel; MobileOne allows several, FastViT has one."""
        branch = self.conv_kxk[0]
        assert isinstance(branch, ConvNorm)
        return branch

    def kernel(self) -> Kernel:
        """The kernel of the one convolution that does what the branches do together."""
        kernel = self.main.kernel()
        if self.conv_scale is not None:
            kernel = added(kernel, self.conv_scale.kernel())
        if self.identity is not None:
            kernel = added(kernel, folded_norm(identity_kernel(self.main.conv), self.identity))
        return kernel

    def fold(self) -> PlainConv:
        """The same with one convolution."""
        return PlainConv(plain_conv(self.kernel(), stride=self.stride, groups=self.groups), self.se, self.act)


class LargeKernelConv(nn.Module):
    """7x7 and 3x3 conv-norms with stride 2, summed: half the grid, ``outputs / inputs`` filters on each channel."""

    def __init__(self, inputs: int, outputs: int, *, se: nn.Module | None = None, act: nn.Module | None = None) -> None:
        super().__init__()
        self.groups = inputs
        self.large_conv = ConvNorm(inputs, outputs, 7, stride=2, groups=inputs)
        self.small_conv = ConvNorm(inputs, outputs, 3, stride=2, groups=inputs)
        self.se = se or nn.Identity()
        self.act = act or nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        return self.act(self.se(self.large_conv(features) + self.small_conv(features)))

    def fold(self) -> PlainConv:
        """The same with one convolution."""
        kernel = added(self.large_conv.kernel(), self.small_conv.kernel())
        return PlainConv(plain_conv(kernel, stride=2, groups=self.groups), self.se, self.act)


class PositionConv(nn.Module):
    """``x + depthwise(x)``: what tells positions apart, through the zeros around the grid, at any size of it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pos_enc = nn.Conv2d(width, width, 7, padding=3, groups=width)

    def forward(self, features: Tensor) -> Tensor:
        return self.pos_enc(features) + features

    def fold(self) -> PlainConv:
        """The same with one convolution."""
        assert self.pos_enc.bias is not None
        kernel = self.pos_enc.weight + identity_kernel(self.pos_enc), self.pos_enc.bias
        return PlainConv(plain_conv(kernel, groups=self.pos_enc.groups))


class LayerScale(nn.Module):
    """One factor per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width, 1, 1), 1e-5))

    def forward(self, features: Tensor) -> Tensor:
        return features * self.gamma


class BareNorm(nn.Module):
    """A batch norm under the name that it has as a branch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.identity = nn.BatchNorm2d(width)

    def forward(self, features: Tensor) -> Tensor:
        return self.identity(features)


class RepMixer(nn.Module):
    """``x + λ · (mixer(x) - norm(x))``: tokens mixed by a depthwise 3x3 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mixer = MobileOne(width, width, 3, groups=width)
        self.norm = BareNorm(width)
        self.layer_scale = LayerScale(width)

    def forward(self, features: Tensor) -> Tensor:
        return features + self.layer_scale(self.mixer(features) - self.norm(features))

    def fold(self) -> PlainConv:
        """The same with one convolution: ``W = I + λ · (M - N)``."""
        groups, scale = self.mixer.groups, self.layer_scale.gamma
        weight, bias = self.mixer.kernel()
        same = identity_kernel(self.mixer.main.conv)
        normed, shift = folded_norm(same, self.norm.identity)
        kernel = same + scale.unsqueeze(-1) * (weight - normed), scale.flatten() * (bias - shift)
        return PlainConv(plain_conv(kernel, groups=groups))


def folded_norm(weight: Tensor, norm: nn.BatchNorm2d) -> Kernel:
    """A convolution without bias and the batch norm behind it: ``W · γ/√(σ²+ε)``, ``β - μ · γ/√(σ²+ε)``."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return weight * scale.view(-1, 1, 1, 1), norm.bias - norm.running_mean * scale


def identity_kernel(conv: nn.Conv2d) -> Tensor:
    """The weight with which ``conv``, of equal inputs and outputs and stride 1, gives back what it gets."""
    weight = torch.zeros_like(conv.weight)
    channels, middle = torch.arange(weight.shape[0], device=weight.device), weight.shape[-1] // 2
    weight[channels, channels % weight.shape[1], middle, middle] = 1.0
    return weight


def added(kernel: Kernel, smaller: Kernel) -> Kernel:
    """The sum of two convolutions of one stride, the second's weight centred in the first's."""
    border = (kernel[0].shape[-1] - smaller[0].shape[-1]) // 2
    return kernel[0] + F.pad(smaller[0], [border] * 4), kernel[1] + smaller[1]


def plain_conv(kernel: Kernel, *, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution with ``kernel``, padded by half of it."""
    weight, bias = (tensor.detach() for tensor in kernel)
    outputs, inputs, size, _ = weight.shape
    with torch.device("meta"):
        conv = nn.Conv2d(inputs * groups, outputs, size, stride=stride, padding=size // 2, groups=groups)
    conv.weight, conv.bias = nn.Parameter(weight), nn.Parameter(bias)
    return conv
