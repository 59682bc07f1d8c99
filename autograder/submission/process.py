"""One submission's worker process: start it, let it run the notebook, borrow a fork of it for each check, end it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from autograder.submission.client import Submission, SubmissionDied
from autograder.submission.sandbox import Sandbox
from autograder.submission.wire import Channel, Malformed

__all__ = ["CellResult", "Limits", "WorkerFailed", "WorkerProcess"]

MAX_FATAL_CELLS = 3
_KEPT_OUTPUTS = {"stream", "display_data", "error"}


@dataclass(frozen=True)
class Limits:
    """Seconds a submission may take."""

    start: float = 60.0
    cell: float = 60.0
    check: float = 30.0
    notebook: float = 300.0  # all cells together
    grace: float = 3.0  # after a cell's own alarm, before its process is killed


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

    def __init__(self, sandbox: Sandbox, limits: Limits):
        self.sandbox, self.limits = sandbox, limits
        self._start()

    # -- life -----------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-I", "-m", "autograder.submission.worker", str(theirs.fileno())]
        self._process = subprocess.Popen(
            self.sandbox.command(command),
            env=self.sandbox.environment(),
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        theirs.close()
        self._control, self._stderr = Channel(ours), bytearray()
        threading.Thread(target=self._drain_stderr, args=(self._process.stderr, self._stderr), daemon=True).start()
        self._ready = False

    @staticmethod
    def _drain_stderr(pipe: Any, kept: bytearray) -> None:
        """Read all the worker writes to stderr, keep the first part: a full pipe would stop it."""
        with contextlib.suppress(ValueError, OSError):
            while part := pipe.read1(65536):
                kept += part[: max(0, 8192 - len(kept))]

    def _wait_until_ready(self) -> None:
        if self._ready:
            return
        try:
            self._control.receive(time.monotonic() + self.limits.start)
        except (EOFError, TimeoutError, Malformed, OSError):
            lines = self._stderr.decode(errors="replace").strip().splitlines()
            raise WorkerFailed(
                f"the worker did not start ({self.sandbox.level}): {lines[-1] if lines else 'no reason given'}"
            ) from None
        self._ready = True

    def close(self) -> None:
        """Kill the worker, its children and whatever they started."""
        self._control.close()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- work -----------------------------------------------------------------------------------------------------

    def run_cells(self, cells: list[tuple[str, str]]) -> list[CellResult]:
        """Run code cells, given as (label, source), in order.

        A cell that ends the process or cannot be stopped costs a second start, in which it is left out.

        Returns:
            One result per cell, in the same order.

        Raises:
            WorkerFailed: if the worker cannot be started.
        """
        end = time.monotonic() + self.limits.notebook
        fatal: dict[str, CellResult] = {}
        while True:
            self._wait_until_ready()
            results, culprit = self._run_once([cell for cell in cells if cell[0] not in fatal], end)
            if culprit is not None:
                fatal[culprit.label] = culprit
                self.close()
                self._start()
                if len(fatal) <= MAX_FATAL_CELLS and time.monotonic() < end:
                    continue
            by_label = {result.label: result for result in results} | fatal
            why = ("NotRun", "cells before it ended the process, or took the time of the whole notebook", "")
            return [by_label.get(label, CellResult(label, error=why)) for label, _ in cells]

    def _run_once(self, cells: list[tuple[str, str]], end: float) -> tuple[list[CellResult], CellResult | None]:
        seconds = self.limits.cell
        results: list[CellResult] = []
        try:
            request = {"do": "run", "cells": [list(c) for c in cells], "cell_seconds": seconds}
            self._control.send(request, time.monotonic() + 10)
            for label, _source in cells:
                deadline = min(time.monotonic() + seconds, end) + self.limits.grace
                results.append(_read_cell(self._control.receive(deadline), label))
        except TimeoutError:
            label = cells[len(results)][0]
            message = f"the cell did not end within {seconds:.0f} s and could not be interrupted"
            return results, CellResult(label, error=("TimeoutError", message, label))
        except (EOFError, OSError, Malformed):
            label = cells[len(results)][0]
            return results, CellResult(label, error=("ProcessEnded", "the cell ended the notebook's process", label))
        return results, None

    @contextlib.contextmanager
    def fork(self) -> Iterator[Submission]:
        """A fresh copy of the state the notebook left, for one check, until `limits.check` seconds have passed.

        Raises:
            SubmissionDied: if the worker is gone.
        """
        ours, theirs = socket.socketpair()
        channel = Channel(ours)
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
            yield Submission.connect(channel, time.monotonic() + self.limits.check)
        finally:
            channel.close()
            with contextlib.suppress(EOFError, OSError, TimeoutError, Malformed):
                self._control.send({"do": "end", "pid": pid}, time.monotonic() + 10)
                self._control.receive(time.monotonic() + 10)


def _read_cell(reply: Any, label: str) -> CellResult:
    """Take over a cell's reply, field by field: it comes from the submission's process."""
    if not isinstance(reply, dict) or reply.get("cell") != label or not isinstance(reply.get("outputs"), list):
        raise Malformed("not the outputs of the cell that was run")
    outputs = []
    for output in reply["outputs"][:1000]:
        if not isinstance(output, dict) or output.get("output_type") not in _KEPT_OUTPUTS:
            raise Malformed("an output of unknown kind")
        kind = output["output_type"]
        if kind == "stream":
            name = "stderr" if output.get("name") == "stderr" else "stdout"
            outputs.append({"output_type": kind, "name": name, "text": _string(output.get("text"))})
        elif kind == "error":
            trace = [_string(line) for line in output.get("traceback") or []]
            outputs.append(
                {
                    "output_type": kind,
                    "ename": _string(output.get("ename")),
                    "evalue": _string(output.get("evalue")),
                    "traceback": trace,
                }
            )
        else:
            data = output.get("data") if isinstance(output.get("data"), dict) else {}
            kept = {mime: _string(data[mime]) for mime in ("text/plain", "image/png") if mime in data}
            outputs.append({"output_type": kind, "data": kept, "metadata": {}})
    error = reply.get("error")
    if error is not None:
        if not (isinstance(error, list) and len(error) == 3):
            raise Malformed("an error is not described properly")
        error = tuple(_string(part) for part in error)
    return CellResult(label, outputs, error)


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise Malformed("text was expected")
    return value
