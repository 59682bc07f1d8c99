"""The page a student gets back: what is missing and why before what is done, and then the notebook as it was run."""

from __future__ import annotations

import functools
from pathlib import Path

from nbconvert.exporters import HTMLExporter
from nbconvert.exporters.exporter import ResourcesDict
from nbformat import NotebookNode
from traitlets.config import Config

from autograder import notebooks
from autograder.report import Graded

__all__ = ["FeedbackExporter", "feedback_page"]


class FeedbackExporter(HTMLExporter):
    """Writes that page, for nbgrader from the gradebook's marks in the cells' metadata."""

    @property
    def default_config(self):
        """nbgrader configures every HTMLExporter for its own page; this class's section goes before that."""
        folder = str(Path(__file__).parent / "templates")
        config = Config({"FeedbackExporter": {"template_name": "feedback", "extra_template_basedirs": [folder]}})
        config.merge(super().default_config)
        return config


@functools.cache
def _exporter() -> FeedbackExporter:
    return FeedbackExporter()


def feedback_page(notebook: NotebookNode, graded: Graded, student: str) -> str:
    """The page for a notebook without a gradebook: as HTML, automatic points only.

    Args:
        notebook: as it was graded.
        graded: what came of it.
        student: whom it is for.
    """
    notebook = graded.apply(notebook)
    points = {check.name: check.points for check in graded.report.checks}
    for cell in notebook.cells:
        marks = cell.metadata.get("nbgrader")
        if marks and (marks.get("grade") or marks.get("task")):
            marks.update(score=points.get(notebooks.grade_id(cell), 0), waiting=bool(marks.get("task")))
    resources = ResourcesDict(
        nbgrader={
            "notebook": graded.report.lab,
            "student": student,
            "score": graded.report.score,
            "max_score": graded.report.max_score + graded.report.manual_points,
            "late_penalty": 0,
            "waiting_points": graded.report.manual_points,
        }
    )
    return _exporter().from_notebook_node(notebook, resources)[0]
