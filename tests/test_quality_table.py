"""Is every sampler measured from the same noise, is finished work kept, and does the table say what was measured?"""

import itertools

import pytest
import torch

from difflab import quality_table as module
from difflab.metrics import Quality
from difflab.quality_table import QualityTable, Row, draw_rows, quality_table, to_markdown
from difflab.schedule import NoiseSchedule

ROWS = (Row("ddpm", 4), Row("ddim", 2), Row("ddim", 2, 1.0), Row("ddim", 2, schedule="quadratic"))


class _Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(1.0))


class _Sampler:
    """Returns x_T, shifted by what it was asked for, and remembers every call."""

    calls: list = []

    def __init__(self, model, schedule):
        self.schedule = schedule

    def create_timestep_schedule(self, num_steps, kind="uniform"):
        return (kind, num_steps)

    def sample(self, shape, timesteps=None, eta=0.0, x_T=None):
        self.calls.append((timesteps, eta, x_T.clone()))
        return 0.1 * x_T + eta


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """draw(**changes): the rows above, 6 digits in batches of 4, measured by their mean and deviation."""
    torch.manual_seed(0)
    monkeypatch.setattr(module, "quality", _quality)
    monkeypatch.setattr(_Sampler, "calls", [])
    network = _Network()

    def draw_them(**changes):
        arguments = dict(
            samplers={"ddpm": _Sampler, "ddim": _Sampler}, model=network, schedule=NoiseSchedule.linear(4),
            test_images=torch.rand(8, 1, 28, 28), work=tmp_path / "work", num=6, seeds=(0, 5), batch_size=4, rows=ROWS,
            timed=3, report=lambda line: None,
        )  # fmt: skip
        return draw_rows(**{**arguments, **changes})

    return draw_them


def _quality(images) -> Quality:
    return Quality(len(images), images.mean().item(), 0.5, 0.5, [0.1] * 10, images.std().item())


def test_all_rows_of_a_seed_start_from_the_same_noise(draw):
    draw()
    drawn = _Sampler.calls[: 4 * 2 * 2]
    starts = [x_T for _, _, x_T in drawn]
    for row in range(4):  # two seeds of two batches each
        for batch in range(4):
            assert torch.equal(starts[4 * row + batch], starts[batch])
    assert not torch.equal(starts[0], starts[2])
    assert [len(x) for x in starts[:4]] == [4, 2, 4, 2]
    assert [(t, eta) for t, eta, _ in drawn[::4]] == [
        (None, 0.0), (("uniform", 2), 0.0), (("uniform", 2), 1.0), (("quadratic", 2), 0.0)
    ]  # fmt: skip


def test_finished_batches_are_not_drawn_again(draw):
    first = draw()
    _Sampler.calls.clear()
    second = draw()
    assert len(_Sampler.calls) == 1 + len(ROWS)  # a warm-up, and the timing
    assert [row.runs for row in second.rows] == [row.runs for row in first.rows]


def test_a_folder_of_another_run_is_refused(draw):
    draw()
    with pytest.raises(ValueError, match="another network or other settings"):
        draw(precision="bfloat16")


def test_the_table_survives_json_and_prints_every_figure(draw, tmp_path):
    table = draw()
    path = tmp_path / "quality.json"
    path.write_text(table.to_json(), encoding="utf-8")
    assert quality_table(path) == table
    text = to_markdown(table)
    assert [line.split(" | ")[0] for line in text.splitlines()[2:]] == [
        "| DDPM-4", "| DDIM-2", "| DDIM-2, η = 1", "| DDIM-2, quadratic", "| *real test digits*"
    ]  # fmt: skip
    row = table.rows[2]
    assert f"{row.runs[0].frechet:.1f} / {row.runs[1].frechet:.1f}" in text
    assert row.frechet == pytest.approx((row.runs[0].frechet + row.runs[1].frechet) / 2)
    assert isinstance(table, QualityTable) and table.n == 6


def test_the_table_that_is_shipped_is_whole():
    table = quality_table()
    assert table.n >= 2048 and len(table.rows) == len(module.ROWS)
    assert {row.label for row in table.rows} == {row.label for row in module.ROWS}
    assert all(len(row.runs) == 2 and row.seconds > 0 and run.n == table.n for row in table.rows for run in row.runs)


def test_the_pages_show_the_figures_that_are_shipped(course):
    table = to_markdown(quality_table())
    assert table in (course / "data" / "README.md").read_text(encoding="utf-8"), "data/README.md shows other figures"
    readme = (course / "README.md").read_text(encoding="utf-8")
    shown = _rows(readme[readme.index("| sampler |") :])
    assert len(shown) >= 5 and all(row in _rows(table) for row in shown), "README.md shows other figures"


def _rows(markdown):
    """The first five cells of each row of the table that `markdown` begins with."""
    lines = itertools.takewhile(lambda line: line.startswith("|"), markdown.splitlines())
    return [[cell.strip() for cell in line.split("|")[1:6]] for line in lines][2:]
