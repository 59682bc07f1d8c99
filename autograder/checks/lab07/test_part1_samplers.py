"""Part 1: the reverse SDE by Euler's method, DDIM as a displacement, momentum, and an honest error."""

import torch

from autograder.checks import expect, graded
from autograder.checks.oracles import Coefficients, GaussianOracle, SteadyNetwork, images, random_schedule
from difflab.schedule import NoiseSchedule


@graded(points=5, section="Samplers")
def test_euler_step(submission, rng):
    """`euler_step` is an Euler-Maruyama step of the reverse SDE, with one network call and no noise at t = 0."""
    # Few and large betas, where Euler's step and DDPM's can be told apart.
    schedule = NoiseSchedule.linear(int(torch.randint(40, 60, (), generator=rng)), 0.002, 0.35)
    network, c = SteadyNetwork(schedule, rng), Coefficients(schedule)
    sampler = submission.MomentumSampler(network, schedule)
    last = schedule.num_timesteps - 1
    x_t = images(rng, 32, 1, 28, 28)
    for t in (last, int(torch.randint(last // 2, last, (), generator=rng)), 0):
        what = f"euler_step at t = {t}"
        network.calls.clear()
        x_s = expect.tensor(sampler.euler_step(x_t, t), what, x_t.shape)
        if len(network.calls) != 1:
            expect.fail(f"{what} should call the network once; it called it {len(network.calls)} times.")
        x_seen, t_seen, eps = network.calls[0]
        if bool((t_seen != t).any()):
            expect.fail(f"{what} asked the network about timestep {t_seen[0].item():g}.")
        expect.same(x_seen, x_t, f"{what} showed the network something other than x_t.")
        if network.grad_enabled:
            expect.fail("euler_step should run without gradients: decorate it with @torch.no_grad().")
        _hold_euler(c, x_s, x_t.double(), t, eps.double(), what)


def _hold_euler(c, x_s, x, t, eps, what):
    """x_s is a draw from N(the Euler step's mean, beta_t), the mean itself at t = 0."""
    beta, a = c.beta(t), c.alpha_bar(t)
    score = -eps / (1 - a).sqrt()
    mean = x + beta * (x / 2 + score)
    std = beta.sqrt() if t > 0 else torch.zeros((), dtype=torch.float64)

    def problem(mean):
        deviation = x_s.double() - mean
        if std == 0:
            return None if deviation.abs().max() < 2e-5 else "it is not the mean itself"
        return expect.noise_problem(deviation / std, eps)

    wrong = problem(mean)
    if wrong is None:
        return
    means = {
        "the score has the other sign (it is −ε/√(1 − ᾱ))": x + beta * (x / 2 - score),
        "1 − ᾱ_t lacks its square root in the score": x + beta * (x / 2 - eps / (1 - a)),
        "the factor ½ stands at the score too (that is the deterministic flow's)": x + beta * (x / 2 + score / 2),
        "the factor ½ of the drift is missing": x + beta * (x + score),
        "x_t is shrunk instead of enlarged (time runs backwards)": x + beta * (-x / 2 + score),
        "ε stands in place of the score ε/√(1 − ᾱ_t)": x + beta * (x / 2 - eps),
        "it is DDPM's mean, divided by √α_t; Euler's step has no such division": c.posterior_mean(x, t, eps),
        "α_t (a single step) stands in place of ᾱ_t": x + beta * (x / 2 - eps / (1 - c.alpha(t)).sqrt()),
    }
    for mistake, other in means.items():
        # At small beta some of them hardly differ; name one only if it explains what the truth does not.
        if problem(other) is None:
            expect.fail(f"the mean of {what} is wrong: {mistake}.")
    spread = (x_s.double() - mean).std().item()
    if t == 0:
        if abs(spread / beta.sqrt().item() - 1) < 0.03:
            expect.fail("euler_step adds noise at t = 0, where the last step leads to clean data.")
        expect.fail(f"{what} should be the mean itself, without noise; it differs by {spread:.3g}.")
    if spread < 0.02 * std.item():
        expect.fail(f"{what} adds no noise; only the last step, t = 0, goes without.")
    scales = {
        "the noise is scaled by β_t; it needs the square root, √β_t": beta.item(),
        "the noise has the posterior variance β̃_t; the SDE's is β_t": c.posterior_variance(t).sqrt().item(),
    }
    for mistake, scale in scales.items():
        if abs(spread / std.item() - 1) > 0.02 and abs(spread / scale - 1) < 0.02:
            expect.fail(f"{what}: {mistake}.")
    expect.fail(f"{what}: x_(t−1) should be the mean plus √β_t · noise, but {wrong}.")


def _displacement(c: Coefficients, eps, t: int, s: int, eta: float = 0.0, z=0.0):
    """Song et al. 2021, equations 12 and 13, in x / sqrt(alpha_bar)."""
    a_t, a_s, variance = c.alpha_bar(t), c.alpha_bar(s), c.ddim_variance(t, s, eta)
    kept = ((1 - a_s - variance).clamp(min=0) / a_s).sqrt()
    return (kept - ((1 - a_t) / a_t).sqrt()) * eps + (variance / a_s).sqrt() * z


@graded(points=6, section="Samplers")
def test_displacement(submission, rng):
    """`displacement` is a DDIM(η) step in x/√ᾱ, to clean data too, with the noise given or drawn."""
    schedule = random_schedule(rng)
    c, last = Coefficients(schedule), schedule.num_timesteps - 1
    sampler = submission.MomentumSampler(SteadyNetwork(schedule, rng), schedule)
    eps, z = images(rng, 6, 1, 8, 8), images(rng, 6, 1, 8, 8)
    e, noise = eps.double(), z.double()
    middle = int(torch.randint(last // 3, 2 * last // 3, (), generator=rng))
    for t, s in ((last, middle), (middle, middle - 1), (middle, 1), (middle, -1), (0, -1)):
        for eta in (0.0, 1.0, 0.3 + 0.4 * torch.rand((), generator=rng).item()):
            what = f"displacement from t = {t} to s = {s} at η = {eta:.2g}"
            d = expect.tensor(sampler.displacement(eps, t, s, eta, z), what, eps.shape)
            right = _displacement(c, e, t, s, eta, noise)
            a_t, a_s, variance = c.alpha_bar(t), c.alpha_bar(s), c.ddim_variance(t, s, eta)
            now, then = ((1 - a_t) / a_t).sqrt(), ((1 - a_s) / a_s).sqrt()
            kept = ((1 - a_s - variance).clamp(min=0) / a_s).sqrt()
            wrapped = c.alpha_bar(last)
            mistakes = {
                "the second root left out (the report's formula)": kept * e + (variance / a_s).sqrt() * noise,
                "the two roots exchanged": -(kept - now) * e + (variance / a_s).sqrt() * noise,
                "σ² not taken off 1 − ᾱ_s (the variance then grows at every step)": (then - now) * e
                + (variance / a_s).sqrt() * noise,
                "the noise without its division by √ᾱ_s": (kept - now) * e + variance.sqrt() * noise,
                "the noise scaled by the variance σ²": (kept - now) * e + variance / a_s.sqrt() * noise,
                "the noise left out": (kept - now) * e,
                "noise added although η = 0": _displacement(c, e, t, s, 1.0, noise),
                "η in place of η² in σ²": _displacement(c, e, t, s, eta**0.5, noise),
                "η left out of σ²": _displacement(c, e, t, s, 1.0, noise),
                "1 − ᾱ in place of its root": ((1 - a_s - variance) / a_s - (1 - a_t) / a_t) * e
                + (variance / a_s).sqrt() * noise,
                "roots that are not divided by √ᾱ": ((1 - a_s - variance).clamp(min=0).sqrt() - (1 - a_t).sqrt()) * e
                + (variance / a_s).sqrt() * noise,
            }
            if s == -1:
                mistakes["alphas_cumprod[−1] at s = −1 (it wraps to the last timestep; ᾱ_{−1} is 1)"] = (
                    ((1 - wrapped) / wrapped).sqrt() - now
                ) * e
            # In float32 from stored ᾱ: 1 − ᾱ loses digits near clean data, and the two roots nearly cancel there.
            scale = float(now) * 2e-4 + 1e-6
            expect.close(d, right, what, mistakes, 1e-3, scale)
    shape = (32, 1, 28, 28)
    eps = images(rng, *shape)
    t, s = middle, middle // 2
    d = expect.tensor(sampler.displacement(eps, t, s, 1.0), "displacement without z", shape)
    std = (c.ddim_variance(t, s, 1.0) / c.alpha_bar(s)).sqrt()
    expect.noise((d.double() - _displacement(c, eps.double(), t, s, 1.0)) / std, "the noise drawn by displacement")
    d = expect.tensor(sampler.displacement(eps, t, s), "displacement at η = 0, without z", shape)
    expect.close(d, _displacement(c, eps.double(), t, s), "displacement at η = 0, without z", {}, 1e-3, 1e-4)


@graded(points=5, section="Samplers")
def test_momentum_update(submission, rng):
    """`momentum_update` averages the displacement, and its mean square over the pixels of each image."""
    schedule = random_schedule(rng)
    sampler = submission.MomentumSampler(SteadyNetwork(schedule, rng), schedule)
    d, m = 2 * images(rng, 5, 3, 6, 6) + 0.3, images(rng, 5, 3, 6, 6)
    v = 0.5 + torch.rand(5, generator=rng)
    D, M, V = d.double(), m.double(), v.double()
    for _ in range(3):
        a, b, c = (0.1 + 0.7 * torch.rand(3, generator=rng, dtype=torch.float64)).tolist()
        pair = expect.tensors(sampler.momentum_update(d, m, v, a, b, c), "momentum_update", 2)
        new_m = expect.tensor(pair[0], "the momentum of momentum_update", d.shape)
        new_v = expect.tensor(pair[1], "the second moment of momentum_update (v)", (5,))
        expect.close(
            new_m, a * M + b * D, "the momentum",
            {
                "a and b exchanged": b * M + a * D,
                "1 − a in place of b": a * M + (1 - a) * D,
                "the displacement added without b": a * M + D,
                "the old momentum kept whole": M + b * D,
            },
        )  # fmt: skip
        square = D.square().mean((1, 2, 3))
        expect.close(
            new_v, (1 - c) * V + c * square, "the second moment",
            {
                "c and 1 − c exchanged": c * V + (1 - c) * square,
                "one mean over the whole batch (each image has its own)": (1 - c) * V + c * D.square().mean(),
                "the sum of the squares in place of their mean": (1 - c) * V + c * D.square().sum((1, 2, 3)),
                "the square of the mean": (1 - c) * V + c * D.mean((1, 2, 3)).square(),
                "the root of the mean square": (1 - c) * V + c * square.sqrt(),
                "the variance (the mean was taken off)": (1 - c) * V + c * D.var((1, 2, 3)),
                "the square of the momentum in place of the displacement's": (1 - c) * V
                + c * (a * M + b * D).square().mean((1, 2, 3)),
                "a v that never moves": V,
            },
        )  # fmt: skip
    pair = expect.tensors(sampler.momentum_update(d, m, v, 0.0, 1.0, 0.0), "momentum_update", 2)
    expect.same(pair[0], d, "with a = 0, b = 1 the momentum should be the displacement itself.")
    expect.same(pair[1], v, "with c = 0 the second moment should stay as it is.")


def _path(c, states, predictions, timesteps, a, b, zeta, decay, displacement=None, update=None):
    """Where each step leads, given what the network was shown and said.

    `displacement` and `update` are those of the submission, if they are to be used in place of the formulas.
    """
    m, v = torch.zeros_like(states[0].double()), torch.ones(len(states[0]), dtype=torch.float64)
    for x, eps, t, s in zip(states, predictions, timesteps, [*timesteps[1:], -1]):
        d = _displacement(c, eps.double(), t, s) if displacement is None else displacement(eps, t, s)
        if update is None:
            m, v = a * m + b * d, (1 - decay) * v + decay * d.square().mean((1, 2, 3))
        else:
            m, v = update(d, m, v, a, b, decay)
        move = m / (v.sqrt() + zeta)[:, None, None, None]
        yield c.alpha_bar(s).sqrt() * (x.double() / c.alpha_bar(t).sqrt() + move), m, v


@graded(points=7, section="Samplers")
def test_momentum_sample(submission, rng):
    """`sample` walks the given timesteps from x_T to clean data, one network call each, moved by momentum."""
    schedule = random_schedule(rng, num_timesteps=60)
    c = Coefficients(schedule)
    network = GaussianOracle(schedule)
    sampler = submission.MomentumSampler(network, schedule)
    shape = (6, 1, 8, 8)
    x_T = images(rng, *shape)
    inner = torch.randperm(58, generator=rng)[:9].add(1).tolist()
    timesteps = sorted([59, 0, *inner], reverse=True)
    a = 0.2 + 0.2 * torch.rand((), generator=rng).item()
    settings = (
        {},
        {"a": a, "b": 1 - a},
        {"a": a, "b": 0.9, "c": 0.02},
        {"b": 0.9, "c": 1e-4, "zeta": 0.5},
    )
    for options in settings:
        network.calls.clear()
        what = "sample with " + (", ".join(f"{k} = {v:.2g}" for k, v in options.items()) or "a = 0, b = 1, c = 0")
        samples = expect.tensor(sampler.sample(shape, timesteps, x_T=x_T, **options), what, shape, torch.float32)
        states = _states(network, samples, timesteps, x_T, what)
        _hold_path(submission, sampler, network, c, states, timesteps, options, what)
    _hold_stochastic(sampler, network, c, rng)
    network.calls.clear()
    first = (3, 1, 8, 8)
    precise = images(rng, *first, dtype=torch.float64)
    samples = expect.tensor(sampler.sample(first, x_T=precise), "samples from a float64 x_T", first, torch.float64)
    _states(network, samples, list(range(59, -1, -1)), precise, "sample without timesteps")
    shape = (64, 1, 20, 20)
    network.calls.clear()
    one, two = (expect.tensor(sampler.sample(shape, [59, 30]), "sample(shape, timesteps)", shape) for _ in range(2))
    expect.noise(network.calls[0][0], "x_T drawn by sample when none is given")
    if torch.equal(one, two):
        expect.fail("two calls of sample return the same images; is a seed set inside?")


def _states(network, samples, timesteps, x_T, what):
    """What the network was shown, and the samples; held to the timesteps."""
    visited = [int(t) for t in network.timesteps]
    if network.grad_enabled:
        expect.fail("sample should run without gradients: decorate it with @torch.no_grad().")
    if visited != timesteps:
        if len(visited) != len(timesteps):
            expect.fail(f"{what} should make {len(timesteps)} network calls, one a timestep; it made {len(visited)}.")
        expect.fail(f"{what} should visit {timesteps[:3]} … in this order; the network was asked {visited[:3]} ….")
    expect.same(network.calls[0][0], x_T, "sample should start from the x_T it is given.")
    return [*(x for x, _, _ in network.calls), samples]


def _hold_path(submission, sampler, network, c, states, timesteps, options, what):
    """Every state follows from those before it, by the formulas, or else by the student's own two methods."""
    predictions = [eps for _, _, eps in network.calls]
    a, b = options.get("a", 0.0), options.get("b", 1.0)
    decay, zeta = options.get("c", 0.0), options.get("zeta", 0.0)

    def lost(path):
        """The first step whose result is not there, with what was expected, or None."""
        for k, (wanted, m, v) in enumerate(path):
            # Steps are computed in float32 from coordinates up to 1/√ᾱ_T = 30 to 200 times larger.
            if not expect.is_close(states[k + 1], wanted, 1e-3, 2e-4):
                return k, wanted, m, v
        return None

    found = lost(_path(c, states, predictions, timesteps, a, b, zeta, decay))
    if found is None:
        return

    def own_displacement(eps, t, s):
        return expect.tensor(sampler.displacement(eps, t, s), "displacement", tuple(eps.shape)).double()

    def own_update(d, m, v, a, b, decay):
        pair = expect.tensors(sampler.momentum_update(d.float(), m.float(), v.float(), a, b, decay), "", 2)
        return expect.tensor(pair[0], "", tuple(d.shape)).double(), expect.tensor(pair[1], "", (len(d),)).double()

    try:
        if lost(_path(c, states, predictions, timesteps, a, b, zeta, decay, own_displacement, own_update)) is None:
            return  # built right on a displacement or an update that is wrong, and loses its points there
    except expect.NOT_WORKING:
        pass
    k, wanted, m, v = found
    t, s = timesteps[k], [*timesteps[1:], -1][k]
    got, x = states[k + 1].double(), states[k].double()
    root_t, root_s = c.alpha_bar(t).sqrt(), c.alpha_bar(s).sqrt()
    d = _displacement(c, predictions[k].double(), t, s)
    size = (v.sqrt() + zeta)[:, None, None, None]
    before = ((v - decay * d.square().mean((1, 2, 3))) / (1 - decay)).clamp(min=0).sqrt()[:, None, None, None] + zeta
    mistakes = {
        "the displacement itself, without the momentum": root_s * (x / root_t + d / size),
        "no division by √v + ζ": root_s * (x / root_t + m),
        "a division by v in place of √v": root_s * (x / root_t + m / (v + zeta)[:, None, None, None]),
        "ζ left out": root_s * (x / root_t + m / v.sqrt()[:, None, None, None]),
        "the v from before the step": root_s * (x / root_t + m / before),
        "x_t that is not divided by √ᾱ_t": root_s * (x + m / size),
        "a division by ᾱ_t in place of √ᾱ_t": root_s * (x / root_t**2 + m / size),
        "no multiplication by √ᾱ_s at the end": x / root_t + m / size,
        "√ᾱ_t in place of √ᾱ_s": x + root_t * m / size,
        "ᾱ_s in place of √ᾱ_s": root_s**2 * (x / root_t + m / size),
        "momentum subtracted instead of added": root_s * (x / root_t - m / size),
        "a momentum that stays 0 (is m handed on from step to step?)": root_s * x / root_t,
        "a step that was not taken": x,
    }
    if s == -1:
        wrapped = c.alpha_bar(c.schedule.num_timesteps - 1).sqrt()
        mistakes["alphas_cumprod[−1] at s = −1 (it wraps to the last timestep)"] = wrapped * (x / root_t + m / size)
    expect.close(got, wanted, f"the step from t = {t} to s = {s} in {what}", mistakes, 1e-3, 2e-4)


def _hold_stochastic(sampler, network, c, rng):
    """With η > 0 fresh noise of the right variance enters every step but the last."""
    shape = (48, 1, 22, 22)
    x_T = images(rng, *shape)
    timesteps, eta, a = [59, 40, 22, 9], 0.8, 0.25
    network.calls.clear()
    samples = expect.tensor(sampler.sample(shape, timesteps, eta, a=a, b=1 - a, x_T=x_T), "sample at η = 0.8", shape)
    states = _states(network, samples, timesteps, x_T, "sample at η = 0.8")
    predictions = [eps.double() for _, _, eps in network.calls]
    m = torch.zeros(shape, dtype=torch.float64)
    for k, (t, s) in enumerate(zip(timesteps, [*timesteps[1:], -1])):
        root_t, root_s = c.alpha_bar(t).sqrt(), c.alpha_bar(s).sqrt()
        moved = states[k + 1].double() / root_s - states[k].double() / root_t
        newest = (moved - a * m) / (1 - a)  # v stays 1, so what was moved is the momentum
        deviation = newest - _displacement(c, predictions[k], t, s, eta)
        std = (c.ddim_variance(t, s, eta) / c.alpha_bar(s)).sqrt()
        if s == -1:
            problem = "the last step leads to clean data and adds no noise" if deviation.abs().max() > 1e-2 else None
        else:
            problem = expect.noise_problem(deviation / std, predictions[k])

        def own_step(x=states[k], eps=network.calls[k][2], m=m, t=t, s=s, root_t=root_t, root_s=root_s):
            """The step by the student's own two methods."""
            d = expect.tensor(sampler.displacement(eps, t, s, eta), "", shape)
            pair = expect.tensors(sampler.momentum_update(d, m.float(), torch.ones(len(d)), a, 1 - a, 0.0), "", 2)
            m, v = expect.tensor(pair[0], "", shape).double(), expect.tensor(pair[1], "", (len(d),)).double()
            return (root_s * (x.double() / root_t + m / v.sqrt()[:, None, None, None])).float()

        if problem:
            if expect.matches_own_draws(states[k + 1], own_step, states[k]):
                return  # built right on a displacement or an update that is wrong, and loses its points there
            what = f"the step from t = {t} to s = {s} in sample at η = {eta}, a = {a}"
            if (newest - _displacement(c, predictions[k], t, s)).abs().max() < 1e-2 * float(std):
                expect.fail(f"{what} adds no noise: is η handed on to displacement?")
            expect.fail(f"{what}: fresh noise of displacement's own variance should enter, but {problem}.")
        m = moved


@graded(points=3, section="Samplers")
def test_noise_mse(submission, rng):
    """`noise_prediction_mse` is the mean over all images, noised with the given timesteps and noise."""
    schedule = random_schedule(rng)
    c = Coefficients(schedule)
    network = GaussianOracle(schedule)
    x_0, eps = images(rng, 23, 1, 8, 8), images(rng, 23, 1, 8, 8)
    t = torch.randint(0, schedule.num_timesteps, (23,), generator=rng)
    t[0], t[1] = 0, schedule.num_timesteps - 1
    eps[20:] *= 3  # the last, smaller batch is another one
    value = submission.noise_prediction_mse(network, schedule, x_0, t, eps, 10)
    value = expect.tensor(value, "noise_prediction_mse", ())
    if network.grad_enabled:
        expect.fail("noise_prediction_mse should run without gradients: decorate it with @torch.no_grad().")
    sizes = [len(x) for x, _, _ in network.calls]
    if sum(sizes) != 23 or max(sizes) > 10:
        expect.fail(
            f"every image should be shown to the network once, 10 at most in a call; the calls had {sizes} images."
        )
    seen = torch.cat([x for x, _, _ in network.calls]).double()
    times = torch.cat([t for _, t, _ in network.calls])
    if not torch.equal(times.long(), t):
        expect.fail("the network should be asked about the given t, in order; it was asked about others.")
    x, e, a = x_0.double(), eps.double(), c.alpha_bar(t)
    expect.close(
        seen, c.noised(x_0, eps, t), "the x_t shown to the network",
        {
            "clean images": x,
            "α_t (a single step) in place of ᾱ_t": c.alpha(t).sqrt() * x + (1 - c.alpha(t)).sqrt() * e,
            "ᾱ_t and 1 − ᾱ_t without their square roots": a * x + (1 - a) * e,
            "1 − ᾱ_t without its square root": a.sqrt() * x + (1 - a) * e,
        },
    )  # fmt: skip
    error = (torch.cat([p for _, _, p in network.calls]).double() - e).square()
    means = [batch.mean() for batch in error.split(10)]
    expect.close(
        value, error.mean(), "noise_prediction_mse",
        {
            "the mean over batches (the last is smaller)": torch.stack(means).mean(),
            "the sum over batches": torch.stack(means).sum(),
            "the sum over pixels": error.sum(),
            "the root of the mean": error.mean().sqrt(),
            "the last batch alone": means[-1],
            "the last, smaller batch dropped": error[:20].mean(),
        },
        1e-4, 1e-7,
    )  # fmt: skip
