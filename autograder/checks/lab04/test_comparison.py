"""Part 5: samplers side by side."""

import time

from autograder.checks import expect, graded
from autograder.checks.lab04.test_sampling import with_timesteps
from autograder.checks.oracles import images, random_schedule
from autograder.checks.samplers import SLOW, SlowOracle, hold_calls_and_clock, hold_rows

TOTAL = 24


@graded(points=6, section="Comparison")
def test_speed_comparison(submission, rng):
    """`compare_samplers` counts network calls, reads the clock, and compares DDPM with DDIM from one x_T."""
    schedule = random_schedule(rng, num_timesteps=TOTAL)
    network = SlowOracle(schedule)
    diffusion = with_timesteps(submission.Diffusion(network, schedule), submission, TOTAL)
    shape, step_counts = (5, 1, 8, 8), (8, 3)
    x_T = images(rng, *shape)

    def timesteps_of(run) -> list[int]:
        """Which timesteps a run of the student's own sampler visits."""
        network.calls.clear()
        run()
        return [int(t) for t in network.timesteps]

    runs = {f"DDPM-{TOTAL}": timesteps_of(lambda: diffusion.ddpm_sample(shape, x_T=x_T))}
    runs |= {f"DDIM-{n}": timesteps_of(lambda n=n: diffusion.ddim_sample(shape, n, x_T=x_T)) for n in step_counts}

    network.calls.clear()
    network.seconds = SLOW
    start = time.perf_counter()
    rows = submission.compare_samplers(diffusion, len(x_T), list(step_counts), list(shape[1:]))
    elapsed = time.perf_counter() - start
    network.seconds = 0.0
    calls = list(network.calls)

    keys = ("name", "network_calls", "seconds", "speedup", "samples")
    rows, common = hold_rows(rows, keys, runs, calls)
    for row, (name, visited) in zip(rows, runs.items()):
        hold_calls_and_clock(row, name, len(visited), rows[0], elapsed)
        samples = expect.tensor(row["samples"], f'"samples" of {name}', shape).double()
        if name.startswith("DDIM"):
            own = expect.tensor(diffusion.ddim_sample(shape, len(visited), x_T=common), "ddim_sample", shape).double()
            if not expect.is_close(samples, own, 1e-3, 1e-3):
                expect.fail(f'"samples" of {name} are not what your ddim_sample makes of that x_T.')
