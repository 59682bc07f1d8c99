"""What every lab's accuracy is tested with: its mutants, its alternatives, its solution again and again."""

from __future__ import annotations

import ast
import importlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import nbformat
import torch
from nbformat import NotebookNode

from autograder.checks.runner import checks_of
from autograder.report import CheckResult

__all__ = [
    "EMPTY",
    "LABS",
    "REPEATS",
    "SEED",
    "SLOW",
    "Lab",
    "Mutant",
    "answer_all",
    "checks_at_stake",
    "exercises",
    "failed",
    "mutate",
    "with_alternative",
]

COURSE = Path(__file__).resolve().parents[1]

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


class Lab(NamedTuple):
    """A lab, and what its folder `tests/labNN` holds it to."""

    name: str  # for example lab05_sampling
    mutants: list[Mutant]
    alternatives: list[Path]  # independent solutions

    @classmethod
    def of(cls, folder: Path) -> Lab:
        """The lab of a folder `tests/labNN`."""
        (script,) = (COURSE / "solutions").glob(f"{folder.name}_*.py")
        mutants = importlib.import_module(f"tests.{folder.name}.mutants").MUTANTS
        return cls(script.stem, mutants, sorted((folder / "alternatives").glob("*.py")))


LABS = [Lab.of(path.parent) for path in sorted(COURSE.glob("tests/lab*/mutants.py"))]
SLOW = {"lab07_lightweight", "lab08_encoder_propagation"}  # all checks of a lab take seconds


def checks_at_stake(mutant: Mutant, lab: str) -> list[str] | None:
    """The checks that tell whether a mutant loses what it must: all (None), but of a slow lab outside `make soak` only
    those it must lose and their neighbours, which are likeliest to be built on the same exercise.
    """
    if SEED or lab not in SLOW:
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


def with_alternative(student: NotebookNode, path: Path) -> NotebookNode:
    """The emptied notebook with another solution pasted below."""
    student.cells = [c for c in student.cells if not c.metadata.get("nbgrader", {}).get("solution")]
    for cell in path.read_text(encoding="utf-8").split("\n# %%\n"):
        student.cells.append(nbformat.v4.new_code_cell(cell))
    return student


def exercises(notebook: NotebookNode) -> tuple[list[str], dict[str, list[str]]]:
    """What students write: names of functions, and of methods by class."""
    functions: list[str] = []
    methods: dict[str, list[str]] = {}
    for cell in notebook.cells:
        if cell.cell_type != "code" or not cell.metadata.get("nbgrader", {}).get("solution"):
            continue
        for node in ast.parse(cell.source).body:
            match node:
                case ast.FunctionDef(decorator_list=[ast.Call(ast.Name("add_to_class"), [ast.Name(owner)]), *_]):
                    methods.setdefault(owner, []).append(node.name)
                case ast.FunctionDef():
                    functions.append(node.name)
                case ast.ClassDef():
                    inside = [item.name for item in node.body if isinstance(item, ast.FunctionDef)]
                    methods.setdefault(node.name, []).extend(inside)
    return functions, methods


def answer_all(student: NotebookNode, answer: str) -> NotebookNode:
    """The notebook in which everything that students write gives one of the `EMPTY` answers."""
    functions, methods = exercises(student)
    code = ["from tests.accuracy import EMPTY", f"ANSWER = EMPTY[{answer!r}]"]
    for owner, names in methods.items():
        code.append(f"for _name in {names}: setattr({owner}, _name, ANSWER)")
        if "__init__" in names:
            code.append(f"{owner}.__init__ = lambda self, *args, **kwargs: None")
    code.append(f"for _name in {functions}: globals()[_name] = lambda *args, **kwargs: ANSWER(None, *args, **kwargs)")
    student.cells.append(nbformat.v4.new_code_cell("\n".join(code)))
    return student
