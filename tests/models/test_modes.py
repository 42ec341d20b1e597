"""Temporary modes are restored."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ebjdat.models.modes import UnitRange, frozen_parameters
from ebjdat.models.wrn import WideResNet


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_moving_images_restores_everything(mode: str, network: WideResNet) -> None:
    network.train()
    network.head.weight.requires_grad_(False)
    before = {k: v.clone() for k, v in network.state_dict().items() if "num_batches" not in k}
    flags = [p.requires_grad for p in network.parameters()]
    momenta = [m.momentum for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]

    def use() -> None:
        with frozen_parameters(network, mode):
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
        with frozen_parameters(network, mode):
            outputs[mode] = network(x).detach()
    assert not torch.allclose(outputs["train"], outputs["eval"])


def test_unit_range_is_the_only_conversion(network: WideResNet) -> None:
    network.eval()
    x = torch.rand(3, 1, 8, 8)
    assert torch.equal(UnitRange(network).eval()(x), network(x * 2 - 1))
