"""Networks whose answers are known exactly, and the schedule's numbers in float64.

For data x_0 ~ N(mean, std^2 I) the best possible noise prediction has a closed form, so the distribution that every
sampler must end in is known as well; no trained network is needed to tell right from wrong.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from autograder.submission.client import Network
from difflab.schedule import NoiseSchedule

__all__ = [
    "Coefficients",
    "GaussianOracle",
    "RecordingNetwork",
    "SteadyNetwork",
    "ideal_timesteps",
    "images",
    "random_schedule",
]


class Coefficients:
    """alpha_t, beta_t and alpha_bar_t of a schedule in float64, from the float32 values the student is given.

    All methods take an int or a LongTensor [B] and return something that broadcasts against images [B, C, H, W].
    """

    def __init__(self, schedule: NoiseSchedule):
        self.schedule = schedule

    def alpha_bar(self, t: int | Tensor) -> Tensor:
        """Cumulative product, 1 at t = -1."""
        return _images_shape(self.schedule.alpha_bar(t).double())

    def alpha(self, t: int | Tensor) -> Tensor:
        """1 - beta_t."""
        return _images_shape(self.schedule.alphas.double()[t])

    def beta(self, t: int | Tensor) -> Tensor:
        """beta_t."""
        return _images_shape(self.schedule.betas.double()[t])

    def posterior_mean(self, x_t: Tensor, t: int | Tensor, eps: Tensor) -> Tensor:
        """Ho et al. 2020, equation 11."""
        x_t, eps = x_t.double(), eps.double()
        return (x_t - self.beta(t) / (1 - self.alpha_bar(t)).sqrt() * eps) / self.alpha(t).sqrt()

    def posterior_variance(self, t: int | Tensor) -> Tensor:
        """Ho et al. 2020, equation 7."""
        return self.beta(t) * (1 - self.alpha_bar(torch.as_tensor(t) - 1)) / (1 - self.alpha_bar(t))

    def noised(self, x_0: Tensor, eps: Tensor, t: int | Tensor) -> Tensor:
        """x_t from x_0 and its noise (Ho et al. 2020, equation 4)."""
        alpha_bar = self.alpha_bar(t)
        return alpha_bar.sqrt() * x_0.double() + (1 - alpha_bar).sqrt() * eps.double()

    def predict_x0(self, x_t: Tensor, eps: Tensor, t: int | Tensor) -> Tensor:
        """x_0 from x_t and its noise (Song et al. 2021, equation 9)."""
        alpha_bar = self.alpha_bar(t)
        return (x_t.double() - (1 - alpha_bar).sqrt() * eps.double()) / alpha_bar.sqrt()

    def ddim_variance(self, t: int, s: int, eta: float) -> Tensor:
        """sigma^2 of a DDIM step from t to s (Song et al. 2021, equation 16)."""
        a_t, a_s = self.alpha_bar(t), self.alpha_bar(s)
        return eta**2 * (1 - a_s) / (1 - a_t) * (1 - a_t / a_s)

    def ddim_mean(self, x_0: Tensor, eps: Tensor, t: int, s: int, eta: float = 0.0) -> Tensor:
        """Mean of a DDIM step from t to s, given the estimate of x_0 (Song et al. 2021, equation 12)."""
        a_s, variance = self.alpha_bar(s), self.ddim_variance(t, s, eta)
        return a_s.sqrt() * x_0.double() + (1 - a_s - variance).clamp(min=0).sqrt() * eps.double()


def _images_shape(values: Tensor) -> Tensor:
    return values if values.ndim == 0 else values[:, None, None, None]


MAX_RECORDED = 2**26  # numbers a network remembers of all its calls: no flood of calls may fill the grader's memory


class RecordingNetwork(Network):
    """Base of the grader's networks: remembers every call, insists on t of shape [B]."""

    def __init__(self, schedule: NoiseSchedule, dtype: str = "float32"):
        self.schedule, self.dtype = schedule, dtype
        self.coefficients = Coefficients(schedule)
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []  # (x, t, predicted noise)
        self.recorded = 0
        self.grad_enabled = False  # was any call made with gradients on?
        self.autocast: list[str | None] = []  # the dtype in force at each call

    def forward(self, x: Tensor, t: Tensor, grad_enabled: bool, autocast: str | None = None) -> Tensor:
        """Predicted noise; the contract of `difflab.unet.UNet`."""
        if not isinstance(x, Tensor) or not isinstance(t, Tensor) or not x.is_floating_point():
            raise ValueError("the network takes two tensors: model(x, t) with x [B, C, H, W] and t [B]")
        if x.ndim != 4 or not len(x):
            raise ValueError(f"the network takes images x of shape [B, C, H, W], got shape {list(x.shape)}")
        if t.shape != (len(x),):
            raise ValueError(
                f"the network takes one timestep per image, t of shape [{len(x)}], got {list(t.shape)}; "
                "use torch.full((len(x),), t, device=x.device)"
            )
        if not bool(((t >= 0) & (t <= self.schedule.num_timesteps - 1)).all()):
            raise ValueError(
                f"the network was asked about timestep {t.max().item() if t.max() > 0 else t.min().item()}; "
                f"it knows 0 ... {self.schedule.num_timesteps - 1}"
            )
        self.recorded += 2 * x.numel() + t.numel() + 256  # and something for every call
        if self.recorded > MAX_RECORDED:
            raise ValueError("the network was called far more often, or with far larger batches, than any step needs")
        self.grad_enabled |= bool(grad_enabled)
        self.autocast.append(autocast)
        eps = self.predict(x, t)
        self.calls.append((x, t, eps))
        return eps

    def predict(self, x: Tensor, t: Tensor) -> Tensor:
        """The noise this network sees in x at t."""
        raise NotImplementedError

    @property
    def timesteps(self) -> list[float]:
        """The timestep of each call (the first image's)."""
        return [t[0].item() for _, t, _ in self.calls]


class GaussianOracle(RecordingNetwork):
    """The exact noise predictor for data N(mean, std^2 I)."""

    def __init__(self, schedule: NoiseSchedule, mean: float = -0.7, std: float = 0.3**0.5, dtype: str = "float32"):
        super().__init__(schedule, dtype)
        self.mean, self.std = mean, std

    def predict(self, x: Tensor, t: Tensor) -> Tensor:
        """sqrt(1 - a)(x - sqrt(a) mean) / (a std^2 + 1 - a), with a the cumulative product at t."""
        a = self.coefficients.alpha_bar(t)
        return ((1 - a).sqrt() * (x.double() - a.sqrt() * self.mean) / (a * self.std**2 + 1 - a)).to(x.dtype)


class SteadyNetwork(RecordingNetwork):
    """Answers with unrelated random noise, always the same for a timestep: nothing about x can be guessed from it."""

    def __init__(self, schedule: NoiseSchedule, rng: torch.Generator, dtype: str = "float32"):
        super().__init__(schedule, dtype)
        self.seed = int(torch.randint(2**31, (), generator=rng))

    def predict(self, x: Tensor, t: Tensor) -> Tensor:
        """Standard normal noise from (seed, t)."""
        rng = torch.Generator().manual_seed(self.seed + 7919 * int(t[0]))
        return torch.randn(x.shape, generator=rng).to(x.dtype)


def random_schedule(rng: torch.Generator, num_timesteps: int | None = None) -> NoiseSchedule:
    """A schedule no one can have memorised: linear betas with random end points, T between 200 and 1200."""
    choose = random.Random(int(torch.randint(2**31, (), generator=rng)))
    num_timesteps = num_timesteps or choose.randint(200, 1200)
    scale = 1000 / num_timesteps
    return NoiseSchedule.linear(num_timesteps, choose.uniform(0.5e-4, 2e-4) * scale, choose.uniform(0.01, 0.02) * scale)


def images(rng: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random images, standard normal."""
    return torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)


def ideal_timesteps(num_timesteps: int, num_steps: int, power: int) -> Tensor:
    """The num_steps timesteps whose power-th roots are evenly spaced from T - 1 to 0, before rounding, float64."""
    if num_steps == 1:
        return torch.tensor([num_timesteps - 1.0], dtype=torch.float64)
    return torch.linspace((num_timesteps - 1) ** (1 / power), 0, num_steps, dtype=torch.float64) ** power
