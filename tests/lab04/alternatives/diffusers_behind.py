"""Style: diffusers does the arithmetic behind the lab's interface."""
# %%
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.training_utils import EMAModel


def ddpm_of(schedule):
    """diffusers' scheduler with this schedule's betas."""
    return DDPMScheduler(
        num_train_timesteps=schedule.num_timesteps, trained_betas=schedule.betas.numpy(), clip_sample=False,
        variance_type="fixed_small",
    )


def linear_betas(num_timesteps, beta_start=1e-4, beta_end=0.02, rescale=True):
    """The tables of a DDPMScheduler."""
    if num_timesteps < 1:
        raise ValueError("num_timesteps must be at least 1")
    factor = 1000 / num_timesteps if rescale else 1.0
    if beta_end * factor >= 1 or beta_start * factor <= 0:
        raise ValueError("betas must stay between 0 and 1")
    tables = DDPMScheduler(num_timesteps, beta_start * factor, beta_end * factor, "linear")
    return tables.betas, tables.alphas_cumprod


# %%
@add_to_class(ForwardProcess)
def forward_step(self, x_prev, t):
    """A one-step scheduler is a forward step."""
    one = DDPMScheduler(1, trained_betas=self.schedule.betas[t : t + 1].numpy())
    return one.add_noise(x_prev, torch.randn_like(x_prev), torch.zeros(len(x_prev), dtype=torch.long))


@add_to_class(ForwardProcess)
def add_noise(self, x_0, t, noise=None):
    """DDPMScheduler.add_noise."""
    noise = torch.randn_like(x_0) if noise is None else noise
    t = torch.as_tensor(t).expand(len(x_0))
    return ddpm_of(self.schedule).add_noise(x_0, noise, t), noise


def prior_mismatch(schedule, mean, std):
    """torch.distributions."""
    a = schedule.alphas_cumprod[-1].double()
    last = torch.distributions.Normal(a.sqrt() * mean, (a * std**2 + 1 - a).sqrt())
    return torch.distributions.kl_divergence(last, torch.distributions.Normal(0.0, 1.0)).item()


def time_embedding(t, dim):
    """diffusers' sinusoids, put in turn."""
    if dim % 2:
        raise ValueError("dim must be even")
    sin, cos = get_timestep_embedding(t, dim, downscale_freq_shift=0).chunk(2, dim=1)
    return torch.stack([sin, cos], dim=-1).reshape(len(t), dim)


@add_to_class(ResidualBlock)
def forward(self, x, embedding):
    """nn.Sequential for each half."""
    first = nn.Sequential(self.norm1, nn.SiLU(), self.conv1, self.norm2)
    second = nn.Sequential(nn.SiLU(), self.conv2)
    gain, bias = (1 + self.time(embedding)[:, : self.conv1.out_channels], self.time(embedding)[:, self.conv1.out_channels :])
    return self.skip(x) + second(first(x) * gain[..., None, None] + bias[..., None, None])


# %%
def noise_prediction_loss(model, schedule, x_0, t=None, noise=None):
    """F.mse_loss of flattened images."""
    if t is None:
        t = torch.randint(0, ddpm_of(schedule).config.num_train_timesteps, (x_0.shape[0],))
    x_t, noise = ForwardProcess(schedule).add_noise(x_0, t, noise)
    return F.mse_loss(model(x_t, t).flatten(1), noise.flatten(1), reduction="none").mean(1).mean()


@add_to_class(EMA)
def __init__(self, model, decay=0.999):
    """EMAModel keeps the numbers, a copy of the model shows them."""
    self.inside = EMAModel(model.parameters(), decay=decay, min_decay=decay)
    self.model = copy.deepcopy(model)


@add_to_class(EMA)
def update(self, model):
    """EMAModel.step."""
    self.inside.optimization_step = 10**6  # no warm-up
    self.inside.step(model.parameters())
    self.inside.copy_to(self.model.parameters())


@add_to_class(Trainer)
def train_step(self, x_0):
    """Backward, step, clear."""
    self.model.zero_grad()
    loss = noise_prediction_loss(self.model, self.schedule, x_0)
    loss.backward()
    self.optimizer.step()
    if self.ema is not None:
        self.ema.update(self.model)
    return loss.item()


@add_to_class(Trainer)
def train_epoch(self, images, batch_size):
    """torch.utils.data.RandomSampler."""
    from torch.utils.data import BatchSampler, RandomSampler

    batches = BatchSampler(RandomSampler(range(len(images))), batch_size, drop_last=False)
    pairs = [(len(index), self.train_step(images[index])) for index in batches]
    return sum(n * loss for n, loss in pairs) / sum(n for n, _ in pairs)


# %%
@add_to_class(Diffusion)
@torch.no_grad()
def ddpm_step(self, x_t, t):
    """DDPMScheduler.step."""
    eps = self.model(x_t, torch.full((len(x_t),), t))
    return ddpm_of(self.schedule).step(eps, t, x_t).prev_sample


@add_to_class(Diffusion)
@torch.no_grad()
def ddpm_sample(self, shape, *, x_T=None):
    """Over DDPMScheduler.timesteps."""
    scheduler = ddpm_of(self.schedule)
    x = torch.randn(shape) if x_T is None else x_T
    for t in scheduler.timesteps.tolist():
        x = self.ddpm_step(x, t)
    return x


@add_to_class(Diffusion)
def ddim_timesteps(self, num_steps):
    """timestep_spacing="linspace"."""
    T = self.schedule.num_timesteps
    if not 1 <= num_steps <= T:
        raise ValueError(f"1 <= num_steps <= {T}")
    if num_steps == 1:
        return torch.tensor([T - 1])
    scheduler = DDIMScheduler(T, timestep_spacing="linspace")
    scheduler.set_timesteps(num_steps)
    return scheduler.timesteps.long()


@add_to_class(Diffusion)
@torch.no_grad()
def ddim_sample(self, shape, num_steps=50, *, x_T=None):
    """predict x_0 by diffusers, go back by its add_noise."""
    x = torch.randn(shape) if x_T is None else x_T
    scheduler = DDIMScheduler(
        self.schedule.num_timesteps, trained_betas=self.schedule.betas.numpy(), clip_sample=False, set_alpha_to_one=True
    )
    visits = self.ddim_timesteps(num_steps).tolist()
    for t, s in zip(visits, visits[1:] + [None]):
        eps = self.model(x, torch.full((len(x),), t))
        scheduler.num_inference_steps = self.schedule.num_timesteps
        x_0 = scheduler.step(eps, t, x).pred_original_sample
        x = x_0 if s is None else scheduler.add_noise(x_0, eps, torch.full((len(x),), s))
    return x


def compare_samplers(diffusion, num_samples=16, step_counts=(50, 20), sample_shape=(1, 28, 28)):
    """A dict of runs."""
    x_T = torch.randn((num_samples, *sample_shape))
    shape, rows = tuple(x_T.shape), []
    runs = [(f"DDPM-{diffusion.schedule.num_timesteps}", diffusion.ddpm_sample, ())]
    runs += [(f"DDIM-{n}", diffusion.ddim_sample, (n,)) for n in step_counts]
    for name, sample, arguments in runs:
        with count_calls(diffusion.model) as counter:
            start = time.perf_counter()
            samples = sample(shape, *arguments, x_T=x_T)
            seconds = time.perf_counter() - start
        rows.append({"name": name, "network_calls": counter.calls, "seconds": seconds,
                     "speedup": 1.0 if not rows else rows[0]["seconds"] / seconds, "samples": samples})
    return rows
