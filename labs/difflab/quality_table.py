"""What quality costs: every sampler on one network from the same noise, measured once, shipped as `data/quality.json`.

Behind `difflab quality-table`. It takes the samplers from a notebook, keeps every finished batch on disk, and goes on
where it was stopped.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from difflab.batches import claim_folder, draw_batches
from difflab.metrics import Quality, quality
from difflab.paths import data_path
from difflab.schedule import NoiseSchedule
from difflab.timing import synchronize
from difflab.unet import low_precision

__all__ = ["QualityTable", "Row", "draw_rows", "quality_table", "to_markdown"]


@dataclass(frozen=True)
class Row:
    """One sampler's measurements; `runs` has one entry for each seed of x_T."""

    method: str  # ddpm | ddim
    network_calls: int
    eta: float = 0.0
    schedule: str = "uniform"
    runs: tuple[Quality, ...] = ()
    seconds: float | None = None  # for `QualityTable.timed` digits in one batch

    @property
    def name(self) -> str:
        """For example DDIM-50; the same for every eta and timestep schedule."""
        return f"{self.method.upper()}-{self.network_calls}"

    @property
    def label(self) -> str:
        """For example DDIM-50, η = 1."""
        eta = f", η = {self.eta:g}" if self.eta else ""
        return self.name + eta + (", quadratic" if self.schedule == "quadratic" else "")

    @property
    def frechet(self) -> float:
        """Mean Fréchet distance of the runs."""
        return statistics.mean(run.frechet for run in self.runs)

    @property
    def recognised(self) -> float:
        """Mean recognised fraction of the runs."""
        return statistics.mean(run.recognised for run in self.runs)

    def __str__(self) -> str:
        return f"Fréchet {_each(self.runs, 'frechet')}, recognised {_each(self.runs, 'recognised', 100)} %"


ROWS = (
    Row("ddpm", 1000),
    *(Row("ddim", n) for n in (200, 100, 50, 20, 10)),
    *(Row("ddim", n, eta) for eta in (0.5, 1.0) for n in (50, 20)),
    *(Row("ddim", n, schedule="quadratic") for n in (100, 50, 20, 10)),
)


@dataclass(frozen=True)
class QualityTable:
    """All rows, and what real test digits get: the floor."""

    n: int  # digits behind every Fréchet distance
    precision: str  # of the network calls
    device: str  # the seconds are from
    timed: int  # digits behind the seconds
    rows: tuple[Row, ...]
    floor: Row

    def to_json(self) -> str:
        """As a JSON object."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> QualityTable:
        """Read what `to_json` wrote."""
        fields = json.loads(text)

        def row(stored: dict[str, Any]) -> Row:
            return Row(**{**stored, "runs": tuple(Quality(*run) for run in stored["runs"])})

        return cls(**{**fields, "rows": tuple(map(row, fields["rows"])), "floor": row(fields["floor"])})


def quality_table(path: str | Path | None = None) -> QualityTable:
    """The measured table that comes with the project (or the one at `path`).

    Raises:
        FileNotFoundError: if there is none.
    """
    return QualityTable.from_json(Path(path or data_path("quality.json")).read_text(encoding="utf-8"))


def to_markdown(table: QualityTable) -> str:
    """The table for a page; a figure for each seed, side by side, shows the spread."""
    lines = [
        f"| sampler | network calls | seconds for {table.timed} | Fréchet, n = {table.n} | recognised, % | diversity |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in table.rows:
        lines.append(
            f"| {row.label} | {row.network_calls} | {row.seconds:.2f} | {_each(row.runs, 'frechet')} | "
            f"{_each(row.runs, 'recognised', 100)} | {_each(row.runs, 'diversity', digits=3)} |"
        )
    floor = table.floor.runs
    lines.append(
        f"| *real test digits* | | | *{_each(floor, 'frechet')}* | *{_each(floor, 'recognised', 100)}* | "
        f"*{_each(floor, 'diversity', digits=3)}* |"
    )
    return "\n".join(lines)


def _each(runs: tuple[Quality, ...], field: str, scale: float = 1.0, digits: int = 1) -> str:
    return " / ".join(f"{scale * getattr(run, field):.{digits}f}" for run in runs)


def draw_rows(
    samplers: dict[str, type],
    model: nn.Module,
    schedule: NoiseSchedule,
    test_images: Tensor,
    work: Path,
    num: int = 2048,
    seeds: tuple[int, ...] = (0, 1),
    batch_size: int = 128,
    precision: str = "float32",
    device: str = "cpu",
    rows: tuple[Row, ...] = ROWS,
    timed: int = 16,
    report: Callable[[str], None] = print,
) -> QualityTable:
    """Draw and measure every row, then time all of them in one go.

    Args:
        samplers: "ddpm" and "ddim": the sampler classes.
        model, schedule: the network and its schedule, on `device`.
        test_images: real digits [N, 1, 28, 28], N >= num, for the floor.
        work: folder that keeps finished batches; run again with the same settings to go on.
        num: digits for every row and seed; all rows of a seed start from the same x_T.

    Raises:
        ValueError: if `work` holds batches of other settings.
    """
    claim_folder(work, model, {"num": num, "batch_size": batch_size, "precision": precision})
    measured = []
    for row in rows:

        def draw(x_T: Tensor, row: Row = row) -> Tensor:
            with low_precision(model, precision, device):
                return _run(row, samplers, model, schedule, x_T.to(device))

        runs = []
        for seed in seeds:
            runs.append(quality(draw_batches(work, row.label, draw, num, seed, batch_size)))
            report(f"{row.label}, seed {seed}: {runs[-1]}")
        measured.append(runs)
    floor = tuple(
        quality(test_images[torch.randperm(len(test_images), generator=torch.Generator().manual_seed(seed))[:num]])
        for seed in seeds
    )
    times = _time_rows(rows, samplers, model, schedule, timed, precision, device)
    filled = tuple(
        Row(r.method, r.network_calls, r.eta, r.schedule, tuple(runs), seconds)
        for r, runs, seconds in zip(rows, measured, times)
    )
    return QualityTable(num, precision, device, timed, filled, Row("real", 0, runs=floor))


def _run(row: Row, samplers: dict[str, type], model: nn.Module, schedule: NoiseSchedule, x_T: Tensor) -> Tensor:
    sampler = samplers[row.method](model, schedule)
    if row.method == "ddpm":
        return sampler.sample(tuple(x_T.shape), x_T=x_T)
    timesteps = sampler.create_timestep_schedule(row.network_calls, row.schedule)
    return sampler.sample(tuple(x_T.shape), timesteps=timesteps, eta=row.eta, x_T=x_T)


def _time_rows(rows, samplers, model, schedule, timed, precision, device) -> list[float]:
    x_T = torch.randn(timed, 1, 28, 28, generator=torch.Generator().manual_seed(0)).to(device)
    seconds = []
    with low_precision(model, precision, device):
        _run(Row("ddim", min(10, schedule.num_timesteps)), samplers, model, schedule, x_T)  # warm-up
        for row in rows:
            synchronize(device)
            start = time.perf_counter()
            _run(row, samplers, model, schedule, x_T)
            synchronize(device)
            seconds.append(time.perf_counter() - start)
    return seconds
