"""How a worker is kept apart from the machine it runs on.

Three levels, strongest first; `auto` takes the first that works here, found by running it:

bwrap   bubblewrap: read-only system, no network, own process space, the course and the home folder out of sight
uid     a separate unprivileged user (only when started as root): cannot write the course's files
none    the grader's own user: the verdict is still computed apart, but the submission can read and write what you can
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import autograder
import difflab

__all__ = ["LEVELS", "Sandbox", "choose"]

LEVELS = ("auto", "bwrap", "uid", "none")
_NOBODY = "65534"


@dataclass(frozen=True)
class Sandbox:
    """A level that works on this machine."""

    level: str
    note: str  # what it does not protect from, in one line; empty for the strongest

    def command(self, arguments: list[str], folder: str) -> list[str]:
        """The command line that runs `arguments` inside, with `folder` to work in."""
        if self.level == "bwrap":
            return _bwrap(arguments, folder)
        if self.level == "uid":
            return [
                "setpriv",
                f"--reuid={_NOBODY}",
                f"--regid={_NOBODY}",
                "--clear-groups",
                "--no-new-privs",
                *arguments,
            ]
        return arguments

    def environment(self, folder: str) -> dict[str, str]:
        """A clean environment: nothing of the grader's own, no network proxies, no tokens."""
        return {
            "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
            "HOME": folder,
            "LANG": "C.UTF-8",
            "MPLBACKEND": "agg",
            "DIFFLAB_GRADING": "1",  # check(...) in a student's own cell is answered later, from outside
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONHASHSEED": "random",
            "CUDA_VISIBLE_DEVICES": "",
            "TQDM_DISABLE": "1",
        }


def choose(level: str = "auto") -> Sandbox:
    """The sandbox of that level, or for `auto` the strongest that works.

    Raises:
        ValueError: for an unknown level.
        RuntimeError: if the level asked for does not work here.
    """
    if level not in LEVELS:
        raise ValueError(f"unknown sandbox {level!r}; expected one of {', '.join(LEVELS)}")
    for candidate in _candidates():
        if level == candidate.level or level == "auto":
            problem = _probe(candidate)
            if problem is None:
                return candidate
            if level != "auto":
                raise RuntimeError(f"the sandbox {level!r} does not work here: {problem}")
    raise RuntimeError("no sandbox works here")


def _candidates() -> Iterator[Sandbox]:
    yield Sandbox("bwrap", "")
    yield Sandbox(
        "uid",
        "submissions can use the network and read what every user can, the solutions perhaps included; "
        "install bubblewrap to prevent it",
    )
    yield Sandbox(
        "none",
        "submissions run as your user and could read and change your files, solutions and gradebook included; "
        "install bubblewrap, or grade on a machine that holds nothing else",
    )


@functools.cache
def _probe(sandbox: Sandbox) -> str | None:
    """None if a Python with torch's neighbours can be started inside; otherwise the reason in one line."""
    if sandbox.level == "none":
        return None
    if sandbox.level == "bwrap" and shutil.which("bwrap") is None:
        return "bubblewrap is not installed (Debian, Ubuntu: apt install bubblewrap)"
    if sandbox.level == "uid" and (os.name != "posix" or os.getuid() != 0 or shutil.which("setpriv") is None):
        return "it needs root and the program setpriv"
    try:
        run = subprocess.run(
            sandbox.command([sys.executable, "-I", "-c", "import msgpack, autograder, difflab"], "/tmp"),
            env=sandbox.environment("/tmp"), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if run.returncode == 0:
        return None
    return (run.stderr.strip().splitlines() or [f"exit status {run.returncode}"])[-1][:200]


def _bwrap(arguments: list[str], folder: str) -> list[str]:
    root = Path(autograder.__file__).resolve().parents[1]
    hidden = {Path.home().resolve(), Path.cwd().resolve(), Path("/tmp"), Path("/var/tmp"), Path("/run"), root}
    hidden.discard(Path("/"))
    visible = [
        Path(sys.prefix).resolve(),
        Path(sys.base_prefix).resolve(),
        Path(difflab.__file__).resolve().parent,
        root / "autograder" / "__init__.py",
        root / "autograder" / "submission",
        root / "data",
    ]
    command = ["bwrap", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc"]
    for path in sorted(hidden):  # a folder inside a hidden one comes after it
        if path.is_dir():
            command += ["--tmpfs", str(path)]
    for path in sorted(set(visible)):
        if path.exists():
            command += ["--ro-bind", str(path), str(path)]
    command += ["--dir", folder, "--unshare-all", "--die-with-parent", "--new-session", "--chdir", folder, "--"]
    return command + arguments
