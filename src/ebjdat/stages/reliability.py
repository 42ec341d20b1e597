"""Stage `reliability`: checkpoint -> calibration, and detection of out-of-distribution and of adversarial images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebjdat.data import prepared
from ebjdat.data.batches import DeviceData
from ebjdat.evaluation import calibration, detection, ood, robust
from ebjdat.files import git_commit, write_atomic, write_json, write_npz
from ebjdat.models.modes import UnitRange
from ebjdat.progress import Bar
from ebjdat.stages.context import Context
from ebjdat.training import checkpoint


@dataclass(frozen=True)
class Outputs:
    metrics: Path
    values: Path
    figure: Path


def run(context: Context, experiment: str, seed: int, data_path: Path, weights: Path, out: Outputs, threads: int | None) -> None:
    from ebjdat.report import figures

    data = prepared.load(data_path)
    device = context.device(threads)
    loaded = checkpoint.load_for(context.profile, experiment, weights, data)
    settings, attack = context.profile.evaluation.reliability, context.profile.attack_settings(experiment)
    size = settings.batch_size
    with context.track_result(experiment, seed, "reliability", data, out.metrics) as tracker:
        model = UnitRange(loaded.network(device)).eval()
        validation, test = DeviceData(data, "validation", device), DeviceData(data, "test", device, settings.n)
        x, y = test.unit(), test.labels
        others, missing = ood.choose(x, context.profile.data, settings)  # before anything that takes long

        logits, labels = detection.logits_of(model, x, size), y.cpu().numpy()
        held_out = detection.logits_of(model, validation.unit(), size)
        fitted = calibration.fit_temperature(held_out, validation.labels.cpu().numpy())
        temperature = 1.0 if fitted is None else fitted
        result: dict[str, Any] = {"temperature": temperature, "temperature_fitted": fitted is not None}
        measured, curves = calibration.measure(logits, labels, temperature, settings.bins)
        result |= {**measured, "n_calibration": len(x), "n_temperature": len(validation), "ece_bins": settings.bins}
        values: dict[str, Any] = {"labels": labels, "logits": logits}

        inside = {**detection.logit_scores(logits), "gradient_norm": detection.gradient_norm(model, x, size)}
        values |= {f"test_{score}": v for score, v in inside.items()}
        result |= {"n_ood_in": len(x), "ood_missing": missing}
        for name, images in others.items():
            outside = detection.logit_scores(detection.logits_of(model, images, size))
            outside["gradient_norm"] = detection.gradient_norm(model, images, size)
            for score in inside:
                result |= detection.separation(inside[score], outside[score], f"ood_auroc_{score}_{name}")
                values[f"ood_{name}_{score}"] = outside[score]
            result[f"n_ood_{name}"] = len(images)

        with Bar(f"{experiment}/seed{seed}: PGD", len(x) * len(attack.protocols)) as bar:
            for name, protocol in attack.protocols.items():
                seen = robust.seen_under(protocol, x, attack.seed)
                moved = robust.pgd_examples(model, seen, y, protocol, attack.seed, attack.batch_size)
                bar.advance(len(x))
                clean, adversarial = (detection.logit_scores(detection.logits_of(model, points, size)) for points in (seen, moved))
                for score in clean:
                    result |= detection.separation(clean[score], adversarial[score], f"detect_auroc_{score}_{name}")
                    values |= {f"clean_{name}_{score}": clean[score], f"adversarial_{name}_{score}": adversarial[score]}
                result[f"n_detect_{name}"] = len(x)

        write_npz(out.values, values)
        diagram = figures.reliability_diagram(curves, f"{experiment}, seed {seed}")
        write_atomic(out.figure, lambda path: figures.save(diagram, path))
        write_json(out.metrics, {**result, "git_commit": git_commit()})
        tracker.final(result)
        tracker.artifact(out.figure)
