"""What grading one complete notebook costs: wall time and peak memory of the whole command, sandbox by sandbox.

    python benchmarks/grading.py [--repeats 5]

Prints the median and spread of `python -m autograder grade` on the Lab 5 solution, the peak memory of the grader and of
the submission's processes together (proportional set size, sampled), and for comparison an interpreter that only
imports torch, in the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

from autograder.submission.sandbox import LEVELS, choose

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "solutions" / "lab05_sampling" / "lab05_sampling.ipynb"


def _memory(pid: int) -> float:
    """Proportional set size of the process and its descendants, in MB: shared pages counted once."""
    total = 0
    with contextlib.suppress(psutil.Error):
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                total += process.memory_full_info().pss
    return total / 2**20


def run(command: list[str]) -> tuple[float, float]:
    """(seconds, peak MB) of a command."""
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    peak = 0.0

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            peak = max(peak, _memory(process.pid))
            time.sleep(0.2)

    watcher = threading.Thread(target=watch)
    watcher.start()
    process.wait()
    seconds = time.perf_counter() - start
    watcher.join()
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed")
    return seconds, peak


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    commands = {"python -c 'import torch'": [sys.executable, "-c", "import torch"]}
    for level in LEVELS[1:]:
        try:
            choose(level)
        except RuntimeError as error:
            print(f"{level}: {error}")
            continue
        commands[f"grade, sandbox {level}"] = [
            sys.executable, "-m", "autograder", "grade", str(NOTEBOOK), "--sandbox", level,
        ]  # fmt: skip
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for repeat in range(repeats + 1):  # in turn, so that a drifting machine slows them alike; the first is warm-up
        for name, command in commands.items():
            outcome = run(command)
            if repeat:
                results[name].append(outcome)
    print(f"{'':<28} {'median':>8} {'min':>7} {'max':>7} {'peak memory':>12}")
    for name, outcomes in results.items():
        seconds = [s for s, _ in outcomes]
        print(
            f"{name:<28} {statistics.median(seconds):>7.2f}s {min(seconds):>6.2f}s {max(seconds):>6.2f}s "
            f"{max(m for _, m in outcomes):>9.0f} MB"
        )


if __name__ == "__main__":
    main()
