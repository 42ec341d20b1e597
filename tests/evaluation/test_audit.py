"""The whole evaluation: every figure from its verdicts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ebjdat.evaluation.audit import audit
from ebjdat.settings import AttackSettings

from ..conftest import Linear
from ..networks import Curved, images, labelled, settings


def test_more_is_asked_for_than_there_is(linear: Linear) -> None:
    x = images(8)
    asked = settings(0.02, 50)
    asked = asked.model_copy(update={"protocols": {"standard": settings(0.02, 0).standard, "quick": asked.protocols["quick"]}})
    found = audit(linear, x, labelled(linear, x, 0), asked, with_checks=False)
    assert found.metrics["quick_n_attack"] == 8
    empty = asked.protocols["quick"].model_copy(update={"attacks": {}})
    found = audit(
        linear, x, labelled(linear, x, 0), asked.model_copy(update={"protocols": {**asked.protocols, "quick": empty}}), with_checks=False
    )
    assert "quick_autoattack_acc" not in found.metrics
    assert found.table.to_pandas().query("protocol == 'quick'")["autoattack"].isna().all()


def test_two_and_three_classes_have_a_protocol_of_their_own() -> None:
    """Verdicts in closed form, with the attacks of the row but less effort; with more classes, targets are all others."""
    n = 12
    x, few, steps = images(n), {"square": {"queries": 50}}, {"steps": 10}
    for classes in (2, 3, 5):
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, classes)).eval()
        with torch.no_grad():
            model[1].weight.copy_(Linear().weight[:classes])
            model[1].bias.copy_(-0.5 * model[1].weight.sum(1))
        y = model(x).argmax(1)
        weight = model[1].weight.detach()
        margins = model(x).detach()[range(n), y][:, None] - model(x).detach()
        lengths = (weight[y][:, None] - weight[None]).abs().sum(2)
        radius = (margins / lengths.clamp_min(1e-9)).masked_fill(lengths == 0, torch.inf).amin(1)
        eps = float(radius.sort().values[n // 2 - 1 : n // 2 + 1].mean())  # half of the images stand, for certain
        near = ((radius - eps).abs() < 0.01 * eps).sum()
        protocol = {"eps": eps, "pgd": {"step_size": eps / 4}, "n": n}
        like, own = ("standard_binary", ("apgd_ce", "fab")) if classes < 4 else ("standard", ("apgd_ce", "apgd_t", "fab_t"))
        row = {"like": like, **protocol, "attacks": {**few, **dict.fromkeys(own, steps)}}
        asked = AttackSettings.model_validate({"protocols": {"standard": {**protocol, "n": 0}, "own": row}})
        assert list(asked.protocols["own"].attacks) == [*own, "square"]
        found = audit(model, x, y, asked, with_checks=False)
        assert abs(found.metrics["own_autoattack_correct"] - n // 2) <= near < n // 4
        assert found.metrics["own_n_targets"] == ({} if classes < 4 else {"apgd_t": 4, "fab_t": 4})
    with pytest.raises(ValueError, match="standard_binary: its name fixes norm, range, noise"):
        AttackSettings.model_validate({"protocols": {"standard": protocol, "standard_binary": {**protocol, "norm": "L2"}}})


@pytest.mark.slow
def test_every_figure_can_be_recomputed_from_the_verdicts() -> None:
    model, x = Curved().eval(), images(40)
    y = labelled(model, x)
    asked = settings(0.012, 30)
    asked = asked.model_copy(
        update={"protocols": {"standard": settings(0.012, 0).standard, **{k: asked.protocols[k] for k in ("quick", "released")}}}
    )
    found = audit(model, x, y, asked, with_checks=False)
    frame = found.table.to_pandas()
    for name, prefix in (("quick", "quick_"), ("released", "released_")):
        mine = frame[frame["protocol"] == name]
        attacks = list(asked.protocols[name].attacks)
        assert mine["index"].tolist() == list(range(40))
        assert mine["label"].tolist() == y.tolist()
        assert found.metrics[f"{prefix}clean_correct"] == (mine["prediction"] == mine["label"]).sum() == mine["clean"].sum()
        assert found.metrics[f"{prefix}pgd20_correct"] == mine["pgd20"].fillna(value=False).sum()
        first = mine[mine["index"] < 30]
        standing = first["clean"].copy()
        for attack in attacks:
            assert (first[attack].isna() | standing).all()  # only what stood was attacked
            standing &= first[attack].fillna(value=True).astype(bool)
            assert found.metrics[f"{prefix}after_{attack}_correct"] == standing.sum()
        assert found.metrics[f"{prefix}autoattack_correct"] == standing.sum() == first["autoattack"].sum()
        assert mine["autoattack"][mine["index"] >= 30].isna().all()
        whole = mine["pgd20"].fillna(value=False).astype(bool) & mine["autoattack"].fillna(value=True).astype(bool)
        assert (mine["worst"] == whole).all()
