"""Style: one callable base sampler for all, properties, lru_cache, singledispatch, float64 log-space coefficients."""

import functools
import time
from abc import ABC, abstractmethod

import matplotlib.pyplot as plt
import torch
from difflab.timing import count_calls, peak_memory, synchronize

CLEAN = -1


class LogTable:
    """log alpha_bar and half log-SNR at -1, 0, ..., T - 1, so that the entry of t is t + 1."""

    def __init__(self, betas64: torch.Tensor):
        self.log_signal = torch.nn.functional.pad(torch.log1p(-betas64).cumsum(0), (1, 0))
        self.half_log_snr = 0.5 * (self.log_signal - torch.log(-torch.expm1(self.log_signal)))

    def noise_std(self, t):
        return (-torch.expm1(entries(t, self.log_signal))).sqrt()

    def coefficients(self, t, s, eta):
        """x_s = A x_t + B eps + C z.

        With h the half log-SNR gained: the share of old noise that stays is 1 - eta^2 (1 - exp(-2h)), and h may be
        infinite, at s = -1.
        """
        log_t, log_s = entries(t, self.log_signal), entries(s, self.log_signal)
        lam_t, lam_s = entries(t, self.half_log_snr), entries(s, self.half_log_snr)
        h = lam_s - lam_t
        renewed = -(eta**2) * torch.expm1(-2 * h)
        shortened = torch.expm1(0.5 * torch.log1p(-renewed.clamp(max=1)))
        std_s = self.noise_std(s)
        a = torch.exp(0.5 * (log_s - log_t))
        b = torch.exp(0.5 * log_s - lam_t) * torch.expm1(-h) + std_s * shortened
        return a, b, std_s * renewed.sqrt()


@functools.singledispatch
def entries(t, table):
    """Values of a table at t, on t's device."""
    return table[int(t) + 1]


@entries.register
def _entries_of_many(t: torch.Tensor, table):
    return table[t.cpu().long() + 1].to(t.device)


@functools.singledispatch
def times(coefficient, x):
    """coefficient x, where a tensor of coefficients holds one an image."""
    return x * coefficient


@times.register
def _times_many(coefficient: torch.Tensor, x):
    return x * coefficient.to(device=x.device, dtype=x.dtype)[(..., *[None] * (x.ndim - 1) * bool(coefficient.ndim))]


@functools.lru_cache(maxsize=16)
def table_of(raw: bytes) -> LogTable:
    return LogTable(torch.frombuffer(bytearray(raw), dtype=torch.float64))


@functools.lru_cache(maxsize=8192)
def numbers(raw: bytes, t: int, s: int, eta: float) -> tuple[float, float, float]:
    return tuple(map(float, table_of(raw).coefficients(t, s, eta)))


@functools.lru_cache(maxsize=64)
def deterministic_path(raw: bytes, path: tuple[int, ...]) -> tuple[tuple[int, float, float], ...]:
    return tuple((t, *numbers(raw, t, s, 0.0)[:2]) for t, s in zip(path, (*path[1:], CLEAN)))


def raw_of(schedule) -> bytes:
    return schedule.betas64.numpy().tobytes()


def rms(values):
    return values.double().pow(2).mean().sqrt().item()


class Sampler(ABC):
    """What every sampler has: a network, a schedule, a way to make one move, and a loop."""

    def __init__(self, model, schedule):
        self.model = model
        self.schedule = schedule

    @property
    def raw(self) -> bytes:
        return raw_of(self.schedule)

    @property
    def table(self) -> LogTable:
        return table_of(self.raw)

    @property
    def top(self) -> int:
        return self.schedule.num_timesteps - 1

    @property
    def every_timestep(self) -> list[int]:
        return list(range(self.top, CLEAN, -1))

    @property
    def blank(self) -> torch.Tensor:
        """An empty tensor of the dtype and on the device of the network."""
        return next(self.model.parameters()).detach().new_empty(0)

    def fresh_noise(self, shape):
        return self.blank.new_empty(tuple(shape)).normal_()

    def predict(self, x, t):
        eps = self.model(x, torch.tensor([int(t)] * x.shape[0], device=x.device))
        return eps.to(x.dtype)

    def advance(self, x, t, s, eta):
        a, b, c = numbers(self.raw, int(t), int(s), float(eta))
        moved = times(a, x) + times(b, self.predict(x, t))
        return moved + times(c, torch.randn_like(x)) if c else moved

    @abstractmethod
    def move(self, x, t, s, eta):
        """One step of the loop."""

    @torch.no_grad()
    def __call__(self, shape, path, eta=0.0, *, keep=False, x_T=None):
        x = self.fresh_noise(shape) if x_T is None else x_T.detach().clone()
        stops = [*map(int, path), CLEAN]
        record = x.new_empty((len(stops) if keep else 0, *x.shape))
        for k, (t, s) in enumerate(zip(stops, stops[1:])):
            if keep:
                record[k] = x
            x = self.move(x, t, s, eta)
        if not keep:
            return x
        record[-1] = x
        return x, [state.clone() for state in record]


# %%
class ForwardProcessImpl(Sampler):
    """The forward process q(x_t | x_0): a sampler that needs no network and goes the other way."""

    def __init__(self, schedule):
        super().__init__(None, schedule)

    def move(self, x, t, s, eta):
        raise TypeError("the forward process moves in one go")

    def add_noise(self, x_start, t, noise=None):
        """x_t and the noise in it."""
        if noise is None:
            noise = torch.empty_like(x_start).normal_()
        signal = torch.exp(0.5 * entries(t, self.table.log_signal))
        return times(signal, x_start) + times(self.table.noise_std(t), noise), noise

    def demonstrate_forward_trajectory(self, x_start, timesteps):
        """One picture for each timestep, side by side."""
        figure = plt.figure(figsize=(len(timesteps), 1.4))
        for place, t in enumerate(timesteps):
            axes = figure.add_subplot(1, len(timesteps), place + 1, title=f"{t}", xticks=[], yticks=[])
            axes.imshow(self.add_noise(x_start[:1], t)[0].squeeze().cpu().numpy(), cmap="gray", vmin=-1.5, vmax=1.5)
        plt.close(figure)
        return figure


class TrainedModelAnalyzer(Sampler):
    """Looks at a trained noise predictor."""

    def move(self, x, t, s, eta):
        raise TypeError("an analyzer only looks")

    def noisy(self, x_clean, t):
        x_t, noise = ForwardProcessImpl(self.schedule).add_noise(x_clean, t)
        return x_t, noise, self.predict(x_t, t)

    @torch.no_grad()
    def analyze_noise_prediction_quality(self, x_clean, timesteps):
        """mse, correlation and snr for each timestep."""
        result = {}
        for t in timesteps:
            _, noise, guess = self.noisy(x_clean, t)
            both = torch.stack([noise.reshape(-1), guess.reshape(-1)]).double()
            result[t] = dict(
                mse=rms(both[0] - both[1]) ** 2,
                correlation=float(torch.corrcoef(both)[0, 1]),
                snr=float(torch.exp(2 * entries(t, self.table.half_log_snr))),
            )
        return result

    @torch.no_grad()
    def visualize_noise_predictions(self, x_clean, timesteps):
        """Four pictures a timestep: x_t, noise, predicted noise, implied x_0."""
        figure = plt.figure(figsize=(4.4, 1.1 * len(timesteps) + 0.4))
        grid = figure.add_gridspec(len(timesteps), 4)
        for row, t in enumerate(timesteps):
            x_t, noise, guess = self.noisy(x_clean[:1], t)
            a, b, _ = numbers(self.raw, t, CLEAN, 0.0)
            for column, picture in enumerate((x_t, noise, guess, a * x_t + b * guess)):
                axes = figure.add_subplot(grid[row, column])
                axes.imshow(picture[0, 0].cpu().numpy(), cmap="gray", vmin=-2, vmax=2)
                axes.set_axis_off()
        plt.close(figure)
        return figure


# %%
class DDPMSampler(Sampler):
    """Stochastic sampling (Ho et al. 2020, algorithm 2)."""

    def move(self, x, t, s, eta):
        return self.ddpm_step(x, t)

    def compute_posterior_mean(self, x_t, t, predicted_noise):
        """Mean of p(x_{t-1} | x_t)."""
        a, b, _ = self.table.coefficients(t, t - 1, 1.0)
        return times(a, x_t) + times(b, predicted_noise)

    def compute_posterior_variance(self, t):
        """Variance of p(x_{t-1} | x_t), in float64."""
        return self.table.coefficients(t, t - 1, 1.0)[-1].square()

    @torch.no_grad()
    def ddpm_step(self, x_t, t):
        """Draw x_{t-1}."""
        return self.advance(x_t, t, t - 1, 1.0)

    def sample(self, shape, return_trajectory=False, *, x_T=None):
        """All T steps."""
        return self(shape, self.every_timestep, 1.0, keep=return_trajectory, x_T=x_T)


class DDIMSampler(Sampler):
    """Sampling with step skipping (Song et al. 2021)."""

    def move(self, x, t, s, eta):
        return self.ddim_step(x, t, s, eta)

    def predict_x0_from_eps(self, x_t, eps, t):
        """A deterministic jump to clean data."""
        a, b, _ = self.table.coefficients(t, CLEAN, 0.0)
        return times(a, x_t) + times(b, eps)

    def create_timestep_schedule(self, num_steps, schedule_type="uniform"):
        """Strictly falling timesteps from T - 1 to 0."""
        if schedule_type not in {"uniform", "quadratic"} or num_steps not in range(1, self.top + 2):
            raise ValueError(f"no {schedule_type!r} schedule of {num_steps} out of {self.top + 1} timesteps")
        if num_steps == 1:
            return torch.tensor(self.every_timestep[:1])
        power = 1 + (schedule_type == "quadratic")
        grid = torch.linspace(0, 1, num_steps, dtype=torch.float64).pow(power).mul(self.top).round().long()
        count = torch.arange(num_steps)
        return ((grid - count).cummax(0).values + count).flip(0)

    @torch.no_grad()
    def ddim_step(self, x_t, t, s, eta=0.0):
        """Jump from t to s."""
        if s not in range(CLEAN, t):
            raise ValueError(f"s = {s} must be at least -1 and less than t = {t}")
        return self.advance(x_t, t, s, eta)

    def sample(self, shape, timesteps=None, eta=0.0, return_trajectory=False, *, x_T=None):
        """One jump for each timestep."""
        path = self.every_timestep if timesteps is None else timesteps
        return self(shape, path, eta, keep=return_trajectory, x_T=x_T)


class Delegate(Sampler):
    """A sampler that asks another one for everything."""

    def __init__(self, ddim_sampler):
        self.ddim_sampler = ddim_sampler

    @property
    def model(self):
        return self.ddim_sampler.model

    @property
    def schedule(self):
        return self.ddim_sampler.schedule

    def move(self, x, t, s, eta):
        return self.ddim_sampler.ddim_step(x, t, s, eta)

    def uniform(self, num_steps):
        return self.ddim_sampler.create_timestep_schedule(num_steps)


class StochasticityController(Delegate):
    """Measures what eta does."""

    def compute_stochastic_variance(self, t, s, eta):
        """Variance of the noise in a step, in float64."""
        return self.table.coefficients(t, s, eta)[-1].square()

    def analyze_eta_effects(self, shape, eta_values, num_steps):
        """Compare two runs from one noise, for each eta."""
        x_T, path = self.fresh_noise(shape), self.uniform(num_steps)
        pairs = torch.combinations(torch.arange(len(x_T), device=x_T.device))
        effects = dict.fromkeys(eta_values)
        for eta in effects:
            first = self.ddim_sampler.sample(shape, path, eta, x_T=x_T)
            second = self.ddim_sampler.sample(shape, path, eta, x_T=x_T)
            distances = [rms(first[i] - first[j]) for i, j in pairs]
            effects[eta] = dict(
                samples=first,
                repeat_distance=rms(first - second),
                diversity=sum(distances) / len(distances),
            )
        return effects


# %%
def seed_consistency(sampler, shape, seeds):
    """Is every seed good for the same samples, twice?"""
    report = {"repeatable": True, "mean": [], "std": []}
    for seed in seeds:
        torch.manual_seed(seed)
        first = sampler.sample(shape).clone()
        torch.manual_seed(seed)
        report["repeatable"] &= bool((first == sampler.sample(shape)).all())
        std, mean = torch.std_mean(first.double())
        report["mean"].append(float(mean))
        report["std"].append(float(std))
    return report


class Race(Delegate):
    """One noise, many samplers."""

    def __init__(self, ddim_sampler, shape):
        super().__init__(ddim_sampler)
        self.shape = shape
        self.x_T = self.fresh_noise(shape)

    @property
    def device(self):
        return self.x_T.device

    def lap(self, sampler, name, one_step, *arguments):
        with count_calls(sampler.model) as counter:
            synchronize(self.device)
            start = time.perf_counter()
            samples = sampler.sample(self.shape, *arguments, x_T=self.x_T)
            synchronize(self.device)
            seconds = time.perf_counter() - start
        flat = samples.double().flatten(1)
        return dict(
            name=name,
            network_calls=counter.calls,
            seconds=seconds,
            peak_memory=int(peak_memory(one_step, self.device)),
            diversity=float(torch.nn.functional.pdist(flat).mean()) / flat.shape[1] ** 0.5,
            samples=samples,
        )


def compare_samplers(
    ddpm_sampler, ddim_sampler, num_samples=16, step_counts=(200, 100, 50, 20, 10), sample_shape=(1, 28, 28)
):
    """DDPM and every DDIM, from one noise."""
    race = Race(ddim_sampler, (num_samples, *sample_shape))
    x, top = race.x_T, race.top
    rows = [race.lap(ddpm_sampler, f"DDPM-{top + 1}", lambda: ddpm_sampler.ddpm_step(x, top))]
    for count in step_counts:
        one_step = functools.partial(ddim_sampler.ddim_step, x, top, CLEAN)
        rows.append(race.lap(ddim_sampler, f"DDIM-{count}", one_step, race.uniform(count)))
    for row in rows:
        row["speedup"] = rows[0]["seconds"] / row["seconds"]
    return rows


def x0_error_gain(schedule, timesteps):
    """exp(-lambda)."""
    return torch.exp(-entries(torch.as_tensor(timesteps), table_of(raw_of(schedule)).half_log_snr))


# %%
class HalfPrecision(Delegate):
    """The same sampler; its network answers in bfloat16, its arithmetic does not."""

    def predict(self, x, t):
        with torch.autocast(x.device.type, torch.bfloat16):
            return super().predict(x, t)

    def fresh_noise(self, shape):
        return super().fresh_noise(shape).float()

    def move(self, x, t, s, eta):
        return self.advance(x, t, s, eta)


class SamplingOptimizer(Delegate):
    """DDIM sampling with a budget of time and memory."""

    @torch.no_grad()
    def cached_noise_schedule_sampling(self, ddim_sampler, shape, num_steps, *, x_T=None):
        """Two numbers a step, which the lru_cache keeps."""
        other = Delegate(ddim_sampler)
        x = other.fresh_noise(shape) if x_T is None else x_T.clone()
        for t, a, b in deterministic_path(other.raw, tuple(other.uniform(num_steps).tolist())):
            x = (x * a).add_(other.predict(x, t) * b)
        return x

    def batch_sampling_with_memory_management(
        self, total_samples, batch_size, *, num_steps=50, sample_shape=(1, 28, 28)
    ):
        """Fill the shelf batch by batch, halving when memory is short."""
        shelf = torch.empty((total_samples, *sample_shape), dtype=self.blank.dtype)
        path, done = self.uniform(num_steps), 0
        while done < total_samples:
            batch_size = min(batch_size, total_samples - done)
            short = False
            try:
                shelf[done : done + batch_size] = self.ddim_sampler.sample((batch_size, *sample_shape), path)
            except torch.OutOfMemoryError:
                if batch_size == 1:
                    raise
                short = True
            if short:
                batch_size //= 2
            else:
                done += batch_size
        return shelf

    def mixed_precision_sampling(self, shape, num_steps, *, x_T=None):
        """Sample through the half-precision delegate."""
        return HalfPrecision(self.ddim_sampler)(shape, self.uniform(num_steps), x_T=x_T)

    @torch.no_grad()
    def choose_num_steps(self, seconds, shape, *, clock=time.perf_counter):
        """Median cost of five steps after two for warming up."""
        x = self.fresh_noise(shape)
        costs = []
        for _ in range(7):
            synchronize(x.device)
            start = clock()
            self.move(x, self.top, CLEAN, 0.0)
            synchronize(x.device)
            costs.append(clock() - start)
        cost = sorted(costs[2:])[2]
        affordable = seconds / cost if cost > 0 else self.top + 1
        return max(1, int(min(affordable, self.top + 1)))


def _schedule_problems(sampler):
    table = sampler.schedule.alphas_cumprod.double()
    return {
        "the schedule does not decrease": not torch.all(table[1:] < table[:-1]),
        "the schedule is not inside (0, 1)": not torch.all((table > 0) & (table < 1)),
    }


def _sample_problems(sampler):
    path = sampler.create_timestep_schedule(min(3, sampler.schedule.num_timesteps))
    drawn = sampler.sample((2, 1, 28, 28), path)
    return {
        f"samples have shape {list(drawn.shape)}": drawn.shape != (2, 1, 28, 28),
        "samples are not finite": not torch.isfinite(drawn).all(),
    }


def health_check(sampler):
    """Lines of what is wrong; nothing is raised."""
    lines = []
    for examine in (_schedule_problems, _sample_problems):
        try:
            lines += [line for line, found in examine(sampler).items() if found]
        except Exception as error:
            lines.append(f"{examine.__name__} raised {error!r}")
    return lines


def sample_with_fallbacks(attempts):
    """Try until something finite comes."""
    failed = {}
    for name, attempt in attempts.items():
        try:
            samples = attempt()
            reason = None if samples.isfinite().all() else "not finite"
        except Exception as error:
            reason = repr(error)
        if reason is None:
            return samples, name, [f"{one}: {why}" for one, why in failed.items()]
        failed[name] = reason
    raise RuntimeError("all attempts failed\n" + "\n".join(map(": ".join, failed.items())))
