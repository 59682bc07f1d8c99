"""What every lab's accuracy is tested with: its mutants, its alternatives, its solution again and again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import nbformat
import torch
from nbformat import NotebookNode

from autograder.checks.runner import checks_of
from autograder.report import CheckResult

__all__ = [
    "EMPTY",
    "REPEATS",
    "SEED",
    "Mutant",
    "alternatives",
    "answer_all",
    "checks_at_stake",
    "failed",
    "mutate",
    "with_alternative",
]

SEED = int(os.environ.get("DIFFLAB_TEST_SEED", "0"))  # `make soak` tries others
REPEATS = int(os.environ.get("DIFFLAB_TEST_REPEATS", "5"))

EMPTY: dict[str, Callable] = {
    "None": lambda self, *args, **kwargs: None,
    "zero": lambda self, *args, **kwargs: 0.0,
    "zeros": lambda self, *args, **kwargs: torch.zeros(
        args[0].shape if isinstance(args[0], torch.Tensor) else args[0] if isinstance(args[0], (list, tuple)) else 4
    ),
    "its first argument": lambda self, *args, **kwargs: args[0],
    "a list": lambda self, *args, **kwargs: [],
    "a string": lambda self, *args, **kwargs: "tensor",
    "NaN": lambda self, *args, **kwargs: torch.full((4,), float("nan")),
}


class Mutant(NamedTuple):
    """`old` becomes `new` in the code of one exercise; `fails` maps the checks that must fail to part of their hint."""

    name: str
    exercise: str
    old: str
    new: str
    fails: dict[str, str]


def checks_at_stake(mutant: Mutant, lab: str) -> list[str] | None:
    """The checks that a mutant must lose and their neighbours, which are likeliest to be built on the same exercise.

    For labs whose checks take seconds; None, for all checks of the lab, in `make soak`.
    """
    if SEED:
        return None
    names = list(checks_of(lab))
    lost = [names.index(name) for name in mutant.fails]
    return [name for k, name in enumerate(names) if any(abs(k - place) <= 1 for place in lost)]


def failed(results: Mapping[str, CheckResult]) -> dict[str, str]:
    """Checks that did not pass, with their hints."""
    return {name: f"[{r.status}] {r.hint}" for name, r in results.items() if r.status != "passed"}


def mutate(notebook: NotebookNode, mutant: Mutant) -> NotebookNode:
    """The notebook with the mutant's mistake."""
    (cell,) = (c for c in notebook.cells if c["id"] == f"{mutant.exercise}-code".replace("_", "-"))
    assert cell.source.count(mutant.old) >= 1, f"{mutant.old!r} is not in the solution of {mutant.exercise}"
    cell.source = cell.source.replace(mutant.old, mutant.new, 1)
    return notebook


def alternatives(test_file: str) -> list[Path]:
    """The independent solutions beside a lab's test."""
    return sorted((Path(test_file).parent / "alternatives").glob("*.py"))


def with_alternative(student: NotebookNode, path: Path) -> NotebookNode:
    """The emptied notebook with another solution pasted below."""
    student.cells = [c for c in student.cells if not c.metadata.get("nbgrader", {}).get("solution")]
    for cell in path.read_text(encoding="utf-8").split("\n# %%\n"):
        student.cells.append(nbformat.v4.new_code_cell(cell))
    return student


def answer_all(
    student: NotebookNode, answer: str, methods: Mapping[str, Iterable[str]], functions: Iterable[str]
) -> NotebookNode:
    """The notebook in which every method and function gives one of the `EMPTY` answers."""
    code = "\n".join(f"for _m in {list(names)}: setattr({cls}, _m, ANSWER)" for cls, names in methods.items())
    code += f"\nfor _f in {list(functions)}: globals()[_f] = lambda *args, **kwargs: ANSWER(None, *args, **kwargs)"
    source = f"from tests.accuracy import EMPTY\nANSWER = EMPTY[{answer!r}]\n{code}"
    student.cells.append(nbformat.v4.new_code_cell(source))
    return student
