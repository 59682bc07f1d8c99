"""Style: NumPy wherever there is no network, generators, and lists filled in loops."""
# %%
import math

import numpy as np


def linear_betas(num_timesteps, beta_start=1e-4, beta_end=0.02, rescale=True):
    """NumPy arrays, handed over as float64 tensors."""
    if num_timesteps <= 0:
        raise ValueError("no timesteps")
    betas = np.linspace(beta_start, beta_end, num_timesteps)
    betas = betas / (num_timesteps / 1000) if rescale else betas
    if (betas >= 1).any() or (betas <= 0).any():
        raise ValueError("a beta is outside (0, 1); take more steps")
    return torch.from_numpy(betas.copy()), torch.from_numpy(np.cumprod(1 - betas))


def prior_mismatch(schedule, mean, std):
    """In float64."""
    a = np.float64(schedule.alphas_cumprod.numpy()[-1])
    M, V = np.sqrt(a) * mean, a * np.square(std) + (1 - a)
    return float((V - 1 - np.log(V) + M**2) * 0.5)


def time_embedding(t, dim):
    """Row by row."""
    if dim & 1:
        raise ValueError(f"odd dimension {dim}")
    w = np.power(10_000.0, -np.arange(dim // 2) / (dim // 2))
    rows = [np.ravel(np.column_stack([np.sin(w * float(v)), np.cos(w * float(v))])) for v in t]
    return torch.from_numpy(np.stack(rows).astype(np.float32))


# %%
@add_to_class(ForwardProcess)
def forward_step(self, x_prev, t):
    """Noise from NumPy."""
    beta = float(self.schedule.betas64[t])
    z = torch.from_numpy(np.random.standard_normal(tuple(x_prev.shape))).to(x_prev)
    return math.sqrt(1 - beta) * x_prev + math.sqrt(beta) * z


@add_to_class(ForwardProcess)
def add_noise(self, x_0, t, noise=None):
    """Image by image."""
    times = [int(t)] * len(x_0) if isinstance(t, int) or t.ndim == 0 else t.tolist()
    noise = torch.from_numpy(np.random.randn(*x_0.shape)).to(x_0) if noise is None else noise
    out = []
    for image, z, time_ in zip(x_0, noise, times):
        a = float(self.schedule.alphas_cumprod[time_])
        out.append(math.sqrt(a) * image + math.sqrt(1 - a) * z)
    return torch.stack(out), noise


@add_to_class(ResidualBlock)
def forward(self, x, embedding):
    """Sigmoid written out."""

    def act(h):
        return h * torch.sigmoid(h)

    inner = self.norm2(self.conv1(act(self.norm1(x))))
    scale, shift = torch.tensor_split(self.time(embedding), 2, dim=1)
    moved = inner + torch.einsum("bchw,bc->bchw", inner, scale) + shift.view(*shift.shape, 1, 1)
    return torch.add(self.conv2(act(moved)), self.skip(x))


# %%
def noise_prediction_loss(model, schedule, x_0, t=None, noise=None):
    """Timesteps from NumPy."""
    if t is None:
        t = torch.from_numpy(np.random.randint(0, schedule.num_timesteps, size=len(x_0)))
    x_t, eps = ForwardProcess(schedule).add_noise(x_0, t, noise)
    error = (model(x_t, t) - eps).flatten()
    return error.dot(error) / error.numel()


@add_to_class(EMA)
def __init__(self, model, decay=0.999):
    """A second model, loaded with clones."""
    self.decay, self.model = decay, copy.deepcopy(model)
    for p in self.model.parameters():
        p.requires_grad = False


@add_to_class(EMA)
def update(self, model):
    """Through the state_dict."""
    new = model.state_dict()
    self.model.load_state_dict(
        {name: self.decay * old + (1 - self.decay) * new[name].detach() for name, old in self.model.state_dict().items()}
    )


@add_to_class(Trainer)
def train_step(self, x_0):
    """torch.autograd.grad in place of backward."""
    loss = noise_prediction_loss(self.model, self.schedule, x_0)
    parameters = list(self.model.parameters())
    for p, g in zip(parameters, torch.autograd.grad(loss, parameters)):
        p.grad = g
    self.optimizer.step()
    if self.ema is not None:
        self.ema.update(self.model)
    return float(loss.detach())


@add_to_class(Trainer)
def train_epoch(self, images, batch_size):
    """A NumPy permutation."""
    order, total, seen = np.random.permutation(len(images)), 0.0, 0
    while seen < len(images):
        part = order[seen : seen + batch_size]
        total += self.train_step(images[torch.from_numpy(part)]) * len(part)
        seen += len(part)
    return total / seen


# %%
@add_to_class(Diffusion)
@torch.no_grad()
def ddpm_step(self, x_t, t):
    """Scalars from float64 tables."""
    a = np.concatenate([[1.0], self.schedule.alphas_cumprod.double().numpy()])
    beta = float(self.schedule.betas.double()[t])
    eps = self.model(x_t, torch.LongTensor([t]).repeat(len(x_t)))
    mean = (x_t - beta / math.sqrt(1 - a[t + 1]) * eps) / math.sqrt(1 - beta)
    return mean + math.sqrt(beta * (1 - a[t]) / (1 - a[t + 1])) * torch.randn_like(x_t)


@add_to_class(Diffusion)
def states(self, x, visits, step):
    """Generator of all states."""
    for i, t in enumerate(visits):
        x = step(x, int(t), int(visits[i + 1]) if i + 1 < len(visits) else -1)
        yield x


@add_to_class(Diffusion)
@torch.no_grad()
def ddpm_sample(self, shape, *, x_T=None):
    """The last state."""
    x = torch.randn(*shape) if x_T is None else x_T
    visits = np.arange(self.schedule.num_timesteps)[::-1]
    return list(self.states(x, visits, lambda x, t, s: self.ddpm_step(x, t)))[-1]


@add_to_class(Diffusion)
def ddim_timesteps(self, num_steps):
    """np.linspace, np.rint."""
    last = self.schedule.num_timesteps - 1
    if num_steps < 1:
        raise ValueError("at least one step")
    if num_steps > last + 1:
        raise ValueError("more steps than timesteps")
    return torch.from_numpy(np.rint(np.linspace(last, 0, num_steps)).astype(np.int64))


@add_to_class(Diffusion)
@torch.no_grad()
def ddim_sample(self, shape, num_steps=50, *, x_T=None):
    """The last state."""

    def jump(x, t, s):
        a, b = (float(self.schedule.alpha_bar(k)) for k in (t, s))
        eps = self.model(x, torch.full((x.shape[0],), t, dtype=torch.long))
        return math.sqrt(b) * (x - math.sqrt(1 - a) * eps) / math.sqrt(a) + math.sqrt(1 - b) * eps

    x = torch.randn(*shape) if x_T is None else x_T
    *_, final = self.states(x, self.ddim_timesteps(num_steps).numpy(), jump)
    return final


def compare_samplers(diffusion, num_samples=16, step_counts=(50, 20), sample_shape=(1, 28, 28)):
    """Names first, then numbers."""
    x_T = torch.from_numpy(np.random.randn(num_samples, *sample_shape)).float()
    names = [f"DDPM-{diffusion.schedule.num_timesteps}"] + [f"DDIM-{n}" for n in step_counts]
    rows = []
    for name in names:
        with count_calls(diffusion.model) as counter:
            begin = time.perf_counter()
            if name.startswith("DDPM"):
                samples = diffusion.ddpm_sample(x_T.shape, x_T=x_T)
            else:
                samples = diffusion.ddim_sample(x_T.shape, int(name.split("-")[1]), x_T=x_T)
            seconds = time.perf_counter() - begin
        rows.append({"name": name, "network_calls": counter.calls, "seconds": seconds, "samples": samples})
    for row in rows:
        row["speedup"] = rows[0]["seconds"] / row["seconds"]
    return rows
