"""Write a class over several cells of a notebook, see how far a long cell is, and take classes from a notebook."""

from __future__ import annotations

import contextlib
import io
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

__all__ = ["add_to_class", "load_notebook", "progress"]


def add_to_class(cls: type) -> Callable[[Callable], Callable]:
    """Decorator: make the function below a method of `cls`, so that a class can grow cell by cell.

    Running the cell again replaces the method. (Zhang et al., "Dive into Deep Learning", use the same device.)
    """

    def add(function: Callable) -> Callable:
        setattr(cls, function.__name__, function)
        return function

    return add


@contextlib.contextmanager
def progress(model: nn.Module, total: int | None = None) -> Iterator[None]:
    """A bar that moves with every call of `model` inside the block, and goes away at its end.

    Args:
        model: the network that the block calls.
        total: how many calls to expect; None if that cannot be known, the bar then counts and shows the pace.
    """
    # standard output, because JupyterLab paints standard error red
    with tqdm(total=total, unit=" network calls", leave=False, file=sys.stdout, mininterval=0.3) as bar:

        def moved(_module: nn.Module, _args: tuple) -> None:
            bar.update()

        handle = model.register_forward_pre_hook(moved)
        try:
            yield
        finally:
            handle.remove()


def load_notebook(path: str | Path) -> dict[str, Any]:
    """Run a notebook's code cells and return the names they define.

    Cells tagged `demo` and cells that only run checks are skipped, so are lines for IPython (% and !). A cell that
    raises is reported in one line and the rest goes on: a half-finished notebook still gives its finished classes.
    The code runs in this process with your rights: load only notebooks you trust.

    Args:
        path: a Jupyter notebook (.ipynb, format 4).

    Returns:
        The namespace, e.g. load_notebook("lab05_sampling.ipynb")["DDIMSampler"].

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a notebook of format 4.
    """
    import matplotlib
    import nbformat

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no notebook at {path}")
    try:
        notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
        version = notebook.nbformat
    except Exception as error:
        raise ValueError(f"{path} is not a Jupyter notebook ({str(error).splitlines()[0][:100]})") from None
    if version != 4:
        raise ValueError(f"{path} has notebook format {version}; open it in JupyterLab and save it as format 4")
    # A module of its own, not __main__: dataclasses look their module up, and code under a __main__ guard stays out.
    module = types.ModuleType(f"notebook_{path.stem}")
    sys.modules[module.__name__] = module
    namespace = vars(module)
    backend = matplotlib.get_backend()
    matplotlib.use("agg")
    try:
        for number, cell in enumerate(notebook.cells):
            tags = cell.metadata.get("tags", [])
            if cell.cell_type != "code" or "demo" in tags or cell.metadata.get("nbgrader", {}).get("grade"):
                continue
            source = "\n".join("" if line.lstrip()[:1] in ("%", "!") else line for line in cell.source.splitlines())
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    exec(compile(source, f"{path.name}, cell {number}", "exec"), namespace)
            except Exception as error:
                print(f"{path.name}, cell {number}: {type(error).__name__}: {str(error)[:200]} (skipped)")
    finally:
        matplotlib.use(backend)
    return namespace
