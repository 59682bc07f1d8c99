"""Style: plain functions first, the methods call them; tables prepared once."""
# %%
import torch
from torch import Tensor


def table(schedule) -> Tensor:
    """sqrt((1 - alpha_bar) / alpha_bar) for t = 0 ... T-1 and, at index -1, for clean data."""
    a = torch.cat([schedule.alphas_cumprod.double(), torch.ones(1, dtype=torch.float64)])
    return a


def predict(model, x: Tensor, t: int) -> Tensor:
    """One network call, without gradients."""
    with torch.no_grad():
        return model(x, torch.ones(len(x), dtype=torch.int64, device=x.device) * t)


def ddim_terms(schedule, t: int, s: int, eta: float) -> tuple[float, float]:
    """(factor of eps, factor of z)."""
    a = table(schedule)
    a_t, a_s = a[t], a[s]
    beta = 1 - a_t / a_s
    var = (eta**2 * beta * (1 - a_s) / (1 - a_t)).clamp(min=0)
    return (((1 - a_s - var).clamp(min=0) / a_s).sqrt() - ((1 - a_t) / a_t).sqrt()).item(), (var / a_s).sqrt().item()


# %%
def _euler_step(self, x_t: Tensor, t: int) -> Tensor:
    """Euler-Maruyama in float64."""
    x, eps = x_t.double(), predict(self.model, x_t, t).double()
    beta, a = self.schedule.betas[t].double(), table(self.schedule)[t]
    x = x * (1 + beta / 2) - beta * eps / (1 - a).sqrt()
    if t:
        x = x + beta.sqrt() * torch.randn_like(x)
    return x.to(x_t.dtype)


def _displacement(self, eps: Tensor, t: int, s: int, eta: float = 0.0, z: Tensor | None = None) -> Tensor:
    """d x_bar."""
    of_eps, of_noise = ddim_terms(self.schedule, t, s, eta)
    if of_noise:
        z = torch.randn_like(eps) if z is None else z
        return of_eps * eps + of_noise * z
    return of_eps * eps


def _momentum_update(self, d, m, v, a, b, c):
    """New averages."""
    energy = torch.einsum("bchw,bchw->b", d, d) / (d.shape[1] * d.shape[2] * d.shape[3])
    return a * m + b * d, v - c * v + c * energy


def _sample(self, shape, timesteps=None, eta=0.0, *, a=0.0, b=1.0, c=0.0, zeta=0.0, x_T=None):
    """All steps."""
    model_dtype = next(self.model.parameters()).dtype
    x = torch.randn(shape, dtype=model_dtype) if x_T is None else x_T
    steps = torch.as_tensor(range(self.schedule.num_timesteps - 1, -1, -1) if timesteps is None else timesteps)
    steps = torch.cat([steps, torch.tensor([-1])]).tolist()
    roots = table(self.schedule).sqrt()
    m, v = torch.zeros_like(x), torch.ones(x.shape[0], dtype=x.dtype, device=x.device)
    while len(steps) > 1:
        t, s = steps[0], steps[1]
        steps = steps[1:]
        d = self.displacement(predict(self.model, x, t), t, s, eta)
        m, v = self.momentum_update(d, m, v, a, b, c)
        gain = 1 / (v.sqrt() + zeta)
        x = (roots[s] / roots[t]).item() * x + roots[s].item() * gain.view(-1, 1, 1, 1) * m
    return x


MomentumSampler.euler_step, MomentumSampler.displacement = _euler_step, _displacement
MomentumSampler.momentum_update, MomentumSampler.sample = _momentum_update, _sample


def noise_prediction_mse(model, schedule, x_0, t, eps, batch_size=128):
    """Squared errors image by image, then their mean."""
    a = table(schedule)[t].view(-1, 1, 1, 1).to(x_0.dtype)
    x_t = a.sqrt() * x_0 + (1 - a).sqrt() * eps
    errors = []
    for k in range(0, len(x_t), batch_size):
        with torch.no_grad():
            answer = model(x_t[k : k + batch_size], t[k : k + batch_size])
        errors += (answer - eps[k : k + batch_size]).double().square().flatten(1).mean(1).tolist()
    return sum(errors) / len(errors)

# %%
import math

import torch


def q_max(bits: int) -> int:
    """Outermost integer."""
    if bits < 2:
        raise ValueError("bits must be 2 or more")
    return 2 ** (bits - 1) - 1


def others(x):
    """All dimensions but the first."""
    return list(range(1, x.dim()))


def symmetric_scale(x, bits, per_channel=False):
    """Vector norm of order infinity."""
    limit = q_max(bits)
    size = torch.linalg.vector_norm(x, ord=math.inf, dim=others(x) if per_channel else None, keepdim=per_channel)
    if not torch.isfinite(size).all():
        raise ValueError("cannot scale values that are not finite")
    return torch.where(size == 0, 1.0, size / limit).to(x.dtype)


def fake_quantize(x, scale, bits):
    """Clip first, then round."""
    limit = q_max(bits)
    return torch.round(torch.clamp(x / scale, -limit, limit)) * scale


def straight_through(x, scale, bits):
    """hardtanh has the gradient that is wanted."""
    limit = q_max(bits)
    marks = torch.clamp(x / scale, -limit - 0.25, limit + 0.25)
    return scale * (marks + (torch.round(torch.clamp(marks, -limit, limit)) - marks).detach())


# %%
def need_two(x_T):
    """Refuse single images."""
    if x_T.size(0) in (0, 1):
        raise ValueError("at least two trajectories")


@torch.no_grad()
def own_ddim(model, schedule, x, num_steps):
    """All states but the samples, computed when needed."""
    times = torch.linspace(schedule.num_timesteps - 1, 0, num_steps).round().long()
    for k in range(num_steps):
        t = times[k].repeat(len(x))
        yield x, t
        if k + 1 < num_steps:
            a, b = schedule.alpha_bar(times[k]).to(x), schedule.alpha_bar(times[k + 1]).to(x)
            e = model(x, t)
            x = (b / a).sqrt() * x + ((1 - b).sqrt() - (b * (1 - a) / a).sqrt()) * e


def calibration_set(model, schedule, x_T, num_steps=100, every=5):
    """Own trajectory."""
    need_two(x_T)
    if not (0 < every <= num_steps):
        raise ValueError("every out of range")
    xs, ts = zip(*[pair for k, pair in enumerate(own_ddim(model, schedule, x_T, num_steps)) if not k % every])
    return torch.cat(xs, 0), torch.cat(ts, 0)


def one_timestep_set(model, schedule, x_T, step=0, num_steps=100):
    """Own trajectory, one state."""
    need_two(x_T)
    if step < 0 or step > num_steps - 1:
        raise ValueError("step out of range")
    for k, (x, t) in enumerate(own_ddim(model, schedule, x_T, num_steps)):
        if k == step:
            return x.clone(), t


def squared_error(x, scale, bits):
    """In float64."""
    return float(((fake_quantize(x.double(), scale, bits) - x.double()) ** 2).sum())


@torch.no_grad()
def activation_scales(network, calibration, bits, split=True, batch_size=32):
    """Own hooks: each layer adds to its own tables while the network runs, twice."""
    pieces = input_pieces(network, split)
    largest, errors, handles, second = {}, {}, [], [False]

    def watch(name):
        """Watch."""
        def hook(module, inputs):
            """Hook."""
            for k, x in enumerate(torch.split(inputs[0], pieces[name], 1)):
                if not second[0]:
                    largest[name, k] = max(largest.get((name, k), 0.0), x.abs().max().item())
                elif largest[name, k] > 0:
                    for r in range(10):
                        s = largest[name, k] * (r + 1) / 10 / q_max(bits)
                        errors.setdefault((name, k), [0.0] * 10)[r] += squared_error(x, s, bits)

        return hook

    for name in pieces:
        handles.append(dict(network.named_modules())[name].register_forward_pre_hook(watch(name)))
    x, t = calibration
    for turn in (False, True):
        second[0] = turn
        for first in range(0, len(x), batch_size):
            network(x[first : first + batch_size], t[first : first + batch_size])
    for handle in handles:
        handle.remove()

    def choose(key):
        """Choose."""
        if largest[key] == 0:
            return torch.tensor(1.0)
        r = min(range(10), key=errors[key].__getitem__)
        return torch.tensor(largest[key] * (r + 1) / 10 / q_max(bits))

    return {name: [choose((name, k)) for k in range(len(sizes))] for name, sizes in pieces.items()}


# %%
def fake_quantize_split(x, scales, sizes, bits):
    """Chunks."""
    if sum(sizes) != x.shape[1]:
        raise ValueError(f"{sizes} do not add up to {x.shape[1]}")
    if len(scales) != len(sizes):
        raise ValueError("not as many scales as pieces")
    return torch.cat([straight_through(p, s, bits) for p, s in zip(torch.split(x, list(sizes), 1), scales)], 1)


@add_to_class(QuantizedConv2d)
def forward(self, x):
    """functional_call with rounded weights in the place of the float ones."""
    weight = self.conv.weight
    starts = [sum(self.sizes[:k]) for k in range(len(self.sizes))]
    rounded = []
    for start, size in zip(starts, self.sizes):
        part = weight[:, start : start + size]
        rounded.append(straight_through(part, symmetric_scale(part, self.weight_bits, True), self.weight_bits))
    x = fake_quantize_split(x, self.scales, self.sizes, self.activation_bits)
    return torch.func.functional_call(self.conv, {"weight": torch.cat(rounded, 1)}, (x,))


def quantize_model(model, calibration, weight_bits=8, activation_bits=8, split=True):
    """Recursion over the children."""
    scales, pieces = activation_scales(model, calibration, activation_bits, split), input_pieces(model, split)

    def replace(module, prefix):
        """Replace."""
        for name, child in module.named_children():
            full = prefix + name
            if full in pieces:
                setattr(module, name, QuantizedConv2d(child, scales[full], pieces[full], weight_bits, activation_bits))
            else:
                replace(child, full + ".")
        return module

    return replace(copy.deepcopy(model), "")


def model_bytes(network):
    """Floats, then bits."""
    quantized = [m for m in network.modules() if isinstance(m, QuantizedConv2d)]
    floats = sum(p.numel() for p in network.parameters()) - sum(m.conv.weight.numel() for m in quantized)
    floats += sum((1 + m.conv.weight.shape[0]) * len(m.sizes) for m in quantized)
    return floats * 4 + sum(math.ceil(m.conv.weight.numel() * m.weight_bits / 8) for m in quantized)


def noisy(schedule, x_0, t):
    """q(x_t | x_0)."""
    a = schedule.alpha_bar(t)[:, None, None, None].to(x_0)
    return a.sqrt() * x_0 + (1 - a).sqrt() * torch.randn_like(x_0)


def finetune_quantized(quantized, teacher, schedule, images, steps, lr=1e-3, batch_size=32):
    """Batches by a helper."""
    quantized.train().requires_grad_(True)
    optimizer = torch.optim.Adam(params=quantized.parameters(), lr=lr)
    losses = torch.zeros(steps)
    for k in range(steps):
        pick = torch.multinomial(torch.ones(len(images)), batch_size, replacement=True)
        t = torch.randint(high=schedule.num_timesteps, size=(batch_size,))
        x_t = noisy(schedule, images[pick], t)
        target = teacher(x_t, t).detach()
        optimizer.zero_grad()
        loss = torch.mean((target - quantized(x_t, t)) ** 2)
        loss.backward()
        optimizer.step()
        losses[k] = loss.detach()
    quantized.eval()
    return losses.tolist()

# %%
def per_channel(x, how):
    """`how` of each x[c], one after the other."""
    return torch.stack([how(x[c]) for c in range(x.shape[0])])


def refuse(condition, message):
    """Refuse."""
    if condition:
        raise ValueError(message)


def noised(schedule, x_0, t, noise):
    """Noised."""
    a = schedule.alpha_bar(t).to(x_0.dtype).reshape(-1, 1, 1, 1)
    return torch.sqrt(a) * x_0 + torch.sqrt(1 - a) * noise


def running_maximum(values):
    """Running maximum."""
    seen = []
    for value in values:
        seen.append(value)
        yield max(seen)


# %%
def channel_magnitudes(weight):
    """Channel magnitudes."""
    return per_channel(weight, lambda w: torch.sqrt((w * w).sum()))


def channels_to_prune(scores, ratio=None, threshold=None):
    """Channels to prune."""
    refuse(ratio is None and threshold is None, "neither ratio nor threshold")
    refuse(ratio is not None and threshold is not None, "ratio and threshold")
    ranked = sorted(range(len(scores)), key=lambda c: float(scores[c]))
    if threshold is not None:
        chosen = [c for c in ranked if float(scores[c]) < threshold]
    else:
        refuse(ratio < 0 or ratio >= 1, "the ratio must be at least 0 and below 1")
        chosen = ranked[: round(len(ranked) * ratio)]
    refuse(len(chosen) == len(ranked), "no channel left")
    return torch.tensor(sorted(chosen), dtype=torch.long)


def taylor_importance(weight, gradient, separately=False):
    """Taylor importance."""
    product = weight * gradient
    if separately:
        return per_channel(product, lambda p: p.abs().sum())
    return per_channel(product, lambda p: p.sum().abs())


# %%
def diffusion_gradients(model, schedule, x_0, noise, threshold=0.05, timesteps=None):
    """Diffusion gradients."""
    network = copy.deepcopy(model)
    network.train(model.training)
    network.requires_grad_(True)
    network.zero_grad(set_to_none=False)

    def losses():
        """Losses."""
        for t in timesteps or range(schedule.num_timesteps):
            at = torch.full((x_0.shape[0],), t, dtype=torch.int64)
            yield t, F.mse_loss(network(noised(schedule, x_0, at, noise), at), noise)

    kept, highest = [], float("-inf")
    total = {}
    for t, loss in losses():
        highest = max(highest, loss.detach().item())
        if not loss.detach().item() / highest > threshold:
            return total or {n: torch.zeros_like(p) for n, p in network.named_parameters()}, kept
        for p in network.parameters():
            p.grad = None
        loss.backward()
        for name, p in network.named_parameters():
            total[name] = total.get(name, 0) + (p.grad if p.grad is not None else torch.zeros_like(p))
        kept.append(t)
    return total, kept


def count_macs(model, shape=(1, 28, 28)):
    """Count macs."""
    counts = {"conv": 0, "linear": 0}

    def conv(layer, _given, out):
        """Conv."""
        counts["conv"] += out.shape[1] * out.shape[2] * out.shape[3] * math.prod(layer.weight.shape[1:])

    def linear(layer, _given, out):
        """Linear."""
        counts["linear"] += out[..., 0].numel() * layer.in_features * layer.out_features

    probe = copy.deepcopy(model)
    for layer in probe.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(conv)
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(linear)
    probe(torch.zeros(1, *shape), torch.zeros(1, dtype=torch.long))
    return counts["conv"] + counts["linear"]


# %%
def score_of_units(group, scores):
    """Mean over the channels of a unit, then over layers."""
    of_layers = []
    for name in group.layers:
        table = scores[name].unflatten(0, (-1, group.units))
        of_layers.append(table.mean(dim=0))
    return sum(of_layers) / len(of_layers)


def prune_by_threshold(network, importance, threshold):
    """Prune by threshold."""
    scores = importance(network)
    for group in channel_groups(network):
        group.remove(channels_to_prune(score_of_units(group, scores), threshold=threshold))


def prune_down_to(network, importance, left):
    """Prune down to."""
    scores = importance(network)
    for group in channel_groups(network):
        surplus = group.units - left[group.layers[0]]
        group.remove(channels_to_prune(score_of_units(group, scores), ratio=surplus / group.units))


def prune_model(model, importance, ratio=None, threshold=None, iterations=1):
    """Prune model."""
    refuse((ratio is None) == (threshold is None), "give one of ratio and threshold")
    network = copy.deepcopy(model)
    whole = {group.layers[0]: group.units for group in channel_groups(network)}
    for turn in range(iterations):
        if threshold is not None:
            prune_by_threshold(network, importance, threshold)
        else:
            share = ratio * (turn + 1) / iterations
            prune_down_to(network, importance, {name: n - round(share * n) for name, n in whole.items()})
    return network


def ratio_for_macs(share_left, target, largest=0.8, tolerance=0.01):
    """Ratio for macs."""
    def search(low, high):
        """Search."""
        if high - low <= tolerance:
            return high
        middle = low + (high - low) / 2
        return search(low, middle) if share_left(middle) <= target else search(middle, high)

    refuse(not share_left(largest) <= target, "too ambitious")
    return search(0.0, largest)


def finetune(model, schedule, images, steps, lr=1e-3, batch_size=32, teacher=None):
    """Finetune."""
    def one_step(optimizer):
        """One step."""
        chosen = torch.randint(0, images.shape[0], (batch_size,))
        t = torch.randint(0, schedule.num_timesteps, (batch_size,))
        noise = torch.randn_like(images[chosen])
        x_t = noised(schedule, images[chosen], t, noise)
        target = noise if teacher is None else teacher_says(x_t, t)
        loss = F.mse_loss(model(x_t, t), target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        return loss.item()

    @torch.no_grad()
    def teacher_says(x_t, t):
        """Teacher says."""
        return teacher(x_t, t).detach()

    model.requires_grad_(True).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    losses = [one_step(optimizer) for _ in range(steps)]
    model.eval()
    return losses
