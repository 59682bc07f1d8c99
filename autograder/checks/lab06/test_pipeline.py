"""Parts 2 and 4: what is timed, and what it draws."""

import torch

from autograder.checks import expect, graded
from autograder.checks.lab06.devices import hold_record
from autograder.checks.oracles import Coefficients, GaussianOracle, ideal_timesteps, images, random_schedule
from autograder.checks.samplers import hold_jump, hold_timesteps
from difflab.datasets import load_digits
from difflab.metrics import quality

PICTURE = (1, 28, 28)


@graded(points=4, section="Pipeline")
def test_ddim_for_timing(submission, rng):
    """`ddim_sample` visits N evenly spaced timesteps, jumps as DDIM does, and ends at clean data."""
    total = 40
    schedule = random_schedule(rng, num_timesteps=total)
    network, c = GaussianOracle(schedule), Coefficients(schedule)
    x_T = images(rng, 3, 1, 8, 8)
    for num_steps in (8, 3, total, 1):
        network.calls.clear()
        what = f"ddim_sample with num_steps = {num_steps}"
        samples = expect.tensor(
            submission.ddim_sample(network, schedule, x_T, num_steps), what, x_T.shape, torch.float32
        )
        if not network.calls:
            expect.fail(f"{what} never calls the network.")
        expect.same(network.calls[0][0], x_T, "ddim_sample should start from the x_T it is given.")
        visited = torch.tensor([int(t) for t in network.timesteps])
        hold_timesteps(visited, f"the timesteps of {what}", total, num_steps)
        if (visited - ideal_timesteps(total, num_steps, 1)).abs().max() > 1.01:
            expect.fail(
                f"the timesteps of {what} should be evenly spaced from T − 1 to 0; it visits {visited.tolist()[:8]} …"
            )
        states = [x for x, _, _ in network.calls] + [samples]
        for (x_t, _, eps), t, s, x_s in zip(network.calls, visited.tolist(), [*visited.tolist()[1:], -1], states[1:]):
            hold_jump(c, x_t, t, s, eps, x_s)
    for bad in (0, -3, total + 1):
        with expect.raises_value_error(f"ddim_sample with num_steps = {bad} and T = {total}"):
            submission.ddim_sample(network, schedule, x_T, bad)


@graded(points=5, section="Pipeline")
def test_generate_batch(submission, rng):
    """`generate` draws noise from its seed, samples all images together, and brings them clipped to the CPU."""
    schedule = random_schedule(rng, num_timesteps=60)
    network = GaussianOracle(schedule)
    seed, other = torch.randint(2**31, (2,), generator=rng).tolist()

    def drawn(num_steps, num_images, seed):
        """(images, the noise they started from)"""
        network.calls.clear()
        what = f"generate with num_steps = {num_steps} and num_images = {num_images}"
        result = submission.generate(network, schedule, num_steps, num_images, seed)
        result = expect.tensor(result, what, (num_images, *PICTURE), torch.float32)
        if not network.calls:
            expect.fail(f"{what} never calls the network.")
        x_T = network.calls[0][0]
        if len(x_T) != num_images:
            expect.fail(f"{what}: all images should go through the network together, [{num_images}, 1, 28, 28] in each "
                        f"call; it was shown {list(x_T.shape)}.")  # fmt: skip
        return result, x_T

    result, x_T = drawn(6, 40, seed)
    expect.noise(x_T, "the noise that generate starts from")
    _hold_collation(submission, network, schedule, result, x_T, 6)
    _, later = drawn(6, 40, other)
    if torch.equal(later, x_T):
        expect.fail("another seed should give other noise: does `seed` reach the generator?")
    for num_steps in (6, 11, 2):
        _, again = drawn(num_steps, 40, seed)
        if not torch.equal(again, x_T):
            expect.fail("equal seeds should give equal noise, whatever num_steps is and whatever was drawn before: use a "
                        "generator of its own, torch.Generator().manual_seed(seed).")  # fmt: skip
    expect.tensor(
        submission.generate(network, schedule, 3), "generate(model, schedule, 3)", (10, *PICTURE), torch.float32
    )
    if network.grad_enabled:
        expect.fail("generate should run without gradients, which cost time and memory: @torch.no_grad().")


def _hold_collation(submission, network, schedule, result, x_T, num_steps):
    """The images are the clean data that the last network call implies, clipped; or what the student's sampler makes."""
    x_t, t, eps = network.calls[-1]
    clean = Coefficients(schedule).predict_x0(x_t, eps, t.long())
    if expect.is_close(result, clean.clamp(-1, 1), 1e-3, 1e-3):
        return
    try:
        own = expect.tensor(submission.ddim_sample(network, schedule, x_T, num_steps), "", tuple(x_T.shape)).double()
        if expect.is_close(result, own.clamp(-1, 1), 1e-3, 1e-3):
            return
    except expect.NOT_WORKING:
        own = clean
    mistakes = {}
    for samples in (clean, own):
        mistakes |= {
            "images that are not clipped to [−1, 1]": samples,
            "images scaled to [0, 1]": (samples.clamp(-1, 1) + 1) / 2,
            "images clipped to [0, 1]": samples.clamp(0, 1),
            "the noise, not the samples,": x_T,
        }
        if expect.is_close(result, samples, 1e-3, 1e-3):
            break
    expect.close(result, clean.clamp(-1, 1), "the images of generate", mistakes, 1e-3, 1e-3)


@graded(points=4, section="Costs")
def test_quality_against_steps(submission, rng):
    """`quality_against_steps` compares step counts on images from one noise."""
    schedule = random_schedule(rng, num_timesteps=60)
    digit = load_digits(200)[0][int(torch.randint(200, (), generator=rng))]
    network = GaussianOracle(schedule, mean=digit[None], std=0.35)
    counts, num_images, seed = [4, 9, 2], 16, int(torch.randint(2**31, (), generator=rng))
    rows = submission.quality_against_steps(network, schedule, counts, num_images, seed)
    rows = expect.tensors(rows, f"quality_against_steps with {len(counts)} step counts", len(counts))
    if not network.calls:
        expect.fail("quality_against_steps should draw images with `generate`; it never calls the network.")
    runs = _drawn(network, schedule)
    for _, x_T, _ in runs:
        if x_T.shape != (num_images, *PICTURE):
            expect.fail(
                f"{num_images} images should be drawn for each step count, all together; found {list(x_T.shape)}."
            )
        if not torch.equal(x_T, runs[0][1]):
            expect.fail("all step counts should start from one noise: pass the same seed to generate every time.")
    drawn = {num_steps: clean for num_steps, _, clean in runs}
    # Where the student's generate is wrong, and its points are lost, the images are those that it draws.
    candidates = [
        drawn if set(drawn) == set(counts) else None,
        _own_images(submission, network, schedule, counts, num_images, seed),
    ]
    problems = []
    for pictures in candidates:
        try:
            if pictures is not None:
                return _hold_quality(rows, counts, pictures)
        except expect.CheckFailed as problem:
            problems.append(problem)
    if candidates[0] is None:
        expect.fail(
            f"images should be drawn with {sorted(counts)} steps; the network was asked for runs of {sorted(drawn)} steps."
        )
    raise problems[0]


def _drawn(network, schedule) -> list:
    """(number of steps, x_T, clipped clean images) of every run the network has seen."""
    starts = [k for k, t in enumerate(network.timesteps) if int(t) == int(network.timesteps[0])]
    runs = []
    for start, end in zip(starts, [*starts[1:], len(network.calls)]):
        x_t, t, eps = network.calls[end - 1]
        clean = Coefficients(schedule).predict_x0(x_t, eps, t.long()).clamp(-1, 1)
        runs.append((end - start, network.calls[start][0], clean))
    return runs


def _own_images(submission, network, schedule, counts, num_images, seed):
    """What the student's own generate draws; None if it does not work."""
    shape = (num_images, *PICTURE)
    try:
        return {
            n: expect.tensor(submission.generate(network, schedule, n, num_images, seed), "", shape).double()
            for n in counts
        }
    except expect.NOT_WORKING:
        return None


def _hold_quality(rows, counts, pictures):
    longest, keys = pictures[max(counts)], ("num_steps", "frechet", "recognised", "distance")
    measured = {n: quality(pictures[n].float()) for n in counts}
    for row, num_steps in zip(rows, counts):
        hold_record(row, keys, f"the row of {num_steps} steps")
        if row["num_steps"] != num_steps:
            expect.fail(
                f"the rows should stand in the order of step_counts, {counts}; found {row['num_steps']!r:.40} for {num_steps}."
            )
        got = {key: expect.tensor(row[key], f'"{key}" with {num_steps} steps', ()).double() for key in keys}

        def rms(other, here=pictures[num_steps]):
            return (here - other).square().mean().sqrt()

        difference, where = pictures[num_steps] - longest, f"with {num_steps} steps"
        mistakes = {
            "the mean square, without its root,": difference.square().mean(),
            "the mean absolute difference": difference.abs().mean(),
            "the sum in place of the mean": difference.square().sum().sqrt(),
            "the distance to the first of step_counts": rms(pictures[counts[0]]),
            "the distance to the last of step_counts": rms(pictures[counts[-1]]),
        }
        expect.close(got["distance"], rms(longest), f'"distance" {where}', mistakes, 1e-3, 1e-4)
        # An image that the classifier is just 90 % sure of may count or not.
        mistakes = {"per cent in place of a fraction": torch.tensor(100 * measured[num_steps].recognised)}
        expect.close(
            got["recognised"],
            torch.tensor(measured[num_steps].recognised),
            f'"recognised" {where}',
            mistakes,
            0,
            1.5 / len(longest),
        )
        mistakes = {"the images of the longest run": torch.tensor(measured[max(counts)].frechet)}
        expect.close(
            got["frechet"], torch.tensor(measured[num_steps].frechet), f'"frechet" {where}', mistakes, 1e-2, 1e-2
        )
