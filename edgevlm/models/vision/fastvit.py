"""FastViT: depthwise convolutions where the grid is large, attention where it is small.

FastViTHD, the encoder of FastVLM, has five stages and a stride of 64: 256 features of a picture of 1024² pixels.
Modules are called as timm calls them.
Sources: Vasu et al. 2023, arXiv:2303.14189; FastVLM, Vasu et al. 2024, arXiv:2412.13303.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from edgevlm.core.errors import ConfigError
from edgevlm.models.vision.branches import (
    ConvNorm,
    LargeKernelConv,
    LayerScale,
    MobileOne,
    PositionConv,
    RepMixer,
    SqueezeExcite,
    plain_conv,
)
from edgevlm.models.vision.reparameterize import replace_children
from edgevlm.shapes.config import FastVitConfig


class FastVit(nn.Module):
    """``(B, 3, H, W)`` to ``(B, H/stride · W/stride, 2 · widths[-1])``, pixels in [0, 1].

    Raises ConfigError for a picture whose sides the stride does not divide.
    """

    def __init__(self, config: FastVitConfig) -> None:
        super().__init__()
        first, last = config.widths[0], config.widths[-1]
        branch = config.stem_scale_branch
        self.stride = config.stride
        self.stem = nn.Sequential(
            MobileOne(3, first, 3, stride=2, scale_branch=branch, act=nn.GELU()),
            MobileOne(first, first, 3, stride=2, groups=first, scale_branch=branch, act=nn.GELU()),
            MobileOne(first, first, 1, act=nn.GELU()),
        )
        self.stages = nn.Sequential(*(Stage(config, index) for index in range(len(config.widths))))
        gate = SqueezeExcite(2 * last, max(1, 2 * last // 16))
        self.final_conv = MobileOne(last, 2 * last, 3, groups=last, se=gate, act=nn.GELU())
        if config.reparameterized:
            replace_children(self, "fold")

    def forward(self, pixel_values: Tensor) -> Tensor:
        self._check(*pixel_values.shape[-2:])
        return self.final_conv(self.stages(self.stem(pixel_values))).flatten(2).transpose(1, 2)

    def _check(self, height: int, width: int) -> None:
        if height % self.stride or width % self.stride:
            raise ConfigError(
                f"pixel_values are {height}x{width}; this encoder needs sides that are multiples of {self.stride}: "
                f"resize or pad the picture"
            )


class Stage(nn.Module):
    """Half the grid (but for the first stage), tell positions apart where attention follows, then blocks."""

    def __init__(self, config: FastVitConfig, index: int) -> None:
        super().__init__()
        width, attention = config.widths[index], config.has_attention(index)
        self.downsample = Downsample(config, index) if index else nn.Identity()
        self.pos_emb = PositionConv(width) if attention else nn.Identity()
        block = AttentionBlock if attention else MixerBlock
        self.blocks = nn.Sequential(*(block(width, config) for _ in range(config.depths[index])))

    def forward(self, features: Tensor) -> Tensor:
        return self.blocks(self.pos_emb(self.downsample(features)))


class Downsample(nn.Module):
    """``(B, C, H, W)`` to ``(B, C', H/2, W/2)``: a large depthwise convolution, then 1x1."""

    def __init__(self, config: FastVitConfig, stage: int) -> None:
        super().__init__()
        inputs, outputs = config.widths[stage - 1], config.widths[stage]
        gate = SqueezeExcite(outputs, max(1, outputs // 4)) if config.has_gate(stage) else None
        act = nn.GELU() if config.downsample_act else None
        self.proj = nn.Sequential(
            LargeKernelConv(inputs, outputs, se=gate, act=act), MobileOne(outputs, outputs, 1, act=nn.GELU())
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.proj(features)


class MixerBlock(nn.Module):
    """Mix tokens by convolution, then channels: ``(B, C, H, W) -> (B, C, H, W)``."""

    def __init__(self, width: int, config: FastVitConfig) -> None:
        super().__init__()
        self.token_mixer = RepMixer(width)
        self.mlp = ConvMlp(width, config.mlp_ratio)
        self.layer_scale: nn.Module = LayerScale(width)

    def forward(self, features: Tensor) -> Tensor:
        features = self.token_mixer(features)
        return features + self.layer_scale(self.mlp(features))

    def bake(self) -> MixerBlock:
        """Itself, the layer scale inside the MLP."""
        if isinstance(self.layer_scale, LayerScale):
            self.mlp.absorb(self.layer_scale.gamma)
            self.layer_scale = nn.Identity()
        return self


class AttentionBlock(nn.Module):
    """Attention over the whole grid, then the MLP: ``(B, C, H, W) -> (B, C, H, W)``."""

    def __init__(self, width: int, config: FastVitConfig) -> None:
        super().__init__()
        self.norm = ChannelNorm(width) if config.attention_norm == "layer" else nn.BatchNorm2d(width)
        self.token_mixer = Attention(width, config.head_dim)
        self.layer_scale_1: nn.Module = LayerScale(width)
        self.mlp = ConvMlp(width, config.mlp_ratio)
        self.layer_scale_2: nn.Module = LayerScale(width)

    def forward(self, features: Tensor) -> Tensor:
        features = features + self.layer_scale_1(self.token_mixer(self.norm(features)))
        return features + self.layer_scale_2(self.mlp(features))

    def bake(self) -> AttentionBlock:
        """Itself, the layer scales inside attention and the MLP."""
        if isinstance(self.layer_scale_1, LayerScale) and isinstance(self.layer_scale_2, LayerScale):
            self.token_mixer.absorb(self.layer_scale_1.gamma)
            self.mlp.absorb(self.layer_scale_2.gamma)
            self.layer_scale_1, self.layer_scale_2 = nn.Identity(), nn.Identity()
        return self


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each pixel of ``(B, C, H, W)``."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Attention(nn.Module):
    """Every pixel of the grid attends to every pixel."""

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, features: Tensor) -> Tensor:
        B, C, H, W = features.shape
        heads = self.qkv(features.flatten(2).transpose(1, 2)).view(B, H * W, 3, -1, self.head_dim)
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(B, H * W, C)
        return self.proj(mixed).transpose(1, 2).reshape(B, C, H, W)

    def absorb(self, scale: Tensor) -> None:
        """Multiply what leaves by ``scale`` (C, 1, 1)."""
        old, self.proj = self.proj, nn.Linear(scale.shape[0], scale.shape[0], device="meta")
        self.proj.weight = nn.Parameter((old.weight * scale.view(-1, 1)).detach())
        self.proj.bias = nn.Parameter((old.bias * scale.flatten()).detach())


class ConvMlp(nn.Module):
    """A depthwise 7x7 convolution with norm, then 1x1 to ``ratio`` times the width, GELU, and back."""

    def __init__(self, width: int, ratio: int) -> None:
        super().__init__()
        self.conv: nn.Module = ConvNorm(width, width, 7, groups=width)
        self.fc1 = nn.Conv2d(width, ratio * width, 1)
        self.fc2 = nn.Conv2d(ratio * width, width, 1)

    def forward(self, features: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.conv(features))))

    def absorb(self, scale: Tensor) -> None:
        """Multiply what leaves by ``scale`` (C, 1, 1), and fold the norm into its convolution."""
        assert isinstance(self.conv, ConvNorm)
        assert self.fc2.bias is not None
        self.conv = plain_conv(self.conv.kernel(), groups=self.conv.conv.groups)
        self.fc2 = plain_conv((self.fc2.weight * scale.unsqueeze(-1), self.fc2.bias * scale.flatten()))
