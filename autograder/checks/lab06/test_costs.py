"""Part 4: what a step and an image cost, on a device whose costs are known."""

import torch

from autograder.checks import expect, graded
from autograder.checks.lab06.devices import SLOW_START, Device, between, hold_record, own_medians


def _interrupted(plain):
    """Every first call with a key is slow, and every other one after it takes three times as long."""

    def cost(key, count):
        seconds = plain(key)
        return seconds + SLOW_START if count == 1 else 3 * seconds if count in (3, 5) else seconds

    return cost


@graded(points=5, section="Costs")
def test_split_step_cost(submission, rng):
    """`split_step_cost` separates network, sampler and fixed cost by differences of medians."""
    fixed, network, sampler = between(rng, 0.05, 0.2), between(rng, 0.02, 0.05), between(rng, 0.005, 0.015)
    n = int(torch.randint(4, 12, (), generator=rng))

    def plain(key):
        kind, num_steps = key
        return fixed + num_steps * (sampler + network * (kind == "sample"))

    device = Device(rng, _interrupted(plain))
    result = submission.split_step_cost(
        lambda num_steps: device.work(("sample", num_steps)), lambda num_steps: device.work(("free", num_steps)),
        n, 5, **device.tools,
    )  # fmt: skip
    keys = ("step", "network", "sampler", "fixed")
    result = hold_record(result, keys, "split_step_cost")
    for kind, name in (("sample", "sample"), ("free", "sample_free")):
        steps = {steps for known, steps in device.asked if known == kind}
        if steps != {n, 2 * n}:
            expect.fail(
                f"{name} should be timed with N = {n} and 2N = {2 * n} steps; it was called with {list(steps) or 'none'}."
            )
    kinds = [(kind, k * n) for kind in ("sample", "free") for k in (1, 2)]
    got = torch.stack([expect.tensor(result[key], f'"{key}" of split_step_cost', ()).double() for key in keys])

    def split(tau):
        step = (tau[kinds[1]] - tau[kinds[0]]) / n
        free = (tau[kinds[3]] - tau[kinds[2]]) / n
        return torch.tensor([step, step - free, free, tau[kinds[0]] - n * step], dtype=torch.float64)

    tau = {key: plain(key) for key in kinds}
    right = split(tau)
    own = own_medians(submission, Device(rng, _interrupted(plain)), kinds, 5)
    if own is not None and expect.is_close(got, split(own), 1e-6, 1e-6):
        return  # the points for a wrong time_call or summarise are lost there
    few = [key for key in kinds if device.asked.count(key) < 6]
    if few:
        expect.fail(
            f"repeats = 5 and a warm-up make 6 calls of each kind; {few[0][0]}({few[0][1]}) was called {device.asked.count(few[0])} times."
        )
    means = {key: 9 / 5 * value for key, value in tau.items()}  # of five, two take three times as long
    step, free = tau[kinds[1]] / (2 * n), tau[kinds[3]] / (2 * n)
    one, one_free = tau[kinds[0]] / n, tau[kinds[2]] / n
    mistakes = {
        "the mean in place of the median": split(means),
        "a clock that does not wait for the device (pass synchronize on)": 0.1 * right,
        "τ(2N)/2N for a step, with the fixed cost in it,": torch.tensor(
            [step, step - free, free, tau[kinds[0]] - n * step]
        ),
        "τ(2N)/2N for the whole step, with the fixed cost in it,": _with_step(right, step, n),
        "τ(N)/N for a step, with the fixed cost in it,": torch.tensor([one, one - one_free, one_free, 0.0]),
        "τ(N)/N for the whole step, with the fixed cost in it,": _with_step(right, one, n),
        "a difference of runs divided by 2N": torch.cat([right[:3] / 2, right[3:] + n * right[:1] / 2]),
        "a difference of runs with N and 2N steps, divided by 2N": _with_step(right, float(right[0] / 2), n),
        "a difference of runs that is not divided by N": torch.cat([right[:3] * n, right[3:]]),
        "network and sampler swapped": right[[0, 2, 1, 3]],
        "the whole step for the network": right[[0, 0, 2, 3]],
        "τ(2N) − N · step for the fixed cost": torch.cat([right[:3], right[3:] + n * right[:1]]),
    }
    expect.close(got, right, "split_step_cost (step, network, sampler, fixed)", mistakes, 1e-6, 1e-6)


def _with_step(right, step: float, n: int) -> torch.Tensor:
    """The split with another cost of the whole step, and the right one of the sampler."""
    return torch.tensor([step, step - right[2], right[2], right[3] + n * (right[0] - step)], dtype=torch.float64)


@graded(points=3, section="Costs")
def test_batch_cost(submission, rng):
    """`batch_cost` gives the median time of each batch size, and of an image in it."""
    fixed, image = between(rng, 0.05, 0.2), between(rng, 0.01, 0.05)
    sizes = [4, 1, 16, 3]

    def plain(size):
        return fixed + image * size

    for repeats in ({}, {"repeats": 5}):
        device = Device(rng, _interrupted(plain))
        rows = submission.batch_cost(device.work, sizes, **repeats, **device.tools)
        rows = expect.tensors(rows, f"batch_cost with {len(sizes)} sizes", len(sizes))
        calls = 1 + repeats.get("repeats", 3)
        if set(device.asked) != set(sizes):
            expect.fail(f"work should be called with the sizes {sizes}; it was called with {list(set(device.asked))}.")
        keys = ("batch_size", "seconds", "seconds_per_image")
        for row in rows:
            hold_record(row, keys, "a row of batch_cost")
        if [row["batch_size"] for row in rows] != sizes:
            expect.fail(
                f"the rows should stand in the order of batch_sizes, {sizes}; got {[row['batch_size'] for row in rows]!r:.80}."
            )
        own = own_medians(submission, Device(rng, _interrupted(plain)), sizes, calls - 1)
        right, size = torch.tensor([plain(size) for size in sizes], dtype=torch.float64), torch.tensor(sizes)
        got, each = (
            torch.stack([expect.tensor(row[key], f'"{key}"', ()).double() for row in rows]) for key in keys[1:]
        )
        if own is not None and expect.is_close(got, torch.tensor(list(own.values())), 1e-6, 1e-6):
            right = got  # the points for a wrong time_call or summarise are lost there
        else:
            _hold_calls(device, sizes, calls)
        slow = {3: 1 + 2 / 3, 5: 9 / 5}[calls - 1]  # of the timed calls, one or two take three times as long
        expect.close(got, right, '"seconds" of batch_cost',
                     {"the mean in place of the median": slow * right, "the time for one image": right / size,
                      "a clock that does not wait for the device (pass synchronize on)": 0.1 * right}, 1e-6, 1e-6)  # fmt: skip
        expect.close(each, right / size, '"seconds_per_image"',
                     {"the time for the whole batch": right, "images a second": size / right, "seconds times images": right * size}, 1e-6, 1e-6)  # fmt: skip


def _hold_calls(device, sizes, calls: int):
    for size in sizes:
        if device.asked.count(size) < calls:
            expect.fail(
                f"repeats = {calls - 1} and a warm-up make {calls} calls for each size; work({size}) was called "
                f"{device.asked.count(size)} times."
            )
