"""Does a checkpoint come back as it was saved, and is every other file refused with a reason?"""

import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

from difflab import checkpoints, paths
from difflab.checkpoints import load_checkpoint, load_pretrained, save_checkpoint, save_tensors
from difflab.paths import data_path
from difflab.schedule import NoiseSchedule
from difflab.unet import UNet


def _model(seed: int = 0) -> UNet:
    torch.manual_seed(seed)
    model = UNet((8, 16), time_dim=8)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


@pytest.fixture
def path(tmp_path):
    """A good checkpoint."""
    save_checkpoint(tmp_path / "model.safetensors", _model(), NoiseSchedule.scaled_linear(50), epoch=3)
    return tmp_path / "model.safetensors"


# -- round trip -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_round_trip(tmp_path, dtype):
    """Are the weights those saved (rounded to dtype), back in float32, with schedule and notes?"""
    path, saved = tmp_path / "new" / "folder" / "model.safetensors", _model()
    save_checkpoint(path, saved, NoiseSchedule.scaled_linear(50), dtype, epoch=3, losses=[0.5, 0.25])
    model, schedule, notes = load_checkpoint(path)
    for name, value in saved.state_dict().items():
        loaded = model.state_dict()[name]
        assert loaded.dtype == torch.float32
        assert torch.equal(loaded, value.to(dtype).float()), name
    assert model.config == saved.config
    assert not model.training
    assert schedule.config == {"kind": "scaled_linear", "num_timesteps": 50}
    assert notes == {"epoch": 3, "losses": [0.5, 0.25]}
    weights = sum(p.numel() for p in saved.parameters()) * dtype.itemsize
    assert weights < path.stat().st_size < weights + 20_000


@pytest.mark.skipif(os.name != "posix", reason="file modes of POSIX")
def test_others_may_read_a_checkpoint(path):
    """Does the file have the mode any new file gets, so that a submission run as another user can load it?"""
    (path.parent / "plain").touch()
    assert path.stat().st_mode == (path.parent / "plain").stat().st_mode


def test_schedule_of_free_betas_comes_back_exactly(tmp_path):
    schedule = NoiseSchedule(torch.tensor([0.1, 0.123456789, 0.3], dtype=torch.float64))
    save_checkpoint(tmp_path / "m.safetensors", _model(), schedule)
    assert torch.equal(load_checkpoint(tmp_path / "m.safetensors")[1].betas64, schedule.betas64)


@pytest.mark.parametrize("stage", ["while writing", "before renaming"])
def test_interrupted_save_leaves_the_old_file(path, monkeypatch, stage):
    old = path.read_bytes()

    def half_write(self, content):
        with open(self, "wb") as file:
            file.write(content[: len(content) // 2])
        raise KeyboardInterrupt

    def killed(source, target):
        raise KeyboardInterrupt

    if stage == "while writing":
        monkeypatch.setattr(Path, "write_bytes", half_write)
    else:
        monkeypatch.setattr(checkpoints.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, _model(seed=1), NoiseSchedule.linear())
    assert path.read_bytes() == old
    monkeypatch.undo()
    save_checkpoint(path, _model(seed=1), NoiseSchedule.linear())
    assert load_checkpoint(path)[1].num_timesteps == 1000
    assert [p.name for p in path.parent.iterdir()] == [path.name], "the half-written file stayed"


# -- files that are no checkpoint -------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_truncated_file_is_refused(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="model.safetensors is not a readable safetensors file .* truncated"):
        load_checkpoint(path)


def test_pickled_file_is_refused(path):
    torch.save(_model().state_dict(), path)
    with pytest.raises(ValueError, match="pickled .pt file, which difflab does not open"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "metadata",
    [None, {"format": "pt"}, {"difflab": "{"}, {"difflab": "[]"}, {"difflab": "{}"}, {"difflab": '{"format": "x"}'}],
)
def test_foreign_safetensors_file_is_refused(path, metadata):
    safetensors.torch.save_file(_model().state_dict(), path, metadata)
    with pytest.raises(ValueError, match=r"was not written by difflab \(difflab-1\); expected .* `difflab train`"):
        load_checkpoint(path)


def test_missing_file_is_named(tmp_path):
    for place in (tmp_path / "nothing.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"no checkpoint at .*{place.name}"):
            load_checkpoint(place)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"architecture": "Classifier"}, "holds 'Classifier', expected a UNet"),
        ({"architecture": None}, "holds None, expected a UNet"),
        ({"config": {"channels": [8, 24], "time_dim": 8}}, "does not match the U-Net it describes"),
        ({"config": {"channels": [8, 16, 32], "time_dim": 8}}, "does not match the U-Net it describes"),
        ({"config": {"width": 8}}, "does not match .*'width'"),
        ({"config": {"channels": [8, 16], "time_dim": 7}}, "does not match .*time_dim must be even"),
        ({"config": None}, "does not match"),
        ({"schedule": {"kind": "sigmoid"}}, "does not match .*unknown noise schedule 'sigmoid'"),
        ({"schedule": {"kind": "betas"}}, "does not match .*'betas'"),
        ({"schedule": None}, "does not match"),
    ],
)
def test_weights_that_do_not_fit_their_description_are_refused(path, header, message):
    good = {"architecture": "UNet", "config": _model().config, "schedule": NoiseSchedule.linear().config}
    save_tensors(path, _model().state_dict(), good)
    assert load_checkpoint(path)[1].num_timesteps == 1000
    save_tensors(path, _model().state_dict(), {**good, **header})
    with pytest.raises(ValueError, match=message) as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)


def test_missing_and_surplus_weights_are_refused(path):
    header = {"architecture": "UNet", "config": _model().config, "schedule": NoiseSchedule.linear().config}
    weights = _model().state_dict()
    for wrong in ({**weights, "extra": torch.zeros(1)}, {k: v for k, v in weights.items() if k != "conv_in.bias"}):
        save_tensors(path, wrong, header)
        with pytest.raises(ValueError, match="does not match the U-Net it describes"):
            load_checkpoint(path)


# -- files that come with the project ---------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project folder of our own, with the kit in labs/difflab, as in a clone."""
    monkeypatch.setattr(paths, "__file__", str(tmp_path / "labs" / "difflab" / "paths.py"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "README.md").touch()
    return tmp_path


def test_pretrained_model_is_loaded_without_gradients(project):
    save_checkpoint(project / "data" / "mnist-tiny.safetensors", _model(), NoiseSchedule.linear(50))
    model, schedule = load_pretrained("mnist-tiny")
    assert torch.equal(model.conv_in.weight, _model().conv_in.weight)
    assert schedule.num_timesteps == 50
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_unknown_pretrained_name_lists_those_there_are(project):
    with pytest.raises(ValueError, match="no pretrained model 'celeba'; available: none"):
        load_pretrained("celeba")
    for name in ("mnist-small", "mnist-300", "classifier"):
        (project / "data" / f"{name}.safetensors").touch()
    with pytest.raises(ValueError, match="no pretrained model 'celeba'; available: mnist-300, mnist-small$"):
        load_pretrained("celeba")


def test_data_is_found_in_the_clone_and_where_pip_puts_it(project, tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda _name, user=None: str(tmp_path / ("home" if user else "prefix")))
    with pytest.raises(FileNotFoundError, match="digits.npz is not in .*data; get the whole repository"):
        data_path("digits.npz")
    installed = [tmp_path / place / "share" / "difflab" / "digits.npz" for place in ("home", "prefix")]
    for path in (*installed, project / "data" / "digits.npz"):  # the later, the better
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        assert data_path("digits.npz") == path


def test_header_is_readable_json(path):
    """Can other tools read what is in the file?"""
    with safetensors.safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["difflab"])
    assert header["format"] == "difflab-1"
    assert header["config"] == {"channels": [8, 16], "time_dim": 8, "in_channels": 1, "attention": True}
    assert header["notes"] == {"epoch": 3}
