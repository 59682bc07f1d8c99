"""Style: generators over (t, s) pairs; one jump is DDPM and DDIM at once; ExitStack, NamedTuples, closures."""

import contextlib
import itertools
import math
import time
from collections import deque
from typing import NamedTuple

import torch
from difflab import plots
from difflab.metrics import diversity
from difflab.notebook import add_to_class
from difflab.timing import count_calls, peak_memory, synchronize

OLDEST = -1  # clean data


class Gaussian(NamedTuple):
    mean: torch.Tensor
    variance: torch.Tensor

    def draw(self):
        if not self.variance.any():
            return self.mean
        return self.mean + spread(self.variance.sqrt(), self.mean) * torch.randn_like(self.mean)


class Levels(NamedTuple):
    """alpha_bar at both ends of a jump, float64, and the variance renewed on the way."""

    here: torch.Tensor
    there: torch.Tensor
    renewed: torch.Tensor


class Start(NamedTuple):
    dtype: torch.dtype
    device: torch.device

    def noise(self, shape):
        return torch.randn(tuple(shape), dtype=self.dtype, device=self.device)


def spread(value, x):
    """A coefficient, single or one an image, in a form that multiplies x."""
    return value.to(device=x.device, dtype=x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def levels(schedule, t, s, eta):
    here, there = (schedule.alpha_bar(k).double() for k in (t, s))
    return Levels(here, there, eta**2 * (1 - there) / (1 - here) * (1 - here / there))


def clean(schedule, x, eps, t):
    signal = schedule.alpha_bar(t).double()
    return (x - spread((1 - signal).sqrt(), x) * eps) / spread(signal.sqrt(), x)


def jump(schedule, x, eps, t, s, eta):
    """Where x goes from t to s. With eta = 1 and s = t - 1 it is the DDPM posterior."""
    _, there, renewed = levels(schedule, t, s, eta)
    old = (1 - there - renewed).clamp(min=0)
    return Gaussian(spread(there.sqrt(), x) * clean(schedule, x, eps, t) + spread(old.sqrt(), x) * eps, renewed)


def oracle(model, *contexts):
    """The network as a function of (x, t), every call inside fresh contexts."""

    def ask(x, t):
        with contextlib.ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context())
            eps = model(x, torch.full((len(x),), t, device=x.device))
        return eps.to(x.dtype)

    return ask


def start_of(model):
    weight = next(model.parameters())
    return Start(weight.dtype, weight.device)


def first_state(model, shape, x_T):
    return start_of(model).noise(shape) if x_T is None else x_T.detach().clone()


def downwards(schedule):
    return range(schedule.num_timesteps - 1, OLDEST, -1)


def pairs(path):
    yield from itertools.pairwise(itertools.chain(map(int, path), [OLDEST]))


def states(x, path, step):
    yield x
    for t, s in pairs(path):
        x = step(x, t, s)
        yield x


def drained(stream, keep):
    if keep:
        everything = list(stream)
        return everything[-1], everything
    (last,) = deque(stream, maxlen=1)
    return last


# %%
@add_to_class(ForwardProcessImpl)
def add_noise(self, x_start, t, noise=None):
    """x_t and the noise in it."""
    noise = torch.randn_like(x_start) if noise is None else noise
    signal = self.schedule.alpha_bar(t).double()
    return spread(signal.sqrt(), x_start) * x_start + spread((1 - signal).sqrt(), x_start) * noise, noise


@add_to_class(ForwardProcessImpl)
def demonstrate_forward_trajectory(self, x_start, timesteps):
    """A row of ever noisier pictures."""
    drowned = (self.add_noise(x_start[:1], t)[0] for t in timesteps)
    return plots.show_images({"x_t": torch.cat(list(drowned))}, [f"t = {t}" for t in timesteps])


def looks(analyzer, x_clean, timesteps):
    """(t, x_t, true noise, predicted noise) for each timestep."""
    ask, forward = oracle(analyzer.model), ForwardProcessImpl(analyzer.schedule)
    for t in map(int, timesteps):
        x_t, noise = forward.add_noise(x_clean, t)
        yield t, x_t, noise, ask(x_t, t)


@add_to_class(TrainedModelAnalyzer)
@torch.no_grad()
def analyze_noise_prediction_quality(self, x_clean, timesteps):
    """Error, correlation and signal-to-noise ratio at each timestep."""

    def centred(values):
        return values.double().flatten() - values.double().mean()

    report = {}
    for t, _, noise, guess in looks(self, x_clean, timesteps):
        a, b = centred(noise), centred(guess)
        signal = self.schedule.alpha_bar(t).double().item()
        report[t] = {
            "mse": (noise.double() - guess.double()).square().mean().item(),
            "correlation": (a @ b / (a.norm() * b.norm())).item(),
            "snr": signal / (1 - signal),
        }
    return report


@add_to_class(TrainedModelAnalyzer)
@torch.no_grad()
def visualize_noise_predictions(self, x_clean, timesteps):
    """x_t, noise, predicted noise and implied x_0, a row for each timestep."""
    rows = {
        f"{number}: t = {t}": torch.cat([x_t, noise, guess, clean(self.schedule, x_t, guess, t)])
        for number, (t, x_t, noise, guess) in enumerate(looks(self, x_clean[:1], timesteps), 1)
    }
    return plots.show_images(rows, ["x_t", "noise", "predicted", "implied x_0"])


# %%
@add_to_class(DDPMSampler)
def compute_posterior_mean(self, x_t, t, predicted_noise):
    """Mean of the eta = 1 jump to the next timestep."""
    return jump(self.schedule, x_t, predicted_noise, t, t - 1, 1.0).mean


@add_to_class(DDPMSampler)
def compute_posterior_variance(self, t):
    """Variance of the eta = 1 jump to the next timestep."""
    return levels(self.schedule, t, t - 1, 1.0).renewed.float()


@add_to_class(DDPMSampler)
@torch.no_grad()
def ddpm_step(self, x_t, t):
    """The eta = 1 jump to the next timestep."""
    return jump(self.schedule, x_t, oracle(self.model)(x_t, t), t, t - 1, 1.0).draw()


@add_to_class(DDPMSampler)
@torch.no_grad()
def sample(self, shape, return_trajectory=False, *, x_T=None):
    """All T jumps."""

    def step(x, t, _s):
        return self.ddpm_step(x, t)

    return drained(states(first_state(self.model, shape, x_T), downwards(self.schedule), step), return_trajectory)


def seed_consistency(sampler, shape, seeds):
    """Two runs for every seed."""

    def draw(seed):
        torch.manual_seed(seed)
        return sampler.sample(shape).clone()

    twins = [(draw(seed), draw(seed)) for seed in seeds]
    return {
        "repeatable": all(itertools.starmap(torch.equal, twins)),
        "mean": [first.double().mean().item() for first, _ in twins],
        "std": [first.double().std().item() for first, _ in twins],
    }


# %%
@add_to_class(DDIMSampler)
def predict_x0_from_eps(self, x_t, eps, t):
    """The clean image that eps implies."""
    return clean(self.schedule, x_t, eps, t)


@add_to_class(DDIMSampler)
def create_timestep_schedule(self, num_steps, schedule_type="uniform"):
    """num_steps different timesteps from T - 1 down to 0."""
    curves = {"uniform": lambda u: u, "quadratic": lambda u: u * u}
    last = self.schedule.num_timesteps - 1
    if schedule_type not in curves:
        raise ValueError(f"{schedule_type!r} is none of {', '.join(curves)}")
    if not 1 <= num_steps <= last + 1:
        raise ValueError(f"{num_steps} steps do not fit into {last + 1} timesteps")
    if num_steps == 1:
        return torch.tensor([last])
    wanted = (round(last * curves[schedule_type](k / (num_steps - 1))) for k in range(num_steps))
    return torch.tensor(list(itertools.accumulate(wanted, lambda before, t: max(before + 1, t)))[::-1])


@add_to_class(DDIMSampler)
@torch.no_grad()
def ddim_step(self, x_t, t, s, eta=0.0):
    """A jump of any length."""
    if not OLDEST <= s < t:
        raise ValueError(f"no way from t = {t} to s = {s}")
    return jump(self.schedule, x_t, oracle(self.model)(x_t, t), t, s, eta).draw()


@add_to_class(DDIMSampler)
@torch.no_grad()
def sample(self, shape, timesteps=None, eta=0.0, return_trajectory=False, *, x_T=None):
    """A jump for each pair of timesteps."""

    def step(x, t, s):
        return self.ddim_step(x, t, s, eta)

    path = downwards(self.schedule) if timesteps is None else timesteps
    return drained(states(first_state(self.model, shape, x_T), path, step), return_trajectory)


@add_to_class(StochasticityController)
def compute_stochastic_variance(self, t, s, eta):
    """The variance that a jump renews."""
    return levels(self.schedule, t, s, eta).renewed.float()


@add_to_class(StochasticityController)
def analyze_eta_effects(self, shape, eta_values, num_steps):
    """Two runs for every eta, all from one noise."""
    sampler = self.ddim_sampler
    x_T = start_of(sampler.model).noise(shape)
    path = sampler.create_timestep_schedule(num_steps)

    def effect(eta):
        once, again = (sampler.sample(shape, path, eta, x_T=x_T) for _ in range(2))
        apart = (once.double() - again.double()).square().mean().sqrt().item()
        return {"samples": once, "repeat_distance": apart, "diversity": diversity(once)}

    return {eta: effect(eta) for eta in eta_values}


# %%
class Contestant(NamedTuple):
    name: str
    model: torch.nn.Module
    draw: object
    one_step: object


def compare_samplers(
    ddpm_sampler, ddim_sampler, num_samples=16, step_counts=(200, 100, 50, 20, 10), sample_shape=(1, 28, 28)
):
    """DDPM, then DDIM with each number of steps, from one noise."""
    shape = (num_samples, *sample_shape)
    x_T = start_of(ddim_sampler.model).noise(shape)
    top = ddpm_sampler.schedule.num_timesteps - 1

    def contestants():
        yield Contestant(
            f"DDPM-{top + 1}",
            ddpm_sampler.model,
            lambda: ddpm_sampler.sample(shape, x_T=x_T),
            lambda: ddpm_sampler.ddpm_step(x_T, top),
        )
        for count in step_counts:
            path = ddim_sampler.create_timestep_schedule(count)
            yield Contestant(
                f"DDIM-{count}",
                ddim_sampler.model,
                lambda path=path: ddim_sampler.sample(shape, path, x_T=x_T),
                lambda path=path: ddim_sampler.ddim_step(x_T, *next(pairs(path))),
            )

    def row_of(contestant):
        with contextlib.ExitStack() as stack:
            counter = stack.enter_context(count_calls(contestant.model))
            synchronize(x_T.device)
            began = time.perf_counter()
            samples = contestant.draw()
            synchronize(x_T.device)
            seconds = time.perf_counter() - began
        return {
            "name": contestant.name,
            "network_calls": counter.calls,
            "seconds": seconds,
            "peak_memory": peak_memory(contestant.one_step, x_T.device),
            "diversity": diversity(samples),
            "samples": samples,
        }

    rows = list(map(row_of, contestants()))
    return [{**row, "speedup": rows[0]["seconds"] / row["seconds"]} for row in rows]


def x0_error_gain(schedule, timesteps):
    """Noise over signal, in standard deviations."""
    signal = (schedule.alpha_bar(t).item() for t in timesteps)
    return torch.tensor([math.sqrt((1 - a) / a) for a in signal])


# %%
class Affine(NamedTuple):
    """x_s = from_x x_t + from_eps eps after the network was asked at t."""

    t: int
    from_x: float
    from_eps: float


def affine_steps(schedule, path):
    for t, s in pairs(path):
        here, there, _ = map(float, levels(schedule, t, s, 0.0))
        from_x = math.sqrt(there / here)
        yield Affine(t, from_x, math.sqrt(1 - there) - from_x * math.sqrt(1 - here))


@add_to_class(SamplingOptimizer)
@torch.no_grad()
def cached_noise_schedule_sampling(self, ddim_sampler, shape, num_steps, *, x_T=None):
    """DDIM with two remembered numbers a step."""
    path = tuple(ddim_sampler.create_timestep_schedule(num_steps).tolist())
    key = path, tuple(ddim_sampler.schedule.alphas_cumprod.tolist())
    if key not in self.cache:
        self.cache[key] = tuple(affine_steps(ddim_sampler.schedule, path))
    ask, x = oracle(ddim_sampler.model), first_state(ddim_sampler.model, shape, x_T)
    for t, from_x, from_eps in self.cache[key]:
        x = torch.add(from_x * x, ask(x, t), alpha=from_eps)
    return x


@add_to_class(SamplingOptimizer)
def batch_sampling_with_memory_management(
    self, total_samples, batch_size, *, num_steps=50, sample_shape=(1, 28, 28)
):
    """As many batches as it takes, smaller ones when memory runs out."""
    path = self.ddim_sampler.create_timestep_schedule(num_steps)

    def attempt(size):
        """A batch on the CPU, or None. The error and its frames are gone on return."""
        try:
            return self.ddim_sampler.sample((size, *sample_shape), path).cpu()
        except torch.OutOfMemoryError:
            if size <= 1:
                raise
        return None

    def batches():
        left, at_once = total_samples, batch_size
        while left > 0:
            size = min(left, at_once)
            batch = attempt(size)
            if batch is None:
                at_once = size // 2
                continue
            left -= size
            yield batch

    nothing = torch.empty((0, *sample_shape), dtype=start_of(self.ddim_sampler.model).dtype)
    return torch.cat([nothing, *batches()])


@add_to_class(SamplingOptimizer)
@torch.no_grad()
def mixed_precision_sampling(self, shape, num_steps, *, x_T=None):
    """The network in bfloat16, the sums in float32."""
    model, schedule = self.ddim_sampler.model, self.ddim_sampler.schedule
    x = first_state(model, shape, x_T).float()
    ask = oracle(model, lambda: torch.autocast(x.device.type, torch.bfloat16))

    def step(x, t, s):
        return jump(schedule, x, ask(x, t), t, s, 0.0).mean

    return drained(states(x, self.ddim_sampler.create_timestep_schedule(num_steps), step), False)


@add_to_class(SamplingOptimizer)
@torch.no_grad()
def choose_num_steps(self, seconds, shape, *, clock=time.perf_counter):
    """The budget over what a step costs."""
    sampler = self.ddim_sampler
    x, most = start_of(sampler.model).noise(shape), sampler.schedule.num_timesteps

    def ticks():
        while True:
            sampler.ddim_step(x, most - 1, OLDEST)
            synchronize(x.device)
            yield clock()

    timed = 8
    warm, *_, done = itertools.islice(ticks(), 1 + timed)
    cost = (done - warm) / timed
    return most if cost <= 0 else max(1, int(min(most, seconds / cost)))


def health_check(sampler):
    """What is wrong, a line each."""

    def table():
        values = sampler.schedule.alphas_cumprod
        if not bool((values.diff() < 0).all()):
            yield "alphas_cumprod does not fall strictly"
        if not bool(((0 < values) & (values < 1)).all()):
            yield "alphas_cumprod leaves (0, 1)"

    def samples():
        shape, top = (2, 1, 28, 28), sampler.schedule.num_timesteps - 1
        drawn = sampler.sample(shape, sorted({top, top // 2, 0}, reverse=True))
        if tuple(drawn.shape) != shape:
            yield f"asked for samples {shape}, got {tuple(drawn.shape)}"
        if not bool(drawn.isfinite().all()):
            yield "samples are not finite"

    problems = []
    for look in (table, samples):
        try:
            problems.extend(look())
        except Exception as error:
            problems.append(f"{look.__name__}: {type(error).__name__}: {error}")
    return problems


def sample_with_fallbacks(attempts):
    """The first attempt that works."""
    problems = []

    def outcomes():
        for name, attempt in attempts.items():
            try:
                samples = attempt()
                if not bool(torch.isfinite(samples).all()):
                    raise ArithmeticError("samples are not finite")
            except Exception as error:
                problems.append(f"{name}: {type(error).__name__}: {error}")
            else:
                yield samples, name

    for samples, name in outcomes():
        return samples, name, problems
    raise RuntimeError("nothing worked: " + "; ".join(problems))
