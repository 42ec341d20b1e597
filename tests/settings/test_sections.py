"""Sections of a profile: data, network, training and evaluation settings that do not go together; what protocols mean."""

from __future__ import annotations

from pathlib import Path

import pytest

from ebjdat.settings import load, usual_protocols

from ..conftest import ROOT
from .conftest import CIFAR, DIGITS, FULL, Refusal

STANDARD, L2 = "evaluation.attack.protocols.standard", "evaluation.attack.protocols.standard_l2"


@pytest.mark.parametrize("path", sorted((ROOT / "params").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_profiles_are_valid(path: Path) -> None:
    assert load(path).experiments


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.validation=1300", "leave no training images"),
        ("data.test=null", "needs `test`"),
        ("data.source=folder", "needs `path`"),
        ("data.source=mnist", "'mnist' is unknown"),
        ("data.size=8", "`size` is for source 'folder'"),
        ("model.depth=12", "6 n + 4"),
        ("model.variant=yopo", "'wrn' or 'jem'"),
        ("training.schedule={name: multistep, milestones: [20]}", "at or after the last epoch"),
        ("training.adversary={score: kl, start: clean}", "score 'kl' has no gradient at the clean image"),
        ("training.adversary.step_size=0.31", "more than the diameter"),
        ("training.adversary.step_ratio=2.1", "more than the diameter"),
        ("training.adversary.start_ratio=2", "set project: false"),
        ("training.adversary={project: false, budget: {name: robust_lt}}", "budget 'robust_lt' starts in the ball of eps"),
        ("training.adversary.budget.name=rampp", "'rampp' is unknown; did you mean 'ramp'"),
        ("training.adversary.budget.by_class=1.5", "less than or equal to 1"),
        ("experiments.pgd_at.training.adversary.budget={name: ramp, by_class: 0.1}", "is not read by budget 'ramp'; it reads warmup"),
        ("experiments.pgd_at.training.adversary.budget.warmup=0.1", "is not read by budget 'uniform'; it reads none"),
        ("experiments.jempp.training.adversary.budget.name=ramp", "is not read by method 'jempp', which moves no images"),
        ("pretraining.clean.training.adversary.budget.name=ramp", "is not read by method 'classifier', which moves no images"),
        ("data.validation=null", "needs `validation`, how many training images"),
        ("data.imbalance={ratio: 10, largest: 100}", "`validation` is not for a split with `imbalance`"),
        ("data={validation: null, n_train: 100, imbalance: {ratio: 10, largest: 100}}", "`n_train` is not for a split with `imbalance`"),
        ("data={validation: null, imbalance: {ratio: 10}}", "data.imbalance.largest: is missing"),
        ("data={validation: null, imbalance: {ratio: 0.5, largest: 100}}", "greater than or equal to 1"),
        ("data={validation: null, imbalance: {ratio: 10, largest: 100, validation: 1}}", "less than 1"),
        ("training.update.name=awp", "published: 0.005 to 0.01"),
        ("training.adversary={start: clean, start_ratio: 0.5}", "start_ratio is of start 'uniform'"),
        ("experiments.pgd_at.training.weights.control=shuffled", "training.weights.examples is uniform"),
        ("experiments.pgd_at.training.weights.beta=3", "is not read by method 'pgd_at'; it reads examples, control"),
        ("experiments.jempp.training.weights.examples.name=kl_dro", "is not read by method 'jempp'; it reads smoothing"),
        ("experiments.pgd_at.training.weights.examples={name: term, radius: 2}", "is not read by examples 'term'; it reads tilt"),
        ("experiments.pgd_at.control=pgd_at", "'pgd_at' is not another experiment"),
        ("experiments.pgd_at.control=[eb_jdat, pdg_at]", "'pdg_at' is not another experiment"),
        ("experiments.pgd_at.control=[eb_jdat, eb_jdat]", "duplicate control; name each once"),
        ("experiments={twin: {method: pgd_at, pretraining: clean, control: pgd_at}}", "'pgd_at' trains with the same settings"),
        ("training.policy.eps=[15, 3]", "[15, 3] is no range; its first number must not be greater than its second"),
        ("training.policy.iterations=[0, 3]", "greater than or equal to 1"),
        ("training.policy.step=[1, 40]", "step reaches 40, more than the largest diameter 2 eps = 30"),
        ("training.policy.unit=0.1", "eps reaches 15 x unit = 1.5; at most 1"),
        ("training.policy.depth=12", "6 n + 4"),
        ("training.policy={eps: [8, 8], iterations: [10, 10], step: [2, 2]}", "nothing to learn; set choose: uniform"),
        ("experiments.pgd_at.training.policy.lr=1", "training.policy: is not read by method 'pgd_at', only by las_at"),
        (
            "experiments.pgd_at={method: las_at, training: {adversary: {steps: 3}}}",
            "adversary.steps: is not read by method 'las_at', whose",
        ),
        ("experiments.pgd_at={method: las_at, training: {adversary: {project: false}}}", "training.policy.eps limits nothing"),
        ("training.contrast={most: 0, direction: random}", "changes nothing where `most` is 0"),
        ("training.contrast.threshold=0.4", "greater than or equal to 0.5"),
        ("training.contrast.ood=svhn", "'svhn' is unknown; allowed: inverted, noise, shuffled"),
        ("experiments.pgd_at.training.contrast.most=3", "training.contrast: is not read by method 'pgd_at', only by dat"),
        (
            "experiments.pgd_at={pretraining: scratch, training: {mode: eval}}",
            "training.mode: 'eval' keeps batch norm's running statistics",
        ),
        ("pretraining.clean.training.mode=eval", "pretraining.clean.training.mode: 'eval' keeps batch norm's running statistics"),
        ("training.weights.examples.name=gairat", "allowed: kl_dro, term, uniform, weat"),
        ("training.weights.targets=0.6", "less than or equal to 0.5"),
        ("training.density_batch_size=32", "density_batch_size is for density_batch 'own'"),
        ("training={density_batch: own, density_batch_size: 2000}", "density_batch_size: 2000 is larger than the training split"),
        ("training={density_batch: own, density_batch_size: 63, compute: {accumulate: 2}}", "density_batch_size 63 is not a multiple"),
        ("training.density_batch=other", "'labelled' or 'own'"),
        ("training.augment.labelled_noise=-0.1", "greater than or equal to 0"),
        ("training.weights.align=unpaired", "'paired' or 'density'"),
        ("training.compute={recompute: true, compile: true}", "set only one of recompute and compile"),
        (
            "experiments.pgd_at={method: gradalign, training: {compute: {compile: true}}}",
            "compute.compile cannot differentiate the network's",
        ),
        ("experiments.pgd_at={method: egat_style, training: {compute: {recompute: true}}}", "loss of method 'egat_style'; set it to false"),
        ("training.healing.ladder=[{change: lr}]", "'lr' needs `by`"),
        ("training.healing.ladder=[{change: seed, by: 2}]", "'seed' takes no `by`"),
        ("training.healing.ladder=[{change: lr, by: 2}]", "less than 1 is allowed"),
        ("training.healing.ladder=[{change: steps, by: 1}]", "more than 1 is allowed"),
        (f"{STANDARD}.pgd.step_size=0.31", "more than the diameter"),
        (f"{STANDARD}.noise=0.03", "its name fixes norm, range, noise, noise_on, pgd.steps, pgd.restarts and attacks"),
        (f"{STANDARD}.attacks.square=null", "add a protocol `like: standard`"),
        (f"{STANDARD}.attacks.square.queries=100", "add a protocol `like: standard`"),
        (f"{STANDARD}.pgd.steps=10", "add a protocol `like: standard`"),
        (f"{STANDARD}.pgd.restarts=2", "add a protocol `like: standard`"),
        (f"{STANDARD}.norm=L2", "add a protocol `like: standard`"),
        (f"{STANDARD}.noise_on={{jem: 0.1}}", "add a protocol `like: standard`"),
        ("evaluation.attack.protocols.released.range=unit", "protocols.released: its name fixes norm, range, noise"),
        ("evaluation.attack.protocols.released.noise_on={jem: 0}", "protocols.released: its name fixes"),
        ("evaluation.attack.protocols.released.noise_on={gem: 0.1}", "'gem' is unknown; did you mean 'jem'"),
        ("evaluation.attack.protocols.released.noise_on={jem: -1}", "greater than or equal to 0"),
        ("evaluation.attack.protocols.ema={like: standard, eps: 0.1, pgd: {step_size: 0.1}, n: 1}", "use another name"),
        ("evaluation.attack.protocols.ema_l2={like: standard, eps: 0.1, pgd: {step_size: 0.1}, n: 1}", "use another name"),
        ("evaluation.attack.protocols.standard_low={like: standard, eps: 0.1, pgd: {step_size: 0.1}, n: 1}", "use another name"),
        (f"{STANDARD}=null", "protocols: 'standard' is missing"),
        ("evaluation.attack.protocols.mine={eps: 0.1}", "protocol 'mine' needs `like`, the preset it starts from; allowed: standard"),
        (f"{L2}.attacks.square={{steps: 3}}", "attacks.square does not read steps; it reads queries"),
        ("evaluation.attack.protocols.released.attacks={cw: {}}", "'cw' is unknown"),
        (f"{L2}.attacks.sqare=null", "'sqare' is unknown; did you mean 'square'"),
        (f"{L2}.like=standrd", "`like` 'standrd' is unknown; did you mean 'standard'"),
        (f"{L2}.attacks.energy_ce={{}}", "'energy_ce' is unknown; it belongs under `adaptive_attacks`"),
        (f"{STANDARD}.adaptive_attacks={{energy: {{}}}}", "'energy' is unknown; did you mean 'energy_ce'"),
        (f"{STANDARD}.adaptive_attacks={{energy_ce: {{weight: -1}}}}", "greater than or equal to 0"),
        (
            f"{L2}={{attacks: {{apgd_ce: null, apgd_t: null, fab_t: null, square: null}}, adaptive_attacks: {{energy_ce: {{}}}}}}",
            "adaptive attacks need an ensemble",
        ),
        ("evaluation.generate.extractor=inception", "Inception is for natural images"),
        ("evaluation.reliability.ood=[auto, noise]", "`ood` is 'auto' or a list of sets, not both"),
        ("evaluation.reliability.ood=folder", "ood 'folder' needs `ood_path`"),
        ("evaluation.reliability={ood: noise, ood_path: x}", "`ood_path` is for ood 'folder'"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(override: str, expected: str, refusal: Refusal) -> None:
    assert expected in refusal([override])


def test_a_batch_must_fit_a_long_tailed_split(refusal: Refusal) -> None:
    """Of 60, 46, 35, 27, 21, 16, 12, 10, 7 and 6 images, all but int(0.2 n) of each."""
    tailed = "data={validation: null, imbalance: {ratio: 10, largest: 60}}"
    assert "batch_size: 195 is larger than the training split (194 images)" in refusal([tailed, "training.batch_size=195"])
    assert load(DIGITS, [tailed, "training.batch_size=194"]).data.training_size() == 194


@pytest.mark.parametrize(
    ("override", "expected"),
    [("ood=[cifar10]", "ood: 'cifar10' is the training data"), ("ood_path=images.tar.xz", "ood_path: is data.path, the training data")],
)
def test_the_training_data_are_not_out_of_distribution(override: str, expected: str, refusal: Refusal) -> None:
    folder = ["data={source: folder, test: null, path: images.tar.xz}"] if "path" in override else ["data={source: cifar10, test: null}"]
    assert f"evaluation.reliability.{expected}" in refusal([*folder, f"evaluation.reliability.{override}"])


def test_protocols_start_from_their_presets_and_know_their_radius() -> None:
    attack = load(CIFAR).evaluation.attack
    standard, released, l2 = (attack.protocols[name] for name in ("standard", "released", "standard_l2"))
    assert list(standard.attacks) == ["apgd_ce", "apgd_t", "fab_t", "square"]
    assert [standard.attacks[name].steps for name in ("apgd_ce", "apgd_t", "fab_t")] == [100, 100, 100]
    assert standard.attacks["square"].queries == 5000
    assert (standard.radius * 255, standard.pgd_step * 255) == (pytest.approx(8), pytest.approx(2))
    assert list(released.attacks) == ["apgd_ce", "apgd_dlr", "fab_t", "square"]
    assert [released.attacks[name].steps for name in ("apgd_ce", "apgd_dlr", "fab_t")] == [20, 20, 20]
    assert (released.attacks["fab_t"].range, released.attacks["fab_t"].targets) == ("internal", 9)
    assert (released.radius * 255, released.pgd_step * 255) == (pytest.approx(4), pytest.approx(0.5))  # half of what it states
    assert l2.attacks == standard.attacks
    assert (l2.norm, l2.radius) == ("L2", 0.5)
    without = load(CIFAR, [f"{L2}.attacks.fab_t=null"])
    assert list(without.evaluation.attack.protocols["standard_l2"].attacks) == ["apgd_ce", "apgd_t", "square"]


def test_the_released_protocol_has_a_noise_for_each_base() -> None:
    """0.03 for JEM and JEM++, none for SADA-JEM; 0.03 for methods without a base, and for any other network."""
    full = load(FULL)
    noise = {name: entry.attack.protocols["released"].noise for name, entry in full.experiments.items()}
    assert noise == {name: 0.0 if name in ("sadajem", "eb_jdat_sadajem") else 0.03 for name in full.experiments}
    assert all(entry.attack.protocols[name].noise == 0 for entry in full.experiments.values() for name in ("standard", "standard_l2"))
    assert usual_protocols(10).protocols["released"].noise == 0.03
    own = ["evaluation.attack.protocols.mine={like: released, eps: 0.1, pgd: {step_size: 0.1}, n: 0, noise: 0.1, noise_on: {jem: 0.2}}"]
    mine = load(FULL, own)
    found = [mine.experiments[name].attack.protocols["mine"].noise for name in ("jem", "jempp", "sadajem", "pgd_at")]
    assert found == [0.2, 0.1, 0.0, 0.1]
