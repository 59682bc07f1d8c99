"""Style: log-space buffers made once in __init__, gathered per image, einsum; the posterior mean through x_0."""

from collections import deque
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from difflab import plots
from difflab.schedule import NoiseSchedule
from torch import Tensor


class _Tables:
    """Float64 logarithms of every coefficient. Entry 0 is clean data (-1), entry t + 1 is timestep t."""

    def __init__(self, schedule: NoiseSchedule):
        self.log_alpha = torch.log1p(-schedule.betas64)
        self.log_signal = F.pad(self.log_alpha.cumsum(0), (1, 0))
        self.log_noise = torch.log(-torch.expm1(self.log_signal))  # -inf for clean data, and exp brings it back to 0
        self.log_beta = schedule.betas64.log()

    @staticmethod
    def gather(table: Tensor, t: int | Tensor, x: Tensor) -> Tensor:
        """table[t] for every image of x, in x's dtype: [B]."""
        index = torch.as_tensor(t, dtype=torch.long).to(table.device).expand(x.shape[0])
        return table.index_select(0, index).to(x)


def _scale(coefficient: Tensor, x: Tensor) -> Tensor:
    return torch.einsum("b,bchw->bchw", coefficient, x)


def _start(model, shape: tuple[int, ...], x_T: Tensor | None) -> Tensor:
    if x_T is not None:
        return x_T.clone()
    parameter = next(model.parameters())
    return torch.empty(*shape, dtype=parameter.dtype, device=parameter.device).normal_()


def _collect(states: Iterator[Tensor], return_trajectory: bool):
    if return_trajectory:
        trajectory = list(states)
        return trajectory[-1].clone(), trajectory
    return deque(states, maxlen=1).pop()


class ForwardProcessImpl:
    """The forward process q(x_t | x_0) of a noise schedule."""

    def __init__(self, schedule: NoiseSchedule):
        self.schedule = schedule
        tables = _Tables(schedule)
        self.gather = tables.gather
        self.signal_scale = (tables.log_signal / 2).exp()[1:]
        self.noise_scale = (tables.log_noise / 2).exp()[1:]

    def add_noise(self, x_start: Tensor, t: int | Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        noise = torch.empty_like(x_start).normal_() if noise is None else noise.clone()
        scale = self.gather(self.noise_scale, t, x_start).reshape(-1, 1, 1, 1)
        x_t = torch.addcmul(_scale(self.gather(self.signal_scale, t, x_start), x_start), scale, noise)
        return x_t, noise

    def demonstrate_forward_trajectory(self, x_start: Tensor, timesteps: list[int]):
        t = torch.tensor(list(timesteps), dtype=torch.long)
        copies = x_start[:1].repeat_interleave(len(t), dim=0)
        noise = torch.randn_like(x_start[:1]).expand_as(copies)  # one noise, so that only its amount changes
        return plots.show_images({"x_t": self.add_noise(copies, t, noise)[0]}, [f"t={k}" for k in t.tolist()])


class DDPMSampler:
    """Stochastic sampling (Ho et al. 2020, algorithm 2)."""

    def __init__(self, model, schedule: NoiseSchedule):
        self.model = model
        self.schedule = schedule
        tables = _Tables(schedule)
        self.gather = tables.gather
        signal, noise, previous = tables.log_signal[1:], tables.log_noise[1:], slice(None, -1)
        # x_0 hat = x0_from_x x_t - x0_from_eps eps, and the mean is mean_from_x0 x_0 hat + mean_from_x x_t.
        self.x0_from_x = (-signal / 2).exp()
        self.x0_from_eps = ((noise - signal) / 2).exp()
        self.mean_from_x0 = (tables.log_signal[previous] / 2 + tables.log_beta - noise).exp()
        self.mean_from_x = (tables.log_alpha / 2 + tables.log_noise[previous] - noise).exp()
        self.variance = (tables.log_beta + tables.log_noise[previous] - noise).exp().float()

    def compute_posterior_mean(self, x_t: Tensor, t: int | Tensor, predicted_noise: Tensor) -> Tensor:
        x0 = _scale(self.gather(self.x0_from_x, t, x_t), x_t)
        x0 = x0 - _scale(self.gather(self.x0_from_eps, t, x_t), predicted_noise)
        weights = torch.stack([self.gather(self.mean_from_x0, t, x_t), self.gather(self.mean_from_x, t, x_t)])
        return torch.einsum("kb,kbchw->bchw", weights, torch.stack([x0, x_t]))

    def compute_posterior_variance(self, t: int | Tensor) -> Tensor:
        t = torch.as_tensor(t)
        variance = self.variance.to(t.device)[t]
        return torch.where(t == 0, torch.zeros_like(variance), variance)

    @torch.inference_mode()
    def ddpm_step(self, x_t: Tensor, t: int) -> Tensor:
        t_batch = torch.empty(x_t.shape[0], dtype=torch.int64, device=x_t.device).fill_(t)
        mean = self.compute_posterior_mean(x_t, t_batch, self.model(x_t, t_batch))
        std = self.compute_posterior_variance(t_batch).sqrt().to(x_t)
        return mean + _scale(std, torch.randn_like(mean))

    def _states(self, x: Tensor) -> Iterator[Tensor]:
        yield x
        for t in reversed(range(self.schedule.num_timesteps)):
            x = self.ddpm_step(x, t)
            yield x

    @torch.inference_mode()
    def sample(self, shape: tuple[int, ...], return_trajectory: bool = False, *, x_T: Tensor | None = None):
        return _collect(self._states(_start(self.model, shape, x_T)), return_trajectory)


class DDIMSampler:
    """Sampling with step skipping (Song et al. 2021)."""

    def __init__(self, model, schedule: NoiseSchedule):
        self.model = model
        self.schedule = schedule
        self.tables = _Tables(schedule)
        self.gather = self.tables.gather

    def predict_x0_from_eps(self, x_t: Tensor, eps: Tensor, t: int | Tensor) -> Tensor:
        log_signal, log_noise = self.tables.log_signal[1:], self.tables.log_noise[1:]
        x_part = _scale(self.gather((-log_signal / 2).exp(), t, x_t), x_t)
        return x_part - _scale(self.gather(((log_noise - log_signal) / 2).exp(), t, x_t), eps)

    def create_timestep_schedule(self, num_steps: int, schedule_type: str = "uniform") -> Tensor:
        last = self.schedule.num_timesteps - 1
        if not 1 <= num_steps <= last + 1:
            raise ValueError(f"num_steps must lie between 1 and {last + 1}, got {num_steps}")
        power = {"uniform": 1.0, "quadratic": 2.0}.get(schedule_type)
        if power is None:
            raise ValueError(f"schedule_type must be 'uniform' or 'quadratic', got {schedule_type!r}")
        if num_steps == 1:
            return torch.tensor([last])
        grid = torch.linspace(0, last ** (1 / power), num_steps, dtype=torch.float64).pow(power)
        # The curve is convex, so it can lie below the diagonal only near 0, and there the diagonal is walked along.
        return torch.maximum(grid.round().long(), torch.arange(num_steps)).flip(0)

    @torch.inference_mode()
    def ddim_step(self, x_t: Tensor, t: int, s: int, eta: float = 0.0) -> Tensor:
        if s < -1 or s >= t:
            raise ValueError(f"s must lie in [-1, {t - 1}], got {s}")
        eps = self.model(x_t, torch.empty(x_t.shape[0], dtype=torch.int64, device=x_t.device).fill_(t))
        signal_t, signal_s = self.tables.log_signal[t + 1], self.tables.log_signal[s + 1]
        noise_t, noise_s = self.tables.log_noise[t + 1], self.tables.log_noise[s + 1]
        renewed = (eta * eta * -torch.expm1(signal_t - signal_s) / noise_t.exp()).clamp(max=1.0)
        from_x = ((signal_s - signal_t) / 2).exp()
        kept = (noise_s / 2).exp() * (1 - renewed).sqrt()
        from_eps = kept - ((signal_s - signal_t + noise_t) / 2).exp()
        sigma = abs(eta) * ((noise_s - noise_t) / 2).exp() * (-torch.expm1(signal_t - signal_s)).sqrt()
        weights = torch.stack([from_x, from_eps, sigma]).to(x_t)
        return torch.einsum("k,kbchw->bchw", weights, torch.stack([x_t, eps.to(x_t), torch.randn_like(x_t)]))

    def _states(self, x: Tensor, path: Tensor, eta: float) -> Iterator[Tensor]:
        yield x
        for t, s in path.unfold(0, 2, 1).tolist():
            x = self.ddim_step(x, t, s, eta)
            yield x

    @torch.inference_mode()
    def sample(
        self,
        shape: tuple[int, ...],
        timesteps=None,
        eta: float = 0.0,
        return_trajectory: bool = False,
        *,
        x_T: Tensor | None = None,
    ):
        path = torch.arange(self.schedule.num_timesteps).flip(0) if timesteps is None else torch.as_tensor(timesteps)
        path = F.pad(path.cpu().long(), (0, 1), value=-1)
        return _collect(self._states(_start(self.model, shape, x_T), path, eta), return_trajectory)
