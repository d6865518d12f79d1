"""A small hybrid encoder: convolutions first, attention where the grid is small.

The idea is FastViT's (Vasu et al. 2023, arXiv:2303.14189): mix tokens with a depthwise convolution whose
residual folds into its weights, and channels with 1x1 convolutions.  ``reparameterize`` folds every batch
norm and that residual, after which the encoder computes the same with fewer layers and cannot be trained
further.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgevlm.models.vision.reparameterize import replace_children
from edgevlm.models.vision.vit import SelfAttention
from edgevlm.shapes.config import HybridConfig


class HybridEncoder(nn.Module):
    """``(B, 3, S, S)`` to ``(B, (S / stride)², widths[-1])``; any S that the stride divides."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        widths, last = config.widths, len(config.widths) - 1
        self.stem = nn.Sequential(
            ConvNorm(3, widths[0] // 2, 3, stride=2),
            nn.GELU(),
            ConvNorm(widths[0] // 2, widths[0], 3, stride=2),
            nn.GELU(),
        )
        stages: list[nn.Module] = []
        for index, (width, depth) in enumerate(zip(widths, config.depths, strict=True)):
            if index:
                stages.append(Downsample(widths[index - 1], width, config.kernel_size))
            block = AttentionBlock if index == last else ConvBlock
            stages.extend(block(width, config) for _ in range(depth))
        self.stages = nn.Sequential(*stages)
        self.norm = nn.LayerNorm(widths[-1])
        if config.reparameterized:
            replace_children(self, "fold")

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.norm(self.stages(self.stem(pixel_values)).flatten(2).transpose(1, 2))


class ConvBlock(nn.Module):
    """Mix tokens, then channels: ``(B, C, H, W) -> (B, C, H, W)``."""

    def __init__(self, width: int, config: HybridConfig) -> None:
        super().__init__()
        self.mixer = Mixer(width, config.kernel_size)
        self.mlp = ConvMlp(width, config.mlp_ratio)

    def forward(self, features: Tensor) -> Tensor:
        features = self.mixer(features)
        return features + self.mlp(features)


class AttentionBlock(nn.Module):
    """A depthwise mixer (which also tells positions apart), attention over the whole grid, then the MLP."""

    def __init__(self, width: int, config: HybridConfig) -> None:
        super().__init__()
        self.mixer = Mixer(width, config.kernel_size)
        self.norm = nn.LayerNorm(width)
        self.attention = SelfAttention(width, width // config.head_dim)
        self.mlp = ConvMlp(width, config.mlp_ratio)

    def forward(self, features: Tensor) -> Tensor:
        features = self.mixer(features)
        B, C, H, W = features.shape
        tokens = features.flatten(2).transpose(1, 2)
        tokens = tokens + self.attention(self.norm(tokens))
        features = tokens.transpose(1, 2).reshape(B, C, H, W)
        return features + self.mlp(features)


class Downsample(nn.Module):
    """Half the grid, from ``inputs`` to ``outputs`` channels: depthwise with stride 2, then 1x1."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int) -> None:
        super().__init__()
        self.reduce = ConvNorm(inputs, inputs, kernel_size, stride=2, groups=inputs)
        self.expand = ConvNorm(inputs, outputs, 1)

    def forward(self, features: Tensor) -> Tensor:
        return F.gelu(self.expand(self.reduce(features)))


class ConvMlp(nn.Module):
    """1x1 convolution with norm to ``ratio`` times the width, GELU, and back."""

    def __init__(self, width: int, ratio: int) -> None:
        super().__init__()
        self.expand = ConvNorm(width, width * ratio, 1)
        self.reduce = ConvNorm(width * ratio, width, 1)

    def forward(self, features: Tensor) -> Tensor:
        return self.reduce(F.gelu(self.expand(features)))


class Mixer(nn.Module):
    """``x + norm(depthwise(x))``: one depthwise convolution once it is folded."""

    def __init__(self, width: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = ConvNorm(width, width, kernel_size, groups=width)

    def forward(self, features: Tensor) -> Tensor:
        return features + self.conv(features)

    def fold(self) -> nn.Conv2d:
        conv = self.conv.fold()
        with torch.no_grad():
            middle = conv.kernel_size[0] // 2
            conv.weight[:, 0, middle, middle] += 1.0
        return conv


class ConvNorm(nn.Module):
    """A convolution without bias, padded to keep the grid, then batch norm."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int, *, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            inputs, outputs, kernel_size, stride=stride, padding=kernel_size // 2, groups=groups, bias=False
        )
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, features: Tensor) -> Tensor:
        return self.norm(self.conv(features))

    def fold(self) -> nn.Conv2d:
        """The same map as one convolution with bias: ``W·γ/√(σ²+ε)``, ``β − μ·γ/√(σ²+ε)``."""
        old, norm = self.conv, self.norm
        size, stride = (old.kernel_size[0], old.kernel_size[1]), (old.stride[0], old.stride[1])
        padding = (size[0] // 2, size[1] // 2)
        conv = nn.Conv2d(old.in_channels, old.out_channels, size, stride=stride, padding=padding, groups=old.groups)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        with torch.no_grad():
            scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
            conv.weight.copy_(old.weight * scale.view(-1, 1, 1, 1))
            assert conv.bias is not None
            conv.bias.copy_(norm.bias - norm.running_mean * scale)
        return conv
