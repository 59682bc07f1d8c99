"""Is everything that is generated as fresh as what it is generated from?"""

from __future__ import annotations

import importlib
import re
import runpy

import nbformat
import pytest

from autograder.authoring import release_notebook, rubric, scripts, solution_notebook, without_outputs
from autograder.checks.runner import checks_of
from tests.attacks.attacks import ATTACKS

SCRIPTS = scripts()
STALE = "is stale: run `make notebooks` and commit what it writes"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_solution_notebook_is_fresh_and_executed(script, course):
    path = course / "solutions" / script.stem / f"{script.stem}.ipynb"
    committed = nbformat.read(path, as_version=4)
    assert without_outputs(committed) == without_outputs(solution_notebook(script)), f"{path} {STALE}"
    code = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code), f"{path} was not executed"
    assert not any(o.output_type == "error" for cell in code for o in cell.outputs)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_student_notebook_is_fresh_and_holds_no_solution(script, course):
    path = course / "labs" / script.stem / f"{script.stem}.ipynb"
    text = path.read_text(encoding="utf-8")
    assert text == release_notebook(solution_notebook(script), script.stem), f"{path} {STALE}"
    for forbidden in ("BEGIN SOLUTION", "MARK SCHEME", '"outputs": [{'):
        assert forbidden not in text
    notebook = nbformat.reads(text, as_version=4)
    stubs = [c for c in notebook.cells if c.metadata.get("nbgrader", {}).get("solution")]
    assert stubs and all("raise NotImplementedError" in c.source for c in stubs)


def test_every_check_has_a_name_of_its_own():
    """`check("name")` in a notebook finds its lab by the name alone."""
    names = [name for script in SCRIPTS for name in checks_of(script.stem)]
    assert len(names) == len(set(names)), [name for name in names if names.count(name) > 1]


def test_rubric_is_fresh(course):
    assert (course / "grading_rubric.md").read_text(encoding="utf-8") == rubric(), f"grading_rubric.md {STALE}"


def test_every_lab_is_a_hundred_points():
    points = re.findall(r"(\d+) automatic and (\d+) manual points", rubric())
    assert [sum(map(int, pair)) for pair in points] == [100] * len(SCRIPTS)


def test_the_readme_says_what_is_there(course):
    readme = (course / "README.md").read_text(encoding="utf-8")
    for command in ("make demo", "make test", "python -m autograder grade", "nbgrader autograde"):
        assert command in readme
    for path in ("docs/samplers.png", "grading_rubric.md", "data/README.md"):
        assert path in readme and (course / path).exists()
    assert f"holds {len(ATTACKS)} attacks" in readme
    modules = [
        importlib.import_module(f"tests.{path.parent.name}.mutants") for path in course.glob("tests/lab*/mutants.py")
    ]
    mutants = sum(len(module.MUTANTS) for module in modules)
    assert f"{mutants} solutions with one realistic mistake each" in readme
    alternatives = len(list((course / "tests").glob("lab*/alternatives/*.py")))
    assert f"{alternatives} correct solutions in other styles" in readme


def test_the_readmes_pictures_are_those_of_the_notebooks(course):
    module = runpy.run_path(str(course / "docs" / "pictures.py"))
    readme = (course / "README.md").read_text(encoding="utf-8")
    for name in module["PICTURES"]:
        assert f"docs/{name}" in readme
        assert (course / "docs" / name).read_bytes() == module["picture"](name), f"docs/{name} {STALE}"


def test_every_file_of_data_is_described(course):
    text = (course / "data" / "README.md").read_text(encoding="utf-8")
    for path in (course / "data").iterdir():
        if path.is_file() and path.name != "README.md":
            assert f"`{path.name}`" in text, f"data/README.md does not say how {path.name} was made"
    total = sum(p.stat().st_size for p in (course / "data").glob("*.*"))
    assert total < 30 * 2**20
