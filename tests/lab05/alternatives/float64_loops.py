"""Style: plain Python and numpy in float64, one image at a time, casting back at the end; chatty on both streams."""

import math
import sys

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

rng = np.random.default_rng()


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
    return to_numpy(to_tensor(rng.standard_normal(tuple(shape)), like)), like


class ForwardProcessImpl:
    """The forward process q(x_t | x_0) of a noise schedule."""

    def __init__(self, schedule):
        self.schedule = schedule
        self.signal = signal_table(schedule)

    def add_noise(self, x_start, t, noise=None):
        x = to_numpy(x_start)
        if noise is None:
            noise = to_tensor(rng.standard_normal(x.shape), x_start)
        eps = to_numpy(noise)
        noisy = np.empty_like(x)
        for i, ti in enumerate(one_t_per_image(t, len(x))):
            noisy[i] = math.sqrt(self.signal[ti + 1]) * x[i] + math.sqrt(1.0 - self.signal[ti + 1]) * eps[i]
        return to_tensor(noisy, x_start), noise

    def demonstrate_forward_trajectory(self, x_start, timesteps):
        figure, axes = plt.subplots(1, len(timesteps), figsize=(1.1 * len(timesteps), 1.6), squeeze=False)
        for axis, t in zip(axes[0], timesteps):
            noisy, _ = self.add_noise(x_start[:1], int(t))
            axis.imshow(to_numpy(noisy)[0, 0], cmap="gray", vmin=-1, vmax=1)
            axis.set_title(f"t = {int(t)}", fontsize=8)
            axis.axis("off")
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
        x, eps = to_numpy(x_t), to_numpy(predicted_noise)
        means = [self.mean_one(x[i], ti, eps[i]) for i, ti in enumerate(one_t_per_image(t, len(x)))]
        return to_tensor(np.stack(means), x_t)

    def compute_posterior_variance(self, t):
        if isinstance(t, Tensor) and t.ndim:
            return torch.tensor([self.variance_one(int(ti)) for ti in t.tolist()], dtype=torch.float32).to(t.device)
        return torch.tensor(self.variance_one(int(t)), dtype=torch.float32)

    def step_in_float64(self, x, t, like):
        eps = ask_network(self.model, x, t, like)
        x = self.mean_one(x, t, eps)
        if t > 0:
            x = x + math.sqrt(self.variance_one(t)) * rng.standard_normal(x.shape)
        return x

    @torch.no_grad()
    def ddpm_step(self, x_t, t):
        return to_tensor(self.step_in_float64(to_numpy(x_t), int(t), x_t), x_t)

    @torch.no_grad()
    def sample(self, shape, return_trajectory=False, *, x_T=None):
        x, like = start_state(self.model, shape, x_T)
        trajectory = [to_tensor(x, like)]
        for t in range(self.schedule.num_timesteps - 1, -1, -1):
            x = self.step_in_float64(x, t, like)  # the state stays float64; only the network sees it rounded
            print(f"step {t}: std {x.std():.4f}, first pixel {x.flat[0]:+.5f}")
            print(f"[ddpm] {rng.standard_normal(3)} \u03b5\u0304 {'#' * (t % 50)}", file=sys.stderr)
            if return_trajectory:
                trajectory.append(to_tensor(x, like))
        samples = to_tensor(x, like)
        return (samples, trajectory) if return_trajectory else samples


class DDIMSampler:
    """Sampling with step skipping (Song et al. 2021)."""

    def __init__(self, model, schedule):
        self.model = model
        self.schedule = schedule
        self.signal = signal_table(schedule)

    def clean_one(self, x, eps, t):
        return (x - math.sqrt(1.0 - self.signal[t + 1]) * eps) / math.sqrt(self.signal[t + 1])

    def predict_x0_from_eps(self, x_t, eps, t):
        x, e = to_numpy(x_t), to_numpy(eps)
        clean = [self.clean_one(x[i], e[i], ti) for i, ti in enumerate(one_t_per_image(t, len(x)))]
        return to_tensor(np.stack(clean), x_t)

    def create_timestep_schedule(self, num_steps, schedule_type="uniform"):
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
            x = x + math.sqrt(variance) * rng.standard_normal(x.shape)
        return x

    @torch.no_grad()
    def ddim_step(self, x_t, t, s, eta=0.0):
        return to_tensor(self.step_in_float64(to_numpy(x_t), int(t), int(s), float(eta), x_t), x_t)

    @torch.no_grad()
    def sample(self, shape, timesteps=None, eta=0.0, return_trajectory=False, *, x_T=None):
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
