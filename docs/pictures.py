"""Takes the README's pictures out of the executed solution notebooks, so that they show what the notebooks show.

python docs/pictures.py
"""

from __future__ import annotations

import base64
from pathlib import Path

import nbformat

DOCS = Path(__file__).resolve().parent
PICTURES = {  # file here -> the notebook, and a piece of the one cell that draws it
    "lab06-time.png": ("lab06_timing", "time_figure = plots.curves("),
    "lab07-bits.png": ("lab07_lightweight", "four_bits = copy.deepcopy("),
    "lab08-keys.png": ("lab08_encoder_propagation", "grid, drawn = time_grid(schedule, 20"),
}


def picture(name: str) -> bytes:
    """The PNG that a notebook shows.

    Raises:
        LookupError: if not exactly one cell has the piece of text, or if that cell shows no picture.
    """
    lab, piece = PICTURES[name]
    notebook = nbformat.read(DOCS.parent / "solutions" / lab / f"{lab}.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code" and piece in cell.source]
    pictures = [
        output.data["image/png"] for cell in cells for output in cell.outputs if "image/png" in output.get("data", {})
    ]
    if len(cells) != 1 or not pictures:
        raise LookupError(
            f"{name}: {len(cells)} cells of {lab} hold {piece!r}, with {len(pictures)} pictures; expected one"
        )
    return base64.b64decode(pictures[0])


if __name__ == "__main__":
    for name in PICTURES:
        (DOCS / name).write_bytes(picture(name))
