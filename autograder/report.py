"""What a verdict is: of one check, of one submission, and with what its cells printed."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from typing import Any

import nbformat
from nbformat import NotebookNode

__all__ = ["CheckResult", "Graded", "Report"]


@dataclass(frozen=True)
class CheckResult:
    """One check's verdict."""

    name: str
    points: float
    max_points: float
    status: str  # passed | todo | failed | missing | timeout | crashed | error (the check itself broke)
    hint: str
    seconds: float


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

    def to_markdown(self) -> str:
        """The report as a table, for a page that shows Markdown: a row for each check, what is missing first."""
        marks = {"passed": "✅", "todo": "⬜", "missing": "⬜"}
        rows = sorted(self.checks, key=lambda check: (check.status == "passed", check.status in marks))
        lines = [
            f"## {self.lab}: {self.score:g} of {self.max_score:g} automatic points",
            "",
            f"{self.manual_points:g} more are given by a person. Sandbox: {self.sandbox}, device: {self.device}.",
            "",
            "| | Check | Points | |",
            "|---|---|---:|---|",
        ]
        for check in rows:
            points = f"{check.points:g} / {check.max_points:g}"
            lines.append(f"| {marks.get(check.status, '❌')} | {check.name} | {points} | {_as_text(check.hint)} |")
        lines += ["", *(f"* {_as_text(note)}" for note in self.notes)] if self.notes else []
        return "\n".join(lines) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read what `to_json` wrote."""
        return cls.from_dict(json.loads(text))

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Report:
        """Read what `dataclasses.asdict` made."""
        return cls(**{**fields, "checks": [CheckResult(**check) for check in fields["checks"]]})


def _as_text(words: str) -> str:
    """Words that a submission may have chosen, as Markdown that shows them and does nothing."""
    return re.sub(r"([\\`*_\[\]<>|~#!&@$:])", lambda sign: f"&#{ord(sign[0])};", " ".join(words.split()))


@dataclass
class Graded:
    """A report, and what the cells printed when they were run for it."""

    report: Report
    outputs: list[list[dict[str, Any]] | None]  # of every cell; None for those that were not run
    is_repeatable: bool  # False if a limit of time or the grader itself had a part in it

    def apply(self, notebook: NotebookNode) -> NotebookNode:
        """A copy of the notebook that was graded, with these outputs, and each graded cell's verdict."""
        notebook = nbformat.from_dict(notebook)
        for cell, outputs in zip(notebook.cells, self.outputs, strict=True):
            if outputs is not None:
                cell["outputs"] = [nbformat.from_dict(output) for output in outputs]
        return notebook

    def to_dict(self) -> dict[str, Any]:
        """As JSON can say it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Graded:
        """Read what `to_dict` wrote."""
        return cls(**{**fields, "report": Report.from_dict(fields["report"])})
