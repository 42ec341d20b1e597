"""The sparse autoencoder against its controls, on features of real digits and on made ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ebjdat.evaluation import autoencoder, detection
from ebjdat.settings import AutoencoderSettings

from ..networks import Curved, images, labelled

SETTINGS = AutoencoderSettings(width=32, epochs=60, lr=0.01)


def features(n: int = 600, seed: int = 0) -> Tensor:
    """16 features of 3 causes: (n, 16), correlated, so that a shuffled one is told from a real one."""
    rng = torch.Generator().manual_seed(seed)
    mixing = torch.randn(3, 16, generator=torch.Generator().manual_seed(7))
    return 5 + 2 * torch.rand(n, 3, generator=rng) @ mixing + 0.01 * torch.randn(n, 16, generator=rng)


@pytest.fixture(scope="module")
def model() -> autoencoder.Autoencoder:
    return autoencoder.fit(features(), SETTINGS, 0)


def test_it_reconstructs_features_better_than_shuffled_ones(model: autoencoder.Autoencoder) -> None:
    """Also new ones. The control has the same distribution feature by feature. By the mean alone the error would be 1."""
    trained, new = (float(model.error(x).mean()) for x in (features(), features(seed=1)))
    control = autoencoder.shuffled(features(seed=1), 0)
    assert torch.equal(control.sort(0).values, features(seed=1).sort(0).values)
    assert not torch.equal(control, features(seed=1))
    assert trained < 0.1
    assert new < 0.1
    assert float(model.error(control).mean()) > 5 * new
    area = detection.auroc(-model.error(features(seed=1)).double().numpy(), -model.error(control).double().numpy())
    assert area > 0.95


def test_identical_sets_are_not_told_apart(model: autoencoder.Autoencoder) -> None:
    scores = -model.error(features(seed=1)).double().numpy()
    assert detection.auroc(scores, scores) == 0.5


def test_the_seed_decides(model: autoencoder.Autoencoder) -> None:
    before = torch.get_rng_state()
    again, other = (autoencoder.fit(features(), SETTINGS, seed) for seed in (0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    for name, weight in vars(model).items():
        assert torch.equal(weight, vars(again)[name]), name
    assert not torch.equal(model.encoder, other.encoder)


def test_error_and_loss_by_hand() -> None:
    """One unit, two features: scaled (2, 1), unit relu(2 + 1 - 1) = 2, reconstructed 2 (0.6, 0.8) + (0, 0.5) = (1.2, 2.1)."""
    one = autoencoder.Autoencoder(
        mean=torch.tensor([1.0, 0.0]),
        std=torch.tensor([2.0, 1.0]),
        encoder=torch.tensor([[1.0], [1.0]]),
        bias=torch.tensor([-1.0]),
        decoder=torch.tensor([[3.0, 4.0]]),
        offset=torch.tensor([0.0, 0.5]),
    )
    x = torch.tensor([[5.0, 1.0]])
    expected = ((2 - 1.2) ** 2 + (1 - 2.1) ** 2) / 2
    assert float(one.error(x)) == pytest.approx(expected)
    assert float(one.loss(x, 0.1)) == pytest.approx(expected + 0.1 * 2)
    assert float(one.units(-x)) == 0.0


def test_sparsity_quiets_units_and_a_feature_that_never_varies_does_no_harm() -> None:
    x = torch.cat([features(), torch.ones(600, 1)], 1)
    loose, tight = (autoencoder.fit(x, SETTINGS.model_copy(update={"sparsity": s}), 0) for s in (0.0, 3.0))
    assert float(tight.units(x).mean()) < 0.5 * float(loose.units(x).mean())
    assert torch.isfinite(loose.error(x)).all()
    assert float(loose.error(x).mean()) < float(tight.error(x).mean())


def test_the_attack_that_knows_it_climbs_what_it_says() -> None:
    """CE - weight * error, against autograd; without a weight it is cross-entropy."""
    network, x = Curved().eval(), images(12)
    y = labelled(network, x, 3)

    def both(at: Tensor) -> tuple[Tensor, Tensor]:
        hidden = network.layers[:3]((at - 0.5) * 4)
        return hidden, network.layers[3](hidden)

    for weight in (0.0, 2.0):
        chosen = SETTINGS.model_copy(update={"epochs": 3, "evasion": weight})
        detector = autoencoder.Detector.of(both, images(200), chosen, 0, batch_size=64)
        error = detector.model.error(both(x)[0])
        expected = F.cross_entropy(network(x), y, reduction="none") - weight * error
        found = detector.evading_score(network, x, y)(x)
        assert np.allclose(found.detach().numpy(), expected.detach().numpy(), atol=1e-6)
        assert np.allclose(detector.scores(x), -error.detach().numpy(), atol=1e-6)
        errors = detector.errors(x, 0)
        assert errors["autoencoder_error"] == pytest.approx(float(error.mean()), abs=1e-6)
        control = autoencoder.shuffled(both(x)[0].detach(), 0)
        assert errors["autoencoder_error_shuffled"] == pytest.approx(float(detector.model.error(control).mean()), abs=1e-6)
