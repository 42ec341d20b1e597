"""What experiments inherit, what determines their results, and that validation happens once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from ebjdat import registry
from ebjdat.settings import load

from .conftest import CIFAR, DIGITS, FULL


def test_overrides_and_method_defaults_reach_the_training() -> None:
    profile = load(DIGITS, ["training.epochs=7", "experiments.pgd_at.training.epochs=3"])
    found = {name: (entry.training.epochs, entry.training.adversary.score) for name, entry in profile.experiments.items()}
    assert (found["eb_jdat"], found["pgd_at"]) == ((7, "energy"), (3, "ce"))
    assert profile.experiments["pgd_at"].own == {"epochs": 3}
    own = load(DIGITS, ["experiments.eb_jdat.training.adversary.score=ce"])
    assert own.experiments["eb_jdat"].training.adversary.score == "ce"


def test_bases_lie_between_the_profile_and_the_experiment() -> None:
    """training < the base's preset < the profile's values for it < method < form < the experiment's own."""
    full = load(FULL)
    sada = full.experiments["eb_jdat_sadajem"].training
    assert (sada.chain.sampler, sada.update.name, sada.augment.density) == ("clipped_sgld", "sam", "plain")  # the preset's
    assert (sada.chain.step_size, sada.update.rho) == (0.5, 0.5)  # the profile's, over the preset's 1.0 and 2.0
    assert sada.chain.buffer == 1000  # the profile's training
    own = load(FULL, ["experiments.eb_jdat_sadajem.training.chain.step_size=0.7", "training.weights.beta=3"])
    assert own.experiments["eb_jdat_sadajem"].training.chain.step_size == 0.7
    assert own.experiments["trades"].training.weights.beta == 3
    released = full.experiments["eb_jdat_released"]
    assert (released.method, released.base, released.form) == ("eb_jdat", "jempp", "released")
    assert (released.training.weights.w2, released.training.adversary.score, released.training.adversary.project) == (
        -0.1,
        "released",
        False,
    )
    assert full.experiments["eb_jdat_ce"].training.adversary.score == "ce"
    assert full.experiments["pgd_at"].training.chain.sampler == "pyld"  # unused there
    assert full.experiments["trades"].training.adversary.start == "gaussian"
    assert (full.pretraining["clean_no_norm"].model.norm, full.pretraining["clean"].model.norm) == ("none", "batch")
    assert full.experiments["jem"].model.norm == full.resolved("jem")["model"]["norm"] == "none"


def test_presets_are_those_of_the_published_table() -> None:
    """JEM: SGLD, step 1, noise 0.01, 20 steps, uniform, eval; JEM++: PYLD, 10 x 5 of 0.2; SADA-JEM: 5 of 1.0, SAM rho 2 adaptive."""
    jem, jempp, sada = (registry.BASES[name].defaults["chain"] for name in ("jem", "jempp", "sadajem"))
    assert jem == {"sampler": "sgld", "step_size": 1, "noise": 0.01, "steps": 20, "start": "uniform", "mode": "eval"}
    assert registry.BASES["jem"].defaults["optimizer"] == {"name": "adam", "lr": 1e-4, "momentum": 0.9, "weight_decay": 0}
    common = {"start": "class_gaussians", "noise": 0, "mode": "train", "clamp": 1}
    assert jempp == {**common, "sampler": "pyld", "steps": 10, "inner_steps": 5, "step_size": 0.2}
    assert sada == {**common, "sampler": "clipped_sgld", "steps": 5, "step_size": 1}


def test_a_students_settings_hold_its_teachers() -> None:
    """So a student's hash changes with what its teacher was trained with, and with nothing of another experiment."""
    chain = ["experiments.a={method: ard, pretraining: clean, training: {teacher: {experiment: b}}}"]
    chain += ["experiments.b={method: rslad, pretraining: clean, training: {teacher: {experiment: pgd_at}}}"]
    hashes = {name: entry.params_hash(0) for name, entry in load(DIGITS, chain).experiments.items()}
    assert load(DIGITS, chain).teachers_first()[-2:] == ["b", "a"]
    for change, students in (("pgd_at", {"pgd_at", "a", "b"}), ("eb_jdat", {"eb_jdat"})):
        changed = load(DIGITS, [*chain, f"experiments.{change}.training.adversary.steps=2"]).experiments
        assert {name for name, entry in changed.items() if entry.params_hash(0) != hashes[name]} == students


def test_every_method_with_chains_has_a_base() -> None:
    for name, method in registry.METHODS.items():
        assert bool(method.bases) == ("negatives" in method.samples), name
        assert set(method.bases) <= set(registry.BASES)
        assert set(method.forms) <= set(registry.FORMS)


@pytest.mark.parametrize("form", ["released", "released_ce"])
@pytest.mark.parametrize(
    ("base", "weights", "noise"), [("jem", (0.45, -0.05, 0.45), 0.03), ("jempp", (1, -0.1, 1), 0.03), ("sadajem", (1, -0.1, 1), 0.0)]
)
def test_released_forms_on_each_base(form: str, base: str, weights: tuple[float, ...], noise: float) -> None:
    """As the release's three trainers have it: alignment, its clean images, noise on labelled images, inner step and budget."""
    t = load(DIGITS, [f"experiments.eb_jdat.form={form}", f"experiments.eb_jdat.base={base}"]).experiments["eb_jdat"].training
    assert (t.weights.w1, t.weights.w2, t.weights.w3) == weights
    assert (t.weights.align, t.density_batch, t.augment.labelled_noise, t.chains) == ("density", "own", noise, 64)
    attack = t.adversary
    assert (attack.score, attack.start, attack.project, attack.range, attack.mode) == (form, "uniform", False, "internal", "eval")


def test_the_papers_form_and_profile_have_the_recipes_as_published() -> None:
    digits, cifar = load(DIGITS), load(CIFAR)
    paper = digits.experiments["eb_jdat"].training
    assert (paper.weights.align, paper.density_batch, paper.augment.labelled_noise, paper.own_density) == ("paired", "labelled", 0, None)
    assert {entry.model.variant for entry in cifar.pretraining.values()} == {"jem"}
    assert digits.model.variant == "wrn"
    trainings = {name: entry.training for name, entry in cifar.experiments.items()}
    sizes = {name: (t.batch_size, t.own_density, t.chains) for name, t in trainings.items()}
    assert sizes["sadajem"] == sizes["eb_jdat_sadajem"] == sizes["eb_jdat_sadajem_released"] == (128, 64, 64)
    assert sizes["jempp"] == sizes["eb_jdat"] == sizes["eb_jdat_released_ce"] == (64, 64, 64)
    assert (sizes["eb_jdat_jem"], sizes["pgd_at"]) == ((128, 128, 128), (128, None, 128))
    for name, noise in {"jem": 0.03, "jempp": 0.03, "eb_jdat": 0.03, "sadajem": 0, "eb_jdat_sadajem": 0, "pgd_at": 0}.items():
        assert trainings[name].augment.labelled_noise == noise
    for name in ("jem", "eb_jdat_jem"):
        t = trainings[name]
        assert (t.epochs, t.schedule.milestones, t.schedule.factor) == (200, (160, 180), 0.3)
    assert trainings["sadajem"].epochs * (45_000 // 128) == 70_200  # 390 steps of 50,000 images in the release


@pytest.mark.parametrize(
    ("overrides", "changed"),
    [
        (["runtime.threads=2", "runtime.device=auto", "report.paper=null"], set()),
        (["data.root=elsewhere", "data.label=mine"], set()),
        (["experiments.eb_jdat.training.epochs=2"], {"eb_jdat"}),
        (["experiments.jempp.method=eb_jdat"], {"jempp"}),
        (["pretraining.clean.epochs=2"], {"pgd_at", "jempp", "eb_jdat"}),
        (["pretraining.clean.method=pgd_at"], {"pgd_at", "jempp", "eb_jdat"}),
        (["evaluation.attack.protocols.standard.eps=0.1"], {"classifier", "pgd_at", "jempp", "eb_jdat"}),
        (["model.width=1"], {"classifier", "pgd_at", "jempp", "eb_jdat"}),
        (["data.split_seed=1"], {"classifier", "pgd_at", "jempp", "eb_jdat"}),
    ],
)
def test_params_hash_follows_what_determines_the_result(overrides: list[str], changed: set[str]) -> None:
    base, other = load(DIGITS), load(DIGITS, overrides)
    assert {e for e in base.experiments if other.params_hash(e, 0) != base.params_hash(e, 0)} == changed
    assert base.params_hash("eb_jdat", 0) != base.params_hash("eb_jdat", 1)


def test_a_profile_is_validated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a whole, with every training and network in it; what is looked up later is not validated again."""
    count: Counter[str] = Counter()
    validate = BaseModel.model_validate.__func__  # type: ignore[attr-defined]

    def counted(model: type[BaseModel], *values: Any, **options: Any) -> BaseModel:
        count.update([model.__name__])
        return validate(model, *values, **options)

    monkeypatch.setattr(BaseModel, "model_validate", classmethod(counted))
    profile = load(FULL)
    for name, entry in profile.experiments.items():
        assert (profile.params_hash(name, 0), profile.resolved(name)) == (entry.params_hash(0), entry.resolved)
        assert (profile.training_settings(name), profile.attack_settings(name)) == (entry.training, entry.attack)
        assert profile.model_settings(entry.pretraining) == entry.model
    assert count == {"ProfileFile": 1}


@pytest.mark.parametrize("path", sorted(DIGITS.parent.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_released_code_stands_in_a_profile_with_both_of_its_inner_steps(path: Path) -> None:
    """An experiment of the form `released` has a twin that differs in the form alone: the step that its code has commented out."""
    experiments = load(path).experiments

    def forms(form: str) -> list[tuple[object, ...]]:
        of_form = [experiment for experiment in experiments.values() if experiment.form == form]
        return [(e.base, e.pretraining, e.training.model_dump(exclude={"adversary": {"score"}})) for e in of_form]

    assert forms("released") == forms("released_ce")
