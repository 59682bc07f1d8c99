"""Run a lab's checks with pytest against a submission, and collect what they say."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import secrets
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

from autograder.checks import CheckFailed, Graded, NotYet
from autograder.report import CheckResult
from autograder.submission.client import (
    ContractBroken,
    Missing,
    StudentError,
    Submission,
    SubmissionDied,
    SubmissionTimeout,
)

__all__ = ["checks_of", "lab_of_check", "run_checks"]

CHECKS = Path(__file__).resolve().parent


def folder_of(lab: str) -> Path:
    """The folder with the checks of a lab: autograder/checks/lab05 for lab05_sampling.

    Raises:
        ValueError: if the lab has no checks.
    """
    folder = CHECKS / lab.split("_")[0]
    if not folder.is_dir():
        raise ValueError(f"there are no checks for {lab!r}")
    return folder


def checks_of(lab: str) -> dict[str, Graded]:
    """All graded checks of a lab by name, in the order of their modules and lines."""
    found: dict[str, Graded] = {}
    for path in sorted(folder_of(lab).glob("test_*.py")):
        module = importlib.import_module(f"autograder.checks.{path.parent.name}.{path.stem}")
        for value in vars(module).values():
            if isinstance(getattr(value, "graded", None), Graded):
                found[value.graded.name] = value.graded
    return found


def lab_of_check(name: str) -> str:
    """The lab folder name (lab05) a check belongs to.

    Raises:
        ValueError: if no lab has a check of that name.
    """
    labs = sorted(path.name for path in CHECKS.glob("lab*"))
    for lab in labs:
        if name in checks_of(lab):
            return lab
    known = ", ".join(check for lab in labs for check in checks_of(lab))
    raise ValueError(f"there is no check {name!r}; the checks are: {known}")


def run_checks(
    lab: str,
    open_submission: Callable[[], AbstractContextManager[Submission]],
    names: Sequence[str] | None = None,
    seed: int | None = None,
    sources: Sequence[str] = (),
) -> list[CheckResult]:
    """Run the checks of a lab (or those named), each with a freshly opened submission and fresh random inputs.

    Args:
        lab: "lab05" or "lab05_sampling".
        open_submission: called once per check.
        names: which checks; None for all.
        seed: makes the random inputs repeatable; None takes one from the operating system.
        sources: the submission's code cells, in the order they ran, for checks that read code.
    """
    plugin = _Plugin(open_submission, names, secrets.randbits(48) if seed is None else seed, sources)
    arguments = [str(folder_of(lab)), "--rootdir", str(CHECKS), "-c", str(CHECKS / "pytest.ini")]
    # What is left out would only cost time: the last two collect garbage several times over.
    left_out = ("cacheprovider", "terminal", "logging", "warnings", "unraisableexception", "threadexception")
    arguments += ["-s", *(option for plugin in left_out for option in ("-p", f"no:{plugin}"))]
    output = io.StringIO()
    with _pytest_environment(), contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        status = pytest.main(arguments, plugins=[plugin])
    if status == pytest.ExitCode.INTERRUPTED:
        raise KeyboardInterrupt
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"the checks of {lab} could not be run (pytest: {status!r}): {output.getvalue()[-2000:]}")
    return plugin.results


@contextlib.contextmanager
def _pytest_environment():
    """No plugins or options from outside: a student's or a developer's pytest set-up must not reach the checks."""
    names = ("PYTEST_ADDOPTS", "PYTEST_PLUGINS", "PYTEST_DISABLE_PLUGIN_AUTOLOAD", "PYTEST_CURRENT_TEST")
    saved = {name: os.environ.get(name) for name in names}
    os.environ.pop("PYTEST_ADDOPTS", None)
    os.environ.pop("PYTEST_PLUGINS", None)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    try:
        yield
    finally:
        for name, value in saved.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


class _Plugin:
    """Gives the checks their fixtures and turns their outcomes into results."""

    def __init__(
        self,
        open_submission: Callable[[], AbstractContextManager[Submission]],
        names: Sequence[str] | None,
        seed: int,
        sources: Sequence[str],
    ):
        self.open_submission, self.names, self.seed, self.code_cells = open_submission, names, seed, sources
        self.results: list[CheckResult] = []

    @pytest.fixture
    def submission(self):
        """The submission under check: `submission.ClassName(...)`."""
        with self.open_submission() as submission:
            yield submission

    @pytest.fixture
    def rng(self, request: pytest.FixtureRequest) -> torch.Generator:
        """Source of the check's random inputs."""
        return torch.Generator().manual_seed(self.seed + zlib.crc32(request.node.name.encode()))

    @pytest.fixture
    def sources(self) -> Sequence[str]:
        """The code cells of the submission, in the order they ran."""
        return self.code_cells

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [
            item
            for item in items
            if isinstance(_graded(item), Graded) and (self.names is None or _graded(item).name in self.names)
        ]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item):
        item.stash[_STARTED] = time.monotonic()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo):
        report = yield
        if call.when == "call" or (call.when == "setup" and call.excinfo is not None):
            self.results.append(_result(_graded(item), call.excinfo, time.monotonic() - item.stash[_STARTED]))
        return report


_STARTED = pytest.StashKey[float]()


def _graded(item: pytest.Item) -> Any:
    return getattr(getattr(item, "function", None), "graded", None)


def _result(check: Graded, excinfo: pytest.ExceptionInfo | None, seconds: float) -> CheckResult:
    error = excinfo.value if excinfo is not None else None
    status, hint = _verdict(error)
    return CheckResult(check.name, check.points if error is None else 0, check.points, status, hint, round(seconds, 3))


def _verdict(error: BaseException | None) -> tuple[str, str]:
    if error is None:
        return "passed", ""
    if isinstance(error, StudentError):
        if error.kind == "NotImplementedError":
            return "todo", f"TODO: {error.call} is still to be written"
        return "failed", str(error)
    if isinstance(error, NotYet):
        return "todo", f"TODO: {error}"
    if isinstance(error, (CheckFailed, ContractBroken)):
        return "failed", str(error)
    if isinstance(error, Missing):
        return "missing", str(error)
    if isinstance(error, SubmissionTimeout):
        return "timeout", str(error)
    if isinstance(error, SubmissionDied):
        return "crashed", str(error)
    return "error", f"the check itself broke ({type(error).__name__}: {str(error)[:200]}); please tell your instructor"
