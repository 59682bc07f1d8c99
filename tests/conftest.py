"""Shared by the project's tests: the course folder, and submissions made from a lab's script."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import nbformat
import pytest
import torch
from nbformat import NotebookNode

from autograder.authoring import solution_notebook
from autograder.checks.runner import run_checks
from autograder.notebooks import to_run
from autograder.report import CheckResult
from autograder.submission.client import Submission

torch.set_num_threads(1)  # small tensors: more threads only get in each other's way

COURSE = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def course() -> Path:
    """The repository's root."""
    return COURSE


@functools.cache
def _solution(lab: str) -> str:
    return nbformat.writes(solution_notebook(COURSE / "solutions" / f"{lab}.py"))


@pytest.fixture(scope="session")
def solution() -> Callable[[str], NotebookNode]:
    """solution("lab05_sampling"): a fresh copy of the solution notebook, without outputs."""
    return lambda lab: nbformat.reads(_solution(lab), as_version=4)


@pytest.fixture(scope="session")
def student(course) -> Callable[[str], NotebookNode]:
    """student("lab05_sampling"): a fresh copy of the notebook students receive."""
    return lambda lab: nbformat.read(course / "labs" / lab / f"{lab}.ipynb", as_version=4)


@pytest.fixture(scope="session")
def check_here() -> Callable[..., dict[str, CheckResult]]:
    """check_here(notebook, lab, seed): run its cells in this process, then the lab's checks (all, or those of `names`);
    results by name.

    The seed fixes both sides' random numbers, so that a red test is red again; `make soak` tries others.
    """

    def check(
        notebook: NotebookNode, lab: str, seed: int = 0, names: Collection[str] | None = None
    ) -> dict[str, CheckResult]:
        torch.manual_seed(seed)
        namespace: dict = {"__name__": "__main__"}  # as in a kernel
        cells = to_run(notebook)
        for _, label, source in cells:
            exec(compile(source, label, "exec"), namespace)

        @contextlib.contextmanager
        def open_submission() -> Iterator[Submission]:
            yield Submission.local(namespace)

        results = run_checks(lab, open_submission, names, seed, sources=[source for *_, source in cells])
        return {result.name: result for result in results}

    return check


def pytest_terminal_summary(terminalreporter) -> None:
    """Say at which levels of the sandbox the attacks were tried, and why the browser was not, if it was not."""
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if "tests/browser/" in report.nodeid]
    for reason in sorted({report.longrepr[2] for report in skipped}):
        terminalreporter.write_line(f"{reason} ({len(skipped)} tests)")
    tried: dict[str, list[int]] = {}
    for number, kind in enumerate(("passed", "failed")):
        for report in terminalreporter.stats.get(kind, []):
            found = re.search(r"test_attack_gains_nothing\[([\w ]+)-", report.nodeid)
            if found and report.when == "call":
                tried.setdefault(found[1], [0, 0])[number] += 1
    for level, (stopped, not_stopped) in sorted(tried.items()):
        terminalreporter.write_line(f"sandbox {level}: {stopped} attacks stopped, {not_stopped} not")
