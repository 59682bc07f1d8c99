"""nbgrader's two stages of autograding, with the verdict taken from the trusted grader. See `nbgrader_config.py`."""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbgrader.preprocessors import NbGraderPreprocessor
from traitlets import Enum, Float

from autograder import notebooks
from autograder.grading import grade_notebook
from autograder.submission.process import Limits
from autograder.submission.sandbox import LEVELS, choose

__all__ = ["NotebookHygiene", "TrustedGrading"]


class NotebookHygiene(NbGraderPreprocessor):
    """Restores locked cells, puts missing graded cells back, drops everything live from a submission."""

    def preprocess(self, nb, resources):
        """Replace the submission by its sanitised form."""
        lab = resources["nbgrader"]["assignment"]
        folder = Path(resources["metadata"]["path"])  # <course>/submitted/<student>/<lab>
        submitted = notebooks.read_notebook(folder / f"{resources['metadata']['name']}.ipynb")
        release = nbformat.read(notebooks.release_path(lab, folder.resolve().parents[2]), as_version=4)
        return notebooks.sanitise(submitted, release), resources


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
        report, graded = grade_notebook(nb, resources["nbgrader"]["assignment"], sandbox, limits)
        self.log.info("%g of %g automatic points", report.score, report.max_score)
        for note in report.notes:
            self.log.warning("%s", note)
        return graded, resources
