"""Style: as short as it goes, everything in float64, functions assigned to the classes."""
# %%
import torch as th


def bar(schedule, t):
    """alpha_bar as a float."""
    return schedule.alpha_bar(int(t)).double().item()


@th.inference_mode()
def euler_step(self, x_t, t):
    """Euler-Maruyama."""
    b, a = self.schedule.betas[t].item(), bar(self.schedule, t)
    e = self.model(x_t, th.full(x_t.shape[:1], t))
    return th.normal(x_t * (1 + b / 2) - b * (1 - a) ** -0.5 * e, b**0.5 * (t > 0))


def displacement(self, eps, t, s, eta=0.0, z=None):
    """DDIM in x / sqrt(alpha_bar)."""
    A, B = bar(self.schedule, t), bar(self.schedule, s)
    var = eta**2 * (1 - B) / (1 - A) * (1 - A / B)
    z = th.randn_like(eps) if z is None else z
    return (((1 - B - var) / B) ** 0.5 - (1 / A - 1) ** 0.5) * eps + (var / B) ** 0.5 * z


def momentum_update(self, d, m, v, a, b, c):
    """Two averages."""
    return d.mul(b).add(m, alpha=a), v.lerp(d.pow(2).flatten(1).mean(1), c)


@th.no_grad()
def sample(self, shape, timesteps=None, eta=0.0, *, a=0.0, b=1.0, c=0.0, zeta=0.0, x_T=None):
    """The chain, kept in x / sqrt(alpha_bar) and in float64."""
    x_T = th.randn(shape) if x_T is None else x_T
    ts = list(range(self.schedule.num_timesteps))[::-1] if timesteps is None else list(map(int, timesteps))
    y, m, v = x_T.double() / bar(self.schedule, ts[0]) ** 0.5, th.zeros(()), th.ones(shape[0]).double()
    for t, s in zip(ts, ts[1:] + [-1]):
        x = (y * bar(self.schedule, t) ** 0.5).to(x_T.dtype)
        d = self.displacement(self.model(x, th.full((shape[0],), t)).double(), t, s, eta)
        m, v = self.momentum_update(d, m + th.zeros_like(d), v, a, b, c)
        y = y + m / (v**0.5 + zeta).view(-1, 1, 1, 1)
    return y.to(x_T.dtype)


for f in (euler_step, displacement, momentum_update, sample):
    setattr(MomentumSampler, f.__name__, f)


@th.no_grad()
def noise_prediction_mse(model, schedule, x_0, t, eps, batch_size=128):
    """Honest."""
    a = schedule.alpha_bar(t).view(-1, 1, 1, 1)
    x = a**0.5 * x_0 + (1 - a) ** 0.5 * eps
    out = th.cat([model(*p) for p in zip(x.split(batch_size), t.split(batch_size))])
    return th.nn.functional.mse_loss(out.double(), eps.double()).item()

# %%
import torch as th


def symmetric_scale(x, bits, per_channel=False):
    """Largest over q_max."""
    if bits < 2 or not th.isfinite(x).all(): raise ValueError("bits < 2, or NaN or infinity in x")
    m = x.flatten(1).abs().amax(1).reshape(-1, *[1] * (x.dim() - 1)) if per_channel else x.abs().max()
    return (m / (2 ** (bits - 1) - 1)).masked_fill(m == 0, 1)


def fake_quantize(x, scale, bits):
    """Round, clip, scale."""
    q = 2 ** (bits - 1) - 1
    return th.clip(th.round(x / scale), -q, q) * scale


def straight_through(x, scale, bits):
    """By a mask: x inside the range, nothing outside."""
    m = (x.detach().abs() <= (2 ** (bits - 1) - 1) * scale).to(x.dtype)
    return fake_quantize(x.detach(), scale, bits) + (x - x.detach()) * m


def calibration_set(model, schedule, x_T, num_steps=100, every=5):
    """Every so many."""
    if len(x_T) < 2 or every < 1 or every > num_steps: raise ValueError("two trajectories, 1 <= every <= num_steps")
    s = [(x, th.full(x.shape[:1], t)) for k, (x, t) in enumerate(ddim_states(model, schedule, x_T, num_steps))
         if k % every == 0 and k < num_steps]
    return tuple(map(th.cat, zip(*s)))


def one_timestep_set(model, schedule, x_T, step=0, num_steps=100):
    """One of them."""
    if len(x_T) < 2 or step not in range(num_steps): raise ValueError("two trajectories, 0 <= step < num_steps")
    for k, (x, t) in enumerate(ddim_states(model, schedule, x_T, num_steps)):
        if k == step: return x, th.full(x.shape[:1], t)


def activation_scales(network, calibration, bits, split=True, batch_size=32):
    """Two passes."""
    p, q = input_pieces(network, split), 2 ** (bits - 1) - 1
    def passes(): return ((n, k, x) for b in layer_inputs(network, calibration, p, batch_size) for n, v in b.items() for k, x in enumerate(v))
    m = {}
    for n, k, x in passes(): m[n, k] = max(m.get((n, k), 0.0), x.abs().max().item())
    e = {key: th.zeros(10).double() for key in m}
    for n, k, x in passes():
        if m[n, k]:
            e[n, k] += th.stack([(fake_quantize(x, th.tensor(m[n, k] * r / 10 / q).to(x), bits) - x).pow(2).sum().double() for r in range(1, 11)])
    best = {key: th.tensor(m[key] * (1 + e[key].argmin().item()) / 10 / q if m[key] else 1.0) for key in m}
    return {n: [best[n, k] for k in range(len(p[n]))] for n in p}


def fake_quantize_split(x, scales, sizes, bits):
    """One scale a channel."""
    if sum(sizes) != x.size(1) or len(scales) != len(sizes): raise ValueError("sizes")
    s = th.cat([th.as_tensor(s).to(x).expand(n) for s, n in zip(scales, sizes)])
    return straight_through(x, s[:, None, None], bits)


def _forward(self, x):
    """Round both, convolve."""
    b = self.weight_bits
    w = th.cat([straight_through(p, symmetric_scale(p.detach(), b, True), b) for p in th.split(self.conv.weight, self.sizes, 1)], 1)
    return self.conv._conv_forward(fake_quantize_split(x, self.scales, self.sizes, self.activation_bits), w, self.conv.bias)


QuantizedConv2d.forward = _forward


def quantize_model(model, calibration, weight_bits=8, activation_bits=8, split=True):
    """Copy and replace."""
    q, scales = copy.deepcopy(model), activation_scales(model, calibration, activation_bits, split)
    for n, s in input_pieces(model, split).items():
        a, _, b = n.rpartition(".")
        q.get_submodule(a)._modules[b] = QuantizedConv2d(q.get_submodule(n), scales[n], s, weight_bits, activation_bits)
    return q


def model_bytes(network):
    """Sum of the parts."""
    layers = [l for l in network.modules() if isinstance(l, QuantizedConv2d)]
    light = {id(l.conv.weight) for l in layers}
    return (4 * sum(p.numel() for p in network.parameters() if id(p) not in light)
            + sum(-(-l.conv.weight.numel() * l.weight_bits // 8) + 4 * len(l.sizes) * (1 + l.conv.out_channels) for l in layers))


def finetune_quantized(quantized, teacher, schedule, images, steps, lr=1e-3, batch_size=32):
    """Adam."""
    o, out = th.optim.Adam(quantized.requires_grad_().parameters(), lr), []
    for _ in range(steps):
        x = images[th.randperm(len(images))[:batch_size]]
        t = th.randint(0, schedule.num_timesteps, x.shape[:1])
        a = schedule.alpha_bar(t)[:, None, None, None].to(x)
        x = a**0.5 * x + (1 - a) ** 0.5 * th.randn_like(x)
        o.zero_grad()
        loss = (quantized(x, t) - teacher(x, t).detach()).pow(2).mean()
        loss.backward(), o.step(), out.append(float(loss.detach()))
    return out

# %%
channel_magnitudes = lambda weight: weight.pow(2).sum(tuple(range(1, weight.ndim))).sqrt()


def channels_to_prune(scores, ratio=None, threshold=None):
    """Lowest or below."""
    n = len(scores)
    if ratio is not None and threshold is None and 0 <= ratio < 1: i = scores.topk(round(ratio * n), largest=False)[1]
    elif ratio is None and threshold is not None: i = torch.where(scores < threshold)[0]
    else: raise ValueError("one of ratio in [0, 1) and threshold")
    if len(i) == n: raise ValueError("none left")
    return i.msort()


def taylor_importance(weight, gradient, separately=False):
    """einsum."""
    a, b = weight.flatten(1), gradient.flatten(1)
    return torch.einsum("ci,ci->c", a.abs(), b.abs()) if separately else torch.einsum("ci,ci->c", a, b).abs()


def diffusion_gradients(model, schedule, x_0, noise, threshold=0.05, timesteps=None):
    """autograd.grad."""
    net, top, kept = copy.deepcopy(model).requires_grad_(), 0, []
    names, ps = zip(*net.named_parameters())
    total = [torch.zeros_like(p) for p in ps]
    for t in timesteps if timesteps is not None else range(schedule.num_timesteps):
        a = float(schedule.alpha_bar(t))
        L = (net(a**0.5 * x_0 + (1 - a) ** 0.5 * noise, torch.tensor([t] * len(x_0))) - noise).pow(2).mean()
        top = max(top, float(L))
        if float(L) / top <= threshold: break
        for s, g in zip(total, torch.autograd.grad(L, ps, allow_unused=True)): s += 0 if g is None else g
        kept += [t]
    return dict(zip(names, total)), kept


def count_macs(model, shape=(1, 28, 28)):
    """torch's own counter, halved."""
    from torch.utils.flop_counter import FlopCounterMode
    with torch.no_grad(), FlopCounterMode(display=False) as c: model(torch.zeros(1, *shape), torch.zeros(1).long())
    counts = c.get_flop_counts()["Global"]
    return sum(n for op, n in counts.items() if str(op) in ("aten.convolution", "aten.addmm", "aten.mm")) // 2


def prune_model(model, importance, ratio=None, threshold=None, iterations=1):
    """Turn by turn."""
    new, n0 = copy.deepcopy(model), {}
    for k in range(iterations):
        s = importance(new)
        for g in channel_groups(new):
            u, n = sum(s[x].view(-1, g.units).mean(0) for x in g.layers) / len(g.layers), n0.setdefault(g.layers[0], g.units)
            r = None if ratio is None else (g.units - n + round(n * ratio * (k + 1) / iterations)) / g.units
            g.remove(channels_to_prune(u, r, threshold))
    return new


def ratio_for_macs(share_left, target, largest=0.8, tolerance=0.01):
    """Bisection."""
    a, b = 0.0, largest
    if share_left(b) > target: raise ValueError("out of reach")
    while b - a > tolerance / 2: a, b = (a, (a + b) / 2) if share_left((a + b) / 2) <= target else ((a + b) / 2, b)
    return b


def finetune(model, schedule, images, steps, lr=1e-3, batch_size=32, teacher=None):
    """Adam."""
    o, out = torch.optim.Adam(model.requires_grad_().parameters(), lr), []
    for _ in range(steps):
        x = images[torch.randperm(len(images))[:batch_size]]
        e, t = torch.randn(x.shape), torch.randint(schedule.num_timesteps, (batch_size,))
        a = schedule.alpha_bar(t).view(-1, 1, 1, 1)
        x = a**0.5 * x + (1 - a) ** 0.5 * e
        with torch.no_grad(): y = teacher(x, t) if teacher is not None else e
        loss = (model(x, t) - y).pow(2).mean()
        o.zero_grad(), loss.backward(), o.step(), out.append(float(loss))
    return out
