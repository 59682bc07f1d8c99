"""nbgrader's own commands, unchanged, on a class: the same scores as the command line, and people still asked."""

from __future__ import annotations

import contextlib
import csv
import re
import shutil
import sqlite3
from pathlib import Path

import nbformat
import pytest

from autograder.demo import CLASS, nbgrader
from autograder.demo import main as demo
from autograder.grading import grade
from autograder.nbgrader_plugin import wait_until_free
from autograder.notebooks import grade_id, is_graded

LAB = "lab05_sampling"
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("nbgrader")]  # one class, graded once


@pytest.fixture(scope="module")
def graded_class(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "course"
    demo(folder)
    return folder


def test_scores_of_the_example_class(graded_class):
    with open(graded_class / "grades.csv", newline="") as file:
        scores = {row["student_id"]: float(row["score"]) for row in csv.DictReader(file)}
    assert scores == {"amira": 89, "boris": 0, "chen": 34, "dara": 82, "emeka": 71, "freya": 82, "goran": 79}
    assert scores.keys() == CLASS.keys()


def test_the_command_line_agrees_with_nbgrader(graded_class):
    for student in ("chen", "emeka"):
        autograded = nbformat.read(graded_class / "autograded" / student / LAB / f"{LAB}.ipynb", as_version=4)
        verdicts = {grade_id(c): c.outputs[0].output_type == "stream" for c in autograded.cells if is_graded(c)}
        report = grade(graded_class / "submitted" / student / LAB / f"{LAB}.ipynb")
        assert {c.name: c.status == "passed" for c in report.checks} == verdicts


def test_manual_tasks_wait_for_a_person(graded_class):
    from nbgrader.api import Gradebook

    with Gradebook(f"sqlite:///{graded_class / 'gradebook.db'}") as gradebook:
        submission = gradebook.find_submission(LAB, "amira")
        grades = {grade.name: grade for notebook in submission.notebooks for grade in notebook.grades}
        assert submission.needs_manual_grade
        for task in ("written_analysis", "code_quality"):
            assert grades[task].needs_manual_grade and grades[task].auto_score is None
        assert not grades["ddpm_step"].needs_manual_grade and grades["ddpm_step"].auto_score == 6


def feedback(folder: Path, student: str) -> str:
    return (folder / "feedback" / student / LAB / f"{LAB}.html").read_text(encoding="utf-8")


def test_feedback_shows_the_hint_and_no_traceback(graded_class):
    html = feedback(graded_class, "dara")
    assert "ᾱ_t in place of α_t" in html and "Traceback (most" not in html and "site-packages" not in html


def test_feedback_begins_with_what_is_missing(graded_class):
    verdict = re.search(r'<section class="verdict">(.*?)</section>', feedback(graded_class, "dara"), re.DOTALL)[1]
    missing, rest = verdict.split("Marked by a person")
    by_hand, passed = rest.split("Passed (")
    assert "Not yet (" in missing and 'href="#ddpm_posterior_mean"' in missing and "ᾱ_t in place of α_t" in missing
    assert "written analysis" in by_hand and "waits for a person, 8" in by_hand
    assert 'href="#add_noise"' in passed and "4 / 4" in passed and "ddpm posterior mean" not in passed
    assert "82</b> of 100 points; 11 of them wait for a person" in verdict
    untouched = feedback(graded_class, "boris")
    assert "Still to be written (" in untouched and "Not yet (" not in untouched


def test_the_release_is_what_students_have(graded_class, course):
    made = (graded_class / "labs" / LAB / f"{LAB}.ipynb").read_text(encoding="utf-8")
    assert made == (course / "labs" / LAB / f"{LAB}.ipynb").read_text(encoding="utf-8")


def test_a_broken_submission_harms_no_one_else(graded_class, tmp_path):
    folder = tmp_path / "course"
    shutil.copytree(graded_class, folder)
    broken = folder / "submitted" / "aaron" / LAB / f"{LAB}.ipynb"
    broken.parent.mkdir(parents=True)
    broken.write_text("this is not a notebook")
    shutil.rmtree(folder / "autograded")
    for student in CLASS:
        if student != "dara":
            shutil.rmtree(folder / "submitted" / student)
    run = nbgrader(folder, "autograde", LAB)
    assert "not JSON" in run.stderr and "aaron" in run.stderr and "Traceback" not in run.stderr, run.stderr
    assert (folder / "autograded" / "dara" / LAB / f"{LAB}.ipynb").exists()
    told = (folder / "autograded" / "aaron" / LAB / f"{LAB}.ipynb").read_text()
    assert "could not be graded" in told and "still to be written" in told


def test_validate_names_what_fails(student, solution, tmp_path):
    target = tmp_path / f"{LAB}.ipynb"
    notebook = student(LAB)
    notebook.cells = [c for c in notebook.cells if "demo" not in c.metadata.get("tags", [])]
    nbformat.write(notebook, target)
    run = nbgrader(tmp_path, "validate", str(target))
    assert "VALIDATION FAILED ON" in run.stdout and "add_noise" in run.stdout
    notebook = solution(LAB)
    notebook.cells = [c for c in notebook.cells if "demo" not in c.metadata.get("tags", [])]
    nbformat.write(notebook, target)
    run = nbgrader(tmp_path, "validate", str(target))
    assert "Success" in run.stdout, run.stdout + run.stderr


def test_a_locked_gradebook_is_said_in_one_line(tmp_path, capsys):
    url = f"sqlite:///{tmp_path / 'gradebook.db'}"
    with contextlib.closing(sqlite3.connect(tmp_path / "gradebook.db", isolation_level=None)) as other:
        other.execute("CREATE TABLE grade (score)")
        wait_until_free(url, seconds=0.1)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(SystemExit, match=r"gradebook.db cannot be written \(database is locked\): close what has"):
            wait_until_free(url, seconds=0.1)
    assert "waiting for it" in capsys.readouterr().err
    wait_until_free(url, seconds=0.1)
    wait_until_free("postgresql://elsewhere/gradebook", seconds=0.1)
