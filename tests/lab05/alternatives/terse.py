"""Style: as short as it gets, one-letter names, reduce instead of loops, in-place arithmetic on clones."""
# ruff: noqa: E701, E731, E741, F821
import itertools as I
from functools import lru_cache
from functools import reduce as R

import matplotlib.pyplot as plt
import numpy as np
import torch

A = lambda s: torch.cat([s.alphas_cumprod, torch.ones(1)])  # A[-1] is 1, as it should be
V = lambda a, t, s, e: e**2 * (1 - a[s]) / (1 - a[t]) * (1 - a[t] / a[s])
c = lambda v, t, x: v[torch.as_tensor(t).cpu()].to(x).view(-1, 1, 1, 1)
n = lambda m, s, x=None: torch.randn(*s).to(next(m.parameters())) if x is None else x + 0
f = lambda x, t: torch.tensor((t,) * len(x), device=x.device)
w = lambda l, r: (l[-1], l) if r else l[-1]


class ForwardProcessImpl:
    def __init__(s, schedule): s.schedule, s.a = schedule, A(schedule)

    def add_noise(s, x_start, t, noise=None):
        """Draw x_t."""
        e, a = torch.randn_like(x_start) if noise is None else noise, c(s.a, t, x_start)
        return x_start.clone().mul_(a.sqrt()).add_((1 - a).sqrt() * e), e

    def demonstrate_forward_trajectory(s, x_start, timesteps):
        """Drown a digit."""
        g = plt.figure(figsize=(len(timesteps), 1))
        for i, t in enumerate(timesteps, 1):
            g.add_subplot(1, len(timesteps), i).matshow(s.add_noise(x_start, t)[0][0, 0])
        return g


class TrainedModelAnalyzer(ForwardProcessImpl):
    def __init__(s, model, schedule): super().__init__(schedule); s.model = model

    def p(s, x, t): x, e = s.add_noise(x, t); return x, e, s.model(x, f(x, t))

    @torch.no_grad()
    def analyze_noise_prediction_quality(s, x_clean, timesteps):
        """True noise against predicted."""
        q = {t: torch.stack(s.p(x_clean, t)[1:]).flatten(1) for t in timesteps}
        k = lambda u, a: (u[0].sub(u[1]).square().mean(), u.corrcoef()[0, 1], a / (1 - a))
        return {t: dict(zip(("mse", "correlation", "snr"), map(float, k(q[t], s.a[t])))) for t in q}

    @torch.no_grad()
    def visualize_noise_predictions(s, x_clean, timesteps):
        """Four pictures a row."""
        g, i = plt.Figure((4, len(timesteps))), I.count(1)
        for t in timesteps:
            x, e, p = s.p(x_clean[:1], t)
            for y in x, e, p, DDIMSampler.predict_x0_from_eps(s, x, p, t):
                g.add_subplot(len(timesteps), 4, next(i)).matshow(y[0, 0].cpu())
        return g


class DDPMSampler:
    def __init__(s, model, schedule): s.model, s.schedule, s.a = model, schedule, A(schedule)

    def compute_posterior_mean(s, x_t, t, predicted_noise):
        """Mean."""
        b = c(s.schedule.betas, t, x_t)
        return x_t.clone().sub_(b * predicted_noise / (1 - c(s.a, t, x_t)).sqrt()).div_((1 - b).sqrt())

    def compute_posterior_variance(s, t):
        """Variance."""
        t = torch.as_tensor(t)
        return s.schedule.betas[t] * (1 - s.a[t - 1]) / (1 - s.a[t])

    @torch.no_grad()
    def ddpm_step(s, x_t, t):
        """One step."""
        v = s.compute_posterior_variance(t)
        return s.compute_posterior_mean(x_t, t, s.model(x_t, f(x_t, t))).add_(v.sqrt() * torch.randn_like(x_t))

    @torch.no_grad()
    def sample(s, shape, return_trajectory=False, *, x_T=None):
        """All steps."""
        g = lambda l, t: [*l, s.ddpm_step(l[-1], t)][0 if return_trajectory else -1:]
        return w(R(g, range(len(s.schedule.betas))[::-1], [n(s.model, shape, x_T)]), return_trajectory)


def seed_consistency(sampler, shape, seeds):
    """Twice with each seed."""
    l = [[(torch.manual_seed(k), sampler.sample(shape))[1] for _ in "ab"] for k in seeds]
    m = {k: [getattr(y, k)().item() for y, _ in l] for k in ("mean", "std")}
    return m | {"repeatable": all(torch.equal(*p) for p in l)}


class DDIMSampler:
    def __init__(s, model, schedule): s.model, s.schedule, s.a = model, schedule, A(schedule)

    def predict_x0_from_eps(s, x_t, eps, t):
        """Clean image."""
        a = c(s.a, t, x_t)
        return x_t.clone().sub_((1 - a).sqrt() * eps).div_(a.sqrt())

    def create_timestep_schedule(s, num_steps, schedule_type="uniform"):
        """Where to stop on the way."""
        N, T, p = num_steps, len(s.schedule.betas) - 1, {"uniform": 1, "quadratic": 2}.get(schedule_type)
        if p is None or not 0 < N <= T + 1: raise ValueError((num_steps, schedule_type))
        # too few different ones? take a finer grid, and drop what is then too many just above 0
        g = lambda m: np.unique(np.rint(np.linspace(T ** (1 / p), 0, m) ** p)) if N > 1 else np.array([T])
        u = next(u for u in map(g, I.count(N)) if len(u) >= N)
        return torch.from_numpy(np.delete(u, range(1, 1 + len(u) - N))[::-1].astype(np.int64))

    @torch.no_grad()
    def ddim_step(o, x_t, t, s, eta=0.0):
        """One jump."""
        if s not in range(-1, t): raise ValueError((t, s))
        e, b, v = o.model(x_t, f(x_t, t)), o.a[s], V(o.a, t, s, eta)
        x = o.predict_x0_from_eps(x_t, e, t).mul_(b.sqrt()).add_((1 - b - v).clamp(min=0).sqrt() * e)
        return x.add_(v.sqrt() * torch.randn_like(x))

    @torch.no_grad()
    def sample(self, shape, timesteps=None, eta=0.0, return_trajectory=False, *, x_T=None):
        """All jumps."""
        p = (*map(int, range(len(self.schedule.betas))[::-1] if timesteps is None else timesteps), -1)
        g = lambda l, q: [*l, self.ddim_step(l[-1], *q, eta)][0 if return_trajectory else -1:]
        return w(R(g, zip(p, p[1:]), [n(self.model, shape, x_T)]), return_trajectory)


class StochasticityController:
    def __init__(s, ddim_sampler): s.ddim_sampler, s.schedule = ddim_sampler, ddim_sampler.schedule

    def compute_stochastic_variance(o, t, s, eta):
        """Sigma squared."""
        return V(A(o.schedule), t, s, eta)

    def analyze_eta_effects(s, shape, eta_values, num_steps):
        """Two runs for each eta."""
        d, x = s.ddim_sampler, n(s.ddim_sampler.model, shape)
        g = lambda e: d.sample(shape, d.create_timestep_schedule(num_steps), e, x_T=x)
        h = lambda y, z: {"samples": y, "repeat_distance": (y - z).norm().item() / y.numel() ** 0.5, "diversity": diversity(y)}
        return {e: h(g(e), g(e)) for e in eta_values}


def compare_samplers(ddpm_sampler, ddim_sampler, num_samples=16, step_counts=(200, 100, 50, 20, 10), sample_shape=(1, 28, 28)):
    """What each costs."""
    p, d, T, l = ddpm_sampler, ddim_sampler, len(ddpm_sampler.schedule.betas), []
    x = n(p.model, (num_samples, *sample_shape))
    k = [("DDPM", T, lambda: p.sample(x.shape, x_T=x), lambda: p.ddpm_step(x, T - 1))]
    k += [("DDIM", N, lambda t=d.create_timestep_schedule(N): d.sample(x.shape, t, x_T=x), lambda: d.ddim_step(x, T - 1, -1)) for N in step_counts]
    for a, N, g, h in k:
        m = peak_memory(h, x.device)
        with count_calls(d.model) as C: b = time.perf_counter(); y = g(); synchronize(x.device); b = time.perf_counter() - b
        l += {"name": f"{a}-{N}", "network_calls": C.calls, "seconds": b, "peak_memory": m, "diversity": diversity(y), "samples": y},
    return [r | {"speedup": l[0]["seconds"] / r["seconds"]} for r in l]


def x0_error_gain(schedule, timesteps):
    """How errors grow."""
    return (1 / A(schedule)[[*timesteps]] - 1).sqrt()


@lru_cache
def K(b, p):
    a = np.append(np.frombuffer(b), 1)[[*p, -1]]
    r, u = np.sqrt(a[1:] / a[:-1]), np.sqrt(1 - a)
    return [*zip(p, r.tolist(), (u[1:] - r * u[:-1]).tolist())]


def G(d, N, x, m):
    k = K(d.schedule.alphas_cumprod.double().numpy().tobytes(), (*d.create_timestep_schedule(N).tolist(),))
    return R(lambda x, k: k[1] * x + k[2] * m(x, f(x, k[0])).to(x), k, x)


class SamplingOptimizer:
    def __init__(s, ddim_sampler): s.ddim_sampler = ddim_sampler

    @torch.no_grad()
    def cached_noise_schedule_sampling(s, ddim_sampler, shape, num_steps, *, x_T=None):
        """DDIM in two numbers a step."""
        return G(ddim_sampler, num_steps, n(ddim_sampler.model, shape, x_T), ddim_sampler.model)

    def batch_sampling_with_memory_management(s, total_samples, batch_size, *, num_steps=50, sample_shape=(1, 28, 28)):
        """As many at once as fit."""
        l, d, k = [torch.empty(0, *sample_shape)][total_samples > 0:], s.ddim_sampler, batch_size
        while r := total_samples - sum(map(len, l)):
            try: l += d.sample((min(k, r), *sample_shape), d.create_timestep_schedule(num_steps)).cpu(),
            except torch.OutOfMemoryError:
                if not (k := min(k, r) // 2): raise
        return torch.cat(l)

    @torch.no_grad()
    def mixed_precision_sampling(s, shape, num_steps, *, x_T=None):
        """Half the digits."""
        d, x = s.ddim_sampler, n(s.ddim_sampler.model, shape, x_T).float()
        return G(d, num_steps, x, torch.autocast(x.device.type, torch.bfloat16)(d.model))

    @torch.no_grad()
    def choose_num_steps(s, seconds, shape, *, clock=time.perf_counter):
        """As many as fit."""
        d, T, x = s.ddim_sampler, len(s.ddim_sampler.schedule.betas), n(s.ddim_sampler.model, shape)
        l = [(d.ddim_step(x, T - 1, -1), synchronize(x.device), clock())[2] for _ in range(9)]
        return int(max(1, min(T, 8 * seconds / max(l[8] - l[0], 1e-12) + 1e-6)))


def health_check(sampler):
    """What is wrong."""
    def g():
        a = sampler.schedule.alphas_cumprod
        if not (a.diff() < 0).all(): yield "alpha bar does not fall"
        if not ((a > 0) & (a < 1)).all(): yield "alpha bar leaves (0, 1)"

    def h():
        y = sampler.sample((2, 1, 28, 28), sampler.create_timestep_schedule(min(3, len(sampler.schedule.betas))))
        if y.shape != (2, 1, 28, 28): yield f"shape {[*y.shape]}"
        if not y.isfinite().all(): yield "not finite"

    l = []
    for k in g, h:
        try: l.extend(k())
        except Exception as e: l += repr(e),
    return l


def sample_with_fallbacks(attempts):
    """The first that works."""
    l = []
    for k, g in attempts.items():
        try:
            if (y := g()).isfinite().all(): return y, k, l
            l += f"{k}: not finite",
        except Exception as e: l += f"{k}: {e!r}",
    raise RuntimeError("; ".join(l))
