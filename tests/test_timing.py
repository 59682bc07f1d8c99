"""Is only the work timed, and is every network call counted? A fake clock: no test here depends on the machine."""

import pytest
import torch

from difflab import timing
from difflab.timing import Timing, count_calls, measure


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
    assert events == ["work"] + 2 * ["sync cuda", "clock", "work", "sync cuda", "clock"]


@pytest.mark.parametrize(("repeats", "warmup"), [(0, 1), (1, -1)])
def test_impossible_counts_are_refused(repeats, warmup):
    with pytest.raises(ValueError, match=f"at least 0, got {repeats} and {warmup}"):
        measure(lambda: None, repeats=repeats, warmup=warmup)


def test_median_of_an_even_number_lies_between():
    assert Timing([1.0, 2.0, 4.0, 8.0]).median == 3.0


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
