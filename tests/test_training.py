"""Does training learn, and does a killed run go on exactly?"""

import pytest
import torch

from difflab.checkpoints import load_checkpoint
from difflab.schedule import NoiseSchedule
from difflab.training import TrainingConfig, train
from difflab.unet import UNet

CONFIG = TrainingConfig(epochs=3, batch_size=32, lr=2e-3, ema_decay=0.9)


def _images(count: int = 128) -> torch.Tensor:
    """Bright squares at random places: enough to learn from."""
    rng = torch.Generator().manual_seed(0)
    images = -torch.ones(count, 1, 8, 8)
    for image in images:
        row, column = torch.randint(0, 5, (2,), generator=rng)
        image[0, row : row + 4, column : column + 4] = 1
    return images


def _model() -> UNet:
    torch.manual_seed(0)
    return UNet((8, 16), time_dim=16)


def test_training_learns(tmp_path):
    losses = [e.train_loss for e in train(_model(), NoiseSchedule.linear(), _images(512), CONFIG, tmp_path)]
    assert losses[-1] < 0.8 * losses[0]


def test_resumed_run_reaches_the_same_weights(tmp_path):
    """Is a run that was stopped after every epoch, and once inside one, bit-identical to an uninterrupted one?"""
    schedule, images = NoiseSchedule.linear(100), _images()
    whole = list(train(_model(), schedule, images, CONFIG, tmp_path / "whole"))

    def killed(batch, batches, loss):
        raise KeyboardInterrupt

    parts = []
    for _ in range(CONFIG.epochs):
        run = train(_model(), schedule, images, CONFIG, tmp_path / "parts")
        parts.append(next(run))
        run.close()
        with pytest.raises((KeyboardInterrupt, StopIteration)):
            next(train(_model(), schedule, images, CONFIG, tmp_path / "parts", on_batch=killed))
    assert [e.train_loss for e in parts] == [e.train_loss for e in whole]
    for name in ("whole", "parts"):
        assert (tmp_path / name / "checkpoints" / "model_latest.safetensors").exists()
    one, _, notes = load_checkpoint(tmp_path / "whole/checkpoints/model_latest.safetensors")
    two, _, _ = load_checkpoint(tmp_path / "parts/checkpoints/model_latest.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values()))
    assert notes["epoch"] == CONFIG.epochs
    assert list(train(_model(), schedule, images, CONFIG, tmp_path / "whole")) == [], "a finished run was run again"


def test_resuming_another_run_is_refused(tmp_path):
    schedule, images = NoiseSchedule.linear(100), _images()
    next(train(_model(), schedule, images, CONFIG, tmp_path))
    other = TrainingConfig(epochs=3, batch_size=32, lr=1e-3)
    with pytest.raises(ValueError, match="another config"):
        next(train(_model(), schedule, images, other, tmp_path))
