"""The grader on real notebooks in a real worker: good, bad and hostile by accident."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import nbformat
import pytest

from autograder.__main__ import main
from autograder.checks.oracles import GaussianOracle
from autograder.grading import grade
from autograder.notebooks import grade_id
from autograder.report import Report
from autograder.submission.process import Limits, WorkerProcess
from autograder.submission.sandbox import choose
from difflab.schedule import NoiseSchedule

LAB = "lab05_sampling"
pytestmark = pytest.mark.slow


@pytest.fixture
def write(tmp_path):
    def write(notebook):
        path = tmp_path / f"{LAB}.ipynb"
        nbformat.write(notebook, path)
        return path

    return write


def _code(notebook, exercise):
    (cell,) = (c for c in notebook.cells if grade_id(c) == f"{exercise}-code")
    return cell


def _status(report):
    return {check.name: check.status for check in report.checks}


def test_the_solution_takes_every_automatic_point(solution, write, capsys, tmp_path):
    assert main(["grade", str(write(solution(LAB))), "--json", str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["score"] == report["max_score"] == 89 and report["manual_points"] == 11
    assert report["lab"] == LAB and report["device"] == "cpu" and report["notes"] == []
    assert all(c["status"] == "passed" and c["points"] == c["max_points"] for c in report["checks"])
    text = capsys.readouterr().out
    assert "✓ ddim_sample" in text and "89 of 89 automatic points" in text


def test_the_untouched_notebook_scores_nothing_and_says_what_to_do(student, write, capsys):
    assert main(["grade", str(write(student(LAB))), "--json", "-"]) == 0
    report = Report.from_json(capsys.readouterr().out)
    assert report.score == 0 and report.notes == []
    assert all(c.status == "todo" and c.hint.startswith("TODO: ") for c in report.checks)


@pytest.mark.parametrize("level", ["none", "uid", "bwrap"])
def test_every_sandbox_gives_the_same_verdict(level, solution, write):
    try:
        choose(level)
    except RuntimeError as error:
        pytest.skip(str(error))
    report = grade(write(solution(LAB)), sandbox=level)
    assert report.score == 89 and report.sandbox == level


def test_what_cannot_be_graded_exits_with_2_and_one_line(tmp_path, capsys):
    bad = tmp_path / "bad.ipynb"
    bad.write_text("not a notebook")
    assert main(["grade", str(bad)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["grade", str(tmp_path / "absent.ipynb")]) == 2
    assert main(["grade", str(bad), "--lab", "lab99"]) == 2


STEP = {"ddpm_step", "ddpm_sample", "seed_consistency", "compare_samplers"}  # what needs ddpm_step
NOISE = {"add_noise", "forward_trajectory", "prediction_quality", "noise_predictions"}  # what needs add_noise
ACCIDENTS = {
    # exercise broken, code that replaces it, checks lost, what the report must mention
    "a syntax error": ("ddpm_step", "def ddpm_step(self x_t):\n    pass", STEP, "SyntaxError"),
    "an exception": ("ddpm_step", "raise RuntimeError('oh no')", STEP, "oh no"),
    "an endless loop in a cell": ("ddpm_step", "while True:\n    pass", STEP, "stopped after"),
    "a loop that cannot be interrupted": (
        "ddpm_step",
        "import signal\nsignal.signal(signal.SIGALRM, signal.SIG_IGN)\nwhile True: pass",
        STEP,
        "could not be interrupted",
    ),
    "sys.exit": ("ddpm_step", "import sys\nsys.exit(3)", STEP, "SystemExit"),
    "os._exit": ("ddpm_step", "import os\nos._exit(3)", STEP, "ended the notebook's process"),
    "a missing class": ("ddpm_step", "del DDPMSampler", {
        "ddpm_posterior_mean", "ddpm_posterior_variance", *STEP, "code_style"}, "DDPMSampler is not defined"),
    "exit in a method": ("ddpm_step", "import os\nDDPMSampler.ddpm_step = lambda *a: os._exit(1)",
                         STEP, "ended before it answered"),
    "100 MB of output": ("add_noise", "for _ in range(1000):\n    print('x' * 100_000)",
                         NOISE, ""),
    "noise on every descriptor": ("forward_trajectory",
                                  "import os\nfor _ in range(3200):\n    os.write(1 + _ % 2, b'x' * 65536)",
                                  {"forward_trajectory"}, ""),
    "four threads asked for": ("forward_trajectory",
                               "torch.set_num_threads(4)\ntorch.randn(500, 500) @ torch.randn(500, 500)",
                               {"forward_trajectory"}, ""),
}  # fmt: skip


@pytest.mark.parametrize("accident", ACCIDENTS)
def test_an_accident_costs_what_it_breaks_and_no_more(accident, solution, write):
    exercise, code, lost, mention = ACCIDENTS[accident]
    notebook = solution(LAB)
    _code(notebook, exercise).source = code
    report = grade(write(notebook), limits=Limits(cell=3, check=10, grace=1))
    wrong = {name for name, status in _status(report).items() if status != "passed"}
    assert wrong == lost
    told = " ".join([*report.notes, *(check.hint for check in report.checks)])
    assert mention in told
    assert "error" not in _status(report).values() and len(report.to_json()) < 100_000


def test_an_endless_check_is_stopped_at_its_deadline(solution, write):
    notebook = solution(LAB)
    _code(
        notebook, "ddpm_sample"
    ).source = "@add_to_class(DDPMSampler)\ndef sample(self, *args, **kwargs):\n    while True: pass"
    start = time.monotonic()
    report = grade(write(notebook), limits=Limits(check=2))
    assert _status(report)["ddpm_sample"] == _status(report)["compare_samplers"] == "timeout"
    assert report.score == 77  # without these two, and with no docstring in what was written
    assert time.monotonic() - start < 60


def test_the_whole_submission_has_a_deadline_too(solution, write):
    """Are checks that come after it timed out without being run, and is the limit named once?"""
    notebook = solution(LAB)
    notebook.cells.append(nbformat.v4.new_code_cell(
        "def _sleep(*args, **kwargs):\n    import time\n    time.sleep(60)\n"
        "DDPMSampler.sample = DDPMSampler.ddpm_step = DDIMSampler.sample = DDIMSampler.ddim_step = _sleep"
    ))  # fmt: skip
    start = time.monotonic()
    report = grade(write(notebook), limits=Limits(check=4, submission=10))
    assert time.monotonic() - start < 30
    late = [c for c in report.checks if "used up before this check" in c.hint]
    assert late and all(c.status == "timeout" and c.points == 0 for c in late)
    assert sum("time: the submission's 10 s were used up" in note for note in report.notes) == 1


def test_a_check_cannot_disturb_the_next(solution, write):
    """Is state that one check's calls leave behind gone in the next?"""
    notebook = solution(LAB)
    _code(notebook, "add_noise").source += (
        "\n    pass\n_original = ForwardProcessImpl.add_noise\n"
        "def _once(self, *args, **kwargs):\n    'Disturbs.'\n    ForwardProcessImpl.add_noise = None\n"
        "    DDIMSampler.sample = None\n"
        "    result = _original(self, *args, **kwargs)\n    ForwardProcessImpl.add_noise = _once\n    return result\n"
        "ForwardProcessImpl.add_noise = _once\n"
    )
    assert grade(write(notebook)).score == 89


def test_two_runs_with_one_seed_give_one_report(student, write):
    path = write(student(LAB))
    one, two = grade(path, seed=7), grade(path, seed=7)
    assert [(c.name, c.status, c.hint) for c in one.checks] == [(c.name, c.status, c.hint) for c in two.checks]


def test_the_network_call_is_seen_by_the_grader_alone():
    """Does a submission hold only a stub of the grader's network?"""
    code = (
        "class Probe:\n"
        "    def __init__(self, model): self.m = model\n"
        "    def kind(self): return [type(self.m).__name__, len(self.m.state_dict())]"
    )
    with WorkerProcess(choose("auto"), Limits()) as worker:
        worker.run_cells([("cell 1", code)])
        with worker.fork() as submission:
            assert submission.Probe(GaussianOracle(NoiseSchedule.linear(10))).kind() == ["RemoteModel", 1]


def test_attributes_and_functions_cross(tmp_path):
    """Can a check replace an attribute, with a function of its own too, and does the object see it?"""
    code = (
        "class Box:\n"
        "    value = 1\n"
        "    def look(self): return self.value\n"
        "    def use(self, a): return self.act(a, twice=True) + self.value"
    )
    with WorkerProcess(choose("auto"), Limits()) as worker:
        worker.run_cells([("cell 1", code)])
        with worker.fork() as submission:
            box = submission.Box()
            submission.set(box, "value", 5)
            submission.set(box, "act", lambda a, twice: a * (2 if twice else 1))
            assert (box.look(), box.use(10)) == (5, 25)


def test_the_command_works_as_a_module(student, write):
    run = subprocess.run(
        [sys.executable, "-m", "autograder", "grade", str(write(student(LAB)))], capture_output=True, text=True
    )
    assert run.returncode == 0 and run.stdout.count("TODO") == len(run.stdout.splitlines()) - 1, run.stderr


def test_a_slow_notebook_keeps_what_was_run_in_time(solution, write):
    """Do cells that take the notebook's time cost only themselves and what follows?"""
    notebook = solution(LAB)
    for _ in range(3):
        notebook.cells.insert(len(notebook.cells), nbformat.v4.new_code_cell("import time\ntime.sleep(30)"))
    report = grade(write(notebook), limits=Limits(notebook=8))
    assert report.score == 89
    assert sum("stopped after" in note for note in report.notes) == 1
    assert sum("took the time of the whole notebook" in note for note in report.notes) == 2


def test_many_deadly_cells_do_not_undo_the_good_ones(solution, write):
    notebook = solution(LAB)
    notebook.cells += [nbformat.v4.new_code_cell("import os\nos._exit(1)") for _ in range(6)]
    assert grade(write(notebook)).score == 89


def test_magics_and_stray_checks_do_not_stop_a_cell(solution, write):
    notebook = solution(LAB)
    stray = "%matplotlib inline\nfrom difflab.check import check\ncheck('add_noise')\nexit\n"
    _code(notebook, "add_noise").source = stray + _code(notebook, "add_noise").source
    report = grade(write(notebook))
    assert report.score == 89 and report.notes == []
