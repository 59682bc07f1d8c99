"""DDIMSampler: the estimate of x_0, timestep schedules, one step, the whole chain (Song et al. 2021)."""

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
from autograder.checks.samplers import hold_timesteps


@graded(points=5, section="DDIM")
def test_ddim_predict_x0(submission, rng):
    """`predict_x0_from_eps` inverts the forward process, for one timestep or one per image."""
    schedule = random_schedule(rng)
    c = Coefficients(schedule)
    sampler = submission.DDIMSampler(SteadyNetwork(schedule, rng), schedule)
    last = schedule.num_timesteps - 1
    x_t, eps = images(rng, 5, 1, 8, 8), images(rng, 5, 1, 8, 8)
    several = torch.tensor([last // 3, last // 2, 40, 1, 0])
    for t in (last // 2, int(torch.randint(20, last, (), generator=rng)), several, 0, last):
        label = "one timestep per image" if isinstance(t, torch.Tensor) else f"t = {t}"
        x_0 = expect.tensor(sampler.predict_x0_from_eps(x_t, eps, t), "the estimate of x_0", x_t.shape)
        x, e, a, single = x_t.double(), eps.double(), c.alpha_bar(t), c.alpha(t)
        mistakes = {
            "α_t (a single step) in place of the cumulative ᾱ_t": (x - (1 - single).sqrt() * e) / single.sqrt(),
            "a missing square root of 1 − ᾱ_t": (x - (1 - a) * e) / a.sqrt(),
            "a missing square root of ᾱ_t": (x - (1 - a).sqrt() * e) / a,
            "both square roots missing": (x - (1 - a) * e) / a,
            "the noise added instead of subtracted": (x + (1 - a).sqrt() * e) / a.sqrt(),
            "√ᾱ_t multiplied instead of divided by": (x - (1 - a).sqrt() * e) * a.sqrt(),
            "the division by √ᾱ_t left out": x - (1 - a).sqrt() * e,
            "the division by √ᾱ_t on x_t alone": x / a.sqrt() - (1 - a).sqrt() * e,
            "x_t and eps swapped": (e - (1 - a).sqrt() * x) / a.sqrt(),
            "an x̂_0 clipped to [−1, 1] (no clipping in this lab)": ((x - (1 - a).sqrt() * e) / a.sqrt()).clamp(-1, 1),
        }
        # Dividing by √ᾱ_t magnifies float32 rounding by as much.
        atol = 1e-5 / float(a.min().sqrt())
        expect.close(x_0, c.predict_x0(x, e, t), f"the estimate of x_0 at {label}", mistakes, 1e-4, atol)


def _hold_schedule(sampler, kind: str, num_timesteps: int, num_steps: int) -> torch.Tensor:
    """What any schedule must satisfy; returns it as a LongTensor."""
    call = f"create_timestep_schedule({num_steps}, {kind!r}) with T = {num_timesteps}"
    return hold_timesteps(sampler.create_timestep_schedule(num_steps, kind), call, num_timesteps, num_steps)


@graded(points=4, section="DDIM")
def test_ddim_uniform_schedule(submission, rng):
    """`create_timestep_schedule` spaces exactly num_steps timesteps evenly from T − 1 to 0, and refuses bad arguments."""
    for schedule in (random_schedule(rng), random_schedule(rng)):
        total = schedule.num_timesteps
        sampler = submission.DDIMSampler(SteadyNetwork(schedule, rng), schedule)
        for num_steps in (10, 50, 1, 2, 7, int(torch.randint(60, total, (), generator=rng)), total):
            timesteps = _hold_schedule(sampler, "uniform", total, num_steps)
            off = (timesteps - ideal_timesteps(total, num_steps, 1)).abs().max().item()
            if off > 1.01:
                expect.fail(
                    f"the uniform schedule of {num_steps} steps (T = {total}) should be evenly spaced from T − 1 to 0; "
                    f"an entry is {off:.0f} timesteps away from its place"
                )
        default = expect.tensor(sampler.create_timestep_schedule(10), "create_timestep_schedule(10)")
        expect.same(default, sampler.create_timestep_schedule(10, "uniform"), 'the default schedule_type is "uniform".')
    for num_steps, kind, what in (
        (0, "uniform", "num_steps = 0"),
        (-3, "uniform", "a negative num_steps"),
        (total + 1, "uniform", "num_steps > T"),
        (10, "exponential", "an unknown schedule_type"),
    ):
        with expect.raises_value_error(what):
            sampler.create_timestep_schedule(num_steps, kind)


@graded(points=4, section="DDIM")
def test_ddim_quadratic_schedule(submission, rng):
    """The quadratic schedule is dense near 0, and keeps exactly num_steps different timesteps at any length."""
    schedule = random_schedule(rng)
    total = schedule.num_timesteps
    sampler = submission.DDIMSampler(SteadyNetwork(schedule, rng), schedule)
    # Below about sqrt(2 T) steps rounding makes no repeats, and every entry has its place.
    for num_steps in (1, 2, 5, 10, int((2 * total) ** 0.5) - 4):
        timesteps = _hold_schedule(sampler, "quadratic", total, num_steps)
        ideal = ideal_timesteps(total, num_steps, 2)
        if (timesteps - ideal).abs().max() > 1.01:
            mirrored = (total - 1) - ideal_timesteps(total, num_steps, 2).flip(0)
            if (timesteps - mirrored).abs().max() < 3:
                expect.fail(
                    "the quadratic schedule is dense near T − 1; it should be dense near 0, where detail is made"
                )
            if (timesteps - ideal_timesteps(total, num_steps, 1)).abs().max() < 1.01:
                expect.fail(
                    "the quadratic schedule equals the uniform one; space the square roots of the timesteps evenly"
                )
            worst = int((timesteps - ideal).abs().argmax())
            expect.fail(
                f"the quadratic schedule of {num_steps} steps (T = {total}) has {int(timesteps[worst])} where "
                f"{ideal[worst]:.1f} belongs: √t should fall evenly from √(T − 1) to 0"
            )
    for num_steps in (total // 5, total // 2, total):
        timesteps = _hold_schedule(sampler, "quadratic", total, num_steps)
        # However repeats are resolved, at least as many entries as without them lie in the upper three quarters.
        repeats = num_steps - len(set(ideal_timesteps(total, num_steps, 2).round().tolist()))
        low, ideal_low = (int((t < total / 4).sum()) for t in (timesteps, ideal_timesteps(total, num_steps, 2)))
        if abs(low - ideal_low) > repeats + 2:
            expect.fail(
                f"the quadratic schedule of {num_steps} steps (T = {total}) has {low} entries below T/4; "
                f"about {ideal_low} belong there"
            )


def _pairs(last: int, rng: torch.Generator) -> list[tuple[int, int]]:
    t = int(torch.randint(last // 2, last, (), generator=rng))
    s = int(torch.randint(5, last // 3, (), generator=rng))
    return [(t, s), (last, last - 1), (last, 0), (t, -1), (20, 19), (0, -1)]


@graded(points=7, section="DDIM")
def test_ddim_deterministic_step(submission, rng):
    """`ddim_step` with η = 0 jumps from t to any s < t, s = −1 being clean data, without randomness."""
    schedule = random_schedule(rng)
    c = Coefficients(schedule)
    network = SteadyNetwork(schedule, rng)
    sampler = submission.DDIMSampler(network, schedule)
    last = schedule.num_timesteps - 1
    x_t = images(rng, 4, 1, 8, 8)
    for t, s in _pairs(last, rng):
        network.calls.clear()
        x_s = expect.tensor(sampler.ddim_step(x_t, t, s), f"ddim_step(x_t, {t}, {s})", x_t.shape)
        if len(network.calls) != 1:
            expect.fail(f"ddim_step should call the network once; it called it {len(network.calls)} times.")
        x_seen, t_seen, eps = network.calls[0]
        if bool((t_seen != t).any()):
            expect.fail(
                f"ddim_step from t = {t} to s = {s} asked the network about timestep {t_seen[0].item():g}, not t."
            )
        expect.same(x_seen, x_t, "ddim_step should show the network x_t itself.")
        x, e, a_t, a_s = x_t.double(), eps.double(), c.alpha_bar(t), c.alpha_bar(s)
        x_0 = c.predict_x0(x, e, t)
        wrapped = schedule.alphas_cumprod.double()[s]
        mistakes = {
            "alphas_cumprod[−1] for s = −1 (it wraps to the noisiest timestep; ᾱ_{−1} is 1, use schedule.alpha_bar)":
            wrapped.sqrt() * x_0 + (1 - wrapped).sqrt() * e,
            "the estimate x̂_0 alone, without the direction back to x_s": x_0,
            "√ᾱ_s x̂_0 alone, without the direction √(1 − ᾱ_s) ε": a_s.sqrt() * x_0,
            "ᾱ_t in place of ᾱ_s in the direction": a_s.sqrt() * x_0 + (1 - a_t).sqrt() * e,
            "ᾱ_s x̂_0 without the square root": a_s * x_0 + (1 - a_s).sqrt() * e,
            "1 − ᾱ_s without its square root": a_s.sqrt() * x_0 + (1 - a_s) * e,
            "t and s swapped": a_t.sqrt() * c.predict_x0(x, e, s) + (1 - a_t).sqrt() * e if s >= 0 else x,
            "the DDPM mean without noise (not the same as DDIM)": c.posterior_mean(x, t, e),
            "a step to t − 1 whatever s is": c.ddim_mean(x_0, e, t, t - 1),
            "the direction subtracted instead of added": a_s.sqrt() * x_0 - (1 - a_s).sqrt() * e,
            "x_t returned unchanged": x,
            "an x̂_0 clipped to [−1, 1] (no clipping in this lab)": c.ddim_mean(x_0.clamp(-1, 1), e, t, s),
        }  # fmt: skip
        atol = 1e-5 * float((a_s / a_t).sqrt()) + 1e-5
        expected = c.ddim_mean(x_0, e, t, s)
        own = _own_x0(sampler, x_t, eps, t)
        if own is None or not expect.is_close(x_s, c.ddim_mean(own, e, t, s), 1e-4, atol):
            expect.close(x_s, expected, f"ddim_step from t = {t} to s = {s}", mistakes, 1e-4, atol)
        again = expect.tensor(sampler.ddim_step(x_t, t, s, 0.0), "ddim_step with eta=0.0", x_t.shape)
        expect.same(
            again, x_s, f"ddim_step(x_t, {t}, {s}, eta=0.0) gives another result the second time: η = 0 is exact."
        )
    for t, s, what in ((50, 50, "s = t"), (50, 60, "s > t"), (50, -2, "s < −1")):
        with expect.raises_value_error(f"ddim_step with {what}"):
            sampler.ddim_step(x_t, t, s)


def _own_x0(sampler, x_t, eps, t):
    """The student's own estimate of x_0, None where it does not work: its points are lost elsewhere."""
    try:
        return expect.tensor(sampler.predict_x0_from_eps(x_t, eps, t), "", x_t.shape)
    except expect.NOT_WORKING:
        return None


@graded(points=7, section="DDIM")
def test_ddim_eta_step(submission, rng):
    """With η > 0 the step has the mean and the variance of Song et al. 2021; at s = −1 nothing is random."""
    schedule = random_schedule(rng)
    c = Coefficients(schedule)
    network = SteadyNetwork(schedule, rng)
    sampler = submission.DDIMSampler(network, schedule)
    last = schedule.num_timesteps - 1
    x_t = images(rng, 32, 1, 28, 28)
    high, low = _pairs(last, rng)[0]
    for t, s, eta in ((high, low, 1.0), (high, high - 1, 1.0), (high, low, 0.5), (last, low, 0.7), (low, -1, 1.0)):
        network.calls.clear()
        x_s = sampler.ddim_step(x_t, t, s, eta)
        if s == -1 and isinstance(x_s, torch.Tensor) and bool(x_s.double().isnan().any()):
            expect.fail(
                f"ddim_step from t = {t} to s = −1 with η = {eta} gives NaN: ᾱ_(−1) is 1 there, and σ is 0; "
                "alphas_cumprod[−1] wraps to the noisiest timestep."
            )
        x_s = expect.tensor(x_s, f"ddim_step(x_t, {t}, {s}, {eta})", x_t.shape)
        if len(network.calls) != 1:
            expect.fail(
                f"ddim_step should call the network once; with η = {eta} it called it {len(network.calls)} times."
            )
        eps = network.calls[0][2]
        variance = c.ddim_variance(t, s, eta)
        truth = c.predict_x0(x_t, eps, t)
        own = _own_x0(sampler, x_t, eps, t)
        candidates = [truth] if own is None else [truth, own.double()]
        if any(_eta_problem(x_s, c.ddim_mean(x_0, eps, t, s, eta), variance, eps) is None for x_0 in candidates):
            continue
        _explain_eta(c, x_s, candidates[-1], eps.double(), t, s, eta)


def _eta_problem(x_s, mean, variance, eps) -> str | None:
    deviation = x_s.double() - mean
    if variance == 0:
        return None if deviation.abs().max() < 1e-2 else "the jump to clean data (s = −1) must not add noise"
    return expect.noise_problem(deviation / variance.sqrt(), eps)


def _explain_eta(c, x_s, x_0, eps, t, s, eta):
    where = f"ddim_step from t = {t} to s = {s} with η = {eta}"
    a_t, a_s = c.alpha_bar(t), c.alpha_bar(s)
    unit = c.ddim_variance(t, s, 1.0)
    variance = eta**2 * unit
    if s == -1:
        expect.fail(f"{where}: at s = −1 the result is x̂_0 itself; σ is 0 there because 1 − ᾱ_(−1) = 0.")
    straight = a_s.sqrt() * x_0 + (1 - a_s).sqrt() * eps

    def fits(mean, var) -> bool:
        return var > 0 and _eta_problem(x_s, mean, var, eps) is None

    def mean(var):
        return a_s.sqrt() * x_0 + (1 - a_s - var).clamp(min=0).sqrt() * eps

    if (x_s.double() - straight).abs().max() < 1e-3 or (x_s.double() - mean(variance)).abs().max() < 1e-3:
        expect.fail(f"{where} adds no noise: η is ignored, or σ is always 0.")
    if any(fits(a_s.sqrt() * x_0, var) for var in (variance, unit)):
        expect.fail(f"{where}: the direction √(1 − ᾱ_s − σ²) ε, back to the noise level of s, is missing.")
    if fits(straight, variance):
        expect.fail(
            f"{where}: the noise is right, but the direction keeps √(1 − ᾱ_s); it must shrink to √(1 − ᾱ_s − σ²), "
            "or every step adds variance that was already there."
        )
    for mistake, var in (
        ("η is applied twice (σ is already multiplied by it)", eta**4 * unit),
        ("η is left out of σ", unit),
        ("σ² = η·(…) has η where η² belongs", eta * unit),
        ("the noise is scaled by σ² where σ belongs", variance**2),
        ("(1 − ᾱ_t)/(1 − ᾱ_s) is upside down in σ²", eta**2 * (1 - a_t) / (1 - a_s) * (1 - a_t / a_s)),
        ("the factor 1 − ᾱ_t/ᾱ_s is missing from σ²", eta**2 * (1 - a_s) / (1 - a_t)),
        ("the factor (1 − ᾱ_s)/(1 − ᾱ_t) is missing from σ²", eta**2 * (1 - a_t / a_s)),
        ("σ² uses β_t of one step, not 1 − ᾱ_t/ᾱ_s of the jump", eta**2 * (1 - a_s) / (1 - a_t) * c.beta(t)),
    ):
        if any(fits(m, var) for m in (mean(var), mean(variance), straight)):
            expect.fail(f"{where}: {mistake}.")
    problem = _eta_problem(x_s, mean(variance), variance, eps)
    expect.fail(f"{where}: around the mean √ᾱ_s x̂_0 + √(1 − ᾱ_s − σ²) ε, {problem}.")


@graded(points=5, section="DDIM")
def test_ddim_sample(submission, rng):
    """`sample` makes one network call for each timestep it is given, jumps to clean data at the end, and passes η on."""
    schedule = random_schedule(rng, num_timesteps=60)
    network = GaussianOracle(schedule)
    sampler = submission.DDIMSampler(network, schedule)
    shape = (3, 1, 8, 8)
    x_T = images(rng, *shape)
    middle = sorted(torch.randperm(58, generator=rng)[:6].add(1).tolist(), reverse=True)
    for timesteps in ([59, *middle, 0], torch.tensor([59, *middle, 0]), middle, None):
        network.calls.clear()
        result = sampler.sample(shape, timesteps=timesteps, return_trajectory=True, x_T=x_T)
        calls = list(network.calls)
        wanted = list(range(59, -1, -1)) if timesteps is None else [int(t) for t in timesteps]
        what = "sample without timesteps" if timesteps is None else f"sample with timesteps {wanted}"
        if network.timesteps != wanted:
            hint = ""
            if network.timesteps == wanted[:-1]:
                hint = "; the last jump, from the last timestep to clean data (s = −1), is missing"
            expect.fail(
                f"{what} should call the network {len(wanted)} times, once at each; "
                f"it was called {len(calls)} times, at {[int(t) for t in network.timesteps[:9]]}{hint}."
            )
        _, states = expect.trajectory(result, network, x_T, "sample")
        for k, (_, _, eps) in enumerate(calls):
            s = wanted[k + 1] if k + 1 < len(wanted) else -1
            _hold_jump(sampler, Coefficients(schedule), states[k], wanted[k], s, eps, states[k + 1])

    kept = [59, 40, 20, 5]
    once, twice = (
        expect.tensor(sampler.sample(shape, timesteps=kept, x_T=x_T), "the samples", shape) for _ in range(2)
    )
    expect.same(twice, once, "from one x_T, two runs with η = 0 should be identical.")
    _hold_eta(sampler, network, kept, rng)
    network.calls.clear()
    expect.tensor(sampler.sample((64, 1, 20, 20), timesteps=[59, 20]), "sample(shape)", (64, 1, 20, 20), torch.float32)
    if len(network.calls) != 2:
        expect.fail(f"sample with two timesteps should call the network twice, not {len(network.calls)} times.")
    expect.noise(network.calls[0][0], "x_T drawn by sample when none is given")
    x_T = images(rng, *shape, dtype=torch.float64)
    expect.tensor(sampler.sample(shape, timesteps=kept, x_T=x_T), "samples from a float64 x_T", shape, torch.float64)


def _hold_eta(sampler, network, timesteps, rng):
    """With η = 1 every jump but the last must be a draw of the true DDIM step, or of the student's own."""
    x_T = images(rng, 32, 1, 28, 28)
    try:  # a step that fails with η > 0 loses its own points; what sample makes of it cannot be told
        for t, s in zip(timesteps, [*timesteps[1:], -1]):
            expect.tensor(sampler.ddim_step(x_T, t, s, 1.0), "", tuple(x_T.shape))
    except expect.NOT_WORKING:
        return
    network.calls.clear()
    result = sampler.sample(tuple(x_T.shape), timesteps=timesteps, eta=1.0, return_trajectory=True, x_T=x_T)
    calls = list(network.calls)
    if len(calls) != len(timesteps):
        expect.fail(f"sample with η = 1 and {len(timesteps)} timesteps called the network {len(calls)} times.")
    _, states = expect.trajectory(result, network, x_T, "sample")
    c = network.coefficients
    for k, (t, s) in enumerate(zip(timesteps, timesteps[1:])):
        x_t, eps, x_s = states[k], calls[k][2], states[k + 1]
        x_0 = c.predict_x0(x_t, eps, t)
        problem = _eta_problem(x_s, c.ddim_mean(x_0, eps, t, s, 1.0), c.ddim_variance(t, s, 1.0), eps)
        if problem is None or expect.matches_own_draws(
            x_s, lambda t=t, s=s, x=x_t: sampler.ddim_step(x, t, s, 1.0), x_t
        ):
            continue
        if expect.is_close(x_s, c.ddim_mean(x_0, eps, t, s, 0.0), 1e-3, 1e-3):
            expect.fail("with η = 1 the samples are made as with η = 0: sample does not pass η on to ddim_step.")
        expect.fail(f"with η = 1, the jump from t = {t} to s = {s} in sample is no draw of such a step: {problem}.")


def _hold_jump(sampler, c, x_t, t, s, eps, x_s):
    """One jump of the chain must be a true DDIM step, or what the student's own ddim_step does."""
    expected = c.ddim_mean(c.predict_x0(x_t, eps, t), eps, t, s)
    if expect.is_close(x_s, expected, 1e-3, 1e-3):
        return
    try:
        own = expect.tensor(sampler.ddim_step(x_t, t, s), "", x_t.shape)
    except expect.NOT_WORKING:
        own = None
    if own is not None and expect.is_close(x_s, own, 1e-4, 1e-4):
        return
    to = "clean data (s = −1)" if s == -1 else f"s = {s}"
    expect.fail(f"in sample, the jump from t = {t} to {to} is neither the DDIM step nor what your ddim_step does.")
