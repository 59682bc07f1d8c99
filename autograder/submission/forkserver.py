"""Workers forked from a process that has imported torch already: a submission starts in milliseconds, not in seconds.

For level bwrap. The server sits in the sandbox and runs no submission's code. Each worker it forks is as apart from it,
and from other workers, as one started afresh: it gets namespaces of its own (processes, network, shared memory, the
folders that can be written) and, where the grader is root, a user of its own.

Started by `ForkServer` as `python -m autograder.submission.forkserver FD`. It first says {"problem": ...}, as JSON.
Then every packet it gets, from any process that holds the other end, is a request to fork a worker:

    {"user": ..., "memory": ..., "processes": ...} and the socket that the worker is to serve
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import re
import signal
import socket
import stat
import struct
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from autograder.submission.sandbox import Sandbox

__all__ = ["ForkServer", "ServerGone"]

# What the labs' notebooks and the worker itself import.
_PRELOADED = (
    "torch", "numpy.random", "matplotlib.pyplot", "IPython.core.interactiveshell", "autograder.submission.server",
    "difflab.check", "difflab.checkpoints", "difflab.datasets", "difflab.metrics", "difflab.notebook", "difflab.plots",
    "difflab.timing", "difflab.training",
)  # fmt: skip

_CLONE_NEWNS, _CLONE_NEWUTS, _CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
_CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_BIND, _MS_REC, _MS_SLAVE = 0x2, 0x4, 0x8, 0x1000, 0x4000, 0x80000
_PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 4, 24, 38
_CAPABILITY_VERSION_3 = 0x20080522
_CREDENTIALS = struct.Struct("3i")  # process, user, group
_MADV_HUGEPAGE, _MADV_COLLAPSE, _LARGE_PAGE = 14, 25, 2 * 2**20


# -- the grader's side ---------------------------------------------------------------------------------------------


class ServerGone(Exception):
    """The server was ended by something, by a lack of memory perhaps: start another."""


class ForkServer:
    """The other end of a server's socket. It can be passed to processes that multiprocessing starts."""

    def __init__(self, server_socket: socket.socket, process: subprocess.Popen):
        self.socket = server_socket
        self._process: subprocess.Popen | None = process  # None where it was passed to another process
        self._works: bool | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"socket": self.socket, "_process": None, "_works": self._works}

    @classmethod
    def start(cls, sandbox: Sandbox) -> ForkServer:
        """Start a server; it is not waited for."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-I", "-m", "autograder.submission.forkserver", str(theirs.fileno())]
        process = subprocess.Popen(
            sandbox.command(command, forks=True),
            env=sandbox.environment("/nonexistent"),
            cwd="/",
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        theirs.close()
        return cls(ours, process)

    def works(self, seconds: float = 60.0) -> bool:
        """Whether it can fork workers that are as apart as its sandbox promises; waits until that is known."""
        if self._works is None:
            self.socket.settimeout(seconds)
            try:
                self._works = json.loads(self.socket.recv(4096))["problem"] is None
            except (OSError, ValueError):
                self._works = False
        return self._works and (self._process is None or self._process.poll() is None)

    def fork(
        self, ours: socket.socket, theirs: socket.socket, user: int | None, memory: int, processes: int
    ) -> psutil.Process:
        """Fork a worker that serves `theirs`, the other end of `ours`, which is closed here.

        Returns:
            The worker. It is the first process of its namespace: what it starts is among its descendants and ends
            with it.

        Raises:
            ServerGone: if no worker comes.
        """
        request = json.dumps({"user": user, "memory": memory, "processes": processes}).encode()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)  # the kernel will say who speaks
        ours.settimeout(30)
        try:
            socket.send_fds(self.socket, [request], [theirs.fileno()])
            theirs.close()  # so that the end of a worker is the end of what can be read
            _, ((_, _, credentials),), _, _ = ours.recvmsg(1, socket.CMSG_SPACE(_CREDENTIALS.size))
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 0)
            ours.settimeout(None)
            return psutil.Process(_CREDENTIALS.unpack(credentials)[0])
        except (OSError, ValueError, psutil.Error) as error:
            raise ServerGone(f"the server that forks workers is gone ({type(error).__name__})") from None

    def close(self) -> None:
        """End the server and every worker of it, if this is the process that started it."""
        self.socket.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()


# -- inside the sandbox --------------------------------------------------------------------------------------------


def main() -> None:
    """Fork a worker for every packet, until nobody holds the other end."""
    from autograder.submission import worker

    control = socket.socket(fileno=int(sys.argv[1]))
    control.set_inheritable(False)
    worker.end_with_parent()
    _preload()
    worker.pin_threads()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the workers here
    control.send(json.dumps({"problem": _try_out()}).encode())
    while True:
        request, descriptors, _, _ = socket.recv_fds(control, 4096, 1)
        if not request:
            return
        with socket.socket(fileno=descriptors[0]) as worker_socket:
            worker_socket.set_inheritable(False)
            if os.fork() == 0:
                control.close()
                try:
                    _become_worker(worker_socket, **json.loads(request))
                finally:
                    os._exit(1)


def _preload() -> None:
    for name in _PRELOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # collections in the workers need not touch, and so copy, what is here now
    _use_large_pages()


def _use_large_pages() -> None:
    """Let a fork copy one entry for 2 MB of memory in place of 512: a third of its time. Needs Linux 6.1."""
    libc = ctypes.CDLL(None)
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, rights, _, _, _, *name = line.split(maxsplit=5)
        if rights == "rw-p" and (not name or name == ["[heap]"]):
            first, last = (int(address, 16) for address in addresses.split("-"))
            first, last = -(-first // _LARGE_PAGE) * _LARGE_PAGE, last // _LARGE_PAGE * _LARGE_PAGE
            for advice in (_MADV_HUGEPAGE, _MADV_COLLAPSE) if first < last else ():
                libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), advice)


def _become_worker(worker_socket: socket.socket, user: int | None, memory: int, processes: int) -> None:
    """Leave all behind that the server is, then serve. Runs in a child of the server; does not return."""
    import random

    import numpy as np

    from autograder.submission import worker
    from autograder.submission.wire import Channel

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    problem = None
    try:
        _enter_namespaces()  # from here on in another child, the first process of its namespace
        _give_up_rights(user)
        os.chdir(os.environ["HOME"])
        worker.limit(memory, processes)
    except Exception as error:
        problem = str(error)
    worker_socket.send(b"!")  # by which the grader learns its process number
    if problem is not None:
        Channel(worker_socket).send({"failed": problem})
        return
    random.seed()
    np.random.seed()
    worker.serve(worker_socket)


def _try_out() -> str | None:
    """None if workers can be had; otherwise the reason why not."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        try:
            _enter_namespaces()
            _give_up_rights(65534 if os.getuid() == 0 else None)
            os.write(writing, b"fine")
        except OSError as error:
            os.write(writing, str(error).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode(errors="replace")
    return None if said == "fine" else said or "a child of the fork server ended without a word"


def _enter_namespaces() -> None:
    """Go on in a child that sees no process but its own, an empty HOME, /tmp and /dev/shm, and no network.

    The child is the first of its process namespace: whatever it starts ends with it.
    """
    flags = _CLONE_NEWNS | _CLONE_NEWUTS | _CLONE_NEWIPC | _CLONE_NEWPID | _CLONE_NEWNET
    user, group = os.getuid(), os.getgid()
    if user != 0:  # an ordinary user may do this in a user namespace only
        flags |= _CLONE_NEWUSER
    _call("unshare", flags)
    if user != 0:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    if os.fork() != 0:
        os._exit(0)
    from autograder.submission.sandbox import HOME, WRITABLE_SIZE

    _call("mount", None, b"/", None, _MS_REC | _MS_SLAVE, None)
    for folder in ("/tmp", "/var/tmp", "/dev/shm", HOME):
        _mount_empty(folder, f"size={WRITABLE_SIZE},mode=1777")
    _call("mount", b"proc", b"/proc", b"proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, None)


def _mount_empty(folder: str, options: str) -> None:
    """A fresh folder in memory over `folder`, in which only what the sandbox had mounted is seen again."""
    mounted = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    points = [re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), point) for point in mounted]
    kept = [(point, os.open(point, os.O_PATH)) for point in points if point.startswith(f"{folder}/")]
    _call("mount", b"tmpfs", folder.encode(), b"tmpfs", _MS_NOSUID | _MS_NODEV, options.encode())
    for point, descriptor in kept:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            os.makedirs(point, exist_ok=True)
        elif not os.path.exists(point):
            os.makedirs(os.path.dirname(point), exist_ok=True)
            Path(point).touch()
        _call("mount", f"/proc/self/fd/{descriptor}".encode(), os.fsencode(point), None, _MS_BIND, None)
        os.close(descriptor)


def _give_up_rights(user: int | None) -> None:
    """Become `user`, if there is one, and be able to become nobody else."""
    if user is not None:
        with contextlib.suppress(OSError):  # until there are no more
            for capability in range(64):
                _call("prctl", _PR_CAPBSET_DROP, capability, 0, 0, 0)
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    header, nothing = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)()
    _call("capset", header, nothing)
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _call("prctl", _PR_SET_DUMPABLE, 1, 0, 0, 0)  # else /proc/self would be root's


def _call(name: str, *arguments: Any) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*(ctypes.c_ulong(a) if isinstance(a, int) else a for a in arguments)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


if __name__ == "__main__":
    main()
