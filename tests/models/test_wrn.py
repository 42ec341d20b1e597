"""Network shapes for every supported input, and the JEM family's variant from its definition."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ebjdat.bench.measure import FlopCount
from ebjdat.models.wrn import WideResNet, build
from ebjdat.settings import ModelSettings

# Logits of the first image in test_the_jem_familys_network_from_its_definition.
EVAL_LOGITS = [52.12033267912046, 224.7577903066674, 255.29400955907425]


TRAIN_LOGITS = [-0.7235747846562683, 0.4196215843726151, 1.2886509022486268]


# Parameters in millions, from a count by hand of the published architecture at 32x32x3 and 10 classes.
PUBLISHED = {(10, 1): 0.08, (10, 2): 0.30, (16, 4): 2.75, (28, 10): 36.5}


@pytest.mark.parametrize(("depth", "width"), PUBLISHED)
def test_parameter_counts_are_the_published_ones(depth: int, width: int) -> None:
    with torch.device("meta"):
        model = WideResNet(ModelSettings(depth=depth, width=width), 3, 10)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(PUBLISHED[depth, width], rel=0.04)


def waved(model: nn.Module) -> None:
    """Parameters and running statistics that follow from their names' order alone."""
    for i, (name, value) in enumerate(model.state_dict().items()):
        if not name.endswith("num_batches_tracked"):
            wave = torch.cos(0.7 * torch.arange(value.numel(), dtype=torch.float64) + i).view(value.shape)
            at = 1 if "norm" in name and name.endswith(("weight", "running_var")) else 0
            size = 0.2 if value.ndim == 1 else 2 / value[0].numel() ** 0.5
            value.copy_(at + size * wave)


class FromDefinition:
    """The JEM family's network in NumPy and float64, from its definition: a block normalises, activates and convolves twice, the
    second time with its stride, and adds its input, convolved (1x1, the same stride) where the shape changes."""

    def __init__(self, state: dict[str, Tensor], train: bool) -> None:
        self.state = {name: value.double().numpy() for name, value in state.items()}
        self.train, self.slope, self.after = train, 0.2, {}

    def conv(self, x: NDArray[np.float64], name: str, stride: int = 1) -> NDArray[np.float64]:
        w, b = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        k = w.shape[-1]
        x = np.pad(x, ((0, 0), (0, 0), (k // 2, k // 2), (k // 2, k // 2)))
        n = (x.shape[-1] - k) // stride + 1
        out = np.empty((len(x), len(w), n, n))
        for i in range(n):
            for j in range(n):
                out[:, :, i, j] = np.einsum("bihw,oihw->bo", x[:, :, i * stride : i * stride + k, j * stride : j * stride + k], w) + b
        return out

    def normed(self, x: NDArray[np.float64], name: str) -> NDArray[np.float64]:
        """Batch norm and leaky ReLU; in train mode the running statistics that follow: a tenth of the old, the rest new."""
        s = {part: self.state[f"{name}.{part}"] for part in ("weight", "bias", "running_mean", "running_var")}
        mean, var = s["running_mean"], s["running_var"]
        if self.train:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
            self.after[f"{name}.running_mean"] = 0.1 * s["running_mean"] + 0.9 * mean
            self.after[f"{name}.running_var"] = 0.1 * s["running_var"] + 0.9 * x.var((0, 2, 3), ddof=0) * x[:, 0].size / (x[:, 0].size - 1)
        at = (None, slice(None), None, None)
        x = (x - mean[at]) / np.sqrt(var[at] + 1e-5) * s["weight"][at] + s["bias"][at]
        return np.where(x > 0, x, self.slope * x)

    def logits(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        h = self.conv(x, "stem")
        for block, stride in enumerate((1, 2, 2)):
            name = f"blocks.{block}"
            inner = self.conv(self.normed(h, f"{name}.norm1"), f"{name}.conv1")
            inner = self.conv(self.normed(inner, f"{name}.norm2"), f"{name}.conv2", stride)
            h = inner + (h if block == 0 else self.conv(h, f"{name}.shortcut", stride))
        pooled = self.normed(h, "norm").mean((2, 3))
        return pooled @ self.state["head.weight"].T + self.state["head.bias"]


@pytest.mark.parametrize(("mode", "fixed"), [("eval", EVAL_LOGITS), ("train", TRAIN_LOGITS)])
def test_the_jem_familys_network_from_its_definition(mode: str, fixed: list[float]) -> None:
    """Against NumPy, and both against numbers that were written down. float32 against float64: 1e-5 of the largest."""
    model = build(ModelSettings(depth=10, width=1, variant="jem"), 3, 3, 0)
    waved(model)
    model.train(mode == "train")
    x = torch.sin(torch.arange(4 * 3 * 8 * 8, dtype=torch.float64)).view(4, 3, 8, 8)
    slow = FromDefinition(copy.deepcopy(model.state_dict()), mode == "train")
    expected = slow.logits(x.numpy())
    assert expected[0].tolist() == pytest.approx(fixed, rel=1e-6)
    assert np.allclose(model(x.float()).detach().numpy(), expected, atol=1e-5 * np.abs(expected).max())
    state = model.state_dict()
    assert len(slow.after) == (14 if mode == "train" else 0)
    assert all(np.allclose(state[name].numpy(), value, rtol=1e-4, atol=1e-4) for name, value in slow.after.items())
    assert {type(m.bias) for m in model.modules() if isinstance(m, nn.Conv2d)} == {nn.Parameter}


def test_the_jem_familys_network_costs_an_eighth_more() -> None:
    """Multiply-adds of a forward pass at 28-10: first convolutions of two groups see four times as many pixels."""
    flops = {}
    for variant in ("wrn", "jem"):
        with torch.device("meta"), FlopCount() as counter, torch.no_grad():
            WideResNet(ModelSettings(depth=28, width=10, variant=variant), 3, 10).features(torch.empty(1, 3, 32, 32))  # type: ignore[arg-type]
        flops[variant] = counter.flops
    assert flops["wrn"] == pytest.approx(10.5e9, rel=0.01)
    assert flops["jem"] / flops["wrn"] == pytest.approx(1.13, abs=0.005)


@pytest.mark.parametrize("variant", ["wrn", "jem"])
@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 9), (3, 32), (1, 33), (3, 64)])
def test_any_square_input_of_at_least_8_pixels(norm: str, channels: int, size: int, variant: str) -> None:
    model = build(ModelSettings.model_validate({"depth": 10, "width": 1, "norm": norm, "variant": variant}), channels, 7, 0)
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
