"""nbgrader's two stages of autograding, with the verdict taken from the trusted grader. See `nbgrader_config.py`."""

from __future__ import annotations

import contextlib
from html import escape
from pathlib import Path

import nbformat
from nbconvert.exporters import NotebookExporter
from nbconvert.exporters.exporter import ResourcesDict
from nbformat import NotebookNode
from nbgrader.preprocessors import NbGraderPreprocessor
from traitlets import Enum, Float

from autograder import notebooks
from autograder.grading import grade_notebook
from autograder.submission.process import Limits, WorkerProcess
from autograder.submission.sandbox import LEVELS, choose

__all__ = ["NotebookHygiene", "SubmissionExporter", "TrustedGrading"]


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

    def preprocess(self, nb, resources):
        """Grade the notebook; nbgrader reads the scores off the outputs of the graded cells."""
        sandbox = choose(self.sandbox)
        if sandbox.note:
            self.log.warning("Sandbox %s: %s", sandbox.level, sandbox.note)
        limits = Limits(cell=self.cell_seconds, check=self.check_seconds)
        with WorkerProcess(sandbox, limits) as worker:
            report, graded = grade_notebook(nb, resources["nbgrader"]["assignment"], worker)
        self.log.info("%g of %g automatic points", report.score, report.max_score)
        for note in report.notes:
            self.log.warning("%s", note)
        return graded, resources
