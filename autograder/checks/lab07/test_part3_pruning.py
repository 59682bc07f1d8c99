"""Part 3: which channels can go, taking them out, and a little training afterwards.

Nothing here asks torch-pruning: what must be left of a network is worked out from how its layers are wired.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from autograder.checks import expect, graded
from autograder.checks.oracles import Coefficients, RecordingNetwork, images, random_schedule
from autograder.submission.client import StudentError
from difflab.training import noise_prediction_loss
from difflab.unet import UNet

STEPS = 50  # of training in a check
CHANNELS, TIME = [24, 64], 8  # 3 and 8 channels in each of 8 GroupNorm groups, 2 attention heads


def _uniform(rng, low: float, high: float) -> float:
    return low + (high - low) * torch.rand((), generator=rng).item()


@graded(points=2, section="Pruning")
def test_channel_magnitudes(submission, rng):
    """`channel_magnitudes` is the Euclidean norm of each output channel's weights."""
    for shape in ((7, 3, 3, 3), (5, 6), (3, 3, 1, 1)):
        weight = images(rng, *shape, dtype=torch.float64) * (1 + torch.arange(shape[0])).view(
            -1, *[1] * (len(shape) - 1)
        )
        what = f"channel_magnitudes of a weight {list(shape)}"
        scores = expect.tensor(submission.channel_magnitudes(weight), what, (shape[0],))
        flat = weight.reshape(shape[0], -1)
        square = flat.square().sum(1)
        mistakes = {
            "the sum of squares, without its root": square,
            "the sum of absolute values (the L1 norm)": flat.abs().sum(1),
            "the root of the mean square": (square / flat.shape[1]).sqrt(),
            "the mean of absolute values": flat.abs().mean(1),
            "the absolute value of the sum": flat.sum(1).abs(),
            "the largest weight": flat.abs().amax(1),
        }
        if shape[0] == shape[1]:
            mistakes["the norm of each input channel's weights"] = weight.transpose(0, 1).flatten(1).norm(dim=1)
        expect.close(scores, square.sqrt(), what, mistakes, 1e-5, 1e-9)


@graded(points=4, section="Pruning")
def test_channels_to_prune(submission, rng):
    """`channels_to_prune` takes the lowest share or all below a threshold, and never all."""
    for count, ratio in (
        (10, 0.3),
        (16, 0.3),
        (9, 0.4),
        (32, 0.77),
        (12, 0.0),
        (40, _uniform(rng, 0.2, 0.6)),
        (7, 0.85),
    ):
        scores = torch.rand(count, generator=rng).double()
        if abs(ratio * count % 1 - 0.5) < 0.01:
            continue  # halves may be rounded either way
        what = f"channels_to_prune of {count} scores with ratio {ratio:.3g}"
        got = _indices(submission.channels_to_prune(scores, ratio=ratio), what, count)
        _hold_choice(got, scores, math.floor(ratio * count + 0.5), what, int(ratio * count))
    for _ in range(3):
        scores = images(rng, 20, dtype=torch.float64).abs()
        place = int(torch.randint(3, 15, (), generator=rng))
        scores[5] = scores.sort().values[place]
        threshold = scores[5].item()
        got = _indices(
            submission.channels_to_prune(scores, threshold=threshold), "channels_to_prune with a threshold", 20
        )
        below = (scores < threshold).nonzero().flatten().tolist()
        if got == (scores > threshold).nonzero().flatten().tolist():
            expect.fail("channels_to_prune with a threshold returns the channels above it; those are to stay.")
        if got == (scores >= threshold).nonzero().flatten().tolist():
            expect.fail("channels_to_prune with a threshold returns the channels that are to stay.")
        if got == (scores <= threshold).nonzero().flatten().tolist():
            expect.fail("channels_to_prune takes a channel whose score equals the threshold; only those below it go.")
        if got != below:
            expect.fail(f"channels_to_prune with threshold {threshold:.3f} should give {below}; got {got}.")
    none = _indices(submission.channels_to_prune(scores, threshold=0.0), "channels_to_prune with threshold 0", 20)
    if none:
        expect.fail(f"no score is below 0, so nothing goes with threshold 0; got {none}.")
    refused = {
        "channels_to_prune with neither ratio nor threshold": (scores, None, None),
        "channels_to_prune with both a ratio and a threshold": (scores, 0.3, 0.5),
        "channels_to_prune with ratio 1": (scores, 1.0, None),
        "channels_to_prune with ratio 1.5": (scores, 1.5, None),
        "channels_to_prune with ratio −0.2": (scores, -0.2, None),
        "channels_to_prune with a threshold above all scores (no channel would be left)": (scores, None, 1e6),
        "channels_to_prune of 4 scores with ratio 0.9 (no channel would be left)": (scores[:4], 0.9, None),
    }
    for what, (values, ratio, threshold) in refused.items():
        with expect.raises_value_error(what):
            submission.channels_to_prune(values, ratio, threshold)


def _indices(value, what: str, count: int) -> list[int]:
    value = expect.tensor(value, what)
    if value.ndim != 1 or value.dtype != torch.int64:
        expect.fail(f"{what} should be a LongTensor of indices, [K]; got {value.dtype} of shape {list(value.shape)}.")
    got = value.tolist()
    if any(not 0 <= i < count for i in got):
        expect.fail(f"{what} gives the index {max(got, key=abs)}; there are channels 0 to {count - 1}.")
    if len(set(got)) < len(got):
        expect.fail(f"{what} gives an index twice.")
    if got != sorted(got):
        expect.fail(f"{what} should give the indices in ascending order; got {got}.")
    return got


def _hold_choice(got: list[int], scores: Tensor, wanted: int, what: str, truncated: int) -> None:
    count = len(scores)
    order = scores.argsort().tolist()
    if got == sorted(order[wanted:]):
        expect.fail(f"{what} returns the channels that are to stay; the {wanted} with the lowest scores are to go.")
    if got and got == sorted(order[count - len(got) :]):
        expect.fail(f"{what} takes the channels with the highest scores; the least important are to go.")
    if len(got) != wanted:
        why = ": cut off in place of rounded?" if len(got) == truncated else "."
        expect.fail(f"{what} should take round(ratio · C) = {wanted} channels; it takes {len(got)}{why}")
    if got != sorted(order[:wanted]):
        expect.fail(f"{what} should take the lowest scores, channels {sorted(order[:wanted])}; got {got}.")


@graded(points=3, section="Pruning")
def test_taylor_importance(submission, rng):
    """`taylor_importance` is |Σ w·g| of each channel, or Σ |w·g|."""
    for shape in ((6, 4, 3, 3), (5, 9)):
        weight = images(rng, *shape, dtype=torch.float64)
        x = images(rng, 8, shape[1], *[5] * (len(shape) - 2), dtype=torch.float64)
        run = F.conv2d if len(shape) == 4 else F.linear
        # Some channels want to grow and some to shrink, so that the sums have both signs.
        factors = torch.tensor([0.4, 1.7])[torch.arange(shape[0]) % 2].view(-1, *[1] * (len(shape) - 1))
        target = run(x, weight * factors.double())
        target = target + 0.2 * images(rng, *target.shape, dtype=torch.float64)

        def loss(w, x=x, target=target, run=run):
            return (run(x, w) - target).square().mean()

        leaf = weight.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(leaf), leaf)
        # An independent way: the derivative by a factor on all weights of a channel is the sum of w · g.
        gate = torch.ones(shape[0], *[1] * (len(shape) - 1), dtype=torch.float64, requires_grad=True)
        (by_gate,) = torch.autograd.grad(loss(weight * gate), gate)
        each = torch.ones_like(weight, requires_grad=True)
        (by_each,) = torch.autograd.grad(loss(weight * each), each)
        joint, separate = by_gate.flatten().abs(), by_each.flatten(1).abs().sum(1)
        for separately, right, other in ((False, joint, separate), (True, separate, joint)):
            formula = "Σ |w·g|" if separately else "|Σ w·g|"
            what = f"taylor_importance with separately={separately}"
            scores = expect.tensor(submission.taylor_importance(weight, gradient, separately), what, (shape[0],))
            flat_w, flat_g = weight.flatten(1), gradient.flatten(1)
            mistakes = {
                f"{'|Σ w·g|' if separately else 'Σ |w·g|'} in place of {formula}": other,
                "Σ w·g without the absolute value": by_gate.flatten(),
                "the mean in place of the sum": right / flat_w.shape[1],
                "the sum of squares, Σ (w·g)²,": (flat_w * flat_g).square().sum(1),
                "the square of the sum, (Σ w·g)²,": (flat_w * flat_g).sum(1).square(),
                "the root of the sum of squares": (flat_w * flat_g).norm(dim=1),
                "the gradient alone, without the weight,": flat_g.abs().sum(1) if separately else flat_g.sum(1).abs(),
                "the norm of the gradient": flat_g.norm(dim=1),
                "the norm of the weights": flat_w.norm(dim=1),
            }
            expect.close(scores, right, what, mistakes, 1e-5, 1e-9)


# -- gradients over timesteps --------------------------------------------------------------------------------------------

# Losses by timestep, up to a factor. The first that is small beside the largest so far (2.7) is 0.12, beside the first of
# all 0.07, by itself 0.03, and beside the largest of all the very first.
PROFILE = [1.5, 2.7, 2.1, 0.9, 0.36, 0.21, 0.12, 1.2, 0.07, 0.4, 0.03, *[0.3] * 19, 90.0, *[0.25] * 9]


@graded(points=5, section="Pruning")
def test_diffusion_gradients(submission, rng):
    """`diffusion_gradients` sums gradients from t = 0 up, and stops at the first small loss."""
    schedule = random_schedule(rng, num_timesteps=len(PROFILE))
    c = Coefficients(schedule)
    x_0, noise = 0.02 * images(rng, 5, 1, 8, 8, dtype=torch.float64), images(rng, 5, 1, 8, 8, dtype=torch.float64)
    weight = _uniform(rng, 0.6, 1.4)
    spread = (1 - schedule.alphas_cumprod.double()).sqrt()
    profile = torch.tensor(PROFILE, dtype=torch.float64)
    gains = (1 - (profile / noise.square().mean()).sqrt()) / spread / weight
    noisy = [c.noised(x_0, noise, t) for t in range(len(PROFILE))]
    losses = [(weight * gains[t] * x - noise).square().mean() for t, x in enumerate(noisy)]
    slopes = torch.stack([2 * ((weight * gains[t] * x - noise) * gains[t] * x).mean() for t, x in enumerate(noisy)])
    unseen = torch.stack([2 * ((weight * gain * x_0 - noise) * gain * x_0).mean() for gain in gains])
    network = submission.KnownLosses(weight, gains)
    every = list(range(len(PROFILE)))
    for threshold, timesteps in (
        (0.0, None),
        (0.05, None),
        (0.2, None),
        (0.05, [1, 3, 4, 7, 9, 12]),
        (0.05, [3, 5, 8, 30]),
    ):
        looked = every if timesteps is None else timesteps
        kept = _kept(losses, looked, threshold)
        given = "" if timesteps is None else f" and timesteps {timesteps}"
        what = f"diffusion_gradients with threshold {threshold}{given}"
        gradients, got = expect.tensors(
            submission.diffusion_gradients(network, schedule, x_0, noise, threshold, timesteps), what, 2
        )
        got = _timesteps(got, what)
        gradient = _gradient(gradients, what)
        if got != kept:
            _explain_kept(got, kept, losses, looked, threshold, what)
        if kept:
            right = slopes[kept].sum()
            mistakes = {
                "the mean over timesteps in place of the sum": slopes[kept].mean(),
                "the last timestep's gradient alone": slopes[kept[-1]],
                "the sum of absolute gradients": slopes[kept].abs().sum(),
                "a sum without its last timestep": slopes[kept[:-1]].sum(),
                "the sum over pixels in place of the mean": right * noise.numel(),
                "the sum of squares of the gradients": slopes[kept].square().sum(),
                "a sum over all timesteps": slopes[looked].sum(),
                "a network that is shown the clean x_0": unseen[kept].sum(),
            }
            if len(kept) < len(looked):
                mistakes["a sum that has the timestep at which it stops"] = right + slopes[looked[len(kept)]]
            scale = slopes[kept].abs().sum().item()
            expect.close(gradient, right, f"the gradient that {what} sums", mistakes, 1e-3, 1e-3 * scale)
    _hold_network(submission, rng)


def _kept(losses: list[Tensor], looked: list[int], threshold: float) -> list[int]:
    kept, largest = [], 0.0
    for t in looked:
        largest = max(largest, losses[t].item())
        if losses[t].item() <= threshold * largest:
            break
        kept.append(t)
    return kept


def _timesteps(value, what: str) -> list[int]:
    if isinstance(value, Tensor) and value.ndim == 1:
        value = value.tolist()
    if not isinstance(value, list):
        expect.fail(f"the second value of {what} should be the list of timesteps summed over.")
    return [int(expect.tensor(t, "a timestep that was kept", ())) for t in value]


def _gradient(gradients, what: str) -> Tensor:
    if not isinstance(gradients, dict) or list(gradients) != ["weight"]:
        expect.fail(f"the first value of {what} should be a dict with a gradient for each of model.named_parameters().")
    return expect.tensor(gradients["weight"], "the gradient", ())


def _explain_kept(got, kept, losses, looked, threshold, what):
    largest = max(losses[t].item() for t in looked)
    first = losses[looked[0]].item()

    def until(bound):
        count = next((k for k, t in enumerate(looked) if losses[t].item() <= bound), len(looked))
        return looked[:count]

    reasons = {
        "goes on after the first small loss: stop there (break), later timesteps are not looked at": [
            t
            for k, t in enumerate(looked)
            if losses[t].item() > threshold * max(losses[s].item() for s in looked[: k + 1])
        ],
        "takes the timestep at which it stops; its loss is small, leave it out": looked[: len(kept) + 1],
        "compares with the largest of all losses; it is the largest so far": until(threshold * largest),
        "compares with the first loss; it is the largest so far": until(threshold * first),
        "compares the loss itself with the threshold; it is L_t / L_max": until(threshold),
        "keeps all timesteps": looked,
    }
    if got and got[0] == looked[-1] and len(looked) > 1:
        expect.fail(f"{what} begins at the last timestep; go up from t = 0, where the loss is large.")
    for reason, values in reasons.items():
        if got == values:
            expect.fail(f"{what} {reason}.")
    expect.fail(f"{what} should keep the timesteps {_short(kept)}; it keeps {_short(got)}.")


def _short(timesteps: list[int]) -> str:
    return str(timesteps) if len(timesteps) < 12 else f"[{timesteps[0]}, …, {timesteps[-1]}] ({len(timesteps)} of them)"


def _hold_network(submission, rng):
    """A U-Net: every parameter's gradient, twice the same, and the network as it was."""
    schedule = random_schedule(rng, num_timesteps=40)
    ours = _unet(rng, [8, 8], 8, attention=False)
    x_0, noise = images(rng, 4, 1, 8, 8), images(rng, 4, 1, 8, 8)
    timesteps = [0, 2, 11, 30]
    trial = submission.PruningTrial(_weights(ours), [8, 8], 8)
    ours.requires_grad_(True)
    for t in timesteps:
        noise_prediction_loss(ours, schedule, x_0, torch.full((4,), t), noise).mean().backward()
    right = {name: p.grad for name, p in ours.named_parameters()}
    for again in (False, True):
        gradients, _ = expect.tensors(trial.gradients(schedule, x_0, noise, 0.0, timesteps), "diffusion_gradients", 2)
        if not isinstance(gradients, dict) or gradients.keys() != right.keys():
            expect.fail("diffusion_gradients should give a gradient for each of model.named_parameters(), by its name.")
        for name, value in right.items():
            got = expect.tensor(gradients[name], f"the gradient of {name}", tuple(value.shape))
            scale = value.abs().max().item()
            if again and expect.is_close(got, 2 * value.double(), 1e-3, 1e-4 * scale + 1e-6) and scale > 1e-3:
                expect.fail("a second call gives twice the gradients: those of the first are still in .grad.")
            expect.close(got, value, f"the gradient of {name}", None, 1e-3, 1e-3 * scale + 1e-6)
    _hold_untouched(trial, ours, "diffusion_gradients")


def _unet(rng, channels: list[int], time_dim: int, in_channels: int = 1, attention: bool = True) -> UNet:
    """A U-Net with random weights everywhere (as built, its last layers are zero)."""
    network = UNet(channels, time_dim, in_channels, attention).requires_grad_(False).eval()
    for parameter in network.parameters():
        scale = 1.0 if parameter.ndim == 1 else (2 / parameter[0].numel()) ** 0.5
        parameter.copy_(scale * torch.randn(parameter.shape, generator=rng))
    return network


def _weights(network: UNet) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def _hold_untouched(trial, ours: UNet, what: str) -> None:
    now = trial.original()
    for name, value in ours.state_dict().items():
        changed = not isinstance(now, dict) or name not in now or not isinstance(now[name], Tensor)
        if changed or now[name].shape != value.shape or not torch.equal(now[name].float(), value.float()):
            expect.fail(f"{what} changes the network it is given ({name}); work on a copy: copy.deepcopy(model).")


# -- cost ----------------------------------------------------------------------------------------------------------------


@graded(points=3, section="Pruning")
def test_count_macs(submission, rng):
    """`count_macs` counts the work of convolutions and linear layers for one image."""
    for channels, in_channels, height, width, attention in (([8, 16], 1, 8, 8, False), ([8, 24], 2, 12, 20, True)):
        ours = _unet(rng, channels, 8, in_channels, attention)
        trial = submission.PruningTrial(_weights(ours), channels, 8)
        convolutions, linear = _flops(ours, in_channels, height, width)
        right = (convolutions + linear) // 2
        what = f"count_macs of a U-Net for [{in_channels}, {height}, {width}]"
        for _ in range(2):
            got = expect.tensor(trial.macs((in_channels, height, width)), what, ()).item()
            if got != right:
                _explain_count(got, right, convolutions // 2, ours, in_channels, height, width, what)


def _explain_count(got, right, convolutions, ours, in_channels, height, width, what):
    weights = sum(p.numel() for p in ours.parameters() if p.ndim > 1)
    parameters = sum(p.numel() for p in ours.parameters())
    size = (ours, in_channels, height, width)
    mistakes = {
        "the operations, two for each multiply-accumulate,": 2 * right,
        "the count without the linear layers": convolutions,
        "the count without the convolutions": right - convolutions,
        "the number of parameters": parameters,
        "the number of weights": weights,
        "the number of weights of the layers as they run": _count(*size, positions=False),
        "the parameters times the pixels of the image": parameters * height * width,
        "the weights times the pixels of the image": weights * height * width,
        "a count without the size of the kernels": _count(*size, kernel=False),
        "a count without the input channels": _count(*size, inputs=False),
        "a count at the layers' input size": _count(*size, at_input=True),
        "a count with the additions of the biases": _count(*size, bias=True),
        "the count of 28 × 28 images": sum(_flops(ours, in_channels, 28, 28)) // 2,
    }
    for mistake, value in mistakes.items():
        if got == value:
            expect.fail(f"{what}: {got:,.0f} is what {mistake} gives; {right:,} was expected.")
    expect.fail(f"{what} should be {right:,}; got {got:,.0f}.")


def _flops(network: UNet, in_channels: int, height: int, width: int) -> tuple[int, int]:
    """Operations of convolutions and of linear layers, as torch's own counter has them."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, in_channels, height, width), torch.zeros(1, dtype=torch.long))
    counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    return sum(n for op, n in counts.items() if "conv" in op), sum(
        n
        for op, n in counts.items()
        if op.rpartition(".")[2] in ("mm", "addmm")  # not bmm: that is inside attention
    )


def _count(
    network, in_channels, height, width, kernel=True, inputs=True, at_input=False, bias=False, positions=True
) -> int:
    """What a mistaken count gives."""
    total, handles = 0, []

    def add(layer, given, output):
        nonlocal total
        weight = layer.weight[0]
        each = weight.numel()
        if weight.ndim == 3:
            each = (weight.shape[0] if inputs else 1) * (weight[0].numel() if kernel else 1)
        elif not inputs:
            each = 1
        size = output.numel() if positions else len(layer.weight)
        if at_input and weight.ndim == 3:
            size = layer.weight.shape[0] * given[0].shape[-1] * given[0].shape[-2]
        total += size * each + (output.numel() if bias else 0)

    for layer in network.modules():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
            handles.append(layer.register_forward_hook(add))
    with torch.no_grad():
        network(torch.zeros(1, in_channels, height, width), torch.zeros(1, dtype=torch.long))
    for handle in handles:
        handle.remove()
    return total


# -- taking channels out -------------------------------------------------------------------------------------------------


def _wiring(low: int, high: int) -> list[tuple[list[str], list[tuple[str, int]], int]]:
    """Groups of a U-Net of two levels with attention: (layers whose outputs go together, their readers, GroupNorms' groups).

    A reader is a layer with the position at which the group's channels begin among its inputs. `low` and `high` are the
    numbers of channels that two groups of the way up have now: what is concatenated behind them begins there.
    """
    residual = ["middle1", "middle2"]
    attention = ["down_attention.1", "middle_attention"]

    def block(name, at=0):
        return [(f"{name}.norm1", at), (f"{name}.conv1", at), (f"{name}.skip", at)]

    inner = [
        ([f"{b}.conv1", f"{b}.time"], [(f"{b}.norm2", 0), (f"{b}.conv2", 0)], 8)
        for b in ("down.0", "down.1", "middle1", "middle2", "up.0", "up.1")
    ]
    return [
        *inner,
        (["conv_in", "down.0.conv2"], [*block("down.0"), ("downsample.0", 0), *block("up.1", low)], 8),
        (["downsample.0"], block("down.1"), 8),
        (
            ["down.1.conv2", "down.1.skip", *(f"{a}.{x}" for a in attention for x in ("qkv", "out")),
             *(f"{b}.conv2" for b in residual)],
            [*((f"{a}.{x}", 0) for a in attention for x in ("norm", "qkv", "out")), *(r for b in residual for r in block(b)),
             *block("up.0"), *block("up.0", high)],
            8,
        ),
        (["up.0.conv2", "up.0.skip"], [("upsample.0", 0)], 1),
        (["upsample.0"], block("up.1"), 8),
        (["up.1.conv2", "up.1.skip"], [("norm_out", 0), ("conv_out", 0)], 8),
        (["time_mlp.0"], [("time_mlp.2", 0)], 1),
        (["time_mlp.2"], [(f"{b}.time", 0) for b in ("down.0", "down.1", "middle1", "middle2", "up.0", "up.1")], 1),
    ]  # fmt: skip


def _pruned(weights, scores, choose, reduce=lambda rows: rows.mean(0)) -> dict[str, Tensor]:
    """What is left of the weights: `choose(scores of the units, layers)` says which units of a group go."""
    left = dict(weights)
    low, high = len(weights["upsample.0.bias"]), len(weights["middle2.conv2.bias"])
    cuts: dict[tuple[str, int], list[Tensor]] = {}
    for layers, readers, norms in _wiring(low, high):
        channels = min(len(weights[f"{layer}.bias"]) for layer in layers)  # qkv has three times as many
        units = channels // norms
        of_units = reduce(torch.stack([scores[layer].double().reshape(-1, units).mean(0) for layer in layers]))
        gone = torch.zeros(units, dtype=torch.bool)
        gone[choose(of_units, layers)] = True
        keep = ~gone.repeat(norms)
        for layer in layers:
            whole = keep.repeat(len(weights[f"{layer}.bias"]) // channels)
            for part in ("weight", "bias"):
                cuts.setdefault((f"{layer}.{part}", 0), []).append((0, whole))
        for reader, start in readers:
            if f"{reader}.weight" not in weights:
                continue  # a skip connection without weights
            if weights[f"{reader}.weight"].ndim == 1:
                for part in ("weight", "bias"):
                    cuts.setdefault((f"{reader}.{part}", 0), []).append((start, keep))
            else:
                cuts.setdefault((f"{reader}.weight", 1), []).append((start, keep))
    for (name, axis), pieces in cuts.items():
        mask = torch.ones(weights[name].shape[axis], dtype=torch.bool)
        for start, keep in pieces:
            mask[start : start + len(keep)] = keep
        left[name] = left[name].index_select(axis, mask.nonzero().flatten())
    return left


def _norms(weights) -> dict[str, Tensor]:
    return {
        name.removesuffix(".weight"): value.double().flatten(1).norm(dim=1)
        for name, value in weights.items()
        if value.ndim > 1
    }


def _equal(got: dict, right: dict[str, Tensor]) -> bool:
    return all(got[name].shape == right[name].shape and torch.equal(got[name].float(), right[name]) for name in right)


@graded(points=5, section="Pruning")
def test_prune_model(submission, rng):
    """`prune_model` takes the least important units out of a copy, everywhere, at once or in turns."""
    ours = _unet(rng, CHANNELS, TIME)
    weights = _weights(ours)
    trial = submission.PruningTrial(weights, CHANNELS, TIME)
    scores = {
        name.removesuffix(".weight"): _uniform(rng, 0.5, 8) * torch.rand(len(w), generator=rng).double()
        for name, w in weights.items()
        if w.ndim > 1
    }
    for ratio in (0.4, 0.0):
        what = f"prune_model with ratio {ratio}"
        got = _answer(_prune(submission, trial, scores, ratio=ratio), weights, what)
        _hold_untouched(trial, ours, "prune_model")
        if got is None:
            continue
        _hold_one_shot(submission, got, weights, scores, ratio, what)
        _hold_answers(trial, got, rng)
    _hold_threshold(submission, trial, weights, scores)
    for iterations in (2, 3):
        left = _prune(submission, trial, None, ratio=0.3, iterations=iterations)
        got = _answer(left, weights, f"prune_model in {iterations} turns")
        if got is not None:
            _hold_turns(submission, got, weights, 0.3, iterations)
    for what, arguments in {
        "prune_model with neither ratio nor threshold": (None, None),
        "prune_model with ratio 0.9, which would leave some layers without channels,": (0.9, None),
        "prune_model with a threshold above all scores": (None, 1e9),
    }.items():
        if _refuses(submission, *arguments):
            with expect.raises_value_error(what):
                trial.prune(scores, *arguments, 1)
    _hold_untouched(trial, ours, "prune_model")


def _prune(submission, trial, scores, ratio=None, threshold=None, iterations=1):
    """The weights that are left; None if prune_model refuses what only a wrong channels_to_prune can refuse."""
    try:
        return trial.prune(scores, ratio, threshold, iterations)
    except StudentError as error:
        if error.kind == "ValueError" and not passes(test_channels_to_prune, submission):
            return None
        raise


def passes(check, submission) -> bool:
    """Does another check pass? Its points are lost there, not here as well."""
    try:
        check(submission, torch.Generator().manual_seed(0))
    except expect.NOT_WORKING:
        return False
    return True


def _refuses(submission, ratio, threshold) -> bool:
    """Does the student's channels_to_prune refuse this rule, as it should?"""
    try:
        submission.channels_to_prune(torch.rand(3), ratio, threshold)
    except StudentError:
        return True
    return False


def _answer(got, weights, what: str) -> dict[str, Tensor] | None:
    if got is None:
        return None
    if not isinstance(got, dict) or got.keys() != weights.keys():
        expect.fail(f"{what} should return a U-Net with the layers of the one it was given.")
    for name, value in weights.items():
        expect.tensor(got[name], f"{name} after {what}")
        if got[name].ndim != value.ndim or got[name].numel() == 0:
            expect.fail(f"{what} leaves nothing of {name}.")
    return got


def _lowest(count_of):
    return lambda s, layers: s.argsort()[: count_of(len(s))]


def _round(value: float) -> int:
    return math.floor(value + 0.5)


def _own_choice(submission, **rule):
    """What the student's channels_to_prune takes: its points are lost elsewhere."""

    def choose(s, layers):
        return expect.tensor(submission.channels_to_prune(s, **rule), "channels_to_prune").long().flatten()

    return choose


def _matches(got, weights, scores, choose) -> bool:
    try:
        return _equal(got, _pruned(weights, scores, choose))
    except (*expect.NOT_WORKING, IndexError):
        return False


def _hold_one_shot(submission, got, weights, scores, ratio, what):
    right = _pruned(weights, scores, _lowest(lambda n: _round(ratio * n)))
    if _equal(got, right) or _matches(got, weights, scores, _own_choice(submission, ratio=ratio)):
        return
    if _equal(got, weights):
        expect.fail(f"{what} returns a network with all its channels; call group.remove for every group.")
    keep = _lowest(lambda n: _round(ratio * n))
    mistakes = {
        "takes the units with the highest scores; the least important are to go": _pruned(
            weights, scores, lambda s, _: s.argsort()[len(s) - _round(ratio * len(s)):]
        ),
        "uses the scores of a group's first layer alone; take the mean over all its layers": _pruned(
            weights, scores, keep, lambda rows: rows[0]
        ),
        "uses the scores of a group's last layer alone; take the mean over all its layers": _pruned(
            weights, scores, keep, lambda rows: rows[-1]
        ),
        "takes the largest of the layers' scores; take their mean": _pruned(
            weights, scores, keep, lambda rows: rows.amax(0)
        ),
        "multiplies the layers' scores; take their mean": _pruned(weights, scores, keep, lambda rows: rows.prod(0)),
        "scales each layer's scores before they are added up; take the plain mean": _pruned(
            weights, scores, keep, lambda rows: (rows / rows.mean(1, keepdim=True)).mean(0)
        ),
        "takes the first units; take those with the lowest scores": _pruned(
            weights, scores, lambda s, _: torch.arange(_round(ratio * len(s)))
        ),
    }  # fmt: skip
    for mistake, values in mistakes.items():
        if _equal(got, values):
            expect.fail(f"{what} {mistake}.")
    _explain_shapes(got, right, weights, what)


def _explain_shapes(got, right, weights, what):
    wrong = [name for name in right if got[name].shape != right[name].shape]
    if wrong:
        name = wrong[0]
        expect.fail(f"{what} should leave {name} with shape {list(right[name].shape)} of {list(weights[name].shape)}; "
                    f"it has {list(got[name].shape)}.")  # fmt: skip
    name = next(name for name in right if not torch.equal(got[name].float(), right[name]))
    expect.fail(f"{what} leaves as many channels as it should, but not the right ones: {name} is not what the units with "
                "the highest scores (mean over the unit's channels, then over the group's layers) are.")  # fmt: skip


def _hold_answers(trial, left: dict[str, Tensor], rng):
    """The pruned network runs, whole and in halves, and computes what its weights say."""
    x, t = images(rng, 3, 1, 8, 8), torch.randint(0, 1000, (3,), generator=rng)
    whole, halves = expect.tensors(trial.answers(x, t), "the pruned network", 2)
    network = UNet(CHANNELS, TIME)
    for name, parameter in network.named_parameters():
        parameter.data = left[name].float().clone()
    with torch.no_grad():
        right = network(x, t)
    for value, what in ((whole, "what the pruned network answers"), (halves, "decode(*encode(x, t), t) of it")):
        value = expect.tensor(value, what, (3, 1, 8, 8))
        expect.close(value, right, what, None, 1e-3, 1e-3 * right.abs().max().item())


def _hold_threshold(submission, trial, weights, scores):
    """A threshold that takes some units of many groups, and all of none."""
    means: list[Tensor] = []
    _pruned(weights, scores, lambda s, layers: means.append(s) or torch.tensor([], dtype=torch.long))
    threshold = 0.97 * min(s.max().item() for s in means)
    near = min((torch.cat(means) - threshold).abs().min().item(), 1.0)
    if near < 1e-6:
        threshold -= 2e-6
    got = _answer(_prune(submission, trial, scores, threshold=threshold), weights, "prune_model with a threshold")
    if got is None:
        return

    def below(s, layers):
        return (s < threshold).nonzero().flatten()

    right = _pruned(weights, scores, below)
    if _equal(got, right) or _matches(got, weights, scores, _own_choice(submission, threshold=threshold)):
        return
    if _equal(got, weights):
        expect.fail("prune_model with a threshold removes nothing; hand the threshold on to channels_to_prune.")
    _explain_shapes(got, right, weights, "prune_model with a threshold")


def _turns(weights, ratio, iterations, gone_after, scores_of, own=None):
    """Weights after pruning in turns; `gone_after(turn, units at first)` is how many are gone by then."""
    left = weights
    first: dict[str, int] = {}
    for turn in range(1, iterations + 1):

        def choose(s, layers, turn=turn):
            units = first.setdefault(layers[0], len(s))
            more = gone_after(turn, units) - (units - len(s))
            return s.argsort()[:more] if own is None else own(s, more)

        left = _pruned(left, scores_of(left, weights), choose)
    return left


def _hold_turns(submission, got, weights, ratio, iterations):
    what = f"prune_model with ratio {ratio} in {iterations} turns"

    def linear(turn, units):
        return _round(ratio * turn / iterations * units)

    def now(left, _):
        return _norms(left)

    def own(s, more):
        value = submission.channels_to_prune(s, ratio=more / len(s))
        return expect.tensor(value, "channels_to_prune").long().flatten()

    right = _turns(weights, ratio, iterations, linear, now)
    if _equal(got, right):
        return
    try:
        if _equal(got, _turns(weights, ratio, iterations, linear, now, own)):
            return
    except (*expect.NOT_WORKING, IndexError):
        pass
    shapes = {name: value.shape for name, value in got.items()}
    each = {}
    for name, rule in {
        "removes the whole ratio in every turn; it is the share removed in all": lambda k, n: (
            n - _shrunk(n, [ratio] * k)
        ),
        "removes ratio/K of what is left in every turn; the shares are of the units at first": (
            lambda k, n: n - _shrunk(n, [ratio / iterations] * k)
        ),
        "takes one turn's share only": lambda k, n: _round(ratio / iterations * n),
    }.items():
        try:
            each[name] = _turns(weights, ratio, iterations, rule, now)
        except (IndexError, RuntimeError, ValueError):
            continue
    for mistake, values in each.items():
        if shapes == {name: value.shape for name, value in values.items()}:
            expect.fail(f"{what} {mistake}.")
    once = _pruned(weights, _norms(weights), _lowest(lambda n: _round(ratio * n)))
    if _equal(got, once):
        expect.fail(f"{what} gives what a single turn gives; ask the importance again before every turn, of the network "
                    "as it is then.")  # fmt: skip
    _explain_shapes(got, right, weights, what)


def _shrunk(units: int, ratios: list[float]) -> int:
    for ratio in ratios:
        units -= _round(ratio * units)
    return units


# -- settings and training -----------------------------------------------------------------------------------------------


@graded(points=2, section="Pruning")
def test_ratio_for_macs(submission, rng):
    """`ratio_for_macs` finds the smallest setting that meets the target, in few calls."""
    for steps in (16, 97, 1000):
        edge, power = _uniform(rng, 0.0, 1 / steps), _uniform(rng, 1.0, 2.5)
        asked: list[float] = []

        def share_left(setting, steps=steps, edge=edge, power=power, asked=asked):
            asked.append(float(setting))
            return (1 - max(0, math.floor((setting + edge) * steps)) / steps) ** power

        target = _uniform(rng, 0.3, 0.7)
        what = f"ratio_for_macs for {target:.3f} of the MACs"
        got = expect.tensor(submission.ratio_for_macs(share_left, target), what, ()).item()
        calls = len(asked)
        if any(not -1e-9 <= s <= 0.8 + 1e-9 for s in asked):
            expect.fail("ratio_for_macs asks share_left about settings outside 0 … largest.")
        if share_left(got) > target:
            expect.fail(f"{what}: the setting {got:.4f} leaves {share_left(got):.3f}, more than the target.")
        smallest = (math.ceil((1 - target ** (1 / power)) * steps - 1e-9)) / steps - edge
        if got > max(smallest, 0) + 0.01 + 1e-6:
            expect.fail(f"{what}: {got:.4f} is not the smallest setting; {max(smallest, 0):.4f} meets the target too.")
        if calls > 15:
            expect.fail(f"ratio_for_macs called share_left {calls} times; halving the interval takes at most 15 calls.")
    got = submission.ratio_for_macs(lambda setting: 1 - setting, 1.0)
    if expect.tensor(got, "ratio_for_macs", ()).item() > 0.01:
        expect.fail("with target 1 nothing needs to go: ratio_for_macs should return (nearly) 0.")
    got = submission.ratio_for_macs(lambda setting: 1 - setting / 10, 0.45, 8.0, 0.05)
    got = expect.tensor(got, "ratio_for_macs with largest = 8", ()).item()
    if not 5.5 - 1e-6 <= got <= 5.55 + 1e-6:
        expect.fail(f"with largest = 8 and tolerance 0.05, 5.5 was to be found; got {got:.4f}.")
    with expect.raises_value_error("ratio_for_macs with a target that even `largest` does not meet"):
        submission.ratio_for_macs(lambda setting: 1 - setting, 0.1)


class _Teacher(RecordingNetwork):
    """Sees another noise than there is: its answers are a target of their own."""

    def predict(self, x: Tensor, t: Tensor) -> Tensor:
        """A turned copy of x, far from zero mean."""
        return 0.3 * x.flip(-1) - 2.0


@graded(points=2, section="Pruning")
def test_finetune(submission, rng):
    """`finetune` trains on noise, or on a teacher's answers, at timesteps of its own for every image."""
    schedule = random_schedule(rng, num_timesteps=60)
    pictures = 0.9 * torch.sign(images(rng, 1, 1, 8, 8)).expand(40, -1, -1, -1).contiguous()
    _hold_noise(submission, schedule, pictures, rng)
    teacher = _Teacher(schedule)
    ours = _unet(rng, [8, 8], 8, attention=False)
    trial = submission.PruningTrial(_weights(ours), [8, 8], 8)
    losses = _losses(trial.finetune(schedule, pictures, STEPS, 5e-3, 12, teacher), STEPS)
    if not teacher.calls:
        expect.fail("finetune never asks the teacher it is given.")
    if teacher.grad_enabled:
        expect.fail("finetune should ask the teacher without gradients: with torch.no_grad().")
    if len(teacher.calls) != STEPS or any(len(x) != 12 for x, _, _ in teacher.calls):
        expect.fail("in each step finetune should ask the teacher once, about the whole batch.")
    x, t = torch.cat([x for x, _, _ in teacher.calls]), torch.cat([t for _, t, _ in teacher.calls]).long()
    if any(bool((t == t[0]).all()) for _, t, _ in teacher.calls):
        expect.fail("every image of a batch has the same timestep; draw one for each: torch.randint(T, (batch_size,)).")
    a = schedule.alpha_bar(t).double()[:, None, None, None]
    noise = (x.double() - a.sqrt() * pictures[:1].double()) / (1 - a).sqrt()
    expect.noise(noise[t > 3], "the noise in the x_t that the teacher is shown")
    with torch.no_grad():
        before = _distance(ours, teacher, schedule, pictures)
        ours.load_state_dict(_answer(trial.original(), _weights(ours), "finetune"))
        after = _distance(ours, teacher, schedule, pictures)
    # The answers have mean -2: who learns the noise, of mean 0, stays 4 away. What learns them came below 0.5.
    if not after < 2:
        expect.fail(f"{STEPS} steps should bring the network near its teacher, to a mean squared distance well below 2; it "
                    f"was {before:.2f} and is {after:.2f}. The target is the teacher's answer, not the noise.")  # fmt: skip
    if not sum(losses[-10:]) < sum(losses[:10]):
        expect.fail("the losses that finetune returns should fall; are they those of its steps?")


def _hold_noise(submission, schedule, pictures, rng):
    ours = _unet(rng, [8, 8], 8, attention=False)
    trial = submission.PruningTrial(_weights(ours), [8, 8], 8)
    losses = _losses(trial.finetune(schedule, pictures, STEPS, 5e-3, 12), STEPS)
    with torch.no_grad():
        before = _noise_loss(ours, schedule, pictures)
        after_weights = _answer(trial.original(), _weights(ours), "finetune")
        if _equal(after_weights, _weights(ours)):
            expect.fail("finetune leaves the weights as they are: gradients on, backward() and optimizer.step()?")
        ours.load_state_dict(after_weights)
        after = _noise_loss(ours, schedule, pictures)
    if after > max(0.8 * before, 1.0):  # 1 is the loss of answering 0; the solution is left with 0.3 of the loss before
        expect.fail(f"{STEPS} steps without a teacher should bring the noise-prediction loss down; it was {before:.2f} and "
                    f"is {after:.2f}.")  # fmt: skip
    if not abs(losses[0] / before - 1) < 0.8 or not sum(losses[-10:]) < sum(losses[:10]):
        expect.fail(
            f"finetune should return the loss of each step, the first here about {before:.2f}; got {losses[0]:.3g}."
        )


def _losses(value, steps: int) -> list[float]:
    value = value.tolist() if isinstance(value, Tensor) and value.ndim == 1 else value
    return [expect.tensor(v, "a loss", ()).item() for v in expect.tensors(value, "finetune's losses", steps)]


def _noise_loss(network, schedule, pictures) -> float:
    t = torch.arange(len(pictures) * 4) % schedule.num_timesteps
    rng = torch.Generator().manual_seed(1)
    noise = torch.randn(len(t), *pictures.shape[1:], generator=rng)
    return noise_prediction_loss(network, schedule, pictures[:1].expand(len(t), -1, -1, -1), t, noise).mean().item()


def _distance(network, teacher: _Teacher, schedule, pictures) -> float:
    t = torch.arange(len(pictures) * 4) % schedule.num_timesteps
    rng = torch.Generator().manual_seed(1)
    a = schedule.alpha_bar(t)[:, None, None, None]
    x = a.sqrt() * pictures[:1] + (1 - a).sqrt() * torch.randn(len(t), *pictures.shape[1:], generator=rng)
    return (network(x, t) - teacher.predict(x, t)).square().mean().item()
