"""Network shapes for every supported input, energies by hand, and that temporary modes are put back."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ebjdat.models.energy import joint_energy, marginal_energy
from ebjdat.models.modes import UnitRange, moving_images
from ebjdat.models.wrn import WideResNet, build
from ebjdat.params import ModelSettings

# Parameters in millions, from a count by hand of the published architecture at 32x32x3 and 10 classes.
PUBLISHED = {(10, 1): 0.08, (10, 2): 0.30, (16, 4): 2.75, (28, 10): 36.5}


@pytest.mark.parametrize(("depth", "width"), PUBLISHED)
def test_parameter_counts_are_the_published_ones(depth: int, width: int) -> None:
    with torch.device("meta"):
        model = WideResNet(ModelSettings(depth=depth, width=width), 3, 10)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(PUBLISHED[depth, width], rel=0.04)


@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 9), (3, 32), (1, 33), (3, 64)])
def test_any_square_input_of_at_least_8_pixels(norm: str, channels: int, size: int) -> None:
    model = build(ModelSettings.model_validate({"depth": 10, "width": 1, "norm": norm}), channels, 7, 0)
    x = torch.rand(2, channels, size, size) * 2 - 1
    assert model(x).shape == (2, 7)
    assert model.features(x).shape == (2, 64)
    assert torch.equal(model(x), model.trunk(model.stem(x)))
    assert torch.equal(model(x), model.head(model.features(x)))
    assert any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules()) == (norm == "batch")


def test_initialisation_depends_on_the_seed_alone() -> None:
    settings = ModelSettings(depth=10, width=1)
    first = build(settings, 1, 10, 3).state_dict()
    torch.rand(5)
    again, other = build(settings, 1, 10, 3).state_dict(), build(settings, 1, 10, 4).state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["stem.weight"], other["stem.weight"])


def test_energies_by_hand() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 1000.0]])
    by_hand = [-math.log(math.exp(1) + math.exp(2) + math.exp(3)), -1000.0]
    assert marginal_energy(logits).tolist() == pytest.approx(by_hand, rel=1e-6)
    assert joint_energy(logits, torch.tensor([0, 2])).tolist() == [-1.0, -1000.0]


def test_joint_and_marginal_energy_give_the_classifier() -> None:
    """p(y|x) = exp(E(x) - E(x, y)) is the softmax."""
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 1, 2, 3, 0])
    found = (marginal_energy(logits) - joint_energy(logits, y)).exp()
    assert torch.allclose(found, logits.softmax(1)[torch.arange(5), y], atol=1e-6)  # float32


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_moving_images_restores_everything(mode: str, network: WideResNet) -> None:
    network.train()
    network.head.weight.requires_grad_(False)
    before = {k: v.clone() for k, v in network.state_dict().items() if "num_batches" not in k}
    flags = [p.requires_grad for p in network.parameters()]
    momenta = [m.momentum for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]

    def use() -> None:
        with moving_images(network, mode):
            assert network.training == (mode == "train")
            assert not any(p.requires_grad for p in network.parameters())
            network(torch.rand(4, 1, 8, 8))
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        use()
    assert network.training
    assert [p.requires_grad for p in network.parameters()] == flags
    assert [m.momentum for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)] == momenta
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items() if k in before)


def test_train_mode_uses_the_statistics_of_the_batch(network: WideResNet) -> None:
    x = torch.rand(8, 1, 8, 8) * 2 - 1
    outputs: dict[str, Tensor] = {}
    for mode in ("train", "eval"):
        with moving_images(network, mode):
            outputs[mode] = network(x).detach()
    assert not torch.allclose(outputs["train"], outputs["eval"])


def test_unit_range_is_the_only_conversion(network: WideResNet) -> None:
    network.eval()
    x = torch.rand(3, 1, 8, 8)
    assert torch.equal(UnitRange(network).eval()(x), network(x * 2 - 1))
