"""ForwardProcessImpl: the closed form of q(x_t | x_0)."""

import torch

from autograder.checks import expect, graded
from autograder.checks.oracles import Coefficients, images, random_schedule
from autograder.submission.wire import Figure


@graded(points=4, section="DDPM")
def test_add_noise(submission, rng):
    """`add_noise` draws from q(x_t | x_0), for one timestep or one per image, and returns the noise it used."""
    schedule = random_schedule(rng)
    c = Coefficients(schedule)
    process = submission.ForwardProcessImpl(schedule)
    last = schedule.num_timesteps - 1
    x_0, eps = images(rng, 6, 1, 8, 8), images(rng, 6, 1, 8, 8)
    mixed = torch.tensor([0, last, *torch.randint(0, last, (4,), generator=rng).tolist()])
    for t, label in ((mixed, "one timestep per image"), (int(mixed[2]), "an int t"), (0, "t = 0")):
        pair = expect.tensors(process.add_noise(x_0, t, eps), "add_noise(x_start, t, noise)", 2)
        x_t = expect.tensor(pair[0], "the first value of add_noise (x_t)", x_0.shape)
        noise = expect.tensor(pair[1], "the second value of add_noise (the noise)", x_0.shape)
        a, x, e = c.alpha_bar(t), x_0.double(), eps.double()
        mistakes = {
            "ᾱ_t without its square root on x_0": a * x + (1 - a).sqrt() * e,
            "1 − ᾱ_t without its square root on the noise": a.sqrt() * x + (1 - a) * e,
            "ᾱ_t and 1 − ᾱ_t without their square roots": a * x + (1 - a) * e,
            "the two coefficients swapped": (1 - a).sqrt() * x + a.sqrt() * e,
            "α_t (a single step) in place of the cumulative ᾱ_t": c.alpha(t).sqrt() * x + (1 - c.alpha(t)).sqrt() * e,
            "the noise subtracted instead of added": a.sqrt() * x - (1 - a).sqrt() * e,
            "the first image's timestep for the whole batch": c.alpha_bar(int(mixed[0])).sqrt() * x
            + (1 - c.alpha_bar(int(mixed[0]))).sqrt() * e,
        }
        expect.close(x_t, a.sqrt() * x + (1 - a).sqrt() * e, f"x_t for {label}", mistakes)
        expect.same(noise, eps, "add_noise should return the noise it was given as its second value.")

    x_0 = images(rng, 32, 1, 28, 28)
    t = last // 2
    x_t, noise = (
        expect.tensor(v, "add_noise without noise", x_0.shape)
        for v in expect.tensors(process.add_noise(x_0, t), "add_noise(x_start, t)", 2)
    )
    expect.noise(noise, "noise drawn when none is given")
    a = c.alpha_bar(t)
    expect.close(
        x_t, a.sqrt() * x_0.double() + (1 - a).sqrt() * noise.double(), "x_t made from the noise that was returned",
        {"other noise than the one returned (was it drawn twice?)": x_t},
    )  # fmt: skip


@graded(points=0, section="DDPM")
def test_forward_trajectory(submission, rng):
    """`demonstrate_forward_trajectory` shows one image for each timestep, in order."""
    schedule = random_schedule(rng)
    process = submission.ForwardProcessImpl(schedule)
    x_0 = 2 * torch.rand(1, 1, 12, 12, generator=rng) - 1
    last = schedule.num_timesteps - 1
    for timesteps in ([0, last // 3, last], [last // 2]):
        figure = process.demonstrate_forward_trajectory(x_0, timesteps)
        if not isinstance(figure, Figure):
            expect.fail(
                "demonstrate_forward_trajectory should return the matplotlib Figure it draws (`return figure`)."
            )
        if len(figure.images) != len(timesteps):
            expect.fail(
                f"for {len(timesteps)} timestep(s) the figure holds {len(figure.images)} images; expected one for each, "
                "drawn with imshow"
            )
        # How closely a picture of x_t follows x_0 is sqrt(alpha_bar_t): nearly one at t = 0, nearly none at the end.
        likeness = [_correlation(image, x_0) for image in figure.images]
        if timesteps[0] == 0 and not (likeness[0] >= 0.9 and abs(likeness[-1]) <= 0.6):
            expect.fail(
                "the pictures should run from t = 0, which looks like x_0, to the last timestep, which is noise; "
                f"their correlations with x_0 are {', '.join(f'{v:.2f}' for v in likeness)}"
            )


def _correlation(image: torch.Tensor, x_0: torch.Tensor) -> float:
    if image.ndim > 2:  # an RGB picture: any of its three equal channels
        image = image.movedim(-1, 0)[0] if image.shape[-1] in (1, 3, 4) else image[0]
    if image.numel() != x_0[0].numel() or image.std() == 0:
        return 0.0
    return torch.corrcoef(torch.stack([image.flatten().double(), x_0[0].flatten().double()]))[0, 1].item()
