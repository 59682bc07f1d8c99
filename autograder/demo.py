"""`make demo`: an example class of seven, graded with nbgrader's own commands in a course folder of its own."""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from autograder.notebooks import COURSE, grade_id, is_graded, release_path
from autograder.submission.sandbox import choose

LAB = "lab05_sampling"


def _edit(exercise: str, old: str, new: str) -> Callable[[NotebookNode, NotebookNode], NotebookNode]:
    """The solution with one change in one exercise."""

    def edit(solution: NotebookNode, _release: NotebookNode) -> NotebookNode:
        (cell,) = (c for c in solution.cells if grade_id(c) == f"{exercise}-code")
        if old not in cell.source:
            raise ValueError(f"the example mistake in {exercise} no longer fits the solution")
        cell.source = cell.source.replace(old, new, 1)
        return solution

    return edit


def _half_done(solution: NotebookNode, release: NotebookNode) -> NotebookNode:
    """Everything up to the DDPM sampler; Part 3 and what follows untouched."""
    stubs = {grade_id(c): c.source for c in release.cells}
    part3 = next(i for i, cell in enumerate(solution.cells) if grade_id(cell) == "part3")
    for cell in solution.cells[part3:]:
        if (grade_id(cell) or "").endswith("-code"):
            cell.source = stubs[grade_id(cell)]
    return solution


CLASS: dict[str, tuple[str, Callable[[NotebookNode, NotebookNode], NotebookNode]]] = {
    "amira": ("everything right", lambda solution, _: solution),
    "boris": ("handed in untouched", lambda _, release: release),
    "chen": ("did Parts 1 and 2", _half_done),
    "dara": (
        "ᾱ_t where α_t belongs",
        _edit("ddpm_posterior_mean", "/ alpha.sqrt()", "/ alpha_bar.sqrt()"),
    ),
    "emeka": (
        "alphas_cumprod[-1] for clean data",
        _edit("ddim_step", "self.schedule.alpha_bar(s)", "self.schedule.alphas_cumprod[s]"),
    ),
    "freya": (
        "forgot −σ² under the root",
        _edit("ddim_step", "(1 - a_s - variance)", "(1 - a_s)"),
    ),
    "goran": (
        "an endless loop",
        _edit("ddpm_sample", "    trajectory = [x_T.clone()]", "    while True:\n        pass\n    trajectory = []"),
    ),
}


def main(folder: Path = COURSE / "demo") -> None:
    """Build the class in `folder`, grade it, print the class table and where to look."""
    shutil.rmtree(folder, ignore_errors=True)
    set_up(folder)
    sandbox = choose()
    print(f"Sandbox: {sandbox.level} ({sandbox.note})")
    _step(folder, "generate_assignment", LAB)
    hand_in(folder)
    _step(folder, "autograde", LAB, "--TrustedGrading.check_seconds=10")
    _step(folder, "generate_feedback", LAB)
    _step(folder, "export")
    _print_table(folder)


def set_up(folder: Path) -> None:
    """A course folder for nbgrader: its configuration, and the solution that the release is made from."""
    source = folder / "solutions" / LAB
    source.mkdir(parents=True)
    shutil.copy(COURSE / "nbgrader_config.py", folder)
    shutil.copy(COURSE / "solutions" / LAB / f"{LAB}.ipynb", source)


def hand_in(folder: Path, students: Iterable[str] = CLASS) -> None:
    """What the class, or these of it, hand in, under submitted/."""
    for student in students:
        _, edit = CLASS[student]
        solution = nbformat.read(COURSE / "solutions" / LAB / f"{LAB}.ipynb", as_version=4)
        submission = edit(solution, nbformat.read(release_path(LAB), as_version=4))
        for cell in submission.cells:
            cell.source = re.sub(r" *### (BEGIN|END) SOLUTION\n?", "", cell.source)
        target = folder / "submitted" / student / LAB / f"{LAB}.ipynb"
        target.parent.mkdir(parents=True)
        nbformat.write(submission, target)


def nbgrader(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run an nbgrader command in a course folder."""
    # nbgrader starts helpers by name, so the environment's own programs must come first on the path.
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = [sys.executable, "-m", "nbgrader", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def _step(folder: Path, *arguments: str) -> None:
    print(f"$ nbgrader {' '.join(arguments)}", flush=True)
    run = nbgrader(folder, *arguments)
    if run.returncode:
        raise RuntimeError(f"nbgrader {arguments[0]} failed:\n{run.stderr[-3000:]}")


def _print_table(folder: Path) -> None:
    with open(folder / "grades.csv", newline="", encoding="utf-8") as file:
        scores = {row["student_id"]: float(row["score"]) for row in csv.DictReader(file)}
    print(f"\n{'student':<8} {'points':>6}  {'what was planted':<34} what the feedback says first")
    for student, (planted, _) in CLASS.items():
        autograded = nbformat.read(folder / "autograded" / student / LAB / f"{LAB}.ipynb", as_version=4)
        verdicts = [c.outputs[0] for c in autograded.cells if is_graded(c)]
        wrong = [v for v in verdicts if v.output_type == "error"]
        missed = [v for v in wrong if v.ename != "To do"] or wrong
        hint = missed[0].evalue if missed else "(all checks passed)"
        print(f"{student:<8} {scores[student]:>6.0f}  {planted:<34} {hint[:110]}")
    print(
        f"\nScores are automatic points; the written analysis waits for a person in formgrader."
        f"\n  grades     {folder / 'grades.csv'}"
        f"\n  feedback   {folder / 'feedback'}/<student>/{LAB}/{LAB}.html"
        f"\n  gradebook  cd {folder.name} && nbgrader formgrader, in JupyterLab"
    )


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as error:
        sys.exit(f"demo: {error}")
