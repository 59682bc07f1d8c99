"""`check(...)` as a student meets it, in a real kernel."""

from __future__ import annotations

import time

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = pytest.mark.slow

SETUP = """
from difflab.check import check
class DDIMSampler:
    def __init__(self, model, schedule): self.schedule = schedule
    def predict_x0_from_eps(self, x_t, eps, t):
        a = self.schedule.alpha_bar(t).to(x_t).view(-1, 1, 1, 1)
        return {formula}
"""
RIGHT = "(x_t - (1 - a).sqrt() * eps) / a.sqrt()"


def _run(*sources: str):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in sources])
    NotebookClient(notebook, timeout=120, allow_errors=True).execute()
    return [cell.outputs for cell in notebook.cells]


def test_green_line_hint_todo_and_unknown_name():
    timed = "import time; _s = time.perf_counter(); {}; print(round(time.perf_counter() - _s, 2))"
    outputs = _run(
        SETUP.format(formula=RIGHT),
        'check("ddim_predict_x0")',
        timed.format('check("ddim_predict_x0")'),
        SETUP.format(formula="x_t - (1 - a).sqrt() * eps"),
        'check("ddim_predict_x0")',
        SETUP.format(formula="1 / 0"),
        'check("ddim_predict_x0")',
        'check("ddim_step")',
    )
    assert "✓ ddim_predict_x0: 5 points" in outputs[1][0].text
    (hint,) = outputs[4]
    assert hint.output_type == "error" and len(hint.traceback) == 1, "a hint, not a traceback"
    assert "the division by √ᾱ_t left out" in " ".join(hint.traceback[0].split())
    assert max(map(len, hint.traceback[0].splitlines())) <= 100, "no line is left to JupyterLab to break within a word"
    raised = " ".join(outputs[6][0].traceback[0].split())
    assert "ZeroDivisionError" in raised and "your cell, line 6" in raised
    assert "there is no check 'ddim_step'; the checks are: " in outputs[7][0].evalue


def test_an_exercise_still_to_be_written_is_one_line():
    """Do cells that meet one say so without a traceback, and keep theirs those that fail in another way?"""
    stub = "def draw(): raise NotImplementedError({!r})"
    outputs = _run(
        "from difflab.check import check",
        stub.format("TODO: write this method") + "\ndraw()",
        stub.format("no such device") + "\ndraw()",
        "print('on it goes')",
    )
    assert outputs[1][0].traceback == ["\x1b[1m○ draw\x1b[0m: TODO: write this method"]
    assert outputs[1][0].ename == "NotImplementedError" and outputs[1][0].evalue == "TODO: write this method"
    assert len(outputs[2][0].traceback) > 1 and outputs[3][0].text == "on it goes\n"


def test_a_check_leaves_the_random_numbers_of_the_notebook_alone():
    """Do checks draw from generators of their own? (The student's code may still use the global one.)"""
    code = "import torch; torch.manual_seed(0); check('ddim_predict_x0'); print(torch.rand(1).item())"
    outputs = _run(SETUP.format(formula=RIGHT), code, code)
    assert outputs[1][-1].text == outputs[2][-1].text


def test_it_answers_quickly(record_property):
    """How long does a warm check take? Recorded, not asserted: machines differ."""
    start = time.perf_counter()
    _run(SETUP.format(formula=RIGHT), *['check("ddim_predict_x0")'] * 3)
    record_property("seconds_for_kernel_and_three_checks", time.perf_counter() - start)
