"""Measurements against closed forms: attacks on linear networks, Fréchet by matrix square root, energies by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

from ebjdat.data.batches import DeviceData
from ebjdat.data.prepared import Prepared
from ebjdat.evaluation import energy, frechet, generate, robust
from ebjdat.evaluation.frechet import ExtractorError
from ebjdat.models.wrn import WideResNet
from ebjdat.params import AttackSettings, ChainSettings, GenerateSettings
from ebjdat.samplers.starts import StartPool

N = 24


class Linear(nn.Module):
    """Ten classes, logits linear in the pixels, so that the exact L-infinity robustness of an image is known."""

    def __init__(self) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(10, 16, generator=rng))

    def forward(self, x: Tensor) -> Tensor:
        return (x - 0.5).flatten(1) @ self.weight.T

    def robust_radius(self, x: Tensor, y: Tensor) -> Tensor:
        """min_j (f_y - f_j) / |w_y - w_j|_1: exact while the box [0, 1] does not bind."""
        margins = self(x)[range(len(x)), y][:, None] - self(x)
        lengths = (self.weight[y][:, None] - self.weight[None]).abs().sum(2)
        lengths[range(len(x)), y] = math.inf
        radius = margins / lengths
        radius[range(len(x)), y] = math.inf
        return radius.min(1).values


class FixedData(DeviceData):
    """Float images as they are, where DeviceData would hold uint8."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.labels, self.device = x, y, x.device

    def unit(self, index: Tensor | slice = slice(None)) -> Tensor:
        return self.x[index]


@pytest.fixture
def linear() -> Linear:
    return Linear().eval()


@pytest.fixture
def points(linear: Linear) -> FixedData:
    """Images around mid grey with their predicted labels; the last four have wrong ones."""
    x = 0.5 + 0.2 * (torch.rand(N, 1, 4, 4, generator=torch.Generator().manual_seed(1)) - 0.5)
    y = linear(x).argmax(1)
    y[-4:] = (y[-4:] + 1) % 10
    return FixedData(x, y)


def attack_settings(eps: float, n: int = N) -> AttackSettings:
    return AttackSettings.model_validate({"eps": eps, "pgd20_step": eps / 4, "autoattack": {"n": n}, "batch_size": 10})


def test_attacks_find_exactly_what_is_not_robust(linear: Linear, points: FixedData) -> None:
    radius = linear.robust_radius(points.x, points.labels).detach()
    ordered = radius[radius > 0].sort().values
    eps = float((ordered[8] + ordered[9]) / 2)  # a radius between two examples: no ties
    assert 0.005 < eps < 0.3
    result = robust.attack(linear, points, attack_settings(eps))
    exact = int((radius > eps).sum())
    assert exact == 20 - 9
    assert result["clean_correct"] == 20
    assert result["autoattack_correct"] == exact
    assert exact <= result["pgd20_correct"] <= exact + 3  # cross-entropy does not aim at the nearest class
    assert result["autoattack_acc"] == exact / N
    assert result["clean_acc"] == 20 / N
    assert (result["n_test"], result["n_attack"]) == (N, N)


def test_attacks_leave_the_model_as_it_was(linear: Linear, points: FixedData) -> None:
    linear.train()
    robust.pgd_examples(linear, points.x, points.labels, attack_settings(0.05))
    assert linear.training
    assert linear.weight.requires_grad


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_within_sees_what_leaves_the_budget(norm: str) -> None:
    settings = AttackSettings.model_validate({"norm": norm, "eps": 0.1, "pgd20_step": 0.02, "autoattack": {"n": 0}})
    x = torch.full((2, 1, 2, 2), 0.5)
    one = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    assert robust.within(x + 0.1 * one, x, settings)
    assert not robust.within(x + 0.101 * one, x, settings)
    everywhere = x + 0.06  # L2 length 0.12
    assert robust.within(everywhere, x, settings) == (norm == "Linf")
    assert not robust.within(torch.full_like(x, 1.001), torch.ones_like(x), settings)


def test_a_network_with_fixed_output_is_noticed(points: FixedData) -> None:
    """AutoAttack's own checks run and their warnings reach the result: here, logits that look like probabilities."""
    model = nn.Sequential(Linear(), nn.Softmax(1)).eval()
    _, warned = robust.autoattack_examples(model, points.x[:4], points.labels[:4], attack_settings(0.01))
    assert any("probability distribution" in text for text in warned), warned


def test_too_few_classes_for_targeted_attacks_are_refused(points: FixedData) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval()
    with pytest.raises(robust.AttackError, match="at least 4 classes"):
        robust.autoattack_examples(model, points.x[:4], points.labels[:4] % 3, attack_settings(0.01))


def test_frechet_distance_against_the_matrix_square_root() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(500, 6)) @ rng.normal(size=(6, 6))
    b = rng.normal(size=(400, 6)) @ rng.normal(size=(6, 6)) + 1
    sa, sb = np.cov(a.T), np.cov(b.T)
    root = scipy.linalg.sqrtm(sa @ sb).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(sa + sb - 2 * root)
    assert frechet.frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_reference_features_are_what_the_head_reads(network: WideResNet, digits: Prepared) -> None:
    network.eval()
    images = torch.from_numpy(digits.images[:30])
    found = frechet.reference_features(network, GenerateSettings(n=2, steps=1, batch_size=7), torch.device("cpu"))(images)
    with torch.no_grad():
        logits = network(images.float() / 127.5 - 1)
        assert torch.allclose(network.head(torch.from_numpy(found).float()), logits, atol=1e-4)


def test_inception_without_weights_is_a_clear_error_or_a_named_fallback(
    tmp_path: Path, network: WideResNet, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "weights.pth"
    broken.write_bytes(b"not weights")
    wanted = GenerateSettings(n=2, steps=1, extractor="inception", inception_weights=str(broken))
    with pytest.raises(ExtractorError, match=r"weights of Inception cannot be had from .*weights\.pth.*'reference'"):
        frechet.choose_extractor(network, wanted, torch.device("cpu"), 3)
    name, _ = frechet.choose_extractor(network, wanted.model_copy(update={"extractor": "auto"}), torch.device("cpu"), 3)
    assert name == "reference"
    assert "it is no FID" in capsys.readouterr().out
    grey = wanted.model_copy(update={"extractor": "auto", "inception_weights": None})
    assert frechet.choose_extractor(network, grey, torch.device("cpu"), 1)[0] == "reference"


def test_inception_features_from_a_weights_file(tmp_path: Path, network: WideResNet, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch-fidelity's own network with random weights from a file: the whole path but the published numbers."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with monkeypatch.context() as patch:  # build one without weights, to have a file of the right tensors
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: {})
        random = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    torch.save(random.state_dict(), tmp_path / "weights.pth")
    settings = GenerateSettings(n=2, steps=1, extractor="inception", inception_weights=str(tmp_path / "weights.pth"), batch_size=2)
    name, features = frechet.choose_extractor(network, settings, torch.device("cpu"), 3)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert name == "inception"
    assert features(images).shape == (3, 2048)
    assert np.allclose(features(images)[:2], random(images[:2])[0].detach().numpy(), atol=1e-5)


def test_fresh_chains_are_deterministic_labelled_and_start_where_they_say(
    network: WideResNet, digits: Prepared, train_data: DeviceData
) -> None:
    pool = StartPool.of(train_data, torch.from_numpy(digits.class_mean))
    settings = GenerateSettings(n=45, steps=2, batch_size=20)
    (first, starts), (again, _) = (generate.fresh_chains(network, pool, ChainSettings(step_size=1e-6), settings) for _ in range(2))
    assert (first.images.int() - starts.images.int()).abs().max() <= 1  # such steps end where they start
    assert torch.equal(first.images, again.images)
    assert first.images.shape == (45, 1, 8, 8)
    assert first.labels.tolist() == [i % 10 for i in range(45)]
    distance = ((first.images.float()[:, None] / 127.5 - 1 - pool.mean[None]) ** 2).flatten(2).sum(2)
    assert (distance.argmin(1) == first.labels).float().mean() > 0.75
    other, _ = generate.fresh_chains(network, pool, ChainSettings(step_size=0.2), settings)
    assert not torch.equal(first.images, other.images)


def test_landscape_by_hand() -> None:
    clean, adversarial, generated = np.array([-5.0, -3.0]), np.array([-4.0, -5.0]), np.array([-1.0, -2.0, -3.0])
    found = energy.landscape(clean, adversarial, generated)
    assert found["energy_gap_adversarial"] == pytest.approx((1 + 2) / 2)
    assert found["energy_shift_adversarial"] == pytest.approx((1 - 2) / 2)
    assert found["energy_gap_generated"] == pytest.approx(2.0)
    assert found["energy_shift_generated"] == pytest.approx(2.0)
    assert found["energy_gap_adversarial_se"] == pytest.approx(np.std([1, 2], ddof=1) / 2**0.5)
    assert found["energy_gap_generated_se"] == pytest.approx((2 / 2 + 1 / 3) ** 0.5)
    assert found["energy_wasserstein_adversarial"] == pytest.approx((0 + 1) / 2)  # sorted: (-5, -5), (-4, -3)


def test_overlap_of_histograms() -> None:
    a = np.linspace(0, 1, 1000)
    assert energy.overlap(a, a) == pytest.approx(1)
    assert energy.overlap(a, a + 5) == 0
    assert energy.overlap(a, a + 0.5) == pytest.approx(0.5, abs=0.03)
    assert energy.overlap(np.ones(3), np.ones(4)) == 1


def test_energies_of_a_network_by_hand(linear: Linear, points: FixedData) -> None:
    marginal, joint = energy.energies(linear, points.x, points.labels, batch_size=7)
    logits = linear(points.x).detach().double().numpy()
    assert marginal == pytest.approx(-np.log(np.exp(logits).sum(1)), rel=1e-6)
    assert joint == pytest.approx(-logits[np.arange(N), points.labels.numpy()], rel=1e-6)
