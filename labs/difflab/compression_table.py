"""The tables of Lab 7: what fewer steps, fewer bits and fewer channels save on a trained network, and what they cost.

Measured by `difflab compression-table` with the classes of a notebook, a part at a time: digits are drawn in batches
that stay on disk, so a measurement of hours that was stopped goes on where it was.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from difflab.batches import claim_folder, draw_batches
from difflab.metrics import Quality, quality
from difflab.paths import data_path
from difflab.schedule import NoiseSchedule
from difflab.timing import count_calls, measure_in_turns

__all__ = ["PARTS", "CompressionTable", "Entry", "Measurement", "Part", "compression_table"]

PARTS = ("samplers", "quantization", "pruning", "together")
MOMENTUM = {"a": 0.2, "b": 0.8}  # of the rows with momentum
NUM_STEPS = 50  # of DDIM, with which every compressed network draws
TIMED = 16  # digits behind a row's seconds
TRAJECTORIES = 16  # behind a calibration, 20 inputs of each
BEFORE = 128  # digits behind a Fréchet distance before fine-tuning: it is in the thousands, or far beyond
LONGER = 20  # times the fine-tuning of the others, for the row that shows what training still buys

TITLES = {  # figure -> (heading, format)
    "network_calls": ("network calls", "d"),
    "bits": ("bits", "d"),
    "parameters": ("parameters", ",d"),
    "macs": ("MACs an image", ",d"),
    "bytes": ("bytes", ",d"),
    "seconds": ("seconds for 16", ".1f"),
    "milliseconds": ("ms an image", ".2f"),
    "mse": ("ε-MSE", ".4f"),
    "mse_before": ("ε-MSE before", ".4f"),
    "frechet_before": ("Fréchet before", ".1f"),
    "frechet": ("Fréchet", ".1f"),
    "recognised": ("recognised, %", ".1f"),
}


@dataclass(frozen=True)
class Part:
    """One table: `rows` maps a label to its figures, named as in `TITLES`."""

    n: int  # digits behind every Fréchet distance, all from one x_T
    seed: int  # of x_T
    rows: dict[str, dict[str, float]]

    def __str__(self) -> str:
        return "\n".join("  ".join(line) for line in self._cells())

    def markdown(self) -> str:
        """For a page."""
        lines = [[cell.strip() for cell in line] for line in self._cells()]
        lines.insert(1, ["---", *["---:"] * (len(lines[0]) - 1)])
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def _cells(self) -> list[list[str]]:
        """The table as text, each column as wide as its widest cell."""
        used = [key for key in TITLES if any(key in row for row in self.rows.values())]
        lines = [[f"n = {self.n}", *(TITLES[key][0] for key in used)]]
        for label, row in self.rows.items():
            lines.append([label, *(f"{row[key]:{TITLES[key][1]}}" if key in row else "" for key in used)])
        widths = [max(map(len, column)) for column in zip(*lines)]
        return [
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))]
            for line in lines
        ]


@dataclass
class CompressionTable:
    """All parts: samplers, quantization, pruning, together."""

    parts: dict[str, Part] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Part:
        """One part.

        Raises:
            KeyError: if it was not measured.
        """
        if name not in self.parts:
            raise KeyError(f"the table has no part {name!r}; it has {', '.join(self.parts) or 'none'}")
        return self.parts[name]

    def to_json(self) -> str:
        """As a JSON object."""
        return json.dumps({name: asdict(part) for name, part in self.parts.items()}, indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> CompressionTable:
        """Read what `to_json` wrote."""
        return cls({name: Part(**part) for name, part in json.loads(text).items()})


def compression_table(path: str | Path | None = None) -> CompressionTable:
    """The measured tables that come with the project (or those at `path`).

    Raises:
        FileNotFoundError: if there are none.
    """
    return CompressionTable.from_json(Path(path or data_path("compression.json")).read_text(encoding="utf-8"))


class Entry(NamedTuple):
    """A row still to be measured."""

    label: str
    draw: Callable[[Tensor], Tensor]  # from x_T [B, 1, 28, 28] to samples
    figures: dict[str, float]  # what is known of it without drawing
    network: Callable[[Tensor, Tensor], Tensor] | None = None  # whose milliseconds are to be measured, if any
    before: Callable[[Tensor], Tensor] | None = None  # draws by the network as it was before fine-tuning


@dataclass
class Measurement:
    """Measures a part of the tables, row by row.

    Args:
        namespace: of the notebook: the classes and functions of Lab 7.
        model, schedule: the trained network and its schedule.
        train_images: for calibration and fine-tuning, [N, 1, 28, 28].
        test_images: for the ε-MSE and for the floor, [N, 1, 28, 28], N >= num.
        work: folder that keeps finished batches and fine-tuned weights; run again with the same settings to go on.
        num, seed, batch_size: digits behind every Fréchet distance, the seed of their x_T, digits in a network call.
        finetune_steps: of a pruned network, or one of few bits.
        report: is told of every finished row.
    """

    namespace: Mapping[str, Any]
    model: nn.Module
    schedule: NoiseSchedule
    train_images: Tensor
    test_images: Tensor
    work: Path
    num: int = 1024
    seed: int = 0
    batch_size: int = 64
    finetune_steps: int = 1000
    report: Callable[[str], None] = print

    def measure(self, name: str) -> Part:
        """The part of that name.

        Raises:
            ValueError: for an unknown name, or if `work` holds batches of another network or other settings.
        """
        if name not in PARTS:
            raise ValueError(f"there is no part {name!r}; the parts are {', '.join(PARTS)}")
        settings = {"seed": self.seed, "batch_size": self.batch_size, "finetune_steps": self.finetune_steps}
        claim_folder(self.work, self.model, settings)
        rows: dict[str, dict[str, float]] = {}
        networks = {}
        for entry in getattr(self, f"_{name}")():
            # The unmodified network draws the same digits for three tables.
            digits = f"DDIM-{NUM_STEPS}" if entry.network is self.model else entry.label
            found = self._quality(digits, entry.draw, self.num)
            figures = {**entry.figures, "frechet": found.frechet, "recognised": 100 * found.recognised}
            if entry.before is not None:
                figures["frechet_before"] = self._quality(
                    f"{entry.label} before", entry.before, min(BEFORE, self.num)
                ).frechet
            rows[entry.label] = figures
            if entry.network is not None:
                networks[entry.label] = entry.network
            self.report(f"{entry.label}: {found}")
        for label, milliseconds in self._milliseconds(networks).items():
            rows[label]["milliseconds"] = milliseconds
        order = torch.randperm(len(self.test_images), generator=torch.Generator().manual_seed(self.seed))
        floor = quality(self.test_images[order[: self.num]])
        rows["real test digits"] = {"frechet": floor.frechet, "recognised": 100 * floor.recognised}
        return Part(self.num, self.seed, rows)

    def _quality(self, label: str, draw: Callable[[Tensor], Tensor], num: int) -> Quality:
        return quality(draw_batches(self.work, label, draw, num, self.seed, self.batch_size))

    def _milliseconds(self, networks: Mapping[str, Callable]) -> dict[str, float]:
        """Of one image in a batch of `TIMED`, all networks in turns."""
        if not networks:
            return {}
        x = torch.randn(TIMED, 1, 28, 28, generator=torch.Generator().manual_seed(self.seed))
        t = torch.full((TIMED,), self.schedule.num_timesteps // 2)
        with torch.no_grad():
            timings = measure_in_turns([lambda f=f: f(x, t) for f in networks.values()], repeats=9, warmup=2)
        return {label: 1000 * timing.median / TIMED for label, timing in zip(networks, timings)}

    def _draw(self, network: Callable, num_steps: int = NUM_STEPS, eta: float = 0.0, **options: float):
        """Draws by the notebook's sampler with `network`."""
        sampler = self.namespace["MomentumSampler"](network, self.schedule)
        timesteps = self.namespace["spaced"](num_steps, self.schedule.num_timesteps)
        return lambda x_T: sampler.sample(tuple(x_T.shape), timesteps, eta, x_T=x_T, **options)

    def _mse(self, network: Callable, num: int = 2048) -> float:
        """The ε-MSE on held-out images, with timesteps and noise of a seed of its own."""
        rng = torch.Generator().manual_seed(20)
        x_0 = self.test_images[:num]
        t = torch.randint(self.schedule.num_timesteps, (len(x_0),), generator=rng)
        eps = torch.randn(x_0.shape, generator=rng)
        return self.namespace["noise_prediction_mse"](network, self.schedule, x_0, t, eps)

    def _samplers(self) -> Iterator[Entry]:
        """DDPM, DDIM, and both with momentum, on the unmodified network."""
        T = self.schedule.num_timesteps
        mse = self._mse(self.model)
        runs = {
            f"DDPM-{T}": (T, 1.0, {}),
            f"DDPM-{T}, momentum": (T, 1.0, MOMENTUM),
            f"DDIM-{T}": (T, 0.0, {}),
            f"DDIM-{T // 2}": (T // 2, 0.0, {}),
            f"DDIM-{T // 2}, momentum": (T // 2, 0.0, MOMENTUM),
            f"DDIM-{NUM_STEPS}": (NUM_STEPS, 0.0, {}),
            f"DDIM-{NUM_STEPS}, momentum": (NUM_STEPS, 0.0, MOMENTUM),
        }
        for label, (num_steps, eta, options) in runs.items():
            draw = self._draw(self.model, num_steps, eta, **options)
            with count_calls(self.model) as counter:
                seconds = self._seconds(draw)
            figures = {"network_calls": counter.calls, "seconds": seconds, "mse": mse}
            yield Entry(label, draw, figures)

    def _quantization(self) -> Iterator[Entry]:
        """Fake quantization at 8, 6 and 4 bits, calibrated in two ways, split or not, trained; and real int8."""
        book = self.namespace
        sets = self._calibration()
        yield self._entry("float32", self.model, bits=32, bytes=book["model_bytes"](self.model))
        variants = [(bits, kind, True) for bits in (8, 6, 4) for kind in sets] + [(4, "trajectory", False)]
        for bits, kind, split in variants:
            network = book["quantize_model"](self.model, sets[kind], bits, bits, split)
            label = f"{bits} bits, {kind}" + ("" if split else ", not split")
            yield self._entry(label, network, timed=False, bits=bits, bytes=book["model_bytes"](network))
        network = book["quantize_model"](self.model, sets["trajectory"], 4, 4)
        self._finetuned("4 bits", network, "finetune_quantized")
        yield self._entry("4 bits, fine-tuned", network, timed=False, bits=4, bytes=book["model_bytes"](network))
        for label, bits, path in zip(
            ("float32, onnxruntime", "int8, onnxruntime"), (32, 8), self._onnx_files("unmodified", self.model)
        ):
            yield self._entry(label, book["load_onnx"](path), bits=bits, bytes=path.stat().st_size)

    def _pruning(self) -> Iterator[Entry]:
        """Every criterion at half the MACs, Diff-Pruning at the report's ratio and beyond, all fine-tuned."""
        book = self.namespace
        whole = book["count_macs"](self.model)
        yield self._entry("unmodified", self.model, parameters=_parameters(self.model), macs=whole)
        for label, prune in self._prunings().items():
            before = prune()
            for times in (1, LONGER) if label == "Diff-Pruning" else (1,):
                name = label if times == 1 else f"{label}, trained {times} ×"
                after = copy.deepcopy(before)
                self._finetuned(name, after, "finetune", times)
                entry = self._entry(name, after, parameters=_parameters(after), macs=book["count_macs"](after))
                yield entry._replace(before=self._draw(before)) if times == 1 else entry

    def _prunings(self) -> dict[str, Callable[[], nn.Module]]:
        """Label -> makes the pruned network."""
        book = self.namespace
        whole = book["count_macs"](self.model)
        x_0 = self.train_images[:64]
        noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(self.seed + 2))
        times = list(range(0, self.schedule.num_timesteps, 20))
        magnitude = book["magnitude_importance"]
        taylor = book["gradient_importance"](self.schedule, x_0, noise, 0.0, False, times)
        diff = book["gradient_importance"](self.schedule, x_0, noise, 0.05, True, times)

        def halved(importance: Callable, setting: str = "ratio", largest: float = 0.8, **options: int):
            """At the smallest setting that leaves half of the MACs, or less."""

            def prune(value: float) -> nn.Module:
                return book["prune_model"](self.model, scores, **{setting: value}, **options)

            # Scores of one network do not change while the setting is searched for.
            once = importance(self.model) if options.get("iterations", 1) == 1 else None
            scores = importance if once is None else lambda network: once
            return prune(book["ratio_for_macs"](lambda v: book["count_macs"](prune(v)) / whole, 0.5, largest))

        relative = book["relative_magnitudes"]
        scores = relative(self.model)
        # The threshold at which the first group would lose all its units, or just below it.
        highest = [
            float(torch.stack([scores[name].reshape(-1, group.units).mean(0) for name in group.layers]).mean(0).max())
            for group in book["channel_groups"](self.model)
        ]
        return {
            "magnitude": lambda: halved(magnitude),
            "magnitude, threshold": lambda: halved(relative, "threshold", 0.999 * min(highest)),
            "magnitude, two turns": lambda: halved(magnitude, iterations=2),
            "Taylor": lambda: halved(taylor),
            "Diff-Pruning": lambda: halved(diff),
            "Diff-Pruning, ratio 0.3": lambda: book["prune_model"](self.model, diff, 0.3),
            "Diff-Pruning, ratio 0.5": lambda: book["prune_model"](self.model, diff, 0.5),
        }

    def _together(self) -> Iterator[Entry]:
        """The network as it was with DDPM, and pruned, in int8, with DDIM."""
        T = self.schedule.num_timesteps
        pruned = self._prunings()["Diff-Pruning"]()
        self._finetuned(f"Diff-Pruning, trained {LONGER} ×", pruned, "finetune", LONGER)
        files = self._onnx_files("pruned", pruned)
        light = self.namespace["load_onnx"](files[1])
        size = self.namespace["model_bytes"](self.model)
        for label, network, num_steps, eta, stored in (
            (f"DDPM-{T}", self.model, T, 1.0, size),
            (f"DDIM-{NUM_STEPS}", self.model, NUM_STEPS, 0.0, size),
            (f"DDIM-{NUM_STEPS}, pruned, int8", light, NUM_STEPS, 0.0, files[1].stat().st_size),
        ):
            draw = self._draw(network, num_steps, eta)
            seconds = self._seconds(draw)
            yield Entry(label, draw, {"network_calls": num_steps, "seconds": seconds, "bytes": stored})

    def _entry(self, label: str, network: Callable, timed: bool = True, **figures: float) -> Entry:
        """A network that draws with DDIM; rounding that is only played has no time worth a column."""
        return Entry(label, self._draw(network), figures, network if timed else None)

    def _calibration(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Inputs from the whole trajectory, and as many from its first timestep."""
        rng = torch.Generator().manual_seed(self.seed + 1)
        make = self.namespace
        return {
            "trajectory": make["calibration_set"](
                self.model, self.schedule, torch.randn(TRAJECTORIES, 1, 28, 28, generator=rng)
            ),
            "one timestep": make["one_timestep_set"](
                self.model, self.schedule, torch.randn(20 * TRAJECTORIES, 1, 28, 28, generator=rng)
            ),
        }

    def _finetuned(self, label: str, network: nn.Module, function: str, times: int = 1) -> None:
        """Train the network in place by the notebook's function, or load what it came to last time.

        `times` as many steps as are asked for.
        """
        path = self.work / f"{label.replace(' ', '_').replace(',', '')}.safetensors"
        if not path.exists():
            torch.manual_seed(self.seed)
            arguments = (self.schedule, self.train_images, times * self.finetune_steps)
            if function == "finetune":
                self.namespace[function](network, *arguments, teacher=self.model)
            else:
                self.namespace[function](network, self.model, *arguments)
            save_file({name: t.contiguous() for name, t in network.state_dict().items()}, path)
        network.load_state_dict(load_file(path))
        network.eval().requires_grad_(False)

    def _onnx_files(self, name: str, network: nn.Module) -> tuple[Path, Path]:
        """The network as a file, in float32 and in int8, calibrated on the trajectory."""
        plain, quantized = self.work / f"{name}.onnx", self.work / f"{name}-int8.onnx"
        self.namespace["export_onnx"](network, plain)
        self.namespace["quantize_onnx"](plain, quantized, self._calibration()["trajectory"])
        return plain, quantized

    def _seconds(self, draw: Callable[[Tensor], Tensor]) -> float:
        x_T = torch.randn(TIMED, 1, 28, 28, generator=torch.Generator().manual_seed(self.seed))
        start = time.perf_counter()
        draw(x_T)
        return time.perf_counter() - start


def _parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())
