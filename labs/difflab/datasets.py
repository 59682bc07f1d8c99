"""Images of handwritten digits in [-1, 1]: real MNIST where it can be had, the bundled digits otherwise."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from difflab.paths import data_path

__all__ = ["load_digits", "load_mnist", "mnist_root"]


def load_digits(num: int | None = None) -> tuple[Tensor, Tensor]:
    """The digits bundled with the project: drawn by `mnist-small`, so that every lab runs offline.

    Args:
        num: how many, from the start (they are in random order); None for all 10 000.

    Returns:
        (images float32 [N, 1, 28, 28] in [-1, 1], labels int64 [N] as the bundled classifier reads them).

    Raises:
        ValueError: if `num` is negative or more than there are.
    """
    with np.load(data_path("digits.npz")) as file:
        images, labels = file["images"], file["labels"]
    if num is not None and not 0 <= num <= len(images):
        raise ValueError(f"num must lie between 0 and {len(images)}, got {num}")
    return _to_images(torch.from_numpy(images[:num])), torch.from_numpy(labels[:num]).long()


def mnist_root() -> Path | None:
    """The folder that holds MNIST in torchvision's layout, or None: $DIFFLAB_MNIST, then data/mnist, then the cache."""
    parts = [f"{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    candidates = [os.environ.get("DIFFLAB_MNIST"), Path(__file__).resolve().parents[2] / "data" / "mnist", _cache()]
    for candidate in candidates:
        # a failed download leaves an empty or half-filled folder behind
        if candidate and all((Path(candidate) / "MNIST" / "raw" / part).is_file() for part in parts):
            return Path(candidate)
    return None


def load_mnist(split: str = "train", download: bool = True, fallback: bool = True) -> tuple[Tensor, Tensor]:
    """MNIST (LeCun et al. 1998) through torchvision.

    Looks in $DIFFLAB_MNIST, then data/mnist, then downloads (12 MB, once, to the user's cache).

    Args:
        split: "train" (60 000 images) or "test" (10 000).
        download: may it ask the network?
        fallback: return the bundled digits, with one line saying so, when MNIST cannot be had.

    Returns:
        (images float32 [N, 1, 28, 28] in [-1, 1], labels int64 [N]).

    Raises:
        ValueError: for an unknown split.
        FileNotFoundError: if MNIST cannot be had and `fallback` is False.
    """
    from torchvision.datasets import MNIST  # imported here: it costs a second that most notebooks do not need

    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    root = mnist_root()
    if root is None and download:
        patience = socket.getdefaulttimeout()
        socket.setdefaulttimeout(10)  # a network that swallows packets must not hold up the first cell of a lab
        try:
            MNIST(_cache(), download=True)
            root = _cache()
        except (OSError, RuntimeError):
            pass
        finally:
            socket.setdefaulttimeout(patience)
    if root is not None:
        data = MNIST(root, train=split == "train")
        return _to_images(data.data), data.targets.long()
    if not fallback:
        raise FileNotFoundError("MNIST was not found; set DIFFLAB_MNIST to a folder that holds MNIST/raw")
    print("MNIST is not here and cannot be downloaded: using the 10 000 bundled digits instead (set DIFFLAB_MNIST)")
    return load_digits()


def _cache() -> Path:
    return Path.home() / ".cache" / "difflab"


def _to_images(uint8: Tensor) -> Tensor:
    return uint8.float().div_(127.5).sub_(1)[:, None]
