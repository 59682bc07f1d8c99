"""The zip for students: is everything in it that Lab 5 needs, on any system, and nothing that gives a solution away?"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile

import nbformat
import pytest

from autograder.__main__ import main
from autograder.bundle import FOLDER, bundle_files, find_trace, solutions_of, write_bundle
from autograder.checks.runner import checks_of

LAB = "lab05_sampling"


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """The bundle's folder."""
    folder = tmp_path_factory.mktemp("student")
    assert main(["bundle", "--out", str(folder / "bundle.zip")]) == 0
    with zipfile.ZipFile(folder / "bundle.zip") as archive:
        archive.extractall(folder)
    return folder / FOLDER


def test_it_holds_what_students_need_and_no_more(unpacked, course):
    names = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    labs = [script.stem for script in (course / "solutions").glob("lab*.py")]
    assert {f"labs/{lab}/{lab}.ipynb" for lab in labs} <= names
    assert {"README.md", "LICENSE", "pyproject.toml", "environment.yml", "data/mnist-small.safetensors"} <= names
    kit = {path.relative_to(course).as_posix() for path in (course / "labs/difflab").rglob("*.py")}
    assert {name for name in names if name.startswith("labs/difflab")} == kit
    for name in names:
        assert not name.startswith(("solutions", "tests")) and name.count("/") <= 4, name
        assert "BEGIN SOLUTION" not in (unpacked / name).read_bytes().decode(errors="ignore"), name
    readme = (unpacked / "README.md").read_text(encoding="utf-8")
    assert all(f"`labs/{lab}/{lab}.ipynb`: Lab " in readme for lab in labs)
    assert "grading" not in (unpacked / "environment.yml").read_text(encoding="utf-8")


def test_no_file_holds_a_trace_of_a_solution(course):
    solutions = solutions_of(course)
    code = "\n".join(script.read_text(encoding="utf-8") for script in (course / "solutions").glob("lab*.py"))
    assert len(solutions) == code.count("### BEGIN SOLUTION") > 50 and min(map(len, solutions.values())) > 30
    for name, content in bundle_files(course).items():
        assert find_trace(name, content, solutions) is None, name


BODY = """
    alpha_bar = self.schedule.alpha_bar(t).to(x_t).view(-1, 1, 1, 1)
    return (x_t - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
"""


def _notebook(**cell) -> bytes:
    whole = {"cell_type": "code", "id": "a", "metadata": {}, "outputs": [], "source": []} | cell
    return json.dumps({"cells": [whole], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}).encode()


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.py", BODY.encode()),
        ("a.md", BODY.replace("    ", "\t").replace(" * ", "*  ").encode()),
        ("a.py", BODY.replace("\n", "  # a comment\n").encode()),
        ("a.ipynb", _notebook(source=BODY.splitlines(keepends=True))),
        ("a.ipynb", _notebook(metadata={"backup": {"code": BODY}})),
        ("a.ipynb", _notebook(metadata={BODY: 1})),
        ("a.ipynb", _notebook(attachments={"a.txt": {"text/plain": BODY.splitlines(keepends=True)}})),
        ("a.ipynb", _notebook(outputs=[{"output_type": "stream", "name": "stdout", "text": ["✓\n"]}])),
        ("a.py", b"    ### BEGIN SOLUTION\n    pass\n"),
        ("a.ipynb", _notebook(cell_type="markdown", source=["=== BEGIN MARK SCHEME ===\n"])),
    ],
)
def test_a_trace_is_found(name, content, course):
    assert find_trace(name, content, solutions_of(course))
    assert not find_trace("a.ipynb", _notebook(source=["x_t = 1\n"]), solutions_of(course))


def test_an_instructors_solved_copy_is_refused(course, solution, tmp_path):
    """What if the solution was saved over the release?"""
    for name in ("solutions", "labs"):
        shutil.copytree(course / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(course / "environment.yml", tmp_path)
    write_bundle(tmp_path / "good.zip", tmp_path)
    nbformat.write(solution(LAB), tmp_path / "labs" / LAB / "mine.ipynb")  # beside it: not in the bundle
    write_bundle(tmp_path / "again.zip", tmp_path)
    assert (tmp_path / "good.zip").read_bytes() == (tmp_path / "again.zip").read_bytes()
    notebook = solution(LAB)
    for cell in notebook.cells:
        cell.source = re.sub(r"###? (BEGIN|END) SOLUTION|=== (BEGIN|END) MARK SCHEME ===", "", cell.source)
    nbformat.write(notebook, tmp_path / "labs" / LAB / f"{LAB}.ipynb")
    with pytest.raises(RuntimeError, match=f"labs/{LAB}/{LAB}.ipynb holds the solution of"):
        write_bundle(tmp_path / "bad.zip", tmp_path)
    assert not (tmp_path / "bad.zip").exists()


# What a Windows laptop lacks; forbidden to our own modules, as libraries ask sys.platform first.
_LAPTOP = """
import builtins, os, torch

original = builtins.__import__

def no_linux(name, globals=None, locals=None, fromlist=(), level=0):
    ours = str((globals or {}).get("__name__", "")).startswith(("difflab", "autograder"))
    if ours and name.split(".")[0] in ("fcntl", "grp", "posix", "pty", "pwd", "resource", "termios", "syslog"):
        raise ModuleNotFoundError(f"No module named {name!r}")
    return original(name, globals, locals, fromlist, level)

builtins.__import__ = no_linux
del os.fork
"""

_LAB_5 = """
import json, linecache, matplotlib
matplotlib.use("agg")
import difflab, autograder.checks, difflab.paths
for module in (difflab, autograder):
    assert module.__path__[0].startswith(FOLDER), module.__path__
assert str(difflab.paths.data_path("digits.npz")).startswith(FOLDER)
namespace = {"__name__": "__main__"}
for number, source in enumerate(json.load(open("cells.json", encoding="utf-8"))):
    name = f"<ipython-input-{number}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    exec(compile(source, name, "exec"), namespace)
"""


@pytest.mark.slow
def test_lab_5_runs_out_of_the_unpacked_folder(unpacked, solution):
    """Do all of Lab 5's checks pass for a solution, with nothing of this repository in reach and nothing of Linux?"""
    student = nbformat.read(unpacked / "labs" / LAB / f"{LAB}.ipynb", as_version=4)
    code = {cell["id"]: cell.source for cell in solution(LAB).cells}
    cells = [c for c in student.cells if c.cell_type == "code" and "demo" not in c.metadata.get("tags", [])]
    (unpacked.parent / "cells.json").write_text(json.dumps([code[cell["id"]] for cell in cells]), encoding="utf-8")
    # what `pip install -e .` in the unpacked folder comes to
    path = os.pathsep.join(str(folder) for folder in (unpacked / "labs", unpacked))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DIFFLAB")}
    run = subprocess.run(
        [sys.executable, "-c", _LAPTOP + f"FOLDER = {str(unpacked)!r}\n" + _LAB_5],
        cwd=unpacked.parent, env=environment | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, encoding="utf-8",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("✓ ") == len(checks_of(LAB)) and run.stderr == ""


@pytest.mark.slow
def test_it_installs(unpacked, tmp_path):
    """Does pip make of the unpacked folder a package that has kit, checks and data?"""
    source = tmp_path / "source"
    shutil.copytree(unpacked, source)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("difflab-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for end in ("difflab/check.py", "autograder/checks/pytest.ini", "autograder/checks/lab05/test_ddim_sampler.py",
                "data/share/difflab/mnist-small.safetensors"):  # fmt: skip
        assert any(name.endswith(end) for name in names), end
