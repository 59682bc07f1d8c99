"""What a class costs: stock nbgrader beside grade-class on the same submissions, then time and memory as classes grow.

    python benchmarks/course.py [--students 24] [--workers 2]          the comparison
    python benchmarks/course.py --growth 100 [--students 500]          time and memory after every hundred
    python benchmarks/course.py --scale [--students 24]                each step's cost, and larger classes and machines

Stock nbgrader runs each notebook in a kernel, one after the other, and the same checks in that kernel; demo cells are
left out for both. No submission of the class ends in a time limit, and no two are alike.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from itertools import cycle
from pathlib import Path

import nbformat
import psutil

from autograder import course
from autograder.course import AHEAD
from autograder.demo import CLASS, LAB, hand_in, nbgrader, set_up
from autograder.notebooks import is_demo
from autograder.submission.sandbox import choose

CLASSES = (500, 10_000, 100_000)
STOCK = """
c = get_config()
c.CourseDirectory.source_directory = "solutions"
c.CourseDirectory.release_directory = "labs"
c.ClearSolutions.code_stub = {"python": 'raise NotImplementedError("TODO: write this method")'}
c.ClearSolutions.enforce_metadata = False
c.Execute.timeout = 120
"""


def make_class(folder: Path, students: int) -> None:
    """A course folder with that many submissions, without demos."""
    set_up(folder)
    hand_in(folder)
    kinds = [name for name in CLASS if name != "goran"]  # his endless loop would measure a time limit
    made = folder / "made"
    (folder / "submitted").rename(made)
    for number, kind in zip(range(students), cycle(kinds)):
        notebook = nbformat.read(made / kind / LAB / f"{LAB}.ipynb", as_version=4)
        notebook.cells = [cell for cell in notebook.cells if not is_demo(cell)]
        notebook.cells.append(nbformat.v4.new_code_cell(f"# student {number}"))
        target = folder / "submitted" / f"student{number:04d}" / LAB / f"{LAB}.ipynb"
        target.parent.mkdir(parents=True)
        nbformat.write(notebook, target)
    shutil.rmtree(made)


class Peak(threading.Thread):
    """Memory of this process and everything it started, in MB, shared pages counted once."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.now = self.highest = 0.0
        self.over = threading.Event()

    def run(self) -> None:
        """Look twice a second."""
        while not self.over.wait(0.5):
            total = 0
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    total += process.memory_full_info().pss
            self.now = total / 2**20
            self.highest = max(self.highest, self.now)


def timed(run) -> tuple[float, float]:
    """(seconds, peak MB) of a function."""
    peak = Peak()
    peak.start()
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    peak.over.set()
    return seconds, peak.highest


def grade_class(folder: Path, workers: int) -> None:
    """The command, as an instructor gives it, but no pages for students: stock autograding makes none either."""
    command = ["grade-class", str(folder / "submitted"), "--lab", LAB, "--out", str(folder / "reports")]
    subprocess.run(
        [sys.executable, "-m", "autograder", *command, "--no-feedback", "--workers", str(workers)],
        check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def compare(students: int, workers: int) -> None:
    """Print throughput of both, side by side."""
    with tempfile.TemporaryDirectory() as name:
        ours, stock = Path(name, "ours"), Path(name, "stock")
        make_class(ours, students)
        make_class(stock, students)
        (stock / "nbgrader_config.py").write_text(STOCK)

        def run_stock() -> None:
            run = nbgrader(stock, "autograde", LAB)
            if run.returncode:
                sys.exit(run.stderr[-2000:])

        made = nbgrader(stock, "generate_assignment", LAB)
        if made.returncode:
            sys.exit(made.stderr[-2000:])
        rows = {"stock nbgrader autograde": timed(run_stock), "grade-class": timed(lambda: grade_class(ours, workers))}
        nbgrader(stock, "export")
        with open(stock / "grades.csv") as a, open(ours / "reports" / "grades.csv") as b:
            theirs = {row["student_id"]: float(row["score"]) for row in csv.DictReader(a)}
            same = {row["student"]: float(row["score"]) for row in csv.DictReader(b)} == theirs
    print(f"{students} submissions of {LAB}, {workers} workers on {os.cpu_count()} cores")
    print(f"{'':<26} {'seconds':>8} {'each':>7} {'peak memory':>12}")
    for name, (seconds, memory) in rows.items():
        print(f"{name:<26} {seconds:>8.1f} {seconds / students:>7.2f} {memory:>9.0f} MB")
    (slow, _), (fast, _) = rows.values()
    print(f"grade-class has {slow / fast:.1f} times the throughput; the scores are {'' if same else 'NOT '}the same")


def grow(students: int, step: int, workers: int) -> None:
    """Print time and memory after every `step` verdicts of one run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "course")
        make_class(folder, students)
        peak = Peak()
        peak.start()
        start = time.perf_counter()
        thread = threading.Thread(target=grade_class, args=(folder, workers))
        thread.start()
        print(f"{'graded':>7} {'seconds':>8} {'each':>6} {'memory now':>11}", flush=True)
        verdicts, last = folder / "reports" / LAB, (0, 0.0)
        for goal in [*range(step, students, step), students]:
            while thread.is_alive() and (not verdicts.is_dir() or len(os.listdir(verdicts)) < goal):
                time.sleep(0.2)
            now = time.perf_counter() - start
            print(f"{goal:>7} {now:>8.1f} {(now - last[1]) / (goal - last[0]):>6.2f} {peak.now:>8.0f} MB", flush=True)
            last = (goal, now)
        thread.join()
        with open(folder / "reports" / "grades.csv") as file:
            count = sum(bool(row["score"]) for row in csv.DictReader(file))
    print(f"{count} of {students} have a verdict; peak memory {peak.highest:.0f} MB")


def scale(students: int, workers: int) -> None:
    """Print what each step costs for one submission, and the sums for larger classes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "course")
        make_class(folder, students)
        submitted, reports = folder / "submitted", folder / "reports"
        pool = functools.partial(course.local_pool, workers, choose())
        marks = []  # clock, and what this process has used, when each verdict came
        for _ in course.grade_class(submitted, LAB, reports, pool, workers):
            marks.append((time.perf_counter(), sum(os.times()[:2])))
        first = AHEAD * workers  # by then every process has started
        clock, used = ((last - before) / (students - first) for last, before in zip(marks[-1], marks[first - 1]))
        grading, writing = clock * workers, used
        names = sorted(os.listdir(submitted))
        course.write_feedback(submitted, LAB, reports, names[0])  # what it imports is imported once
        page = timed(lambda: [course.write_feedback(submitted, LAB, reports, n) for n in names[1:]])[0] / (students - 1)
        size = sum(path.stat().st_size for path in reports.rglob("*") if path.is_file()) / students
        book = timed(lambda: nbgrader(folder, "autograde", LAB))[0] / students
    print(f"One submission of {LAB}, measured with {workers} workers on {os.cpu_count()} cores:")
    print(f"  graded                           {grading:7.2f} s of a worker")
    print(f"  its page for the student         {page:7.2f} s of a worker")
    print(f"  read, cleaned, stored            {writing * 1e3:7.0f} ms of the one process that writes the store")
    print(f"  into nbgrader's gradebook        {book:7.2f} s of the one process that writes it")
    print(f"  kept on disk                     {size / 1e3:7.0f} kB")
    print(f"\n{'graded, pages included':<34}" + "".join(f"{n:>12,}" for n in CLASSES))
    for name, count in {f"{workers} cores, as here": workers, "64 cores": 64, "200 workers of a cluster": 200}.items():
        each = max((grading + page) / count, writing)
        print(f"{name:<34}" + "".join(f"{_duration(each * n):>12}" for n in CLASSES))
    print(f"{'the store alone (one process)':<34}" + "".join(f"{_duration(writing * n):>12}" for n in CLASSES))
    print(f"{'the gradebook (one process)':<34}" + "".join(f"{_duration(book * n):>12}" for n in CLASSES))
    print(f"{'disk':<34}" + "".join(f"{size * n / 1e9:>9.1f} GB" for n in CLASSES))
    print(f"The store keeps up with {(grading + page) / writing:.0f} workers of this speed.")


def _duration(seconds: float) -> str:
    for limit, unit, length in ((120, "s", 1), (7200, "min", 60), (2 * 86400, "h", 3600)):
        if seconds < limit:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds / 86400:.1f} days"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--students", type=int, default=24)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--growth", type=int, default=0, metavar="STEP")
    parser.add_argument("--scale", action="store_true")
    arguments = parser.parse_args()
    if arguments.scale:
        scale(arguments.students, arguments.workers)
    elif arguments.growth:
        grow(arguments.students, arguments.growth, arguments.workers)
    else:
        compare(arguments.students, arguments.workers)


if __name__ == "__main__":
    main()
