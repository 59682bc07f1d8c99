"""Does training learn, and does a killed run go on exactly?"""

import nbformat
import pytest
import torch

from difflab.__main__ import main
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


NOTEBOOK = """
import torch
class DDIMSampler:
    def __init__(self, model, schedule): pass
    def create_timestep_schedule(self, num_steps): return list(range(num_steps))[::-1]
    def sample(self, shape, timesteps, eta, x_T): return torch.zeros(shape)
"""


def test_the_command_trains_draws_a_grid_each_epoch_and_resumes(tmp_path, monkeypatch, capsys):
    images = -torch.ones(64, 1, 28, 28)
    monkeypatch.setattr("difflab.datasets.load_mnist", lambda *args, **kwargs: (images, torch.zeros(64)))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(NOTEBOOK)])
    nbformat.write(notebook, tmp_path / "mine.ipynb")
    command = ["train", "--out", str(tmp_path), "--timesteps", "50", "--channels", "8", "16", "--time-dim", "8"]
    command += ["--epochs", "2", "--batch-size", "32", "--samples-from", str(tmp_path / "mine.ipynb")]
    assert main(command) == 0
    assert "epoch 2/2: training loss" in capsys.readouterr().out
    assert (tmp_path / "samples" / "epoch_001.png").exists() and (tmp_path / "samples" / "epoch_002.png").exists()
    model, schedule, notes = load_checkpoint(tmp_path / "checkpoints" / "model_latest.safetensors")
    assert schedule.config == {"kind": "scaled_linear", "num_timesteps": 50} and notes["epoch"] == 2
    assert model.config["channels"] == [8, 16]
    assert main(command) == 0
    assert "epoch" not in capsys.readouterr().out.split("finished")[0].replace("epochs", ""), "trained again"
    assert main([*command[:-1], str(tmp_path / "none.ipynb")]) == 2
