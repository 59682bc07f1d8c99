"""One submission's worker process: start it, let it run the notebook, borrow a fork of it for each check, end it.

Whatever needs torch is imported by the functions that speak with the worker, not here: importing torch takes a second,
the worker needs one too, and so they spend it side by side.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import psutil

from autograder.submission.sandbox import Sandbox
from autograder.submission.watchdog import Watchdog, count_threads, end_all, family, members_of_user

if TYPE_CHECKING:
    from autograder.submission.client import Submission
    from autograder.submission.forkserver import ForkServer

__all__ = ["CellResult", "Limits", "WorkerFailed", "WorkerProcess", "Workers", "start_server"]

MAX_FATAL_CELLS = 3
MAX_RECEIVED = 256 * 2**20  # bytes one check may be sent; a check of the labs is sent ten million
MAX_TEXT, MAX_PICTURE = 400_000, 4_000_000  # characters of one cell's output, of one picture
_BASE64 = re.compile(r"[A-Za-z0-9+/=\n]*")


@dataclass(frozen=True)
class Limits:
    """What a submission may take; seconds where nothing else is said."""

    start: float = 60.0
    cell: float = 60.0
    check: float = 30.0
    notebook: float = 300.0  # all cells together
    submission: float = 900.0  # cells and checks together
    grace: float = 3.0  # after a cell's own alarm, before its process is killed
    memory: int = 4 * 2**30  # bytes, of all its processes together
    processes: int = 64 + (os.cpu_count() or 1)  # threads included; some libraries start one for each core


class WorkerFailed(Exception):
    """The worker could not be started: the machine's or the installation's fault, not the submission's."""


@dataclass
class CellResult:
    """What running one code cell gave: outputs in notebook form, and the error as (kind, message, where)."""

    label: str
    outputs: list[dict[str, Any]] = field(default_factory=list)
    error: tuple[str, str, str] | None = None


class WorkerProcess:
    """A worker that has run a notebook. Use as a context manager; leaving it kills everything it started."""

    def __init__(self, sandbox: Sandbox, limits: Limits, server: ForkServer | None = None):
        self.sandbox, self.limits, self._server = sandbox, limits, server
        self.struck: list[str] = []  # limits that struck, each in one line
        self._end: float | None = None  # of the submission's time, on the monotonic clock
        self._start()

    # -- life -----------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        self._user = user = self.sandbox.new_user()
        self._folder: str | None = None  # a forked worker has its folders in memory
        memory, processes = self.limits.memory, self.limits.processes + (count_threads() if user is None else 0)
        self._socket, self._stderr, self._process = ours, bytearray(), None
        if self._server is not None:
            root = self._server.fork(ours, theirs, user, memory, processes)
            find = functools.partial(family, root)
        else:
            self._folder = tempfile.mkdtemp(prefix="submission-")
            if user is not None:
                os.chown(self._folder, user, user)
            command = [sys.executable, "-I", "-m", "autograder.submission.worker", str(theirs.fileno())]
            self._process = process = subprocess.Popen(
                self.sandbox.command([*command, str(memory), str(processes)], user),
                env=self.sandbox.environment(self._folder),
                cwd=self._folder,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
            root = psutil.Process(process.pid)
            find = functools.partial(family, root) if user is None else functools.partial(members_of_user, user)
            threading.Thread(target=self._drain_stderr, args=(process.stderr, self._stderr), daemon=True).start()
        theirs.close()
        self._find_members = find
        self._watchdog = Watchdog(find, self.limits.memory, self._on_strike)
        self._watchdog.start()
        self._ready = False

    def _on_strike(self, what: str) -> None:
        if what not in self.struck:
            self.struck.append(what)

    @staticmethod
    def _drain_stderr(pipe: Any, kept: bytearray) -> None:
        """Read all the worker writes to stderr, keep the first part: a full pipe would stop it."""
        with contextlib.suppress(ValueError, OSError):
            while part := pipe.read1(65536):
                kept += part[: max(0, 8192 - len(kept))]

    def _wait_until_ready(self) -> None:
        if self._ready:
            return
        from autograder.submission.wire import Channel, Malformed

        self._control = Channel(self._socket)
        try:
            reason = self._control.receive(time.monotonic() + self.limits.start).get("failed")
        except (EOFError, TimeoutError, Malformed, OSError):
            reason = self._stderr.decode(errors="replace").strip().split("\n")[-1] or "no reason given"
        if reason is not None:
            raise WorkerFailed(f"the worker did not start ({self.sandbox.level}): {reason}")
        self._ready = True

    def close(self) -> None:
        """Kill the worker, its children and whatever they started."""
        self._socket.close()
        self._watchdog.stop()
        end_all(self._find_members, self._user, self._folder if self.sandbox.level == "none" else None)
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _deadline(self) -> float:
        """When the submission's time is used up; it begins to run with its first cell or check."""
        if self._end is None:
            self._end = time.monotonic() + self.limits.submission
        return self._end

    # -- work -----------------------------------------------------------------------------------------------------

    def run_cells(self, cells: list[tuple[str, str]]) -> list[CellResult]:
        """Run code cells, given as (label, source), in order, until the notebook's time is used up.

        A cell that ends the process, or cannot be stopped, costs a fresh start in which the cells before it are run
        again and it is left out.

        Returns:
            One result per cell, in the same order.

        Raises:
            WorkerFailed: if the worker cannot be started.
        """
        fatal: dict[str, CellResult] = {}
        todo = list(cells)
        while True:
            self._wait_until_ready()
            results, culprit = self._run_until_fatal(todo)
            if culprit is None:
                break
            fatal[culprit.label] = culprit
            todo = [cell for cell in todo if cell[0] != culprit.label]
            if len(fatal) > MAX_FATAL_CELLS:
                todo = todo[: len(results)]  # enough: what has worked so far is run once more, and no further
            self.close()
            self._start()
        by_label = {result.label: result for result in results} | fatal
        why = ("NotRun", "the cells before it ended the process, or took the time of the whole notebook", "")
        return [by_label.get(label, CellResult(label, error=why)) for label, _ in cells]

    def _run_until_fatal(self, cells: list[tuple[str, str]]) -> tuple[list[CellResult], CellResult | None]:
        """Results of the cells that were run, and the cell that cost the process, if one did."""
        from autograder.submission.wire import Malformed, Unsendable

        end = min(time.monotonic() + self.limits.notebook, self._deadline())
        results: list[CellResult] = []
        for label, source in cells:
            seconds = min(self.limits.cell, end - time.monotonic())
            if seconds <= 0:
                break
            try:
                deadline = time.monotonic() + seconds + self.limits.grace
                self._control.send({"do": "run", "label": label, "source": source, "seconds": seconds}, deadline)
                results.append(_read_cell(self._control.receive(deadline), label))
            except TimeoutError:
                message = f"the cell did not end within {seconds:.0f} s and could not be interrupted"
                return results, CellResult(label, error=("TimeoutError", message, label))
            except (EOFError, OSError, Malformed, Unsendable):
                message = "; ".join(["the cell ended the notebook's process", *self.struck])
                return results, CellResult(label, error=("ProcessEnded", message, label))
        return results, None

    @contextlib.contextmanager
    def fork(self) -> Iterator[Submission]:
        """A fresh copy of the state the notebook left, for one check, until `limits.check` seconds have passed.

        Raises:
            SubmissionDied: if the worker is gone.
            SubmissionTimeout: if the submission has used up its time.
        """
        from autograder.submission.client import Submission, SubmissionDied, SubmissionTimeout
        from autograder.submission.wire import Channel, Malformed

        if time.monotonic() > self._deadline():
            why = f"time: the submission's {self.limits.submission:.0f} s were used up"
            self._on_strike(f"{why} before the last check")
            raise SubmissionTimeout(f"{why} before this check")
        ours, theirs = socket.socketpair()
        channel = Channel(ours, budget=MAX_RECEIVED)
        self._wait_until_ready()
        soon = time.monotonic() + 10
        try:
            self._control.send({"do": "fork"}, soon)
            socket.send_fds(self._control.socket, [b"f"], [theirs.fileno()])
            theirs.close()
            reply = self._control.receive(soon)
            pid = reply["pid"] if isinstance(reply, dict) else None
            if type(pid) is not int:
                raise Malformed("no child")
        except (EOFError, OSError, TimeoutError, Malformed, KeyError):
            ours.close()
            raise SubmissionDied(
                "the submission's process is gone: a cell of the notebook ended or blocked it"
            ) from None
        try:
            yield Submission.connect(channel, min(time.monotonic() + self.limits.check, self._deadline()))
        finally:
            channel.close()
            with contextlib.suppress(EOFError, OSError, TimeoutError, Malformed):
                self._control.send({"do": "end", "pid": pid}, time.monotonic() + 10)


class Workers:
    """Starts workers for one submission after another, forked from one server where that works.

    Use as a context manager; leaving it ends the server.

    Args:
        sandbox, server: a server that works already, and for which sandbox.
    """

    def __init__(self, sandbox: Sandbox | None = None, server: ForkServer | None = None) -> None:
        self._sandbox, self._server = sandbox, server  # the server may be None where none works

    def start(self, sandbox: Sandbox, limits: Limits) -> WorkerProcess:
        """A fresh worker.

        Raises:
            ServerGone: if there was a server and it is gone.
        """
        if sandbox != self._sandbox or (self._server is not None and not self._server.works()):
            self.close()
            self._sandbox, self._server = sandbox, start_server(sandbox)
        return WorkerProcess(sandbox, limits, self._server)

    def close(self) -> None:
        """End the server."""
        if self._server is not None:
            self._server.close()
        self._sandbox = self._server = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def start_server(sandbox: Sandbox) -> ForkServer | None:
    """A server that forks workers into that sandbox, once it is ready; None where there can be none."""
    from autograder.submission.forkserver import ForkServer

    if sandbox.level != "bwrap":
        return None
    server = ForkServer.start(sandbox)
    if server.works():
        return server
    server.close()
    return None


def _read_cell(reply: Any, label: str) -> CellResult:
    """Take over a cell's reply, field by field: it comes from the submission's process."""
    from autograder.submission.wire import Malformed, printable

    if not isinstance(reply, dict) or reply.get("cell") != label or not isinstance(reply.get("outputs"), list):
        raise Malformed("not the outputs of the cell that was run")
    outputs, room = [], MAX_TEXT
    for output in reply["outputs"][:1000]:
        if not isinstance(output, dict):
            raise Malformed("an output of unknown kind")
        kind = output.get("output_type")
        if kind == "stream":
            name = "stderr" if output.get("name") == "stderr" else "stdout"
            outputs.append({"output_type": kind, "name": name, "text": _string(output.get("text"), room)})
            room -= len(outputs[-1]["text"])
        elif kind == "error":
            name, value = _string(output.get("ename"), 100), _string(output.get("evalue"), 2000)
            trace = [_string(line, 4000) for line in (output.get("traceback") or [])[:20]]
            outputs.append({"output_type": kind, "ename": name, "evalue": value, "traceback": trace})
        elif kind == "display_data" and isinstance(output.get("data"), dict):
            data = {}
            if "text/plain" in output["data"]:
                data["text/plain"] = _string(output["data"]["text/plain"], room)
                room -= len(data["text/plain"])
            png = output["data"].get("image/png")
            if isinstance(png, str) and len(png) <= MAX_PICTURE and _BASE64.fullmatch(png):
                data["image/png"] = png
            outputs.append({"output_type": kind, "data": data, "metadata": {}})
        else:
            raise Malformed("an output of unknown kind")
    error = reply.get("error")
    if error is not None:
        if not (isinstance(error, list) and len(error) == 3):
            raise Malformed("an error is not described properly")
        error = tuple(printable(_string(part, limit), limit) for part, limit in zip(error, (100, 2000, 200)))
    return CellResult(label, outputs, error)


def _string(value: Any, limit: int) -> str:
    from autograder.submission.wire import Malformed

    if not isinstance(value, str):
        raise Malformed("text was expected")
    return value[: max(0, limit)]
