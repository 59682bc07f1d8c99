"""Part 2: scales, rounding and its gradient, calibration, a quantized U-Net and its size (Li et al. 2023)."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from autograder.checks import expect, graded
from autograder.checks.oracles import Coefficients, GaussianOracle, images, random_schedule
from difflab.unet import UNet

CHANNELS, TIME_DIM, SIZE = (4, 8), 8, 8  # of the tiny U-Nets, and of their images
ODD = (3, 5)  # channels with which the bits of a layer are no whole number of bytes
OUTER = ("conv_in", "conv_out")  # stay float
# A float32 computation may round a value the other way that float64 puts on the edge between two marks; what that
# changes is far smaller than the quantization error itself, and so is this share of it.
SHARE = 0.05


def _q_max(bits: int) -> int:
    return 2 ** (bits - 1) - 1


def _rounded(x, scale, bits):
    """The nearest of the values that bits-bit integers times the scale can hold."""
    return scale * (x / scale).round().clamp(-_q_max(bits), _q_max(bits))


def _per_channel(w):
    """The largest absolute value of each w[c], [C, 1, ..., 1]."""
    return w.abs().flatten(1).amax(1).view(-1, *[1] * (w.ndim - 1))


# -- one tensor --------------------------------------------------------------------------------------------------------


@graded(points=3, section="Quantization")
def test_symmetric_scale(submission, rng):
    """`symmetric_scale` puts the largest value on the outermost mark, for the tensor or for each channel."""
    for bits in (8, 4, int(torch.randint(2, 12, (), generator=rng))):
        for shape in ((5, 3, 3, 3), (6, 7)):
            size = (3 * images(rng, shape[0])).exp().view(-1, *[1] * (len(shape) - 1))
            x = size * images(rng, *shape)
            x = -x if x.max() == x.abs().max() else x  # the largest of all is negative
            for per_channel in (False, True):
                what = f"symmetric_scale with bits = {bits}" + (", per_channel" if per_channel else "")
                wanted = (shape[0], *[1] * (len(shape) - 1)) if per_channel else ()
                scale = expect.tensor(submission.symmetric_scale(x, bits, per_channel), what, wanted)
                x64 = x.double()
                top = _per_channel(x64) if per_channel else x64.abs().max()
                highest = x64.flatten(1).amax(1).view(top.shape) if per_channel else x64.max()
                spread = x64.flatten(1).amax(1) - x64.flatten(1).amin(1)
                spread = spread.view(top.shape) if per_channel else x64.max() - x64.min()
                q = _q_max(bits)
                mistakes = {
                    "the largest value, not the largest absolute value," if q > 0 else "": highest / q,
                    "q_max = 2^(bits − 1), one too many,": top / (q + 1),
                    "q_max = 2^bits − 1, twice too many,": top / (2**bits - 1),
                    "max − min over 2^bits − 1 (an asymmetric quantizer's)": spread / (2**bits - 1),
                    "the largest value itself, not divided by q_max,": top,
                    "the standard deviation in place of the largest value": (
                        x64.flatten(1).std(1).view(top.shape) if per_channel else x64.std()
                    ) / q,
                    "1 over the scale": q / top,
                }  # fmt: skip
                if per_channel:
                    mistakes["one scale for all channels"] = (x64.abs().max() / q).expand(top.shape)
                expect.close(scale, top / q, what, mistakes, 1e-5, 0)
    _hold_zeros(submission, rng)
    for name, bad in {"NaN": math.nan, "an infinite value": math.inf}.items():
        x = images(rng, 4, 3)
        x[2, 1] = bad
        with expect.raises_value_error(f"symmetric_scale of a tensor that holds {name}"):
            submission.symmetric_scale(x, 8)
    with expect.raises_value_error("symmetric_scale with bits = 1"):
        submission.symmetric_scale(images(rng, 4, 3), 1)


def _hold_zeros(submission, rng):
    """A scale of 1 where all is zero."""
    x = images(rng, 4, 3, 3, 3)
    x[2] = 0
    scale = submission.symmetric_scale(x, 8, True)
    if isinstance(scale, torch.Tensor) and scale.shape == (4, 1, 1, 1) and scale.flatten()[2] != 1:
        expect.fail(f"symmetric_scale of a channel that is all zero should be 1; got {scale.flatten()[2].item():g} "
                    "(a scale of 0 gives 0/0 = NaN when one divides by it).")  # fmt: skip
    expect.close(
        expect.tensor(scale, "symmetric_scale", (4, 1, 1, 1)),
        torch.where(_per_channel(x.double()) > 0, _per_channel(x.double()) / 127, 1.0),
        "symmetric_scale beside a channel that is all zero", None, 1e-5, 0,
    )  # fmt: skip
    scale = expect.tensor(submission.symmetric_scale(torch.zeros(3, 2), 8), "symmetric_scale of zeros", ())
    if scale != 1:
        expect.fail(f"symmetric_scale of a tensor that is all zero should be 1; got {scale.item():g}.")


def _off_the_edges(rng, scale, bits, *shape):
    """Values up to 1.6 times the range, none near the middle between two marks, where rounding is a matter of taste."""
    reach = int(1.6 * _q_max(bits)) + 2
    marks = torch.randint(-reach, reach + 1, shape, generator=rng).double()
    return scale * (marks + 0.9 * (torch.rand(shape, generator=rng).double() - 0.5))


def _hold_rounding(value, x, scale, bits, what):
    """The values are q(x)."""
    q, y = _q_max(bits), x / scale
    mistakes = {
        "a missing clip": scale * y.round(),
        "clipping to −2^(bits − 1), one integer too far,": scale * y.round().clamp(-q - 1, q),
        "rounding down in place of to the nearest": scale * y.floor().clamp(-q, q),
        "rounding toward zero in place of to the nearest": scale * y.trunc().clamp(-q, q),
        "the integers, not multiplied by the scale again,": y.round().clamp(-q, q),
        "bounds that are values, not integers (clip x/s to ±s·q_max),": scale * y.round().clamp(-q * scale, q * scale),
        "q_max = 2^bits − 1": scale * y.round().clamp(-(2**bits - 1), 2**bits - 1),
        "multiplying by the scale first and dividing after": (x * scale).round().clamp(-q, q) / scale,
        "no rounding at all": scale * y.clamp(-q, q),
        "negative values clipped to 0": scale * y.round().clamp(0, q),
    }
    # half a mark is far away from every value, so that nothing but rounding errors is left to tolerate
    expect.close(value, _rounded(x, scale, bits), what, mistakes, 1e-5, 1e-5 * float(scale.max()))


@graded(points=3, section="Quantization")
def test_fake_quantize(submission, rng):
    """`fake_quantize` rounds to the nearest mark and clips; inside the range nothing moves by more than half a mark."""
    for bits in (8, 4, int(torch.randint(2, 9, (), generator=rng))):
        for shape, scale_shape in (((4, 3, 5, 5), ()), ((6, 3, 3, 3), (6, 1, 1, 1)), ((9, 9), ())):
            scale = 0.01 + torch.rand(scale_shape, generator=rng).double()
            scale = scale.float()
            x = _off_the_edges(rng, scale.double(), bits, *shape).float()
            what = f"fake_quantize with bits = {bits}"
            value = expect.tensor(submission.fake_quantize(x, scale, bits), what, shape, torch.float32)
            _hold_rounding(value, x.double(), scale.double(), bits, what)
            inside = x.double().abs() <= _q_max(bits) * scale.double()
            far = ((value.double() - x.double()).abs() > (0.5 + 1e-4) * scale.double()) & inside
            if bool(far.any()):
                expect.fail(f"{what}: a value inside the range moved by more than half a mark.")


@graded(points=3, section="Quantization")
def test_straight_through(submission, rng):
    """`straight_through` has the values of fake_quantize, and a gradient: 1 inside the range, 0 where it clips."""
    for bits in (8, 4, int(torch.randint(3, 9, (), generator=rng))):
        scale = (0.01 + torch.rand((), generator=rng).double()).float()
        x = _off_the_edges(rng, scale.double(), bits, 6, 50).float()
        upstream = 1 + images(rng, 6, 50).abs()
        result = submission.input_gradient(x, scale, bits, upstream)
        value, gradient = expect.tensors(result, "input_gradient", 2)
        own = _own_rounding(submission, x, scale, bits)
        value = expect.tensor(value, "what straight_through returns", (6, 50))
        if own is None or not expect.is_close(value, own, 1e-5, 1e-5 * scale.item()):
            _hold_rounding(value, x.double(), scale.double(), bits, "straight_through")
        gradient = expect.tensor(gradient, "the gradient", (6, 50)).double()
        marks, q = (x.double() / scale.double()).abs(), _q_max(bits)
        # Where clipping begins, at the outermost mark or half a mark behind it, is left to the program.
        clear = (marks < q) | (marks > q + 0.5)
        right = upstream.double() * (marks <= q)
        mistakes = {
            "a gradient of zero everywhere (round has none: see the hint)": torch.zeros(6, 50),
            "a gradient that passes outside the range as well": upstream,
            "a gradient of 1/scale inside the range": right / scale.double(),
            "a gradient multiplied by the scale": right * scale.double(),
            "a gradient of 1 whatever comes from above": (marks <= q).double(),
            "a gradient that passes outside the range and not inside": upstream.double() * (marks > q),
        }
        expect.close(
            torch.where(clear, gradient, 0.0), torch.where(clear, right, 0.0),
            f"the gradient of straight_through with bits = {bits}",
            {name: torch.where(clear, torch.as_tensor(m).double(), 0.0) for name, m in mistakes.items()}, 1e-4, 1e-5,
        )  # fmt: skip


def _own_rounding(submission, x, scale, bits):
    """What the student's own fake_quantize makes of x; None if it does not work."""
    try:
        return expect.tensor(submission.fake_quantize(x, scale, bits), "", tuple(x.shape)).double()
    except expect.NOT_WORKING:
        return None


@graded(points=2, section="Quantization")
def test_fake_quantize_split(submission, rng):
    """`fake_quantize_split` measures each piece of the channels with its own scale."""
    for sizes in ([3, 5], [4], [2, 1, 4]):
        bits = int(torch.randint(3, 9, (), generator=rng))
        scales = [(0.02 * 6**k * (1 + torch.rand((), generator=rng))).float() for k in range(len(sizes))]
        scales = [scales[int(k)] for k in torch.randperm(len(sizes), generator=rng)]
        parts = [_off_the_edges(rng, s.double(), bits, 2, n, 4, 4).float() for s, n in zip(scales, sizes)]
        x = torch.cat(parts, 1)
        what = f"fake_quantize_split of pieces {sizes}"
        value = expect.tensor(submission.fake_quantize_split(x, scales, sizes, bits), what, tuple(x.shape))
        own = [_own_straight(submission, p, s, bits) for p, s in zip(parts, scales)]
        if all(o is not None for o in own) and expect.is_close(
            value, torch.cat(own, 1), 1e-5, 1e-5 * float(max(scales))
        ):
            continue

        def whole(s, parts=parts, bits=bits):
            return torch.cat([_rounded(p.double(), t.double(), bits) for p, t in zip(parts, s)], 1)

        n = len(sizes)
        mistakes = {
            "the first scale for all pieces": whole([scales[0]] * n),
            "the last scale for all pieces": whole([scales[-1]] * n),
            "the largest scale for all pieces": whole([max(scales)] * n),
            "the scales in the wrong order": whole(scales[::-1]),
            "no rounding at all": x,
        }
        if n == 2:
            swapped = x.double().split(sizes[::-1], 1)
            cut = [_rounded(p, s.double(), bits) for p, s in zip(swapped, scales)]
            mistakes["a cut at the size of the second piece"] = torch.cat(cut, 1)
        expect.close(value, whole(scales), what, mistakes, 1e-5, 1e-5 * float(max(scales)))
    x, s = images(rng, 2, 6, 3, 3), torch.tensor(0.1)
    with expect.raises_value_error("fake_quantize_split with pieces of [2, 3] channels for 6"):
        submission.fake_quantize_split(x, [s, s], [2, 3], 8)
    with expect.raises_value_error("fake_quantize_split with one scale for two pieces"):
        submission.fake_quantize_split(x, [s], [2, 4], 8)


def _own_straight(submission, x, scale, bits):
    """What the student's own straight_through makes of x; None if it does not work."""
    try:
        value, _ = expect.tensors(submission.input_gradient(x, scale, bits, torch.ones_like(x)), "", 2)
        return expect.tensor(value, "", tuple(x.shape)).double()
    except expect.NOT_WORKING:
        return None


# -- calibration -------------------------------------------------------------------------------------------------------


@graded(points=4, section="Quantization")
def test_calibration_set(submission, rng):
    """`calibration_set` keeps every so many states of the model's own trajectory; `one_timestep_set` keeps one."""
    schedule = random_schedule(rng)
    c, last = Coefficients(schedule), schedule.num_timesteps - 1
    for num_steps, every in ((20, 5), (10, 3), (6, 1)):
        network, x_T = GaussianOracle(schedule), images(rng, 3, 1, 4, 4)
        what = f"calibration_set with num_steps = {num_steps}, every = {every}"
        pair = expect.tensors(submission.calibration_set(network, schedule, x_T, num_steps, every), what, 2)
        timesteps, states = _path(network, c, x_T, num_steps, last)
        kept = list(range(0, num_steps, every))
        x, t = _held_pair(pair, what, 3 * len(kept), x_T)
        if network.recorded and len(network.calls) > num_steps:
            expect.fail(f"{what} should make at most {num_steps} network calls; it made {len(network.calls)}.")
        if network.grad_enabled:
            expect.fail("calibration_set should ask the network without gradients (ddim_states does).")
        right_t = torch.tensor([timesteps[k] for k in kept]).repeat_interleave(3)
        shifted = torch.tensor([timesteps[min(k + every - 1, num_steps - 1)] for k in kept]).repeat_interleave(3)
        if not torch.equal(t.double(), right_t.double()):
            why = (
                f" (these are the steps number {every - 1}, {2 * every - 1}, …: start with the first)"
                if every > 1 and torch.equal(t.double(), shifted.double())
                else " (each state's timestep comes once for each of its images, one state after the other)"
                if torch.equal(t.double().sort().values, right_t.double().sort().values)
                else ""
            )
            expect.fail(f"{what}: the timesteps should be {_brief(right_t)}; got {_brief(t)}{why}.")
        right = torch.cat([states[k] for k in kept])
        mistakes = {
            "the state after each step, not the one before it (which the network is shown at t),": torch.cat(
                [states[k + 1] for k in kept]
            ),
            "x_T at every timestep": x_T.repeat(len(kept), 1, 1, 1),
            "the noise predictions": torch.cat([network.predict(states[k].float(), t[:3] * 0 + timesteps[k]).double()
                                                for k in kept]),
            "the finished samples": states[-1].repeat(len(kept), 1, 1, 1),
        }  # fmt: skip
        expect.close(x, right, f"{what}: the states", mistakes, 1e-3, 1e-4)
    _hold_one_timestep(submission, schedule, c, last, rng)
    one, two = images(rng, 1, 1, 4, 4), images(rng, 2, 1, 4, 4)
    for name in ("calibration_set", "one_timestep_set"):
        with expect.raises_value_error(f"{name} with a single trajectory"):
            getattr(submission, name)(GaussianOracle(schedule), schedule, one)
        with expect.raises_value_error(f"{name} with no trajectory at all"):
            getattr(submission, name)(GaussianOracle(schedule), schedule, one[:0])
    for every in (0, 11):
        with expect.raises_value_error(f"calibration_set with every = {every} of 10 steps"):
            submission.calibration_set(GaussianOracle(schedule), schedule, two, 10, every)


def _brief(t):
    values = [int(v) for v in t]
    return str(values) if len(values) < 14 else f"[{', '.join(map(str, values[:10]))}, …], {len(values)} in all"


def _path(network, c, x_T, num_steps, last):
    """The timesteps that ddim_states visits, and its states: one more, the samples."""
    timesteps = torch.linspace(last, 0, num_steps).round().long().tolist()
    states = [x_T.double()]
    for t, s in zip(timesteps, [*timesteps[1:], -1]):
        x = states[-1].double()
        eps = network.predict(x, torch.full((len(x),), t))
        states.append(c.ddim_mean(c.predict_x0(x, eps, t), eps, t, s))
    return timesteps, states


def _held_pair(pair, what, count, x_T):
    """(x, t) of the right shapes."""
    t = pair[1]
    if isinstance(t, torch.Tensor) and t.ndim == 1 and bool((t < 0).any()):
        expect.fail(f"{what}: t = −1 is among the timesteps. Those are the samples, which no network is ever shown.")
    x = expect.tensor(pair[0], f"{what}: x", (count, *x_T.shape[1:]))
    return x, expect.tensor(t, f"{what}: t", (count,))


def _hold_one_timestep(submission, schedule, c, last, rng):
    """The state before one step, with exactly that many network calls."""
    for step in (0, 4):
        network, x_T = GaussianOracle(schedule), images(rng, 3, 1, 4, 4)
        what = f"one_timestep_set with step = {step} of 10"
        x, t = _held_pair(
            expect.tensors(submission.one_timestep_set(network, schedule, x_T, step, 10), what, 2), what, 3, x_T
        )
        calls = len(network.calls)
        timesteps, states = _path(network, c, x_T, 10, last)
        if bool((t != timesteps[step]).any()):
            expect.fail(f"{what}: t should be {timesteps[step]} for every image; got {_brief(t)}.")
        expect.close(x, states[step], f"{what}: x", {"the state after that step": states[step + 1]}, 1e-3, 1e-4)
        if calls != step:
            expect.fail(f"{what} should make exactly {step} network calls; it made {calls}.")
    two = images(rng, 2, 1, 4, 4)
    for step in (-1, 10):
        with expect.raises_value_error(f"one_timestep_set with step = {step} of 10"):
            submission.one_timestep_set(GaussianOracle(schedule), schedule, two, step, 10)


# -- a tiny network, on both sides -------------------------------------------------------------------------------------


def tiny_network(rng, attention: bool = True, channels: tuple[int, ...] = CHANNELS) -> UNet:
    """A U-Net small enough for a check, in float64, with weights that let every layer matter."""
    torch.manual_seed(int(torch.randint(2**31, (), generator=rng)))
    network = UNet(channels, TIME_DIM, 1, attention).double().eval().requires_grad_(False)
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:  # outputs of one size, from channels of several sizes
            fan_in = parameter[0].numel()
            size = torch.exp(0.7 * torch.randn(len(parameter), *[1] * (parameter.ndim - 1), dtype=torch.float64))
            parameter.copy_(size * torch.randn_like(parameter) / fan_in**0.5)
        elif name.endswith("bias"):
            parameter.copy_(0.3 * torch.randn_like(parameter))
    network.conv_in.weight *= 3  # the skip connections of the first level are the larger halves
    return network


def _inputs(rng, count: int):
    """(x, t) for the tiny network: images of different sizes, so that no batch stands for the others."""
    size = torch.exp(images(rng, count, 1, 1, 1).double())
    return size * images(rng, count, 1, SIZE, SIZE).double(), torch.randint(1000, (count,), generator=rng)


def _pieces(network: UNet, split: bool) -> dict[str, list[int]]:
    """Layer -> channels of its pieces; layers behind a concatenation have two."""
    found, widths = {}, network.config["channels"]
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d) and name not in OUTER:
            found[name] = [layer.in_channels]
            if split and name.startswith("up.") and not name.endswith("conv2"):
                skip = widths[len(widths) - 1 - int(name.split(".")[1])]
                found[name] = [layer.in_channels - skip, skip]
    return found


def _watch(network: UNet, names, x, t) -> dict[str, torch.Tensor]:
    """The inputs of the layers, for the whole set at once."""
    seen, handles = {}, []
    for name in names:
        layer = network.get_submodule(name)
        handles.append(layer.register_forward_pre_hook(lambda _l, inputs, name=name: seen.update({name: inputs[0]})))
    network(x, t)
    for handle in handles:
        handle.remove()
    return seen


def _by_hand(
    network, x, t, scales, pieces, weight_bits, activation_bits, *,
    per_channel=True, weights=True, activations=True, split_weights=True, also=(), bias=False,
):  # fmt: skip
    """What the network answers when hooks round the inputs of its layers and its weights are rounded beforehand."""
    state = {name: value.clone() for name, value in network.state_dict().items()}
    handles = []
    for name in (*pieces, *also):
        layer = network.get_submodule(name)
        sizes = pieces.get(name, [layer.in_channels])
        if weights:
            cut = sizes if split_weights else [layer.in_channels]
            parts = []
            for w in layer.weight.split(cut, 1):
                top = _per_channel(w) if per_channel else w.abs().max()
                parts.append(_rounded(w, torch.where(top > 0, top, 1.0) / _q_max(weight_bits), weight_bits))
            layer.weight.copy_(torch.cat(parts, 1))
            if bias:
                top = layer.bias.abs().max() / _q_max(weight_bits)
                layer.bias.copy_(_rounded(layer.bias, top, weight_bits))
        if activations and name in pieces:

            def round_input(_layer, inputs, name=name, sizes=sizes):
                parts = inputs[0].split(sizes, 1)
                return torch.cat([_rounded(p, s.double(), activation_bits) for p, s in zip(parts, scales[name])], 1)

            handles.append(layer.register_forward_pre_hook(round_input))
    answer = network(x, t)
    for handle in handles:
        handle.remove()
    network.load_state_dict(state)
    return answer


def _held_scales(result, pieces, what) -> dict[str, list[torch.Tensor]]:
    """Name -> positive scales, as many as there are pieces."""
    if not isinstance(result, dict):
        expect.fail(f"{what} should be a dict, name of the layer → list of scales; got "
                    f"{'None: is a `return` missing?' if result is None else type(result).__name__}.")  # fmt: skip
    outer = [name for name in OUTER if name in result]
    if outer:
        expect.fail(f"{what}: {' and '.join(outer)} stay float and need no scale (see input_pieces).")
    missing = [name for name in pieces if name not in result]
    if missing:
        expect.fail(f"{what}: there is no scale for {missing[0]}.")
    held = {}
    for name, sizes in pieces.items():
        scales = result[name]
        if isinstance(scales, torch.Tensor) and scales.ndim == 1:
            scales = list(scales)
        if not isinstance(scales, list) or len(scales) != len(sizes):
            count = len(scales) if isinstance(scales, list) else "no list of"
            expect.fail(f"{what}: {name} has {len(sizes)} piece(s) and needs a list of as many scales; got {count}.")
        held[name] = [expect.tensor(s, f"{what}: a scale of {name}", ()).double() for s in scales]
        if not all(s > 0 for s in held[name]):
            expect.fail(f"{what}: a scale of {name} is not positive.")
    return held


@graded(points=4, section="Quantization")
def test_activation_scales(submission, rng):
    """`activation_scales` finds, over the whole set, the best of ten ranges for every piece of every layer's input."""
    network = tiny_network(rng)
    trial = submission.QuantizationTrial(network.state_dict(), CHANNELS, TIME_DIM)
    x, t = _inputs(rng, 18)
    for bits, split in ((3, True), (8, True), (4, False)):
        what = f"activation_scales with bits = {bits}, split = {split}"
        pieces = _pieces(network, split)
        scales = _held_scales(trial.scales(x, t, bits, split, 5), pieces, what)
        seen = _watch(network, pieces, x, t)
        for name, sizes in pieces.items():
            for got, piece, whole in zip(scales[name], seen[name].split(sizes, 1), [seen[name]] * 2):
                half = " (a half)" * (len(sizes) > 1)
                _hold_scale(submission, got, piece, whole, bits, f"{what}: the scale of {name}{half}")
    if not _same_weights(trial.weights(), network):
        expect.fail("activation_scales should leave the network as it is.")


def _same_weights(state, network) -> bool:
    """Does a state dict hold the network's weights?"""
    own = network.state_dict()
    return (
        isinstance(state, dict)
        and state.keys() == own.keys()
        and all(isinstance(value, torch.Tensor) and torch.equal(value, own[name]) for name, value in state.items())
    )


def _hold_scale(submission, got, piece, whole, bits, what):
    """One of the ten candidates, and as good as the best of them."""
    q = _q_max(bits)

    def best(values, top=None):
        """(scale, error) of the best of the ten ranges for these values."""
        top = values.abs().max() if top is None else top
        candidates = [top * r / 10 / q for r in range(1, 11)]
        return min(((error(s, values), s) for s in candidates), key=lambda pair: pair[0])[1]

    def error(scale, values=piece):
        return (_rounded(values, scale, bits) - values).square().sum().item()

    top = piece.abs().max()
    if top == 0:
        expect.close(got, torch.tensor(1.0), what, None, 1e-5, 0)
        return
    right = best(piece)
    # Two ranges may be equally good up to rounding; the error of what was chosen decides.
    if error(got) <= error(right) * (1 + 1e-4) and is_candidate(got, top, q):
        return
    if _best_of_own(submission, got, piece, bits):
        return  # the points for a wrong scale or rounding are lost there
    batches = piece.split(5)
    mistakes = {
        "the whole range, never clipped,": top / q,
        "the last batch alone": best(batches[-1]),
        "the first batch alone": best(batches[0]),
        "the mean over the batches": torch.stack([best(b) for b in batches]).mean(),
        "the largest value of the last batch as the range to start from": best(piece, batches[-1].abs().max()),
        "the sum of absolute errors in place of squared": min(
            ((_rounded(piece, top * r / 10 / q, bits) - piece).abs().sum().item(), top * r / 10 / q)
            for r in range(1, 11)
        )[1],
        "both halves together": best(whole),
        "errors of the last batch alone": min(
            (error(top * r / 10 / q, batches[-1]), top * r / 10 / q) for r in range(1, 11)
        )[1],
        "the largest value in place of the largest absolute value": best(piece, piece.max().clamp(min=1e-9)),
        "the range, not divided by q_max,": right * q,
    }
    expect.close(got, right, what, mistakes, 1e-4, 0)


def is_candidate(scale, top, q) -> bool:
    """Is it one of r max / q_max, r = 0.1 ... 1?"""
    r = (scale * q / top * 10).item()
    return 0.99 < r < 10.01 and abs(r - round(r)) < 1e-3


def _best_of_own(submission, got, piece, bits) -> bool:
    """Is it the best of ten ranges when the student's own functions, which are wrong, make the scale and round?"""
    try:
        whole = expect.tensor(submission.symmetric_scale(piece, bits), "", ()).double()
        for full in (whole, piece.abs().max() / _q_max(bits)):
            scales = [full * r / 10 for r in range(1, 11)]
            errors = [
                (expect.tensor(submission.fake_quantize(piece, scale, bits), "", tuple(piece.shape)) - piece)
                .square().sum().item() for scale in scales
            ]  # fmt: skip
            if any(e <= min(errors) * (1 + 1e-4) and abs(s / got - 1) < 1e-4 for e, s in zip(errors, scales)):
                return True
    except expect.NOT_WORKING:
        pass
    return False


# -- quantized layers and networks -------------------------------------------------------------------------------------


def _near(actual, right, plain) -> bool:
    """Is `actual` the rounded answer, up to a few values that fell on the other side of an edge?"""
    return bool((actual - right).square().mean().sqrt() <= SHARE * (right - plain).square().mean().sqrt() + 1e-9)


def _hold_answer(actual, right, plain, mistakes, what):
    """`actual` is what rounding by hand gives; otherwise name the likeliest mistake."""
    actual = actual.double()
    if _near(actual, right, plain):
        return
    distance = (actual - right).square().mean().sqrt().item()
    offs = {name: (actual - value).square().mean().sqrt().item() for name, value in mistakes.items()}
    name = min(offs, key=offs.get)
    if offs[name] < 0.2 * distance:
        expect.fail(f"{what}: these values are what {name} gives.")
    share = distance / (right - plain).square().mean().sqrt().item()
    expect.fail(f"{what} differs from rounding by hand by {share:.0%} of what the rounding itself changes.")


@graded(points=4, section="Quantization")
def test_quantized_conv(submission, rng):
    """`QuantizedConv2d.forward` convolves rounded inputs with rounded weights, and lets gradients through."""
    for sizes, stride, weight_bits, activation_bits in (([4], 2, 4, 6), ([3, 5], 1, 3, 4), ([2, 6], 1, 5, 3)):
        channels = sum(sizes)
        weight = torch.exp(images(rng, 6, 1, 1, 1).double()) * images(rng, 6, channels, 3, 3).double()
        if len(sizes) == 2:
            weight[:, sizes[0] :] *= 4
        bias = images(rng, 6).double()
        scales = [
            0.3 * 3.0**k / _q_max(activation_bits) * torch.ones((), dtype=torch.float64) for k in range(len(sizes))
        ]
        # None of the inputs is beyond the range, where a gradient may be lost at the outermost mark or a little later.
        x = torch.cat([_q_max(activation_bits) * s * (2 * torch.rand(3, n, 7, 7, generator=rng).double() - 1)
                       for s, n in zip(scales, sizes)], 1)  # fmt: skip
        out = F.conv2d(x, weight, bias, stride, 1)
        upstream = images(rng, *out.shape).double()
        result = submission.layer_trial(x, weight, bias, stride, scales, sizes, weight_bits, activation_bits, upstream)
        y, weight_gradient, x_gradient = expect.tensors(result, "layer_trial", 3)
        what = f"a QuantizedConv2d with pieces of {sizes} channels, stride {stride}"
        y = expect.tensor(y, f"the output of {what},", tuple(out.shape))

        def layer(w, x, b=bias, stride=stride):
            return F.conv2d(x, w, b, stride, 1)

        def weights(cut, bits, per_channel=True, weight=weight):
            parts = []
            for w in weight.split(cut, 1):
                top = _per_channel(w) if per_channel else w.abs().max()
                parts.append(_rounded(w, top / _q_max(bits), bits))
            return torch.cat(parts, 1)

        w_q = weights(sizes, weight_bits)
        x_q = torch.cat([_rounded(p, s, activation_bits) for p, s in zip(x.split(sizes, 1), scales)], 1)
        across = weight.abs().amax((0, 2, 3), keepdim=True) / _q_max(weight_bits)
        mistakes = {
            "the float convolution": out,
            "weights that are not rounded": layer(weight, x_q),
            "an input that is not rounded": layer(w_q, x),
            "one scale for all output channels": layer(weights(sizes, weight_bits, False), x_q),
            "one scale for each input channel": layer(_rounded(weight, across, weight_bits), x_q),
            "a missing bias": layer(w_q, x_q, None),
            "the activations' bits for the weights": layer(weights(sizes, activation_bits), x_q),
            "a bias that is rounded as well": layer(
                w_q, x_q, _rounded(bias, bias.abs().max() / _q_max(weight_bits), weight_bits)
            ),
        }
        if len(sizes) == 2:
            mistakes["weights that are not cut into pieces"] = layer(weights([channels], weight_bits), x_q)
            one = _rounded(x, scales[0], activation_bits)
            mistakes["the first piece's scale for the whole input"] = layer(w_q, one)
        if not _near(y.double(), layer(w_q, x_q), out):
            own = _own_pieces(submission, weight, x, scales, sizes, weight_bits, activation_bits)
            if own is not None and _near(y.double(), layer(*own), out):
                continue  # the points for a wrong scale or rounding are lost there
        _hold_answer(y, layer(w_q, x_q), out, mistakes, f"the output of {what}")
        if not _works(test_straight_through, submission, rng):
            continue
        _hold_layer_gradients(weight_gradient, x_gradient, x_q, w_q, upstream, stride, what)


def _own_pieces(submission, weight, x, scales, sizes, weight_bits, activation_bits):
    """(weights, input) as the student's own functions round them; None if those do not work."""
    try:
        parts = []
        for w in weight.split(sizes, 1):
            scale = submission.symmetric_scale(w.contiguous(), weight_bits, True)
            parts.append(_own_straight(submission, w.contiguous(), expect.tensor(scale, ""), weight_bits))
        rounded = expect.tensor(submission.fake_quantize_split(x, scales, sizes, activation_bits), "", tuple(x.shape))
        return (torch.cat(parts, 1), rounded.double()) if all(part is not None for part in parts) else None
    except expect.NOT_WORKING:
        return None


def _hold_layer_gradients(weight_gradient, x_gradient, x_q, w_q, upstream, stride, what):
    """As if nothing had been rounded on the way back; only the weights that set a scale may differ."""
    right_w = nn.grad.conv2d_weight(x_q, w_q.shape, upstream, stride, 1)
    right_x = nn.grad.conv2d_input(x_q.shape, w_q, upstream, stride, 1)
    for name, got, right in (("weights", weight_gradient, right_w), ("input", x_gradient, right_x)):
        got = expect.tensor(got, f"the gradient of the {name}", tuple(right.shape)).double()
        if got.abs().max() == 0:
            expect.fail(f"no gradient reaches the {name} of {what}: use straight_through.")
        # The largest weight of each channel lies on the edge of the range, and may move its scale: one of many.
        fits = ((got - right).abs() <= 1e-3 * right.abs().max() + 1e-3 * right.abs()).double().mean().item()
        if fits < 0.8:
            expect.fail(f"the gradient of the {name} of {what} is not the convolution's; let it pass straight through.")


@graded(points=3, section="Quantization")
def test_quantize_model(submission, rng):
    """`quantize_model` gives a copy whose convolutions, all but the first and last, are rounded; the original stays."""
    network = tiny_network(rng)
    x, t = _inputs(rng, 12)
    for weight_bits, activation_bits, split in ((3, 5, True), (5, 3, False)):
        trial = submission.QuantizationTrial(network.state_dict(), CHANNELS, TIME_DIM)
        trial.quantize(x, t, weight_bits, activation_bits, split)
        what = f"the network quantized with bits {weight_bits} and {activation_bits}, split = {split},"
        answer = expect.tensor(trial.answer(x, t), f"the answer of {what}", tuple(x.shape))
        if not _same_weights(trial.weights(), network):
            expect.fail("quantize_model should leave the network it is given as it is: work on copy.deepcopy(model).")
        pieces = _pieces(network, split)
        fresh = submission.QuantizationTrial(network.state_dict(), CHANNELS, TIME_DIM)

        def scales_for(bits, split, pieces, fresh=fresh):
            return _held_scales(fresh.scales(x, t, bits, split, 32), pieces, "activation_scales")

        scales = scales_for(activation_bits, split, pieces)
        plain = network(x, t)

        def by_hand(weight_bits=weight_bits, activation_bits=activation_bits, scales=scales, pieces=pieces, **options):
            return _by_hand(network, x, t, scales, pieces, weight_bits, activation_bits, **options)

        other_pieces = _pieces(network, not split)
        other = scales_for(activation_bits, not split, other_pieces)
        of_weight_bits = scales_for(weight_bits, split, pieces)
        mistakes = {
            "the float network": plain,
            "weights that are not rounded": by_hand(weights=False),
            "activations that are not rounded": by_hand(activations=False),
            "conv_in and conv_out rounded as well": by_hand(also=OUTER),
            "weight_bits and activation_bits exchanged": by_hand(activation_bits, weight_bits, of_weight_bits),
            "weight_bits and activation_bits exchanged in the layers": by_hand(activation_bits, weight_bits),
            "the scales that belong to weight_bits": by_hand(scales=of_weight_bits),
            "the other choice of split": by_hand(scales=other, pieces=other_pieces),
            "one scale for all output channels": by_hand(per_channel=False),
            "a network whose attention stays float": by_hand(
                scales=scales, pieces={n: s for n, s in pieces.items() if "attention" not in n}
            ),
            "a network without its 1x1 convolutions rounded": by_hand(
                pieces={n: s for n, s in pieces.items() if network.get_submodule(n).kernel_size == (3, 3)}
            ),
        }
        right = by_hand()
        if not _near(answer.double(), right, plain):
            own = _of_own_layers(submission, network, x, t, scales, pieces, weight_bits, activation_bits)
            if (
                own is not None
                and (answer - own).abs().max() <= 1e-5 * own.abs().max()
                and not _near(own, plain, right)
            ):
                continue  # the points for a wrong layer are lost there
        _hold_answer(answer, right, plain, mistakes, what)


def _of_own_layers(submission, network, x, t, scales, pieces, weight_bits, activation_bits):
    """What the network answers when its layers are the student's own QuantizedConv2d; None if those do not work."""
    handles = []
    for name, sizes in pieces.items():
        layer = network.get_submodule(name)

        def answer(layer, inputs, out, name=name, sizes=sizes):
            result = submission.layer_trial(
                inputs[0].contiguous(), layer.weight, layer.bias, layer.stride[0], scales[name], sizes,
                weight_bits, activation_bits, torch.zeros_like(out),
            )  # fmt: skip
            return expect.tensor(expect.tensors(result, "", 3)[0], "", tuple(out.shape)).double()

        handles.append(layer.register_forward_hook(answer))
    try:
        return network(x, t)
    except expect.NOT_WORKING:
        return None
    finally:
        for handle in handles:
            handle.remove()


def _works(check, submission, rng) -> bool:
    """Does another check pass?"""
    try:
        check(submission, rng)
    except expect.NOT_WORKING:
        return False
    return True


@graded(points=2, section="Quantization")
def test_model_bytes(submission, rng):
    """`model_bytes` counts the bits of quantized weights, their scales, and four bytes for everything else."""
    network = tiny_network(rng, bool(torch.randint(2, (), generator=rng)), ODD)
    plain = 4 * sum(p.numel() for p in network.parameters())
    for weight_bits, activation_bits, split in ((5, 8, True), (3, 4, False)):
        trial = submission.QuantizationTrial(network.state_dict(), ODD, TIME_DIM)
        value = expect.tensor(trial.bytes(None), "model_bytes of a float network", ())
        if value != plain:
            expect.fail(f"model_bytes of a float network should be 4 bytes a parameter, {plain}; got {value.item():g}.")
        what = f"model_bytes of layers with weight_bits = {weight_bits}"
        value = expect.tensor(trial.bytes(weight_bits, activation_bits, split), what, ())

        def count(bits=weight_bits, rounded=math.ceil, channel_scales=1, input_scales=1, bias=4, split=split):
            total = 4 * sum(p.numel() for p in network.time_mlp.parameters())
            for name, sizes in _pieces(network, split).items():
                layer = network.get_submodule(name)
                total += rounded(layer.weight.numel() * bits / 8) + bias * layer.out_channels
                total += 4 * len(sizes) * (channel_scales * layer.out_channels + input_scales)
            return float(total)

        mistakes = {
            "four bytes for every parameter, quantized or not,": count(bits=32, channel_scales=0, input_scales=0),
            "scales left out": count(channel_scales=0, input_scales=0),
            "the scales of the inputs left out": count(input_scales=0),
            "the scales of the weights left out": count(channel_scales=0),
            "activation_bits in place of weight_bits": count(bits=activation_bits),
            "whole bytes for every weight": count(bits=8),
            "bits in place of bytes": count(bits=8 * weight_bits),
            "biases left out": count(bias=0),
            "layers rounded down to whole bytes": count(rounded=math.floor),
            "layers not rounded to whole bytes": count(rounded=lambda n: n),
            "all layers rounded together": float(math.ceil(count(rounded=lambda n: n))),
            "two pieces everywhere they could be" if not split else "one piece everywhere": count(split=not split),
        }
        right = count()
        if value != right:
            expect.close(value, torch.tensor(right), what, mistakes, 0, 0.01)


LEARNED = 0.7  # of the distance to the teacher, what may be left; the solution keeps 0.02 to 0.15
STEPS = 40


@graded(points=2, section="Quantization")
def test_finetune_quantized(submission, rng):
    """`finetune_quantized` brings a network with damaged weights nearer to its teacher, which stays as it is."""
    teacher = tiny_network(rng, attention=False)
    damaged = {
        name: _rounded(w, _per_channel(w) / 3, 3) if w.ndim == 4 else w for name, w in teacher.state_dict().items()
    }
    student = UNet(CHANNELS, TIME_DIM, 1, False).double().eval().requires_grad_(False)
    student.load_state_dict(damaged)
    schedule = random_schedule(rng, num_timesteps=60)
    c = Coefficients(schedule)
    x_0 = torch.sign(images(rng, 4, 1, SIZE, SIZE)).double()[torch.randint(4, (48,), generator=rng)]
    t = torch.randint(60, (48,), generator=rng)
    x = c.noised(x_0, images(rng, *x_0.shape), t)
    target = teacher(x, t)

    def distance():
        return (student(x, t) - target).square().mean().item()

    before = distance()
    trial = submission.QuantizationTrial(teacher.state_dict(), CHANNELS, TIME_DIM)
    losses = trial.finetune(damaged, schedule, x_0, STEPS, 4e-3, 16)
    if not isinstance(losses, list) or len(losses) != STEPS:
        kind = f"{len(losses)} of them" if isinstance(losses, list) else type(losses).__name__
        expect.fail(f"finetune_quantized should return a list of {STEPS} losses, one for each step; got {kind}.")
    losses = [float(expect.tensor(loss, "a loss", ())) for loss in losses]
    if not _same_weights(trial.weights("teacher"), teacher):
        expect.fail("finetune_quantized changed the teacher; train the quantized network alone.")
    weights = trial.weights("student")
    if not isinstance(weights, dict) or weights.keys() != damaged.keys():
        expect.fail("finetune_quantized should train the network it is given, and not change what it is made of.")
    if _same_weights(weights, student):
        expect.fail("finetune_quantized leaves the network as it is: does its optimizer hold its parameters, and is there "
                    "a step?")  # fmt: skip
    student.load_state_dict({name: expect.tensor(weights[name], name, tuple(w.shape)) for name, w in damaged.items()})
    if not 0.15 * before < losses[0] < 7 * before:
        expect.fail(f"the first loss should be about the mean squared distance of the two networks' answers, "
                    f"{before:.3g}; it is {losses[0]:.3g}.")  # fmt: skip
    if not distance() < LEARNED * before:
        expect.fail(f"{STEPS} steps should bring the squared distance to the float network from {before:.3g} "
                    f"below {LEARNED * before:.3g}; it is {distance():.3g}.")  # fmt: skip
