"""Verdicts by content: what has been graded once, by the same checks in the same way, is not graded again.

A folder of reports has two parts, both written by one process at a time and readable by any:

    store/<key>.json            verdicts on whose content alone they depend
    <lab>/<student>.json        what the last run of `grade-class` found, time-outs and unreadable files included
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from nbformat import NotebookNode

import autograder
import difflab
from autograder import notebooks
from autograder.report import Graded
from autograder.submission.process import Limits
from difflab.paths import data_path

__all__ = ["Reports", "key_of", "version"]


@functools.cache
def version() -> str:
    """A digest of all that can change a verdict besides the submission: checks, grader, kit, data, torch, Python."""
    digest = hashlib.sha256(f"{metadata.version('torch')} {platform.python_version()}".encode())
    packages = [Path(module.__file__).parent for module in (autograder, difflab)]
    files = [path for folder in packages for path in sorted(folder.rglob("*.py"))]
    files += sorted(path for path in data_path("README.md").parent.iterdir() if path.suffix in (".npz", ".safetensors"))
    for path in files:
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def key_of(notebook: NotebookNode, lab: str, sandbox: str, limits: Limits) -> str:
    """What a verdict depends on, as 64 hexadecimal digits.

    Args:
        notebook: as `notebooks.sanitise` left it; its code counts.
        lab, sandbox, limits: how it is graded. Limits of time do not count: a verdict they had a part in is not stored.
    """
    cells = [  # by their places, which reports name; text is no part of it, and nbgrader adds mark schemes to that
        (index, cell.source, notebooks.grade_id(cell), notebooks.is_graded(cell), notebooks.is_demo(cell))
        for index, cell in enumerate(notebook.cells)
        if cell.cell_type == "code"
    ]
    content = json.dumps([version(), lab, sandbox, limits.memory, limits.processes, cells], ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()


class Reports:
    """A folder of verdicts. Files appear whole or not at all: a run that is killed leaves nothing half-written."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)

    def find(self, key: str, lab: str = "", student: str = "") -> Graded | None:
        """The verdict of that key, from the store, or from the last run on that student."""
        stored = _read(self._stored(key))
        if stored is None and student:
            last = _read(self.path_of(lab, student))
            stored = last.get("graded") if last is not None and last.get("key") == key else None
        return None if stored is None else Graded.from_dict(stored)

    def keep(self, key: str, graded: Graded) -> None:
        """Store a verdict, unless a limit of time or the grader itself had a part in it.

        Raises:
            OSError: if it cannot be written.
        """
        if graded.is_repeatable:
            _write(self._stored(key), graded.to_dict())

    def record(self, lab: str, student: str, result: dict[str, Any]) -> None:
        """Write down what a run found about a student.

        Raises:
            OSError: if it cannot be written.
        """
        _write(self.path_of(lab, student), result)

    def recorded(self, lab: str, student: str) -> dict[str, Any] | None:
        """What the last run found about a student."""
        return _read(self.path_of(lab, student))

    def _stored(self, key: str) -> Path:
        return self.folder / "store" / key[:2] / f"{key}.json"

    def path_of(self, lab: str, student: str) -> Path:
        """Where `record` writes."""
        return self.folder / lab / f"{student}.json"


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, ensure_ascii=False)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
