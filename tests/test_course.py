"""A class, graded in parallel: on this machine, on a cluster, through Gradescope, with the same scores everywhere."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from concurrent.futures import Executor, Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import nbformat
import psutil
import pytest

from autograder import course as course_module
from autograder.class_report import class_page
from autograder.course import Result, Stopped, find_submissions, grade_class
from autograder.demo import CLASS, LAB, hand_in, nbgrader, set_up
from autograder.exports import find_handed_in, grades_csv, gradescope_results, gradescope_zip
from autograder.notebooks import CannotGrade, sanitise
from autograder.report import CheckResult, Graded, Report
from autograder.store import Reports, key_of
from autograder.submission.process import Limits
from autograder.submission.sandbox import choose

SCORES = {"amira": 89, "boris": 0, "chen": 34, "dara": 82, "emeka": 71, "freya": 82, "goran": 79}


def report(score: float = 4, status: str = "failed", hint: str = "x_t is off by 0.5", notes: tuple = ()) -> Report:
    checks = [CheckResult("add_noise", 4, 4, "passed", "", 0.1), CheckResult("ddpm_step", 0, 6, status, hint, 0.1)]
    return Report(LAB, score, 10, 11, checks, "bwrap", "cpu", list(notes))


def graded(**options) -> Graded:
    return Graded(report(**options), [None, [{"output_type": "stream", "name": "stdout", "text": "hello"}]], True)


# -- what was handed in --------------------------------------------------------------------------------------------


@pytest.fixture
def submitted(tmp_path, course) -> Path:
    """A folder in which much has gone wrong."""
    folder = tmp_path / "submitted"
    for name in ("fine", "with spaces", "-rf", "none", "two", "renamed", "linked", "huge", "damaged"):
        (folder / name / LAB).mkdir(parents=True)
    good = course / "labs" / LAB / f"{LAB}.ipynb"
    for name in ("fine", "with spaces", "-rf", "two"):
        shutil.copy(good, folder / name / LAB)
    shutil.copy(good, folder / "two" / LAB / "copy.ipynb")
    shutil.copy(good, folder / "renamed" / LAB / "homework.ipynb")
    (folder / "linked" / LAB / f"{LAB}.ipynb").symlink_to(good)
    with open(folder / "huge" / LAB / f"{LAB}.ipynb", "wb") as file:
        file.truncate(200 * 2**20)
    (folder / "damaged" / LAB / f"{LAB}.ipynb").write_text('{"cells": [')
    (folder / "nothing").mkdir()
    (folder / "a stray file.txt").write_text("x")
    (folder / ".hidden").mkdir()
    (folder / "folder-link").symlink_to(folder / "fine")
    return folder


def test_every_student_is_found_or_named(submitted):
    found = find_submissions(submitted, LAB)
    fine = {name for name, what in found.items() if isinstance(what, Path)}
    assert fine == {"fine", "with spaces", "-rf", "huge", "damaged"}
    wrong = {name: what for name, what in found.items() if isinstance(what, str)}
    assert wrong.keys() == {"none", "two", "renamed", "linked", "nothing", "folder-link"}
    for name, part in {"none": "no notebook", "two": "two notebooks", "renamed": "should be called",
                       "linked": "symbolic link", "nothing": "nothing was handed in",
                       "folder-link": "symbolic link"}.items():  # fmt: skip
        assert part in wrong[name] and "\n" not in wrong[name]


def test_a_folder_that_is_no_class_is_refused(tmp_path):
    with pytest.raises(CannotGrade, match="no such folder"):
        find_submissions(tmp_path / "absent", LAB)
    with pytest.raises(CannotGrade, match="no student's folder"):
        find_submissions(tmp_path, LAB)


# -- the run, with executors that misbehave ------------------------------------------------------------------------


class Here(Executor):
    """Runs nothing: answers as `answer` says for every notebook, at once."""

    def __init__(self, answer):
        self.answer = answer

    def submit(self, function, text, *args):
        future: Future = Future()
        try:
            future.set_result(self.answer(text))
        except BaseException as error:
            future.set_exception(error)
        return future


def run(submitted, out, answer, **options) -> dict[str, Result]:
    results = grade_class(submitted, LAB, out, lambda: contextlib.nullcontext(Here(answer)), 2, **options)
    return {result.student: result for result in results}


def test_the_rest_is_graded(submitted, tmp_path):
    results = run(submitted, tmp_path / "out", lambda text: graded().to_dict())
    assert {name for name, result in results.items() if result.report} == {"fine", "with spaces", "-rf"}
    assert "200 MB" in results["huge"].problem and "not JSON" in results["damaged"].problem
    assert len(results) == 11 and all(result.report or result.problem for result in results.values())


def test_what_is_graded_is_not_graded_again(submitted, tmp_path):
    run(submitted, tmp_path / "out", lambda text: graded().to_dict())

    def never(text):
        raise AssertionError("graded again")

    results = run(submitted, tmp_path / "out", never)
    assert results["fine"].report.score == 4 and not any(result.graded_now for result in results.values())


def test_time_outs_are_not_stored_but_not_repeated_in_the_next_run_either(submitted, tmp_path):
    slow = Graded(report(status="timeout"), [], is_repeatable=False)
    run(submitted, tmp_path / "out", lambda text: slow.to_dict())
    assert not (tmp_path / "out" / "store").exists()
    again = run(submitted, tmp_path / "out", lambda text: graded(score=5).to_dict())
    assert again["fine"].report.score == 4


def test_a_process_that_dies_is_replaced_and_its_submission_tried_again(submitted, tmp_path):
    calls = []

    def answer(text):
        calls.append(text)
        if len(calls) == 2:
            raise BrokenProcessPool("it died")
        return graded().to_dict()

    results = run(submitted, tmp_path / "out", answer)
    assert {n for n, r in results.items() if r.report} == {"fine", "with spaces", "-rf"} and len(results) == 11


def test_a_submission_that_kills_every_process_is_given_up(submitted, tmp_path):
    def die(text):
        raise BrokenProcessPool("it died")

    results = run(submitted, tmp_path / "out", die)
    assert "died 3 times" in results["fine"].problem and len(results) == 11


def test_other_failures_of_a_cluster_cost_one_submission(submitted, tmp_path):
    def answer(text):
        raise KeyError("KilledWorker")

    assert "KilledWorker" in run(submitted, tmp_path / "out", answer)["fine"].problem


def test_a_full_disk_stops_the_run_in_one_line(submitted, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Reports, "keep", full)
    with pytest.raises(Stopped, match="No space left.*is kept") as stopped:
        run(submitted, tmp_path / "out", lambda text: graded().to_dict())
    assert "\n" not in str(stopped.value)


def test_other_versions_on_a_cluster_are_refused(monkeypatch):
    with pytest.raises(Stopped, match="another version"):
        course_module._grade("{}", LAB, "none", Limits(), expected="something else")


# -- the store -----------------------------------------------------------------------------------------------------


def test_verdicts_are_found_by_content(student, tmp_path):
    notebook = sanitise(student(LAB), student(LAB))
    key = key_of(notebook, LAB, "bwrap", Limits())
    reports = Reports(tmp_path)
    assert reports.find(key) is None
    reports.keep(key, graded())
    assert reports.find(key) == graded()
    assert key == key_of(notebook, LAB, "bwrap", Limits(check=1))
    changed = sanitise(student(LAB), student(LAB))
    next(cell for cell in changed.cells if cell.cell_type == "code").source += " "
    assert len({key, key_of(changed, LAB, "bwrap", Limits()), key_of(notebook, LAB, "none", Limits()),
                key_of(notebook, LAB, "bwrap", Limits(memory=1))}) == 4  # fmt: skip


def test_a_damaged_verdict_is_none(tmp_path):
    reports = Reports(tmp_path)
    reports.keep("ab" * 32, graded())
    (path,) = (tmp_path / "store").rglob("*.json")
    path.write_text("{")
    assert reports.find("ab" * 32) is None


# -- what others read ----------------------------------------------------------------------------------------------


def test_the_table_has_a_row_for_everyone_and_no_formulas():
    text = grades_csv(
        [Result("zoe", report()), Result("=cmd|x", problem="no\nnotebook"), Result("abe", report(score=0))]
    )
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["student"] for row in rows] == ["'=cmd|x", "abe", "zoe"]
    assert rows[2]["score"] == "4" and rows[2]["add_noise"] == "4" and rows[2]["ddpm_step"] == "0"
    assert rows[0]["problem"] == "no notebook" and rows[0]["score"] == ""


def test_the_class_page_stands_alone_and_escapes():
    results = [Result(f"s{i}", report(hint=f"x_t is off by {i}.25 at t = {i}")) for i in range(5)]
    results += [Result("<script>alert(1)</script>", report(score=10, status="passed", hint=""))]
    results += [Result("late", report(status="timeout", hint="no answer", notes=("memory: <b>",)))]
    results += [Result("absent", problem="nothing was handed in")]
    page = class_page(results, "Lab")
    assert "<script" not in page and not re.search(r'(src|href)="(?!feedback/|#)', page)
    assert "7 of 8 submissions graded" in page
    misconceptions = page.split("What went wrong most often")[1].split("Stopped")[0]
    assert misconceptions.count("is off by") == 1 and re.search(r">\s*5\s*</td>", misconceptions)
    assert "check ddpm_step: timeout" in page and "nothing was handed in" in page
    assert "86 %" not in page and "14 %" in page, "one of seven passed ddpm_step"
    class_page([], "empty")
    class_page([Result("a", problem="b")], "none graded")


def test_gradescope_is_told_each_check():
    results = gradescope_results(report(notes=("cell 3: ValueError",)))
    assert results["score"] == 4 and [test["score"] for test in results["tests"]] == [4, 0]
    assert results["tests"][1]["output"] == "x_t is off by 0.5" and "cell 3" in results["output"]
    assert gradescope_results(None, "not JSON")["score"] == 0


def test_the_uploaded_notebook_is_found(tmp_path):
    with pytest.raises(CannotGrade, match="no notebook"):
        find_handed_in(tmp_path, LAB)
    (tmp_path / "mine.ipynb").write_text("{}")
    assert find_handed_in(tmp_path, LAB).name == "mine.ipynb"
    (tmp_path / f"{LAB}.ipynb").write_text("{}")
    assert find_handed_in(tmp_path, LAB).name == f"{LAB}.ipynb"


# -- the real thing ------------------------------------------------------------------------------------------------

real = [pytest.mark.slow, pytest.mark.xdist_group("class")]


def command(*arguments: str | Path, **options) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "autograder", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, **options)


def scores(out: Path) -> dict[str, float]:
    with open(out / "grades.csv", newline="", encoding="utf-8") as file:
        return {row["student"]: float(row["score"]) for row in csv.DictReader(file) if row["score"]}


@pytest.fixture(scope="module")
def klass(tmp_path_factory) -> Path:
    """The example class, in a course folder, graded on this machine; one more student has handed in nothing."""
    folder = tmp_path_factory.mktemp("class")
    set_up(folder)
    hand_in(folder)
    (folder / "submitted" / "harriet").mkdir()
    run = command("grade-class", folder / "submitted", "--lab", LAB, "--out", folder / "reports", "--workers", "2",
                  "--check-seconds", "5")  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "7 of 8 graded, 7 of them now" in run.stdout
    assert "harriet: nothing was handed in" in run.stderr and "Traceback" not in run.stderr
    return folder


def hand_in_untouched(folder: Path, notebook: nbformat.NotebookNode, students: int) -> None:
    """That many submissions, no two alike."""
    for number in range(students):
        notebook.cells.append(nbformat.v4.new_code_cell(f"# number {number}"))
        (folder / f"student{number}" / LAB).mkdir(parents=True)
        nbformat.write(notebook, folder / f"student{number}" / LAB / f"{LAB}.ipynb")


class TestRealClass:
    pytestmark = real

    def test_scores_and_pages(self, klass):
        assert scores(klass / "reports") == SCORES
        page = (klass / "reports" / "report.html").read_text(encoding="utf-8")
        assert "harriet" in page and "ᾱ_t in place of α_t" in page and "check ddpm_sample: timeout" in page
        for name in CLASS:
            assert (klass / "reports" / "feedback" / f"{name}.html").exists()
        html = (klass / "reports" / "feedback" / "dara.html").read_text(encoding="utf-8")
        assert "Not yet (" in html and "82</b> of 100 points; 11 of them wait for a person" in html

    def test_a_second_run_grades_nothing(self, klass):
        run = command("grade-class", klass / "submitted", "--lab", LAB, "--out", klass / "reports")
        assert "7 of 8 graded, 0 of them now" in run.stdout, run.stderr
        assert scores(klass / "reports") == SCORES

    def test_nbgrader_reads_the_same_verdicts(self, klass, tmp_path):
        folder = tmp_path / "course"
        shutil.copytree(klass, folder)
        shutil.rmtree(folder / "submitted" / "harriet")
        told = 0
        for path in (folder / "reports").rglob("*.json"):  # a mark that shows where a verdict was taken from
            text = path.read_text(encoding="utf-8")
            told += "ᾱ_t in place of α_t" in text
            path.write_text(text.replace("ᾱ_t in place of α_t", "READ FROM THE STORE"), encoding="utf-8")
        assert told
        for step in (["generate_assignment", LAB], ["autograde", LAB], ["export"]):
            run = nbgrader(folder, *step)
            assert run.returncode == 0, run.stderr
        with open(folder / "grades.csv", newline="") as file:
            assert {row["student_id"]: float(row["score"]) for row in csv.DictReader(file)} == SCORES
        assert "READ FROM THE STORE" in (folder / "autograded" / "dara" / LAB / f"{LAB}.ipynb").read_text()

    def test_a_killed_run_goes_on(self, tmp_path, student):
        folder, out = tmp_path / "submitted", tmp_path / "out"
        hand_in_untouched(folder, student(LAB), 8)
        line = ["grade-class", folder, "--lab", LAB, "--out", out, "--workers", "2", "--no-feedback"]
        process = subprocess.Popen([sys.executable, "-m", "autograder", *map(str, line)], stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while len(list((out / LAB).glob("*.json"))) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        started = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        gone, alive = psutil.wait_procs(started, timeout=20)  # some end once they have written their verdict
        assert not [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        done = {path.name: path.read_bytes() for path in (out / LAB).glob("*.json")}
        assert 3 <= len(done) < 8
        run = command(*line)
        assert f"8 of 8 graded, {8 - len(done)} of them now" in run.stdout, run.stdout + run.stderr
        assert all((out / LAB / name).read_bytes() == content for name, content in done.items())

    def test_a_run_goes_on_without_the_processes_it_loses(self, tmp_path, student):
        folder, out = tmp_path / "submitted", tmp_path / "out"
        hand_in_untouched(folder, student(LAB), 8)
        line = ["grade-class", folder, "--lab", LAB, "--out", out, "--workers", "2", "--no-feedback"]
        with subprocess.Popen([sys.executable, "-m", "autograder", *map(str, line)], stdout=subprocess.PIPE) as process:
            deadline = time.monotonic() + 120
            while len(list((out / LAB).glob("*.json"))) < 2 and time.monotonic() < deadline:
                time.sleep(0.05)
            for child in psutil.Process(process.pid).children():  # the server, or what graders are forked from
                if "autograder.submission" in " ".join(child.cmdline()):
                    child.kill()
            told, _ = process.communicate(timeout=300)
        assert process.returncode == 0 and b"8 of 8 graded, 8 of them now" in told

    def test_a_cluster_gives_the_same_scores_though_a_worker_dies(self, klass, tmp_path):
        pytest.importorskip("distributed")
        environment = {**os.environ, "DASK_DISTRIBUTED__ADMIN__TICK__LIMIT": "60s"}
        ready = tmp_path / "scheduler.json"
        run = [sys.executable, "-m", "distributed.cli.dask_scheduler"]
        with contextlib.ExitStack() as stack:

            def start(*arguments: str) -> subprocess.Popen:
                process = subprocess.Popen([sys.executable, "-m", "dask", *arguments], env=environment, cwd=tmp_path,
                                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
                stack.callback(process.wait)
                stack.callback(process.kill)
                return process

            start("scheduler", "--scheduler-file", str(ready), "--port", "0", "--no-dashboard", "--host", "127.0.0.1")
            workers = [
                start("worker", "--scheduler-file", str(ready), "--nthreads", "1", "--no-dashboard", "--no-nanny",
                      "--local-directory", str(tmp_path))
                for _ in range(2)
            ]  # fmt: skip
            deadline = time.monotonic() + 60
            while not ready.exists() and time.monotonic() < deadline:
                time.sleep(0.1)
            address = json.loads(ready.read_text())["address"]
            from distributed import Client

            with Client(address) as client:
                client.wait_for_workers(2, timeout=60)
            line = ["grade-class", klass / "submitted", "--lab", LAB, "--out", tmp_path / "out", "--no-feedback",
                    "--scheduler", address, "--check-seconds", "5"]  # fmt: skip
            run = subprocess.Popen([sys.executable, "-m", "autograder", *map(str, line)], stderr=subprocess.PIPE,
                                   stdout=subprocess.PIPE, text=True)  # fmt: skip
            while len(list((tmp_path / "out" / LAB).glob("*.json"))) < 3 and run.poll() is None:
                time.sleep(0.1)
            workers[0].kill()
            told, errors = run.communicate(timeout=300)
        assert run.returncode == 0, errors
        assert "7 of 8 graded" in told and scores(tmp_path / "out") == SCORES

    def test_an_unreachable_scheduler_is_one_line(self, klass, tmp_path):
        run = command("grade-class", klass / "submitted", "--lab", LAB, "--out", tmp_path, "--scheduler",
                      "tcp://127.0.0.1:1")  # fmt: skip
        assert run.returncode == 2
        assert run.stderr.strip().count("\n") == 0 and "no Dask scheduler answers" in run.stderr, run.stderr

    def test_gradescope_runs_the_zip(self, klass, tmp_path, course):
        zipped = tmp_path / "autograder.zip"
        gradescope_zip(LAB, zipped)
        root = tmp_path / "autograder"
        with zipfile.ZipFile(zipped) as archive:
            names = archive.namelist()
            archive.extractall(root / "source")
        assert not any("solutions" in name or name.startswith("tests") for name in names)
        assert "BEGIN SOLUTION" not in "".join(p.read_text() for p in (root / "source").rglob("*.ipynb"))
        for script in ("setup.sh", "run_autograder"):
            assert (
                next(i for i in zipfile.ZipFile(zipped).infolist() if i.filename == script).external_attr >> 16 & 0o111
            )
            (root / "source" / script).chmod(0o755)
        # In the place of what setup.sh installs: an environment that has the same libraries, and the zip's own code.
        environment = root / "environment"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
        (site,) = environment.glob("lib/python*/site-packages")
        installed = next(p for p in sys.path if p.endswith("site-packages"))
        (site / "zip.pth").write_text(f"{root / 'source'}\n{root / 'source' / 'labs'}\n{installed}\n")
        for name in ("dara", "boris"):
            shutil.rmtree(root / "submission", ignore_errors=True)
            (root / "submission").mkdir()
            shutil.copy(klass / "submitted" / name / LAB / f"{LAB}.ipynb", root / "submission" / "my work.ipynb")
            run = subprocess.run([root / "source" / "run_autograder"], env={**os.environ, "AUTOGRADER": str(root)},
                                 capture_output=True, text=True)  # fmt: skip
            assert run.returncode == 0, run.stderr
            results = json.loads((root / "results" / "results.json").read_text())
            assert results["score"] == SCORES[name] == sum(test["score"] for test in results["tests"])
            assert results["output"] == "11 more points are given by a person."
        assert choose().level  # the level that was used is one that works here
