"""Workers forked from one server: as apart from it and from one another as workers started afresh."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from autograder.submission import sandbox
from autograder.submission.forkserver import ForkServer, ServerGone
from autograder.submission.process import Limits, WorkerFailed, WorkerProcess, Workers, start_server
from autograder.submission.sandbox import Sandbox, choose

pytestmark = pytest.mark.slow
BWRAP = Sandbox("bwrap", choose().note) if choose().level == "bwrap" else None
needs_bwrap = pytest.mark.skipif(BWRAP is None, reason="bubblewrap does not work here")


@pytest.fixture(scope="module")
def workers():
    with Workers() as workers:
        yield workers


def say(worker: WorkerProcess, *sources: str) -> list[str]:
    """What each of these cells prints."""
    results = worker.run_cells([(f"cell {i}", source) for i, source in enumerate(sources)])
    assert [r.error for r in results] == [None] * len(results)
    return ["".join(o.get("text", "") for o in r.outputs).strip() for r in results]


def shown_in_tmp() -> list[str]:
    """What of the course and its environment lies in /tmp, and must be seen there."""
    shown = sandbox._visible(sandbox._course(), Path.cwd())
    return sorted({path.parts[2] for path in shown if path.is_relative_to("/tmp")})


@needs_bwrap
def test_a_worker_inherits_nothing(workers):
    with workers.start(BWRAP, Limits()) as worker:
        descriptors, processes, folders, _, rights, identity = say(
            worker,
            "import os; print(sorted(os.readlink(f'/proc/self/fd/{n}') for n in range(64)"
            " if os.path.lexists(f'/proc/self/fd/{n}')))",
            "print([name for name in os.listdir('/proc') if name.isdigit()])",
            "print([sorted(os.listdir(f)) for f in ('/tmp', '/var/tmp', '/dev/shm')], os.getcwd(), os.environ['HOME'])",
            "status = dict(line.split(':', 1) for line in open('/proc/self/status'))",
            "print(*[status[k].strip() for k in ('CapInh', 'CapPrm', 'CapEff', 'CapAmb', 'NoNewPrivs')])",
            "print(*os.getresuid(), *os.getresgid(), *os.getgroups())",
        )
    assert descriptors.count("socket:") == 1 and descriptors.count("/dev/null") == 3 and "pipe" not in descriptors
    assert processes == "['1']"
    assert folders == f"[{shown_in_tmp()}, [], []] /home/student /home/student"
    assert rights.split() == ["0" * 16] * 4 + ["1"], "no capabilities, and none to be had"
    assert len(set(identity.split())) == 1 and (os.getuid() != 0 or int(identity.split()[0]) >= 2**30)


@needs_bwrap
def test_what_the_sandbox_shows_in_tmp_is_seen(tmp_path, monkeypatch):
    """An environment or a course under /tmp, with a space in its name, and mounts in mounts."""
    folder = tmp_path / "an environment"
    (folder / "in it").mkdir(parents=True)
    (folder / "file").write_text("shown")
    (tmp_path / "other").write_text("hidden")
    for path in (*folder.parents, folder, folder / "in it"):
        if path.is_relative_to(tmp_path.parents[2]) and path.owner() == Path.home().owner():
            path.chmod(0o755)
    shown = sandbox._visible(sandbox._course(), Path.cwd())
    monkeypatch.setattr(sandbox, "_visible", lambda *_: sorted([*shown, folder, folder / "file", folder / "in it"]))
    with Workers() as workers, workers.start(BWRAP, Limits()) as worker:
        assert workers._server is not None
        found, beside, error = say(
            worker,
            "import os; ls = lambda folder: sorted(os.listdir(folder))\n"
            f"print(open('{folder}/file').read(), ls('{folder}'), ls('/tmp'))",
            f"print(os.listdir('{tmp_path}'))",
            f"try: open('{folder}/new', 'w')\nexcept OSError as error: print(error.strerror)",
        )
    assert found == f"shown ['file', 'in it'] {shown_in_tmp()}"
    assert beside == "['an environment']" and error in ("Read-only file system", "Permission denied")


@needs_bwrap
def test_workers_do_not_see_one_another(workers):
    with workers.start(BWRAP, Limits()) as first, workers.start(BWRAP, Limits()) as second:
        leave = "open('/tmp/left', 'w').write('x'); open('/dev/shm/left', 'w'); open('left', 'w'); import random, numpy"
        (one,) = say(first, f"{leave}; print(random.random(), numpy.random.rand())")
        other, found = say(
            second,
            "import random, numpy; print(random.random(), numpy.random.rand())",
            "import os; print(sorted(os.listdir('/tmp')), os.listdir('/dev/shm'), os.listdir('.'))",
        )
        assert found in (f"{shown_in_tmp()} [] []", f"{shown_in_tmp()} [] ['.ipython']")
        assert not set(one.split()) & set(other.split()), "the same random numbers for two students"


@needs_bwrap
def test_a_worker_need_not_import_torch(workers):
    with workers.start(BWRAP, Limits()) as worker:
        (seconds,) = say(
            worker, "import time; t = time.time(); import torch, matplotlib.pyplot; print(time.time() - t)"
        )
    assert float(seconds) < 0.1


@needs_bwrap
def test_a_server_that_is_gone_is_replaced(workers):
    workers.start(BWRAP, Limits()).close()
    workers._server._process.kill()
    workers._server._process.wait()
    with workers.start(BWRAP, Limits()) as worker:
        assert say(worker, "print(2)") == ["2"]


@needs_bwrap
def test_a_server_that_goes_meanwhile_is_said():
    server = start_server(BWRAP)
    server._process.kill()
    server._process.wait()
    server._process = None  # as in another process, which cannot see it
    with pytest.raises(ServerGone):
        WorkerProcess(BWRAP, Limits(), server)
    server.close()


@needs_bwrap
@pytest.mark.skipif(os.getuid() != 0, reason="an ordinary user's workers are that user's")
def test_what_goes_wrong_in_the_fork_is_said(workers, monkeypatch):
    workers.start(BWRAP, Limits()).close()  # so that there is a server, whichever test runs first
    monkeypatch.setattr(Sandbox, "new_user", lambda self: -5)
    said = pytest.raises(WorkerFailed, match="did not start.*gid is less than minimum")
    with WorkerProcess(BWRAP, Limits(start=5), workers._server) as worker, said:
        worker.run_cells([])


def test_where_no_server_works_each_worker_is_started_afresh(monkeypatch):
    monkeypatch.setattr(ForkServer, "works", lambda self, seconds=60.0: False)
    with Workers() as workers:
        for _ in range(2):
            start = time.monotonic()
            with workers.start(choose(), Limits()) as worker:
                assert say(worker, "print(3)") == ["3"]
            assert workers._server is None
        assert time.monotonic() - start < 60
