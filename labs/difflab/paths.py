"""Where the bundled data lie."""

from __future__ import annotations

import sysconfig
from pathlib import Path

__all__ = ["data_path"]


def data_path(name: str) -> Path:
    """Where a file of the project's `data/` folder lies: in the clone, or where pip put it.

    Raises:
        FileNotFoundError: if it is in neither place.
    """
    clone = Path(__file__).resolve().parents[2] / "data"
    for folder in (clone, Path(sysconfig.get_path("data")) / "share" / "difflab"):
        if (folder / name).exists():
            return folder / name
    raise FileNotFoundError(f"{name} is not in {clone}; get the whole repository, data/ included")
