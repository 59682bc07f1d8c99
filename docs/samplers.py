"""Draws docs/samplers.png, the picture at the top of the README: one noise, six samplers, with what each cost.

    python docs/samplers.py

The samplers are those of the Lab 5 solution notebook, the network is the bundled mnist-small.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from difflab.checkpoints import load_pretrained
from difflab.notebook import load_notebook
from difflab.timing import count_calls

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = 12


def main() -> None:
    """Sample, time, draw."""
    lab = load_notebook(ROOT / "solutions" / "lab05_sampling" / "lab05_sampling.ipynb")
    model, schedule = load_pretrained("mnist-small")
    ddpm, ddim = lab["DDPMSampler"](model, schedule), lab["DDIMSampler"](model, schedule)
    x_T = torch.randn(COLUMNS, 1, 28, 28, generator=torch.Generator().manual_seed(7))
    rows = [("DDPM", lambda: ddpm.sample(x_T.shape, x_T=x_T))]
    for num_steps, eta in ((50, 0.0), (20, 0.0), (50, 0.3), (50, 0.7), (50, 1.0)):
        timesteps = ddim.create_timestep_schedule(num_steps)
        rows.append((f"DDIM, η = {eta:g}", partial(ddim.sample, x_T.shape, timesteps, eta, x_T=x_T)))

    figure, axes = plt.subplots(len(rows), COLUMNS + 1, figsize=(11.5, 5.4), width_ratios=[2.6] + [1] * COLUMNS)
    for line, (name, run) in zip(axes, rows):
        torch.manual_seed(0)
        start = time.perf_counter()
        with count_calls(model) as counter:
            samples = run()
        seconds = time.perf_counter() - start
        label = f"{name}\n{counter.calls} network calls, {seconds:.1f} s"
        print(label.replace("\n", ": "))
        line[0].text(1.0, 0.5, label, ha="right", va="center", fontsize=10, transform=line[0].transAxes)
        for axis in line:
            axis.axis("off")
        for axis, image in zip(line[1:], samples):
            axis.imshow(image[0].clamp(-1, 1), cmap="gray_r", vmin=-1, vmax=1, interpolation="bilinear")
    figure.subplots_adjust(left=0.0, right=0.995, top=0.99, bottom=0.01, wspace=0.04, hspace=0.06)
    figure.savefig(ROOT / "docs" / "samplers.png", dpi=110)


if __name__ == "__main__":
    main()
