# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown] given="title"
# # Lab 8 · Faster diffusion by encoder propagation
#
# A trained diffusion model can be made faster in two ways that need no training: ask the network *less often*, or do *less
# work* each time it is asked. In this lab you do both. First you write the solvers that made ten or twenty calls enough
# (DPM-Solver and DPM-Solver++, Lu et al. 2022). Then you look inside the U-Net, find out which half of it says nearly the
# same thing at every step, and stop asking that half (*encoder propagation*, Li et al. 2023, "Faster Diffusion").
#
# | Part | Time | Points |
# |---|---|---|
# | 1 · Solvers that take long steps | 45 min | 30 |
# | 2 · What changes from step to step? | 20 min | 12 |
# | 3 · Encoder propagation | 35 min | 28 |
# | 4 · The same on Stable Diffusion | 30 min | 14 |
# | Written analysis | 15 min | 10 given by a person |
# | Code quality, throughout | | 2, and 4 given by a person |
#
# That is two and a half hours for two people and 100 points.
#
# **How to work.** Each exercise is a cell with a `TODO`. Replace the line that raises `NotImplementedError`, run the
# cell, then run the `check(...)` cell below it. A green line is the points; anything else is a hint. The checks are
# the very ones that grade your hand-in, with new random numbers every time, so green here is green there. Add cells of
# your own wherever you like; the cells that are given (set-up, class heads, checks) are put back as they were when your
# notebook is graded. Any correct program passes: apart from two points for tidy code, no check looks at how you wrote it,
# and none at how fast your machine is.
#
# **Conventions.**
#
# | symbol | code | meaning |
# |---|---|---|
# | $t$ | a float | time, from $T-1$ (noise) down to $0$; **between the whole timesteps, too**: $t = 417.3$ is a time like any other |
# | $t = -1$ | `-1.0` | clean data |
# | $a_t = \sqrt{\bar\alpha_t},\ b_t = \sqrt{1-\bar\alpha_t}$ | `schedule.alpha_bar(t)` | how much signal and noise is in $x_t$; takes floats |
# | $\lambda_t = \ln(a_t/b_t)$ | `schedule.log_snr(t)` | half the logarithm of the signal-to-noise ratio: rises as $t$ falls; infinite at $t=-1$ |
# | $t(\lambda)$ | `schedule.t_of_lambda(lam)` | its inverse |
# | $\epsilon_\theta(x_t, t)$ | `model(x_t, t)` | predicted noise; `x_t` is `[B, 1, 28, 28]`, `t` a tensor `[B]` of floats or ints |
#
# Images are float32 in $[-1, 1]$. Nothing is clipped in the graded functions.

# %% given="setup"
import math
import time
from dataclasses import replace

import torch
from torch import Tensor

from difflab import plots
from difflab.check import check
from difflab.checkpoints import load_pretrained
from difflab.metrics import quality
from difflab.notebook import add_to_class, progress
from difflab.quality_table import quality_table
from difflab.schedule import NoiseSchedule
from difflab.solver_table import solver_table
from difflab.timing import measure_in_turns

model, schedule = load_pretrained("mnist-small")
x_T = torch.randn(10, 1, 28, 28, generator=torch.Generator().manual_seed(0))  # one noise for all demonstrations
print(schedule)

# %% [markdown] given="part1"
# ---
# ## Part 1 · Solvers that take long steps
# 45 minutes
#
# A deterministic sampler solves an ordinary differential equation. Written in $\lambda$ in place of $t$, half of its
# solution can be done on paper (Lu et al. 2022a, equation 3.4): from time $t$ to an earlier $s$, exactly,
#
# $$x_s = \frac{a_s}{a_t}\,x_t \;-\; a_s\int_{\lambda_t}^{\lambda_s} e^{-\lambda}\,\epsilon_\theta(x_\lambda, \lambda)\,d\lambda .$$
#
# Only the integral over the network is left to approximate, and the approximations are what these solvers are named for.
# Take ε as constant over the step: *order 1*. Take it from the middle of the step: *order 2*. Or spend no second call, and
# use what the *last* step saw: *order 2, multistep*. Order $p$ means: half the step, $2^p$ times less error.

# %% [markdown] given="time_grid_text"
# ### 1.1 Where to stop on the way
# 🟢 easy · 4 points · 5 min · under 1 CPU second
#
# A run with $N$ steps visits $N$ times from $T-1$ to $0$ and then jumps from $0$ to clean data, $-1$. So a grid has $N+1$
# entries. Three spacings of the first $N$:
#
# * `"time"`: evenly in $t$, and **rounded to whole timesteps**: with first-order steps this is DDIM as everyone knows it;
# * `"logsnr"`: evenly in $\lambda$, not rounded. (Rounded, several would fall on one timestep near $T$ from about $N = 40$ on.)
# * `"quadratic"`: evenly in $\sqrt t$, not rounded.
#
# <details><summary>Hint</summary>
#
# `torch.linspace(first, last, N, dtype=torch.float64)`, then `schedule.t_of_lambda` for `"logsnr"`. Rounding may push
# $\lambda_{T-1}$ below what the schedule reaches: overwrite the first entry.
# </details>


# %% exercise="time_grid"
def time_grid(schedule: NoiseSchedule, num_steps: int, spacing: str = "logsnr") -> list[float]:
    """The times at which a run with num_steps steps stops.

    Args:
        schedule: the noise schedule, with T timesteps.
        num_steps: N, from 1 to T.
        spacing: "time", "logsnr" or "quadratic".

    Returns:
        N + 1 floats, strictly decreasing: N from T - 1 to 0 in the given spacing, then -1. For N = 1: [T - 1, -1].

    Raises:
        ValueError: for an unknown spacing, num_steps < 1 or num_steps > T.
    """
    # TODO: refuse bad arguments; N times, then -1.
    ### BEGIN SOLUTION
    last = schedule.num_timesteps - 1
    if not 1 <= num_steps <= last + 1:
        raise ValueError(f"num_steps must lie between 1 and {last + 1}, got {num_steps}")
    even = torch.linspace(1, 0, num_steps, dtype=torch.float64)
    if spacing == "time":
        times = (last * even).round()
    elif spacing == "quadratic":
        times = last * even**2
    elif spacing == "logsnr":
        first, end = schedule.log_snr(last), schedule.log_snr(0)
        times = schedule.t_of_lambda(end + (first - end) * even)
    else:
        raise ValueError(f"spacing must be 'time', 'logsnr' or 'quadratic', got {spacing!r}")
    times = times.tolist()
    times[-1], times[0] = 0.0, float(last)
    return [*times, -1.0]
    ### END SOLUTION


# %% check="time_grid"
check("time_grid")


# %% given="dpm_solver_class"
class DPMSolver:
    """DPM-Solver and DPM-Solver++ (Lu et al. 2022a, 2022b).

    Args:
        model: noise predictor, called as model(x, t) with x [B, C, H, W] and t a tensor [B] of times.
        schedule: the noise schedule it was trained with.
    """

    def __init__(self, model, schedule: NoiseSchedule):
        self.model = model
        self.schedule = schedule

    def levels(self, t: float) -> tuple[float, float, float]:
        """(a_t, b_t, lambda_t), plain floats in full precision; (1, 0, infinity) at t = -1."""
        if t == -1:
            return 1.0, 0.0, math.inf
        lam = float(self.schedule.log_snr(t))
        return (1 + math.exp(-2 * lam)) ** -0.5, (1 + math.exp(2 * lam)) ** -0.5, lam


# %% [markdown] given="first_order_step_text"
# ### 1.2 Order 1: the noise stays as it is
# 🟡 a trap at the end · 5 points · 6 min · under 1 CPU second
#
# With ε taken as constant the integral is $\epsilon\,(e^{-\lambda_t} - e^{-\lambda_s})$, and with $h = \lambda_s-\lambda_t$
#
# $$x_s = \frac{a_s}{a_t}\,x_t - b_s\,(e^h - 1)\,\epsilon .$$
#
# At $s = -1$ this reads $x_{-1} = x_t/a_t - 0\cdot\infty\cdot\epsilon$, which a computer makes NaN of. Look at what it tends
# to instead: $b_s e^h = a_s b_t/a_t$, so the last jump gives $\hat x_0 = (x_t - b_t\epsilon)/a_t$.
#
# <details><summary>Hint</summary>
#
# `self.levels(t)` gives $a_t$, $b_t$ and $\lambda_t$. `math.expm1(h)` is $e^h-1$ without rounding for small $h$.
# </details>
# <details><summary>Hint: a shorter way</summary>
#
# Put $b_s e^h = a_s b_t/a_t$ into the formula: $x_s = a_s\hat x_0 + b_s\epsilon$. That is right at $s=-1$ as well. You may
# know it: DPM-Solver of order 1 *is* DDIM.
# </details>


# %% exercise="first_order_step"
@add_to_class(DPMSolver)
@torch.no_grad()
def first_order_step(self, x: Tensor, eps: Tensor, t: float, s: float) -> Tensor:
    """DPM-Solver-1 (Lu et al. 2022a, equation 3.7).

    Args:
        x: x_t, [B, C, H, W], left unchanged.
        eps: the noise predicted at x_t, [B, C, H, W].
        t: where x is, from 0 to T - 1.
        s: where to go, -1 or 0 <= s < t.

    Returns:
        x_s, [B, C, H, W]; at s = -1 the estimate of x_0.

    Raises:
        ValueError: unless -1 <= s < t.
    """
    # TODO: the formula; mind s = -1.
    ### BEGIN SOLUTION
    if not -1 <= s < t:
        raise ValueError(f"s must satisfy -1 <= s < t = {t:g}, got {s:g}")
    a_t, b_t, _ = self.levels(t)
    x_0 = (x - b_t * eps) / a_t
    a_s, b_s, _ = self.levels(s)
    return a_s * x_0 + b_s * eps
    ### END SOLUTION


# %% check="first_order_step"
check("first_order_step")

# %% [markdown] given="second_order_step_text"
# ### 1.3 Order 2: ask in the middle
# 🟡 medium · 6 points · 7 min · under 1 CPU second
#
# Go half-way in $\lambda$ with a first-order step, ask the network *there*, and take the whole step **from $x_t$** with
# that answer (Lu et al. 2022a, algorithm 1, with $r_1 = \tfrac12$):
#
# $$\lambda_m = \tfrac12(\lambda_t+\lambda_s),\quad m = t(\lambda_m),\qquad
# u = \frac{a_m}{a_t}x_t - b_m\,(e^{h/2}-1)\,\epsilon_\theta(x_t, t),\qquad
# x_s = \frac{a_s}{a_t}x_t - b_s\,(e^{h}-1)\,\epsilon_\theta(u, m).$$
#
# $m$ is the middle in λ, not in $t$, and hardly ever a whole timestep. `eps` at $(x_t, t)$ is given: this method makes one
# network call. Clean data has no middle: at $s = -1$ make none, and return $\hat x_0$.
#
# <details><summary>Hint</summary>
#
# Both lines are first-order steps: `first_order_step` does them, given the right arguments. The network wants a tensor of
# times: `torch.full((len(x),), m, dtype=torch.float64, device=x.device)`.
# </details>


# %% exercise="second_order_step"
@add_to_class(DPMSolver)
@torch.no_grad()
def second_order_step(self, x: Tensor, eps: Tensor, t: float, s: float) -> Tensor:
    """DPM-Solver-2 (Lu et al. 2022a, algorithm 1): one network call, in the middle of the step.

    Args:
        x: x_t, [B, C, H, W], left unchanged.
        eps: the noise predicted at x_t, [B, C, H, W].
        t: where x is.
        s: where to go, -1 or 0 <= s < t.

    Returns:
        x_s, [B, C, H, W]; at s = -1 the estimate of x_0, without a network call.
    """
    # TODO: half a step, one network call, a whole step from x.
    ### BEGIN SOLUTION
    if s == -1:
        return self.first_order_step(x, eps, t, s)
    middle = float(self.schedule.t_of_lambda((self.levels(t)[2] + self.levels(s)[2]) / 2))
    u = self.first_order_step(x, eps, t, middle)
    eps_middle = self.model(u, torch.full((len(x),), middle, dtype=torch.float64, device=x.device))
    return self.first_order_step(x, eps_middle, t, s)
    ### END SOLUTION


# %% check="second_order_step"
check("second_order_step")

# %% [markdown] given="multistep_step_text"
# ### 1.4 Order 2 for one call: remember the last step
# 🔴 the heart of the part · 6 + 3 points · 10 min · under 1 CPU second
#
# DPM-Solver++ does the same sums for $\hat x_0$ in place of ε, and its multistep form ("2M") replaces the extra call by a
# straight line through the last two estimates of $x_0$ (Lu et al. 2022b, algorithm 2):
#
# $$r = \frac{\lambda_t-\lambda_{\text{before}}}{\lambda_s-\lambda_t},\qquad
# D = \Bigl(1+\frac1{2r}\Bigr)\hat x_0 - \frac1{2r}\,\hat x_0^{\text{before}},\qquad
# x_s = \frac{b_s}{b_t}\,x_t - a_s\,(e^{-h}-1)\,D .$$
#
# The first step has nothing to remember: there $D = \hat x_0$, order 1. The last, to $s=-1$, returns $\hat x_0$ itself.
#
# **With noise.** The method has a stochastic sibling ("SDE-DPM-Solver++"), and as in DDIM a dial $\eta$ leads from one to
# the other. Some of the noise is taken out and put back afresh:
#
# $$x_s = \frac{b_s}{b_t}\,e^{-\eta h}\,x_t \;-\; a_s\,\bigl(e^{-(1+\eta)h}-1\bigr)\,D \;+\; b_s\sqrt{1-e^{-2\eta h}}\;z,\qquad z\sim\mathcal N(0, I).$$
#
# $\eta = 0$ is 2M; $\eta = 1$ is the sibling, whose first-order step is DDIM's with $\eta = 1$. The first check tries
# $\eta=0$, the second the rest.
#
# <details><summary>Hint</summary>
#
# `math.expm1(-h)` is negative: together with the minus in front the second term *adds* $D$. Handle $s=-1$ before anything
# that divides by $h$.
# </details>


# %% exercise="multistep_step"
@add_to_class(DPMSolver)
@torch.no_grad()
def multistep_step(
    self,
    x: Tensor,
    x_0: Tensor,
    t: float,
    s: float,
    x_0_before: Tensor | None = None,
    t_before: float | None = None,
    eta: float = 0.0,
) -> Tensor:
    """DPM-Solver++ 2M (Lu et al. 2022b, algorithm 2), with eta = 1 SDE-DPM-Solver++ 2M: no network call.

    Args:
        x: x_t, [B, C, H, W], left unchanged.
        x_0: the estimate of x_0 at t, [B, C, H, W].
        t: where x is.
        s: where to go, -1 or 0 <= s < t.
        x_0_before, t_before: the estimate of the step before and its time, t_before > t; None in the first step, which is
            of first order then.
        eta: 0 for a deterministic step, 1 for as much fresh noise as DDPM has.

    Returns:
        x_s, [B, C, H, W]; at s = -1 x_0 itself, whatever eta is.
    """
    # TODO: s = -1; then D, the step, and for eta > 0 fresh noise.
    ### BEGIN SOLUTION
    if s == -1:
        return x_0
    (_, b_t, now), (a_s, b_s, then) = self.levels(t), self.levels(s)
    h, D = then - now, x_0
    if x_0_before is not None:
        r = (now - self.levels(t_before)[2]) / h
        D = (1 + 1 / (2 * r)) * x_0 - 1 / (2 * r) * x_0_before
    x_s = b_s / b_t * math.exp(-eta * h) * x - a_s * math.expm1(-(1 + eta) * h) * D
    if eta > 0:
        x_s = x_s + b_s * math.sqrt(-math.expm1(-2 * eta * h)) * torch.randn_like(x)
    return x_s
    ### END SOLUTION


# %% check="multistep_step"
check("multistep_step")

# %% check="stochastic_multistep"
check("stochastic_multistep")

# %% [markdown] given="solver_sample_text"
# ### 1.5 The loop
# 🟡 medium · 4 points · 6 min · under 1 CPU second
#
# One loop for all three. For each pair $(t, s)$ of neighbours in `times`:
#
# 1. if there is `on_state`, put `on_state(x, t)` in the place of x (Part 3 will need it);
# 2. ask the network for ε at $(x, t)$;
# 3. step to $s$ with the method asked for: `"dpm1"`, `"dpm2"` or `"dpm++2m"`.
#
# `times` need not end at $-1$: the orders below are measured on grids that do not.


# %% exercise="solver_sample"
@add_to_class(DPMSolver)
@torch.no_grad()
def sample(self, x_T: Tensor, times: list[float], method: str = "dpm++2m", eta: float = 0.0, on_state=None) -> Tensor:
    """Follow the times from x_T.

    Args:
        x_T: where to start, at times[0], [B, C, H, W], left unchanged.
        times: strictly decreasing; the last may be -1, clean data.
        method: "dpm1", "dpm2" or "dpm++2m".
        eta: of "dpm++2m"; the others have none.
        on_state: None, or a function (x, t) -> x, called with the state before the network is asked about it, once a step.

    Returns:
        The state at times[-1], [B, C, H, W]. len(times) - 1 network calls; with "dpm2" one more for each step that does
        not lead to -1. The network is given times as a tensor [B] of floats.

    Raises:
        ValueError: for an unknown method, or an eta other than 0 with "dpm1" or "dpm2".
    """
    # TODO: refuse bad arguments; then on_state, network call, step.
    ### BEGIN SOLUTION
    if method not in ("dpm1", "dpm2", "dpm++2m"):
        raise ValueError(f"method must be 'dpm1', 'dpm2' or 'dpm++2m', got {method!r}")
    if eta and method != "dpm++2m":
        raise ValueError(f"{method} has no eta; got {eta}")
    x, x_0_before, t_before = x_T, None, None
    for t, s in zip(times, times[1:]):
        if on_state is not None:
            x = on_state(x, t)
        eps = self.model(x, torch.full((len(x),), t, dtype=torch.float64, device=x.device))
        if method == "dpm1":
            x = self.first_order_step(x, eps, t, s)
        elif method == "dpm2":
            x = self.second_order_step(x, eps, t, s)
        else:
            x_0 = self.first_order_step(x, eps, t, -1)
            x = self.multistep_step(x, x_0, t, s, x_0_before, t_before, eta)
            x_0_before, t_before = x_0, t
    return x
    ### END SOLUTION


# %% check="solver_sample"
check("solver_sample")

# %% [markdown] given="convergence_order_text"
# ### 1.6 Which order is it?
# 🟢 easy · 1 + 1 points · 5 min · 2 CPU seconds
#
# If the error behaves like $C\,N^{-p}$, its logarithm falls on a straight line over $\log N$, with slope $-p$. Fit the line
# to all points by least squares, and give $p$.
#
# The second check measures *your* solvers this way: on a network that is never wrong, from $T-1$ to a finite λ, with
# fractional times. A method that is right in nearly every respect has a lower order.


# %% exercise="convergence_order"
def convergence_order(step_counts: list[int], errors: list[float]) -> float:
    """The order p of errors that fall like C * N^(-p).

    Args:
        step_counts: N, at least two different ones.
        errors: the error with each of them, positive.

    Returns:
        p, a plain float: minus the slope of the least-squares line through (log N, log error).
    """
    # TODO: a straight line through the logarithms.
    ### BEGIN SOLUTION
    log_n, log_error = (torch.tensor(values, dtype=torch.float64).log() for values in (step_counts, errors))
    deviation = log_n - log_n.mean()
    return -((deviation * log_error).sum() / deviation.square().sum()).item()
    ### END SOLUTION


# %% check="convergence_order"
check("convergence_order")

# %% check="solver_orders"
check("solver_orders")


# %% tags=["demo"]
class ExactNoise(torch.nn.Module):
    """The best possible noise prediction for data from N(-0.7, 0.3)."""

    def forward(self, x, t):
        a = torch.sigmoid(2 * schedule.log_snr(t)).view(-1, 1, 1, 1)
        return (1 - a).sqrt() * (x + 0.7 * a.sqrt()) / (0.3 * a + 1 - a)


def exact_solution(x, t, s):
    """Where the differential equation takes x from t to s, for those data."""
    a_t, a_s = (torch.sigmoid(2 * schedule.log_snr(time)) for time in (t, s))
    return -0.7 * a_s.sqrt() + ((0.3 * a_s + 1 - a_s) / (0.3 * a_t + 1 - a_t)).sqrt() * (x + 0.7 * a_t.sqrt())


exact = DPMSolver(ExactNoise(), schedule)
numbers = torch.linspace(-2, 2, 9, dtype=torch.float64).view(-1, 1, 1, 1)
step_counts, lines = [10, 20, 40, 80, 160], {}
for method in ("dpm1", "dpm2", "dpm++2m"):
    errors = []
    for n in step_counts:
        lam = torch.linspace(schedule.log_snr(999).item(), schedule.log_snr(20).item(), n + 1, dtype=torch.float64)
        times = schedule.t_of_lambda(lam.clamp(min=schedule.log_snr(999).item())).tolist()
        errors.append(
            (exact.sample(numbers, times, method) - exact_solution(numbers, times[0], times[-1])).abs().max().item()
        )
    order = convergence_order(step_counts[2:], errors[2:])
    print(f"{method:8} order {order:.2f}   errors {'  '.join(f'{e:.1e}' for e in errors)}")
    lines[f"{method}, order {order:.2f}"] = (step_counts, errors)
plots.curves(lines, "steps", "largest error", "On a network that is never wrong", xscale="log", yscale="log")

# %% [markdown] given="diffusers_text"
# The same method in another program: *diffusers* calls it `DPMSolverMultistepScheduler`. Its options have to be pinned, or
# it is another method: `final_sigmas_type="zero"` makes the last jump lead to clean data, `lower_order_final=False` keeps
# the second-to-last step at order 2 (the default lowers it below 15 steps), and it is given whole timesteps, the only ones
# it knows. Its DPM-Solver without ++ cannot end at clean data at all.

# %% tags=["demo", "nbval-ignore-output"]
from difflab.stable_diffusion import require_acceleration

require_acceleration()
from diffusers import DPMSolverMultistepScheduler

solver, whole = DPMSolver(model, schedule), time_grid(schedule, 12, "time")
for order, method in ((1, "dpm1"), (2, "dpm++2m")):
    theirs = DPMSolverMultistepScheduler(
        trained_betas=schedule.betas.numpy(), algorithm_type="dpmsolver++", solver_order=order, solver_type="midpoint",
        final_sigmas_type="zero", lower_order_final=False, euler_at_final=False, use_lu_lambdas=False,
    )  # fmt: skip
    theirs.set_timesteps(timesteps=[int(t) for t in whole[:-1]])
    x = x_T
    with torch.no_grad():
        for t in theirs.timesteps:
            x = theirs.step(model(x, t.expand(len(x))), t, x).prev_sample
    ours = solver.sample(x_T, whole, method)
    print(f"order {order}: largest difference between your {method} and diffusers {(ours - x).abs().max():.1e}")

# %% [markdown] given="solvers_seen_text"
# And on digits, from one noise. What does the eye say about five calls, and about eleven?

# %% tags=["demo"]
torch.manual_seed(0)
solver, drawn = DPMSolver(model, schedule), {}
for method, eta in (("dpm1", 0.0), ("dpm2", 0.0), ("dpm++2m", 0.0), ("dpm++2m", 1.0)):
    for calls in (5, 11):
        steps = (calls + 1) // 2 if method == "dpm2" else calls
        label = f"{method}, {calls} calls" + (", η = 1" if eta else "")
        drawn[label] = solver.sample(x_T, time_grid(schedule, steps, "quadratic"), method, eta)
plots.show_images(drawn)

# %% [markdown] given="finding_text"
# ### 1.7 How few calls are enough?
# Ten digits show little; a Fréchet distance needs a thousand or more. These were measured beforehand, from the same noise, with
# this lab's solution (`difflab solver-table`, in float32) and with Lab 5's (`difflab quality-table`). Compare distances only
# where $n$, the number of digits, is the same: fewer digits, larger distance, and at $n = 1024$ it moves by two or three
# from one thousand digits to the next.

# %% tags=["demo"]
measured = quality_table()
for row in measured.rows:
    if row.schedule == "uniform":
        print(f"{row.label:36} {row.network_calls:5} calls   n = {measured.n}   Fréchet {row.runs[0].frechet:5.1f}   "
              f"recognised {100 * row.runs[0].recognised:.1f} %")  # fmt: skip
for row in solver_table().rows:
    if row.keys == "all":
        print(f"{row.label:36} {row.network_calls:5} calls   n = {row.n}   Fréchet {row.runs[0].frechet:5.1f}   "
              f"recognised {100 * row.runs[0].recognised:.1f} %")  # fmt: skip

# %% [markdown] given="finding_answer"
# How few calls equal DDPM's thousand (Fréchet distance 3.2 at $n = 2048$)? **None of the rows with up to 20.** DPM-Solver++ 2M
# with fresh noise, $\eta = 1$, gets to 9.9 with 15 calls and to 7.2 with 20, no better than DDIM-20 with $\eta=1$ (7.0); what
# does equal DDPM-1000 is DDIM-50 with $\eta = 1$, in 50.
#
# Order pays where steps are long: with ten calls the first order has 37.5 (at $n = 1024$) and 2M 24.5, with twenty 20.5 and
# 15.1. But no *deterministic* solver can reach DDPM, however high its order. They all solve one differential equation, and 2M
# follows it well with twenty calls (the bundled digits, DDIM-50 from the same noise, have 13.9); but the network's own
# solution of it is not better than about 8.7 at $n = 2048$ (DDIM-200), because whatever error the network makes on the way
# stays in. Fresh noise in each step washes errors out. On a network that is never wrong order was everything; here the
# network is the limit. Two questions to tell apart: how well is the equation solved, and how good is its solution?

# %% [markdown] given="part2"
# ---
# ## Part 2 · What changes from step to step?
# 20 minutes
#
# A U-Net has two halves. The **encoder** goes down: it looks at $x_t$ and makes features of it, at three resolutions here.
# The **decoder** goes back up: from the lowest features `h` and the `skips`, one for each resolution, it paints the noise.
# `model.encode(x, t)` gives `(h, skips)`, `model.decode(h, skips, t)` the predicted noise, and `model(x, t)` is one after
# the other. Both halves are told the time.
#
# Li et al. (2023) claim: *along a sampling path the encoder's features change little from one step to the next, the
# decoder's change a lot; so the encoder's can be reused.* That is a hypothesis about networks they looked at. Test it on
# yours, before you build on it.


# %% given="features_on_the_way"
def features_on_the_way(x_T: Tensor, times: list[float]) -> tuple[dict[str, list[Tensor]], list[Tensor]]:
    """Sample with first-order steps and keep what each block of the U-Net puts out.

    Returns:
        ({"encoder 28×28": one tensor [B, C, H, W] for each network call, …}, the states [B, 1, 28, 28] it was shown).
    """
    blocks = {f"encoder {28 >> i}×{28 >> i}": block for i, block in enumerate(model.down)}
    blocks["encoder, middle"] = model.middle2
    blocks |= {f"decoder {7 << i}×{7 << i}": block for i, block in enumerate(model.up)}
    features, states = {name: [] for name in blocks}, []
    hooks = [
        block.register_forward_hook(lambda _module, _given, out, kept=features[name]: kept.append(out))
        for name, block in blocks.items()
    ]
    hooks.append(model.register_forward_pre_hook(lambda _module, given: states.append(given[0])))
    try:
        DPMSolver(model, schedule).sample(x_T, times, "dpm1")
    finally:
        for hook in hooks:
            hook.remove()
    return features, states


# %% [markdown] given="adjacent_changes_text"
# ### 2.1 How far, and in which direction
# 🟢 easy · 5 points · 6 min · under 1 CPU second
#
# For features $f_1, f_2, \dots$ of neighbouring steps, and for each image on its own, all its channels and pixels taken as
# one long vector:
#
# $$\text{relative change} = \frac{\lVert f_{k+1}-f_k\rVert}{\lVert f_k\rVert},\qquad
# \text{cosine} = \frac{f_k\cdot f_{k+1}}{\lVert f_k\rVert\,\lVert f_{k+1}\rVert}.$$
#
# Then the mean over the images.


# %% exercise="adjacent_changes"
@torch.no_grad()
def adjacent_changes(features: list[Tensor]) -> dict[str, list[float]]:
    """How features change from each step to the next.

    Args:
        features: K tensors [B, ...], one for each step, in order.

    Returns:
        A dict: "relative", the relative change, and "cosine", the cosine similarity, from each step to the next; both are
        lists of K - 1 plain floats, means over the B images.
    """
    # TODO: flatten each image; compare neighbours.
    ### BEGIN SOLUTION
    changes = {"relative": [], "cosine": []}
    for before, after in zip(features, features[1:]):
        a, b = before.flatten(1), after.flatten(1)
        changes["relative"].append(((b - a).norm(dim=1) / a.norm(dim=1)).mean().item())
        changes["cosine"].append(torch.cosine_similarity(a, b, dim=1).mean().item())
    return changes
    ### END SOLUTION


# %% check="adjacent_changes"
check("adjacent_changes")

# %% tags=["demo", "nbval-ignore-output"]
path = time_grid(schedule, 50, "time")
with progress(model, 50):
    features, states = features_on_the_way(x_T, path)
changes = {name: adjacent_changes(kept) for name, kept in features.items()}
print(f"{'mean over 49 pairs of steps':28} relative change   cosine")
for name, change in changes.items():
    print(f"{name:28} {sum(change['relative']) / 49:15.3f} {sum(change['cosine']) / 49:8.4f}")
plots.curves(
    {name: (path[1:50], change["relative"]) for name, change in changes.items()},
    "t", "relative change since the step before", "DDIM with 50 steps, from right to left", yscale="log",
)  # fmt: skip

# %% [markdown] given="principal_components_text"
# ### 2.2 A path to look at
# 🟡 medium · 4 points · 6 min · under 1 CPU second
#
# Features have thousands of numbers. Principal components keep the directions in which they vary most: centre the rows
# (subtract the mean row), take the singular value decomposition $X = U S V^\top$; the coordinates along the first $k$
# directions are the first $k$ columns of $U S$, and $S_i^2/\sum_j S_j^2$ is the fraction of the variance along direction $i$.
#
# <details><summary>Hint</summary>
#
# `torch.linalg.svd(X, full_matrices=False)`. The sign of a direction is arbitrary; any will do.
# </details>


# %% exercise="principal_components"
@torch.no_grad()
def principal_components(features: Tensor, num: int = 2) -> tuple[Tensor, Tensor]:
    """Principal components of N feature maps.

    Args:
        features: [N, ...], a row for each; flattened first.
        num: how many directions, from 1 to N.

    Returns:
        (coordinates [N, num] of the centred rows along the directions of largest variance, in falling order, each of
        either sign; fractions [num] of the whole variance along them).
    """
    # TODO: flatten, centre, decompose.
    ### BEGIN SOLUTION
    rows = features.flatten(1)
    U, S, _ = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    return (U * S)[:, :num], S[:num].square() / S.square().sum()
    ### END SOLUTION


# %% check="principal_components"
check("principal_components")

# %% tags=["demo"]
lines = {}
for name in ("encoder 14×14", "decoder 14×14"):
    coordinates, explained = principal_components(torch.stack([kept[0] for kept in features[name]]))
    coordinates = coordinates * coordinates[0].sign()  # both begin in the same corner
    lines[f"{name}: {100 * explained.sum():.0f} % of the variance"] = tuple(
        (coordinates / coordinates.norm(dim=1).max()).T.tolist()
    )
plots.curves(
    lines, "first component", "second component", "The features of one image, step by step (scaled to the farthest)"
)

# %% [markdown] given="reuse_error_text"
# ### 2.3 What it costs to reuse them
# 🟡 medium · 3 points · 6 min · under 1 CPU second
#
# Small or not, what counts is the predicted noise. Encode once, at the first of several states on a path. Decode those
# features at *each* time, and compare with the whole network at that state and time:
#
# $$\text{error}_k = \text{mean over images of } \frac{\lVert \text{decode}(\text{encode}(x_{t_1}, t_1),\ t_k) - \epsilon_\theta(x_{t_k}, t_k)\rVert}{\lVert\epsilon_\theta(x_{t_k}, t_k)\rVert}.$$


# %% exercise="reuse_error"
@torch.no_grad()
def reuse_error(model, states: list[Tensor], times: list[float]) -> list[float]:
    """What reusing the encoder's features of the first state costs at each of the states.

    Args:
        model: has encode(x, t) -> (h, skips), decode(h, skips, t) -> eps, and model(x, t) -> eps; t is a tensor [B].
        states: x at each of the times, K tensors [B, C, H, W].
        times: K floats.

    Returns:
        K plain floats, the relative error of the predicted noise; the first is 0 up to rounding.
    """

    # TODO: encode the first state; decode at each time; compare.
    ### BEGIN SOLUTION
    def batch(t):
        return torch.full((len(states[0]),), t, dtype=torch.float64, device=states[0].device)

    h, skips = model.encode(states[0], batch(times[0]))
    errors = []
    for x, t in zip(states, times):
        eps = model(x, batch(t)).flatten(1)
        reused = model.decode(h, skips, batch(t)).flatten(1)
        errors.append(((reused - eps).norm(dim=1) / eps.norm(dim=1)).mean().item())
    return errors
    ### END SOLUTION


# %% check="reuse_error"
check("reuse_error")

# %% tags=["demo", "nbval-ignore-output"]
lines = {}
for first in (0, 10, 20, 30, 40):
    errors = reuse_error(model, states[first : first + 10], path[first : first + 10])
    lines[f"encoded at t = {path[first]:.0f}"] = (list(range(10)), errors)
    print(
        f"encoded at t = {path[first]:3.0f}, reused 1, 4, 9 steps later: {', '.join(f'{errors[k]:.3f}' for k in (1, 4, 9))}"
    )
plots.curves(lines, "steps (of 50) since the encoder ran", "relative error of the noise")

# %% [markdown] given="part2_answer"
# What did you find? On this network, measured with DDIM in 50 steps:
#
# * Neighbouring steps do have similar features: cosines above 0.99 everywhere. So far the paper is right.
# * But the encoder is **not** calmer than the decoder: at the same resolution both change about as much. What tells a half
#   that can be reused from one that cannot is something else: the decoder's output *is* the answer.
# * And change is small *early*, near $t = T$, where all is noise, and largest at the *end*. The paper's key steps for Stable
#   Diffusion are dense at the beginning; here that is where they are needed least. A reused encoder costs under 2 % of
#   the noise for nine steps at $t = 999$, and 40 % at the end.
#
# A hypothesis about one network is not a law about all. What works must now be tried.

# %% [markdown] given="part3"
# ---
# ## Part 3 · Encoder propagation
# 35 minutes
#
# The encoder runs at a few **key** calls of the network only. At all others the decoder is given the features of the last
# key call, together with the time that it is *now*. The solver does not know: it asks for ε and gets ε.
#
# If a run makes $N$ network calls, $K$ of them at key steps, and the encoder costs the fraction $f$ of a call, the saving is
#
# $$\Bigl(1-\frac KN\Bigr) f .$$

# %% [markdown] given="key_schedule_text"
# ### 3.1 Key steps
# 🟢 easy · 3 points · 4 min · under 1 CPU second
#
# Calls are numbered from 0. Two schedules:
#
# * `"uniform"`: $\lfloor kN/K\rfloor$ for $k = 0 \dots K-1$;
# * `"paper"`: for $N = 50$ Li et al. use 0, 1, 2, 3, 5, 10, 15, 25, 35. For another $N$: each entry $i$ becomes
#   $\lfloor iN/50\rfloor$, repeats removed.


# %% given="paper_key_steps"
PAPER_KEY_STEPS = [0, 1, 2, 3, 5, 10, 15, 25, 35]  # of 50


# %% exercise="key_schedule"
def key_schedule(num_calls: int, kind: str = "uniform", num_keys: int = 1) -> list[int]:
    """The network calls at which the encoder runs.

    Args:
        num_calls: N, at least 1.
        kind: "uniform" or "paper".
        num_keys: K, of "uniform", from 1 to N; "paper" does not look at it.

    Returns:
        Call numbers, strictly increasing from 0.

    Raises:
        ValueError: for an unknown kind, or a num_keys outside 1 ... N with "uniform".
    """
    # TODO: the two schedules.
    ### BEGIN SOLUTION
    if kind == "paper":
        return sorted({i * num_calls // 50 for i in PAPER_KEY_STEPS})
    if kind != "uniform":
        raise ValueError(f"kind must be 'uniform' or 'paper', got {kind!r}")
    if not 1 <= num_keys <= num_calls:
        raise ValueError(f"num_keys must lie between 1 and {num_calls}, got {num_keys}")
    return [k * num_calls // num_keys for k in range(num_keys)]
    ### END SOLUTION


# %% check="key_schedule"
check("key_schedule")

# %% [markdown] given="hold_key_steps_text"
# ### 3.2 Refuse what cannot work
# 🟢 easy · 3 points · 3 min · under 1 CPU second
#
# Without call 0 there is nothing to reuse at the start; a key step beyond the end is never reached; one out of order is a
# typing error. One line each, which says what was wrong and what to do.


# %% exercise="hold_key_steps"
def hold_key_steps(key_steps: list[int], num_calls: int) -> list[int]:
    """The key steps, if they can be used.

    Args:
        key_steps: call numbers.
        num_calls: N.

    Returns:
        The same numbers, as a list.

    Raises:
        ValueError: if there are none, the first is not 0, they do not rise strictly, or one is not below num_calls. The
            message holds the word "0" for a missing start, and num_calls for one beyond the end.
    """
    # TODO: look at the start, the order and the end.
    ### BEGIN SOLUTION
    keys = list(key_steps)
    if keys[:1] != [0]:
        raise ValueError(
            f"key steps must start with 0, got {keys}: call 0 has no earlier features to reuse; add 0 in front"
        )
    if any(a >= b for a, b in zip(keys, keys[1:])):
        raise ValueError(f"key steps must rise strictly, got {keys}; sort them and remove repeats")
    if keys[-1] >= num_calls:
        raise ValueError(
            f"key steps must stay below the {num_calls} network calls of the run, got {keys[-1]}; leave it out"
        )
    return keys
    ### END SOLUTION


# %% check="hold_key_steps"
check("hold_key_steps")

# %% [markdown] given="network_times_text"
# ### 3.3 When the network is asked
# 🟢 easy · 2 points · 4 min · under 1 CPU second
#
# To decode several calls at once (below) one must know beforehand at which times the network will be asked: at every entry
# of `times` but the last, and with `"dpm2"` also in the middle (in λ) of every step that does not lead to $-1$.


# %% exercise="network_times"
def network_times(schedule: NoiseSchedule, times: list[float], method: str) -> list[float]:
    """The times of all network calls of DPMSolver.sample, in order.

    Args:
        schedule: the noise schedule.
        times, method: as for DPMSolver.sample.

    Returns:
        A float for each network call.
    """
    # TODO: all but the last; with "dpm2" the middles in between.
    ### BEGIN SOLUTION
    asked = []
    for t, s in zip(times, times[1:]):
        asked.append(t)
        if method == "dpm2" and s != -1:
            asked.append(schedule.t_of_lambda((schedule.log_snr(t) + schedule.log_snr(s)) / 2).item())
    return asked
    ### END SOLUTION


# %% check="network_times"
check("network_times")

# %% [markdown] given="propagation_text"
# ### 3.4 The network that seldom looks
# 🔴 the heart of the lab · 6 + 4 + 2 points · 12 min · 1 CPU second
#
# The class below stands where the network stood. Before each run `start()` is called; then `predict` is called once for
# each network call of the run. Three checks:
#
# * **serial** (6 points): at a key step encode, remember `(h, skips)`; at every call decode, with the time *of that call*.
#   Every call is one decoder call, every key step one encoder call.
# * **batched** (4 points): the decoder never sees x. So once the encoder has run, the noise of all calls up to the next key
#   step can be decoded *at once*, with a batch of (number of calls) × B: one decoder call for each key step. The other calls
#   only look up what is already there.
# * **fresh** (2 points): a second run has another x and perhaps another batch size. Nothing of the first may be left.
#
# <details><summary>Hint: attributes</summary>
#
# `start()` sets `self.call = 0`, `self.features = None` and `self.decoded = {}`. Add one to `self.call` at the end of
# `predict`.
# </details>
# <details><summary>Hint: the batch</summary>
#
# For `k` calls: `h.repeat(k, 1, 1, 1)`, each of the skips likewise, and
# `torch.tensor(times).repeat_interleave(B)`; the answer falls apart with `.chunk(k)`.
# </details>


# %% given="encoder_propagation_class"
class EncoderPropagation:
    """A noise predictor whose encoder runs at key steps only (Li et al. 2023).

    Args:
        model: has encode(x, t) -> (h, skips) and decode(h, skips, t) -> eps; t is a tensor [B].
        times: the times of all network calls of a run, in order.
        key_steps: numbers of the calls at which the encoder runs, strictly increasing from 0.
        batched: decode all calls from a key step up to the next at once.
    """

    def __init__(self, model, times: list[float], key_steps: list[int], batched: bool = False):
        self.model = model
        self.times = list(times)
        self.key_steps = list(key_steps)
        self.batched = batched
        self.start()

    def start(self) -> None:
        """Before every run."""
        self.call = 0  # number of the next network call
        self.features = None  # (h, skips) of the last key step
        self.decoded = {}  # call -> noise that was decoded ahead

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self.predict(x, t)


# %% exercise="propagated_prediction"
@add_to_class(EncoderPropagation)
@torch.no_grad()
def predict(self, x: Tensor, t: Tensor) -> Tensor:
    """The noise at the next network call of the run.

    Args:
        x: [B, C, H, W], left unchanged.
        t: the time of this call, a tensor [B]; the same as self.times[number of the call] up to rounding.

    Returns:
        The predicted noise [B, C, H, W]. Serial: the encoder runs at key steps, the decoder at every call. Batched: both
        run at key steps only, the decoder for all calls up to the next key step.
    """
    # TODO: encode at key steps; decode, now or ahead; count the call.
    ### BEGIN SOLUTION
    call, self.call = self.call, self.call + 1
    if call in self.key_steps:
        self.features = self.model.encode(x, t)
        if self.batched:
            end = min([k for k in self.key_steps if k > call], default=len(self.times))
            count = end - call
            ahead = torch.tensor(self.times[call:end], dtype=torch.float64, device=x.device).repeat_interleave(len(x))
            h, skips = self.features
            noises = self.model.decode(h.repeat(count, 1, 1, 1), [s.repeat(count, 1, 1, 1) for s in skips], ahead)
            self.decoded = dict(enumerate(noises.chunk(count), call))
    if self.batched:
        return self.decoded[call]
    return self.model.decode(*self.features, t)
    ### END SOLUTION


# %% check="propagation_serial"
check("propagation_serial")

# %% check="propagation_batched"
check("propagation_batched")

# %% check="propagation_fresh"
check("propagation_fresh")

# %% [markdown] given="inject_noise_text"
# ### 3.5 A little of the first noise
# 🟢 easy · 2 points · 3 min · under 1 CPU second
#
# Reused features lose fine texture. Li et al. put a little of the noise that the run started from back into the state, in
# the second half of the way: $x \leftarrow x + \gamma\,x_T$ wherever $t < T/2$, with $\gamma = 0.003$, *before* the network
# is asked. Elsewhere x stays as it is.


# %% exercise="inject_noise"
def inject_noise(x: Tensor, t: float, x_T: Tensor, num_timesteps: int, strength: float = 0.003) -> Tensor:
    """The state that the next step starts from.

    Args:
        x: x_t, [B, C, H, W], left unchanged.
        t: its time.
        x_T: the noise that the run started from, [B, C, H, W].
        num_timesteps: T.
        strength: gamma.

    Returns:
        x + strength * x_T where t < T/2, else x.
    """
    # TODO: one line.
    ### BEGIN SOLUTION
    return x + strength * x_T if t < num_timesteps / 2 else x
    ### END SOLUTION


# %% check="inject_noise"
check("inject_noise")

# %% [markdown] given="faster_sample_text"
# ### 3.6 All together
# 🟡 medium · 4 points · 5 min · 1 CPU second
#
# Any of your solvers, on a network that seldom looks. Bad arguments are refused before the network is asked anything.


# %% exercise="faster_sample"
@torch.no_grad()
def faster_sample(
    model,
    schedule: NoiseSchedule,
    x_T: Tensor,
    times: list[float],
    method: str,
    key_steps: list[int],
    batched: bool = False,
    strength: float = 0.0,
) -> Tensor:
    """DPMSolver.sample (eta = 0) with encoder propagation.

    Args:
        model: has encode and decode.
        schedule: its noise schedule.
        x_T, times, method: as for DPMSolver.sample.
        key_steps: numbers of the network calls at which the encoder runs; with "dpm2" calls in the middle count, too.
        batched: as for EncoderPropagation.
        strength: of the noise injected before every step at t < T/2; 0 for none.

    Returns:
        Samples [B, C, H, W].

    Raises:
        ValueError: for an unknown method, or key steps that cannot be used.
    """
    # TODO: hold_key_steps, EncoderPropagation, DPMSolver, inject_noise.
    ### BEGIN SOLUTION
    asked = network_times(schedule, times, method)
    network = EncoderPropagation(model, asked, hold_key_steps(key_steps, len(asked)), batched)
    return DPMSolver(network, schedule).sample(
        x_T, times, method, on_state=lambda x, t: inject_noise(x, t, x_T, schedule.num_timesteps, strength)
    )
    ### END SOLUTION


# %% check="faster_sample"
check("faster_sample")

# %% [markdown] given="saving_text"
# ### 3.7 What it should save
# 🟢 easy · 2 points · 3 min · under 1 CPU second


# %% exercise="theoretical_saving"
def theoretical_saving(num_calls: int, num_keys: int, encoder_share: float) -> float:
    """The fraction of the network's cost that encoder propagation saves, (1 - K/N) f.

    Args:
        num_calls: N.
        num_keys: K, from 1 to N.
        encoder_share: f, the encoder's share of the cost of a whole call, from 0 to 1.

    Returns:
        A plain float, 0 for K = N.

    Raises:
        ValueError: for a num_keys or an encoder_share out of range.
    """
    # TODO: the formula at the head of this part.
    ### BEGIN SOLUTION
    if not 1 <= num_keys <= num_calls:
        raise ValueError(f"num_keys must lie between 1 and {num_calls}, got {num_keys}")
    if not 0 <= encoder_share <= 1:
        raise ValueError(f"encoder_share must lie between 0 and 1, got {encoder_share}")
    return (1 - num_keys / num_calls) * encoder_share
    ### END SOLUTION


# %% check="theoretical_saving"
check("theoretical_saving")

# %% [markdown] given="table_text"
# ### 3.8 The table
# Everything in one table, in the form of the project report that this lab follows: method, network calls, quality, seconds
# and saving. Quality needs a thousand digits a row, so it was measured beforehand, with this lab's solution (`difflab
# solver-table`). Seconds and the encoder's share $f$ are measured here, on your machine, with *your* functions, in turns.

# %% tags=["demo", "nbval-ignore-output"]
table, few = solver_table(), x_T[:4]
with torch.no_grad():
    t_half = torch.full((len(few),), 500.0)
    whole_call, encoder = measure_in_turns([lambda: model(few, t_half), lambda: model.encode(few, t_half)], repeats=31)
share = encoder.median / whole_call.median
print(f"the encoder's share f of a network call: {share:.2f}\n")


def runner(row):
    """How to draw four digits as a row of the table does."""
    times = time_grid(schedule, row.steps, row.spacing)
    if row.keys == "all":
        return lambda: DPMSolver(model, schedule).sample(few, times, row.method, row.eta)
    kind, _, num_keys = row.keys.partition("-")
    keys = key_schedule(row.network_calls, kind, int(num_keys or 1))
    return lambda: faster_sample(model, schedule, few, times, row.method, keys, strength=row.strength)


def encoder_calls(row):
    """K of a row."""
    kind, _, num_keys = row.keys.partition("-")
    return row.network_calls if kind == "all" else len(key_schedule(row.network_calls, kind, int(num_keys or 1)))


print(f"{'':54} {'':>6} {'':>5} {'recog-':>8} {'':>8} {'saving':>9} {'(1−K/N)f':>9}")
print(f"{'method':54} {'N / K':>6} {'n':>5} {'Fréchet':>8} {'nised, %':>8} {'seconds':>8}")
plain = {}
for row in table.rows:
    draw, kind = runner(row), (row.method, row.network_calls, row.spacing, row.eta)
    n_k, quality_of = f"{row.network_calls}/{encoder_calls(row)}", f"{row.frechet:8.1f} {100 * row.recognised:8.1f}"
    if row.keys == "all":
        plain[kind] = draw
        seconds = measure_in_turns([draw], repeats=3)[0].median
        print(f"{row.label:54} {n_k:>6} {row.n:5} {quality_of} {seconds:8.2f}")
        continue
    without, propagated = measure_in_turns([plain.get(kind) or runner(replace(row, keys="all")), draw], repeats=3)
    saved = 100 * (1 - propagated.median / without.median)
    promised = 100 * theoretical_saving(row.network_calls, encoder_calls(row), share)
    print(f"{row.label:54} {n_k:>6} {row.n:5} {quality_of} {propagated.median:8.2f} {saved:7.0f} % {promised:7.0f} %")

# %% [markdown] given="drift_text"
# ### 3.9 Too much of it
# One noise, one solver, fewer and fewer key steps. First texture goes. Then a digit becomes *another* digit: the path was
# decided by what the encoder saw, and it did not look. The report that this lab follows calls it semantic drift.

# %% tags=["demo", "nbval-ignore-output"]
grid, drawn = time_grid(schedule, 20, "quadratic"), {}
for name, keys in (
    ("all 20 key", list(range(20))), ("paper's, 7 key", key_schedule(20, "paper")), ("7 key", key_schedule(20, "uniform", 7)),
    ("5 key", key_schedule(20, "uniform", 5)), ("3 key", key_schedule(20, "uniform", 3)), ("2 key", key_schedule(20, "uniform", 2)),
):  # fmt: skip
    drawn[name] = faster_sample(model, schedule, x_T, grid, "dpm++2m", keys)
    distance = (drawn[name] - drawn["all 20 key"]).square().mean().sqrt().item()
    print(f"{name:15} root mean square distance from the plain run {distance:.3f}")
plots.show_images(drawn)

# %% tags=["demo", "nbval-ignore-output"]
whole_times, drawn = time_grid(schedule, 50, "time"), {}
reference = DPMSolver(model, schedule).sample(x_T, whole_times, "dpm1")
print("DDIM with 50 steps and 9 key steps; distance from the plain run")
for name, keys in (("the paper's", key_schedule(50, "paper")), ("uniform", key_schedule(50, "uniform", 9))):
    for strength in (0.0, 0.003):
        label = f"{name}, noise {strength:g}"
        drawn[label] = faster_sample(model, schedule, x_T, whole_times, "dpm1", keys, strength=strength)
        print(f"{label:24} {(drawn[label] - reference).square().mean().sqrt():.3f}")
plots.show_images(drawn)

# %% [markdown] given="source_savings"
# > #### 🔍 Check the source: "24–41 %"
# > The report's table, and its claim that encoder propagation "significantly reduced sampling time by approximately
# > 24–41 %". Compute the savings yourself. Then look at the three *plain* rows: what does one network call cost in each?


# %% tags=["demo", "nbval-ignore-output"]
report_seconds = {
    "DDIM": (50, 1.5189, 1.1081),
    "DPM-Solver": (20, 2.1566, 0.6856),
    "DPM-Solver++": (20, 0.6337, 0.4942),
}
for name, (steps, plain_seconds, with_propagation) in report_seconds.items():
    print(
        f"{name:13} saved {100 * (1 - with_propagation / plain_seconds):5.1f} %; "
        f"a plain step costs {1000 * plain_seconds / steps:.1f} ms, with propagation {1000 * with_propagation / steps:.1f} ms"
    )
honest = 1 - report_seconds["DPM-Solver"][2] / report_seconds["DPM-Solver++"][1]
print(f"DPM-Solver with propagation against the plain DPM-Solver++ of as many steps: {100 * honest:.1f} % saved")
print(f"to save 68.2 % with 7 of 20 key steps the encoder would have to be {0.682 / (1 - 7 / 20):.2f} of the network")

# %% [markdown] given="source_savings_answer"
# > 27.0, 68.2 and 22.0 %: none of them is 24, and none 41. The 68.2 % stand on one number: a plain DPM-Solver step costs
# > more than three times what the same U-Net costs under the two other solvers, and no solver's own arithmetic does. Most
# > likely that run met another load, or a first call that was slow; the report gives no spread, so nobody can tell. Beside
# > DPM-Solver++, which makes as many network calls, it saves nothing. And $(1-K/N)\,f$ cannot reach 68 %: the encoder would
# > have to cost more than the whole network. A claim that exceeds its own bound is a measurement error, not a result.

# %% [markdown] given="part4"
# ---
# ## Part 4 · The same on Stable Diffusion
# 30 minutes · 14 points
#
# Stable Diffusion 1.5 is a U-Net with 860 million weights that removes noise from *latents* `[B, 4, 64, 64]`; a text
# encoder tells it what to paint, an image decoder turns the last latents into a picture (Rombach et al. 2022). Nothing
# in encoder propagation (Li et al. 2023) needs that U-Net to be trained anew. In this part you take the U-Net of the
# library *diffusers* apart, put the propagated loop around it, and measure what comes out with FID and CLIP score.
#
# **No download.** Where this machine has the weights, in a folder or in the Hugging Face cache, everything below runs
# with them. Elsewhere a tiny pipeline with *random* weights takes their place: its pictures are noise, yet it is built
# of the same classes, so all that must hold *exactly* can be seen on it: with every step a key step the propagated loop
# gives what the plain pipeline gives, and decoding one by one gives what decoding together gives.
#
# | name | shape | meaning |
# |---|---|---|
# | `x`, `x_T` | `[B, 4, h, w]` | latents |
# | `t` | LongTensor `[B]` | a timestep for each of them, 0 … 999 |
# | `text`, `null_text` | `[B, L, D]` | what the text encoder makes of the prompt, and of the empty prompt |
# | `h`, `skips` | a tensor, a list of tensors, each `[B, …]` | what the encoder half hands to the decoder half |
# | `key_steps` | list of ints | numbers of the steps, counted from 0, at which the encoder runs |

# %% given="part4_setup"
import json
from pathlib import Path

from difflab.stable_diffusion import (
    SCHEDULE,
    Clip,
    RandomFeatures,
    image_batches,
    inception_features,
    latents_to_images,
    require_acceleration,
    save_coco,
    save_images,
    save_tiny_pipeline,
    tiny_pipeline,
)

try:
    require_acceleration()
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.multimodal.clip_score import CLIPScore
except ModuleNotFoundError as error:
    print(error)  # the other parts of the lab run without

# %% [markdown] given="load_stable_diffusion_text"
# ### 4.1 The weights, if they are there
# 🟢 easy · 1 point · 3 min · 2 CPU seconds
#
# `StableDiffusionPipeline.from_pretrained(source, …)` takes a folder or a name in the Hugging Face cache. With
# `local_files_only=True` it never asks the network; what it cannot find it answers with an `OSError`, or with a
# `ValueError` where the name can be no model's. The safety checker is another 1.2 GB and no part of this lab:
# `safety_checker=None, requires_safety_checker=False`.
#
# To get the weights, some 4 GB, once and outside of this notebook:
# `python -c "from diffusers import StableDiffusionPipeline as P; P.from_pretrained('stable-diffusion-v1-5/stable-diffusion-v1-5')"`.


# %% exercise="load_stable_diffusion"
def load_stable_diffusion(source: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"):
    """Stable Diffusion from this machine, else the tiny pipeline; the network is never asked.

    Args:
        source: a folder with a pipeline, or the name of one in the Hugging Face cache.

    Returns:
        (pipeline, line): the pipeline, and one line of text (no line break) for whoever runs the notebook. It holds
        `source`; if the weights are not there, the pipeline is `tiny_pipeline()`, and the line also holds the word
        "random" and says what to do.
    """
    # TODO: try source; fall back on tiny_pipeline().
    ### BEGIN SOLUTION
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(
            source, local_files_only=True, safety_checker=None, requires_safety_checker=False
        )
    except (OSError, ValueError):
        return tiny_pipeline(), (
            f"No weights of {source} on this machine: a tiny pipeline with random weights takes their place, and its images "
            "are noise. For real ones pass the folder that holds them, or download them as 4.1 says."
        )
    return pipeline, f"Stable Diffusion from {source}"
    ### END SOLUTION


# %% given="pipeline_probe"
class PipelineProbe:
    """What the checks ask of `load_stable_diffusion`."""

    def __init__(self, source: str):
        self.pipeline, self.line = load_stable_diffusion(source)

    def message(self) -> str:
        """The line."""
        return self.line

    @torch.no_grad()
    def noise(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """What the pipeline's U-Net sees in x [B, 4, h, w]."""
        return self.pipeline.unet(x, t, text).sample


# %% check="load_stable_diffusion"
check("load_stable_diffusion")

# %% [markdown] given="make_scheduler_text"
# ### 4.2 A scheduler by name
# 🟢 easy · 1 point · 3 min · under 1 CPU second
#
# In diffusers the sampler is called *scheduler*: `scheduler.set_timesteps(num_steps)` decides on
# `scheduler.timesteps`, and `scheduler.step(eps, t, x).prev_sample` is one step. Its options decide as much as its name, so
# they are pinned here, all of them on top of Stable Diffusion's noise schedule, which `SCHEDULE` holds:
#
# | name | class | options besides `**SCHEDULE` |
# |---|---|---|
# | `"ddim"` | `DDIMScheduler` | `clip_sample=False`: latents do not end at ±1; `set_alpha_to_one=False`: the last step goes to $\bar\alpha_0$, as Stable Diffusion was tuned |
# | `"dpm-solver"` | `DPMSolverMultistepScheduler` | `algorithm_type="dpmsolver"`, `final_sigmas_type="sigma_min"`: it solves for ε and cannot end at σ = 0 |
# | `"dpm-solver++"` | `DPMSolverMultistepScheduler` | `algorithm_type="dpmsolver++"`, `final_sigmas_type="zero"`: it solves for $x_0$ |
#
# Both DPM-Solvers are multistep and of `solver_order=2`. Anything else is a `ValueError` that names the three.


# %% exercise="make_scheduler"
def make_scheduler(name: str):
    """A diffusers scheduler with the options pinned in the table above.

    Args:
        name: "ddim", "dpm-solver" or "dpm-solver++".

    Raises:
        ValueError: for any other name; the message holds the three names.
    """
    # TODO: one of the two classes, with SCHEDULE and its own options.
    ### BEGIN SOLUTION
    makers = {
        "ddim": lambda: DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False),
        "dpm-solver": lambda: DPMSolverMultistepScheduler(
            **SCHEDULE, algorithm_type="dpmsolver", solver_order=2, final_sigmas_type="sigma_min"
        ),
        "dpm-solver++": lambda: DPMSolverMultistepScheduler(
            **SCHEDULE, algorithm_type="dpmsolver++", solver_order=2, final_sigmas_type="zero"
        ),
    }
    if name not in makers:
        raise ValueError(f"there is no scheduler {name!r}; choose one of {', '.join(makers)}")
    return makers[name]()
    ### END SOLUTION


# %% given="scheduler_probe"
class SchedulerProbe:
    """What the checks ask of `make_scheduler`."""

    def __init__(self, name: str):
        self.scheduler = make_scheduler(name)

    def walk(self, x: Tensor, noises: list[Tensor]) -> list:
        """[timesteps, states]: as many steps as there are predicted noises, from x [B, 4, h, w]."""
        self.scheduler.set_timesteps(len(noises))
        states = [x]
        for t, eps in zip(self.scheduler.timesteps, noises):
            states.append(self.scheduler.step(eps, t, states[-1]).prev_sample)
        return [self.scheduler.timesteps, states[1:]]


# %% check="make_scheduler"
check("make_scheduler")

# %% [markdown] given="unet_halves_text"
# ### 4.3 The U-Net in two halves
# 🔴 needs reading · 3 points · 8 min · 1 CPU second
#
# A `UNet2DConditionModel` (here: `unet`) does this. The line marks where your `encode` ends and your `decode` begins.
#
# ```
# t ──▶ unet.get_time_embed(sample=…, timestep=t) ──▶ unet.time_embedding ──▶ emb
# x ──▶ unet.conv_in ──▶ the blocks of unet.down_blocks ──▶ unet.mid_block ──▶ h           each is given emb, and text
#            │                  │ a few                                                   if it has cross-attention
#            └──────── skips ───┘
# ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────
# h, skips ──▶ the blocks of unet.up_blocks ──▶ unet.conv_norm_out ──▶ unet.conv_act ──▶ unet.conv_out ──▶ eps
# ```
#
# * `skips` starts with what `conv_in` gives; each down block returns `(h, several skips)`, which are appended in order.
# * Each up block takes the *last* `len(block.resnets)` skips that are left, as a tuple, in the order they have in the list.
# * `decode` needs a time embedding of its own: that of the `t` it is given, not of the one the skips come from.
# * The lists you are given stay as they are: the same skips will be decoded again at the next step.
#
# <details><summary>Hint: how a block is called</summary>
#
# Arguments by name: `hidden_states=h, temb=emb`, for an up block also `res_hidden_states_tuple=…`. A block with
# `getattr(block, "has_cross_attention", False)` also takes `encoder_hidden_states=text`. `mid_block` takes `h` and `emb`
# first, and `encoder_hidden_states=text`.
# </details>
# <details><summary>Hint: latents of an odd size</summary>
#
# Down from 5 pixels are 3, up from 3 are 6. Every up block but the last therefore takes `upsample_size`, the height and
# width of the last of the skips that are left for the next block. Giving it always is right, too.
# </details>
# <details><summary>Hint: where to look</summary>
#
# `UNet2DConditionModel.forward??` shows the source. Of its many branches Stable Diffusion 1.5 takes few: no class labels, no
# masks, no ControlNet, no adapters.
# </details>


# %% given="split_unet_class"
class SplitUNet:
    """A `UNet2DConditionModel` in two halves.

    Args:
        unet: as in Stable Diffusion 1.5: text, but no class labels or other conditions.
    """

    def __init__(self, unet):
        self.unet = unet

    @torch.no_grad()
    def propagate(self, x: Tensor, t_key: Tensor, timesteps: list[Tensor], text: Tensor) -> list[Tensor]:
        """eps at each of `timesteps` (each a LongTensor [B]), all decoded from the features of x at t_key."""
        h, skips = self.encode(x, t_key, text)
        return [self.decode(h, skips, t, text) for t in timesteps]


# %% exercise="unet_halves"
@add_to_class(SplitUNet)
def encode(self, x: Tensor, t: Tensor, text: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The half that looks: conv_in, down blocks, middle block.

    Args:
        x: latents [B, C, h, w].
        t: timesteps, LongTensor [B].
        text: [B, L, D].

    Returns:
        (h, skips): the middle block's output, and the list of all skips.
    """
    # TODO: the upper half of the drawing.
    ### BEGIN SOLUTION
    unet = self.unet
    emb = unet.time_embedding(unet.get_time_embed(sample=x, timestep=t))
    h = unet.conv_in(x)
    skips = [h]
    for block in unet.down_blocks:
        more = {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}
        h, several = block(hidden_states=h, temb=emb, **more)
        skips += several
    return unet.mid_block(h, emb, encoder_hidden_states=text), skips
    ### END SOLUTION


@add_to_class(SplitUNet)
def decode(self, h: Tensor, skips: list[Tensor], t: Tensor, text: Tensor) -> Tensor:
    """The half that paints: up blocks, norm, activation, conv_out.

    Args:
        h, skips: what `encode` returned, possibly at another timestep; left unchanged.
        t: the timesteps to decode for, LongTensor [B].
        text: [B, L, D].

    Returns:
        The predicted noise [B, C, h, w].
    """
    # TODO: the lower half of the drawing.
    ### BEGIN SOLUTION
    unet, skips = self.unet, list(skips)
    emb = unet.time_embedding(unet.get_time_embed(sample=h, timestep=t))
    for block in unet.up_blocks:
        count = len(block.resnets)
        skips, taken = skips[:-count], tuple(skips[-count:])
        more = {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}
        if skips:
            more["upsample_size"] = skips[-1].shape[2:]
        h = block(hidden_states=h, temb=emb, res_hidden_states_tuple=taken, **more)
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(h)))
    ### END SOLUTION


# %% check="unet_halves"
check("unet_halves")

# %% [markdown] given="propagated_sampling_text"
# ### 4.4 The propagated loop, with guidance
# 🔴 hard · 6 points from three checks · 12 min · 1 CPU second
#
# **Classifier-free guidance** (Ho and Salimans 2022) asks the network twice, with the prompt and with the empty prompt,
# and goes further in the direction in which the two differ, with guidance scale $w$:
#
# $$\hat\epsilon = \epsilon(x_t, t, \text{null}) + w\,\bigl(\epsilon(x_t, t, \text{text}) - \epsilon(x_t, t, \text{null})\bigr).$$
#
# Both are asked in *one* call with a batch of `2B`: `x` twice, and both texts. Without `null_text` there is no guidance:
# a batch of `B`, and $\hat\epsilon = \epsilon(x_t, t, \text{text})$.
#
# For each step `i`, with `t = scheduler.timesteps[i]`:
#
# 1. *Noise injection*: if `t < T/2`, put `x + injection * x_T` in the place of `x`. ($T$ is
#    `scheduler.config.num_train_timesteps`.) It brings back fine texture that propagation smooths away.
# 2. If `i` is a key step, `encode` x at t, and keep what it returns.
# 3. `decode` what was kept, at t; guidance; `scheduler.step`.
#
# **Together.** The decoder sees `h`, `skips`, `t` and the text, but never x. So as soon as the encoder has run at a key
# step, the noise of all steps up to the next key step can be decoded in *one* call, with a batch of `run · 2B`; only the
# scheduler's steps still come one after the other. That is `batched=True`: one call of `decode` for each key step.
#
# Call `scheduler.set_timesteps` at the start of each `sample`: that also makes a multistep solver forget the last run.
#
# <details><summary>Hint: the batch of a run</summary>
#
# A run of `k` steps, each with `n` rows: `h.repeat(k, 1, 1, 1)` goes with `timesteps.repeat_interleave(n)`, and the answer
# falls apart with `.chunk(k)`. Skips and text are repeated as `h` is; mind the number of their dimensions.
# </details>
# <details><summary>Hint: one loop for both</summary>
#
# Split the steps into runs, each from a key step up to the next. In each run: inject, encode, decode (one by one or
# together), then step. With `batched`, the first step's injection comes before the encoder, those of the others before
# their own scheduler step.
# </details>


# %% given="propagated_sampler_class"
class PropagatedSampler:
    """Sampling with a diffusers scheduler in which the encoder runs at key steps only (Li et al. 2023).

    Args:
        network: has encode(x, t, text) -> (h, skips) and decode(h, skips, t, text) -> eps, as `SplitUNet`.
        scheduler: what `make_scheduler` returns.
    """

    def __init__(self, network, scheduler):
        self.network = network
        self.scheduler = scheduler


class Halves:
    """A network made of two functions: `PropagatedSampler` asks no more of one."""

    def __init__(self, encode, decode):
        self.encode, self.decode = encode, decode


# %% exercise="propagated_sampling"
@add_to_class(PropagatedSampler)
@torch.no_grad()
def sample(
    self,
    x_T: Tensor,
    text: Tensor,
    null_text: Tensor | None = None,
    *,
    num_steps: int = 50,
    key_steps: list[int] | None = None,
    guidance_scale: float = 7.5,
    injection: float = 0.0,
    batched: bool = False,
) -> Tensor:
    """Latents from noise.

    Args:
        x_T: noise [B, C, h, w], left unchanged.
        text, null_text: [B, L, D], of the prompts and of the empty prompt; without the latter there is no guidance.
        num_steps: steps of the scheduler.
        key_steps: the steps at which the encoder runs, strictly increasing from 0, all below num_steps; None for all.
        guidance_scale: w.
        injection: what is added at every t < T/2, in multiples of x_T.
        batched: decode all steps from a key step up to the next in one call.

    Returns:
        The latents after the last step, [B, C, h, w].

    Raises:
        ValueError: if key_steps is empty, does not start with 0, is not strictly increasing or leaves 0 … num_steps − 1;
            before the network is asked anything.
    """
    # TODO: check key_steps; then the loop above.
    ### BEGIN SOLUTION
    key_steps = list(range(num_steps)) if key_steps is None else list(key_steps)
    if key_steps[:1] != [0] or key_steps[-1] >= num_steps or any(a >= b for a, b in zip(key_steps, key_steps[1:])):
        raise ValueError(
            f"key_steps must rise strictly from 0 and stay below num_steps = {num_steps}; got {key_steps}: "
            "step 0 has no earlier features to reuse"
        )
    guided = null_text is not None
    both = torch.cat([null_text, text]) if guided else text
    rows = len(both)
    self.scheduler.set_timesteps(num_steps, device=x_T.device)
    timesteps = self.scheduler.timesteps
    halfway = self.scheduler.config.num_train_timesteps / 2

    def guide(eps: Tensor) -> Tensor:
        if not guided:
            return eps
        null, prompted = eps.chunk(2)
        return null + guidance_scale * (prompted - null)

    def decode_together(h: Tensor, skips: list[Tensor], run: Tensor):
        k = len(run)
        repeated = [torch.cat([skip] * k) for skip in skips]
        t = run.repeat_interleave(rows)
        return self.network.decode(torch.cat([h] * k), repeated, t, torch.cat([both] * k)).chunk(k)

    x = x_T
    for start, end in zip(key_steps, [*key_steps[1:], num_steps]):
        run = timesteps[start:end]
        for i, t in enumerate(run):
            if t < halfway:
                x = x + injection * x_T
            if i == 0:
                h, skips = self.network.encode(torch.cat([x, x]) if guided else x, t.expand(rows), both)
                noises = decode_together(h, skips, run) if batched else None
            eps = noises[i] if batched else self.network.decode(h, skips, t.expand(rows), both)
            x = self.scheduler.step(guide(eps), t, x).prev_sample
    return x
    ### END SOLUTION


# %% [markdown] given="propagated_sampling_checks"
# The first check looks at the loop, one decoder call for each step (3 points); the second at `batched=True` (2 points); the
# third puts your two halves and your loop together and compares with diffusers' own pipeline (1 point).

# %% check="propagated_sampling"
check("propagated_sampling")

# %% check="batched_decoding"
check("batched_decoding")

# %% check="same_as_pipeline"
check("same_as_pipeline")

# %% tags=["demo"]
require_acceleration()
pipeline, line = load_stable_diffusion()
print(line)
real = "random weights" not in line
pipeline = pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
prompts = ["a red bus in front of a church", "a cat asleep on a keyboard", "two surfers wait for a wave"]
text, null_text = pipeline.encode_prompt(prompts, pipeline.device, 1, do_classifier_free_guidance=True)
side = pipeline.unet.config.sample_size
x_T_latent = torch.randn(len(prompts), 4, side, side, generator=torch.Generator().manual_seed(0)).to(pipeline.device)
# Dense early on, where Li et al. see the encoder's features change fastest. For 50 steps these are their key steps.
KEY_STEPS = {50: [0, 1, 2, 3, 5, 10, 15, 25, 35], 20: [0, 1, 2, 3, 5, 8, 12, 16], 10: [0, 1, 3, 6]}
print(f"U-Net: {sum(p.numel() for p in pipeline.unet.parameters()):,} weights, latents {list(x_T_latent.shape)}")

# %% tags=["demo", "nbval-ignore-output"]
require_acceleration()
split = SplitUNet(pipeline.unet)
latents = {}
print(f"{'':28}{'encoder':>9}{'decoder':>9}{'seconds':>9}   largest difference from the plain pipeline")
for name in ("ddim", "dpm-solver", "dpm-solver++"):
    num_steps = (50 if name == "ddim" else 20) if real else (20 if name == "ddim" else 10)
    sampler = PropagatedSampler(split, make_scheduler(name))
    pipeline.scheduler = make_scheduler(name)
    given = {"latents": x_T_latent, "prompt_embeds": text, "negative_prompt_embeds": null_text, "output_type": "latent"}
    start = time.perf_counter()
    plain = pipeline(num_inference_steps=num_steps, guidance_scale=7.5, **given).images
    print(f"{name + f', {num_steps} steps':28}{num_steps:9}{num_steps:9}{time.perf_counter() - start:9.2f}")
    latents[name] = plain
    ways = {
        "all steps key": {},
        "propagated": {"key_steps": KEY_STEPS[num_steps]},
        "propagated, batched": {"key_steps": KEY_STEPS[num_steps], "batched": True},
        "propagated, noise injected": {"key_steps": KEY_STEPS[num_steps], "injection": 0.003},
    }
    for way, options in ways.items():
        start = time.perf_counter()
        result = sampler.sample(x_T_latent, text, null_text, num_steps=num_steps, **options)
        seconds, keys = time.perf_counter() - start, len(options.get("key_steps", range(num_steps)))
        decoders = keys if "batched" in options else num_steps
        off = (result - plain).abs().max() / plain.abs().max()
        print(f"  {way:26}{keys:9}{decoders:9}{seconds:9.2f}   {off:.1e}")
        latents[f"{name}, {way}"] = result
    serial, together = latents[f"{name}, propagated"], latents[f"{name}, propagated, batched"]
    print(f"  {'serial against batched':53}   {(serial - together).abs().max() / serial.abs().max():.1e}")

# %% [markdown] given="propagated_sampling_answer"
# *All steps key* differs from the plain pipeline by nothing, or by rounding; batched and serial differ by rounding. What
# propagation itself changes depends on the weights: how fast do the encoder's features turn? You measured that for the
# digits in this lab; random weights have nothing to say about Stable Diffusion. The seconds are those of this
# machine and this U-Net; count calls for what carries over, and let the encoder's share of a call's cost say how much an
# encoder call is worth.

# %% [markdown] given="read_coco_text"
# ### 4.5 Images and captions in COCO's layout
# 🟢 easy · 1 point · 3 min · under 1 CPU second
#
# The validation set of COCO 2017 (Lin et al. 2014; captions by Chen et al. 2015) unpacks to
#
# ```
# FOLDER/val2017/000000000139.jpg …                                  5000 images
# FOLDER/annotations/captions_val2017.json                           {"images": […], "annotations": […], …}
# ```
#
# An entry of `"images"` has an `"id"` and a `"file_name"`, one of `"annotations"` has an `"id"`, an `"image_id"` and a
# `"caption"`. Neither list is in the order of the other, and ids have gaps: only ids join them.
#
# > #### 🔍 Check the source: one caption an image?
# > The report that this lab follows says that each of the 5000 images has "a single human-written caption". Every COCO image has
# > at least five; whoever takes one of them as the prompt should say which. Your function returns them all.


# %% exercise="read_coco"
def read_coco(folder: str) -> list[tuple[str, list[str]]]:
    """Images and captions of a folder in the layout of COCO 2017's validation set.

    Args:
        folder: holds val2017/ and annotations/captions_val2017.json.

    Returns:
        (path of the image's file, its captions) for each entry of "images", in the order of the images' ids; the
        captions in the order of the annotations' ids.

    Raises:
        FileNotFoundError: if the file of captions is not there; the message names it.
    """
    # TODO: read the JSON file; join by image_id; sort.
    ### BEGIN SOLUTION
    file = Path(folder) / "annotations" / "captions_val2017.json"
    if not file.is_file():
        raise FileNotFoundError(f"no {file}: unpack COCO 2017's val2017.zip and annotations_trainval2017.zip there")
    content = json.loads(file.read_text(encoding="utf-8"))
    captions = {image["id"]: [] for image in content["images"]}
    for annotation in sorted(content["annotations"], key=lambda a: a["id"]):
        captions[annotation["image_id"]].append(annotation["caption"])
    images = sorted(content["images"], key=lambda image: image["id"])
    return [(str(Path(folder) / "val2017" / image["file_name"]), captions[image["id"]]) for image in images]
    ### END SOLUTION


# %% check="read_coco"
check("read_coco")

# %% [markdown] given="folder_fid_text"
# ### 4.6 FID of two folders
# 🟢 easy · 1 point · 4 min · 1 CPU second
#
# The Fréchet inception distance (Heusel et al. 2017) compares mean and covariance of image features, $\mu, \Sigma$ of one
# folder with $\mu', \Sigma'$ of the other:
#
# $$\mathrm{FID} = \lVert\mu-\mu'\rVert^2 + \operatorname{tr}\bigl(\Sigma + \Sigma' - 2\,(\Sigma\Sigma')^{1/2}\bigr).$$
#
# `FrechetInceptionDistance(feature=module)` of torchmetrics keeps the sums: `metric.update(images, real=True)` for a batch of
# real images, `real=False` for generated ones, `metric.compute()` at the end. `image_batches(folder, size, batch_size)`
# yields the images of a folder, uint8 `[≤ batch_size, 3, size, size]`, the last batch often smaller.


# %% exercise="folder_fid"
def folder_fid(real: str, generated: str, features, *, size: int = 64, batch_size: int = 32) -> float:
    """Fréchet distance of all images in two folders.

    Args:
        real, generated: folders with images.
        features: a module from uint8 images [B, 3, size, size] to features [B, D].
        size: images are scaled and cut to size × size.
        batch_size: how many at once.

    Returns:
        The distance, a plain float.
    """
    # TODO: one metric, two folders, all batches.
    ### BEGIN SOLUTION
    metric = FrechetInceptionDistance(feature=features)
    for folder, is_real in ((real, True), (generated, False)):
        for images in image_batches(folder, size, batch_size):
            metric.update(images, real=is_real)
    return metric.compute().item()
    ### END SOLUTION


# %% check="folder_fid"
check("folder_fid")

# %% [markdown] given="clip_score_text"
# ### 4.7 Does the image show what the prompt says?
# 🟢 easy · 1 point · 3 min · 1 CPU second
#
# CLIP (Radford et al. 2021) embeds images and texts in one space. The score of an image and its prompt is the cosine of
# their embeddings, times 100 in torchmetrics: `CLIPScore(lambda: (clip, clip.processor))`, then
# `metric.update(images, prompts)` with a batch of images and the list of their prompts, and `metric.compute()`.
#
# > #### 🔍 Check the source: two scales, and two names
# > * The report's CLIP scores are about 0.78. Hessel et al. (2021) define CLIPScore as $2.5 \cdot \max(\cos, 0)$, torchmetrics
# >   as $100 \cdot \max(\cos, 0)$. On the scale of the definition 0.78 is a cosine of 0.31 and would read 31 here; as
# >   $100\cos$ it would be as good as no match at all. A score without its scale is no number.
# > * The report credits FID to Yu et al. (2021), who use it for GANs; it is due to Heusel et al. (2017).


# %% exercise="clip_score"
def clip_score(images: Tensor, prompts: list[str], clip, *, batch_size: int = 16) -> float:
    """CLIP score of images and their prompts, on the scale 100 · cos.

    Args:
        images: uint8 [N, 3, H, W].
        prompts: N texts, one for each image.
        clip: a `Clip`.
        batch_size: how many images at once.

    Returns:
        The mean over all N pairs (torchmetrics gives 0 where it is negative), a plain float.

    Raises:
        ValueError: if there is not exactly one prompt for each image.
    """
    # TODO: a CLIPScore, all batches.
    ### BEGIN SOLUTION
    if len(images) != len(prompts):
        raise ValueError(f"there must be one prompt for each image; got {len(prompts)} for {len(images)} images")
    metric = CLIPScore(lambda: (clip, clip.processor))
    for start in range(0, len(images), batch_size):
        metric.update(images[start : start + batch_size], prompts[start : start + batch_size])
    return metric.compute().item()
    ### END SOLUTION


# %% check="clip_score"
check("clip_score")

# %% tags=["demo", "nbval-ignore-output"]
require_acceleration()
try:
    clip, clip_is_real = Clip("openai/clip-vit-base-patch16"), True
except OSError:
    clip, clip_is_real = Clip(), False
features = inception_features()
features_are_real = features is not None
if not features_are_real:
    features = RandomFeatures(torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
if not (real and clip_is_real and features_are_real):
    names = {"the pipeline": real, "CLIP": clip_is_real, "the features": features_are_real}
    print(f"Random weights in {', '.join(n for n, there in names.items() if not there)}:")
    print("the numbers below mean nothing, they only show that everything runs.")

# The images of the plain pipeline stand for COCO's, written in its layout with five captions each.
words = ("photo of", "there is", "this shows", "look,")
captions = [[prompt, *(f"{start} {prompt}" for start in words)] for prompt in prompts]
coco = save_coco(latents_to_images(pipeline, latents["ddim"]), captions)
pairs = read_coco(coco)
print(f"{len(pairs)} images, the first with {len(pairs[0][1])} captions: {pairs[0][1][:2]} …")
first_captions = [texts[0] for _, texts in pairs]
for name, result in latents.items():
    images = latents_to_images(pipeline, result)
    fid = folder_fid(f"{coco}/val2017", save_images(images), features, size=images.shape[-1])  # saved without loss
    print(f"{name:42} FID {fid:10.3g}   CLIP score {clip_score(images, first_captions, clip):6.2f}")

# %% [markdown] given="part4_answer"
# In the first row images are compared with themselves, once through JPEG: that alone moves FID, so save as the reference is
# saved. Three images make no covariance, and random features no quality. With weights for all three networks, generate one image
# for the first caption of each of COCO's 5000, keep seeds and prompts the same for every sampler, and compare with
# `folder_fid("COCO/val2017", …)`. Before you read anything into a difference between two rows, as between the report's
# 25.25 and 25.04, draw one row again with other seeds: how far does FID move by itself?

# %% [markdown] task="written_analysis" points=10
# ---
# ## Written analysis
# 10 points, read by a person. One page, 300 to 500 words, with numbers and pictures from your own runs:
#
# 1. **Fewer calls.** How few calls gave digits that you would accept, with which solver, and how do you know? What does the
#    stochastic variant buy, what does it cost? Is order 2 the reason?
# 2. **Less work a call.** Does your network satisfy the hypothesis behind encoder propagation? Set what it saved in seconds
#    against $(1-K/N)f$ and against what it did to the digits. Compare it with simply making fewer calls.
# 3. **Or train again?** Distillation trains a *new* model that needs one to four steps (Salimans and Ho 2022; Song et al.
#    2023). Weigh the two: cost of getting it, speed, quality and diversity, what happens when the model, the guidance scale
#    or the solver changes, who can do it. When would you choose which?
#
# === BEGIN MARK SCHEME ===
# | Points | Level |
# |---|---|
# | 9–10 | All three answered from own measurements, with n named; separates network calls from seconds; compares propagation with the honest alternative of fewer calls; states what the feature analysis did and did not show; the comparison with distillation names costs on both sides and says when each wins |
# | 7–8 | All three answered, mostly with evidence; one comparison is missing or one-sided |
# | 4–6 | Two answered with evidence, or all three in general terms |
# | 1–3 | An attempt that shows some understanding of one of the methods |
# | 0 | Nothing, or text unrelated to the runs |
# === END MARK SCHEME ===

# %% [markdown] answer="written_analysis"
# *Your analysis here.*

# %% [markdown] given="code_style_text"
# ## Code quality
# 2 points from this check, 4 from a person
#
# The check reads the functions you have completed, at least half of them: each keeps a docstring, uses every variable it
# assigns, and no name that is not defined; and no `except:` without the name of an error, which would also swallow the
# stop button.

# %% check="propagation_style"
check("propagation_style")

# %% [markdown] task="code_quality" points=4
# ### Code read by a person
# 4 points for the code above; nothing to write here.
#
# === BEGIN MARK SCHEME ===
# | Points | Level |
# |---|---|
# | 4 | Names from the field, steps built on each other instead of repeated formulas, helpers where they help, comments that say why |
# | 3 | Clear on the whole; some repetition, or names that hide what they hold |
# | 1–2 | Works, but is hard to follow |
# | 0 | Not completed, or not readable |
# === END MARK SCHEME ===

# %% [markdown] given="going_further"
# ---
# ## Going further
# For the curious: no points, no checks, no solution.
#
# 1. **Key steps of your own.** Features here change most near $t = 0$. Choose nine key steps of 50 by the measured
#    change: a new one whenever the sum of the relative changes since the last passes a threshold. Does it beat both
#    schedules of 3.1? Test it on noise that you did not tune it on.
# 2. **The other half.** Reuse the *decoder's* deep features and run the shallow encoder afresh (Ma et al. 2024,
#    "DeepCache", do so). What does your table of changes predict?
# 3. **Order 3.** DPM-Solver++ 3M puts a parabola through three estimates. Write it, measure its order, and find out from
#    which number of calls it helps on digits.
# 4. **The dial.** Draw 512 digits with $\eta = 0, 0.5, 1, 1.5$ at 10, 20 and 40 calls. Where does fresh noise begin to pay?

# %% [markdown] given="submit"
# ---
# **Before you hand in:** *Kernel → Restart Kernel and Run All Cells*. Cells whose check does not pass show their hint,
# and the rest runs on. Then save, and submit this `.ipynb` file under its own name.
#
# | What is asked | Where |
# |---|---|
# | DPM-Solver of order 1 and 2, DPM-Solver++ 2M, with noise, the loop, orders on the exact network | 1.1 – 1.6 |
# | Feature analysis: relative change, cosine, principal components, the price of reuse | 2.1 – 2.3 |
# | Encoder propagation: key steps, serial and batched decoding, noise injection, bad input, savings | 3.1 – 3.9 |
# | Stable Diffusion through diffusers: loading, schedulers, halves of the U-Net, guidance, FID, CLIP score | 4.1 – 4.7 |
# | The method against distillation | *Written analysis*, question 3 |
# | Documentation and code quality | *Code quality* |
