"""Parts 1 and 2: the order of measurements, the harness, the summary, the protocol."""

import statistics
from collections import Counter
from itertools import permutations

import torch

from autograder.checks import expect, graded
from autograder.checks.lab06.devices import SLOW_START, Device, between, hold_record


def _seed(rng) -> int:
    # small: some add to it or multiply it, and NumPy's old generators take no more than 32 bits
    return int(torch.randint(2**20, (), generator=rng))


def _orders(value, runs: int, what: str) -> list:
    """What run_order returned, with lists of numbers where there were tensors."""
    return [
        order.tolist() if isinstance(order, torch.Tensor) else _plain(order)
        for order in expect.tensors(value.tolist() if isinstance(value, torch.Tensor) else value, what, runs)
    ]


def _hold_orders(value, step_counts, runs: int, what: str) -> list[list[int]]:
    orders = _orders(value, runs, what)
    for order in orders:
        if not isinstance(order, list):
            expect.fail(f"{what} should be a list of {runs} lists, one for each run; got {order!r:.60} among them.")
        if any(isinstance(n, (list, str, dict)) or n is None for n in order) or sorted(order) != sorted(step_counts):
            expect.fail(
                f"every run should hold every step count once, here {sorted(step_counts)}; one holds {order!r:.80}."
            )
    return orders


def _plain(order):
    """A list of numbers for a list of 0-dimensional tensors."""
    if not isinstance(order, list):
        return order
    return [n.item() if isinstance(n, torch.Tensor) and n.numel() == 1 else n for n in order]


@graded(points=4, section="Design")
def test_run_order(submission, rng):
    """`run_order` holds every step count once in each run, each shuffled on its own, repeatable by its seed."""
    counts = (torch.randperm(90, generator=rng)[:3] + 5).tolist()
    _hold_orders(submission.run_order([10, 50, 100, 7, 3], 4, 1), [10, 50, 100, 7, 3], 4, "run_order")
    seeds = [_seed(rng) for _ in range(300)]
    drawn = [_hold_orders(submission.run_order(counts, 2, seed), counts, 2, "run_order with 2 runs") for seed in seeds]
    for seed, orders in zip(seeds[:5], drawn):
        if _hold_orders(submission.run_order(counts, 2, seed), counts, 2, "run_order with 2 runs") != orders:
            expect.fail(
                "equal seeds should give equal orders; draw from a generator made of `seed`, as random.Random(seed)."
            )
    orders_of = [Counter(tuple(orders[run]) for orders in drawn) for run in range(2)]
    if any(len(found) == 1 for found in orders_of):
        expect.fail("the order is the same for every seed: is it shuffled, and does `seed` reach the generator?")
    if all(one == two for one, two in drawn):
        expect.fail("all runs have one and the same order; shuffle each run on its own.")
    for found in orders_of:
        # Of 300, 50 are expected of each of the 6 orders, with a standard deviation of 6.5; the tails are skewed.
        if any(abs(found[order] - 50) > 48 for order in permutations(counts)):
            expect.fail("all orders of a run should be equally likely; some come far too often, or never.")
    together = sum(one == two for one, two in drawn)
    if abs(together - 50) > 48:
        expect.fail("the orders of two runs depend on each other; shuffle each run on its own.")


def _slow_at_first(rng, slow_calls: int):
    """Costs of 10 to 50 ms, with the first calls slow."""
    costs = [between(rng, 0.01, 0.05) + SLOW_START / k**2 * (k <= slow_calls) for k in range(1, 60)]
    return lambda _key, count: costs[count - 1]


@graded(points=9, section="Stopwatch")
def test_time_call(submission, rng):
    """`time_call` warms up, waits for the device before each look at the clock, and times every repeat on its own."""
    for repeats, warmup, busy in ((7, 2, 0.0), (4, 1, 0.7), (5, 3, 0.4), (3, 0, 0.9), (1, 1, 0.0)):
        device = Device(rng, _slow_at_first(rng, max(warmup, 1)), busy)
        seconds = submission.time_call(device.work, repeats, warmup, **device.tools)
        _hold_times(seconds, device, repeats, warmup, busy)
    device = Device(rng, _slow_at_first(rng, 1))
    _hold_times(submission.time_call(device.work, **device.tools), device, 5, 1, 0.0)
    for repeats, warmup, what in ((0, 1, "repeats = 0"), (3, -1, "warmup = -1")):
        with expect.raises_value_error(f"time_call with {what}"):
            submission.time_call(device.work, repeats, warmup, **device.tools)


def _hold_times(seconds, device, repeats, warmup, busy):
    what = f"time_call with repeats = {repeats} and warmup = {warmup}"
    if seconds is None:
        expect.fail(f"{what} returns None: is a `return` missing?")
    if not isinstance(seconds, list) and not (isinstance(seconds, torch.Tensor) and seconds.ndim == 1):
        expect.fail(f"{what} should return the seconds of each repeat, a list of {repeats}; got {seconds!r:.60}.")
    if len(device.calls) != warmup + repeats:
        cause = " There was no warm-up." if warmup and len(device.calls) == repeats else ""
        expect.fail(
            f"{what} should call work() {warmup + repeats} times in all; it called it {len(device.calls)} times.{cause}"
        )
    if len(seconds) != repeats:
        expect.fail(f"{what} should return {repeats} times; got {len(seconds)}. (Calls of the warm-up are not timed.)")
    got = torch.stack([expect.tensor(s, f"a time of {what}", ()).double() for s in seconds])
    costs = device.seconds
    right = costs[warmup:]
    # What was queued before the first timed call: earlier work, and the warm-up's.
    queued = busy + 0.9 * costs[:warmup].sum()
    if torch.allclose(got[1:], right[1:], atol=1e-6) and abs(got[0] - right[0]) > 1e-6 and got[0] > right[0]:
        expect.fail(
            f"{what}: the first time holds {got[0] - right[0]:.3g} s of work that the device was given before. Wait for the "
            "device before the clock is started too, not only before it is stopped."
        )
    before = right.clone()
    before[0] += queued
    mistakes = {
        "a clock that does not wait for the device (only the time Python takes to queue the work)": 0.1 * right,
        "no waiting before the clock is stopped, so that work is counted one repeat late": 0.1 * right
        + 0.9 * torch.cat([queued.reshape(1) / 0.9, right[:-1]]),
        "no warm-up (the first calls, which are slow, are counted)": costs[:repeats],
        "the mean of all repeats in place of each": right.mean().expand(repeats),
        "the mean of all calls, the warm-up among them,": costs.mean().expand(repeats),
        "the time since the start in place of each repeat's own": right.cumsum(0),
        "milliseconds": 1000 * right,
        "a clock that is read in the wrong order (stop − start has the wrong sign)": -right,
    }
    expect.close(got, right, what, mistakes, 1e-6, 1e-6)


@graded(points=5, section="Stopwatch")
def test_summarise(submission, rng):
    """`summarise` gives the number of values, their median, quartiles and interquartile range."""
    for n in (9, 6, 3, 2, 1, 20):
        values = (torch.randn(n, generator=rng, dtype=torch.float64).exp() + 0.1).tolist()
        summary = hold_record(submission.summarise(values), ("n", "median", "q1", "q3", "iqr"), "summarise")
        got = {
            key: expect.tensor(summary[key], f'"{key}" of {n} values', ()).double()
            for key in ("n", "median", "q1", "q3", "iqr")
        }
        data = torch.tensor(values, dtype=torch.float64)
        q1, median, q3 = torch.quantile(data, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
        expect.close(got["n"], torch.tensor(float(n)), '"n"', None, 0, 1e-9)
        ordered = data.sort().values
        expect.close(
            got["median"], median, f'"median" of {n} values',
            {"the mean": data.mean(), "the middle of the values as they came, not sorted," : data[n // 2],
             "the upper of the two middle values": ordered[n // 2], "the lower of the two middle values": ordered[(n - 1) // 2],
             "halfway between the smallest and the largest": (ordered[0] + ordered[-1]) / 2},
            1e-6, 1e-9,
        )  # fmt: skip
        for key, right, other in (("q1", q1, q3), ("q3", q3, q1)):
            expect.close(got[key], right, f'"{key}" of {n} values', _quartile_mistakes(ordered, key, other), 1e-6, 1e-9)
        mistakes = {"the range, largest minus smallest,": ordered[-1] - ordered[0], "half the interquartile range": (q3 - q1) / 2,
                    "q1 − q3": q1 - q3}  # fmt: skip
        if n > 1:
            mistakes |= {
                "the standard deviation": data.std(),
                "the standard deviation (over n)": data.std(correction=0),
            }
        # a difference: in float32 it is as uncertain as the values are
        expect.close(got["iqr"], q3 - q1, f'"iqr" of {n} values', mistakes, 1e-6, 1e-6 * data.max())
    with expect.raises_value_error("summarise without any value"):
        submission.summarise([])


def _quartile_mistakes(ordered, key, other) -> dict:
    n, upper = len(ordered), key == "q3"
    values = ordered.tolist()
    mistakes = {"the other quartile": other}
    if n > 1:
        exclusive = statistics.quantiles(values, n=4)[2 if upper else 0]
        half = values[(n + 1) // 2 :] if upper else values[: n // 2]
        mistakes |= {
            "another definition of quartiles (statistics.quantiles needs method='inclusive')": torch.tensor(exclusive),
            "the median of one half (another definition of quartiles)": torch.tensor(statistics.median(half)),
            "no interpolation": ordered[min(n - 1, int(n * (0.75 if upper else 0.25)))],
        }
    return mistakes


@graded(points=8, section="Stopwatch")
def test_run_protocol(submission, rng):
    """`run_protocol` warms up once, measures every step count in every shuffled run, and logs in the order measured."""
    counts = (torch.randperm(90, generator=rng)[:4] + 5).tolist()
    for runs, warmup in ((3, 2), (2, 1)):
        seed = _seed(rng)
        costs = _costs(rng)
        device = Device(rng, costs)
        records = submission.run_protocol(device.work, counts, runs, seed, warmup, **device.tools)
        order = _hold_log(records, device, counts, runs, warmup)
        _hold_order(submission, rng, records, order, counts, runs, seed)
        got = torch.stack(
            [expect.tensor(record["seconds"], '"seconds" of a record', ()).double() for record in records]
        )
        right = device.seconds[warmup:]
        own = _own_times(submission, Device(rng, costs), order, counts[0], warmup)
        if own is not None and expect.is_close(got, own, 1e-6, 1e-6):
            continue  # the points for a wrong time_call are lost there
        mistakes = {
            "a clock that does not wait for the device (pass synchronize on to time_call)": 0.1 * right,
            "the time for one step (divided by num_steps)": right / torch.tensor(order),
            "the time since the start of the series": right.cumsum(0),
            "the mean of all": right.mean().expand(len(right)),
        }
        expect.close(got, right, '"seconds" of the records', mistakes, 1e-6, 1e-6)


def _costs(rng):
    """A fixed part, a part for each step, and a little that differs from call to call; the first calls are slow."""
    fixed, step = between(rng, 0.02, 0.1), between(rng, 0.01, 0.05)
    wobble = torch.rand(200, generator=rng).tolist()
    calls = iter(range(200))
    known: dict = {}

    def cost(num_steps, count):
        number = known.setdefault((num_steps, count), next(calls))
        return fixed + step * num_steps + 0.02 * wobble[number] + SLOW_START * (number == 0)

    return cost


def _hold_log(records, device, counts, runs, warmup) -> list[int]:
    """The records fit the calls that were made; returns the step counts in the order measured."""
    asked, wanted = device.asked, runs * len(counts)
    records = expect.tensors(records, f"run_protocol with {runs} runs of {len(counts)} step counts", wanted)
    for record in records:
        hold_record(record, ("run", "num_steps", "seconds"), "a record")
    if len(asked) == wanted:
        expect.fail("there was no warm-up: the first call is slow, and it was measured.")
    if len(asked) != warmup + wanted:
        expect.fail(
            f"{warmup} call(s) to warm up and {wanted} measurements make {warmup + wanted} calls of generate_images; "
            f"there were {len(asked)}. (Warm up once, before the first measurement, and measure one call each time.)"
        )
    if not all(key in counts for key in asked):
        expect.fail(
            f"generate_images was called with {next(k for k in asked if k not in counts)!r:.40}, which is none of the step counts."
        )
    order = [record["num_steps"] for record in records]
    if order != asked[warmup:]:
        expect.fail("the records should stand in the order in which they were measured, each with its own num_steps.")
    numbers = [record["run"] for record in records]
    right = [run + 1 for run in range(runs) for _ in counts]
    if numbers != right:
        from_zero = " (count runs from 1)" if numbers == [number - 1 for number in right] else ""
        expect.fail(f'"run" should be {right}, run after run; got {numbers!r:.100}{from_zero}.')
    return order


def _hold_order(submission, rng, records, order, counts, runs, seed):
    """Every run holds every count once, shuffled, the same again for the same seed; or it is the student's run_order."""
    own = _own_order(submission, counts, runs, seed)
    if own is not None and [n for run in own for n in run] == order:
        return
    for run in range(runs):
        measured = order[run * len(counts) : (run + 1) * len(counts)]
        if sorted(measured) != sorted(counts):
            expect.fail(f"every run should hold every step count once; run {run + 1} measured {measured}.")

    def again(seed):
        device = Device(rng, _costs(rng))
        submission.run_protocol(device.work, counts, runs, seed, 1, **device.tools)
        return device.asked[1:]

    if own is not None and own == _own_order(submission, counts, runs, seed) and again(seed) != order:
        expect.fail("equal seeds should give equal orders; pass the seed on to run_order.")
    if all(again(_seed(rng)) == order for _ in range(6)):
        expect.fail("the order is the same for every seed; take it from run_order(step_counts, runs, seed).")


def _own_order(submission, counts, runs, seed):
    try:
        orders = _orders(submission.run_order(counts, runs, seed), runs, "")
        return orders if all(isinstance(order, list) for order in orders) else None
    except expect.NOT_WORKING as error:
        if getattr(error, "kind", "") == "NotImplementedError":
            raise
        return None


def _own_times(submission, device, order, first, warmup):
    """What the student's own time_call says of the same measurements."""
    try:
        for _ in range(warmup):
            device.work(first)
        times = [submission.time_call(lambda n=n: device.work(n), 1, 0, **device.tools) for n in order]
        return torch.tensor(
            [float(expect.tensor(expect.tensors(t, "", 1)[0], "", ())) for t in times], dtype=torch.float64
        )
    except expect.NOT_WORKING as error:
        if getattr(error, "kind", "") == "NotImplementedError":
            raise
        return None
