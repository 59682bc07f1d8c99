"""Style: mixins, properties, dataclasses and coroutine steps; all noise from a private generator by Box-Muller."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from difflab import plots
from difflab.schedule import NoiseSchedule
from torch import Tensor


def _private_generator() -> torch.Generator:
    generator = torch.Generator()
    generator.seed()
    return generator


@dataclass
class GaussianSource:
    """Normal numbers from uniform ones; torch's global generator is never touched."""

    generator: torch.Generator = field(default_factory=_private_generator)

    def normal(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        count = math.prod(shape)
        uniform = torch.rand(-(-count // 2), 2, generator=self.generator, dtype=torch.float64)
        radius, angle = (-2 * torch.log1p(-uniform[:, 0])).sqrt(), 2 * math.pi * uniform[:, 1]
        flat = torch.cat([radius * angle.sin(), radius * angle.cos()])[:count]
        backwards = flat.reshape(tuple(shape)[::-1])  # width first, batch last
        return backwards.permute(*reversed(range(len(shape)))).contiguous().to(like)

    def deck(self, count: int, shape: tuple[int, ...], like: Tensor) -> Iterator[Tensor]:
        """Noise for `count` steps, drawn many steps at a time and dealt in shuffled order."""
        at_once = max(1, min(count, 2**21 // max(1, math.prod(shape))))
        for first in range(0, count, at_once):
            cards = self.normal((min(at_once, count - first), *shape), like)
            for k in torch.randperm(len(cards), generator=self.generator).tolist():
                yield cards[k]


@dataclass(frozen=True, eq=False)
class Level:
    """A noise level, or one for each image: alpha_bar in float64."""

    alpha_bar: Tensor

    @property
    def signal(self) -> Tensor:
        return self.alpha_bar.sqrt()

    @property
    def variance(self) -> Tensor:
        return 1 - self.alpha_bar

    @property
    def noise(self) -> Tensor:
        return self.variance.sqrt()


class ScheduleMixin:
    schedule: NoiseSchedule

    def level(self, t: int | Tensor, shift: int = 0) -> Level:
        return Level(self.schedule.alpha_bar(torch.as_tensor(t) + shift).double())

    def beta(self, t: int | Tensor) -> Tensor:
        t = torch.as_tensor(t)
        return self.schedule.betas64[t.cpu()].to(t.device)


class NoiseMixin:
    @cached_property
    def source(self) -> GaussianSource:
        return GaussianSource()


def over_images(x: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that makes a coefficient fit for multiplying x."""
    return lambda coefficient: coefficient.reshape(-1, 1, 1, 1).to(x)


class ForwardProcessImpl(ScheduleMixin, NoiseMixin):
    """The forward process q(x_t | x_0) of a noise schedule."""

    def __init__(self, schedule: NoiseSchedule):
        self.schedule = schedule

    def add_noise(self, x_start: Tensor, t: int | Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        fit, level = over_images(x_start), self.level(t)
        noise = self.source.normal(tuple(x_start.shape), x_start) if noise is None else noise
        return fit(level.signal) * x_start + fit(level.noise) * noise, noise

    def demonstrate_forward_trajectory(self, x_start: Tensor, timesteps: list[int]):
        noisy = map(partial(self.add_noise, x_start[:1]), timesteps)
        images = torch.cat([x_t for x_t, _ in noisy])
        return plots.show_images({"": images}, [f"$x_{{{t}}}$" for t in timesteps])


Step = Generator[tuple[Tensor, Tensor], Tensor, Tensor]


class SamplerBase(ScheduleMixin, NoiseMixin):
    """A sampler runs coroutines: each yields a question for the network, is sent the answer, returns the state."""

    def __init__(self, model, schedule: NoiseSchedule):
        self.model = model
        self.schedule = schedule

    @property
    def last(self) -> int:
        return self.schedule.num_timesteps - 1

    @staticmethod
    def question(x: Tensor, t: int) -> tuple[Tensor, Tensor]:
        return x, torch.full((x.shape[0],), t, dtype=torch.long, device=x.device)

    def drive(self, step: Step) -> Tensor:
        answer = None
        while True:
            try:
                answer = self.model(*step.send(answer))
            except StopIteration as stop:
                return stop.value

    def first_state(self, shape: tuple[int, ...], x_T: Tensor | None) -> Tensor:
        if x_T is None:
            return self.source.normal(tuple(shape), next(self.model.parameters()).detach())
        return x_T.detach().clone()

    def chain(self, x: Tensor, steps: list[Callable[..., Step]]) -> Iterator[Tensor]:
        noise = self.source.deck(len(steps), tuple(x.shape), x)
        yield x
        for step in steps:
            x = self.drive(step(x, noise=lambda: next(noise)))
            yield x

    def run(self, x: Tensor, steps: list[Callable[..., Step]], return_trajectory: bool):
        trajectory: list[Tensor] = []
        for state in self.chain(x, steps):
            if not return_trajectory:
                trajectory.clear()
            trajectory.append(state)
        return (trajectory[-1], trajectory) if return_trajectory else trajectory[-1]


class DDPMSampler(SamplerBase):
    """Stochastic sampling (Ho et al. 2020, algorithm 2)."""

    def compute_posterior_mean(self, x_t: Tensor, t: int | Tensor, predicted_noise: Tensor) -> Tensor:
        fit, beta = over_images(x_t), self.beta(t)
        return fit((1 - beta).rsqrt()) * (x_t - fit(beta / self.level(t).noise) * predicted_noise)

    def compute_posterior_variance(self, t: int | Tensor) -> Tensor:
        return self.beta(t) * self.level(t, -1).variance / self.level(t).variance

    def _step(self, x: Tensor, t: int, noise: Callable[[], Tensor]) -> Step:
        eps = yield self.question(x, t)
        mean = self.compute_posterior_mean(x, t, eps)
        return mean if t == 0 else mean + self.compute_posterior_variance(t).sqrt().to(x) * noise()

    @torch.no_grad()
    def ddpm_step(self, x_t: Tensor, t: int) -> Tensor:
        return self.drive(self._step(x_t, t, partial(self.source.normal, tuple(x_t.shape), x_t)))

    @torch.no_grad()
    def sample(self, shape: tuple[int, ...], return_trajectory: bool = False, *, x_T: Tensor | None = None):
        steps = [partial(self._step, t=t) for t in range(self.last, -1, -1)]
        return self.run(self.first_state(shape, x_T), steps, return_trajectory)


class DDIMSampler(SamplerBase):
    """Sampling with step skipping (Song et al. 2021)."""

    def predict_x0_from_eps(self, x_t: Tensor, eps: Tensor, t: int | Tensor) -> Tensor:
        fit, level = over_images(x_t), self.level(t)
        return (x_t - fit(level.noise) * eps) / fit(level.signal)

    def create_timestep_schedule(self, num_steps: int, schedule_type: str = "uniform") -> Tensor:
        builders = {"uniform": self._evenly, "quadratic": self._quadratically}
        if schedule_type not in builders:
            raise ValueError(f"schedule_type must be one of {sorted(builders)}, got {schedule_type!r}")
        if num_steps < 1 or num_steps > self.last + 1:
            raise ValueError(f"num_steps must be from 1 to {self.last + 1}, got {num_steps}")
        chosen = {self.last} if num_steps == 1 else builders[schedule_type](num_steps)
        return torch.tensor(sorted(chosen, reverse=True), dtype=torch.int64)

    def _evenly(self, count: int) -> set[int]:
        return {(2 * i * self.last + count - 1) // (2 * (count - 1)) for i in range(count)}

    def _quadratically(self, count: int) -> set[int]:
        """Repeats become new timesteps in the middle of whatever gap is then the widest."""
        chosen = {round(self.last * (i / (count - 1)) ** 2) for i in range(count)}
        while len(chosen) < count:
            ordered = sorted(chosen)
            low, high = max(zip(ordered, ordered[1:]), key=lambda pair: pair[1] - pair[0])
            chosen.add((low + high) // 2)
        return chosen

    def _step(self, x: Tensor, t: int, s: int, eta: float, noise: Callable[[], Tensor]) -> Step:
        if not -1 <= s < t:
            raise ValueError(f"a step must go to an earlier timestep, not from {t} to {s}")
        now, then = self.level(t), self.level(s)
        eps = yield self.question(x, t)
        variance = eta**2 * (then.variance / now.variance) * (1 - now.alpha_bar / then.alpha_bar)
        direction = (then.variance - variance).clamp(min=0).sqrt()
        x_s = then.signal.to(x) * self.predict_x0_from_eps(x, eps, t) + direction.to(x) * eps
        return x_s + variance.sqrt().to(x) * noise() if variance > 0 else x_s

    @torch.no_grad()
    def ddim_step(self, x_t: Tensor, t: int, s: int, eta: float = 0.0) -> Tensor:
        return self.drive(self._step(x_t, t, s, eta, partial(self.source.normal, tuple(x_t.shape), x_t)))

    @torch.no_grad()
    def sample(
        self,
        shape: tuple[int, ...],
        timesteps=None,
        eta: float = 0.0,
        return_trajectory: bool = False,
        *,
        x_T: Tensor | None = None,
    ):
        path = list(map(int, range(self.last, -1, -1) if timesteps is None else timesteps))
        steps = [partial(self._step, t=t, s=s, eta=eta) for t, s in zip(path, [*path[1:], -1])]
        return self.run(self.first_state(shape, x_T), steps, return_trajectory)
