"""Hygiene: what of a submitted notebook survives."""

from __future__ import annotations

import json
import re

import nbformat
import pytest

from autograder.notebooks import CannotGrade, find_lab, grade_id, read_notebook, sanitise, to_run

LAB = "lab05_sampling"


def _cell(notebook, name):
    (cell,) = (c for c in notebook.cells if grade_id(c) == name)
    return cell


def _through_disk(notebook, tmp_path):
    path = tmp_path / "submission.ipynb"
    path.write_text(nbformat.writes(notebook), encoding="utf-8")
    return read_notebook(path)


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "empty"),
        ("hello", "not JSON"),
        ("[1, 2]", "not a Jupyter notebook"),
        ("{}", "not a Jupyter notebook"),
        ('{"nbformat": 3, "worksheets": []}', "notebook format 3"),
        ('{"nbformat": 4, "nbformat_minor": 5, "cells": []}', "no cells"),
        ('{"nbformat": 4, "cells": [{"cell_type": "code", "source": 5}]}', "cell 1 is damaged"),
        ('{"nbformat": 4, "cells": [{"cell_type": "graph", "source": ""}]}', "cell 1 is damaged"),
        ('{"nbformat": 4, "cells": [7]}', "cell 1 is damaged"),
    ],
)
def test_what_is_no_notebook_is_named_in_one_line(text, says, tmp_path):
    path = tmp_path / "x.ipynb"
    path.write_text(text)
    with pytest.raises(CannotGrade, match=says) as error:
        read_notebook(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_missing_binary_and_deep_files(tmp_path):
    with pytest.raises(CannotGrade, match="no such file"):
        read_notebook(tmp_path / "none.ipynb")
    (tmp_path / "b.ipynb").write_bytes(b"\x80\x81\x82")
    with pytest.raises(CannotGrade, match="as text"):
        read_notebook(tmp_path / "b.ipynb")
    (tmp_path / "d.ipynb").write_text("[" * 100_000)
    with pytest.raises(CannotGrade, match="not JSON"):
        read_notebook(tmp_path / "d.ipynb")


def test_the_lab_is_found_from_the_graded_cells(student):
    assert find_lab(student(LAB)) == LAB
    stranger = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 + 1")])
    with pytest.raises(CannotGrade, match="no graded cells"):
        find_lab(stranger)


def test_an_untouched_submission_is_its_release(student, tmp_path):
    clean = sanitise(_through_disk(student(LAB), tmp_path), student(LAB))
    assert [(c.cell_type, c.source, c.metadata) for c in clean.cells] == [
        (c.cell_type, c.source, c.metadata) for c in student(LAB).cells
    ]


def test_locked_cells_are_restored_and_solutions_kept(student, tmp_path):
    submitted = student(LAB)
    _cell(submitted, "add_noise").source = "print('always right')"
    _cell(submitted, "setup").source = "import os; os._exit(0)"
    _cell(submitted, "add_noise-code").source = "mine = 1"
    clean = sanitise(_through_disk(submitted, tmp_path), student(LAB))
    assert _cell(clean, "add_noise").source == 'check("add_noise")'
    assert _cell(clean, "setup").source == _cell(student(LAB), "setup").source
    assert _cell(clean, "add_noise-code").source == "mine = 1"


def test_tags_unknown_metadata_and_attachments_are_dropped(student, tmp_path):
    submitted = student(LAB)
    cell = _cell(submitted, "add_noise-code")
    cell.metadata["tags"] = ["skip-execution", "demo"]
    cell.metadata["nbgrader"]["points"] = 1000
    cell.metadata["papermill"] = {"x": 1}
    submitted.metadata["kernelspec"]["name"] = "evil"
    submitted.cells.append(nbformat.v4.new_markdown_cell("hi", attachments={"a.png": {"image/png": "AAAA"}}))
    clean = sanitise(_through_disk(submitted, tmp_path), student(LAB))
    assert _cell(clean, "add_noise-code").metadata == _cell(student(LAB), "add_noise-code").metadata
    assert clean.metadata == student(LAB).metadata
    assert "attachments" not in clean.cells[-1]


def test_missing_graded_locked_and_task_cells_are_put_back_in_place(student, tmp_path):
    submitted = student(LAB)
    gone = {"add_noise", "ddpm_class", "written_analysis", "title"}
    submitted.cells = [c for c in submitted.cells if grade_id(c) not in gone]
    clean = sanitise(_through_disk(submitted, tmp_path), student(LAB))
    assert [grade_id(c) for c in clean.cells] == [grade_id(c) for c in student(LAB).cells]


def test_a_deleted_stub_stays_deleted(student, tmp_path):
    """Their code may stand in another cell, and the stub would undo it."""
    submitted = student(LAB)
    submitted.cells = [c for c in submitted.cells if grade_id(c) != "add_noise-code"]
    clean = sanitise(_through_disk(submitted, tmp_path), student(LAB))
    assert "add_noise-code" not in [grade_id(c) for c in clean.cells]


def test_of_a_repeated_name_only_the_first_counts(student, tmp_path):
    submitted = student(LAB)
    twin = nbformat.from_dict(json.loads(json.dumps(_cell(submitted, "add_noise-code"))))
    twin.source = "second = 2"
    submitted.cells.append(twin)
    clean = sanitise(_through_disk(submitted, tmp_path), student(LAB))
    assert [grade_id(c) for c in clean.cells].count("add_noise-code") == 1
    assert clean.cells[-1].source == "second = 2"  # still run: the student's last word
    assert len({c["id"] for c in clean.cells}) == len(clean.cells)


def test_only_text_and_pictures_of_demos_survive(student, tmp_path):
    submitted = student(LAB)
    demo = next(c for c in submitted.cells if "demo" in c.metadata.get("tags", []))
    html = {"text/html": "<script>alert(1)</script>", "image/svg+xml": "<svg/>", "text/plain": "fine"}
    demo["outputs"] = [
        nbformat.v4.new_output("display_data", data=html),
        nbformat.v4.new_output("stream", text="hello"),
    ]
    _cell(submitted, "add_noise-code")["outputs"] = [nbformat.v4.new_output("stream", text="swept away")]
    clean = sanitise(_through_disk(submitted, tmp_path), student(LAB))
    text = nbformat.writes(clean)
    assert "<script" not in text and "<svg" not in text and "swept away" not in text
    assert "fine" in text and "hello" in text


def test_demos_and_check_cells_are_not_run_even_if_retagged(student, tmp_path):
    submitted = student(LAB)
    submitted.cells[5].metadata["tags"] = ["demo"]
    clean = sanitise(_through_disk(submitted, tmp_path), student(LAB))
    sources = "\n".join(source for _, _, source in to_run(clean))
    assert not re.search(r"^check\(", sources, re.MULTILINE) and "plots.trajectory(ddpm" not in sources
    assert "def add_noise" in sources


def test_colliding_ids_come_to_an_end(student, tmp_path):
    """Three cells that named each other's replacement once made the search for a free name endless."""
    submitted = student(LAB)
    for identity in ("a" * 50, "a" * 50 + "-0", "a" * 50 + "-1", "a" * 50):
        cell = nbformat.v4.new_code_cell("1")
        cell["id"] = identity
        submitted.cells.append(cell)
    path = tmp_path / "x.ipynb"
    path.write_text(json.dumps(submitted))
    clean = sanitise(read_notebook(path), student(LAB))
    assert len({c["id"] for c in clean.cells}) == len(clean.cells)


def test_raw_html_in_a_students_markdown_is_text(student, tmp_path):
    submitted = student(LAB)
    live = '<img src=x onerror="alert(1)"> $a < b$ <script>x</script>'
    submitted.cells.append(nbformat.v4.new_markdown_cell(live))
    clean = sanitise(_through_disk(submitted, tmp_path), student(LAB))
    assert clean.cells[-1].source == '&lt;img src=x onerror="alert(1)"> $a < b$ &lt;script>x&lt;/script>'
    assert "<details>" in nbformat.writes(clean), "the lab's own text keeps its hints"


def test_demos_are_known_by_their_source_when_ids_are_gone(student, tmp_path):
    submitted = student(LAB)
    for number, cell in enumerate(submitted.cells):
        cell["id"] = f"other-{number}"
    clean = sanitise(_through_disk(submitted, tmp_path), student(LAB))
    assert len(to_run(clean)) == len(to_run(student(LAB)))


def test_half_a_surrogate_and_too_many_cells(student, tmp_path):
    path = tmp_path / "x.ipynb"
    cell = {"cell_type": "code", "source": "s = '\ud800'", "metadata": {}}
    path.write_text(json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [cell]}))
    read_notebook(path).cells[0].source.encode("utf-8")
    path.write_text(json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [cell] * 1001}))
    with pytest.raises(CannotGrade, match="1,001 cells"):
        read_notebook(path)
