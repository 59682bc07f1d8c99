"""Do the measures give known answers on inputs whose answer is known?"""

import numpy as np
import pytest
import torch

from difflab import metrics
from difflab.checkpoints import save_checkpoint
from difflab.metrics import (
    Classifier,
    diversity,
    frechet_distance,
    gaussian_statistics,
    load_classifier,
    quality,
    save_classifier,
)
from difflab.schedule import NoiseSchedule
from difflab.unet import UNet


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _covariance(dim: int, seed: int) -> torch.Tensor:
    factor = _random(dim, dim, seed=seed)
    return factor @ factor.T / dim + 0.1 * torch.eye(dim, dtype=torch.float64)


# -- Fréchet distance -------------------------------------------------------------------------------------------


def test_frechet_of_diagonal_gaussians_has_a_closed_form():
    """|m1 - m2|^2 + |s1 - s2|^2, with s the standard deviations."""
    m1, m2 = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([3.0, 1.0, 0.0])
    s1, s2 = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([4.0, 0.5, 1.0])
    assert frechet_distance(m1, (s1**2).diag(), m2, (s2**2).diag()) == pytest.approx((9 + 4) + (9 + 2.25 + 1))


@pytest.mark.parametrize("dim", [2, 8, 128])
def test_frechet_agrees_with_the_matrix_root_of_the_product(dim):
    """The papers' formula, with (C1 C2)^(1/2) from an eigendecomposition of C1 C2 itself."""
    m1, m2, c1, c2 = _random(dim, seed=1), _random(dim, seed=2), _covariance(dim, 3), _covariance(dim, 4)
    values, vectors = np.linalg.eig((c1 @ c2).numpy())
    root = vectors @ np.diag(np.sqrt(values.astype(complex))) @ np.linalg.inv(vectors)
    assert np.allclose(root @ root, (c1 @ c2).numpy())
    expected = ((m1 - m2) ** 2).sum().item() + np.trace(c1.numpy() + c2.numpy() - 2 * root.real)
    assert frechet_distance(m1, c1, m2, c2) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(m2, c2, m1, c1) == pytest.approx(expected, rel=1e-9)


def test_frechet_of_equal_gaussians_is_zero():
    mean, cov = _random(32), _covariance(32, 5)
    assert frechet_distance(mean, cov, mean, cov) == pytest.approx(0, abs=1e-9)


def test_frechet_takes_singular_covariances():
    """Fewer images than features: does rounding below zero stay out of the root?"""
    mean, cov = gaussian_statistics(_random(5, 64))
    distance = frechet_distance(mean, cov, mean + 0.5, cov)
    assert distance == pytest.approx(64 * 0.25, abs=1e-4)  # an eigenvalue that is 0 up to 1e-16 has a root of 1e-8


def test_gaussian_statistics_agree_with_numpy():
    features = _random(50, 7).float() + 3
    mean, cov = gaussian_statistics(features)
    assert mean.dtype == cov.dtype == torch.float64
    assert np.allclose(mean, features.double().numpy().mean(0))
    assert np.allclose(cov, np.cov(features.double().numpy(), rowvar=False))


@pytest.mark.parametrize("shape", [(1, 3), (0, 3), (5,), (2, 3, 4)])
def test_statistics_need_two_rows(shape):
    with pytest.raises(ValueError, match=r"shape \[N, D\] with N >= 2, got"):
        gaussian_statistics(torch.zeros(shape))


# -- diversity --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("greys", "expected"),
    [([0.3], 0), ([0.5, 0.5, 0.5], 0), ([-1, 1], 2), ([0, 0, 1], 2 / 3), ([0, 1, 3], (1 + 3 + 2) / 3)],
)
def test_diversity_is_the_mean_distance_of_pairs(greys, expected):
    images = torch.tensor(greys, dtype=torch.float32)[:, None, None, None].expand(-1, 1, 28, 28)
    assert diversity(images) == pytest.approx(expected)


# -- classifier and quality -------------------------------------------------------------------------------------


def _classifier() -> Classifier:
    torch.manual_seed(0)
    classifier = Classifier()
    classifier(torch.randn(16, 1, 28, 28))  # so that the running statistics are not those of a new one
    return classifier.eval()


@pytest.fixture
def images() -> torch.Tensor:
    return _random(12, 1, 28, 28).float().clamp(-1, 1)


@pytest.fixture
def own_reference(images, monkeypatch):
    """Reference statistics such that the distance of `images` is 0 and moving the mean by 0.5 gives 128/4."""
    mean, cov = gaussian_statistics(_classifier().features(images).detach())
    monkeypatch.setattr(metrics, "reference_statistics", lambda: (mean, cov))
    return mean, cov


def test_classifier_round_trip(tmp_path, images):
    saved = _classifier()
    save_classifier(tmp_path / "c.safetensors", saved, epochs=1)
    loaded = load_classifier(tmp_path / "c.safetensors")
    assert torch.equal(loaded(images), saved(images))
    assert loaded.state_dict().keys() == saved.state_dict().keys()
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert loaded(images).shape == (12, 10) and loaded.features(images).shape == (12, 128)


def test_a_unet_is_no_classifier(tmp_path):
    save_checkpoint(tmp_path / "unet.safetensors", UNet((8,), time_dim=8), NoiseSchedule.linear(10))
    with pytest.raises(ValueError, match="expected a classifier checkpoint, got 'UNet'"):
        load_classifier(tmp_path / "unet.safetensors")


def test_quality_measures_the_distance_to_the_reference(images, own_reference, monkeypatch):
    mean, cov = own_reference
    assert quality(images, _classifier()).frechet == pytest.approx(0, abs=1e-4)
    monkeypatch.setattr(metrics, "reference_statistics", lambda: (mean + 0.5, cov))
    assert quality(images, _classifier()).frechet == pytest.approx(32, abs=1e-4)


@pytest.mark.parametrize(("probability", "recognised"), [(0.95, 1), (0.85, 0)])
def test_quality_of_a_classifier_that_always_says_three(images, own_reference, probability, recognised):
    classifier = _classifier()
    torch.nn.init.zeros_(classifier.out.weight)
    probabilities = torch.full((10,), (1 - probability) / 9)
    probabilities[3] = probability
    classifier.out.bias.data = probabilities.log()
    result = quality(images, classifier)
    assert result.n == 12
    assert result.recognised == recognised
    assert result.confidence == pytest.approx(probability)
    assert result.label_histogram == [0, 0, 0, 1, 0, 0, 0, 0, 0, 0]
    assert result.diversity == pytest.approx(diversity(images))
    assert str(result).startswith("n = 12: Fréchet ")
    assert str(result).endswith("digits 0-9 in %: 0 0 0 100 0 0 0 0 0 0")


def test_quality_counts_every_image_once(images, own_reference):
    """Do the figures stay the same when the images come in several batches, the last one smaller?"""
    classifier = _classifier()
    classifier.out.weight.data *= 20  # spread the labels
    expected = classifier(images).argmax(-1).bincount(minlength=10) / 12
    whole, parts = quality(images, classifier), quality(images, classifier, batch_size=5)
    assert whole.label_histogram == expected.tolist()
    assert len(set(expected.tolist())) > 1
    assert parts.label_histogram == whole.label_histogram
    assert parts.frechet == pytest.approx(whole.frechet, abs=1e-4)
    assert parts.confidence == pytest.approx(whole.confidence)


def test_quality_uses_the_bundled_classifier(images, tmp_path, monkeypatch):
    """Are the classifier and the reference statistics read from data/ when none are given?"""
    save_classifier(tmp_path / "classifier.safetensors", _classifier())
    mean, cov = gaussian_statistics(_classifier().features(images).detach())
    np.savez(tmp_path / "mnist-features.npz", mean=mean.numpy() + 0.5, cov=cov.numpy())
    monkeypatch.setattr(metrics, "data_path", lambda name: tmp_path / name)
    assert quality(images).frechet == pytest.approx(32, abs=1e-4)


@pytest.mark.parametrize("shape", [(1, 1, 28, 28), (4, 28, 28), (4, 3, 28, 28), (4, 1, 32, 32)])
def test_quality_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match=r"shape \[N, 1, 28, 28\] with N >= 2, got \[" + ", ".join(map(str, shape))):
        quality(torch.zeros(shape), _classifier())
