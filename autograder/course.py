"""A class of notebooks in, a verdict on each out: in parallel, and going on where it was stopped."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import nbformat
import psutil

from autograder import notebooks
from autograder.notebooks import CannotGrade
from autograder.report import Graded, Report
from autograder.store import Reports, key_of, version
from autograder.submission.forkserver import ForkServer, ServerGone
from autograder.submission.process import Limits, WorkerFailed, Workers, start_server
from autograder.submission.sandbox import Sandbox, choose

__all__ = ["Result", "Stopped", "cluster", "find_submissions", "grade_class", "local_pool", "write_feedback"]

ATTEMPTS = 3  # at a submission whose grading process died, before it is reported
AHEAD = 2  # submissions handed out for every worker, so that none waits


class Stopped(RuntimeError):
    """The run cannot go on; what was graded is kept, and the message says what to do."""


@dataclass(frozen=True)
class Result:
    """What a run found about one student: a report, or in one line why there is none."""

    student: str
    report: Report | None = None
    problem: str = ""
    graded_now: bool = False  # not taken from an earlier run


# -- what was handed in --------------------------------------------------------------------------------------------


def find_submissions(folder: Path, lab: str) -> dict[str, Path | str]:
    """The notebook of every student in `submitted/<student>/<lab>/`, or in one line what is wrong with what is there.

    Raises:
        CannotGrade: if the folder does not exist or holds no student's folder.
    """
    if not folder.is_dir():
        raise CannotGrade(f"{folder}: there is no such folder; expected submitted/, with <student>/{lab}/{lab}.ipynb")
    found: dict[str, Path | str] = {}
    for entry in sorted(folder.iterdir()):
        if not entry.name.startswith("."):
            found[entry.name] = _submission(entry, lab)
    if not any((folder / name).is_dir() for name in found):
        raise CannotGrade(f"{folder}: no student's folder in it; expected <student>/{lab}/{lab}.ipynb")
    return {name: what for name, what in found.items() if isinstance(what, Path) or (folder / name).is_dir()}


def _submission(student: Path, lab: str) -> Path | str:
    folder = student / lab
    notebook = folder / f"{lab}.ipynb"
    for path in (student, folder, notebook):
        if path.is_symlink():
            return f"{path} is a symbolic link; put the file itself there"
    if not folder.is_dir():
        return f"nothing was handed in: there is no folder {folder}"
    others = sorted(p.name for p in folder.glob("*.ipynb") if p.name != notebook.name)
    if notebook.is_file():
        return f"two notebooks in {folder}: {', '.join([notebook.name, *others])}; leave one" if others else notebook
    if others:
        return f"{folder / others[0]} should be called {notebook.name}"
    return f"there is no notebook in {folder}"


# -- one of them, in a process of the pool -------------------------------------------------------------------------


_lock = threading.Lock()  # pytest and redirected streams are one to a process; a cluster may use threads
_workers = Workers()  # of this process; the local pool's processes share a server


def _grade(text: str, lab: str, level: str, limits: Limits, expected: str) -> dict[str, Any]:
    """Runs where the executor puts it, perhaps on another machine. Everything in and out is plain."""
    if version() != expected:
        raise Stopped("a worker has another version of checks, kit, data, torch or Python; update it and run again")
    sandbox = choose(level)
    if sandbox.level != level:
        raise Stopped(
            f"a worker offers the sandbox {sandbox.level}, not {level}; install bubblewrap there, or name one"
        )
    try:
        from autograder.grading import grade_notebook

        with _lock, _workers.start(sandbox, limits) as worker:
            return grade_notebook(nbformat.reads(text, as_version=4), lab, worker).to_dict()
    except WorkerFailed as error:
        return {"failed": str(error)}
    except ServerGone as error:
        raise BrokenProcessPool(str(error)) from None


def _prepare_process(command: int, sandbox: Sandbox | None, server: ForkServer | None) -> None:
    """In every process of the local pool: end with the command that started it, however that ends."""
    global _workers
    import torch

    torch.set_num_threads(1)  # as many submissions as cores are at work already
    if sandbox is not None:
        _workers = Workers(sandbox, server)

    def watch() -> None:
        while psutil.pid_exists(command):
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# -- executors -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def local_pool(workers: int, sandbox: Sandbox | None = None) -> Iterator[Executor]:
    """Processes on this machine, which share what they import and, for grading in `sandbox`, the workers' server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["autograder.grading"])
    forkserver.ensure_running()  # both import torch, side by side
    server = None if sandbox is None else start_server(sandbox)
    try:
        with ProcessPoolExecutor(workers, context, _prepare_process, (os.getpid(), sandbox, server)) as pool:
            yield pool
    finally:
        if server is not None:
            server.close()


@contextlib.contextmanager
def cluster(address: str) -> Iterator[tuple[Executor, int]]:
    """The workers of a running Dask cluster, and how many there are.

    Raises:
        Stopped: if dask.distributed is not installed, or no scheduler or no worker answers at the address.
    """
    try:
        from distributed import Client
    except ImportError:
        raise Stopped('dask.distributed is not installed: pip install -e ".[cluster]"') from None
    try:
        client = Client(address, timeout=5)
    except (OSError, TimeoutError, ValueError) as error:
        raise Stopped(f"no Dask scheduler answers at {address} ({str(error).splitlines()[0][:100]})") from None
    with client:
        count = len(client.scheduler_info()["workers"])
        if not count:
            raise Stopped(f"the Dask scheduler at {address} has no workers; start some with `dask worker {address}`")
        yield client.get_executor(), count


# -- the class -----------------------------------------------------------------------------------------------------


def grade_class(
    folder: Path,
    lab: str,
    out: Path,
    open_executor: Callable[[], contextlib.AbstractContextManager[Executor]],
    workers: int,
    sandbox: str = "auto",
    limits: Limits | None = None,
    course: Path = notebooks.COURSE,
) -> Iterator[Result]:
    """Grade every submission that has no verdict yet; yields one result for each student, as they come.

    Args:
        folder: holds <student>/<lab>/<lab>.ipynb.
        out: folder of reports, see `autograder.store`.
        open_executor: called again if its processes die.
        workers: how many submissions are graded at once.

    Raises:
        CannotGrade: if there is nothing to grade, or no such lab.
        Stopped: if the run cannot go on.
    """
    release = nbformat.read(notebooks.release_path(lab, course), as_version=4)
    limits, level = limits or Limits(), choose(sandbox).level
    reports = Reports(out)
    found = find_submissions(folder, lab)

    def waiting() -> Iterator[_Task]:
        """What has to be graded; problems and earlier verdicts go to `ready`."""
        for student, what in found.items():
            try:
                if isinstance(what, str):
                    raise CannotGrade(what)
                notebook = notebooks.sanitise(notebooks.read_notebook(what), release)
            except CannotGrade as problem:
                ready.append(_refuse(reports, lab, student, str(problem)))
                continue
            key = key_of(notebook, lab, level, limits)
            known = reports.find(key, lab, student)
            if known is None:
                yield _Task(student, key, nbformat.writes(notebook))
            else:
                if (reports.recorded(lab, student) or {}).get("key") != key:
                    with _writing(reports):
                        reports.record(lab, student, {"key": key, "graded": known.to_dict()})
                ready.append(Result(student, known.report))

    ready: list[Result] = []
    queue, under_way = waiting(), {}
    again: list[tuple[_Task, int]] = []  # what a dead process had, and which attempt at it is next
    exhausted = False
    while not exhausted or again:
        with open_executor() as executor:
            try:
                while True:
                    while len(under_way) < AHEAD * workers:
                        task, attempt = again.pop() if again else (next(queue, None), 1)
                        if task is None:
                            exhausted = True
                            break
                        if attempt > ATTEMPTS:
                            problem = f"its grading process died {ATTEMPTS} times; is this machine out of memory?"
                            ready.append(_refuse(reports, lab, task.student, problem))
                            continue
                        future = executor.submit(_grade, task.notebook, lab, level, limits, version())
                        under_way[future] = (task, attempt)
                    yield from ready
                    ready.clear()
                    if not under_way:
                        break
                    for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                        result = _take(future, reports, lab, under_way[future][0])
                        del under_way[future]
                        yield result
            except BrokenProcessPool:
                again += [(task, attempt + 1) for task, attempt in under_way.values()]
                under_way.clear()
            finally:
                for future in under_way:
                    future.cancel()


def write_feedback(folder: Path, lab: str, out: Path, student: str, course: Path = notebooks.COURSE) -> None:
    """Write the page for one student of a class that has been graded, unless it is there and newer than the verdict."""
    from autograder.feedback import feedback_page

    reports = Reports(out)
    page = out / "feedback" / f"{student}.html"
    if page.exists() and page.stat().st_mtime >= reports.path_of(lab, student).stat().st_mtime:
        return
    release = nbformat.read(notebooks.release_path(lab, course), as_version=4)
    notebook = notebooks.sanitise(notebooks.read_notebook(folder / student / lab / f"{lab}.ipynb"), release)
    graded = Graded.from_dict(reports.recorded(lab, student)["graded"])
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(feedback_page(notebook, graded, student), encoding="utf-8")


@dataclass(frozen=True)
class _Task:
    student: str
    key: str
    notebook: str


def _take(future: Future, reports: Reports, lab: str, task: _Task) -> Result:
    try:
        outcome = future.result()
    except (BrokenProcessPool, Stopped):
        raise
    except Exception as error:  # a cluster's own, of a worker lost too often, say
        reason = str(error).splitlines()[0][:200] if str(error) else ""
        return _refuse(reports, lab, task.student, f"the grader failed ({type(error).__name__}: {reason})")
    if "failed" in outcome:
        return _refuse(reports, lab, task.student, outcome["failed"])
    graded = Graded.from_dict(outcome)
    with _writing(reports):
        reports.keep(task.key, graded)
        reports.record(lab, task.student, {"key": task.key, "graded": outcome})
    return Result(task.student, graded.report, graded_now=True)


def _refuse(reports: Reports, lab: str, student: str, problem: str) -> Result:
    with _writing(reports):
        reports.record(lab, student, {"problem": problem})
    return Result(student, problem=problem)


@contextlib.contextmanager
def _writing(reports: Reports) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Stopped(
            f"cannot write to {reports.folder} ({error.strerror or error}); what was graded is kept: "
            "make room, or give another --out, and run the command again"
        ) from None
