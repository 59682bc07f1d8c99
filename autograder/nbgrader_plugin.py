"""nbgrader's stages, with the verdict taken from the trusted grader and told so that it helps: `nbgrader_config.py`."""

from __future__ import annotations

import atexit
import contextlib
import functools
import sqlite3
import sys
from html import escape
from pathlib import Path
from typing import Any

import nbformat
from nbconvert.exporters import NotebookExporter
from nbconvert.exporters.exporter import ResourcesDict
from nbformat import NotebookNode
from nbgrader.preprocessors import GetGrades, NbGraderPreprocessor
from traitlets import Enum, Float, Unicode
from traitlets.config import Application

from autograder import notebooks
from autograder.grading import grade_notebook
from autograder.store import Reports, key_of
from autograder.submission.process import Limits, Workers
from autograder.submission.sandbox import LEVELS, choose

__all__ = ["FeedbackGrades", "NotebookHygiene", "SubmissionExporter", "TrustedGrading", "wait_for_gradebook"]


class SubmissionExporter(NotebookExporter):
    """Reads submissions. One that is no notebook is logged by name and graded as if nothing had been written."""

    def from_filename(self, filename, resources=None, **kw):
        """The notebook in `filename`, or the release with a note on top if that cannot be read."""
        try:
            notebooks.read_notebook(filename)
        except notebooks.CannotGrade as problem:
            self.log.error("%s (graded as untouched)", problem)
            path = Path(filename)
            reason = escape(str(problem).removeprefix(f"{filename}: "))
            stand_in = _release(path.resolve().parent)
            note = nbformat.v4.new_markdown_cell(f"**The submitted file could not be graded:** {reason}")
            stand_in.cells.insert(0, note)
            resources = ResourcesDict() if resources is None else resources
            resources["metadata"] = ResourcesDict(name=path.stem, path=str(path.parent))
            return self.from_notebook_node(stand_in, resources, **kw)
        return super().from_filename(filename, resources, **kw)


class NotebookHygiene(NbGraderPreprocessor):
    """Restores locked cells, puts missing graded cells back, drops everything live from a submission."""

    def preprocess(self, nb, resources):
        """Replace the submission by its sanitised form."""
        folder = Path(resources["metadata"]["path"]).resolve()
        with contextlib.suppress(notebooks.CannotGrade):  # else nb is the exporter's stand-in, and clean
            nb = notebooks.read_notebook(folder / f"{resources['metadata']['name']}.ipynb")
        return notebooks.sanitise(nb, _release(folder)), resources


def _release(folder: Path) -> NotebookNode:
    """The release that <course>/submitted/<student>/<lab> answers."""
    return nbformat.read(notebooks.release_path(folder.name, folder.parents[2]), as_version=4)


class TrustedGrading(NbGraderPreprocessor):
    """Runs the submission in a worker of its own and writes the outside verdict into the graded cells."""

    sandbox = Enum(LEVELS, "auto", help="How submissions are kept apart: auto, bwrap, uid or none.").tag(config=True)
    cell_seconds = Float(Limits.cell, help="Seconds a cell may run.").tag(config=True)
    check_seconds = Float(Limits.check, help="Seconds a check may take.").tag(config=True)
    submission_seconds = Float(Limits.submission, help="Seconds for all cells and checks together.").tag(config=True)
    memory_gb = Float(Limits.memory / 2**30, help="Gigabytes a submission may hold.").tag(config=True)
    reports = Unicode("reports", help="Folder of verdicts, read and added to; empty for none.").tag(config=True)

    def preprocess(self, nb, resources):
        """Grade the notebook; nbgrader reads the scores off the outputs of the graded cells."""
        sandbox = choose(self.sandbox)
        if sandbox.level != "bwrap":
            self.log.warning("Sandbox %s: %s", sandbox.level, sandbox.note)
        limits = Limits(
            cell=self.cell_seconds, check=self.check_seconds, submission=self.submission_seconds,
            memory=int(self.memory_gb * 2**30),
        )  # fmt: skip
        lab, student = (resources["nbgrader"][key] for key in ("assignment", "student"))
        course = Path(resources["metadata"]["path"]).resolve().parents[2]
        reports = Reports(course / self.reports) if self.reports else None
        key = key_of(nb, lab, sandbox.level, limits)
        graded = reports.find(key, lab, student) if reports else None
        if graded is None:
            with _workers().start(sandbox, limits) as worker:
                graded = grade_notebook(nb, lab, worker)
            if reports:
                reports.keep(key, graded)
        self.log.info("%g of %g automatic points", graded.report.score, graded.report.max_score)
        for note in graded.report.notes:
            self.log.warning("%s", note)
        return graded.apply(nb), resources


@functools.cache
def _workers() -> Workers:
    """For all submissions of one run of nbgrader."""
    workers = Workers()
    atexit.register(workers.close)
    return workers


def wait_for_gradebook(**_: Any) -> None:
    """Before each submission: wait while another program writes the gradebook, and stop with one line if it stays so.

    nbgrader itself would show a traceback and advise to upgrade the database.
    """
    course = getattr(Application.instance(), "coursedir", None)
    if course is not None:  # else this is formgrader, within the Jupyter server, which is not to be stopped
        wait_until_free(course.db_url, seconds=60)


def wait_until_free(url: str, seconds: float) -> None:
    path = url.removeprefix("sqlite:///")
    if path == url or not Path(path).exists():
        return  # another kind of database, or none yet
    for patience, problem in ((0, "waiting for it"), (seconds, "")):
        try:
            with contextlib.closing(sqlite3.connect(path, timeout=patience, isolation_level=None)) as gradebook:
                gradebook.execute("BEGIN IMMEDIATE")
                return
        except sqlite3.OperationalError as error:
            what = f"the gradebook {path} cannot be written ({error})"
            if problem:
                print(f"{what}: {problem}", file=sys.stderr)
            else:
                sys.exit(f"{what}: close what has it open and run this again; the verdicts so far are kept")


class FeedbackGrades(GetGrades):
    """nbgrader's own, and for tasks whether a person has yet to mark them."""

    def preprocess(self, nb, resources):
        """Write the gradebook's marks and comments into the cells."""
        nb, resources = super().preprocess(nb, resources)
        waiting = [cell.metadata.nbgrader for cell in nb.cells if cell.metadata.get("nbgrader", {}).get("waiting")]
        resources["nbgrader"]["waiting_points"] = sum(task["points"] for task in waiting)
        return nb, resources

    def _get_score(self, cell, resources):
        super()._get_score(cell, resources)
        key = (cell.metadata["nbgrader"]["grade_id"], self.notebook_id, self.assignment_id, self.student_id)
        cell.metadata.nbgrader["waiting"] = bool(self.gradebook.find_grade(*key).needs_manual_grade)
