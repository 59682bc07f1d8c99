"""Part 1: the schedule, one step, all steps at once, and what is left at the end (Ho et al. 2020, section 2)."""

import math

import torch

from autograder.checks import expect, graded
from autograder.checks.oracles import Coefficients, images, random_schedule
from difflab.schedule import NoiseSchedule


@graded(points=5, section="Forward process")
def test_linear_betas(submission, rng):
    """`linear_betas` spaces T betas evenly, rescales them for T, and takes their product; bad arguments are refused."""
    start = 1e-4 * (1 + torch.rand((), generator=rng).item())
    end = 0.015 + 0.005 * torch.rand((), generator=rng).item()
    for T, rescale in (
        (300, True),
        (int(torch.randint(100, 900, (), generator=rng)), True),
        (300, False),
        (1000, True),
    ):
        what = f"with T = {T}, rescale={rescale}"
        pair = expect.tensors(submission.linear_betas(T, start, end, rescale), "linear_betas", 2)
        betas = expect.tensor(pair[0], f"betas {what}", (T,))
        alphas_cumprod = expect.tensor(pair[1], f"alphas_cumprod {what}", (T,))
        scale = 1000 / T if rescale else 1.0
        plain = torch.linspace(start, end, T, dtype=torch.float64)
        right = plain * scale
        mistakes = {
            "betas that are not rescaled by 1000/T": plain,
            "betas rescaled although rescale=False": plain * 1000 / T,
            "betas scaled by T/1000 in place of 1000/T": plain * T / 1000,
            "T + 1 points without the last (beta_end is one of the T values)": torch.linspace(
                start, end, T + 1, dtype=torch.float64
            )[:-1] * scale,
            "evenly spaced square roots": torch.linspace(start**0.5, end**0.5, T, dtype=torch.float64) ** 2 * scale,
            "1 − β_t": 1 - right,
        }  # fmt: skip
        expect.close(betas, right, f"betas {what}", mistakes, 1e-5, 1e-9)
        mistakes = {
            "1 minus the sum of the betas": 1 - right.cumsum(0),
            "the product of the betas": right.cumprod(0),
            "α_t = 1 − β_t without the product over the steps before": 1 - right,
            "a product that starts at 1 (it leaves out the newest step)": torch.cat(
                [torch.ones(1, dtype=torch.float64), (1 - right).cumprod(0)[:-1]]
            ),
            "the square root of the product": (1 - right).cumprod(0).sqrt(),
        }
        expect.close(alphas_cumprod, (1 - right).cumprod(0), f"alphas_cumprod {what}", mistakes, 2e-4, 1e-9)
    for T, what in ((0, "T = 0"), (-3, "T = −3"), (15, "T = 15 with rescale=True, where the last beta is above 1,")):
        with expect.raises_value_error(f"linear_betas with {what}"):
            submission.linear_betas(T, 1e-4, 0.02, True)
    expect.tensors(submission.linear_betas(15, 1e-4, 0.02, False), "linear_betas(15, rescale=False)", 2)


@graded(points=4, section="Forward process")
def test_forward_step(submission, rng):
    """`forward_step` draws from N(√(1 − β_t) x, β_t): fresh noise for every pixel."""
    schedule = random_schedule(rng, num_timesteps=300)
    process = submission.ForwardProcess(schedule)
    c = Coefficients(schedule)
    x = images(rng, 40, 1, 26, 26)
    for t in (0, int(torch.randint(50, 250, (), generator=rng)), 299):
        x_t = expect.tensor(process.forward_step(x, t), f"forward_step at t = {t}", x.shape)
        beta = c.beta(t).item()
        residual = x_t.double() - math.sqrt(1 - beta) * x.double()
        std = residual.std().item()
        problem = expect.noise_problem(residual / math.sqrt(beta), x)
        if problem is None:
            continue
        ratio = std / math.sqrt(beta)
        if std < 1e-6:
            expect.fail(f"forward_step at t = {t} adds no noise.")
        if abs(ratio - 1) > 0.05 and abs(std / beta - 1) < 0.03:
            expect.fail(f"forward_step at t = {t}: the noise is scaled by β_t; it needs the square root, √β_t.")
        a = c.alpha_bar(t).item()
        if t > 0 and expect.noise_problem((x_t.double() - math.sqrt(a) * x.double()) / math.sqrt(1 - a), x) is None:
            expect.fail(f"forward_step at t = {t} takes all steps so far, from x_0; it should take one, from x_(t−1).")
        for cause, factor in {
            "x_(t−1) is not shrunk; multiply it by √(1 − β_t)": 1.0,
            "x_(t−1) is multiplied by 1 − β_t; it needs the square root": 1 - beta,
            "x_(t−1) is multiplied by √ᾱ_t, all steps so far; one step shrinks by √(1 − β_t)": c.alpha_bar(t).item()
            ** 0.5,
        }.items():
            if expect.noise_problem((x_t.double() - factor * x.double()) / math.sqrt(beta), x) is None:
                expect.fail(f"forward_step at t = {t}: {cause}.")
        expect.fail(f"forward_step at t = {t}: x_t should be √(1 − β_t) x_(t−1) + √β_t · noise, but {problem}.")


@graded(points=4, section="Forward process")
def test_forward_jump(submission, rng):
    """`add_noise` draws from q(x_t | x_0) and returns the noise it used, for one timestep or one per image."""
    schedule = random_schedule(rng)
    process = submission.ForwardProcess(schedule)
    hold_add_noise(process, schedule, rng)


def hold_add_noise(process, schedule, rng):
    """The closed form of the forward process, as a method `add_noise(x_0, t, noise=None)`."""
    c = Coefficients(schedule)
    last = schedule.num_timesteps - 1
    x_0, eps = images(rng, 6, 1, 8, 8), images(rng, 6, 1, 8, 8)
    mixed = torch.tensor([0, last, *torch.randint(0, last, (4,), generator=rng).tolist()])
    for t, label in ((mixed, "one timestep per image"), (int(mixed[2]), "an int t"), (0, "t = 0")):
        pair = expect.tensors(process.add_noise(x_0, t, eps), "add_noise(x_0, t, noise)", 2)
        x_t = expect.tensor(pair[0], "the first value of add_noise (x_t)", x_0.shape)
        noise = expect.tensor(pair[1], "the second value of add_noise (the noise)", x_0.shape)
        expect.close(x_t, c.noised(x_0, eps, t), f"x_t for {label}", noising_mistakes(c, x_0, eps, t))
        expect.same(noise, eps, "add_noise should return the noise it was given as its second value.")
    x_0, t = images(rng, 32, 1, 28, 28), last // 2
    x_t, noise = (
        expect.tensor(v, "add_noise without noise", x_0.shape)
        for v in expect.tensors(process.add_noise(x_0, t), "add_noise(x_0, t)", 2)
    )
    expect.noise(noise, "noise drawn when none is given")
    expect.close(
        x_t, c.noised(x_0, noise, t), "x_t made from the noise that was returned",
        {"other noise than the one returned (was it drawn twice?)": x_t},
    )  # fmt: skip


def noising_mistakes(c: Coefficients, x_0: torch.Tensor, eps: torch.Tensor, t) -> dict[str, torch.Tensor]:
    """What x_t becomes by common mistakes."""
    a, x, e = c.alpha_bar(t), x_0.double(), eps.double()
    single = c.alpha(t)
    mistakes = {
        "ᾱ_t without its square root on x_0": a * x + (1 - a).sqrt() * e,
        "1 − ᾱ_t without its square root on the noise": a.sqrt() * x + (1 - a) * e,
        "ᾱ_t and 1 − ᾱ_t without their square roots": a * x + (1 - a) * e,
        "the two coefficients swapped": (1 - a).sqrt() * x + a.sqrt() * e,
        "α_t (a single step) in place of the cumulative ᾱ_t": single.sqrt() * x + (1 - single).sqrt() * e,
        "the noise subtracted instead of added": a.sqrt() * x - (1 - a).sqrt() * e,
    }
    if isinstance(t, torch.Tensor):
        mistakes["the first image's timestep for the whole batch"] = c.noised(x_0, eps, int(t[0]))
    return mistakes


@graded(points=4, section="Forward process")
def test_prior_mismatch(submission, rng):
    """`prior_mismatch` is the Kullback-Leibler divergence of the last state from N(0, 1), per pixel."""
    for T in (*torch.randint(100, 400, (2,), generator=rng).tolist(), 1000):
        schedule = NoiseSchedule.linear(T)  # short ones leave some signal
        for _ in range(2):
            mean = torch.rand((), generator=rng).item() - 1
            std = 0.3 + 0.5 * torch.rand((), generator=rng).item()
            a = schedule.alphas_cumprod.double()

            def kl(alpha_bar, std=std, mean=mean, root=True):
                variance = alpha_bar * std**2 + 1 - alpha_bar
                return 0.5 * (variance + alpha_bar ** (1 if root else 2) * mean**2 - 1 - variance.log())

            value = expect.tensor(submission.prior_mismatch(schedule, mean, std), "prior_mismatch", ())
            mistakes = {
                "alphas_cumprod[0], the first timestep,": kl(a[0]),
                "the last α_t in place of ᾱ_t": kl(schedule.alphas.double()[-1]),
                "the standard deviation in place of the variance s²": kl(a[-1], std**0.5),
                "the mean left out": kl(a[-1], mean=0.0),
                "ᾱ m in place of √ᾱ m": kl(a[-1], root=False),
                "a missing factor ½": 2 * kl(a[-1]),
                "a logarithm to base 2": kl(a[-1]) / math.log(2),
                "the noise's variance 1 − ᾱ alone": kl(a[-1], 0.0),
            }
            # Near zero the three terms cancel: in float32 with an error of about 1e-7.
            expect.close(value, kl(a[-1]), f"prior_mismatch at T = {T}", mistakes, 1e-3, 3e-7)
