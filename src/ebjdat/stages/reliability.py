"""Stage `reliability`: checkpoint -> calibration, and detection of out-of-distribution and of adversarial images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ebjdat.data import prepared
from ebjdat.data.batches import DeviceData
from ebjdat.errors import AttackError
from ebjdat.evaluation import calibration, detection, ood, robust
from ebjdat.files import git_commit, write_atomic, write_npz, write_result
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

        logits, held_out = detection.logits_of(model, x, size), detection.logits_of(model, validation.unit(), size)
        finite, finite_held_out = detection.finite_rows(logits), detection.finite_rows(held_out)
        lost = int((~finite).sum())
        if lost:  # there is no confidence of them: they are left out, and counted
            print(f"WARNING: the logits of {lost} of {len(x)} test images are not finite; what follows is of the others", flush=True)
        if not finite.any() or not finite_held_out.any():
            raise AttackError("the network has no finite logits, on test or on validation images; nothing can be calibrated")
        rows = torch.from_numpy(finite).to(x.device)
        x, y, logits = x[rows], y[rows], logits[finite]
        labels = y.cpu().numpy()
        fitted = calibration.fit_temperature(held_out[finite_held_out], validation.labels.cpu().numpy()[finite_held_out])
        temperature = 1.0 if fitted is None else fitted
        result: dict[str, Any] = {"temperature": temperature, "temperature_fitted": fitted is not None, "n_calibration_not_finite": lost}
        measured, curves = calibration.measure(logits, labels, temperature, settings.bins)
        result |= {**measured, "n_calibration": len(x), "n_temperature": int(finite_held_out.sum()), "ece_bins": settings.bins}
        values: dict[str, Any] = {"labels": labels, "logits": logits}

        inside = {**detection.logit_scores(logits), "gradient_norm": detection.gradient_norm(model, x, size)}
        values |= {f"test_{score}": v for score, v in inside.items()}
        result |= {"n_ood_in": len(x), "ood_missing": missing}
        for name, images in others.items():
            found = detection.logits_of(model, images, size)
            kept = detection.finite_rows(found)
            outside = detection.logit_scores(found[kept])
            outside["gradient_norm"] = detection.gradient_norm(model, images, size)[kept]
            for score in inside:
                result |= detection.separation(inside[score], outside[score], f"ood_auroc_{score}_{name}")
                values[f"ood_{name}_{score}"] = outside[score]
            result[f"n_ood_{name}"] = int(kept.sum())

        with Bar(f"{experiment}/seed{seed}: PGD", len(x) * len(attack.protocols)) as bar:
            for name, protocol in attack.protocols.items():
                seen = robust.apply_protocol_noise(protocol, x, attack.seed)
                moved = robust.pgd_examples(model, seen, y, protocol, attack.seed, attack.batch_size)
                bar.advance(len(x))
                both = [detection.logits_of(model, points, size) for points in (seen, moved)]
                kept = detection.finite_rows(*both)
                clean, adversarial = (detection.logit_scores(found[kept]) for found in both)
                for score in clean:
                    result |= detection.separation(clean[score], adversarial[score], f"detect_auroc_{score}_{name}")
                    values |= {f"clean_{name}_{score}": clean[score], f"adversarial_{name}_{score}": adversarial[score]}
                result[f"n_detect_{name}"] = int(kept.sum())

        write_npz(out.values, values)
        diagram = figures.reliability_diagram(curves, f"{experiment}, seed {seed}")
        write_atomic(out.figure, lambda path: figures.save(diagram, path))
        write_result(out.metrics, {**result, "git_commit": git_commit()}, [out.values, out.figure])
        tracker.final(result)
        tracker.artifact(out.figure)
