"""A small noise-prediction U-Net, in two halves that can be called apart.

`encode` runs the down path and the middle, `decode` the up path; `forward` is one after the other. The split lets a
sampler reuse the encoder's features over several timesteps (Li et al. 2023, "Faster Diffusion").
The blocks are those of Ho et al. 2020 (appendix B): GroupNorm, SiLU, 3x3 convolutions, the time embedding added
between the two convolutions, and self-attention at the lowest resolution only.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["UNet", "low_precision", "timestep_embedding"]


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoidal embedding of the timestep (Vaswani et al. 2017, section 3.5; Ho et al. 2020).

    Args:
        t: timesteps, shape [B], integer or floating point (continuous-time solvers pass fractions).
        dim: size of the embedding, even.
        max_period: the longest wavelength, in timesteps.

    Returns:
        float32 tensor [B, dim]: cosines in the first half, sines in the second.

    Raises:
        ValueError: if `dim` is odd.
    """
    if dim % 2:
        raise ValueError(f"the time embedding needs an even dimension, got {dim}; use {dim + 1}")
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angles = t.float()[:, None] * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(8, channels), channels)


class ResBlock(nn.Module):
    """Two 3x3 convolutions with a skip connection; the time embedding enters between them."""

    def __init__(self, in_channels: int, out_channels: int, embedding_dim: int):
        super().__init__()
        self.norm1 = _group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(embedding_dim, out_channels)
        self.norm2 = _group_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)
        # The block starts as the identity, so that depth does not hurt the first steps of training.
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time(embedding)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return self.skip(x) + h


class Attention(nn.Module):
    """Multi-head self-attention over the pixels of a feature map."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = _group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, 3, self.heads, c // self.heads, height * width).unbind(1)
        h = F.scaled_dot_product_attention(q.mT, k.mT, v.mT).mT
        return x + self.out(h.reshape(b, c, height, width))


class UNet(nn.Module):
    """Noise predictor eps_theta(x_t, t) for small single-channel images.

    Args:
        channels: feature channels at each resolution, from full size down; each level halves height and width.
        time_dim: size of the sinusoidal timestep embedding, even.
        in_channels: channels of the image.
        attention: put a self-attention layer on the lowest resolution (down and middle).

    Raises:
        ValueError: for empty `channels`, or an odd `time_dim`.
    """

    def __init__(
        self,
        channels: Sequence[int] = (32, 64, 128),
        time_dim: int = 64,
        in_channels: int = 1,
        attention: bool = True,
    ):
        super().__init__()
        channels = [int(c) for c in channels]
        if not channels or min(channels) < 1:
            raise ValueError(f"channels must be a non-empty list of positive integers, got {channels}")
        if time_dim % 2:
            raise ValueError(f"time_dim must be even, got {time_dim}")
        self.config = {
            "channels": channels,
            "time_dim": time_dim,
            "in_channels": in_channels,
            "attention": attention,
        }
        self.time_dim = time_dim
        embedding_dim = 4 * time_dim
        self.time_mlp = nn.Sequential(
            nn.Linear(time_dim, embedding_dim), nn.SiLU(), nn.Linear(embedding_dim, embedding_dim), nn.SiLU()
        )
        lowest = channels[-1]
        heads = math.gcd(max(1, lowest // 32), lowest)  # heads must divide the channels

        def maybe_attention(level: int) -> nn.Module:
            return Attention(lowest, heads) if attention and level == len(channels) - 1 else nn.Identity()

        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.down = nn.ModuleList()
        self.down_attention = nn.ModuleList()
        self.downsample = nn.ModuleList()
        previous = channels[0]
        for level, width in enumerate(channels):
            self.down.append(ResBlock(previous, width, embedding_dim))
            self.down_attention.append(maybe_attention(level))
            last = level == len(channels) - 1
            self.downsample.append(nn.Identity() if last else nn.Conv2d(width, width, 3, stride=2, padding=1))
            previous = width

        self.middle1 = ResBlock(lowest, lowest, embedding_dim)
        self.middle_attention = maybe_attention(len(channels) - 1)
        self.middle2 = ResBlock(lowest, lowest, embedding_dim)

        self.up = nn.ModuleList()
        self.upsample = nn.ModuleList()
        for level in reversed(range(len(channels))):
            width = channels[level]
            self.up.append(ResBlock(previous + width, width, embedding_dim))
            self.upsample.append(nn.Conv2d(width, channels[level - 1], 3, padding=1) if level else nn.Identity())
            previous = channels[level - 1] if level else width
        self.norm_out = _group_norm(channels[0])
        self.conv_out = nn.Conv2d(channels[0], in_channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    def encode(self, x: Tensor, t: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Down path and middle.

        Args:
            x: images x_t, shape [B, in_channels, H, W], H and W divisible by 2^(levels-1).
            t: timesteps, shape [B], integer or floating point.

        Returns:
            (h, skips): the lowest-resolution features, and one feature map a level for `decode`, full size first.

        Raises:
            ValueError: for an x or t of another shape.
        """
        self._check(x, t)
        embedding = self._embed(t)
        h = self.conv_in(x)
        skips = []
        for block, attention, downsample in zip(self.down, self.down_attention, self.downsample):
            h = attention(block(h, embedding))
            skips.append(h)
            h = downsample(h)
        h = self.middle2(self.middle_attention(self.middle1(h, embedding)), embedding)
        return h, skips

    def decode(self, h: Tensor, skips: Sequence[Tensor], t: Tensor) -> Tensor:
        """Up path.

        Args:
            h, skips: what `encode` returned, possibly at another timestep.
            t: timesteps, shape [B].

        Returns:
            Predicted noise, shape [B, in_channels, H, W].
        """
        embedding = self._embed(t)
        for block, upsample, skip in zip(self.up, self.upsample, reversed(skips)):
            h = block(torch.cat([h, skip], dim=1), embedding)
            if not isinstance(upsample, nn.Identity):
                h = upsample(F.interpolate(h, scale_factor=2.0, mode="nearest"))
        return self.conv_out(F.silu(self.norm_out(h)))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Predicted noise for x_t [B, C, H, W] at timesteps t [B]; same shape as x."""
        return self.decode(*self.encode(x, t), t)

    def _embed(self, t: Tensor) -> Tensor:
        return self.time_mlp(timestep_embedding(t, self.time_dim).to(self.time_mlp[0].weight.dtype))

    def _check(self, x: Tensor, t: Tensor) -> None:
        in_channels, factor = self.config["in_channels"], 2 ** (len(self.config["channels"]) - 1)
        if x.ndim != 4 or x.shape[1] != in_channels or x.shape[2] % factor or x.shape[3] % factor:
            raise ValueError(
                f"x must have shape [B, {in_channels}, H, W] with H and W divisible by {factor}, got {list(x.shape)}"
            )
        if t.shape != (x.shape[0],):
            raise ValueError(
                f"t must hold one timestep per image, shape [{x.shape[0]}], got {list(t.shape)}; "
                "use torch.full((len(x),), t, device=x.device)"
            )


@contextlib.contextmanager
def low_precision(model: nn.Module, precision: str, device: str) -> Iterator[None]:
    """Run the network in bfloat16 inside the block (for precision "bfloat16"); its answers are float32 either way."""
    handle = model.register_forward_hook(lambda _module, _inputs, eps: eps.float())
    try:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bfloat16"):
            yield
    finally:
        handle.remove()
