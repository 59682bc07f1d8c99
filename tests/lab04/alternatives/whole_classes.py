"""Style: classes written anew in one piece, a DataLoader, torch's own averaging, gradients cleared first."""
# %%
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset


class ForwardProcess:
    """Adds noise to images."""

    def __init__(self, schedule):
        self.schedule = schedule
        bars = torch.cat([torch.ones(1), schedule.alphas_cumprod])
        self.signal, self.spread = bars.sqrt(), (1 - bars).sqrt()

    def forward_step(self, x_prev, t):
        """From t - 1 to t."""
        beta = float(self.schedule.betas[t])
        noise = torch.randn(x_prev.shape, dtype=x_prev.dtype, device=x_prev.device)
        return x_prev * (1 - beta) ** 0.5 + noise * beta**0.5

    def add_noise(self, x_0, t, noise=None):
        """From clean data to t."""
        if isinstance(t, int):
            t = torch.full((x_0.shape[0],), t)
        if noise is None:
            noise = torch.randn_like(x_0)
        index = t.cpu() + 1
        signal = self.signal[index].reshape(len(x_0), 1, 1, 1).to(x_0)
        spread = self.spread[index].reshape(len(x_0), 1, 1, 1).to(x_0)
        return signal * x_0 + spread * noise, noise


# %%
def linear_betas(num_timesteps, beta_start=1e-4, beta_end=0.02, rescale=True):
    """Plain Python lists, then tensors."""
    if num_timesteps < 1:
        raise ValueError(f"num_timesteps must be positive, got {num_timesteps}")
    betas, products, product = [], [], 1.0
    for i in range(num_timesteps):
        fraction = i / (num_timesteps - 1) if num_timesteps > 1 else 0.0
        beta = beta_start + fraction * (beta_end - beta_start)
        if rescale:
            beta *= 1000.0 / num_timesteps
        if not 0 < beta < 1:
            raise ValueError(f"beta {beta} at step {i} is not between 0 and 1")
        product *= 1 - beta
        betas.append(beta)
        products.append(product)
    return torch.tensor(betas, dtype=torch.float32), torch.tensor(products, dtype=torch.float32)


def prior_mismatch(schedule, mean, std):
    """KL(N(M, V) || N(0, 1))."""
    import math

    left = schedule.alphas_cumprod[schedule.num_timesteps - 1].item()
    M, V = math.sqrt(left) * mean, left * std * std + (1 - left)
    return (V + M * M - 1 - math.log(V)) / 2


# %%
def time_embedding(t, dim):
    """One column after another."""
    if dim % 2 == 1:
        raise ValueError("dim must be even")
    half = dim // 2
    out = torch.empty(len(t), dim)
    for i in range(half):
        angle = t.double() / 10000 ** (i / half)
        out[:, 2 * i], out[:, 2 * i + 1] = torch.sin(angle), torch.cos(angle)
    return out


class ResidualBlock(nn.Module):
    """The same layers, chained."""

    def __init__(self, in_channels, out_channels, embedding_dim):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, in_channels), nn.GroupNorm(4, out_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding="same")
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding="same")
        self.time = nn.Linear(embedding_dim, 2 * out_channels)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        self.activation = nn.SiLU()

    def forward(self, x, embedding):
        """Norm, activation, convolution; twice."""
        h = self.norm2(self.conv1(self.activation(self.norm1(x))))
        channels = h.shape[1]
        time = self.time(embedding).unsqueeze(-1).unsqueeze(-1)
        h = h + h * time[:, :channels] + time[:, channels:]
        return self.conv2(self.activation(h)) + self.skip(x)


# %%
def noise_prediction_loss(model, schedule, x_0, t=None, noise=None):
    """nn.MSELoss of the noise."""
    B = x_0.size(0)
    if t is None:
        t = (torch.rand(B) * schedule.num_timesteps).long().clamp(max=schedule.num_timesteps - 1)
    x_t, eps = ForwardProcess(schedule).add_noise(x_0, t, noise)
    return nn.MSELoss()(model(x_t, t), eps)


class EMA:
    """torch's AveragedModel inside."""

    def __init__(self, model, decay=0.999):
        self.averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
        self.averaged.n_averaged.fill_(1)  # else the first update would overwrite the first weights
        self.model = self.averaged.module

    def update(self, model):
        """One step of the average."""
        self.averaged.update_parameters(model)

    def weights(self):
        """The averaged weights, by name."""
        return self.model.state_dict()


@add_to_class(Trainer)
def train_step(self, x_0):
    """Clear, loss, gradients, step, average."""
    self.optimizer.zero_grad(set_to_none=True)
    loss = noise_prediction_loss(self.model, self.schedule, x_0)
    loss.backward()
    self.optimizer.step()
    if self.ema is not None:
        self.ema.update(self.model)
    return loss.detach().item()


@add_to_class(Trainer)
def train_epoch(self, images, batch_size):
    """One pass of a DataLoader."""
    losses, counts = [], []
    for (batch,) in DataLoader(TensorDataset(images), batch_size=batch_size, shuffle=True):
        losses.append(self.train_step(batch))
        counts.append(len(batch))
    return float(torch.tensor(losses, dtype=torch.float64) @ torch.tensor(counts, dtype=torch.float64) / sum(counts))


# %%
class Diffusion:
    """DDPM, and DDIM with sigma = 0."""

    def __init__(self, model, schedule):
        self.model, self.schedule = model, schedule
        self.T = schedule.num_timesteps

    def eps(self, x, t):
        """The network's answer."""
        return self.model(x, torch.tensor([t] * len(x)))

    @torch.no_grad()
    def ddpm_step(self, x_t, t):
        """Mean, and noise unless t = 0."""
        s = self.schedule
        eps = self.eps(x_t, t)
        mean = (x_t - s.betas[t] / torch.sqrt(1 - s.alphas_cumprod[t]) * eps) / torch.sqrt(s.alphas[t])
        if t == 0:
            return mean
        variance = s.betas[t] * (1 - s.alphas_cumprod[t - 1]) / (1 - s.alphas_cumprod[t])
        return mean + torch.sqrt(variance) * torch.randn_like(x_t)

    @torch.no_grad()
    def ddpm_sample(self, shape, *, x_T=None):
        """All steps."""
        x = torch.randn(shape) if x_T is None else x_T.clone()
        t = self.T - 1
        while t >= 0:
            x = self.ddpm_step(x, t)
            t -= 1
        return x

    def ddim_timesteps(self, num_steps):
        """Truncated after adding a half."""
        if not (1 <= num_steps <= self.T):
            raise ValueError("num_steps out of range")
        if num_steps == 1:
            return torch.LongTensor([self.T - 1])
        grid = torch.arange(num_steps - 1, -1, -1, dtype=torch.float64) * (self.T - 1) / (num_steps - 1)
        return (grid + 0.5).floor().long()

    @torch.no_grad()
    def ddim_sample(self, shape, num_steps=50, *, x_T=None):
        """Jump by jump."""
        x = torch.randn(shape) if x_T is None else x_T.clone()
        visits = self.ddim_timesteps(num_steps).tolist()
        for i, t in enumerate(visits):
            eps = self.eps(x, t)
            a = self.schedule.alphas_cumprod[t].to(x.dtype)
            x_0 = (x - torch.sqrt(1 - a) * eps) / torch.sqrt(a)
            if i == len(visits) - 1:
                return x_0
            b = self.schedule.alphas_cumprod[visits[i + 1]].to(x.dtype)
            x = torch.sqrt(b) * x_0 + torch.sqrt(1 - b) * eps


def compare_samplers(diffusion, num_samples=16, step_counts=(50, 20), sample_shape=(1, 28, 28)):
    """Timed with time.perf_counter, counted with a hook."""
    x_T = torch.randn(num_samples, *sample_shape)

    def run(name, sampler):
        with count_calls(diffusion.model) as counter:
            begin = time.perf_counter()
            samples = sampler()
            end = time.perf_counter()
        return {"name": name, "network_calls": counter.calls, "seconds": end - begin, "samples": samples}

    rows = [run(f"DDPM-{diffusion.T}", lambda: diffusion.ddpm_sample(tuple(x_T.shape), x_T=x_T))]
    rows += [run(f"DDIM-{n}", lambda n=n: diffusion.ddim_sample(tuple(x_T.shape), n, x_T=x_T)) for n in step_counts]
    base = rows[0]["seconds"]
    return [{**row, "speedup": base / row["seconds"]} for row in rows]
