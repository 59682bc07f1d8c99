"""Timing that can be believed: warm-up, device synchronisation, repeats, spread; and counting network calls."""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

__all__ = ["CallCounter", "Timing", "count_calls", "measure", "measure_in_turns", "peak_memory", "synchronize"]


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
    return measure_in_turns([work], repeats, warmup, device, clock)[0]


def measure_in_turns(
    works: Sequence[Callable[[], Any]],
    repeats: int = 5,
    warmup: int = 1,
    device: str | torch.device = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> list[Timing]:
    """Time several pieces of work side by side: each once, then each again, so that a slow minute slows all.

    Raises:
        ValueError: for fewer than one repeat or a negative warm-up.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats must be at least 1 and warmup at least 0, got {repeats} and {warmup}")
    seconds: list[list[float]] = [[] for _ in works]
    for turn in range(warmup + repeats):
        for work, measured in zip(works, seconds):
            synchronize(device)
            start = clock()
            work()
            synchronize(device)
            if turn >= warmup:
                measured.append(clock() - start)
    return [Timing(measured) for measured in seconds]


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


def peak_memory(work: Callable[[], Any], device: str | torch.device = "cpu") -> int:
    """The most bytes that tensors made by `work()` took at once.

    On CUDA the allocator's own figure. Elsewhere the sizes of all live tensors that PyTorch operations returned,
    without the scratch memory inside an operation.
    """
    device = torch.device(device)
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _LiveTensors() as live:
        work()
    return live.peak


class _LiveTensors(TorchFunctionMode):
    """Adds up the storages of new tensors for as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, weakref.ref] = {}
        self.bytes = self.peak = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        given = {id(tensor.untyped_storage()) for tensor in _tensors((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if id(storage) not in self.known and id(storage) not in given:
                self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        identity, size = id(storage), storage.nbytes()

        def gone(_reference: weakref.ref) -> None:
            self.known.pop(identity, None)
            self.bytes -= size

        self.known[identity] = weakref.ref(storage, gone)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
