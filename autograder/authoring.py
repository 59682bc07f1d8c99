"""From one hand-edited script per lab to its solution notebook, its student notebook and its rows of the rubric.

`solutions/lab05_sampling.py` is a jupytext percent script. Its cells carry one short mark each, from which the full
nbgrader metadata is written here, so that points stand in one place: beside the checks.

    # %% given="name"              the student receives it and cannot change it
    # %% exercise="name"           the student completes it; BEGIN/END SOLUTION is cut out
    # %% check="name"              check("name"), graded with the points of that check
    # %% [markdown] task="name" points=8      graded by a person; its mark scheme is cut out and goes to the rubric
    # %% [markdown] answer="name"  where the student writes
    # %% tags=["demo"]             runs for people, is skipped when grading
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from autograder.checks.runner import checks_of
from autograder.notebooks import COURSE, is_graded

__all__ = ["build_all", "release_notebook", "rubric", "scripts", "solution_notebook", "without_outputs"]

_MARKS = ("given", "exercise", "check", "task", "answer")
_MARK_SCHEME = re.compile(r"=== BEGIN MARK SCHEME ===\n(.*?)\n=== END MARK SCHEME ===", re.DOTALL)


def scripts(course: Path = COURSE) -> list[Path]:
    """The labs' scripts, in order."""
    return sorted((course / "solutions").glob("lab*.py"))


def solution_notebook(script: Path) -> NotebookNode:
    """The solution notebook of a script, not yet executed.

    Raises:
        ValueError: if a cell's mark is unknown, repeated or names a check that does not exist; or a check has no cell.
    """
    import jupytext

    checks = checks_of(script.stem)
    notebook = jupytext.read(script)
    used: set[str] = set()
    for number, cell in enumerate(notebook.cells):
        marks = [mark for mark in _MARKS if mark in cell.metadata]
        if len(marks) > 1 or (not marks and "demo" not in cell.metadata.get("tags", [])):
            raise ValueError(f"{script.name}, cell {number}: expected one mark of {', '.join(_MARKS)} or the tag demo")
        mark = marks[0] if marks else "demo"
        name = cell.metadata.get(mark, f"demo-{number}")
        identity = f"{name}-code" if mark == "exercise" else name if mark != "answer" else f"{name}-answer"
        if identity in used:
            raise ValueError(f"{script.name}: two cells are named {identity!r}")
        used.add(identity)
        if mark == "check" and name not in checks:
            raise ValueError(f"{script.name}: there is no check {name!r} in autograder/checks")
        # JupyterLab's Run All goes on after a cell with this tag has raised: one missing exercise hides no other.
        tags = {"demo": ["demo", "raises-exception"], "check": ["raises-exception"]}.get(mark)
        if "nbval-ignore-output" in cell.metadata.get("tags", []):
            tags = [*(tags or []), "nbval-ignore-output"]  # it differs from run to run, and no pattern tells how
        metadata = {"tags": tags} if tags else {}
        if mark in ("given", "exercise", "check", "task"):
            points = checks[name].points if mark == "check" else cell.metadata.get("points")
            metadata["nbgrader"] = {
                "grade": mark == "check",
                "grade_id": identity,
                "locked": mark != "exercise",
                "schema_version": 3,
                "solution": mark == "exercise",
                "task": mark == "task",
            } | ({} if points is None else {"points": points})
        cell.metadata = NotebookNode(metadata)
        cell["id"] = identity.replace("_", "-")[:64]
    missing = [name for name in checks if name not in used]
    if missing:
        raise ValueError(f"{script.name}: no cell runs the check(s) {', '.join(missing)}")
    notebook.metadata = NotebookNode(
        kernelspec={"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
        language_info={"name": "python"},
    )
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    return nbformat.from_dict(notebook)


def execute(notebook: NotebookNode, folder: Path) -> NotebookNode:
    """The notebook with the outputs of a fresh run; raises what the notebook raises."""
    from nbclient import NotebookClient

    saved = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"  # progress bars would stay in the outputs
    try:
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    finally:
        os.environ.pop("TQDM_DISABLE")
        if saved is not None:
            os.environ["TQDM_DISABLE"] = saved
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    notebook.metadata["language_info"] = NotebookNode(name="python")
    return notebook


def release_notebook(solution: NotebookNode, lab: str) -> str:
    """The student notebook, as text, by `nbgrader generate_assignment` in a course folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "source", lab)
        source.mkdir(parents=True)
        nbformat.write(solution, source / f"{lab}.ipynb")
        Path(folder, "nbgrader_config.py").write_text((COURSE / "nbgrader_config.py").read_text(encoding="utf-8"))
        command = [sys.executable, "-m", "nbgrader", "generate_assignment", lab, "--no-db"]
        command += [f"--CourseDirectory.root={folder}", "--CourseDirectory.source_directory=source"]
        command += ["--CourseDirectory.release_directory=release", "--GenerateAssignment.logfile="]
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        released = Path(folder, "release", lab, f"{lab}.ipynb")
        if run.returncode or not released.is_file():
            raise RuntimeError(f"nbgrader generate_assignment failed:\n{run.stderr[-3000:]}")
        return released.read_text(encoding="utf-8")


def without_outputs(notebook: NotebookNode) -> list[tuple]:
    """What a build decides: kind, id, source and metadata of every cell."""
    return [(c.cell_type, c["id"], c.source, dict(c.metadata)) for c in notebook.cells]


def build_all(course: Path = COURSE, execute_all: bool = True, labs: Collection[str] = ()) -> None:
    """Write every solution notebook (executed, unless told to keep old outputs), student notebook, and the rubric.

    Args:
        labs: only these; none for all.

    Raises:
        ValueError: for a lab that has no script.
    """
    known = {script.stem: script for script in scripts(course)}
    if unknown := set(labs) - set(known):
        raise ValueError(f"there is no lab {', '.join(sorted(unknown))}; the labs are {', '.join(known)}")
    for lab, script in known.items():
        if labs and lab not in labs:
            continue
        target = course / "solutions" / lab / f"{lab}.ipynb"
        target.parent.mkdir(exist_ok=True)
        notebook = solution_notebook(script)
        if execute_all:
            print(f"{lab}: executing …", flush=True)
            execute(notebook, target.parent)
        elif target.exists():
            _keep_outputs(notebook, nbformat.read(target, as_version=4))
        nbformat.write(notebook, target)
        released = course / "labs" / lab / f"{lab}.ipynb"
        released.parent.mkdir(exist_ok=True)
        released.write_text(release_notebook(solution_notebook(script), lab), encoding="utf-8")
        print(f"{lab}: {target.relative_to(course)} and {released.relative_to(course)} written")
    (course / "grading_rubric.md").write_text(rubric(course), encoding="utf-8")


def _keep_outputs(notebook: NotebookNode, old: NotebookNode) -> None:
    known = {(cell["id"], cell.source): cell for cell in old.cells if cell.cell_type == "code"}
    for cell in notebook.cells:
        before = known.get((cell["id"], cell.source))
        if before is not None:
            cell["outputs"], cell["execution_count"] = before["outputs"], before["execution_count"]


# -- the rubric --------------------------------------------------------------------------------------------------------


def rubric(course: Path = COURSE) -> str:
    """`grading_rubric.md`: every automatic check with its points, every manual task with its levels."""
    lines = [
        "# Grading rubric",
        "",
        "*Written by `make notebooks` from the checks in `autograder/checks` and the mark schemes in `solutions/`; "
        "edit those.*",
        "",
        "Automatic points are given by the check of the same name, which students have too. "
        "Manual points are given by a person in formgrader, by the levels below.",
    ]
    for script in scripts(course):
        notebook = solution_notebook(script)
        checks = checks_of(script.stem)
        tasks = [cell for cell in notebook.cells if cell.metadata.get("nbgrader", {}).get("task")]
        order = [c.metadata["nbgrader"]["grade_id"] for c in notebook.cells if is_graded(c)]
        automatic = sum(check.points for check in checks.values())
        manual = sum(cell.metadata["nbgrader"]["points"] for cell in tasks)
        title = notebook.cells[0].source.splitlines()[0].lstrip("# ")
        lines += ["", f"## {title}", "", f"{automatic} automatic and {manual} manual points.", ""]
        lines += ["| Section | Check | Points | What it holds to |", "|---|---|---:|---|"]
        for check in (checks[name] for name in order):
            title = check.title.replace("|", "\\|")
            lines.append(f"| {check.section} | `{check.name}` | {check.points} | {title} |")
        for cell in tasks:
            heading = re.search(r"^#+ (.+)$", cell.source, re.MULTILINE).group(1)
            scheme = _MARK_SCHEME.search(cell.source)
            if scheme is None:
                raise ValueError(f"{script.name}: the task {heading!r} has no mark scheme")
            name, points = cell.metadata["nbgrader"]["grade_id"], cell.metadata["nbgrader"]["points"]
            lines += ["", f"### {heading} (`{name}`, {points} points, manual)", "", scheme.group(1)]
    return "\n".join(lines) + "\n"
