"""Style: plain Python and numpy in float64, one image at a time, casting back at the end; chatty on both streams."""

import math
import sys
import time

import matplotlib.pyplot as plt
import numpy as np
import torch
from difflab.timing import count_calls, peak_memory, synchronize
from torch import Tensor

chatter = np.random.default_rng()  # for what is printed, never for what is drawn


def gauss(shape) -> np.ndarray:
    """Normal numbers from a generator of numpy's, whose seed comes from torch."""
    seed = int(torch.randint(2**62, (1,)))
    return np.random.default_rng(seed).standard_normal(tuple(shape))


def to_numpy(x: Tensor) -> np.ndarray:
    """A float64 copy that shares nothing with x."""
    return np.array(x.detach().cpu().double().numpy(), dtype=np.float64, copy=True)


def to_tensor(array: np.ndarray, like: Tensor) -> Tensor:
    return torch.tensor(array, dtype=torch.float64).to(dtype=like.dtype, device=like.device)


def one_t_per_image(t: int | Tensor, count: int) -> list[int]:
    if isinstance(t, Tensor):
        return [int(value) for value in t.tolist()]
    return [int(t)] * count


def signal_table(schedule) -> list[float]:
    """alpha_bar of -1, 0, ..., T - 1, so alpha_bar(t) is entry t + 1."""
    table = [1.0]
    for beta in schedule.betas64.tolist():
        table.append(table[-1] * (1.0 - beta))
    return table


def ask_network(model, x: np.ndarray, t: int, like: Tensor) -> np.ndarray:
    t_batch = torch.full((x.shape[0],), t, dtype=torch.long, device=like.device)
    return to_numpy(model(to_tensor(x, like), t_batch))


def start_state(model, shape, x_T: Tensor | None) -> tuple[np.ndarray, Tensor]:
    """The first state in float64, and an empty tensor that knows the dtype and the device of the answer."""
    if x_T is not None:
        return to_numpy(x_T), torch.empty(0, dtype=x_T.dtype, device=x_T.device)
    parameter = next(iter(model.parameters()))
    like = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
    return to_numpy(to_tensor(gauss(shape), like)), like


def root_mean_square(a: np.ndarray, b: np.ndarray) -> float:
    squares = [(u - v) ** 2 for u, v in zip(a.ravel().tolist(), b.ravel().tolist())]
    return math.sqrt(math.fsum(squares) / len(squares))


def mean_pair_distance(images: np.ndarray) -> float:
    total, pairs = 0.0, 0
    for i in range(len(images)):
        for j in range(i):
            total += root_mean_square(images[i], images[j])
            pairs += 1
    return total / pairs


def all_finite(samples: Tensor) -> bool:
    for value in samples.detach().double().flatten().tolist():
        if not math.isfinite(value):
            return False
    return True


class ForwardProcessImpl:
    """The forward process q(x_t | x_0) of a noise schedule."""

    def __init__(self, schedule):
        self.schedule = schedule
        self.signal = signal_table(schedule)

    def add_noise(self, x_start, t, noise=None):
        """Draw x_t from q(x_t | x_0)."""
        x = to_numpy(x_start)
        if noise is None:
            noise = to_tensor(gauss(x.shape), x_start)
        eps = to_numpy(noise)
        noisy = np.empty_like(x)
        for i, ti in enumerate(one_t_per_image(t, len(x))):
            noisy[i] = math.sqrt(self.signal[ti + 1]) * x[i] + math.sqrt(1.0 - self.signal[ti + 1]) * eps[i]
        return to_tensor(noisy, x_start), noise

    def demonstrate_forward_trajectory(self, x_start, timesteps):
        """The first image at each timestep."""
        figure, axes = plt.subplots(1, len(timesteps), figsize=(1.1 * len(timesteps), 1.6), squeeze=False)
        for axis, t in zip(axes[0], timesteps):
            noisy, _ = self.add_noise(x_start[:1], int(t))
            axis.imshow(to_numpy(noisy)[0, 0], cmap="gray", vmin=-1, vmax=1)
            axis.set_title(f"t = {int(t)}", fontsize=8)
            axis.axis("off")
        plt.close(figure)
        return figure


class TrainedModelAnalyzer:
    """Looks at a trained noise predictor."""

    def __init__(self, model, schedule):
        self.model = model
        self.schedule = schedule
        self.forward_process = ForwardProcessImpl(schedule)
        self.signal = signal_table(schedule)

    def look(self, x_clean, t):
        """x_t, the noise in it and what the network takes for the noise."""
        x_t, noise = self.forward_process.add_noise(x_clean, t)
        seen = to_numpy(x_t)
        return seen, to_numpy(noise), ask_network(self.model, seen, t, x_t)

    @torch.no_grad()
    def analyze_noise_prediction_quality(self, x_clean, timesteps):
        """Error, correlation and signal-to-noise ratio at each timestep."""
        report = {}
        for t in timesteps:
            _, noise, guess = self.look(x_clean, int(t))
            n = noise.size
            sum_e = sum_g = sum_ee = sum_gg = sum_eg = sum_dd = 0.0
            for e, g in zip(noise.ravel().tolist(), guess.ravel().tolist()):
                sum_e += e
                sum_g += g
                sum_ee += e * e
                sum_gg += g * g
                sum_eg += e * g
                sum_dd += (e - g) ** 2
            var_e = sum_ee / n - (sum_e / n) ** 2
            var_g = sum_gg / n - (sum_g / n) ** 2
            covariance = sum_eg / n - sum_e / n * sum_g / n
            product = var_e * var_g
            report[t] = {
                "mse": sum_dd / n,
                "correlation": covariance / math.sqrt(product) if product > 0.0 else math.nan,
                "snr": self.signal[int(t) + 1] / (1.0 - self.signal[int(t) + 1]),
            }
            print(f"looked at t = {t}", report[t])
        return report

    @torch.no_grad()
    def visualize_noise_predictions(self, x_clean, timesteps):
        """x_t, noise, predicted noise and implied x_0, a row for each timestep."""
        figure, axes = plt.subplots(len(timesteps), 4, figsize=(5, 1.3 * len(timesteps)), squeeze=False)
        for row, t in enumerate(timesteps):
            seen, noise, guess = self.look(x_clean[:1], int(t))
            signal = self.signal[int(t) + 1]
            clean = (seen - math.sqrt(1.0 - signal) * guess) / math.sqrt(signal)
            for column, picture in enumerate([seen, noise, guess, clean]):
                axes[row][column].imshow(picture[0, 0], cmap="gray", vmin=-1, vmax=1)
                axes[row][column].axis("off")
            axes[row][0].set_title(f"t = {int(t)}", fontsize=8)
        plt.close(figure)
        return figure


class DDPMSampler:
    """Stochastic sampling (Ho et al. 2020, algorithm 2)."""

    def __init__(self, model, schedule):
        self.model = model
        self.schedule = schedule
        self.beta = schedule.betas64.tolist()
        self.signal = signal_table(schedule)

    def mean_one(self, x, t, eps):
        return (x - self.beta[t] / math.sqrt(1.0 - self.signal[t + 1]) * eps) / math.sqrt(1.0 - self.beta[t])

    def variance_one(self, t):
        if t == 0:
            return 0.0
        return self.beta[t] * (1.0 - self.signal[t]) / (1.0 - self.signal[t + 1])

    def compute_posterior_mean(self, x_t, t, predicted_noise):
        """Mean of p(x_{t-1} | x_t), image after image."""
        x, eps = to_numpy(x_t), to_numpy(predicted_noise)
        means = [self.mean_one(x[i], ti, eps[i]) for i, ti in enumerate(one_t_per_image(t, len(x)))]
        return to_tensor(np.stack(means), x_t)

    def compute_posterior_variance(self, t):
        """Variance of p(x_{t-1} | x_t)."""
        if isinstance(t, Tensor) and t.ndim:
            return torch.tensor([self.variance_one(int(ti)) for ti in t.tolist()], dtype=torch.float32).to(t.device)
        return torch.tensor(self.variance_one(int(t)), dtype=torch.float32)

    def step_in_float64(self, x, t, like):
        eps = ask_network(self.model, x, t, like)
        x = self.mean_one(x, t, eps)
        if t > 0:
            x = x + math.sqrt(self.variance_one(t)) * gauss(x.shape)
        return x

    @torch.no_grad()
    def ddpm_step(self, x_t, t):
        """One random step back."""
        return to_tensor(self.step_in_float64(to_numpy(x_t), int(t), x_t), x_t)

    @torch.no_grad()
    def sample(self, shape, return_trajectory=False, *, x_T=None):
        """All T steps."""
        x, like = start_state(self.model, shape, x_T)
        trajectory = [to_tensor(x, like)]
        for t in range(self.schedule.num_timesteps - 1, -1, -1):
            x = self.step_in_float64(x, t, like)  # the state stays float64; only the network sees it rounded
            print(f"step {t}: std {x.std():.4f}, first pixel {x.flat[0]:+.5f}")
            print(f"[ddpm] {chatter.standard_normal(3)} \u03b5\u0304 {'#' * (t % 50)}", file=sys.stderr)
            if return_trajectory:
                trajectory.append(to_tensor(x, like))
        samples = to_tensor(x, like)
        return (samples, trajectory) if return_trajectory else samples


def seed_consistency(sampler, shape, seeds):
    """Two runs with every seed, compared pixel by pixel."""
    repeatable = True
    means = []
    deviations = []
    for seed in seeds:
        runs = []
        for _ in range(2):
            torch.manual_seed(seed)
            runs.append(sampler.sample(tuple(shape)).double().flatten().tolist())
        if len(runs[0]) != len(runs[1]):
            repeatable = False
        for first, second in zip(runs[0], runs[1]):
            if first != second:
                repeatable = False
        mean = math.fsum(runs[0]) / len(runs[0])
        means.append(mean)
        deviations.append(math.sqrt(math.fsum((value - mean) ** 2 for value in runs[0]) / len(runs[0])))
        print("seed", seed, "mean", mean, "std", deviations[-1])
    return {"repeatable": repeatable, "mean": means, "std": deviations}


class DDIMSampler:
    """Sampling with step skipping (Song et al. 2021)."""

    def __init__(self, model, schedule):
        self.model = model
        self.schedule = schedule
        self.signal = signal_table(schedule)

    def clean_one(self, x, eps, t):
        return (x - math.sqrt(1.0 - self.signal[t + 1]) * eps) / math.sqrt(self.signal[t + 1])

    def predict_x0_from_eps(self, x_t, eps, t):
        """The clean image, if eps is the noise."""
        x, e = to_numpy(x_t), to_numpy(eps)
        clean = [self.clean_one(x[i], e[i], ti) for i, ti in enumerate(one_t_per_image(t, len(x)))]
        return to_tensor(np.stack(clean), x_t)

    def create_timestep_schedule(self, num_steps, schedule_type="uniform"):
        """num_steps timesteps from T - 1 down to 0."""
        last = self.schedule.num_timesteps - 1
        if schedule_type not in ("uniform", "quadratic"):
            raise ValueError(f"I know uniform and quadratic, not {schedule_type!r}")
        if num_steps < 1:
            raise ValueError("at least one step, please")
        if num_steps > last + 1:
            raise ValueError(f"there are only {last + 1} timesteps")
        if num_steps == 1:
            return torch.tensor([last])
        ascending = []
        for i in range(num_steps):
            fraction = i / (num_steps - 1)
            if schedule_type == "uniform":
                value = fraction * last
            else:
                value = (fraction * math.sqrt(last)) ** 2
            value = math.floor(value + 0.5)
            if ascending and value <= ascending[-1]:
                value = ascending[-1] + 1
            ascending.append(value)
        return torch.tensor(ascending[::-1], dtype=torch.long)

    def step_in_float64(self, x, t, s, eta, like):
        if not -1 <= s < t:
            raise ValueError(f"cannot jump from {t} to {s}")
        signal_t, signal_s = self.signal[t + 1], self.signal[s + 1]
        eps = ask_network(self.model, x, t, like)
        variance = eta**2 * (1.0 - signal_s) / (1.0 - signal_t) * (1.0 - signal_t / signal_s)
        direction = math.sqrt(max(1.0 - signal_s - variance, 0.0))
        x = math.sqrt(signal_s) * self.clean_one(x, eps, t) + direction * eps
        if variance > 0.0:
            x = x + math.sqrt(variance) * gauss(x.shape)
        return x

    @torch.no_grad()
    def ddim_step(self, x_t, t, s, eta=0.0):
        """One jump from t to s."""
        return to_tensor(self.step_in_float64(to_numpy(x_t), int(t), int(s), float(eta), x_t), x_t)

    @torch.no_grad()
    def sample(self, shape, timesteps=None, eta=0.0, return_trajectory=False, *, x_T=None):
        """One jump for each timestep, the last to clean data."""
        if timesteps is None:
            timesteps = range(self.schedule.num_timesteps - 1, -1, -1)
        visited = [int(t) for t in timesteps]
        x, like = start_state(self.model, shape, x_T)
        trajectory = [to_tensor(x, like)]
        for t, s in zip(visited, visited[1:] + [-1]):
            x = self.step_in_float64(x, t, s, float(eta), like)
            print("jump", t, "->", s, "x[0] =", x.flat[0])
            sys.stderr.write(f"\r{t:5d} {np.abs(x).max():9.3f}\n")
            if return_trajectory:
                trajectory.append(to_tensor(x, like))
        samples = to_tensor(x, like)
        return (samples, trajectory) if return_trajectory else samples


class StochasticityController:
    """Measures what eta does."""

    def __init__(self, ddim_sampler):
        self.ddim_sampler = ddim_sampler
        self.schedule = ddim_sampler.schedule

    def compute_stochastic_variance(self, t, s, eta):
        """sigma^2 of a jump from t to s."""
        signal = signal_table(self.schedule)
        signal_t, signal_s = signal[int(t) + 1], signal[int(s) + 1]
        sigma = eta * math.sqrt((1.0 - signal_s) / (1.0 - signal_t)) * math.sqrt(1.0 - signal_t / signal_s)
        return torch.tensor(sigma * sigma, dtype=torch.float64)

    def analyze_eta_effects(self, shape, eta_values, num_steps):
        """Two runs for each eta, all from one noise."""
        x, like = start_state(self.ddim_sampler.model, shape, None)
        timesteps = self.ddim_sampler.create_timestep_schedule(num_steps).tolist()
        effects = {}
        for eta in eta_values:
            runs = []
            for _ in range(2):
                runs.append(self.ddim_sampler.sample(tuple(shape), timesteps, eta, x_T=to_tensor(x, like)))
            first, second = to_numpy(runs[0]), to_numpy(runs[1])
            effects[eta] = {
                "samples": runs[0],
                "repeat_distance": root_mean_square(first, second),
                "diversity": mean_pair_distance(first),
            }
        return effects


def compare_samplers(
    ddpm_sampler, ddim_sampler, num_samples=16, step_counts=(200, 100, 50, 20, 10), sample_shape=(1, 28, 28)
):
    """DDPM, then DDIM with each number of steps, from one noise."""
    last = ddpm_sampler.schedule.num_timesteps - 1
    shape = (num_samples, *sample_shape)
    x, like = start_state(ddpm_sampler.model, shape, None)
    x_T = to_tensor(x, like)
    rows = []
    for steps in [last + 1, *step_counts]:
        ddpm = not rows
        if ddpm:
            memory = peak_memory(lambda: ddpm_sampler.ddpm_step(x_T, last), x_T.device)
        else:
            memory = peak_memory(lambda: ddim_sampler.sample(shape, [last], x_T=x_T), x_T.device)
            timesteps = ddim_sampler.create_timestep_schedule(steps).tolist()
        sampler = ddpm_sampler if ddpm else ddim_sampler
        with count_calls(sampler.model) as counter:
            synchronize(x_T.device)
            start = time.perf_counter_ns()
            samples = sampler.sample(shape, x_T=x_T) if ddpm else sampler.sample(shape, timesteps, x_T=x_T)
            synchronize(x_T.device)
            nanoseconds = max(1, time.perf_counter_ns() - start)
        rows.append(
            {
                "name": f"{'DDPM' if ddpm else 'DDIM'}-{steps}",
                "network_calls": counter.calls,
                "seconds": nanoseconds / 1e9,
                "speedup": 1.0,
                "peak_memory": memory,
                "diversity": mean_pair_distance(to_numpy(samples)),
                "samples": samples,
            }
        )
        rows[-1]["speedup"] = rows[0]["seconds"] / rows[-1]["seconds"]
        print(rows[-1]["name"], "took", nanoseconds, "ns", file=sys.stderr)
    return rows


def x0_error_gain(schedule, timesteps):
    """Noise over signal, the factor an error in eps is multiplied by."""
    signal = signal_table(schedule)
    gains = []
    for t in timesteps:
        gains.append(math.sqrt(1.0 / signal[int(t) + 1] - 1.0))
    return torch.tensor(gains, dtype=torch.float64)


class SamplingOptimizer:
    """DDIM sampling with a budget of time and memory."""

    def __init__(self, ddim_sampler):
        self.ddim_sampler = ddim_sampler
        self.known = []  # (table, timesteps, coefficients)

    def coefficients(self, sampler, num_steps):
        """[(t, A, B), ...], found among the known or worked out."""
        table = sampler.schedule.alphas_cumprod.double().tolist()
        timesteps = sampler.create_timestep_schedule(num_steps).tolist()
        for known_table, known_timesteps, answer in self.known:
            if known_table == table and known_timesteps == timesteps:
                return answer
        answer = []
        for i, t in enumerate(timesteps):
            signal_t = table[t]
            signal_s = table[timesteps[i + 1]] if i + 1 < len(timesteps) else 1.0
            a = math.sqrt(signal_s / signal_t)
            answer.append((t, a, math.sqrt(1.0 - signal_s) - a * math.sqrt(1.0 - signal_t)))
        self.known.append((table, timesteps, answer))
        print("new coefficients for", len(timesteps), "steps;", len(self.known), "sets are known")
        return answer

    @torch.no_grad()
    def cached_noise_schedule_sampling(self, ddim_sampler, shape, num_steps, *, x_T=None):
        """DDIM with coefficients worked out once."""
        x, like = start_state(ddim_sampler.model, shape, x_T)
        for t, a, b in self.coefficients(ddim_sampler, num_steps):
            x = a * x + b * ask_network(ddim_sampler.model, x, t, like)
        return to_tensor(x, like)

    def batch_sampling_with_memory_management(
        self, total_samples, batch_size, *, num_steps=50, sample_shape=(1, 28, 28)
    ):
        """Batches of at most batch_size, taken apart into images and stacked on the CPU."""
        if batch_size < 1:
            raise ValueError("a batch needs an image")
        timesteps = self.ddim_sampler.create_timestep_schedule(num_steps).tolist()
        images = []
        while len(images) < total_samples:
            size = min(batch_size, total_samples - len(images))
            try:
                batch = self.ddim_sampler.sample((size, *sample_shape), timesteps)
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                batch_size = size // 2
                print("memory ran out, now at most", batch_size, file=sys.stderr)
                continue
            for i in range(size):
                images.append(batch[i].cpu())
            del batch
        if not images:
            return start_state(self.ddim_sampler.model, (0, *sample_shape), None)[1].cpu().reshape(0, *sample_shape)
        return torch.stack(images)

    @torch.no_grad()
    def mixed_precision_sampling(self, shape, num_steps, *, x_T=None):
        """The network in bfloat16; here the state is float32, not float64."""
        model = self.ddim_sampler.model
        x, like = start_state(model, shape, x_T)
        x = x.astype(np.float32)
        for t, a, b in self.coefficients(self.ddim_sampler, num_steps):
            t_batch = torch.tensor([t] * len(x), device=like.device)
            images = torch.tensor(x, device=like.device)
            with torch.autocast(like.device.type, torch.bfloat16):
                eps = model(images, t_batch)
            x = np.float32(a) * x + np.float32(b) * eps.float().cpu().numpy()
        return torch.tensor(x, device=like.device)

    @torch.no_grad()
    def choose_num_steps(self, seconds, shape, *, clock=time.perf_counter):
        """How many steps fit into the seconds, after one run to warm up and one under the clock."""
        sampler = self.ddim_sampler
        most = sampler.schedule.num_timesteps
        x, like = start_state(sampler.model, shape, None)
        x_T = to_tensor(x, like)
        timed = sampler.create_timestep_schedule(min(10, most)).tolist()
        sampler.sample(tuple(shape), timed[-1:], x_T=x_T)
        synchronize(x_T.device)
        start = clock()
        sampler.sample(tuple(shape), timed, x_T=x_T)
        synchronize(x_T.device)
        elapsed = clock() - start
        if elapsed <= 0:
            return most
        steps = 1
        while steps < most and (steps + 1) * elapsed <= seconds * len(timed) * (1.0 + 1e-9):
            steps += 1
        return steps


def health_check(sampler):
    """A line for each thing that is wrong."""
    lines = []
    try:
        signal = sampler.schedule.alphas_cumprod.double().tolist()
        for t, value in enumerate(signal):
            if not 0.0 < value < 1.0:
                lines.append(f"alphas_cumprod[{t}] is {value}, which is not inside (0, 1)")
                break
        for t in range(1, len(signal)):
            if not signal[t] < signal[t - 1]:
                lines.append(f"alphas_cumprod does not fall from {t - 1} to {t}")
                break
    except Exception as error:
        lines.append(f"the schedule raises {error!r}")
    try:
        timesteps = sorted({sampler.schedule.num_timesteps - 1, sampler.schedule.num_timesteps // 2, 0}, reverse=True)
        samples = sampler.sample((2, 1, 28, 28), timesteps)
        if list(samples.shape) != [2, 1, 28, 28]:
            lines.append(f"two images 1 x 28 x 28 were ordered, {list(samples.shape)} came")
        if not all_finite(samples):
            lines.append("not every pixel is finite")
    except Exception as error:
        lines.append(f"sampling raises {error!r}")
    return lines


def sample_with_fallbacks(attempts):
    """Down the list until something works."""
    lines = []
    for name in attempts:
        try:
            samples = attempts[name]()
            if all_finite(samples):
                return samples, name, lines
            lines.append(f"{name} gave samples that are not finite")
        except Exception as error:
            lines.append(f"{name} raised {error!r}")
        print(lines[-1], file=sys.stderr)
    raise RuntimeError("no attempt worked: " + "; ".join(lines))
