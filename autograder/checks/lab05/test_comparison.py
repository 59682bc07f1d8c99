"""Part 4: samplers side by side, and the far end of the schedule."""

import time

import torch

from autograder.checks import expect, graded
from autograder.checks.lab05.follow_through import ddim_sampler
from autograder.checks.oracles import Coefficients, images, random_schedule
from autograder.checks.samplers import SLOW, SlowOracle, hold_calls_and_clock, hold_rows


@graded(points=4, section="Performance analysis")
def test_compare_samplers(submission, rng):
    """`compare_samplers` counts network calls, reads the clock, and compares DDPM with DDIM from one x_T."""
    total = 24
    schedule = random_schedule(rng, num_timesteps=total)
    network = SlowOracle(schedule)
    ddpm, ddim = submission.DDPMSampler(network, schedule), ddim_sampler(submission, network, schedule)
    shape, step_counts = (5, 1, 8, 8), (8, 3)

    def timesteps_of(run) -> list[int]:
        """Which timesteps a run of the student's own sampler visits."""
        network.calls.clear()
        run()
        return [int(t) for t in network.timesteps]

    x_T = images(rng, *shape)
    runs = {f"DDPM-{total}": timesteps_of(lambda: ddpm.sample(shape, x_T=x_T))} | {
        f"DDIM-{n}": timesteps_of(
            lambda n=n: ddim.sample(shape, timesteps=ddim.create_timestep_schedule(n), x_T=x_T)
        )
        for n in step_counts
    }  # fmt: skip

    network.calls.clear()
    network.seconds = SLOW
    start = time.perf_counter()
    rows = submission.compare_samplers(ddpm, ddim, len(x_T), list(step_counts), list(shape[1:]))
    elapsed = time.perf_counter() - start
    network.seconds = 0.0
    calls = list(network.calls)

    keys = ("name", "network_calls", "seconds", "speedup", "peak_memory", "diversity", "samples")
    rows, common = hold_rows(rows, keys, runs, calls)
    for row, (name, visited) in zip(rows, runs.items()):
        _hold_row(row, name, visited, rows[0], shape, elapsed)
        if name.startswith("DDIM"):
            own = ddim.sample(shape, timesteps=ddim.create_timestep_schedule(int(name[5:])), x_T=common)
            own = expect.tensor(own, "sample", shape).double()
            if not expect.is_close(row["samples"], own, 1e-3, 1e-3):
                expect.fail(f'"samples" of {name} are not what your DDIM sampler makes of that x_T with η = 0.')


def _hold_row(row, name, visited, first, shape, elapsed):
    hold_calls_and_clock(row, name, len(visited), first, elapsed)
    memory, spread = (float(expect.tensor(row[k], f'"{k}" of {name}', ())) for k in ("peak_memory", "diversity"))
    if memory <= 0:
        expect.fail(
            f'"peak_memory" of {name} should be a positive number of bytes; `peak_memory(work, device)` measures it.'
        )
    samples = expect.tensor(row["samples"], f'"samples" of {name}', shape).double()
    pairs, pixels = torch.pdist(samples.flatten(1)), samples[0].numel()
    mistakes = {
        "the Euclidean distance, not divided by the number of pixels,": pairs.mean(),
        "the standard deviation": samples.std(),
    }
    expect.close(torch.tensor(spread), pairs.mean() / pixels**0.5, f'"diversity" of {name}', mistakes, 1e-3, 1e-5)


@graded(points=0, section="Performance analysis")
def test_x0_error_gain(submission, rng):
    """`x0_error_gain` tells how much an error in ε̂ grows in x̂_0."""
    schedule = random_schedule(rng)
    c = Coefficients(schedule)
    last = schedule.num_timesteps - 1
    timesteps = [0, 30, last // 2, last - 1, last]
    gain = expect.tensor(submission.x0_error_gain(schedule, timesteps), "the gain", (len(timesteps),))
    a = schedule.alpha_bar(torch.tensor(timesteps)).double()
    mistakes = {
        "the square of the factor": (1 - a) / a,
        "the factor upside down": (a / (1 - a)).sqrt(),
        "1/√ᾱ_t, without √(1 − ᾱ_t),": 1 / a.sqrt(),
        "√(1 − ᾱ_t), without 1/√ᾱ_t,": (1 - a).sqrt(),
        "α_t in place of ᾱ_t": torch.stack([(c.beta(t) / c.alpha(t)).sqrt() for t in timesteps]),
    }
    expect.close(gain, ((1 - a) / a).sqrt(), "the gain", mistakes, 1e-3, 1e-6)
