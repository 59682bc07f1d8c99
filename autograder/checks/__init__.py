"""The checks that grade, as pytest tests: students have these very files, and nothing here needs to be secret.

A check asks a submission questions with fresh random inputs and holds the answers against closed forms, in float64,
starting from the stored float32 schedule. It holds to the contract in the student notebook and to distributions, never
to the order of random draws or to how something is written. When it fails it says why, and if it can, names the
mistake: `expect.close` compares the answer with what common misconceptions would give.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

__all__ = ["CheckFailed", "Graded", "NotYet", "graded"]


class CheckFailed(AssertionError):
    """A check's verdict against a submission; the message is the hint the student reads."""


class NotYet(CheckFailed):
    """There is not enough to judge yet; the message says what is still to be written."""


class Graded(NamedTuple):
    """What `@graded` remembers of a check."""

    name: str  # the grade_id of its cell in the notebook
    points: int
    section: str  # the row of the lab's table of points it belongs to
    title: str


def graded(points: int, section: str) -> Callable[[Callable], Callable]:
    """Mark a pytest function `test_<grade_id>` as a graded check; the first line of its docstring is its title."""

    def mark(function: Callable) -> Callable:
        title = (function.__doc__ or "").strip().splitlines()[0]
        function.graded = Graded(function.__name__.removeprefix("test_"), points, section, title)
        return function

    return mark
