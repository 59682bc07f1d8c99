"""Style: as short as it gets, one-letter names, reduce instead of loops, in-place arithmetic on clones."""
# ruff: noqa: E701, E731, E741
import itertools as I
from functools import reduce as R

import matplotlib.pyplot as plt
import numpy as np
import torch

A = lambda s: torch.cat([s.alphas_cumprod, torch.ones(1)])  # A[-1] is 1, as it should be
c = lambda v, t, x: v[torch.as_tensor(t).cpu()].to(x).view(-1, 1, 1, 1)
n = lambda m, s, x: torch.randn(*s).to(next(m.parameters())) if x is None else x + 0
f = lambda x, t: torch.tensor((t,) * len(x), device=x.device)
w = lambda l, r: (l[-1], l) if r else l[-1]


class ForwardProcessImpl:
    def __init__(s, schedule): s.schedule, s.a = schedule, A(schedule)

    def add_noise(s, x_start, t, noise=None):
        e, a = torch.randn_like(x_start) if noise is None else noise, c(s.a, t, x_start)
        return x_start.clone().mul_(a.sqrt()).add_((1 - a).sqrt() * e), e

    def demonstrate_forward_trajectory(s, x_start, timesteps):
        g = plt.figure(figsize=(len(timesteps), 1))
        for i, t in enumerate(timesteps, 1):
            g.add_subplot(1, len(timesteps), i).matshow(s.add_noise(x_start, t)[0][0, 0])
        return g


class DDPMSampler:
    def __init__(s, model, schedule): s.model, s.schedule, s.a = model, schedule, A(schedule)

    def compute_posterior_mean(s, x_t, t, predicted_noise):
        b = c(s.schedule.betas, t, x_t)
        return x_t.clone().sub_(b * predicted_noise / (1 - c(s.a, t, x_t)).sqrt()).div_((1 - b).sqrt())

    def compute_posterior_variance(s, t):
        t = torch.as_tensor(t)
        return s.schedule.betas[t] * (1 - s.a[t - 1]) / (1 - s.a[t])

    @torch.no_grad()
    def ddpm_step(s, x_t, t):
        v = s.compute_posterior_variance(t)
        return s.compute_posterior_mean(x_t, t, s.model(x_t, f(x_t, t))).add_(v.sqrt() * torch.randn_like(x_t))

    @torch.no_grad()
    def sample(s, shape, return_trajectory=False, *, x_T=None):
        g = lambda l, t: [*l, s.ddpm_step(l[-1], t)][0 if return_trajectory else -1:]
        return w(R(g, range(len(s.schedule.betas))[::-1], [n(s.model, shape, x_T)]), return_trajectory)


class DDIMSampler:
    def __init__(s, model, schedule): s.model, s.schedule, s.a = model, schedule, A(schedule)

    def predict_x0_from_eps(s, x_t, eps, t):
        a = c(s.a, t, x_t)
        return x_t.clone().sub_((1 - a).sqrt() * eps).div_(a.sqrt())

    def create_timestep_schedule(s, num_steps, schedule_type="uniform"):
        N, T, p = num_steps, len(s.schedule.betas) - 1, {"uniform": 1, "quadratic": 2}.get(schedule_type)
        if p is None or not 0 < N <= T + 1: raise ValueError((num_steps, schedule_type))
        # too few different ones? take a finer grid, and drop what is then too many just above 0
        g = lambda m: np.unique(np.rint(np.linspace(T ** (1 / p), 0, m) ** p)) if N > 1 else np.array([T])
        u = next(u for u in map(g, I.count(N)) if len(u) >= N)
        return torch.from_numpy(np.delete(u, range(1, 1 + len(u) - N))[::-1].astype(np.int64))

    @torch.no_grad()
    def ddim_step(o, x_t, t, s, eta=0.0):
        if s not in range(-1, t): raise ValueError((t, s))
        e, a, b = o.model(x_t, f(x_t, t)), o.a[t], o.a[s]
        v = eta**2 * (1 - b) / (1 - a) * (1 - a / b)
        x = o.predict_x0_from_eps(x_t, e, t).mul_(b.sqrt()).add_((1 - b - v).clamp(min=0).sqrt() * e)
        return x.add_(v.sqrt() * torch.randn_like(x))

    @torch.no_grad()
    def sample(self, shape, timesteps=None, eta=0.0, return_trajectory=False, *, x_T=None):
        p = (*map(int, range(len(self.schedule.betas))[::-1] if timesteps is None else timesteps), -1)
        g = lambda l, q: [*l, self.ddim_step(l[-1], *q, eta)][0 if return_trajectory else -1:]
        return w(R(g, zip(p, p[1:]), [n(self.model, shape, x_T)]), return_trajectory)
