"""Stage `reliability`: checkpoint -> calibration, and detection of out-of-distribution and of adversarial images."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ebjdat.data.batches import DeviceData
from ebjdat.errors import AttackError
from ebjdat.evaluation import calibration, detection, ood, robust
from ebjdat.evaluation.autoencoder import Detector
from ebjdat.files import write_atomic, write_npz
from ebjdat.models.modes import UnitRange
from ebjdat.models.wrn import WideResNet, features_and_logits
from ebjdat.progress import Bar
from ebjdat.settings import AttackSettings, ReliabilitySettings
from ebjdat.stages.context import Context
from ebjdat.stages.evaluation import Task, open_evaluation

Results = dict[str, Any]
Scores = dict[str, NDArray[np.float64]]


def run(context: Context, task: Task) -> None:
    """Calibration, and how well out-of-distribution and adversarial images are distinguished from test images.

    Inputs: data, weights. Outputs: out, values (scores of every image), figure. Raises AttackError without any finite logits.
    """
    from ebjdat.report import figures

    settings, attack = context.profile.evaluation.reliability, context.profile.attack_settings(task.experiment)
    size = settings.batch_size
    with open_evaluation(context, task, "reliability") as evaluation:
        model = UnitRange(evaluation.checkpoint.network(evaluation.device)).eval()
        test = DeviceData(evaluation.data, "test", evaluation.device, settings.n)
        validation = DeviceData(evaluation.data, "validation", evaluation.device)
        x, y = test.unit(), test.labels
        others, missing = ood.choose(x, context.profile.data, settings)  # before anything that takes long

        logits, held_out = detection.logits_of(model, x, size), detection.logits_of(model, validation.unit(), size)
        finite, finite_held_out = detection.finite_rows(logits), detection.finite_rows(held_out)
        lost = int((~finite).sum())
        if lost:  # they have no confidence: they are left out, and counted
            print(f"WARNING: the logits of {lost} of {len(x)} test images are not finite; these are left out below", flush=True)
        if not finite.any() or not finite_held_out.any():
            raise AttackError("the network has no finite logits, on test or on validation images; nothing can be calibrated")
        rows = torch.from_numpy(finite).to(x.device)
        x, y, logits = x[rows], y[rows], logits[finite]
        labels = y.cpu().numpy()
        temperature = calibration.fit_temperature(held_out[finite_held_out], validation.labels.cpu().numpy()[finite_held_out])
        measured, curves = calibration.measure(logits, labels, temperature or 1.0, settings.bins)
        evaluation.metrics = {
            "temperature": temperature or 1.0,
            "temperature_fitted": temperature is not None,
            "n_calibration_not_finite": lost,
            **measured,
            "n_calibration": len(x),
            "n_temperature": int(finite_held_out.sum()),
            "ece_bins": settings.bins,
            "n_ood_in": len(x),
            "ood_missing": missing,
        }
        own = {**detection.logit_scores(logits), "gradient_norm": detection.gradient_norm(model, x, size)}
        values = {"labels": labels, "logits": logits, **{f"test_{score}": v for score, v in own.items()}}
        detector = detector_of(model, DeviceData(evaluation.data, "train", evaluation.device), settings)
        if detector:
            evaluation.metrics |= detector.errors(x, settings.seed)
        with Bar(f"{evaluation.title}: PGD", len(x) * len(attack.protocols)) as bar:
            for metrics, scores in (out_of_distribution(model, own, others, size), adversarial(model, x, y, attack, size, bar, detector)):
                evaluation.metrics |= metrics
                values |= scores

        write_npz(task.outputs["values"], values)
        diagram = figures.reliability_diagram(curves, f"{task.experiment}, seed {task.seed}")
        write_atomic(task.outputs["figure"], lambda path: figures.save(diagram, path))


def out_of_distribution(model: nn.Module, own: Scores, others: Mapping[str, Tensor], size: int) -> tuple[Results, Scores]:
    """Every score on OOD sets, name -> images in [0, 1], against `own`, the same scores of test images; both by their final names."""
    metrics: Results = {}
    values: Scores = {}
    for name, images in others.items():
        logits = detection.logits_of(model, images, size)
        finite = detection.finite_rows(logits)
        scores = detection.logit_scores(logits[finite])
        scores["gradient_norm"] = detection.gradient_norm(model, images, size)[finite]
        for score in own:
            metrics |= detection.separation(own[score], scores[score], f"ood_auroc_{score}_{name}")
            values[f"ood_{name}_{score}"] = scores[score]
        metrics[f"n_ood_{name}"] = int(finite.sum())
    return metrics, values


def detector_of(model: UnitRange, train: DeviceData, settings: ReliabilitySettings) -> Detector | None:
    """The sparse autoencoder that the settings ask for, trained on features of training images."""
    if not settings.autoencoder:
        return None
    assert isinstance(model.network, WideResNet)
    return Detector.of(partial(features_and_logits, model.network), train.unit(), settings.autoencoder, settings.seed, settings.batch_size)


def adversarial(
    model: nn.Module, x: Tensor, y: Tensor, attack: AttackSettings, size: int, bar: Bar, detector: Detector | None = None
) -> tuple[Results, Scores]:
    """Every score of logits on PGD's images under each protocol against the same images without an attack; by their final names.

    detector: one more, which is also asked about the images of an attack that knows it.
    """
    metrics: Results = {}
    values: Scores = {}
    for name, protocol in attack.protocols.items():
        clean = robust.apply_protocol_noise(protocol, x, attack.seed)
        moved = robust.pgd_examples(model, clean, y, protocol, attack.seed, attack.batch_size)
        bar.advance(len(x))
        both = [detection.logits_of(model, points, size) for points in (clean, moved)]
        finite = detection.finite_rows(*both)
        of_clean, of_moved = (detection.logit_scores(logits[finite]) for logits in both)
        for score in of_clean:
            metrics |= detection.separation(of_clean[score], of_moved[score], f"detect_auroc_{score}_{name}")
            values |= {f"clean_{name}_{score}": of_clean[score], f"adversarial_{name}_{score}": of_moved[score]}
        metrics[f"n_detect_{name}"] = int(finite.sum())
        if detector:
            evaded = robust.pgd_examples(model, clean, y, protocol, attack.seed, attack.batch_size, detector.evading_score)
            sets = {"clean": clean, "adversarial": moved, "evading": evaded}
            scores = {kind: detector.scores(points) for kind, points in sets.items()}
            metrics |= detection.separation(scores["clean"], scores["adversarial"], f"detect_auroc_autoencoder_{name}")
            metrics |= detection.separation(scores["clean"], scores["evading"], f"detect_auroc_evaded_autoencoder_{name}")
            metrics[f"detect_evaded_acc_{name}"] = float((robust.predictions(model, evaded, size) == y).double().mean())
            values |= {f"{kind}_{name}_autoencoder": score for kind, score in scores.items()}
    return metrics, values
