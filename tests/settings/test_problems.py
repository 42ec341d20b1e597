"""Every problem of a profile is reported at once, once, and where it is."""

from __future__ import annotations

from typing import Any

import pytest

from ebjdat.settings import load, merge

from .conftest import DIGITS, Refusal, nested

PROTOCOLS = "evaluation.attack.protocols"


def student(teacher: str, **more: Any) -> dict[str, Any]:
    """An experiment that learns from another."""
    return {"method": "rslad", "pretraining": "clean", "training": {"teacher": {"experiment": teacher, **more}}}


def test_all_problems_at_once_with_file_key_path_and_what_is_allowed(raw: dict[str, Any], refusal: Refusal) -> None:
    for path, value in {
        "training.epocs": 3,
        "training.batch_size": "many",
        f"{PROTOCOLS}.standard.eps": -0.1,
        "experiments.pgd_at.method": "pgdat",
        "experiments.jempp.pretraining": "claen",
        "experiments.eb_jdat.training": {"adversary": {"eps": 1.5, "stepz": 3}, "schedule": {"name": "linear"}},
    }.items():
        raw = merge(raw, nested(path, value))
    first, *lines = refusal(raw).splitlines()
    assert first == "8 problems in the settings:"
    for expected in (
        "training.epocs: unknown key; did you mean 'epochs'? allowed: ",
        "training.batch_size: a number is allowed, found 'many'",
        f"{PROTOCOLS}.standard.eps: input should be greater than 0, found -0.1",
        "experiments.pgd_at.method: 'pgdat' is unknown; did you mean 'pgd_at'? allowed: ",
        "experiments.jempp.pretraining: 'claen' is not under `pretraining`; did you mean 'clean'? allowed: ",
        "experiments.eb_jdat.training.adversary.eps: input should be less than or equal to 1, found 1.5",
        "experiments.eb_jdat.training.adversary.stepz: unknown key; did you mean 'step",
        "experiments.eb_jdat.training.schedule.name: 'linear' is unknown; ",
    ):
        assert sum("mine.yaml: " + expected in line for line in lines) == 1, expected


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (f"{PROTOCOLS}.released.n", 498, f"{PROTOCOLS}.released.n: 498 is more than the test split has; allowed: up to 497"),
        ("evaluation.energy.n", 600, "evaluation.energy.n: 600 is more than the test split has; allowed: up to 497"),
        ("evaluation.reliability.n", 498, "evaluation.reliability.n: 498 is more than the test split has"),
        ("evaluation.attack.transfer.experiment", "nobody", "evaluation.attack.transfer.experiment: 'nobody' is not an experiment"),
        ("evaluation.generate.reference.experiment", "nobody", "not an experiment of this profile"),
        ("evaluation.generate.reference.seed", 7, "not one of the profile's seeds"),
        ("seeds", [0, 0], "seeds: duplicate seed"),
        ("pretraining.clean.training.epochs", 3, "one level too deep; set pretraining.clean.epochs"),
        ("pretraining.other", {"method": "pgd_at", "epochs": 0}, "the same settings as pretraining."),
        ("pretraining.clean.epochs", "many", "pretraining.clean.epochs: a number is allowed, found 'many'"),
        ("pretraining.clean.model", {"depth": 11}, "pretraining.clean.model: depth 11"),
        ("experiments.pretraining", {"method": "classifier", "pretraining": "scratch"}, "this name is reserved for"),
        ("experiments.a/b", {"method": "classifier", "pretraining": "scratch"}, "should match pattern"),
        ("experiments.pgd_at.training.batch_size", 5000, "experiments.pgd_at.training.batch_size: 5000 is larger"),
        ("experiments.eb_jdat.training", {"chain": {"sampler": "sgld", "clamp": 0.1}}, "chain.clamp: is not read by sampler 'sgld'"),
        ("experiments.pgd_at.training", {"update": {"rho": 0.1}}, "training.update.rho: is not read by update 'plain'; it reads none"),
        ("data.path", "images.zip", "data: `path` is for source 'folder'; 'digits' does not read it"),
        ("experiments.jempp.base", "jem", "method 'jempp' has no base 'jem'; allowed: jempp"),
        ("experiments.pgd_at.form", "released", "method 'pgd_at' has no form 'released'; allowed: none"),
        ("experiments.eb_jdat.form", "papper", "'papper' is unknown; did you mean 'paper'?"),
        ("experiments.eb_jdat.training", 3, "experiments.eb_jdat.training: input should be a valid mapping, found 3"),
        ("training.chain.steps", 3, "training.chain.steps: is never used, since every base sets it; set bases.<base>"),
        ("training.chain.inner_steps", 3, "training.chain.inner_steps: is never used"),
        ("training.chain.clamp", 0.5, "training.chain.clamp: is never used"),
        ("bases.jempp.chain.stps", 3, "bases.jempp.chain.stps: unknown key; did you mean 'steps'?"),
        ("bases.jemp", {}, "'jemp' is unknown; did you mean 'jem"),
        ("experiments.s", {"method": "rslad", "pretraining": "clean"}, "experiments.s: training.teacher: method 'rslad' needs one"),
        ("experiments.s", student("nobody"), "experiments.s.training.teacher.experiment: 'nobody' is not another experiment"),
        ("experiments.s", student("s"), "experiments.s.training.teacher.experiment: 's' is not another experiment"),
        ("experiments.s", student("pgd_at", seed=8), "experiments.s.training.teacher.seed: 8 is not one of the profile's seeds [0]"),
        ("experiments.s", student("pgd_at", weights="a.pt"), "training.teacher: `weights` is of `model`, which is not given"),
        ("experiments.s", student("pgd_at", model="a:b"), "training.teacher: one of `experiment` (of this profile) and `model`"),
        ("experiments.pgd_at.training", student("jempp")["training"], "experiments.pgd_at: training.teacher: nothing reads it here"),
        (
            "experiments.pgd_at.training",
            {"adversary": {"score": "kl_teacher"}},
            "experiments.pgd_at: training.teacher: score 'kl_teacher' needs one",
        ),
        (
            "pretraining.clean",
            {"method": "ard", "training": student("pgd_at")["training"]},
            "pretraining.clean.training.teacher: a pretraining has no teacher",
        ),
        # what others inherit is reported where it is stated, and nowhere else
        ("training.batch_size", 5000, "training.batch_size: 5000 is larger than the training split (1170 images)"),
        ("training.adversary.step_size", 0.31, "training.adversary: step_size 0.31 is more than the diameter"),
        ("model.depth", 12, "model: depth 12: a wide residual network has 6 n + 4 layers"),
        ("training", 3, "training: input should be a valid mapping, found 3"),
    ],
)
def test_one_problem_is_one_line(raw: dict[str, Any], refusal: Refusal, path: str, value: Any, expected: str) -> None:
    first, line = refusal(merge(raw, nested(path, value))).splitlines()
    assert first == "1 problem in the settings:"
    assert expected in line


def test_experiments_that_teach_each_other_are_refused(raw: dict[str, Any], refusal: Refusal) -> None:
    raw = merge(raw, nested("experiments", {"a": student("b"), "b": student("c"), "c": student("a"), "d": student("a")}))
    first, *lines = refusal(raw).splitlines()
    assert first == "3 problems in the settings:"
    assert "experiments.a.training.teacher.experiment: experiments teach each other in a circle: a, b, c" in lines[0]


def test_a_base_that_a_method_may_have_is_accepted() -> None:
    assert load(DIGITS, ["experiments.jempp.base=jempp"]).experiments["jempp"].base == "jempp"


def test_a_wrong_setting_over_a_wrong_setting_is_reported_too(raw: dict[str, Any], refusal: Refusal) -> None:
    raw = merge(raw, nested("training.adversary.eps", 2), nested("experiments.pgd_at.training.adversary.eps", 3))
    text = refusal(raw)
    assert "training.adversary.eps: input should be less than or equal to 1, found 2" in text
    assert "experiments.pgd_at.training.adversary.eps: input should be less than or equal to 1, found 3" in text
    assert text.startswith("2 problems")


def test_the_reference_classifier_is_an_experiment_under_inceptions_features_too(refusal: Refusal) -> None:
    colour = ["data={source: cifar10, test: null}", "training.augment.flip=false", "evaluation.generate.extractor=inception"]
    assert "generate.reference.experiment: 'nobody' is not an" in refusal([*colour, "evaluation.generate.reference.experiment=nobody"])


def test_mirrored_digits_are_refused_wherever_they_are_switched_on(refusal: Refusal) -> None:
    for path in ("training", "experiments.eb_jdat.training", "pretraining.clean.training"):
        assert f"{path}.augment.flip: a mirrored image of 'digits' may lose its label" in refusal([f"{path}.augment.flip=yes"])


def test_a_problem_names_the_override_it_comes_from(refusal: Refusal) -> None:
    assert "override 'training.epochs=-1': training.epochs: " in refusal(["training.epochs=-1"])


def test_an_error_in_a_common_part_does_not_fill_pages(raw: dict[str, Any], refusal: Refusal) -> None:
    text = refusal({**raw, **{f"slip{i}": 1 for i in range(300)}})
    assert text.startswith("300 problems in the settings:\n")
    assert text.endswith("\n  and 250 more")
    assert len(text.splitlines()) == 52


def test_every_experiment_of_a_wrong_profile_is_checked(refusal: Refusal) -> None:
    """Also where other sections, and the experiment itself, are wrong."""
    text = refusal(["experiments.eb_jdat={note: [], form: x, training: {ema: 1}}", "data.source=mnist", "runtime.threads=0"])
    for path in (*(f"experiments.eb_jdat.{key}" for key in ("note", "form", "training.ema")), "data.source", "runtime.threads"):
        assert f": {path}: " in text
