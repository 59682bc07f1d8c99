"""Style: log-space buffers made once in __init__, gathered per image, einsum; the posterior mean through x_0."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from difflab import plots
from difflab.notebook import add_to_class
from difflab.schedule import NoiseSchedule
from difflab.timing import count_calls, measure, peak_memory, synchronize
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


def _rms(difference: Tensor) -> float:
    flat = difference.double().reshape(-1)
    return (torch.einsum("n,n->", flat, flat) / flat.numel()).sqrt().item()


def _spread(images: Tensor) -> float:
    """Mean distance of two images, from the Gram matrix."""
    rows = images.double().flatten(1)
    rows = rows - rows.mean(0)
    gram = torch.einsum("ip,jp->ij", rows, rows)
    i, j = torch.triu_indices(*gram.shape, offset=1, device=gram.device)
    squares = gram.diagonal()[i] + gram.diagonal()[j] - 2 * gram[i, j]
    return (squares.clamp(min=0) / rows.shape[1]).sqrt().mean().item()


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
        """Draw x_t from q(x_t | x_0), one pair of coefficients gathered for each image."""
        noise = torch.empty_like(x_start).normal_() if noise is None else noise.clone()
        scale = self.gather(self.noise_scale, t, x_start).reshape(-1, 1, 1, 1)
        x_t = torch.addcmul(_scale(self.gather(self.signal_scale, t, x_start), x_start), scale, noise)
        return x_t, noise

    def demonstrate_forward_trajectory(self, x_start: Tensor, timesteps: list[int]):
        """One image and one noise, in growing amounts."""
        t = torch.tensor(list(timesteps), dtype=torch.long)
        copies = x_start[:1].repeat_interleave(len(t), dim=0)
        noise = torch.randn_like(x_start[:1]).expand_as(copies)  # one noise, so that only its amount changes
        return plots.show_images({"x_t": self.add_noise(copies, t, noise)[0]}, [f"t={k}" for k in t.tolist()])


def _probe(analyzer, x_clean: Tensor, timesteps: list[int]) -> Tensor:
    """All timesteps in one network call. x_t, noise and prediction: [3, K, B, C, H, W]."""
    t = torch.tensor(timesteps, dtype=torch.long, device=x_clean.device).repeat_interleave(x_clean.shape[0])
    x_t, noise = ForwardProcessImpl(analyzer.schedule).add_noise(x_clean.repeat(len(timesteps), 1, 1, 1), t)
    found = torch.stack([x_t, noise, analyzer.model(x_t, t).to(noise)])
    return found.unflatten(1, (len(timesteps), -1))


@add_to_class(TrainedModelAnalyzer)
@torch.inference_mode()
def analyze_noise_prediction_quality(self, x_clean: Tensor, timesteps: list[int]) -> dict[int, dict[str, float]]:
    """First and second moments of noise and prediction, for all timesteps at once."""
    if len(timesteps) == 0:
        return {}
    pair = _probe(self, x_clean, timesteps)[1:].flatten(2).double()
    error = torch.einsum("ikn,i->kn", pair, pair.new_tensor([1.0, -1.0]))
    mse = torch.einsum("kn,kn->k", error, error) / error.shape[1]
    pair = pair - pair.mean(2, keepdim=True)
    moments = torch.einsum("ikn,jkn->kij", pair, pair)
    correlation = moments[:, 0, 1] / torch.einsum("kii->ki", moments).prod(1).sqrt()
    tables = _Tables(self.schedule)
    snr = (tables.log_signal - tables.log_noise)[1:].exp().index_select(0, torch.tensor(timesteps))
    columns = mse.tolist(), correlation.tolist(), snr.tolist()
    return {t: {"mse": m, "correlation": r, "snr": q} for t, m, r, q in zip(timesteps, *columns)}


@add_to_class(TrainedModelAnalyzer)
@torch.inference_mode()
def visualize_noise_predictions(self, x_clean: Tensor, timesteps: list[int]):
    """x_t, noise, prediction and implied x_0 as columns."""
    x_t, noise, guess = _probe(self, x_clean[:1], timesteps)[:, :, 0]
    x_0 = DDIMSampler(self.model, self.schedule).predict_x0_from_eps(x_t, guess, torch.tensor(timesteps))
    lines = torch.stack([x_t, noise, guess, x_0], dim=1)
    labels = [f"{k}. t = {t}" for k, t in enumerate(timesteps, start=1)]
    return plots.show_images(dict(zip(labels, lines)), ["x_t", "noise", "predicted", "implied x_0"])


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
        """Mean of p(x_{t-1} | x_t) as a mixture of x_0 and x_t."""
        x0 = _scale(self.gather(self.x0_from_x, t, x_t), x_t)
        x0 = x0 - _scale(self.gather(self.x0_from_eps, t, x_t), predicted_noise)
        weights = torch.stack([self.gather(self.mean_from_x0, t, x_t), self.gather(self.mean_from_x, t, x_t)])
        return torch.einsum("kb,kbchw->bchw", weights, torch.stack([x0, x_t]))

    def compute_posterior_variance(self, t: int | Tensor) -> Tensor:
        """Variance of p(x_{t-1} | x_t), from the table."""
        t = torch.as_tensor(t)
        variance = self.variance.to(t.device)[t]
        return torch.where(t == 0, torch.zeros_like(variance), variance)

    @torch.inference_mode()
    def ddpm_step(self, x_t: Tensor, t: int) -> Tensor:
        """Draw x_{t-1}."""
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
        """T steps from noise."""
        return _collect(self._states(_start(self.model, shape, x_T)), return_trajectory)


def seed_consistency(sampler, shape: tuple[int, ...], seeds: list[int]) -> dict:
    """A table [seed, run, pixel], then its moments."""

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return sampler.sample(tuple(shape)).to(torch.float64, copy=True).flatten()

    table = torch.stack([draw(seed) for seed in seeds for _ in range(2)]).unflatten(0, (-1, 2))
    weight = torch.full_like(table[0, 0], 1 / table.shape[2])
    mean = torch.einsum("sn,n->s", table[:, 0], weight)
    offset = table[:, 0] - mean[:, None]
    std = torch.einsum("sn,sn,n->s", offset, offset, weight).sqrt()
    return {"repeatable": table[:, 0].equal(table[:, 1]), "mean": mean.tolist(), "std": std.tolist()}


class DDIMSampler:
    """Sampling with step skipping (Song et al. 2021)."""

    def __init__(self, model, schedule: NoiseSchedule):
        self.model = model
        self.schedule = schedule
        self.tables = _Tables(schedule)
        self.gather = self.tables.gather

    def predict_x0_from_eps(self, x_t: Tensor, eps: Tensor, t: int | Tensor) -> Tensor:
        """x_0, if eps is the noise in x_t."""
        log_signal, log_noise = self.tables.log_signal[1:], self.tables.log_noise[1:]
        x_part = _scale(self.gather((-log_signal / 2).exp(), t, x_t), x_t)
        return x_part - _scale(self.gather(((log_noise - log_signal) / 2).exp(), t, x_t), eps)

    def create_timestep_schedule(self, num_steps: int, schedule_type: str = "uniform") -> Tensor:
        """num_steps different timesteps, from T - 1 down."""
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
        """Draw x_s as a combination of x_t, the predicted noise and fresh noise."""
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
        """One jump along each edge of the path."""
        path = torch.arange(self.schedule.num_timesteps).flip(0) if timesteps is None else torch.as_tensor(timesteps)
        path = F.pad(path.cpu().long(), (0, 1), value=-1)
        return _collect(self._states(_start(self.model, shape, x_T), path, eta), return_trajectory)


@add_to_class(StochasticityController)
def compute_stochastic_variance(self, t: int, s: int, eta: float) -> Tensor:
    """eta^2 times the share of noise that a step may renew, put together from logarithms."""
    tables = _Tables(self.schedule)
    ratio = (tables.log_noise[s + 1] - tables.log_noise[t + 1]).exp()
    return (eta**2 * ratio * -torch.expm1(tables.log_signal[t + 1] - tables.log_signal[s + 1])).float()


@add_to_class(StochasticityController)
def analyze_eta_effects(self, shape: tuple[int, ...], eta_values: list[float], num_steps: int) -> dict[float, dict]:
    """First and second runs side by side: how far apart in a pair, how far apart in a batch."""
    x_T = _start(self.ddim_sampler.model, tuple(shape), None)
    draw = partial(
        self.ddim_sampler.sample, tuple(x_T.shape), self.ddim_sampler.create_timestep_schedule(num_steps), x_T=x_T
    )
    firsts, seconds = ({eta: draw(eta=eta) for eta in eta_values} for _ in range(2))
    return {
        eta: {"samples": first, "repeat_distance": _rms(first - seconds[eta]), "diversity": _spread(first)}
        for eta, first in firsts.items()
    }


def compare_samplers(
    ddpm_sampler,
    ddim_sampler,
    num_samples: int = 16,
    step_counts: tuple[int, ...] = (200, 100, 50, 20, 10),
    sample_shape: tuple[int, ...] = (1, 28, 28),
) -> list[dict]:
    """Every sampler from one noise; the columns are joined to rows at the end."""
    model, last = ddpm_sampler.model, ddpm_sampler.schedule.num_timesteps - 1
    x_T = _start(model, (num_samples, *sample_shape), None)
    shape = tuple(x_T.shape)
    paths = [ddim_sampler.create_timestep_schedule(num_steps) for num_steps in step_counts]
    whole = [partial(ddpm_sampler.sample, shape, x_T=x_T)]
    whole += [partial(ddim_sampler.sample, shape, path, x_T=x_T) for path in paths]
    short = [partial(ddpm_sampler.ddpm_step, x_T, last)]
    short += [partial(ddim_sampler.sample, shape, path[:1], x_T=x_T) for path in paths]
    memory = [peak_memory(work, x_T.device) for work in short]
    drawn, calls, seconds = [], [], []
    for work in whole:
        with count_calls(model) as counter:
            timing = measure(lambda work=work: drawn.append(work()), repeats=1, warmup=0, device=x_T.device)
        calls.append(counter.calls)
        seconds.append(timing.median)
    seconds = torch.tensor(seconds, dtype=torch.float64).clamp(min=1e-9)
    speedup = torch.einsum(",k->k", seconds[0], seconds.reciprocal())
    columns = {
        "name": [f"DDPM-{last + 1}", *(f"DDIM-{num_steps}" for num_steps in step_counts)],
        "network_calls": calls,
        "seconds": seconds.tolist(),
        "speedup": speedup.tolist(),
        "peak_memory": memory,
        "diversity": map(_spread, drawn),
        "samples": drawn,
    }
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


def x0_error_gain(schedule: NoiseSchedule, timesteps: list[int]) -> Tensor:
    """exp of half the log noise-to-signal ratio, gathered."""
    tables = _Tables(schedule)
    half = (tables.log_noise - tables.log_signal)[1:] / 2
    return half.index_select(0, torch.tensor(timesteps, dtype=torch.long)).exp().float()


@add_to_class(SamplingOptimizer)
def _edges(self, sampler, num_steps: int) -> list[tuple[int, Tensor]]:
    """(t, [A, B]) for every jump."""
    path = sampler.create_timestep_schedule(num_steps).cpu()
    key = bytes(sampler.schedule.betas64.numpy()), bytes(path.numpy())
    if key not in self.cache:
        tables = _Tables(sampler.schedule)
        here, there = path + 1, F.pad(path[1:] + 1, (0, 1))
        log_a = (tables.log_signal[there] - tables.log_signal[here]) / 2
        logs = torch.stack([log_a, tables.log_noise[there] / 2, log_a + tables.log_noise[here] / 2])
        signs = torch.tensor([[1, 0, 0], [0, 1, -1]], dtype=logs.dtype)
        weights = torch.einsum("wk,kn->nw", signs, logs.exp())
        self.cache[key] = list(zip(path.tolist(), weights.unbind()))
    return self.cache[key]


@add_to_class(SamplingOptimizer)
def _walk(self, sampler, network: Callable[[Tensor, Tensor], Tensor], x: Tensor, num_steps: int) -> Tensor:
    for t, weights in self._edges(sampler, num_steps):
        eps = network(x, torch.full(x.shape[:1], t, dtype=torch.int64, device=x.device))
        x = torch.einsum("k,kbchw->bchw", weights.to(x), torch.stack([x, eps.to(x)]))
    return x


@add_to_class(SamplingOptimizer)
@torch.inference_mode()
def cached_noise_schedule_sampling(
    self, ddim_sampler, shape: tuple[int, ...], num_steps: int, *, x_T: Tensor | None = None
) -> Tensor:
    """DDIM along edges whose weights are kept."""
    return self._walk(ddim_sampler, ddim_sampler.model, _start(ddim_sampler.model, shape, x_T), num_steps)


@add_to_class(SamplingOptimizer)
@torch.inference_mode()
def batch_sampling_with_memory_management(
    self,
    total_samples: int,
    batch_size: int,
    *,
    num_steps: int = 50,
    sample_shape: tuple[int, ...] = (1, 28, 28),
) -> Tensor:
    """One buffer on the CPU, filled a slice at a time."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    path = self.ddim_sampler.create_timestep_schedule(num_steps)
    everything = torch.empty(total_samples, *sample_shape, dtype=next(self.ddim_sampler.model.parameters()).dtype)
    missing = everything
    while len(missing):
        gap = missing[:batch_size]
        try:
            gap.copy_(self.ddim_sampler.sample(tuple(gap.shape), path))
        except torch.OutOfMemoryError:
            batch_size = len(gap) // 2
            if batch_size == 0:
                raise
        else:
            missing = missing[len(gap) :]
    return everything


@add_to_class(SamplingOptimizer)
@torch.inference_mode()
def mixed_precision_sampling(self, shape: tuple[int, ...], num_steps: int, *, x_T: Tensor | None = None) -> Tensor:
    """The same walk with a network that answers under autocast."""
    x = _start(self.ddim_sampler.model, shape, x_T).float()

    @torch.autocast(x.device.type, torch.bfloat16)
    def low(x: Tensor, t: Tensor) -> Tensor:
        return self.ddim_sampler.model(x, t)

    return self._walk(self.ddim_sampler, low, x, num_steps)


@add_to_class(SamplingOptimizer)
@torch.inference_mode()
def choose_num_steps(
    self, seconds: float, shape: tuple[int, ...], *, clock: Callable[[], float] = time.perf_counter
) -> int:
    """Seconds per step is the slope of a line through the times after each of a dozen steps."""
    last = self.ddim_sampler.schedule.num_timesteps - 1
    x = _start(self.ddim_sampler.model, shape, None)

    def moment(_: int) -> float:
        self.ddim_sampler.ddim_step(x, last, last - 1)
        synchronize(x.device)
        return clock()

    moments = torch.tensor([moment(k) for k in range(13)], dtype=torch.float64)  # the first ends the warm-up
    steps = torch.arange(13, dtype=torch.float64) - 6
    slope = torch.einsum("k,k->", steps, moments - moments[0]) / torch.einsum("k,k->", steps, steps)
    affordable = seconds / slope * (1 + 1e-9) if slope > 0 else torch.tensor(float("inf"))
    return int(affordable.clamp(1, last + 1))


def _findings(sampler) -> Iterator[Callable[[], str]]:
    """Questions to a sampler; each answers with what is wrong, or with nothing."""
    shape, drawn = (2, 1, 28, 28), []

    def falling() -> str:
        gaps = sampler.schedule.alphas_cumprod.diff()
        return "" if bool((gaps < 0).all()) else f"alphas_cumprod rises or rests, by up to {gaps.max():g}"

    def inside() -> str:
        values = sampler.schedule.alphas_cumprod
        outside = ~((values > 0) & (values < 1))
        return f"alphas_cumprod leaves (0, 1) at {outside.nonzero().flatten().tolist()}" if outside.any() else ""

    def shaped() -> str:
        steps = min(4, sampler.schedule.num_timesteps)
        drawn.append(sampler.sample(shape, sampler.create_timestep_schedule(steps)))
        return "" if drawn[0].shape == shape else f"samples are {tuple(drawn[0].shape)} instead of {shape}"

    def finite() -> str:
        return "" if not drawn or drawn[0].isfinite().all() else "samples are not finite"

    yield from (falling, inside, shaped, finite)


def health_check(sampler) -> list[str]:
    """Ask every question; one that raises is a finding, too."""
    lines = []
    for question in _findings(sampler):
        try:
            lines.append(question())
        except Exception as error:
            lines.append(f"{question.__name__}: {type(error).__name__}: {error}")
    return [line for line in lines if line]


def sample_with_fallbacks(attempts: dict) -> tuple[Tensor, str, list[str]]:
    """Work off a queue of attempts."""
    queue, lines = deque(attempts.items()), []
    while queue:
        name, attempt = queue.popleft()
        try:
            samples = attempt()
            if samples.isfinite().all():
                return samples, name, lines
            lines.append(f"{name}: not finite")
        except Exception as error:
            lines.append(f"{name}: {type(error).__name__}: {error}")
    raise RuntimeError("all attempts failed. " + " | ".join(lines))
