"""Verdicts in the forms others read: a table for the registrar, Gradescope's results.json and autograder zip."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from autograder import notebooks
from autograder.course import Result
from autograder.notebooks import CannotGrade, release_path
from autograder.report import Report

__all__ = ["find_handed_in", "gradescope_results", "gradescope_zip", "grades_csv", "write_gradescope_results"]

FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet would compute instead of show


def grades_csv(results: Iterable[Result]) -> str:
    """A row for each student: points, status, what went wrong; and a column for each check."""
    results = sorted(results, key=lambda result: result.student)
    checks = next((r.report.checks for r in results if r.report), [])
    file = io.StringIO()
    table = csv.writer(file, lineterminator="\n")
    table.writerow(["student", "score", "max_score", "manual_points", "problem", *(check.name for check in checks)])
    for result in results:
        if result.report is None:
            table.writerow([_text(result.student), "", "", "", _text(result.problem), *("" for _ in checks)])
            continue
        points = {check.name: f"{check.points:g}" for check in result.report.checks}
        totals = (result.report.score, result.report.max_score, result.report.manual_points)
        row = [_text(result.student), *(f"{number:g}" for number in totals), _text("; ".join(result.report.notes))]
        table.writerow([*row, *(points.get(check.name, "") for check in checks)])
    return file.getvalue()


def _text(value: str) -> str:
    value = " ".join(value.split())
    return f"'{value}" if value.startswith(FORMULA) else value


# -- Gradescope ----------------------------------------------------------------------------------------------------


def gradescope_results(report: Report | None, problem: str = "") -> dict[str, Any]:
    """The content of results.json: a test for each check, its hint as output.

    Source: https://gradescope-autograders.readthedocs.io/en/latest/specs/
    """
    if report is None:
        return {"score": 0, "output": f"This file could not be graded: {problem}", "tests": [], "visibility": "visible"}
    tests = [
        {
            "name": check.name.replace("_", " "),
            "score": check.points,
            "max_score": check.max_points,
            "status": "passed" if check.status == "passed" else "failed",
            "output": check.hint,
            "visibility": "visible",
        }
        for check in report.checks
    ]
    notes = [f"{report.manual_points:g} more points are given by a person." if report.manual_points else ""]
    notes += report.notes
    return {
        "score": report.score,
        "execution_time": round(sum(check.seconds for check in report.checks)),
        "output": "\n".join(filter(None, notes)),
        "stdout_visibility": "hidden",
        "visibility": "visible",
        "tests": tests,
    }


_SETUP = """#!/usr/bin/env bash
# Run once, when the autograder's image is built.
set -euo pipefail
apt-get update -q && apt-get install -y -q python3-venv bubblewrap || echo "going on with what is installed"
python3 -m venv "${ENVIRONMENT:-/autograder/environment}"
"${ENVIRONMENT:-/autograder/environment}/bin/pip" install -q -e "$(dirname "$0")"
"""
_RUN = """#!/usr/bin/env bash
# Run for every submission.
set -uo pipefail
root=${AUTOGRADER:-/autograder}
cd "$root/source"
exec "${ENVIRONMENT:-$root/environment}/bin/python" -m autograder gradescope-run \\
  --lab LAB --submission "$root/submission" --results "$root/results/results.json"
"""


def gradescope_zip(lab: str, path: Path, course: Path = notebooks.COURSE) -> None:
    """Write the zip that Gradescope asks for: setup.sh, run_autograder, and of this project what grading needs.

    Raises:
        CannotGrade: if there is no such lab.
    """
    release = release_path(lab, course)
    parts = [course / name for name in ("autograder", "labs/difflab", "data", "pyproject.toml", "README.md", "LICENSE")]
    files = [file for part in parts for file in ([part] if part.is_file() else sorted(part.rglob("*")))]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in [*files, release]:
            if file.is_file() and "__pycache__" not in file.parts:
                archive.write(file, file.relative_to(course))
        for name, text in (("setup.sh", _SETUP), ("run_autograder", _RUN.replace("LAB", lab))):
            entry = zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0))
            entry.external_attr = 0o755 << 16
            archive.writestr(entry, text)


def write_gradescope_results(results: Path, report: Report | None, problem: str = "") -> None:
    """Write results.json where Gradescope looks for it."""
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps(gradescope_results(report, problem), indent=2, ensure_ascii=False), encoding="utf-8")


def find_handed_in(folder: Path, lab: str) -> Path:
    """The one notebook in a folder of uploaded files; of several the one named after the lab.

    Raises:
        CannotGrade: if there is none, or which one is meant cannot be told.
    """
    found = sorted(path for path in folder.rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
    named = [path for path in found if path.name == f"{lab}.ipynb"]
    for candidates in (found, named):
        if len(candidates) == 1:
            return candidates[0]
    names = ", ".join(path.name for path in found) or "no notebook"
    raise CannotGrade(f"expected one notebook, {lab}.ipynb; found {names}")
