"""One notebook in, one `Report` out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from autograder import notebooks
from autograder.checks.runner import run_checks
from autograder.notebooks import CannotGrade
from autograder.report import CheckResult, Graded, Report
from autograder.submission.process import CellResult, Limits, WorkerProcess
from autograder.submission.sandbox import choose

__all__ = ["grade", "grade_notebook"]


def grade(
    path: str | Path,
    lab: str | None = None,
    sandbox: str = "auto",
    limits: Limits | None = None,
    course: Path = notebooks.COURSE,
    seed: int | None = None,
    worker: WorkerProcess | None = None,
) -> Report:
    """Grade a notebook file.

    Args:
        path: the submission.
        lab: name of its lab; found from its graded cells if None.
        sandbox: auto, bwrap, uid or none.
        limits: seconds it may take.
        course: the folder that holds labs/.
        seed: makes the checks' random inputs repeatable.
        worker: one that was started already, in place of `sandbox` and `limits`.

    Raises:
        CannotGrade: if the file is not a notebook of this course.
        RuntimeError: if the sandbox asked for does not work here.
        WorkerFailed: if the worker cannot be started.
    """
    submitted = notebooks.read_notebook(path)
    lab = lab or notebooks.find_lab(submitted, course)
    release = nbformat.read(notebooks.release_path(lab, course), as_version=4)
    if not any(notebooks.is_graded(cell) for cell in release.cells):
        raise CannotGrade(f"{lab} has no graded cells yet")
    notebook = notebooks.sanitise(submitted, release)
    if worker is not None:
        return grade_notebook(notebook, lab, worker, seed).report
    with WorkerProcess(choose(sandbox), limits or Limits()) as worker:
        return grade_notebook(notebook, lab, worker, seed).report


def grade_notebook(notebook: NotebookNode, lab: str, worker: WorkerProcess, seed: int | None = None) -> Graded:
    """Grade a notebook that `notebooks.sanitise` has prepared, in a fresh worker."""
    to_run = notebooks.to_run(notebook)
    cells = worker.run_cells([(label, source) for _, label, source in to_run])
    results = run_checks(lab, worker.fork, seed=seed, sources=[source for _, _, source in to_run])
    by_name = {result.name: result for result in results}
    order = [notebooks.grade_id(cell) for cell in notebook.cells if notebooks.is_graded(cell)]
    results.sort(key=lambda result: order.index(result.name) if result.name in order else len(order))
    ran = {index: _outputs(cell) for (index, _, _), cell in zip(to_run, cells)}
    outputs = [
        [_verdict(by_name.get(notebooks.grade_id(cell)))] if notebooks.is_graded(cell) else ran.get(index)
        for index, cell in enumerate(notebook.cells)
    ]
    manual = sum(float(c.metadata["nbgrader"]["points"]) for c in notebook.cells if _is_manual(c))
    report = Report(
        lab=lab,
        score=sum(r.points for r in results),
        max_score=sum(r.max_points for r in results),
        manual_points=manual,
        checks=results,
        sandbox=worker.sandbox.level,
        device="cpu",
        notes=[_note(cell) for cell in cells if cell.error is not None and not cell.error[1].startswith("TODO")]
        + worker.struck,
    )
    stopped = any(cell.error is not None and cell.error[0] in ("TimeoutError", "NotRun") for cell in cells)
    by_time = stopped or worker.struck or any(r.status in ("timeout", "error") for r in results)
    return Graded(report, outputs, is_repeatable=not by_time)


def _is_manual(cell: NotebookNode) -> bool:
    nbgrader = cell.metadata.get("nbgrader", {})
    return bool(nbgrader.get("task")) or bool(nbgrader.get("grade") and nbgrader.get("solution"))


def _note(cell: CellResult) -> str:
    kind, message, where = cell.error
    return f"{where or cell.label}: {kind}: {message.splitlines()[0] if message else ''}"[:300]


def _outputs(cell: CellResult) -> list[dict[str, Any]]:
    outputs = list(cell.outputs)
    if cell.error is not None and not any(o["output_type"] == "error" for o in outputs):
        kind, message, where = cell.error
        outputs.append(_error(kind, f"{message} ({where})" if where else message))
    return outputs


def _verdict(result: CheckResult | None) -> dict[str, Any]:
    """nbgrader scores a graded cell by its output: an error is 0, anything else the cell's full points."""
    if result is None:
        return _error("NotChecked", "this course has no check of that name")
    if result.status == "passed":
        return {"output_type": "stream", "name": "stdout", "text": f"✓ {result.name}: {result.points:g} points\n"}
    return _error({"todo": "To do"}.get(result.status, "Not yet"), result.hint)


def _error(kind: str, message: str) -> dict[str, Any]:
    return {"output_type": "error", "ename": kind, "evalue": message, "traceback": [f"✗ {kind}: {message}"]}
