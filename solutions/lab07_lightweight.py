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
# # Lab 7 · A lightweight diffusion model
#
# A diffusion model is slow because a large network is called many times. There are three ways out, and this lab takes
# all of them, on one network: **fewer and better steps**, **fewer bits**, **fewer channels**. You write each, measure what
# it saves and what it costs, and put the three together at the end.
#
# | Part | Time | Points |
# |---|---|---|
# | 1 · Samplers: the SDE view, DDIM, momentum | 35 min | 26 |
# | 2 · Quantization: 8, 6 and 4 bits | 50 min | 30 |
# | 3 · Pruning: which channels can go? | 45 min | 26 |
# | Putting it together | 20 min | 12 for your written analysis |
# | Code quality, throughout | | 2, and 4 given by a person |
#
# That is two and a half hours for two people and 100 points.
#
# **How to work.** Each exercise is a cell with a `TODO`. Replace the line that raises `NotImplementedError`, run the
# cell, then run the `check(...)` cell below it. A green line is the points; anything else is a hint. The checks are
# the very ones that grade your hand-in, with new random numbers every time. Add cells of your own wherever you like; the
# cells that are given are put back as they were when your notebook is graded. Any correct program passes.
#
# **A source to argue with.** The lab follows a project report, "Mini Diffusion Model for MNIST". Its three results tables
# are your guide to what can be tried, and several of its formulas and figures do not survive a second look. Boxes marked
# 🔍 take them to the test.
#
# **Conventions.** Timesteps run from $t = 0$ (almost clean) to $T-1$ (almost pure noise);
# $\alpha_t = 1-\beta_t$, $\bar\alpha_t = \prod_{i\le t}\alpha_i$, and $\bar\alpha_{-1} = 1$ is clean data, written $s = -1$.
# The report writes $\alpha$ for $\bar\alpha_t$ in one formula and for $1-\beta_t$ in the next; we never do. Images are
# float32 `[B, 1, 28, 28]` in $[-1, 1]$; the network predicts the noise, `model(x, t)` with `t` a LongTensor `[B]`.
#
# This lab needs a few libraries more than the others: `pip install -e ".[acceleration]"`.

# %% given="setup"
import copy
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from difflab import plots
from difflab.check import check
from difflab.checkpoints import load_pretrained
from difflab.compression_table import compression_table
from difflab.datasets import load_digits
from difflab.metrics import quality
from difflab.notebook import add_to_class, progress
from difflab.schedule import NoiseSchedule
from difflab.timing import measure_in_turns
from difflab.training import held_out_loss
from difflab.unet import UNet

model, schedule = load_pretrained("mnist-small")
digits, labels = load_digits()
print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {schedule}, {len(digits):,} digits")

# %% [markdown] given="part1"
# ---
# ## Part 1 · Samplers
# 35 minutes
#
# ### A stochastic differential equation, in a page
#
# Make the steps of the forward process ever smaller, and it becomes a stochastic differential equation (Song et al. 2021,
# equation 11): with $\beta(t)$ the noise added in a unit of time,
#
# $$\mathrm dx = -\tfrac12\beta(t)\,x\,\mathrm dt + \sqrt{\beta(t)}\,\mathrm dw .$$
#
# The first term shrinks, the second adds noise. Such a process can be run backwards (Anderson 1982) if one knows the
# **score**, the gradient of the log-density of the noisy images:
#
# $$\mathrm dx = \left[-\tfrac12\beta(t)\,x-\beta(t)\,\nabla_x\log p_t(x)\right]\mathrm dt + \sqrt{\beta(t)}\,\mathrm d\bar w,
# \qquad \nabla_x\log p_t(x) \approx -\frac{\epsilon_\theta(x,t)}{\sqrt{1-\bar\alpha_t}} .$$
#
# Time runs backwards here, $\mathrm dt < 0$. A noise predictor is a score estimator, and *sampling is solving this
# equation numerically*. Everything about speed follows from how well that is done with few steps.


# %% given="momentum_sampler_class"
class MomentumSampler:
    """Draws samples by Euler's method, by DDPM and DDIM, and by either with momentum.

    Args:
        model: noise predictor, called as model(x, t) with x [B, C, H, W] and t a LongTensor [B].
        schedule: the noise schedule it was trained with.
    """

    def __init__(self, model, schedule: NoiseSchedule):
        self.model = model
        self.schedule = schedule


# %% [markdown] given="euler_step_text"
# ### 1.1 Euler's method
# 🟢 easy · 5 points · 6 min · 1 CPU second
#
# Take one timestep for the unit of time, freeze everything during a step, and the equation above becomes a rule
# (Euler and Maruyama): from $t$ to $t-1$, with the score written out,
#
# $$x_{t-1} = x_t + \beta_t\left(\tfrac12 x_t - \frac{\epsilon_\theta(x_t,t)}{\sqrt{1-\bar\alpha_t}}\right) + \sqrt{\beta_t}\,z,
# \qquad z\sim\mathcal N(0, I).$$
#
# The last step, from $t = 0$ to clean data, adds no noise.
#
# <details><summary>Hint: how does this differ from DDPM?</summary>
#
# DDPM divides by $\sqrt{1-\beta_t}$, which is $1+\tfrac12\beta_t+\dots$: to first order in $\beta_t$ the two are the same.
# Write the one above.
# </details>


# %% exercise="euler_step"
@add_to_class(MomentumSampler)
@torch.no_grad()
def euler_step(self, x_t: Tensor, t: int) -> Tensor:
    """One Euler-Maruyama step of the reverse SDE, from t to t - 1.

    Args:
        x_t: noisy images [B, C, H, W], left unchanged.
        t: timestep, an int.

    Returns:
        x_{t-1}, [B, C, H, W]; no noise is added at t = 0. One network call is made.
    """
    # TODO: one network call, then the formula above.
    ### BEGIN SOLUTION
    eps = self.model(x_t, torch.full((len(x_t),), t, device=x_t.device))
    beta, alpha_bar = self.schedule.betas[t].item(), self.schedule.alphas_cumprod[t].item()
    x = x_t + beta * (x_t / 2 - eps / math.sqrt(1 - alpha_bar))
    return x + math.sqrt(beta) * torch.randn_like(x) if t > 0 else x
    ### END SOLUTION


# %% check="euler_step"
check("euler_step")

# %% [markdown] given="exact_network_text"
# ### A network that is never wrong
#
# Is a sampler good, or does the network hide its faults? To tell them apart the experiments below use data of which
# everything is known: every pixel is $\mathcal N(-0.7,\ 0.30)$. The best possible noise predictor then has a closed form,
# and whatever sampler is right must end with variance 0.30.


# %% given="exact_network"
class ExactNetwork(nn.Module):
    """The exact noise predictor for data N(mean, variance I)."""

    def __init__(self, schedule: NoiseSchedule, mean: float = -0.7, variance: float = 0.30):
        super().__init__()
        self.schedule, self.mean, self.variance = schedule, mean, variance
        self.placeholder = nn.Parameter(torch.zeros((), dtype=torch.float64), requires_grad=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Predicted noise for x [B, C, H, W] at timesteps t [B]."""
        a = self.schedule.alpha_bar(t).to(x)[:, None, None, None]
        return (1 - a).sqrt() * (x - a.sqrt() * self.mean) / (a * self.variance + 1 - a)


exact = ExactNetwork(schedule)
start = torch.randn(16, 1, 28, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

# %% [markdown] given="source_ddim"
# > #### 🔍 Check the source: is DDIM the DDPM mean without noise?
# > The report obtains DDIM from DDPM's formula by setting $\sigma_t$ to 0: it takes the mean and leaves out the noise.
# > Follow that, Euler's method, and DDPM through 1000 steps of the exact network. Which variances come out?


# %% tags=["demo"]
def mean_alone(x, t):
    """DDPM's posterior mean, nothing added."""
    beta, a = schedule.betas[t].item(), schedule.alphas_cumprod[t].item()
    eps = exact(x, torch.full((len(x),), t))
    return (x - beta / math.sqrt(1 - a) * eps) / math.sqrt(1 - beta)


torch.manual_seed(0)
euler, mean_only = start, start
for t in reversed(range(1000)):
    euler, mean_only = MomentumSampler(exact, schedule).euler_step(euler, t), mean_alone(mean_only, t)
for name, x in {"Euler": euler, "DDPM's mean alone": mean_only}.items():
    print(f"{name:18} mean {x.mean():+.3f}, variance {x.var():.2g}   (true: -0.700, 0.30)")

# %% [markdown] given="source_ddim_answer"
# > Euler's method is close. The mean alone comes to a standstill near the average image: its variance is a hundred
# > thousand times too small. The noise that DDPM adds is not decoration; each step shrinks a little more than the
# > probability flow does and relies on the noise to make up for it. **DDIM is another formula**, not this one with a term
# > crossed out, and this is also why the report's pictures "get corrupted" when its DDIM takes many steps: the more steps
# > of that kind, the closer to the average.

# %% [markdown] given="displacement_text"
# ### 1.2 Distances travelled
# 🟡 medium · 6 points · 8 min · under 1 CPU second
#
# Here is the real one. In the coordinate $\bar x = x/\sqrt{\bar\alpha}$, in which the signal keeps its size and only the
# noise changes, a DDIM step (Song et al. 2021, equations 12 and 13) is a plain displacement. From $t$ to $s<t$:
#
# $$\mathrm d\bar x = \left[\sqrt{\frac{1-\bar\alpha_s-\sigma^2}{\bar\alpha_s}}-\sqrt{\frac{1-\bar\alpha_t}{\bar\alpha_t}}\right]
# \epsilon + \frac{\sigma}{\sqrt{\bar\alpha_s}}\,z,\qquad
# \sigma^2 = \eta^2\,\frac{1-\bar\alpha_s}{1-\bar\alpha_t}\left(1-\frac{\bar\alpha_t}{\bar\alpha_s}\right).$$
#
# $\eta = 0$ is DDIM; $\eta = 1$ on all timesteps *is* DDPM, step for step. So one formula serves both.
#
# <details><summary>Hint: the last step</summary>
#
# `schedule.alpha_bar(-1)` is 1: at $s = -1$ both $1-\bar\alpha_s$ and $\sigma$ vanish.
# </details>


# %% exercise="displacement"
@add_to_class(MomentumSampler)
def displacement(self, eps: Tensor, t: int, s: int, eta: float = 0.0, z: Tensor | None = None) -> Tensor:
    """How far one DDIM step moves x / sqrt(alpha_bar).

    Args:
        eps: the noise predicted at t, [B, C, H, W].
        t, s: timesteps, -1 <= s < t; s = -1 is clean data.
        eta: 0 is DDIM, 1 adds the noise of DDPM.
        z: the standard normal noise to use, [B, C, H, W]; drawn when None and eta > 0.

    Returns:
        d x_bar, [B, C, H, W].
    """
    # TODO: the formula above.
    ### BEGIN SOLUTION
    a_t, a_s = self.schedule.alpha_bar(t).double().item(), self.schedule.alpha_bar(s).double().item()
    variance = eta**2 * (1 - a_s) / (1 - a_t) * (1 - a_t / a_s)
    moved = (math.sqrt(max(1 - a_s - variance, 0.0) / a_s) - math.sqrt((1 - a_t) / a_t)) * eps
    if variance > 0:
        z = torch.randn_like(eps) if z is None else z
        moved = moved + math.sqrt(variance / a_s) * z
    return moved
    ### END SOLUTION


# %% check="displacement"
check("displacement")

# %% [markdown] given="momentum_update_text"
# ### 1.3 Momentum, and a second moment
# 🟢 easy · 5 points · 6 min · under 1 CPU second
#
# Wang et al. (2023) treat the displacement as Adam treats a gradient: they average it over steps, and divide by the root of
# an average of its square.
#
# $$m \leftarrow a\,m + b\,\mathrm d\bar x,\qquad v \leftarrow (1-c)\,v + c\,\overline{(\mathrm d\bar x)^2},$$
#
# where $\overline{(\cdot)^2}$ is the mean square over the pixels of each image, so that $v$ is one number an image.


# %% exercise="momentum_update"
@add_to_class(MomentumSampler)
def momentum_update(self, d: Tensor, m: Tensor, v: Tensor, a: float, b: float, c: float) -> tuple[Tensor, Tensor]:
    """The new momentum and second moment.

    Args:
        d: displacement of this step, [B, C, H, W].
        m: momentum before, [B, C, H, W].
        v: second moment before, [B].
        a, b: how much of the old momentum stays, how much of the displacement enters.
        c: how much of the new square enters; 0 leaves v as it is.

    Returns:
        (m, v) after the step, as new tensors.
    """
    # TODO: the two averages.
    ### BEGIN SOLUTION
    return a * m + b * d, (1 - c) * v + c * d.square().mean((1, 2, 3))
    ### END SOLUTION


# %% check="momentum_update"
check("momentum_update")

# %% [markdown] given="momentum_sample_text"
# ### 1.4 The sampler
# 🟡 medium · 7 points · 10 min · 1 CPU second
#
# Start with $m = 0$ and $v = 1$. For each pair $t\to s$ of the timesteps, the last going to $s=-1$: predict the noise,
# get the displacement, update $m$ and $v$, and move by the **new** ones:
#
# $$x_s = \sqrt{\bar\alpha_s}\left(\frac{x_t}{\sqrt{\bar\alpha_t}} + \frac{m}{\sqrt v+\zeta}\right).$$
#
# With $a = 0$, $b = 1$, $c = 0$, $\zeta = 0$ this is DDIM, or DDPM at $\eta = 1$.


# %% exercise="momentum_sample"
@add_to_class(MomentumSampler)
@torch.no_grad()
def sample(
    self,
    shape: tuple[int, ...],
    timesteps: list[int] | None = None,
    eta: float = 0.0,
    *,
    a: float = 0.0,
    b: float = 1.0,
    c: float = 0.0,
    zeta: float = 0.0,
    x_T: Tensor | None = None,
) -> Tensor:
    """Draw samples.

    Args:
        shape: [B, C, H, W].
        timesteps: strictly decreasing ints t_0, t_1, ..., t_last; all T of them when None. The steps are
            t_0 -> t_1 -> ... -> t_last -> -1: exactly len(timesteps) network calls.
        eta: 0 is deterministic, 1 adds the noise of DDPM.
        a, b, c: of `momentum_update`.
        zeta: added to sqrt(v).
        x_T: the noise to start from, left unchanged; drawn from N(0, I) when None.

    Returns:
        Samples of that shape, with the dtype and on the device of x_T, or of the model's parameters.
    """
    # TODO: for each pair of timesteps: predict, displace, update, move.
    ### BEGIN SOLUTION
    if x_T is None:
        parameter = next(self.model.parameters())
        x_T = torch.randn(shape, dtype=parameter.dtype, device=parameter.device)
    timesteps = [int(t) for t in (range(self.schedule.num_timesteps - 1, -1, -1) if timesteps is None else timesteps)]
    x, m, v = x_T, torch.zeros_like(x_T), torch.ones(len(x_T), dtype=x_T.dtype, device=x_T.device)
    for t, s in zip(timesteps, [*timesteps[1:], -1]):
        eps = self.model(x, torch.full((len(x),), t, device=x.device))
        m, v = self.momentum_update(self.displacement(eps, t, s, eta), m, v, a, b, c)
        a_t, a_s = self.schedule.alpha_bar(t).double().item(), self.schedule.alpha_bar(s).double().item()
        x = math.sqrt(a_s) * (x / math.sqrt(a_t) + m / (v.sqrt() + zeta)[:, None, None, None])
    return x
    ### END SOLUTION


# %% check="momentum_sample"
check("momentum_sample")


# %% given="spaced"
def spaced(num_steps: int, num_timesteps: int = 1000) -> list[int]:
    """`num_steps` timesteps, evenly spaced from the last to 0."""
    return torch.linspace(num_timesteps - 1, 0, num_steps, dtype=torch.float64).round().long().tolist()


# %% [markdown] given="source_momentum"
# > #### 🔍 Check the source: a missing term, and a scale that drifts
# > The report's displacement is the first half of yours, $\sqrt{(1-\bar\alpha_s-\sigma^2)/\bar\alpha_s}\;\epsilon$ without
# > the second root. And its $c > 0$ averages squares of a quantity that changes a thousandfold on the way. Both can be
# > followed on the exact network, where the answer is known: variance 0.30.


# %% tags=["demo", "nbval-ignore-output"]
class AsPrinted(MomentumSampler):
    """The displacement as the report prints it."""

    def displacement(self, eps, t, s, eta=0.0, z=None):
        """The first half alone."""
        a_s = schedule.alpha_bar(s).item()
        return math.sqrt((1 - a_s) / a_s) * eps


print("variance of the samples (true: 0.30)         N = 50      N = 1000")
settings = {
    "DDIM (a = 0, b = 1, c = 0)": (MomentumSampler, {}),
    "momentum, a = 0.2, b = 0.8": (MomentumSampler, {"a": 0.2, "b": 0.8}),
    "momentum, a = 0.6, b = 0.8 (a² + b² = 1)": (MomentumSampler, {"a": 0.6, "b": 0.8}),
    "c = 0.0001": (MomentumSampler, {"c": 1e-4}),
    "c = 0.001": (MomentumSampler, {"c": 1e-3}),
    "c = 0.01": (MomentumSampler, {"c": 1e-2}),
    "the report's displacement": (AsPrinted, {}),
}
for name, (sampler, options) in settings.items():
    variances = [
        sampler(exact, schedule).sample(start.shape, spaced(n), x_T=start, **options).var().item() for n in (50, 1000)
    ]
    print(f"{name:41} {variances[0]:9.3g} {variances[1]:13.3g}")

# %% [markdown] given="source_momentum_answer"
# > Without the second root the displacement does not vanish when the step does, and the samples leave every scale.
# > With the right one, $a + b = 1$ hands every displacement on in full, only later: with 1000 steps nothing is lost, with 50
# > the last ones have not arrived when sampling ends, and a good part of the variance is missing. $a^2+b^2 = 1$, which one
# > also meets, hands on twice as much as came in. And any $c>0$ rescales the path by a factor that depends on the number of
# > steps: Adam may do that to a gradient, whose size does not matter; a sampler must arrive somewhere. So $c = 0$ and
# > $a + b = 1$ from here on.

# %% [markdown] given="noise_mse_text"
# ### 1.5 An honest error
# 🟢 easy · 3 points · 5 min · 1 CPU second
#
# The report's tables have a column "MSE", between 1.08 and 1.11. The mean squared error of the predicted noise has a
# natural yardstick: always answering 0 scores 1. To compare networks it must be taken over the same images, timesteps
# and noise:
#
# $$\frac1N\sum_{i=1}^N \overline{\left(\epsilon_i-\epsilon_\theta(\sqrt{\bar\alpha_{t_i}}\,x_0^{(i)}+\sqrt{1-\bar\alpha_{t_i}}\,\epsilon_i,\ t_i)\right)^2}.$$


# %% exercise="noise_mse"
@torch.no_grad()
def noise_prediction_mse(
    model: nn.Module, schedule: NoiseSchedule, x_0: Tensor, t: Tensor, eps: Tensor, batch_size: int = 128
) -> float:
    """Mean squared error of the predicted noise.

    Args:
        model: noise predictor.
        schedule: its noise schedule.
        x_0: clean images [N, C, H, W].
        t: a timestep for each image, LongTensor [N].
        eps: the noise for each image, [N, C, H, W].
        batch_size: images in a network call; the last batch may be smaller.

    Returns:
        The mean over all pixels of all images, a plain float.
    """
    # TODO: noise, predict and compare, batch by batch; the mean is over images, not over batches.
    ### BEGIN SOLUTION
    total = 0.0
    for x, times, noise in zip(x_0.split(batch_size), t.split(batch_size), eps.split(batch_size)):
        a = schedule.alpha_bar(times).to(x)[:, None, None, None]
        predicted = model(a.sqrt() * x + (1 - a).sqrt() * noise, times)
        total += (predicted - noise).square().sum().item()
    return total / eps.numel()
    ### END SOLUTION


# %% check="noise_mse"
check("noise_mse")

# %% tags=["demo"]
rng = torch.Generator().manual_seed(1)
held_images = digits[:512]
held_t = torch.randint(0, 1000, (512,), generator=rng)
held_eps = torch.randn(held_images.shape, generator=rng)
print(f"mnist-small {noise_prediction_mse(model, schedule, held_images, held_t, held_eps):.4f}")
print(f"always 0    {held_eps.square().mean():.4f}")

# %% [markdown] given="source_mse"
# > #### 🔍 Check the source: an error of 1.08
# > An untrained network whose last layer is zero does better than 1.08. Whatever was measured, it was not how well the
# > network predicts noise. And since a *sampler* does not change the *network*, the honest error is one number for all
# > samplers of the report's first table: it cannot tell them apart, and the Fréchet distance must. (That table's times are
# > 518.8 s for DDPM and 271.2 s for DDIM, celebrated as an acceleration: a factor of 1.91 for 500 steps in place of 1000.
# > Half the calls, half the time, and a little lost on the way.)

# %% [markdown] given="samplers_table_text"
# ### 1.6 Results: samplers
# Measured once on `mnist-small` by `difflab compression-table` with the solution of this lab; every row starts from the
# same $x_T$. The Fréchet distance of *n* digits to the training set (lower is better) is never below that of real digits,
# the last row. *ε-MSE* is your 1.5 on held-out test images: one network, one number.

# %% tags=["demo"]
table = compression_table()
print(table["samplers"])

# %% [markdown] given="samplers_watch"
# Below, six digits of one $x_T$: by DDIM with 50 steps, with momentum, and by the report's "DDIM", DDPM's mean alone.

# %% tags=["demo"]
x_T = torch.randn(6, 1, 28, 28, generator=torch.Generator().manual_seed(3))
rows = {}
with progress(model, 50 + 50 + 200):
    sampler = MomentumSampler(model, schedule)
    rows["DDIM-50"] = sampler.sample(x_T.shape, spaced(50), x_T=x_T)
    rows["DDIM-50, momentum"] = sampler.sample(x_T.shape, spaced(50), x_T=x_T, a=0.2, b=0.8)
    x = x_T
    steps = spaced(200)
    with torch.no_grad():
        for t, s in zip(steps, [*steps[1:], -1]):  # DDPM's mean for a jump from t to s
            a_t, a_s = schedule.alpha_bar(t).item(), schedule.alpha_bar(s).item()
            eps = model(x, torch.full((len(x),), t))
            x = (x - (1 - a_t / a_s) / math.sqrt(1 - a_t) * eps) / math.sqrt(a_t / a_s)
    rows["mean alone, 200"] = x
plots.show_images(rows)

# %% [markdown] given="part2"
# ---
# ## Part 2 · Quantization
# 50 minutes
#
# A weight is stored as a small integer times a scale, and so is every activation. That is four to eight times less to
# store, and integer arithmetic is faster where the processor has it. The price is rounding noise, in a network whose
# answers feed its own next inputs, fifty times over. You build it by hand ("fake quantization": rounded values, computed
# in float), find out at how many bits the digits suffer and what helps, and then time the real thing.


# %% given="tiny_unet_tools"
def tiny_unet(weights: dict[str, Tensor], channels: tuple[int, ...] = (8, 16), time_dim: int = 16) -> UNet:
    """A small U-Net made of the weights that a check sends, in their dtype.

    Args:
        weights: a state dict; with or without attention, for images of any number of channels.
        channels, time_dim: as of `UNet`.
    """
    attention = any("attention" in name for name in weights)
    first = weights["conv_in.weight"]
    network = UNet(channels, time_dim, first.shape[1], attention).to(first.dtype)
    network.load_state_dict(weights)
    return network.eval()


# %% [markdown] given="symmetric_scale_text"
# ### 2.1 A ruler for numbers
# 🟢 easy · 3 + 3 points · 8 min · under 1 CPU second
#
# With $b$ bits a symmetric quantizer has the integers $-q_{\max},\dots,q_{\max}$, $q_{\max}=2^{b-1}-1$. The scale $s$ is
# the distance of two marks on the ruler, and the outermost mark should lie on the largest value there is:
#
# $$s = \frac{\max|x|}{q_{\max}},\qquad
# q(x) = s\cdot\mathrm{clip}\!\left(\mathrm{round}\!\left(\frac xs\right), -q_{\max}, q_{\max}\right).$$
#
# Inside the range nothing moves by more than half a mark, $|x-q(x)|\le s/2$. Weights get one scale for each output channel
# (their sizes differ tenfold, and the scale can be multiplied in after the sum), activations one for the whole tensor.
#
# <details><summary>Hint: the largest of each channel</summary>
#
# `w.abs().amax(dim=(1, 2, 3), keepdim=True)` has shape `[C, 1, 1, 1]`; for any number of dimensions,
# `dim=tuple(range(1, w.ndim))`.
# </details>


# %% exercise="symmetric_scale"
def symmetric_scale(x: Tensor, bits: int, per_channel: bool = False) -> Tensor:
    """The scale with which the largest value falls on the outermost mark.

    Args:
        x: weights or activations, of any shape, not empty.
        bits: at least 2.
        per_channel: one scale for each x[c] instead of one for all.

    Returns:
        0-dimensional tensor, or [C, 1, ..., 1] with as many dimensions as x, in the dtype of x. Where all values are
        zero the scale is 1, so that nothing is divided by zero.

    Raises:
        ValueError: if bits < 2, or x holds NaN or an infinity (a scale made of those would ruin every value).
    """
    # TODO: refuse what cannot be; the largest absolute value over q_max; 1 where that is 0.
    ### BEGIN SOLUTION
    if bits < 2:
        raise ValueError(f"a symmetric quantizer needs at least 2 bits, got {bits}")
    if not bool(x.isfinite().all()):
        raise ValueError("x holds NaN or infinite values; there is no scale for those")
    largest = x.abs().amax(dim=tuple(range(1, x.ndim)), keepdim=True) if per_channel else x.abs().max()
    scale = largest / (2 ** (bits - 1) - 1)
    return torch.where(largest > 0, scale, torch.ones_like(scale))
    ### END SOLUTION


# %% check="symmetric_scale"
check("symmetric_scale")


# %% exercise="fake_quantize"
def fake_quantize(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The values that b-bit integers times the scale can hold, nearest to x.

    Args:
        x: of any shape, left unchanged.
        scale: positive, 0-dimensional or of a shape that broadcasts against x.
        bits: at least 2; the integers are -(2^(bits-1) - 1) ... 2^(bits-1) - 1.

    Returns:
        q(x), of the shape and dtype of x.
    """
    # TODO: the formula above.
    ### BEGIN SOLUTION
    q_max = 2 ** (bits - 1) - 1
    return scale * (x / scale).round().clamp(-q_max, q_max)
    ### END SOLUTION


# %% check="fake_quantize"
check("fake_quantize")

# %% [markdown] given="source_clip"
# > #### 🔍 Check the source: what is clipped?
# > The report's formula is the one above, $\hat w = s\cdot\mathrm{clip}(\mathrm{round}(w/s), c_{\min}, c_{\max})$, but it
# > explains $c_{\min}$ and $c_{\max}$ as the smallest and largest *value allowed after quantization*. Take it by its word,
# > with the smallest and largest weight for bounds, and by ours:

# %% tags=["demo"]
w = model.middle1.conv1.weight
s = symmetric_scale(w, 8)
for name, (low, high) in {"values, as explained": (w.min(), w.max()), "integers, ±127": (-127, 127)}.items():
    rounded = s * (w / s).round().clamp(low, high)
    print(f"bounds are {name:21} relative error {(rounded - w).norm() / w.norm():7.2%}, "
          f"{len(rounded.unique())} different values left")  # fmt: skip
for name, scale in {"one scale for the layer": s, "one for each output channel": symmetric_scale(w, 8, True)}.items():
    print(f"{name:28} relative error {(fake_quantize(w, scale, 8) - w).norm() / w.norm():.2%}")

# %% [markdown] given="straight_through_text"
# ### 2.2 A gradient for a staircase
# 🟡 medium · 3 points · 6 min · under 1 CPU second
#
# `round` is flat almost everywhere: its gradient is zero, and a network that is rounded cannot learn. The
# **straight-through estimator** (Bengio et al. 2013) rounds on the way forward and pretends on the way back that nothing
# was rounded: gradient 1 inside the range, 0 where the value was clipped (there a small change of $x$ changes nothing).
#
# <details><summary>Hint</summary>
#
# `y + (z - y).detach()` has the value of `z` and the gradient of `y`. Which $y$ has gradient 1 inside and 0 outside?
# </details>


# %% exercise="straight_through"
def straight_through(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """`fake_quantize` that lets gradients through.

    Args:
        x, scale, bits: as of `fake_quantize`.

    Returns:
        The values of `fake_quantize`. The gradient with respect to x is that of the output for |x| < q_max * scale, and
        zero for |x| beyond the range (from half a mark outside it, at the latest).
    """
    # TODO: see the hint.
    ### BEGIN SOLUTION
    limit = (2 ** (bits - 1) - 1) * scale
    clipped = torch.maximum(torch.minimum(x, limit), -limit)
    return clipped + (fake_quantize(x, scale, bits) - clipped).detach()
    ### END SOLUTION


# %% given="input_gradient"
def input_gradient(x: Tensor, scale: Tensor, bits: int, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """(straight_through(x), the gradient that reaches x when `upstream` reaches the output); the check asks for it."""
    x = x.clone().requires_grad_(True)
    y = straight_through(x, scale, bits)
    (gradient,) = torch.autograd.grad(y, x, upstream)
    return y.detach(), gradient


# %% check="straight_through"
check("straight_through")

# %% [markdown] given="calibration_set_text"
# ### 2.3 What will the network see?
# 🟡 medium · 4 points · 8 min · 1 CPU second
#
# The scale of an activation must be known before the first digit is drawn, from examples. Which? At $t = 999$ the network
# sees noise, at $t = 0$ a digit, and its activations differ. Q-Diffusion (Li et al. 2023, section 3.2) calibrates on
# what will really occur: states from the float network's *own* sampling trajectory, taken at regular intervals over all of
# it. The cheap alternative, for comparison: one timestep only.
#
# `ddim_states` below is DDIM with a stop before every network call: it hands out $(x_t, t)$ and goes on when asked for the
# next. `every=5` of 100 steps keeps the states before the steps number 0, 5, 10, …, 95.


# %% given="ddim_states"
@torch.no_grad()
def ddim_states(model, schedule: NoiseSchedule, x_T: Tensor, num_steps: int) -> Iterator[tuple[Tensor, int]]:
    """The states of a DDIM trajectory (eta = 0), one after the other; a network call is made between two of them.

    Args:
        model, schedule: noise predictor, and the schedule it was trained with.
        x_T: noise to start from, [B, C, H, W].
        num_steps: network calls in all.

    Yields:
        (x_t, t): first (x_T, T - 1), then what each step leads to; last (x_0, -1), the samples.
    """
    timesteps = torch.linspace(schedule.num_timesteps - 1, 0, num_steps).round().long().tolist()
    x = x_T
    for t, s in zip(timesteps, [*timesteps[1:], -1]):
        yield x, t
        eps = model(x, torch.full((len(x),), t))
        now, then = schedule.alpha_bar(t).to(x), schedule.alpha_bar(s).to(x)
        x = then.sqrt() * (x - (1 - now).sqrt() * eps) / now.sqrt() + (1 - then).sqrt() * eps
    yield x, -1


# %% exercise="calibration_set"
def calibration_set(
    model, schedule: NoiseSchedule, x_T: Tensor, num_steps: int = 100, every: int = 5
) -> tuple[Tensor, Tensor]:
    """Network inputs from the model's own DDIM trajectory.

    Args:
        model, schedule: the float network, and its schedule.
        x_T: noise for B >= 2 trajectories, [B, C, H, W]. Left unchanged.
        num_steps: length of the trajectory; at most so many network calls are made.
        every: keep the states before the steps number 0, every, 2 every, ...; 1 <= every <= num_steps.

    Returns:
        (x, t): [K B, C, H, W] and LongTensor [K B], the K kept states one after the other, each with its timestep. What
        the network is never shown (the samples themselves) is not among them.

    Raises:
        ValueError: for fewer than two trajectories (one image, or none, says nothing of a range), or `every` out of
            range.
    """
    # TODO: walk through ddim_states, keep every so many.
    ### BEGIN SOLUTION
    if len(x_T) < 2:
        raise ValueError(f"calibration needs at least two trajectories, got {len(x_T)}")
    if not 1 <= every <= num_steps:
        raise ValueError(f"every must lie between 1 and num_steps = {num_steps}, got {every}")
    states = list(ddim_states(model, schedule, x_T, num_steps))[:-1][::every]
    return torch.cat([x for x, _ in states]), torch.cat([torch.full((len(x),), t) for x, t in states])
    ### END SOLUTION


def one_timestep_set(
    model, schedule: NoiseSchedule, x_T: Tensor, step: int = 0, num_steps: int = 100
) -> tuple[Tensor, Tensor]:
    """Network inputs from a single timestep of the same trajectory.

    Args:
        model, schedule, x_T, num_steps: as of `calibration_set`.
        step: which, 0 <= step < num_steps; 0 is x_T itself. Exactly `step` network calls are made.

    Returns:
        (x, t): the state before that step, [B, C, H, W], and its timestep for each image, LongTensor [B].

    Raises:
        ValueError: for fewer than two trajectories, or a step out of range.
    """
    # TODO: walk until there, and no farther.
    ### BEGIN SOLUTION
    if len(x_T) < 2:
        raise ValueError(f"calibration needs at least two trajectories, got {len(x_T)}")
    if not 0 <= step < num_steps:
        raise ValueError(f"step must lie between 0 and {num_steps - 1}, got {step}")
    states = ddim_states(model, schedule, x_T, num_steps)
    for _ in range(step):
        next(states)
    x, t = next(states)
    return x, torch.full((len(x),), t)
    ### END SOLUTION


# %% check="calibration_set"
check("calibration_set")

# %% [markdown] given="layer_tools_text"
# Two tools. `input_pieces` says which layers are quantized: every convolution, those of the attention included, but not
# the first and the last, which see and make images and hold 0.03 % of the weights. It also says where an input is two
# tensors side by side: on the way up each block gets `cat([h, skip])`, which its `conv1` sees normalised and its `skip`
# as it is. `layer_inputs` runs the network on a calibration set, batch by batch, and shows what goes into those layers.


# %% given="layer_tools"
def input_pieces(network: UNet, split: bool = True) -> dict[str, list[int]]:
    """Which convolutions to quantize, and the number of input channels that each of their quantizers is for.

    Returns:
        Name of the layer -> [C_in]; with `split`, [C_h, C_skip] for the layers behind cat([h, skip]).
    """
    pieces = {
        name: [layer.in_channels]
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Conv2d) and name not in ("conv_in", "conv_out")
    }
    if split:
        for level, block in enumerate(reversed(network.down)):
            of_skip = block.conv2.out_channels
            for name in (f"up.{level}.conv1", f"up.{level}.skip"):
                if name in pieces:
                    pieces[name] = [pieces[name][0] - of_skip, of_skip]
    return pieces


@torch.no_grad()
def layer_inputs(
    network: UNet, calibration: tuple[Tensor, Tensor], pieces: dict[str, list[int]], batch_size: int = 32
) -> Iterator[dict[str, list[Tensor]]]:
    """What goes into the layers named in `pieces`, for one batch of the calibration set after the other.

    Yields:
        Name of the layer -> its input [B, C, H, W], cut along the channels into the given pieces.
    """
    seen: dict[str, list[Tensor]] = {}

    def remember(name: str):
        return lambda _layer, inputs: seen.update({name: list(inputs[0].split(pieces[name], dim=1))})

    handles = [network.get_submodule(name).register_forward_pre_hook(remember(name)) for name in pieces]
    try:
        for x, t in zip(calibration[0].split(batch_size), calibration[1].split(batch_size)):
            network(x, t)
            yield dict(seen)
    finally:
        for handle in handles:
            handle.remove()


# %% tags=["demo"]
torch.manual_seed(0)
some = calibration_set(model, schedule, torch.randn(4, 1, 28, 28))
largest = {name: [] for name in ("down.0.conv1", "down.2.conv1", "middle2.conv1", "up.0.skip", "up.2.skip")}
for inputs in layer_inputs(model, some, {name: [model.get_submodule(name).in_channels] for name in largest}, 4):
    for name, (piece,) in inputs.items():
        largest[name].append(piece.abs().max().item())
plots.curves({name: (some[1][::4].tolist(), values) for name, values in largest.items()}, "t", "largest activation")

# %% [markdown] given="activation_scales_text"
# ### 2.4 Scales for activations
# 🔴 hard · 4 points · 12 min · 1 CPU second
#
# The largest activation of a thousand images may be an outlier that costs all others their resolution. Clipping it a
# little is better when bits are few: try the ten ranges $r\cdot\max|x|$, $r = 0.1, 0.2, \dots, 1$, and keep
# the scale with the smallest sum of squared errors *over the whole set*. At eight bits this changes little; at four, the
# largest value alone leaves an error of ε̂ of 0.47, the best ranges one of 0.12. (A fixed quantile would be simpler, but the
# right one depends on the bits.)
#
# The set does not fit into memory layer by layer, so go through it twice: once for the largest value of each piece, once
# to add up the ten errors of each.


# %% exercise="activation_scales"
def activation_scales(
    network: UNet, calibration: tuple[Tensor, Tensor], bits: int, split: bool = True, batch_size: int = 32
) -> dict[str, list[Tensor]]:
    """A scale for the input of every layer that is quantized, or one for each piece of it.

    Args:
        network: the float network, left unchanged.
        calibration: (x, t), inputs of the network.
        bits: of the activations.
        split: tell the two halves of a concatenation apart.
        batch_size: the set is gone through in batches of this size.

    Returns:
        Name of the layer -> list of 0-dimensional scales, one for each of `input_pieces(network, split)[name]`. Of the ten
        candidates r max|x| / q_max, r = 0.1, ..., 1.0, with the maximum over the whole set, it is the one with the least
        sum of squared errors |x - q(x)|^2 over the whole set; 1 if all inputs are zero.
    """
    # TODO: once through the set for the maxima, once more for the errors of the ten candidates.
    ### BEGIN SOLUTION
    pieces = input_pieces(network, split)
    largest = {name: [torch.zeros(())] * len(sizes) for name, sizes in pieces.items()}
    for inputs in layer_inputs(network, calibration, pieces, batch_size):
        for name, parts in inputs.items():
            largest[name] = [torch.maximum(old.to(x), x.abs().max()) for old, x in zip(largest[name], parts)]
    ranges = torch.arange(1, 11) / 10
    candidates = {name: [symmetric_scale(m, bits) * ranges for m in values] for name, values in largest.items()}
    errors = {name: torch.zeros(len(sizes), 10, dtype=torch.float64) for name, sizes in pieces.items()}
    for inputs in layer_inputs(network, calibration, pieces, batch_size):
        for name, parts in inputs.items():
            for k, x in enumerate(parts):
                for r, scale in enumerate(candidates[name][k]):
                    errors[name][k, r] += (fake_quantize(x, scale, bits) - x).square().sum()
    return {
        name: [scales[int(error.argmin())] for scales, error in zip(candidates[name], errors[name])] for name in pieces
    }
    ### END SOLUTION


# %% given="quantization_trial"
class QuantizationTrial:
    """What the checks talk to: a tiny U-Net made of the weights they send, in the hands of your functions."""

    def __init__(self, weights: dict[str, Tensor], channels: tuple[int, ...], time_dim: int):
        self.shape = channels, time_dim
        self.network, self.teacher = (tiny_unet(weights, *self.shape).requires_grad_(False) for _ in range(2))
        self.quantized = self.student = None

    def weights(self, which: str = "network") -> dict[str, Tensor]:
        """Those of the float network, of the "teacher" or of its "student"."""
        return dict(getattr(self, which).state_dict())

    def scales(self, x: Tensor, t: Tensor, bits: int, split: bool, batch_size: int) -> dict[str, list[Tensor]]:
        """What your activation_scales gives."""
        return activation_scales(self.network, (x, t), bits, split, batch_size)

    def quantize(self, x: Tensor, t: Tensor, weight_bits: int, activation_bits: int, split: bool) -> None:
        """Quantize the network, by your quantize_model."""
        self.quantized = quantize_model(self.network, (x, t), weight_bits, activation_bits, split)

    @torch.no_grad()
    def answer(self, x: Tensor, t: Tensor) -> Tensor:
        """The noise that the quantized network sees."""
        return self.quantized(x, t)

    def bytes(self, weight_bits: int | None, activation_bits: int = 8, split: bool = True) -> int:
        """What your model_bytes says of the float network, or of its layers in quantized form beside its time_mlp."""
        if weight_bits is None:
            return model_bytes(self.teacher)
        layers = [
            QuantizedConv2d(self.teacher.get_submodule(name), [torch.ones(())] * len(sizes), sizes, weight_bits,
                            activation_bits)
            for name, sizes in input_pieces(self.teacher, split).items()
        ]  # fmt: skip
        return model_bytes(nn.ModuleList([*layers, self.teacher.time_mlp]))

    def finetune(
        self,
        weights: dict[str, Tensor],
        schedule: NoiseSchedule,
        images: Tensor,
        steps: int,
        lr: float,
        batch_size: int,
    ) -> list[float]:
        """Train a student of these weights, by your finetune_quantized, to answer like the float network."""
        self.student = tiny_unet(weights, *self.shape).requires_grad_(False)
        return finetune_quantized(self.student, self.teacher, schedule, images, steps, lr, batch_size)


# %% check="activation_scales"
check("activation_scales")

# %% [markdown] given="fake_quantize_split_text"
# ### 2.5 Two rulers side by side
# 🟢 easy · 2 points · 4 min · under 1 CPU second
#
# On the way up, the features $h$ from below and those from the skip connection lie in one tensor and need not be of one
# size. With one ruler the small half is measured with the large half's marks. Q-Diffusion (section 3.3) gives each half its
# own.


# %% exercise="fake_quantize_split"
def fake_quantize_split(x: Tensor, scales: list[Tensor], sizes: list[int], bits: int) -> Tensor:
    """Quantize pieces of the channels, each with its own scale; gradients pass straight through.

    Args:
        x: [B, C, H, W], left unchanged.
        scales: one for each piece, 0-dimensional.
        sizes: channels of each piece, in order; they add up to C.
        bits: the same for all.

    Returns:
        [B, C, H, W].

    Raises:
        ValueError: if the sizes do not add up to C, or there are not as many scales as sizes.
    """
    # TODO: cut, quantize each piece, put together.
    ### BEGIN SOLUTION
    if sum(sizes) != x.shape[1] or len(scales) != len(sizes):
        raise ValueError(f"{len(scales)} scales for pieces of {sizes} channels do not fit {x.shape[1]} channels")
    return torch.cat([straight_through(part, s, bits) for part, s in zip(x.split(sizes, dim=1), scales)], dim=1)
    ### END SOLUTION


# %% check="fake_quantize_split"
check("fake_quantize_split")

# %% [markdown] given="split_demo_text"
# First where one knows what must come out: a half of size 1 beside one of size 0.05. Then the halves that this network
# has. How much is there to gain?

# %% tags=["demo"]
torch.manual_seed(0)
bimodal = torch.cat([torch.randn(4, 8, 16, 16), 0.05 * torch.randn(4, 8, 16, 16)], dim=1)
for bits in (8, 6, 4):
    both, halves = symmetric_scale(bimodal, bits), [symmetric_scale(half, bits) for half in bimodal.split(8, dim=1)]
    for name, rounded in {"one scale": fake_quantize(bimodal, both, bits),
                          "two scales": fake_quantize_split(bimodal, halves, [8, 8], bits)}.items():  # fmt: skip
        error = (rounded - bimodal).square().mean((0, 2, 3)).view(2, 8).mean(1).sqrt()
        print(f"{bits} bits, {name:10}  error of the large half {error[0]:.4f}, of the small half {error[1]:.4f}")
print("\nthe network's own halves, largest values over the trajectory:")
behind_cat = {name: sizes for name, sizes in input_pieces(model).items() if len(sizes) == 2}
halves = {name: [0.0, 0.0] for name in behind_cat}
for inputs in layer_inputs(model, some, behind_cat):
    for name, parts in inputs.items():
        halves[name] = [max(old, part.abs().max().item()) for old, part in zip(halves[name], parts)]
for name, (h, skip) in halves.items():
    print(f"{name:11} h {h:6.2f}   skip {skip:6.2f}")

# %% [markdown] given="quantized_conv_text"
# ### 2.6 A quantized network
# 🟡 medium · 4 + 3 points · 12 min · 2 CPU seconds
#
# First one layer. Its input is quantized with the scales found above; its weights with a scale for each output channel,
# taken from the weights as they are *now* (they may be training). Where the input comes in two pieces, so do the
# weights, `[C_out, C_in, k, k]`: the slice that meets each piece has scales of its own.


# %% given="quantized_conv_class"
class QuantizedConv2d(nn.Module):
    """A convolution with fake-quantized weights and inputs.

    Args:
        conv: the float convolution; becomes part of this layer, its weights stay float and are rounded at every call.
        scales: of the pieces of the input, 0-dimensional.
        sizes: channels of each piece.
        weight_bits, activation_bits: at least 2.
    """

    def __init__(self, conv: nn.Conv2d, scales: list[Tensor], sizes: list[int], weight_bits: int, activation_bits: int):
        super().__init__()
        self.conv = conv
        self.scales, self.sizes = list(scales), list(sizes)
        self.weight_bits, self.activation_bits = weight_bits, activation_bits


# %% exercise="quantized_conv"
@add_to_class(QuantizedConv2d)
def forward(self, x: Tensor) -> Tensor:
    """The convolution of the rounded input with the rounded weights; the bias is not rounded.

    Args:
        x: [B, C_in, H, W].

    Returns:
        [B, C_out, H', W'], through which gradients reach x and self.conv.weight.
    """
    # TODO: round the input, round the weights piece by piece, convolve with the layer's own stride and padding.
    ### BEGIN SOLUTION
    x = fake_quantize_split(x, self.scales, self.sizes, self.activation_bits)
    weight = torch.cat(
        [
            straight_through(part, symmetric_scale(part.detach(), self.weight_bits, per_channel=True), self.weight_bits)
            for part in self.conv.weight.split(self.sizes, dim=1)
        ],
        dim=1,
    )
    return F.conv2d(x, weight, self.conv.bias, self.conv.stride, self.conv.padding)
    ### END SOLUTION


# %% given="layer_trial"
def layer_trial(
    x: Tensor, weight: Tensor, bias: Tensor, stride: int, scales: list[Tensor], sizes: list[int],
    weight_bits: int, activation_bits: int, upstream: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(output, gradient of the weights, gradient of the input) of your layer; the check asks for it."""
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], stride, weight.shape[2] // 2).to(weight.dtype)
    conv.load_state_dict({"weight": weight, "bias": bias})
    x = x.clone().requires_grad_(True)
    y = QuantizedConv2d(conv, scales, sizes, weight_bits, activation_bits)(x)
    return y.detach(), *torch.autograd.grad(y, (conv.weight, x), upstream)


# %% check="quantized_conv"
check("quantized_conv")

# %% [markdown] given="quantize_model_text"
# Then all of them: a copy of the network in which each layer of `input_pieces` is a `QuantizedConv2d`.
#
# <details><summary>Hint: putting a layer into its place</summary>
#
# `"up.0.conv1".rpartition(".")` gives the name of the parent and that of the child; `network.get_submodule(parent)` finds
# the one, `setattr` replaces the other.
# </details>


# %% exercise="quantize_model"
def quantize_model(
    model: UNet,
    calibration: tuple[Tensor, Tensor],
    weight_bits: int = 8,
    activation_bits: int = 8,
    split: bool = True,
) -> nn.Module:
    """A copy of a U-Net with fake-quantized convolutions, all but conv_in and conv_out.

    Args:
        model: the float network, left unchanged; the copy shares no weights with it.
        calibration: (x, t) for the scales of the activations.
        weight_bits, activation_bits: at least 2.
        split: two scales where an input is cat([h, skip]), one otherwise.

    Returns:
        A network to be called as model(x, t).
    """
    # TODO: scales, a copy, and a QuantizedConv2d in the place of every layer of input_pieces.
    ### BEGIN SOLUTION
    scales = activation_scales(model, calibration, activation_bits, split)
    quantized = copy.deepcopy(model)
    for name, sizes in input_pieces(model, split).items():
        parent, _, child = name.rpartition(".")
        conv = quantized.get_submodule(name)
        layer = QuantizedConv2d(conv, scales[name], sizes, weight_bits, activation_bits)
        setattr(quantized.get_submodule(parent), child, layer)
    return quantized
    ### END SOLUTION


# %% check="quantize_model"
check("quantize_model")

# %% [markdown] given="model_bytes_text"
# ### 2.7 What it weighs
# 🟢 easy · 2 points · 4 min · 1 CPU second
#
# Quantized weights take their bits, packed layer by layer into whole bytes. Everything else takes four bytes: biases, the
# layers that stay float, and every scale, of which a layer has, for each piece of its input, one for the input and one for
# each output channel.


# %% exercise="model_bytes"
def model_bytes(network: nn.Module) -> int:
    """Bytes that a network takes when it is stored.

    Args:
        network: float, or with layers of class QuantizedConv2d.

    Returns:
        Parameters at four bytes; the weights of quantized layers at weight_bits bits each (a layer's sum rounded up to
        whole bytes), and four bytes for every scale.
    """
    # TODO: four bytes for all, corrected for the quantized layers.
    ### BEGIN SOLUTION
    total = 4 * sum(p.numel() for p in network.parameters())
    for layer in network.modules():
        if isinstance(layer, QuantizedConv2d):
            weight = layer.conv.weight
            scales = len(layer.sizes) * (len(weight) + 1)
            total += math.ceil(weight.numel() * layer.weight_bits / 8) - 4 * weight.numel() + 4 * scales
    return total
    ### END SOLUTION


# %% check="model_bytes"
check("model_bytes")

# %% [markdown] given="ptq_demo_text"
# What does the rounding change? Below, networks of 8, 6 and 4 bits against the float network, on states of a trajectory
# that none was calibrated on: the root mean squared difference of the two ε̂, which is about 1 in size. The set
# `single` has as many states, all of $t = 999$: pure noise, which costs no network call.

# %% tags=["demo", "nbval-ignore-output"]
torch.manual_seed(1)
held_out = calibration_set(model, schedule, torch.randn(3, 1, 28, 28), num_steps=30, every=3)
single = one_timestep_set(model, schedule, torch.randn(len(some[0]), 1, 28, 28))
float_answer = model(*held_out)
print("bits  calibrated on     split   error  at t = 999 … 0")
rounded_networks = {}
for bits, (name, chosen), split in [(8, ("trajectory", some), True), (8, ("t = 999", single), True),
                                    (6, ("trajectory", some), True), (4, ("trajectory", some), True),
                                    (4, ("t = 999", single), True), (4, ("trajectory", some), False)]:  # fmt: skip
    network = rounded_networks[bits, name, split] = quantize_model(model, chosen, bits, bits, split)
    with torch.no_grad():
        by_t = (network(*held_out) - float_answer).square().mean((1, 2, 3)).view(10, 3).mean(1)
    shown = " ".join(f"{value:.3f}" for value in by_t.sqrt()[::3])
    print(f"{bits:4}  {name:15} {str(split):>7} {by_t.mean().sqrt():7.3f}  {shown}")

# %% [markdown] given="finetune_quantized_text"
# ### 2.8 Four bits need training
# 🟡 medium · 2 points · 6 min · 1 CPU second
#
# At four bits a weight has fifteen values, and no calibration makes up for that. **Quantization-aware training** goes on
# training with the rounding in place, the gradients passing straight through; the float weights behind it learn to
# round well. The teacher is the float network: its answer is a better target than the noise itself, of which a part cannot
# be predicted by anyone.
#
# $$L = \mathbb E_{x_0,t,\epsilon}\lVert\epsilon_{\text{rounded}}(x_t,t)-\epsilon_\theta(x_t,t)\rVert^2
# \quad\text{(the mean over all pixels)}.$$
#
# <details><summary>Hint: a trap</summary>
#
# The parameters of a pretrained network do not require gradients, and their copies do not either:
# `quantized.requires_grad_(True)`.
# </details>


# %% exercise="finetune_quantized"
def finetune_quantized(
    quantized: nn.Module,
    teacher: nn.Module,
    schedule: NoiseSchedule,
    images: Tensor,
    steps: int,
    lr: float = 1e-4,
    batch_size: int = 32,
) -> list[float]:
    """Train a fake-quantized network to answer like its float teacher.

    Args:
        quantized: trained in place, with Adam.
        teacher: the float network, left unchanged.
        schedule: the forward process.
        images: clean images [N, C, H, W].
        steps: steps of training, each on batch_size images drawn at random, with a timestep for each, drawn from
            0 ... T - 1, and fresh noise.
        lr: learning rate.
        batch_size: images a step.

    Returns:
        The mean squared difference of the two networks' answers, one plain float for each step.
    """
    # TODO: for every step: noisy images, both answers, their distance, a step of Adam.
    ### BEGIN SOLUTION
    quantized.requires_grad_(True)
    optimizer = torch.optim.Adam(quantized.parameters(), lr=lr)
    losses = []
    for _ in range(steps):
        x_0 = images[torch.randint(len(images), (batch_size,))]
        t = torch.randint(schedule.num_timesteps, (batch_size,))
        alpha_bar = schedule.alpha_bar(t).to(x_0).view(-1, 1, 1, 1)
        x_t = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * torch.randn_like(x_0)
        with torch.no_grad():
            target = teacher(x_t, t)
        loss = F.mse_loss(quantized(x_t, t), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
    ### END SOLUTION


# %% check="finetune_quantized"
check("finetune_quantized")

# %% [markdown] given="finetune_demo_text"
# Eighty steps, half a minute or a minute, on small batches. The learning rate is small: at five times as much the network
# comes out worse than it went in, for every weight that crosses the middle between two values jumps by a whole one. So few
# steps bring the answers nearer and the strokes back, not yet each digit; the table below has a network that was trained
# longer.

# %% tags=["demo", "nbval-ignore-output"]
torch.manual_seed(0)
four_bits = copy.deepcopy(rounded_networks[4, "trajectory", True])
x_T = torch.randn(12, 1, 28, 28)
drawn = {}
for name, network in {"float32": model, "4 bits": four_bits}.items():
    with progress(network, 20):
        *_, (drawn[name], _) = ddim_states(network, schedule, x_T, 20)
with progress(four_bits, 80):
    finetune_quantized(four_bits, model, schedule, digits, steps=80, batch_size=8)
*_, (drawn["4 bits, trained"], _) = ddim_states(four_bits, schedule, x_T, 20)
for name, network in {"rounded": rounded_networks[4, "trajectory", True], "trained": four_bits}.items():
    with torch.no_grad():
        distance = (network(*held_out) - float_answer).square().mean()
    print(f"{name}: squared distance to the float network's answers {distance:.4f}")
plots.show_images(drawn)

# %% [markdown] given="source_training_aware"
# > #### 🔍 Check the source: who is better at few bits?
# > The report writes that post-training quantization "can outperform in low bit-width", and calls the other approach
# > *training-aware quantization*. It is *quantization*-aware training, and EfficientDM (He et al. 2023), which the report
# > cites for this, starts from the opposite observation: post-training quantization breaks down at few bits, and
# > training with the rounding in place is what repairs it, at a cost in time and data that EfficientDM then
# > reduces. The digits above are the experiment: same bits, same scales, before and after eighty steps.

# %% [markdown] given="onnx_text"
# ### 2.9 Integers, really
# No points · 8 min · a minute of CPU
#
# Fake quantization computes in float, and rounding comes on top: it shows the quality, not the speed. For speed the
# network must be computed by integer instructions. **onnxruntime** has such convolutions: the network is written as an
# ONNX graph, each convolution wrapped in `QuantizeLinear` / `DequantizeLinear` pairs with scales from *your* calibration
# set, and the runtime turns wrapped convolutions into integer ones. Read the three tools; each choice in them was
# measured on a processor with AVX2:
#
# * convolutions only, and not the first and the last. GroupNorm, SiLU and the attention's products stay float: they are
#   cheap, and their ranges are wide. The two ends are 0.3 % of the multiplications, and eight bits ruin them: with both in
#   int8 the Fréchet distance went from 38 to 322, without them it stayed 38 (n = 128, DDIM-20, one noise). The first sees
#   the image itself, whose background is exactly −1. Rounding its *input* alone, with $s = 0.0332$, makes that −0.9955
#   everywhere and at every step: 98. With a coarser $s = 1/27$, for which −1 is a mark: 38.
# * activations unsigned, weights signed, one scale for each output channel: the pair that the processor's multiply
#   instruction takes. Signed activations took a sixth longer.
# * `reduce_range`: that instruction adds two products of 8 bits in 16 bits and saturates. With weights of seven bits it
#   cannot: the error of ε̂ fell although a bit was lost. (Processors with VNNI do not need this.)


# %% given="onnx_tools"
def export_onnx(network: nn.Module, path: str | Path, size: int = 28) -> None:
    """Write a U-Net as one ONNX file, for batches of any length and images [1, size, size].

    Raises:
        ModuleNotFoundError: if the extra `acceleration` is not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        raise ModuleNotFoundError('writing ONNX needs the extra: pip install -e ".[acceleration]"') from None
    x, t = torch.zeros(2, 1, size, size), torch.zeros(2, dtype=torch.long)
    batch = {0: torch.export.Dim.DYNAMIC}
    with torch.no_grad():
        torch.onnx.export(
            network, (x, t), str(path), dynamo=True, external_data=False, verbose=False,
            input_names=["x", "t"], output_names=["eps"], dynamic_shapes=(batch, batch),
        )  # fmt: skip


def quantize_onnx(
    source: str | Path, target: str | Path, calibration: tuple[Tensor, Tensor], batch_size: int = 32
) -> None:
    """Write an int8 version of an ONNX network: its convolutions but the first and last, calibrated on (x, t).

    Raises:
        ModuleNotFoundError: if the extra `acceleration` is not installed.
    """
    try:
        import onnx
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process
    except ImportError:
        raise ModuleNotFoundError('int8 needs the extra: pip install -e ".[acceleration]"') from None

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.batches = iter(zip(*(part.split(batch_size) for part in calibration)))

        def get_next(self):
            x, t = next(self.batches, (None, None))
            return None if x is None else {"x": x.numpy(), "t": t.numpy()}

    with tempfile.TemporaryDirectory() as folder:
        folded = str(Path(folder, "folded.onnx"))  # constants computed, neighbouring operations joined
        quant_pre_process(str(source), folded, skip_symbolic_shape=True)
        nodes = [node for node in onnx.load(folded).graph.node if node.op_type == "Conv"]
        ends = [node.name for node in nodes if any(i.startswith(("conv_in.", "conv_out.")) for i in node.input)]
        quantize_static(
            folded, str(target), Reader(), quant_format=QuantFormat.QDQ, op_types_to_quantize=["Conv"],
            nodes_to_exclude=ends,
            per_channel=True, reduce_range=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip


class OnnxNetwork(nn.Module):
    """A noise predictor in an onnxruntime session, called like any other: network(x, t)."""

    def __init__(self, session):
        super().__init__()
        self.session = session

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Predicted noise, float32 on the CPU."""
        (eps,) = self.session.run(None, {"x": x.float().contiguous().numpy(), "t": t.long().numpy()})
        return torch.from_numpy(eps)


def load_onnx(path: str | Path, threads: int | None = None) -> OnnxNetwork:
    """Open an ONNX network that `export_onnx` or `quantize_onnx` wrote.

    Args:
        path: the file.
        threads: CPU threads; None for as many as torch uses.

    Raises:
        ModuleNotFoundError: if the extra `acceleration` is not installed.
        FileNotFoundError: if there is no such file.
        ValueError: if it is no ONNX file, or one of another network: the message says what it takes and what was
            expected.
    """
    try:
        import onnxruntime
    except ImportError:
        raise ModuleNotFoundError('ONNX networks need the extra: pip install -e ".[acceleration]"') from None
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no ONNX file at {path}; export_onnx writes one")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3  # errors only
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ValueError(f"{path} is no ONNX file that can be run ({str(error).splitlines()[0][:150]})") from None
    takes = {i.name: f"{i.type.removeprefix('tensor(').rstrip(')')} {i.shape}" for i in session.get_inputs()}
    fits = [(i.name, i.type, len(i.shape)) for i in session.get_inputs()] == [
        ("x", "tensor(float)", 4),
        ("t", "tensor(int64)", 1),
    ]
    if not fits or len(session.get_outputs()) != 1:
        raise ValueError(
            f"{path} takes {', '.join(f'{name}: {kind}' for name, kind in takes.items()) or 'nothing'}; "
            "expected x: float [B, 1, 28, 28] and t: int64 [B], as export_onnx writes it"
        )
    return OnnxNetwork(session)


# %% tags=["demo", "nbval-ignore-output"]
folder = Path(tempfile.mkdtemp())
export_onnx(model, folder / "float32.onnx")
quantize_onnx(folder / "float32.onnx", folder / "int8.onnx", some)
int8 = load_onnx(folder / "int8.onnx")
with torch.no_grad():
    difference = (int8(*held_out) - float_answer).square().mean().sqrt()
print(f"int8 against float32: error {difference:.3f}; file {(folder / 'int8.onnx').stat().st_size / 1e6:.2f} MB, "
      f"float32 {(folder / 'float32.onnx').stat().st_size / 1e6:.2f} MB")  # fmt: skip

# %% [markdown] given="timing_text"
# Now the clock. All in turns, so that a slow moment slows all; the last column is against float32 as PyTorch runs it. Some
# of the gain is the runtime's, not the integers': that is what its own float32 row is for. bfloat16 is fast where the
# processor has instructions for it, and dreadful where it has not.

# %% tags=["demo", "nbval-ignore-output"]
batch = torch.randn(16, 1, 28, 28), torch.full((16,), 500)
last_layout = copy.deepcopy(model).to(memory_format=torch.channels_last)
float_onnx = load_onnx(folder / "float32.onnx")


def in_bfloat16():
    """One call under autocast."""
    with torch.autocast("cpu", torch.bfloat16):
        model(*batch)


engines = {
    "float32": lambda: model(*batch),
    "float32, channels last": lambda: last_layout(batch[0].contiguous(memory_format=torch.channels_last), batch[1]),
    "bfloat16 autocast": in_bfloat16,
    "fake 8 bits": lambda: rounded_networks[8, "trajectory", True](*batch),
    "onnxruntime float32": lambda: float_onnx(*batch),
    "onnxruntime int8": lambda: int8(*batch),
}
with torch.no_grad():
    timings = measure_in_turns(list(engines.values()), repeats=3)
for name, timing in zip(engines, timings):
    print(f"{name:24} {1000 * timing.median / 16:8.2f} ms an image   {timings[0].median / timing.median:5.2f} ×")

# %% [markdown] given="source_slower"
# > #### 🔍 Check the source: was it slower?
# > The report's text says that with quantization the "inference time increased", and gives two reasons; its own Table 2,
# > a page on, has 67.2 ms for DDPM, 56.3 with quantization and 50.8 for DDIM with quantization. Both cannot be. Your table
# > shows how each may have come about: the rounding of fake quantization *costs* time, integer arithmetic *saves* it, and a
# > number in milliseconds says little unless one knows which was timed. It also says that the quantized network needed
# > "less steps". Steps are the sampler's; what changes is what a step costs. (DDIM's call costs what DDPM's does:
# > the last 5.5 ms of that table are not the bits' doing.)

# %% [markdown] given="quantization_table_text"
# ### 2.10 The table
# Measured once by a command, on more digits than a lab has time for; all rows from the same noise. Bytes are what
# `model_bytes` counts (the file's size for int8). Then one row of it, drawn again by your own functions with few digits: a
# Fréchet distance of few digits is larger, and can only be compared with its like.

# %% tags=["demo"]
print(table["quantization"])

# %% tags=["demo", "nbval-ignore-output"]
torch.manual_seed(0)
noise = torch.randn(64, 1, 28, 28)
for name, network in {"float32": float_onnx, "int8": int8}.items():
    with progress(network, 20):
        *_, (samples, _) = ddim_states(network, schedule, noise, 20)
    print(f"{name:8} DDIM-20, {quality(samples)}")

# %% [markdown] given="part3"
# ---
# ## Part 3 · Pruning
# 45 minutes
#
# A channel is a filter, and everything downstream that reads what it computes. Take whole channels out, and the
# network is a smaller network of the same kind, faster on any machine. The questions are which channels, how many,
# and how much of the damage a little training repairs.

# %% [markdown] given="channel_magnitudes_text"
# ### 3.1 How large is a channel?
# 🟢 easy · 2 points · 3 min · under 1 CPU second
#
# The simplest guess at importance: small weights matter little. With $w_{c}$ all weights that make output channel $c$,
#
# $$I_c = \lVert w_c\rVert_2 .$$
#
# - `weight` is `[C_out, C_in, k, k]` of a convolution or `[C_out, C_in]` of a linear layer; the scores are `[C_out]`.


# %% exercise="channel_magnitudes"
def channel_magnitudes(weight: Tensor) -> Tensor:
    """Magnitude importance: the Euclidean (L2) norm of each output channel's weights.

    Args:
        weight: [C_out, ...], of a convolution or a linear layer; left unchanged.

    Returns:
        Scores [C_out], in the dtype of weight.
    """
    # TODO: one norm for each weight[c].
    ### BEGIN SOLUTION
    return weight.flatten(1).norm(dim=1)
    ### END SOLUTION


# %% check="channel_magnitudes"
check("channel_magnitudes")

# %% [markdown] given="channels_to_prune_text"
# ### 3.2 Which ones go?
# 🟡 medium · 4 points · 6 min · under 1 CPU second
#
# Two rules: everything that scores **below a threshold**, or a **fixed share**, the lowest scores first. A layer
# without channels passes nothing on, so a rule that would take them all is refused.
#
# - `ratio` $r$ takes $\mathrm{round}(r\,C)$ of $C$ channels, $0\le r<1$; `threshold` takes those with a score
#   strictly below it. One of the two is given.
#
# <details><summary>Hint</summary>
#
# `scores.argsort()` lists the channels from the lowest score up. `(scores < threshold).nonzero().flatten()` are the
# indices of the low ones.
# </details>


# %% exercise="channels_to_prune"
def channels_to_prune(scores: Tensor, ratio: float | None = None, threshold: float | None = None) -> Tensor:
    """Choose the channels to remove.

    Args:
        scores: importance of each channel, [C].
        ratio: take the round(ratio * C) channels with the lowest scores (of equal scores, any).
        threshold: take the channels whose score is below it.

    Returns:
        LongTensor of their indices, ascending; it may be empty.

    Raises:
        ValueError: if not exactly one of ratio and threshold is given, if ratio lies outside [0, 1), or if no channel
            would be left.
    """
    # TODO: choose, refuse to take them all, and sort.
    ### BEGIN SOLUTION
    if (ratio is None) == (threshold is None):
        raise ValueError("give a ratio or a threshold, and not both")
    if ratio is None:
        chosen = (scores < threshold).nonzero().flatten()
    elif 0 <= ratio < 1:
        chosen = scores.argsort()[: round(ratio * len(scores))].sort().values
    else:
        raise ValueError(f"ratio must lie in [0, 1), got {ratio}")
    if len(chosen) == len(scores):
        rule = f"ratio {ratio}" if threshold is None else f"threshold {threshold:.4g}"
        raise ValueError(f"{rule} would remove all {len(scores)} channels of a layer; choose a smaller one")
    return chosen
    ### END SOLUTION


# %% check="channels_to_prune"
check("channels_to_prune")

# %% [markdown] given="taylor_importance_text"
# ### 3.3 What would the loss say?
# 🟡 medium · 3 points · 5 min · under 1 CPU second
#
# Without a weight $w_i$ the loss changes, to first order, by $-w_i\,g_i$ with $g_i=\partial L/\partial w_i$. For a
# channel there are two ways to add that up:
#
# $$I_c^{\text{Taylor}} = \Bigl|\sum_{i\in c} w_i g_i\Bigr|,\qquad I_c^{\text{Diff-Pruning}} = \sum_{i\in c}\bigl|w_i g_i\bigr| .$$
#
# The first is the change of the loss if all of them go at once (Molchanov et al. 2017). In it, large terms of
# opposite sign cancel; Diff-Pruning (Fang et al. 2023) does not let them.


# %% exercise="taylor_importance"
def taylor_importance(weight: Tensor, gradient: Tensor, separately: bool = False) -> Tensor:
    """First-order Taylor importance of each output channel.

    Args:
        weight: [C_out, ...].
        gradient: of a loss, by weight; the same shape.
        separately: False: |sum of w g|, the channel as a whole (Molchanov et al. 2017, equation 7, for weights);
            True: the sum of |w g|, weight by weight (Fang et al. 2023).

    Returns:
        Scores [C_out], none negative, in the dtype of weight.
    """
    # TODO: products, added up over each weight[c]; mind the order of sum and absolute value.
    ### BEGIN SOLUTION
    products = (weight * gradient).flatten(1)
    return products.abs().sum(1) if separately else products.sum(1).abs()
    ### END SOLUTION


# %% check="taylor_importance"
check("taylor_importance")

# %% [markdown] given="diffusion_gradients_text"
# ### 3.4 A gradient of many timesteps
# 🔴 hard · 5 points · 10 min · 1 CPU second
#
# A diffusion model has one loss for each timestep,
# $L_t=\operatorname{mean}\,(\epsilon-\epsilon_\theta(\sqrt{\bar\alpha_t}x_0+\sqrt{1-\bar\alpha_t}\,\epsilon,\ t))^2$.
# It is large near $t=0$, where there is hardly any noise to see, and falls. Diff-Pruning (algorithm 1) goes up from
# $t=0$ and adds the gradients of the $L_t$, until a loss is small beside the largest one so far:
#
# $$L_{\max}\leftarrow\max(L_{\max},L_t),\qquad \text{stop at the first } t \text{ with } L_t/L_{\max}\le\tau;\qquad
# g=\sum_{t\text{ before that}}\nabla_\theta L_t .$$
#
# - $L_t$ is the mean over all images and pixels, with the same $x_0$ and $\epsilon$ at every $t$.
# - The timestep at which it stops is not in the sum. $\tau=0$ takes all of them.
# - The network comes with gradients switched off (`load_pretrained` does that): work on a copy.
#
# <details><summary>Hint: gradients add up</summary>
#
# `loss.backward()` adds to every parameter's `.grad`; nothing else is needed for the sum, if it begins at zero.
# `torch.autograd.grad` is the other way.
# </details>


# %% exercise="diffusion_gradients"
def diffusion_gradients(
    model: nn.Module,
    schedule: NoiseSchedule,
    x_0: Tensor,
    noise: Tensor,
    threshold: float = 0.05,
    timesteps: list[int] | None = None,
) -> tuple[dict[str, Tensor], list[int]]:
    """Gradients of the noise-prediction loss, summed over timesteps as in Diff-Pruning.

    Args:
        model: called as model(x_t, t) with t a LongTensor [B]; left as it is: weights, gradients, requires_grad.
        schedule: the noise schedule.
        x_0: clean images [B, C, H, W].
        noise: as x_0; used at every timestep.
        threshold: stop at the first timestep with L_t / (largest loss so far, L_t included) <= threshold.
        timesteps: ascending, the ones to look at; None for 0, ..., T - 1.

    Returns:
        (gradients, kept): for each of model.named_parameters() the sum of its gradients, and the timesteps summed over.
    """
    # TODO: a copy that wants gradients; then t by t: the loss, its place beside the largest, backward.
    ### BEGIN SOLUTION
    network = copy.deepcopy(model).requires_grad_(True)
    network.zero_grad()
    largest, kept = 0.0, []
    for t in range(schedule.num_timesteps) if timesteps is None else timesteps:
        alpha_bar = schedule.alpha_bar(t).to(x_0)
        x_t = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise
        loss = F.mse_loss(network(x_t, torch.full((len(x_t),), t, device=x_t.device)), noise)
        largest = max(largest, loss.item())
        if loss.item() <= threshold * largest:
            break
        loss.backward()
        kept.append(t)
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in network.named_parameters()}
    return gradients, kept
    ### END SOLUTION


# %% given="known_losses"
class KnownLosses(nn.Module):
    """A network of one weight w whose losses are known: it answers w · gains[t] · x_t. The check listens to it."""

    def __init__(self, weight: float, gains: Tensor):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=gains.dtype), requires_grad=False)
        self.register_buffer("gains", gains)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The answer for x [B, C, H, W] at t [B]."""
        return self.weight * self.gains[t][:, None, None, None] * x


# %% given="pruning_trial"
class PruningTrial:
    """What the checks talk to: a tiny U-Net made of the weights they send, in the hands of your functions."""

    def __init__(self, weights: dict[str, Tensor], channels: list[int], time_dim: int):
        self.network = tiny_unet(weights, channels, time_dim).requires_grad_(False)
        self.pruned = self.network

    def original(self) -> dict[str, Tensor]:
        """The weights of the whole network."""
        return dict(self.network.state_dict())

    def prune(
        self, scores: dict[str, Tensor] | None, ratio: float | None, threshold: float | None, iterations: int
    ) -> dict[str, Tensor]:
        """Weights of the copy that your prune_model makes, by these scores, or by the norms of the weights."""

        def norms(network: nn.Module) -> dict[str, Tensor]:
            layers = weighted_layers(network)
            return {name: layer.weight.detach().square().flatten(1).sum(1).sqrt() for name, layer in layers.items()}

        importance = norms if scores is None else lambda network: scores
        self.pruned = prune_model(self.network, importance, ratio, threshold, iterations)
        return dict(self.pruned.state_dict())

    @torch.no_grad()
    def answers(self, x: Tensor, t: Tensor) -> list[Tensor]:
        """The noise that the pruned network sees, in one call and in two halves."""
        return [self.pruned(x, t), self.pruned.decode(*self.pruned.encode(x, t), t)]

    def gradients(self, schedule: NoiseSchedule, x_0: Tensor, noise: Tensor, threshold: float, timesteps: list[int]):
        """What your diffusion_gradients gives."""
        return diffusion_gradients(self.network, schedule, x_0, noise, threshold, timesteps)

    def macs(self, shape: tuple[int, int, int]) -> int:
        """What your count_macs gives."""
        return count_macs(self.network, shape)

    def finetune(self, schedule: NoiseSchedule, images: Tensor, steps: int, lr: float, batch_size: int, teacher=None):
        """What your finetune gives; it trains the network itself."""
        return finetune(self.network, schedule, images, steps, lr, batch_size, teacher)


# %% check="diffusion_gradients"
check("diffusion_gradients")

# %% tags=["demo"]
some, some_noise = digits[:8], torch.randn(8, 1, 28, 28, generator=torch.Generator().manual_seed(7))
sampled = list(range(0, 1000, 20))
with progress(model, len(sampled)):
    gradients, kept = diffusion_gradients(model, schedule, some, some_noise, 0.05, sampled)
print(f"of t = 0, 20, …, 980 the sum takes {len(kept)}: up to t = {kept[-1]}")

# %% [markdown] given="source_timesteps"
# > #### 🔍 Check the source: are timesteps pruned?
# > The report says that Diff-Pruning uses "the Taylor Expansion method to prune the timesteps". What the loop leaves
# > out are *terms of a sum* that scores channels. The pruned network knows all 1000 timesteps as before, and a
# > sampler calls it as often. What is pruned is channels: below, that shows in the shapes.

# %% [markdown] given="count_macs_text"
# ### 3.5 What does a network cost?
# 🟡 medium · 3 points · 7 min · 1 CPU second
#
# Parameters are numbers to store; **MACs** (multiply-accumulate operations) are work. A convolution with a `[C_out,
# C_in, k, k]` weight does $C_{in}k^2$ of them for each number it puts out, a linear layer $C_{in}$. Count the
# convolutions and linear layers for **one image**. (Additions of biases, normalisations and the products inside
# attention are left out, as they are by most counters.)
#
# <details><summary>Hint</summary>
#
# A forward hook sees the output: `layer.register_forward_hook(lambda layer, inputs, output: ...)` returns a handle, and
# `handle.remove()` takes the hook off again.
# </details>


# %% exercise="count_macs"
def count_macs(model: nn.Module, shape: tuple[int, int, int] = (1, 28, 28)) -> int:
    """Multiply-accumulate operations of all nn.Conv2d and nn.Linear layers for one image.

    Args:
        model: called as model(x, t), float32; left as it is, without hooks.
        shape: [C, H, W] of the image.

    Returns:
        The count, an int. Layers that run twice count twice.
    """
    # TODO: hooks on the layers, one call, hooks off.
    ### BEGIN SOLUTION
    counts = []

    def count(layer: nn.Module, _inputs: tuple, output: Tensor) -> None:
        counts.append(output.numel() * layer.weight[0].numel())

    handles = [
        layer.register_forward_hook(count) for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))
    ]
    try:
        with torch.no_grad():
            model(torch.zeros(1, *shape), torch.zeros(1, dtype=torch.long))
    finally:
        for handle in handles:
            handle.remove()
    return sum(counts)
    ### END SOLUTION


# %% check="count_macs"
check("count_macs")

# %% [markdown] given="channel_groups_text"
# ### 3.6 Take them out
# 🔴 hard · 5 points · 12 min · 2 CPU seconds
#
# Channels hang together. Where two layers' outputs are added, both must lose the same ones; every reader loses them
# too; and GroupNorm wants all its groups of one size. The library **torch-pruning** (Fang et al. 2023, "DepGraph")
# finds out by tracing the network. `channel_groups` below asks it, and cares for two things more:
#
# - A GroupNorm with 8 groups loses one channel *in each group* or none. Such a set of channels is a **unit**: unit $u$ of
#   $U$ is the channels $u, u+U, u+2U, \dots$
# - Query, key and value of an attention layer lose what the features lose, in every head.
#
# So a group has `layers` (names, whose output channels go together), `units` $U$, and `remove(units)`. The score of a
# unit is the mean over its channels, then over the group's layers; as the channels of a unit lie $U$ apart,
# `scores[name].reshape(-1, U).mean(0)` is the first of the two means.
#
# In several turns (**iterative** pruning), after turn $k$ of $K$ a group has lost $\mathrm{round}(r\,\tfrac kK\,U_0)$
# of its $U_0$ units, and the importance is asked again before every turn, of the network as it is then. A `threshold`
# is applied afresh in every turn.


# %% given="channel_groups"
class ChannelGroup(NamedTuple):
    """Output channels that can only go together."""

    layers: list[str]  # the convolutions and linear layers they are outputs of
    units: int  # how many units they fall into
    remove: Callable[[Tensor], None]  # take these units out of the network, everywhere


def weighted_layers(network: nn.Module) -> dict[str, nn.Module]:
    """The convolutions and linear layers, by name."""
    return {name: m for name, m in network.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}


def dependency_graph(network: UNet):
    """What torch-pruning finds out about the network."""
    try:
        import torch_pruning
    except ModuleNotFoundError:
        need = 'torch-pruning is missing; install it with: pip install -e ".[acceleration]"'
        raise ModuleNotFoundError(need) from None

    def stand_in(attention: nn.Module) -> Callable[[Tensor], Tensor]:
        """Channel i of the features, of query, key and value, and of their result go together; trace just that."""

        def forward(x: Tensor) -> Tensor:
            query, key, value = attention.qkv(attention.norm(x)).chunk(3, dim=1)
            return x + attention.out(x + query + key + value)

        return forward

    attentions = [module for module in network.modules() if hasattr(module, "qkv")]
    wanted = [(p, p.requires_grad) for p in network.parameters()]
    side = 2 ** len(network.config["channels"])
    image = torch.zeros(1, network.config["in_channels"], side, side).to(network.conv_in.weight)
    try:
        for attention in attentions:
            attention.forward = stand_in(attention)
        network.requires_grad_(True)  # it follows the gradients' graph
        example = (image, torch.zeros(1, dtype=torch.long))
        return torch_pruning.DependencyGraph().build_dependency(network, example)
    finally:
        for attention in attentions:
            del attention.forward
        for parameter, before in wanted:
            parameter.requires_grad_(before)


def channel_groups(network: UNet) -> list[ChannelGroup]:
    """All groups of channels that can be pruned, sorted by name. The output layer, conv_out, keeps its channels."""
    graph = dependency_graph(network)
    names = {module: name for name, module in network.named_modules()}
    found = []
    for group in graph.get_all_groups(ignored_layers=[network.conv_out], root_module_types=[nn.Conv2d, nn.Linear]):
        root, cut = group[0].dep.target.module, group[0].dep.handler
        members = [(d.target.module, graph.is_out_channel_pruning_fn(d.handler)) for d, _ in group]
        layers = {names[m] for m, out in members if out and isinstance(m, (nn.Conv2d, nn.Linear))}
        norms = max((m.num_groups for m, _ in members if isinstance(m, nn.GroupNorm)), default=1)
        units = graph.get_out_channels(root) // norms

        def remove(chosen: Tensor, root=root, cut=cut, units=units, norms=norms) -> None:
            channels = [int(u) + units * k for k in range(norms) for u in chosen]
            if channels:
                graph.get_pruning_group(root, cut, sorted(channels)).prune()

        found.append(ChannelGroup(sorted(layers), units, remove))
    return sorted(found, key=lambda group: group.layers)


def magnitude_importance(network: nn.Module) -> dict[str, Tensor]:
    """Your channel_magnitudes of every layer."""
    return {name: channel_magnitudes(layer.weight.detach()) for name, layer in weighted_layers(network).items()}


def gradient_importance(
    schedule: NoiseSchedule, x_0: Tensor, noise: Tensor, threshold: float, separately: bool, timesteps: list[int]
) -> Callable[[nn.Module], dict[str, Tensor]]:
    """Your taylor_importance of every layer, with your diffusion_gradients."""

    def importance(network: nn.Module) -> dict[str, Tensor]:
        gradients, _ = diffusion_gradients(network, schedule, x_0, noise, threshold, timesteps)
        return {
            name: taylor_importance(layer.weight.detach(), gradients[f"{name}.weight"], separately)
            for name, layer in weighted_layers(network).items()
        }

    return importance


# %% exercise="prune_model"
def prune_model(
    model: UNet,
    importance: Callable[[nn.Module], dict[str, Tensor]],
    ratio: float | None = None,
    threshold: float | None = None,
    iterations: int = 1,
) -> UNet:
    """A pruned copy of a U-Net.

    Args:
        model: left as it is.
        importance: gives for a network, by layer name, the scores [C_out] of every convolution and linear layer; called
            once in each turn, with the network as it is then.
        ratio: share of each group's units to remove in all, those with the lowest scores.
        threshold: or: remove the units that score below it, in each turn.
        iterations: number of turns K, at least 1.

    Returns:
        The copy: a UNet with narrower layers, with forward, encode and decode as before.

    Raises:
        ValueError: if not exactly one of ratio and threshold is given, or a group would lose all its channels.
    """
    # TODO: turn by turn: scores, then for every group: the score of its units, channels_to_prune, remove.
    ### BEGIN SOLUTION
    pruned = copy.deepcopy(model)
    full = [group.units for group in channel_groups(pruned)]
    for turn in range(1, iterations + 1):
        scores = importance(pruned)
        for group, units in zip(channel_groups(pruned), full):
            of_units = torch.stack([scores[name].reshape(-1, group.units).mean(0) for name in group.layers]).mean(0)
            share = ratio
            if ratio is not None:
                share = (round(ratio * turn / iterations * units) - (units - group.units)) / group.units
            group.remove(channels_to_prune(of_units, share, threshold))
    return pruned
    ### END SOLUTION


# %% check="prune_model"
check("prune_model")

# %% tags=["demo"]
whole = count_macs(model)
for ratio in (0.1, 0.3, 0.5, 0.7):
    network = prune_model(model, magnitude_importance, ratio)
    widths = [layer.out_channels for layer in (network.conv_in, network.down[1].conv1, network.down[2].conv1)]
    parameters = sum(p.numel() for p in network.parameters())
    print(f"ratio {ratio}: widths {widths}, {parameters:9,} parameters, {count_macs(network) / whole:4.0%} of the MACs")

# %% [markdown] given="save_modules"
# `network.config` still describes the network as it was. A `state_dict` would not fit into a U-Net made from it, so save the
# whole module: `torch.save(network, path)` and `torch.load(path, weights_only=False)`, the latter only for files that
# you wrote yourself, as it runs what is in them.

# %% [markdown] given="source_magnitude"
# > #### 🔍 Check the source: the magnitude of what?
# > The report defines magnitude importance with *gradients*, $\lVert\nabla L(\theta)\rVert$; a few pages on it speaks
# > of "weights with lower magnitudes". The method of that name is about *weights*. Below, both; with them Taylor and
# > Diff-Pruning, and scores drawn at random, which every method should beat. All lose the same number of channels,
# > and none is trained afterwards. (The whole network's loss on these digits is in the first line.)

# %% tags=["demo", "nbval-ignore-output"]
held = digits[-60:]
gradient_sums = {
    "Diff-Pruning": gradients,
    "Taylor": diffusion_gradients(model, schedule, some, some_noise, 0.0, list(range(0, 1000, 40)))[0],
}
random = torch.Generator().manual_seed(0)
scores = {"random": {}, "magnitude of weights": magnitude_importance(model), "magnitude of gradients": {}}
scores |= {"Taylor": {}, "Diff-Pruning": {}}
for name, layer in weighted_layers(model).items():
    scores["random"][name] = torch.rand(len(layer.weight), generator=random)
    scores["magnitude of gradients"][name] = channel_magnitudes(gradient_sums["Diff-Pruning"][f"{name}.weight"])
    for method in ("Taylor", "Diff-Pruning"):
        gradient = gradient_sums[method][f"{name}.weight"]
        scores[method][name] = taylor_importance(layer.weight, gradient, method == "Diff-Pruning")
print(f"loss of the whole network {held_out_loss(model, schedule, held):.4f}; pruned, by ratio:")
for method, known in scores.items():
    losses = [held_out_loss(prune_model(model, lambda _: known, r), schedule, held) for r in (0.1, 0.3)]
    print(f"{method:24}" + "".join(f"  {ratio}: {loss:.4f}" for ratio, loss in zip((0.1, 0.3), losses)))

# %% [markdown] given="source_magnitude_answer"
# > A tenth of the channels does next to nothing: every method finds them, chance does not. From 0.2 on, all do damage
# > of one size, chance included. Here the norms of the (summed) gradients do the least and Diff-Pruning the most: the
# > report's formula is another method, not a broken one, but it should not be called magnitude. And a loss straight
# > after pruning says little about what a method is worth: the table at the end has both, before and after training.

# %% [markdown] given="source_table"
# > #### 🔍 Check the source: a ratio of 0.3
# > The report prunes with ratio 0.3. Its table shows 16,293M MACs for the whole network and 16,142M after magnitude
# > pruning: **0.9 %** fewer. Where 0.3 of the channels go, a convolution loses them at its input and at its output,
# > so about $0.7^2=49\,\%$ of the work is left, as in your rows above. With 0.9 % hardly a layer was touched, and
# > that the quality stayed the same says nothing about pruning. (Diff-Pruning, in the row beside it, removed 32 %.
# > The two cannot be compared: methods are compared **at equal MACs**.) The base model's "1K" parameters, above 1.07M
# > left after pruning, are a misprint.
# >
# > How can a pruner remove next to nothing? Let the threshold rise from 0 and see how far it gets.

# %% tags=["demo"]
for share in (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4):
    threshold = torch.cat(list(magnitude_importance(model).values())).quantile(share).item()
    try:
        left = count_macs(prune_model(model, magnitude_importance, threshold=threshold)) / whole
        print(f"threshold {threshold:.3f}, above {share:3.0%} of all channels: {left:.1%} of the MACs are left")
    except ValueError as error:
        print(f"threshold {threshold:.3f}, above {share:3.0%} of all channels: {error}")
        break

# %% [markdown] given="source_threshold_answer"
# > Layers differ in scale. Before one number for all of them has touched most layers, it has emptied one. A threshold
# > becomes useful when each layer is measured by its own scale, as `relative_magnitudes` does in the table below.

# %% [markdown] given="ratio_for_macs_text"
# ### 3.7 Equal MACs
# 🟢 easy · 2 points · 5 min · under 1 CPU second
#
# Widths are whole numbers, so MACs fall in steps as the ratio, or the threshold, grows. Find the smallest setting
# that meets a target, by halving an interval again and again: pruning costs a second, and a hundred of them would
# cost minutes.


# %% exercise="ratio_for_macs"
def ratio_for_macs(
    share_left: Callable[[float], float], target: float, largest: float = 0.8, tolerance: float = 0.01
) -> float:
    """The smallest setting that leaves at most `target` of the MACs.

    Args:
        share_left: MACs left at a setting, as a share of all; never rises with the setting.
        target: the share wanted, in (0, 1].
        largest: settings go from 0 to this.
        tolerance: how exactly the setting is found.

    Returns:
        A setting s with share_left(s) <= target, at most `tolerance` above the smallest such. At most 15 calls of
        share_left for 0.8 and 0.01.

    Raises:
        ValueError: if share_left(largest) > target.
    """
    # TODO: keep an upper end that meets the target and a lower end that does not, and halve.
    ### BEGIN SOLUTION
    if share_left(largest) > target:
        raise ValueError(f"even {largest} leaves more than {target:.0%} of the MACs")
    low, high = 0.0, largest
    if share_left(low) <= target:
        return low
    while high - low > tolerance:
        middle = (low + high) / 2
        if share_left(middle) <= target:
            high = middle
        else:
            low = middle
    return high
    ### END SOLUTION


# %% check="ratio_for_macs"
check("ratio_for_macs")

# %% [markdown] given="finetune_text"
# ### 3.8 A little training
# 🟡 medium · 2 points · 6 min · 2 CPU seconds
#
# The pruned network is damaged, not wrong, and a few hundred steps go a long way. Its teacher is at hand: the network
# it was cut from. The noise $\epsilon$ is a noisy target, as nobody can see it all in $x_t$; the teacher's
# $\epsilon_{\text{teacher}}(x_t,t)$ is near the best that can be said. This is **distillation** (Hinton et al. 2015;
# Kim et al. 2023 do it for pruned diffusion models).
#
# - Each step: images drawn at random, a random $t$ for each, fresh noise; the mean squared distance of the network's answer
#   from the target; one step of an optimizer (Adam is a good one).


# %% exercise="finetune"
def finetune(
    model: nn.Module,
    schedule: NoiseSchedule,
    images: Tensor,
    steps: int,
    lr: float = 1e-3,
    batch_size: int = 32,
    teacher: nn.Module | None = None,
) -> list[float]:
    """Train a network in place, for a while.

    Args:
        model: called as model(x_t, t); its weights change, gradients need not be switched on before.
        schedule: the noise schedule.
        images: clean images [N, C, H, W].
        steps: optimizer steps, each on batch_size images with a timestep and noise of their own.
        lr: learning rate; it may fall towards the end.
        batch_size: at most N.
        teacher: the target is its answer at the same (x_t, t), without gradients; None: the noise.

    Returns:
        The loss of each step, a list of `steps` numbers.
    """
    # TODO: an optimizer, then steps: draw, target, loss, backward, step.
    ### BEGIN SOLUTION
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    decay = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1)
    losses = []
    for _ in range(steps):
        x_0 = images[torch.randint(len(images), (batch_size,))]
        t = torch.randint(schedule.num_timesteps, (batch_size,))
        noise = torch.randn_like(x_0)
        alpha_bar = schedule.alpha_bar(t)[:, None, None, None]
        x_t = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise
        target = noise
        if teacher is not None:
            with torch.no_grad():
                target = teacher(x_t, t)
        loss = F.mse_loss(model(x_t, t), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        losses.append(loss.item())
    return losses
    ### END SOLUTION


# %% check="finetune"
check("finetune")

# %% [markdown] given="finetune_pruned_text"
# A minute of training, for the network that Diff-Pruning leaves at half the MACs. The loss is that of predicting the noise, on
# digits it is not trained on.


# %% given="relative_magnitudes"
def relative_magnitudes(network: nn.Module) -> dict[str, Tensor]:
    """Your channel_magnitudes, in units of each layer's mean."""
    return {name: scores / scores.mean() for name, scores in magnitude_importance(network).items()}


# %% tags=["demo", "nbval-ignore-output"]
def share_left(ratio):
    return count_macs(prune_model(model, lambda _: scores["Diff-Pruning"], ratio)) / whole


half = ratio_for_macs(share_left, 0.5)
light = prune_model(model, lambda _: scores["Diff-Pruning"], half)
parameters = sum(p.numel() for p in light.parameters())
print(f"ratio {half:.3f}: {share_left(half):.1%} of the MACs, {parameters:,} parameters")
print(f"held-out loss: whole network {held_out_loss(model, schedule, held):.4f}, "
      f"pruned {held_out_loss(light, schedule, held):.4f}")  # fmt: skip
torch.manual_seed(0)
with progress(light, 80):
    distances = finetune(light, schedule, digits[:-60], 80, 2e-3, 16, model)
print(f"after {len(distances)} steps beside its teacher: {held_out_loss(light, schedule, held):.4f}")
plots.curves({"training": (range(1, len(distances) + 1), distances)}, "step", "distance from the teacher", yscale="log")

# %% tags=["demo", "nbval-ignore-output"]
x_t, t = torch.randn(16, 1, 28, 28), torch.full((16,), 500)
with torch.no_grad():
    timings = measure_in_turns([lambda: model(x_t, t), lambda: light(x_t, t)], repeats=7)
for name, timing in zip(("whole network", "half the MACs"), timings):
    print(f"{name}: {timing} for 16 images")
print(f"speed-up {timings[0].median / timings[1].median:.2f} ×, where the MACs promise {1 / share_left(half):.2f} ×")

# %% [markdown] given="pruning_table_text"
# ### 3.9 Results: pruning
# Measured once on `mnist-small` by `difflab compression-table` with the solution of this lab, DDIM with 50 steps from
# one $x_T$. *Before* is straight after pruning; the others are after fine-tuning with the whole network as teacher, as
# many steps for each except in the row that says otherwise.

# %% tags=["demo"]
print(table["pruning"])

# %% [markdown] given="together"
# ---
# ## Putting it together
# 20 minutes
#
# A pruned network can be quantized, and both can be sampled in fifty steps. The last row below is all three against where
# the lab began: the unmodified network in float32, DDPM with 1000 steps.

# %% tags=["demo"]
print(table["together"])

# %% [markdown] task="lightweight_analysis" points=12
# ### Written analysis
# 12 points, marked by a person. Answer in the cell below, in about 300 words, with numbers of your own or from the tables.
#
# 1. **Samplers.** What does momentum change, for better or worse, and for how many steps? Why can the ε-MSE not tell?
# 2. **Quantization.** Where does the quality break, and what brings it back: calibration, the split, or training? Where
#    does the time go in int8, and why is fake quantization slower than float32?
# 3. **Pruning.** Do the criteria differ at equal MACs, before and after fine-tuning? What would you conclude if you had
#    compared them at equal ratio?
# 4. **Deployment.** Which combination would you ship on a phone, on a server, and which would you not, and why?
# 5. **The report.** Name the two of its claims that you would most want corrected before anyone builds on them.
#
# === BEGIN MARK SCHEME ===
# | Points | Level |
# |---|---|
# | 11–12 | All five answered from numbers; calls, seconds, MACs and bytes kept apart; comparisons at equal cost; n and the floor named with every distance; the two claims well chosen |
# | 8–10 | Mostly right and from numbers; one question thin or one comparison unfair |
# | 4–7 | Numbers without reasons, or reasons without numbers |
# | 1–3 | A few correct remarks |
# | 0 | Nothing, or nothing of one's own |
# === END MARK SCHEME ===

# %% [markdown] answer="lightweight_analysis"
# *Your answer here.*

# %% [markdown] given="lightweight_style_text"
# ### Code quality
# 2 points by a program, for what you completed: docstrings kept, no unused or undefined names, no bare `except:`.

# %% check="lightweight_style"
check("lightweight_style")

# %% [markdown] task="lightweight_code_quality" points=4
# ### Code read by a person
# 4 points for the code above; nothing to write here.
#
# === BEGIN MARK SCHEME ===
# | Points | Level |
# |---|---|
# | 4 | Names from the field, no repeated formulas, helpers where they help, comments that say why |
# | 3 | Clear on the whole; some repetition, or names that hide what they hold |
# | 1–2 | Works, but is hard to follow |
# | 0 | Not completed, or not readable |
# === END MARK SCHEME ===

# %% [markdown] given="lightweight_further"
# ---
# ## Going further
# For the curious: no points, no checks, no solution.
#
# 1. **Momentum that knows the schedule.** $a = 0.2$ delays a fifth of every displacement by a step. How much is still
#    undelivered at the end, for 20 steps and for 1000? Hand it over in the last step and measure.
# 2. **Mixed bits.** Which single layer, quantized to 4 bits with all others in float32, hurts most? Give that one 8 bits.
# 3. **Quantized differently in time.** Let the activation scales depend on the timestep (He et al. 2023). What do the extra
#    numbers cost, and what do they buy at 4 bits?
# 4. **Pruned from the start.** Train a network of the pruned one's size from scratch for as many steps as fine-tuning and
#    the original training took together. Was the large network worth it?

# %% [markdown] given="lightweight_submit"
# ---
# **Before you hand in:** *Kernel → Restart Kernel and Run All Cells*. Cells whose check does not pass show their hint,
# and the rest runs on. Then save, and submit this `.ipynb` file under its own name.
