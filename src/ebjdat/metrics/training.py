"""Metrics of trainings, and the provenance that every result states."""

from __future__ import annotations

from ebjdat.metrics.parts import ADVERSARIAL, ANY_MODEL, CHAINS, CLEAN, LOGS, WATCHED, listed, of
from ebjdat.vocabulary import Metric

M = Metric

# A table, an entry after the other: not one argument a line.
# fmt: off
TRAINING: tuple[Metric, ...] = (
    *of(
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
    *of(
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
    *of(
        "curve",
        M("epoch", "epoch, from 1", "", "which epoch"),
        M("lr", "per step", "", "learning rate of the last step"),
        M("seconds", "seconds", "lower", "this training so far, validation included; the last is `finetune_seconds` or `pretrain_seconds`"),
        M("loss", "nats", "lower", "what is minimised, as its method weighs it"),
        M("ce_clean", "nats", "lower", "cross-entropy of clean images", CLEAN),
        M("ce_robust", "nats", "lower", "cross-entropy of adversarial neighbours", ADVERSARIAL),
        *(M(log.name, log.unit, log.better, log.meaning, f"method {listed(names)}") for log, names in LOGS.items()),
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
)
# fmt: on
