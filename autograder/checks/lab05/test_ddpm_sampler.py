"""DDPMSampler: posterior mean and variance, one step, the whole chain (Ho et al. 2020, algorithm 2)."""

import torch

from autograder.checks import expect, graded
from autograder.checks.oracles import Coefficients, GaussianOracle, SteadyNetwork, images, random_schedule
from autograder.checks.samplers import step_problem


def _small_t_tolerance(t: torch.Tensor) -> torch.Tensor:
    """Below t = 20, 1 − ᾱ_t has few digits left in float32, and correct programs differ in how they lose them."""
    return torch.where(torch.as_tensor(t) < 20, 3e-3, 1e-4)


def _variance_rtol(t: int) -> float:
    """Rounding of 1 − x near 1 (6e-8), over the size of β_t and 1 − ᾱ_t."""
    return 2e-3 if t < 20 else 1e-3 if t < 100 else 3e-4


@graded(points=7, section="DDPM")
def test_ddpm_posterior_mean(submission, rng):
    """`compute_posterior_mean` is the mean of p(x_{t−1} | x_t), for one timestep or one per image."""
    schedule = random_schedule(rng)
    c = Coefficients(schedule)
    sampler = submission.DDPMSampler(SteadyNetwork(schedule, rng), schedule)
    last = schedule.num_timesteps - 1
    x_t, eps = images(rng, 5, 1, 8, 8), images(rng, 5, 1, 8, 8)
    several = torch.tensor([last, last // 2, 40, 1, 0])
    for t in (last // 3, int(torch.randint(20, last, (), generator=rng)), last, several, 0):
        label = "one timestep per image" if isinstance(t, torch.Tensor) else f"t = {t}"
        mean = expect.tensor(sampler.compute_posterior_mean(x_t, t, eps), "the posterior mean", x_t.shape)
        x, e = x_t.double(), eps.double()
        a, b, ab = c.alpha(t), c.beta(t), c.alpha_bar(t)
        mistakes = {
            "ᾱ_t in place of α_t in 1/√α_t": (x - b / (1 - ab).sqrt() * e) / ab.sqrt(),
            "ᾱ_t in place of α_t everywhere (so 1 − ᾱ_t for β_t)": (x - (1 - ab).sqrt() * e) / ab.sqrt(),
            "1 − ᾱ_t in place of β_t": (x - (1 - ab).sqrt() * e) / a.sqrt(),
            "a missing square root of 1 − ᾱ_t": (x - b / (1 - ab) * e) / a.sqrt(),
            "a missing square root of α_t": (x - b / (1 - ab).sqrt() * e) / a,
            "√β_t in place of β_t": (x - b.sqrt() / (1 - ab).sqrt() * e) / a.sqrt(),
            "the noise added instead of subtracted": (x + b / (1 - ab).sqrt() * e) / a.sqrt(),
            "1/√α_t on x_t alone, not on the noise term": x / a.sqrt() - b / (1 - ab).sqrt() * e,
            "√α_t multiplied instead of divided by": (x - b / (1 - ab).sqrt() * e) * a.sqrt(),
            "1 − α_t in place of 1 − ᾱ_t under the root": (x - b / (1 - a).sqrt() * e) / a.sqrt(),
            "the estimate x̂_0 in place of the mean of x_{t−1}": c.predict_x0(x, e, t),
            "the DDIM step in place of the DDPM mean": c.alpha_bar(torch.as_tensor(t) - 1).sqrt()
            * c.predict_x0(x, e, t)
            + (1 - c.alpha_bar(torch.as_tensor(t) - 1)).sqrt() * e,
        }
        if isinstance(t, torch.Tensor):
            first = int(t[0])
            mistakes["the first image's timestep for the whole batch"] = c.posterior_mean(x, first, e)
        atol = _small_t_tolerance(t)
        atol = atol[:, None, None, None] if atol.ndim else atol
        expect.close(mean, c.posterior_mean(x, t, e), f"the posterior mean at {label}", mistakes, 1e-4, atol)


@graded(points=7, section="DDPM")
def test_ddpm_posterior_variance(submission, rng):
    """`compute_posterior_variance` is β̃_t: exactly 0 at t = 0, 0-dimensional for an int, [B] for a LongTensor."""
    schedule = random_schedule(rng)
    c = Coefficients(schedule)
    sampler = submission.DDPMSampler(SteadyNetwork(schedule, rng), schedule)
    last = schedule.num_timesteps - 1
    middle = int(torch.randint(20, last, (), generator=rng))

    def mistakes(t) -> dict[str, torch.Tensor]:
        t = torch.as_tensor(t)
        wrapped = schedule.alphas_cumprod.double()[t - 1]
        b, ab = schedule.betas.double()[t], schedule.alphas_cumprod.double()[t]
        before = torch.cat([torch.ones(1, dtype=torch.float64), schedule.alphas_cumprod.double()])[t]
        true = b * (1 - before) / (1 - ab)
        return {
            "alphas_cumprod[t − 1] at t = 0 (index −1 wraps to the last timestep; ᾱ_{−1} is 1, use schedule.alpha_bar)": b
            * (1 - wrapped)
            / (1 - ab),
            "β_t itself": b,
            "the standard deviation √β̃_t in place of the variance": true.sqrt(),
            "the fraction turned upside down": b * (1 - ab) / (1 - before).clamp(min=1e-12),
            "ᾱ_{t−1} and ᾱ_t in place of 1 − ᾱ_{t−1} and 1 − ᾱ_t": b * before / ab,
            "1 − ᾱ_t in place of β_t": 1 - before,
            "α_t in place of ᾱ_t": b * (1 - schedule.alphas.double()[(t - 1).clamp(min=0)]) / b,
            "the logarithm of the variance": true.clamp(min=1e-20).log(),
        }

    # Small t first: there the mistakes are far apart. Float32 leaves few digits of β_t and 1 − ᾱ_t at small t, and
    # which of them a program loses depends on how it is written.
    for t in (5, 1, 30, middle, last):
        value = expect.tensor(sampler.compute_posterior_variance(t), "the variance for an int t", ())
        expect.close(
            value, c.posterior_variance(t), f"the posterior variance at t = {t}", mistakes(t), _variance_rtol(t), 1e-12
        )  # fmt: skip
    value = expect.tensor(sampler.compute_posterior_variance(0), "the variance at t = 0", ())
    if value.item() != 0:
        if abs(value.item()) > 1e-9:
            expect.close(value, torch.zeros(()), "the posterior variance at t = 0", mistakes(0), 1e-4, 0)
        expect.fail(
            f"the posterior variance at t = 0 must be exactly 0 (no noise in the last step), got {value.item():.3g}"
        )
    several = torch.tensor([0, last, middle, 0, 30])
    value = expect.tensor(sampler.compute_posterior_variance(several), "the variance for a LongTensor [B]", (5,))
    true = torch.stack([c.posterior_variance(int(t)) for t in several])
    if value[0] != 0 or value[3] != 0:
        expect.close(value, true, "the posterior variance for several t", mistakes(several), 1e-3, 1e-12)
        expect.fail("in a LongTensor that mixes t = 0 with others, the entries at t = 0 must still be exactly 0")
    expect.close(value, true, "the posterior variance for several t", mistakes(several), _variance_rtol(30), 1e-12)


@graded(points=6, section="DDPM")
def test_ddpm_step(submission, rng):
    """`ddpm_step` draws from N(mean, variance), with one network call and no noise at t = 0."""
    schedule = random_schedule(rng)
    network = SteadyNetwork(schedule, rng)
    sampler = submission.DDPMSampler(network, schedule)
    last = schedule.num_timesteps - 1
    x_t = images(rng, 32, 1, 28, 28)
    for t in (last, int(torch.randint(30, last, (), generator=rng)), 3, 0):
        network.calls.clear()
        x_s = expect.tensor(sampler.ddpm_step(x_t, t), f"ddpm_step at t = {t}", x_t.shape)
        if len(network.calls) != 1:
            expect.fail(f"ddpm_step should call the network once; at t = {t} it called it {len(network.calls)} times.")
        x_seen, t_seen, eps = network.calls[0]
        if bool((t_seen != t).any()):
            expect.fail(f"ddpm_step at t = {t} asked the network about timestep {t_seen[0].item():g}.")
        expect.same(x_seen, x_t, f"ddpm_step at t = {t} showed the network something other than x_t.")
        _hold_step(submission, schedule, network, x_t, t, eps, x_s)


def _hold_step(submission, schedule, network, x_t, t, eps, x_s):
    """x_s must be right given the true mean and variance, or given what the student's own two methods return."""
    c = Coefficients(schedule)
    mean, variance = c.posterior_mean(x_t, t, eps), c.posterior_variance(t)
    own_mean, own_variance = _own_methods(submission, schedule, network, x_t, t, eps)
    problems = []
    for m, v in ((mean, variance), (own_mean, own_variance), (mean, own_variance), (own_mean, variance)):
        if m is None or v is None:
            continue
        problem = step_problem(x_s, m, v, eps)
        if problem is None:
            return
        problems.append(problem)
    residual = (x_s.double() - mean).std().item()
    std, beta = variance.sqrt().item(), c.beta(t).item()
    if t > 0 and abs(residual / variance.item() - 1) < 0.05:
        expect.fail(f"ddpm_step at t = {t}: the noise is scaled by the variance; it needs its square root, √β̃_t.")
    if t > 0 and residual < 1e-4 * std + 1e-6:
        expect.fail(f"ddpm_step at t = {t} adds no noise; only the last step, t = 0, goes without.")
    if t > 0 and abs(residual / std - 1) > 0.02 and abs(residual / beta**0.5 - 1) < 0.02:
        expect.fail(f"ddpm_step at t = {t}: the noise has variance β_t; this lab uses the posterior variance β̃_t.")
    if t > 0 and abs(residual / variance.item() ** 0.25 - 1) < 0.02:
        expect.fail(f"ddpm_step at t = {t}: the square root was taken twice; the noise has standard deviation β̃_t^¼.")
    expect.fail(f"ddpm_step at t = {t}: {problems[0]}.")


def _own_methods(submission, schedule, network, x_t, t, eps):
    """The student's own mean and variance, None where they do not work: their points are lost elsewhere."""
    sampler = submission.DDPMSampler(network, schedule)
    try:
        mean = expect.tensor(sampler.compute_posterior_mean(x_t, t, eps), "", x_t.shape).double()
        other = expect.tensor(sampler.compute_posterior_mean(x_t, t, -eps), "", x_t.shape).double()
        mean = None if torch.equal(mean, other) else mean  # a mean that ignores the network is not one to build on
    except expect.NOT_WORKING:
        mean = None
    try:
        variance = expect.tensor(sampler.compute_posterior_variance(t), "", ()).double()
        variance = variance if variance > 0 or (t == 0 and variance == 0) else None
    except expect.NOT_WORKING:
        variance = None
    return mean, variance


@graded(points=6, section="DDPM")
def test_ddpm_sample(submission, rng):
    """`sample` walks all T timesteps from x_T to x_0, one network call each, and can return its trajectory."""
    schedule = random_schedule(rng, num_timesteps=24)
    steps = schedule.num_timesteps
    network = GaussianOracle(schedule)
    sampler = submission.DDPMSampler(network, schedule)
    shape = (48, 1, 22, 22)
    x_T = images(rng, *shape)
    result = sampler.sample(shape, return_trajectory=True, x_T=x_T)
    if len(network.calls) != steps:
        expect.fail(
            f"sample should call the network once for each of the {steps} timesteps; "
            f"it was called {len(network.calls)} times."
        )
    wanted = list(range(steps - 1, -1, -1))
    if network.timesteps != wanted:
        order = "from 0 up" if network.timesteps == wanted[::-1] else f"as {[int(t) for t in network.timesteps[:4]]} …"
        expect.fail(f"sample should visit t = {steps - 1}, …, 1, 0 in this order; the network was asked {order}.")
    _, states = expect.trajectory(result, network, x_T, "sample")
    for k in (0, steps // 2, steps - 2, steps - 1):
        _hold_transition(submission, schedule, sampler, network, states[k], wanted[k], states[k + 1])

    network.calls.clear()
    shape = (64, 1, 20, 20)
    one, two = (expect.tensor(sampler.sample(shape), "sample(shape)", shape, torch.float32) for _ in range(2))
    expect.noise(network.calls[0][0], "x_T drawn by sample when none is given")
    if torch.equal(one, two):
        expect.fail("two calls of sample return the same digits; is a seed set inside?")
    x_T = images(rng, 2, 1, 8, 8, dtype=torch.float64)
    expect.tensor(sampler.sample((2, 1, 8, 8), x_T=x_T), "samples from a float64 x_T", (2, 1, 8, 8), torch.float64)


def _hold_transition(submission, schedule, sampler, network, x_t, t, x_s):
    """One transition of the chain must be a true DDPM step, or one of the student's own ddpm_step."""
    c = Coefficients(schedule)
    eps = network.predict(x_t, torch.full((len(x_t),), t))
    mean, variance = c.posterior_mean(x_t, t, eps), c.posterior_variance(t)
    problem = step_problem(x_s, mean, variance, eps)
    if problem is None:
        return
    if not expect.matches_own_draws(x_s, lambda: sampler.ddpm_step(x_t, t), x_t):
        expect.fail(f"the step from t = {t} in sample: {problem}; it is not what your ddpm_step does either.")


class _FickleOracle(GaussianOracle):
    """Answers a little differently every time, whatever seed the student sets."""

    def predict(self, x, t):
        """The exact prediction, and a little more with every call."""
        return super().predict(x, t) + 1e-3 * len(self.calls)


@graded(points=0, section="DDPM")
def test_seed_consistency(submission, rng):
    """`seed_consistency` draws twice with each seed, tells whether both are the same, and gives mean and deviation."""
    schedule = random_schedule(rng, num_timesteps=22)
    shape, seeds = [6, 1, 8, 8], torch.randperm(10_000, generator=rng)[:3].tolist()
    for network, repeatable in ((GaussianOracle(schedule), True), (_FickleOracle(schedule), False)):
        sampler = submission.DDPMSampler(network, schedule)
        sampler.sample(shape)
        per_run = len(network.calls)
        network.calls.clear()
        result = submission.seed_consistency(sampler, shape, seeds if repeatable else seeds[:1])
        if not isinstance(result, dict) or not {"repeatable", "mean", "std"} <= result.keys():
            expect.fail('seed_consistency should return a dict with "repeatable", "mean" and "std".')
        if expect.truth(result["repeatable"], '"repeatable"') is not repeatable:
            expect.fail(
                '"repeatable" is False although the network answers the same every time: torch.manual_seed(seed) before '
                "each of the two runs?"
                if repeatable
                else '"repeatable" is True although the network answered differently the second time: compare the samples.'
            )
        if not repeatable:
            continue
        if len(network.calls) != 2 * len(seeds) * per_run or not network.calls:
            expect.fail(
                f"two runs for each of {len(seeds)} seeds are {2 * len(seeds) * per_run} network calls; "
                f"there were {len(network.calls)}."
            )
        # Runs of one seed start from the same noise; in which order the runs are made is free.
        runs = [network.calls[i : i + per_run] for i in range(0, len(network.calls), per_run)]
        by_start = {}
        for run in runs:
            by_start.setdefault(run[0][0].numpy().tobytes(), []).append(run)
        if len(by_start) == 1:
            expect.fail("runs of different seeds start from the same noise.")
        if any(len(same) != 2 for same in by_start.values()):
            expect.fail("the two runs of a seed start from different noise: call torch.manual_seed(seed) before each.")
        ends = [_chain_end(sampler, network, first[-1]) for first, _ in by_start.values()]
        if any(end is None for end in ends):
            continue  # the chain's end is random, which the check of sample or of the step says
        for key, statistic in (("mean", torch.Tensor.mean), ("std", torch.Tensor.std)):
            given = [
                expect.tensor(v, f'"{key}" of a seed', ()) for v in expect.tensors(result[key], f'"{key}"', len(seeds))
            ]
            given, true, variance, mean = (
                torch.stack(sorted(values)).double()
                for values in (given, map(statistic, ends), map(torch.Tensor.var, ends), map(torch.Tensor.mean, ends))
            )
            mistakes = {"the variance": variance, "the mean": mean}
            expect.close(given, true, f'"{key}" of the seeds', mistakes, 1e-2, 1e-3)


def _chain_end(sampler, network, last_call):
    """What the last step made of what it was shown; None if the student's last step is random, or fails."""
    x, t, _ = last_call
    try:
        one, two = (expect.tensor(sampler.ddpm_step(x, int(t[0])), "", tuple(x.shape)).double() for _ in range(2))
    except expect.NOT_WORKING:
        return None
    return one if torch.equal(one, two) else None
