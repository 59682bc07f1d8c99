"""How a class has done, as one HTML page that needs nothing beside it."""

from __future__ import annotations

import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from autograder.course import Result
from autograder.report import CheckResult

__all__ = ["class_page"]

BINS = 10
STATUSES = ("passed", "failed", "todo", "other")  # in the order in which a bar shows them
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")


@dataclass(frozen=True)
class Misconception:
    """Hints that differ only in their numbers, as one."""

    check: str
    hint: str  # one of them
    students: list[str]


def class_page(results: Iterable[Result], title: str, feedback: bool = True) -> str:
    """The page.

    Args:
        results: one for each student.
        title: of the page.
        feedback: is there a page feedback/<student>.html beside it for everyone with a report?
    """
    results = sorted(results, key=lambda result: result.student)
    reports = [result.report for result in results if result.report is not None]
    template = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, trim_blocks=True
    ).get_template("class_report.html.j2")
    scores = [report.score for report in reports]
    return template.render(
        title=title,
        results=results,
        graded=reports,
        problems=[result for result in results if result.report is None],
        max_score=max((report.max_score for report in reports), default=0),
        mean=statistics.mean(scores) if scores else 0,
        median=statistics.median(scores) if scores else 0,
        histogram=_histogram(scores, max((report.max_score for report in reports), default=0)),
        checks=_pass_rates(reports),
        misconceptions=_misconceptions(results),
        limits=_limits(results),
        seconds=[sum(check.seconds for check in report.checks) for report in reports],
        sandboxes=sorted({report.sandbox for report in reports}),
        feedback=feedback,
    )


def _histogram(scores: list[float], max_score: float) -> list[tuple[str, int, float]]:
    """(label, students, height in per cent) of equal parts of the scale."""
    if not scores or not max_score:
        return []
    width = max_score / BINS
    counts = Counter(min(int(score / width), BINS - 1) for score in scores)
    highest = max(counts.values())
    return [(f"{i * width:.0f}–{(i + 1) * width:.0f}", counts[i], 100 * counts[i] / highest) for i in range(BINS)]


def _status(check: CheckResult) -> str:
    return check.status if check.status in STATUSES else "other"


def _pass_rates(reports: list) -> list[tuple[str, float, dict[str, int]]]:
    """(check, its points, students by status), in the order of the notebook."""
    table: dict[str, tuple[float, Counter]] = {}
    for report in reports:
        for check in report.checks:
            points, counts = table.setdefault(check.name, (check.max_points, Counter()))
            counts[_status(check)] += 1
    return [(name, points, {s: counts[s] for s in STATUSES}) for name, (points, counts) in table.items()]


def _misconceptions(results: list[Result]) -> list[Misconception]:
    """What checks have said most often, numbers aside."""
    found: dict[tuple[str, str], Misconception] = {}
    for result in results:
        for check in result.report.checks if result.report else []:
            if check.status == "failed":
                key = (check.name, _NUMBER.sub("#", re.sub(r"\(cell [^)]*\)", "", check.hint)))
                found.setdefault(key, Misconception(check.name, check.hint, [])).students.append(result.student)
    return sorted(found.values(), key=lambda m: -len(m.students))


def _limits(results: list[Result]) -> list[tuple[str, list[str]]]:
    """What was stopped, or ended by itself, and with whom."""
    found: dict[str, list[str]] = defaultdict(list)
    for result in results:
        if result.report is None:
            continue
        kinds = {
            f"check {c.name}: {c.status}" for c in result.report.checks if c.status in ("timeout", "crashed", "error")
        }
        kinds |= {_NUMBER.sub("#", note) if note.startswith(("memory:", "time:")) else "a cell did not end well"
                  for note in result.report.notes}  # fmt: skip
        for kind in kinds:
            found[kind].append(result.student)
    return sorted(found.items(), key=lambda item: -len(item[1]))
