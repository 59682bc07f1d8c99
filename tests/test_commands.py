"""Does the command line do what it says, and say in one line what it will not do?"""

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
from nbformat.v4 import new_code_cell, new_notebook

from difflab import datasets, metrics, training
from difflab.__main__ import main
from difflab.checkpoints import load_checkpoint, load_tensors, save_checkpoint, save_tensors
from difflab.schedule import NoiseSchedule
from difflab.unet import UNet

TIMESTEPS = 60

# Samplers that call the network as often as real ones would and return plain grey: eta for DDIM, white for DDPM.
SAMPLERS = """
import torch

class DDPMSampler:
    def __init__(self, model, schedule):
        self.model, self.schedule = model, schedule

    @torch.no_grad()
    def sample(self, shape, x_T):
        for t in reversed(range(self.schedule.num_timesteps)):
            self.model(x_T, torch.full((shape[0],), t))
        return torch.ones(shape)

class DDIMSampler(DDPMSampler):
    def create_timestep_schedule(self, num_steps):
        return list(range(num_steps))

    @torch.no_grad()
    def sample(self, shape, timesteps, eta=0.0, x_T=None):
        for t in timesteps:
            self.model(x_T, torch.full((shape[0],), t))
        return torch.full(shape, float(eta))
"""


# The same from Lab 4: one class, which draws black by DDPM and half grey by DDIM.
DIFFUSION = """
import torch

class Diffusion:
    def __init__(self, model, schedule):
        self.model, self.schedule = model, schedule

    def ddpm_sample(self, shape, *, x_T=None):
        return self.ddim_sample(shape, self.schedule.num_timesteps, x_T=x_T) - 1.5

    @torch.no_grad()
    def ddim_sample(self, shape, num_steps=50, *, x_T=None):
        for t in range(num_steps):
            self.model(x_T, torch.full((shape[0],), t))
        return torch.full(shape, 0.5)
"""


def _write_notebook(path, *cells):
    nbformat.write(new_notebook(cells=[new_code_cell(cell) for cell in cells]), path)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a notebook of samplers, lab.ipynb, and a checkpoint, tiny.safetensors; commands run in it."""
    monkeypatch.chdir(tmp_path)
    _write_notebook(tmp_path / "lab.ipynb", SAMPLERS)
    save_checkpoint(tmp_path / "tiny.safetensors", UNet((8, 8), time_dim=8), NoiseSchedule.scaled_linear(TIMESTEPS))
    return tmp_path


def _sample(*arguments: str) -> int:
    """`difflab sample`, five samples on the CPU unless told otherwise."""
    start = ["sample", "--from", "lab.ipynb", "--checkpoint", "tiny.safetensors", "--device", "cpu"]
    return main([*start, "--num-samples", "5", *arguments])


def _refused(status: int, capsys) -> str:
    """The one-line error of a refused command."""
    assert status == 2
    output = capsys.readouterr()
    lines = output.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("difflab: "), output.err
    assert "written to" not in output.out
    return lines[0]


def _classifier() -> metrics.Classifier:
    torch.manual_seed(0)
    return metrics.Classifier().eval()


# -- sample -----------------------------------------------------------------------------------------------------


def test_sample_draws_with_the_notebooks_sampler(folder, capsys):
    """Are five grey digits written, and are the network calls those of three DDIM steps?"""
    assert _sample("--num-steps", "3", "--eta", "0.5", "--out", "new/grid.png") == 0
    out = capsys.readouterr().out
    assert "5 samples in " in out and "on cpu: 3 network calls for each of 1 batches" in out
    assert "written to " in out
    picture = plt.imread(folder / "new" / "grid.png")
    assert picture.shape[:2] == (3 * (28 + 4), 3 * (5 * 30 + 2))
    assert picture[48, 48, 0] == pytest.approx(0.75, abs=1 / 255)
    assert picture[0, 0, 0] == 1


def test_sample_takes_fifty_steps_unless_told(folder, capsys):
    assert _sample() == 0
    assert "50 network calls" in capsys.readouterr().out
    assert (folder / "samples.png").exists()


def test_ddpm_takes_every_timestep(folder, capsys):
    assert _sample("--method", "ddpm") == 0
    assert f": {TIMESTEPS} network calls for each of 1 batches" in capsys.readouterr().out


def test_calls_are_counted_per_batch(folder, capsys):
    assert _sample("--num-steps", "3", "--batch-size", "2", "--out", "grid.png") == 0
    assert "5 samples in " in (out := capsys.readouterr().out)
    assert "3 network calls for each of 3 batches" in out


def test_a_notebook_of_lab_4_samples_too(folder, capsys):
    _write_notebook(folder / "lab.ipynb", DIFFUSION)
    for arguments, calls, grey in ((["--num-steps", "3"], 3, 0.75), (["--method", "ddpm"], TIMESTEPS, 0.0)):
        assert _sample(*arguments, "--out", f"{calls}.png") == 0
        assert f": {calls} network calls for each of 1 batches" in capsys.readouterr().out
        assert abs(plt.imread(folder / f"{calls}.png")[10, 10, 0] - grey) < 0.01
    assert "knows no --eta" in _refused(_sample("--eta", "0.5", "--num-steps", "3"), capsys)


def test_seed_decides_the_starting_noise(folder, capsys):
    """Is x_T, returned here as the sample, the same for the same seed and another for another?"""
    _write_notebook(folder / "lab.ipynb", SAMPLERS, "DDIMSampler.sample = lambda self, shape, timesteps, eta, x_T: x_T")
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert _sample("--seed", seed, "--out", f"{name}.png") == 0
    a, b, c = (plt.imread(folder / f"{name}.png") for name in "abc")
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


def test_npz_holds_bytes_and_the_classifiers_labels(folder, monkeypatch):
    monkeypatch.setattr(metrics, "load_classifier", _classifier)
    assert _sample("--eta", "0.5", "--out", "set.npz") == 0
    with np.load(folder / "set.npz") as file:
        images, labels = file["images"], file["labels"]
    assert images.shape == (5, 28, 28) and images.dtype == np.uint8
    assert set(images.ravel().tolist()) == {191}  # (0.5 + 1) * 127.5 = 191.25
    label = _classifier()(torch.full((1, 1, 28, 28), 0.5)).argmax().item()
    assert labels.tolist() == [label] * 5
    assert not list(folder.glob("*.tmp*"))


def test_nothing_is_overwritten_without_force(folder, capsys):
    (folder / "grid.png").write_text("precious")
    assert "already there; add --force" in _refused(_sample("--out", "grid.png"), capsys)
    assert (folder / "grid.png").read_text() == "precious"
    assert _sample("--out", "grid.png", "--force") == 0
    assert plt.imread(folder / "grid.png").shape[0] == 96


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "grid.jpg"], "--out must end in .png or .npz, got grid.jpg"),
        (["--method", "ddpm", "--num-steps", "10"], "belong to --method ddim; ddpm always takes every timestep"),
        (["--method", "ddpm", "--eta", "0.5"], "belong to --method ddim"),
        (["--num-samples", "0"], "must be at least 1"),
        (["--batch-size", "0"], "must be at least 1"),
        (["--num-steps", "0"], "must be at least 1"),
        (["--num-steps", "61"], "--num-steps 61 is more than the 60 timesteps there are"),
        (["--out", "/proc/grid.png"], "cannot write to '/proc' ("),
        (["--checkpoint", "nothing.safetensors"], "no checkpoint at nothing.safetensors"),
        (["--checkpoint", "no-such-model"], "no-such-model.safetensors is not in "),
        (["--checkpoint", "broken.safetensors"], "broken.safetensors is not a readable safetensors file"),
        (["--from", "nothing.ipynb"], "no notebook at nothing.ipynb"),
        (["--from", "empty.ipynb"], "empty.ipynb defines neither DDIMSampler nor Diffusion"),
        (["--from", "empty.ipynb", "--method", "ddpm"], "empty.ipynb defines neither DDPMSampler nor Diffusion"),
        (["--from", "tiny.safetensors"], "tiny.safetensors is not a Jupyter notebook"),
    ],
)
def test_what_cannot_be_sampled_is_refused(folder, capsys, arguments, message):
    (folder / "broken.safetensors").write_bytes(b"broken")
    _write_notebook(folder / "empty.ipynb", "a = 1")
    assert message in _refused(_sample(*arguments), capsys)
    assert not list(folder.glob("samples.*"))


@pytest.mark.parametrize("method", ["__init__", "create_timestep_schedule", "sample"])
def test_an_unfinished_notebook_is_an_error_of_one_line(folder, capsys, method):
    """Whatever is not written yet: is the student told so, without a traceback?"""
    stub = f"def stub(self, *args, **keywords):\n    raise NotImplementedError('write me')\nDDIMSampler.{method} = stub"
    _write_notebook(folder / "lab.ipynb", SAMPLERS, stub)
    assert "is not finished: write me" in _refused(_sample(), capsys)


def test_an_interrupted_command_says_so(folder, capsys):
    stub = "def stub(self, *args, **keywords):\n    raise KeyboardInterrupt\nDDIMSampler.sample = stub"
    _write_notebook(folder / "lab.ipynb", SAMPLERS, stub)
    assert _sample() == 130
    assert capsys.readouterr().err == "difflab: interrupted; run the same command again to go on\n"


# -- train and evaluate -----------------------------------------------------------------------------------------


def _train(monkeypatch, *arguments: str) -> int:
    images = torch.rand(16, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    monkeypatch.setattr(datasets, "load_mnist", lambda split: (images, torch.zeros(16).long()))
    start = ["train", "--out", "run", "--channels", "8", "8", "--time-dim", "8", "--epochs", "1", "--batch-size", "8"]
    return main([*start, "--device", "cpu", *arguments])


def test_train_writes_a_model_that_sample_takes(folder, capsys, monkeypatch):
    assert _train(monkeypatch, "--timesteps", "22", "--samples-from", "lab.ipynb") == 0
    out = capsys.readouterr().out
    assert "NoiseSchedule(scaled_linear, num_timesteps=22" in out and "epoch 1/1: training loss" in out
    path = folder / "run" / "checkpoints" / "model_latest.safetensors"
    model, schedule, _ = load_checkpoint(path)
    assert model.config["channels"] == [8, 8]
    assert schedule.config == {"kind": "scaled_linear", "num_timesteps": 22}
    assert plt.imread(folder / "run" / "samples" / "epoch_001.png").shape[:2] == (3 * 242, 3 * 242)
    assert _sample("--checkpoint", str(path), "--num-steps", "3") == 0


def test_train_names_an_unfinished_notebook(folder, capsys, monkeypatch):
    stub = "def stub(self, *args):\n    raise NotImplementedError('write me')\nDDIMSampler.__init__ = stub"
    _write_notebook(folder / "lab.ipynb", SAMPLERS, stub)
    assert _train(monkeypatch, "--timesteps", "22", "--samples-from", "lab.ipynb") == 2
    assert "is not finished: write me" in capsys.readouterr().err.splitlines()[-1]


def test_train_refuses_an_impossible_schedule(folder, capsys, monkeypatch):
    assert "scaled_linear needs more than 20 timesteps, got 20" in _refused(
        _train(monkeypatch, "--timesteps", "20"), capsys
    )
    assert not (folder / "run").exists()


def test_train_finds_out_before_the_first_epoch(folder, capsys, monkeypatch):
    """An hour of training must not be lost to what could be seen at once."""
    (folder / "run").write_text("a file")
    assert "cannot write to 'run/checkpoints' (Not a directory)" in _refused(_train(monkeypatch), capsys)
    (folder / "run").unlink()
    stub = "def stub(self, *args, **keywords):\n    raise NotImplementedError('write me')\nDDIMSampler.sample = stub"
    _write_notebook(folder / "lab.ipynb", SAMPLERS, stub)
    assert "is not finished: write me" in _refused(_train(monkeypatch, "--samples-from", "lab.ipynb"), capsys)
    assert not (folder / "run").exists()


def test_train_goes_on_or_starts_anew_but_mixes_nothing(folder, capsys, monkeypatch):
    arguments = ["--timesteps", "60", "--epochs", "2"]
    monkeypatch.setattr(training, "_save_state", _interrupt_after(training._save_state))
    assert _train(monkeypatch, *arguments) == 130
    assert "run the same command again to go on" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert _train(monkeypatch, *arguments) == 0
    assert "epoch 1/2" not in (out := capsys.readouterr().out) and "epoch 2/2" in out
    finished = (folder / "run/checkpoints/model_latest.safetensors").read_bytes()
    for other, message in {
        ("--timesteps", "300", "--epochs", "2"): "belongs to a run with another schedule",
        ("--time-dim", "16", *arguments): "belongs to a run with another model",
        ("--timesteps", "60", "--epochs", "3"): "belongs to a run with another config",
    }.items():
        assert message in (error := _refused(_train(monkeypatch, *other), capsys)) and "--force" in error
    assert (folder / "run/checkpoints/model_latest.safetensors").read_bytes() == finished
    assert _train(monkeypatch, "--timesteps", "300", "--force") == 0
    assert load_checkpoint(folder / "run/checkpoints/model_latest.safetensors")[1].num_timesteps == 300


def _interrupt_after(save_state):
    def saved_and_stopped(*arguments):
        save_state(*arguments)
        raise KeyboardInterrupt

    return saved_and_stopped


def test_train_does_not_overwrite_a_checkpoint_of_another_origin(folder, capsys, monkeypatch):
    (folder / "run/checkpoints").mkdir(parents=True)
    (folder / "run/checkpoints/model_latest.safetensors").write_bytes((folder / "tiny.safetensors").read_bytes())
    assert "already there; add --force to overwrite it" in _refused(_train(monkeypatch), capsys)
    assert _train(monkeypatch, "--force") == 0


@pytest.mark.parametrize("arguments", [["--timesteps", "300"], ["--timesteps", "60", "--channels", "16", "16"]])
def test_train_starts_only_from_weights_of_its_own_kind(folder, capsys, monkeypatch, arguments):
    error = _refused(_train(monkeypatch, *arguments, "--init", "tiny.safetensors"), capsys)
    assert "--init tiny.safetensors holds another network or schedule" in error
    assert not (folder / "run").exists()


def test_sample_takes_the_timesteps_from_the_checkpoint(folder, capsys):
    """Steps asked for are held against the network's own T, and weights against what their file says they are."""
    save_checkpoint(folder / "short.safetensors", UNet((8, 8), time_dim=8), NoiseSchedule.scaled_linear(30))
    status = _sample("--checkpoint", "short.safetensors", "--num-steps", "50")
    assert "more than the 30 timesteps" in _refused(status, capsys)
    tensors, header = load_tensors(folder / "tiny.safetensors")
    header["config"]["channels"] = [16, 16]
    save_tensors(folder / "other.safetensors", tensors, header)
    assert "does not match the U-Net it describes" in _refused(_sample("--checkpoint", "other.safetensors"), capsys)


@pytest.mark.parametrize(("arguments", "n"), [([], 6), (["--num", "4"], 4)])
def test_evaluate_measures_the_images_of_a_file(folder, capsys, monkeypatch, arguments, n):
    grey = np.random.default_rng(0).integers(0, 256, (6, 28, 28), dtype=np.uint8)
    np.savez(folder / "set.npz", images=grey)
    monkeypatch.setattr(metrics, "load_classifier", lambda device: _classifier())
    monkeypatch.setattr(metrics, "reference_statistics", lambda: (torch.zeros(128), torch.eye(128)))
    assert main(["evaluate", "set.npz", *arguments]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"n = {n}: Fréchet ")
    if n == 6:
        images = torch.from_numpy(grey).float()[:, None] / 127.5 - 1
        assert out.strip() == str(metrics.quality(images, _classifier()))


def test_evaluate_needs_its_file(folder, capsys):
    assert "nothing.npz" in _refused(main(["evaluate", "nothing.npz"]), capsys)


def test_a_command_is_required(capsys):
    with pytest.raises(SystemExit) as error:
        main([])
    assert error.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_export_halves_the_file_and_keeps_notes(tmp_path, monkeypatch, capsys):
    images = torch.rand(64, 1, 28, 28) * 2 - 1
    monkeypatch.setattr("difflab.datasets.load_mnist", lambda *args, **kwargs: (images, torch.zeros(64)))
    whole, half = tmp_path / "whole.safetensors", tmp_path / "half.safetensors"
    save_checkpoint(whole, UNet((8, 16), time_dim=8), NoiseSchedule.linear(50), epoch=7)
    assert main(["export", str(whole), "--out", str(half)]) == 0
    assert half.stat().st_size < 0.65 * whole.stat().st_size
    assert load_checkpoint(half)[2] == {"epoch": 7}
    losses = [float(line.split("test loss ")[1].split(",")[0]) for line in capsys.readouterr().out.splitlines()]
    assert abs(losses[0] - losses[1]) < 1e-3
