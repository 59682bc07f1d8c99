"""Digits drawn in batches that stay on disk, so that a measurement of hours goes on where it was stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["claim_folder", "draw_batches"]


def claim_folder(work: Path, model: nn.Module, settings: dict[str, Any]) -> None:
    """Bind the folder to these weights and settings.

    Raises:
        ValueError: if it holds batches of others.
    """
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    settings = {**settings, "weights": digest.hexdigest()}
    work.mkdir(parents=True, exist_ok=True)
    note = work / "settings.json"
    if not note.exists():
        note.write_text(json.dumps(settings), encoding="utf-8")
    elif json.loads(note.read_text(encoding="utf-8")) != settings:
        raise ValueError(f"{work} holds digits of another network or other settings; remove it, or give another --work")


def draw_batches(
    work: Path, label: str, draw: Callable[[Tensor], Tensor], num: int, seed: int, batch_size: int
) -> Tensor:
    """`num` digits from the noise of a seed; batches that are on disk are read, the others drawn and written.

    Args:
        work: folder of the batches, see `claim_folder`.
        label: of what is drawn; names the files.
        draw: from x_T [B, 1, 28, 28] on the CPU to samples of that shape.
        num: how many digits in all.
        seed: of x_T, and of the noise that `draw` adds.
        batch_size: digits in a batch; the last may be smaller.

    Returns:
        Digits [num, 1, 28, 28], rounded to float16, as float32 on the CPU.
    """
    x_T = torch.randn(num, 1, 28, 28, generator=torch.Generator().manual_seed(seed))
    name = "".join(c if c.isalnum() or c in "-+.=" else "_" for c in label.replace(", ", "_").replace(" ", ""))
    images = []
    for first in range(0, num, batch_size):
        path = work / f"{name}-seed{seed}-{first:05d}.npy"
        if not path.exists():
            torch.manual_seed(1_000_003 * (seed + 1) + first)  # of the noise that stochastic samplers add
            samples = draw(x_T[first : first + batch_size])
            temporary = path.with_suffix(".tmp.npy")
            np.save(temporary, samples.half().cpu().numpy())
            os.replace(temporary, path)
        images.append(torch.from_numpy(np.load(path)).float())
    return torch.cat(images)
