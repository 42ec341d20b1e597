"""Stage `reliability` on real files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import log_loss
from torch import Tensor

from ebjdat.evaluation import calibration, detection, robust
from ebjdat.files import read_json
from ebjdat.metrics import describe
from ebjdat.models.modes import UnitRange
from ebjdat.settings import load
from ebjdat.stages import reliability
from ebjdat.stages.context import Context
from ebjdat.training import checkpoint

from ..chain import Chain
from ..conftest import ROOT
from ..evaluation.test_calibration import slow_ece


def test_the_stage_measures_the_test_split_under_the_trained_network(chain: Chain, here: Path) -> None:
    """A classifier's, twice."""
    overrides = [str(ROOT / "params/overrides/ci.yaml"), "evaluation.reliability.batch_size=64"]
    context, weights, data = Context(load(ROOT / "params/digits.yaml", overrides), "test"), chain.weights("clean"), chain.data
    for folder in "ab":
        reliability.run(context, chain.task("reliability", here / folder, weights, "classifier"))
    result, again = (read_json(here / folder / "reliability.json") for folder in "ab")
    assert result == again
    assert Image.open(here / "a/reliability.png").width > 400

    model = UnitRange(checkpoint.load(weights).network(torch.device("cpu"))).eval()
    images, labels = data.split("test")
    x, y = torch.from_numpy(images).float() / 255, torch.from_numpy(labels)

    def logits(at: Tensor) -> np.ndarray:
        with torch.no_grad():
            return model(at).double().numpy()

    values = np.load(here / "a/reliability.npz", allow_pickle=False)
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
    checkpoint.save(replace(loaded, weights={**loaded.weights, **heads}), here / "large.safetensors")
    reliability.run(context, chain.task("reliability", here / "b", here / "large.safetensors", "classifier"))
    found, others = read_json(here / "b/reliability.json"), np.load(here / "b/reliability.npz", allow_pickle=False)
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


def test_an_autoencoder_stands_beside_energy_also_under_an_attack_that_knows_it(chain: Chain) -> None:
    """Each AUROC from the scores that are kept; the attack lowers what the detector goes by."""
    found = read_json(chain.experiment / "reliability.json")
    values = np.load(chain.experiment / "reliability.npz", allow_pickle=False)
    assert found["autoencoder_error"] < found["autoencoder_error_shuffled"]
    for name in chain.context.profile.evaluation.attack.protocols:
        clean, moved, evading = (values[f"{kind}_{name}_autoencoder"] for kind in ("clean", "adversarial", "evading"))
        assert found["autoencoder_error"] == pytest.approx(-clean.mean(), abs=1e-6) or name == "released"  # with its noise
        assert found[f"detect_auroc_autoencoder_{name}"] == detection.auroc(clean, moved)
        assert found[f"detect_auroc_evaded_autoencoder_{name}"] == detection.auroc(clean, evading)
        assert evading.mean() > moved.mean()
        assert 0 <= found[f"detect_evaded_acc_{name}"] <= 1
