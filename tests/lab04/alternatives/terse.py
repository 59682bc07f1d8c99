"""Style: as short as it goes, everything in float64, functions assigned to the classes."""
# %%
import torch as th
import torch.nn.functional as F


def linear_betas(num_timesteps, beta_start=1e-4, beta_end=0.02, rescale=True):
    """Betas and their products."""
    if num_timesteps < 1: raise ValueError("T < 1")
    b = th.linspace(beta_start, beta_end, num_timesteps).double() * (1e3 / num_timesteps if rescale else 1)
    if b.max() >= 1: raise ValueError("beta >= 1")
    return b, th.exp(th.log1p(-b).cumsum(0))


def bar(schedule, t, x):
    """alpha_bar at t, ready to multiply images."""
    return schedule.alpha_bar(th.as_tensor(t)).double().reshape(-1, 1, 1, 1).to(x.device)


def forward_step(self, x_prev, t):
    """One step."""
    b = self.schedule.betas[t].item()
    return th.normal((1 - b) ** 0.5 * x_prev, b**0.5)


def add_noise(self, x_0, t, noise=None):
    """All steps."""
    noise = th.randn_like(x_0) if noise is None else noise
    a = bar(self.schedule, t, x_0)
    return (a**0.5 * x_0 + (1 - a) ** 0.5 * noise).to(x_0.dtype), noise


ForwardProcess.forward_step, ForwardProcess.add_noise = forward_step, add_noise


def prior_mismatch(schedule, mean, std):
    """KL to N(0, 1)."""
    a = float(schedule.alpha_bar(schedule.num_timesteps - 1))
    p = th.distributions.Normal(th.tensor(a**0.5 * mean).double(), th.tensor((a * std**2 + 1 - a) ** 0.5).double())
    return th.distributions.kl_divergence(p, th.distributions.Normal(th.zeros(()).double(), 1.0)).item()


def time_embedding(t, dim):
    """Real and imaginary parts lie in turn."""
    if dim % 2: raise ValueError("odd")
    w = th.logspace(0, -4 * (1 - 2 / dim), dim // 2, dtype=th.float64) if dim > 2 else th.ones(1).double()
    z = th.polar(th.ones(()).double(), t.double()[:, None] * w)
    return th.view_as_real(z).flip(-1).flatten(1).float()


ResidualBlock.forward = lambda self, x, embedding, e=0: (
    e := self.time(embedding).unflatten(1, (2, -1))[..., None, None],
    self.skip(x) + self.conv2(F.silu(th.addcmul(e[:, 1], self.norm2(self.conv1(F.silu(self.norm1(x)))), 1 + e[:, 0]))),
)[1]


def noise_prediction_loss(model, schedule, x_0, t=None, noise=None):
    """Equation 14."""
    t = th.randint(0, schedule.num_timesteps, x_0.shape[:1]) if t is None else t
    x_t, noise = ForwardProcess(schedule).add_noise(x_0, t, noise)
    return (noise - model(x_t, t)).pow(2).mean()


def _init(self, model, decay=0.999):
    """A copy, and the decay."""
    self.model, self.decay = copy.deepcopy(model), decay


def update(self, model):
    """Lerp."""
    with th.no_grad():
        for a, b in zip(self.model.parameters(), model.parameters()): a.lerp_(b, 1 - self.decay)


EMA.__init__, EMA.update = _init, update


def train_step(self, x_0):
    """Step, then clear."""
    loss = noise_prediction_loss(self.model, self.schedule, x_0)
    loss.backward(), self.optimizer.step(), self.optimizer.zero_grad()
    if self.ema: self.ema.update(self.model)
    return float(loss)


def train_epoch(self, images, batch_size):
    """Shuffle, chunk, train."""
    shuffled = images[th.randperm(len(images))]
    return sum(len(b) * self.train_step(b) for b in shuffled.split(batch_size)) / len(images)


Trainer.train_step, Trainer.train_epoch = train_step, train_epoch


@th.no_grad()
def ddpm_step(self, x_t, t):
    """Ancestral step, by way of x_0 (Ho et al., equation 7)."""
    e = self.model(x_t, th.full(x_t.shape[:1], t)).double()
    a, p, s = (bar(self.schedule, k, x_t) for k in (t, t - 1, t))
    b = 1 - a / p
    x_0 = (x_t - (1 - a) ** 0.5 * e) / s**0.5
    mean = p**0.5 * b / (1 - a) * x_0 + (1 - b) ** 0.5 * (1 - p) / (1 - a) * x_t
    return (mean + (b * (1 - p) / (1 - a)) ** 0.5 * th.randn_like(x_t)).to(x_t.dtype)


@th.no_grad()
def ddpm_sample(self, shape, *, x_T=None):
    """T steps."""
    x = th.randn(*shape) if x_T is None else x_T
    for t in range(self.schedule.num_timesteps)[::-1]: x = self.ddpm_step(x, t)
    return x


def ddim_timesteps(self, num_steps):
    """Evenly spaced."""
    T = self.schedule.num_timesteps
    if num_steps < 1 or num_steps > T: raise ValueError("1 <= num_steps <= T")
    return th.tensor([round((T - 1) * (1 - i / max(1, num_steps - 1))) for i in range(num_steps)])


@th.no_grad()
def ddim_sample(self, shape, num_steps=50, *, x_T=None):
    """num_steps jumps."""
    x = th.randn(*shape) if x_T is None else x_T
    ts = [*self.ddim_timesteps(num_steps).tolist(), -1]
    for t, s in zip(ts, ts[1:]):
        e, a, p = self.model(x, th.full(x.shape[:1], t)), bar(self.schedule, t, x), bar(self.schedule, s, x)
        x = ((p / a) ** 0.5 * x + ((1 - p) ** 0.5 - (p * (1 - a) / a) ** 0.5) * e).to(x.dtype)
    return x


Diffusion.ddpm_step, Diffusion.ddpm_sample = ddpm_step, ddpm_sample
Diffusion.ddim_timesteps, Diffusion.ddim_sample = ddim_timesteps, ddim_sample


def compare_samplers(diffusion, num_samples=16, step_counts=(50, 20), sample_shape=(1, 28, 28)):
    """A row each."""
    x, rows = th.randn(num_samples, *sample_shape), []
    for n in (None, *step_counts):
        with count_calls(diffusion.model) as c:
            t0 = time.perf_counter()
            y = diffusion.ddpm_sample(x.shape, x_T=x) if n is None else diffusion.ddim_sample(x.shape, n, x_T=x)
            s = time.perf_counter() - t0
        name = f"DDIM-{n}" if n else f"DDPM-{diffusion.schedule.num_timesteps}"
        rows += [dict(name=name, network_calls=c.calls, seconds=s, samples=y)]
        rows[-1]["speedup"] = rows[0]["seconds"] / s
    return rows
