"""The worker: runs a notebook's cells, then answers each check from a forked copy of the state they left.

Started afresh as `python -m autograder.submission.worker FD MEMORY PROCESSES`, or forked by
`autograder.submission.forkserver`; in a sandbox, if the machine has one. Messages on the control socket, one after
another:

    {"do": "run", "label": ..., "source": ..., "seconds": ...}     run one cell; the reply holds its outputs
    {"do": "fork"} and a socket     a child that serves `Server` requests on that socket; reply {"pid": ...}
    {"do": "end", "pid": ...}       kill the child and all it started; no reply
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import io
import os
import re
import resource
import signal
import socket
import sys
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: its thread pool does not survive a fork

MAX_CELL_OUTPUT = 200_000  # characters of text kept of one cell
MAX_CELL_PICTURES = 20


def main() -> None:
    """Serve the control socket until it closes. Arguments: its descriptor, bytes of memory, number of processes."""
    descriptor, memory, processes = map(int, sys.argv[1:])
    control_socket = socket.socket(fileno=descriptor)
    control_socket.set_inheritable(False)
    end_with_parent()
    limit(memory, processes)
    pin_threads()
    serve(control_socket)


def serve(control_socket: socket.socket) -> None:
    """Do what the grader asks on `control_socket`, until it closes."""
    import torch
    from IPython.core.interactiveshell import InteractiveShell

    from autograder.submission.server import Server
    from autograder.submission.wire import Channel

    class Shell(InteractiveShell):
        """A shell without a window or a person: `%matplotlib inline` and `exit()` are no reason to stop a cell."""

        def enable_gui(self, gui=None):
            pass

        def ask_exit(self):
            pass

    control = Channel(control_socket)
    control.send({"ready": True})
    shell = Shell.instance(colors="nocolor")
    runner = _CellRunner(shell)
    children: set[int] = set()
    while True:
        try:
            request = control.receive()
        except EOFError:
            return
        if request["do"] == "run":
            control.send(runner.run(request["label"], request["source"], request["seconds"]))
        elif request["do"] == "fork":
            _, descriptors, _, _ = socket.recv_fds(control_socket, 1, 1)
            sys.stdout.flush()
            pid = os.fork()
            if pid == 0:
                os.setsid()
                end_with_parent()
                control_socket.close()
                torch.set_num_threads(1)
                try:
                    _serve(Channel(socket.socket(fileno=descriptors[0])), shell.user_ns, runner.file_labels, Server)
                finally:
                    os._exit(1)  # what the notebook left for the end of its process is not the check's concern
            os.close(descriptors[0])
            children.add(pid)
            control.send({"pid": pid})
        elif request["do"] == "end" and request["pid"] in children:
            children.discard(request["pid"])
            with contextlib.suppress(ProcessLookupError):
                os.killpg(request["pid"], signal.SIGKILL)
            os.waitpid(request["pid"], 0)


def limit(memory: int, processes: int) -> None:
    """What the kernel holds each process to. That all of them together keep within `memory` is the watchdog's part."""
    limits = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 64 * 2**20,
        resource.RLIMIT_NOFILE: 512,
        resource.RLIMIT_NPROC: processes,
        resource.RLIMIT_DATA: memory,  # not the address space, of which importing torch takes gigabytes
    }
    for kind, value in limits.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # should the machine run out of memory all the same, this goes first


def end_with_parent() -> None:
    """Linux ends this process when the one that started it is gone: a grader that is killed leaves no one behind."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def pin_threads() -> None:
    """One thread, for good: a notebook that asks for four would hang the children forked from it."""
    import torch

    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    really_set = torch.set_num_threads
    torch.set_num_threads = lambda _count: really_set(1)
    torch.set_num_interop_threads = lambda _count: None


def _serve(channel: Any, namespace: dict[str, Any], file_labels: dict[str, str], server_class: Any) -> None:
    """Answer requests on `channel` until it closes; never returns."""
    from autograder.submission.server import exception_for
    from autograder.submission.wire import Unsendable

    def ask(identity: int, method: str, arguments: list) -> Any:
        channel.send({"ask": [identity, method, arguments]})
        reply = channel.receive()
        if "raise" in reply:
            kind, message = reply["raise"]
            raise exception_for(kind, message)
        return reply["return"]

    server = server_class(namespace, ask, file_labels.get)
    while True:
        try:
            request = channel.receive()
        except EOFError:
            os._exit(0)
        reply = server.answer(request)
        try:
            channel.send(reply)
        except Unsendable as error:
            channel.send({"error": ["Unsendable", str(error), ""]})


class _CellTimeout(Exception):
    """Raised inside a cell by the alarm. Students may swallow it: the grader's own deadline comes a little later."""


class _CellRunner:
    """Runs cells in an IPython shell and collects their outputs in notebook form."""

    def __init__(self, shell: Any):
        self.shell = shell
        self.file_labels: dict[str, str] = {}
        self.outputs: list[dict[str, Any]] = []
        self.room = MAX_CELL_OUTPUT
        self.pictures = MAX_CELL_PICTURES
        shell.display_pub.publish = self._publish
        shell.displayhook.write_output_prompt = lambda: None
        shell.displayhook.write_format_data = lambda data, _metadata=None: self._publish(data)
        shell.displayhook.finish_displayhook = lambda: None
        shell.showtraceback = lambda *args, **kwargs: None  # errors are read off the result instead
        shell.showsyntaxerror = lambda *args, **kwargs: None
        signal.signal(signal.SIGALRM, self._on_alarm)

    def run(self, label: str, source: str, seconds: float) -> dict[str, Any]:
        """Run one cell for at most `seconds`; returns {"cell", "outputs", "error"}."""
        self.outputs, self.room, self.pictures = [], MAX_CELL_OUTPUT, MAX_CELL_PICTURES
        self.seconds = seconds
        error: BaseException | None = None
        signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # again every second, should the first be caught
        try:
            with (
                contextlib.redirect_stdout(_Stream(self, "stdout")),
                contextlib.redirect_stderr(_Stream(self, "stderr")),
            ):
                self._remember_file(label, source)
                result = self.shell.run_cell(source, store_history=False)
                error = result.error_before_exec or result.error_in_exec
                self._flush_figures()
        except BaseException as raised:  # an alarm that struck between two statements of ours
            error = raised
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        description = None
        if error is not None:
            description = self._describe(error)
            self.outputs.append(
                {
                    "output_type": "error",
                    "ename": description[0],
                    "evalue": description[1],
                    "traceback": [
                        ": ".join(filter(None, description[:2])) + (f"  ({description[2]})" if description[2] else "")
                    ],
                }
            )
        return {"cell": label, "outputs": self.outputs, "error": description}

    def _remember_file(self, label: str, source: str) -> None:
        transformed = self.shell.transform_cell(source)
        name = self.shell.compile.get_code_name(source, transformed, self.shell.execution_count)
        self.file_labels[name] = label

    def _describe(self, error: BaseException) -> list[str]:
        from autograder.submission.server import describe

        kind, message, where = describe(error, self.file_labels.get)
        if isinstance(error, SyntaxError) and error.lineno:
            where = f"line {error.lineno}"
        if isinstance(error, _CellTimeout):
            kind = "TimeoutError"
        return [kind, re.sub(r" \(<ipython-input-[^)]*\)| \(\d+\.py, line \d+\)", "", message), where]

    def _on_alarm(self, _signal: int, _frame: Any) -> None:
        raise _CellTimeout(f"the cell was stopped after {self.seconds:g} s")

    def _text(self, name: str, text: str) -> None:
        if self.room <= 0:
            return
        if len(text) > self.room:
            text = text[: self.room] + f"\n[output cut after {MAX_CELL_OUTPUT:,} characters]\n"
        self.room -= len(text)
        if self.outputs and self.outputs[-1].get("name") == name:
            self.outputs[-1]["text"] += text
        else:
            self.outputs.append({"output_type": "stream", "name": name, "text": text})

    def _publish(self, data: dict[str, Any], *_args: Any, **_kwargs: Any) -> None:
        kept: dict[str, str] = {}
        text, png = data.get("text/plain"), data.get("image/png")
        if isinstance(text, str) and self.room > 0:
            kept["text/plain"] = text[: self.room]
            self.room -= len(text)
        if png is not None and self.pictures > 0:
            self.pictures -= 1
            kept["image/png"] = png if isinstance(png, str) else base64.b64encode(png).decode()
        if kept:
            self.outputs.append({"output_type": "display_data", "data": kept, "metadata": {}})

    def _flush_figures(self) -> None:
        plt = sys.modules.get("matplotlib.pyplot")
        if plt is None:
            return
        for number in plt.get_fignums():
            if self.pictures > 0:
                buffer = io.BytesIO()
                plt.figure(number).savefig(buffer, format="png", dpi=72)
                self._publish({"image/png": buffer.getvalue()})
        plt.close("all")


class _Stream(io.TextIOBase):
    """A stdout that keeps only as much as the runner has room for."""

    def __init__(self, runner: _CellRunner, name: str):
        self.runner, self.name = runner, name

    def write(self, text: str) -> int:
        self.runner._text(self.name, str(text))
        return len(text)

    def writable(self) -> bool:
        return True


if __name__ == "__main__":
    main()
