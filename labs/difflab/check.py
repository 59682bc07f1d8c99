"""`check("ddpm_posterior_mean")` in a notebook: the very checks that grade, run on the spot."""

from __future__ import annotations

import contextlib
import inspect
import keyword
import linecache
import os
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

__all__ = ["CheckNotPassed", "check"]

WIDTH = 88  # letters; what a notebook shows beside the file browser of a small laptop


class CheckNotPassed(AssertionError):
    """A check that did not pass. Jupyter shows its message alone, without a traceback."""

    def _render_traceback_(self) -> list[str]:
        # In whole words, because JupyterLab would break lines within them; and not in colours, because it paints the
        # background pink, on which neither yellow nor red can be read.
        title, _, hint = " ".join(str(self).split()).partition(": ")
        text = textwrap.fill(f"{title}: {hint}", WIDTH, subsequent_indent="  ")
        return [text.replace(title, f"\x1b[1m{title}\x1b[0m", 1)]


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
        raise CheckNotPassed(f"{mark} {name}: {result.hint}")
    points = f": {result.max_points:g} points" if result.max_points else ""
    print(f"\x1b[32m✓ {name}{points}\x1b[0m")


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


def _cell_of_file(file_name: str) -> str | None:
    """Code typed in a notebook: ipykernel gives every cell a file of its own in a temporary folder."""
    return "your cell" if "ipykernel_" in file_name or file_name.startswith("<ipython-input") else None


def _shorten_todo() -> None:
    """Let a cell that meets an exercise still to be written say so in one line: Run All is for half-done labs, too."""
    try:
        shell = get_ipython()  # noqa: F821  (IPython defines it)
    except NameError:
        return  # not in a notebook

    def show(shell: Any, kind: type, error: NotImplementedError, traceback: Any, tb_offset: int | None = None) -> None:
        if str(error).startswith("TODO"):
            where = inspect.getinnerframes(traceback)[-1].function
            error._render_traceback_ = lambda: [f"\x1b[1m○ {where}\x1b[0m: {error}"]
        shell.showtraceback((kind, error, traceback))

    shell.set_custom_exc((NotImplementedError,), show)


if not os.environ.get("DIFFLAB_GRADING"):
    _shorten_todo()
