"""Are all solvers measured from the same noise, is finished work kept, and does the table say what was measured?"""

import pytest
import torch

from difflab import solver_table as module
from difflab.__main__ import main
from difflab.metrics import Quality
from difflab.schedule import NoiseSchedule
from difflab.solver_table import NEEDED, SolverRow, draw_solver_rows, solver_table, to_markdown

ROWS = (
    SolverRow("dpm1", 4, "time", n=6),
    SolverRow("dpm++2m", 3, "quadratic", 1.0, n=6),
    SolverRow("dpm2", 3, "quadratic", keys="uniform-2", strength=0.1, n=4),
    SolverRow("dpm++2m", 50, "quadratic", keys="paper", n=4),
)


class _Solver:
    def __init__(self, model, schedule):
        self.calls = model.calls

    def sample(self, x_T, times, method, eta):
        self.calls.append((method, times, eta, None, x_T.clone()))
        return 0.1 * x_T + eta


def _faster(model, schedule, x_T, times, method, keys, strength):
    model.calls.append((method, times, strength, keys, x_T.clone()))
    return 0.1 * x_T - strength


NOTEBOOK = {
    "time_grid": lambda schedule, num_steps, spacing: (num_steps, spacing),
    "DPMSolver": _Solver,
    "key_schedule": lambda num_calls, kind, num_keys: (num_calls, kind, num_keys),
    "faster_sample": _faster,
}


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """draw(**changes): (the table of the rows above in batches of 4, all calls)."""
    monkeypatch.setattr(
        module, "quality", lambda x: Quality(len(x), x.mean().item(), 0.5, 0.5, [0.1] * 10, x.std().item())
    )
    torch.manual_seed(0)
    network = torch.nn.Conv2d(1, 1, 3)

    def draw_them(**changes):
        network.calls = []
        arguments = dict(
            notebook=NOTEBOOK, model=network, schedule=NoiseSchedule.linear(60), work=tmp_path / "work", seeds=(0, 5),
            batch_size=4, rows=ROWS, report=lambda line: None,
        )  # fmt: skip
        return draw_solver_rows(**{**arguments, **changes}), network.calls

    return draw_them


def test_every_row_is_drawn_as_it_says_from_the_same_noise(draw):
    _, calls = draw()
    asked = [call[:4] for call in calls]
    assert asked[:4] == [("dpm1", (4, "time"), 0.0, None)] * 4  # two seeds of two batches each
    assert asked[4] == ("dpm++2m", (3, "quadratic"), 1.0, None)
    assert asked[8] == ("dpm2", (3, "quadratic"), 0.1, (5, "uniform", 2))
    assert asked[10] == ("dpm++2m", (50, "quadratic"), 0.0, (50, "paper", 1))
    starts = [call[4] for call in calls]
    assert all(torch.equal(starts[i], starts[i + 4]) for i in range(4)) and torch.equal(starts[0], starts[8])
    assert not torch.equal(starts[0], starts[2])


def test_finished_batches_are_not_drawn_again(draw):
    first, _ = draw()
    second, calls = draw()
    assert not calls
    assert [row.runs for row in second.rows] == [row.runs for row in first.rows]


def test_a_folder_of_another_run_is_refused(draw):
    draw()
    with pytest.raises(ValueError, match="another network or other settings"):
        draw(batch_size=2)


def test_the_table_survives_json_and_prints_every_figure(draw, tmp_path):
    table, _ = draw()
    path = tmp_path / "solvers.json"
    path.write_text(table.to_json(), encoding="utf-8")
    assert solver_table(path) == table
    text = to_markdown(table)
    assert [line.split(" | ")[0] for line in text.splitlines()[2:]] == [
        "| DDIM-4", "| DPM-Solver++ 2M-3, η = 1, quadratic", "| DPM-Solver-2-5, quadratic, keys uniform-2, noise 0.1",
        "| DPM-Solver++ 2M-50, quadratic, keys paper",
    ]  # fmt: skip
    assert all(f"{row.runs[0].frechet:.1f} / {row.runs[1].frechet:.1f}" in text for row in table.rows)


def test_a_notebook_of_another_lab_is_refused(course, capsys):
    notebook = course / "labs" / "lab06_timing" / "lab06_timing.ipynb"
    assert main(["solver-table", "--from", str(notebook)]) == 2
    error = capsys.readouterr().err
    assert all(name in error for name in NEEDED) and error.strip().count("\n") == 0


def test_the_table_that_is_shipped_is_whole():
    table = solver_table()
    assert [row.label for row in table.rows] == [row.label for row in module.ROWS]
    assert all(run.n == row.n for row in table.rows for run in row.runs)
    assert all(row.runs for row in table.rows)


def test_the_page_shows_the_figures_that_are_shipped(course):
    page = (course / "data" / "README.md").read_text(encoding="utf-8")
    assert to_markdown(solver_table()) in page, "data/README.md shows other figures"
