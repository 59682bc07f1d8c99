"""How good are generated digits? Measured with the features of a small MNIST classifier.

Inception features, which the Fréchet inception distance of Heusel et al. 2017 uses, mean nothing on 28x28 digits; the
penultimate layer of a classifier trained on MNIST does.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from difflab.checkpoints import load_tensors, save_tensors
from difflab.paths import data_path

__all__ = [
    "Classifier",
    "Quality",
    "diversity",
    "frechet_distance",
    "gaussian_statistics",
    "load_classifier",
    "quality",
    "reference_statistics",
    "save_classifier",
]


class Classifier(nn.Module):
    """Three convolutions and two linear layers; 128 features before the last one."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((1, 32), (32, 64), (64, 128)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
        self.convolutions = nn.Sequential(*layers)
        self.hidden = nn.Linear(128 * 3 * 3, 128)
        self.dropout = nn.Dropout(0.3)
        self.out = nn.Linear(128, 10)

    def features(self, images: Tensor) -> Tensor:
        """Penultimate features, shape [B, 128], of images [B, 1, 28, 28] in [-1, 1]."""
        return self.hidden(self.convolutions(images).flatten(1)).relu()

    def forward(self, images: Tensor) -> Tensor:
        """Class scores (logits), shape [B, 10]."""
        return self.out(self.dropout(self.features(images)))


def save_classifier(path, classifier: Classifier, **notes) -> None:
    """Write a classifier in the project's checkpoint format."""
    save_tensors(path, classifier.state_dict(), {"architecture": "Classifier", "notes": notes})


def load_classifier(path=None, device: str | torch.device = "cpu") -> Classifier:
    """The classifier that comes with the project (or the one at `path`), in eval mode, gradients off.

    Raises:
        ValueError: if the file holds something else.
    """
    tensors, header = load_tensors(path or data_path("classifier.safetensors"))
    if header.get("architecture") != "Classifier":
        raise ValueError(f"expected a classifier checkpoint, got {header.get('architecture')!r}")
    classifier = Classifier()
    classifier.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in tensors.items()})
    return classifier.to(device).eval().requires_grad_(False)


def gaussian_statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [D] and covariance [D, D] of features [N, D], in float64.

    Raises:
        ValueError: for fewer than two rows.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features must have shape [N, D] with N >= 2, got {list(features.shape)}")
    features = features.double()
    return features.mean(0), torch.cov(features.T)


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """Squared Fréchet distance of two Gaussians (Dowson & Landau 1982; Heusel et al. 2017, equation 6).

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)); the trace of the root is the sum of the square roots of the
    eigenvalues of C1^(1/2) C2 C1^(1/2), which is symmetric, so no complex rounding appears.
    """
    values, vectors = torch.linalg.eigh(cov1.double())
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    product = root @ cov2.double() @ root
    trace_root = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (mean1 - mean2).double().square().sum() + cov1.trace() + cov2.trace() - 2 * trace_root
    return float(distance)


def reference_statistics() -> tuple[Tensor, Tensor]:
    """Feature mean and covariance of the 60 000 MNIST training images, as the bundled classifier sees them."""
    with np.load(data_path("mnist-features.npz")) as file:
        return torch.from_numpy(file["mean"]).double(), torch.from_numpy(file["cov"]).double()


def diversity(images: Tensor) -> float:
    """Mean root-mean-square pixel distance over all pairs of different images [N, ...]; 0 for one image."""
    flat = images.flatten(1).double()
    if len(flat) < 2:
        return 0.0
    return float(torch.pdist(flat).mean() / flat.shape[1] ** 0.5)


class Quality(NamedTuple):
    """What `quality` measures. `n` belongs to every figure: a Fréchet distance without it says little."""

    n: int
    frechet: float  # squared Fréchet distance to the MNIST training set, in classifier features
    recognised: float  # fraction the classifier is more than 90 % sure of
    confidence: float  # mean of the classifier's highest probability
    label_histogram: list[float]  # fraction read as 0, 1, ..., 9
    diversity: float  # of the first 512 images

    def __str__(self) -> str:
        labels = " ".join(f"{100 * f:.0f}" for f in self.label_histogram)
        return (
            f"n = {self.n}: Fréchet {self.frechet:.2f}, recognised (> 0.9) {100 * self.recognised:.1f} %, "
            f"mean confidence {self.confidence:.3f}, diversity {self.diversity:.3f}, digits 0-9 in %: {labels}"
        )


@torch.no_grad()
def quality(images: Tensor, classifier: Classifier | None = None, batch_size: int = 500) -> Quality:
    """Measure generated images [N, 1, 28, 28] in [-1, 1] against the MNIST training set.

    Raises:
        ValueError: for another shape, or fewer than two images.
    """
    if images.ndim != 4 or images.shape[1:] != (1, 28, 28) or len(images) < 2:
        raise ValueError(f"images must have shape [N, 1, 28, 28] with N >= 2, got {list(images.shape)}")
    classifier = classifier or load_classifier(device=images.device)
    features = torch.cat([classifier.features(batch) for batch in images.float().split(batch_size)])
    probabilities = classifier.out(features).softmax(-1)
    top, label = probabilities.max(-1)
    return Quality(
        n=len(images),
        frechet=frechet_distance(*gaussian_statistics(features.cpu()), *reference_statistics()),
        recognised=(top > 0.9).float().mean().item(),
        confidence=top.mean().item(),
        label_histogram=(torch.bincount(label, minlength=10) / len(images)).tolist(),
        diversity=diversity(images[:512]),
    )
