"""Wide residual network (Zagoruyko & Komodakis 2016, arXiv 1605.07146) for square images of at least 8 pixels.

Variant "jem": what the JEM family's code and EB-JDAT's released code make of it. Convolutions have a bias also beside batch norm,
a block's stride lies on its second convolution, the shortcut takes the block's input as it is, batch norm's running statistics keep
a tenth of their old value, and chains count in them. At 28-10 about 13 % more multiply-adds.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ebjdat.models.modes import repeated
from ebjdat.pixels import internal_from_unit
from ebjdat.settings import ModelSettings


def _norm(settings: ModelSettings, channels: int) -> nn.Module:
    momentum = 0.9 if settings.variant == "jem" else 0.1  # torch's: the share of the new value
    return nn.BatchNorm2d(channels, momentum=momentum) if settings.norm == "batch" else nn.Identity()


def _biased(settings: ModelSettings) -> bool:
    return settings.norm == "none" or settings.variant == "jem"


class Block(nn.Module):
    """Pre-activation residual block of two 3x3 convolutions."""

    def __init__(self, settings: ModelSettings, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        bias = _biased(settings)
        self.slope, self.raw_shortcut = settings.negative_slope, settings.variant == "jem"
        first, second = (1, stride) if settings.variant == "jem" else (stride, 1)
        self.norm1 = _norm(settings, channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, first, 1, bias=bias)
        self.norm2 = _norm(settings, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, second, 1, bias=bias)
        self.shortcut = nn.Conv2d(channels_in, channels, 1, stride, bias=bias) if stride > 1 or channels_in != channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.norm1(x), self.slope)
        skip = x if self.shortcut is None else self.shortcut(x if self.raw_shortcut else h)
        h = F.leaky_relu(self.norm2(self.conv1(h)), self.slope)
        return skip + self.conv2(h)


class WideResNet(nn.Module):
    """WRN-depth-width: images (B, C, H, W) in [-1, 1] -> logits (B, K).

    `stem` (the first convolution) and `trunk` (the rest) are exposed because PYLD steps through the stem alone. Under
    autocast the head stays in fp32, and with it the logits: bf16 resolves an energy of 10 only to 0.06.

    recompute: run each block again in the backward pass instead of keeping what is inside it, where weights have gradients.
    """

    recompute = False

    def __init__(self, settings: ModelSettings, channels: int, classes: int) -> None:
        super().__init__()
        blocks = (settings.depth - 4) // 6
        widths = [16, 16 * settings.width, 32 * settings.width, 64 * settings.width]
        self.slope = settings.negative_slope
        self.chains_update_statistics = settings.variant == "jem"
        self.stem = nn.Conv2d(channels, widths[0], 3, 1, 1, bias=_biased(settings))
        layers = []
        for group in range(3):
            for i in range(blocks):
                channels_in = widths[group] if i == 0 else widths[group + 1]
                stride = 2 if group > 0 and i == 0 else 1
                layers.append(Block(settings, channels_in, widths[group + 1], stride))
        self.blocks = nn.Sequential(*layers)
        self.norm = _norm(settings, widths[3])
        self.head = nn.Linear(widths[3], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and not module.weight.is_meta:  # there torch would import its compiler, for seconds
                nn.init.kaiming_normal_(module.weight, a=self.slope, mode="fan_in")

    def penultimate(self, h: Tensor) -> Tensor:
        """Stem output (B, 16, H, W) -> pooled features (B, 64 * width), fp32 also under autocast."""
        if self.recompute and torch.is_grad_enabled() and self.head.weight.requires_grad:
            for block in self.blocks:
                h = checkpoint(block, h, use_reentrant=False, preserve_rng_state=False, context_fn=partial(_again, block))
        else:
            h = self.blocks(h)
        h = F.leaky_relu(self.norm(h), self.slope)
        return F.adaptive_avg_pool2d(h.float(), 1).flatten(1)

    def trunk(self, h: Tensor) -> Tensor:
        """Stem output -> logits."""
        features = self.penultimate(h)
        with torch.autocast(features.device.type, enabled=False):
            logits: Tensor = self.head(features)
        return logits

    def stem_gradient(self, p: Tensor) -> Tensor:
        """d<stem(x), p>/dx for p (B, 16, H, W), at any x: the stem's transposed convolution, (B, C, H, W)."""
        return F.conv_transpose2d(p, self.stem.weight, padding=1)

    def features(self, x: Tensor) -> Tensor:
        """Images in [-1, 1] -> penultimate features (B, 64 * width)."""
        return self.penultimate(self.stem(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.trunk(self.stem(x))


def _again(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of a block's forward pass and of its repetition, which must not count twice in batch norm's running statistics."""
    return nullcontext(), repeated(block)


def features_and_logits(network: WideResNet, x: Tensor) -> tuple[Tensor, Tensor]:
    """Images in [0, 1] -> penultimate features (B, 64 * width) and logits (B, K), in one pass."""
    features = network.features(internal_from_unit(x))
    return features, network.head(features)


def build(settings: ModelSettings, channels: int, classes: int, seed: int) -> WideResNet:
    """A freshly initialised network; the same seed gives the same weights, whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return WideResNet(settings, channels, classes)
