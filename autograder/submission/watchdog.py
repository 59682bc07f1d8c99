"""What the processes of one submission use, seen from outside; and their end, all of them."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

__all__ = ["Watchdog", "count_threads", "end_all", "family", "members_of_user"]

_PERIOD = 0.25  # seconds between two looks
_SHARED_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")


def members_of_user(user: int) -> list[psutil.Process]:
    """The processes of a submission that has a user of its own."""
    return [p for p in psutil.process_iter() if _user_of(p) == user]


def family(process: psutil.Process) -> list[psutil.Process]:
    """A process and its descendants."""
    try:
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def _user_of(process: psutil.Process) -> int | None:
    with contextlib.suppress(psutil.Error):
        return process.uids().real
    return None


def count_threads() -> int:
    """Threads of the grader's own user: what its limit on processes counts from, where a submission is no one else."""
    own, count = os.getuid(), 0
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            count += process.num_threads() if _user_of(process) == own else 0
    return count


class Watchdog(threading.Thread):
    """Ends the largest process of a submission when all together hold more memory than they may."""

    def __init__(self, find_members: Callable[[], list[psutil.Process]], limit: int, report: Callable[[str], None]):
        super().__init__(daemon=True)
        self._find, self._limit, self._report = find_members, limit, report
        self._over = threading.Event()

    def run(self) -> None:
        """Look every quarter of a second."""
        while not self._over.wait(_PERIOD):
            held = {process: _private_memory(process) for process in self._find()}
            if sum(held.values()) > self._limit:
                self._report(
                    f"memory: the submission held more than {self._limit / 2**30:.1f} GB; its largest process was ended"
                )
                with contextlib.suppress(psutil.Error):
                    max(held, key=lambda process: held[process]).kill()

    def stop(self) -> None:
        """No more looks."""
        self._over.set()


def _private_memory(process: psutil.Process) -> int:
    """Bytes of memory that are not a file's; what a fork still shares with its parent is counted for both."""
    try:
        memory = process.memory_info()
    except psutil.Error:
        return 0
    return memory.rss - getattr(memory, "shared", 0)


def end_all(
    find_members: Callable[[], list[psutil.Process]], user: int | None, home: str | None, seconds: float = 5.0
) -> None:
    """Kill every process of a submission, wait until they are gone, and remove what its user left in shared folders.

    Args:
        find_members: gives the processes it has now.
        user: the submission's own user, if it has one.
        home: the HOME that no other submission has, by which processes that left the tree are known; None if they
            cannot leave.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        alive = [p for p in find_members() + ([] if home is None else _strays(home)) if _runs(p)]
        if not alive:
            break
        if user is not None:
            _kill_user(user)
        for p in alive:
            with contextlib.suppress(psutil.Error):
                p.kill()
        pause = time.monotonic() + 0.5
        while any(map(_runs, alive)) and time.monotonic() < pause:
            time.sleep(0.005)
    if user is not None:
        _remove_files_of(user)


def _runs(process: psutil.Process) -> bool:
    """Has it not ended, even if nobody has asked for its exit status?"""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _strays(home: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("HOME") == home:
                found.append(process)
    return found


def _kill_user(user: int) -> None:
    """All at once, as that user: however fast they multiply, none is missed."""
    command = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "sh", "-c", "kill -KILL -1"]
    subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _remove_files_of(user: int) -> None:
    for folder in map(Path, _SHARED_FOLDERS):
        for entry in os.scandir(folder) if folder.is_dir() else ():
            with contextlib.suppress(OSError):
                if entry.stat(follow_symlinks=False).st_uid == user:
                    if entry.is_dir(follow_symlinks=False):
                        shutil.rmtree(entry.path, ignore_errors=True)
                    else:
                        os.unlink(entry.path)
