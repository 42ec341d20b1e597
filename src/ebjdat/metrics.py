"""Every metric once: its name, unit, direction, meaning, sample size, interval, and where it is shown.

Result files, summary.csv, DVC, MLflow and the report use these names; docs/metrics.md is made from this table. A metric is added
by an entry here, beside the code that computes it and its test.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from ebjdat import registry
from ebjdat.vocabulary import Column, Metric, Vocabulary

# heading -> where these names occur
STAGES: Mapping[str, str] = {
    "provenance": "What a result is of, in every file that states it. Text and settings, not measurements.",
    "training": "`pretrain.json`, `finetune.json`, and the header of checkpoints.",
    "curve": "`pretrain_curve.csv`, `finetune_curve.csv` and MLflow's curves: a row per epoch. Means over the epoch's batches, in the mode "
    "the network trains in, unless stated otherwise.",
    "attack": "`attack.json`. Names under the protocol `standard` have no prefix, those under any other begin with its name "
    "(`released_autoattack_acc`, `standard_l2_autoattack_acc`); `ema_` in front: the same for averaged weights. Protocols are settings, "
    "`evaluation.attack.protocols`. `released` shows the images with its noise (none on SADA-JEM), at half the radius, and attacks with "
    "a weaker ensemble: its figures are never to be called AutoAttack standard.",
    "generate": "`generate.json`. A name begins with its protocol, unless that is `standard` (`released_frechet`), and ends with its set "
    "of samples, unless that is the fresh chains (`frechet_conditional`, `frechet_buffer`). What an experiment lacks is null.",
    "energy": "`energy.json`. Energies are E(x) = −logsumexp of the logits; in curves the same names are of training batches.",
    "reliability": "`reliability.json`. Scores are higher, the more an image is like those of the data.",
    "teacher": "`teacher.json`, of experiments with a teacher where `evaluation.teacher` names a recipe: the first `n_teaching` training "
    "images, and how the recipe's networks of all seeds fare on them under PGD of `teaching_steps` steps in the standard protocol's ball. "
    "A teacher that is less sure of what is not learned makes better students (arXiv 2605.21999); on the other sets this should not hold.",
    "report": "`summary.csv` (a row per experiment and seed) and `table.csv` (a row per experiment: means over seeds); also names above.",
    "bench": "What `ebjdat bench` prints and saves: a training step's speed ([how fast](performance.md)).",
    "system": "MLflow's system metrics, on the run of each stage: of the whole machine, unless stated otherwise.",
}

BUFFER = "the method keeps a replay buffer (else null)"
INCEPTION, REFERENCE = "`frechet_extractor` is `inception` (else null)", "`frechet_extractor` is `reference` (else null)"
EMA = "training kept averaged weights (`training.ema`)"
ADVERSARIAL = "the method trains on adversarial neighbours"
CHAINS = "the method has chains"
WATCHED = "`training.healing.overfitting` is set, for methods that train on adversarial neighbours"
ENSEMBLE = "the protocol's ensemble was run (`n` above 0)"
UNIVERSAL = "`evaluation.attack.universal` is set"
SCREEN = "`evaluation.attack.screen` is set"
AUTOENCODER = "`evaluation.reliability.autoencoder` is set"
FOUND = "there is one (else null)"
ADAPTIVE = "the protocol's `adaptive_attacks` has the attack, and `n` is above 0"
SEEDS = "several seeds"
NAIVE = "`--against naive` (else null)"
GPU = "there is an NVIDIA GPU and nvidia-ml-py"
CLEAN = "the method sees clean images"
FOUR = "at least four samples (else null)"
OOD = "`evaluation.reliability.ood` has the set"
ANY_MODEL = "`ebjdat attack --model`"
TAUGHT = "the experiment has a teacher, and `evaluation.teacher` is set"
LONG_TAILED = "the profile has `data.imbalance`"
GROUPS = {"head": "of the largest 20 % of the classes", "tail": "of the smallest 80 % of the classes"}  # by training images
M = Metric
# What the energy stage lets PGD climb, beside the attack on cross-entropy (evaluation/energy.py).
ENERGY_ATTACKS = {
    "untargeted": "up the cross-entropy",
    "targeted": "down the cross-entropy of class (y + 1) mod K",
    "ascent": "up E",
    "energy_aware": "up CE − E",
}
# Sets of training images that the teacher stage compares (evaluation/teaching.py).
TEACHING = {
    "unlearned": "that no network of the recipe classifies under PGD",
    "learned": "that every network of the recipe classifies under PGD",
    "random": "drawn at random, as many as are not learned",
    "hardest": "with the largest cross-entropy without an attack, as many as are not learned",
}
LOGS = {log: [name for name, row in registry.METHODS.items() if log in row.logs] for row in registry.METHODS.values() for log in row.logs}


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _of(stage: str, *entries: Metric) -> tuple[Metric, ...]:
    return tuple(replace(entry, stage=stage) for entry in entries)


# A table, an entry after the other: not one argument a line.
# fmt: off
METRICS: tuple[Metric, ...] = (
    *_of(
        "provenance",
        M("experiment", "text", "", "the experiment of the profile", summary=1),
        M("method", "text", "", "its method, or a pretraining's", summary=2),
        M("seed", "integer", "", "the run's seed", summary=3),
        M("data_hash", "hex", "", "hash of the prepared arrays and splits", summary=16),
        M("params_hash", "hex", "", "hash of everything in the settings that determines the row", summary=15),
        M("git_commit", "text", "",
          "commit at which it was measured (`summary.csv`, checkpoints: at which it was trained); `-dirty` when tracked files differed",
          summary=17, needed=("finetune", "attack", "generate", "energy", "reliability", "teacher")),
        M("digest", "hex", "", "of everything else in the file, so that a later change of a value is noticed"),
        M("files", "mapping", "", "name → sha256 of the curves, pictures, arrays and verdicts that its stage wrote beside it"),
        M("version", "text", "", "version of this package"),
        M("settings", "settings", "", "what robustness was measured with (`evaluation.attack`, resolved)"),
        M("not_finite", "list of names", "", "names beside it whose value was NaN or infinite, and is null", "there was one"),
        M("notes", "list of text", "", "how images were read, where that is not the usual way; what was skipped", ANY_MODEL),
        M("(model|weights|data)", "text", "", "factory, hash of the tensors, name of the data", ANY_MODEL),
    ),
    *_of(
        "training",
        M("pretrain_seconds", "seconds", "lower", "wall time of the pretraining's loop; depends on what else the machine does",
          needed=("pretrain",)),
        M("finetune_seconds", "seconds", "lower", "wall time of the fine-tuning's loop alone; depends on what else the machine does",
          needed=("finetune",)),
        M("epochs", "count", "", "epochs that were trained", needed=("finetune",)),
        M("selected_epoch", "epoch, from 1", "", "the epoch whose weights were kept; 0: those it began with", needed=("finetune",)),
        M("selection_score", "fraction", "higher",
          "validation score that selected: `validation_clean_acc`, `validation_robust_acc` or their mean (`training.selection.score`)"),
        M("n_train", "count", "", "training images"),
        M("n_validation", "count", "", "validation images"),
        M("collapse_epoch", "epoch, from 1", "",
          "epoch in which training first diverged (a check found a symptom; see [healing](healing.md)); null or empty: never",
          "training diverged", summary=18),
        M("recoveries", "count", "lower",
          "how often training returned to a healthy state and continued with a change; in `table.csv` the sum over seeds",
          summary=19, dvc=True),
        M("events", "list of text", "", "each divergence: where, by what symptom, and what was done"),
    ),
    *_of(
        "curve",
        M("epoch", "epoch, from 1", "", "which epoch"),
        M("lr", "per step", "", "learning rate of the last step"),
        M("seconds", "seconds", "lower", "this training so far, validation included; the last is `finetune_seconds` or `pretrain_seconds`"),
        M("loss", "nats", "lower", "what is minimised, as its method weighs it"),
        M("ce_clean", "nats", "lower", "cross-entropy of clean images", CLEAN),
        M("ce_robust", "nats", "lower", "cross-entropy of adversarial neighbours", ADVERSARIAL),
        *(M(log.name, log.unit, log.better, log.meaning, f"method {_listed(names)}") for log, names in LOGS.items()),
        M("batch_clean_acc", "fraction", "higher", "accuracy on clean training images", CLEAN),
        M("batch_robust_acc", "fraction", "higher", "accuracy on their adversarial neighbours", ADVERSARIAL),
        M("[ema_]validation_clean_acc", "fraction", "higher", "accuracy on validation images after the epoch, eval mode"),
        M("[ema_]validation_robust_acc", "fraction", "higher",
          "accuracy on validation images after a 10-step projected gradient on cross-entropy (whether right before or not)",
          "selection asks for it"),
        M("[ema_]validation_energy", "nats", "", "mean E(x) of validation images, eval mode"),
        M("health_energy", "nats", "", "largest |mean energy| of images, chains or neighbours in the last step that was checked"),
        M("health_gap", "nats", "", "largest |mean E(clean) − mean E(chains or neighbours)|", "the method sees both"),
        M("health_cross_entropy", "times that of a guess", "lower", "clean cross-entropy over log K"),
        M("health_saturation", "fraction", "lower",
          "share of chain pixels at the ends of the range: (chains' − images') / (1 − images'), at least 0", CHAINS),
        M("health_robust_acc", "fraction", "higher",
          "accuracy on fixed training images under validation's attack, eval mode", WATCHED),
        M("health_overfitting", "fraction", "lower", "how far that lies below its best so far", WATCHED),
        M("health_contrast", "times images'", "", "spread of pixels within a chain", CHAINS),
        M("health_diversity", "times images'", "", "spread of a pixel across chains", CHAINS),
    ),
    *_of(
        "attack",
        M("[<protocol>_]norm", "text", "", "the ball's norm: `Linf` or `L2`"),
        M("[<protocol>_]eps", "pixels, as the protocol states them", "", "the ball as the protocol states it (`released`: of [−1, 1])"),
        M("[<protocol>_]radius", "pixels of [0, 1]", "", "its radius (half of `eps` for `released`)"),
        M("[<protocol>_]n_test", "count", "", "test examples behind `clean_…` and `pgd…`", summary=4, needed=("attack",)),
        M("[<protocol>_]n_attack", "count", "", "the first so many test examples, behind `autoattack_…` and `after_…`", summary=7,
          needed=("attack",)),
        M("[ema_][<protocol>_]n_not_finite", "count", "lower",
          "test examples whose logits are not all finite: no class is predicted, so they are wrong; above a tenth of `n_test` nothing is "
          "evaluated"),
        M("[ema_][<protocol>_]n_not_finite_adversarial", "count", "lower",
          "test examples for which an attack returned an image with such logits: they count as broken"),
        M("[ema_][<protocol>_]clean_correct", "count", "higher", "right without an attack, of `n_test`"),
        M("[ema_][<protocol>_]clean_acc", "fraction", "higher", "accuracy on clean test images (with the protocol's noise, if it has any)",
          n="n_test", interval="wilson", paper="clean", summary=5, dvc=True, bar="Clean accuracy", label="clean %", panel=True,
          needed=("attack",)),
        M("[ema_][<protocol>_]clean_(low|high)", "fraction", "", "95 % Wilson interval of `clean_acc`"),
        M("[ema_][<protocol>_]pgd<steps>_correct", "count", "higher", "right without an attack and after PGD, of `n_test`"),
        M("[ema_][<protocol>_]pgd<steps>_acc", "fraction", "higher",
          "right on the clean image and after PGD of so many sign steps on cross-entropy from a random start (`pgd20_acc`: PGD-20)",
          n="n_test", interval="wilson", paper="pgd20", summary=6, released=20, dvc=True, bar="Accuracy under PGD-20", label="PGD-20 %",
          panel=True, needed=("attack",)),
        M("[ema_][<protocol>_]pgd<steps>_(low|high)", "fraction", "", "95 % Wilson interval of `pgd<steps>_acc`"),
        M("[<protocol>_]pgd<steps>_found_l2", "pixels of [0, 1]", "",
          "mean L2 distance from the image, of the images with which PGD broke an example that was right", FOUND,
          columns=(Column("attack", "L2, PGD-20", n="pgd20_found_n"),)),
        M("[<protocol>_]pgd<steps>_found_ssim", "number, -1 to 1", "",
          "mean structural similarity to the image (Wang et al. 2004; 1: equal), of the same; the less, the more visible", FOUND,
          columns=(Column("attack", "SSIM, PGD-20", form=".3f"),)),
        M("[<protocol>_]pgd<steps>_found_n", "count", "", "how many they are: `clean_correct` less `pgd<steps>_correct`"),
        M("[<protocol>_]pgd<steps>_acc_first_n", "fraction", "higher", "PGD on the ensemble's examples, the first `n_attack`", ENSEMBLE),
        M("[ema_][<protocol>_]autoattack_correct", "count", "higher", "right after every attack of the ensemble, of `n_attack`", ENSEMBLE),
        M("[ema_][<protocol>_]autoattack_acc", "fraction", "higher",
          "right after every attack of the ensemble; `autoattack_acc` alone: AutoAttack standard (APGD-CE, APGD-T, FAB-T, Square)",
          ENSEMBLE, n="n_attack", interval="wilson", paper="autoattack", summary=8, released=21, dvc=True, bar="Accuracy under AutoAttack",
          label="AutoAttack %", panel=True),
        M("[ema_][<protocol>_]autoattack_(low|high)", "fraction", "", "95 % Wilson interval of `autoattack_acc`", ENSEMBLE),
        M("[<protocol>_]autoattack_found_l2", "pixels of [0, 1]", "",
          "as for PGD: of the image with which the first attack of the ensemble that did broke an example", f"{ENSEMBLE}; {FOUND}",
          columns=(Column("attack", "L2, AutoAttack", n="autoattack_found_n"),)),
        M("[<protocol>_]autoattack_found_ssim", "number, -1 to 1", "", "as for PGD, of the same", f"{ENSEMBLE}; {FOUND}",
          columns=(Column("attack", "SSIM, AutoAttack", form=".3f"),)),
        M("[<protocol>_]autoattack_found_n", "count", "", "how many they are", ENSEMBLE),
        M("[ema_][<protocol>_]after_<attack>_correct", "count", "higher", "right after this attack and those before it", ENSEMBLE),
        M("[ema_][<protocol>_]<adaptive>_correct", "count", "higher", "right after the ensemble and this adaptive attack, of `n_attack`",
          ADAPTIVE),
        M("[ema_][<protocol>_]<adaptive>_acc", "fraction", "higher",
          "right after the ensemble and this adaptive attack, which attacks what the ensemble left; `autoattack_acc` is without it",
          ADAPTIVE, n="n_attack", interval="wilson"),
        M("[ema_][<protocol>_]<adaptive>_(low|high)", "fraction", "", "95 % Wilson interval of `<adaptive>_acc`", ADAPTIVE),
        M("[ema_][<protocol>_]<adaptive>_alone", "count", "lower", "broken by this adaptive attack and not by the ensemble, of `n_attack`",
          ADAPTIVE),
        M("[ema_][<protocol>_]<adaptive>_alone_share", "fraction", "lower", "the same as a share of `n_attack`", ADAPTIVE),
        M("[ema_][<protocol>_]<adaptive>_alone_share_(low|high)", "fraction", "", "its 95 % Wilson interval", ADAPTIVE),
        M("[<protocol>_]<adaptive>_found_l2", "pixels of [0, 1]", "", "as for PGD, of the images that it found", f"{ADAPTIVE}; {FOUND}"),
        M("[<protocol>_]<adaptive>_found_ssim", "number, -1 to 1", "", "as for PGD, of the same", f"{ADAPTIVE}; {FOUND}"),
        M("[<protocol>_]<adaptive>_found_n", "count", "", "how many they are", ADAPTIVE),
        M("[<protocol>_]n_targets", "mapping", "", "targeted attack → how many classes it aims at, at most all others", ENSEMBLE),
        M("[<protocol>_]autoattack_warnings", "list of text", "", "what AutoAttack's own checks warned of", ENSEMBLE),
        M("[<protocol>_]attack_seconds", "seconds", "lower",
          "time of PGD, ensemble and adaptive attacks, summed over batches, parallel ones too", ENSEMBLE),
        *(M(f"[ema_][<protocol>_]{attack}_{group}_acc", "fraction", "higher", f"`{plain}_acc` of the test images {which}", LONG_TAILED,
            n=f"{n}_{group}", interval="wilson", summary=24 + 2 * i + j)
          for i, (attack, plain, n) in enumerate((
              ("clean", "clean", "n"), ("pgd<steps>", "pgd20", "n"), ("autoattack", "autoattack", "n_attack")))
          for j, (group, which) in enumerate(GROUPS.items())),
        M("[ema_][<protocol>_](clean|pgd<steps>|autoattack)_(head|tail)_correct", "count", "higher", "their right ones", LONG_TAILED),
        M("[ema_][<protocol>_](clean|pgd<steps>|autoattack)_(head|tail)_(low|high)", "fraction", "", "95 % Wilson interval", LONG_TAILED),
        *(M(f"[<protocol>_]n_{group}", "count", "", f"test images {which}, behind `clean_{group}_acc` and `pgd<steps>_{group}_acc`",
            LONG_TAILED) for group, which in GROUPS.items()),
        M("[<protocol>_]n_attack_(head|tail)", "count", "", "of these, those among the first `n_attack`", LONG_TAILED),
        M("universal[_random]_correct", "count", "higher", "right with the universal perturbation, of `n_test`", UNIVERSAL),
        M("universal[_random]_acc", "fraction", "higher",
          "accuracy on test images that one and the same perturbation was added to (whether right before or not), found on validation "
          "images at the standard protocol's radius; `_random`: its control, as large with random signs",
          UNIVERSAL, n="n_test", interval="wilson",
          columns=(Column("universal", "universal perturbation %", interval=True),
                   Column("universal", "random signs %", "universal_random_acc", interval=True))),
        M("universal[_random]_(low|high)", "fraction", "", "95 % Wilson interval of it", UNIVERSAL),
        M("n_universal", "count", "", "validation images that it was found on", UNIVERSAL),
        M("screen[_shuffled]_agreement", "fraction", "",
          "a screen, not a measure of robustness: pixels at which the gradient predicted from features has the sign of the true one, on "
          "test images that are right; `_shuffled`: its control, fitted with each gradient beside another image's features", SCREEN,
          columns=(Column("screen", "sign agreement %"), Column("screen", "shuffled: sign agreement %", "screen_shuffled_agreement"))),
        M("screen[_shuffled|_random]_success", "number, at least 0", "",
          "a screen, not a measure of robustness: images that one step along the predicted signs breaks, over those that FGSM breaks; "
          "`_random`: along random signs", SCREEN,
          columns=(Column("screen", "success / FGSM's"), Column("screen", "shuffled: success / FGSM's", "screen_shuffled_success"),
                   Column("screen", "random signs: success / FGSM's", "screen_random_success"))),
        M("screen_fgsm_broken", "count", "", "images that FGSM breaks, of `n_screen`; if 0 there is no success to compare with", SCREEN,
          columns=(Column("screen", "FGSM breaks", form=".0f", n="n_screen"),)),
        M("n_screen", "count", "", "test images that are right without an attack", SCREEN),
        M("n_screen_calibration", "count", "", "validation images that the regression was fitted on", SCREEN),
        M("checks", "list", "",
          "integrity checks: `name`, `protocol`, `passed` (null: not run), `value` and `limit` in the unit that `says` names, `n`",
          needed=("attack",)),
        M("checks_failed", "count", "lower", "integrity checks of the evaluation that failed", summary=22, dvc=True, needed=("attack",)),
        M("sweep", "list", "",
          "accuracy under PGD at growing radii: [radius in [0, 1] pixels, fraction], of the first `evaluation.attack.checks.n` images",
          needed=("attack",)),
    ),
    *_of(
        "generate",
        M("[<protocol>_]frechet", "squared distance of features", "lower",
          "Fréchet distance, at least 0; **biased upward in n**, so only distances of the same n compare. Standard: all fresh chains, "
          "none discarded, to the training split", n="n_samples", paper="fid", summary=9, dvc=True, label="Fréchet", panel=True,
          needed=("generate",), columns=(Column("samples", "Fréchet", n="n_samples"),)),
        M("[<protocol>_]kid[_conditional|_buffer]", "number", "lower",
          "kernel distance (squared MMD, cubic kernel), unbiased in n, the mean over 100 subsets: about 0 for equal sets, may be "
          "slightly negative", f"`…_buffer`: {BUFFER}",
          columns=(Column("samples", "KID ×1000", spread="kid_std", scale=1000),)),
        M("[<protocol>_]kid_std[_conditional|_buffer]", "number", "", "its spread over the subsets"),
        M("[<protocol>_]kid_subset_size[_conditional|_buffer]", "count", "", "size of a subset: a tenth of the smaller set, at most 1000"),
        M("[<protocol>_]precision[_conditional|_buffer]", "fraction", "higher",
          "share of samples within a real image's third-neighbour ball; depends on both n", FOUR,
          columns=(Column("samples", "precision %"),)),
        M("[<protocol>_]recall[_conditional|_buffer]", "fraction", "higher",
          "share of real images within a sample's third-neighbour ball; depends on both n", FOUR, columns=(Column("samples", "recall %"),)),
        M("[<protocol>_]inception_score[_conditional|_buffer]", "number, 1 to 1008", "higher", "Inception Score, mean over ten splits",
          INCEPTION, columns=(Column("samples", "score", spread="inception_score_std"),)),
        M("[<protocol>_]inception_score_std[_conditional|_buffer]", "number", "", "its spread over the splits", INCEPTION),
        M("[<protocol>_]reference_score[_conditional|_buffer]", "number, 1 to the classes", "higher",
          "the same formula on the reference classifier's logits. It is not an Inception Score", REFERENCE,
          columns=(Column("samples", "score", spread="reference_score_std"),)),
        M("[<protocol>_]reference_score_std[_conditional|_buffer]", "number", "", "its spread over the splits", REFERENCE),
        M("[<protocol>_]frechet_conditional", "squared distance of features", "lower", "the same of the chains down E(x, y)",
          columns=(Column("samples", "Fréchet, E(x, y) chains", n="n_conditional"),)),
        M("[<protocol>_]frechet_buffer", "squared distance of features", "lower", "the same of the replay buffer", BUFFER,
          needed=("generate",),
          columns=(
              Column("samples", "Fréchet, buffer", n="n_buffer"),
              Column("samples", "Fréchet, released", "released_frechet", n="released_n_samples"),
          )),
        M("[<protocol>_]n_samples", "count", "", "samples behind the protocol's distances; standard: fresh chains, none discarded",
          summary=11, needed=("generate",)),
        M("[<protocol>_]n_reference", "count", "", "real images behind the protocol's distances"),
        M("[<protocol>_]frechet_against", "text", "", "which real images: `train` or `all`"),
        M("frechet_extractor", "text", "",
          "whose features: `inception` (then distances are FID and KID) or `reference` (the profile's classifier)", summary=10,
          needed=("generate",)),
        M("n_conditional", "count", "", "class-conditional chains"),
        M("n_chains_not_finite", "count", "lower", "fresh chains that ended in images that are not finite; their set has no distance"),
        M("n_buffer", "count", "", "chains of the replay buffer; 0: the method keeps none", needed=("generate",)),
        M("class_agreement[_conditional]", "fraction", "higher", "share of chains that the network itself gives the class they began at",
          needed=("generate",)),
        M("frechet_start", "squared distance of features", "",
          "Fréchet distance of the fresh chains' starts: what the start alone achieves", needed=("generate",)),
        M("ema_frechet", "squared distance of features", "lower", "`frechet` of fresh chains of the averaged weights", EMA),
    ),
    *_of(
        "energy",
        M("energy_clean", "nats", "", "mean E(x) of test images", needed=("energy",), columns=(Column("energy", "mean clean"),)),
        M("energy_adversarial", "nats", "", "mean E(x̃) of their PGD neighbours under the standard protocol", needed=("energy",),
          columns=(Column("energy", "mean adversarial"),)),
        M("energy_generated", "nats", "", "mean E of fresh chains", needed=("energy",), columns=(Column("energy", "mean generated"),)),
        M("[joint_]energy_gap_adversarial", "nats", "lower", "mean of |E(x) − E(x̃)| over pairs; `joint_`: of E(x, y)", n="n_energy_clean",
          interval="normal", summary=12, dvc=True, label="gap adv.", needed=("energy",), columns=(Column("energy", "gap adv. (pairs)"),)),
        M("[joint_]energy_gap_adversarial_se", "nats", "", "its standard error", needed=("energy",)),
        M("[joint_]energy_gap_generated", "nats", "lower", "|mean E(x) − mean E(generated)|; `joint_`: of E(x, y)", n="n_energy_generated",
          interval="normal", summary=13, dvc=True, label="gap gen.", needed=("energy",), columns=(Column("energy", "gap gen."),)),
        M("[joint_]energy_gap_generated_se", "nats", "", "its standard error", needed=("energy",)),
        *(entry for attack, score in ENERGY_ATTACKS.items() for entry in (
            M(f"energy_change_{attack}", "nats", "", f"mean of E(x̃) − E(x) over pairs, signed; standard protocol's PGD {score}",
              interval="signed", n=f"n_energy_change_{attack}", needed=("energy",),
              columns=(Column("energy", f"ΔE {attack}", form="+.2f"),)),
            M(f"energy_change_{attack}_se", "nats", "", "its standard error", needed=("energy",)),
            M(f"energy_rise_{attack}", "fraction", "", "of these pairs, those whose energy rises", needed=("energy",)),
            M(f"n_energy_change_{attack}", "count", "", "of these pairs, those with finite energies", needed=("energy",)))),
        M("energy_shift_(adversarial|generated)", "nats", "", "mean energy of these minus that of test images"),
        M("energy_overlap_adversarial", "fraction", "higher", "common area of both histograms (50 bins over both)", needed=("energy",),
          columns=(Column("energy", "overlap adv.", form=".2f", scale=1),)),
        M("energy_overlap_generated", "fraction", "higher", "common area of both histograms (50 bins over both)", needed=("energy",),
          columns=(Column("energy", "overlap gen.", form=".2f", scale=1),)),
        M("energy_wasserstein_adversarial", "nats", "lower", "Wasserstein-1 distance of both sets of energies", needed=("energy",),
          columns=(Column("energy", "W₁ adv."),)),
        M("energy_wasserstein_generated", "nats", "lower", "Wasserstein-1 distance of both sets of energies", needed=("energy",),
          columns=(Column("energy", "W₁ gen."),)),
        M("n_energy_not_finite", "count", "lower", "energies E that are not finite; every figure that includes one is null"),
        M("n_energy_clean", "count", "", "test images, and as many PGD neighbours", needed=("energy",)),
        M("n_energy_generated", "count", "", "fresh chains", needed=("energy",)),
    ),
    *_of(
        "reliability",
        M("ece", "fraction", "lower", "expected calibration error on test images, `ece_bins` bins, as trained", summary=23, dvc=True,
          needed=("reliability",), columns=(Column("reliability", "ECE %"),)),
        M("ece_scaled", "fraction", "lower", "the same with logits / `temperature`", needed=("reliability",),
          columns=(Column("reliability", "ECE, scaled %"),)),
        M("ece_bins", "count", "", "equal bins of max softmax probability (15)"),
        M("temperature", "number, above 0", "",
          "minimises the mean −log p(y | x) of the validation split, which also selected the checkpoints", needed=("reliability",),
          columns=(Column("reliability", "temperature"),)),
        M("nll", "nats", "lower", "mean −log p(y | x) of test images, as trained", needed=("reliability",),
          columns=(Column("reliability", "NLL", form=".3f"),)),
        M("nll_scaled", "nats", "lower", "the same with logits / `temperature`"),
        M("brier", "number, 0 to 2", "lower", "mean squared distance of the probabilities to the one-hot label, as trained"),
        M("brier_scaled", "number, 0 to 2", "lower", "the same with logits / `temperature`"),
        M("temperature_fitted", "true or false", "",
          "false: there is no such minimum (no error on validation: colder is always better), `temperature` is 1 and nothing is scaled"),
        M("n_calibration", "count", "", "test images behind `ece`, `nll`, `brier`"),
        M("n_calibration_not_finite", "count", "lower", "test images whose logits are not finite; this stage leaves them out"),
        M("n_temperature", "count", "", "validation images behind `temperature`"),
        M("ood_auroc_<score>_<set>", "fraction", "higher",
          "chance that a test image scores above one of the set, ties count half; 0.5: no better than chance", OOD,
          columns=(Column("reliability", "OOD: {set} (energy)", "ood_auroc_energy_<set>", interval=True),)),
        M("ood_auroc_<score>_<set>_(low|high)", "fraction", "",
          "its 95 % interval (Newcombe's score interval, Hanley and McNeil's variance)", OOD),
        M("n_ood_in", "count", "", "test images behind `ood_auroc_…`"),
        M("n_ood_<set>", "count", "", "images of the set, at most as many", OOD),
        M("ood_missing", "mapping", "", "sets that `ood: auto` looked for and did not have: name → why", needed=("reliability",)),
        M("detect_auroc_(energy|max_probability)_<protocol>", "fraction", "higher",
          "chance that a test image, as the protocol shows it, scores above the PGD neighbour of one; below 0.5: adversarial images "
          "look more like the data than the data",
          columns=(Column("reliability", "PGD, {protocol} (energy)", "detect_auroc_energy_<protocol>", interval=True),)),
        M("detect_auroc_(energy|max_probability)_<protocol>_(low|high)", "fraction", "", "its 95 % interval, as for `ood_auroc_…`"),
        M("detect_auroc[_evaded]_autoencoder_<protocol>", "fraction", "higher",
          "the same of minus the error with which a sparse autoencoder, trained on features of training images, reconstructs an image's; "
          "`_evaded`: of images by an attack that knows it (PGD up cross-entropy − `evasion` × error): only this says whether it helps",
          AUTOENCODER,
          columns=(Column("reliability", "PGD, {protocol} (autoencoder)", "detect_auroc_autoencoder_<protocol>", interval=True),
                   Column("reliability", "evading PGD, {protocol} (autoencoder)", "detect_auroc_evaded_autoencoder_<protocol>",
                          interval=True))),
        M("detect_auroc[_evaded]_autoencoder_<protocol>_(low|high)", "fraction", "", "its 95 % interval, as `ood_auroc_…`", AUTOENCODER),
        M("detect_evaded_acc_<protocol>", "fraction", "higher",
          "right after the attack that knows the detector, of `n_calibration` images: what evading it costs the attack",
          AUTOENCODER),
        M("autoencoder_error[_shuffled]", "number, at least 0", "lower",
          "mean squared error of test images' features, each scaled to variance 1 on training images; `_shuffled`: its control, of "
          "features that were each taken from another image", AUTOENCODER),
        M("n_detect_<protocol>", "count", "", "test images, and as many PGD neighbours (also of those that are misclassified anyway)"),
    ),
    *_of(
        "teacher",
        *(entry for chosen, images in TEACHING.items() for entry in (
            M(f"teacher_entropy_{chosen}", "nats", "", f"mean entropy of the teacher on training images {images}; null: none",
              TAUGHT,
              columns=(Column("teacher", f"entropy, {chosen}", form=".3f", n=f"n_{chosen}"),)),
            M(f"teacher_entropy_{chosen}_se", "nats", "", "its standard error; null for fewer than two images", TAUGHT),
            M(f"teacher_confidence_{chosen}", "fraction", "", "mean of the teacher's largest probability on these", TAUGHT,
              columns=(Column("teacher", f"confidence, {chosen} %"),)),
            M(f"n_{chosen}", "count", "", "these images", TAUGHT, needed=("teacher",)))),
        M("robust_overfitting", "fraction", "lower", "the student's best `validation_robust_acc` minus its last", TAUGHT,
          columns=(Column("teacher", "best − last, robust %"),)),
        M("n_teaching", "count", "", "training images", TAUGHT, needed=("teacher",)),
        M("n_recipes", "count", "", "networks of the recipe, one per seed", TAUGHT, needed=("teacher",)),
        M("teaching_steps", "count", "", "steps of PGD", TAUGHT),
    ),
    *_of(
        "report",
        M("train_seconds", "seconds", "lower", "`finetune_seconds` plus `pretrain_seconds` of its (shared) pretraining", summary=14,
          dvc=True, label="train s"),
        M("seeds", "count", "", "seeds behind a row of `table.csv`"),
        M("<column>_(low|high)", "as the column", "", "95 % interval: over seeds, or of one seed's count or standard error",
          "the column has one"),
        M("<column>_sd", "as the column", "", "standard deviation over seeds", SEEDS),
        M("<column>_n", "count", "", "examples or samples behind the column", "the column has one"),
        M("<column>_paper", "as the column", "", "the paper's number", "the profile's data are the paper's"),
        M("collapses", "count", "lower", "seeds whose training diverged"),
        M("collapse_epochs", "list of epochs", "", "their `collapse_epoch`, separated by spaces"),
    ),
    *_of(
        "bench",
        M("images_per_s", "images per second", "higher", "of whole steps, as the training loop takes them: median over `n` timings"),
        M("ms_per_step", "milliseconds", "lower", "the same, per step"),
        M("ms", "milliseconds", "lower",
          "parts, each synchronised, so that they may add up to more than a step: `data` (batch, augmentation, where chains come from), "
          "`chain`, `adversarial`, `update` (losses, gradients, optimiser)"),
        M("outside_network", "fraction", "lower",
          "share of the step that is not a pass through the network: what is left when the passes alone are timed on a fixed batch"),
        M("flops_per_image", "FLOP", "",
          "floating-point operations of a step's convolutions and matrix products, counted by torch as it dispatches them, per image"),
        M("matrix_rate_flops", "FLOP per second", "",
          "the fastest of some large matrix products and 3×3 convolutions in the step's precision, measured in the same run"),
        M("matrix_rate_by", "text", "", "which of them was fastest"),
        M("mfu", "fraction", "higher", "the step's share of that rate"),
        M("peak_memory_bytes", "bytes", "lower",
          "GPU: most allocated; CPU: the process's resident memory at its highest (on other systems than Linux: after a step)"),
        M("naive_images_per_s", "images per second", "", "of a plain implementation of the step, timed in turns with this one", NAIVE),
        M("speedup", "number", "higher", "the plain implementation's time over this one's: median of the pairs' ratios", NAIVE),
        M("spread", "as the name", "", "quartiles over the timings, of `images_per_s`, `naive_images_per_s`, `speedup`"),
        M("n", "count", "", "timings"),
        M("steps_per_timing", "count", "", "steps of one timing, enough to take half a second"),
        M("case", "settings", "", "method, network, batch, image shape and every setting of the step"),
        M("machine", "mapping", "", "what it ran on: device, threads, versions of torch and Python"),
    ),
    *_of(
        "system",
        M("system/cpu_utilization_percentage", "percent", "", "processors in use"),
        M("system/system_memory_usage_megabytes", "megabytes", "", "memory in use"),
        M("system/system_memory_usage_percentage", "percent", "", "memory in use"),
        M("system/process_cpu_utilization_percentage", "percent of one", "", "processors that the stage's own process has in use"),
        M("system/process_memory_usage_megabytes", "megabytes", "lower", "resident memory of the stage's own process"),
        M("system/gpu_<gpu>_utilization_percentage", "percent", "", "how busy the GPU is", GPU),
        M("system/gpu_<gpu>_memory_usage_(megabytes|percentage)", "megabytes, percent", "", "GPU memory in use", GPU),
        M("system/gpu_<gpu>_power_usage_watts", "watts", "", "power that the GPU draws", GPU),
    ),
)
# fmt: on

_SUMMARY = {m.summary: (m.plain, m) for m in METRICS} | {m.released: (f"released_{m.plain}", m) for m in METRICS}
_COLUMNS = tuple(entry for place, entry in sorted(_SUMMARY.items(), key=lambda item: item[0]) if place)

# The contract with other programs: columns of summary.csv, in this order. New ones come at the end.
SUMMARY = tuple(name for name, _ in _COLUMNS)
# What DVC shows and compares (`dvc metrics show`), and its bar charts: column of table.csv -> title.
HEADLINE = tuple(name for name, metric in _COLUMNS if metric.dvc)
BARS: Mapping[str, str] = {metric.plain: metric.bar for _, metric in _COLUMNS if metric.bar}
# Columns of the report's main table, each under its plain name; those with a panel in its figure; columns of tables of one seed.
TABLE = tuple(replace(metric, name=name) for name, metric in _COLUMNS if metric.label and name == metric.plain)
PANELS = tuple(metric for metric in TABLE if metric.panel)
COLUMNS = tuple((metric, column) for metric in METRICS for column in metric.columns)
# Result file -> names that it must have.
FILES = tuple(dict.fromkeys(file for metric in METRICS for file in metric.needed))
NEEDED: Mapping[str, tuple[Metric, ...]] = {
    file: tuple(replace(metric, name=metric.plain) for metric in METRICS if file in metric.needed) for file in FILES
}

# What `<place>` in a pattern may be. Protocols are settings, so any word may; `describe` takes the real ones.
PLACES: Mapping[str, tuple[str, Collection[str]]] = {
    "protocol": ("a protocol of the settings, also your own", ()),
    "steps": ("a whole number", ()),
    "gpu": ("a GPU's number, from 0", ()),
    "attack": ("an attack of the ensemble", tuple(registry.ATTACKS)),
    "adaptive": ("an adaptive attack, after the ensemble", tuple(registry.ADAPTIVE)),
    "score": ("an out-of-distribution score", ("energy", "max_probability", "gradient_norm")),
    "set": ("an out-of-distribution set", tuple(registry.OOD_SETS)),
    "column": ("a column of the report's main table", tuple(metric.name for metric in TABLE)),
}

VOCABULARY = Vocabulary(METRICS, PLACES)
describe, find = VOCABULARY.describe, VOCABULARY.find


def sign(name: str) -> int:
    """1 where higher is better, -1 where lower is, 0 where neither is."""
    return {"higher": 1, "lower": -1, "": 0}[describe(name).better]


def markdown() -> str:
    """docs/metrics.md."""
    return VOCABULARY.markdown(STAGES, SUMMARY)
