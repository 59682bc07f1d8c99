"""Style: numpy does all the arithmetic; torch lends the network and the random numbers, and nothing else."""

import functools
import inspect
import time
from collections import deque

import numpy as np
import torch
from difflab.timing import peak_memory, synchronize
from matplotlib.figure import Figure

# --- the border: arrays inside, tensors outside


def inside(value):
    """A tensor as an array of its own memory; anything numpy has no dtype for becomes float32."""
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach().cpu()
    if value.is_floating_point() and value.dtype is not torch.float64:
        value = value.float()
    return value.numpy().copy()


def outside(array, like):
    """An array as a tensor of its own memory, with the dtype and on the device of `like`."""
    return torch.tensor(np.ascontiguousarray(array)).to(dtype=like.dtype, device=like.device)


def border(method):
    """Tensors go in, arrays are worked with, and what comes out is like the first tensor."""

    form = inspect.signature(method)

    @functools.wraps(method)
    def crossing(*luggage, **named):
        declared = form.bind(*luggage, **named).arguments
        first = next(value for value in declared.values() if isinstance(value, torch.Tensor))
        return outside(method(**{name: inside(value) for name, value in declared.items()}), first)

    return crossing


def passport(model, x_T=None):
    """An empty tensor that has the dtype and device samples must have."""
    holder = next(model.parameters()) if x_T is None else x_T
    return torch.empty(0, dtype=holder.dtype, device=holder.device)


def dice(shape, dtype=np.float32):
    wide = np.dtype(dtype) == np.float64
    return torch.randn(tuple(shape), dtype=torch.float64 if wide else torch.float32).numpy()


def departure(model, shape, x_T=None):
    """(x_T as an array, passport)."""
    stamp = passport(model, x_T)
    if x_T is not None:
        return inside(x_T), stamp
    return inside(outside(dice(shape, np.float64 if stamp.dtype is torch.float64 else np.float32), stamp)), stamp


def oracle(model, x, t, stamp):
    times = np.full(x.shape[0], 0, dtype=np.int64) + np.asarray(t)
    answer = model(outside(x, stamp), torch.from_numpy(times).to(stamp.device))
    return inside(answer).astype(x.dtype, copy=False)


# --- inside: float64 coefficients, cast to the dtype of the images where they meet


def levels(schedule):
    """alpha bar of -1, 0, ..., T - 1."""
    return np.insert(inside(schedule.alphas_cumprod).astype(np.float64), 0, 1.0)


def fit(coefficient, x):
    return np.asarray(coefficient, dtype=x.dtype).reshape(-1, *np.ones(x.ndim - 1, dtype=int))


def renewed(bar, t, s, eta):
    now, then = bar[t + 1], bar[s + 1]
    return np.square(eta) * (1 - then) / (1 - now) * (1 - now / then)


def rms(difference):
    return float(np.sqrt(np.mean(np.square(difference, dtype=np.float64))))


def spread(images):
    flat = images.reshape(len(images), -1).astype(np.float64)
    i, j = np.triu_indices(len(flat), k=1)
    return float(np.mean([rms(flat[a] - flat[b]) for a, b in zip(i, j)])) if len(i) else 0.0


def gallery(rows):
    figure = Figure(figsize=(1.2 * len(rows[0]), 1.2 * len(rows)))
    axes = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    for cell, _ in np.ndenumerate(np.empty(axes.shape)):
        axes[cell].imshow(rows[cell[0]][cell[1]], cmap="gray_r", vmin=-2, vmax=2)
        axes[cell].set_axis_off()
    return figure


class ForwardProcessImpl:
    """The forward process q(x_t | x_0) of a noise schedule."""

    def __init__(self, schedule):
        self.schedule = schedule

    @border
    def _mix(self, x, t, eps):
        bar = levels(self.schedule)[np.asarray(t) + 1]
        return fit(np.sqrt(bar), x) * x + fit(np.sqrt(1 - bar), x) * eps.astype(x.dtype)

    def add_noise(self, x_start, t, noise=None):
        """x_t and the noise in it."""
        if noise is None:
            noise = outside(dice(x_start.shape, inside(x_start).dtype), x_start)
        return self._mix(x_start, t, noise), noise

    def demonstrate_forward_trajectory(self, x_start, timesteps):
        """One row, one picture a timestep."""
        return gallery([[inside(self.add_noise(x_start[:1], t)[0])[0, 0] for t in timesteps]])


class TrainedModelAnalyzer:
    """Looks at a trained noise predictor."""

    def __init__(self, model, schedule):
        self.model, self.schedule = model, schedule

    def _guess(self, x_clean, t):
        x, eps = map(inside, ForwardProcessImpl(self.schedule).add_noise(x_clean, t))
        with torch.no_grad():
            return x, eps, oracle(self.model, x, t, x_clean[:0])

    def analyze_noise_prediction_quality(self, x_clean, timesteps):
        """Error, correlation and signal-to-noise ratio at each timestep."""
        report = {}
        for t in timesteps:
            _, eps, guess = self._guess(x_clean, t)
            pairs = np.stack([eps.ravel(), guess.ravel()]).astype(np.float64)
            bar = levels(self.schedule)[t + 1]
            report[t] = {
                "mse": float(np.square(np.diff(pairs, axis=0)).mean()),
                "correlation": float(np.corrcoef(pairs)[0, 1]),
                "snr": float(bar / (1 - bar)),
            }
        return report

    def visualize_noise_predictions(self, x_clean, timesteps):
        """A row for each timestep: x_t, noise, predicted noise, implied x_0."""
        rows = []
        for t in timesteps:
            x, eps, guess = self._guess(x_clean[:1], t)
            bar = levels(self.schedule)[t + 1]
            clean = (x - fit(np.sqrt(1 - bar), x) * guess) / fit(np.sqrt(bar), x)
            rows.append([picture[0, 0] for picture in (x, eps, guess, clean)])
        return gallery(rows)


class DDPMSampler:
    """Stochastic sampling (Ho et al. 2020, algorithm 2)."""

    def __init__(self, model, schedule):
        self.model, self.schedule = model, schedule

    def _moments(self, t):
        """Weights of x and eps in the mean, and the variance, for an int or an array of them."""
        t = np.asarray(t)
        bar, beta = levels(self.schedule), inside(self.schedule.betas).astype(np.float64)[t]
        from_x = 1 / np.sqrt(1 - beta)
        return from_x, -from_x * beta / np.sqrt(1 - bar[t + 1]), beta * (1 - bar[t]) / (1 - bar[t + 1])

    @border
    def compute_posterior_mean(self, x_t, t, predicted_noise):
        """Mean of p(x_{t-1} | x_t)."""
        from_x, from_eps, _ = self._moments(t)
        return fit(from_x, x_t) * x_t + fit(from_eps, x_t) * predicted_noise.astype(x_t.dtype)

    def compute_posterior_variance(self, t):
        """Variance of p(x_{t-1} | x_t)."""
        variance = self._moments(inside(t))[2]
        return torch.tensor(variance, dtype=torch.float32, device=getattr(t, "device", "cpu"))

    def _step(self, x, t, stamp):
        from_x, from_eps, variance = self._moments(t)
        new = fit(from_eps, x) * oracle(self.model, x, t, stamp)
        new += fit(from_x, x) * x
        if t:
            new += fit(np.sqrt(variance), x) * dice(x.shape, x.dtype)
        return new

    @torch.no_grad()
    def ddpm_step(self, x_t, t):
        """One step from t to t - 1."""
        return outside(self._step(inside(x_t), t, x_t[:0]), x_t)

    @torch.no_grad()
    def sample(self, shape, return_trajectory=False, *, x_T=None):
        """All T steps."""
        x, stamp = departure(self.model, shape, x_T)
        T = len(self.schedule.betas)
        film = np.empty((T + 1 if return_trajectory else 2, *x.shape), x.dtype)  # every state, or the last two
        film[0] = x
        for k, t in enumerate(np.arange(T)[::-1].tolist()):
            film[(k + 1) % len(film)] = self._step(film[k % len(film)], t, stamp)
        last = outside(film[T % len(film)], stamp)
        return (last, [outside(state, stamp) for state in film]) if return_trajectory else last


def seed_consistency(sampler, shape, seeds):
    """Two runs with each seed, and their statistics."""
    shows = []
    for seed in np.repeat(seeds, 2).tolist():
        torch.manual_seed(seed)
        shows.append(inside(sampler.sample(shape)))
    shows = np.asarray(shows).reshape(len(seeds), 2, -1)
    return {
        "repeatable": bool(np.array_equal(shows[:, 0], shows[:, 1])),
        "mean": shows[:, 0].mean(axis=1, dtype=np.float64).tolist(),
        "std": shows[:, 0].std(axis=1, dtype=np.float64).tolist(),
    }


class DDIMSampler:
    """Sampling with step skipping (Song et al. 2021)."""

    def __init__(self, model, schedule):
        self.model, self.schedule = model, schedule

    @border
    def predict_x0_from_eps(self, x_t, eps, t):
        """The clean image implied by a noise."""
        bar = levels(self.schedule)[np.asarray(t) + 1]
        return (x_t - fit(np.sqrt(1 - bar), x_t) * eps.astype(x_t.dtype)) / fit(np.sqrt(bar), x_t)

    def create_timestep_schedule(self, num_steps, schedule_type="uniform"):
        """The timesteps to visit, falling."""
        T = len(self.schedule.betas)
        if schedule_type not in ("uniform", "quadratic") or not 1 <= num_steps <= T:
            raise ValueError(f"no {schedule_type!r} schedule of {num_steps} timesteps out of {T}")
        if num_steps == 1:
            return torch.from_numpy(np.array([T - 1], dtype=np.int64))
        power = 1 + (schedule_type == "quadratic")
        ideal = np.rint(np.linspace(0, (T - 1) ** (1 / power), num_steps) ** power).astype(np.int64)
        rank = np.arange(num_steps)
        climbing = np.maximum.accumulate(ideal - rank) + rank  # a repeat is pushed one past the entry before it
        return torch.from_numpy(climbing[::-1].copy())

    def _step(self, x, t, s, eta, stamp):
        if not -1 <= s < t:
            raise ValueError(f"from {t} one can jump to -1 ... {t - 1}, not to {s}")
        bar = levels(self.schedule)
        now, then, variance = bar[t + 1], bar[s + 1], renewed(bar, t, s, eta)
        from_x = np.sqrt(then / now)
        from_eps = np.sqrt(np.maximum(1 - then - variance, 0)) - from_x * np.sqrt(1 - now)
        weights, parts = [from_x, from_eps], [x, oracle(self.model, x, t, stamp)]
        if variance > 0:
            weights.append(np.sqrt(variance))
            parts.append(dice(x.shape, x.dtype))
        return np.tensordot(np.array(weights, x.dtype), np.stack(parts), axes=1)

    @torch.no_grad()
    def ddim_step(self, x_t, t, s, eta=0.0):
        """One jump from t to s."""
        return outside(self._step(inside(x_t), t, s, eta, x_t[:0]), x_t)

    @torch.no_grad()
    def sample(self, shape, timesteps=None, eta=0.0, return_trajectory=False, *, x_T=None):
        """All jumps, the last one to clean data."""
        if timesteps is None:
            timesteps = np.arange(len(self.schedule.betas))[::-1]
        stops = np.append(np.asarray(inside(timesteps), dtype=np.int64), -1)
        x, stamp = departure(self.model, shape, x_T)
        film = [x]
        for t, s in np.lib.stride_tricks.sliding_window_view(stops, 2).tolist():
            film = film * bool(return_trajectory) + [self._step(film[-1], t, s, eta, stamp)]
        last = outside(film[-1], stamp)
        return (last, [outside(state, stamp) for state in film]) if return_trajectory else last


class StochasticityController:
    """Measures what eta does."""

    def __init__(self, ddim_sampler):
        self.ddim_sampler, self.schedule = ddim_sampler, ddim_sampler.schedule

    def compute_stochastic_variance(self, t, s, eta):
        """Variance of the noise in a jump."""
        return torch.tensor(renewed(levels(self.schedule), t, s, eta), dtype=torch.float32)

    def analyze_eta_effects(self, shape, eta_values, num_steps):
        """Two runs from one noise for each eta."""
        sampler = self.ddim_sampler
        start = outside(*departure(sampler.model, shape))
        path = sampler.create_timestep_schedule(num_steps)
        effects = {}
        for eta in eta_values:
            first, second = (sampler.sample(shape, path, eta, x_T=start) for _ in range(2))
            effects[eta] = {
                "samples": first,
                "repeat_distance": rms(inside(first) - inside(second)),
                "diversity": spread(inside(first)),
            }
        return effects


def compare_samplers(
    ddpm_sampler, ddim_sampler, num_samples=16, step_counts=(200, 100, 50, 20, 10), sample_shape=(1, 28, 28)
):
    """One noise, every sampler: what it costs and what comes out."""
    model, T = ddpm_sampler.model, len(ddpm_sampler.schedule.betas)
    start = outside(*departure(model, (num_samples, *sample_shape)))
    names = np.char.add(["DDPM-"] + ["DDIM-"] * len(step_counts), np.array([T, *step_counts]).astype(str)).tolist()
    calls, seconds = np.zeros(len(names), int), np.zeros(len(names))
    images, bytes_taken = [], []
    for i, steps in enumerate((None, *step_counts)):
        if steps is None:
            one_step, job = functools.partial(ddpm_sampler.ddpm_step, start, T - 1), ddpm_sampler.sample
        else:
            one_step = functools.partial(ddim_sampler.ddim_step, start, T - 1, -1)
            job = functools.partial(ddim_sampler.sample, timesteps=ddim_sampler.create_timestep_schedule(steps))
        bytes_taken.append(int(peak_memory(one_step, start.device)))

        def tick(*_, row=i):
            calls[row] += 1

        hook = model.register_forward_hook(tick)
        synchronize(start.device)
        seconds[i] = -time.perf_counter()
        images.append(job(list(start.shape), x_T=start))
        synchronize(start.device)
        seconds[i] += time.perf_counter()
        hook.remove()
    speedup = (seconds[0] / seconds).tolist()
    keys = ("name", "network_calls", "seconds", "speedup", "peak_memory", "diversity", "samples")
    columns = (names, calls.tolist(), seconds.tolist(), speedup, bytes_taken, [spread(inside(y)) for y in images], images)
    return [dict(zip(keys, row)) for row in zip(*columns)]


def x0_error_gain(schedule, timesteps):
    """How errors in eps grow in x_0."""
    bar = levels(schedule)[np.array(timesteps, dtype=int) + 1]
    return torch.from_numpy(np.sqrt(1 - bar) / np.sqrt(bar))


class SamplingOptimizer:
    """DDIM sampling with a budget of time and memory."""

    def __init__(self, ddim_sampler):
        self.ddim_sampler = ddim_sampler
        self.cache = {}

    def _plan(self, sampler, num_steps):
        path = inside(sampler.create_timestep_schedule(num_steps))
        bar = levels(sampler.schedule)
        key = path.tobytes(), bar.tobytes()
        if key not in self.cache:
            now, then = bar[path + 1], bar[np.append(path[1:], -1) + 1]
            grow = np.sqrt(then / now)
            self.cache[key] = np.rec.fromarrays([path, grow, np.sqrt(1 - then) - grow * np.sqrt(1 - now)], names="t,A,B")
        return self.cache[key]

    def _run(self, sampler, network, x, num_steps, stamp):
        for t, grow, turn in self._plan(sampler, num_steps).tolist():
            eps = oracle(network, x, t, stamp)
            np.multiply(eps, x.dtype.type(turn), out=eps)
            x = np.multiply(x, x.dtype.type(grow))
            np.add(x, eps, out=x)
        return outside(x, stamp)

    @torch.no_grad()
    def cached_noise_schedule_sampling(self, ddim_sampler, shape, num_steps, *, x_T=None):
        """Two prepared numbers a step."""
        x, stamp = departure(ddim_sampler.model, shape, x_T)
        return self._run(ddim_sampler, ddim_sampler.model, x, num_steps, stamp)

    def batch_sampling_with_memory_management(
        self, total_samples, batch_size, *, num_steps=50, sample_shape=(1, 28, 28)
    ):
        """Batches that fit, joined on the CPU."""
        path = self.ddim_sampler.create_timestep_schedule(num_steps)
        full, rest = divmod(total_samples, batch_size)
        waiting, done = deque([batch_size] * full + [rest] * (rest > 0)), []
        while waiting:
            size = waiting.popleft()
            try:
                done.append(self.ddim_sampler.sample((size, *sample_shape), path).cpu())
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                left, half = size + sum(waiting), size // 2
                waiting = deque([half] * (left // half) + [left % half] * (left % half > 0))
        return torch.cat(done) if done else torch.from_numpy(np.empty((0, *sample_shape), np.float32))

    @torch.no_grad()
    def mixed_precision_sampling(self, shape, num_steps, *, x_T=None):
        """The network in bfloat16, the rest in float32."""
        x, stamp = departure(self.ddim_sampler.model, shape, x_T)

        def half_awake(*question):
            with torch.autocast(stamp.device.type, torch.bfloat16):
                return self.ddim_sampler.model(*question)

        return self._run(self.ddim_sampler, half_awake, x.astype(np.float32), num_steps, stamp.float())

    @torch.no_grad()
    def choose_num_steps(self, seconds, shape, *, clock=time.perf_counter):
        """As many steps as fit into the seconds."""
        sampler, T = self.ddim_sampler, len(self.ddim_sampler.schedule.betas)
        x = outside(*departure(sampler.model, shape))
        readings = []
        for t in np.linspace(T - 1, 0, 11).astype(int).tolist():
            sampler.ddim_step(x, t, -1)
            synchronize(x.device)
            readings.append(clock())
        with np.errstate(divide="ignore", invalid="ignore"):
            affordable = np.divide(seconds, np.median(np.diff(readings)))  # the warm-up ended at the first reading
        return int(np.clip(np.nan_to_num(affordable, posinf=T), 1, T) + 1e-9)


def health_check(sampler):
    """Everything that is wrong with a sampler, in words."""
    findings = []
    try:
        bar = inside(sampler.schedule.alphas_cumprod)
        if not np.all(np.diff(bar) < 0):
            findings.append(f"alphas_cumprod does not fall at {np.flatnonzero(~(np.diff(bar) < 0)).tolist()[:5]}")
        if not np.all((0 < bar) & (bar < 1)):
            findings.append("alphas_cumprod has a value that is not between 0 and 1")
    except Exception as problem:
        findings.append(f"schedule: {problem!r}")
    try:
        path = sampler.create_timestep_schedule(np.minimum(3, len(sampler.schedule.betas)).item())
        pictures = inside(sampler.sample((2, 1, 28, 28), path))
        if np.shape(pictures) != (2, 1, 28, 28):
            findings.append(f"asked for 2 x 1 x 28 x 28, got {np.shape(pictures)}")
        if not np.isfinite(pictures).all():
            findings.append(f"{np.count_nonzero(~np.isfinite(pictures))} numbers are not finite")
    except Exception as problem:
        findings.append(f"sampling: {problem!r}")
    return findings


def sample_with_fallbacks(attempts):
    """The best attempt that works."""
    findings = []
    for name, attempt in attempts.items():
        try:
            samples = attempt()
            finite = np.isfinite(inside(samples))
            if finite.all():
                return samples, name, findings
            findings.append(f"{name}: {finite.size - finite.sum()} of {finite.size} numbers are not finite")
        except Exception as problem:
            findings.append(f"{name}: {problem!r}")
    raise RuntimeError("nothing worked: " + "; ".join(findings))
