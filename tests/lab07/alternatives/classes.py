"""Style: a small class for a pair of timesteps; generators; batched coefficients."""
# %%
import dataclasses
import itertools

import torch


@dataclasses.dataclass
class Jump:
    """From t to s on a schedule."""

    schedule: object
    t: int
    s: int

    def __post_init__(self):
        self.now = float(self.schedule.alpha_bar(self.t).double())
        self.then = float(self.schedule.alpha_bar(self.s).double())

    def sigma(self, eta):
        """Standard deviation of the added noise, in x_s."""
        ratio = (1 - self.then) / (1 - self.now)
        return eta * (ratio * (1 - self.now / self.then)) ** 0.5

    def direction(self, eta):
        """What multiplies eps, in x / sqrt(alpha_bar)."""
        left = max(0.0, 1 - self.then - self.sigma(eta) ** 2)
        return (left / self.then) ** 0.5 - ((1 - self.now) / self.now) ** 0.5


@add_to_class(MomentumSampler)
def euler_step(self, x_t, t):
    """One step of the SDE."""
    times = torch.empty(x_t.size(0), dtype=torch.long).fill_(t)
    with torch.no_grad():
        score = self.model(x_t, times).neg() / (1 - self.schedule.alpha_bar(t)).sqrt()
    beta = self.schedule.betas[t]
    mean = x_t + (0.5 * x_t + score) * beta
    return mean if t == 0 else mean + torch.randn(x_t.shape, dtype=x_t.dtype) * beta.sqrt()


@add_to_class(MomentumSampler)
def displacement(self, eps, t, s, eta=0.0, z=None):
    """A jump in x / sqrt(alpha_bar)."""
    jump = Jump(self.schedule, t, s)
    result = eps * jump.direction(eta)
    if eta == 0 or s == -1:
        return result
    noise = torch.randn(eps.shape, dtype=eps.dtype) if z is None else z
    return result + noise * (jump.sigma(eta) / jump.then**0.5)


@add_to_class(MomentumSampler)
def momentum_update(self, d, m, v, a, b, c):
    """Momentum and second moment."""
    mean_square = torch.linalg.vector_norm(d, dim=(1, 2, 3)) ** 2 / d[0].numel()
    return torch.add(a * m, d, alpha=b), v + c * (mean_square - v)


@add_to_class(MomentumSampler)
def states(self, x, timesteps, eta, a, b, c, zeta):
    """Yield x after every step."""
    m, v = x * 0, torch.ones(x.size(0), dtype=x.dtype)
    for t, s in itertools.pairwise([*timesteps, -1]):
        jump = Jump(self.schedule, t, s)
        eps = self.model(x, torch.empty(x.size(0), dtype=torch.long).fill_(t))
        m, v = self.momentum_update(self.displacement(eps, t, s, eta), m, v, a, b, c)
        x = (x * jump.now**-0.5 + m / (v.sqrt() + zeta).unflatten(0, (-1, 1, 1, 1))) * jump.then**0.5
        yield x


@add_to_class(MomentumSampler)
def sample(self, shape, timesteps=None, eta=0.0, *, a=0.0, b=1.0, c=0.0, zeta=0.0, x_T=None):
    """The last of the states."""
    if timesteps is None:
        timesteps = reversed(range(self.schedule.num_timesteps))
    x = torch.randn(*shape) if x_T is None else x_T
    with torch.no_grad():
        for x in self.states(x, [int(t) for t in timesteps], eta, a, b, c, zeta):
            pass
    return x


def noise_prediction_mse(model, schedule, x_0, t, eps, batch_size=128):
    """Weighted mean of the batches' errors."""
    batches = torch.arange(len(x_0)).split(batch_size)
    with torch.no_grad():
        errors = []
        for index in batches:
            a = schedule.alpha_bar(t[index]).reshape(-1, 1, 1, 1)
            shown = torch.sqrt(a) * x_0[index] + torch.sqrt(1 - a) * eps[index]
            errors.append(torch.nn.functional.mse_loss(model(shown, t[index]), eps[index]) * len(index))
    return float(sum(errors) / len(x_0))

# %%
class Ruler:
    """Integers from -top to top, a scale apart."""

    def __init__(self, bits, scale=None):
        if bits < 2:
            raise ValueError(f"bits = {bits}")
        self.top = (1 << (bits - 1)) - 1
        self.scale = scale

    def fit(self, x, per_channel=False):
        """Put the largest value on the outermost mark."""
        if x.isnan().any() or x.isinf().any():
            raise ValueError("NaN or infinity")
        if per_channel:
            top = torch.stack([channel.abs().max() for channel in x]).reshape([-1] + [1] * (x.ndim - 1))
        else:
            top = torch.maximum(x.max(), -x.min())
        self.scale = torch.where(top == 0, torch.ones_like(top), top / self.top)
        return self

    def __call__(self, x):
        integers = torch.round(x / self.scale)
        return integers.clip(min=-self.top, max=self.top) * self.scale

    def inside(self, x):
        """Where nothing is clipped."""
        return (x / self.scale).abs() <= self.top


def symmetric_scale(x, bits, per_channel=False):
    """See Ruler.fit."""
    return Ruler(bits).fit(x, per_channel).scale


def fake_quantize(x, scale, bits):
    """See Ruler."""
    return Ruler(bits, scale)(x)


def straight_through(x, scale, bits):
    """Clipped values, with the rounding added where no gradient sees it."""
    ruler = Ruler(bits, scale)
    y = torch.where(ruler.inside(x), x, ruler(x).detach())
    return y + (ruler(x) - y).detach()


# %%
class Trajectory:
    """States, kept when asked."""

    def __init__(self, model, schedule, x_T, num_steps):
        if not len(x_T) > 1:
            raise ValueError("more than one trajectory, please")
        self.steps = ddim_states(model, schedule, x_T, num_steps)
        self.count = num_steps

    def at(self, wanted):
        """(x, t) of the wanted steps, ascending."""
        if not wanted or min(wanted) < 0 or max(wanted) >= self.count:
            raise ValueError(f"steps {wanted}")
        found = []
        for k in range(max(wanted) + 1):
            state = next(self.steps)
            if k in wanted:
                found.append(state)
        return (
            torch.vstack([x for x, _ in found]),
            torch.tensor([t for x, t in found for _ in range(len(x))], dtype=torch.long),
        )


def calibration_set(model, schedule, x_T, num_steps=100, every=5):
    """See Trajectory."""
    if every < 1 or every > num_steps:
        raise ValueError(f"every = {every}")
    return Trajectory(model, schedule, x_T, num_steps).at([k for k in range(num_steps) if k % every == 0])


def one_timestep_set(model, schedule, x_T, step=0, num_steps=100):
    """See Trajectory."""
    return Trajectory(model, schedule, x_T, num_steps).at([step])


class Candidates:
    """Ten ranges, and what each costs."""

    def __init__(self):
        self.top, self.costs = 0.0, torch.zeros(10, dtype=torch.float64)

    def see(self, x):
        """First pass."""
        self.top = max(self.top, float(x.abs().max()))

    def weigh(self, x, bits):
        """Second pass."""
        for r, scale in enumerate(self.scales(bits)):
            self.costs[r] += F.mse_loss(fake_quantize(x, scale.to(x.dtype), bits), x, reduction="sum").double()

    def scales(self, bits):
        """The ten."""
        return [torch.tensor((self.top or 1.0) * r / (10 * (2 ** (bits - 1) - 1))).double() for r in range(1, 11)]

    def best(self, bits):
        """The one."""
        return self.scales(bits)[int(torch.argmin(self.costs))] if self.top else torch.tensor(1.0)


def activation_scales(network, calibration, bits, split=True, batch_size=32):
    """A `Candidates` for each piece."""
    pieces = input_pieces(network, split)
    found = {name: [Candidates() for _ in sizes] for name, sizes in pieces.items()}
    for inputs in layer_inputs(network, calibration, pieces, batch_size):
        for name in pieces:
            for candidates, x in zip(found[name], inputs[name]):
                candidates.see(x)
    for inputs in layer_inputs(network, calibration, pieces, batch_size):
        for name in pieces:
            for candidates, x in zip(found[name], inputs[name]):
                candidates.weigh(x, bits)
    return {name: [c.best(bits) for c in candidates] for name, candidates in found.items()}


# %%
def fake_quantize_split(x, scales, sizes, bits):
    """In place of a list: narrow."""
    if len(sizes) != len(scales):
        raise ValueError("a scale for each piece")
    if x.size(1) != sum(sizes):
        raise ValueError("pieces must cover all channels")
    start, parts = 0, []
    for scale, size in zip(scales, sizes):
        parts.append(straight_through(x.narrow(1, start, size), scale.to(x.dtype), bits))
        start += size
    return torch.cat(parts, 1)


class _Forward:
    """What the layer does."""

    def weights(self):
        """Rounded, piece by piece."""
        rounded = []
        for w in self.conv.weight.split(self.sizes, 1):
            scale = Ruler(self.weight_bits).fit(w.detach(), per_channel=True).scale
            rounded.append(straight_through(w, scale, self.weight_bits))
        return torch.cat(rounded, 1)

    def forward(self, x):
        """Convolve."""
        x = fake_quantize_split(x, self.scales, self.sizes, self.activation_bits)
        c = self.conv
        return torch.conv2d(x, self.weights(), c.bias, c.stride, c.padding, c.dilation, c.groups)


QuantizedConv2d.weights, QuantizedConv2d.forward = _Forward.weights, _Forward.forward


def quantize_model(model, calibration, weight_bits=8, activation_bits=8, split=True):
    """Copy, then replace by name."""
    twin = copy.deepcopy(model)
    for name, scales in activation_scales(model, calibration, activation_bits, split).items():
        where, what = twin, name.split(".")
        for part in what[:-1]:
            where = getattr(where, part)
        old = getattr(where, what[-1])
        sizes = input_pieces(model, split)[name]
        setattr(where, what[-1], QuantizedConv2d(old, scales, sizes, weight_bits, activation_bits))
    return twin


def model_bytes(network):
    """Walk."""
    if isinstance(network, QuantizedConv2d):
        w, pieces = network.conv.weight, len(network.sizes)
        bits = w.numel() * network.weight_bits
        return (bits + 7) // 8 + 4 * (network.conv.bias.numel() + pieces * (w.size(0) + 1))
    own = 4 * sum(p.numel() for p in network.parameters(recurse=False))
    return own + sum(model_bytes(child) for child in network.children())


def finetune_quantized(quantized, teacher, schedule, images, steps, lr=1e-3, batch_size=32):
    """A closure for the step."""
    for p in quantized.parameters():
        p.requires_grad_()
    adam = torch.optim.AdamW(quantized.parameters(), lr=lr, weight_decay=0.0)

    def one():
        """One."""
        index = torch.randint(0, images.size(0), (batch_size,))
        t = torch.randint(0, schedule.num_timesteps, (batch_size,))
        bar = schedule.alpha_bar(t).to(images.dtype).reshape(-1, 1, 1, 1)
        eps = torch.randn(batch_size, *images.shape[1:], dtype=images.dtype)
        x = torch.sqrt(bar) * images[index] + torch.sqrt(1 - bar) * eps
        with torch.inference_mode():
            wanted = teacher(x, t)
        adam.zero_grad(set_to_none=True)
        loss = ((quantized(x, t) - wanted.clone()) ** 2).mean()
        loss.backward()
        adam.step()
        return loss.item()

    return [one() for _ in range(steps)]

# %%
class Scores:
    """Importance of channels, and who goes."""

    def __init__(self, values):
        self.values = values

    @classmethod
    def of_weight(cls, weight):
        """Of weight."""
        return cls(torch.linalg.vector_norm(weight, dim=list(range(1, weight.dim()))))

    @classmethod
    def of_taylor(cls, weight, gradient, separately):
        """Of taylor."""
        parts = torch.mul(weight, gradient).reshape(weight.size(0), -1)
        if separately:
            parts = parts.abs()
        return cls(parts.sum(-1).abs())

    def lowest(self, ratio):
        """Lowest."""
        if ratio < 0.0 or ratio >= 1.0:
            raise ValueError("ratio out of range")
        number = math.floor(ratio * len(self.values) + 0.5)
        cut = torch.sort(self.values).indices[:number]
        return self._checked(torch.sort(cut).values)

    def below(self, threshold):
        """Below."""
        return self._checked(torch.arange(len(self.values))[self.values < threshold])

    def _checked(self, chosen):
        if chosen.numel() >= self.values.numel():
            raise ValueError("that would empty the layer")
        return chosen


def channel_magnitudes(weight):
    """Channel magnitudes."""
    return Scores.of_weight(weight).values


def channels_to_prune(scores, ratio=None, threshold=None):
    """Channels to prune."""
    match (ratio is not None, threshold is not None):
        case (True, False):
            return Scores(scores).lowest(ratio)
        case (False, True):
            return Scores(scores).below(threshold)
    raise ValueError("ratio or threshold")


def taylor_importance(weight, gradient, separately=False):
    """Taylor importance."""
    return Scores.of_taylor(weight, gradient, separately).values


# %%
class Accumulator:
    """Adds gradients up in double precision."""

    def __init__(self, model, schedule):
        self.model = copy.deepcopy(model)
        for p in self.model.parameters():
            p.requires_grad_()
        self.schedule = schedule
        self.sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in self.model.named_parameters()}
        self.kept, self.max = [], 0.0

    def visit(self, t, x_0, noise, threshold):
        """Visit."""
        a = self.schedule.alpha_bar(torch.tensor(t)).to(x_0)
        x_t = a**0.5 * x_0 + (1 - a) ** 0.5 * noise
        difference = self.model(x_t, torch.full([len(x_0)], t, device=x_0.device)) - noise
        loss = difference.square().mean()
        self.max = max(self.max, float(loss))
        if float(loss) <= threshold * self.max:
            return False
        names = list(self.sums)
        parameters = dict(self.model.named_parameters())
        gradients = torch.autograd.grad(loss, [parameters[n] for n in names], allow_unused=True)
        for name, gradient in zip(names, gradients):
            if gradient is not None:
                self.sums[name] += gradient.double()
        self.kept.append(t)
        return True


def diffusion_gradients(model, schedule, x_0, noise, threshold=0.05, timesteps=None):
    """Diffusion gradients."""
    accumulator = Accumulator(model, schedule)
    steps = iter(range(schedule.num_timesteps) if timesteps is None else timesteps)
    while (t := next(steps, None)) is not None and accumulator.visit(t, x_0, noise, threshold):
        pass
    return {name: value.to(x_0.dtype) for name, value in accumulator.sums.items()}, accumulator.kept


class MacCounter:
    """A context that counts."""

    def __init__(self, model):
        self.layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        self.total = 0

    def __call__(self, layer, _args, output):
        self.total += output.numel() * math.prod(layer.weight.shape[1:])

    def __enter__(self):
        self.handles = [layer.register_forward_hook(self) for layer in self.layers]
        return self

    def __exit__(self, *_):
        [handle.remove() for handle in self.handles]


def count_macs(model, shape=(1, 28, 28)):
    """Count macs."""
    with MacCounter(model) as counter, torch.no_grad():
        model(torch.zeros(1, *shape), torch.zeros(1, dtype=torch.long))
    return counter.total


# %%
class Pruner:
    """Holds the copy and the widths it began with."""

    def __init__(self, model, importance):
        self.network, self.importance = copy.deepcopy(model), importance
        self.start = [g.units for g in channel_groups(self.network)]

    def turn(self, decide):
        """Turn."""
        scores = self.importance(self.network)
        for group, start in zip(channel_groups(self.network), self.start):
            rows = [scores[n].reshape(-1, group.units).double().mean(0) for n in group.layers]
            group.remove(decide(torch.stack(rows).mean(0), start))


def prune_model(model, importance, ratio=None, threshold=None, iterations=1):
    """Prune model."""
    if (ratio is not None) + (threshold is not None) != 1:
        raise ValueError("exactly one rule")
    pruner = Pruner(model, importance)
    for k in range(1, iterations + 1):
        if ratio is None:
            pruner.turn(lambda s, start: channels_to_prune(s, threshold=threshold))
        else:
            goal = ratio * k / iterations
            pruner.turn(lambda s, start: channels_to_prune(s, (len(s) - start + round(goal * start)) / len(s)))
    return pruner.network


def ratio_for_macs(share_left, target, largest=0.8, tolerance=0.01):
    """Ratio for macs."""
    interval = [0.0, largest]
    if share_left(largest) > target:
        raise ValueError("unreachable")
    for _ in range(math.ceil(math.log2(largest / tolerance)) + 1):
        middle = sum(interval) / 2
        interval[share_left(middle) <= target] = middle
    return interval[1]


class Trainer7:
    """Optimizer, draws, target."""

    def __init__(self, model, schedule, lr, teacher):
        self.model, self.schedule, self.teacher = model.requires_grad_(True), schedule, teacher
        self.optimizer = torch.optim.RMSprop(model.parameters(), lr)

    def step(self, x_0):
        """Step."""
        t = torch.randint(high=self.schedule.num_timesteps, size=(len(x_0),))
        eps = torch.randn_like(x_0)
        a = self.schedule.alphas_cumprod[t][:, None, None, None]
        x_t = a.sqrt() * x_0 + (1 - a).sqrt() * eps
        self.optimizer.zero_grad()
        if self.teacher is not None:
            with torch.no_grad():
                eps = self.teacher(x_t, t)
        loss = (self.model(x_t, t) - eps).square().mean()
        loss.backward()
        self.optimizer.step()
        return loss.item()


def finetune(model, schedule, images, steps, lr=1e-3, batch_size=32, teacher=None):
    """Finetune."""
    trainer = Trainer7(model, schedule, lr, teacher)
    return [trainer.step(images[torch.randint(len(images), (batch_size,))]) for _ in range(steps)]
