"""Are Lab 7's tables measured with what the notebook defines, is finished work kept, and is what is shipped whole?"""

from __future__ import annotations

import pytest
import torch

from difflab import compression_table as module
from difflab.compression_table import PARTS, CompressionTable, Measurement, Part, compression_table
from difflab.metrics import Quality
from difflab.notebook import load_notebook
from difflab.schedule import NoiseSchedule
from difflab.unet import UNet


@pytest.fixture(scope="module")
def namespace(course):
    return load_notebook(course / "solutions" / "lab07_lightweight" / "lab07_lightweight.ipynb")


@pytest.fixture
def measure(namespace, tmp_path, monkeypatch):
    """measure(part): the part at toy size, with the lab's own solution."""
    monkeypatch.setattr(module, "quality", lambda x: Quality(len(x), x.mean().item(), 0.5, 0.5, [0.1] * 10, 0.0))
    monkeypatch.setattr(module, "NUM_STEPS", 2)
    monkeypatch.setattr(module, "TIMED", 2)
    monkeypatch.setattr(module, "TRAJECTORIES", 2)
    monkeypatch.setattr(module, "LONGER", 2)
    torch.manual_seed(0)
    model = UNet((32, 64), 16).eval().requires_grad_(False)
    for parameter in model.parameters():  # the last layers start at zero, and would make all rows alike
        parameter.add_(0.05 * torch.randn_like(parameter))
    images = torch.rand(8, 1, 28, 28) * 2 - 1
    schedule = NoiseSchedule.scaled_linear(24)
    reports: list[str] = []
    measurement = Measurement(namespace, model, schedule, images, images, tmp_path / "work", 3, 0, 2, 2, reports.append)
    return lambda part: (measurement.measure(part), reports)


@pytest.mark.slow
@pytest.mark.parametrize("name", PARTS)
def test_every_part_is_measured(name, measure):
    part, reports = measure(name)
    assert part.n == 3 and len(part.rows) == len(reports) + 1 and "real test digits" in part.rows
    for label, row in part.rows.items():
        assert row["frechet"] == row["frechet"] and "recognised" in row, label
    drawn = [row["frechet"] for label, row in part.rows.items() if label != "real test digits"]
    assert len(set(drawn)) > 1
    if name == "pruning":
        macs = {
            label: row["macs"] / part.rows["unmodified"]["macs"] for label, row in part.rows.items() if "macs" in row
        }
        for label in ("magnitude", "magnitude, threshold", "magnitude, two turns", "Taylor", "Diff-Pruning"):
            assert 0.2 < macs[label] <= 0.5, macs
        without = {label for label in macs if "frechet_before" not in part.rows[label]}
        assert without == {"unmodified", f"Diff-Pruning, trained {module.LONGER} ×"}
    if name == "quantization":
        assert part.rows["4 bits, trajectory"]["bytes"] < part.rows["8 bits, trajectory"]["bytes"]


def test_finished_work_is_kept_and_another_folder_refused(measure, namespace, tmp_path):
    first, _ = measure("samplers")
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").iterdir()}
    second, _ = measure("samplers")
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "work").iterdir()}
    assert {k: r["frechet"] for k, r in first.rows.items()} == {k: r["frechet"] for k, r in second.rows.items()}
    other = Measurement(
        namespace, UNet((8, 16), 16), NoiseSchedule.linear(100), torch.zeros(3, 1, 28, 28), torch.zeros(3, 1, 28, 28),
        tmp_path / "work", 3,
    )  # fmt: skip
    with pytest.raises(ValueError, match="another network or other settings"):
        other.measure("samplers")


def test_an_unknown_part_is_refused(measure):
    with pytest.raises(ValueError, match="no part 'sampler'; the parts are samplers, "):
        measure("sampler")


def test_tables_survive_json_and_print_in_columns(tmp_path):
    part = Part(
        7, 0, {"a row": {"bits": 8, "bytes": 1234567, "frechet": 3.14159}, "real test digits": {"frechet": 2.0}}
    )
    path = tmp_path / "compression.json"
    path.write_text(CompressionTable({"quantization": part}).to_json(), encoding="utf-8")
    table = compression_table(path)
    assert table["quantization"] == part
    lines = str(part).splitlines()
    assert lines[0].split("  ")[0] == "n = 7" and len({len(line) for line in lines}) == 1
    assert "1,234,567" in lines[1] and "3.1" in lines[1]
    assert part.markdown().splitlines()[1] == "| --- | ---: | ---: | ---: |"
    with pytest.raises(KeyError, match="no part 'pruning'; it has quantization"):
        table["pruning"]


def test_the_table_that_is_shipped_is_whole():
    table = compression_table()
    assert set(table.parts) == set(PARTS)
    for name in PARTS:
        assert len(table[name].rows) >= 4 and all("frechet" in row for row in table[name].rows.values())


def test_the_page_shows_the_figures_that_are_shipped(course):
    text = (course / "data" / "README.md").read_text(encoding="utf-8")
    for name, part in compression_table().parts.items():
        assert part.markdown() in text, f"data/README.md shows other figures of {name}"
