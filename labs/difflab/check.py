"""`check("ddpm_posterior_mean")` in a notebook: the very checks that grade, run on the spot."""

from __future__ import annotations

import contextlib
import inspect
import keyword
import linecache
import os
import sys
from collections.abc import Iterator
from typing import Any

__all__ = ["CheckNotPassed", "check"]


class CheckNotPassed(AssertionError):
    """A check that did not pass. Jupyter shows its message alone, without a traceback."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


def check(name: str) -> None:
    """Run one check on the classes of this notebook.

    Prints a green line when it passes. Otherwise the cell stops with a hint: what was wrong, what was expected, and
    if it can be told, the likely cause.

    Args:
        name: the check's name, as in the cell below the exercise.

    Raises:
        CheckNotPassed: if it does not pass.
        ValueError: if there is no check of that name.
    """
    if os.environ.get("DIFFLAB_GRADING"):
        return  # the grader asks the same check from outside
    try:
        from autograder.checks.runner import lab_of_check, run_checks
        from autograder.submission.client import Submission
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}; install the course with: pip install -e . (in its folder)") from None

    namespace: dict[str, Any] = sys._getframe(1).f_globals

    @contextlib.contextmanager
    def open_submission() -> Iterator[Submission]:
        yield Submission.local(namespace, _cell_of_file)

    (result,) = run_checks(lab_of_check(name), open_submission, [name], sources=_sources(namespace))
    if result.status != "passed":
        mark = {"todo": "○", "missing": "○"}.get(result.status, "✗")
        raise CheckNotPassed(_coloured(f"{mark} {name}: {result.hint}", "33" if mark == "○" else "31"))
    points = f": {result.max_points:g} points" if result.max_points else ""
    print(_coloured(f"✓ {name}{points}", "32"))


def _sources(namespace: dict[str, Any]) -> list[str]:
    """The cells that defined what the namespace holds, behind a line for each name, so that none seems undefined."""
    names = "\n".join(f"{name} = None" for name in namespace if name.isidentifier() and not keyword.iskeyword(name))
    functions = [value for value in namespace.values() if callable(value)]
    functions += [item for cls in functions if isinstance(cls, type) for item in list(vars(cls).values())]
    files = {}  # in order, each once
    for function in functions:
        code = getattr(inspect.unwrap(function) if callable(function) else None, "__code__", None)
        if code is not None and _cell_of_file(code.co_filename):
            files[code.co_filename] = "".join(linecache.getlines(code.co_filename))
    return [names, *files.values()]


def _coloured(text: str, colour: str) -> str:
    return f"\x1b[{colour}m{text}\x1b[0m"


def _cell_of_file(file_name: str) -> str | None:
    """Code typed in a notebook: ipykernel gives every cell a file of its own in a temporary folder."""
    return "your cell" if "ipykernel_" in file_name or file_name.startswith("<ipython-input") else None
