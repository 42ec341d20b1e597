"""The paper's claims against what was measured: holds, fails or open, and why. One function per claim.

A claim is judged with the uncertainty of both sides: "open" means that the data cannot decide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from scipy.stats import fisher_exact

from ebjdat.intervals import over_seeds
from ebjdat.metrics import describe, sign
from ebjdat.names import STANDARD
from ebjdat.registry import FORMS, METHODS, RELEASE, Family
from ebjdat.report.collect import RunResult, metrics_of
from ebjdat.report.format import effective_radius
from ebjdat.report.pairs import SIGNIFICANT, compared
from ebjdat.report.summary import Estimate, estimate, paper_numbers
from ebjdat.settings import RELEASED, Profile, form_values

Verdict = Literal["holds", "fails", "open"]
WHY_OF_GAPS = {
    "holds": "the intervals do not overlap",
    "fails": "the gap is larger, and the intervals do not overlap",
    "open": "the intervals overlap",
}
ROBUST: Family = "joint"
ONE_SEED = "one seed: about these networks, not yet about the methods"
TRAINING_CHECKS = "checks during training (docs/healing.md)"
ENOUGH = 3  # seeds, for a claim about training
MARGIN = 39.67 / 37.12 - 1  # in the paper, EB-JDAT's distance is this much larger than its JEM's
ARCHITECTURE, RADIUS = (28, 10, "jem"), 8 / 255  # of the paper's table, according to its released code


@dataclass(frozen=True)
class Finding:
    """One claim.

    paper: what it says, with its number. measured: what was measured here, with n and intervals. protocol: how. why: the reason for the
    verdict.
    """

    claim: str
    paper: str
    measured: str
    protocol: str
    verdict: Verdict
    why: str


@dataclass(frozen=True)
class Evidence:
    """What was measured: the profile, a result per experiment and seed, and the folder with every verdict."""

    profile: Profile
    runs: Sequence[RunResult]
    results: Path

    def find(self, method: str, form: str | None = None, w2: float | None = None) -> str | None:
        """The first experiment of a method as it is defined: with its form's own score and weights, or another w2 if given."""
        for name, entry in self.profile.experiments.items():
            settings = self.profile.training_settings(name)
            if entry.method != method or (form is not None and entry.form != form):
                continue
            values = form_values(form, entry.base) if form else {}
            usual = values.get("weights", {}) | ({} if w2 is None else {"w2": w2})
            as_usual = all(getattr(settings.weights, name) == usual.get(name, 1.0) for name in ("w1", "w2", "w3"))
            if form is None or (as_usual and settings.adversary.score == values["adversary"]["score"]):
                return name
        return None

    def of_family(self, family: Family) -> list[str]:
        """Every experiment whose method is of a family, in the registry's order: the first is the plainest."""
        methods = [method for method, row in METHODS.items() if row.family == family]
        return [name for method in methods for name, entry in self.profile.experiments.items() if entry.method == method]

    def first(self, *families: Family) -> str | None:
        """The first experiment of the first of these families that the profile has."""
        return next((name for family in families for name in self.of_family(family)), None)

    def variant(self, form: str, w2: float | None = None) -> str | None:
        """EB-JDAT in another form, or with another w2."""
        robust = [name for name, method in METHODS.items() if method.family == ROBUST]
        return next((found for name in robust if (found := self.find(name, form, w2))), None)

    @property
    def eb_jdat(self) -> str | None:
        """EB-JDAT as its paper defines it, else the paper's form with another inner score."""
        for name, entry in self.profile.experiments.items():
            weights = self.profile.training_settings(name).weights
            if entry.form == "paper" and (weights.w1, weights.w2, weights.w3) == (1, 1, 1):
                return self.variant("paper") or name
        return None

    @property
    def jem(self) -> str | None:
        """The JEM that EB-JDAT's experiment builds on."""
        entry = self.profile.experiments.get(self.eb_jdat or "")
        return self.find(entry.base or "") if entry else None

    def estimate(self, experiment: str, name: str, protocol: str = STANDARD) -> Estimate | None:
        return estimate(metrics_of(self.runs, experiment), name, protocol)

    @property
    def column(self) -> str:
        """The strongest attack of the standard protocol that was run, as verdicts.parquet names it."""
        return "autoattack" if self.profile.evaluation.attack.standard.n else "pgd20"

    def accuracy(self, experiment: str, column: str = "autoattack", protocol: str = STANDARD) -> Estimate | None:
        """Without an attack ("clean"), after PGD ("pgd20") or after the protocol's ensemble; None where that was not run."""
        return self.estimate(experiment, f"{column}_acc", protocol)

    def protocol(self) -> str:
        return f"standard, {effective_radius(self.profile, STANDARD)}"

    def extractor(self, experiment: str) -> str:
        return str(metrics_of(self.runs, experiment)[0]["frechet_extractor"])

    def diverged(self, experiment: str) -> tuple[int, int]:
        """Seeds of an experiment whose training diverged, and all."""
        epochs = [seed.get("collapse_epoch") for seed in metrics_of(self.runs, experiment)]
        return sum(epoch is not None for epoch in epochs), len(epochs)

    def better(self, a: str, b: str, column: str) -> tuple[Verdict, str]:
        """Whether a classifies more of the same examples right than b: "holds" more, "fails" fewer; and how that was decided.

        column: of verdicts.parquet under the standard protocol. One seed: McNemar's test; several: t interval of the differences.
        """
        found = compared(self.results, a, b, self.profile.seeds, column)
        if found.seeds == 1:
            counts = f"only {a} right {found.only_a}, only {b} {found.only_b}"
            how = f"McNemar on the same {found.n} examples: {counts}, p = {found.p:.2g}"
        else:
            how = f"difference over {found.seeds} seeds {found.points.replace(' [', ' points [')}"
        if not found.significant:
            return "open", f"{how}: no difference that these examples can detect"
        how += "" if found.seeds > 1 else f"; {ONE_SEED}"
        return ("holds" if sign(f"{column}_acc") * found.difference > 0 else "fails"), how


Claim = Callable[[Evidence, str], Finding | None]  # of EB-JDAT's experiment; None: no other experiment of the profile is about it


def stated_robustness(e: Evidence, eb_jdat: str) -> Finding | None:
    standard, reference = e.accuracy(eb_jdat), paper_numbers(e.profile, eb_jdat).get("autoattack")
    network = e.profile.model_settings(e.profile.experiments[eb_jdat].pretraining)
    verdict: Verdict
    same_network = (network.depth, network.width, network.variant) == ARCHITECTURE
    if reference is None or not same_network or abs(e.profile.evaluation.attack.standard.radius - RADIUS) >= 1e-9:
        verdict, why = "open", "other data, network or radius than the paper's: its number is not tested"
    elif standard is None:
        verdict, why = "open", "not measured"
    elif standard.high * 100 < reference:
        verdict, why = "fails", "the paper's number lies above the interval"
    elif standard.low * 100 >= reference:
        verdict, why = "holds", "the interval lies above the paper's number"
    else:
        verdict, why = "open", "the paper's number lies within the interval: more images or seeds could decide"
    return Finding(
        "EB-JDAT withstands AutoAttack at 8/255",
        f"{reference:.2f} %" if reference else "64.78 % (on JEM++), 66.12 % (on SADA-JEM), CIFAR-10",
        f"{eb_jdat}: {standard.percent()} %, n = {standard.n}" if standard else "AutoAttack was not run",
        e.protocol(),
        verdict,
        why,
    )


def stated_protocol(e: Evidence, eb_jdat: str) -> Finding | None:
    if RELEASED not in e.profile.evaluation.attack.protocols:
        return None
    column = e.column if e.profile.evaluation.attack.protocols[RELEASED].n else "pgd20"
    standard, released = e.accuracy(eb_jdat, column), e.accuracy(eb_jdat, column, RELEASED)
    if standard is None or released is None:
        return None
    n = f"n = {standard.n}" if standard.n == released.n else f"n = {released.n} and {standard.n}"
    return Finding(
        "The released evaluation measures what the paper states: L∞ 8/255, AutoAttack standard",
        "L∞ 8/255, AutoAttack standard",
        f"{eb_jdat}, {column}: {released.percent()} % as released ({effective_radius(e.profile, RELEASED)}), {standard.percent()} % as "
        f"stated ({effective_radius(e.profile, STANDARD)}), {n}",
        "released against standard",
        "fails",
        "its budget is applied to [-1, 1] pixels, half as far in [0, 1], with noise on the images (none on SADA-JEM) and without targeted "
        f"APGD: a fact of the code ({RELEASE}); here the difference is {100 * (released.value - standard.value):+.1f} points. How the "
        "paper's own numbers were made is inferred",
    )


def _against_adversarial_training(e: Evidence, eb_jdat: str, column: str, claim: str, paper: str, protocol: str) -> Finding | None:
    trained = e.of_family("adversarial")
    if not trained:
        return None
    against = max(trained, key=lambda name: best.value if (best := e.accuracy(name, column)) else 0.0)
    own, reference = e.accuracy(eb_jdat, column), e.accuracy(against, column)
    if own is None or reference is None:
        return None
    verdict, why = e.better(eb_jdat, against, column)
    if column == "autoattack":
        why += f". Under PGD-20: {e.better(eb_jdat, against, 'pgd20')[1]}"
    measured = f"{eb_jdat} {own.percent()} %, {against} {reference.percent()} %, n = {own.n}"
    return Finding(claim, paper, measured, protocol, verdict, why)


def beats_adversarial_training(e: Evidence, eb_jdat: str) -> Finding | None:
    claim, paper = "EB-JDAT is more robust than adversarial training", "AutoAttack 64.78 % (JEM++) against 55.52 % (LAS-AWP), CIFAR-10"
    return _against_adversarial_training(e, eb_jdat, e.column, claim, paper, f"{e.protocol()}, {e.column}")


def keeps_accuracy(e: Evidence, eb_jdat: str) -> Finding | None:
    claim, paper = "EB-JDAT keeps more clean accuracy than adversarial training", "90.30 % against 82.67 to 87.74 %, CIFAR-10"
    return _against_adversarial_training(e, eb_jdat, "clean", claim, paper, "clean test images")


def generates_like_its_jem(e: Evidence, eb_jdat: str) -> Finding | None:
    jem = e.jem
    if jem is None:
        return None
    own, reference, starts = e.estimate(eb_jdat, "frechet"), e.estimate(jem, "frechet"), e.estimate(eb_jdat, "frechet_start")
    if own is None or reference is None or starts is None:
        return None
    margin = MARGIN * reference.value
    verdict: Verdict = "open"
    if own.seeds == reference.seeds == len(e.profile.seeds) > 1:
        pairs = zip(metrics_of(e.runs, eb_jdat), metrics_of(e.runs, jem), strict=True)
        low, high = over_seeds([a["frechet"] - b["frechet"] for a, b in pairs])
        verdict = "holds" if high <= margin else "fails" if low > margin else "open"
        why = f"difference over {own.seeds} seeds [{low:+.2f}, {high:+.2f}]; the paper's own is +{margin:.2f} on this scale ({MARGIN:.0%})"
    else:
        why = f"{'one seed' if len(e.profile.seeds) == 1 else 'not measured for every seed'}: the distance has no interval"
    if own.value >= starts.value:
        why += f"; its chains' starts alone reach {starts.value:.2f}: the chains add nothing that this distance detects"
        verdict = "open" if reference.value >= starts.value else verdict
    return Finding(
        "EB-JDAT generates about as well as the JEM it builds on",
        "FID 39.67 against 37.12 (JEM++), CIFAR-10",
        f"{eb_jdat} {own.value:.2f}, {jem} {reference.value:.2f}, {own.n} samples each",
        f"fresh chains, none discarded, against the training split, features: {e.extractor(eb_jdat)}",
        verdict,
        why,
    )


def fid_is_of_samples(e: Evidence, eb_jdat: str) -> Finding | None:
    fresh, released = e.estimate(eb_jdat, "frechet"), e.estimate(eb_jdat, "frechet", RELEASED)
    if fresh is None or released is None:
        return None
    return Finding(
        "The released evaluation's FID is that of the model's samples",
        "FID 39.67 (JEM++), 27.42 (SADA-JEM), CIFAR-10",
        f"{eb_jdat}: {released.value:.2f} as released (n = {released.n}), {fresh.value:.2f} of fresh chains (n = {fresh.n})",
        f"released against standard, features: {e.extractor(eb_jdat)}",
        "fails",
        "it takes the most confident 90 % of the training buffer and compares them with training and test images: a fact of the code; "
        "the two distances differ in n as well, which biases them",
    )


def _narrows(
    e: Evidence, metric: str, narrow: str | None, wide: str | None, claim: str, paper: str = "figure, no number"
) -> Finding | None:
    if narrow is None or wide is None:
        return None
    own, reference = e.estimate(narrow, metric), e.estimate(wide, metric)
    if own is None or reference is None:
        return None
    verdict: Verdict = "holds" if own.high < reference.low else "fails" if own.low > reference.high else "open"
    gaps = ((narrow, own), (wide, reference))
    measured = ", ".join(f"{name} {gap.value:.2f} [{gap.low:.2f}, {gap.high:.2f}]" for name, gap in gaps)
    why = WHY_OF_GAPS[verdict]
    if own.seeds == 1 and verdict != "open":
        why += f"; {ONE_SEED}"
    protocol = f"energies of test images, PGD-20 neighbours (standard) and fresh chains, {describe(metric).unit}"
    return Finding(claim, paper, measured, protocol, verdict, why)


def adversarial_images_have_more_energy(e: Evidence, _: str) -> Finding | None:
    """The premise of EB-JDAT's alignment, on the standard classifier: signed changes, which the mean of |E(x) - E(x~)| hides."""
    network = e.first("standard")
    changes = {name: e.estimate(network, f"energy_change_{name}") for name in ("untargeted", "targeted", "ascent")} if network else {}
    untargeted = changes.get("untargeted")
    if untargeted is None:
        return None
    verdict: Verdict = "holds" if untargeted.low > 0 else "fails" if untargeted.high < 0 else "open"
    measured = ", ".join(f"{name} {c.value:+.2f} [{c.low:+.2f}, {c.high:+.2f}]" for name, c in changes.items() if c)
    why = "decided by the untargeted attack on cross-entropy; arXiv 2407.06315 reports lower energies there and higher ones when targeted"
    return Finding(
        "Adversarial images have higher energy than clean ones",
        "premise of the alignment; gap 10.18 without a sign",
        f"{network}: {measured}",
        f"mean E(x̃) − E(x) over pairs, nats, PGD of the standard protocol, {effective_radius(e.profile, STANDARD)}",
        verdict,
        why + ("" if untargeted.seeds > 1 or verdict == "open" else f"; {ONE_SEED}"),
    )


def training_closes_first_gap(e: Evidence, _: str) -> Finding | None:
    claim = "Adversarial training narrows the gap of energies between clean and adversarial images"
    return _narrows(e, "energy_gap_adversarial", e.first("adversarial"), e.first("standard"), claim, "1.46 against 10.18")


def jem_closes_second_gap(e: Evidence, _: str) -> Finding | None:
    claim = "A JEM narrows the gap of energies between clean and generated images"
    return _narrows(e, "energy_gap_generated", e.jem, e.first("adversarial", "standard"), claim)


def closes_first_gap(e: Evidence, eb_jdat: str) -> Finding | None:
    claim = "EB-JDAT narrows the first gap further than adversarial training"
    return _narrows(e, "energy_gap_adversarial", eb_jdat, e.first("adversarial"), claim)


def closes_second_gap(e: Evidence, eb_jdat: str) -> Finding | None:
    claim = "EB-JDAT narrows the second gap further than adversarial training"
    return _narrows(e, "energy_gap_generated", eb_jdat, e.first("adversarial", "standard"), claim)


def alignment_prevents_collapse(e: Evidence, eb_jdat: str) -> Finding | None:
    without = e.variant("paper", w2=0.0)
    claim, paper = "Without energy alignment (h2) training collapses", "collapse at epoch 41 of 100 (weights 0 0 1, which leave out h1 too)"
    if without is None:
        return Finding(claim, paper, "not measured", "–", "open", "no experiment of this profile leaves out h2 alone (w = 1 0 1)")
    (missing, of_missing), (kept, of_kept) = e.diverged(without), e.diverged(eb_jdat)
    p = float(fisher_exact([[missing, of_missing - missing], [kept, of_kept - kept]]).pvalue)
    verdict: Verdict = "open" if p >= SIGNIFICANT else "holds" if missing / of_missing > kept / of_kept else "fails"
    why = f"Fisher's exact p = {p:.2g}"
    if missing == kept == 0:
        why = "nothing diverged, with or without it: at this profile's chain steps and rates there is nothing to prevent"
    measured = f"{without}: {missing} of {of_missing} seeds diverged, {eb_jdat}: {kept} of {of_kept}"
    return Finding(claim, paper, measured, TRAINING_CHECKS, verdict, why)


def code_is_the_paper(e: Evidence, eb_jdat: str) -> Finding | None:
    claim, column = "The released code computes what the paper defines", e.column
    fact = f"the inner maximisation, its budget, and the alignment's sign and clean images differ: a fact of the code ({RELEASE})"
    own, measured, why = e.accuracy(eb_jdat, column), [], [fact]
    forms = {"released": "released form, its default lines", "released_ce": "the same with its commented-out cross-entropy step"}
    for form, description in forms.items():
        name = e.variant(form)
        reference = e.accuracy(name, column) if name else None
        if name is not None and reference is not None:
            measured.append(f"{description} ({name}) {reference.percent()} %")
            why.append(e.better(eb_jdat, name, column)[1])
    if own is None or not measured:
        return Finding(claim, "implied", "its effect was not measured: no experiment has `form: released`", "–", "fails", fact)
    figures = f"paper form {own.percent()} %, {', '.join(measured)}, n = {own.n}"
    return Finding(claim, "implied", figures, f"{e.protocol()}, {column}", "fails", "; ".join(why))


def more_steps_collapse(e: Evidence, _: str) -> Finding | None:
    claim, paper = "More than 5 adversarial steps make the energy-based model collapse", "stated"
    usual = FORMS["paper"].defaults["adversary"]["score"]
    longer = [
        name
        for name, entry in e.profile.experiments.items()
        if entry.form == "paper" and (adversary := e.profile.training_settings(name).adversary).steps > 5 and adversary.score == usual
    ]
    if not longer:
        return Finding(claim, paper, "not measured", "–", "open", "no experiment of this profile takes more than 5 (adversary.steps)")
    counts = [e.diverged(name) for name in longer]
    diverged, runs = sum(c[0] for c in counts), sum(c[1] for c in counts)
    verdict: Verdict = "open" if runs < ENOUGH or 0 < diverged < runs else "holds" if diverged else "fails"
    measured = f"{diverged} of {runs} runs diverged ({', '.join(longer)})"
    return Finding(claim, paper, measured, TRAINING_CHECKS, verdict, f"counted; fewer than {ENOUGH} runs are too few to judge")


CLAIMS: tuple[Claim, ...] = (
    stated_robustness,
    stated_protocol,
    beats_adversarial_training,
    keeps_accuracy,
    generates_like_its_jem,
    fid_is_of_samples,
    adversarial_images_have_more_energy,
    training_closes_first_gap,
    jem_closes_second_gap,
    closes_first_gap,
    closes_second_gap,
    alignment_prevents_collapse,
    code_is_the_paper,
    more_steps_collapse,
)


def judge(evidence: Evidence) -> list[Finding]:
    """Every claim that this profile's experiments are evidence for or against, in the paper's order."""
    eb_jdat = evidence.eb_jdat
    claims = CLAIMS if eb_jdat else (adversarial_images_have_more_energy, training_closes_first_gap)  # not about EB-JDAT or its JEM
    return [finding for claim in claims if (finding := claim(evidence, eb_jdat or "")) is not None]
