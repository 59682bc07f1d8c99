"""Part 1: time grids, DPM-Solver of order 1 and 2, DPM-Solver++ 2M, the loop, and the orders they reach."""

import math

import torch

from autograder.checks import expect, graded
from autograder.checks.lab08.solvers import CALLS_A_STEP, Formulas, exact_flow
from autograder.checks.oracles import GaussianOracle, SteadyNetwork, images, random_schedule
from difflab.schedule import NoiseSchedule

METHODS = tuple(CALLS_A_STEP)


def _uniform(rng, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=rng, dtype=torch.float64))


@graded(points=4, section="Solvers")
def test_time_grid(submission, rng):
    """`time_grid` gives N times from T − 1 to 0 in the spacing asked for, then −1, and refuses bad arguments."""
    schedule = random_schedule(rng)
    last = schedule.num_timesteps - 1
    first_lambda, last_lambda = float(schedule.log_snr(last)), float(schedule.log_snr(0))
    for spacing in ("time", "quadratic", "logsnr"):
        for num_steps in (10, 1, 2, 7, 60):
            call = f"time_grid(schedule, {num_steps}, {spacing!r}) with T = {last + 1}"
            grid = submission.time_grid(schedule, num_steps, spacing)
            grid = expect.tensor(torch.tensor(_listed(grid, call), dtype=torch.float64), call)
            if grid.ndim != 1 or len(grid) != num_steps + 1:
                cause = " (the last jump, from 0 to clean data, needs its −1)" if grid.shape == (num_steps,) else ""
                expect.fail(f"{call} should hold {num_steps + 1} times; got {list(grid.shape)}{cause}.")
            if abs(grid[0] - last) > 1e-3:
                expect.fail(f"{call} should start at T − 1 = {last}; it starts at {grid[0]:g}.")
            if grid[-1] != -1 or (num_steps > 1 and abs(grid[-2]) > 1e-3):
                end = ", ".join(f"{t:g}" for t in grid[-2:].tolist())
                expect.fail(f"{call} should end with 0 and −1; it ends with {end}.")
            if bool((grid[1:] >= grid[:-1]).any()):
                expect.fail(f"{call} should fall strictly; it repeats or rises (λ-uniform times must not be rounded).")
            if num_steps == 1:
                continue
            even = torch.linspace(1, 0, num_steps, dtype=torch.float64)
            in_time, in_root = last * even, last * even**2
            in_lambda = schedule.t_of_lambda(
                (last_lambda + (first_lambda - last_lambda) * even).clamp(min=first_lambda)
            )
            ideal = {"time": in_time, "quadratic": in_root, "logsnr": in_lambda}
            got = grid[:-1]
            if spacing == "time":
                if not expect.is_close(got, in_time, 0, 0.51) or bool((got != got.round()).any()):
                    expect.fail(f"{call} should be linspace(T − 1, 0, N), rounded to whole timesteps.")
                continue
            mistakes = {f"the spacing {name!r}": values for name, values in ideal.items() if name != spacing}
            mistakes["times rounded to whole timesteps"] = ideal[spacing].round()
            mistakes["the dense end near T − 1"] = last - ideal[spacing].flip(0)
            expect.close(got, ideal[spacing], call, mistakes, 1e-4, 2e-3)
    with_default = _listed(submission.time_grid(schedule, 8), "time_grid(schedule, 8)")
    if with_default != _listed(submission.time_grid(schedule, 8, "logsnr"), "time_grid"):
        expect.fail('the default spacing is "logsnr".')
    for num_steps, spacing, what in (
        (0, "time", "num_steps = 0"), (-2, "logsnr", "a negative num_steps"), (last + 2, "quadratic", "num_steps > T"),
        (5, "cosine", "an unknown spacing"),
    ):  # fmt: skip
        with expect.raises_value_error(what):
            submission.time_grid(schedule, num_steps, spacing)


def _listed(grid, call):
    if isinstance(grid, torch.Tensor):
        grid = grid.tolist()
    if not isinstance(grid, list) or not all(isinstance(t, (int, float)) and not isinstance(t, bool) for t in grid):
        expect.fail(f"{call} should be a list of floats{': is a `return` missing?' if grid is None else ''}")
    return torch.tensor(grid, dtype=torch.float64).tolist()


def _pairs(schedule, rng) -> list[tuple[float, float]]:
    """(t, s), fractional, far enough from 0 that an alpha_bar rounded to float32 costs less than 1e-3."""
    last = schedule.num_timesteps - 1
    return [
        (_uniform(rng, 0.5, 0.9) * last, _uniform(rng, 0.1, 0.4) * last),
        (float(last), _uniform(rng, 0.6, 0.8) * last),
        (_uniform(rng, 0.2, 0.3) * last, _uniform(rng, 0.1, 0.15) * last),
    ]


def _near(actual, expected) -> bool:
    return expect.is_close(actual, expected, 1e-3, 1e-3 * float(expected.abs().max()))


def _close(actual, expected, what, mistakes):
    expect.close(actual, expected, what, mistakes, 1e-3, 1e-3 * float(expected.abs().max()))


@graded(points=5, section="Solvers")
def test_first_order_step(submission, rng):
    """`first_order_step` is DPM-Solver-1 between any two times, gives x̂_0 at s = −1, and refuses s ≥ t."""
    schedule = random_schedule(rng)
    f = Formulas(schedule)
    network = SteadyNetwork(schedule, rng)
    solver = submission.DPMSolver(network, schedule)
    x, eps = images(rng, 4, 1, 8, 8), images(rng, 4, 1, 8, 8)
    for t, s in [*_pairs(schedule, rng), (_uniform(rng, 0.2, 0.4) * schedule.num_timesteps, -1.0), (0.0, -1.0)]:
        where = f"first_order_step from t = {t:.4g} to s = {s:.4g}"
        result = solver.first_order_step(x, eps, t, s)
        if s == -1 and isinstance(result, torch.Tensor) and not bool(result.isfinite().all()):
            expect.fail(
                f"{where} gives NaN or infinity: λ is infinite at clean data. The last jump returns x̂_0 = (x − b_t ε)/a_t."
            )
        result = expect.tensor(result, where, x.shape)
        (a_t, b_t, now), (a_s, b_s, then) = f.levels(t), f.levels(s)
        X, E = x.double(), eps.double()
        mistakes = {"x_t/a_t alone, without −b_t ε/a_t": X / a_t} if s == -1 else {
            "e^h in place of e^h − 1": a_s / a_t * X - b_s * math.exp(then - now) * E,
            "h with the wrong sign": a_s / a_t * X - b_s * math.expm1(now - then) * E,
            "a_s in place of b_s before ε": a_s / a_t * X - a_s * math.expm1(then - now) * E,
            "b_t in place of b_s before ε": a_s / a_t * X - b_t * math.expm1(then - now) * E,
            "a_t/a_s upside down": a_t / a_s * X - b_s * math.expm1(then - now) * E,
            "the term with ε added": a_s / a_t * X + b_s * math.expm1(then - now) * E,
            "ᾱ without its square root": a_s**2 / a_t**2 * X - b_s * math.expm1(then - now) * E,
            "λ = ln(ᾱ/(1 − ᾱ)), twice what it should be,": a_s / a_t * X - b_s * math.expm1(2 * (then - now)) * E,
            "x̂_0, the jump to clean data": (X - b_t * E) / a_t,
            "t and s swapped": f.first(x, eps, s, t),
        }  # fmt: skip
        _close(result, f.first(x, eps, t, s), where, mistakes)
    if network.calls:
        expect.fail("first_order_step is given eps; it should not call the network.")
    for t, s, what in ((50.0, 50.0, "s = t"), (50.0, 60.5, "s > t"), (50.0, -2.0, "s < −1")):
        with expect.raises_value_error(f"first_order_step with {what}"):
            solver.first_order_step(x, eps, t, s)


def _own(call, shape):
    """What the student's own method gives; None where it does not work: its points are lost elsewhere."""
    try:
        return expect.tensor(call(), "", shape).double()
    except expect.NOT_WORKING:
        return None


@graded(points=6, section="Solvers")
def test_second_order_step(submission, rng):
    """`second_order_step` asks the network once, in the middle in λ, and takes the whole step from x_t."""
    schedule = random_schedule(rng)
    f = Formulas(schedule)
    network = SteadyNetwork(schedule, rng)
    solver = submission.DPMSolver(network, schedule)
    x, eps = images(rng, 4, 1, 8, 8), images(rng, 4, 1, 8, 8)
    X, E = x.double(), eps.double()
    pairs = [pair for _ in range(8) for pair in _pairs(schedule, rng) if abs(_fraction(f.middle(*pair)) - 0.5) < 0.3]
    for t, s in [*pairs[:4], (_uniform(rng, 0.2, 0.4) * schedule.num_timesteps, -1.0)]:
        where = f"second_order_step from t = {t:.4g} to s = {s:.4g}"
        network.calls.clear()
        result = solver.second_order_step(x, eps, t, s)
        if s == -1:
            if network.calls:
                expect.fail(f"{where}: clean data has no middle; make no network call at s = −1 and return x̂_0.")
            result = expect.tensor(result, where, x.shape)
            own = _own(lambda t=t: solver.first_order_step(x, eps, t, -1.0), x.shape)
            if own is None or not _near(result, own):
                _close(result, f.first(x, eps, t, s), where, {})
            continue
        result = expect.tensor(result, where, x.shape)
        if len(network.calls) != 1:
            expect.fail(
                f"{where} should call the network once, in the middle; it called it {len(network.calls)} times."
            )
        u, asked, eps_middle = network.calls[0]
        m, asked = f.middle(t, s), asked[0].item()
        if abs(asked - m) > 0.02 + 2e-4 * m:
            cause = next(
                (name for name, value in (
                    ("the middle in t", (t + s) / 2), ("the middle, rounded to a whole timestep,", round(m)),
                    ("the middle, cut to a whole timestep,", int(m)), ("t itself", t), ("s", s),
                ) if abs(asked - value) < 0.02 + 2e-4 * value),
                "another time",
            )  # fmt: skip
            expect.fail(f"{where} asked the network at {asked:.5g}, {cause}; the middle in λ is t = {m:.5g}.")
        (a_t, _, now), (a_s, b_s, then) = f.levels(t), f.levels(s)
        a_m, b_m, _ = f.levels(m)
        h = then - now
        own = _own(lambda t=t, m=m: solver.first_order_step(x, eps, t, m), x.shape)
        if own is None or not _near(u, own):
            mistakes = {
                "a first-order step of the whole length h": a_m / a_t * X - b_m * math.expm1(h) * E,
                "x_t itself": X,
                "the first-order step to s": f.first(x, eps, t, s),
            }
            _close(u, f.first(x, eps, t, m), f"what the network is shown in {where}", mistakes)
        own = _own(lambda t=t, s=s, e=eps_middle: solver.first_order_step(x, e, t, s), x.shape)
        if own is not None and _near(result, own):
            continue
        E2 = eps_middle.double()
        mistakes = {
            "the first-order step, without the middle": f.first(x, eps, t, s),
            "a step from u in place of x_t": f.first(u, eps_middle, m, s),
            "a whole step, but begun at u": a_s / a_t * u.double() - b_s * math.expm1(h) * E2,
            "the average of both predictions": f.first(x, (E + E2) / 2, t, s),
            "the half step alone": u.double(),
        }
        _close(result, f.first(x, eps_middle, t, s), where, mistakes)


def _fraction(value: float) -> float:
    return value - math.floor(value)


@graded(points=6, section="Solvers")
def test_multistep_step(submission, rng):
    """`multistep_step` with η = 0 is DPM-Solver++ 2M: order 1 without memory, x̂_0 itself at s = −1."""
    schedule = random_schedule(rng)
    f = Formulas(schedule)
    network = SteadyNetwork(schedule, rng)
    solver = submission.DPMSolver(network, schedule)
    last = schedule.num_timesteps - 1
    x, x_0, before = (images(rng, 4, 1, 8, 8) for _ in range(3))
    X, X0, XB = x.double(), x_0.double(), before.double()
    for t, s in [*_pairs(schedule, rng)[::2], (_uniform(rng, 0.2, 0.4) * last, -1.0)]:
        for t_before in (None, t + _uniform(rng, 0.02, 0.05) * last):
            remembered = {} if t_before is None else {"x_0_before": before, "t_before": t_before}
            memory = "the first step" if t_before is None else f"t_before = {t_before:.4g}"
            where = f"multistep_step from t = {t:.4g} to s = {s:.4g} ({memory})"
            result = solver.multistep_step(x, x_0, t, s, **remembered)
            if s == -1:
                result = result if isinstance(result, torch.Tensor) and result.isfinite().all() else None
                if result is None or not _near(expect.tensor(result, where, x.shape), X0):
                    expect.fail(f"{where} should return x_0 as it is: the last jump is not computed by the formula.")
                continue
            result = expect.tensor(result, where, x.shape)
            (a_t, b_t, now), (a_s, b_s, then) = f.levels(t), f.levels(s)
            h = then - now

            def step(D, b_t=b_t, a_s=a_s, b_s=b_s, h=h):
                return b_s / b_t * X - a_s * math.expm1(-h) * D

            truth = f.combined(x_0, t, s, None if t_before is None else before, t_before)
            mistakes = {
                "the second term subtracted: expm1(−h) is negative already,": b_s / b_t * X
                + a_s * math.expm1(-h) * truth,
                "expm1(h) in place of expm1(−h)": b_s / b_t * X - a_s * math.expm1(h) * truth,
                "a_s/a_t before x in place of b_s/b_t": a_s / a_t * X - a_s * math.expm1(-h) * truth,
                "b_s before D in place of a_s": b_s / b_t * X - b_s * math.expm1(-h) * truth,
                "b_t/b_s upside down": b_t / b_s * X - a_s * math.expm1(-h) * truth,
            }
            if t_before is not None:
                r = f.ratio(t, s, t_before)
                mistakes |= {
                    "the memory ignored (order 1)": step(X0),
                    "r upside down": step((1 + r / 2) * X0 - r / 2 * XB),
                    "1/r in place of 1/(2r)": step((1 + 1 / r) * X0 - 1 / r * XB),
                    "r measured in t in place of λ": step(
                        (1 + 0.5 * (t - s) / (t_before - t)) * X0 - 0.5 * (t - s) / (t_before - t) * XB
                    ),
                    "the two estimates averaged": step((1 - 1 / (2 * r)) * X0 + 1 / (2 * r) * XB),
                    "the estimate and the one before exchanged": step((1 + 1 / (2 * r)) * XB - 1 / (2 * r) * X0),
                    "r = 1, as if all steps had one length,": step(1.5 * X0 - 0.5 * XB),
                }
            _close(result, step(truth), where, mistakes)
    if network.calls:
        expect.fail("multistep_step is given the estimates; it should not call the network.")


@graded(points=3, section="Solvers")
def test_stochastic_multistep(submission, rng):
    """With η > 0 `multistep_step` has the mean and the variance of the formula, and nothing is random at s = −1."""
    schedule = random_schedule(rng)
    f = Formulas(schedule)
    solver = submission.DPMSolver(SteadyNetwork(schedule, rng), schedule)
    x, x_0, before = (images(rng, 32, 1, 28, 28) for _ in range(3))
    t, inner = _pairs(schedule, rng)[2]
    for s, eta, t_before in ((inner, 1.0, None), (inner, 1.0, 1.1 * t), (inner, 0.5, 1.1 * t), (-1.0, 1.0, 1.1 * t)):
        remembered = {} if t_before is None else {"x_0_before": before, "t_before": t_before}
        where = f"multistep_step from t = {t:.4g} to s = {s:.4g} with eta = {eta:g}"
        result = expect.tensor(solver.multistep_step(x, x_0, t, s, **remembered, eta=eta), where, x.shape)
        if s == -1:
            expect.same(result, x_0, f"{where}: the last jump returns x_0 itself, without noise.")
            continue
        D = f.combined(x_0, t, s, None if t_before is None else before, t_before)
        mean, std = f.multistep_moments(x, D, t, s, eta)
        problem = _noise_problem(result, mean, std, x, D)
        if problem is None:
            continue
        _explain_noise(f, where, result, x, D, t, s, eta)
        # A D of the student's own is multistep_step's business: here it is the noise that counts.
        own = _own(lambda s=s, r=remembered: solver.multistep_step(x, x_0, t, s, **r, eta=0.0), x.shape)
        (_, b_t, now), (a_s, b_s, then) = f.levels(t), f.levels(s)
        if own is not None and remembered:
            own_D = (own - b_s / b_t * x.double()) / (-a_s * math.expm1(-(then - now)))
            if _noise_problem(result, f.multistep_moments(x, own_D, t, s, eta)[0], std, x, own_D) is None:
                continue
        expect.fail(f"{where}: around the mean of the formula, {problem}.")


def _noise_problem(result, mean, std, *seen):
    residual = (result.double() - mean) / std
    return next((p for p in (expect.noise_problem(residual, other) for other in seen) if p), None)


def _explain_noise(f, where, result, x, D, t, s, eta):
    (_, b_t, now), (a_s, b_s, then) = f.levels(t), f.levels(s)
    h = then - now
    X = x.double()
    mean, std = f.multistep_moments(x, D, t, s, eta)
    plain = f.multistep_moments(x, D, t, s, 0.0)[0]
    if _near(result, plain) or _near(result, mean):
        expect.fail(f"{where} adds no noise: η is ignored, or z is missing.")
    kept, added = b_s / b_t * math.exp(-eta * h) * X, -a_s * math.expm1(-(1 + eta) * h) * D
    means = {
        "": mean,
        "x_t is not multiplied by e^(−ηh), so the old noise is not taken out": b_s / b_t * X + added,
        "D has e^(−h) where e^(−(1+η)h) belongs": kept - a_s * math.expm1(-h) * D,
        "the mean is that of η = 0; what is put in must first be taken out": plain,
    }
    stds = {
        "": std,
        "the noise is scaled by its variance where the root belongs": std**2,
        "1 − e^(−ηh) stands under the root in place of 1 − e^(−2ηh)": b_s * math.sqrt(-math.expm1(-eta * h)),
        "the noise is not scaled by b_s": std / b_s,
        "η is left out under the root": b_s * math.sqrt(-math.expm1(-2 * h)),
    }
    for about_mean, m in means.items():
        for about_std, d in stds.items():
            if (about_mean or about_std) and d > 0 and _noise_problem(result, m, d, x, D) is None:
                expect.fail(f"{where}: {'; '.join(filter(None, (about_mean, about_std)))}.")


def _states(f, network, x_T, times, method, on_state, own=None):
    """(samples of the loop, what each network call was shown), by the formulas or by the student's own steps."""
    x, before, t_before, shown = x_T.double(), None, None, []
    dtype = x_T.dtype

    def ask(x, t):
        shown.append((x, t))
        return network.predict(x.to(dtype), torch.full((len(x),), t, dtype=torch.float64)).double()

    for t, s in zip(times, times[1:]):
        if on_state is not None:
            x = on_state(x.to(dtype), t).double()
        eps = ask(x, t)
        if own is not None:
            given = (x.to(dtype), eps.to(dtype), t, s)
            if method == "dpm++2m":
                x_0 = own.first_order_step(*given[:3], -1.0)
                memory = {} if before is None else {"x_0_before": before, "t_before": t_before}
                x, before, t_before = own.multistep_step(given[0], x_0, t, s, **memory).double(), x_0, t
            else:
                x = (own.first_order_step if method == "dpm1" else own.second_order_step)(*given).double()
        elif method == "dpm1" or (method == "dpm2" and s == -1):
            x = f.first(x, eps, t, s)
        elif method == "dpm2":
            m = f.middle(t, s)
            x = f.first(x, ask(f.first(x, eps, t, m), m), t, s)
        else:
            x_0 = f.first(x, eps, t, -1.0)
            x = f.multistep_moments(x, f.combined(x_0, t, s, before, t_before), t, s)[0]
            before, t_before = x_0, t
    return x, shown


@graded(points=4, section="Solvers")
def test_solver_sample(submission, rng):
    """`sample` follows the times with each method, calls on_state and the network as often as it should, passes η on."""
    schedule = random_schedule(rng)
    f = Formulas(schedule)
    network = GaussianOracle(schedule)
    solver = submission.DPMSolver(network, schedule)
    last = schedule.num_timesteps - 1
    x_T = images(rng, 3, 1, 8, 8)
    inner = sorted((_uniform(rng, 0.08, 0.95) * last for _ in range(5)), reverse=True)
    told: list[float] = []

    def nudge(x, t):
        told.append(float(t))
        return x + 0.2 + t / (5 * last)

    for times, on_state in (
        ([float(last), *inner, -1.0], None),
        ([float(last), *inner], None),
        ([last, *inner, -1.0], nudge),
    ):
        for method in METHODS:
            where = f'sample with "{method}"' + (" and on_state" if on_state else "")
            network.calls.clear()
            told.clear()
            extra = {} if on_state is None else {"on_state": on_state}
            result = expect.tensor(solver.sample(x_T, times, method, **extra), where, tuple(x_T.shape), x_T.dtype)
            calls, called_with = list(network.calls), list(told)
            if network.grad_enabled:
                expect.fail("sample should run without gradients: decorate it with @torch.no_grad().")
            truth, shown = _states(f, network, x_T, times, method, on_state)
            if _near(result, truth):
                _hold_calls(calls, shown, method, where)
            elif not _follows_own(f, network, x_T, times, method, on_state, solver, result):
                _explain_sample(
                    f, network, x_T, times, method, on_state, calls, called_with, shown, result, truth, where
                )
    _hold_eta(submission, rng, f, schedule)
    for method, eta, what in (
        ("heun", 0.0, 'method="heun"'),
        ("dpm1", 0.5, 'eta with "dpm1"'),
        ("dpm2", 1.0, 'eta with "dpm2"'),
    ):
        with expect.raises_value_error(f"sample with {what}"):
            solver.sample(x_T, [float(last), *inner, -1.0], method, eta)


def _hold_calls(calls, shown, method, where):
    if len(calls) != len(shown):
        expect.fail(f"{where}: {len(shown)} network calls are needed; it made {len(calls)}.")
    if method != "dpm2":  # where it looks between two times is for second_order_step to answer
        _hold_times(calls, shown, where)


def _hold_times(calls, shown, where):
    """At times nearby, the network can answer almost the same."""
    for k, ((_, t), (_, asked, _)) in enumerate(zip(shown, calls)):
        got = asked[0].item()
        if abs(t - got) > 0.02 + 2e-4 * abs(t):
            expect.fail(f"{where}: network call {k + 1} should be about t = {t:.5g}; it was about {got:.5g}.")


def _follows_own(f, network, x_T, times, method, on_state, solver, result) -> bool:
    try:
        own, _ = _states(f, network, x_T, times, method, on_state, solver)
        return _near(result, expect.tensor(own, "", tuple(x_T.shape)))
    except (*expect.NOT_WORKING, AttributeError):
        return False


def _explain_sample(f, network, x_T, times, method, on_state, calls, called_with, shown, result, truth, where):
    if not calls:
        expect.fail(f"{where} never asked the network.")
    first = x_T if on_state is None else x_T.double() + 0.2 + 1 / 5
    if on_state is not None and len(called_with) != len(times) - 1:
        expect.fail(
            f"{where}: on_state should be called once a step, {len(times) - 1} times; it was called {len(called_with)} times."
        )
    if not _near(calls[0][0], first.double()):
        expect.fail(
            f"{where} should start from {'x_T' if on_state is None else 'on_state(x_T, t)'}; "
            "the network was first shown something else."
        )
    if len(calls) != len(shown):
        expect.fail(f"{where}: {len(shown)} network calls are needed; it made {len(calls)}.")
    _hold_times(calls, shown, where)
    others = {m: _states(f, network, x_T, times, m, on_state)[0] for m in METHODS if m != method}
    mistakes = {f'the method "{m}"': value for m, value in others.items()}
    if method == "dpm++2m":
        mistakes = {
            "order 1 (the memory, x̂_0 and its time, is not kept or not handed on rightly)": others["dpm1"]
        } | mistakes
    if on_state is not None:
        mistakes["on_state left out of the state that is stepped on"] = _state_forgotten(
            f, network, x_T, times, on_state
        )
    _close(result, truth, f"the result of {where}", mistakes)


def _state_forgotten(f, network, x_T, times, on_state):
    """Order 1, with on_state shown to the network only."""
    x = x_T.double()
    for t, s in zip(times, times[1:]):
        seen = on_state(x.to(x_T.dtype), t)
        x = f.first(x, network.predict(seen, torch.full((len(x),), float(t), dtype=torch.float64)), t, s)
    return x


def _hold_eta(submission, rng, f, schedule):
    network = SteadyNetwork(schedule, rng)
    solver = submission.DPMSolver(network, schedule)
    last = schedule.num_timesteps - 1
    x_T = images(rng, 32, 1, 28, 28)
    times = [0.5 * last, 0.3 * last, -1.0]
    expect.tensor(solver.sample(x_T, times, "dpm++2m", 0.7), 'sample with "dpm++2m" and eta', tuple(x_T.shape))
    if len(network.calls) != 2:
        return
    (x, _, eps), (x_s, _, _) = network.calls
    x_0 = f.first(x, eps, times[0], -1.0)
    mean, std = f.multistep_moments(x, x_0, times[0], times[1], 0.7)
    if _noise_problem(x_s, mean, std, x) is None:
        return
    if _near(x_s, f.multistep_moments(x, x_0, times[0], times[1], 0.0)[0]):
        own = _own(lambda: solver.multistep_step(x, x_0.to(x.dtype), times[0], times[1], eta=0.7), x.shape)
        if own is not None and not _near(own, x_s):
            expect.fail("sample does not pass eta on to multistep_step.")
        return

    def draw():
        return solver.multistep_step(x, solver.first_order_step(x, eps, times[0], -1.0), *times[:2], eta=0.7)

    if not expect.matches_own_draws(x_s, draw, x):
        expect.fail("sample with eta = 0.7: its first step is not what multistep_step does with that eta.")


@graded(points=1, section="Solvers")
def test_convergence_order(submission, rng):
    """`convergence_order` is the slope of log error against log step size, fitted to all points."""
    for _ in range(3):
        order, scale = _uniform(rng, 0.5, 3.5), _uniform(rng, 0.1, 10)
        counts = sorted({int(_uniform(rng, 10, 500)) for _ in range(6)})
        wobble = [math.exp(_uniform(rng, -0.3, 0.3)) for _ in counts]
        errors = [scale * n**-order * w for n, w in zip(counts, wobble)]
        got = expect.tensor(submission.convergence_order(counts, errors), "convergence_order", ())
        log_n, log_e = (torch.tensor(v, dtype=torch.float64).log() for v in (counts, errors))
        slope = -float(((log_n - log_n.mean()) * (log_e - log_e.mean())).sum() / (log_n - log_n.mean()).square().sum())
        mistakes = {
            "the slope with its sign: error falls as steps grow, and the order is positive": torch.tensor(-slope),
            "the first and the last point alone": -(log_e[-1] - log_e[0]) / (log_n[-1] - log_n[0]),
            "the two axes exchanged": torch.tensor(
                -float((log_e - log_e.mean()).square().sum().pow(-1))
                * float(((log_n - log_n.mean()) * (log_e - log_e.mean())).sum())
            ),
            "a fit without logarithms": torch.tensor(
                float(((log_n.exp() - log_n.exp().mean()) * (log_e.exp() - log_e.exp().mean())).sum()
                      / (log_n.exp() - log_n.exp().mean()).square().sum())
            ),
        }  # fmt: skip
        expect.close(got, torch.tensor(slope), "convergence_order", mistakes, 1e-3, 1e-4)


@graded(points=1, section="Solvers")
def test_solver_orders(submission, rng):
    """On the exact oracle, in continuous time, your three methods have orders 1, 2 and 2."""
    # A fixed schedule: for Gaussian data every method is affine in x, so the orders are the same for any x_T, and a right
    # solver's measured orders are 0.98, 2.02 and 1.95 here, every time.
    schedule = NoiseSchedule.linear(1000)
    network = GaussianOracle(schedule, dtype="float64")
    solver = submission.DPMSolver(network, schedule)
    last = float(schedule.num_timesteps - 1)
    x_T = images(rng, 6, 1, 1, 1, dtype=torch.float64)
    ends = [float(schedule.log_snr(t)) for t in (last, 20.0)]
    counts = (40, 80)
    for method, order in (("dpm1", 1), ("dpm2", 2), ("dpm++2m", 2)):
        errors = []
        for num_steps in counts:
            lam = torch.linspace(*ends, num_steps + 1, dtype=torch.float64)
            times = schedule.t_of_lambda(lam.clamp(min=ends[0])).tolist()
            result = expect.tensor(solver.sample(x_T, times, method), f'sample with "{method}"', tuple(x_T.shape))
            exact = exact_flow(schedule, x_T, times[0], times[-1], network.mean, network.std)
            errors.append(float((result.double() - exact).abs().max()))
        slope = math.log(errors[0] / max(errors[-1], 1e-300)) / math.log(counts[-1] / counts[0])
        if not order - 0.2 < slope < order + 0.35 or errors[-1] > 0.1:
            shown = ", ".join(f"{e:.2g}" for e in errors)
            expect.fail(
                f'"{method}" should be of order {order}; its errors with {counts[0]} and {counts[1]} steps are {shown}, which is '
                f"order {slope:.2f}."
            )
