"""Part 3: the line, the exponent, the decision; on numbers whose law and noise are known."""

import math

import torch

from autograder.checks import expect, graded
from autograder.checks.lab06.devices import between, hold_record
from difflab.statistics import t_quantile

PART = 1e-3  # of a standard error: what computing in float32 may cost; every mistake named below costs far more


def _fit(steps: torch.Tensor, seconds: torch.Tensor, degree: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(coefficients, their standard errors, residual standard deviation) of a polynomial, in float64."""
    scale = steps.abs().max()
    X = torch.stack([(steps / scale) ** k for k in range(degree + 1)], dim=1)
    inverse = torch.linalg.inv(X.T @ X)
    coefficients = inverse @ X.T @ seconds
    s = ((seconds - X @ coefficients).square().sum() / (len(steps) - degree - 1)).sqrt()
    units = scale ** torch.arange(degree + 1)
    return coefficients / units, s * inverse.diagonal().sqrt() / units, float(s)


def _interval(estimate, error, t) -> torch.Tensor:
    return torch.stack([estimate - t * error, estimate + t * error])


def _steps(rng, distinct: int, repeats: int) -> torch.Tensor:
    """Step counts from 12 to 121, each `repeats` times, in random order; never bunched, so that no fit is ill-conditioned."""
    width = 110 // distinct
    counts = 12 + width * torch.arange(distinct) + torch.randint(width, (distinct,), generator=rng)
    return counts.repeat(repeats)[torch.randperm(distinct * repeats, generator=rng)].double()


@graded(points=8, section="Analysis")
def test_fit_affine(submission, rng):
    """`fit_affine` finds intercept, slope, residual deviation and 95 % intervals by Student's t."""
    for distinct, repeats in ((4, 1), (3, 2), (6, 3)):
        x = _steps(rng, distinct, repeats)
        noise = torch.randn(len(x), generator=rng, dtype=torch.float64)
        y = between(rng, 0.2, 0.6) + between(rng, 0.01, 0.05) * x + 0.05 * noise
        keys = ("n", "intercept", "slope", "residual_std", "intercept_interval", "slope_interval")
        result = hold_record(submission.fit_affine(x.tolist(), y.tolist()), keys, "fit_affine")
        _hold_fit(result, x, y)
    many = list(range(5, 11))
    for arguments, what in (
        (([10, 50], [0.3, 1.5]), "two measurements"),
        (([50] * 4, [1.5, 1.6, 1.4, 1.5]), "equal numbers of steps"),
        ((many, [0.1 * n for n in many[:-1]]), "lists of different lengths"),
    ):
        with expect.raises_value_error(f"fit_affine with {what}"):
            submission.fit_affine(*arguments)


def _hold_fit(result, x, y):
    n = len(x)
    (a, b), (se_a, se_b), s = _fit(x, y, 1)
    got = {
        key: expect.tensor(result[key], f'"{key}" of fit_affine', ()).double()
        for key in ("n", "slope", "intercept", "residual_std")
    }
    where = f"with {n} measurements"
    expect.close(got["n"], torch.tensor(float(n)), '"n" of fit_affine', None, 0, 1e-9)
    back = _fit(y, x, 1)[0]
    ends = (y[x.argmax()] - y[x.argmin()]) / (x.max() - x.min())
    expect.close(
        got["slope"], b, f'"slope" {where}',
        {"slope and intercept swapped": a, "steps fitted against seconds": back[1], "steps fitted against seconds, upside down": 1 / back[1],
         "a line through the origin": (x @ y) / (x @ x), "the two end points alone": ends, "the mean of seconds / steps": (y / x).mean()},
        0, PART * se_b,
    )  # fmt: skip
    expect.close(got["intercept"], a, f'"intercept" {where}',
                 {"slope and intercept swapped": b, "the mean of the seconds": y.mean(), "steps fitted against seconds": back[0],
                  "ȳ + b x̄ (the sign of b x̄)": y.mean() + b * x.mean()}, 0, PART * se_a)  # fmt: skip
    left = (y - a - b * x).square().sum()
    deviation = torch.tensor(s)
    others = {"n − 1": (left / (n - 1)).sqrt(), "n": (left / n).sqrt()}
    expect.close(got["residual_std"], deviation, f'"residual_std" {where}',
                 {f"division by {name} in place of n − 2": value for name, value in others.items()}
                 | {"the variance, without its root,": deviation**2, "the sum of squares": left, "the deviation of all seconds": y.std()},
                 1e-4, 0)  # fmt: skip
    t, spread = t_quantile(n - 2), ((x - x.mean()) ** 2).sum()
    for key, estimate, error, wrong_error, mistake in (
        ("slope_interval", b, se_b, deviation / spread, "S without its root in se(b)"),
        ("intercept_interval", a, se_a, deviation * x.mean() / spread.sqrt(), "the term 1/n left out of se(a)"),
    ):
        ends = expect.tensors(
            result[key].tolist() if isinstance(result[key], torch.Tensor) else result[key], f'"{key}"', 2
        )
        interval = torch.stack([expect.tensor(end, f'an end of "{key}"', ()).double() for end in ends])
        mistakes = _interval_mistakes(estimate, error, n, 2) | {mistake: _interval(estimate, wrong_error, t)}
        mistakes |= {
            f"s with division by {name}": _interval(estimate, error * value / deviation, t)
            for name, value in others.items()
        }
        if key == "intercept_interval":
            mistakes["the term x̄²/S left out of se(a)"] = _interval(estimate, deviation / math.sqrt(n), t)
        expect.close(interval, _interval(estimate, error, t), f'"{key}" {where}', mistakes, 0, PART * t * error)


def _interval_mistakes(estimate, error, n: int, fitted: int) -> dict[str, torch.Tensor]:
    """What misconceptions about an interval give, for `fitted` coefficients."""
    wrong = {
        "1.96 in place of t (that is for many measurements)": 1.96,
        "2 in place of t": 2.0,
        "one standard error on either side": 1.0,
        f"t with n − {fitted - 1} degrees of freedom in place of n − {fitted}": t_quantile(n - fitted + 1),
        "t with n degrees of freedom": t_quantile(n),
        "a 90 % interval": t_quantile(n - fitted, 0.95),
    }
    if n > fitted + 1:
        wrong[f"t with n − {fitted + 1} degrees of freedom in place of n − {fitted}"] = t_quantile(n - fitted - 1)
    mistakes = {name: _interval(estimate, error, t) for name, t in wrong.items()}
    mistakes["the half-width of the interval, without the estimate,"] = _interval(
        0 * estimate, error, t_quantile(n - fitted)
    )
    mistakes["high before low"] = _interval(estimate, error, -t_quantile(n - fitted))
    return mistakes


@graded(points=4, section="Analysis")
def test_log_log_slope(submission, rng):
    """`log_log_slope` is the least-squares slope of ln(seconds) against ln(steps)."""
    for distinct, repeats in ((3, 1), (5, 2)):
        x = _steps(rng, distinct, repeats)
        power = between(rng, 0.5, 1.4)
        y = 0.05 * x**power * (0.2 * torch.randn(len(x), generator=rng, dtype=torch.float64)).exp()
        got = expect.tensor(submission.log_log_slope(x.tolist(), y.tolist()), "log_log_slope", ()).double()
        log_x, log_y = x.log(), y.log()
        first, last = x.argmin(), x.argmax()
        mistakes = {
            "the intercept of the fit in place of its slope": _fit(log_x, log_y, 1)[0][0],
            "a logarithm of the steps alone": _fit(log_x, y, 1)[0][1],
            "a logarithm of the seconds alone": _fit(x, log_y, 1)[0][1],
            "the slope without logarithms": _fit(x, y, 1)[0][1],
            "ln(steps) fitted against ln(seconds)": _fit(log_y, log_x, 1)[0][1],
            "the smallest and the largest number of steps alone": (log_y[last] - log_y[first])
            / (log_x[last] - log_x[first]),
            "a fit through the origin": (log_x @ log_y) / (log_x @ log_x),
            "different logarithms for steps (10) and seconds (e)": math.log(10) * _fit(log_x, log_y, 1)[0][1],
            "different logarithms for steps (e) and seconds (10)": _fit(log_x, log_y, 1)[0][1] / math.log(10),
        }
        (_, slope), (_, error), _ = _fit(log_x, log_y, 1)
        expect.close(got, slope, "log_log_slope", mistakes, 0, PART * error)
    for arguments, what in (
        (([5, 10, 20], [0.2, 0.0, 0.6]), "a time of 0"),
        (([0, 10, 20], [0.1, 0.2, 0.6]), "0 steps"),
    ):
        with expect.raises_value_error(f"log_log_slope with {what}"):
            submission.log_log_slope(*arguments)


def _measurements(rng, distinct, repeats, intercept, curvature):
    """(steps, seconds) whose intercept and curvature are so many times the half-width of their 95 % intervals.

    The noise is taken orthogonal to 1, N and N², so that it moves neither: the decision is as far from its thresholds as
    the two numbers say, whatever the noise.
    """
    x = _steps(rng, distinct, repeats)
    n = len(x)
    X = torch.stack([torch.ones(n, dtype=torch.float64), x / 100, (x / 100) ** 2], dim=1)
    noise = torch.randn(n, generator=rng, dtype=torch.float64)
    noise = noise - X @ torch.linalg.lstsq(X, noise[:, None]).solution[:, 0]
    noise = 0.02 * noise / noise.std()
    base = between(rng, 0.02, 0.04) * x + noise
    width = _fit(x, base, 2)[1][2] * t_quantile(n - 3)
    y = base + curvature * width * (x**2 - _parabola_line(x))
    return x, y + intercept * _fit(x, y, 1)[1][0] * t_quantile(n - 2)


def _parabola_line(x):
    """The straight line nearest to x², so that what is left of it changes no line."""
    a, b = _fit(x, x**2, 1)[0]
    return a + b * x


CASES = (  # law, distinct step counts, runs, intercept and curvature in half-widths of their intervals
    ("affine", 5, 3, 4.0, 0.3),
    ("linear", 5, 3, 0.4, -0.3),
    ("sub-linear", 5, 3, 4.0, -4.0),
    ("super-linear", 5, 3, 0.3, 4.0),
    ("affine", 4, 2, 3.0, -0.3),
    ("affine", 5, 2, -4.0, 0.2),
    ("linear", 5, 1, 0.78, 0.1),  # 0 is inside, but not of an interval made with 1.96 (half as wide)
    ("linear", 5, 1, -0.3, 0.72),  # the same for the curvature
    ("sub-linear", 4, 2, 0.2, -3.0),
)


@graded(points=7, section="Analysis")
def test_decide_growth(submission, rng):
    """`decide` asks first whether the curvature's interval excludes 0, then whether the intercept's contains it."""
    for law, distinct, repeats, intercept, curvature in CASES:
        x, y = _measurements(rng, distinct, repeats, intercept, curvature)
        keys = ("law", "curvature", "curvature_interval")
        result = hold_record(submission.decide(x.tolist(), y.tolist()), keys, "decide")
        _hold_curvature(result, x, y)
        if result["law"] != law:
            _explain(submission, x, y, law, result["law"])
    for arguments, what in (
        (([10, 50, 100], [0.3, 1.5, 3.0]), "three measurements"),
        (([10, 10, 50, 50, 50], [0.3, 0.4, 1.5, 1.6, 1.4]), "two different numbers of steps"),
    ):
        with expect.raises_value_error(f"decide with {what}"):
            submission.decide(*arguments)


def _hold_curvature(result, x, y):
    n = len(x)
    estimates, errors, s = _fit(x, y, 2)
    c, error, t = estimates[2], errors[2], t_quantile(n - 3)
    low, high = _interval(c, error, t)
    width = high - low
    got = expect.tensor(result["curvature"], '"curvature"', ()).double()
    expect.close(got, c, '"curvature"',
                 {"the second derivative, 2c,": 2 * c, "the coefficient of N": estimates[1], "the intercept": estimates[0],
                  "the slope of the straight line": _fit(x, y, 1)[0][1]}, 1e-5, 1e-5 * width)  # fmt: skip
    ends = result["curvature_interval"]
    ends = expect.tensors(ends.tolist() if isinstance(ends, torch.Tensor) else ends, '"curvature_interval"', 2)
    interval = torch.stack([expect.tensor(end, 'an end of "curvature_interval"', ()).double() for end in ends])
    line = _fit(x, y, 1)[2]
    mistakes = _interval_mistakes(c, error, n, 3) | {
        "the residual deviation of the line in place of the parabola's": _interval(c, error * line / s, t),
        "s² in place of s": _interval(c, error * s, t),
        "se(c)², without its root,": _interval(c, error**2, t),
    }
    expect.close(
        interval, _interval(c, error, t), f'"curvature_interval" with {n} measurements', mistakes, 1e-4, 1e-5 * width
    )


def _explain(submission, x, y, law, got):
    """Fail with what is likely to be wrong; unless the fault is that of the student's fit_affine."""
    if not isinstance(got, str) or got not in ("linear", "affine", "sub-linear", "super-linear"):
        expect.fail(f'"law" should be "linear", "affine", "sub-linear" or "super-linear"; got {got!r:.60}.')
    bent = ("sub-linear", "super-linear")
    if law not in bent and got not in bent:
        own = _own_interval(submission, x, y)
        if own is not None and (own[0] <= 0 <= own[1]) == (got == "linear"):
            return
    (a, _), (error, _), _ = _fit(x, y, 1)
    low, high = _interval(a, error, t_quantile(len(x) - 2)).tolist()
    said = f'these {len(x)} measurements are {law}, but decide says "{got}"'
    if law in bent and got in bent:
        expect.fail(f"{said}: a negative curvature bends downwards, which is sub-linear.")
    if law in bent:
        expect.fail(
            f"{said}: look at the curvature first; its whole interval lies {'below' if law == 'sub-linear' else 'above'} 0."
        )
    if got in bent:
        expect.fail(
            f"{said}: the interval of the curvature contains 0, so there is no evidence that it bends. (A log-log slope below "
            "1, or a negative estimate, is none: a fixed cost and noise give those as well.)"
        )
    if law == "linear":
        expect.fail(
            f"{said}: the intercept of the line is {a:.3g}, but its interval, {low:.3g} … {high:.3g}, contains 0."
        )
    expect.fail(f"{said}: the interval of the line's intercept, {low:.3g} … {high:.3g}, does not contain 0.")


def _own_interval(submission, x, y):
    try:
        ends = expect.tensors(submission.fit_affine(x.tolist(), y.tolist())["intercept_interval"], "", 2)
        return [float(expect.tensor(end, "", ())) for end in ends]
    except (*expect.NOT_WORKING, TypeError, KeyError):
        return None
