"""The command line: python -m autograder grade NOTEBOOK, build, rubric."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from autograder.submission.process import Limits, WorkerFailed, WorkerProcess
from autograder.submission.sandbox import LEVELS, choose

if TYPE_CHECKING:
    from autograder.grading import Report


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0 when it did its work whatever the score, 2 with one line on stderr when it cannot."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.command(arguments)
    except (WorkerFailed, RuntimeError, ValueError, OSError) as error:
        print(f"autograder: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m autograder", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    one = commands.add_parser("grade", help="grade one notebook")
    one.add_argument("notebook", type=Path)
    one.add_argument(
        "--lab", default=None, help="name of the lab, e.g. lab05_sampling (default: found from the notebook)"
    )
    one.add_argument("--json", default=None, metavar="FILE", help="write the report as JSON; - for standard output")
    one.add_argument("--sandbox", choices=LEVELS, default="auto")
    one.add_argument("--seed", type=int, default=None, help="repeat the random inputs of an earlier run")
    one.set_defaults(command=_grade)

    build = commands.add_parser("build", help="build every notebook and the rubric from solutions/*.py")
    build.add_argument("--no-execute", action="store_true", help="keep the outputs that are there")
    build.set_defaults(command=_build)

    rubric = commands.add_parser("rubric", help="print the grading rubric")
    rubric.set_defaults(command=_rubric)
    return parser


def _grade(arguments: argparse.Namespace) -> None:
    # The worker takes a second or two to start, and so do the libraries that read notebooks: side by side.
    sandbox = choose(arguments.sandbox)
    with WorkerProcess(sandbox, Limits()) as worker:
        # nbformat's validator would import this grammar of web addresses, which takes a second; it does without.
        sys.modules.setdefault("rfc3987_syntax", None)
        from autograder.grading import grade

        report = grade(arguments.notebook, arguments.lab, seed=arguments.seed, worker=worker)
    if sandbox.level != "bwrap":
        print(f"Sandbox {sandbox.level}: {sandbox.note}", file=sys.stderr)
    if arguments.json == "-":
        print(report.to_json())
        return
    if arguments.json:
        Path(arguments.json).write_text(report.to_json() + "\n", encoding="utf-8")
    print(format_report(report))


def format_report(report: Report) -> str:
    """The report for a terminal: a line per check, the notes, the total."""
    width = max(len(check.name) for check in report.checks)
    marks = {"passed": "✓", "todo": "·"}
    lines = []
    for check in report.checks:
        points = f"{check.points:g}/{check.max_points:g}"
        hint = f"  {' '.join(check.hint.split())}" if check.hint else ""
        lines.append(f"{marks.get(check.status, '✗')} {check.name:<{width}} {points:>6}{hint}")
    lines += [f"! {note}" for note in report.notes]
    lines.append(
        f"{report.lab}: {report.score:g} of {report.max_score:g} automatic points; "
        f"{report.manual_points:g} more are given by a person. Sandbox: {report.sandbox}, device: {report.device}."
    )
    return "\n".join(lines)


def _build(arguments: argparse.Namespace) -> None:
    from autograder.authoring import build_all

    build_all(execute_all=not arguments.no_execute)


def _rubric(_arguments: argparse.Namespace) -> None:
    from autograder.authoring import rubric

    print(rubric())


if __name__ == "__main__":
    sys.exit(main())
