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
# | Part | Time | Points |
# |---|---|---|
# | 1 · Noise, and the network that sees it | 15 min | 8 |
# | 2 · DDPM: a thousand small random steps | 25 min | 26 |
# | 3 · DDIM: fifty long ones, and η, the dial between the two | 25 min | 39 |
# | 4 · Which sampler, then? | 15 min | 4, and 8 for your written analysis |
# | 5 · Sampling for production | 10 min | 10 |
# | Code quality, throughout | | 2, and 3 given by a person |
#
# That is 90 minutes for two people and 100 points. Exercises marked *practice* have a check but no points; those marked
# *optional* are for whoever has time left.
#
# **How to work.** Each exercise is a cell with a `TODO`. Replace the line that raises `NotImplementedError`, run the
# cell, then run the `check(...)` cell below it. A green line is the points; anything else is a hint. The checks are
# the very ones that grade your hand-in, with new random numbers every time, so green here is green there. Add cells of
# your own wherever you like, with helpers and imports; the cells that are given (set-up, class heads, checks) are put
# back as they were when your notebook is graded. Any correct program passes: apart from two points for tidy code, no
# check looks at how you wrote it.
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
from difflab.metrics import diversity, quality
from difflab.notebook import add_to_class, progress
from difflab.quality_table import quality_table
from difflab.schedule import NoiseSchedule
from difflab.timing import count_calls, measure, measure_in_turns, peak_memory, synchronize

model, schedule = load_pretrained("mnist-small")
x_clean, labels = load_digits(64)
x_T = torch.randn(16, 1, 28, 28, generator=torch.Generator().manual_seed(0))  # one noise for all demonstrations
print(schedule)

# %% [markdown] given="part1"
# ---
# ## Part 1 · Noise, and the network that sees it
# 15 minutes
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
# 🟢 easy · 4 points · 4 min · under 1 CPU second
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
# 🟢 easy · practice · 3 min · 1 CPU second
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
# variance is left, and the second half of the schedule looks like plain noise. What does the network see there?


# %% given="analyzer_class"
class TrainedModelAnalyzer:
    """Looks at a trained noise predictor.

    Args:
        model: noise predictor, called as model(x, t) with x [B, C, H, W] and t a LongTensor [B].
        schedule: the noise schedule it was trained with.
    """

    def __init__(self, model, schedule: NoiseSchedule):
        self.model = model
        self.schedule = schedule


# %% [markdown] given="prediction_quality_text"
# ### 1.3 How well does it see the noise?
# 🟡 medium · 4 points · 5 min · 1 CPU second
#
# Before sampling from a network, look at what it can do. Noise the clean images to each timestep, let the network
# predict the noise, and compare over all pixels of all images:
#
# * `"mse"`: the mean of $(\epsilon-\hat\epsilon)^2$ (a network that always answers 0 would score 1),
# * `"correlation"`: Pearson's $r$ between $\epsilon$ and $\hat\epsilon$,
# * `"snr"`: the signal-to-noise ratio $\bar\alpha_t / (1-\bar\alpha_t)$ of that timestep.
#
# Before you run it: where will the error be largest, where there is most noise, or least?
#
# <details><summary>Hint</summary>
#
# `torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]` is Pearson's $r$ of two tensors.
# </details>


# %% exercise="prediction_quality"
@add_to_class(TrainedModelAnalyzer)
@torch.no_grad()
def analyze_noise_prediction_quality(self, x_clean: Tensor, timesteps: list[int]) -> dict[int, dict[str, float]]:
    """Compare predicted with true noise.

    Args:
        x_clean: clean images [B, C, H, W].
        timesteps: which timesteps to look at.

    Returns:
        For every timestep a dict of plain floats, "mse", "correlation" and "snr", over all pixels of x_clean noised to
        that timestep.
    """
    # TODO: for each timestep: noise, predict, compare.
    ### BEGIN SOLUTION
    forward = ForwardProcessImpl(self.schedule)
    results = {}
    for t in timesteps:
        x_t, eps = forward.add_noise(x_clean, t)
        predicted = self.model(x_t, torch.full((len(x_t),), t, device=x_t.device))
        alpha_bar = self.schedule.alpha_bar(t).item()
        results[t] = {
            "mse": (eps - predicted).square().mean().item(),
            "correlation": torch.corrcoef(torch.stack([eps.flatten(), predicted.flatten()]))[0, 1].item(),
            "snr": alpha_bar / (1 - alpha_bar),
        }
    return results
    ### END SOLUTION


# %% check="prediction_quality"
check("prediction_quality")

# %% [markdown] given="noise_predictions_text"
# ### 1.4 See what it sees
# 🟢 easy · practice · 3 min · 1 CPU second
#
# A row for each timestep, four pictures a row, each in axes of its own: $x_t$, the true $\epsilon$, the predicted
# $\hat\epsilon$, and the clean image they imply, $\hat x_0 = (x_t - \sqrt{1-\bar\alpha_t}\,\hat\epsilon)/\sqrt{\bar\alpha_t}$.


# %% exercise="noise_predictions"
@add_to_class(TrainedModelAnalyzer)
@torch.no_grad()
def visualize_noise_predictions(self, x_clean: Tensor, timesteps: list[int]):
    """Show x_t, the true noise, the predicted noise, and the implied x_0 of the first image.

    Args:
        x_clean: clean images [B, 1, H, W]; the first is shown.
        timesteps: which timesteps to show, in order, one a row.

    Returns:
        A matplotlib Figure with four images, drawn with imshow, for each timestep.
    """
    # TODO: four pictures for each timestep.
    ### BEGIN SOLUTION
    rows = {}
    for t in timesteps:
        x_t, eps = ForwardProcessImpl(self.schedule).add_noise(x_clean[:1], t)
        predicted = self.model(x_t, torch.full((1,), t, device=x_t.device))
        alpha_bar = self.schedule.alpha_bar(t).to(x_t)
        x_0 = (x_t - (1 - alpha_bar).sqrt() * predicted) / alpha_bar.sqrt()
        rows[f"t = {t}"] = torch.cat([x_t, eps, predicted, x_0])
    return plots.show_images(rows, ["x_t", "ε", "ε̂", "x̂_0"])
    ### END SOLUTION


# %% check="noise_predictions"
check("noise_predictions")

# %% tags=["demo"]
torch.manual_seed(0)
analyzer = TrainedModelAnalyzer(model, schedule)
looked_at = [0, 10, 50, 100, 200, 300, 400, 500, 600, 700, 800, 900, 999]
seen = analyzer.analyze_noise_prediction_quality(x_clean, looked_at)
for t, row in seen.items():
    print(f"t = {t:3d}:  mse {row['mse']:.4f}   correlation {row['correlation']:.3f}   snr {row['snr']:.3g}")
analyzer.visualize_noise_predictions(x_clean, [50, 200, 400, 600, 800])

# %% [markdown] given="part1_answer"
# The error is largest where there is *least* noise: at $t = 0$ the network looks for something that is hardly there,
# and it matters little, because so little of it is added back. Near $T$ the prediction of ε is almost perfect, yet
# $\hat x_0$ is a blur: nearly everything in $x_t$ *is* noise, and what is left of the digit fits many digits.

# %% [markdown] given="part2"
# ---
# ## Part 2 · DDPM: a thousand small random steps
# 25 minutes
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
# 🟢 easy · 7 points · 4 min · under 1 CPU second
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
# 🟡 medium · 6 points · 7 min · 1 CPU second for the check, half a minute for the demo
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
    """Draw samples with all T steps. Chance comes from torch, so that torch.manual_seed makes a run repeatable.

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
# Your first eight digits out of noise. A thousand network calls: this takes about twenty seconds on two cores.

# %% tags=["demo"]
torch.manual_seed(0)
start = time.perf_counter()
with count_calls(model) as counter, progress(model, 1000):
    ddpm_samples, ddpm_trajectory = DDPMSampler(model, schedule).sample(
        (8, 1, 28, 28), return_trajectory=True, x_T=x_T[:8]
    )
print(f"DDPM: {counter.calls} network calls in {time.perf_counter() - start:.1f} s")
plots.trajectory(ddpm_trajectory, title="DDPM, from noise to digits")

# %% [markdown] given="seed_consistency_text"
# ### 2.5 Is it the same sampler every time?
# 🟢 easy · practice · 4 min · 1 CPU second
#
# Random is not arbitrary: with one seed the digits must come out the same, and with any seed their statistics must agree.
# Seed torch's generator, draw, seed it again, draw again.


# %% exercise="seed_consistency"
def seed_consistency(sampler: DDPMSampler, shape: tuple[int, ...], seeds: list[int]) -> dict:
    """Sample twice with each seed.

    Args:
        sampler: anything with sample(shape).
        shape: [B, C, H, W].
        seeds: for torch.manual_seed.

    Returns:
        A dict: "repeatable", True if every seed gave exactly the same samples both times; "mean" and "std", for each
        seed the mean and the standard deviation over all pixels of its samples, lists of plain floats.
    """
    # TODO: two runs for each seed.
    ### BEGIN SOLUTION
    repeatable, means, stds = True, [], []
    for seed in seeds:
        torch.manual_seed(seed)
        first = sampler.sample(shape)
        torch.manual_seed(seed)
        second = sampler.sample(shape)
        repeatable = repeatable and torch.equal(first, second)
        means.append(first.mean().item())
        stds.append(first.std().item())
    return {"repeatable": repeatable, "mean": means, "std": stds}
    ### END SOLUTION


# %% check="seed_consistency"
check("seed_consistency")

# %% [markdown] given="part3"
# ---
# ## Part 3 · DDIM: fifty long steps
# 25 minutes
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
# 🟢 easy · 5 points · 2 min · under 1 CPU second
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
# 🟡 medium · 4 + 4 points · 6 min · under 1 CPU second
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

# %% [markdown] given="source_schedules"
# > #### 🔍 Check the source: two schedules from a handout
# > The cell below holds two schedule functions as a course handout prints them. Before you run it, find what is wrong
# > with each: how many timesteps come out, where do they start, where are they dense, where do they end?


# %% tags=["demo"]
def handout_uniform(num_steps, T):
    return torch.linspace(T - 1, 0, num_steps + 1).long()


def handout_quadratic(num_steps, T):
    timesteps = [max(0, int(T * (1 - (i / num_steps) ** 2))) for i in range(num_steps)]
    return torch.tensor(sorted(set(timesteps), reverse=True))


ddim = DDIMSampler(model, schedule)
for name, theirs in (("uniform", handout_uniform), ("quadratic", handout_quadratic)):
    for num_steps in (50, 100):
        a, b = theirs(num_steps, 1000), ddim.create_timestep_schedule(num_steps, name)
        print(f"{name:9} {num_steps:3d} steps   handout: {len(a):3d} entries {a[:3].tolist()} … {a[-3:].tolist()}")
        print(f"{'':22} yours: {len(b):3d} entries {b[:3].tolist()} … {b[-3:].tolist()}")

# %% [markdown] given="source_schedules_answer"
# > The uniform one has an entry too many, cuts decimals off instead of rounding, and used as pairs $(t, s)$ it stops at
# > index 0, which still carries noise, and never jumps to clean data. The quadratic one starts at index $T$, which does
# > not exist; its *gaps* shrink toward $T$, so it is dense where everything is noise and leaps where detail is made; and
# > removing repeats loses steps (98 of 100).

# %% [markdown] given="ddim_step_text"
# ### 3.3 One jump
# 🔴 the heart of the lab · 7 + 7 points · 7 min · 1 CPU second
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
# 🟡 medium · 5 points · 4 min · 1 CPU second
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

# %% [markdown] given="source_eta_step"
# > #### 🔍 Check the source: where did the variance come from?
# > The same handout writes the step as $x_s = \sqrt{\bar\alpha_s}\,\hat x_0 + \sqrt{1-\bar\alpha_s}\;\epsilon + \eta\,\sigma z$,
# > with the direction at full length, and defines σ once without η and once with it. Is that the same? Ask a network
# > that is never wrong: if the data are numbers from $\mathcal N(-0.7,\ 0.3)$, the best noise prediction has a closed
# > form, and a right sampler must end with variance 0.3.


# %% tags=["demo"]
class ExactNoise(torch.nn.Module):
    """The best possible noise prediction for data from N(-0.7, 0.3)."""

    def forward(self, x, t):
        a = schedule.alpha_bar(t).view(-1, 1, 1, 1)
        return (1 - a).sqrt() * (x + 0.7 * a.sqrt()) / (0.3 * a + 1 - a)


def handout_step(full_direction, eta_twice):
    def step(self, x_t, t, s, eta=0.0):
        a_t, a_s = schedule.alpha_bar(t), schedule.alpha_bar(s)
        eps = self.model(x_t, torch.full((len(x_t),), t))
        sigma = eta * ((1 - a_s) / (1 - a_t) * (1 - a_t / a_s)).sqrt()
        kept = 1 - a_s if full_direction else (1 - a_s - sigma**2).clamp(min=0)
        x_0 = (x_t - (1 - a_t).sqrt() * eps) / a_t.sqrt()
        z = torch.randn_like(x_t)
        return a_s.sqrt() * x_0 + kept.sqrt() * eps + (eta * sigma if eta_twice else sigma) * z

    return type("Handout", (DDIMSampler,), {"ddim_step": step})


torch.manual_seed(0)
numbers = torch.randn(20_000, 1, 1, 1)
full_direction, eta_twice = handout_step(True, False), handout_step(False, True)
print("variance of 20 000 numbers drawn with all 1000 steps; the data have 0.300\n")
for eta, name, sampler_class in (
    (1.0, "your step", DDIMSampler),
    (1.0, "direction at full length", full_direction),
    (0.5, "your step", DDIMSampler),
    (0.5, "η applied twice", eta_twice),
):
    numbers_out = sampler_class(ExactNoise(), schedule).sample(numbers.shape, eta=eta, x_T=numbers)
    print(f"η = {eta:<3g}   {name:26} {numbers_out.var():.3f}")

# %% [markdown] given="source_eta_step_answer"
# > Every step adds noise of variance $\sigma^2$. If the old noise is not shortened by as much, it piles up, a thousand
# > times; if σ is multiplied by η once more, too little is added for what was taken out, and the spread shrinks.

# %% [markdown] given="ddim_demo_text"
# The same noise that DDPM started from above, in 50 calls instead of 1000. These will not be the digits that DDPM drew:
# it threw dice on the way. Run this cell twice, and DDIM's digits will not change.

# %% tags=["demo"]
start = time.perf_counter()
with count_calls(model) as counter:
    ddim_samples, ddim_trajectory = ddim.sample(
        x_T.shape, timesteps=ddim.create_timestep_schedule(50), return_trajectory=True, x_T=x_T
    )
print(f"DDIM: {counter.calls} network calls in {time.perf_counter() - start:.1f} s")
plots.trajectory(ddim_trajectory, title="DDIM with 50 steps, from the same noise")

# %% tags=["demo"]
torch.manual_seed(1)
drawn = {}
for num_steps, eta in ((50, 0.0), (20, 0.0), (10, 0.0), (50, 0.5), (50, 1.0)):
    timesteps = ddim.create_timestep_schedule(num_steps)
    drawn[f"DDIM {num_steps}, η = {eta:g}"] = ddim.sample((10, 1, 28, 28), timesteps, eta, x_T=x_T[:10])
plots.show_images(drawn, title="One noise, five samplers: a column starts from the same x_T")

# %% [markdown] given="stochasticity_text"
# ### 3.5 The dial η
# 🟡 medium · 3 + 4 points · 6 min · 2 CPU seconds
#
# First the variance $\sigma^2$ of a step as a method of its own. Then two measurements for each η: how far apart two
# runs from *one* noise end (0 when nothing is random), and how different the samples of one batch are from each other.
#
# <details><summary>Hint</summary>
#
# Draw one `x_T` and start every run from it. `diversity(images)`, imported at the top, is the second measurement.
# </details>


# %% given="stochasticity_class"
class StochasticityController:
    """Measures what eta does.

    Args:
        ddim_sampler: a DDIMSampler; its model and schedule are used.
    """

    def __init__(self, ddim_sampler: DDIMSampler):
        self.ddim_sampler = ddim_sampler
        self.schedule = ddim_sampler.schedule


# %% exercise="ddim_stochastic_variance"
@add_to_class(StochasticityController)
def compute_stochastic_variance(self, t: int, s: int, eta: float) -> Tensor:
    """Variance of the noise in a DDIM step (Song et al. 2021, equation 16).

    Args:
        t, s: the step's timesteps, -1 <= s < t.
        eta: the dial.

    Returns:
        sigma^2, a 0-dimensional tensor; 0 at s = -1.
    """
    # TODO: sigma^2, from the formula at the top of Part 3.
    ### BEGIN SOLUTION
    a_t, a_s = self.schedule.alpha_bar(t), self.schedule.alpha_bar(s)
    return eta**2 * (1 - a_s) / (1 - a_t) * (1 - a_t / a_s)
    ### END SOLUTION


# %% check="ddim_stochastic_variance"
check("ddim_stochastic_variance")


# %% exercise="eta_effects"
@add_to_class(StochasticityController)
def analyze_eta_effects(self, shape: tuple[int, ...], eta_values: list[float], num_steps: int) -> dict[float, dict]:
    """Sample twice from one x_T for each eta, and compare.

    Args:
        shape: [B, C, H, W], B >= 2.
        eta_values: the etas to try; every run of every eta starts from the same x_T.
        num_steps: network calls of each run, on the uniform schedule.

    Returns:
        For every eta a dict: "samples", the first run's samples [B, C, H, W]; "repeat_distance", the root-mean-square
        difference between the two runs over all pixels; "diversity", the root-mean-square difference of two images of
        the first run, averaged over all pairs of different images. The last two are plain floats.
    """
    # TODO: two runs for each eta, from one x_T.
    ### BEGIN SOLUTION
    parameter = next(self.ddim_sampler.model.parameters())
    x_T = torch.randn(shape, dtype=parameter.dtype, device=parameter.device)
    timesteps = self.ddim_sampler.create_timestep_schedule(num_steps)
    effects = {}
    for eta in eta_values:
        first, second = (self.ddim_sampler.sample(shape, timesteps, eta, x_T=x_T) for _ in range(2))
        effects[eta] = {
            "samples": first,
            "repeat_distance": (first - second).square().mean().sqrt().item(),
            "diversity": diversity(first),
        }
    return effects
    ### END SOLUTION


# %% check="eta_effects"
check("eta_effects")

# %% tags=["demo"]
torch.manual_seed(2)
effects = StochasticityController(ddim).analyze_eta_effects((10, 1, 28, 28), [0.0, 0.25, 0.5, 0.75, 1.0], num_steps=20)
for eta, effect in effects.items():
    print(f"η = {eta:.2f}: two runs differ by {effect['repeat_distance']:.3f}, two digits by {effect['diversity']:.3f}")
plots.show_images({f"η = {eta:g}": effect["samples"] for eta, effect in effects.items()})

# %% [markdown] given="part4"
# ---
# ## Part 4 · Which sampler, then?
# 15 minutes, the written analysis included
#
# What does a step count cost, and what does it buy? Cost is told twice: in *network calls*, which are the same on every
# machine, and in seconds, which are yours.

# %% [markdown] given="compare_samplers_text"
# ### 4.1 Calls, seconds, memory, diversity
# 🟡 medium · 4 points · 5 min · 2 CPU seconds for the check, one to two minutes for the demo
#
# `with count_calls(model) as counter:` counts in `counter.calls`. A GPU works on after Python has gone on, so call
# `synchronize(device)` before each look at the clock. `peak_memory(work, device)` calls `work()` and returns the most
# bytes that its tensors took at once; without a trajectory one step needs as much as a thousand, so give it one step.


# %% exercise="compare_samplers"
def compare_samplers(
    ddpm_sampler: DDPMSampler,
    ddim_sampler: DDIMSampler,
    num_samples: int = 16,
    step_counts: tuple[int, ...] = (200, 100, 50, 20, 10),
    sample_shape: tuple[int, ...] = (1, 28, 28),
) -> list[dict]:
    """Run DDPM with all steps, and DDIM (eta = 0, uniform schedule) with each of step_counts, all from one x_T.

    Args:
        ddpm_sampler, ddim_sampler: on one model and schedule.
        num_samples: images drawn by each, at least 2.
        step_counts: numbers of steps for DDIM.
        sample_shape: [C, H, W].

    Returns:
        A dict for each sampler, DDPM first, then DDIM in the order of step_counts: "name" ("DDPM-1000", "DDIM-50", …),
        "network_calls" (counted, not assumed), "seconds" of the run, "speedup" (DDPM's seconds over this one's),
        "peak_memory" in bytes, "diversity" of its samples, and "samples" [num_samples, *sample_shape].
    """
    # TODO: one x_T; then for each sampler: count, time, look.
    ### BEGIN SOLUTION
    parameter = next(ddim_sampler.model.parameters())
    device, T = parameter.device, ddpm_sampler.schedule.num_timesteps
    x_T = torch.randn(num_samples, *sample_shape, dtype=parameter.dtype, device=device)
    schedules = {f"DDIM-{n}": ddim_sampler.create_timestep_schedule(n) for n in step_counts}
    runs = {
        f"DDPM-{T}": (
            lambda: ddpm_sampler.sample(x_T.shape, x_T=x_T),
            lambda: ddpm_sampler.ddpm_step(x_T, T - 1),
        )
    } | {
        name: (
            lambda timesteps=timesteps: ddim_sampler.sample(x_T.shape, timesteps, x_T=x_T),
            lambda: ddim_sampler.ddim_step(x_T, T - 1, -1),
        )
        for name, timesteps in schedules.items()
    }
    rows = []
    for name, (run, one_step) in runs.items():
        memory = peak_memory(one_step, device)  # also the warm-up
        with count_calls(ddim_sampler.model) as counter:
            synchronize(device)
            start = time.perf_counter()
            samples = run()
            synchronize(device)
            seconds = time.perf_counter() - start
        rows.append(
            {
                "name": name,
                "network_calls": counter.calls,
                "seconds": seconds,
                "speedup": rows[0]["seconds"] / seconds if rows else 1.0,
                "peak_memory": memory,
                "diversity": diversity(samples),
                "samples": samples,
            }
        )
    return rows
    ### END SOLUTION


# %% check="compare_samplers"
check("compare_samplers")

# %% tags=["demo"]
torch.manual_seed(3)
with progress(model):
    comparison = compare_samplers(DDPMSampler(model, schedule), ddim)
device = next(model.parameters()).device.type
print(f"16 digits on {device}\n\nsampler     calls   seconds   speed-up   memory     diversity")
for row in comparison:
    print(
        f"{row['name']:10} {row['network_calls']:6d} {row['seconds']:9.2f} {row['speedup']:8.1f} × "
        f"{row['peak_memory'] / 2**20:7.1f} MB {row['diversity']:9.3f}"
    )
plots.show_images({row["name"]: row["samples"][:10] for row in comparison})

# %% [markdown] given="quality_text"
# Sixteen digits tell you about speed, not about quality: that takes thousands, and an hour. The course has measured them
# once, on this very network, with a solution of this lab: the **Fréchet distance** to MNIST in the features of a digit
# classifier (lower is better; it depends on the number of digits $n$, so compare only equal $n$) and the fraction of
# digits the classifier **recognises** with more than 90 % confidence. The dashed line is what real test digits get.

# %% tags=["demo"]
table = quality_table()
plots.quality_curves(table, {row["network_calls"]: row["seconds"] for row in comparison})

# %% [markdown] given="spot_check_text"
# Do your digits belong on that curve? A few of them tell, within a few per cent, how many are recognised; the Fréchet
# distance of so few would be another number altogether.

# %% tags=["demo"]
torch.manual_seed(4)
for row in table.rows:
    if row.label in ("DDIM-10", "DDIM-20"):
        with progress(model, row.network_calls):
            yours = quality(ddim.sample((128, 1, 28, 28), ddim.create_timestep_schedule(row.network_calls)))
        print(
            f"{row.label}: recognised {yours.recognised:.0%} of {yours.n} of yours, {row.recognised:.0%} in the table"
        )

# %% [markdown] given="x0_error_gain_text"
# ### 4.2 The far end of the schedule
# 🟢 easy · practice · 3 min · under 1 CPU second
#
# If the network's ε is off by δ, by how much is $\hat x_0 = (x_t - \sqrt{1-\bar\alpha_t}\,\epsilon)/\sqrt{\bar\alpha_t}$
# off? Write the factor, then look at it for $t$ near $T$.


# %% exercise="x0_error_gain"
def x0_error_gain(schedule: NoiseSchedule, timesteps: list[int]) -> Tensor:
    """How many times larger an error in the predicted noise gets in the estimate of x_0.

    Args:
        schedule: a noise schedule.
        timesteps: n timesteps.

    Returns:
        The factors, a tensor [n].
    """
    # TODO: the factor, from the formula above.
    ### BEGIN SOLUTION
    alpha_bar = schedule.alpha_bar(torch.tensor(timesteps))
    return ((1 - alpha_bar) / alpha_bar).sqrt()
    ### END SOLUTION


# %% check="x0_error_gain"
check("x0_error_gain")

# %% tags=["demo"]
ts = [0, 100, 300, 500, 700, 900, 999]
print("t    gain in x̂_0   x̂_0 off by   x_s off by   (ε off by 0.01, jump of 20 timesteps)")
for t, gain in zip(ts, x0_error_gain(schedule, ts).tolist()):
    s = max(t - 20, -1)
    x_t, eps = torch.randn(2, 8, 1, 28, 28)
    delta = 0.01 * torch.randn_like(eps)
    a_s = schedule.alpha_bar(s)
    moved = [ddim.predict_x0_from_eps(x_t, e, t) for e in (eps, eps + delta)]
    x_s = [a_s.sqrt() * x_0 + (1 - a_s).sqrt() * e for x_0, e in zip(moved, (eps, eps + delta))]
    print(f"{t:3d} {gain:12.2f} {(moved[1] - moved[0]).std():12.4f} {(x_s[1] - x_s[0]).std():12.5f}")

# %% [markdown] given="x0_error_gain_answer"
# At $t = 999$ an error of one hundredth in ε moves $\hat x_0$ by three quarters of the way from black to white. The
# *step* survives it: in $x_s$ the two errors, through $\hat x_0$ and through the direction, have opposite signs and almost cancel. That
# is why a sampler that clips or stores $\hat x_0$ in half precision has trouble exactly there, and why few steps (long
# jumps) hurt. At the other end, float32 keeps only three or four digits of $1-\bar\alpha_t$.

# %% [markdown] given="part5"
# ---
# ## Part 5 · Sampling for production
# 10 minutes; 5.4 to 5.6 are optional


# %% given="optimizer_class"
class SamplingOptimizer:
    """DDIM sampling with a budget of time and memory.

    Args:
        ddim_sampler: the sampler to use.
    """

    def __init__(self, ddim_sampler: DDIMSampler):
        self.ddim_sampler = ddim_sampler
        self.cache = {}


# %% [markdown] given="cached_sampling_text"
# ### 5.1 Coefficients, once
# 🟡 medium · 4 points · 4 min · 1 CPU second
#
# With η = 0 a step is $x_s = A\,x_t + B\,\epsilon$ with two numbers that depend on $t$ and $s$ alone. Work out $A$ and
# $B$ on paper, prepare them for all steps, and keep them for the next call. A cache must also know when *not* to be
# used: another number of steps or another schedule has other coefficients.
#
# <details><summary>Hint: the two numbers</summary>
#
# Put $\hat x_0$ into the step: $A = \sqrt{\bar\alpha_s/\bar\alpha_t}$, and what multiplies ε is
# $B = \sqrt{1-\bar\alpha_s} - A\sqrt{1-\bar\alpha_t}$. Prepare them in float64: $B$ is a small difference.
# </details>
# <details><summary>Hint: the key</summary>
#
# What do $A$ and $B$ depend on? The number of steps and the values in `alphas_cumprod`. Two schedules of the same
# length are not the same schedule.
# </details>


# %% exercise="cached_sampling"
@add_to_class(SamplingOptimizer)
@torch.no_grad()
def cached_noise_schedule_sampling(
    self, ddim_sampler: DDIMSampler, shape: tuple[int, ...], num_steps: int, *, x_T: Tensor | None = None
) -> Tensor:
    """DDIM sampling (eta = 0, uniform schedule) with coefficients prepared once and kept for later calls.

    Args:
        ddim_sampler: whose model, schedule and timesteps are used; it may be another one at every call.
        shape: [B, C, H, W].
        num_steps: network calls.
        x_T: the noise to start from, left unchanged; drawn from N(0, I) when None.

    Returns:
        What ddim_sampler.sample(shape, ddim_sampler.create_timestep_schedule(num_steps), x_T=x_T) returns, up to
        rounding.
    """
    # TODO: look the coefficients up, or prepare them; then num_steps network calls.
    ### BEGIN SOLUTION
    if x_T is None:
        parameter = next(ddim_sampler.model.parameters())
        x_T = torch.randn(shape, dtype=parameter.dtype, device=parameter.device)
    schedule = ddim_sampler.schedule
    key = (num_steps, x_T.device, schedule.alphas_cumprod.numpy().tobytes())
    if key not in self.cache:
        timesteps = ddim_sampler.create_timestep_schedule(num_steps)
        a = schedule.alpha_bar(torch.cat([timesteps, torch.tensor([-1])])).double()
        A = (a[1:] / a[:-1]).sqrt()
        B = (1 - a[1:]).sqrt() - A * (1 - a[:-1]).sqrt()
        # Timesteps stay on the device and A, B are plain numbers: no step waits for a copy.
        self.cache[key] = timesteps.to(x_T.device)[:, None], A.tolist(), B.tolist()
    timesteps, A, B = self.cache[key]
    x = x_T
    for t, a, b in zip(timesteps.expand(-1, shape[0]), A, B):
        x = torch.add(x * a, ddim_sampler.model(x, t), alpha=b)
    return x
    ### END SOLUTION


# %% check="cached_sampling"
check("cached_sampling")

# %% [markdown] given="batch_sampling_text"
# ### 5.2 Many samples, little memory
# 🟡 medium · 4 points · 4 min · 1 CPU second
#
# Draw `total_samples` in batches and collect them on the CPU. The last batch may be smaller. When memory runs out,
# PyTorch raises `torch.OutOfMemoryError`: halve the batch, and go on with the smaller size; if even one image does not
# fit, let the error through. Other errors are not yours to catch.


# %% exercise="batch_sampling"
@add_to_class(SamplingOptimizer)
def batch_sampling_with_memory_management(
    self,
    total_samples: int,
    batch_size: int,
    *,
    num_steps: int = 50,
    sample_shape: tuple[int, ...] = (1, 28, 28),
) -> Tensor:
    """Draw samples with self.ddim_sampler (eta = 0, uniform schedule) in batches.

    Args:
        total_samples: how many in all.
        batch_size: how many at once, at most; halved when memory runs out.
        num_steps: network calls a batch.
        sample_shape: [C, H, W].

    Returns:
        Exactly total_samples samples, [total_samples, C, H, W], on the CPU.

    Raises:
        torch.OutOfMemoryError: if a single image does not fit.
    """
    # TODO: batches, the last one partial; on OutOfMemoryError halve and try again.
    ### BEGIN SOLUTION
    timesteps = self.ddim_sampler.create_timestep_schedule(num_steps)
    batches, missing = [], total_samples
    while missing > 0:
        size = min(batch_size, missing)
        try:
            batches.append(self.ddim_sampler.sample((size, *sample_shape), timesteps).cpu())
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            batch_size = size // 2
        else:
            missing -= size
    return torch.cat(batches)
    ### END SOLUTION


# %% check="batch_sampling"
check("batch_sampling")

# %% [markdown] given="health_check_text"
# ### 5.3 Is it healthy?
# 🟢 easy · 2 points · 2 min · under 1 CPU second
#
# What a service runs before it takes traffic. It must be quick (two images, a few steps), and it must never raise: an
# error is a finding, too.


# %% exercise="health_check"
def health_check(sampler: DDIMSampler) -> list[str]:
    """What is wrong with a sampler.

    Finds: schedule.alphas_cumprod not strictly decreasing; a value in it not inside (0, 1); samples of another shape than
    was asked for; samples that are not finite; anything that raises.

    Args:
        sampler: a DDIMSampler; its schedule and what sampler.sample(...) returns are looked at.

    Returns:
        A line for each problem; an empty list for a healthy sampler.
    """
    # TODO: look at the schedule, then draw two images in a few steps; catch what is raised.
    ### BEGIN SOLUTION
    problems = []
    try:
        alpha_bar = sampler.schedule.alphas_cumprod
        if not bool((alpha_bar[1:] < alpha_bar[:-1]).all()):
            problems.append("alphas_cumprod is not strictly decreasing")
        if not bool(((alpha_bar > 0) & (alpha_bar < 1)).all()):
            problems.append("alphas_cumprod leaves (0, 1)")
        shape = (2, 1, 28, 28)
        samples = sampler.sample(shape, sampler.create_timestep_schedule(min(3, len(alpha_bar))))
        if tuple(samples.shape) != shape:
            problems.append(f"asked for samples of shape {shape}, got {tuple(samples.shape)}")
        if not bool(samples.isfinite().all()):
            problems.append("the samples are not finite")
    except Exception as error:
        problems.append(f"{type(error).__name__}: {error}")
    return problems
    ### END SOLUTION


# %% check="health_check"
check("health_check")

# %% [markdown] given="source_caching"
# > #### 🔍 Check the source: does caching give "10–20 %"?
# > The handout promises so. Measure it: plain and cached sampling side by side, in turns, with this network, and then
# > with one that costs nothing.


# %% tags=["demo"]
class FreeNoise(torch.nn.Module):
    """A network that costs nothing: what is left is the sampler's own work."""

    def forward(self, x, t):
        return x


optimizer = SamplingOptimizer(ddim)
for name, network, num_steps in (("this U-Net", model, 10), ("a free network", FreeNoise(), 500)):
    sampler = DDIMSampler(network, schedule)
    timesteps = sampler.create_timestep_schedule(num_steps)
    plain, cached = measure_in_turns(
        [
            lambda: sampler.sample(x_T.shape, timesteps, x_T=x_T),
            lambda: optimizer.cached_noise_schedule_sampling(sampler, x_T.shape, num_steps, x_T=x_T),
        ],
        repeats=5,
    )
    per_step = 1e6 / num_steps
    print(
        f"{name:15} plain {plain.median * per_step:8.1f} µs a step, cached {cached.median * per_step:8.1f} µs: "
        f"{100 * (1 - cached.median / plain.median):.1f} % saved"
    )

# %% [markdown] given="source_caching_answer"
# > The cache saves nearly all of the *sampler's* work, and the sampler's work is a small part of a step: what a cache
# > gains depends on what the network costs. A percentage without the network it was measured on says nothing.

# %% [markdown] given="mixed_precision_text"
# ### 5.4 Half the digits
# 🟡 medium · optional · 5 min · 1 CPU second
#
# Run the *network* in bfloat16, with `torch.autocast(device.type, torch.bfloat16)`, and keep the sampler's own
# arithmetic in float32: a bfloat16 has three significant digits, and a sum of fifty steps in bfloat16 has fewer. The
# samples must be float32 and stay within a root-mean-square distance of 0.005 of those in float32, from the same noise
# and for an exact network.


# %% exercise="mixed_precision"
@add_to_class(SamplingOptimizer)
@torch.no_grad()
def mixed_precision_sampling(self, shape: tuple[int, ...], num_steps: int, *, x_T: Tensor | None = None) -> Tensor:
    """DDIM sampling (eta = 0, uniform schedule): the network in bfloat16 under autocast, everything else in float32.

    Args:
        shape: [B, C, H, W].
        num_steps: network calls.
        x_T: the noise to start from, float32, left unchanged; drawn from N(0, I) when None.

    Returns:
        samples, float32 [B, C, H, W].
    """

    # TODO: sample, with every network call under autocast and its answer brought back to float32.
    ### BEGIN SOLUTION
    def low_precision(x, t):
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.ddim_sampler.model(x, t).float()

    if x_T is None:
        x_T = torch.randn(shape, device=next(self.ddim_sampler.model.parameters()).device)
    timesteps = self.ddim_sampler.create_timestep_schedule(num_steps)
    return DDIMSampler(low_precision, self.ddim_sampler.schedule).sample(shape, timesteps, x_T=x_T)
    ### END SOLUTION


# %% check="mixed_precision"
check("mixed_precision")

# %% [markdown] given="choose_num_steps_text"
# ### 5.5 As good as time allows
# 🟡 medium · optional · 5 min · under 1 CPU second
#
# How many steps fit into a given number of seconds? Measure what a step costs, then divide. The first call of a network
# is often slow (memory is claimed, kernels are chosen), so it must not be counted; and the measurement itself must stay
# cheap: at most 20 network calls.


# %% exercise="choose_num_steps"
@add_to_class(SamplingOptimizer)
@torch.no_grad()
def choose_num_steps(self, seconds: float, shape: tuple[int, ...], *, clock=time.perf_counter) -> int:
    """The largest number of DDIM steps for which a batch of that shape takes at most `seconds`.

    Args:
        seconds: the budget.
        shape: [B, C, H, W].
        clock: tells the time in seconds.

    Returns:
        The number of steps, from 1 (also when even one takes too long) to T.
    """
    # TODO: warm up, time a few steps, divide.
    ### BEGIN SOLUTION
    T, device = self.ddim_sampler.schedule.num_timesteps, next(self.ddim_sampler.model.parameters()).device
    timesteps = self.ddim_sampler.create_timestep_schedule(min(3, T))
    timing = measure(lambda: self.ddim_sampler.sample(shape, timesteps), repeats=3, device=device, clock=clock)
    return max(1, min(T, int(seconds / timing.median * len(timesteps))))
    ### END SOLUTION


# %% check="choose_num_steps"
check("choose_num_steps")

# %% [markdown] given="sample_with_fallbacks_text"
# ### 5.6 Degrade, do not fail
# 🟡 medium · optional · 5 min · under 1 CPU second
#
# A service that cannot have the best sample should return a good one and say so. Try one way after another: a way fails
# when it raises an `Exception`, or returns anything that is not finite.


# %% exercise="sample_with_fallbacks"
def sample_with_fallbacks(attempts: dict) -> tuple[Tensor, str, list[str]]:
    """Samples from the first attempt that works.

    Args:
        attempts: name -> function without arguments that returns samples; tried in order, the best first.

    Returns:
        (samples, the name of the attempt they are from, a line for each attempt that failed before it).

    Raises:
        RuntimeError: if none works; its message holds the name of every attempt.
    """
    # TODO: try each; remember why it failed.
    ### BEGIN SOLUTION
    problems = []
    for name, attempt in attempts.items():
        try:
            samples = attempt()
        except Exception as error:
            problems.append(f"{name}: {type(error).__name__}: {error}")
            continue
        if bool(samples.isfinite().all()):
            return samples, name, problems
        problems.append(f"{name}: the samples are not finite")
    raise RuntimeError(f"no way of sampling worked: {'; '.join(problems)}")
    ### END SOLUTION


# %% check="sample_with_fallbacks"
check("sample_with_fallbacks")

# %% tags=["demo", "nbval-ignore-output"]
budget = 2.0
num_steps = optimizer.choose_num_steps(budget, x_T.shape)
start = time.perf_counter()
samples, way, problems = sample_with_fallbacks(
    {
        "bfloat16": lambda: optimizer.mixed_precision_sampling(x_T.shape, num_steps, x_T=x_T),
        "float32": lambda: optimizer.cached_noise_schedule_sampling(ddim, x_T.shape, num_steps, x_T=x_T),
        "float32, ten steps": lambda: optimizer.cached_noise_schedule_sampling(ddim, x_T.shape, 10, x_T=x_T),
    }
)
print(f"{num_steps} steps were chosen for {budget:g} s; {way} took {time.perf_counter() - start:.2f} s")
print("health:", health_check(ddim) or "no problem found", "· failed before:", problems or "nothing")
plots.image_grid(samples, columns=16)

# %% [markdown] task="written_analysis" points=8
# ---
# ## Written analysis
# 8 points, read by a person. Answer in the cell below, in 150 to 300 words, with numbers and pictures from your own runs:
#
# 1. What does DDIM give up for its speed, and what not? Compare your DDPM and DDIM digits at 50, 20 and 10 steps.
# 2. What does η change, in one sample and over many? When would you want η = 0, when η = 1? (`difflab.metrics` has
#    `quality(images)` and `diversity(images)`.)
# 3. **Deployment recommendation.** Which sampler, how many steps, which precision and batch size would you ship in a
#    product that draws digits while a user waits, and what does it do when time or memory runs short? Say what you
#    measured it on.
#
# === BEGIN MARK SCHEME ===
# | Points | Level |
# |---|---|
# | 7–8 | All three questions answered with the student's own measurements; separates network calls from seconds; knows that η = 0 maps one x_T to one digit, and says from measured numbers what η did to quality here; the recommendation follows from stated numbers, and says what happens when time or memory runs short |
# | 5–6 | All three answered, mostly with evidence; one claim without support, or speed and quality not weighed against each other |
# | 3–4 | Two answered, or general statements without own numbers |
# | 1–2 | An attempt that shows some understanding of the difference between the samplers |
# | 0 | Nothing, or text unrelated to the runs |
# === END MARK SCHEME ===

# %% [markdown] answer="written_analysis"
# *Your analysis here.*

# %% [markdown] given="code_style_text"
# ## Code quality
# 2 points from this check, 3 from a person
#
# The check reads the methods you have completed, at least half of them: each keeps a docstring, uses every variable it
# assigns, and no name that is not defined; and no `except:` without the name of an error, which would also swallow the
# stop button.

# %% check="code_style"
check("code_style")

# %% [markdown] task="code_quality" points=3
# ### Code read by a person
# 3 points for the code above; nothing to write here.
#
# === BEGIN MARK SCHEME ===
# | Points | Level |
# |---|---|
# | 3 | Names from the field, no repeated formulas, helpers where they help, comments that say why |
# | 2 | Clear on the whole; some repetition, or names that hide what they hold |
# | 1 | Works, but is hard to follow |
# | 0 | Not completed, or not readable |
# === END MARK SCHEME ===

# %% [markdown] given="going_further"
# ---
# ## Going further
# For the curious: no points, no checks, no solution.
#
# 1. **Backwards.** With η = 0 the path can be walked from a digit up to its noise: take the DDIM step from $t$ to a
#    *larger* $s$. Go up and down again with 20, 100 and 500 steps. How much of the digit comes back, and what is lost?
# 2. **Between two digits.** Mix two $x_T$ on the straight line and on the great circle between them, and draw both rows.
#    What length has a mixture on the line, and why does the network mind?
# 3. **Clipping.** Force $\hat x_0$ into $[-1, 1]$ in every step and derive ε from it again. What happens to DDIM-10, and to
#    its Fréchet distance? For what kind of data would it be wrong?
# 4. **Your own timesteps.** Ten network calls, at timesteps you choose. Search (at random, or one at a time) for the set
#    with the smallest Fréchet distance over 500 digits, then test the winner on *other* noise. How much of the gain stays?

# %% [markdown] given="submit"
# ---
# **Before you hand in:** *Kernel → Restart Kernel and Run All Cells*. Cells whose check does not pass show their hint,
# and the rest runs on. Then save, and submit this `.ipynb` file under its own name.
#
# | What is asked | Where |
# |---|---|
# | DDPM: posterior mean and variance, a stochastic step, the whole chain, the same digits for the same seed | 2.1 – 2.5 |
# | DDIM: clean image from noise, timestep schedules, a step with η, skipping steps | 3.1 – 3.4 |
# | Analysis: the network's predictions, η, speed, memory, quality and diversity against steps, the far end of the schedule | 1.3, 1.4, 3.5, 4.1, 4.2, *Written analysis* |
# | Production: cached coefficients, batches within memory, health check; precision, budget, fallbacks (optional) | 5.1 – 5.6 |
# | Deployment recommendation | *Written analysis*, question 3 |
# | Documentation and code quality | *Code quality* |
