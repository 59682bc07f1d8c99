"""Style: coefficients by NumPy, explicit loops, results as tensors at the very end."""
# %%
import numpy as np
import torch


def _abar(schedule):
    """alpha_bar with 1 appended, so that index -1 is clean data."""
    return np.append(schedule.alphas_cumprod.numpy().astype(np.float64), 1.0)


def _coefficients(schedule, t, s, eta):
    """What multiplies eps and z."""
    abar = _abar(schedule)
    sigma2 = 0.0
    if eta != 0:
        sigma2 = eta * eta * (1 - abar[s]) / (1 - abar[t]) * (1 - abar[t] / abar[s])
    kept = np.sqrt(np.clip(1 - abar[s] - sigma2, 0, None) / abar[s])
    return float(kept - np.sqrt((1 - abar[t]) / abar[t])), float(np.sqrt(sigma2 / abar[s]))


class MomentumSampler(MomentumSampler):
    """The given class, filled by inheritance."""

    def euler_step(self, x_t, t):
        """Drift and diffusion."""
        with torch.no_grad():
            eps = self.model(x_t, torch.tensor([t] * x_t.shape[0]))
        beta = float(self.schedule.betas.numpy()[t])
        score = -eps / float(np.sqrt(1 - _abar(self.schedule)[t]))
        drift = 0.5 * beta * x_t + beta * score
        noise = np.sqrt(beta) * np.random.standard_normal(tuple(x_t.shape)) if t != 0 else np.zeros(tuple(x_t.shape))
        return x_t + drift + torch.from_numpy(noise).to(x_t.dtype)

    def displacement(self, eps, t, s, eta=0.0, z=None):
        """Two terms."""
        first, second = _coefficients(self.schedule, t, s, eta)
        if second == 0.0:
            return first * eps
        if z is None:
            z = torch.from_numpy(np.random.standard_normal(tuple(eps.shape))).to(eps.dtype)
        return first * eps + second * z

    def momentum_update(self, d, m, v, a, b, c):
        """Per image."""
        squares = np.array([float(np.mean(np.square(image.double().numpy()))) for image in d])
        return a * m + b * d, (1 - c) * v + c * torch.from_numpy(squares).to(v.dtype)

    def sample(self, shape, timesteps=None, eta=0.0, *, a=0.0, b=1.0, c=0.0, zeta=0.0, x_T=None):
        """Step by step."""
        abar = _abar(self.schedule)
        if timesteps is None:
            timesteps = np.arange(self.schedule.num_timesteps)[::-1].tolist()
        x = torch.randn(tuple(shape)) if x_T is None else x_T.clone()
        m, v = torch.zeros_like(x), torch.ones(x.shape[0], dtype=x.dtype)
        for k in range(len(timesteps)):
            t = int(timesteps[k])
            s = int(timesteps[k + 1]) if k + 1 < len(timesteps) else -1
            with torch.no_grad():
                eps = self.model(x, torch.tensor([t] * x.shape[0]))
            m, v = self.momentum_update(self.displacement(eps, t, s, eta), m, v, a, b, c)
            scaled = x / float(np.sqrt(abar[t])) + m / (torch.sqrt(v) + zeta).reshape(-1, 1, 1, 1)
            x = float(np.sqrt(abar[s])) * scaled
        return x


# %%
def noise_prediction_mse(model, schedule, x_0, t, eps, batch_size=128):
    """Sum of squares over everything, divided once."""
    abar, squares = _abar(schedule), 0.0
    for first in range(0, len(x_0), batch_size):
        part = slice(first, first + batch_size)
        a = torch.from_numpy(abar[t[part].numpy()]).to(x_0.dtype).reshape(-1, 1, 1, 1)
        with torch.no_grad():
            answer = model(torch.sqrt(a) * x_0[part] + torch.sqrt(1 - a) * eps[part], t[part])
        squares += float(np.sum(np.square(answer.numpy() - eps[part].numpy()), dtype=np.float64))
    return squares / eps.numel()

# %%
import numpy as np


def symmetric_scale(x, bits, per_channel=False):
    """The scale, by numpy."""
    values = np.abs(x.detach().numpy().astype(np.float64))
    if bits < 2:
        raise ValueError("at least 2 bits")
    if not np.all(np.isfinite(values)):
        raise ValueError("values must be finite")
    top = values.max(axis=tuple(range(1, values.ndim)), keepdims=True) if per_channel else values.max()
    scale = np.where(top == 0, 1.0, top / (2 ** (bits - 1) - 1))
    return torch.from_numpy(np.asarray(scale)).to(x.dtype)


def fake_quantize(x, scale, bits):
    """Nearest integers times the scale."""
    limit = 2 ** (bits - 1) - 1
    integers = np.clip(np.rint(x.detach().numpy() / scale.detach().numpy()), -limit, limit)
    return torch.from_numpy(np.asarray(integers * scale.detach().numpy())).to(x.dtype)


# %%
class _Rounding(torch.autograd.Function):
    """Forward rounds, backward passes what was not clipped."""

    @staticmethod
    def forward(ctx, x, scale, bits):
        """Round."""
        ctx.save_for_backward((x / scale).abs() <= 2 ** (bits - 1) - 0.5)
        return fake_quantize(x, scale, bits)

    @staticmethod
    def backward(ctx, upstream):
        """Pass."""
        (inside,) = ctx.saved_tensors
        return upstream * inside, None, None


def straight_through(x, scale, bits):
    """Round, with a gradient."""
    return _Rounding.apply(x, torch.as_tensor(scale, dtype=x.dtype), bits)


# %%
def _check(x_T):
    if x_T.shape[0] < 2:
        raise ValueError("two trajectories at least")


def calibration_set(model, schedule, x_T, num_steps=100, every=5):
    """Some states of the trajectory; stops after the last that is wanted."""
    _check(x_T)
    if every < 1 or every > num_steps:
        raise ValueError("every")
    wanted = set(range(0, num_steps, every))
    images, times = [], []
    for step, (x, t) in enumerate(ddim_states(model, schedule, x_T, num_steps)):
        if step in wanted:
            images.append(x.numpy())
            times.append(np.repeat(t, len(x)))
        if step == max(wanted):
            break
    return torch.from_numpy(np.concatenate(images)), torch.from_numpy(np.concatenate(times))


def one_timestep_set(model, schedule, x_T, step=0, num_steps=100):
    """One state."""
    _check(x_T)
    if step < 0 or step >= num_steps:
        raise ValueError("step")
    trajectory = ddim_states(model, schedule, x_T, num_steps)
    x, t = next(trajectory)
    while step:
        x, t = next(trajectory)
        step -= 1
    return x, torch.from_numpy(np.repeat(t, len(x)))


def activation_scales(network, calibration, bits, split=True, batch_size=32):
    """All inputs at once, as the set is small enough here; batches are put together first."""
    pieces = input_pieces(network, split)
    parts = {}
    for inputs in layer_inputs(network, calibration, pieces, batch_size):
        for name, values in inputs.items():
            for k, value in enumerate(values):
                parts.setdefault((name, k), []).append(value.numpy().astype(np.float64).ravel())
    result = {name: [] for name in pieces}
    q_max = 2 ** (bits - 1) - 1
    for (name, _), chunks in sorted(parts.items(), key=lambda item: item[0][1]):
        values = np.concatenate(chunks)
        top = np.abs(values).max()
        if top == 0:
            result[name].append(torch.tensor(1.0))
            continue
        scales = top * np.linspace(0.1, 1, 10) / q_max
        errors = [((np.clip(np.rint(values / s), -q_max, q_max) * s - values) ** 2).sum() for s in scales]
        result[name].append(torch.tensor(scales[int(np.argmin(errors))]))
    return result


# %%
def fake_quantize_split(x, scales, sizes, bits):
    """Slice by slice."""
    if len(scales) != len(sizes) or sum(sizes) != x.shape[1]:
        raise ValueError("scales and sizes do not fit")
    ends = np.cumsum([0, *sizes])
    return torch.hstack([straight_through(x[:, a:b], s, bits) for a, b, s in zip(ends[:-1], ends[1:], scales)])


@add_to_class(QuantizedConv2d)
def forward(self, x):
    """Sum of the convolutions of the pieces."""
    y = 0
    ends = np.cumsum([0, *self.sizes])
    for a, b, scale in zip(ends[:-1], ends[1:], self.scales):
        w = self.conv.weight[:, a:b]
        w = straight_through(w, symmetric_scale(w, self.weight_bits, True), self.weight_bits)
        part = straight_through(x[:, a:b], scale, self.activation_bits)
        y = y + F.conv2d(part, w, None, self.conv.stride, self.conv.padding)
    return y + self.conv.bias[None, :, None, None]


def quantize_model(model, calibration, weight_bits=8, activation_bits=8, split=True):
    """By walking over the modules."""
    scales = activation_scales(model, calibration, activation_bits, split)
    pieces = input_pieces(model, split)
    quantized = copy.deepcopy(model)
    for parent_name, parent in list(quantized.named_modules()):
        for child_name, child in list(parent.named_children()):
            name = f"{parent_name}.{child_name}" if parent_name else child_name
            if name in pieces:
                layer = QuantizedConv2d(child, scales[name], pieces[name], weight_bits, activation_bits)
                parent.add_module(child_name, layer)
    return quantized


def model_bytes(network):
    """Layer by layer."""
    inside = {}
    for name, layer in network.named_modules():
        if isinstance(layer, QuantizedConv2d):
            inside[f"{name}.conv.weight"] = layer
    total = 0
    for name, value in network.named_parameters():
        if name in inside:
            layer = inside[name]
            total += int(np.ceil(value.numel() * layer.weight_bits / 8))
            total += 4 * len(layer.sizes) + 4 * len(layer.sizes) * value.shape[0]
        else:
            total += 4 * value.numel()
    return int(total)


def finetune_quantized(quantized, teacher, schedule, images, steps, lr=1e-3, batch_size=32):
    """With numpy's random numbers."""
    rng = np.random.default_rng()
    for parameter in quantized.parameters():
        parameter.requires_grad = True
    optimizer = torch.optim.Adam(quantized.parameters(), lr=lr)
    history = []
    for _ in range(steps):
        x_0 = images[rng.integers(len(images), size=batch_size)]
        t = torch.from_numpy(rng.integers(schedule.num_timesteps, size=batch_size))
        noise = torch.from_numpy(rng.standard_normal(tuple(x_0.shape))).to(x_0.dtype)
        a = schedule.alphas_cumprod[t].to(x_0.dtype)[:, None, None, None]
        x_t = a.sqrt() * x_0 + (1 - a).sqrt() * noise
        loss = torch.nn.MSELoss()(quantized(x_t, t), teacher(x_t, t).detach())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
    return history

# %%
def channel_magnitudes(weight):
    """numpy's norm."""
    flat = weight.numpy().reshape(len(weight), -1)
    return torch.from_numpy(np.linalg.norm(flat.astype(np.float64), axis=1)).to(weight.dtype)


def channels_to_prune(scores, ratio=None, threshold=None):
    """A mask, then its indices."""
    values = scores.detach().double().numpy()
    if ratio is None and threshold is None or ratio is not None and threshold is not None:
        raise ValueError("exactly one of ratio and threshold")
    if ratio is not None:
        if not (ratio >= 0 and ratio < 1):
            raise ValueError(f"ratio {ratio} is not in [0, 1)")
        mask = np.zeros(values.size, dtype=bool)
        mask[np.argsort(values, kind="stable")[: int(np.floor(ratio * values.size + 0.5))]] = True
    else:
        mask = values < threshold
    if mask.all():
        raise ValueError("a layer would be emptied")
    return torch.from_numpy(np.flatnonzero(mask).astype(np.int64))


def taylor_importance(weight, gradient, separately=False):
    """Products in numpy."""
    products = (weight.numpy() * gradient.numpy()).reshape(len(weight), -1)
    result = np.sum(np.abs(products), axis=1) if separately else np.abs(np.sum(products, axis=1))
    return torch.from_numpy(result)


# %%
def _loss(network, schedule, x_0, noise, t):
    alpha_bar = np.float64(schedule.alphas_cumprod[t].item())
    x_t = (x_0 * float(np.sqrt(alpha_bar)) + noise * float(np.sqrt(1 - alpha_bar))).to(x_0.dtype)
    return torch.mean(torch.square(noise - network(x_t, torch.full((x_0.shape[0],), t, dtype=torch.long))))


def diffusion_gradients(model, schedule, x_0, noise, threshold=0.05, timesteps=None):
    """First all losses without gradients, then the gradient of the sum of those that count."""
    looked = list(range(schedule.num_timesteps)) if timesteps is None else list(timesteps)
    with torch.no_grad():
        losses = np.array([_loss(model, schedule, x_0, noise, t).item() for t in looked])
    small = np.flatnonzero(losses <= threshold * np.maximum.accumulate(losses))
    kept = looked[: small[0]] if small.size else looked
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.requires_grad_(True)
        parameter.grad = torch.zeros_like(parameter)
    for t in kept:
        _loss(twin, schedule, x_0, noise, t).backward()
    return {name: parameter.grad.clone() for name, parameter in twin.named_parameters()}, kept


def count_macs(model, shape=(1, 28, 28)):
    """From shapes seen by pre-hooks."""
    total = []

    def hook(layer, inputs):
        """Hook."""
        x = inputs[0]
        if isinstance(layer, nn.Linear):
            total.append(int(np.prod(x.shape[:-1])) * layer.in_features * layer.out_features)
            return
        size = [
            (x.shape[2 + i] + 2 * layer.padding[i] - layer.kernel_size[i]) // layer.stride[i] + 1 for i in range(2)
        ]
        per = layer.in_channels // layer.groups * layer.kernel_size[0] * layer.kernel_size[1] * layer.out_channels
        total.append(size[0] * size[1] * per)

    handles = [m.register_forward_pre_hook(hook) for m in model.modules() if type(m) in (nn.Conv2d, nn.Linear)]
    with torch.inference_mode():
        model(torch.randn((1, *shape)), torch.tensor([3]))
    for handle in handles:
        handle.remove()
    return int(np.sum(total))


# %%
def prune_model(model, importance, ratio=None, threshold=None, iterations=1):
    """Scores by numpy."""
    if (ratio is None) == (threshold is None):
        raise ValueError("exactly one of ratio and threshold")
    result = copy.deepcopy(model)
    at_first = {tuple(g.layers): g.units for g in channel_groups(result)}
    for turn in range(iterations):
        scores = {name: value.double().numpy() for name, value in importance(result).items()}
        for group in channel_groups(result):
            rows = []
            for name in group.layers:
                rows.append([scores[name][unit :: group.units].mean() for unit in range(group.units)])
            unit_scores = torch.from_numpy(np.mean(rows, axis=0))
            if threshold is not None:
                group.remove(channels_to_prune(unit_scores, threshold=threshold))
                continue
            whole = at_first[tuple(group.layers)]
            wanted = int(np.floor(ratio * (turn + 1) / iterations * whole + 0.5))
            more = wanted - (whole - group.units)
            if more >= group.units:
                raise ValueError("a group would be emptied")
            group.remove(unit_scores.argsort()[:more])
    return result


def ratio_for_macs(share_left, target, largest=0.8, tolerance=0.01):
    """On a grid, by bisection of its index."""
    grid = np.linspace(0, largest, int(np.ceil(largest / tolerance)) + 1)
    low, high = 0, len(grid) - 1
    if share_left(float(grid[-1])) > target:
        raise ValueError("not even the largest setting will do")
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if share_left(float(grid[middle])) <= target else (middle + 1, high)
    return float(grid[low])


def finetune(model, schedule, images, steps, lr=1e-3, batch_size=32, teacher=None):
    """Indices and timesteps from numpy."""
    draw = np.random.default_rng()
    for parameter in model.parameters():
        parameter.requires_grad = True
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0)
    history = np.zeros(steps)
    for step in range(steps):
        x_0 = images[torch.from_numpy(draw.integers(len(images), size=batch_size))]
        t = torch.from_numpy(draw.integers(schedule.num_timesteps, size=batch_size))
        noise = torch.from_numpy(draw.standard_normal(tuple(x_0.shape), dtype=np.float32))
        alpha_bar = schedule.alphas_cumprod[t].reshape(-1, 1, 1, 1)
        x_t = x_0 * alpha_bar.sqrt() + noise * (1 - alpha_bar).sqrt()
        target = noise
        if teacher is not None:
            with torch.no_grad():
                target = teacher(x_t, t)
        model.zero_grad()
        loss = torch.mean((model(x_t, t) - target) ** 2)
        loss.backward()
        optimizer.step()
        history[step] = loss.item()
    return history.tolist()
