"""Comparisons that teach: each raises `CheckFailed` with what was wrong, what was expected and the likely cause."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from autograder.checks import CheckFailed
from autograder.submission.client import ContractBroken, Missing, StudentError

__all__ = [
    "NOT_WORKING",
    "close",
    "fail",
    "is_close",
    "matches_own_draws",
    "noise",
    "noise_problem",
    "raises_value_error",
    "same",
    "tensor",
    "tensors",
    "trajectory",
    "truth",
]

# A correct submission fails a statistical comparison at most once in a billion: |z| < 6.1 for a normal variable. The
# variance's own distribution is skewed and the kurtosis's has long tails, hence the wider margins below; with 25 000
# numbers they still tell a variance that is off by 7 %, or a correlation of 0.04.
Z = 6.1

# What a call of the student's own code raises when it does not work, and points may be lost for it in another check.
# (An endless loop or a dead process is not among them: that ends the check that met it.)
NOT_WORKING = (CheckFailed, StudentError, ContractBroken, Missing)


def fail(message: str) -> None:
    """Fail the check with a hint."""
    raise CheckFailed(message)


def tensor(value: Any, what: str, shape: tuple[int, ...] | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """The value as a tensor, if it is one (or a number, for shape ()) of that shape and dtype, and finite.

    Raises:
        CheckFailed: otherwise.
    """
    if value is None:
        fail(f"{what} is None: is a `return` missing?")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = torch.tensor(value, dtype=torch.float64)
    if not isinstance(value, Tensor):
        kind = {list: "a list (or tuple)", dict: "a dict", str: "a string"}.get(
            type(value), f"a {type(value).__name__}"
        )
        fail(f"{what} is {kind}; expected a tensor" + (f" of shape {list(shape)}" if shape is not None else ""))
    if shape is not None and tuple(value.shape) != tuple(shape):
        fail(
            f"{what} has shape {list(value.shape)}; expected {list(shape)}."
            + (" A coefficient of shape [B] must be reshaped to [B, 1, 1, 1] before it multiplies images."
               if len(shape) == 4 and value.shape[:2] == (shape[0], shape[0]) else "")
        )  # fmt: skip
    if dtype is not None and value.dtype != dtype:
        fail(f"{what} has dtype {value.dtype}; expected {dtype}")
    if not bool(torch.isfinite(value.double()).all()):
        bad = "NaN" if bool(value.double().isnan().any()) else "infinite values"
        fail(f"{what} contains {bad}: look for a division by zero or the root of a negative number")
    return value


def tensors(value: Any, what: str, count: int) -> list[Any]:
    """The value as a list of `count` items.

    Raises:
        CheckFailed: otherwise.
    """
    if not isinstance(value, list):
        fail(f"{what} should be {count} values; got {'None: is a `return` missing?' if value is None else 'one value'}")
    if len(value) != count:
        fail(f"{what} should be {count} values; got {len(value)}")
    return value


def truth(value: Any, what: str) -> bool:
    """The value as True or False: a bool, or a tensor that holds one.

    Raises:
        CheckFailed: otherwise.
    """
    if isinstance(value, Tensor) and value.dtype == torch.bool and value.numel() == 1:
        value = value.item()
    if not isinstance(value, bool):
        fail(f"{what} should be True or False; got {_briefly(value)}")
    return value


def _briefly(value: Any) -> str:
    return "a tensor" if isinstance(value, Tensor) else repr(value)[:40]


def is_close(actual: Tensor, expected: Tensor, rtol: float, atol: float | Tensor) -> bool:
    """Are all entries within atol + rtol * |expected|?"""
    expected = torch.as_tensor(expected, dtype=torch.float64).broadcast_to(actual.shape)
    return bool(((actual.double() - expected).abs() <= atol + rtol * expected.abs()).all())


def close(
    actual: Tensor,
    expected: Tensor,
    what: str,
    mistakes: Mapping[str, Tensor] | None = None,
    rtol: float = 1e-4,
    atol: float | Tensor = 1e-5,
) -> None:
    """All entries of `actual` are within atol + rtol * |expected| of `expected`.

    Args:
        actual, expected: tensors of one shape (expected may broadcast).
        what: how the hint names the value.
        mistakes: misconception -> the values it would give; the hint names the one that fits best, of equals the first.

    Raises:
        CheckFailed: otherwise.
    """
    expected = torch.as_tensor(expected, dtype=torch.float64).broadcast_to(actual.shape)
    if is_close(actual, expected, rtol, atol):
        return
    error = (actual.double() - expected).abs()
    found, nearest = "", math.inf
    for mistake, values in (mistakes or {}).items():
        values = torch.as_tensor(values, dtype=torch.float64).broadcast_to(actual.shape)
        off = (actual.double() - values).abs().max().item()
        # Looser than for the truth, as a mistake rounds in its own way, but it must be far nearer than the truth is.
        fits = off < 0.2 * error.max().item() and is_close(actual, values, 10 * rtol, 10 * atol)
        if fits and off < 0.1 * nearest:
            found, nearest = mistake, off
    if found:
        fail(f"{what}: these values are what {found} gives.")
    worst = int(error.argmax())
    got, want = actual.double().flatten()[worst].item(), expected.flatten()[worst].item()
    fail(f"{what} is off by up to {error.max().item():.3g}: got {got:.5g} where {want:.5g} was expected.")


def same(actual: Tensor, expected: Tensor, message: str) -> None:
    """The two are equal up to rounding; otherwise fail with `message`."""
    if actual.shape != expected.shape or not is_close(actual, expected.double(), 1e-5, 1e-6):
        fail(message)


def noise_problem(residual: Tensor, seen: Tensor | None = None) -> str | None:
    """Is `residual` [B, ...] standard normal noise, fresh for every image? None, or what is wrong with it.

    Mean, variance and (for noise of another shape than the normal's) kurtosis are held to their sampling error; so are
    the variance of the mean over the batch, which noise shared between images would raise, and the correlation with
    `seen`, the noise the network predicted: a wrong mean leaves some of that in the residual.
    """
    r = residual.double()
    n = r.numel()
    mean, std = r.mean().item(), r.std().item()
    if std == 0:
        return "there is none"
    centred = (r - mean) / std
    per_pixel = centred.mean(0) * math.sqrt(len(r))  # standard normal too, if the images are independent
    excess = (per_pixel.square().mean().item() - 1) / math.sqrt(2 / per_pixel.numel())
    if len(r) > 1 and excess > 3 * Z:
        return "the same noise is added to every image of the batch; draw it with the shape of x"
    if abs(mean) * math.sqrt(n) > Z * max(1.0, std):
        return f"the noise has mean {mean:.3f} standard deviations instead of 0"
    if abs(std**2 - 1) / math.sqrt(2 / n) > Z + 1:
        return f"the noise has {std**2:.3f} times the variance it should have"
    if abs(centred.pow(4).mean().item() - 3) / math.sqrt(24 / n) > Z + 4:
        return "the noise is not normally distributed; use torch.randn"
    if seen is not None:
        other = seen.double() - seen.double().mean()
        if abs((centred * other / other.std()).mean().item()) * math.sqrt(n) > Z:
            return "part of the predicted noise is left in it, so the mean is off"
    return None


def noise(residual: Tensor, what: str) -> None:
    """`residual` is standard normal noise, fresh for every image [B, ...]; at least 20 000 numbers.

    Raises:
        CheckFailed: otherwise.
    """
    problem = noise_problem(residual)
    if problem:
        fail(f"{what}: {problem}.")


def matches_own_draws(x_s: Tensor, draw: Callable[[], Any], x_t: Tensor) -> bool:
    """Could x_s be one more draw of `draw`, a step of the student's own from x_t? A step that does nothing is none.

    False also if the step does not work. Against the mean of n repeats a draw varies by 1 + 1/n of its variance.
    """
    try:
        repeats = torch.stack([tensor(draw(), "", tuple(x_t.shape)).double() for _ in range(24)])
    except NOT_WORKING:
        return False
    mean, variance = repeats.mean(0), repeats.var(0).mean().item()
    if (mean - x_t.double()).abs().max() < 1e-6:
        return False
    deviation = x_s.double() - mean
    if deviation.abs().max() < 1e-5 * mean.abs().max() and mean.abs().max() > 1e4:
        return True  # a wrong step may make numbers so large that its noise is lost in their rounding
    if variance < 1e-12:
        return bool(deviation.abs().max() < 1e-3)
    std = (variance * (1 + 1 / len(repeats))) ** 0.5
    return abs(deviation.square().mean().sqrt().item() / std - 1) < 0.1 and abs(deviation.mean().item()) < 0.1 * std


def trajectory(result: Any, network: Any, x_T: Tensor, what: str) -> tuple[Tensor, list[Tensor]]:
    """(samples, states) of a sampler's (samples, trajectory), held to what the network was shown.

    The trajectory starts with x_T, ends with the samples, and has in between what the network saw: one state more than
    there were network calls. The samples keep the dtype of x_T.
    """
    samples, states = tensors(result, f"{what} with return_trajectory=True", 2)
    shape = tuple(x_T.shape)
    samples = tensor(samples, "the samples", shape, x_T.dtype)
    seen = [x for x, _, _ in network.calls]
    same(seen[0], x_T, f"{what} should start from the x_T it is given.")
    if network.grad_enabled:
        fail(f"{what} should run without gradients: decorate it with @torch.no_grad().")
    if not isinstance(states, list) or len(states) != len(seen) + 1:
        count = len(states) if isinstance(states, list) else "no"
        fail(f"the trajectory should hold {len(seen) + 1} states, x_T and one after each step; it holds {count}.")
    states = [tensor(state, "a state of the trajectory", shape) for state in states]
    same(states[0], x_T, "the trajectory should start with x_T.")
    same(states[-1], samples, "the trajectory should end with the samples that are returned.")
    for k, x in enumerate(seen):
        same(states[k], x, f"state {k} of the trajectory is not what the network was shown in step {k + 1}.")
    return samples, states


@contextlib.contextmanager
def raises_value_error(what: str) -> Iterator[None]:
    """The block makes the submission raise ValueError.

    Raises:
        CheckFailed: if it raises nothing, or another kind of error.
    """
    try:
        yield
    except StudentError as error:
        if error.kind == "ValueError":
            return
        if error.kind == "NotImplementedError":
            raise
        fail(f"{what} should raise a ValueError that says what was expected; it raised {error.kind}: {error.message}")
    fail(f"{what} should raise a ValueError that says what was expected; it was accepted")
