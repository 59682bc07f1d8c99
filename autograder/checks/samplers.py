"""What samplers are held to, in whichever lab they are written."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from autograder.checks import expect
from autograder.checks.oracles import Coefficients, GaussianOracle

__all__ = ["SLOW", "SlowOracle", "hold_calls_and_clock", "hold_jump", "hold_rows", "hold_timesteps", "step_problem"]

SLOW = 0.004  # seconds a call of a slow network takes


def step_problem(x_s: Tensor, mean: Tensor, variance: Tensor, eps: Tensor) -> str | None:
    """Is x_s a draw from N(mean, variance)? None, or what is wrong with it. `eps` is what the network predicted."""
    deviation = x_s.double() - mean
    if variance == 0:
        if deviation.abs().max() > 3e-3:
            size = deviation.std().item()
            return f"the result should be the mean itself, without noise (it differs by {size:.3g})"
        return None
    std = variance.sqrt()
    problem = expect.noise_problem(deviation / std, eps)
    return problem and f"x_(t−1) should be mean + √β̃_t · noise, but {problem}"


def hold_timesteps(value: Any, call: str, num_timesteps: int, num_steps: int) -> Tensor:
    """What the timesteps that a sampler visits must satisfy; `call` is how the hint names them.

    Returns:
        LongTensor [num_steps].

    Raises:
        CheckFailed: otherwise.
    """
    timesteps = expect.tensor(value, call)
    if timesteps.ndim != 1:
        expect.fail(f"{call} should be one-dimensional, got shape {list(timesteps.shape)}")
    if timesteps.dtype != torch.int64:
        expect.fail(f"{call} should be a LongTensor (int64), got {timesteps.dtype}; use .long()")
    entries = timesteps[: num_timesteps + 2].tolist()
    if len(entries) > 1 and entries[0] < entries[-1]:
        expect.fail(f"{call} is ascending; sampling runs from T − 1 down to 0")
    if entries and (max(entries) >= num_timesteps or min(entries) < 0):
        expect.fail(f"{call} leaves 0 … {num_timesteps - 1}: it holds {min(entries)} … {max(entries)}")
    if len(timesteps) != num_steps:
        cause = (
            " (linspace(…, num_steps + 1) makes one too many; the last jump, from 0 to clean data, needs no entry)"
            if len(timesteps) == num_steps + 1
            else " (removing repeats loses steps; resolve them so that the number stays)"
            if len(timesteps) < num_steps and "quadratic" in call
            else ""
        )
        expect.fail(f"{call} should have exactly {num_steps} entries, got {len(timesteps)}{cause}")
    if any(a <= b for a, b in zip(entries, entries[1:])):
        expect.fail(f"{call} should fall strictly; it repeats or rises: a repeated timestep wastes a network call")
    if entries[0] != num_timesteps - 1:
        expect.fail(
            f"{call} should start at T − 1 = {num_timesteps - 1}, the noise that x_T has; it starts at {entries[0]}"
        )
    if num_steps > 1 and entries[-1] != 0:
        expect.fail(f"{call} should end at 0, the cleanest timestep; it ends at {entries[-1]}")
    return timesteps


class SlowOracle(GaussianOracle):
    """Takes its time, so that there is something to measure."""

    seconds = 0.0

    def predict(self, x, t):
        """The exact prediction, a little later."""
        time.sleep(self.seconds)
        return super().predict(x, t)


def hold_rows(
    rows: Any, keys: Sequence[str], runs: Mapping[str, list[int]], calls: list[tuple[Tensor, Tensor, Tensor]]
) -> tuple[list[dict], Tensor]:
    """A comparison of samplers has a row for each run, in order, and all runs start from one x_T.

    Args:
        rows: what the student's function returned.
        keys: what a row must hold.
        runs: name of each run -> the timesteps it visits.
        calls: all calls of the network, as `RecordingNetwork` keeps them.

    Returns:
        (the rows, the x_T of all runs).

    Raises:
        CheckFailed: otherwise.
    """
    rows = expect.tensors(rows, "compare_samplers", len(runs))
    for row, name in zip(rows, runs):
        if not isinstance(row, dict) or any(key not in row for key in keys):
            got = f"{list(row)}" if isinstance(row, dict) else f"{row!r:.80}"
            expect.fail(f"a row should be a dict with {', '.join(keys)}; got {got}.")
        if row["name"] != name:
            expect.fail(
                f"the rows should be {', '.join(runs)} in this order; found {row['name']!r:.40} in place of {name}."
            )
    starts = {name: _starts(calls, visited) for name, visited in runs.items()}
    for name, found in starts.items():
        if not found:
            expect.fail(f"there was no run of {name}: the network was never asked for its timesteps one after another.")
    first = next(iter(runs))
    common = starts[first][-1]
    for name in runs:
        if not any(expect.is_close(x, common.double(), 1e-5, 1e-6) for x in starts[name]):
            expect.fail(f"{name} starts from another x_T than {first}; from one x_T samplers differ by what they do.")
    return rows, common


def _starts(calls, visited) -> list[torch.Tensor]:
    """What the network was shown first in every run that visits exactly these timesteps."""
    asked = [int(t[0]) for _, t, _ in calls]
    width = len(visited)
    return [calls[i][0] for i in range(len(asked) - width + 1) if asked[i : i + width] == visited]


def hold_calls_and_clock(row: dict, name: str, count: int, first: dict, elapsed: float) -> None:
    """ "network_calls", "seconds" and "speedup" of a run of `count` calls of a `SlowOracle`.

    Args:
        row, name: of this run.
        count: calls it makes.
        first: the row of the run it is compared with.
        elapsed: seconds that all runs took.

    Raises:
        CheckFailed: if they cannot be true.
    """
    if row["network_calls"] != count:
        expect.fail(
            f'"network_calls" of {name} should be {count}, counted during that run alone; '
            f"got {row['network_calls']!r:.40}."
        )
    seconds, speedup = (float(expect.tensor(row[key], f'"{key}" of {name}', ())) for key in ("seconds", "speedup"))
    if seconds < 0.97 * SLOW * count:
        expect.fail(
            f'"seconds" of {name} is {seconds:.3g}, less than the network alone took ({SLOW * count:.3g} s): '
            "read time.perf_counter() before and after the run."
        )
    if seconds > elapsed:
        expect.fail(f'"seconds" of {name} is {seconds:.3g}; all runs together took {elapsed:.3g} s.')
    ratio = float(first["seconds"]) / seconds
    mistakes = {"the ratio upside down": 1 / ratio, "the ratio of network calls": first["network_calls"] / count}
    expect.close(torch.tensor(speedup), ratio, f'"speedup" of {name}', mistakes, 1e-2, 0)


def hold_jump(c: Coefficients, x_t: Tensor, t: int, s: int, eps: Tensor, x_s: Tensor) -> None:
    """x_s is where a deterministic DDIM step leads from x_t, with the noise the network predicted."""
    x, e = x_t.double(), eps.double()
    x_0 = c.predict_x0(x, e, t)
    a_t, a_s, single = c.alpha_bar(t), c.alpha_bar(s), c.alpha(t)
    to = "clean data (s = −1)" if s == -1 else f"s = {s}"
    mistakes = {
        "ᾱ_t in place of ᾱ_s in the second half": a_t.sqrt() * x_0 + (1 - a_t).sqrt() * e,
        "1 − ᾱ_s without its square root": a_s.sqrt() * x_0 + (1 - a_s) * e,
        "ᾱ_s without its square root": a_s * x_0 + (1 - a_s).sqrt() * e,
        "the direction of the noise left out": a_s.sqrt() * x_0,
        "an x̂_0 clipped to [−1, 1] (no clipping in this lab)": a_s.sqrt() * x_0.clamp(-1, 1) + (1 - a_s).sqrt() * e,
        "a missing division by √ᾱ_t in x̂_0": a_s.sqrt() * (x - (1 - a_t).sqrt() * e) + (1 - a_s).sqrt() * e,
        "α_t (a single step) in place of ᾱ_t in x̂_0": a_s.sqrt() * (x - (1 - single).sqrt() * e) / single.sqrt()
        + (1 - a_s).sqrt() * e,
        "the DDPM mean in place of the DDIM step": c.posterior_mean(x, t, e),
        "alphas_cumprod[−1] at s = −1 (index −1 wraps to the last timestep; ᾱ_{−1} is 1)": c.alpha_bar(
            c.schedule.num_timesteps - 1
        ).sqrt()
        * x_0
        + (1 - c.alpha_bar(c.schedule.num_timesteps - 1)).sqrt() * e,
    }
    expect.close(x_s, c.ddim_mean(x_0, e, t, s), f"the jump from t = {t} to {to} in ddim_sample", mistakes, 1e-3, 1e-3)
