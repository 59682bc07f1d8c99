"""Style: the schedulers of Hugging Face diffusers do the work; only what they cannot express is done by hand."""

from fractions import Fraction

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from difflab import plots


class MeanScheduler(DDPMScheduler):
    """A DDPMScheduler whose step adds no noise, so that it returns the mean."""

    def _get_variance(self, t, predicted_variance=None, variance_type=None):
        return torch.zeros(())


def make(kind, schedule, **settings):
    return kind(
        num_train_timesteps=schedule.num_timesteps,
        trained_betas=schedule.betas64.tolist(),
        clip_sample=False,
        prediction_type="epsilon",
        **settings,
    )


def batch_of(t, x):
    return torch.as_tensor(t, dtype=torch.long, device=x.device).reshape(-1).expand(len(x))


def per_image(function, t, *images):
    """function(t, *images) for an int; for a LongTensor image by image, because the schedulers take one t a call."""
    if not torch.is_tensor(t) or t.ndim == 0:
        return function(int(t), *images)
    rows = [function(ti, *(image[i : i + 1] for image in images)) for i, ti in enumerate(t.tolist())]
    return torch.cat(rows)


def start(model, shape, x_T):
    if x_T is not None:
        return x_T.detach().clone()
    weight = next(model.parameters())
    return torch.randn(tuple(shape), dtype=weight.dtype, device=weight.device)


class ForwardProcessImpl:
    """The forward process q(x_t | x_0) of a noise schedule."""

    def __init__(self, schedule):
        self.schedule = schedule
        self.scheduler = make(DDPMScheduler, schedule)

    def add_noise(self, x_start, t, noise=None):
        if noise is None:
            noise = torch.randn_like(x_start)
        return self.scheduler.add_noise(x_start, noise, batch_of(t, x_start)), noise

    def demonstrate_forward_trajectory(self, x_start, timesteps):
        row = torch.cat([self.add_noise(x_start[:1], t)[0] for t in timesteps])
        return plots.show_images({"noisy": row}, list(map(str, timesteps)), title="forward process")


class DDPMSampler:
    """Stochastic sampling (Ho et al. 2020, algorithm 2)."""

    def __init__(self, model, schedule):
        self.model = model
        self.schedule = schedule
        self.scheduler = make(DDPMScheduler, schedule, variance_type="fixed_small")
        self.mean_scheduler = make(MeanScheduler, schedule)

    def compute_posterior_mean(self, x_t, t, predicted_noise):
        def mean(ti, x, eps):
            return self.mean_scheduler.step(eps, ti, x, return_dict=False)[0]

        return per_image(mean, t, x_t, predicted_noise)

    def compute_posterior_variance(self, t):
        def variance(ti):
            # _get_variance clamps to 1e-20 for the sake of a logarithm; at t = 0 the contract wants 0
            return self.scheduler._get_variance(ti) if ti else torch.zeros(())

        if torch.is_tensor(t):
            return torch.stack([variance(ti) for ti in t.reshape(-1).tolist()]).reshape(t.shape).to(t.device)
        return variance(int(t)).clone()

    @torch.no_grad()
    def ddpm_step(self, x_t, t):
        eps = self.model(x_t, batch_of(t, x_t).clone())
        return self.scheduler.step(eps, int(t), x_t).prev_sample

    @torch.no_grad()
    def sample(self, shape, return_trajectory=False, *, x_T=None):
        x = start(self.model, shape, x_T)
        trajectory = [x]
        for t in self.scheduler.timesteps.tolist():  # T - 1, ..., 0 as long as set_timesteps is never called
            x = self.ddpm_step(x, t)
            trajectory.append(x)
        return (x, trajectory) if return_trajectory else x


class DDIMSampler:
    """Sampling with step skipping (Song et al. 2021)."""

    def __init__(self, model, schedule):
        self.model = model
        self.schedule = schedule
        self.scheduler = make(DDIMScheduler, schedule, set_alpha_to_one=True)

    def _step(self, eps, t, s, x_t, eta=0.0, noise=None):
        # The scheduler goes from t to t - T // num_inference_steps. With a fraction that is any s, exactly.
        self.scheduler.num_inference_steps = Fraction(self.schedule.num_timesteps, t - s)
        return self.scheduler.step(eps, t, x_t, eta=eta, variance_noise=noise, return_dict=False)

    def predict_x0_from_eps(self, x_t, eps, t):
        return per_image(lambda ti, x, e: self._step(e, ti, -1, x)[1], t, x_t, eps)

    def create_timestep_schedule(self, num_steps, schedule_type="uniform"):
        T = self.schedule.num_timesteps
        if schedule_type not in {"uniform", "quadratic"}:
            raise ValueError(f"unknown schedule_type {schedule_type!r}")
        if not 0 < num_steps <= T:
            raise ValueError(f"num_steps must be in 1 ... {T}, not {num_steps}")
        if num_steps == 1:
            return torch.LongTensor([T - 1])
        if schedule_type == "uniform":
            spaced = make(DDPMScheduler, self.schedule, timestep_spacing="linspace")
            spaced.set_timesteps(num_steps)
            return spaced.timesteps
        timesteps, below = [], T
        for left, root in zip(reversed(range(num_steps)), torch.linspace((T - 1) ** 0.5, 0, num_steps).tolist()):
            # Not above the one before, and with `left` numbers still to come below this one.
            below = max(min(round(root * root), below - 1), left)
            timesteps.append(below)
        return torch.LongTensor(timesteps)

    @torch.no_grad()
    def ddim_step(self, x_t, t, s, eta=0.0):
        if not (-1 <= s < t):
            raise ValueError(f"s = {s} is not an earlier timestep than t = {t}")
        eps = self.model(x_t, batch_of(t, x_t).clone())
        sigma = eta * self.scheduler._get_variance(t, s) ** 0.5
        alpha_s = self.scheduler.alphas_cumprod[s] if s >= 0 else self.scheduler.final_alpha_cumprod
        noise = torch.randn_like(x_t)
        if 1 - alpha_s - sigma**2 >= 0:
            return self._step(eps, t, s, x_t, eta, noise)[0]
        # the scheduler would take the root of a rounding error below 0 here, and return nan
        return alpha_s**0.5 * self._step(eps, t, s, x_t)[1] + sigma * noise

    @torch.no_grad()
    def sample(self, shape, timesteps=None, eta=0.0, return_trajectory=False, *, x_T=None):
        path = self.scheduler.timesteps if timesteps is None else timesteps
        path = [int(t) for t in path] + [-1]
        x = start(self.model, shape, x_T)
        trajectory = [x]
        for t, s in zip(path[:-1], path[1:]):
            x = self.ddim_step(x, t, s, eta)
            trajectory.append(x)
        return (x, trajectory) if return_trajectory else x
