"""Every name under which something is measured: what it means, its unit, and which direction is better. Stated here alone.

Result files, summary.csv, DVC, MLflow and the report use these names. docs/metrics.md is made from this table.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cache, lru_cache

from ebjdat import registry
from ebjdat.errors import UserError


class UnknownNameError(UserError):
    """Nothing is measured under this name."""


@dataclass(frozen=True)
class Quantity:
    """One name, or a pattern of names: [a|b] may stand there, (a|b) one of them stands there, <x> is one of the PLACES.

    better: "higher", "lower", or "" where neither is. only: when it is there at all ("" : always). label: its short title in
    tables. stage: the heading of STAGES it belongs to.
    """

    name: str
    unit: str
    better: str
    meaning: str
    only: str = ""
    label: str = ""
    stage: str = ""

    @property
    def is_pattern(self) -> bool:
        return any(mark in self.name for mark in "[(<")

    @property
    def percent(self) -> bool:
        """Tables show it in percent."""
        return self.unit == "fraction"

    @property
    def kind(self) -> type | tuple[type, ...]:
        """Python's type of its values in a JSON file, where it may be null as well."""
        kinds = {"text": str, "hex": str, "settings": dict, "mapping": dict, "true or false": bool}
        return list if self.unit.startswith("list") else kinds.get(self.unit, (int, float))


# heading -> where its names are found
STAGES: Mapping[str, str] = {
    "provenance": "What a result is of, in every file that says it. Text and settings, not measurements.",
    "training": "`pretrain.json`, `finetune.json`, and the header of checkpoints.",
    "curve": "`pretrain_curve.csv`, `finetune_curve.csv` and MLflow's curves: a row per epoch. Means over the epoch's batches, in the mode "
    "the network trains in, unless said otherwise.",
    "attack": "`attack.json`. Names of the protocol `standard` stand alone, those of every other begin with its name "
    "(`released_autoattack_acc`, `standard_l2_autoattack_acc`); `ema_` before all: the same of averaged weights. Protocols are settings, "
    "`evaluation.attack.protocols`. `released` shows the images with its noise (none on SADA-JEM), at half the radius, and attacks with "
    "a weaker ensemble: its figures are never to be called AutoAttack standard.",
    "generate": "`generate.json`. A name begins with its protocol, unless that is `standard` (`released_frechet`), and ends with its set "
    "of samples, unless that is the fresh chains (`frechet_conditional`, `frechet_buffer`). What an experiment does not have is null.",
    "energy": "`energy.json`. Energies are E(x) = −logsumexp of the logits; in curves the same names are of training batches.",
    "reliability": "`reliability.json`. Scores are higher, the more an image is like those of the data.",
    "report": "`summary.csv` (a row per experiment and seed), and `table.csv` (one per experiment: means over seeds), beside names above.",
    "bench": "What `ebjdat bench` prints and saves: a training step's speed ([how fast](performance.md)).",
    "system": "MLflow's system metrics, on the run of each stage: the whole machine's, unless said otherwise.",
}

# Columns of the report's table, in their order.
TABLE = ("clean_acc", "pgd20_acc", "autoattack_acc", "frechet", "energy_gap_adversarial", "energy_gap_generated", "train_seconds")

# What may stand for a place in a pattern. Protocols are settings, so any word may; `describe` takes the real ones.
PLACES: Mapping[str, tuple[str, Collection[str]]] = {
    "protocol": ("a protocol of the settings, also your own", ()),
    "steps": ("a whole number", ()),
    "gpu": ("a GPU's number, from 0", ()),
    "attack": ("an attack of the ensemble", tuple(registry.ATTACKS)),
    "score": ("an out-of-distribution score", ("energy", "max_probability", "gradient_norm")),
    "set": ("an out-of-distribution set", tuple(registry.OOD_SETS)),
    "column": ("a column of the table", TABLE),
}
WORD, NUMBER = r"[A-Za-z]\w*?", r"\d+"

BUFFER = "the method keeps a replay buffer (else null)"
INCEPTION, REFERENCE = "`frechet_extractor` is `inception` (else null)", "`frechet_extractor` is `reference` (else null)"
EMA = "training kept averaged weights (`training.ema`)"
ADVERSARIAL = "the method draws adversarial neighbours"
CHAINS = "the method has chains"
ENSEMBLE = "the protocol's ensemble was run (`n` above 0)"
SEEDS = "several seeds"
NAIVE = "`--against naive` (else null)"
GPU = "there is an NVIDIA GPU and nvidia-ml-py"
Q = Quantity


def _of(stage: str, *entries: Quantity) -> tuple[Quantity, ...]:
    return tuple(replace(entry, stage=stage) for entry in entries)


VOCABULARY: tuple[Quantity, ...] = (
    *_of(
        "provenance",
        Q("experiment", "text", "", "the experiment of the profile"),
        Q("method", "text", "", "its method, or a pretraining's"),
        Q("seed", "integer", "", "the run's seed"),
        Q("data_hash", "hex", "", "hash of the prepared arrays and splits"),
        Q("params_hash", "hex", "", "hash of everything in the settings that determines the row"),
        Q(
            "git_commit",
            "text",
            "",
            "commit it was measured at (`summary.csv`, checkpoints: trained at); `-dirty` when tracked files differed",
        ),
        Q("digest", "hex", "", "of all else in the file, so that a value that changed later is noticed"),
        Q("files", "mapping", "", "name → sha256 of the curves, pictures, arrays and verdicts that its stage wrote beside it"),
        Q("version", "text", "", "version of this package"),
        Q("settings", "settings", "", "what robustness was measured with (`evaluation.attack`, resolved)"),
        Q("not_finite", "list of names", "", "names beside it whose value was NaN or infinite, and is null", "there was one"),
        Q("notes", "list of text", "", "how images were read, where not as anybody expects; what was skipped", "`ebjdat attack --model`"),
        Q("(model|weights|data)", "text", "", "factory, hash of the tensors, name of the data", "`ebjdat attack --model`"),
    ),
    *_of(
        "training",
        Q("pretrain_seconds", "seconds", "lower", "wall time of the pretraining's loop; depends on what else the machine does"),
        Q("finetune_seconds", "seconds", "lower", "wall time of the fine-tuning's loop alone; depends on what else the machine does"),
        Q("epochs", "count", "", "epochs that were trained"),
        Q("selected_epoch", "epoch, from 1", "", "the epoch whose weights were kept; 0: those it began with"),
        Q(
            "selection_score",
            "fraction",
            "higher",
            "validation score that selected: `validation_clean_acc`, `validation_robust_acc` or their mean (`training.selection.score`)",
        ),
        Q("n_train", "count", "", "training images"),
        Q("n_validation", "count", "", "validation images"),
        Q(
            "collapse_epoch",
            "epoch, from 1",
            "",
            "epoch in which training first diverged (a check found a symptom; see [healing](healing.md)); null or empty: never",
            "training diverged",
        ),
        Q(
            "recoveries",
            "count",
            "lower",
            "how often training went back to a healthy state and on with a change; in `table.csv` the sum over seeds",
        ),
        Q("events", "list of text", "", "each divergence: where, by what symptom, and what was done"),
    ),
    *_of(
        "curve",
        Q("epoch", "epoch, from 1", "", "which epoch"),
        Q("lr", "per step", "", "learning rate of the last step"),
        Q("seconds", "seconds", "lower", "this training so far, validation included; the last is `finetune_seconds` or `pretrain_seconds`"),
        Q("loss", "nats", "lower", "what is minimised, as its method weighs it"),
        Q("ce_clean", "nats", "lower", "cross-entropy of clean images", "the method sees clean images"),
        Q("ce_robust", "nats", "lower", "cross-entropy of adversarial neighbours", ADVERSARIAL),
        Q("kl", "nats", "lower", "KL(p(·|x) ‖ p(·|x̃))", "method `trades`"),
        Q("batch_clean_acc", "fraction", "higher", "accuracy on clean training images", "the method sees clean images"),
        Q("batch_robust_acc", "fraction", "higher", "accuracy on their adversarial neighbours", ADVERSARIAL),
        Q("[ema_]validation_clean_acc", "fraction", "higher", "accuracy on validation images after the epoch, eval mode"),
        Q(
            "[ema_]validation_robust_acc",
            "fraction",
            "higher",
            "right after a 10-step projected gradient on cross-entropy, of validation images (not first right without)",
            "selection asks for it",
        ),
        Q("[ema_]validation_energy", "nats", "", "mean E(x) of validation images, eval mode"),
        Q("health_energy", "nats", "", "largest |mean energy| of images, chains or neighbours in the last step that was checked"),
        Q("health_gap", "nats", "", "largest |mean E(clean) − mean E(chains or neighbours)|", "the method sees both"),
        Q("health_cross_entropy", "times that of a guess", "lower", "clean cross-entropy over log K"),
        Q(
            "health_saturation",
            "fraction",
            "lower",
            "share of chain pixels at the ends of the range: (chains' − images') / (1 − images'), at least 0",
            CHAINS,
        ),
        Q("health_contrast", "times images'", "", "spread of pixels within a chain", CHAINS),
        Q("health_diversity", "times images'", "", "spread of a pixel across chains", CHAINS),
    ),
    *_of(
        "attack",
        Q("[<protocol>_]norm", "text", "", "the ball's norm: `Linf` or `L2`"),
        Q("[<protocol>_]eps", "pixels, as the protocol states them", "", "the ball as the protocol states it (`released`: of [−1, 1])"),
        Q("[<protocol>_]radius", "pixels of [0, 1]", "", "its radius (half of `eps` for `released`)"),
        Q("[<protocol>_]n_test", "count", "", "test examples behind `clean_…` and `pgd…`"),
        Q("[<protocol>_]n_attack", "count", "", "the first so many test examples, behind `autoattack_…` and `after_…`"),
        Q(
            "[ema_][<protocol>_]n_not_finite",
            "count",
            "lower",
            "test examples whose logits are not all finite: no class is predicted, so they are wrong; beyond a tenth of `n_test` there is "
            "no evaluation",
        ),
        Q(
            "[ema_][<protocol>_]n_not_finite_adversarial",
            "count",
            "lower",
            "test examples of which an attack returned an image with such logits: that is broken",
        ),
        Q("[ema_][<protocol>_]clean_correct", "count", "higher", "right without an attack, of `n_test`"),
        Q(
            "[ema_][<protocol>_]clean_acc",
            "fraction",
            "higher",
            "accuracy on clean test images (with the protocol's noise, if it has any)",
            label="clean %",
        ),
        Q("[ema_][<protocol>_]clean_(low|high)", "fraction", "", "95 % Wilson interval of `clean_acc`"),
        Q("[ema_][<protocol>_]pgd<steps>_correct", "count", "higher", "right without an attack and after PGD, of `n_test`"),
        Q(
            "[ema_][<protocol>_]pgd<steps>_acc",
            "fraction",
            "higher",
            "right on the clean image and after PGD of so many sign steps on cross-entropy from a random start (`pgd20_acc`: PGD-20)",
            label="PGD-20 %",
        ),
        Q("[ema_][<protocol>_]pgd<steps>_(low|high)", "fraction", "", "95 % Wilson interval of `pgd<steps>_acc`"),
        Q("[<protocol>_]pgd<steps>_acc_first_n", "fraction", "higher", "PGD on the ensemble's examples, the first `n_attack`", ENSEMBLE),
        Q("[ema_][<protocol>_]autoattack_correct", "count", "higher", "right after every attack of the ensemble, of `n_attack`", ENSEMBLE),
        Q(
            "[ema_][<protocol>_]autoattack_acc",
            "fraction",
            "higher",
            "right after every attack of the ensemble; `autoattack_acc` alone: AutoAttack standard (APGD-CE, APGD-T, FAB-T, Square)",
            ENSEMBLE,
            "AutoAttack %",
        ),
        Q("[ema_][<protocol>_]autoattack_(low|high)", "fraction", "", "95 % Wilson interval of `autoattack_acc`", ENSEMBLE),
        Q("[ema_][<protocol>_]after_<attack>_correct", "count", "higher", "right after this attack and those before it", ENSEMBLE),
        Q("[<protocol>_]n_targets", "mapping", "", "targeted attack → classes it aims at: what is asked, at most all others", ENSEMBLE),
        Q("[<protocol>_]autoattack_warnings", "list of text", "", "what AutoAttack's own checks warned of", ENSEMBLE),
        Q(
            "[<protocol>_]attack_seconds",
            "seconds",
            "lower",
            "time of PGD and ensemble, summed over batches, also those that ran side by side",
            ENSEMBLE,
        ),
        Q(
            "checks",
            "list",
            "",
            "integrity checks: `name`, `protocol`, `passed` (null: not asked), `value` and `limit` in the unit that `says` names, `n`",
        ),
        Q("checks_failed", "count", "lower", "integrity checks of the evaluation that failed"),
        Q(
            "sweep",
            "list",
            "",
            "accuracy under PGD at growing radii: [radius in [0, 1] pixels, fraction], of the first `evaluation.attack.checks.n` images",
        ),
    ),
    *_of(
        "generate",
        Q(
            "[<protocol>_]frechet[_conditional|_buffer]",
            "squared distance of features",
            "lower",
            "Fréchet distance, at least 0; **biased upward in n**, so only distances of the same n compare. Standard: all fresh chains, "
            "none discarded, to the training split",
            "`…_buffer`: " + BUFFER,
            "Fréchet",
        ),
        Q(
            "[<protocol>_]kid[_conditional|_buffer]",
            "number",
            "lower",
            "kernel distance (squared MMD, cubic kernel), unbiased in n, the mean over 100 subsets: about 0 for equal sets, may be "
            "slightly negative",
            "`…_buffer`: " + BUFFER,
            "KID ×1000",
        ),
        Q("[<protocol>_]kid_std[_conditional|_buffer]", "number", "", "its spread over the subsets"),
        Q("[<protocol>_]kid_subset_size[_conditional|_buffer]", "count", "", "size of a subset: a tenth of the smaller set, at most 1000"),
        Q(
            "[<protocol>_]precision[_conditional|_buffer]",
            "fraction",
            "higher",
            "share of samples within a real image's third-neighbour ball; depends on both n",
            "at least four samples (else null)",
            "precision %",
        ),
        Q(
            "[<protocol>_]recall[_conditional|_buffer]",
            "fraction",
            "higher",
            "share of real images within a sample's third-neighbour ball; depends on both n",
            "at least four samples (else null)",
            "recall %",
        ),
        Q(
            "[<protocol>_]inception_score[_conditional|_buffer]",
            "number, 1 to 1008",
            "higher",
            "Inception Score, mean over ten splits",
            INCEPTION,
            "score",
        ),
        Q("[<protocol>_]inception_score_std[_conditional|_buffer]", "number", "", "its spread over the splits", INCEPTION),
        Q(
            "[<protocol>_]reference_score[_conditional|_buffer]",
            "number, 1 to the classes",
            "higher",
            "the same formula on the reference classifier's logits. No Inception Score",
            REFERENCE,
            "score",
        ),
        Q("[<protocol>_]reference_score_std[_conditional|_buffer]", "number", "", "its spread over the splits", REFERENCE),
        Q("[<protocol>_]n_samples", "count", "", "samples behind the protocol's distances; standard: fresh chains, none discarded"),
        Q("[<protocol>_]n_reference", "count", "", "real images behind the protocol's distances"),
        Q("[<protocol>_]frechet_against", "text", "", "which real images: `train` or `all`"),
        Q(
            "frechet_extractor",
            "text",
            "",
            "whose features: `inception` (then distances are FID and KID) or `reference` (the profile's classifier)",
        ),
        Q("n_conditional", "count", "", "class-conditional chains"),
        Q("n_chains_not_finite", "count", "lower", "fresh chains that ended in images that are not finite; their set has no distance"),
        Q("n_buffer", "count", "", "chains of the replay buffer; 0: the method keeps none"),
        Q("class_agreement[_conditional]", "fraction", "higher", "share of chains that the network itself gives the class they began at"),
        Q(
            "frechet_start",
            "squared distance of features",
            "",
            "Fréchet distance of the fresh chains' starts: what the start alone achieves",
        ),
        Q("ema_frechet", "squared distance of features", "lower", "`frechet` of fresh chains of the averaged weights", EMA),
    ),
    *_of(
        "energy",
        Q("energy_clean", "nats", "", "mean E(x) of test images"),
        Q("energy_adversarial", "nats", "", "mean E(x̃) of their PGD neighbours under the standard protocol"),
        Q("energy_generated", "nats", "", "mean E of fresh chains"),
        Q("[joint_]energy_gap_adversarial", "nats", "lower", "mean of |E(x) − E(x̃)| over pairs; `joint_`: of E(x, y)", label="gap adv."),
        Q("[joint_]energy_gap_adversarial_se", "nats", "", "its standard error"),
        Q("[joint_]energy_gap_generated", "nats", "lower", "|mean E(x) − mean E(generated)|; `joint_`: of E(x, y)", label="gap gen."),
        Q("[joint_]energy_gap_generated_se", "nats", "", "its standard error"),
        Q("energy_shift_(adversarial|generated)", "nats", "", "mean energy of these less that of test images, signed"),
        Q("energy_overlap_(adversarial|generated)", "fraction", "higher", "common area of both histograms (50 bins over both)"),
        Q("energy_wasserstein_(adversarial|generated)", "nats", "lower", "Wasserstein-1 distance of both sets of energies"),
        Q("n_energy_not_finite", "count", "lower", "energies E that are not finite; what they take part in is null"),
        Q("n_energy_clean", "count", "", "test images, and as many PGD neighbours"),
        Q("n_energy_generated", "count", "", "fresh chains"),
    ),
    *_of(
        "reliability",
        Q("ece", "fraction", "lower", "expected calibration error on test images, `ece_bins` bins, as trained", label="ECE %"),
        Q("ece_scaled", "fraction", "lower", "the same with logits / `temperature`", label="ECE, scaled %"),
        Q("ece_bins", "count", "", "equal bins of max softmax probability (15)"),
        Q("nll", "nats", "lower", "mean −log p(y | x) of test images, as trained", label="NLL"),
        Q("nll_scaled", "nats", "lower", "the same with logits / `temperature`"),
        Q("brier", "number, 0 to 2", "lower", "mean squared distance of the probabilities to the one-hot label, as trained"),
        Q("brier_scaled", "number, 0 to 2", "lower", "the same with logits / `temperature`"),
        Q(
            "temperature",
            "number, above 0",
            "",
            "minimises the mean −log p(y | x) of the validation split, by which checkpoints were selected too",
            label="temperature",
        ),
        Q(
            "temperature_fitted",
            "true or false",
            "",
            "false: there is no such minimum (no error on validation: colder is always better), `temperature` is 1 and nothing is scaled",
        ),
        Q("n_calibration", "count", "", "test images behind `ece`, `nll`, `brier`"),
        Q("n_calibration_not_finite", "count", "lower", "test images whose logits are not finite; no figure of this stage is of them"),
        Q("n_temperature", "count", "", "validation images behind `temperature`"),
        Q(
            "ood_auroc_<score>_<set>",
            "fraction",
            "higher",
            "chance that a test image scores above one of the set, ties half; 0.5: cannot tell",
            "`evaluation.reliability.ood` has the set",
        ),
        Q(
            "ood_auroc_<score>_<set>_(low|high)",
            "fraction",
            "",
            "its 95 % interval (Newcombe's score interval, Hanley and McNeil's variance)",
            "`evaluation.reliability.ood` has the set",
        ),
        Q("n_ood_in", "count", "", "test images behind `ood_auroc_…`"),
        Q("n_ood_<set>", "count", "", "images of the set, at most as many", "`evaluation.reliability.ood` has the set"),
        Q("ood_missing", "mapping", "", "sets that `ood: auto` looked for and could not have: name → why"),
        Q(
            "detect_auroc_(energy|max_probability)_<protocol>",
            "fraction",
            "higher",
            "chance that a test image, as the protocol shows it, scores above the PGD neighbour of one; below 0.5: adversarial images look "
            "more like the data than the data",
        ),
        Q("detect_auroc_(energy|max_probability)_<protocol>_(low|high)", "fraction", "", "its 95 % interval, as for `ood_auroc_…`"),
        Q("n_detect_<protocol>", "count", "", "test images, and as many PGD neighbours (also of those that are misclassified anyway)"),
    ),
    *_of(
        "report",
        Q(
            "train_seconds",
            "seconds",
            "lower",
            "`finetune_seconds` plus `pretrain_seconds` of its (shared) pretraining",
            label="train s",
        ),
        Q("seeds", "count", "", "seeds behind a row of `table.csv`"),
        Q("<column>_(low|high)", "as the column", "", "95 % interval: over seeds, or of one seed's count or standard error", "it has one"),
        Q("<column>_sd", "as the column", "", "standard deviation over seeds", SEEDS),
        Q("<column>_n", "count", "", "examples or samples behind the column", "it has one"),
        Q("<column>_paper", "as the column", "", "the paper's number", "the profile's data are the paper's"),
        Q("collapses", "count", "lower", "seeds whose training diverged"),
        Q("collapse_epochs", "list of epochs", "", "their `collapse_epoch`, separated by spaces"),
    ),
    *_of(
        "bench",
        Q("images_per_s", "images per second", "higher", "of whole steps, as the training loop takes them: median over `n` timings"),
        Q("ms_per_step", "milliseconds", "lower", "the same, per step"),
        Q(
            "ms",
            "milliseconds",
            "lower",
            "parts, each waited for, so that they may add up to more than a step: `data` (batch, augmentation, where chains come from), "
            "`chain`, `adversarial`, `update` (losses, gradients, optimiser)",
        ),
        Q(
            "outside_network",
            "fraction",
            "lower",
            "share of the step that is not a pass through the network: what is left when the passes alone are timed on a fixed batch",
        ),
        Q(
            "flops_per_image",
            "FLOP",
            "",
            "floating-point operations of a step's convolutions and matrix products, counted by torch as it dispatches them, per image",
        ),
        Q(
            "matrix_rate_flops",
            "FLOP per second",
            "",
            "the fastest of some large matrix products and 3×3 convolutions in the step's precision, measured in the same run",
        ),
        Q("matrix_rate_by", "text", "", "which of them it was"),
        Q("mfu", "fraction", "higher", "the step's share of that rate"),
        Q(
            "peak_memory_bytes",
            "bytes",
            "lower",
            "GPU: most allocated; CPU: the process's resident memory at its highest (on other systems than Linux: after a step)",
        ),
        Q("naive_images_per_s", "images per second", "", "of the plainly written step, timed in turns with ours", NAIVE),
        Q("speedup", "number", "higher", "the plainly written step's time over ours: median of the pairs' ratios", NAIVE),
        Q("spread", "as the name", "", "quartiles over the timings, of `images_per_s`, `naive_images_per_s`, `speedup`"),
        Q("n", "count", "", "timings"),
        Q("steps_per_timing", "count", "", "steps of one timing, so many that it takes half a second"),
        Q("case", "settings", "", "method, network, batch, image shape and every setting of the step"),
        Q("machine", "mapping", "", "what it ran on: device, threads, versions of torch and Python"),
    ),
    *_of(
        "system",
        Q("system/cpu_utilization_percentage", "percent", "", "processors in use"),
        Q("system/system_memory_usage_megabytes", "megabytes", "", "memory in use"),
        Q("system/system_memory_usage_percentage", "percent", "", "memory in use"),
        Q("system/process_cpu_utilization_percentage", "percent of one", "", "processors that the stage's own process has in use"),
        Q("system/process_memory_usage_megabytes", "megabytes", "lower", "resident memory of the stage's own process"),
        Q("system/gpu_<gpu>_utilization_percentage", "percent", "", "how busy the GPU is", GPU),
        Q("system/gpu_<gpu>_memory_usage_(megabytes|percentage)", "megabytes, percent", "", "GPU memory in use", GPU),
        Q("system/gpu_<gpu>_power_usage_watts", "watts", "", "power that the GPU draws", GPU),
    ),
)


def describe(name: str, protocols: Collection[str] = ()) -> Quantity:
    """The entry that a name stands in, with its own before patterns: "released_pgd20_acc" -> "[ema_][<protocol>_]pgd<steps>_acc".

    protocols: the only ones that `<protocol>` may be; without them any word may. Raises UnknownNameError.
    """
    found = find(name, protocols)
    if found is not None:
        return found
    plain = {re.sub(r"\[.*?\]|[()<>]", "", quantity.name): quantity.name for quantity in VOCABULARY}
    close = [plain[near] for near in difflib.get_close_matches(name, plain, n=1)]
    raise UnknownNameError(f"{name!r} is not measured; {f'did you mean {close[0]!r}? ' if close else ''}`ebjdat metrics` lists every name")


@lru_cache(10_000)
def _find(name: str, protocols: frozenset[str]) -> Quantity | None:
    return next((quantity for pattern, quantity in _patterns(protocols) if pattern.fullmatch(name)), None)


def find(name: str, protocols: Collection[str] = ()) -> Quantity | None:
    """As `describe`; None where nothing is measured under this name."""
    return _find(name, frozenset(protocols))


@cache
def _patterns(protocols: frozenset[str]) -> tuple[tuple[re.Pattern[str], Quantity], ...]:
    """Fixed names first, then patterns without a free word, then longer before shorter: what ends in _low is no protocol's name."""
    order = sorted(VOCABULARY, key=lambda q: (q.is_pattern, "<protocol>" in q.name, -len(q.name)))
    return tuple((re.compile(_expression(q.name, protocols)), q) for q in order)


def _expression(name: str, protocols: frozenset[str]) -> str:
    def place(match: re.Match[str]) -> str:
        known = protocols if match[1] == "protocol" else PLACES[match[1]][1]
        free = WORD if match[1] == "protocol" else NUMBER
        return f"(?:{'|'.join(map(re.escape, known))})" if known else f"(?:{free})"

    optional = name.replace("[", "(?:").replace("]", ")?")
    return re.sub(r"<(\w+)>", place, optional)


def sign(name: str) -> int:
    """1 where higher is better, -1 where lower is, 0 where neither is."""
    return {"higher": 1, "lower": -1, "": 0}[describe(name).better]


def markdown() -> str:
    """docs/metrics.md."""
    lines = [
        "# Names of everything that is measured",
        "",
        "Made by `ebjdat metrics --markdown` from `src/ebjdat/metrics.py`; change it there. `ebjdat metrics NAME` explains one name,",
        "`ebjdat metrics --json` is for programs. The same name means the same in result files, `summary.csv`, DVC, MLflow and the report;",
        "where files lie says [results-format](results-format.md).",
        "",
        "In names, `[a|b]` may stand there, `(a|b)`: one of them stands there, and",
        "",
        *(f"- `<{name}>`: {says}{_listed(known)}" for name, (says, known) in PLACES.items()),
        "",
        "Better: ↑ higher, ↓ lower, nothing: neither is. Fractions are from 0 to 1.",
    ]
    for stage, where in STAGES.items():
        lines += ["", f"## {stage.capitalize()}", "", where, "", "| name | meaning | unit | better | only where |", "|---|---|---|---|---|"]
        for q in VOCABULARY:
            if q.stage == stage:
                arrow = {"higher": "↑", "lower": "↓", "": ""}[q.better]
                told = (q.name, q.meaning, q.only)
                name, meaning, only = (text.replace("|", "\\|") for text in told)
                lines.append(f"| `{name}` | {meaning} | {q.unit} | {arrow} | {only} |".replace("|  |", "| |"))
    return "\n".join(lines) + "\n"


def _listed(known: Collection[str]) -> str:
    return f": {', '.join(f'`{name}`' for name in known)}" if known else ""
