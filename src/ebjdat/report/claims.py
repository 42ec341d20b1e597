"""The paper's claims against what was measured here: holds, fails or open, and why. One function per claim.

A claim is judged with the uncertainty of both sides: "open" is what neither the data nor its size can decide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.stats import fisher_exact

from ebjdat.intervals import mcnemar, normal, over_seeds
from ebjdat.metrics import describe, sign
from ebjdat.registry import FORMS, RELEASE
from ebjdat.report.tables import Measured, Row, accuracy, effective_radius, paper_numbers, stands_together
from ebjdat.settings import RELEASED, STANDARD, Profile, base_of, form_of, form_values, prefix_of

Verdict = Literal["holds", "fails", "open"]
SIGNIFICANT = 0.05
ENOUGH = 3  # seeds, for a claim about training
MARGIN = 39.67 / 37.12 - 1  # how much farther than its JEM's the paper lets EB-JDAT's samples be
ARCHITECTURE, RADIUS = (28, 10, "jem"), 8 / 255  # of the paper's table, as far as its released code tells


@dataclass(frozen=True)
class Finding:
    """One claim. paper: what it says, with its number; measured: ours with n and intervals; protocol: how; why: of the verdict."""

    claim: str
    paper: str
    measured: str
    protocol: str
    verdict: Verdict
    why: str


@dataclass(frozen=True)
class Evidence:
    """What was measured: the profile, a row per experiment and seed, and the folder with every verdict."""

    profile: Profile
    rows: Sequence[Row]
    results: Path

    def find(self, method: str, form: str | None = None, w2: float | None = None) -> str | None:
        """The first experiment of a method as it is defined (its form's own score and weights; another w2 where asked for)."""
        for name, entry in self.profile.experiments.items():
            settings = self.profile.training_settings(name)
            if entry.method != method or (form is not None and form_of(method, entry.form) != form):
                continue
            row = form_values(form, base_of(entry.method, entry.base)) if form else {}
            usual = row.get("weights", {}) | ({} if w2 is None else {"w2": w2})
            as_usual = all(getattr(settings.weights, name) == usual.get(name, 1.0) for name in ("w1", "w2", "w3"))
            if form is None or (as_usual and settings.adversary.score == row["adversary"]["score"]):
                return name
        return None

    @property
    def ours(self) -> str | None:
        """EB-JDAT as its paper defines it, else the paper's form with another inner score."""
        for name, entry in self.profile.experiments.items():
            weights = self.profile.training_settings(name).weights
            if form_of(entry.method, entry.form) == "paper" and (weights.w1, weights.w2, weights.w3) == (1, 1, 1):
                return self.find("eb_jdat", "paper") or name
        return None

    @property
    def trained_robust(self) -> list[str]:
        return [name for name in (self.find("pgd_at"), self.find("trades")) if name]

    @property
    def jem(self) -> str | None:
        """The JEM that EB-JDAT's experiment stands on."""
        entry = self.profile.experiments.get(self.ours or "")
        return self.find(base_of(entry.method, entry.base) or "") if entry else None

    def metrics(self, experiment: str) -> list[dict[str, Any]]:
        return [row.metrics for row in self.rows if row.experiment == experiment]

    @property
    def column(self) -> str:
        """The strongest attack of the standard protocol that was run, as verdicts.parquet names it."""
        return "autoattack" if self.profile.evaluation.attack.standard.n else "pgd20"

    def robust(self, experiment: str, column: str = "autoattack", protocol: str = STANDARD) -> Measured | None:
        """After the protocol's ensemble ("autoattack") or after PGD ("pgd20"); None where that was not run."""
        n = "n_attack" if column == "autoattack" else "n_test"
        return accuracy(self.rows, experiment, f"{prefix_of(protocol)}{column}", f"{prefix_of(protocol)}{n}")

    def spread(self, experiment: str, name: str) -> Measured | None:
        """A metric that is no accuracy, with its interval: over seeds, or from its standard error, or none (low = high = nan)."""
        mine = [m[name] for m in self.metrics(experiment) if m.get(name) is not None]
        if not mine:
            return None
        first = self.metrics(experiment)[0]
        if len(mine) > 1:
            low, high = over_seeds(mine)
        elif first.get(f"{name}_se") is not None:
            low, high = normal(mine[0], first[f"{name}_se"])
            low = max(0.0, low)  # a gap is not negative
        else:
            low = high = float("nan")
        return Measured(float(np.mean(mine)), low, high, len(mine))

    def better(self, a: str, b: str, column: str) -> tuple[Verdict, str]:
        """Whether a classifies more of the same examples right than b: "holds" more, "fails" fewer; and how that was decided.

        column: of verdicts.parquet under the standard protocol. One seed: McNemar; several: t interval of the differences.
        """
        counts = []
        for seed in self.profile.seeds:
            stands = stands_together(self.results, (a, b), seed, column)
            counts.append((*mcnemar(stands[a], stands[b]), len(stands[a])))
        differences = [(only_a - only_b) / n for only_a, only_b, _, n in counts]
        if len(counts) == 1:
            only_a, only_b, p, n = counts[0]
            significant, how = p < SIGNIFICANT, f"McNemar on the same {n} examples: only {a} right {only_a}, only {b} {only_b}, p = {p:.2g}"
        else:
            low, high = over_seeds(differences)
            significant = low > 0 or high < 0
            how = f"difference over {len(counts)} seeds {100 * np.mean(differences):+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"
        if not significant:
            return "open", f"{how}: no difference that these examples can show"
        how += "" if len(counts) > 1 else "; one seed: of these two networks, not yet of the methods"
        return ("holds" if sign(f"{column}_acc") * np.mean(differences) > 0 else "fails"), how


Claim = Callable[[Evidence], Finding | None]  # None: no experiment of the profile is about it


def stated_robustness(e: Evidence) -> Finding | None:
    if e.ours is None:
        return None
    standard, settings = e.robust(e.ours), e.profile.evaluation.attack.standard
    theirs = paper_numbers(e.profile, e.ours).get("autoattack")
    network = e.profile.model_settings(e.profile.experiments[e.ours].pretraining)
    claim, protocol = "EB-JDAT withstands AutoAttack at 8/255", f"standard, {effective_radius(e.profile, STANDARD)}"
    paper = f"{theirs:.2f} %" if theirs else "64.78 % (on JEM++), 66.12 % (on SADA-JEM), CIFAR-10"
    measured = f"{e.ours}: {standard.percent()} %, n = {standard.n}" if standard else "AutoAttack was not run"
    same = theirs is not None and (network.depth, network.width, network.variant) == ARCHITECTURE and abs(settings.radius - RADIUS) < 1e-9
    if theirs is None or not same:
        return Finding(
            claim, paper, measured, protocol, "open", "other data, network or radius than the paper's: its number is not at stake"
        )
    if standard is None:
        return Finding(claim, paper, measured, protocol, "open", "not measured")
    if standard.high * 100 < theirs:
        return Finding(claim, paper, measured, protocol, "fails", "the paper's number lies above the interval")
    if standard.low * 100 >= theirs:
        return Finding(claim, paper, measured, protocol, "holds", "the interval lies above the paper's number")
    return Finding(claim, paper, measured, protocol, "open", "the paper's number lies within the interval: more images or seeds would tell")


def stated_protocol(e: Evidence) -> Finding | None:
    if e.ours is None or RELEASED not in e.profile.evaluation.attack.protocols:
        return None
    column = e.column if e.profile.evaluation.attack.protocols[RELEASED].n else "pgd20"
    standard, released = e.robust(e.ours, column), e.robust(e.ours, column, RELEASED)
    if standard is None or released is None:
        return None
    n = f"n = {standard.n}" if standard.n == released.n else f"n = {released.n} and {standard.n}"
    return Finding(
        "The released evaluation measures what the paper states: L∞ 8/255, AutoAttack standard",
        "L∞ 8/255, AutoAttack standard",
        f"{e.ours}, {column}: {released.percent()} % as released ({effective_radius(e.profile, RELEASED)}), {standard.percent()} % as "
        f"stated ({effective_radius(e.profile, STANDARD)}), {n}",
        "released against standard",
        "fails",
        "its budget is applied to [-1, 1] pixels, half as far in [0, 1], with noise on the images (none on SADA-JEM) and without targeted "
        f"APGD: a fact of the code ({RELEASE}); it reads {100 * (released.value - standard.value):+.1f} points here. How the paper's own "
        "numbers were made is inferred",
    )


def beats_adversarial_training(e: Evidence) -> Finding | None:
    if e.ours is None or not e.trained_robust:
        return None
    column = e.column
    against = max(e.trained_robust, key=lambda name: found.value if (found := e.robust(name, column)) else 0.0)
    mine, theirs = e.robust(e.ours, column), e.robust(against, column)
    if mine is None or theirs is None:
        return None
    verdict, why = e.better(e.ours, against, column)
    if column != "pgd20":
        why += f". Under PGD-20: {e.better(e.ours, against, 'pgd20')[1]}"
    return Finding(
        "EB-JDAT is more robust than adversarial training",
        "AutoAttack 64.78 % (JEM++) against 55.52 % (LAS-AWP), CIFAR-10",
        f"{e.ours} {mine.percent()} %, {against} {theirs.percent()} %, n = {mine.n}",
        f"standard, {effective_radius(e.profile, STANDARD)}, {column}",
        verdict,
        why,
    )


def keeps_accuracy(e: Evidence) -> Finding | None:
    if e.ours is None or not e.trained_robust:
        return None
    against = max(e.trained_robust, key=lambda name: found.value if (found := accuracy(e.rows, name, "clean", "n_test")) else 0.0)
    mine, theirs = accuracy(e.rows, e.ours, "clean", "n_test"), accuracy(e.rows, against, "clean", "n_test")
    if mine is None or theirs is None:
        return None
    verdict, why = e.better(e.ours, against, "clean")
    return Finding(
        "EB-JDAT keeps more clean accuracy than adversarial training",
        "90.30 % against 82.67 to 87.74 %, CIFAR-10",
        f"{e.ours} {mine.percent()} %, {against} {theirs.percent()} %, n = {mine.n}",
        "clean test images",
        verdict,
        why,
    )


def generates_like_its_jem(e: Evidence) -> Finding | None:
    jem = e.jem
    if e.ours is None or jem is None:
        return None
    mine, theirs = e.spread(e.ours, "frechet"), e.spread(jem, "frechet")
    starts = e.spread(e.ours, "frechet_start")
    if mine is None or theirs is None or starts is None:
        return None
    margin = MARGIN * theirs.value
    verdict: Verdict = "open"
    if mine.n == theirs.n == len(e.profile.seeds) > 1:
        pairs = zip(e.metrics(e.ours), e.metrics(jem), strict=True)
        low, high = over_seeds([a["frechet"] - b["frechet"] for a, b in pairs])
        verdict = "holds" if high <= margin else "fails" if low > margin else "open"
        why = f"difference over {mine.n} seeds [{low:+.2f}, {high:+.2f}]; the paper's own is +{margin:.2f} on this scale ({MARGIN:.0%})"
    else:
        why = f"{'one seed' if len(e.profile.seeds) == 1 else 'not measured for every seed'}: the distance has no interval"
    if mine.value >= starts.value:
        why += f"; its chains' starts alone reach {starts.value:.2f}: the chains add nothing that this distance sees"
        verdict = "open" if theirs.value >= starts.value else verdict
    first = e.metrics(e.ours)[0]
    return Finding(
        "EB-JDAT generates about as well as the JEM it stands on",
        "FID 39.67 against 37.12 (JEM++), CIFAR-10",
        f"{e.ours} {mine.value:.2f}, {jem} {theirs.value:.2f}, {first['n_samples']} samples each",
        f"fresh chains, none discarded, against the training split, features: {first['frechet_extractor']}",
        verdict,
        why,
    )


def fid_is_of_samples(e: Evidence) -> Finding | None:
    if e.ours is None:
        return None
    fresh, released = e.spread(e.ours, "frechet"), e.spread(e.ours, "released_frechet")
    if fresh is None or released is None:
        return None
    first = e.metrics(e.ours)[0]
    return Finding(
        "The released evaluation's FID is that of the model's samples",
        "FID 39.67 (JEM++), 27.42 (SADA-JEM), CIFAR-10",
        f"{e.ours}: {released.value:.2f} as released (n = {first.get('released_n_samples')}), {fresh.value:.2f} of fresh chains "
        f"(n = {first['n_samples']})",
        f"released against standard, features: {first['frechet_extractor']}",
        "fails",
        "it takes the most confident 90 % of the training buffer and compares them with training and test images: a fact of the code; "
        "the two distances differ in n as well, which biases them",
    )


def _closes(e: Evidence, claim: str, paper: str, gap: str, who: str | None, against: str | None) -> Finding | None:
    if who is None or against is None:
        return None
    mine, theirs = e.spread(who, gap), e.spread(against, gap)
    if mine is None or theirs is None:
        return None
    verdict: Verdict = "holds" if mine.high < theirs.low else "fails" if mine.low > theirs.high else "open"
    measured = (
        f"{who} {mine.value:.2f} [{mine.low:.2f}, {mine.high:.2f}], {against} {theirs.value:.2f} [{theirs.low:.2f}, {theirs.high:.2f}]"
    )
    why = {"holds": "the intervals are apart", "fails": "the gap is larger, and the intervals are apart", "open": "the intervals meet"}[
        verdict
    ]
    if mine.n == 1 and verdict != "open":
        why += "; one seed: of these two networks, not yet of the methods"
    protocol = f"energies of test images, PGD-20 neighbours (standard) and fresh chains, {describe(gap).unit}"
    return Finding(claim, paper, measured, protocol, verdict, why)


def training_closes_first_gap(e: Evidence) -> Finding | None:
    claim, paper = "Adversarial training narrows the gap of energies between clean and adversarial images", "1.46 against 10.18"
    return _closes(e, claim, paper, "energy_gap_adversarial", e.find("pgd_at"), e.find("classifier"))


def jem_closes_second_gap(e: Evidence) -> Finding | None:
    claim, paper = "A JEM narrows the gap of energies between clean and generated images", "figure, no number"
    return _closes(e, claim, paper, "energy_gap_generated", e.jem, e.find("pgd_at") or e.find("classifier"))


def closes_first_gap(e: Evidence) -> Finding | None:
    claim, paper = "EB-JDAT narrows the first gap further than adversarial training", "figure, no number"
    return _closes(e, claim, paper, "energy_gap_adversarial", e.ours, e.find("pgd_at"))


def closes_second_gap(e: Evidence) -> Finding | None:
    claim, paper = "EB-JDAT narrows the second gap further than adversarial training", "figure, no number"
    return _closes(e, claim, paper, "energy_gap_generated", e.ours, e.find("pgd_at") or e.find("classifier"))


def alignment_prevents_collapse(e: Evidence) -> Finding | None:
    without = e.find("eb_jdat", "paper", w2=0.0)
    claim, paper = "Without energy alignment (h2) training collapses", "collapse at epoch 41 of 100 (weights 0 0 1, which leave out h1 too)"
    if e.ours is None:
        return None
    if without is None:
        return Finding(claim, paper, "not measured", "–", "open", "no experiment of this profile leaves h2 alone out (w = 1 0 1)")
    missing, kept = _diverged(e, without), _diverged(e, e.ours)
    measured = f"{without}: {missing[0]} of {missing[1]} seeds diverged, {e.ours}: {kept[0]} of {kept[1]}"
    p = float(fisher_exact([[missing[0], missing[1] - missing[0]], [kept[0], kept[1] - kept[0]]]).pvalue)
    verdict: Verdict = "open" if p >= SIGNIFICANT else "holds" if missing[0] / missing[1] > kept[0] / kept[1] else "fails"
    why = f"Fisher's exact p = {p:.2g}"
    if missing[0] == kept[0] == 0:
        why = "nothing diverged, with or without it: at this profile's chain steps and rates there is nothing to prevent"
    return Finding(claim, paper, measured, "checks during training (docs/healing.md)", verdict, why)


def _diverged(e: Evidence, experiment: str) -> tuple[int, int]:
    """Seeds of an experiment whose training diverged, and all."""
    epochs = [m.get("collapse_epoch") for m in e.metrics(experiment)]
    return sum(epoch is not None for epoch in epochs), len(epochs)


def code_is_the_paper(e: Evidence) -> Finding | None:
    if e.ours is None:
        return None
    claim, paper, column = "The released code computes what the paper defines", "implied", e.column
    fact = f"inner walk, its budget and the alignment's sign and clean images differ: a fact of the code ({RELEASE})"
    mine = e.robust(e.ours, column)
    measured, why = [], [fact]
    for form, what in (
        ("released", "released form, its default lines"),
        ("released_ce", "the same with its commented-out cross-entropy step"),
    ):
        name = e.find("eb_jdat", form)
        theirs = e.robust(name, column) if name else None
        if name is not None and theirs is not None:
            measured.append(f"{what} ({name}) {theirs.percent()} %")
            why.append(e.better(e.ours, name, column)[1])
    if mine is None or not measured:
        return Finding(claim, paper, "what that does was not measured: no experiment has `form: released`", "–", "fails", fact)
    return Finding(
        claim,
        paper,
        f"paper form {mine.percent()} %, {', '.join(measured)}, n = {mine.n}",
        f"standard, {effective_radius(e.profile, STANDARD)}, {column}",
        "fails",
        "; ".join(why),
    )


def more_steps_collapse(e: Evidence) -> Finding | None:
    if e.ours is None:
        return None
    claim, paper = "More than 5 adversarial steps make the energy-based model collapse", "stated"
    usual = FORMS["paper"].defaults["adversary"]["score"]
    longer = [
        name
        for name, entry in e.profile.experiments.items()
        if form_of(entry.method, entry.form) == "paper"
        and (adversary := e.profile.training_settings(name).adversary).steps > 5
        and adversary.score == usual
    ]
    if not longer:
        return Finding(claim, paper, "not measured", "–", "open", "no experiment of this profile takes more than 5 (adversary.steps)")
    counts = [_diverged(e, name) for name in longer]
    diverged, runs = sum(c[0] for c in counts), sum(c[1] for c in counts)
    verdict: Verdict = "open" if runs < ENOUGH or 0 < diverged < runs else "holds" if diverged else "fails"
    measured = f"{diverged} of {runs} runs diverged ({', '.join(longer)})"
    return Finding(
        claim, paper, measured, "checks during training (docs/healing.md)", verdict, f"counted; fewer than {ENOUGH} runs say nothing"
    )


CLAIMS: tuple[Claim, ...] = (
    stated_robustness,
    stated_protocol,
    beats_adversarial_training,
    keeps_accuracy,
    generates_like_its_jem,
    fid_is_of_samples,
    training_closes_first_gap,
    jem_closes_second_gap,
    closes_first_gap,
    closes_second_gap,
    alignment_prevents_collapse,
    code_is_the_paper,
    more_steps_collapse,
)


def judge(evidence: Evidence) -> list[Finding]:
    """Every claim that this profile's experiments say something about, in the paper's order."""
    return [found for claim in CLAIMS if (found := claim(evidence)) is not None]
