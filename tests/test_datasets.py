"""Do images come as [-1, 1] floats, and does a lab go on where MNIST cannot be had?"""

import os
import socket
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision.datasets.mnist as torchvision_mnist

from difflab import datasets
from difflab.datasets import load_digits, load_mnist, mnist_root

FILES = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]
REAL_MNIST = Path(os.environ.get("DIFFLAB_MNIST") or Path(__file__).resolve().parents[2] / "shared" / "mnist")


@pytest.fixture
def digits(tmp_path, monkeypatch):
    """Six bundled digits: image i is grey 51 i all over, and its label is i."""
    grey = np.arange(6, dtype=np.uint8)
    np.savez(tmp_path / "digits.npz", images=np.tile(51 * grey[:, None, None], (1, 28, 28)), labels=grey)
    monkeypatch.setattr(datasets, "data_path", lambda name: tmp_path / name)


@pytest.fixture
def no_mnist(tmp_path, monkeypatch):
    """A machine without MNIST and without a network; returns the addresses that were asked."""
    asked = []

    def download(url, *args, **kwargs):
        asked.append(url)
        raise URLError("no network")

    monkeypatch.delenv("DIFFLAB_MNIST", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))  # what HOME is called on Windows
    monkeypatch.setattr(datasets, "__file__", str(tmp_path / "labs" / "difflab" / "datasets.py"))
    monkeypatch.setattr(torchvision_mnist, "download_and_extract_archive", download)
    return asked


def _fake_mnist(root: Path, files=FILES) -> Path:
    (root / "MNIST" / "raw").mkdir(parents=True)
    for name in files:
        (root / "MNIST" / "raw" / name).touch()
    return root


# -- bundled digits ---------------------------------------------------------------------------------------------


def test_digits_lie_between_minus_one_and_one(digits):
    images, labels = load_digits()
    assert images.shape == (6, 1, 28, 28) and images.dtype == torch.float32
    torch.testing.assert_close(images[:, 0, 5, 9], torch.tensor([-1.0, -0.6, -0.2, 0.2, 0.6, 1.0]))
    assert labels.tolist() == [0, 1, 2, 3, 4, 5] and labels.dtype == torch.int64


@pytest.mark.parametrize("num", [0, 2, 6])
def test_num_takes_the_first(digits, num):
    images, labels = load_digits(num)
    assert images.shape == (num, 1, 28, 28)
    assert labels.tolist() == list(range(num))


@pytest.mark.parametrize("num", [-1, 7])
def test_more_digits_than_there_are_is_refused(digits, num):
    with pytest.raises(ValueError, match=f"between 0 and 6, got {num}"):
        load_digits(num)


# -- MNIST ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not (REAL_MNIST / "MNIST" / "raw").is_dir(), reason="MNIST is not here; set DIFFLAB_MNIST")
def test_mnist_is_read_from_the_folder_in_the_environment(monkeypatch):
    monkeypatch.setenv("DIFFLAB_MNIST", str(REAL_MNIST))
    assert mnist_root() == REAL_MNIST
    images, labels = load_mnist("test", download=False, fallback=False)
    assert images.shape == (10_000, 1, 28, 28) and images.dtype == torch.float32
    assert (images.min().item(), images.max().item()) == (-1, 1)
    assert images.mean().item() == pytest.approx(2 * 0.1325 - 1, abs=1e-3)
    assert labels[:5].tolist() == [7, 2, 1, 0, 4] and labels.dtype == torch.int64
    assert labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


def test_environment_comes_before_the_data_folder_and_the_cache(no_mnist, tmp_path, monkeypatch):
    assert mnist_root() is None
    cache = _fake_mnist(tmp_path / "home" / ".cache" / "difflab")
    assert mnist_root() == cache
    data = _fake_mnist(tmp_path / "data" / "mnist")
    assert mnist_root() == data
    elsewhere = _fake_mnist(tmp_path / "elsewhere")
    monkeypatch.setenv("DIFFLAB_MNIST", str(elsewhere))
    assert mnist_root() == elsewhere


@pytest.mark.parametrize("files", [[], FILES[:3]])
def test_half_a_download_is_not_taken_for_mnist(no_mnist, tmp_path, files):
    _fake_mnist(tmp_path / "home" / ".cache" / "difflab", files)
    assert mnist_root() is None


def test_bundled_digits_stand_in_offline_every_time(digits, no_mnist, capsys):
    """Also the second time, when the failed download has left an empty folder in the cache?"""
    patience = socket.getdefaulttimeout()
    for _ in range(2):
        images, labels = load_mnist("train")
        assert images.shape == (6, 1, 28, 28)
        assert labels.tolist() == [0, 1, 2, 3, 4, 5]
        assert capsys.readouterr().out.count("using the 10 000 bundled digits instead (set DIFFLAB_MNIST)") == 1
    assert no_mnist, "the network was never asked"
    assert socket.getdefaulttimeout() == patience


def test_network_is_left_alone_without_download(digits, no_mnist):
    assert len(load_mnist("test", download=False)[0]) == 6
    assert no_mnist == []


def test_without_fallback_missing_mnist_is_an_error(no_mnist):
    with pytest.raises(FileNotFoundError, match="set DIFFLAB_MNIST to a folder that holds MNIST/raw"):
        load_mnist(fallback=False)


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'train' or 'test', got 'validation'"):
        load_mnist("validation")
