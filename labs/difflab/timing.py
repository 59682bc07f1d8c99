"""Timing that can be believed: warm-up, device synchronisation, repeats, spread; and counting network calls."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

__all__ = ["CallCounter", "Timing", "count_calls", "measure", "synchronize"]


class Timing(NamedTuple):
    """Repeated measurements of one piece of work."""

    seconds: list[float]

    @property
    def median(self) -> float:
        """Median of the repeats, in seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Largest minus smallest repeat, in seconds."""
        return max(self.seconds) - min(self.seconds)

    def __str__(self) -> str:
        return f"{self.median:.4g} s (spread {self.spread:.2g} s over {len(self.seconds)} runs)"


def synchronize(device: str | torch.device = "cpu") -> None:
    """Wait until the device has finished: GPU kernels run after the call that started them has returned."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def measure(
    work: Callable[[], Any],
    repeats: int = 5,
    warmup: int = 1,
    device: str | torch.device = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> Timing:
    """Time `work()` after warm-up, waiting for the device before the clock is read.

    Raises:
        ValueError: for fewer than one repeat or a negative warm-up.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats must be at least 1 and warmup at least 0, got {repeats} and {warmup}")
    for _ in range(warmup):
        work()
    seconds = []
    for _ in range(repeats):
        synchronize(device)
        start = clock()
        work()
        synchronize(device)
        seconds.append(clock() - start)
    return Timing(seconds)


class CallCounter:
    """How often a network was called, and for how many images in all."""

    def __init__(self) -> None:
        self.calls = 0
        self.images = 0


@contextmanager
def count_calls(model: nn.Module) -> Iterator[CallCounter]:
    """Count the calls of `model` inside the block:  `with count_calls(model) as counter: ...; counter.calls`."""
    counter = CallCounter()

    def hook(_module: nn.Module, args: tuple, keywords: dict[str, Any]) -> None:
        counter.calls += 1
        counter.images += len((*args, *keywords.values())[0])

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield counter
    finally:
        handle.remove()
