"""The training loops behind `difflab train` and `difflab train-classifier`.

`train` is a generator: it yields after every epoch, so that progress bars, sample grids and printing live outside.
Every epoch draws its order, timesteps and noise from a generator seeded with (seed, epoch). A run that was killed
therefore goes on from its last finished epoch to exactly the weights it would have reached uninterrupted.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from difflab.checkpoints import load_tensors, save_checkpoint, save_tensors
from difflab.metrics import Classifier
from difflab.schedule import NoiseSchedule

__all__ = ["Epoch", "TrainingConfig", "held_out_loss", "noise_prediction_loss", "train", "train_classifier"]


@dataclass(frozen=True)
class TrainingConfig:
    """Everything that decides the trained weights, besides the model, its schedule and the images."""

    epochs: int = 20
    batch_size: int = 128
    lr: float = 1e-3  # the peak of a one-cycle schedule (Smith & Topin 2018), which ends near zero
    weight_decay: float = 0.01
    ema_decay: float = 0.999  # of the weights that are saved and sampled from
    min_snr_gamma: float | None = None  # weigh the loss as Hang et al. 2023; None: the plain noise-prediction loss
    precision: str = "float32"  # or "bfloat16": autocast, about twice as fast on recent processors
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1 or self.lr <= 0 or not 0 <= self.ema_decay < 1:
            raise ValueError(f"epochs, batch_size and lr must be positive and ema_decay in [0, 1), got {self}")
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision must be 'float32' or 'bfloat16', got {self.precision!r}")


class Epoch(NamedTuple):
    """One finished epoch."""

    epoch: int  # from 1
    train_loss: float  # mean unweighted noise-prediction loss of the network being trained
    test_loss: float  # the same for the averaged weights, on held-out images with fixed noise
    model: nn.Module  # the averaged (EMA) weights, in eval mode


def noise_prediction_loss(model: nn.Module, schedule: NoiseSchedule, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """Squared error of the predicted noise for each image (Ho et al. 2020, equation 14): shape [B]."""
    alpha_bar = schedule.alpha_bar(t)[:, None, None, None]
    x_t = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * eps
    return (model(x_t, t).float() - eps).square().mean((1, 2, 3))


def train(
    model: nn.Module,
    schedule: NoiseSchedule,
    images: Tensor,
    config: TrainingConfig,
    out: str | Path,
    test_images: Tensor | None = None,
    on_batch: Callable[[int, int, float], None] = lambda batch, batches, loss: None,
) -> Iterator[Epoch]:
    """Train a noise predictor, yielding after each epoch.

    After every epoch `out/checkpoints/model_latest.safetensors` (averaged weights) and
    `out/checkpoints/training_state.safetensors` (all that is needed to go on) are replaced. If the latter is there
    when training starts, the run is continued.

    Args:
        model: called as model(x_t, t); its device is used.
        schedule: the forward process.
        images: training images [N, C, H, W] in [-1, 1].
        config: see `TrainingConfig`.
        out: folder of the run.
        test_images: held-out images for the reported test loss (default: the first 2000 training images).
        on_batch: called with (batches done, batches in the epoch, running mean loss).

    Yields:
        An `Epoch` each; none if the run in `out` is already complete.

    Raises:
        ValueError: if `out` holds a run with another configuration, model or schedule.
    """
    out = Path(out)
    device = next(model.parameters()).device
    if len(images) < config.batch_size:
        raise ValueError(f"a batch of {config.batch_size} needs at least as many images, got {len(images)}")
    batches = len(images) // config.batch_size
    average = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, weight_decay=config.weight_decay)
    identity = {
        "config": asdict(config),
        "model": model.config,
        "schedule": schedule.config,
        "num_images": len(images),
    }
    state_path = out / "checkpoints" / "training_state.safetensors"
    history: list[list[float]] = []
    if state_path.exists():
        history = _restore(state_path, identity, model, average, optimizer)
    test_images = images[:2000] if test_images is None else test_images

    for epoch in range(len(history), config.epochs):
        rng = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
        order = torch.randperm(len(images), generator=rng)
        model.train()
        total = 0.0
        for batch in range(batches):
            x_0 = images[order[batch * config.batch_size : (batch + 1) * config.batch_size]].to(device)
            t = _stratified_timesteps(len(x_0), schedule.num_timesteps, rng).to(device)
            eps = torch.randn(x_0.shape, generator=rng).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
                loss = noise_prediction_loss(model, schedule, x_0, t, eps)
            weighted = loss * _loss_weight(schedule, t, config.min_snr_gamma)
            optimizer.zero_grad()
            weighted.mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            step = epoch * batches + batch
            for group in optimizer.param_groups:
                group["lr"] = config.lr * _one_cycle(step / (config.epochs * batches))
            optimizer.step()
            _update_average(average, model, min(config.ema_decay, (1 + step) / (10 + step)))
            total += loss.mean().item()
            on_batch(batch + 1, batches, total / (batch + 1))
        row = [total / batches, held_out_loss(average, schedule, test_images, config.seed)]
        history.append(row)
        notes = {"epoch": epoch + 1, "train_loss": row[0], "test_loss": row[1], "training": asdict(config)}
        save_checkpoint(out / "checkpoints" / "model_latest.safetensors", average, schedule, **notes)
        _save_state(state_path, {**identity, "history": history}, model, average, optimizer)
        yield Epoch(epoch + 1, row[0], row[1], average)


def _stratified_timesteps(count: int, num_timesteps: int, rng: torch.Generator) -> Tensor:
    """Uniform timesteps, spread evenly over the batch: each is uniform, their mean varies less (Kingma et al. 2021)."""
    positions = (torch.rand(1, generator=rng) + torch.arange(count) / count) % 1
    return (positions * num_timesteps).long().clamp(max=num_timesteps - 1)


def _one_cycle(progress: float, warmup: float = 0.15) -> float:
    """Learning-rate factor: up from 1/25 over the first part of training, then down to 0, both along a cosine."""
    if progress < warmup:
        return 1 / 25 + (1 - 1 / 25) * (1 - math.cos(math.pi * progress / warmup)) / 2
    return (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))) / 2


def _loss_weight(schedule: NoiseSchedule, t: Tensor, gamma: float | None) -> Tensor:
    """min(SNR, gamma) / SNR: nearly clean timesteps no longer outweigh those that decide the digit's shape."""
    if gamma is None:
        return torch.ones(t.shape, device=t.device)
    alpha_bar = schedule.alpha_bar(t)
    return (gamma * (1 - alpha_bar) / alpha_bar).clamp(max=1.0)


@torch.no_grad()
def _update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
    for mean, current in zip(average.buffers(), model.buffers()):
        mean.copy_(current)


@torch.no_grad()
def held_out_loss(model: nn.Module, schedule: NoiseSchedule, images: Tensor, seed: int = 0) -> float:
    """Mean noise-prediction loss on images [N, C, H, W], with timesteps and noise fixed by the seed."""
    device = next(model.parameters()).device
    rng = torch.Generator().manual_seed(seed)
    total = 0.0
    for x_0 in images.split(250):
        t = _stratified_timesteps(len(x_0), schedule.num_timesteps, rng)
        eps = torch.randn(x_0.shape, generator=rng)
        total += noise_prediction_loss(model, schedule, x_0.to(device), t.to(device), eps.to(device)).sum().item()
    return total / len(images)


def _save_state(path: Path, header: dict, model: nn.Module, average: nn.Module, optimizer: torch.optim.AdamW) -> None:
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"average.{k}": v for k, v in average.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": torch.as_tensor(v) for k, v in state.items()}
    save_tensors(path, tensors, header)


def _restore(
    path: Path, identity: dict, model: nn.Module, average: nn.Module, optimizer: torch.optim.AdamW
) -> list[list[float]]:
    tensors, header = load_tensors(path)
    for key, wanted in identity.items():
        if header.get(key) != wanted:
            raise ValueError(
                f"{path} belongs to a run with another {key} ({header.get(key)}, now {wanted}); "
                "repeat the command it was started with, choose another --out, or start anew there with --force"
            )

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    model.load_state_dict(part("model."))
    average.load_state_dict(part("average."))
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in part("optimizer.").items():
        index, key = name.split(".")
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return header["history"]


def train_classifier(
    images: Tensor, labels: Tensor, epochs: int = 3, batch_size: int = 128, lr: float = 3e-3, seed: int = 0
) -> Iterator[tuple[int, float, Classifier]]:
    """Train the digit classifier behind `difflab.metrics`; yields (epoch, mean loss, classifier) after each epoch."""
    torch.manual_seed(seed)
    classifier = Classifier()
    batches = math.ceil(len(images) / batch_size)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr, weight_decay=0.01)
    one_cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * batches)
    for epoch in range(epochs):
        classifier.train()
        total = 0.0
        for index in torch.randperm(len(images)).split(batch_size):
            loss = F.cross_entropy(classifier(images[index]), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            one_cycle.step()
            total += loss.item()
        yield epoch + 1, total / batches, classifier.eval()
