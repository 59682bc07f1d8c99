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
# # Lab 5 · Sampling from trained diffusion models
#
# A diffusion model is trained once and sampled from for ever after. In this lab you take a network that can tell the
# noise in a digit from the digit, and write the loops that turn pure noise into new digits with it: first **DDPM**,
# true to the theory and slow (denoising diffusion probabilistic models), then **DDIM**, which jumps over most of the
# steps (denoising diffusion implicit models).
#
# | Part | Time | Automatic points |
# |---|---|---|
# | 1 · The forward process | 10 min | 4 |
# | 2 · DDPM: a thousand small random steps | 25 min | 26 |
# | 3 · DDIM: fifty long ones, and η, the dial between the two | 35 min | 32 |
#
# **How to work.** Each exercise is a cell with a `TODO`. Replace the line that raises `NotImplementedError`, run the
# cell, then run the `check(...)` cell below it. A green line is the points; anything else is a hint. The checks are
# the very ones that grade your hand-in, with new random numbers every time, so green here is green there. Add cells of
# your own wherever you like, with helpers and imports; the cells that are given (set-up, class heads, checks) are put
# back as they were when your notebook is graded. Any correct program passes: no check looks at how you wrote it.
#
# **Conventions**, the same as in the papers:
#
# | symbol | code | meaning |
# |---|---|---|
# | $\beta_t,\ \alpha_t = 1-\beta_t$ | `schedule.betas[t]`, `schedule.alphas[t]` | variance of the noise added, and of the signal kept, in the one step $t$ |
# | $\bar\alpha_t = \prod_{i\le t}\alpha_i$ | `schedule.alphas_cumprod[t]`, `schedule.alpha_bar(t)` | the same since the start: variance of the signal kept |
# | $T$ | `schedule.num_timesteps` | timesteps run from $0$ (almost clean) to $T-1$ (almost pure noise) |
# | $\bar\alpha_{-1} = 1$ | `schedule.alpha_bar(-1)` | $-1$ is the name of clean data. `alphas_cumprod[-1]` is *not* that: Python wraps it to $T-1$ |
# | $\epsilon_\theta(x_t, t)$ | `model(x_t, t)` | predicted noise; `x_t` is `[B, 1, 28, 28]`, `t` a LongTensor `[B]` |
#
# Sampling starts from pure noise, called `x_T`; it stands for the noise level of timestep $T-1$. After the step at
# $t = 0$ the image is clean.
#
# Images are float32 in $[-1, 1]$. Do not clip anything in the graded methods. The tables are float32; computing from them
# in float32 or in float64 is equally right.

# %% given="setup"
import time

import torch
from torch import Tensor

from difflab import plots
from difflab.check import check
from difflab.checkpoints import load_pretrained
from difflab.datasets import load_digits
from difflab.notebook import add_to_class
from difflab.schedule import NoiseSchedule
from difflab.timing import count_calls

model, schedule = load_pretrained("mnist-small")
x_clean, labels = load_digits(64)
x_T = torch.randn(16, 1, 28, 28, generator=torch.Generator().manual_seed(0))  # one noise for all demonstrations
print(schedule)

# %% [markdown] given="part1"
# ---
# ## Part 1 · The forward process
#
# Training pairs are made by adding noise to a digit. Because every step adds a little Gaussian noise, all steps up to
# $t$ together add one Gaussian, and $x_t$ can be drawn in one go (Ho et al. 2020, equation 4):
#
# $$q(x_t \mid x_0) = \mathcal N\!\left(\sqrt{\bar\alpha_t}\,x_0,\ (1-\bar\alpha_t) I\right)
# \qquad\Longleftrightarrow\qquad x_t = \sqrt{\bar\alpha_t}\,x_0 + \sqrt{1-\bar\alpha_t}\;\epsilon,\quad \epsilon\sim\mathcal N(0, I).$$
#
# The network will be asked to find $\epsilon$ in $x_t$. Everything in this lab rests on this one line.


# %% given="forward_process_class"
class ForwardProcessImpl:
    """The forward process q(x_t | x_0) of a noise schedule."""

    def __init__(self, schedule: NoiseSchedule):
        self.schedule = schedule


# %% [markdown] given="add_noise_text"
# ### 1.1 Add noise
# 🟢 easy · 4 points · 5 min · under 1 CPU second
#
# `t` may be one int for the whole batch, or a LongTensor `[B]` with one timestep for each image.
#
# <details><summary>Hint: shapes</summary>
#
# A coefficient of shape `[B]` does not multiply images of shape `[B, C, H, W]` the way you want. Bring it to
# `[B, 1, 1, 1]`, for instance with `.view(-1, 1, 1, 1)`; that also works for a single number.
# </details>
# <details><summary>Hint: which table?</summary>
#
# `schedule.alphas` is one step; `schedule.alphas_cumprod` is all steps so far. `schedule.alpha_bar(t)` answers for an
# int as well as for a tensor.
# </details>


# %% exercise="add_noise"
@add_to_class(ForwardProcessImpl)
def add_noise(self, x_start: Tensor, t: int | Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Draw x_t from q(x_t | x_0).

    Args:
        x_start: clean images x_0, [B, C, H, W].
        t: timestep, an int or a LongTensor [B].
        noise: the noise to use, [B, C, H, W]; drawn from N(0, I) when None.

    Returns:
        (x_t, noise), both [B, C, H, W]: the noisy images and the noise that is in them.
    """
    # TODO: the formula above.
    ### BEGIN SOLUTION
    if noise is None:
        noise = torch.randn_like(x_start)
    alpha_bar = self.schedule.alpha_bar(t).to(x_start).view(-1, 1, 1, 1)
    return alpha_bar.sqrt() * x_start + (1 - alpha_bar).sqrt() * noise, noise
    ### END SOLUTION


# %% check="add_noise"
check("add_noise")

# %% [markdown] given="forward_trajectory_text"
# ### 1.2 Watch a digit drown
# 🟢 easy · practice, no points · 5 min · 1 CPU second
#
# Show the first image of `x_start` at each of the given timesteps, in their order, each in axes of its own (`imshow`).
# `plots.show_images({"label": images}, column_titles)` makes such a figure from images `[N, 1, H, W]`.


# %% exercise="forward_trajectory"
@add_to_class(ForwardProcessImpl)
def demonstrate_forward_trajectory(self, x_start: Tensor, timesteps: list[int]):
    """Show progressive noise corruption.

    Args:
        x_start: clean images [B, 1, H, W]; the first is shown.
        timesteps: which timesteps to show, in order.

    Returns:
        A matplotlib Figure with one image, drawn with imshow, for each timestep.
    """
    # TODO: noise the first image to each timestep and show the results in a row.
    ### BEGIN SOLUTION
    states = torch.cat([self.add_noise(x_start[:1], t)[0] for t in timesteps])
    return plots.show_images({"x_t": states}, [f"t = {t}" for t in timesteps])
    ### END SOLUTION


# %% check="forward_trajectory"
check("forward_trajectory")

# %% tags=["demo"]
torch.manual_seed(0)
ForwardProcessImpl(schedule).demonstrate_forward_trajectory(x_clean, [0, 50, 100, 200, 300, 400, 500, 700, 999])

# %% [markdown] given="part1_question"
# Where does the digit disappear for your eye? At $t = 500$ only $\bar\alpha_{500} \approx 0.08$ of the signal's
# variance is left, and the second half of the schedule looks like plain noise. The network still gets half of its
# calls there. Keep that in mind for the timestep schedules of Part 3.

# %% [markdown] given="part2"
# ---
# ## Part 2 · DDPM: a thousand small random steps
#
# Undoing one step of noise is a random step as well. If the step is small its reverse is Gaussian, and with the
# network's noise estimate put in place of the true noise, its mean and variance are (Ho et al. 2020, equations 7 and 11)
#
# $$p_\theta(x_{t-1}\mid x_t) = \mathcal N\!\left(\mu_\theta(x_t,t),\ \tilde\beta_t I\right),\qquad
# \mu_\theta = \frac{1}{\sqrt{\alpha_t}}\left(x_t - \frac{\beta_t}{\sqrt{1-\bar\alpha_t}}\,\epsilon_\theta(x_t,t)\right),\qquad
# \tilde\beta_t = \beta_t\,\frac{1-\bar\alpha_{t-1}}{1-\bar\alpha_t}.$$
#
# Two different alphas stand in one formula: $\alpha_t$ undoes *this* step, $\bar\alpha_t$ says how much noise there is
# *in all*. Mixing them up is the most common mistake in diffusion code.


# %% given="ddpm_class"
class DDPMSampler:
    """Stochastic sampling (Ho et al. 2020, algorithm 2).

    Args:
        model: noise predictor, called as model(x, t) with x [B, C, H, W] and t a LongTensor [B].
        schedule: the noise schedule it was trained with.
    """

    def __init__(self, model, schedule: NoiseSchedule):
        self.model = model
        self.schedule = schedule


# %% [markdown] given="ddpm_posterior_mean_text"
# ### 2.1 The mean
# 🟢 easy · 7 points · 5 min · under 1 CPU second
#
# <details><summary>Hint</summary>
#
# Three tables are needed at `t`: `betas`, `alphas` and `alphas_cumprod`. `torch.as_tensor(t)` makes an int and a
# LongTensor look alike; after indexing, `.view(-1, 1, 1, 1)`.
# </details>


# %% exercise="ddpm_posterior_mean"
@add_to_class(DDPMSampler)
def compute_posterior_mean(self, x_t: Tensor, t: int | Tensor, predicted_noise: Tensor) -> Tensor:
    """Mean of p(x_{t-1} | x_t).

    Args:
        x_t: noisy images [B, C, H, W].
        t: timestep, an int or a LongTensor [B].
        predicted_noise: the network's estimate of the noise in x_t, [B, C, H, W].

    Returns:
        The mean, [B, C, H, W].
    """
    # TODO: mu_theta, from the formula above.
    ### BEGIN SOLUTION
    index = torch.as_tensor(t).cpu()  # the tables live on the CPU
    beta, alpha, alpha_bar = (
        table[index].to(x_t).view(-1, 1, 1, 1)
        for table in (self.schedule.betas, self.schedule.alphas, self.schedule.alphas_cumprod)
    )
    return (x_t - beta / (1 - alpha_bar).sqrt() * predicted_noise) / alpha.sqrt()
    ### END SOLUTION


# %% check="ddpm_posterior_mean"
check("ddpm_posterior_mean")

# %% [markdown] given="ddpm_posterior_variance_text"
# ### 2.2 The variance
# 🟡 a trap at t = 0 · 7 points · 5 min · under 1 CPU second
#
# It must be *exactly* 0 at $t = 0$: the last step leads to clean data, and adds no noise.
#
# <details><summary>Hint: the trap</summary>
#
# What is $\bar\alpha_{t-1}$ at $t = 0$? In the table of conventions at the top it is 1. In Python,
# `alphas_cumprod[-1]` is the *noisiest* entry. `schedule.alpha_bar(-1)` does the right thing.
# </details>


# %% exercise="ddpm_posterior_variance"
@add_to_class(DDPMSampler)
def compute_posterior_variance(self, t: int | Tensor) -> Tensor:
    """Variance of p(x_{t-1} | x_t).

    Args:
        t: timestep, an int or a LongTensor [B], which may mix t = 0 with others.

    Returns:
        The variance: 0-dimensional for an int, [B] for a LongTensor; exactly 0 where t = 0.
    """
    # TODO: beta tilde, from the formula above.
    ### BEGIN SOLUTION
    t = torch.as_tensor(t)
    before, now = self.schedule.alpha_bar(t - 1), self.schedule.alpha_bar(t)
    return self.schedule.betas[t.cpu()].to(t.device) * (1 - before) / (1 - now)
    ### END SOLUTION


# %% check="ddpm_posterior_variance"
check("ddpm_posterior_variance")

# %% [markdown] given="ddpm_step_text"
# ### 2.3 One step
# 🟡 medium · 6 points · 5 min · 1 CPU second
#
# Ask the network for the noise in $x_t$ (one call), then draw $x_{t-1} = \mu_\theta + \sqrt{\tilde\beta_t}\,z$ with
# $z\sim\mathcal N(0, I)$. If something in 2.1 or 2.2 is still wrong, this step can have its points all the same: it
# passes if it matches either the right mean and variance or your own.
#
# <details><summary>Hint</summary>
#
# The network wants a timestep for every image: `torch.full((len(x_t),), t, device=x_t.device)`. And it is the standard
# deviation, not the variance, that scales the noise.
# </details>


# %% exercise="ddpm_step"
@add_to_class(DDPMSampler)
@torch.no_grad()
def ddpm_step(self, x_t: Tensor, t: int) -> Tensor:
    """Draw x_{t-1} from p(x_{t-1} | x_t): one network call, no noise at t = 0.

    Args:
        x_t: noisy images [B, C, H, W], left unchanged.
        t: timestep, an int.

    Returns:
        x_{t-1}, [B, C, H, W].
    """
    # TODO: one network call, then mean plus noise.
    ### BEGIN SOLUTION
    eps = self.model(x_t, torch.full((len(x_t),), t, device=x_t.device))
    mean = self.compute_posterior_mean(x_t, t, eps)
    std = self.compute_posterior_variance(t).to(x_t).sqrt()
    return mean + std * torch.randn_like(x_t)
    ### END SOLUTION


# %% check="ddpm_step"
check("ddpm_step")

# %% [markdown] given="ddpm_sample_text"
# ### 2.4 The whole chain
# 🟡 medium · 6 points · 10 min · 1 CPU second for the check, half a minute for the demo
#
# Start from $x_T \sim \mathcal N(0, I)$ and take all $T$ steps, $t = T-1, \dots, 1, 0$. A *trajectory* is the list of
# all states: it starts with `x_T`, ends with the samples, and has one entry more than there were network calls.
#
# <details><summary>Hint</summary>
#
# When no `x_T` is given, draw it with the dtype and on the device of the model: `next(self.model.parameters())` knows
# both.
# </details>


# %% exercise="ddpm_sample"
@add_to_class(DDPMSampler)
@torch.no_grad()
def sample(self, shape: tuple[int, ...], return_trajectory: bool = False, *, x_T: Tensor | None = None):
    """Draw samples with all T steps.

    Args:
        shape: [B, C, H, W].
        return_trajectory: also return every state.
        x_T: the noise to start from, left unchanged; drawn from N(0, I) when None.

    Returns:
        samples, or (samples, trajectory) with trajectory a list of T + 1 tensors [B, C, H, W], x_T first, no two of
        them the same memory. Samples have the dtype and device of x_T, or of the model's parameters when x_T is None.
    """
    # TODO: T calls of ddpm_step.
    ### BEGIN SOLUTION
    if x_T is None:
        parameter = next(self.model.parameters())
        x_T = torch.randn(shape, dtype=parameter.dtype, device=parameter.device)
    trajectory = [x_T.clone()]
    x = x_T
    for t in reversed(range(self.schedule.num_timesteps)):
        x = self.ddpm_step(x, t)
        if return_trajectory:
            trajectory.append(x)
    return (x, trajectory) if return_trajectory else x
    ### END SOLUTION


# %% check="ddpm_sample"
check("ddpm_sample")

# %% [markdown] given="ddpm_demo_text"
# Your first digits out of noise. This takes half a minute to a minute on two cores: a thousand network calls.

# %% tags=["demo"]
torch.manual_seed(0)
start = time.perf_counter()
with count_calls(model) as counter:
    ddpm_samples, ddpm_trajectory = DDPMSampler(model, schedule).sample(x_T.shape, return_trajectory=True, x_T=x_T)
print(f"DDPM: {counter.calls} network calls in {time.perf_counter() - start:.1f} s")
plots.trajectory(ddpm_trajectory, title="DDPM, from noise to digits")

# %% [markdown] given="part3"
# ---
# ## Part 3 · DDIM: fifty long steps
#
# Training only ever used the marginals $q(x_t\mid x_0)$, and many different processes share them. Song et al. (2021)
# pick a family with a dial $\eta$. To go from $t$ to *any* earlier $s$, first guess the clean image, then go back to
# noise level $s$ in the direction of the noise you saw, with some of it renewed (their equations 9, 12 and 16):
#
# $$\hat x_0 = \frac{x_t - \sqrt{1-\bar\alpha_t}\,\epsilon_\theta}{\sqrt{\bar\alpha_t}},\qquad
# x_s = \sqrt{\bar\alpha_s}\,\hat x_0 + \sqrt{1-\bar\alpha_s-\sigma^2}\;\epsilon_\theta + \sigma z,\qquad
# \sigma^2 = \eta^2\,\frac{1-\bar\alpha_s}{1-\bar\alpha_t}\left(1-\frac{\bar\alpha_t}{\bar\alpha_s}\right).$$
#
# $\eta = 0$ is deterministic: the same $x_T$ always becomes the same digit. $\eta = 1$ on consecutive steps is exactly
# the DDPM of Part 2. The last jump goes to $s = -1$, clean data, where the formula leaves $\hat x_0$ alone.


# %% given="ddim_class"
class DDIMSampler:
    """Sampling with step skipping (Song et al. 2021).

    Args:
        model: noise predictor, called as model(x, t) with x [B, C, H, W] and t a LongTensor [B].
        schedule: the noise schedule it was trained with.
    """

    def __init__(self, model, schedule: NoiseSchedule):
        self.model = model
        self.schedule = schedule


# %% [markdown] given="ddim_predict_x0_text"
# ### 3.1 Guess the clean image
# 🟢 easy · 5 points · 5 min · under 1 CPU second
#
# This is 1.1 solved for $x_0$.


# %% exercise="ddim_predict_x0"
@add_to_class(DDIMSampler)
def predict_x0_from_eps(self, x_t: Tensor, eps: Tensor, t: int | Tensor) -> Tensor:
    """The clean image that x_t would come from if its noise were eps.

    Args:
        x_t: noisy images [B, C, H, W].
        eps: noise [B, C, H, W].
        t: timestep, an int or a LongTensor [B].

    Returns:
        The estimate of x_0, [B, C, H, W], not clipped.
    """
    # TODO: x_0 hat, from the formula above.
    ### BEGIN SOLUTION
    alpha_bar = self.schedule.alpha_bar(t).to(x_t).view(-1, 1, 1, 1)
    return (x_t - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
    ### END SOLUTION


# %% check="ddim_predict_x0"
check("ddim_predict_x0")

# %% [markdown] given="ddim_schedule_text"
# ### 3.2 Which timesteps to visit
# 🟡 medium · 4 + 4 points · 10 min · under 1 CPU second
#
# With $N$ network calls, which $N$ timesteps should be visited? Both kinds of schedule start at $T-1$, because that is
# how noisy $x_T$ is, fall strictly, and end at $0$, from where the last jump leads to clean data.
#
# * `"uniform"`: evenly spaced, rounded.
# * `"quadratic"`: the square roots of the timesteps are evenly spaced, and the squares rounded, so that they are dense
#   near 0, where fine detail is decided. With many steps, rounding makes repeats there (with $T = 1000$ from $N = 46$
#   on). Resolve them near where they arise, in any way that keeps exactly $N$ different timesteps.
#
# <details><summary>Hint: uniform</summary>
#
# `torch.linspace(a, b, N)` has $N$ entries, both ends among them. Round before `.long()`, which truncates.
# </details>
# <details><summary>Hint: resolving repeats</summary>
#
# Write the schedule in ascending order and walk along it: an entry that is not larger than the one before it becomes
# that one plus 1. Can this ever climb past $T-1$? (No, as long as $N \le T$.)
# </details>


# %% exercise="ddim_uniform_schedule"
@add_to_class(DDIMSampler)
def create_timestep_schedule(self, num_steps: int, schedule_type: str = "uniform") -> Tensor:
    """The timesteps that a sampler with num_steps network calls visits.

    Args:
        num_steps: N, from 1 to T.
        schedule_type: "uniform" or "quadratic".

    Returns:
        LongTensor [N], strictly decreasing from T - 1 to 0; for N = 1 it is [T - 1].

    Raises:
        ValueError: for an unknown schedule_type, num_steps < 1, or num_steps > T.
    """
    # TODO: refuse bad arguments, then build the schedule.
    ### BEGIN SOLUTION
    T = self.schedule.num_timesteps
    if not 1 <= num_steps <= T:
        raise ValueError(f"num_steps must lie between 1 and {T}, got {num_steps}")
    if schedule_type == "uniform":
        return torch.linspace(T - 1, 0, num_steps, dtype=torch.float64).round().long()
    if schedule_type != "quadratic":
        raise ValueError(f"schedule_type must be 'uniform' or 'quadratic', got {schedule_type!r}")
    if num_steps == 1:
        return torch.tensor([T - 1])
    ascending = (torch.linspace(0, (T - 1) ** 0.5, num_steps, dtype=torch.float64) ** 2).round().long()
    for i in range(1, num_steps):
        ascending[i] = max(ascending[i], ascending[i - 1] + 1)
    return ascending.flip(0)
    ### END SOLUTION


# %% check="ddim_uniform_schedule"
check("ddim_uniform_schedule")

# %% check="ddim_quadratic_schedule"
check("ddim_quadratic_schedule")

# %% [markdown] given="ddim_step_text"
# ### 3.3 One jump
# 🔴 the heart of the lab · 7 + 7 points · 10 min · 1 CPU second
#
# Write the step for any $\eta$; the first check tries $\eta = 0$, the second the rest. Note the $-\sigma^2$ under the
# root: noise that is renewed is taken out of the old direction, so that the total stays $1-\bar\alpha_s$. A step that
# forgets it adds variance every time.
#
# <details><summary>Hint: s = −1</summary>
#
# `schedule.alpha_bar(-1)` is 1, and the formula does the rest: nothing special is needed. Indexing `alphas_cumprod[-1]`
# is the trap of 2.2 again.
# </details>
# <details><summary>Hint: rounding under the root</summary>
#
# $1-\bar\alpha_s-\sigma^2$ is never negative on paper; in float32 it can be, by a hair. `.clamp(min=0)`.
# </details>


# %% exercise="ddim_step"
@add_to_class(DDIMSampler)
@torch.no_grad()
def ddim_step(self, x_t: Tensor, t: int, s: int, eta: float = 0.0) -> Tensor:
    """Jump from timestep t to an earlier one: one network call.

    Args:
        x_t: noisy images [B, C, H, W], left unchanged.
        t: where x_t is, an int.
        s: where to go, -1 <= s < t; -1 is clean data.
        eta: 0 for a deterministic step, 1 for as much noise as DDPM.

    Returns:
        x_s, [B, C, H, W].

    Raises:
        ValueError: unless -1 <= s < t.
    """
    # TODO: refuse a bad s, then: one network call, x_0 hat, direction, noise.
    ### BEGIN SOLUTION
    if not -1 <= s < t:
        raise ValueError(f"s must satisfy -1 <= s < t = {t}, got {s}")
    eps = self.model(x_t, torch.full((len(x_t),), t, device=x_t.device))
    x_0 = self.predict_x0_from_eps(x_t, eps, t)
    a_t, a_s = self.schedule.alpha_bar(t).to(x_t), self.schedule.alpha_bar(s).to(x_t)
    variance = eta**2 * (1 - a_s) / (1 - a_t) * (1 - a_t / a_s)
    x_s = a_s.sqrt() * x_0 + (1 - a_s - variance).clamp(min=0).sqrt() * eps
    if eta > 0:
        x_s = x_s + variance.sqrt() * torch.randn_like(x_t)
    return x_s
    ### END SOLUTION


# %% check="ddim_deterministic_step"
check("ddim_deterministic_step")

# %% check="ddim_eta_step"
check("ddim_eta_step")

# %% [markdown] given="ddim_sample_text"
# ### 3.4 The whole chain, skipping steps
# 🟡 medium · 5 points · 10 min · 1 CPU second
#
# With timesteps $t_0 > t_1 > \dots > t_{N-1}$, jump $t_0\to t_1\to\dots\to t_{N-1}\to -1$: $N$ timesteps, $N$ network
# calls. `timesteps` may be a list or a LongTensor; `None` means all $T$.


# %% exercise="ddim_sample"
@add_to_class(DDIMSampler)
@torch.no_grad()
def sample(
    self,
    shape: tuple[int, ...],
    timesteps=None,
    eta: float = 0.0,
    return_trajectory: bool = False,
    *,
    x_T: Tensor | None = None,
):
    """Draw samples, visiting only the given timesteps.

    Args:
        shape: [B, C, H, W].
        timesteps: strictly decreasing ints, a list or a LongTensor; None for all T.
        eta: passed to every step.
        return_trajectory: also return every state.
        x_T: the noise to start from, left unchanged; drawn from N(0, I) when None.

    Returns:
        samples, or (samples, trajectory) with trajectory a list of len(timesteps) + 1 tensors [B, C, H, W], x_T first,
        no two of them the same memory. Samples have the dtype and device of x_T, or of the model's parameters when x_T
        is None.
    """
    # TODO: one ddim_step for each timestep, the last one to -1.
    ### BEGIN SOLUTION
    if timesteps is None:
        timesteps = range(self.schedule.num_timesteps - 1, -1, -1)
    if x_T is None:
        parameter = next(self.model.parameters())
        x_T = torch.randn(shape, dtype=parameter.dtype, device=parameter.device)
    visited = [int(t) for t in timesteps]
    trajectory = [x_T.clone()]
    x = x_T
    for t, s in zip(visited, [*visited[1:], -1]):
        x = self.ddim_step(x, t, s, eta)
        if return_trajectory:
            trajectory.append(x)
    return (x, trajectory) if return_trajectory else x
    ### END SOLUTION


# %% check="ddim_sample"
check("ddim_sample")

# %% [markdown] given="ddim_demo_text"
# The same noise that DDPM started from above, in 50 calls instead of 1000. These will not be the digits that DDPM drew:
# it threw dice on the way. Run this cell twice, and DDIM's digits will not change.

# %% tags=["demo"]
ddim = DDIMSampler(model, schedule)
start = time.perf_counter()
with count_calls(model) as counter:
    ddim_samples, ddim_trajectory = ddim.sample(
        x_T.shape, timesteps=ddim.create_timestep_schedule(50), return_trajectory=True, x_T=x_T
    )
print(f"DDIM: {counter.calls} network calls in {time.perf_counter() - start:.1f} s")
plots.trajectory(ddim_trajectory, title="DDIM with 50 steps, from the same noise")

# %% tags=["demo"]
torch.manual_seed(1)
rows = {"DDPM 1000": ddpm_samples[:10]} if "ddpm_samples" in globals() else {}
for num_steps, eta in ((50, 0.0), (20, 0.0), (10, 0.0), (50, 0.5), (50, 1.0)):
    timesteps = ddim.create_timestep_schedule(num_steps)
    rows[f"DDIM {num_steps}, η = {eta:g}"] = ddim.sample((10, 1, 28, 28), timesteps, eta, x_T=x_T[:10])
plots.show_images(rows, title="One noise, six samplers: a column starts from the same x_T")

# %% [markdown] task="written_analysis" points=8
# ---
# ## Written analysis
# 8 points, read by a person. Answer in the cell below, in 150 to 300 words, with numbers and pictures from your own runs:
#
# 1. What does DDIM give up for its speed, and what not? Compare your DDPM and DDIM digits at 50, 20 and 10 steps.
# 2. What does η change, in one sample and over many? When would you want η = 0, when η = 1? (`difflab.metrics` has
#    `quality(images)` and `diversity(images)`.)
# 3. Which sampler and how many steps would you ship in a product that draws digits while a user waits, and why?
#
# === BEGIN MARK SCHEME ===
# | Points | Level |
# |---|---|
# | 7–8 | All three questions answered with the student's own measurements; separates network calls from seconds; knows that η = 0 maps one x_T to one digit and that noise can repair an imperfect network's errors; the recommendation follows from stated numbers |
# | 5–6 | All three answered, mostly with evidence; one claim without support, or speed and quality not weighed against each other |
# | 3–4 | Two answered, or general statements without own numbers |
# | 1–2 | An attempt that shows some understanding of the difference between the samplers |
# | 0 | Nothing, or text unrelated to the runs |
# === END MARK SCHEME ===

# %% [markdown] answer="written_analysis"
# *Your analysis here.*

# %% [markdown] task="code_quality" points=3
# ## Code quality
# 3 points, read by a person, for the code above; nothing to write here.
#
# === BEGIN MARK SCHEME ===
# | Points | Level |
# |---|---|
# | 3 | Names from the field, no repeated formulas, helpers where they help, comments that say why |
# | 2 | Clear on the whole; some repetition, or names that hide what they hold |
# | 1 | Works, but is hard to follow |
# | 0 | Not completed, or not readable |
# === END MARK SCHEME ===

# %% [markdown] given="submit"
# ---
# **Before you hand in:** *Kernel → Restart Kernel and Run All Cells*. Cells whose check does not pass show their hint,
# and the rest runs on. Then save, and submit this `.ipynb` file under its own name.
