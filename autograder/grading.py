"""One notebook in, one `Report` out."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from autograder import notebooks
from autograder.checks.runner import CheckResult, run_checks
from autograder.notebooks import CannotGrade
from autograder.submission.process import CellResult, Limits, WorkerProcess
from autograder.submission.sandbox import choose

__all__ = ["Report", "grade", "grade_notebook"]


@dataclass
class Report:
    """The verdict on one submission: `score` of `max_score` automatic points; `manual_points` wait for a person."""

    lab: str
    score: float
    max_score: float
    manual_points: float
    checks: list[CheckResult]
    sandbox: str
    device: str
    notes: list[str] = field(default_factory=list)  # cells that failed, limits that struck

    def to_json(self) -> str:
        """The report as a JSON object."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read what `to_json` wrote."""
        fields: dict[str, Any] = json.loads(text)
        fields["checks"] = [CheckResult(**check) for check in fields["checks"]]
        return cls(**fields)


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
        return grade_notebook(notebook, lab, worker, seed)[0]
    with WorkerProcess(choose(sandbox), limits or Limits()) as worker:
        return grade_notebook(notebook, lab, worker, seed)[0]


def grade_notebook(
    notebook: NotebookNode, lab: str, worker: WorkerProcess, seed: int | None = None
) -> tuple[Report, NotebookNode]:
    """Grade a notebook that `notebooks.sanitise` has prepared, in a fresh worker.

    Returns:
        (report, the notebook with the outputs of its cells as the worker ran them, and each graded cell's verdict).
    """
    notebook = nbformat.from_dict(notebook)
    to_run = notebooks.to_run(notebook)
    cells = worker.run_cells([(label, source) for _, label, source in to_run])
    results = run_checks(lab, worker.fork, seed=seed, sources=[source for _, _, source in to_run])
    by_name = {result.name: result for result in results}
    order = [notebooks.grade_id(cell) for cell in notebook.cells if notebooks.is_graded(cell)]
    results.sort(key=lambda result: order.index(result.name) if result.name in order else len(order))
    for (index, _, _), cell in zip(to_run, cells):
        notebook.cells[index]["outputs"] = _outputs(cell)
    for cell in notebook.cells:
        if notebooks.is_graded(cell):
            cell["outputs"] = [_verdict(by_name.get(notebooks.grade_id(cell)))]
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
    return report, notebook


def _is_manual(cell: NotebookNode) -> bool:
    nbgrader = cell.metadata.get("nbgrader", {})
    return bool(nbgrader.get("task")) or bool(nbgrader.get("grade") and nbgrader.get("solution"))


def _note(cell: CellResult) -> str:
    kind, message, where = cell.error
    return f"{where or cell.label}: {kind}: {message.splitlines()[0] if message else ''}"[:300]


def _outputs(cell: CellResult) -> list[NotebookNode]:
    outputs = [nbformat.from_dict(output) for output in cell.outputs]
    if cell.error is not None and not any(o["output_type"] == "error" for o in outputs):
        kind, message, where = cell.error
        outputs.append(_error(kind, f"{message} ({where})" if where else message))
    return outputs


def _verdict(result: CheckResult | None) -> NotebookNode:
    """nbgrader scores a graded cell by its output: an error is 0, anything else the cell's full points."""
    if result is None:
        return _error("NotChecked", "this course has no check of that name")
    if result.status == "passed":
        return nbformat.v4.new_output("stream", name="stdout", text=f"✓ {result.name}: {result.points:g} points\n")
    return _error({"todo": "To do"}.get(result.status, "Not yet"), result.hint)


def _error(kind: str, message: str) -> NotebookNode:
    return nbformat.v4.new_output("error", ename=kind, evalue=message, traceback=[f"✗ {kind}: {message}"])
