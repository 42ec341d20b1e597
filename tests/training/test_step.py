"""The training step: against a naive one, in slices, recomputed, compiled, in bf16."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ebjdat import registry
from ebjdat.bench import naive
from ebjdat.bench.measure import Case, PipelineStep
from ebjdat.data.batches import Batch, generator
from ebjdat.models import wrn
from ebjdat.models.energy import marginal_energy
from ebjdat.models.modes import autocast
from ebjdat.models.wrn import WideResNet
from ebjdat.objectives import recipes, sampling
from ebjdat.objectives.sampling import SamplingState
from ebjdat.samplers.chains import starter
from ebjdat.settings import ModelSettings, ParamsError, TrainingSettings, load, merge
from ebjdat.training import step
from ebjdat.training.step import Step
from tests.conftest import ROOT

CPU = torch.device("cpu")


CIFAR = load(ROOT / "params/cifar10.yaml", [])


def case(experiment: str, changes: Mapping[str, Any], norm: str = "batch", variant: str = "wrn") -> Case:
    """The paper's settings on a small network and 16-pixel images."""
    usual = {
        "compute": {"precision": "fp32"},
        "batch_size": 32,
        "chain": {"steps": 3, "buffer": 100, "reinit": 0.3},
        "adversary": {"mode": "eval"},
    }
    settings = TrainingSettings.model_validate(merge(CIFAR.training_settings(experiment).model_dump(), usual, changes))
    network = ModelSettings(depth=10, width=1, norm=norm, variant=variant)  # type: ignore[arg-type]
    return Case(CIFAR.experiments[experiment].method, settings, network, CPU, (3, 16, 16), 10, 400)


def taken(bench: PipelineStep, model: WideResNet, settings: TrainingSettings) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One step of a copy of the network on the first batch and chains: its terms, and the network's state after it."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    one = Step(bench.case.method, settings, model, optimizer)
    batch, state = next(bench._work())
    buffer = copy.deepcopy(state.buffer)
    samples = one.sample(batch, SamplingState(settings, buffer, state.chains), generator(CPU, "test"))
    return one.update(batch, samples, bench.when).scalars(), model.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experiment", "variant"),
    [(name, "wrn") for name in ("eb_jdat", "eb_jdat_released", "eb_jdat_released_ce", "eb_jdat_ce", "jempp", "pgd_at", "classifier")]
    + [(name, "jem") for name in ("eb_jdat_released_ce", "jempp")],
)
def test_a_step_equals_the_naive_one(experiment: str, variant: str) -> None:
    """Loss, chains and weights after one step from the same weights and random numbers, fp32.

    Tolerance: both sum in other orders (channels-last, slices of two), so products differ in their last bits: a thousandth of how
    far the step moves the weights. Gradients of cross-entropy come near 0; where one turns its sign, a pixel moves by two steps
    (seen: 1 of 24,576, and 1.6 % of the step), hence a twentieth there. Chains count in the statistics of variant "jem" alone, in eval
    mode the neighbours' own: the last bits of these turn signs as well (97 of 24,576).
    """
    chains = 20 if "released" in experiment else 32
    own = {"density_batch_size": chains} if "released" in experiment else {}
    of = case(experiment, {"augment": {"pad": 2}, **own}, variant=variant)
    signs = "adversarial" in registry.METHODS[of.method].samples and (of.settings.adversary.score.endswith("ce") or variant == "jem")
    tolerance = 5e-2 if signs else 1e-3
    bench = PipelineStep(of, of.data())
    theirs = wrn.build(of.model, 3, 10, 0)
    settings, spec, start = of.settings, of.settings.chain, starter(of.settings.chain, bench.pool)
    batch, _ = next(bench.work)
    before = copy.deepcopy(theirs.state_dict())
    held, state, random = torch.zeros(100, 3, 16, 16), SamplingState(settings), None
    uniform = torch.rand(batch.x.shape, generator=generator(CPU, "noise")) * 2 - 1
    if bench.learner.buffer is not None:
        buffer = bench.learner.buffer
        plan = buffer.plan(1, chains, spec.reinit, start, generator(CPU, "plan"))
        state, held = SamplingState(settings, buffer, buffer.take(plan, 0)), buffer.images.clone()
        random = naive.Randomness(plan.slots[0], plan.fresh[plan.which[0]], plan.again[0], uniform)
        assert 0 < int(plan.again[0].sum()) < chains == len(batch.x_density)
    else:
        random = naive.Randomness(torch.zeros(0), torch.zeros(0), torch.zeros(0), uniform)
    optimizer = torch.optim.SGD(theirs.parameters(), settings.optimizer.lr, 0.9, weight_decay=settings.optimizer.weight_decay)
    loss = naive.step(of.method, theirs, optimizer, (batch.x, batch.x_density, batch.y), held, random, settings)
    terms = bench.step.update(batch, bench.step.sample(batch, state, generator(CPU, "noise")), bench.when)
    assert float(terms.loss) == pytest.approx(loss, rel=1e-4)
    if bench.learner.buffer is not None:
        assert (bench.learner.buffer.images - held).abs().max() < 1e-4
    ended = theirs.state_dict()
    moved = torch.cat([(ended[k] - before[k]).flatten() for k in before if k.endswith("weight")])
    apart = torch.cat([(ended[k] - v).flatten() for k, v in bench.model.state_dict().items() if k.endswith("weight")])
    assert apart.norm() < tolerance * moved.norm()
    for name, value in bench.model.state_dict().items():
        if "running" in name:
            assert torch.allclose(value, ended[name], rtol=tolerance, atol=tolerance / 100), name


@pytest.mark.parametrize("update", ["plain", "sam"])
def test_slices_of_a_batch_add_up(update: str) -> None:
    """Without batch norm the mean over slices is the whole: same terms, same weights to rounding."""
    changes = {
        "density_batch_size": 16,
        "update": {"name": update},
        "chain": {"noise": 0.0},
        "adversary": {"start": "clean"},
        "optimizer": {"name": "sgd"},
    }
    of = case("eb_jdat_jem", changes, norm="none")
    bench = PipelineStep(of, of.data())
    found = []
    for n in (1, 4):
        settings = TrainingSettings.model_validate(merge(of.settings.model_dump(), {"compute": {"accumulate": n}}))
        found.append(taken(bench, copy.deepcopy(bench.model), settings))
    (terms, state), (sliced_terms, sliced_state) = found
    assert all(float(terms[k]) == pytest.approx(float(sliced_terms[k]), rel=1e-4, abs=1e-6) for k in terms)
    assert any(not torch.equal(state[k], v) for k, v in bench.model.state_dict().items())
    apart = max(float((state[k] - sliced_state[k]).norm()) for k in state)
    assert apart < 1e-3 * max(float((state[k] - v).norm()) for k, v in bench.model.state_dict().items())
    with pytest.raises(ParamsError, match="is not a multiple of"):
        load(ROOT / "params/digits.yaml", ["training.compute.accumulate=5"])


def test_a_sample_sees_what_its_slice_sampled_before() -> None:
    """Displacements of each slice lie in the span of that slice's differences, and not in the other's."""
    of = replace(case("pgd_at", {"adversary": {"steps": 2}}), method="matched_jacobian")
    bench = PipelineStep(of, of.data())
    settings = TrainingSettings.model_validate(merge(of.settings.model_dump(), {"compute": {"accumulate": 2}}))
    batch, state = next(bench._work())
    samples = Step(of.method, settings, bench.model, bench.learner.optimizer).sample(batch, state, generator(CPU, "test"))
    assert list(samples) == ["adversarial", "nuisance"]
    d, u = (samples["adversarial"] - batch.x).flatten(1).double(), samples["nuisance"].flatten(1).double()
    for own, other in ((slice(0, 16), slice(16, 32)), (slice(16, 32), slice(0, 16))):
        within, beside = (u[own] - u[own] @ torch.linalg.pinv(d[rows]) @ d[rows] for rows in (own, other))
        assert within.norm() < 1e-5 * u[own].norm()
        assert beside.norm() > 0.1 * u[own].norm()


def test_recomputed_blocks_change_nothing_but_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits of weights and running statistics; each block ran once more, in the loss alone."""
    of = case("eb_jdat", {})
    bench, passes = PipelineStep(of, of.data()), []
    forward = wrn.Block.forward
    monkeypatch.setattr(wrn.Block, "forward", lambda self, x: passes.append(len(x)) or forward(self, x))
    found, counts = [], []
    for recompute in (False, True):
        settings = TrainingSettings.model_validate(merge(of.settings.model_dump(), {"compute": {"recompute": recompute}}))
        passes.clear()
        found.append(taken(bench, copy.deepcopy(bench.model), settings)[1])
        counts.append(len(passes))
    assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])
    losses, blocks = 4, 3
    assert counts == [blocks * (3 + 5 + losses), blocks * (3 + 5 + 2 * losses)]  # chain, adversaries, losses
    with pytest.raises(ParamsError, match="only one of recompute and compile"):
        load(ROOT / "params/digits.yaml", ["training.compute.recompute=true", "training.compute.compile=true"])


def test_bf16_is_for_layers_alone() -> None:
    """Weights, logits, energies, losses and chains stay fp32; logits are near those of fp32, and the head adds no rounding."""
    of = case("eb_jdat", {"compute": {"precision": "bf16"}})
    bench = PipelineStep(of, of.data())
    batch, state = next(bench.work)
    samples = bench.step.sample(batch, state, bench.noise)
    assert {value.dtype for value in samples.values()} == {torch.float32}
    terms = bench.step.update(batch, samples, bench.when)
    assert {value.dtype for value in terms.scalars().values()} == {torch.float32}
    assert {p.dtype for p in bench.model.parameters()} == {torch.float32}
    bench.model.eval()
    with torch.no_grad():
        plain = bench.model(batch.x)
        with autocast(CPU, "bf16"):
            logits, features = bench.model(batch.x), bench.model.features(batch.x)
        assert logits.dtype == marginal_energy(logits).dtype == torch.float32
        assert torch.equal(logits, bench.model.head(features))
        apart = (logits - plain).norm() / plain.norm()
        assert 0 < apart < 0.02  # 8 bits of mantissa; not fp32 in disguise


@pytest.mark.slow
def test_precision_is_entered_for_each_pass_and_everything_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast remembers weights in bf16 until it is left, so SAM's second pass, at other weights, needs one of its own."""
    of = case("eb_jdat", {"compute": {"precision": "bf16", "recompute": True}, "update": {"name": "sam"}, "chain": {"steps": 1}})
    bench, entered, seen = PipelineStep(of, of.data()), [], []
    monkeypatch.setattr(step, "autocast", lambda *arguments: entered.append(arguments[1]) or autocast(*arguments))
    monkeypatch.setattr(sampling, "run_chain", lambda model, x, *_: seen.append((torch.is_autocast_enabled("cpu"), model.recompute)) or x)
    batch, state = next(bench.work)
    samples = bench.step.sample(batch, state, bench.noise)
    assert seen == [(True, True)]
    entered.clear()
    bench.step.update(batch, samples, bench.when)
    assert entered == ["bf16", "bf16"]
    flags: list[tuple[bool, bool]] = []

    def broken(model: WideResNet, *_: Any) -> dict[str, Tensor]:
        flags.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
        assert model.recompute
        raise ZeroDivisionError

    monkeypatch.setattr(recipes, "eb_jdat", broken)
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    changed = TrainingSettings.model_validate(merge(of.settings.model_dump(), {"compute": {"precision": "tf32"}}))
    with pytest.raises(ZeroDivisionError):
        Step("eb_jdat", changed, bench.model, bench.learner.optimizer).update(batch, samples, bench.when)
    assert flags == [(True, True)]
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before
    assert not bench.model.recompute
    assert "trunk" not in vars(bench.model)


def test_a_slice_keeps_that_images_of_both_terms_are_the_same() -> None:
    x = torch.rand(4, 1, 2, 2)
    same, other = Batch(x, x, torch.arange(4)).part(0, 2), Batch(x, x[:2] + 1, torch.arange(4)).part(1, 2)
    assert same.x_density is same.x
    assert torch.equal(other.x_density, x[1:2] + 1)  # as many slices of another number of images
    assert other.y.tolist() == [2, 3]


@pytest.mark.slow
def test_compiled_steps_agree_and_a_network_is_left_as_it_was(tmp_path: Path) -> None:
    """In a process of its own, since torch.compile keeps what it made: near the eager step, to the rounding of fused layers.

    Without a compiler it runs all the same.
    """
    script = """
import copy, sys
from tests.training.test_step import case, taken, PipelineStep, TrainingSettings, merge
of = case("classifier", {})
bench = PipelineStep(of, of.data())
ends = []
for compiled in (False, True):
    settings = TrainingSettings.model_validate(merge(of.settings.model_dump(), {"compute": {"compile": compiled}}))
    model = copy.deepcopy(bench.model)
    ends.append(taken(bench, model, settings)[1])
    assert "trunk" not in vars(model)
moved = max(float((ends[0][k] - v).norm()) for k, v in bench.model.state_dict().items() if k.endswith("weight"))
print(max(float((ends[0][k] - ends[1][k]).norm()) for k in ends[0] if k.endswith("weight")) / moved)
"""
    for name, environment in (("with", {}), ("without", {"CXX": "/nowhere/c++", "PATH": f"{Path(sys.executable).parent}"})):
        # One thread: processes that compile side by side would each import torch first.
        cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / name), "TORCHINDUCTOR_COMPILE_THREADS": "1", "EBJDAT_TRACKING": "0"}
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, env=os.environ | cache | environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        assert float(done.stdout.split()[-1]) < 1e-3


class Waits(TorchDispatchMode):
    """Names of operations that make a program wait for a GPU: values read, shapes that depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masked = name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1])
        if masked or name in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "repeat_interleave"):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


PENALTIES = ("matched_jacobian", "jacobian_isotropic", "jacobian_complement", "jacobian_shuffled", "egat_style", "aat_style", "jeat_style")


@pytest.mark.parametrize("experiment", ["eb_jdat", "eb_jdat_sadajem", "eb_jdat_jem", "trades", "classifier", *PENALTIES])
def test_no_step_waits_for_the_device(experiment: str) -> None:
    """From batch to weights, once the chains of some steps are planned. (Adam counts its steps on the CPU, so SGD is looked at.)"""
    changes = {"chain": {"steps": 1}, "adversary": {"steps": 1}, "optimizer": {"name": "sgd"}}
    of = case("eb_jdat" if experiment in PENALTIES else experiment, changes, norm="none" if experiment.endswith("_jem") else "batch")
    of = replace(of, method=experiment) if experiment in PENALTIES else of
    bench = PipelineStep(of, of.data())
    bench()  # plans the chains
    with Waits() as waits:
        bench()
        assert waits.seen == []
        torch.ones(2).sum().item()
        torch.ones(2)[torch.tensor([True, False])]
    assert waits.seen == ["_local_scalar_dense", "index"]
