"""How a worker is kept apart from the machine it runs on.

Three levels, strongest first; `auto` takes the first that works here, found by running it:

bwrap   bubblewrap: of the machine only a read-only system, the environment, the kit and its data; no network, a process
        space of its own, small files in memory; started as root, also an unprivileged user of its own
uid     an unprivileged user of its own for every submission (only when started as root): cannot write the course's
        files, and nothing of it stays
none    the grader's own user: the verdict is still computed apart, but the submission can read and write what you can
"""

from __future__ import annotations

import functools
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import autograder
import difflab
from difflab.paths import data_path

__all__ = ["LEVELS", "Sandbox", "choose"]

LEVELS = ("auto", "bwrap", "uid", "none")
HOME = "/home/student"  # inside bubblewrap
WRITABLE_SIZE = 256 * 2**20  # bytes, of each of the folders that can be written
_TO_CHANGE_USER = ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP")
_TO_FORK = (*_TO_CHANGE_USER, "CAP_SYS_ADMIN")
# What a Python with torch needs of a system besides its environment; torch asks the last two what the processor can do.
_SYSTEM = (
    "/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/nix/store",
    "/etc/alternatives", "/etc/fonts", "/etc/group", "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d",
    "/etc/localtime", "/etc/nsswitch.conf", "/etc/passwd", "/sys/devices/system/cpu", "/sys/devices/system/node",
)  # fmt: skip


@dataclass(frozen=True)
class Sandbox:
    """A level that works on this machine."""

    level: str
    note: str  # what it does not protect from, in one line

    def new_user(self) -> int | None:
        """A user id that nobody else has, for one submission; None where the level runs as the grader's own user."""
        if self.level == "none" or os.getuid() != 0:
            return None
        return 2**30 + secrets.randbelow(2**30)

    def command(self, arguments: list[str], user: int | None = None, forks: bool = False) -> list[str]:
        """The command line that runs `arguments` inside.

        Args:
            arguments: a command.
            user: as whom; None for the grader's own user.
            forks: whether the command is the fork server, which as root needs the rights to make namespaces and users.
        """
        if user is not None:
            arguments = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "--no-new-privs",
                         "--inh-caps=-all", "--bounding-set=-all", *arguments]  # fmt: skip
        return _bwrap(arguments, forks) if self.level == "bwrap" else arguments

    def environment(self, folder: str) -> dict[str, str]:
        """A clean environment: nothing of the grader's own, no network proxies, no tokens."""
        return {
            "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
            "HOME": HOME if self.level == "bwrap" else folder,
            "USER": "student",
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
    yield Sandbox("bwrap", "the kernel itself is shared: a submission that breaks Linux gets out")
    yield Sandbox(
        "uid",
        "submissions can use the network, fill /tmp, and read what every user can, the solutions perhaps included; "
        "install bubblewrap to prevent it",
    )
    yield Sandbox(
        "none",
        "submissions run as your user: they could read and change your files, solutions and gradebook included, "
        "stop your programs and use the network; install bubblewrap, or grade on a machine that holds nothing else",
    )


@functools.cache
def _probe(sandbox: Sandbox) -> str | None:
    """None if a Python with torch's neighbours can be started inside; otherwise the reason in one line."""
    if sandbox.level == "none":
        return None
    if sandbox.level == "bwrap" and shutil.which("bwrap") is None:
        return "bubblewrap is not installed (Debian, Ubuntu: apt install bubblewrap)"
    if sandbox.level == "uid" and (os.name != "posix" or os.getuid() != 0):
        return "it needs root"
    if sandbox.new_user() is not None and shutil.which("setpriv") is None:
        return "it needs the program setpriv, of util-linux"
    try:
        run = subprocess.run(
            sandbox.command([sys.executable, "-I", "-c", "import msgpack, autograder, difflab"], sandbox.new_user()),
            env=sandbox.environment("/tmp"), cwd="/", stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=30,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if run.returncode == 0:
        return None
    return (run.stderr.strip().splitlines() or [f"exit status {run.returncode}"])[-1][:200]


def _bwrap(arguments: list[str], forks: bool) -> list[str]:
    command = ["bwrap"]
    for folder in ("/tmp", "/var/tmp", HOME):
        command += [*_limited_size(), "--perms", "1777", "--tmpfs", folder]
    for path in map(Path, _SYSTEM):
        if path.is_symlink() and path.parent == Path("/"):
            command += ["--symlink", os.readlink(path), str(path)]
        else:
            command += ["--ro-bind-try", str(path), str(path)]
    root, here = _course(), Path.cwd()
    visible = _visible(root, here)
    command += _read_only(visible)
    hidden = [f for f in {root, here} if any(f != p and f.is_relative_to(p) for p in [*map(Path, _SYSTEM), *visible])]
    for folder in hidden:  # a course in /usr/src, say
        command += ["--tmpfs", str(folder), *_read_only([p for p in visible if p.is_relative_to(folder)])]
    command += ["--proc", "/proc", "--dev", "/dev", *_limited_size(), "--perms", "1777", "--tmpfs", "/dev/shm"]
    command += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", HOME, "--die-with-parent", "--new-session"]
    # As root without a user namespace, so that the submission can be another user than the files' owner.
    if os.getuid() == 0:
        command += ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    else:
        command += ["--unshare-all"]
    command += ["--cap-drop", "ALL"]
    needed = _TO_FORK if forks else _TO_CHANGE_USER
    command += [option for right in needed if os.getuid() == 0 for option in ("--cap-add", right)]
    return [*command, "--", *arguments]


def _read_only(paths: list[Path]) -> list[str]:
    options = []
    for folder in sorted({parent for path in paths for parent in path.parents} - {Path("/"), Path("/tmp")}):
        options += ["--dir", str(folder)]  # else only root could enter it
    for path in paths:
        options += ["--ro-bind", str(path), str(path)]
    return options


def _course() -> Path:
    """The folder that holds solutions/; of an installed package, the package itself."""
    package = Path(autograder.__file__).resolve().parent
    return package.parent if (package.parent / "solutions").is_dir() else package


def _visible(root: Path, here: Path) -> list[Path]:
    """The environment, the kit, its data, and of the grader what runs inside; a folder comes before what is in it."""
    package = Path(autograder.__file__).resolve().parent
    imported = {Path(entry).resolve() for entry in sys.path if Path(entry).is_absolute()}
    visible = {
        *(path for path in imported if not (root.is_relative_to(path) or here.is_relative_to(path))),
        Path(sys.prefix).resolve(),
        Path(sys.base_prefix).resolve(),
        Path(difflab.__file__).resolve().parent,
        package / "__init__.py",
        package / "submission",
        data_path("README.md").parent,
    } - set(map(Path, _SYSTEM))
    return sorted(path for path in visible if path.exists())


@functools.cache
def _limited_size() -> tuple[str, ...]:
    """The option that limits what a folder in memory may hold: bubblewrap has it since 0.7."""
    known = subprocess.run(["bwrap", "--help"], capture_output=True, text=True).stdout
    return ("--size", str(WRITABLE_SIZE)) if "--size" in known else ()
