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
# # Lab 6 · Steps against time: a controlled experiment
#
# How does the time to draw ten digits depend on the number of sampling steps? It sounds as if there were nothing to find
# out. A project report measured it and concluded that time falls "sub-linearly, with diminishing returns". In this lab you
# repeat its experiment, with a stopwatch that can be trusted, and let the numbers decide, yours and theirs. At the end
# stands a lab report that writes itself from your measurements.
#
# | Part | Time | Points |
# |---|---|---|
# | 1 · A question that can be answered | 15 min | 4, and 5 for your hypothesis |
# | 2 · A stopwatch that can be trusted | 35 min | 31 |
# | 3 · What the numbers say | 30 min | 19 |
# | 4 · Where the time goes, and what it buys | 15 min | 12 |
# | 5 · The report | 25 min | 14, and 10 for your conclusions |
# | Code quality, throughout | | 2, and 3 given by a person |
#
# That is two hours for two people and 100 points.
#
# **How to work.** Each exercise is a cell with a `TODO`. Replace the line that raises `NotImplementedError`, run the
# cell, then run the `check(...)` cell below it. A green line is the points; anything else is a hint. The checks are
# the very ones that grade your hand-in, with new random numbers every time, so green here is green there. Add cells of
# your own wherever you like; the cells that are given (set-up, checks) are put back as they were when your notebook is
# graded. Any correct program passes: apart from two points for tidy code, no check looks at how you wrote it. **No check
# looks at how fast your machine is**: they hand your functions a clock and a device of their own.
#
# **Conventions.** `seconds` are seconds. $N$ is `num_steps`, the number of sampling steps, each of which calls the network
# once. Images are float32 `[B, 1, 28, 28]` in $[-1, 1]$. Functions that measure take `clock`, a function that tells the
# time in seconds, and `synchronize`, a function that returns when the device has finished everything it was given. Always
# use these two; the defaults are right for your machine.

# %% given="setup" tags=["nbval-ignore-output"]
import html
import random
import re
import statistics
import time
from pathlib import Path

import mistune
import numpy as np
import torch
from torch import Tensor

from difflab import plots
from difflab.check import check
from difflab.checkpoints import load_pretrained
from difflab.metrics import quality
from difflab.notebook import progress
from difflab.report import data_uri, environment, show_report
from difflab.schedule import NoiseSchedule
from difflab.statistics import t_quantile
from difflab.timing import synchronize

device = "cuda" if torch.cuda.is_available() else "cpu"
model, schedule = load_pretrained("mnist-paper", device)


def wait_for_device() -> None:
    """Return when the device has finished everything it was given."""
    synchronize(device)


A40_SECONDS = {10: [0.328, 0.327], 50: [1.542, 1.531], 100: [3.031, 3.018]}  # the project report: steps -> two runs
print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {environment(device)['device']}")

# %% [markdown] given="part1"
# ---
# ## Part 1 · A question that can be answered
# 15 minutes
#
# The project report in short. A pre-trained network of the size you have just loaded draws ten digits with DDIM, from
# random noise, in 10, 50 and 100 steps, each in two runs, on an NVIDIA A40. What is timed is the whole process, from the
# noise to the collected images. Its table:
#
# | steps | run 1 | run 2 |
# |---:|---:|---:|
# | 10 | 0.328 s | 0.327 s |
# | 50 | 1.542 s | 1.531 s |
# | 100 | 3.031 s | 3.018 s |
#
# Its hypothesis: fewer steps take less time, "potentially exhibiting a linear or sub-linear relationship". Its conclusion:
# the hypothesis is confirmed, the relationship is sub-linear.
#
# Which table would have *refuted* that hypothesis? Hardly any: whatever grows with $N$, and not faster than $N$, agrees
# with it. And some things are not said: whether the network was warmed up, whether the clock waited for the GPU, in which
# order the runs were made, and whether the seconds are those of ten images together or of one of them on the average.

# %% [markdown] given="hypothesis_text"
# ### 1.1 Your hypothesis
# 5 points, read by a person · 8 min
#
# **Write it before you measure.** Three to six sentences, as the text that the function below returns; your report will
# quote it.
#
# * What do you change on purpose (*independent variable*, with its values), what do you measure (*dependent variable*:
#   the seconds of what, exactly, from where to where), what do you hold fixed (*control variables*), and what can you not
#   hold fixed?
# * Which law do you expect, $bN$, $a + bN$, or something that bends, and **why**? What would $a$ and $b$ be made of?
# * Which result would refute you?


# %% exercise="hypothesis"
def hypothesis() -> str:
    """The hypothesis of this experiment, in plain sentences; your report quotes it."""
    # TODO: your text, before the first measurement.
    ### BEGIN SOLUTION
    return (
        "We change the number of DDIM steps N (10, 50, 100, then a denser sweep) and measure the wall-clock seconds from "
        "drawing the noise for ten images until the ten finished images lie on the CPU. Held fixed: network and weights, "
        "noise schedule, DDIM with eta = 0, batch of ten, image size, noise seed, device, number of threads, software. Not "
        "under our control: the machine's temperature and what else runs on it; hence the shuffled order and the repeats. "
        "Every step calls the same network on the same shapes once, so each step should cost the same b seconds whatever N "
        "is, and drawing the noise and collecting the images cost a fixed a: seconds = a + b N with a small a > 0. "
        "A significant curvature, downwards or upwards, would refute this, and so would an interval for b that contains 0."
    )
    ### END SOLUTION


# %% [markdown] task="hypothesis_points" points=5
# ### Hypothesis, read by a person
# 5 points for the text above; nothing to write here.
#
# === BEGIN MARK SCHEME ===
# | Points | Level |
# |---|---|
# | 5 | Independent, dependent (what is timed, from where to where) and control variables named, and what cannot be controlled; a definite law with a reason from how a sampler works; a result that would refute it |
# | 3–4 | Variables and law named; the reason or the refuting result is missing or vague |
# | 1–2 | An expectation without variables, or one that no result could refute |
# | 0 | Nothing |
# === END MARK SCHEME ===

# %% [markdown] given="run_order_text"
# ### 1.2 In which order?
# 🟢 easy · 4 points · 5 min · under 1 CPU second
#
# Machines warm up, slow down when hot, and begin a backup. If you measure 10, then 50, then 100 steps, every such change
# looks like an effect of $N$. Two remedies cost nothing. Measure in **runs**, each of which holds every step count once:
# a slow minute then spoils one value of each. And **shuffle** each run on its own, so that no step count always comes last.
#
# The order must be one that can be repeated: chance comes from `seed` alone.


# %% exercise="run_order"
def run_order(step_counts: list[int], runs: int, seed: int = 0) -> list[list[int]]:
    """In which order to measure.

    Args:
        step_counts: the different numbers of steps to measure.
        runs: how many runs.
        seed: an int; equal seeds give equal orders.

    Returns:
        A list of `runs` lists. Each holds every one of step_counts once, in a random order of its own; all orders are
        equally likely.
    """
    # TODO: one shuffled copy of step_counts for each run.
    ### BEGIN SOLUTION
    rng = random.Random(seed)
    return [rng.sample(step_counts, len(step_counts)) for _ in range(runs)]
    ### END SOLUTION


# %% check="run_order"
check("run_order")

# %% [markdown] given="part2"
# ---
# ## Part 2 · A stopwatch that can be trusted
# 35 minutes
#
# Three things go wrong when people time networks.
#
# 1. **The first call is slow.** Memory is claimed, kernels are chosen or compiled. Call once or twice before you measure.
# 2. **The device works on after Python has gone on.** A GPU call returns at once; the work is only queued. A clock that is
#    read then shows how fast Python can queue. Wait (`synchronize()`) right before *each* look at the clock: at the end, so
#    that the work is done, and at the start, so that no earlier work is counted.
# 3. **One slow repeat moves the mean.** Another program wakes up, and one repeat takes twice as long. It moves the mean;
#    the median stays.

# %% [markdown] given="time_call_text"
# ### 2.1 The harness
# 🟡 the heart of the part · 9 points · 8 min · under 1 CPU second
#
# The check brings a device that queues: `work()` returns at once, and only `synchronize()` lets the time pass that the
# work takes. Its first calls are slow, and it may still be busy with something when you are called.
#
# <details><summary>Hint: the order of things</summary>
#
# For each repeat: synchronize, read the clock, work, synchronize, read the clock. Five lines, in a loop.
# </details>


# %% exercise="time_call"
def time_call(
    work, repeats: int = 5, warmup: int = 1, *, clock=time.perf_counter, synchronize=wait_for_device
) -> list[float]:
    """Time work().

    Args:
        work: a function without arguments; it is called warmup + repeats times.
        repeats: how many calls are timed, each on its own; at least 1.
        warmup: how many calls are made before that, and not timed; may be 0.
        clock: tells the time in seconds.
        synchronize: returns when the device has finished everything it was given, be it by work() or by anyone before.

    Returns:
        The seconds of each timed call, in order: a list of `repeats` floats. Each includes all that the call set the
        device to do, and nothing that was set before.

    Raises:
        ValueError: if repeats < 1 or warmup < 0.
    """
    # TODO: warm up, then time each repeat.
    ### BEGIN SOLUTION
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats must be at least 1 and warmup at least 0, got {repeats} and {warmup}")
    for _ in range(warmup):
        work()
    seconds = []
    for _ in range(repeats):
        synchronize()
        start = clock()
        work()
        synchronize()
        seconds.append(clock() - start)
    return seconds
    ### END SOLUTION


# %% check="time_call"
check("time_call")

# %% [markdown] given="pretend_text"
# No GPU at hand? Here is a pretended one: calls return at once, the work takes 20 ms each, and the first call takes
# a second more. Before you run the cell: what will each of the three stopwatches show?


# %% tags=["demo", "nbval-ignore-output"]
class PretendedGPU:
    """Queues work; has a clock of its own, so that nobody has to wait."""

    def __init__(self):
        self.now, self.queued, self.calls = 0.0, 0.0, 0

    def work(self):
        self.now += 0.0005  # what it takes Python to queue
        self.queued += 0.020 if self.calls else 1.020
        self.calls += 1

    def synchronize(self):
        self.now, self.queued = self.now + self.queued, 0.0


for name, warmup, waits in (("as it should be", 1, True), ("no warm-up", 0, True), ("no synchronisation", 1, False)):
    gpu = PretendedGPU()
    wait = gpu.synchronize if waits else lambda: None
    shown = time_call(gpu.work, repeats=4, warmup=warmup, clock=lambda gpu=gpu: gpu.now, synchronize=wait)
    print(f"{name:20}", "  ".join(f"{1000 * s:7.1f} ms" for s in shown))

# %% [markdown] given="summarise_text"
# ### 2.2 Median and spread
# 🟢 easy · 5 points · 5 min · under 1 CPU second
#
# A number without its spread cannot be compared with anything. For timings, which have a long tail on one side, take the
# **median** and the **interquartile range** $q_3 - q_1$: half of all repeats lie between the quartiles.
#
# There are several definitions of quartiles. Here: sort the $n$ values; they stand at the places $0, \frac1{n-1}, \dots, 1$,
# and between them one interpolates linearly; $q_1$ is the value at ¼, $q_3$ at ¾. (NumPy does this by default; the
# `statistics` module calls it *inclusive*.)


# %% exercise="summarise"
def summarise(seconds: list[float]) -> dict[str, float]:
    """Median and spread of repeated measurements.

    Args:
        seconds: at least one value, in any order; left unchanged.

    Returns:
        A dict of plain numbers: "n" (how many), "median", "q1", "q3", and "iqr" = q3 - q1. Of one value all three
        are that value.

    Raises:
        ValueError: if there is no value.
    """
    # TODO: sort, and look at ¼, ½ and ¾.
    ### BEGIN SOLUTION
    if not len(seconds):
        raise ValueError("there is nothing to summarise: no values")
    q1, median, q3 = np.percentile(seconds, [25, 50, 75]).tolist()
    return {"n": len(seconds), "median": median, "q1": q1, "q3": q3, "iqr": q3 - q1}
    ### END SOLUTION


# %% check="summarise"
check("summarise")

# %% [markdown] given="ddim_text"
# ### 2.3 What is to be timed: the sampler
# 🟡 medium · 4 points · 6 min · under 1 CPU second
#
# DDIM without noise ($\eta = 0$; Song et al. 2021, equation 12). If you have it from Lab 4 or 5, bring it along. It visits
# $N$ of the $T$ timesteps, `round(linspace(T − 1, 0, N))` (for $N = 1$ only $T-1$), and jumps from each to the next, from
# the last to clean data, where $\bar\alpha_{-1} = 1$ (`schedule.alpha_bar(-1)`):
#
# $$\hat x_0 = \frac{x_t - \sqrt{1-\bar\alpha_t}\,\epsilon_\theta}{\sqrt{\bar\alpha_t}},\qquad
# x_s = \sqrt{\bar\alpha_s}\,\hat x_0 + \sqrt{1-\bar\alpha_s}\;\epsilon_\theta .$$
#
# <details><summary>Hint: what is measured later</summary>
#
# The tables of `schedule` lie on the CPU. Read all the $\bar\alpha$ you need before the loop, as plain numbers
# (`.tolist()`); then no step has to wait for a copy between CPU and GPU.
# </details>


# %% exercise="ddim_for_timing"
@torch.no_grad()
def ddim_sample(model, schedule: NoiseSchedule, x_T: Tensor, num_steps: int) -> Tensor:
    """Deterministic DDIM sampling.

    Args:
        model: noise predictor, called as model(x, t) with x [B, C, H, W] and t a LongTensor [B] on x's device.
        schedule: the noise schedule it was trained with.
        x_T: the noise to start from, [B, C, H, W], left unchanged.
        num_steps: N, from 1 to T; exactly N network calls are made, each with the whole batch.

    Returns:
        Samples [B, C, H, W], not clipped, with the dtype and on the device of x_T, computed without gradients.

    Raises:
        ValueError: if num_steps < 1 or > T.
    """
    # TODO: the timesteps, then one network call and one jump for each.
    ### BEGIN SOLUTION
    T = schedule.num_timesteps
    if not 1 <= num_steps <= T:
        raise ValueError(f"num_steps must lie between 1 and {T}, got {num_steps}")
    timesteps = torch.linspace(T - 1, 0, num_steps, dtype=torch.float64).round().long()
    # Plain numbers: looking up a table on the CPU would make every step of a GPU wait.
    alpha_bar = schedule.alpha_bar(torch.cat([timesteps, torch.tensor([-1])])).double().tolist()
    x = x_T
    for t, now, then in zip(timesteps.tolist(), alpha_bar, alpha_bar[1:]):
        eps = model(x, torch.full((len(x),), t, device=x.device))
        x_0 = (x - (1 - now) ** 0.5 * eps) / now**0.5
        x = then**0.5 * x_0 + (1 - then) ** 0.5 * eps
    return x
    ### END SOLUTION


# %% check="ddim_for_timing"
check("ddim_for_timing")

# %% [markdown] given="generate_text"
# ### 2.4 What is to be timed: the whole pipeline
# 🟢 easy · 5 points · 5 min · under 1 CPU second
#
# The report times "the complete inference process": drawing the noise, sampling, collecting the images. So this is one
# function, and the stopwatch goes around all of it. The noise is drawn **on the CPU, from a generator of its own** with the
# given seed, and then brought to the model's device: one seed is then the same noise for every $N$, on every machine.
#
# <details><summary>Hint</summary>
#
# `torch.Generator().manual_seed(seed)` is a generator; `torch.randn(..., generator=…)` takes it.
# `next(model.parameters()).device` is the model's device.
# </details>


# %% exercise="generate_batch"
def generate(model, schedule: NoiseSchedule, num_steps: int, num_images: int = 10, seed: int = 0) -> Tensor:
    """Noise, sampling, collation: what the experiment times.

    Args:
        model: noise predictor, as for ddim_sample.
        schedule: its noise schedule.
        num_steps: N; exactly N network calls are made, each with all images.
        num_images: how many images.
        seed: of the noise. Equal seeds give equal noise, whatever num_steps is, and whatever other code draws from
            torch's global generator.

    Returns:
        Images, float32 [num_images, 1, 28, 28] on the CPU, clipped to [-1, 1], without gradients.
    """
    # TODO: noise from the seed, ddim_sample, clip, bring to the CPU.
    ### BEGIN SOLUTION
    noise = torch.randn(num_images, 1, 28, 28, generator=torch.Generator().manual_seed(seed))
    samples = ddim_sample(model, schedule, noise.to(next(model.parameters()).device), num_steps)
    return samples.clamp(-1, 1).cpu()
    ### END SOLUTION


# %% check="generate_batch"
check("generate_batch")

# %% tags=["demo", "nbval-ignore-output"]
first = time_call(lambda: generate(model, schedule, 5), repeats=4, warmup=0)
print("four calls with 5 steps, the first of them cold:", "  ".join(f"{s:.3f} s" for s in first))
plots.image_grid(generate(model, schedule, 20), title="20 steps")

# %% [markdown] given="run_protocol_text"
# ### 2.5 The protocol
# 🟡 medium · 8 points · 8 min · under 1 CPU second
#
# Now put the pieces together: warm up once, then run after run in the order of `run_order`, every measurement on its own.
# What comes out is the **run log**: a record for each measurement, in the order in which they were made. Nothing is
# averaged and nothing thrown away here; that is for the analysis, where everybody can see it.


# %% exercise="run_protocol"
def run_protocol(
    generate_images,
    step_counts: list[int],
    runs: int,
    seed: int = 0,
    warmup: int = 1,
    *,
    clock=time.perf_counter,
    synchronize=wait_for_device,
) -> list[dict]:
    """Measure every step count once in every run.

    Args:
        generate_images: what is timed, called as generate_images(num_steps).
        step_counts: the different numbers of steps.
        runs: how many runs.
        seed: of run_order.
        warmup: how many calls are made before the first measurement, with any of step_counts; they leave no record.
            In all there are warmup + runs · len(step_counts) calls.
        clock, synchronize: as for time_call.

    Returns:
        A record for each measurement, in the order in which they were made: {"run": 1, "num_steps": 50,
        "seconds": 1.542}, with runs counted from 1.
    """
    # TODO: warm up; then for each run, and each of its step counts: time one call.
    ### BEGIN SOLUTION
    for _ in range(warmup):
        generate_images(step_counts[0])
    records = []
    for run, order in enumerate(run_order(step_counts, runs, seed), 1):
        for num_steps in order:
            (seconds,) = time_call(
                lambda n=num_steps: generate_images(n), repeats=1, warmup=0, clock=clock, synchronize=synchronize
            )
            records.append({"run": run, "num_steps": num_steps, "seconds": seconds})
    return records
    ### END SOLUTION


# %% check="run_protocol"
check("run_protocol")

# %% [markdown] given="protocol_demo_text"
# The report's protocol exactly: 10, 50 and 100 steps, ten images, two runs. About half a minute on two cores. A GPU runs
# this cell unchanged; the table says on what it was measured.

# %% tags=["demo", "nbval-ignore-output"]
SEED = 6
protocol = run_protocol(lambda n: generate(model, schedule, n), [10, 50, 100], runs=2, seed=SEED)
here = environment(device)["device"]
print(f"seconds for ten images\n\nsteps    run 1    run 2    A40 1    A40 2     here: {here}")
for n, theirs in A40_SECONDS.items():
    mine = [record["seconds"] for record in protocol if record["num_steps"] == n]  # in the order of the runs
    print(f"{n:5d}", *(f"{s:8.3f}" for s in mine + theirs))

# %% [markdown] given="sweep_text"
# Three values of $N$ can hardly tell a straight line from one that bends. A denser sweep can: more values, three runs,
# and small $N$ among them, where a fixed cost shows.

# %% tags=["demo", "nbval-ignore-output"]
sweep = run_protocol(lambda n: generate(model, schedule, n), [2, 5, 10, 20, 35, 50], runs=3, seed=SEED)
for n in sorted({record["num_steps"] for record in sweep}):
    s = summarise([record["seconds"] for record in sweep if record["num_steps"] == n])
    print(f"{n:3d} steps: median {s['median']:.3f} s, interquartile range {s['iqr']:.3f} s, n = {s['n']}")

# %% [markdown] given="part3"
# ---
# ## Part 3 · What the numbers say
# 30 minutes
#
# The simplest law with a reason behind it is **affine**: $\text{seconds} = a + bN$, a fixed cost $a$ (noise, collation,
# the first launch) and a cost $b$ for each step. It is **linear** if $a = 0$. It would be **sub-linear** if later steps
# cost less than earlier ones, so that the curve bends down.

# %% [markdown] given="fit_affine_text"
# ### 3.1 A line, and how sure it is
# 🟡 medium · 8 points · 10 min · under 1 CPU second
#
# Least squares for $y_i = a + b x_i$, with $\bar x, \bar y$ the means and $S = \sum_i (x_i-\bar x)^2$:
#
# $$b = \frac{\sum_i (x_i-\bar x)(y_i-\bar y)}{S},\quad a = \bar y - b\bar x,\quad
# s = \sqrt{\frac{\sum_i (y_i - a - b x_i)^2}{n-2}},\quad
# \mathrm{se}(b) = \frac{s}{\sqrt S},\quad \mathrm{se}(a) = s\sqrt{\frac1n + \frac{\bar x^2}{S}} .$$
#
# A 95 % interval is the estimate $\pm\, t\cdot\mathrm{se}$ with $t$ from Student's distribution with $n-2$ degrees of freedom:
# `t_quantile(n - 2)`. (1.96 is its limit for many measurements; for four, $t$ is 4.3.)


# %% exercise="fit_affine"
def fit_affine(steps: list[float], seconds: list[float]) -> dict:
    """Least squares for seconds = intercept + slope · steps.

    Args:
        steps: n numbers of steps, repeats included.
        seconds: the n measured times.

    Returns:
        A dict of plain numbers: "n", "intercept", "slope", "residual_std" (s above), and the 95 % intervals
        "intercept_interval" and "slope_interval", each [low, high].

    Raises:
        ValueError: if there are fewer than 3 measurements, if the lists differ in length, or if all steps are equal.
    """
    # TODO: the formulas above.
    ### BEGIN SOLUTION
    x, y, n = np.asarray(steps, float), np.asarray(seconds, float), len(steps)
    if n < 3 or n != len(y) or np.ptp(x) == 0:
        raise ValueError("a line with intervals needs at least 3 measurements, at 2 different numbers of steps")
    spread = ((x - x.mean()) ** 2).sum()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / spread
    intercept = y.mean() - slope * x.mean()
    s = (((y - intercept - slope * x) ** 2).sum() / (n - 2)) ** 0.5
    t = t_quantile(n - 2)
    off_slope = t * s / spread**0.5
    off_intercept = t * s * (1 / n + x.mean() ** 2 / spread) ** 0.5
    return {
        "n": n,
        "intercept": float(intercept),
        "slope": float(slope),
        "residual_std": float(s),
        "intercept_interval": [float(intercept - off_intercept), float(intercept + off_intercept)],
        "slope_interval": [float(slope - off_slope), float(slope + off_slope)],
    }
    ### END SOLUTION


# %% check="fit_affine"
check("fit_affine")

# %% [markdown] given="log_log_slope_text"
# ### 3.2 The exponent that seems to be there
# 🟢 easy · 4 points · 4 min · under 1 CPU second
#
# If seconds were $c\,N^p$, then $\ln(\text{seconds}) = \ln c + p\ln N$: in a plot with two logarithmic axes a line of slope
# $p$. Fit that line by least squares; $p$ is its slope.


# %% exercise="log_log_slope"
def log_log_slope(steps: list[float], seconds: list[float]) -> float:
    """The exponent p of the power law c · steps^p: the least-squares slope of ln(seconds) against ln(steps).

    Raises:
        ValueError: if any value is not positive.
    """
    # TODO: logarithms of both, then the slope.
    ### BEGIN SOLUTION
    if min(*steps, *seconds) <= 0:
        raise ValueError("logarithms need positive steps and seconds")
    return float(np.polyfit(np.log(steps), np.log(seconds), 1)[0])
    ### END SOLUTION


# %% check="log_log_slope"
check("log_log_slope")

# %% [markdown] given="exponent_question"
# Now feed it times that are affine *exactly*, $0.03\,N + a$, without any noise. For which $a$ is the exponent 1?

# %% tags=["demo"]
ns = [10, 50, 100]
for a in (0.0, 0.01, 0.032, 0.1, 0.3):
    print(f"0.03 N + {a:<5g} s: log-log slope {log_log_slope(ns, [0.03 * n + a for n in ns]):.3f}")

# %% [markdown] given="exponent_answer"
# Only for $a = 0$. The slope of $\ln(a+bN)$ against $\ln N$ is $\frac{bN}{a+bN}$: below 1 for every $a > 0$, and the closer
# to 1 the larger $N$. **An exponent below 1 is what a fixed cost looks like.** It says nothing about steps getting cheaper.

# %% [markdown] given="decide_text"
# ### 3.3 Decide
# 🔴 needs care · 7 points · 8 min · under 1 CPU second
#
# A decision must not depend on what one hopes to find, so write the procedure down first and let the program follow it:
#
# 1. Fit $\text{seconds} = a + bN + cN^2$ by least squares. The **curvature** is $c$; its 95 % interval is
#    $c \pm t\cdot\mathrm{se}(c)$ with $t$ = `t_quantile(n - 3)`, where $\mathrm{se}(c)^2$ is the last diagonal entry of
#    $s^2 (X^\top X)^{-1}$, the columns of $X$ are $1, N, N^2$, and $s^2$ is the sum of squared residuals over $n-3$.
#    * If the whole interval lies below 0, the law is `"sub-linear"`.
#    * If the whole interval lies above 0, the law is `"super-linear"`.
# 2. Otherwise there is no evidence that it bends. Fit the line of 3.1. If its intercept's 95 % interval contains 0, the law
#    is `"linear"`; if not, it is `"affine"`.
#
# Compute in float64 (NumPy's default; in torch `dtype=torch.float64`): in float32 the squares of $N$ drown the curvature.
#
# "No evidence that it bends" is not proof that it does not: look at how wide the interval of $c$ is.


# %% exercise="decide_growth"
def decide(steps: list[float], seconds: list[float]) -> dict:
    """Is time linear, affine, or bent in the number of steps? By the procedure above.

    Args:
        steps: n numbers of steps, repeats included.
        seconds: the n measured times.

    Returns:
        {"law": "linear", "affine", "sub-linear" or "super-linear", "curvature": c, "curvature_interval": [low, high]}.

    Raises:
        ValueError: if there are fewer than 4 measurements, or fewer than 3 different numbers of steps.
    """
    # TODO: the parabola and its interval; then, if need be, the line.
    ### BEGIN SOLUTION
    x, y, n = np.asarray(steps, float), np.asarray(seconds, float), len(steps)
    if n < 4 or len(set(steps)) < 3:
        raise ValueError("a curvature with an interval needs at least 4 measurements, at 3 different numbers of steps")
    X = np.stack([np.ones(n), x, x**2], axis=1)
    coefficients = np.linalg.lstsq(X, y, rcond=None)[0]
    variance = ((y - X @ coefficients) ** 2).sum() / (n - 3)
    c = coefficients[2]
    off = t_quantile(n - 3) * (variance * np.linalg.inv(X.T @ X)[2, 2]) ** 0.5
    if c + off < 0:
        law = "sub-linear"
    elif c - off > 0:
        law = "super-linear"
    else:
        low, high = fit_affine(steps, seconds)["intercept_interval"]
        law = "linear" if low <= 0 <= high else "affine"
    return {"law": law, "curvature": float(c), "curvature_interval": [float(c - off), float(c + off)]}
    ### END SOLUTION


# %% check="decide_growth"
check("decide_growth")

# %% [markdown] given="source_table"
# > #### 🔍 Check the source: "sub-linear, with diminishing returns"
# > The report argues: from 100 to 50 steps the time is nearly halved, but from 50 to 10 it is not, so the returns diminish.
# > Before you run the cell: by which factor do the *steps* fall from 50 to 10? And what should be compared with what, if
# > the question is whether a step saved late is worth less than a step saved early?


# %% given="as_lists"
def as_lists(records: list[dict]) -> tuple[list[int], list[float]]:
    """Records -> (steps, seconds)."""
    return [record["num_steps"] for record in records], [record["seconds"] for record in records]


# %% tags=["demo"]
a40 = [
    {"run": k + 1, "num_steps": n, "seconds": s} for k in range(2) for n, both in A40_SECONDS.items() for s in [both[k]]
]
medians = {n: statistics.median(both) for n, both in A40_SECONDS.items()}
for many, few in ((100, 50), (50, 10)):
    saved = medians[many] - medians[few]
    print(f"from {many} to {few} steps: steps divided by {many / few:.2f}, time by {medians[many] / medians[few]:.2f}; "
          f"{1000 * saved / (many - few):.1f} ms saved for each step left out")  # fmt: skip
line, bend = fit_affine(*as_lists(a40)), decide(*as_lists(a40))
print(
    f"\nseconds = {line['intercept']:.3f} + {line['slope']:.4f} N, deviation {line['residual_std']:.4f} s, n = {line['n']}"
)
print(
    "95 % intervals: intercept {:.3f} … {:.3f}, slope {:.4f} … {:.4f}".format(
        *line["intercept_interval"], *line["slope_interval"]
    )
)
print("curvature {:.1e}, interval {:.1e} … {:.1e}".format(bend["curvature"], *bend["curvature_interval"]))
print(f"log-log slope {log_log_slope(*as_lists(a40)):.3f}; decision: {bend['law']}")

# %% [markdown] given="source_table_answer"
# > From 50 to 10 the steps fall by a factor of five, not two, and so, nearly, does the time. Every step left out saves 30 ms,
# > early or late: the returns do not diminish. The table is **affine**, about 0.030 s a step and 0.032 s once, and the
# > exponent of 0.965 is the fixed cost seen through logarithms. Two more things the table shows: run 2 is faster at all
# > three step counts, as if the machine had still been warming up; and one fixed cost of 0.03 s is as much as one step.
# > One caution: with three step counts and two runs the interval of the curvature is wide. The table cannot show that
# > nothing bends; it shows no sign that anything does.

# %% [markdown] given="own_text"
# And yours? The line is fitted to the sweep alone, whose step counts were shuffled with one another. The protocol was
# measured minutes earlier, perhaps by a machine in another mood; pooled with the sweep, such a difference would look like
# a bend. Kept apart it is a test: does the line foretell the 100 steps that it has not seen?

# %% tags=["demo", "nbval-ignore-output"]
records = protocol + [record | {"run": record["run"] + 2} for record in sweep]  # five runs in all
steps, seconds = as_lists(sweep)
fit, decision, exponent = fit_affine(steps, seconds), decide(steps, seconds), log_log_slope(steps, seconds)
print(
    f"{here}: seconds = {fit['intercept']:.3f} + {fit['slope']:.4f} N, deviation {fit['residual_std']:.3f} s, n = {fit['n']}"
)
print(
    "95 % intervals: intercept {:.3f} … {:.3f}, slope {:.4f} … {:.4f}".format(
        *fit["intercept_interval"], *fit["slope_interval"]
    )
)
print("curvature {:.1e}, interval {:.1e} … {:.1e}".format(decision["curvature"], *decision["curvature_interval"]))
print(f"log-log slope {exponent:.3f}; decision: {decision['law']}")
foretold = fit["intercept"] + 100 * fit["slope"]
measured = [record["seconds"] for record in protocol if record["num_steps"] == 100]
print(f"100 steps: foretold {foretold:.2f} s; the protocol's runs took " + " and ".join(f"{s:.2f} s" for s in measured))

# %% tags=["demo", "nbval-ignore-output"]
by_run = {}
for record in sorted(records, key=lambda record: record["num_steps"]):
    by_run.setdefault(f"run {record['run']}", []).append(record)
ends = [0, max(record["num_steps"] for record in records)]
time_figure = plots.curves(
    {name: as_lists(rows) for name, rows in sorted(by_run.items())}
    | {"a + b N": (ends, [fit["intercept"] + fit["slope"] * n for n in ends])},
    "steps N", "seconds for ten images", f"Time against steps, {device}", points=by_run,
)  # fmt: skip
time_figure

# %% tags=["demo", "nbval-ignore-output"]
residual_figure = plots.curves(
    {
        name: ([r["num_steps"] for r in rows],
               [1000 * (r["seconds"] - fit["intercept"] - fit["slope"] * r["num_steps"]) for r in rows])
        for name, rows in sorted(by_run.items())
    },
    "steps N", "measured − fitted, ms", "What the line leaves over: does it bend?", points=by_run,
)  # fmt: skip
residual_figure

# %% [markdown] given="residual_answer"
# Two things to look for. Do the leftovers bend, low at both ends and high in the middle, or the other way round? That is
# what the curvature measures. And do they grow with $N$? Least squares takes all measurements for equally uncertain. If
# a long run scatters by more milliseconds than a short one, the interval of the intercept comes out wider than it need be,
# and a small fixed cost drowns in it: "linear" then means *too small to be seen from here*.
#
# And a third: all intervals take your measurements for independent. A slow minute that catches the long runs bends the
# line, and the procedure then says "sub-linear" or "super-linear" of a machine, not of a sampler. Look whether a few points
# of one run do it, and say so in your conclusions. What you may not do is measure again until you like the answer.

# %% [markdown] given="part4"
# ---
# ## Part 4 · Where the time goes, and what it buys
# 15 minutes

# %% [markdown] given="split_step_cost_text"
# ### 4.1 Network and sampler
# 🟡 medium · 5 points · 6 min · under 1 CPU second
#
# How much of a step is the network, and how much the sampler around it? A difference of two nearly equal times tells
# nothing, so measure the sampler by itself: with a **free network**, which costs nothing and answers at once. And to get a
# *step* rather than a whole run, use the difference of two lengths, in which the fixed cost drops out. With $\tau(N)$ the
# median time of $N$ steps and $\tau_0(N)$ the same with the free network:
#
# $$\text{step} = \frac{\tau(2N)-\tau(N)}{N},\qquad \text{sampler} = \frac{\tau_0(2N)-\tau_0(N)}{N},\qquad
# \text{network} = \text{step} - \text{sampler},\qquad \text{fixed} = \tau(N) - N\cdot\text{step}.$$


# %% exercise="split_step_cost"
def split_step_cost(
    sample, sample_free, num_steps: int, repeats: int = 5, *, clock=time.perf_counter, synchronize=wait_for_device
) -> dict[str, float]:
    """Split the cost of a step into network and sampler.

    Args:
        sample: sample(N) runs the pipeline with N steps.
        sample_free: the same with a network that costs nothing.
        num_steps: N of the formulas; runs of N and of 2N steps are timed.
        repeats: timed calls of each kind, after one that is not; their median is taken.
        clock, synchronize: as for time_call.

    Returns:
        A dict of plain numbers, in seconds: "step", "network", "sampler" and "fixed" as above.
    """

    # TODO: four medians, and the formulas above.
    ### BEGIN SOLUTION
    def tau(run, n):
        return summarise(time_call(lambda: run(n), repeats, 1, clock=clock, synchronize=synchronize))["median"]

    short = tau(sample, num_steps)
    step = (tau(sample, 2 * num_steps) - short) / num_steps
    sampler = (tau(sample_free, 2 * num_steps) - tau(sample_free, num_steps)) / num_steps
    return {"step": step, "network": step - sampler, "sampler": sampler, "fixed": short - num_steps * step}
    ### END SOLUTION


# %% check="split_step_cost"
check("split_step_cost")


# %% tags=["demo", "nbval-ignore-output"]
class FreeNetwork(torch.nn.Module):
    """Costs nothing: answers with what it is shown. Its one parameter says on which device it is."""

    def __init__(self):
        super().__init__()
        self.device_of = torch.nn.Parameter(torch.zeros((), device=device))

    def forward(self, x, t):
        return x


free = FreeNetwork()
split = split_step_cost(lambda n: generate(model, schedule, n), lambda n: generate(free, schedule, n), 6, repeats=3)
print(f"a step takes {1000 * split['step']:.2f} ms: network {1000 * split['network']:.2f} ms, "
      f"sampler {1000 * split['sampler']:.3f} ms ({100 * split['sampler'] / split['step']:.2f} %)")  # fmt: skip
print(f"once: {1000 * split['fixed']:.1f} ms; the intercept of the line was {1000 * fit['intercept']:.1f} ms")

# %% [markdown] given="split_answer"
# Does the fixed cost agree with the intercept of the line? Both are small differences of large times, so look at the
# interval of the intercept before you worry. What would a faster sampler gain you, and what a faster network?

# %% [markdown] given="batch_cost_text"
# ### 4.2 Ten images at once
# 🟢 easy · 3 points · 4 min · under 1 CPU second
#
# The report always drew ten images at once. Is one image a tenth of that? New shapes may need new kernels, so warm up for
# every size.


# %% exercise="batch_cost"
def batch_cost(
    work, batch_sizes: list[int], repeats: int = 3, *, clock=time.perf_counter, synchronize=wait_for_device
) -> list[dict]:
    """What an image costs in batches of different sizes.

    Args:
        work: work(batch_size) draws that many images at once.
        batch_sizes: the sizes to try.
        repeats: timed calls for each size, after one that is not; their median is taken.
        clock, synchronize: as for time_call.

    Returns:
        A dict for each size, in the order of batch_sizes: "batch_size", "seconds" (the median for the whole batch) and
        "seconds_per_image".
    """
    # TODO: for each size: time, summarise, divide.
    ### BEGIN SOLUTION
    rows = []
    for size in batch_sizes:
        seconds = time_call(lambda size=size: work(size), repeats, 1, clock=clock, synchronize=synchronize)
        median = summarise(seconds)["median"]
        rows.append({"batch_size": size, "seconds": median, "seconds_per_image": median / size})
    return rows
    ### END SOLUTION


# %% check="batch_cost"
check("batch_cost")

# %% tags=["demo", "nbval-ignore-output"]
batches = batch_cost(lambda size: generate(model, schedule, 4, num_images=size), [1, 2, 5, 10, 20])
for row in batches:
    print(
        f"{row['batch_size']:3d} at once, 4 steps: {row['seconds']:.3f} s, {1000 * row['seconds_per_image']:.1f} ms an image"
    )
batch_figure = plots.curves(
    {"4 steps": ([r["batch_size"] for r in batches], [1000 * r["seconds_per_image"] for r in batches])},
    "images at once", "ms an image", f"Time for an image against batch size, {device}", xscale="log",
)  # fmt: skip
batch_figure

# %% [markdown] given="quality_text"
# ### 4.3 What do the steps buy?
# 🟡 medium · 4 points · 5 min · 2 CPU seconds
#
# The report leaves quality for "future work"; without it, the fastest setting is one step. Compare step counts on images
# that start from **one noise**, so that they differ by the steps alone. `quality(images)` gives `.frechet`, the Fréchet
# distance to MNIST in the features of a digit classifier (lower is better; compare only equal numbers of images), and
# `.recognised`, the fraction of digits that the classifier is more than 90 % sure of. A third figure needs no classifier:
# how far the images are from those of the longest run.


# %% exercise="quality_against_steps"
def quality_against_steps(
    model, schedule: NoiseSchedule, step_counts: list[int], num_images: int = 50, seed: int = 0
) -> list[dict]:
    """Quality of the images that `generate` draws with each of step_counts, all from the noise of one seed.

    Args:
        model, schedule: as for generate.
        step_counts: the numbers of steps to compare, in any order.
        num_images: images for each, at least 2.
        seed: of the noise, the same for all.

    Returns:
        A dict of plain numbers for each step count, in the order given: "num_steps", "frechet" and "recognised" as
        `quality` measures them, and "distance", the root-mean-square difference, over all pixels of all images, to the
        images of the largest step count.
    """
    # TODO: draw, measure, compare with the longest run.
    ### BEGIN SOLUTION
    images = {n: generate(model, schedule, n, num_images, seed) for n in step_counts}
    longest = images[max(step_counts)]
    rows = []
    for n in step_counts:
        measured = quality(images[n])
        distance = (images[n] - longest).square().mean().sqrt().item()
        rows.append(
            {"num_steps": n, "frechet": measured.frechet, "recognised": measured.recognised, "distance": distance}
        )
    return rows
    ### END SOLUTION


# %% check="quality_against_steps"
check("quality_against_steps")

# %% tags=["demo", "nbval-ignore-output"]
NUM_IMAGES = 48
with progress(model, 3 + 5 + 10 + 20 + 40):
    quality_rows = quality_against_steps(model, schedule, [3, 5, 10, 20, 40], NUM_IMAGES)
print(f"n = {NUM_IMAGES} images, all from one noise")
for row in quality_rows:
    print(f"{row['num_steps']:3d} steps: Fréchet {row['frechet']:6.1f}, recognised {100 * row['recognised']:3.0f} %, "
          f"{row['distance']:.3f} from {max(r['num_steps'] for r in quality_rows)} steps")  # fmt: skip
plots.show_images(
    {f"{n} steps": generate(model, schedule, n) for n in (3, 5, 10, 20)}, title="One noise, four step counts"
)

# %% tags=["demo", "nbval-ignore-output"]
quality_figure = plots.curves(
    {"quality": ([fit["intercept"] + fit["slope"] * r["num_steps"] for r in quality_rows],
                 [r["frechet"] for r in quality_rows])},
    "seconds for ten images (fitted)", f"Fréchet distance, n = {NUM_IMAGES}",
    "What a second buys: " + ", ".join(f"{r['num_steps']}" for r in quality_rows) + " steps",
)  # fmt: skip
quality_figure

# %% [markdown] given="quality_answer"
# Here, not in the seconds, is where returns may diminish. With so few images the Fréchet distance only ranks: it is far
# above its value for many images, and differences of a few per cent mean nothing.

# %% [markdown] given="part5"
# ---
# ## Part 5 · The report
# 25 minutes
#
# A report whose numbers are typed by hand goes stale with the next run. Yours is *built*: one cell turns measurements into
# text, tables and figures, and can do it again tomorrow, or on another machine.
#
# The project report has an appendix, too: the paths of a workspace, and the news that a shell was set up. Nothing in it
# would help anybody to repeat the experiment, or to doubt it. Yours holds what does: every single measurement, in the order
# in which it was made, and the machine and software it was made with.

# %% [markdown] given="report_table_text"
# ### 5.1 A table
# 🟢 easy · 3 points · 6 min · under 1 CPU second
#
# A table in Markdown:
#
# ```
# | steps | seconds |
# |---|---|
# | 10 | 0.3281 |
# ```
#
# What stands in a cell is **text, whatever it is**. A `|` in it must not start a new column (write `\|`), a line break
# must not end the row (write a space), and `<b>` must not make anything bold: write `&` as `&amp;` and `<` as `&lt;`.


# %% exercise="report_table"
def markdown_table(rows: list[dict], columns: dict[str, str]) -> str:
    """A table in Markdown.

    Args:
        rows: a dict for each row; keys that are not in `columns` are left out.
        columns: key -> heading, in the order of the columns.

    Returns:
        The table: a line of headings, a line of dashes, a line for each row. Ints and strings stand as they are, floats
        with at least three significant digits. No |, line break, & or < in a cell changes the table or how the cell reads.
    """

    # TODO: a line for each row; take care of |, line breaks and markup.
    ### BEGIN SOLUTION
    def cell(value):
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        return " ".join(html.escape(text, quote=False).replace("\\", "\\\\").replace("|", "\\|").split())

    lines = [list(columns.values()), ["---"] * len(columns), *([row[key] for key in columns] for row in rows)]
    return "\n".join("| " + " | ".join(cell(value) for value in line) + " |" for line in lines)
    ### END SOLUTION


# %% check="report_table"
check("report_table")

# %% [markdown] given="report_markdown_text"
# ### 5.2 The text
# 🟡 longest of all · 7 points · 12 min · under 1 CPU second
#
# The sections of the project report, in its order, each under a heading of the second level (`## Results`). What must
# stand in each, at least; write sentences around it as you like:
#
# | Section | holds |
# |---|---|
# | `Abstract` | the law that was decided, the number of measurements $n$, the device |
# | `Introduction` | the hypothesis |
# | `Methodology` | a table of `method`: one row for each name and value |
# | `Results` | a table of the measured seconds as in the project report: a row for each step count, ascending, with the step count and then one column a run. The same for the reference, with its device's name in the text. Every figure, with its caption |
# | `Analysis` | slope and intercept with both ends of their intervals, the residual deviation, log-log slope, curvature with both ends of its interval, the law; tables of `split`, `batches` and `quality` |
# | `Conclusion and Future Work` | the conclusion |
# | `Appendix A: Run log` | a table with a row for each record, in the order measured; its first three columns are run, steps, seconds |
# | `Appendix B: Environment` | a table of `environment`: one row for each name and value |
#
# A step count that a run did not hold has an empty cell there. All times are in seconds, and every number has at least
# three significant digits. A figure is `![caption](address)`; its address holds the picture itself (`data:image/png;…`).


# %% exercise="report_markdown"
def build_report(study: dict) -> str:
    """The lab report, in Markdown.

    Args:
        study: a dict with
            "hypothesis", "conclusion": text;
            "method", "environment": dicts, name -> text or number;
            "records": what run_protocol returned (several calls together, runs counted on);
            "reference": {"device": text, "records": as above}, somebody else's measurements;
            "fit", "decision": what fit_affine and decide returned;
            "log_log_slope": a float;
            "split", "batches", "quality": what split_step_cost, batch_cost and quality_against_steps returned;
            "figures": caption -> address of a picture, "data:image/png;base64,…".
            environment["device"] names the device of the measurements.

    Returns:
        The report, with the sections and the contents of the table above.
    """

    # TODO: section by section; markdown_table does most of it.
    ### BEGIN SOLUTION
    def named(values):
        rows = [{"name": name, "value": value} for name, value in values.items()]
        return markdown_table(rows, {"name": "", "value": "value"})

    def seconds_table(records):
        runs = sorted({record["run"] for record in records})
        rows = {}
        for record in sorted(records, key=lambda record: record["num_steps"]):
            n = record["num_steps"]
            row = rows.setdefault(n, {"num_steps": n} | {f"run {run}": "" for run in runs})
            row[f"run {record['run']}"] = record["seconds"]
        columns = {"num_steps": "steps"} | {f"run {run}": f"run {run} (s)" for run in runs}
        return markdown_table(list(rows.values()), columns)

    fit, decision, device = study["fit"], study["decision"], html.escape(study["environment"]["device"])
    counts = sorted({record["num_steps"] for record in study["records"]})
    coefficients = [
        {"what": "slope, s a step", "estimate": fit["slope"], "interval": fit["slope_interval"]},
        {"what": "intercept, s", "estimate": fit["intercept"], "interval": fit["intercept_interval"]},
        {"what": "curvature, s a step²", "estimate": decision["curvature"], "interval": decision["curvature_interval"]},
    ]
    for row in coefficients:
        row["low"], row["high"] = row["interval"]
    headings = {"what": "", "estimate": "estimate", "low": "95 % from", "high": "to"}
    split = {name: f"{value:.4g} s" for name, value in study["split"].items()}
    sections = {
        "Abstract": f"We measured how long it takes to draw images with {counts[0]} to {counts[-1]} DDIM steps on {device}. "
        f"By {fit['n']} measurements time is **{decision['law']}** in the number of steps: {fit['intercept']:.4g} s once "
        f"and {fit['slope']:.4g} s for each step.",
        "Introduction": study["hypothesis"],
        "Methodology": named(study["method"]),
        "Results": "\n\n".join(
            [
                f"Seconds on {device}:",
                seconds_table(study["records"]),
                f"For comparison, seconds on {html.escape(study['reference']['device'])}:",
                seconds_table(study["reference"]["records"]),
                *(f"![{caption}]({address})" for caption, address in study["figures"].items()),
            ]
        ),
        "Analysis": "\n\n".join(
            [
                f"By the procedure fixed beforehand the law is **{decision['law']}**. The line leaves a residual deviation "
                f"of {fit['residual_std']:.4g} s; the log-log slope is {study['log_log_slope']:.4g}.",
                markdown_table(coefficients, headings),
                "What a step is made of, and what is paid once:",
                named(split),
                "Images at once:",
                markdown_table(
                    study["batches"],
                    {"batch_size": "images", "seconds": "seconds", "seconds_per_image": "seconds an image"},
                ),
                "Quality, from one noise:",
                markdown_table(
                    study["quality"],
                    {
                        "num_steps": "steps",
                        "frechet": "Fréchet distance",
                        "recognised": "recognised",
                        "distance": "distance to the longest run",
                    },
                ),
            ]
        ),
        "Conclusion and Future Work": study["conclusion"],
        "Appendix A: Run log": markdown_table(
            study["records"], {"run": "run", "num_steps": "steps", "seconds": "seconds"}
        ),
        "Appendix B: Environment": named(study["environment"]),
    }
    title = "# Steps against time: a lab report\n\n"
    return title + "\n\n".join(f"## {heading}\n\n{text}" for heading, text in sections.items()) + "\n"
    ### END SOLUTION


# %% check="report_markdown"
check("report_markdown")

# %% [markdown] given="report_html_text"
# ### 5.3 A page that stands alone
# 🟡 medium · 4 points · 6 min · under 1 CPU second
#
# The same as a web page, in **one file**: nothing is loaded from elsewhere, no script, no style sheet, no picture; what
# looks like HTML in the Markdown shows as text. `mistune`, which comes with Jupyter, turns Markdown into HTML:
# `mistune.create_markdown(escape=True, plugins=["table"])` makes a function from Markdown to the HTML of a page's body.
# `html.escape(text)` makes text of markup.
#
# One thing is left to you: Markdown can ask for a picture from elsewhere, `![](https://…)`. Refuse it.


# %% exercise="report_html"
def report_html(markdown: str, title: str) -> str:
    """A Markdown report as a web page in one file.

    Args:
        markdown: the report; its tables and figures appear, HTML in it shows as text.
        title: plain text for the <title>.

    Returns:
        The page: <!doctype html>, <html>, <head> with <meta charset="utf-8"> and <title>, and <body>. A <style> of its
        own is welcome.

    Raises:
        ValueError: if the Markdown shows a picture whose address does not begin with "data:image/".
    """
    # TODO: the body by mistune; look at the addresses of its pictures; then the page around it.
    ### BEGIN SOLUTION
    body = mistune.create_markdown(escape=True, plugins=["table"])(markdown)
    if re.search(r'<img\b[^>]*?\bsrc="(?!data:image/)', body):
        raise ValueError("the report shows a picture from elsewhere; embed it as data:image/…")
    style = (
        "body { max-width: 52rem; margin: 2rem auto; padding: 0 1rem; font: 1rem/1.5 sans-serif; } "
        "table { border-collapse: collapse; margin: 1rem 0; } "
        "td, th { border: 1px solid #bbb; padding: 0.2rem 0.6rem; text-align: left; } img { max-width: 100%; }"
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        f"<style>{style}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )
    ### END SOLUTION


# %% check="report_html"
check("report_html")

# %% [markdown] given="conclusion_text"
# ### 5.4 Your conclusions
# 10 points, read by a person · 10 min
#
# 150 to 300 words, as the text that the function below returns, with numbers from **your** runs. Write in the first person
# of the experiment ("we measured …"), and answer:
#
# 1. Was your hypothesis of 1.1 confirmed? Which law, with which numbers and intervals, for which range of $N$?
# 2. Does the project report's table support its conclusion? What went wrong in its argument, and what does an exponent
#    below 1 mean?
# 3. Where does the time go, on your device? Why is $b$ so different from the A40's, or so alike? What would you change
#    first to make sampling faster?
# 4. How many steps would you use, from quality *and* time, and how sure are you?
# 5. What could still be wrong with your own measurement?


# %% exercise="conclusion"
def conclusion() -> str:
    """The conclusions of this experiment, in plain sentences; your report quotes them."""
    # TODO: your text, with your numbers.
    ### BEGIN SOLUTION
    # The numbers are those of the last run: a sentence typed by hand would go stale with the next one.
    same = [[s for m, s in zip(steps, seconds) if m == n] for n in set(steps)]
    bend = abs(decision["curvature"]) * (max(steps) - min(steps)) ** 2 / 4
    verdict = {
        "affine": "This confirms our hypothesis.",
        "linear": "This confirms our hypothesis but for the fixed cost, which is too small to be seen from here.",
    }.get(
        decision["law"],
        f"This does not confirm our hypothesis. Nor do we trust it yet: the bend is {bend:.2f} s in the middle of the "
        f"range, and measurements of one step count differ by up to {max(max(s) - min(s) for s in same):.2f} s, because "
        "the machine was not ours alone. The interval takes them for independent, which those of one slow minute are "
        "not. We keep the measurement as it is, and would make a second one with more runs.",
    )
    (slope_low, slope_high), (once_low, once_high) = fit["slope_interval"], fit["intercept_interval"]
    best = min(row["frechet"] for row in quality_rows)
    enough = min((row for row in quality_rows if row["frechet"] < 1.1 * best), key=lambda row: row["num_steps"])
    return (
        f"From {fit['n']} measurements between {min(steps)} and {max(steps)} steps, ten images each, the procedure that we "
        f"had fixed decides: {decision['law']}. {verdict} A step takes {fit['slope']:.4f} s (95 % interval "
        f"{slope_low:.4f} to {slope_high:.4f} s), what is paid once is {fit['intercept']:.3f} s ({once_low:.3f} to "
        f"{once_high:.3f} s). It foretells {foretold:.2f} s for 100 steps, where the protocol took {min(measured):.2f} to "
        f"{max(measured):.2f} s; beyond that we have measured nothing.\n\n"
        "The table of the project report does not support its conclusion. It compares halving the steps (100 to 50) with "
        "dividing them by five (50 to 10) and expects the same factor of both; each step left out saves 30 ms in either "
        "case. An exponent below 1 in a log-log plot is what any fixed cost gives; it does not make a law sub-linear.\n\n"
        f"Of a step, {100 * split['network'] / split['step']:.1f} % is the network. A faster sampler would gain next to "
        f"nothing, a faster network or fewer calls nearly everything. Our step takes {fit['slope'] / line['slope']:.1f} "
        "times as long as the A40's. We would have expected a larger difference of a GPU; ten small images may be too "
        "little to keep it busy, so that it waits for Python to queue the work, but we could not test that here.\n\n"
        f"Of the step counts we compared, {enough['num_steps']} is the smallest whose Fréchet distance is within a tenth of "
        f"the best ({enough['frechet']:.1f}, best {best:.1f}), and it takes "
        f"{fit['intercept'] + fit['slope'] * enough['num_steps']:.2f} s. With {NUM_IMAGES} images this ranks step counts "
        "and no more; we would repeat it with a thousand.\n\n"
        "What could be wrong: one machine, on which other programs may have run; three runs, so that a slow minute weighs; "
        "and a long measurement scatters by more seconds than a short one, which the intervals do not know."
    )
    ### END SOLUTION


# %% [markdown] task="conclusion_points" points=10
# ### Conclusions, read by a person
# 10 points for the text above; nothing to write here.
#
# === BEGIN MARK SCHEME ===
# | Points | Level |
# |---|---|
# | 9–10 | All five answered from the student's own numbers, with intervals and n; the hypothesis judged by the procedure fixed beforehand, and not beyond the range measured; the report's mistake named (a factor of five compared with a factor of two, a fixed cost taken for a bend); network and sampler kept apart; steps chosen from quality and time, with its uncertainty; own weaknesses seen |
# | 6–8 | Mostly right and from own numbers; one question thin, or intervals ignored |
# | 3–5 | Numbers without reasons, or reasons without numbers |
# | 1–2 | A few correct remarks |
# | 0 | Nothing, or nothing of one's own |
# === END MARK SCHEME ===

# %% [markdown] given="report_text"
# ### 5.5 One cell
# This cell builds the report anew, writes `lab06_report.md` and `lab06_report.html` beside this notebook, and shows it. Open
# the HTML file in a browser; it can be sent to anyone as it is.

# %% tags=["demo", "nbval-ignore-output"]
study = {
    "hypothesis": hypothesis(),
    "conclusion": conclusion(),
    "method": {
        "independent variable": "number of DDIM steps",
        "dependent variable": "wall-clock seconds from the noise to the collected images",
        "held fixed": "network mnist-paper, schedule, eta = 0, image size, noise seed, device, threads, software",
        "images at once": 10,
        "runs": f"2 of the protocol (10, 50, 100 steps), then 3 of the sweep, to which the line is fitted; each shuffled, seed {SEED}",
        "warm-up": "one call before each series; clock read only after the device was waited for",
        "images for quality": NUM_IMAGES,
    },
    "records": records,
    "reference": {"device": "NVIDIA A40 (project report)", "records": a40},
    "fit": fit,
    "log_log_slope": exponent,
    "decision": decision,
    "split": split,
    "batches": batches,
    "quality": quality_rows,
    "figures": {
        "Time against steps": data_uri(time_figure),
        "What the line leaves over": data_uri(residual_figure),
        "Time for an image against batch size": data_uri(batch_figure),
        "Quality against time": data_uri(quality_figure),
    },
    "environment": environment(device),
}
report = build_report(study)
Path("lab06_report.md").write_text(report, encoding="utf-8")
Path("lab06_report.html").write_text(report_html(report, "Steps against time"), encoding="utf-8")
show_report(report)

# %% [markdown] given="timing_style_text"
# ## Code quality
# 2 points by a program, for what you completed: docstrings kept, no unused or undefined names, no bare `except:`.

# %% check="timing_style"
check("timing_style")

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
# 1. **Far out.** Fit the line with at most 20 steps and predict 1000, with its interval. Then wait for the 1000. Was the
#    interval honest? Which assumption of it is the weakest?
# 2. **Which part moves?** Repeat the sweep with half the threads (`torch.set_num_threads`), in bfloat16, and with
#    `torch.compile`. Predict first, for each, whether $a$, $b$ or both will change.
# 3. **A noisy neighbour.** Start another program that keeps one core busy and repeat the protocol. What do mean, median and
#    minimum of the repeats say? Which of them would you put in a report, and why?
# 4. **The same law elsewhere.** Time one *training* step against the batch size, on the same network. Is that law affine
#    as well, and how does its slope compare with that of sampling?

# %% [markdown] given="submit"
# ---
# **Before you hand in:** *Kernel → Restart Kernel and Run All Cells*. Cells whose check does not pass show their hint,
# and the rest runs on. Then save, and submit this `.ipynb` file under its own name. The report is in it; the two files it
# wrote are for you.
