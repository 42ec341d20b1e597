"""Calibration and detection against loops, closed forms and simulations; the stage on real files."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import norm
from sklearn.metrics import brier_score_loss, log_loss
from torch import Tensor

from ebjdat import settings as params
from ebjdat.data import prepared, sources
from ebjdat.errors import DataError
from ebjdat.evaluation import calibration, detection, ood, robust
from ebjdat.files import read_json
from ebjdat.metrics import describe
from ebjdat.models.modes import UnitRange
from ebjdat.models.wrn import WideResNet
from ebjdat.settings import DataSettings, ParamsError, ReliabilitySettings
from ebjdat.stages import reliability, train
from ebjdat.stages.context import Context, Task
from ebjdat.training import checkpoint

from .conftest import ROOT
from .test_evaluation import Linear

DIGITS = DataSettings(source="digits", test=497, validation=130)


def drawn(n: int, classes: int, temperature: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and labels drawn from softmax(logits / temperature)."""
    rng = np.random.default_rng(seed)
    logits = 3 * rng.normal(size=(n, classes))
    p = np.exp(logits / temperature)
    p /= p.sum(1, keepdims=True)
    return logits, (p.cumsum(1) < rng.random((n, 1))).sum(1)


def slow_ece(p: np.ndarray, labels: np.ndarray, bins: int) -> float:
    total = 0.0
    for k in range(bins):
        inside = [i for i in range(len(p)) if k / bins < max(p[i]) <= (k + 1) / bins]
        if inside:
            accuracy = sum(p[i].argmax() == labels[i] for i in inside) / len(inside)
            confidence = sum(max(p[i]) for i in inside) / len(inside)
            total += len(inside) / len(p) * abs(accuracy - confidence)
    return total


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_error_against_a_loop(bins: int) -> None:
    logits, labels = drawn(400, 5, temperature=2.0)
    p = calibration.probabilities(logits)
    found = calibration.expected_calibration_error(calibration.reliability_curve(p, labels, bins))
    assert found == pytest.approx(slow_ece(p, labels, bins), abs=1e-12)
    assert found > 0.05


def test_a_reliability_curve_by_hand() -> None:
    """0.9 right, 0.9 wrong, 0.6 right; and one half, which belongs to the lower of two bins."""
    p = np.array([[0.9, 0.1], [0.1, 0.9], [0.6, 0.4]])
    curve = calibration.reliability_curve(p, np.array([0, 0, 0]), 10)
    assert calibration.expected_calibration_error(curve) == pytest.approx(2 / 3 * 0.4 + 1 / 3 * 0.4)
    assert np.flatnonzero(curve["share"]).tolist() == [5, 8]
    assert curve["share"][[5, 8]] == pytest.approx([1 / 3, 2 / 3])
    assert curve["accuracy"][[5, 8]].tolist() == [1.0, 0.5]
    assert np.isnan(curve["accuracy"][0])
    z2 = norm.ppf(0.975) ** 2
    half = z2**0.5 * math.sqrt(0.25 / 2 + z2 / 16) / (1 + z2 / 2)  # Wilson for 1 of 2
    assert (curve["low"][8], curve["high"][8]) == pytest.approx((0.5 - half, 0.5 + half))
    assert calibration.reliability_curve(np.full((1, 2), 0.5), np.array([0]), 2)["share"].tolist() == [1.0, 0.0]


def test_likelihood_and_brier_score_against_scikit_learn() -> None:
    logits, labels = drawn(200, 4, temperature=1.0)
    p = calibration.probabilities(logits, 1.7)
    assert p == pytest.approx(np.exp(logits / 1.7) / np.exp(logits / 1.7).sum(1, keepdims=True))
    assert calibration.negative_log_likelihood(logits, labels, 1.7) == pytest.approx(log_loss(labels, p))
    assert calibration.brier_score(p, labels) == pytest.approx(sum(brier_score_loss(labels == k, p[:, k]) for k in range(4)))


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_the_temperature_that_labels_were_drawn_at_is_found(temperature: float) -> None:
    logits, labels = drawn(20_000, 6, temperature)
    found = calibration.fit_temperature(logits, labels)
    assert found == pytest.approx(temperature, rel=0.04)  # 20,000 samples: standard error about 1 %
    assert found is not None
    around = [calibration.negative_log_likelihood(logits, labels, found * f) for f in (0.99, 1.0, 1.01)]
    assert around[1] == min(around)


def test_without_a_minimum_there_is_no_temperature() -> None:
    sure = 5 * np.eye(4)
    assert calibration.fit_temperature(sure, np.arange(4)) is None  # no error: ever colder
    assert calibration.fit_temperature(sure, (np.arange(4) + 1) % 4) is None  # nothing right: ever hotter
    result, curves = calibration.measure(sure, np.arange(4), 2.0, 15)
    assert result["nll"] == pytest.approx(math.log(1 + 3 * math.exp(-5)))
    assert result["nll_scaled"] == pytest.approx(math.log(1 + 3 * math.exp(-2.5)))
    assert list(curves) == ["as trained", "temperature scaled"]


def test_auroc_is_the_share_of_pairs_in_order() -> None:
    rng = np.random.default_rng(0)
    inside, outside = rng.integers(0, 8, 40).astype(float), rng.integers(-3, 5, 30).astype(float)  # with ties
    pairs = [(a > b) + 0.5 * (a == b) for a in inside for b in outside]
    assert detection.auroc(inside, outside) == pytest.approx(np.mean(pairs))
    assert detection.auroc(outside, inside) == pytest.approx(1 - np.mean(pairs))


@pytest.mark.parametrize("area", [0.75, 0.96])
def test_the_interval_holds_the_true_area_as_often_as_it_says(area: float) -> None:
    rng = np.random.default_rng(0)
    shift, held = math.sqrt(2) * norm.ppf(area), 0
    for _ in range(500):
        found = detection.separation(rng.normal(shift, size=60), rng.normal(size=40), "a")
        held += found["a_low"] <= area <= found["a_high"]
    assert 0.925 <= held / 500 <= 0.995  # nominal 0.95, more near 1; 500 samples: standard error 0.01


def test_the_interval_against_a_bootstrap_and_at_its_ends() -> None:
    rng = np.random.default_rng(1)
    inside, outside = rng.normal(1.0, size=200), rng.normal(size=150)
    areas = [detection.auroc(rng.choice(inside, 200), rng.choice(outside, 150)) for _ in range(600)]
    found = detection.separation(inside, outside, "a")
    assert (found["a_low"], found["a_high"]) == pytest.approx(np.quantile(areas, [0.025, 0.975]), abs=0.015)
    low, high = detection.auroc_interval(1.0, 50, 50)
    assert 0.9 < low < 0.98
    assert high == 1.0
    assert (1 - low) ** 2 == pytest.approx(
        norm.ppf(0.975) ** 2 * low * (1 - low) * (1 + 49 * ((1 - low) / (2 - low) + low / (1 + low))) / 2500
    )
    assert detection.auroc_interval(0.0, 50, 50) == pytest.approx((0.0, 1 - low))


def test_scores_of_a_linear_network_in_closed_form() -> None:
    """d logsumexp(W x + b) / dx = W^T softmax."""
    linear = Linear()
    x = torch.rand(7, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    logits = detection.logits_of(linear, x, batch_size=3)
    scores = detection.logit_scores(logits)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert scores["energy"] == pytest.approx(np.log(np.exp(logits).sum(1)))
    assert scores["max_probability"] == pytest.approx(p.max(1))
    expected = -np.linalg.norm(p @ linear.weight.detach().double().numpy(), axis=1)
    assert detection.gradient_norm(linear, x, batch_size=3) == pytest.approx(expected, rel=1e-5)
    assert linear.weight.requires_grad
    assert linear.training


def test_gradient_norm_against_the_jacobian(network: WideResNet) -> None:
    """In [0, 1] pixels, in eval mode whatever mode the network is in."""
    x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    found = detection.gradient_norm(UnitRange(network).train(), x, batch_size=2)
    network.eval()
    for i in range(3):
        jacobian = torch.autograd.functional.jacobian(lambda at: network(2 * at - 1).logsumexp(1), x[i : i + 1])
        assert isinstance(jacobian, Tensor)
        assert found[i] == pytest.approx(-float(jacobian.norm()), rel=1e-4)


@pytest.fixture
def x() -> Tensor:
    """Colour images whose pixels all differ."""
    return torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def test_made_sets(x: Tensor) -> None:
    found, missing = ood.choose(x, DIGITS, ReliabilitySettings(ood=ood.MADE))
    again, _ = ood.choose(x, DIGITS, ReliabilitySettings(ood=ood.MADE))
    other, _ = ood.choose(x, DIGITS, ReliabilitySettings(ood=ood.MADE, seed=1))
    assert missing == {}
    assert list(found) == ["noise", "inverted", "shuffled"]
    for name, images in found.items():
        assert images.shape == x.shape
        assert 0 <= images.min() < images.max() <= 1
        assert torch.equal(images, again[name])
        assert torch.equal(images, other[name]) == (name == "inverted")
    assert torch.equal(found["inverted"], 1 - x)
    noise = ood.noise(torch.zeros(100, 1, 8, 8), ood.OODSource("", None, False, 0)).flatten()
    assert (float(noise.mean()), float(noise.std())) == pytest.approx((0.5, 12**-0.5), abs=0.02)  # 6,400 draws


def test_shuffled_images_keep_their_pixels_whole(x: Tensor) -> None:
    moved = ood.shuffled(x, ood.OODSource("", None, False, 0))

    def pixels(image: Tensor) -> list[Any]:
        return image.flatten(1).T.tolist()  # (H W, C)

    orders = []
    for before, after in zip(x, moved, strict=True):
        assert sorted(pixels(before)) == sorted(pixels(after))
        orders.append([pixels(before).index(pixel) for pixel in pixels(after)])
    assert all(orders[0] != order for order in orders[1:])
    assert all(sorted(order) == list(range(64)) != order for order in orders)


@pytest.mark.parametrize("channels", [1, 3])
def test_other_sets_are_brought_to_the_images_shape(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One colour per image, so that scaling changes nothing; grey as Pillow has it."""
    colours = np.random.default_rng(0).integers(0, 256, (9, 3), dtype=np.uint8)
    images = np.broadcast_to(colours[:, :, None, None], (9, 3, 32, 32)).copy()
    monkeypatch.setattr(sources, "torchvision_split", lambda *_: (images, np.zeros(9, np.int64), ("a",)))
    x = torch.zeros(6, channels, 8, 8)
    found, _ = ood.choose(x, DIGITS, ReliabilitySettings(ood="svhn"))
    assert found["svhn"].shape == x.shape
    seen = {tuple(np.rint(255 * image[:, 0, 0].numpy()).astype(int)) for image in found["svhn"]}
    grey = np.asarray(Image.fromarray(colours[None]).convert("L"))[0][:, None]
    assert len(seen) == 6
    assert seen <= {tuple(c) for c in (colours if channels == 3 else grey).astype(int).tolist()}


def test_a_folder_is_read_from_its_test_images(tmp_path: Path) -> None:
    for split, level in (("train", 0), ("test", 200)):
        for label in ("a", "b"):
            (tmp_path / split / label).mkdir(parents=True)
            Image.fromarray(np.full((12, 12), level, np.uint8)).save(tmp_path / split / label / "1.png")
    found, missing = ood.choose(torch.zeros(5, 1, 8, 8), DIGITS, ReliabilitySettings(ood_path=str(tmp_path)))
    assert list(found) == [*ood.MADE, "folder"]
    assert missing == {}
    assert torch.equal(found["folder"], torch.full((2, 1, 8, 8), 200 / 255))
    for label in ("a", "b"):
        Image.fromarray(np.eye(12, dtype=np.uint8)).save(tmp_path / "test" / label / "1.png")
    with pytest.raises(DataError, match="no pixel is above 1"):
        ood.choose(torch.zeros(5, 1, 8, 8), DIGITS, ReliabilitySettings(ood_path=str(tmp_path)))


def test_what_auto_cannot_have_is_named_and_what_was_asked_for_is_an_error(x: Tensor, tmp_path: Path) -> None:
    """torchvision itself, on an empty folder: it is left empty, so nothing was fetched."""
    data = DataSettings(source="cifar100", validation=5000, root=str(tmp_path))
    found, missing = ood.choose(x, data, ReliabilitySettings())
    assert list(found) == list(ood.MADE)
    assert missing["svhn"] == f"not available: SVHN is missing or incomplete under {str(tmp_path)!r}"
    assert "ood_path" in missing["folder"]
    assert set(missing) == {"svhn", "folder"}  # cifar100 is the data itself
    assert list(tmp_path.iterdir()) == []
    assert list(ood.choose(x[:, :1], DIGITS, ReliabilitySettings())[0]) == list(ood.MADE)
    for asked in ("folder", "auto"):  # a path asks for what is there
        with pytest.raises(DataError, match=r"ood: 'folder' cannot be had: 'nowhere': there is no such folder"):
            ood.choose(x, data, ReliabilitySettings(ood=asked, ood_path="nowhere"))


def test_a_set_asked_for_by_name_may_be_fetched_and_auto_fetches_nothing(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def absent(name: str, split: str, root: str, download: bool) -> None:
        asked.append((name, split, download))
        raise RuntimeError("no network")

    monkeypatch.setattr(sources, "torchvision_split", absent)
    ood.choose(x, DIGITS, ReliabilitySettings())
    with pytest.raises(DataError, match=r"'cifar10' cannot be had: CIFAR10 is missing .* could not be downloaded: no network"):
        ood.choose(x, DIGITS, ReliabilitySettings(ood=("noise", "cifar10")))
    assert asked == [("SVHN", "test", False), ("CIFAR100", "test", False), ("CIFAR10", "test", True)]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("ood=svnh", "did you mean 'svhn'"),
        ("ood=[auto,noise]", "not both"),
        ("ood=folder", "needs `ood_path`"),
        ("{ood: [noise], ood_path: x}", "is for ood 'folder'"),
        ("n=498", "reliability.n: 498 is more than the test split has"),
    ],
)
def test_settings_that_cannot_be(override: str, expected: str) -> None:
    text = f"evaluation.reliability{'=' if override.startswith('{') else '.'}{override}"
    with pytest.raises(ParamsError, match="1 problem ") as caught:
        params.load(ROOT / "params/digits.yaml", [text])
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("profile", "override", "expected"),
    [
        ("cifar100", "evaluation.reliability.ood=cifar100", "'cifar100' is what the networks are trained on"),
        ("cifar10-folder", "evaluation.reliability.ood_path=datasets/cifar10-jpeg.tar.xz", "is data.path"),
    ],
)
def test_the_data_itself_is_not_out_of_distribution(profile: str, override: str, expected: str) -> None:
    with pytest.raises(ParamsError, match=expected):
        params.load(ROOT / f"params/{profile}.yaml", [override])


def test_the_stage_measures_the_test_split_under_the_trained_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EBJDAT_TRACKING", "0")
    overrides = [str(ROOT / "params/overrides/ci.yaml"), "evaluation.reliability.batch_size=64"]
    context = Context(params.load(ROOT / "params/digits.yaml", overrides), "test")
    data, card = prepared.prepare(context.profile.data)
    prepared.save(data, card, tmp_path / "data.npz", tmp_path / "card.json")
    weights = tmp_path / "clean.safetensors"
    train.pretrain(context, "clean", 0, tmp_path / "data.npz", train.Outputs(weights, tmp_path / "c.json", tmp_path / "c.csv"), None)
    files = {"out": "reliability.json", "values": "reliability.npz", "figure": "reliability.png"}
    outputs = [{name: tmp_path / folder / file for name, file in files.items()} for folder in "ab"]
    for out in outputs:
        reliability.run(context, Task("classifier", 0, {"data": tmp_path / "data.npz", "weights": weights}, out))
    result, again = (read_json(out["out"]) for out in outputs)
    assert result == again
    assert Image.open(outputs[0]["figure"]).width > 400

    model = UnitRange(checkpoint.load(weights).network(torch.device("cpu"))).eval()
    images, labels = data.split("test")
    x, y = torch.from_numpy(images).float() / 255, torch.from_numpy(labels)

    def logits(at: Tensor) -> np.ndarray:
        with torch.no_grad():
            return model(at).double().numpy()

    values = np.load(outputs[0]["values"], allow_pickle=False)
    plain = logits(x)
    assert np.allclose(values["logits"], plain, atol=1e-4)
    for suffix, t in (("", 1.0), ("_scaled", result["temperature"])):
        p = np.exp(plain / t) / np.exp(plain / t).sum(1, keepdims=True)
        assert result[f"ece{suffix}"] == pytest.approx(slow_ece(p, labels, 15), abs=1e-4)
        assert result[f"nll{suffix}"] == pytest.approx(log_loss(labels, p, labels=range(10)), abs=1e-4)
        assert result[f"brier{suffix}"] == pytest.approx(((p - np.eye(10)[labels]) ** 2).sum(1).mean(), abs=1e-4)
    held, held_labels = data.split("validation")
    held_logits = logits(torch.from_numpy(held).float() / 255)
    grid = np.geomspace(0.1, 10, 2000)  # steps of 0.23 %
    nll = [log_loss(held_labels, calibration.probabilities(held_logits, t), labels=range(10)) for t in grid[::20]]
    assert result["temperature_fitted"] is True
    assert result["temperature"] == pytest.approx(grid[::20][np.argmin(nll)], rel=0.05)
    assert (result["n_calibration"], result["n_temperature"], result["ece_bins"]) == (100, 130, 15)

    def share_in_order(inside: np.ndarray, outside: np.ndarray) -> float:
        return float(np.mean((inside[:, None] > outside) + 0.5 * (inside[:, None] == outside)))

    energy = np.log(np.exp(plain).sum(1))
    inverted = np.log(np.exp(logits(1 - x)).sum(1))
    assert np.allclose(values["ood_inverted_energy"], inverted, atol=1e-4)
    assert result["ood_auroc_energy_inverted"] == pytest.approx(share_in_order(energy, inverted), abs=1e-3)
    for score in ("energy", "max_probability", "gradient_norm"):
        for name in ("noise", "inverted", "shuffled"):
            key = f"ood_auroc_{score}_{name}"
            assert result[key] == pytest.approx(share_in_order(values[f"test_{score}"], values[f"ood_{name}_{score}"]))
            assert 0 <= result[f"{key}_low"] <= result[key] <= result[f"{key}_high"] <= 1
    assert [result[f"n_ood_{name}"] for name in ("in", "noise", "inverted", "shuffled")] == [100] * 4
    assert result["ood_missing"] == {}
    assert result["n_calibration_not_finite"] == 0

    # the same network with logits so large that fp32 cannot hold those of half the images
    loaded = checkpoint.load(weights)
    large = float(torch.finfo(torch.float32).max / np.median(np.abs(plain).max(1)))
    heads = {name: loaded.weights[name] * large for name in ("head.weight", "head.bias")}
    checkpoint.save(replace(loaded, weights={**loaded.weights, **heads}), tmp_path / "large.safetensors")
    inputs = {"data": tmp_path / "data.npz", "weights": tmp_path / "large.safetensors"}
    reliability.run(context, Task("classifier", 0, inputs, outputs[1]))
    found, others = read_json(outputs[1]["out"]), np.load(outputs[1]["values"], allow_pickle=False)
    assert 30 < found["n_calibration_not_finite"] < 70
    assert found["n_calibration"] == found["n_ood_in"] == len(others["labels"]) == 100 - found["n_calibration_not_finite"]
    kept = np.abs(plain).max(1) * large < 0.99 * torch.finfo(torch.float32).max
    assert abs(kept.sum() - found["n_calibration"]) <= 3
    assert np.isfinite(others["logits"]).all()
    assert found["n_detect_standard"] <= found["n_calibration"]

    attack = context.profile.evaluation.attack
    assert list(attack.protocols) == ["standard", "released", "standard_l2"]
    for name, protocol in attack.protocols.items():
        seen = robust.apply_protocol_noise(protocol, x, attack.seed)
        moved = robust.pgd_examples(model, seen, y, protocol, attack.seed, attack.batch_size)
        assert torch.equal(seen, x) == (name != "released")
        clean, adversarial = (np.log(np.exp(logits(points)).sum(1)) for points in (seen, moved))
        assert np.allclose(values[f"clean_{name}_energy"], clean, atol=1e-4)
        assert np.allclose(values[f"adversarial_{name}_energy"], adversarial, atol=1e-3)
        assert result[f"detect_auroc_energy_{name}"] == pytest.approx(share_in_order(clean, adversarial), abs=2e-3)
        assert result[f"n_detect_{name}"] == 100

    assert {describe(key, attack.protocols).stage for key in result} == {"reliability", "provenance"}
