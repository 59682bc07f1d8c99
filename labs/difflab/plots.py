"""Pictures of digits and curves.

Everything returns a closed matplotlib Figure: as the last line of a cell it is shown once, and is shown nowhere else.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from torch import Tensor

if TYPE_CHECKING:
    from difflab.quality_table import QualityTable

__all__ = ["curves", "image_grid", "quality_curves", "save_image_grid", "show_images", "tile", "trajectory"]


def tile(images: Tensor, columns: int, gap: int = 2) -> np.ndarray:
    """Lay images [N, 1, H, W] in [-1, 1] out as one grey picture in [0, 1], row by row, on white."""
    images = images.detach().float().cpu().clamp(-1, 1)[:, 0]
    n, height, width = images.shape
    rows = -(-n // columns)
    sheet = torch.ones(rows * (height + gap) + gap, columns * (width + gap) + gap)
    for i, image in enumerate(images):
        top = gap + i // columns * (height + gap)
        left = gap + i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = (image + 1) / 2
    return sheet.numpy()


def image_grid(images: Tensor, columns: int = 10, title: str = "", scale: float = 0.8) -> Figure:
    """A grid of images [N, 1, H, W] in [-1, 1], `columns` a row."""
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(figsize=(columns * scale, rows * scale + 0.3 * bool(title)), layout="constrained")
    axes.imshow(tile(images, columns), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.axis("off")
    if title:
        axes.set_title(title, fontsize=10)
    plt.close(figure)
    return figure


def show_images(rows: Mapping[str, Tensor], column_titles: Sequence[str] = (), title: str = "") -> Figure:
    """Labelled rows of images, each a tensor [N, 1, H, W]: one axes per image, in order."""
    columns = max(len(images) for images in rows.values())
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(columns * 0.95 + 1.1, len(rows) * 1.0 + 0.4), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_frame_on(False)
    for line, (label, images) in zip(axes, rows.items()):
        line[0].set_ylabel(label, fontsize=9, rotation=0, ha="right", va="center")
        for axis, image in zip(line, images.detach().float().cpu().numpy()):
            axis.imshow(image[0], cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
    for axis, text in zip(axes[0], column_titles):
        axis.set_title(text, fontsize=9)
    if title:
        figure.suptitle(title, fontsize=10)
    plt.close(figure)
    return figure


def trajectory(states: Sequence[Tensor], count: int = 10, rows: int = 3, title: str = "") -> Figure:
    """`count` states of a sampling trajectory, evenly spaced from x_T to the sample, for the first `rows` images."""
    picks = np.linspace(0, len(states) - 1, min(count, len(states))).round().astype(int)
    return show_images(
        {f"sample {i + 1}": torch.stack([states[k][i] for k in picks]) for i in range(min(rows, len(states[0])))},
        [f"after {k}" if k else "x_T" for k in picks],
        title,
    )


def curves(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    xlabel: str,
    ylabel: str,
    title: str = "",
    points: Collection[str] = (),
    **axes_set,
) -> Figure:
    """Labelled curves {label: (x, y)} with markers.

    Args:
        lines: what to draw.
        points: labels of those whose markers are not joined by a line.
        axes_set: further keywords go to `Axes.set`, e.g. yscale="log".
    """
    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for label, (x, y) in lines.items():
        size, width = (5, 0) if label in points else (3, 1.2)
        axes.plot(x, y, marker="o", markersize=size, linewidth=width, label=label)
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title, **axes_set)
    if axes.get_xscale() == "log":
        _plain_ticks(axes, sorted({value for x, _ in lines.values() for value in x}))
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend(fontsize=8)
    plt.close(figure)
    return figure


def _plain_ticks(axes: Axes, values: Sequence[float]) -> None:
    """On a logarithmic axis: the values that were measured, written out."""
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.set_xticks([], minor=True)


def quality_curves(table: QualityTable, seconds: Mapping[int, float]) -> Figure:
    """What steps buy (Fréchet distance and recognised fraction of the measured table) and what they cost.

    Args:
        table: from `difflab.quality_table`.
        seconds: network calls -> seconds, as you measured them.
    """
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    series = {
        "DDPM": lambda row: row.method == "ddpm",
        "DDIM, η = 0": lambda row: row.method == "ddim" and row.eta == 0 and row.schedule == "uniform",
        "DDIM, η = 0, quadratic": lambda row: row.method == "ddim" and row.schedule == "quadratic",
        "DDIM, η = 0.5": lambda row: row.method == "ddim" and row.eta == 0.5,
        "DDIM, η = 1": lambda row: row.method == "ddim" and row.eta == 1,
    }
    for label, belongs in series.items():
        rows = sorted((row for row in table.rows if belongs(row)), key=lambda row: row.network_calls)
        calls = [row.network_calls for row in rows]
        style = {"marker": "*", "markersize": 11} if label == "DDPM" else {"marker": "o", "markersize": 4}
        left.plot(calls, [row.frechet for row in rows], label=label, **style)
        middle.plot(calls, [100 * row.recognised for row in rows], **style)
    left.axhline(table.floor.frechet, color="gray", linestyle="--", linewidth=1)
    middle.axhline(100 * table.floor.recognised, color="gray", linestyle="--", linewidth=1, label="real test digits")
    right.plot(list(seconds), list(seconds.values()), marker="o", markersize=4, color="black")
    left.set(ylabel=f"Fréchet distance (n = {table.n})", xscale="log", yscale="log", title="lower is better")
    middle.set(ylabel="recognised, %", xscale="log", title="higher is better")
    right.set(ylabel="seconds", xscale="log", yscale="log", title="what you measured")
    counts = sorted({row.network_calls for row in table.rows})
    for axes in (left, middle, right):
        axes.set_xlabel("network calls")
        _plain_ticks(axes, counts)
        axes.grid(alpha=0.3)
    for axes in (left, right):  # 20, not 2 × 10¹
        axes.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_locator=NullLocator())
    left.legend(fontsize=7)
    middle.legend(fontsize=7)
    plt.close(figure)
    return figure


def save_image_grid(path: str | Path, images: Tensor, columns: int = 8) -> None:
    """Write a grid of images [N, 1, H, W] in [-1, 1] as a PNG, three screen pixels to an image pixel."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    plt.imsave(path, tile(images, min(columns, len(images))).repeat(3, 0).repeat(3, 1), cmap="gray", vmin=0, vmax=1)
