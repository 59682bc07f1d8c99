"""Part 4: DDPM's steps one after another, and DDIM's that jump (Ho et al. 2020; Song et al. 2021)."""

import torch

from autograder.checks import expect, graded
from autograder.checks.oracles import (
    Coefficients,
    GaussianOracle,
    SteadyNetwork,
    ideal_timesteps,
    images,
    random_schedule,
)
from autograder.checks.samplers import hold_jump, hold_timesteps, step_problem


@graded(points=5, section="Sampling")
def test_reverse_step(submission, rng):
    """`ddpm_step` draws from p(x_{t−1} | x_t), with one network call and no noise at t = 0."""
    schedule = random_schedule(rng)
    network, c = SteadyNetwork(schedule, rng), Coefficients(schedule)
    diffusion = submission.Diffusion(network, schedule)
    last = schedule.num_timesteps - 1
    x_t = images(rng, 32, 1, 28, 28)
    for t in (last, int(torch.randint(30, last, (), generator=rng)), 3, 0):
        network.calls.clear()
        x_s = expect.tensor(diffusion.ddpm_step(x_t, t), f"ddpm_step at t = {t}", x_t.shape)
        if len(network.calls) != 1:
            expect.fail(f"ddpm_step should call the network once; at t = {t} it called it {len(network.calls)} times.")
        x_seen, t_seen, eps = network.calls[0]
        if bool((t_seen != t).any()):
            expect.fail(f"ddpm_step at t = {t} asked the network about timestep {t_seen[0].item():g}.")
        expect.same(x_seen, x_t, f"ddpm_step at t = {t} showed the network something other than x_t.")
        mean, variance = c.posterior_mean(x_t, t, eps), c.posterior_variance(t)
        problem = step_problem(x_s, mean, variance, eps)
        if problem is not None:
            _explain_step(c, x_s, x_t, t, eps, mean, variance)
            expect.fail(f"ddpm_step at t = {t}: {problem}.")


def _explain_step(c, x_s, x_t, t, eps, mean, variance):
    """Fail with the mistake, if it is a known one."""
    x, e = x_t.double(), eps.double()
    a, b, ab = c.alpha(t), c.beta(t), c.alpha_bar(t)
    wrong_means = {
        "ᾱ_t stands in place of α_t in 1/√α_t": (x - b / (1 - ab).sqrt() * e) / ab.sqrt(),
        "1 − ᾱ_t stands in place of β_t": (x - (1 - ab).sqrt() * e) / a.sqrt(),
        "1 − ᾱ_t lacks its square root": (x - b / (1 - ab) * e) / a.sqrt(),
        "α_t lacks its square root": (x - b / (1 - ab).sqrt() * e) / a,
        "the predicted noise is added instead of subtracted": (x + b / (1 - ab).sqrt() * e) / a.sqrt(),
        "the division by √α_t is missing": x - b / (1 - ab).sqrt() * e,
        "it is the estimate of x_0, not the mean of x_(t−1)": c.predict_x0(x, e, t),
    }
    std = variance.sqrt().item()
    for mistake, wrong in wrong_means.items():
        if step_problem(x_s, wrong, variance, eps) is None:
            expect.fail(f"the mean of ddpm_step at t = {t} is wrong: {mistake}.")
    spread = (x_s.double() - mean).std().item()
    if t == 0:
        wrapped = (b * (1 - c.alpha_bar(c.schedule.num_timesteps - 1)) / (1 - ab)).sqrt().item()
        cause = "alphas_cumprod[t − 1] at t = 0 is the last entry; ᾱ_{−1} is 1, use schedule.alpha_bar(t − 1)"
        if abs(spread / wrapped - 1) < 0.03:
            expect.fail(f"ddpm_step adds noise at t = 0: {cause}.")
        if abs(spread / b.sqrt().item() - 1) < 0.03:
            expect.fail("ddpm_step adds noise at t = 0, where the last step leads to clean data.")
        return
    scales = {
        "the noise is scaled by the variance; it needs its square root, √β̃_t": variance.item(),
        "the noise has variance β_t; this lab uses the posterior variance β̃_t": c.beta(t).item() ** 0.5,
        "the square root of the variance is taken twice": std**0.5,
    }
    if spread < 1e-4 * std + 1e-6:
        expect.fail(f"ddpm_step at t = {t} adds no noise; only the last step, t = 0, goes without.")
    for mistake, scale in scales.items():
        if abs(spread / std - 1) > 0.03 and abs(spread / scale - 1) < 0.02:
            expect.fail(f"ddpm_step at t = {t}: {mistake}.")


@graded(points=4, section="Sampling")
def test_reverse_chain(submission, rng):
    """`ddpm_sample` walks all T timesteps from x_T to x_0, one network call each."""
    schedule = random_schedule(rng, num_timesteps=24)
    network, c = GaussianOracle(schedule), Coefficients(schedule)
    diffusion = submission.Diffusion(network, schedule)
    shape = (48, 1, 22, 22)
    x_T = images(rng, *shape)
    samples = expect.tensor(diffusion.ddpm_sample(shape, x_T=x_T), "ddpm_sample", shape, torch.float32)
    calls = list(network.calls)
    wanted = list(range(23, -1, -1))
    _hold_visits(network, wanted, "ddpm_sample")
    expect.same(calls[0][0], x_T, "ddpm_sample should start from the x_T it is given.")
    states = [x for x, _, _ in calls] + [samples]
    for k in (0, 12, 22, 23):
        x_t, t, eps = states[k], wanted[k], calls[k][2]
        problem = step_problem(states[k + 1], c.posterior_mean(x_t, t, eps), c.posterior_variance(t), eps)
        if problem and not expect.matches_own_draws(
            states[k + 1], lambda x_t=x_t, t=t: diffusion.ddpm_step(x_t, t), x_t
        ):
            expect.fail(f"the step from t = {t} in ddpm_sample: {problem}; it is not what your ddpm_step does either.")
    _hold_own_noise(network, lambda s: diffusion.ddpm_sample(s), "ddpm_sample", rng)
    small = (2, 1, 8, 8)
    precise = images(rng, *small, dtype=torch.float64)
    expect.tensor(diffusion.ddpm_sample(small, x_T=precise), "samples from a float64 x_T", small, torch.float64)


def _hold_visits(network, wanted, what):
    visited = [int(t) for t in network.timesteps]
    if network.grad_enabled:
        expect.fail(f"{what} should run without gradients: decorate it with @torch.no_grad().")
    if visited == wanted:
        return
    if len(visited) != len(wanted):
        hint = "; the last jump, from the last timestep to clean data (s = −1), is missing" if (
            visited == wanted[:-1] and len(wanted) > 1
        ) else ""  # fmt: skip
        expect.fail(f"{what} should make {len(wanted)} network calls; it made {len(visited)}{hint}.")
    order = "from 0 up" if visited == wanted[::-1] else f"{visited[:4]} …"
    expect.fail(f"{what} should visit {wanted[:3]} …, {wanted[-1]} in this order; the network was asked {order}.")


def _hold_own_noise(network, sample, what, rng):
    """Without x_T it starts from noise of its own, new every time."""
    shape = (64, 1, 20, 20)
    network.calls.clear()
    one, two = (expect.tensor(sample(shape), f"{what}(shape)", shape, torch.float32) for _ in range(2))
    expect.noise(network.calls[0][0], f"x_T drawn by {what} when none is given")
    if torch.equal(one, two):
        expect.fail(f"two calls of {what} return the same digits; is a seed set inside?")


@graded(points=3, section="Sampling")
def test_ddim_timesteps(submission, rng):
    """`ddim_timesteps` spaces exactly N timesteps evenly from T − 1 to 0."""
    for T in (300, int(torch.randint(200, 1200, (), generator=rng))):
        schedule = random_schedule(rng, num_timesteps=T)
        diffusion = submission.Diffusion(SteadyNetwork(schedule, rng), schedule)
        for num_steps in (50, 20, 1, 2, 7, int(torch.randint(60, T, (), generator=rng)), T):
            call = f"ddim_timesteps({num_steps}) with T = {T}"
            timesteps = hold_timesteps(diffusion.ddim_timesteps(num_steps), call, T, num_steps)
            off = (timesteps - ideal_timesteps(T, num_steps, 1)).abs().max().item()
            if off > 1.01:
                expect.fail(
                    f"{call} should be evenly spaced from T − 1 to 0; an entry is {off:.0f} away from its place."
                )
        for bad, what in ((0, "num_steps = 0"), (-2, "a negative num_steps"), (T + 1, "num_steps > T")):
            with expect.raises_value_error(f"ddim_timesteps with {what}"):
                diffusion.ddim_timesteps(bad)


@graded(points=7, section="Sampling")
def test_ddim_chain(submission, rng):
    """`ddim_sample` jumps from each timestep to the next and at last to clean data: N calls, no chance."""
    schedule = random_schedule(rng, num_timesteps=90)
    network, c = GaussianOracle(schedule), Coefficients(schedule)
    diffusion = with_timesteps(submission.Diffusion(network, schedule), submission, 90)
    shape = (3, 1, 8, 8)
    x_T = images(rng, *shape)
    for num_steps in (8, 3, 90, 1):
        wanted = expect.tensor(diffusion.ddim_timesteps(num_steps), "ddim_timesteps").tolist()
        network.calls.clear()
        what = f"ddim_sample with num_steps = {num_steps}"
        samples = expect.tensor(diffusion.ddim_sample(shape, num_steps, x_T=x_T), what, shape, torch.float32)
        calls = list(network.calls)
        _hold_visits(network, wanted, what)
        expect.same(calls[0][0], x_T, "ddim_sample should start from the x_T it is given.")
        states = [x for x, _, _ in calls] + [samples]
        for k, (x_t, _, eps) in enumerate(calls):
            t, s = wanted[k], wanted[k + 1] if k + 1 < len(wanted) else -1
            hold_jump(c, x_t, t, s, eps, states[k + 1])
        network.calls.clear()
        again = expect.tensor(diffusion.ddim_sample(shape, num_steps, x_T=x_T), what, shape)
        expect.same(again, samples, "from one x_T, two runs of ddim_sample should be identical.")
    _hold_own_noise(network, lambda s: diffusion.ddim_sample(s, 4), "ddim_sample", rng)
    precise = images(rng, *shape, dtype=torch.float64)
    expect.tensor(diffusion.ddim_sample(shape, 5, x_T=precise), "samples from a float64 x_T", shape, torch.float64)


def with_timesteps(diffusion, submission, total):
    """Where ddim_timesteps is wrong, and its points are lost, a right one takes its place."""

    def right(num_steps, *_args, **_keywords):
        return ideal_timesteps(total, num_steps, power=1).round().long()

    try:
        for num_steps in (1, 8, total):
            timesteps = hold_timesteps(diffusion.ddim_timesteps(num_steps), "", total, num_steps)
            if (timesteps - right(num_steps)).abs().max() > 1:
                break
        else:
            return diffusion
    except expect.NOT_WORKING as error:
        if getattr(error, "kind", "") == "NotImplementedError":
            raise
    submission.set(diffusion, "ddim_timesteps", right)
    return diffusion
