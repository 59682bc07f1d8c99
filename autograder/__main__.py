"""The command line: python -m autograder grade NOTEBOOK, grade-class SUBMITTED, gradescope LAB, build, bundle."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from autograder.submission.process import Limits, WorkerFailed, WorkerProcess
from autograder.submission.sandbox import LEVELS, choose

if TYPE_CHECKING:
    from autograder.report import Report


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
    one.add_argument(
        "--markdown", default=None, metavar="FILE", help="add the report to FILE as a table; - to print it"
    )
    one.add_argument("--sandbox", choices=LEVELS, default="auto")
    one.add_argument("--seed", type=int, default=None, help="repeat the random inputs of an earlier run")
    one.set_defaults(command=_grade)

    many = commands.add_parser("grade-class", help="grade a class, in parallel; run again to go on")
    many.add_argument("folder", type=Path, help="holds <student>/<lab>/<lab>.ipynb, as nbgrader's submitted/")
    many.add_argument("--lab", required=True, help="name of the lab, e.g. lab05_sampling")
    many.add_argument("--out", type=Path, required=True, help="folder for verdicts, grades.csv, report.html, feedback/")
    many.add_argument("--workers", type=int, default=os.cpu_count(), help="submissions at once (default: all cores)")
    many.add_argument("--scheduler", metavar="tcp://…", help="a Dask cluster's, in place of this machine's cores")
    many.add_argument("--sandbox", choices=LEVELS, default="auto")
    many.add_argument("--check-seconds", type=float, default=Limits.check, help="seconds a check may take")
    many.add_argument("--no-feedback", action="store_true", help="write no page for each student")
    many.set_defaults(command=_grade_class)

    gradescope = commands.add_parser("gradescope", help="write the autograder zip of a lab")
    gradescope.add_argument("lab")
    gradescope.add_argument("--out", type=Path, default=Path("autograder.zip"))
    gradescope.set_defaults(command=_gradescope)

    run = commands.add_parser("gradescope-run", help="what the zip's run_autograder calls")
    run.add_argument("--lab", required=True)
    run.add_argument("--submission", type=Path, required=True)
    run.add_argument("--results", type=Path, required=True)
    run.set_defaults(command=_gradescope_run)

    build = commands.add_parser("build", help="build every notebook and the rubric from solutions/*.py")
    build.add_argument("labs", nargs="*", metavar="LAB", help="only these (default: all)")
    build.add_argument("--no-execute", action="store_true", help="keep the outputs that are there")
    build.set_defaults(command=_build)

    bundle = commands.add_parser("bundle", help="write the zip that students receive")
    bundle.add_argument("--out", type=Path, default=Path("difflab-students.zip"))
    bundle.set_defaults(command=_bundle)

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
    if arguments.json not in (None, "-"):
        Path(arguments.json).write_text(report.to_json() + "\n", encoding="utf-8")
    if arguments.markdown not in (None, "-"):
        with open(arguments.markdown, "a", encoding="utf-8") as file:  # GitHub's summary of a job may have begun
            file.write(report.to_markdown())
    if arguments.json == "-":
        print(report.to_json())
    elif arguments.markdown == "-":
        print(report.to_markdown(), end="")
    else:
        print(format_report(report))


def _grade_class(arguments: argparse.Namespace) -> None:
    from tqdm import tqdm

    from autograder import course

    if arguments.workers < 1:
        raise ValueError(f"--workers must be at least 1, got {arguments.workers}")
    sandbox = choose(arguments.sandbox)
    limits = Limits(check=arguments.check_seconds)
    with contextlib.ExitStack() as stack:
        workers = arguments.workers
        if arguments.scheduler:
            executor, workers = stack.enter_context(course.cluster(arguments.scheduler))
            open_executor = functools.partial(contextlib.nullcontext, executor)
        else:
            open_executor = functools.partial(course.local_pool, workers, sandbox)
        print(f"{workers} workers, sandbox {sandbox.level}: {sandbox.note}", file=sys.stderr)
        total = len(course.find_submissions(arguments.folder, arguments.lab))
        bar = stack.enter_context(tqdm(total=total, unit="notebook", dynamic_ncols=True, disable=None))
        results = []
        for result in course.grade_class(
            arguments.folder, arguments.lab, arguments.out, open_executor, workers, sandbox.level, limits
        ):
            results.append(result)
            bar.update()
            if result.problem:
                bar.write(f"{result.student}: {result.problem}", file=sys.stderr)
    _write_class(arguments, results)


def _write_class(arguments: argparse.Namespace, results: list) -> None:
    from tqdm import tqdm

    from autograder.class_report import class_page
    from autograder.course import local_pool, write_feedback
    from autograder.exports import grades_csv

    out, lab = arguments.out, arguments.lab
    try:
        if not arguments.no_feedback:
            with local_pool(arguments.workers) as pool:
                names = [result.student for result in results if result.report is not None]
                written = pool.map(functools.partial(write_feedback, arguments.folder, lab, out), names)
                for _ in tqdm(written, total=len(names), unit="page", dynamic_ncols=True, disable=None):
                    pass
        (out / "grades.csv").write_text(grades_csv(results), encoding="utf-8")
        page = class_page(results, f"{lab}: {len(results)} students", feedback=not arguments.no_feedback)
        (out / "report.html").write_text(page, encoding="utf-8")
    except OSError as error:
        raise RuntimeError(f"cannot write to {out} ({error.strerror or error}); the verdicts are kept there") from None
    graded = [result for result in results if result.report is not None]
    print(f"{len(graded)} of {len(results)} graded, {sum(r.graded_now for r in results)} of them now")
    for name in ("grades.csv", "report.html") + (() if arguments.no_feedback else ("feedback",)):
        print(f"  {out / name}")


def _gradescope(arguments: argparse.Namespace) -> None:
    from autograder.exports import gradescope_zip

    gradescope_zip(arguments.lab, arguments.out)
    print(f"{arguments.out}: {arguments.out.stat().st_size / 2**20:.0f} MB; upload it as the assignment's autograder")


def _gradescope_run(arguments: argparse.Namespace) -> None:
    from autograder.exports import find_handed_in, write_gradescope_results
    from autograder.grading import grade
    from autograder.notebooks import CannotGrade

    try:
        path = find_handed_in(arguments.submission, arguments.lab)
        report, problem = grade(path, arguments.lab), ""
    except CannotGrade as error:
        report, problem = None, str(error)
    write_gradescope_results(arguments.results, report, problem)


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

    build_all(execute_all=not arguments.no_execute, labs=arguments.labs)


def _bundle(arguments: argparse.Namespace) -> None:
    from autograder.bundle import write_bundle

    write_bundle(arguments.out)
    print(f"{arguments.out}: {arguments.out.stat().st_size / 2**20:.0f} MB for students, no solution in it")


def _rubric(_arguments: argparse.Namespace) -> None:
    from autograder.authoring import rubric

    print(rubric())


if __name__ == "__main__":
    sys.exit(main())
