"""What students receive, as one zip: notebooks, kit, checks, data, environment, and no trace of a solution."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from autograder import notebooks

__all__ = ["FOLDER", "bundle_files", "find_trace", "solutions_of", "write_bundle"]

FOLDER = "difflab-students"  # what the zip unpacks to

_PARTS = (
    "LICENSE", "pyproject.toml",
    "labs/difflab/**/*.py", "data/*.npz", "data/*.safetensors", "data/*.json", "data/README.md",
    # of the grader what `check` needs in a notebook, which runs on Windows, too; not what runs notebooks of others
    "autograder/__init__.py", "autograder/report.py", "autograder/checks/**/*.py", "autograder/checks/pytest.ini",
    "autograder/submission/__init__.py", "autograder/submission/client.py", "autograder/submission/server.py",
    "autograder/submission/wire.py",
)  # fmt: skip

_README = """# difflab: the labs

Notebooks in which you write samplers for a diffusion model that draws digits. A laptop is enough, without a GPU. You
need Python 3.10 or newer and, for the installation only, a network.

In this folder (Linux and macOS):

    python3 -m venv .venv
    .venv/bin/pip install -e .
    .venv/bin/jupyter lab labs/

On Windows:

    py -m venv .venv
    .venv\\Scripts\\pip install -e .
    .venv\\Scripts\\jupyter lab labs/

With conda: `conda env create -f environment.yml`, `conda activate difflab`, `jupyter lab labs/`.

Labs 7 and 8 need a few libraries more: the same command with `".[acceleration]"` in place of `.`.

LABS

Open a notebook, fill a `TODO`, run the cell and the `check(...)` below it: a green line, or a hint. Save, and hand the
notebook in under its own name. The checks are in `autograder/checks`, and you may read them: the
same ones grade you.

**On Colab or a JupyterHub** upload this zip beside the notebook, and run once in a new first cell

    !unzip -q -o difflab-students.zip
    %pip install -q ./difflab-students

(on a JupyterHub: open the notebooks in `difflab-students/labs`). Restart the kernel; then everything works as above.
"""


def bundle_files(course: Path = notebooks.COURSE) -> dict[str, bytes]:
    """Every file of the zip by its path in it. Of `labs/` only what is built: an instructor's own notebooks stay."""
    labs = [script.stem for script in sorted((course / "solutions").glob("lab*.py"))]
    paths = [path for part in _PARTS for path in sorted(course.glob(part))]
    paths += [notebooks.release_path(lab, course) for lab in labs]
    files = {path.relative_to(course).as_posix(): path.read_bytes() for path in paths}
    titles = [json.loads(files[f"labs/{lab}/{lab}.ipynb"])["cells"][0]["source"] for lab in labs]
    rows = [
        f"* `labs/{lab}/{lab}.ipynb`: {''.join(title).splitlines()[0].lstrip('# ')}" for lab, title in zip(labs, titles)
    ]
    files["README.md"] = _README.replace("LABS", "\n".join(rows)).encode()
    # Students have nothing to grade, so they need no nbgrader.
    environment = (course / "environment.yml").read_text(encoding="utf-8")
    files["environment.yml"] = re.sub(r"\[grading\]|grading,|,grading", "", environment).encode()
    return files


def write_bundle(path: Path, course: Path = notebooks.COURSE) -> None:
    """Write the zip.

    Raises:
        RuntimeError: if a file that would be in it holds a solution.
    """
    files = bundle_files(course)
    solutions = solutions_of(course)
    for name, content in files.items():
        if trace := find_trace(name, content, solutions):
            raise RuntimeError(f"{name} {trace}; nothing was written. `make notebooks` makes it afresh")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in sorted(files.items()):
            entry = zipfile.ZipInfo(f"{FOLDER}/{name}", (2020, 1, 1, 0, 0, 0))  # the same files, the same zip
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(entry, content)


def find_trace(name: str, content: bytes, solutions: dict[str, str]) -> str | None:
    """Is there a solution in a file? None, or what of one: "holds the solution of add_noise".

    Looks for the marks of solutions and mark schemes, and for every exercise's code whatever its spaces and comments;
    in a notebook also in metadata, attachments and outputs, and for outputs as such.

    Args:
        name: the file's name; its end says how it is read.
        content: the file.
        solutions: exercise -> code, as `solutions_of` gives it.
    """
    text = content.decode("utf-8", errors="ignore")
    if name.endswith((".ipynb", ".json")):
        data = json.loads(text)
        if any(cell.get("outputs") for cell in data.get("cells", [])):
            return "has outputs"
        text = "\n".join(_strings(data))
    if mark := re.search(r"(BEGIN|END) (SOLUTION|MARK SCHEME)", text):
        return f"says {mark[0]}"
    code = _bare(text)
    return next((f"holds the solution of {exercise}" for exercise, body in solutions.items() if body in code), None)


def solutions_of(course: Path) -> dict[str, str]:
    """Exercise -> the code that a student must find, bare."""
    found = {}
    for script in sorted((course / "solutions").glob("lab*.py")):
        for cell in re.split(r"^# %%", script.read_text(encoding="utf-8"), flags=re.MULTILINE):
            name = re.match(r' exercise="(\w+)"', cell)
            bodies = re.findall(r"### BEGIN SOLUTION\n(.*?)### END SOLUTION", cell, re.DOTALL)
            found |= {f"{name[1]}" + (f", part {n + 1}" if n else ""): _bare(body) for n, body in enumerate(bodies)}
    return found


def _bare(code: str) -> str:
    """Code without its comments and white space."""
    return "".join(re.sub(r"#[^\n]*", "", code).split())


def _strings(data: Any) -> Iterator[str]:
    """Every string in what JSON holds; a list of nothing but strings is the lines of one."""
    if isinstance(data, str):
        yield data
    elif isinstance(data, dict):
        for key, value in data.items():
            yield key
            yield from _strings(value)
    elif isinstance(data, list) and all(isinstance(item, str) for item in data):
        yield "".join(data)
    elif isinstance(data, list):
        for item in data:
            yield from _strings(item)
