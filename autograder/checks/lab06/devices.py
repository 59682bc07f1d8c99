"""A device and a clock whose every second is known: what it is given is queued, and passes only when waited for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from autograder.checks import expect

__all__ = ["Device", "between", "hold_record", "own_medians"]

SLOW_START = 3.0  # seconds that a first call takes on top


def between(rng: torch.Generator, low: float, high: float) -> float:
    """A number drawn uniformly from [low, high]."""
    return low + (high - low) * torch.rand((), generator=rng).item()


class Device:
    """Plays a device that works on after a call has returned.

    Args:
        rng: where its clock starts.
        cost: (key, count) -> seconds of the count-th call, from 1, with this key.
        busy: seconds of earlier work that it still has to do.

    Attributes:
        calls: (key, seconds, of which Python waits) of each call.
    """

    def __init__(self, rng: torch.Generator, cost: Callable[[Any, int], float], busy: float = 0.0):
        self.cost, self.now, self.queued = cost, between(rng, 10, 1000), busy
        self.calls: list[tuple[Any, float, float]] = []

    def work(self, key: Any = None) -> None:
        """A tenth of the cost is Python's own; the rest is queued."""
        seconds = self.cost(key, 1 + sum(known == key for known, _, _ in self.calls))
        self.calls.append((key, seconds, 0.1 * seconds))
        self.now += 0.1 * seconds
        self.queued += 0.9 * seconds

    def synchronize(self) -> None:
        """Wait for what is queued."""
        self.now, self.queued = self.now + self.queued, 0.0

    def clock(self) -> float:
        """The time."""
        return self.now

    @property
    def tools(self) -> dict[str, Callable]:
        """The keywords of every function that measures."""
        return {"clock": self.clock, "synchronize": self.synchronize}

    @property
    def seconds(self) -> torch.Tensor:
        """What each call took."""
        return torch.tensor([seconds for _, seconds, _ in self.calls], dtype=torch.float64)

    @property
    def asked(self) -> list:
        """The key of each call."""
        return [key for key, _, _ in self.calls]


def hold_record(value: Any, keys: tuple[str, ...], what: str) -> dict:
    """The value as a dict with at least these keys.

    Raises:
        CheckFailed: otherwise.
    """
    if not isinstance(value, dict) or any(key not in value for key in keys):
        got = (
            "None: is a `return` missing?"
            if value is None
            else list(value)
            if isinstance(value, dict)
            else type(value).__name__
        )
        expect.fail(f"{what} should be a dict with {', '.join(keys)}; got {got}.")
    return value


def own_medians(submission, device: Device, keys: list, repeats: int) -> dict | None:
    """key -> what the student's own time_call and summarise make of `device`; None if they do not work.

    Where those two are wrong their points are lost, and what is built on them is held to what they give.
    """
    medians = {}
    try:
        for key in keys:
            seconds = submission.time_call(lambda key=key: device.work(key), repeats, 1, **device.tools)
            summary = hold_record(submission.summarise(seconds), ("median",), "")
            medians[key] = float(expect.tensor(summary["median"], "", ()))
    except expect.NOT_WORKING as error:
        if getattr(error, "kind", "") == "NotImplementedError":
            raise
        return None
    return medians
