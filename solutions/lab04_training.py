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
# # Lab 4 · Train a diffusion model from scratch
#
# In this lab you build a **DDPM** (denoising diffusion probabilistic model) from its noise schedule to its last sample:
# you write the forward process, the parts of the network that know about time, the loss, the training loop, and two
# ways to draw digits from what you trained. Two minutes on a laptop are enough to see digits appear.
#
# | Part | Time | Points |
# |---|---|---|
# | 1 · Noise in 300 steps | 25 min | 17 |
# | 2 · A network that knows what time it is | 20 min | 15 |
# | 3 · Training | 30 min | 28 |
# | 4 · Sampling, in 300 steps and in 20, from a network of your own | 25 min | 19 |
# | 5 · What the speed costs | 20 min | 6, and 10 for your written analysis |
# | Code quality, throughout | | 2, and 3 given by a person |
#
# That is two hours for two people and 100 points.
#
# **How to work.** Each exercise is a cell with a `TODO`. Replace the line that raises `NotImplementedError`, run the
# cell, then run the `check(...)` cell below it. A green line is the points; anything else is a hint. The checks are
# the very ones that grade your hand-in, with new random numbers every time, so green here is green there. Add cells of
# your own wherever you like; the cells that are given (set-up, class heads, checks) are put back as they were when your
# notebook is graded. Any correct program passes: apart from two points for tidy code, no check looks at how you wrote it.
#
# **Conventions.** Timesteps run from $t = 0$ (almost clean) to $T-1$ (almost pure noise). $\beta_t$ is the variance of
# the noise that step $t$ adds, $\alpha_t = 1-\beta_t$, $\bar\alpha_t = \prod_{i\le t}\alpha_i$, and $\bar\alpha_{-1} = 1$
# is clean data. Images are float32 `[B, 1, H, W]` in $[-1, 1]$.

# %% given="setup"
import copy
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from difflab import plots
from difflab.check import check
from difflab.checkpoints import load_pretrained
from difflab.datasets import load_digits
from difflab.metrics import quality
from difflab.notebook import add_to_class, progress
from difflab.schedule import NoiseSchedule
from difflab.timing import count_calls
from difflab.unet import UNet

digits, labels = load_digits()
print(f"{len(digits):,} digits of shape {list(digits.shape[1:])}, from {digits.min():.0f} to {digits.max():.0f}")

# %% [markdown] given="part1"
# ---
# ## Part 1 · Noise in 300 steps
# 25 minutes
#
# The forward process adds a little Gaussian noise at every step and shrinks what was there, so that the variance stays
# what it was (Ho et al. 2020, equation 2):
#
# $$q(x_t\mid x_{t-1}) = \mathcal N\!\left(\sqrt{1-\beta_t}\;x_{t-1},\ \beta_t I\right).$$
#
# The $\beta_t$ are chosen by hand. Ho et al. take 1000 of them, evenly spaced from $10^{-4}$ to $0.02$. You will use
# $T = 300$, as a course project did, and Part 1 ends with a look at what that project overlooked.

# %% [markdown] given="linear_betas_text"
# ### 1.1 The noise schedule
# 🟢 easy · 5 points · 5 min · under 1 CPU second
#
# $T$ values, evenly spaced from `beta_start` to `beta_end`, both included; with `rescale=True` all multiplied by
# $1000/T$, so that fewer steps add as much noise in all. A $\beta$ must stay below 1, so a rescaled schedule needs more
# than 20 steps: refuse what cannot be.


# %% exercise="linear_betas"
def linear_betas(
    num_timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02, rescale: bool = True
) -> tuple[Tensor, Tensor]:
    """A linear noise schedule.

    Args:
        num_timesteps: T, at least 1.
        beta_start, beta_end: the first and the last beta of a schedule with T = 1000.
        rescale: multiply every beta by 1000 / T.

    Returns:
        (betas, alphas_cumprod): both [T], float32 or float64. alphas_cumprod[t] is the product of 1 - betas[0 .. t].

    Raises:
        ValueError: if num_timesteps < 1, or a beta would not lie strictly between 0 and 1.
    """
    # TODO: the two tables; take the product in float64, its many factors lose digits otherwise.
    ### BEGIN SOLUTION
    if num_timesteps < 1:
        raise ValueError(f"a schedule needs at least one timestep, got {num_timesteps}")
    betas = torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64)
    if rescale:
        betas = betas * 1000 / num_timesteps
    if not bool(((betas > 0) & (betas < 1)).all()):
        raise ValueError(f"every beta must lie between 0 and 1, got {betas.min():.3g} ... {betas.max():.3g}")
    return betas, (1 - betas).cumprod(0)
    ### END SOLUTION


# %% check="linear_betas"
check("linear_betas")

# %% [markdown] given="forward_class_text"
# From here on a `NoiseSchedule` carries the tables: `schedule.betas`, `schedule.alphas`, `schedule.alphas_cumprod`, all
# `[T]`, `schedule.num_timesteps`, and `schedule.alpha_bar(t)`, which takes an int or a LongTensor and answers 1 for
# $t = -1$.


# %% given="forward_process_class"
class ForwardProcess:
    """Adds noise to images.

    Args:
        schedule: the noise schedule.
    """

    def __init__(self, schedule: NoiseSchedule):
        self.schedule = schedule


# %% [markdown] given="forward_step_text"
# ### 1.2 One step
# 🟢 easy · 4 points · 4 min · under 1 CPU second
#
# The formula above, for the step that leads *to* timestep $t$.


# %% exercise="forward_step"
@add_to_class(ForwardProcess)
def forward_step(self, x_prev: Tensor, t: int) -> Tensor:
    """Draw x_t from q(x_t | x_{t-1}).

    Args:
        x_prev: images x_{t-1}, [B, C, H, W]; clean ones for t = 0. Left unchanged.
        t: timestep, an int.

    Returns:
        x_t, [B, C, H, W].
    """
    # TODO: shrink, and add noise.
    ### BEGIN SOLUTION
    beta = self.schedule.betas[t].to(x_prev)
    return (1 - beta).sqrt() * x_prev + beta.sqrt() * torch.randn_like(x_prev)
    ### END SOLUTION


# %% check="forward_step"
check("forward_step")

# %% [markdown] given="forward_jump_text"
# ### 1.3 All steps at once
# 🟢 easy · 4 points · 4 min · under 1 CPU second
#
# A sum of Gaussians is Gaussian, so $t+1$ steps can be taken in one (Ho et al. 2020, equation 4):
#
# $$x_t = \sqrt{\bar\alpha_t}\,x_0 + \sqrt{1-\bar\alpha_t}\;\epsilon,\qquad \epsilon\sim\mathcal N(0, I).$$
#
# Training needs this for a batch in which every image has a timestep of its own.
#
# <details><summary>Hint: shapes</summary>
#
# A coefficient of shape `[B]` does not multiply images of shape `[B, C, H, W]` the way you want: bring it to
# `[B, 1, 1, 1]`, with `.view(-1, 1, 1, 1)`.
# </details>


# %% exercise="forward_jump"
@add_to_class(ForwardProcess)
def add_noise(self, x_0: Tensor, t: int | Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Draw x_t from q(x_t | x_0).

    Args:
        x_0: clean images, [B, C, H, W]. Left unchanged.
        t: timestep, an int or a LongTensor [B].
        noise: the noise to use, [B, C, H, W]; drawn from N(0, I) when None.

    Returns:
        (x_t, noise), both [B, C, H, W].
    """
    # TODO: the formula above.
    ### BEGIN SOLUTION
    if noise is None:
        noise = torch.randn_like(x_0)
    alpha_bar = self.schedule.alpha_bar(t).to(x_0).view(-1, 1, 1, 1)
    return alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise, noise
    ### END SOLUTION


# %% check="forward_jump"
check("forward_jump")

# %% [markdown] given="forward_demo_text"
# Do the two agree? Below, 2000 copies of one pixel value go step by step (1.2) and in one jump (1.3). The mean and the
# spread must be the same at every timestep.

# %% tags=["demo"]
torch.manual_seed(0)
schedule = NoiseSchedule.scaled_linear(300)
process = ForwardProcess(schedule)
x = pixel = torch.full((2000, 1, 1, 1), 0.8)
print("  t   step by step        in one jump")
for t in range(300):
    x = process.forward_step(x, t)
    if t in (0, 30, 75, 150, 299):
        jump, _ = process.add_noise(pixel, t)
        print(f"{t:3d}   {x.mean():+.3f} ± {x.std():.3f}     {jump.mean():+.3f} ± {jump.std():.3f}")
shown = [0, 20, 50, 100, 150, 200, 299]
plots.show_images({"x_t": torch.cat([process.add_noise(digits[:1], t)[0] for t in shown])}, [f"t = {t}" for t in shown])

# %% [markdown] given="prior_mismatch_text"
# ### 1.4 Is it noise, in the end?
# 🟡 medium · 4 points · 6 min · under 1 CPU second
#
# Sampling will start from $\mathcal N(0, I)$. Is that what the forward process ends in? For a pixel that is
# $\mathcal N(m, s^2)$ in the data, the last state is Gaussian with mean $M=\sqrt{\bar\alpha_{T-1}}\,m$ and variance
# $V=\bar\alpha_{T-1}s^2 + 1-\bar\alpha_{T-1}$, and its distance from $\mathcal N(0,1)$ is the Kullback-Leibler divergence
#
# $$\mathrm{KL} = \tfrac12\left(V + M^2 - 1 - \ln V\right)\quad\text{nats a pixel.}$$


# %% exercise="prior_mismatch"
def prior_mismatch(schedule: NoiseSchedule, mean: float, std: float) -> float:
    """How far the last state of the forward process is from the noise that sampling starts from.

    Args:
        schedule: the noise schedule.
        mean, std: of the data, per pixel.

    Returns:
        KL(q(x_{T-1}) || N(0, 1)) in nats a pixel, a plain float.
    """
    # TODO: the formula above; the last timestep is T - 1.
    ### BEGIN SOLUTION
    alpha_bar = schedule.alphas_cumprod[-1].double()
    variance = alpha_bar * std**2 + 1 - alpha_bar
    return 0.5 * (variance + alpha_bar * mean**2 - 1 - variance.log()).item()
    ### END SOLUTION


# %% check="prior_mismatch"
check("prior_mismatch")

# %% [markdown] given="source_prior"
# > #### 🔍 Check the source: 300 steps, but whose β?
# > A project report trains with $T = 300$ and keeps $\beta$ from $10^{-4}$ to $0.02$, the end points that Ho et al. chose
# > for 1000 steps. How much of the digit is left in its $x_{T-1}$? The cell below follows data of which everything is
# > known, $\mathcal N(-0.7,\ 0.3)$ per pixel with its exact noise predictor, through 300 deterministic DDIM steps that
# > start, as every sampler does, from $\mathcal N(0, I)$. What should come out is mean $-0.7$ and variance $0.3$.

# %% tags=["demo"]
torch.manual_seed(0)
mean, variance = -0.7, 0.3
for name, some in {"as printed": NoiseSchedule.linear(300), "rescaled": NoiseSchedule.scaled_linear(300)}.items():
    x = torch.randn(200_000, dtype=torch.float64)
    for t in reversed(range(300)):
        a_t, a_s = some.alpha_bar(t).double(), some.alpha_bar(t - 1).double()
        eps = (1 - a_t).sqrt() * (x - a_t.sqrt() * mean) / (a_t * variance + 1 - a_t)
        x = a_s.sqrt() * (x - (1 - a_t).sqrt() * eps) / a_t.sqrt() + (1 - a_s).sqrt() * eps
    left = some.alphas_cumprod[-1].sqrt()
    print(f"{name:10}  signal left at the end {left:6.1%}, KL {prior_mismatch(some, mean, variance**0.5):.1e} nats; "
          f"samples have mean {x.mean():+.3f}, variance {x.var():.3f}")  # fmt: skip

# %% [markdown] given="source_prior_answer"
# > With the printed values 22 % of the signal is still there when the schedule ends. Nothing like that is in the noise
# > that sampling starts from, and the samples' mean is off by an eighth of what it should be. Rescaled by 1000/T, the
# > last state is noise. (Full DDPM sampling, which adds fresh noise at every step, hides most of the error.)

# %% [markdown] given="part2"
# ---
# ## Part 2 · A network that knows what time it is
# 20 minutes
#
# One network predicts the noise at every timestep, so it must be told which. The number $t$ is first spread over a
# vector of sines and cosines of many wavelengths (Vaswani et al. 2017, section 3.5), then every block of the U-Net mixes
# it into its features.

# %% [markdown] given="time_embedding_text"
# ### 2.1 Time as a vector
# 🟡 medium · 7 points · 6 min · under 1 CPU second
#
# With $h = \texttt{dim}/2$ frequencies $\omega_i = 10000^{-i/h}$, $i = 0,\dots,h-1$, sine and cosine in turn as in that
# paper (many programs put all cosines first; a network learns as well from either, but must be given one of them always):
#
# $$\mathrm{emb}(t) = [\sin\omega_0 t,\ \cos\omega_0 t,\ \sin\omega_1 t,\ \cos\omega_1 t,\ \dots,\ \sin\omega_{h-1} t,\ \cos\omega_{h-1} t].$$
#
# <details><summary>Hint</summary>
#
# `t[:, None] * frequencies[None, :]` is a table of all products, `[B, h]`. A slice with a step, `table[:, 0::2]`, is every
# other column.
# </details>


# %% exercise="time_embedding"
def time_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding of timesteps.

    Args:
        t: timesteps [B], integer or floating point.
        dim: size of the embedding, even.

    Returns:
        float32 tensor [B, dim]: sine and cosine of each frequency in turn, the highest frequency first.

    Raises:
        ValueError: if dim is odd.
    """
    # TODO: the formula above.
    ### BEGIN SOLUTION
    if dim % 2:
        raise ValueError(f"dim must be even, got {dim}")
    half = dim // 2
    frequencies = 10_000 ** (-torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angles = t.float()[:, None] * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)
    ### END SOLUTION


# %% check="time_embedding"
check("time_embedding")

# %% tags=["demo"]
times = torch.arange(0, 300, 3)
waves = time_embedding(times, 64)[:, 0::2]
plots.curves({f"i = {i}": (times.tolist(), waves[:, i].tolist()) for i in (4, 10, 16, 24)}, "t", "sin ω_i t")


# %% given="residual_block_class"
class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with a skip connection; the time embedding scales and shifts the features between them.

    Args:
        in_channels, out_channels: of the feature maps.
        embedding_dim: size of the time embedding.
    """

    def __init__(self, in_channels: int, out_channels: int, embedding_dim: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(4, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(embedding_dim, 2 * out_channels)
        self.norm2 = nn.GroupNorm(4, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)


# %% [markdown] given="residual_block_text"
# ### 2.2 A residual block
# 🟡 medium · 8 points · 8 min · 1 CPU second
#
# The layers are there; write how the data flows. This is the block of Ho et al. 2020 (appendix B) with the time entering
# as in Dhariwal and Nichol 2021 (section 3, "adaptive group normalization"):
#
# 1. `norm1`, SiLU, `conv1`;
# 2. `norm2`, then $h \leftarrow h\,(1 + \text{scale}) + \text{shift}$: `time(embedding)` holds for each image the scales of
#    all channels in its first half and the shifts in its second, the same at every pixel;
# 3. SiLU, `conv2`;
# 4. add the input, through `skip`, which changes its number of channels where needed.
#
# <details><summary>Hint</summary>
#
# `a, b = table.chunk(2, dim=1)` are the two halves of `[B, 2 C]`; `a[:, :, None, None]` fits `[B, C, H, W]`.
# </details>


# %% exercise="residual_block"
@add_to_class(ResidualBlock)
def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
    """What the block makes of its input.

    Args:
        x: features [B, in_channels, H, W].
        embedding: of the timesteps, [B, embedding_dim].

    Returns:
        Features [B, out_channels, H, W].
    """
    # TODO: the four steps above; F.silu is the activation.
    ### BEGIN SOLUTION
    scale, shift = self.time(embedding)[:, :, None, None].chunk(2, dim=1)
    h = self.conv1(F.silu(self.norm1(x)))
    h = self.norm2(h) * (1 + scale) + shift
    return self.skip(x) + self.conv2(F.silu(h))
    ### END SOLUTION


# %% check="residual_block"
check("residual_block")

# %% [markdown] given="unet_text"
# A U-Net is such blocks on the way down (each level halves height and width), in the middle, and on the way up, where
# each level also sees what the way down had at its size. `difflab.unet.UNet` puts them together (in its blocks the time
# only shifts); read it, it is 200 lines. Here is a small one, and what it has to learn: a trained network's error is far
# below 1, the error of always answering 0.

# %% tags=["demo"]
torch.manual_seed(0)
small = UNet(channels=(16, 32, 64), time_dim=32)
print(f"{sum(p.numel() for p in small.parameters()):,} parameters")
x_t, eps = process.add_noise(digits[:64], torch.randint(300, (64,)))
print(f"untrained: mean squared error {(small(x_t, torch.randint(300, (64,))) - eps).square().mean():.3f}")

# %% [markdown] given="part3"
# ---
# ## Part 3 · Training
# 30 minutes
#
# Take an image, a timestep and some noise, all at random; put the noise in; ask the network which noise it was
# (Ho et al. 2020, algorithm 1 and equation 14):
#
# $$L = \mathbb E_{x_0,\,t,\,\epsilon}\left[\,\lVert \epsilon - \epsilon_\theta(x_t, t)\rVert^2\,\right],
# \qquad t\sim\mathrm{Uniform}\{0,\dots,T-1\},\ \epsilon\sim\mathcal N(0,I).$$

# %% [markdown] given="noise_prediction_loss_text"
# ### 3.1 The loss
# 🟡 the heart of the lab · 9 points · 8 min · 1 CPU second
#
# The *mean* over all pixels of all images. Every image of the batch gets a timestep of its own.


# %% exercise="noise_prediction_loss"
def noise_prediction_loss(
    model: nn.Module, schedule: NoiseSchedule, x_0: Tensor, t: Tensor | None = None, noise: Tensor | None = None
) -> Tensor:
    """The simple loss of Ho et al. 2020, equation 14.

    Args:
        model: noise predictor, called once as model(x_t, t) with x_t [B, C, H, W] and t a LongTensor [B].
        schedule: the forward process.
        x_0: clean images, [B, C, H, W].
        t: timesteps, LongTensor [B]; drawn uniformly from 0 ... T-1, one for each image, when None.
        noise: [B, C, H, W]; drawn from N(0, I) when None.

    Returns:
        The loss, a 0-dimensional tensor that gradients flow through.
    """
    # TODO: draw what is missing, add the noise, ask the network, compare.
    ### BEGIN SOLUTION
    if t is None:
        t = torch.randint(schedule.num_timesteps, (len(x_0),), device=x_0.device)
    x_t, noise = ForwardProcess(schedule).add_noise(x_0, t, noise)
    return F.mse_loss(model(x_t, t), noise)
    ### END SOLUTION


# %% check="noise_prediction_loss"
check("noise_prediction_loss")

# %% [markdown] given="ema_text"
# ### 3.2 A slow copy of the weights
# 🟡 medium · 7 points · 6 min · under 1 CPU second
#
# Weights jitter from batch to batch, and samples drawn from their moving average are better. After every step:
#
# $$\bar\theta \leftarrow d\,\bar\theta + (1-d)\,\theta,$$
#
# with a decay $d$ just below 1. The average starts as a copy of the first weights.
#
# <details><summary>Hint: a trap</summary>
#
# `model.state_dict()` holds the parameters themselves, not copies: an "average" made of them changes with the model.
# `copy.deepcopy` makes a model that stands on its own.
# </details>


# %% given="ema_class"
class EMA:
    """Exponential moving average of a model's parameters.

    Args:
        model: the network that is trained.
        decay: how much of the average is kept at each update, in [0, 1).

    Attributes:
        model: the averaged network, a module of the same kind; training the original does not change it.
    """

    def weights(self) -> dict[str, Tensor]:
        """The averaged weights, by name."""
        return self.model.state_dict()


# %% exercise="ema"
@add_to_class(EMA)
def __init__(self, model: nn.Module, decay: float = 0.999):
    """Start from a copy of the model's weights, in self.model."""
    # TODO: keep a copy, and the decay.
    ### BEGIN SOLUTION
    self.model = copy.deepcopy(model).eval().requires_grad_(False)
    self.decay = decay
    ### END SOLUTION


@add_to_class(EMA)
@torch.no_grad()
def update(self, model: nn.Module) -> None:
    """Move the average one step toward the model's parameters."""
    # TODO: the formula above, for every parameter.
    ### BEGIN SOLUTION
    for mean, current in zip(self.model.parameters(), model.parameters()):
        mean.mul_(self.decay).add_(current, alpha=1 - self.decay)
    ### END SOLUTION


# %% check="ema"
check("ema")


# %% given="trainer_class"
class Trainer:
    """Trains a noise predictor.

    Args:
        model: the network, called as model(x_t, t).
        schedule: the forward process.
        lr: learning rate of Adam.
        ema: the average to update after every step; None for none.
    """

    def __init__(self, model: nn.Module, schedule: NoiseSchedule, lr: float = 2e-4, ema: EMA | None = None):
        self.model = model
        self.schedule = schedule
        self.optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        self.ema = ema

    def weights(self) -> dict[str, Tensor]:
        """The weights to draw samples with."""
        return self.ema.weights() if self.ema is not None else self.model.state_dict()

    def gradient_norm(self) -> float:
        """Length of the gradient that the last step left, a thing to watch when training goes wrong."""
        gradients = [p.grad.norm() for p in self.model.parameters() if p.grad is not None]
        return torch.stack(gradients).norm().item() if gradients else 0.0


# %% [markdown] given="train_step_text"
# ### 3.3 One step of training
# 🟡 medium · 7 points · 5 min · 3 CPU seconds
#
# The loss of a batch, its gradients, one step of the optimizer, one update of the average if there is one.
#
# <details><summary>Hint</summary>
#
# Gradients add up in PyTorch until they are cleared: `self.optimizer.zero_grad()`.
# </details>


# %% exercise="train_step"
@add_to_class(Trainer)
def train_step(self, x_0: Tensor) -> float:
    """Train on one batch.

    Args:
        x_0: clean images, [B, C, H, W].

    Returns:
        The loss of this batch before the step, a plain float.
    """
    # TODO: loss, gradients, step, average.
    ### BEGIN SOLUTION
    self.model.train()
    loss = noise_prediction_loss(self.model, self.schedule, x_0)
    self.optimizer.zero_grad()
    loss.backward()
    self.optimizer.step()
    if self.ema is not None:
        self.ema.update(self.model)
    return loss.item()
    ### END SOLUTION


# %% check="train_step"
check("train_step")

# %% [markdown] given="train_epoch_text"
# ### 3.4 An epoch
# 🟢 easy · 5 points · 5 min · 2 CPU seconds
#
# Every image once, in an order that is new each time. The last batch may be smaller.


# %% exercise="train_epoch"
@add_to_class(Trainer)
def train_epoch(self, images: Tensor, batch_size: int) -> float:
    """Train on every image once, in random order.

    Args:
        images: [N, C, H, W].
        batch_size: images a step; the last step takes what is left.

    Returns:
        The mean loss over all images (a smaller last batch counts for less), a plain float.
    """
    # TODO: shuffle, cut into batches, train on each.
    ### BEGIN SOLUTION
    total = 0.0
    for index in torch.randperm(len(images)).split(batch_size):
        total += self.train_step(images[index]) * len(index)
    return total / len(images)
    ### END SOLUTION


# %% check="train_epoch"
check("train_epoch")

# %% [markdown] given="part4"
# ---
# ## Part 4 · Sampling, in 300 steps and in 20, from a network of your own
# 25 minutes
#
# To undo one step, DDPM draws from a Gaussian whose mean the network's answer decides (Ho et al. 2020, equations 7
# and 11, algorithm 2):
#
# $$x_{t-1} = \frac{1}{\sqrt{\alpha_t}}\left(x_t - \frac{\beta_t}{\sqrt{1-\bar\alpha_t}}\,\epsilon_\theta(x_t,t)\right)
# + \sqrt{\tilde\beta_t}\;z,\qquad \tilde\beta_t = \beta_t\,\frac{1-\bar\alpha_{t-1}}{1-\bar\alpha_t},\quad z\sim\mathcal N(0,I).$$
#
# At $t = 0$ no noise is added: $\bar\alpha_{-1} = 1$, so $\tilde\beta_0 = 0$.


# %% given="diffusion_class"
class Diffusion:
    """Draws samples with a trained noise predictor.

    Args:
        model: called as model(x, t) with x [B, C, H, W] and t a LongTensor [B].
        schedule: the noise schedule it was trained with.
    """

    def __init__(self, model, schedule: NoiseSchedule):
        self.model = model
        self.schedule = schedule


# %% [markdown] given="reverse_step_text"
# ### 4.1 One step back
# 🟡 medium · 5 points · 6 min · 1 CPU second
#
# <details><summary>Hint: the trap at t = 0</summary>
#
# `schedule.alphas_cumprod[t - 1]` at $t = 0$ is the *last* entry. `schedule.alpha_bar(-1)` is 1.
# </details>


# %% exercise="reverse_step"
@add_to_class(Diffusion)
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
    beta, alpha = self.schedule.betas[t].to(x_t), self.schedule.alphas[t].to(x_t)
    now, before = self.schedule.alpha_bar(t).to(x_t), self.schedule.alpha_bar(t - 1).to(x_t)
    mean = (x_t - beta / (1 - now).sqrt() * eps) / alpha.sqrt()
    return mean + (beta * (1 - before) / (1 - now)).sqrt() * torch.randn_like(x_t)
    ### END SOLUTION


# %% check="reverse_step"
check("reverse_step")

# %% [markdown] given="reverse_chain_text"
# ### 4.2 All of them
# 🟢 easy · 4 points · 4 min · 1 CPU second


# %% exercise="reverse_chain"
@add_to_class(Diffusion)
@torch.no_grad()
def ddpm_sample(self, shape: tuple[int, ...], *, x_T: Tensor | None = None) -> Tensor:
    """Draw samples with all T steps.

    Args:
        shape: [B, C, H, W].
        x_T: the noise to start from, left unchanged; drawn from N(0, I) when None.

    Returns:
        Samples of that shape, with the dtype and on the device of x_T, or of the model's parameters.
    """
    # TODO: start from noise, take the steps T - 1, ..., 0.
    ### BEGIN SOLUTION
    x = self._start(shape, x_T)
    for t in reversed(range(self.schedule.num_timesteps)):
        x = self.ddpm_step(x, t)
    return x


@add_to_class(Diffusion)
def _start(self, shape: tuple[int, ...], x_T: Tensor | None) -> Tensor:
    """x_T, or noise for the model."""
    if x_T is not None:
        return x_T
    parameter = next(self.model.parameters())
    return torch.randn(shape, dtype=parameter.dtype, device=parameter.device)
    ### END SOLUTION


# %% check="reverse_chain"
check("reverse_chain")

# %% [markdown] given="reverse_demo_text"
# Digits out of nothing but noise, by your own steps. The network is `mnist-t300`: the U-Net of Part 2 twice as wide, after
# twenty epochs on all of MNIST. Your own comes next.

# %% tags=["demo"]
trained, trained_schedule = load_pretrained("mnist-t300")
torch.manual_seed(0)
with progress(trained, 300):
    first_digits = Diffusion(trained, trained_schedule).ddpm_sample((20, 1, 28, 28))
plots.image_grid(first_digits)

# %% [markdown] given="ddim_text"
# ### 4.3 Steps that jump
# 🟡 medium · 3 + 7 points · 10 min · 1 CPU second
#
# DDIM (Song et al. 2021, equation 12 with $\sigma = 0$) visits only $N$ of the $T$ timesteps, evenly spaced from $T-1$ to
# $0$, and from each jumps to the next: to the clean image that the network sees, and back up to the noise level wanted.
#
# $$\hat x_0 = \frac{x_t - \sqrt{1-\bar\alpha_t}\,\epsilon_\theta}{\sqrt{\bar\alpha_t}},\qquad
# x_s = \sqrt{\bar\alpha_s}\,\hat x_0 + \sqrt{1-\bar\alpha_s}\;\epsilon_\theta .$$
#
# The last jump, from $t = 0$, goes to $s = -1$: clean data. $N$ timesteps make $N$ network calls, and no chance is
# left: one $x_T$ always becomes the same digits.


# %% exercise="ddim_timesteps"
@add_to_class(Diffusion)
def ddim_timesteps(self, num_steps: int) -> Tensor:
    """Which timesteps to visit.

    Args:
        num_steps: N, from 1 to T.

    Returns:
        LongTensor [N], strictly decreasing, evenly spaced (rounded) from T - 1 to 0; for N = 1 it is [T - 1].

    Raises:
        ValueError: if num_steps < 1 or > T.
    """
    # TODO: N timesteps, both ends included.
    ### BEGIN SOLUTION
    T = self.schedule.num_timesteps
    if not 1 <= num_steps <= T:
        raise ValueError(f"num_steps must lie between 1 and {T}, got {num_steps}")
    return torch.linspace(T - 1, 0, num_steps, dtype=torch.float64).round().long()
    ### END SOLUTION


# %% check="ddim_timesteps"
check("ddim_timesteps")


# %% exercise="ddim_chain"
@add_to_class(Diffusion)
@torch.no_grad()
def ddim_sample(self, shape: tuple[int, ...], num_steps: int = 50, *, x_T: Tensor | None = None) -> Tensor:
    """Draw samples with num_steps deterministic steps.

    Args:
        shape: [B, C, H, W].
        num_steps: N, from 1 to T; exactly N network calls are made.
        x_T: the noise to start from, left unchanged; drawn from N(0, I) when None.

    Returns:
        Samples of that shape, with the dtype and on the device of x_T, or of the model's parameters.
    """
    # TODO: jump from each timestep to the next, and from the last to clean data.
    ### BEGIN SOLUTION
    x = self._start(shape, x_T)
    timesteps = self.ddim_timesteps(num_steps).tolist()
    for t, s in zip(timesteps, [*timesteps[1:], -1]):
        eps = self.model(x, torch.full((len(x),), t, device=x.device))
        now, then = self.schedule.alpha_bar(t).to(x), self.schedule.alpha_bar(s).to(x)
        x_0 = (x - (1 - now).sqrt() * eps) / now.sqrt()
        x = then.sqrt() * x_0 + (1 - then).sqrt() * eps
    return x
    ### END SOLUTION


# %% check="ddim_chain"
check("ddim_chain")

# %% [markdown] given="training_demo_text"
# ### 4.4 Two minutes of training
# All parts are there. Below they train your own network, small enough for a laptop, on 10 000 digits; after every epoch
# it draws twelve, from one noise. Watch them come out of nothing, and the loss, which soon hardly falls.

# %% tags=["demo", "nbval-ignore-output"]
torch.manual_seed(0)
schedule = NoiseSchedule.scaled_linear(300)
network = UNet(channels=(16, 32, 64), time_dim=32)
trainer = Trainer(network, schedule, lr=2e-3, ema=EMA(network, 0.99))
x_T = torch.randn(12, 1, 28, 28)
losses, drawn = [], {}
start = time.perf_counter()
while time.perf_counter() - start < 110 or len(losses) < 2:
    losses.append(trainer.train_epoch(digits, batch_size=64))
    torch.manual_seed(len(losses))
    drawn[f"epoch {len(losses)}"] = Diffusion(trainer.ema.model, schedule).ddpm_sample(x_T.shape, x_T=x_T)
    print(f"epoch {len(losses)}: loss {losses[-1]:.4f}, {time.perf_counter() - start:.0f} s")
plots.show_images(drawn)

# %% tags=["demo", "nbval-ignore-output"]
plots.curves({"loss": (range(1, len(losses) + 1), losses)}, "epoch", "mean squared error of ε", yscale="log")

# %% [markdown] given="training_command_text"
# In earnest, on all of MNIST and with checkpoints, the same training is one command. It takes about two hours on two
# cores; stopped, it goes on where it was:
#
# ```sh
# difflab train --timesteps 300 --epochs 20 --batch-size 128 --lr 2e-4 --samples-from lab04_training.ipynb
# ```

# %% [markdown] given="part5"
# ---
# ## Part 5 · What the speed costs
# 20 minutes
#
# A project report says of 300 steps against 50 and 20 that DDIM is "about 6× faster" and "15× faster", and of the
# samples that they are "nearly indistinguishable" and have "some degradation". The first can be counted, and both can be
# measured.

# %% [markdown] given="speed_comparison_text"
# ### 5.1 Calls and seconds
# 🟡 medium · 6 points · 8 min · 2 CPU seconds for the check
#
# `with count_calls(model) as counter:` counts network calls in `counter.calls`; `time.perf_counter()` is the clock.


# %% exercise="speed_comparison"
def compare_samplers(
    diffusion: Diffusion, num_samples: int = 16, step_counts: tuple[int, ...] = (50, 20), sample_shape=(1, 28, 28)
) -> list[dict]:
    """Run DDPM with all steps, and DDIM with each of step_counts, all from one x_T.

    Args:
        diffusion: on a trained model.
        num_samples: images drawn by each.
        step_counts: numbers of steps for DDIM.
        sample_shape: [C, H, W].

    Returns:
        A dict for each sampler, DDPM first, then DDIM in the order of step_counts: "name" ("DDPM-300", "DDIM-50", …),
        "network_calls" (counted, not assumed), "seconds" of the run, "speedup" (DDPM's seconds over this one's), and
        "samples" [num_samples, *sample_shape].
    """
    # TODO: one x_T; then for each sampler: count and time.
    ### BEGIN SOLUTION
    parameter = next(diffusion.model.parameters())
    x_T = torch.randn(num_samples, *sample_shape, dtype=parameter.dtype, device=parameter.device)
    runs = {f"DDPM-{diffusion.schedule.num_timesteps}": lambda: diffusion.ddpm_sample(x_T.shape, x_T=x_T)}
    for n in step_counts:
        runs[f"DDIM-{n}"] = lambda n=n: diffusion.ddim_sample(x_T.shape, n, x_T=x_T)
    rows = []
    for name, run in runs.items():
        with count_calls(diffusion.model) as counter:
            start = time.perf_counter()
            samples = run()
            seconds = time.perf_counter() - start
        speedup = rows[0]["seconds"] / seconds if rows else 1.0
        rows.append(
            {"name": name, "network_calls": counter.calls, "seconds": seconds, "speedup": speedup, "samples": samples}
        )
    return rows
    ### END SOLUTION


# %% check="speed_comparison"
check("speed_comparison")

# %% tags=["demo"]
torch.manual_seed(3)
with progress(trained, 300 + 50 + 20):
    comparison = compare_samplers(Diffusion(trained, trained_schedule), num_samples=16)
print("sampler     calls   300 over calls   seconds   speed-up")
for row in comparison:
    calls = row["network_calls"]
    print(f"{row['name']:10} {calls:6d} {300 / calls:12.0f} × {row['seconds']:11.2f} {row['speedup']:8.1f} ×")
plots.show_images({row["name"]: row["samples"][:12] for row in comparison})

# %% [markdown] given="quality_text"
# ### 5.2 And the digits?
# Quality needs numbers of digits: the **Fréchet distance** compares the statistics of generated and real digits (in the
# features of a classifier; lower is better, and *n* belongs to it), *recognised* is the share that the classifier is more
# than 90 % sure of. A few hundred digits are enough to rank samplers, not to tell close ones apart.

# %% tags=["demo", "nbval-ignore-output"]
diffusion = Diffusion(trained, trained_schedule)
noise = torch.randn(256, 1, 28, 28, generator=torch.Generator().manual_seed(5))
for num_steps in (50, 20, 10):
    with progress(trained, num_steps):
        samples = diffusion.ddim_sample(noise.shape, num_steps, x_T=noise)
    print(f"DDIM-{num_steps:<3d}", quality(samples))

# %% [markdown] task="written_analysis" points=10
# ### Written analysis
# 10 points, marked by a person. Answer in the cell below, in about 250 words, with your own numbers.
#
# 1. **Training.** What do your loss curve and the digits after each epoch show? Why does the loss level off far above
#    zero, and why do samples go on improving when it hardly falls?
# 2. **Speed.** How do 6× and 15× compare with what you counted and with what you measured? What would make them differ?
# 3. **Quality.** Are 50 steps "nearly indistinguishable" from 300, and 20 "acceptable"? Say by which measure, for which n.
# 4. **The prior.** A friend trained with T = 300 and the printed β. What would you expect of her samples, and of which
#    sampler most?
#
# === BEGIN MARK SCHEME ===
# | Points | Level |
# |---|---|
# | 9–10 | All four answered from own numbers; the loss floor is explained (noise that cannot be told from the data), calls and clock kept apart, quality claimed with measure and n, the prior's effect named and DDIM singled out |
# | 6–8 | Mostly right and from own numbers; one question thin or one explanation missing |
# | 3–5 | Numbers without reasons, or reasons without numbers |
# | 1–2 | A few correct remarks |
# | 0 | Nothing, or nothing of one's own |
# === END MARK SCHEME ===

# %% [markdown] answer="written_analysis"
# *Your answer here.*

# %% [markdown] given="training_style_text"
# ### Code quality
# 2 points by a program, for what you completed: docstrings kept, no unused or undefined names, no bare `except:`.

# %% check="training_style"
check("training_style")

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
# 1. **Another schedule.** Nichol and Dhariwal (2021, equation 17) choose $\bar\alpha_t$ as a squared cosine. Write it beside
#    `linear_betas`, compare the two at $t = 30, 150, 270$ in one row of digits, and train on both for the same two minutes.
# 2. **Another target.** The network may predict $x_0$, or $v = \sqrt{\bar\alpha_t}\,\epsilon - \sqrt{1-\bar\alpha_t}\,x_0$
#    (Salimans and Ho 2022). What has to change in the loss, and what in `ddpm_step`? Which target is easy at which $t$?
# 3. **Another weight.** Weigh the loss of each image by $\min(\mathrm{SNR}(t), 5)/\mathrm{SNR}(t)$ (Hang et al. 2023). The
#    loss is then another number: compare samples, not losses.
# 4. **On demand.** Add an embedding of the label to the time embedding, drop it for one image in ten, and draw the digit
#    you want with classifier-free guidance (Ho and Salimans 2022). What do guidance scales 1, 3 and 10 do to diversity?

# %% [markdown] given="submit"
# ---
# **Before you hand in:** *Kernel → Restart Kernel and Run All Cells*. Cells whose check does not pass show their hint,
# and the rest runs on. Then save, and submit this `.ipynb` file under its own name.
#
# Your notebook can draw for itself, from a shell:
#
# ```sh
# difflab sample --from lab04_training.ipynb --checkpoint mnist-t300 --method ddpm --num-samples 64
# difflab sample --from lab04_training.ipynb --checkpoint mnist-t300 --method ddim --num-steps 20 --num-samples 64
# ```
