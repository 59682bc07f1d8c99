"""Do the files around the code say what is true: environment, workflows, hooks, change log, how to write a lab?"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest

from autograder.authoring import scripts
from autograder.checks.runner import checks_of

yaml = pytest.importorskip("yaml", reason="these tests need pyyaml (pip install -e '.[dev]'), and it is not installed")
tomllib = pytest.importorskip("tomllib", reason="reading pyproject.toml needs Python 3.11")


def read(path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_the_conda_environment_is_the_projects(course):
    """Does environment.yml give what pyproject.toml asks for, and add nothing of its own?"""
    project = tomllib.loads((course / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    environment = read(course / "environment.yml")
    assert environment["name"] == project["name"] and environment["channels"] == ["conda-forge"]
    *packages, pip = environment["dependencies"]
    assert [re.split("[=<>]", package)[0] for package in packages] == ["python", "pip"]
    asked, given = project["requires-python"].removeprefix(">=").split("."), packages[0].split("=")[1].split(".")
    assert list(map(int, given)) >= list(map(int, asked))
    (installed,) = pip["pip"]
    folder, extras = re.fullmatch(r"-e (\S+?)(?:\[(.+)\])?", installed).groups()
    assert folder == "." and set(extras.split(",")) <= project["optional-dependencies"].keys()


def steps_of(course, workflow: str) -> list[dict]:
    jobs = read(course / ".github" / "workflows" / workflow)["jobs"]
    steps = [step for job in jobs.values() for step in job["steps"]]
    assert all(("uses" in step) != ("run" in step) for step in steps)
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"]) for step in steps if "uses" in step)
    return steps


def test_ci_checks_style_and_runs_everything(course):
    commands = [step.get("run", "").strip() for step in steps_of(course, "ci.yml")]
    assert {"ruff check .", "ruff format --check .", "make test"} <= set(commands)
    assert any("bubblewrap" in command for command in commands)
    assert "\ntest:" in (course / "Makefile").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_grading_workflow_posts_the_table(course, tmp_path):
    """What does its last step write where GitHub looks for a summary?"""
    step = steps_of(course, "grade.yml")[-1]
    assert step["env"] == {"NOTEBOOK": "${{ inputs.notebook }}"} and "inputs" not in step["run"]
    notebook = course / "labs" / "lab05_sampling" / "lab05_sampling.ipynb"
    (tmp_path / "summary.md").write_text("# Before\n")
    environment = os.environ | {
        "NOTEBOOK": str(notebook), "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md"),
        "PATH": f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    run = subprocess.run(["bash", "-e", "-c", step["run"]], cwd=course, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    before, title, *rest = (tmp_path / "summary.md").read_text(encoding="utf-8").splitlines()
    assert before == "# Before" and title == "## lab05_sampling: 0 of 89 automatic points"
    rows = [line for line in rest if line.startswith("| ⬜ | ")]
    assert len(rows) == len(checks_of("lab05_sampling")) and all("TODO&#58; " in row for row in rows)
    assert re.search(r"^· add_noise +0/4 ", run.stdout, re.MULTILINE)


def test_hooks_call_what_there_is(course):
    (local,) = read(course / ".pre-commit-config.yaml")["repos"]
    assert local["repo"] == "local"
    entries = {hook["id"]: hook["entry"].split() for hook in local["hooks"]}
    assert entries["ruff-check"][:2] == [".venv/bin/ruff", "check"]
    assert entries["ruff-format"][:2] == [".venv/bin/ruff", "format"]
    test = entries["no-solution-for-students"]
    assert test[-1] in (course / test[-3]).read_text(encoding="utf-8")


def test_the_change_log_names_checks(course):
    known = {name for script in scripts() for name in checks_of(script.stem)}
    text = (course / "CHANGELOG.md").read_text(encoding="utf-8")
    for block in re.findall(r"\*\*(?:Relaxed|Tightened)\*\*\n\n(.*?)(?=\n\n|\Z)", text, re.DOTALL):
        for line in re.findall(r"^\* (`.*?)(?:\(Lab|:)", block, re.MULTILINE):
            assert set(re.findall(r"`(\w+)`", line)) <= known, line


@pytest.mark.slow
def test_the_page_on_writing_a_lab_is_true(course, tmp_path):
    """Whoever follows it: is a lab built, graded on both sides, and in the rubric?"""
    page = (course / "docs" / "writing_a_lab.md").read_text(encoding="utf-8")
    for name in ("autograder", "labs", "tests", "solutions"):
        ignored = shutil.ignore_patterns("__pycache__", "attacks", "browser", "lab0*" if name == "tests" else "")
        shutil.copytree(course / name, tmp_path / name, ignore=ignored)
    for name in ("pyproject.toml", "nbgrader_config.py"):
        shutil.copy(course / name, tmp_path)
    (tmp_path / "data").symlink_to(course / "data")
    written = re.findall(r"`([\w/]+\.py)`:\n\n```python\n(.*?)```", page, re.DOTALL)
    for name, text in [*written, *((name, "") for name in re.findall(r"`([\w/]+\.py)` is empty", page))]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert len(written) == 4
    (commands,) = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{tmp_path / 'labs'}", "OMP_NUM_THREADS": "1"}
    said = []
    for command in commands.strip().splitlines():
        program, *arguments = command.split("#")[0].split()
        assert program == "python"
        run = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )  # fmt: skip
        assert run.returncode == 0, f"{command}\n{run.stdout[-2000:]}{run.stderr[-2000:]}"
        said.append(run.stdout)
    _, tests, untouched, solved = said
    assert "14 passed" in tests
    assert "0 of 90 automatic points; 10 more" in untouched and "90 of 90 automatic points; 10 more" in solved
    rubric = (tmp_path / "grading_rubric.md").read_text(encoding="utf-8")
    assert "| Schedules | `signal_to_noise` | 90 | `signal_to_noise` is ᾱ_t / (1 − ᾱ_t). |" in rubric
    assert "### 1.2 Where does the digit drown? (`where_it_drowns`, 10 points, manual)" in rubric
