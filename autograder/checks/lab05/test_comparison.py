"""Part 4: samplers side by side, and the far end of the schedule."""

import time

import torch

from autograder.checks import expect, graded
from autograder.checks.lab05.follow_through import ddim_sampler
from autograder.checks.oracles import Coefficients, GaussianOracle, images, random_schedule


class _SlowOracle(GaussianOracle):
    """Takes its time, so that there is something to measure."""

    seconds = 0.0

    def predict(self, x, t):
        """The exact prediction, a little later."""
        time.sleep(self.seconds)
        return super().predict(x, t)


@graded(points=4, section="Performance analysis")
def test_compare_samplers(submission, rng):
    """`compare_samplers` counts network calls, reads the clock, and compares DDPM with DDIM from one x_T."""
    total = 24
    schedule = random_schedule(rng, num_timesteps=total)
    network = _SlowOracle(schedule)
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
    network.seconds = 0.004
    start = time.perf_counter()
    rows = submission.compare_samplers(ddpm, ddim, len(x_T), list(step_counts), list(shape[1:]))
    elapsed = time.perf_counter() - start
    network.seconds = 0.0
    calls = list(network.calls)

    rows = expect.tensors(rows, "compare_samplers", len(runs))
    keys = ("name", "network_calls", "seconds", "speedup", "peak_memory", "diversity", "samples")
    for row, name in zip(rows, runs):
        if not isinstance(row, dict) or any(key not in row for key in keys):
            expect.fail(
                f"a row should be a dict with {', '.join(keys)}; got {list(row) if isinstance(row, dict) else row!r:.80}."
            )
        if row["name"] != name:
            expect.fail(
                f"the rows should be {', '.join(runs)} in this order; found {row['name']!r:.40} in place of {name}."
            )
    starts = {name: _starts(calls, visited) for name, visited in runs.items()}
    for name, found in starts.items():
        if not found:
            expect.fail(f"there was no run of {name}: the network was never asked for its timesteps one after another.")
    common = starts[f"DDPM-{total}"][-1]
    for row, (name, visited) in zip(rows, runs.items()):
        if not any(expect.is_close(x, common.double(), 1e-5, 1e-6) for x in starts[name]):
            expect.fail(
                f"{name} starts from another x_T than DDPM-{total}; from one x_T samplers differ by what they do."
            )
        _hold_row(row, name, visited, rows[0], shape, elapsed)
        if name.startswith("DDIM"):
            own = ddim.sample(shape, timesteps=ddim.create_timestep_schedule(int(name[5:])), x_T=common)
            own = expect.tensor(own, "sample", shape).double()
            if not expect.is_close(row["samples"], own, 1e-3, 1e-3):
                expect.fail(f'"samples" of {name} are not what your DDIM sampler makes of that x_T with η = 0.')


def _starts(calls, visited) -> list[torch.Tensor]:
    """What the network was shown first in every run that visits exactly these timesteps."""
    asked = [int(t[0]) for _, t, _ in calls]
    width = len(visited)
    return [calls[i][0] for i in range(len(asked) - width + 1) if asked[i : i + width] == visited]


def _hold_row(row, name, visited, first, shape, elapsed):
    if row["network_calls"] != len(visited):
        expect.fail(
            f'"network_calls" of {name} should be {len(visited)}, counted during that run alone; '
            f"got {row['network_calls']!r:.40}."
        )
    seconds, speedup, memory, spread = (
        float(expect.tensor(row[key], f'"{key}" of {name}', ()))
        for key in ("seconds", "speedup", "peak_memory", "diversity")
    )
    if seconds < 0.0039 * len(visited):
        expect.fail(
            f'"seconds" of {name} is {seconds:.3g}, less than the network alone took ({0.004 * len(visited):.3g} s): '
            "read time.perf_counter() before and after the run."
        )
    if seconds > elapsed:
        expect.fail(f'"seconds" of {name} is {seconds:.3g}; all runs together took {elapsed:.3g} s.')
    ratio = float(first["seconds"]) / seconds
    mistakes = {"the ratio upside down": 1 / ratio, "the ratio of network calls": first["network_calls"] / len(visited)}
    expect.close(torch.tensor(speedup), ratio, f'"speedup" of {name}', mistakes, 1e-2, 0)
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
