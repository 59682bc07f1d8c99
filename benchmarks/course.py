"""What a class costs: stock nbgrader beside grade-class on the same submissions, then time and memory as classes grow.

    python benchmarks/course.py [--students 24] [--workers 2]          the comparison
    python benchmarks/course.py --growth 100 [--students 500]          time and memory after every hundred

Stock nbgrader runs each notebook in a kernel, one after the other, and the same checks in that kernel; demo cells are
left out for both. No submission of the class ends in a time limit, and no two are alike.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
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

from autograder.demo import CLASS, LAB, hand_in, nbgrader, set_up
from autograder.notebooks import is_demo

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
    command = [
        "grade-class",
        str(folder / "submitted"),
        "--lab",
        LAB,
        "--out",
        str(folder / "reports"),
        "--no-feedback",
    ]
    subprocess.run([sys.executable, "-m", "autograder", *command, "--workers", str(workers)], check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip


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


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--students", type=int, default=24)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--growth", type=int, default=0, metavar="STEP")
    arguments = parser.parse_args()
    if arguments.growth:
        grow(arguments.students, arguments.growth, arguments.workers)
    else:
        compare(arguments.students, arguments.workers)


if __name__ == "__main__":
    main()
