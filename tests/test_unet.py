"""Is the U-Net the sum of its two halves, and does it say what is wrong with its arguments?"""

import json

import pytest
import torch

from difflab.unet import UNet, low_precision, timestep_embedding

T1, T2 = torch.tensor([3, 700]), torch.tensor([40, 900])


def _model(channels=(16, 32), **keywords) -> UNet:
    """A small U-Net in which no weight is zero: the zeros it starts with would hide everything behind them."""
    torch.manual_seed(0)
    model = UNet(channels, time_dim=16, **keywords)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def _images(channels: int = 1) -> torch.Tensor:
    return torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(1))


# -- the two halves ---------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("channels", [(16,), (16, 32), (16, 24, 32)])
def test_decode_of_encode_is_forward(channels):
    model, x = _model(channels), _images()
    h, skips = model.encode(x, T1)
    assert [s.shape[1:] for s in skips] == [(c, 8 >> i, 8 >> i) for i, c in enumerate(channels)]
    assert h.shape == skips[-1].shape
    out = model.decode(h, skips, T1)
    assert torch.equal(out, model(x, T1))
    assert out.shape == x.shape


@torch.no_grad()
def test_decode_takes_the_features_of_another_timestep():
    """Does a decoder at t2 use the encoder's features of t1, and its own time embedding?"""
    model, x = _model(), _images()
    mixed = model.decode(*model.encode(x, T1), T2)
    assert mixed.shape == x.shape
    assert (mixed - model(x, T1)).abs().max() > 1e-3, "the decoder ignores its t"
    assert (mixed - model(x, T2)).abs().max() > 1e-3, "the features do not depend on the encoder's t"


@torch.no_grad()
def test_every_skip_is_used():
    model, x = _model((16, 24, 32)), _images()
    h, skips = model.encode(x, T1)
    for level in range(3):
        without = [torch.zeros_like(s) if i == level else s for i, s in enumerate(skips)]
        assert (model.decode(h, without, T1) - model(x, T1)).abs().max() > 1e-3, f"skip {level}"


# -- what it computes -------------------------------------------------------------------------------------------


def test_gradient_reaches_every_parameter():
    model = _model((16, 32, 32)).double()
    model(_images().double(), T1).square().sum().backward()
    unreached = [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-6]
    assert unreached == []


def test_a_new_model_predicts_zero_noise():
    assert UNet((16, 32), time_dim=16)(_images(), T1).abs().max() == 0


@torch.no_grad()
def test_images_of_a_batch_do_not_mix():
    model, x = _model(), _images()
    alone = torch.cat([model(x[i : i + 1], T1[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(model(x, T1), alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_fractional_timesteps_are_not_rounded():
    model, x = _model(), _images()
    torch.testing.assert_close(model(x, T1.float()), model(x, T1), rtol=0, atol=0)
    assert (model(x, T1 + 0.5) - model(x, T1)).abs().max() > 1e-5


@torch.no_grad()
def test_attention_sits_at_the_lowest_resolution_only():
    """Does one pixel reach the far corner through attention, and only through it?"""
    x = torch.zeros(1, 1, 32, 32)
    spot = x.clone()
    spot[..., 0, 0] = 5
    for attention in (True, False):
        model = _model((16, 16), attention=attention)
        # GroupNorm also reaches everywhere: take it out, so that only convolutions and attention carry.
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, torch.nn.GroupNorm):
                    setattr(module, name, torch.nn.Identity())
        moved = (model(spot, T1[:1]) - model(x, T1[:1]))[..., -1, -1].abs().item()
        assert (moved > 0) == attention


@torch.no_grad()
def test_float64_model_agrees_with_float32():
    x = _images()
    out = _model().double()(x.double(), T1)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out.float(), _model()(x, T1), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("lowest", [1, 20, 80, 100, 128])
def test_any_width_works(lowest):
    """Do the attention heads divide widths that are not multiples of 32, such as a pruned network's?"""
    assert _model((12, lowest))(_images(), T1).shape == (2, 1, 8, 8)


def test_timestep_embedding_is_cosines_then_sines():
    frequencies = torch.tensor([1.0, 0.1, 0.01, 0.001])  # 10000^(-i/4)
    embedding = timestep_embedding(torch.tensor([0.0, 2.5, 40.0]), 8)
    for t, row in zip((0.0, 2.5, 40.0), embedding, strict=True):
        torch.testing.assert_close(row, torch.cat([(t * frequencies).cos(), (t * frequencies).sin()]))


# -- configuration and errors -----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("keywords", [{}, {"attention": False}, {"in_channels": 3}])
def test_config_rebuilds_the_same_network(keywords):
    model = _model(**keywords)
    x = _images(keywords.get("in_channels", 1))
    again = UNet(**json.loads(json.dumps(model.config)))
    again.load_state_dict(model.state_dict())
    assert again.config == model.config
    assert torch.equal(again(x, T1), model(x, T1))


@pytest.mark.parametrize(
    ("shape", "t", "message"),
    [
        ((2, 8, 8), T1, r"x must have shape \[B, 1, H, W\] .* divisible by 2, got \[2, 8, 8\]"),
        ((2, 3, 8, 8), T1, r"got \[2, 3, 8, 8\]"),
        ((2, 1, 7, 8), T1, r"got \[2, 1, 7, 8\]"),
        ((2, 1, 8, 7), T1, r"got \[2, 1, 8, 7\]"),
        ((2, 1, 8, 8), torch.tensor(3), r"one timestep per image, shape \[2\], got \[\]; use torch.full"),
        ((2, 1, 8, 8), torch.tensor([1, 2, 3]), r"shape \[2\], got \[3\]"),
    ],
)
def test_wrong_shapes_are_named(shape, t, message):
    model = _model()
    for call in (model, model.encode):
        with pytest.raises(ValueError, match=message):
            call(torch.zeros(shape), t)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": ()}, r"non-empty list of positive integers, got \[\]"),
        ({"channels": (8, 0)}, r"got \[8, 0\]"),
        ({"time_dim": 15}, "time_dim must be even, got 15"),
    ],
)
def test_impossible_networks_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        UNet(**arguments)


def test_odd_embedding_is_refused():
    with pytest.raises(ValueError, match="even dimension, got 7; use 8"):
        timestep_embedding(T1, 7)


def test_low_precision_ends_with_its_block():
    network = torch.nn.Linear(4, 4)
    seen = []
    network.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with low_precision(network, "bfloat16", "cpu"):
        assert network(torch.ones(1, 4)).dtype == torch.float32
    network(torch.ones(1, 4))
    assert seen == [torch.bfloat16, torch.float32] and len(network._forward_hooks) == 1
