"""Part 2: the time embedding, and a residual block that uses it (Dhariwal and Nichol 2021, section 3)."""

import torch
import torch.nn.functional as F
from torch import nn

from autograder.checks import expect, graded
from autograder.checks.oracles import images


@graded(points=7, section="Network")
def test_time_embedding(submission, rng):
    """`time_embedding` gives sine and cosine of dim/2 geometrically spaced frequencies in turn."""
    for dim in (32, 64, 2 * int(torch.randint(5, 40, (), generator=rng))):
        for t in (
            torch.tensor([1, 0, 2]),
            torch.randint(0, 1000, (7,), generator=rng),
            300 * torch.rand(5, generator=rng),
        ):
            kind = "floating-point t" if t.is_floating_point() else "a LongTensor"
            value = submission.time_embedding(t, dim)
            value = expect.tensor(value, f"time_embedding of {kind}, dim = {dim},", (len(t), dim), torch.float32)
            half, times = dim // 2, t.double()[:, None]
            i = torch.arange(half, dtype=torch.float64)

            def embed(frequencies, times=times):
                angles = times * frequencies
                return torch.stack([angles.sin(), angles.cos()], 2).flatten(1)

            right = embed(10_000 ** (-i / half))
            sin, cos = right[:, 0::2], right[:, 1::2]
            mistakes = {
                "all sines before all cosines": torch.cat([sin, cos], 1),
                "all cosines before all sines": torch.cat([cos, sin], 1),
                "the cosine before the sine": torch.stack([cos, sin], 2).flatten(1),
                "frequencies that rise, 10000^(+i/h),": embed(10_000 ** (i / half)),
                "frequencies that end at 1/10000 (i/(h − 1) in the exponent)": embed(10_000 ** (-i / max(half - 1, 1))),
                "i/dim in place of i/(dim/2) in the exponent": embed(10_000 ** (-i / dim)),
                "2i/(dim/2) in place of i/(dim/2) in the exponent": embed(10_000 ** (-2 * i / half)),
                "evenly spaced frequencies": embed(1 - i / half),
                "angles with a factor 2π": embed(2 * torch.pi * 10_000 ** (-i / half)),
                "t truncated to whole numbers": embed(10_000 ** (-i / half), times.floor()),
            }
            # An angle of 1000 has an error of 1e-4 in float32, in its frequency and in the product.
            expect.close(value, right, f"time_embedding of {kind}, dim = {dim},", mistakes, 0, 4e-4)
    with expect.raises_value_error("time_embedding with an odd dim"):
        submission.time_embedding(torch.arange(3), 7)


class _Block(nn.Module):
    """The block as the lab describes it."""

    def __init__(self, in_channels: int, out_channels: int, embedding_dim: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(4, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(embedding_dim, 2 * out_channels)
        self.norm2 = nn.GroupNorm(4, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def variant(self, x, embedding, *, act1=F.silu, act2=F.silu, time="affine", skip="skip", norm2=True):
        """What the block gives if it is wired in another way."""
        scale, shift = self.time(embedding)[:, :, None, None].chunk(2, 1)
        h = self.conv1(act1(self.norm1(x)))
        if time == "before norm2":
            h = h * (1 + scale) + shift
        h = self.norm2(h) if norm2 else h
        h = {
            "affine": h * (1 + scale) + shift,
            "no one": h * scale + shift,
            "swapped": h * (1 + shift) + scale,
            "shift alone": h + shift,
            "scale alone": h * (1 + scale),
        }.get(time, h)
        h = act2(h)
        if time == "after the activation":
            h = h * (1 + scale) + shift
        h = self.conv2(h)
        if time == "last":
            h = h * (1 + scale) + shift
        return {"skip": self.skip(x) + h, "none": h, "alone": self.skip(x)}[skip]


@graded(points=8, section="Network")
def test_residual_block(submission, rng):
    """`ResidualBlock.forward` wires the block right: activations, scale and shift by the time, the skip connection."""
    torch.manual_seed(int(torch.randint(2**31, (), generator=rng)))
    for channels in ((8, 12), (8, 8)):
        ours = _Block(*channels, 16).double()
        block = submission.ResidualBlock(*channels, 16)
        block.load_state_dict({name: value.float() for name, value in ours.state_dict().items()})
        x, embedding = images(rng, 3, channels[0], 6, 6), images(rng, 3, 16)
        shape = (3, channels[1], 6, 6)
        value = expect.tensor(block.forward(x, embedding), "ResidualBlock.forward", shape)
        x, embedding = x.double(), embedding.double()
        with torch.no_grad():

            def identity(h):
                return h

            mistakes = {
                "a block without the skip connection": ours.variant(x, embedding, skip="none"),
                "the skip connection alone": ours.variant(x, embedding, skip="alone"),
                "a block that does not use the time embedding": ours.variant(x, embedding, time="nowhere"),
                "a scale in place of 1 + scale": ours.variant(x, embedding, time="no one"),
                "scale and shift exchanged": ours.variant(x, embedding, time="swapped"),
                "the shift without the scale": ours.variant(x, embedding, time="shift alone"),
                "the scale without the shift": ours.variant(x, embedding, time="scale alone"),
                "the time before the second normalisation, which undoes most of it,": ours.variant(
                    x, embedding, time="before norm2"
                ),
                "the time after the second activation": ours.variant(x, embedding, time="after the activation"),
                "the time after the second convolution": ours.variant(x, embedding, time="last"),
                "a missing first activation": ours.variant(x, embedding, act1=identity),
                "a missing second activation": ours.variant(x, embedding, act2=identity),
                "no activations": ours.variant(x, embedding, act1=identity, act2=identity),
                "ReLU in place of SiLU": ours.variant(x, embedding, act1=F.relu, act2=F.relu),
                "a missing second normalisation": ours.variant(x, embedding, norm2=False),
            }
            if channels[0] == channels[1]:
                mistakes["the skip connection twice"] = ours.variant(x, embedding) + x
                mistakes["the first image's time embedding for the whole batch"] = ours.variant(
                    x, embedding[:1].expand(3, -1)
                )
            expect.close(value, ours.variant(x, embedding), "what ResidualBlock.forward returns", mistakes, 1e-4, 1e-4)
