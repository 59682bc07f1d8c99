"""Notebook hygiene: what of a submitted notebook is read, restored, put back or dropped before it is graded."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

__all__ = ["CannotGrade", "cell_label", "find_lab", "is_graded", "read_notebook", "release_path", "sanitise", "to_run"]

COURSE = Path(__file__).resolve().parents[1]
MAX_NOTEBOOK = 64 * 2**20  # bytes
MAX_CELLS = 1000
MAX_CELL = 1_000_000  # characters of source
_BASE64 = re.compile(r"[A-Za-z0-9+/=\s]*")
# What feedback and formgrader, pages an instructor opens, would bring to life in a student's text:
_LIVE = (
    (re.compile(r"<(?=[a-zA-Z/!?])"), "&lt;"),  # raw HTML
    (re.compile(r"!+(?=\[)"), ""),  # pictures from elsewhere; what is left is a link
    (re.compile(r"\]\((?!https?://|mailto:|#)"), "] ("),  # links that run code when clicked
    (re.compile(r"\]:(?!\s*(?:https?://|mailto:|#))"), "] :"),
    (re.compile(r"\\(?=(?:href|require|class|cssId|style|data|html|mmlToken|toggle|tooltip|texttip))"), r"\ "),
)
_CELL_ID = re.compile(r"[a-zA-Z0-9_-]{1,64}")  # nbformat 4.5


class CannotGrade(ValueError):
    """The input is not a notebook of this course; the message is one line."""


def read_notebook(path: str | Path) -> NotebookNode:
    """Read a notebook of format 4.

    Raises:
        CannotGrade: if it is missing, too large, not JSON, not a notebook, of another format, or has no cells.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise CannotGrade(f"{path}: there is no such file")
        if path.stat().st_size > MAX_NOTEBOOK:
            raise CannotGrade(
                f"{path}: {path.stat().st_size / 2**20:.0f} MB is more than a notebook may have "
                f"({MAX_NOTEBOOK // 2**20} MB); clear its outputs and submit again"
            )
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CannotGrade(f"{path}: cannot be read as text ({error})") from None
    if not text.strip():
        raise CannotGrade(f"{path}: the file is empty")
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CannotGrade(f"{path}: not JSON ({str(error)[:80]}); is it the .ipynb file itself?") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("nbformat"), int):
        raise CannotGrade(f"{path}: JSON, but not a Jupyter notebook")
    if raw["nbformat"] != 4:
        raise CannotGrade(
            f"{path}: notebook format {raw['nbformat']}, expected 4; open it in JupyterLab and save it again"
        )
    if not isinstance(raw.get("cells"), list) or not raw["cells"]:
        raise CannotGrade(f"{path}: the notebook has no cells")
    if len(raw["cells"]) > MAX_CELLS:
        raise CannotGrade(f"{path}: {len(raw['cells']):,} cells are more than a notebook may have ({MAX_CELLS:,})")
    return _clean_notebook(raw, path)


def _clean_notebook(raw: dict[str, Any], path: Path) -> NotebookNode:
    """Keep of each cell its type, source, id, grade_id and harmless outputs; everything else is dropped."""
    cells = []
    for number, cell in enumerate(raw["cells"], 1):
        source = cell.get("source") if isinstance(cell, dict) else None
        if isinstance(source, list) and all(isinstance(line, str) for line in source):
            source = "".join(source)
        if not isinstance(source, str) or cell.get("cell_type") not in ("code", "markdown", "raw"):
            raise CannotGrade(f"{path}: cell {number} is damaged; save the notebook again in JupyterLab")
        if len(source) > MAX_CELL:
            raise CannotGrade(f"{path}: cell {number} has more than {MAX_CELL:,} characters of source")
        metadata = cell.get("metadata") if isinstance(cell.get("metadata"), dict) else {}
        nbgrader = metadata.get("nbgrader") if isinstance(metadata.get("nbgrader"), dict) else {}
        source = source.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair is no text
        new = _new_cell(cell["cell_type"], source)
        identity = cell.get("id")
        new["id"] = identity if isinstance(identity, str) and _CELL_ID.fullmatch(identity) else f"cell-{number}"
        if isinstance(nbgrader.get("grade_id"), str):
            new.metadata["nbgrader"] = NotebookNode(grade_id=nbgrader["grade_id"])
        if cell["cell_type"] == "code":
            new["outputs"] = _safe_outputs(cell.get("outputs"))
        cells.append(new)
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.nbformat_minor = 5
    return notebook


def _new_cell(kind: str, source: str) -> NotebookNode:
    """A cell that still needs an id. (nbformat's own constructors validate each cell, and then the notebook again.)"""
    cell = NotebookNode(cell_type=kind, metadata=NotebookNode(), source=source)
    if kind == "code":
        cell.update(execution_count=None, outputs=[])
    return cell


def _safe_outputs(outputs: Any) -> list[NotebookNode]:
    """Text and PNG pictures of a student's own run, for the person who grades the written answers; nothing live."""
    kept = []
    for output in outputs[:50] if isinstance(outputs, list) else []:
        if not isinstance(output, dict):
            continue
        if output.get("output_type") == "stream":
            text = _joined(output.get("text"))
            if text is not None:
                kept.append(nbformat.v4.new_output("stream", name="stdout", text=text[:20_000]))
        elif output.get("output_type") in ("display_data", "execute_result") and isinstance(output.get("data"), dict):
            data = {
                mime: text
                for mime in ("image/png", "text/plain")
                if (text := _joined(output["data"].get(mime))) is not None
                and len(text) < 4_000_000
                and (mime != "image/png" or _BASE64.fullmatch(text))
            }
            if data:
                kept.append(nbformat.v4.new_output("display_data", data=data))
    return kept


def _joined(text: Any) -> str | None:
    if isinstance(text, list) and all(isinstance(line, str) for line in text):
        return "".join(text)
    return text if isinstance(text, str) else None


# -- the release a submission belongs to ---------------------------------------------------------------------------


def release_path(lab: str, course: Path = COURSE) -> Path:
    """The notebook students of a lab received.

    Raises:
        CannotGrade: if the course has no such lab.
    """
    path = course / "labs" / lab / f"{lab}.ipynb"
    if not path.is_file():
        known = ", ".join(_labs(course)) or "none"
        raise CannotGrade(f"there is no lab {lab!r}; this course has: {known}")
    return path


def _labs(course: Path) -> list[str]:
    return sorted(p.stem for p in (course / "labs").glob("lab*/lab*.ipynb") if p.parent.name == p.stem)


def find_lab(notebook: NotebookNode, course: Path = COURSE) -> str:
    """The lab whose graded cells the notebook has most of.

    Raises:
        CannotGrade: if it has none of any.
    """
    present = {grade_id(cell) for cell in notebook.cells} - {None}
    shared: dict[str, int] = {}
    for lab in _labs(course):
        release = nbformat.read(release_path(lab, course), as_version=4)
        shared[lab] = len(present & {grade_id(cell) for cell in release.cells})
    best = max(shared, key=lambda lab: shared[lab], default=None)
    if best is None or shared[best] == 0:
        raise CannotGrade(
            "the notebook has no graded cells of this course; start from the lab's notebook in labs/, "
            f"or name the lab with --lab ({', '.join(_labs(course)) or 'none'})"
        )
    return best


def grade_id(cell: NotebookNode) -> str | None:
    """The cell's name in the gradebook, if it has one."""
    return cell.metadata.get("nbgrader", {}).get("grade_id")


def is_graded(cell: NotebookNode) -> bool:
    """Is this a cell that only runs a check?"""
    return bool(cell.metadata.get("nbgrader", {}).get("grade")) and cell.cell_type == "code"


def is_demo(cell: NotebookNode) -> bool:
    """Is this a cell for people, not run when grading?"""
    return "demo" in cell.metadata.get("tags", [])


def sanitise(submitted: NotebookNode, release: NotebookNode) -> NotebookNode:
    """Put a submission back on the rails of its release, keeping all of the student's own work.

    Locked cells get the release's source back; graded, locked and task cells that are missing are put back in their
    place; metadata is the release's own, and of a name that appears twice only the first counts. Cells the student
    added stay where they are, what is live in their Markdown (HTML, pictures, links that are no addresses) made text.
    """
    originals = {grade_id(cell): cell for cell in release.cells if grade_id(cell)}
    demos = {key: cell for cell in release.cells if is_demo(cell) for key in (cell["id"], cell.source)}
    cells: list[NotebookNode] = []
    seen: set[str] = set()
    for cell in submitted.cells:
        name = grade_id(cell)
        original = originals.get(name) if name not in seen else None
        if original is not None and original.cell_type == cell.cell_type:
            seen.add(name)
            restored = _restore(cell, original)
        else:
            restored = _new_cell(cell.cell_type, cell.source)
            demo = demos.get(cell["id"]) or demos.get(cell.source)
            if name is None and demo is not None and cell.cell_type == "code":
                restored.metadata = NotebookNode(demo.metadata)
                restored["outputs"] = cell.get("outputs", [])
            elif cell.cell_type != "code":
                restored.source = _harmless(cell.source)
        restored["id"] = original["id"] if original is not None else cell["id"]
        cells.append(restored)
    for position, cell in enumerate(release.cells):
        name = grade_id(cell)
        if name and name not in seen and not _is_plain_solution(cell):
            before = {c["id"] for c in release.cells[:position]}
            places = [i for i, c in enumerate(cells) if c["id"] in before]
            put_back = _restore(cell, cell)
            put_back["id"] = cell["id"]
            cells.insert(max(places, default=-1) + 1, put_back)
    _make_ids_unique(cells)
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=release.metadata)
    notebook.nbformat_minor = 5
    return notebook


def _restore(cell: NotebookNode, original: NotebookNode) -> NotebookNode:
    """The release's cell, with the student's source where the student may write."""
    source = cell.source if _is_editable(original) else original.source
    if original.cell_type != "code" and source != original.source:
        source = _harmless(source)
    restored = _new_cell(original.cell_type, source)
    restored.metadata = NotebookNode(original.metadata)
    return restored


def _harmless(text: str) -> str:
    """A student's Markdown with everything in it that is live made plain text."""
    for pattern, replacement in _LIVE:
        text = pattern.sub(replacement, text)
    return text


def _is_editable(original: NotebookNode) -> bool:
    nbgrader = original.metadata.get("nbgrader", {})
    return bool(nbgrader.get("solution")) or not (
        nbgrader.get("locked") or nbgrader.get("grade") or nbgrader.get("task")
    )


def _is_plain_solution(cell: NotebookNode) -> bool:
    """A stub the student deleted: their code may stand elsewhere, and the stub would undo it."""
    nbgrader = cell.metadata.get("nbgrader", {})
    return bool(nbgrader.get("solution")) and not nbgrader.get("grade")


def _make_ids_unique(cells: list[NotebookNode]) -> None:
    used: set[str] = set()
    for cell in cells:
        if cell["id"] in used:
            cell["id"] = next(name for n in itertools.count() if (name := f"{cell['id'][:50]}-{n}") not in used)
        used.add(cell["id"])


def cell_label(cell: NotebookNode, number: int) -> str:
    """How reports name a cell: by its grade_id, else by its number in the notebook, from 1."""
    return f"cell {(grade_id(cell) or str(number)).removesuffix('-code')}"


def to_run(notebook: NotebookNode) -> list[tuple[int, str, str]]:
    """(index, label, source) of the code cells that are run before the checks: all but check cells and demos."""
    return [
        (index, cell_label(cell, index + 1), cell.source)
        for index, cell in enumerate(notebook.cells)
        if cell.cell_type == "code" and not is_graded(cell) and not is_demo(cell)
    ]
