"""What the README promises, tried: no points gained, nothing changed, nothing left, the next submission unharmed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import socket
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import nbformat
import psutil
import pytest

from autograder.checks.runner import run_checks
from autograder.grading import grade_notebook
from autograder.notebooks import read_notebook, sanitise, to_run
from autograder.submission.process import Limits, WorkerProcess, Workers
from autograder.submission.sandbox import LEVELS, Sandbox, choose
from tests.attacks.attacks import ATTACKS

LAB = "lab05_sampling"
pytestmark = pytest.mark.slow
LIMITS = Limits(cell=2, check=2, notebook=15, submission=40, grace=0.5, memory=2 * 2**30)
CANARY, FOUND = "canary-7316", "FOUND-WHAT-IT-SHOULD-NOT"
HONEST_CHECKS = ("add_noise", "ddpm_posterior_mean", "ddpm_step")


def _works(level: str) -> bool:
    with contextlib.suppress(RuntimeError):
        return bool(choose(level))
    return False


HERE = [level for level in LEVELS[1:] if _works(level)]


@dataclass
class Klass:
    """A class with a gradebook, in a folder that everyone can read and write to, as far as file modes go."""

    folder: Path
    listener: socket.socket
    abstract: socket.socket

    def connections(self) -> int:
        """How many have come in by now."""
        count = 0
        for sock in (self.listener, self.abstract):
            with contextlib.suppress(BlockingIOError):
                while sock.accept():
                    count += 1
        return count


@pytest.fixture(scope="module")
def klass() -> Iterator[Klass]:
    with tempfile.TemporaryDirectory(prefix="difflab-class-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        listener, abstract = (stack.enter_context(socket.socket(family)) for family in (socket.AF_INET, socket.AF_UNIX))
        listener.bind(("127.0.0.1", 0))
        abstract.bind(f"\0difflab-{listener.getsockname()[1]}")
        for sock in (listener, abstract):
            sock.listen()
            sock.setblocking(False)
        for path, text in {
            "secret.txt": CANARY,
            "reports/key.json": "{}",
            f"submitted/neighbour/{LAB}/{LAB}.ipynb": "{}",
            "solutions/lab05_sampling.py": "print('solution')",
        }.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text)
        with sqlite3.connect(folder / "gradebook.db") as book:
            book.execute("CREATE TABLE grade (score)")
            book.execute("INSERT INTO grade VALUES (50)")
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)
        yield Klass(folder, listener, abstract)


def _fingerprint(*folders: Path) -> dict[str, str]:
    found = {}
    for folder in folders:
        for top, names, files in os.walk(folder):
            names[:] = [name for name in names if name not in (".git", ".venv", "__pycache__", "runs", "demo")]
            for name in [*names, *files]:
                path = Path(top, name)
                status = path.lstat()
                data = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
                found[str(path)] = f"{status.st_mode:o} {hashlib.sha1(data).hexdigest()}"
    return found


@dataclass
class Traces:
    """By which the processes and files of this test's submissions are known."""

    home: Path  # holds the folders they work in
    mark: str  # in the names of the files they try to leave elsewhere
    users: list[int]
    children: set[psutil.Process]

    def left(self) -> list[str]:
        """Processes that still run, files that are still there."""
        found = [f"{self.home}/{name}" for name in os.listdir(self.home)]
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.status() == psutil.STATUS_ZOMBIE:
                    continue
                if process.uids().real in self.users or str(self.home) in process.environ().get("HOME", ""):
                    found.append(f"{process} {process.cmdline()}")
        found += map(str, set(psutil.Process().children(recursive=True)) - self.children)
        for folder in ("/tmp", "/var/tmp", "/dev/shm", "/run", "/home"):
            names = os.listdir(folder) if os.path.isdir(folder) else []
            found += [f"{folder}/{name}" for name in names if self.mark in name and name != self.home.name]
        return found


@pytest.fixture
def traces(level, neighbours, workers, tmp_path, monkeypatch) -> Iterator[Traces]:
    neighbours(level)  # and tmp_path: what is not to be counted comes first
    if level in HERE:
        workers.start(choose(level), LIMITS).close()
    with tempfile.TemporaryDirectory(prefix="difflab-homes-") as home:
        os.chmod(home, 0o755)
        users: list[int] = []
        new_user = Sandbox.new_user

        def remember(sandbox):
            user = new_user(sandbox)
            users.extend([] if user is None else [user])
            return user

        monkeypatch.setattr(tempfile, "tempdir", home)
        monkeypatch.setattr(Sandbox, "new_user", remember)
        yield Traces(Path(home), Path(home).name, users, set(psutil.Process().children(recursive=True)))


@pytest.fixture(scope="module")
def honest_cells(solution) -> list[tuple[str, str]]:
    """The cells of an honest submission, as far as `HONEST_CHECKS` need them."""
    cells = [(label, source) for _, label, source in to_run(solution(LAB))]
    last = next(i for i, (label, _) in enumerate(cells) if label == "cell ddpm_step")
    return cells[: last + 1]


@pytest.fixture(scope="module")
def neighbours(honest_cells) -> Iterator[Callable[[str], WorkerProcess | None]]:
    """An honest submission at each level, under way while all the attacks go on; and one that comes after them."""
    started: dict[str, WorkerProcess] = {}

    def neighbour(level: str) -> WorkerProcess | None:
        if level in HERE and level not in started:
            started[level] = WorkerProcess(choose(level), Limits(submission=3600))
            started[level].run_cells(honest_cells)
        return started.get(level)

    yield neighbour
    for level, worker in started.items():
        worker.close()
        with WorkerProcess(choose(level), LIMITS) as after:
            after.run_cells(honest_cells)
            _hold_honest(after)


def _hold_honest(worker: WorkerProcess) -> None:
    results = run_checks(LAB, worker.fork, names=HONEST_CHECKS)
    assert {r.name: r.status for r in results} == dict.fromkeys(HONEST_CHECKS, "passed"), results


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    """One source of workers for all the attacks: where it forks them, none may reach the next."""
    with Workers() as workers:
        yield workers


# Where a sandbox forbids namespaces within it, workers in bwrap are started afresh, as at other levels always.
AFRESH = (
    "startup files", "reading the solutions", "the gradebook", "a neighbour's submission", "something left in /tmp",
    "environment", "/proc", "ptrace", "signals to the grader", "becoming root", "sockets", "fork bomb", "disk bomb",
    "memory shared among processes", "a detached process", "asleep for good", "another program instead",
)  # fmt: skip
CASES = [pytest.param(level, level != "bwrap", name, id=f"{level}-{name}") for level in LEVELS[1:] for name in ATTACKS]
CASES += [pytest.param("bwrap", True, name, id=f"bwrap afresh-{name}") for name in AFRESH]


@pytest.mark.parametrize(("level", "afresh", "name"), CASES)
def test_attack_gains_nothing(
    level, afresh, name, klass, neighbours, workers, traces, solution, student, course, tmp_path, monkeypatch
):
    attack = ATTACKS[name]
    if level not in attack.levels:
        pytest.skip(f"not promised at level {level}")
    if level not in HERE:
        pytest.skip(f"the level {level} does not work on this machine")
    monkeypatch.setenv("DIFFLAB_TOKEN", CANARY)
    notebook = {"student": student, "solution": solution}[attack.base](LAB)
    code = attack.code
    for key, value in {"course": course, "klass": klass.folder, "found": FOUND, "mark": traces.mark}.items():
        code = code.replace(f"{{{key}}}", str(value))
    code = code.replace("{port}", str(klass.listener.getsockname()[1]))
    if code:
        notebook.cells.insert(0 if attack.first else len(notebook.cells), nbformat.v4.new_code_cell(code))
    if attack.edit:
        attack.edit(notebook)
    path = tmp_path / f"{LAB}.ipynb"
    path.write_text(json.dumps(notebook))
    watched = (course, klass.folder)
    before = _fingerprint(*watched)

    with WorkerProcess(choose(level), LIMITS) if afresh else workers.start(choose(level), LIMITS) as worker:
        graded = grade_notebook(sanitise(read_notebook(path), student(LAB)), LAB, worker)
    report = graded.report

    assert report.score == 0, [(c.name, c.points) for c in report.checks if c.points]
    assert {c.status for c in report.checks} <= {"todo", "failed", "missing", "timeout", "crashed"}, report.checks
    assert len(report.checks) == 26 and report.max_score == 89
    outputs = json.dumps(graded.outputs, ensure_ascii=False)
    told = outputs + report.to_json()
    assert CANARY not in told and FOUND not in told
    assert re.search(attack.told, told), report
    assert len(told) < 10 * 2**20 and "\\u001b" not in report.to_json(), "nothing that steers a terminal"
    assert _fingerprint(*watched) == before
    assert klass.connections() == 0
    assert traces.left() == []
    _hold_honest(neighbours(level))


def test_there_are_enough_attacks():
    assert len(ATTACKS) >= 45 and all(attack.idea for attack in ATTACKS.values())
