"""Are a notebook's classes taken, and everything that is not a definition left alone?"""

import json

import matplotlib
import nbformat
import pytest
import torch
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from difflab.notebook import add_to_class, load_notebook, progress

GRADED = {"nbgrader": {"grade": True, "solution": False, "grade_id": "g", "points": 1, "schema_version": 3}}
SOLUTION = {"nbgrader": {"grade": False, "solution": True, "grade_id": "s", "schema_version": 3}}


@pytest.fixture
def load(tmp_path):
    """Write the cells to a notebook and load it."""

    def write_and_load(*cells):
        cells = [new_code_cell(cell) if isinstance(cell, str) else cell for cell in cells]
        nbformat.write(new_notebook(cells=cells), tmp_path / "lab.ipynb")
        return load_notebook(tmp_path / "lab.ipynb")

    return write_and_load


def test_add_to_class_adds_and_replaces_a_method():
    class Sampler:
        pass

    @add_to_class(Sampler)
    def step(self, x):
        return x + 1

    assert Sampler().step(1) == 2
    assert step(None, 1) == 2, "the function itself must stay usable"

    @add_to_class(Sampler)
    def step(self, x):
        return x + 2

    assert Sampler().step(1) == 3


@pytest.mark.parametrize("total", [3, None])
def test_progress_counts_calls_on_standard_output_and_changes_nothing(total, capsys, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    network = torch.nn.Identity()
    with pytest.raises(RuntimeError, match="inside"), progress(network, total):
        assert [network(k) for k in range(3)] == [0, 1, 2]
        raise RuntimeError("inside")
    shown = capsys.readouterr()
    assert "network calls" in shown.out and shown.err == ""
    assert not network._forward_pre_hooks, "the bar must not stay on the network"


def test_cells_share_their_names(load):
    names = load(
        "from difflab.notebook import add_to_class\nclass A:\n    pass",
        "@add_to_class(A)\ndef two(self):\n    return 2",
        "value = A().two()",
    )
    assert names["value"] == 2
    assert names["A"].__module__ == names["__name__"] != "__main__", "code under a __main__ guard would run"


def test_demos_graded_cells_and_text_are_skipped(load):
    names = load(
        "done = ['plain']",
        new_code_cell("done.append('demo')", metadata={"tags": ["demo"]}),
        new_code_cell("done.append('check')", metadata=GRADED),
        new_code_cell("done.append('solution')", metadata=SOLUTION),
        new_code_cell("done.append('tagged')", metadata={"tags": ["other"]}),
        new_markdown_cell("done.append('text')"),
    )
    assert names["done"] == ["plain", "solution", "tagged"]


def test_lines_for_ipython_are_skipped(load):
    names = load("%matplotlib inline\n!pip install nothing\na = 7 % 4\nif a:\n    %time\n    b = 2", "%%time\nc = 3")
    assert (names["a"], names["b"], names["c"]) == (3, 2, 3)


def test_a_cell_that_fails_is_reported_and_the_rest_goes_on(load, capsys):
    names = load(
        new_markdown_cell("# Lab"),
        "a = 1\nraise NotImplementedError('write me')\na = 2",
        "def broken(:",
        "b = a + 1",
    )
    assert names["b"] == 2
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0] == "lab.ipynb, cell 1: NotImplementedError: write me (skipped)"
    assert lines[1].startswith("lab.ipynb, cell 2: SyntaxError: ")


def test_what_cells_print_is_not_shown(load, capsys):
    load("print('hello')")
    assert capsys.readouterr().out == ""


def test_plots_of_a_notebook_open_no_window(load):
    before = matplotlib.get_backend()
    names = load("import matplotlib\nbackend = matplotlib.get_backend()\nmatplotlib.use('svg')")
    assert names["backend"].lower() == "agg"
    assert matplotlib.get_backend() == before


@pytest.mark.parametrize("text", ["", "print('a script')", "[]", "null", "{}", '{"cells": []}', '{"nbformat": 4}'])
def test_another_file_is_refused(tmp_path, text):
    (tmp_path / "lab.ipynb").write_text(text)
    with pytest.raises(ValueError, match="lab.ipynb is not a Jupyter notebook") as error:
        load_notebook(tmp_path / "lab.ipynb")
    assert "\n" not in str(error.value)


def test_a_binary_file_is_refused(tmp_path):
    (tmp_path / "lab.ipynb").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="lab.ipynb is not a Jupyter notebook"):
        load_notebook(tmp_path / "lab.ipynb")


def test_an_old_format_is_refused(tmp_path):
    old = {"nbformat": 3, "nbformat_minor": 0, "metadata": {}, "worksheets": []}
    (tmp_path / "lab.ipynb").write_text(json.dumps(old))
    with pytest.raises(ValueError, match="notebook format 3; open it in JupyterLab and save it as format 4"):
        load_notebook(tmp_path / "lab.ipynb")


def test_a_missing_notebook_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no notebook at .*lab.ipynb"):
        load_notebook(tmp_path / "lab.ipynb")
