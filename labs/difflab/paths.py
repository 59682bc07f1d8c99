"""Where the bundled data lie, and where results may be written."""

from __future__ import annotations

import sysconfig
import tempfile
from pathlib import Path

__all__ = ["data_path", "ensure_writable"]


def data_path(name: str) -> Path:
    """Where a file of the project's `data/` folder lies: in the clone, or where pip put it.

    Raises:
        FileNotFoundError: if it is in neither place.
    """
    clone = Path(__file__).resolve().parents[2] / "data"
    # Into the environment, or where that is not the user's to write (on a JupyterHub) into their home.
    installed = (sysconfig.get_path("data"), sysconfig.get_path("data", sysconfig.get_preferred_scheme("user")))
    for folder in (clone, *(Path(place, "share", "difflab") for place in installed)):
        if (folder / name).exists():
            return folder / name
    raise FileNotFoundError(f"{name} is not in {clone}; get the whole repository, data/ included")


def ensure_writable(folder: str | Path) -> None:
    """Make the folder, and see that a file can be written there: better before an hour's work than after it.

    Raises:
        OSError: if it cannot.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"cannot write to {str(folder)!r} ({error.strerror}); give another --out") from None
