"""Is only the work timed, and is every network call counted? A fake clock: no test here depends on the machine."""

import pytest
import torch

from difflab import timing
from difflab.timing import Timing, count_calls, measure, measure_in_turns, peak_memory


class _Network(torch.nn.Module):
    def forward(self, x, t):
        return x + t[:, None]


def _call(network: torch.nn.Module, images: int) -> None:
    network(torch.zeros(images, 3), torch.zeros(images))


# -- measure ----------------------------------------------------------------------------------------------------


def test_warmup_is_not_timed():
    now, costs = [0.0], iter([100.0, 50.0, 1.0, 4.0, 2.0])

    def work():
        now[0] += next(costs)

    result = measure(work, repeats=3, warmup=2, clock=lambda: now[0])
    assert result.seconds == [1.0, 4.0, 2.0]
    assert (result.median, result.spread) == (2.0, 3.0)
    assert str(result) == "2 s (spread 3 s over 3 runs)"


def test_the_device_has_finished_whenever_the_clock_is_read(monkeypatch):
    events = []
    monkeypatch.setattr(timing, "synchronize", lambda device: events.append(f"sync {device}"))

    def clock():
        events.append("clock")
        return 0.0

    measure(lambda: events.append("work"), repeats=2, warmup=1, device="cuda", clock=clock)
    timed = ["sync cuda", "clock", "work", "sync cuda", "clock"]
    assert events == timed[:4] + 2 * timed


@pytest.mark.parametrize(("repeats", "warmup"), [(0, 1), (1, -1)])
def test_impossible_counts_are_refused(repeats, warmup):
    with pytest.raises(ValueError, match=f"at least 0, got {repeats} and {warmup}"):
        measure(lambda: None, repeats=repeats, warmup=warmup)


def test_median_of_an_even_number_lies_between():
    assert Timing([1.0, 2.0, 4.0, 8.0]).median == 3.0


def test_contestants_take_turns_and_warm_up_first():
    order, now = [], [0.0]

    def work(name, seconds):
        def run():
            order.append(name)
            now[0] += seconds * (1 if order.count(name) > 1 else 100)

        return run

    a, b = measure_in_turns([work("a", 1.0), work("b", 3.0)], repeats=2, clock=lambda: now[0])
    assert order == ["a", "b"] * 3
    assert (a.seconds, b.seconds) == ([1.0, 1.0], [3.0, 3.0])


# -- peak_memory ------------------------------------------------------------------------------------------------


def _forget(steps):
    x = torch.zeros(1000)
    for _ in range(steps):
        x = x + 1
    return x


def _keep(steps):
    states = [torch.zeros(1000)]
    for _ in range(steps):
        states.append(states[-1] + 1)
    return states


@pytest.mark.parametrize(("work", "tensors"), [(_forget, 2), (_keep, 11)])
def test_peak_memory_counts_what_lives_at_once(work, tensors):
    assert peak_memory(lambda: work(10)) == 4000 * tensors


def test_views_and_work_in_place_take_no_memory():
    x = torch.zeros(1000)
    assert peak_memory(lambda: x.view(10, 100).mul_(2)[3]) == 0


# -- count_calls ------------------------------------------------------------------------------------------------


def test_calls_and_images_are_counted_inside_the_block_only():
    network = _Network()
    _call(network, 7)
    with count_calls(network) as counter:
        assert (counter.calls, counter.images) == (0, 0)
        _call(network, 2)
        _call(network, 5)
    _call(network, 7)
    assert (counter.calls, counter.images) == (2, 7)


def test_calls_by_keyword_are_counted():
    network = _Network()
    with count_calls(network) as counter:
        network(t=torch.zeros(4), x=torch.zeros(4, 3))
    assert (counter.calls, counter.images) == (1, 4)


def test_blocks_can_be_nested():
    network = _Network()
    with count_calls(network) as outer:
        _call(network, 1)
        with count_calls(network) as inner:
            _call(network, 1)
    assert (outer.calls, inner.calls) == (2, 1)


def test_hook_is_removed_after_an_exception():
    network = _Network()
    with pytest.raises(RuntimeError, match="inside"), count_calls(network) as counter:
        _call(network, 1)
        raise RuntimeError("inside")
    _call(network, 1)
    assert counter.calls == 1
    assert len(network._forward_pre_hooks) == 0
