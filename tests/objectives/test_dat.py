"""DAT: its loss by hand, where x- come from and how far they climb, and when that becomes farther."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from ebjdat.data import made
from ebjdat.data.batches import Batch, DeviceData
from ebjdat.data.prepared import Prepared
from ebjdat.jobs import named
from ebjdat.models.energy import marginal_energy
from ebjdat.models.wrn import WideResNet
from ebjdat.objectives import recipes
from ebjdat.objectives.dat import Growth, area_under_curve, contrast, dat
from ebjdat.objectives.sampling import SamplingState
from ebjdat.objectives.terms import Terms
from ebjdat.pixels import internal_from_unit, unit_from_internal
from ebjdat.settings import ContrastSettings, TrainingSettings, WeightSettings
from tests.networks import Table
from tests.training.conftest import METHODS, changed

SETTINGS = METHODS.training_settings("dat")
CPU = torch.device("cpu")


@pytest.fixture
def table() -> Table:
    return Table(torch.randn(6, 4, generator=torch.Generator().manual_seed(2)))


BATCH = Batch(x=torch.tensor([0, 1]), x_density=torch.tensor([0, 1]), y=torch.tensor([2, 3]))
SAMPLES = {"adversarial": torch.tensor([2, 3]), "contrast": torch.tensor([4, 5])}


def test_the_gradient_is_that_of_the_closed_form(table: Table) -> None:
    """(sigmoid(LSE) - t) softmax / 2B on data (t = 1) and x- (t = 0), none elsewhere without CE. 1e-6: rounding of fp32."""
    terms = dat(table, BATCH, SAMPLES, WeightSettings(w1=0.7, w3=0))
    (gradient,) = torch.autograd.grad(terms.loss, table.rows)
    rows = table.rows.detach()
    target = torch.tensor([1.0, 1, 0, 0, 0, 0])
    expected = 0.7 * (rows.logsumexp(1).sigmoid() - target)[:, None] * rows.softmax(1) / 4
    expected[2:4] = 0
    assert torch.allclose(gradient, expected, atol=1e-6)
    assert float(terms.logged["auc"]) == roc_auc_score([1, 1, 0, 0], rows[[0, 1, 4, 5]].logsumexp(1))


def test_without_discrimination_it_is_pgd_at(table: Table) -> None:
    """The same loss and gradient, to the bit."""
    found = []
    for recipe in (dat, recipes.pgd_at):
        loss = recipe(table, BATCH, SAMPLES, WeightSettings(w1=0)).loss
        found.append((loss, *torch.autograd.grad(loss, table.rows)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_area_under_the_curve_with_ties() -> None:
    rng = torch.Generator().manual_seed(0)
    higher, lower = torch.randint(0, 9, (40,), generator=rng), torch.randint(0, 8, (30,), generator=rng)
    labels = [1] * 40 + [0] * 30
    assert float(area_under_curve(higher.float(), lower.float())) == pytest.approx(
        roc_auc_score(labels, torch.cat([higher, lower])), abs=1e-6
    )


def images_of(train_data: DeviceData) -> Batch:
    x = train_data.internal(slice(0, 32))
    return Batch(x, x, train_data.labels[:32])


def sampled(network: WideResNet, batch: Batch, steps: int, settings: TrainingSettings = SETTINGS) -> Tensor:
    own = Growth(settings.contrast, CPU)
    own.steps = steps
    return contrast(network, batch, SamplingState(settings, own=own), torch.Generator().manual_seed(3))


@pytest.mark.parametrize("ood", ["noise", "inverted", "shuffled"])
def test_with_no_step_they_are_the_images_out_of_distribution(ood: str, network: WideResNet, train_data: DeviceData) -> None:
    batch = images_of(train_data)
    made_now = getattr(made, ood)(unit_from_internal(batch.x), torch.Generator().manual_seed(3))
    found = sampled(network, batch, 0, changed(SETTINGS, contrast={"ood": ood}))
    assert torch.equal(found, internal_from_unit(made_now))


def test_they_climb_the_density_by_steps_of_a_tenth(network: WideResNet, train_data: DeviceData) -> None:
    """One step is 0.1 of [0, 1] pixels in L2 where the range does not cut it, along the gradient; more of them climb higher."""
    network.eval()
    batch = images_of(train_data)
    batch = Batch(batch.x * 0.5, batch.x * 0.5, batch.y)
    start, one, five = (sampled(network, batch, steps) for steps in (0, 1, 5))
    at = start.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(-marginal_energy(network(at)).sum(), at)
    moved = (one - start).flatten(1)
    assert torch.allclose(moved.norm(dim=1), torch.tensor(0.2), atol=1e-5)
    assert torch.allclose(torch.cosine_similarity(moved, gradient.flatten(1)), torch.tensor(1.0), atol=1e-4)
    with torch.no_grad():
        heights = [-marginal_energy(network(x)) for x in (start, one, five)]
    assert (heights[1] > heights[0]).all()
    assert (heights[2] > heights[1]).all()
    assert five.abs().max() <= 1


def test_the_control_moves_as_far_in_a_random_direction(network: WideResNet, train_data: DeviceData) -> None:
    network.eval()
    batch = images_of(train_data)
    batch = Batch(batch.x * 0.5, batch.x * 0.5, batch.y)
    start, moved = sampled(network, batch, 0), sampled(network, batch, 3)
    other = sampled(network, batch, 3, changed(SETTINGS, contrast={"direction": "random"}))
    along, across = ((x - start).flatten(1) for x in (moved, other))
    assert torch.allclose(across.norm(dim=1), along.norm(dim=1), atol=1e-5)
    assert torch.cosine_similarity(across, along).abs().mean() < 0.3  # 64 pixels: 0.1 by chance


def test_steps_grow_when_the_area_reaches_the_threshold() -> None:
    """The mean over `every` steps decides; it begins anew after each decision, and there are never more than `most`."""
    own = Growth(ContrastSettings(threshold=0.75, every=2, most=2), CPU)
    seen = []
    for index, auc in enumerate([0.5, 1.0, 0.75, 0.625, 1.0, 0.25, 0.75, 1.0, 1.0, 1.0]):
        terms = Terms(torch.zeros(()), logged={"auc": torch.tensor(auc)})
        logged = own.after(None, BATCH, {}, terms, index, torch.Generator())  # type: ignore[arg-type]
        seen.append(own.steps)
        assert float(logged["contrast_steps"]) == ([0, *seen])[index]  # of the step that was made
    assert seen == [0, 1, 1, 1, 1, 1, 1, 2, 2, 2]
    again = Growth(own.settings, CPU)
    again.load_state_dict(own.state_dict())
    assert (again.steps, float(again.total)) == (2, 0)


def test_what_it_keeps_counts_as_its_code(digits: Prepared) -> None:
    targets = {entry.target for entry in named({"method": "dat", "training": SETTINGS.model_dump()})}
    assert {"ebjdat.objectives.dat:growth", "ebjdat.objectives.dat:contrast", "ebjdat.data.made:shuffled"} <= targets
    others = {entry.target for entry in named({"method": "pgd_at", "training": SETTINGS.model_dump()})}
    assert not any("dat:" in target or "made:" in target for target in others)
