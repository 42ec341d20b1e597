"""`ebjdat bench`: rates and operations by hand, and its output."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ebjdat.bench import naive
from ebjdat.bench.measure import FlopCount, PipelineStep, matrix_rate, rates, step_flops, timed
from ebjdat.cli import app
from ebjdat.metrics import describe
from ebjdat.settings import ModelSettings
from tests.conftest import ROOT
from tests.training.test_step import case

CPU = torch.device("cpu")


def test_the_naive_step_refuses_slices_of_two_where_they_would_change_the_mathematics() -> None:
    with pytest.raises(naive.NaiveError, match=r"--override training\.adversary\.mode=eval"):
        naive.check("eb_jdat", case("eb_jdat", {"adversary": {"mode": "train"}}).settings)
    with pytest.raises(naive.NaiveError, match="sadajem"):
        naive.check("sadajem", case("sadajem", {}).settings)
    for changes in (
        {"update": {"name": "sam"}},
        {"ema": 0.9},
        {"weights": {"energy_l2": 0.1}},
        {"chain": {"start": "uniform"}},
        {"chain": {"sampler": "sgld"}},
        {"adversary": {"start": "clean"}},
        {"adversary": {"score": "kl"}},
        {"augment": {"density": "plain"}},
    ):
        with pytest.raises(naive.NaiveError):
            naive.check("eb_jdat", case("eb_jdat", changes).settings)


def test_flops_of_a_step() -> None:
    """A classifier's step is three forward passes but for the first layer's input gradient; chains and adversaries two each per step."""
    of = replace(case("classifier", {}), model=ModelSettings(depth=10, width=1), shape=(3, 32, 32))
    forward = 0.025e9  # per image, WRN-10-1 at 32 pixels; with the stride on second convolutions the first of a group has 4 times as many
    jem = replace(of, model=ModelSettings(depth=10, width=1, variant="jem"))
    more = 2 * 9 * (16 * 32 * (32 * 32 - 16 * 16) + 32 * 64 * (16 * 16 - 8 * 8))
    assert (step_flops(PipelineStep(jem, jem.data())) - step_flops(PipelineStep(of, of.data()))) / 32 == pytest.approx(3 * more, rel=0.01)
    assert step_flops(PipelineStep(of, of.data())) / 32 == pytest.approx(3 * forward, rel=0.05)
    whole = replace(of, method="eb_jdat", settings=case("eb_jdat", {"compute": {"recompute": True}}).settings)
    assert step_flops(PipelineStep(whole, whole.data())) / 32 == pytest.approx((3 * 2 + 5 * 2 + 4 * 3) * forward, rel=0.05)


def test_flops_by_hand() -> None:
    """A convolution, forwards and for its input: 2 x 2 B C K 9 H W; a linear layer: 2 B I O."""
    x = torch.rand(2, 3, 8, 8, requires_grad=True)
    w, v = torch.rand(5, 3, 3, 3), torch.rand(4, 7)
    with FlopCount() as counter:
        torch.autograd.grad(torch.nn.functional.conv2d(x, w, padding=1).sum(), x)
        torch.rand(6, 7) @ v.T
    assert counter.flops == 2 * 2 * 2 * 3 * 5 * 9 * 64 + 2 * 6 * 7 * 4


def test_rates_by_hand() -> None:
    """Two images in 0.5, 1 and 2 s against 4, 4 and 6 s: medians of rates, and of the ratios 8, 4 and 3 of each pair."""
    found = rates(2, [0.5, 1.0, 2.0], [4.0, 4.0, 6.0], 30.0, 600.0)
    assert (found["images_per_s"], found["ms_per_step"], found["n"]) == (2.0, 1000.0, 3)
    assert (found["naive_images_per_s"], found["speedup"]) == (0.5, 4.0)
    assert found["mfu"] == 0.1
    assert found["spread"] == {"images_per_s": [1.5, 3.0], "naive_images_per_s": [pytest.approx(5 / 12), 0.5], "speedup": [3.5, 6.0]}
    alone = rates(2, [0.5, 1.0, 2.0], [], 30.0, 600.0)
    assert (alone["naive_images_per_s"], alone["speedup"], set(alone["spread"])) == (None, None, {"images_per_s"})
    assert timed(lambda: time.sleep(0.02), CPU, 5) == pytest.approx(0.02, rel=0.5)


def test_the_matrix_rate_is_one() -> None:
    """Between a hundredth of what one slow core does and a thousand times a fast one."""
    rate, how = matrix_rate(CPU, "fp32")
    assert 1e8 < rate < 1e14
    assert "matrix" in how or "convolution" in how


@pytest.mark.slow
def test_bench_prints_and_saves_one_object(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    words = ["--params", str(ROOT / "params/digits.yaml"), "--model", "10-1", "--batch", "16", "--repeats", "3"]
    words += ["--override", "training.adversary.mode=eval", "--against", "naive", "--json", "--out", str(out)]
    done = CliRunner().invoke(app, ["bench", *words])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found == json.loads(out.read_text())
    assert all(found[k] > 0 for k in ("images_per_s", "naive_images_per_s", "speedup", "mfu", "peak_memory_bytes"))
    assert (found["speedup"] > 1) == (found["images_per_s"] > found["naive_images_per_s"])
    assert set(found["ms"]) == {"data", "chain", "adversarial", "update"}
    assert 0 < found["outside_network"] < 1
    assert 0.3 < sum(found["ms"].values()) / found["ms_per_step"] < 5  # each waited for
    assert {describe(name).stage for name in found} == {"bench", "provenance"}
    assert found["case"]["batch_size"] == 16
    assert found["case"]["model"] == "WRN-10-1"
    assert math.isclose(found["mfu"], found["flops_per_image"] * found["images_per_s"] / found["matrix_rate_flops"], rel_tol=1e-6)
    assert len(found["spread"]["speedup"]) == 2
    assert found["case"]["settings"]["adversary"]["mode"] == "eval"
    refused = CliRunner().invoke(app, ["bench", *words[:2], "--model", "11-1"])
    assert refused.exit_code == 1
    assert "6 n + 4" in refused.stderr
