"""Style: mixins, properties, dataclasses and coroutine steps; all noise by Box-Muller from private generators.

Every call makes a generator of its own, seeded with one number from torch's global one.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import combinations, pairwise

import torch
from difflab import plots
from difflab.schedule import NoiseSchedule
from difflab.timing import count_calls, peak_memory, synchronize
from matplotlib.figure import Figure
from torch import Tensor


def _private_generator() -> torch.Generator:
    return torch.Generator().manual_seed(torch.randint(2**63 - 1, ()).item())


@dataclass
class GaussianSource:
    """Normal numbers from uniform ones; of torch's global generator it takes the seed and nothing else."""

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

    def renewed(self, t: int, s: int, eta: float) -> Tensor:
        """The variance that a jump from t to s takes out and puts in anew."""
        now, then = self.level(t), self.level(s)
        return eta**2 * (then.variance / now.variance) * (1 - now.alpha_bar / then.alpha_bar)


class NoiseMixin:
    @property
    def source(self) -> GaussianSource:
        """A new source each time, so that torch.manual_seed rules over what comes after it."""
        return GaussianSource()


def parameter_of(model) -> Tensor:
    return next(model.parameters()).detach()


def rms(difference: Tensor) -> float:
    return difference.double().square().mean().sqrt().item()


def spread(images: Tensor) -> float:
    return statistics.fmean(rms(a.double() - b.double()) for a, b in combinations(images, 2))


def over_images(x: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that makes a coefficient fit for multiplying x."""
    return lambda coefficient: coefficient.reshape(-1, 1, 1, 1).to(x)


class ForwardProcessImpl(ScheduleMixin, NoiseMixin):
    """The forward process q(x_t | x_0) of a noise schedule."""

    def __init__(self, schedule: NoiseSchedule):
        self.schedule = schedule

    def add_noise(self, x_start: Tensor, t: int | Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Signal and noise at level t, and the noise alone."""
        fit, level = over_images(x_start), self.level(t)
        noise = self.source.normal(tuple(x_start.shape), x_start) if noise is None else noise
        return fit(level.signal) * x_start + fit(level.noise) * noise, noise

    def demonstrate_forward_trajectory(self, x_start: Tensor, timesteps: list[int]):
        """One image, noisier and noisier."""
        noisy = map(partial(self.add_noise, x_start[:1]), timesteps)
        images = torch.cat([x_t for x_t, _ in noisy])
        return plots.show_images({"": images}, [f"$x_{{{t}}}$" for t in timesteps])


@dataclass
class PairMoments:
    """Sums over pairs of numbers, gathered batch by batch."""

    count: int = 0
    sums: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))
    products: Tensor = field(default_factory=lambda: torch.zeros(2, 2, dtype=torch.float64))

    def __iadd__(self, pair: tuple[Tensor, Tensor]) -> PairMoments:
        rows = torch.stack([numbers.flatten() for numbers in pair]).double().cpu()
        self.count += rows.shape[1]
        self.sums += rows.sum(1)
        self.products += rows @ rows.T
        return self

    @property
    def mse(self) -> float:
        (aa, ab), (_, bb) = self.products.tolist()
        return (aa - 2 * ab + bb) / self.count

    @property
    def correlation(self) -> float:
        mean = self.sums / self.count
        (aa, ab), (_, bb) = (self.products / self.count - mean.outer(mean)).tolist()
        return ab / math.sqrt(aa * bb)


@dataclass(frozen=True, eq=False)
class Trial:
    """Noisy images, the noise in them, and what the network takes for it."""

    level: Level
    noisy: Tensor
    noise: Tensor
    guess: Tensor

    @property
    def implied(self) -> Tensor:
        signal, noise = self.level.signal.to(self.noisy), self.level.noise.to(self.noisy)
        return (self.noisy - noise * self.guess) / signal


class TrainedModelAnalyzer(ScheduleMixin, NoiseMixin):
    """Looks at a trained noise predictor."""

    def __init__(self, model, schedule: NoiseSchedule):
        self.model = model
        self.schedule = schedule

    def trials(self, clean: Tensor, t: int, source: GaussianSource, at_once: int = 16) -> Iterator[Trial]:
        level = self.level(t)
        for x in clean.split(at_once):
            noise = source.normal(tuple(x.shape), x)
            noisy = level.signal.to(x) * x + level.noise.to(x) * noise
            yield Trial(level, noisy, noise, self.model(*SamplerBase.question(noisy, t)))

    @torch.no_grad()
    def analyze_noise_prediction_quality(self, x_clean: Tensor, timesteps: list[int]) -> dict[int, dict[str, float]]:
        """Moments of true and predicted noise, at every timestep."""
        source, report = self.source, {}
        for t in timesteps:
            moments, level = PairMoments(), self.level(t)
            for trial in self.trials(x_clean, t, source):
                moments += trial.noise, trial.guess
            snr = (level.alpha_bar / level.variance).item()
            report[t] = {"snr": snr, "mse": moments.mse, "correlation": moments.correlation}
        return report

    @torch.no_grad()
    def visualize_noise_predictions(self, x_clean: Tensor, timesteps: list[int]) -> Figure:
        """A subfigure for each timestep."""
        figure = Figure(figsize=(6, 1.6 * len(timesteps)))
        source, strips = self.source, figure.subfigures(len(timesteps), 1, squeeze=False)[:, 0]
        for t, strip in zip(timesteps, strips):
            (trial,) = self.trials(x_clean[:1], t, source)
            pictures = {"x_t": trial.noisy, "ε": trial.noise, "ε̂": trial.guess, "x̂_0": trial.implied}
            strip.suptitle(f"t = {t}", fontsize=8)
            for axes, (name, picture) in zip(strip.subplots(1, 4), pictures.items()):
                axes.imshow(picture[0, 0].float().cpu(), cmap="gray", vmin=-1, vmax=1)
                axes.set_xlabel(name)
                axes.set(xticks=[], yticks=[])
        return figure


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
            return self.source.normal(tuple(shape), parameter_of(self.model))
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
        """Equation 11."""
        fit, beta = over_images(x_t), self.beta(t)
        return fit((1 - beta).rsqrt()) * (x_t - fit(beta / self.level(t).noise) * predicted_noise)

    def compute_posterior_variance(self, t: int | Tensor) -> Tensor:
        """Equation 7."""
        return self.beta(t) * self.level(t, -1).variance / self.level(t).variance

    def _step(self, x: Tensor, t: int, noise: Callable[[], Tensor]) -> Step:
        eps = yield self.question(x, t)
        mean = self.compute_posterior_mean(x, t, eps)
        return mean if t == 0 else mean + self.compute_posterior_variance(t).sqrt().to(x) * noise()

    @torch.no_grad()
    def ddpm_step(self, x_t: Tensor, t: int) -> Tensor:
        """One step, driven alone."""
        return self.drive(self._step(x_t, t, partial(self.source.normal, tuple(x_t.shape), x_t)))

    @torch.no_grad()
    def sample(self, shape: tuple[int, ...], return_trajectory: bool = False, *, x_T: Tensor | None = None):
        """A chain of all steps."""
        steps = [partial(self._step, t=t) for t in range(self.last, -1, -1)]
        return self.run(self.first_state(shape, x_T), steps, return_trajectory)


@dataclass(frozen=True, eq=False)
class SeededRun:
    seed: int
    samples: Tensor

    @classmethod
    def of(cls, sampler, shape: tuple[int, ...], seed: int) -> SeededRun:
        torch.manual_seed(seed)
        return cls(seed, sampler.sample(shape).detach().clone())

    @property
    def moments(self) -> tuple[float, float]:
        std, mean = torch.std_mean(self.samples.double())
        return mean.item(), std.item()


def seed_consistency(sampler: DDPMSampler, shape: tuple[int, ...], seeds: list[int]) -> dict:
    """All seeds once, then all of them once more."""
    first, second = ([SeededRun.of(sampler, shape, seed) for seed in seeds] for _ in range(2))
    return {
        "repeatable": all(a.samples.equal(b.samples) for a, b in zip(first, second)),
        "mean": [run.moments[0] for run in first],
        "std": [run.moments[1] for run in first],
    }


class DDIMSampler(SamplerBase):
    """Sampling with step skipping (Song et al. 2021)."""

    def predict_x0_from_eps(self, x_t: Tensor, eps: Tensor, t: int | Tensor) -> Tensor:
        """What is left of x_t without its noise, at full signal."""
        fit, level = over_images(x_t), self.level(t)
        return (x_t - fit(level.noise) * eps) / fit(level.signal)

    def create_timestep_schedule(self, num_steps: int, schedule_type: str = "uniform") -> Tensor:
        """Timesteps as a set, sorted at the end."""
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
        then = self.level(s)
        eps = yield self.question(x, t)
        variance = self.renewed(t, s, eta)
        direction = (then.variance - variance).clamp(min=0).sqrt()
        x_s = then.signal.to(x) * self.predict_x0_from_eps(x, eps, t) + direction.to(x) * eps
        return x_s + variance.sqrt().to(x) * noise() if variance > 0 else x_s

    @torch.no_grad()
    def ddim_step(self, x_t: Tensor, t: int, s: int, eta: float = 0.0) -> Tensor:
        """One jump, driven alone."""
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
        """A chain of jumps."""
        path = list(map(int, range(self.last, -1, -1) if timesteps is None else timesteps))
        steps = [partial(self._step, t=t, s=s, eta=eta) for t, s in zip(path, [*path[1:], -1])]
        return self.run(self.first_state(shape, x_T), steps, return_trajectory)


@dataclass(eq=False)
class StochasticityController(ScheduleMixin, NoiseMixin):
    """Measures what eta does."""

    ddim_sampler: DDIMSampler

    @property
    def schedule(self) -> NoiseSchedule:
        return self.ddim_sampler.schedule

    def compute_stochastic_variance(self, t: int, s: int, eta: float) -> Tensor:
        """The noise renewed between t and s."""
        return self.renewed(t, s, eta)

    def analyze_eta_effects(self, shape: tuple[int, ...], eta_values: list[float], num_steps: int) -> dict:
        """Each eta is tried twice."""
        sampler = self.ddim_sampler
        x_T = self.source.normal(tuple(shape), parameter_of(sampler.model))
        timesteps = sampler.create_timestep_schedule(num_steps)

        def effect(eta: float) -> dict:
            once, again = (sampler.sample(tuple(shape), timesteps, eta=eta, x_T=x_T) for _ in range(2))
            return {"samples": once, "repeat_distance": rms(once - again), "diversity": spread(once)}

        return {eta: effect(eta) for eta in eta_values}


@dataclass
class Contestant:
    """A sampler in a race: what it runs, and one step of that to look at its memory."""

    name: str
    model: torch.nn.Module
    run: Callable[[], Tensor]
    step: Callable[[], Tensor]
    result: dict = field(default_factory=dict)

    def compete(self, device: torch.device) -> Contestant:
        with count_calls(self.model) as counter:
            ticks = self._ticks(device)
            start = next(ticks)
            samples = self.run()
            seconds = next(ticks) - start
        self.result = {
            "name": self.name,
            "network_calls": counter.calls,
            "seconds": seconds,
            "peak_memory": peak_memory(self.step, device),
            "diversity": spread(samples),
            "samples": samples,
        }
        return self

    @staticmethod
    def _ticks(device: torch.device) -> Iterator[float]:
        while True:
            synchronize(device)
            yield time.perf_counter()

    def against(self, champion: Contestant) -> dict:
        return {**self.result, "speedup": champion.result["seconds"] / self.result["seconds"]}


def compare_samplers(
    ddpm_sampler: DDPMSampler,
    ddim_sampler: DDIMSampler,
    num_samples: int = 16,
    step_counts: tuple[int, ...] = (200, 100, 50, 20, 10),
    sample_shape: tuple[int, ...] = (1, 28, 28),
) -> list[dict]:
    """A race of DDPM against DDIMs of several lengths."""
    shape, last = (num_samples, *sample_shape), ddpm_sampler.schedule.num_timesteps - 1
    x_T = GaussianSource().normal(shape, parameter_of(ddpm_sampler.model))
    ddpm = Contestant(
        f"DDPM-{last + 1}",
        ddpm_sampler.model,
        run=partial(ddpm_sampler.sample, shape, x_T=x_T),
        step=partial(ddpm_sampler.ddpm_step, x_T, last),
    )
    field_of_ddims = [
        Contestant(
            f"DDIM-{count}",
            ddim_sampler.model,
            run=partial(ddim_sampler.sample, shape, ddim_sampler.create_timestep_schedule(count), x_T=x_T),
            step=partial(ddim_sampler.sample, shape, [last], x_T=x_T),
        )
        for count in step_counts
    ]
    return [contestant.compete(x_T.device).against(ddpm) for contestant in (ddpm, *field_of_ddims)]


def x0_error_gain(schedule: NoiseSchedule, timesteps: list[int]) -> Tensor:
    """Noise over signal, from the logarithm of signal over noise."""
    return schedule.log_snr(torch.tensor(timesteps)).neg().exp()


@dataclass(frozen=True)
class InBfloat16:
    """A network asked under autocast, answering in float32."""

    network: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.network(x, t).float()


@lru_cache(maxsize=32)
def _affine_jumps(timesteps: tuple[int, ...], table: tuple[float, ...]) -> list[tuple[int, float, float]]:
    """t, A and B of every jump x_s = A x_t + B eps."""
    kept = (*table, 1.0)  # so that [-1] is clean data here
    jumps = []
    for t, s in pairwise((*timesteps, -1)):
        a = math.sqrt(kept[s] / kept[t])
        jumps.append((t, a, math.sqrt(1 - kept[s]) - a * math.sqrt(1 - kept[t])))
    return jumps


class SamplingOptimizer(NoiseMixin):
    """DDIM sampling with a budget of time and memory."""

    def __init__(self, ddim_sampler: DDIMSampler):
        self.ddim_sampler = ddim_sampler

    def first_state(self, sampler: DDIMSampler, shape: tuple[int, ...], x_T: Tensor | None) -> Tensor:
        return self.source.normal(tuple(shape), parameter_of(sampler.model)) if x_T is None else x_T.detach().clone()

    @torch.no_grad()
    def cached_noise_schedule_sampling(
        self, ddim_sampler: DDIMSampler, shape: tuple[int, ...], num_steps: int, *, x_T: Tensor | None = None
    ) -> Tensor:
        """Jumps whose two coefficients are remembered by the values they follow from."""
        timesteps = tuple(ddim_sampler.create_timestep_schedule(num_steps).tolist())
        x = self.first_state(ddim_sampler, shape, x_T)
        for t, a, b in _affine_jumps(timesteps, tuple(ddim_sampler.schedule.alphas_cumprod.tolist())):
            x = torch.add(a * x, ddim_sampler.model(*SamplerBase.question(x, t)), alpha=b)
        return x

    def batch_sampling_with_memory_management(
        self,
        total_samples: int,
        batch_size: int,
        *,
        num_steps: int = 50,
        sample_shape: tuple[int, ...] = (1, 28, 28),
    ) -> Tensor:
        """Portions, concatenated."""
        portions = list(self._portions(total_samples, batch_size, num_steps, tuple(sample_shape)))
        return torch.cat(portions) if portions else torch.empty(0, *sample_shape)

    def _portions(self, left: int, size: int, num_steps: int, sample_shape: tuple[int, ...]) -> Iterator[Tensor]:
        while left > 0:
            size = min(size, left)
            try:
                portion = self.cached_noise_schedule_sampling(self.ddim_sampler, (size, *sample_shape), num_steps)
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                size //= 2
                continue
            left -= size
            yield portion.cpu()

    @torch.no_grad()
    def mixed_precision_sampling(self, shape: tuple[int, ...], num_steps: int, *, x_T: Tensor | None = None) -> Tensor:
        """The usual chain of jumps, with another voice behind the network."""
        sampler = DDIMSampler(InBfloat16(self.ddim_sampler.model), self.ddim_sampler.schedule)
        timesteps = sampler.create_timestep_schedule(num_steps)
        return sampler.sample(shape, timesteps, x_T=self.first_state(self.ddim_sampler, shape, x_T).float())

    @torch.no_grad()
    def choose_num_steps(
        self, seconds: float, shape: tuple[int, ...], *, clock: Callable[[], float] = time.perf_counter
    ) -> int:
        """From the median time between the ends of two steps."""
        longest = self.ddim_sampler.schedule.num_timesteps
        x = self.first_state(self.ddim_sampler, shape, None)

        def ends() -> Iterator[float]:
            for _ in range(10):
                self.ddim_sampler.ddim_step(x, longest - 1, longest - 2)
                synchronize(x.device)
                yield clock()

        cost = statistics.median(after - before for before, after in pairwise(ends()))
        return longest if seconds >= cost * longest else max(1, math.floor(seconds / cost))


def _odd_schedule(sampler: DDIMSampler) -> Iterator[str]:
    values = sampler.schedule.alphas_cumprod.double()
    if not bool((values.diff() < 0).all()):
        yield "alphas_cumprod: not strictly decreasing"
    if not bool(torch.logical_and(values > 0, values < 1).all()):
        yield "alphas_cumprod: not inside (0, 1)"


def _odd_samples(sampler: DDIMSampler) -> Iterator[str]:
    shape, last = torch.Size([2, 1, 28, 28]), sampler.schedule.num_timesteps - 1
    samples = sampler.sample(shape, timesteps=sorted({last, last // 2, 0}, reverse=True))
    if samples.shape != shape:
        yield f"samples: shape {list(samples.shape)} where {list(shape)} was asked for"
    if not bool(samples.isfinite().all()):
        yield "samples: not finite"


def health_check(sampler: DDIMSampler) -> list[str]:
    """What the examiners say, and what they stumble over."""
    problems: list[str] = []
    for examiner in (_odd_schedule, _odd_samples):
        try:
            for problem in examiner(sampler):
                problems.append(problem)
        except Exception as error:
            problems.append(f"{examiner.__name__}: {type(error).__name__}: {error}")
    return problems


@dataclass(frozen=True)
class Attempt:
    name: str
    work: Callable[[], Tensor]

    def outcome(self) -> tuple[Tensor | None, str]:
        """The samples, or why there are none."""
        try:
            samples = self.work()
            if bool(torch.isfinite(samples).all()):
                return samples, ""
            return None, f"{self.name}: not finite"
        except Exception as error:
            return None, f"{self.name}: {type(error).__name__}: {error}"


def sample_with_fallbacks(attempts: dict) -> tuple[Tensor, str, list[str]]:
    """Attempts in order, until one has samples."""
    reasons: list[str] = []
    for attempt in (Attempt(name, work) for name, work in attempts.items()):
        samples, reason = attempt.outcome()
        if samples is not None:
            return samples, attempt.name, reasons
        reasons.append(reason)
    raise RuntimeError(f"{len(reasons)} attempts failed. " + " | ".join(reasons))
