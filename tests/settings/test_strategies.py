"""What `ebjdat methods` lists, against the registry."""

from __future__ import annotations

import json

from typer.testing import CliRunner

from ebjdat import registry
from ebjdat.cli import app
from ebjdat.settings import strategies

from ..conftest import ROOT


def test_the_catalogue_lists_everything_with_source_and_defaults() -> None:
    found = json.loads(CliRunner().invoke(app, ["methods", "--json"]).stdout)
    for kind in ("methods", "bases", "forms", "samplers", "starts", "scores", "updates", "optimizers", "schedules"):
        assert set(found[kind]) == set(getattr(registry, kind.upper()))
        assert all(entry["source"] and "defaults" in entry for entry in found[kind].values())
    assert found["methods"]["sadajem"]["defaults"]["update"] == {"name": "sam", "rho": 2.0, "adaptive": True}
    assert found["methods"]["trades"]["defaults"]["adversary"]["score"] == "kl"
    assert found["methods"]["eb_jdat"]["bases"] == ["jempp", "jem", "sadajem"]
    assert found["samplers"]["pyld"]["defaults"] == {"steps": 10, "inner_steps": 5, "step_size": 0.2, "noise": 0.0, "clamp": 1.0}
    assert found["updates"]["sam"]["defaults"] == {"rho": 2.0, "adaptive": True}


def test_every_registered_strategy_can_be_imported() -> None:
    registries = [v for k, v in vars(registry).items() if k.isupper() and isinstance(v, dict) and k[0] != "_" and k != "FEWEST_CLASSES"]
    assert len(registries) >= 9
    for entries in registries:
        for name, entry in entries.items():
            assert isinstance(entry, registry.Preset) or callable(registry.load(entries, name)), name
            assert entry.source


def test_the_page_of_methods_is_current_and_names_every_control() -> None:
    """Every adversarial or joint method of a paper says what its control is; baselines and controls have none."""
    assert (ROOT / "docs/methods.md").read_text(encoding="utf-8") == strategies.markdown()
    named = {name for name, method in registry.METHODS.items() if method.control}
    assert {"mart", "weat_nat", "weat_adv", "der", "s2o", "s2o_trades", "rs_fgsm", "n_fgsm", "gradalign", "eb_jdat"} <= named
    assert not {"pgd_at", "corners", "der_random"} & named
