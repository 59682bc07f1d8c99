"""What few network calls buy: Lab 8's solvers and encoder propagation, measured once, shipped as `data/solvers.json`.

Behind `difflab solver-table`. As `difflab.quality_table` it takes the samplers from a notebook and keeps finished
batches on disk. Its noise is the same, so rows of both tables compare where n is the same.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from difflab.batches import claim_folder, draw_batches
from difflab.metrics import Quality, quality
from difflab.paths import data_path
from difflab.schedule import NoiseSchedule

__all__ = ["ROWS", "SolverRow", "SolverTable", "draw_solver_rows", "solver_table", "to_markdown"]

NEEDED = ("time_grid", "DPMSolver", "key_schedule", "faster_sample")  # of a notebook
NAMES = {"dpm1": "DPM-Solver-1", "dpm2": "DPM-Solver-2", "dpm++2m": "DPM-Solver++ 2M"}


@dataclass(frozen=True)
class SolverRow:
    """One way of sampling; `runs` has one entry for each seed of x_T."""

    method: str  # dpm1 | dpm2 | dpm++2m
    steps: int  # of the grid, the jump to clean data included
    spacing: str = "logsnr"
    eta: float = 0.0
    keys: str = "all"  # at which calls the encoder runs: all | paper | uniform-K
    strength: float = 0.0  # of the noise injected, with keys other than all
    n: int = 1024  # digits behind the Fréchet distance
    runs: tuple[Quality, ...] = ()

    @property
    def network_calls(self) -> int:
        """Full or partial."""
        return 2 * self.steps - 1 if self.method == "dpm2" else self.steps

    @property
    def label(self) -> str:
        """For example DPM-Solver++ 2M-15, η = 1; first-order steps at whole timesteps are DDIM."""
        ddim = self.method == "dpm1" and self.spacing == "time"
        eta = f", η = {self.eta:g}" if self.eta else ""
        spacing = "" if ddim else f", {self.spacing}"
        keys = "" if self.keys == "all" else f", keys {self.keys}"
        injected = f", noise {self.strength:g}" if self.strength else ""
        return f"{'DDIM' if ddim else NAMES[self.method]}-{self.network_calls}{eta}{spacing}{keys}{injected}"

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
    # What order buys at equal network calls; the first order is DDIM at times of its own.
    SolverRow("dpm1", 10, "quadratic"),
    SolverRow("dpm1", 20, "quadratic"),
    SolverRow("dpm2", 8, "quadratic"),
    SolverRow("dpm++2m", 5, "quadratic"),
    SolverRow("dpm++2m", 10, "quadratic"),
    SolverRow("dpm++2m", 15, "quadratic"),
    SolverRow("dpm++2m", 20, "quadratic"),
    # What fresh noise adds.
    SolverRow("dpm++2m", 15, "quadratic", 1.0, n=2048),
    SolverRow("dpm++2m", 20, "quadratic", 1.0, n=2048),
    # Encoder propagation; two keys are too few on purpose.
    SolverRow("dpm++2m", 20, "quadratic", keys="paper"),
    SolverRow("dpm++2m", 20, "quadratic", keys="paper", strength=0.003),
    SolverRow("dpm++2m", 20, "quadratic", keys="uniform-2"),
    SolverRow("dpm2", 8, "quadratic", keys="uniform-8"),
    SolverRow("dpm1", 50, "time", n=512),
    SolverRow("dpm1", 50, "time", keys="paper", n=512),
)


@dataclass(frozen=True)
class SolverTable:
    """All rows. No seconds: they belong to a machine, and the notebook measures them on yours."""

    rows: tuple[SolverRow, ...]

    def to_json(self) -> str:
        """As a JSON object."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> SolverTable:
        """Read what `to_json` wrote."""
        fields = json.loads(text)

        def row(stored: dict[str, Any]) -> SolverRow:
            return SolverRow(**{**stored, "runs": tuple(Quality(*run) for run in stored["runs"])})

        return cls(tuple(map(row, fields["rows"])))


def solver_table(path: str | Path | None = None) -> SolverTable:
    """The measured table that comes with the project (or the one at `path`).

    Raises:
        FileNotFoundError: if there is none.
    """
    return SolverTable.from_json(Path(path or data_path("solvers.json")).read_text(encoding="utf-8"))


def to_markdown(table: SolverTable) -> str:
    """The table for a page; a figure for each seed, side by side."""
    lines = [
        "| sampler | network calls | n | Fréchet | recognised, % |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in table.rows:
        lines.append(
            f"| {row.label} | {row.network_calls} | {row.n} | {_each(row.runs, 'frechet')} | "
            f"{_each(row.runs, 'recognised', 100)} |"
        )
    return "\n".join(lines)


def _each(runs: tuple[Quality, ...], field: str, scale: float = 1.0) -> str:
    return " / ".join(f"{scale * getattr(run, field):.1f}" for run in runs)


def draw_solver_rows(
    notebook: dict[str, Any],
    model: nn.Module,
    schedule: NoiseSchedule,
    work: Path,
    seeds: tuple[int, ...] = (0,),
    batch_size: int = 128,
    device: str = "cpu",
    rows: tuple[SolverRow, ...] = ROWS,
    report: Callable[[str], None] = print,
) -> SolverTable:
    """Draw and measure every row.

    Args:
        notebook: the names of a notebook of Lab 8, among them those of `NEEDED`.
        model, schedule: the network and its schedule, on `device`.
        work: folder that keeps finished batches; run again with the same settings to go on.
        seeds: of x_T; all rows of a seed start from the same noise, shorter ones from its beginning.

    Raises:
        ValueError: if `work` holds batches of other settings.
    """
    claim_folder(work, model, {"batch_size": batch_size, "table": "solvers"})
    # A layout that convolutions on a CPU are a third faster with; the numbers stay the same up to rounding.
    model = model.to(memory_format=torch.channels_last)
    measured = []
    for row in rows:
        runs = []
        for seed in seeds:

            def draw(x_T: Tensor, row: SolverRow = row) -> Tensor:
                return run_row(row, notebook, model, schedule, x_T.to(device))

            runs.append(quality(draw_batches(work, row.label, draw, row.n, seed, batch_size)))
            report(f"{row.label}, seed {seed}: {runs[-1]}")
        measured.append(replace(row, runs=tuple(runs)))
    return SolverTable(tuple(measured))


def run_row(row: SolverRow, notebook: dict[str, Any], model: nn.Module, schedule: NoiseSchedule, x_T: Tensor) -> Tensor:
    """Samples of one row, by the functions of the notebook."""
    times = notebook["time_grid"](schedule, row.steps, row.spacing)
    if row.keys == "all":
        return notebook["DPMSolver"](model, schedule).sample(x_T, times, row.method, row.eta)
    kind, _, num_keys = row.keys.partition("-")
    keys = notebook["key_schedule"](row.network_calls, kind, int(num_keys or 1))
    return notebook["faster_sample"](model, schedule, x_T, times, row.method, keys, strength=row.strength)
