"""Result files as the stages write them, small, with values that show where they come from."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ebjdat.files import read_json, write_result
from ebjdat.metrics import ENERGY_ATTACKS
from ebjdat.names import flat_results
from ebjdat.report import claims, pairs
from ebjdat.report.collect import RunResult, collect
from ebjdat.report.figures import animate, sample_grids, save
from ebjdat.report.page import Site
from ebjdat.settings import Profile

CARD: dict[str, Any] = {
    "name": "digits",
    "data_hash": "d1",
    "image_shape": [1, 8, 8],
    "classes": list("0123456789"),
    "sizes": {"train": 10, "validation": 5, "test": 100},
}
MADE = {
    "pretrain": ["pretrain_curve.csv"],
    "finetune": ["finetune_curve.csv"],
    "attack": ["verdicts.parquet"],
    "generate": ["samples.png", "chains.gif"],
    "energy": ["energy.npz"],
    "reliability": ["reliability.png"],
}
GROUPS = ("clean", "adversarial", "generated")
CHECK = {"protocol": None, "n": 20, "says": "figure"}
CHECKS = [
    {"name": "deterministic output", "passed": True, "value": 0.0, "limit": 1e-4, **CHECK},
    {"name": "black-box attack adds nothing", "passed": False, "value": 0.05, "limit": 0.01, **CHECK, "protocol": "standard"},
    {"name": "a transferred attack is weaker", "passed": None, "value": None, "limit": 0.0, **CHECK},
]
ENERGIES = ("clean", "adversarial", "generated", *(f"{m}_{g}" for m in ("overlap", "wasserstein") for g in GROUPS[1:]))
ENERGY = {"energy_gap_adversarial_se": 0.1, "energy_gap_generated": 1.0, "energy_gap_generated_se": 0.2, "git_commit": "abc"}
ENERGY |= {"n_energy_clean": 100, "n_energy_generated": 200}
for _attack in ENERGY_ATTACKS:
    ENERGY |= {f"energy_change_{_attack}": -1.0, f"energy_change_{_attack}_se": 0.1, f"energy_rise_{_attack}": 0.25}
    ENERGY |= {f"n_energy_change_{_attack}": 100}
SAMPLES = {"frechet_start": 9.0, "frechet_buffer": None, "frechet_extractor": "reference", "released_frechet": 7.25, "git_commit": "abc"}
SAMPLES |= {"kid": 0.001, "kid_std": 0.0005, "precision": 0.5, "recall": 0.25, "reference_score": 5.0, "reference_score_std": 0.1}
SAMPLES |= {"released_n_samples": 90, "n_samples": 200, "n_buffer": 0, "class_agreement": 0.9}
RELIABILITY = {"ece": 0.02, "ece_scaled": 0.01, "temperature": 1.5, "nll": 0.3, "ood_missing": {"svhn": "not here"}, "git_commit": "abc"}
RELIABILITY |= {"ood_auroc_energy_noise": 0.9, "ood_auroc_energy_noise_low": 0.85, "ood_auroc_energy_noise_high": 0.95}
HEALTHY = {"collapse_epoch": None, "recoveries": 0, "events": []}
DIVERGED = {"collapse_epoch": 2, "recoveries": 1, "events": ["epoch 2, step 5: seen; done"]}


def attack_result(correct: int) -> dict[str, Any]:
    """Of 100 examples and an ensemble on 20: PGD leaves 50 (released: 70), the ensemble 9 (released: 14)."""
    nested: dict[str, Any] = {}
    for protocol, (pgd, ensemble) in {"standard": (50, 9), "released": (70, 14), "standard_l2": (60, 11)}.items():
        counts = {"clean": (correct, 100), "pgd20": (pgd, 100), "autoattack": (ensemble, 20)}
        nested[protocol] = {attack: {"correct": k, "acc": k / n} for attack, (k, n) in counts.items()} | {
            "": {"n_test": 100, "n_attack": 20}
        }
    sweep = [[0.0, correct / 100], [0.15, 0.5], [0.5, 0.0]]
    return {**flat_results(nested), "git_commit": "abc", "checks_failed": 1, "checks": CHECKS, "sweep": sweep}


def seal(path: Path) -> None:
    """A stage's result again, with the files beside it as they are now."""
    write_result(path, read_json(path), [path.with_name(name) for name in MADE[path.stem]])


def change(path: Path, **values: Any) -> None:
    """Other values in a result file; None leaves the name out."""
    changed = {**read_json(path), **values}
    write_result(path, {name: value for name, value in changed.items() if value is not None or name not in values})


def write_verdicts(path: Path, profile: Profile, correct: int, pgd: int = 50, ensemble: int = 9) -> None:
    """The first examples are robust."""
    rows = [{"weights": "ema", "protocol": "standard", "index": i, "clean": False, "pgd20": False, "autoattack": False} for i in range(100)]
    for name in profile.evaluation.attack.protocols:
        for i in range(100):
            clean, verdict = i < correct, i < ensemble if i < 20 else None
            row = {"weights": "raw", "protocol": name, "index": i, "label": i % 10, "prediction": i % 10 if clean else (i + 1) % 10}
            rows.append({**row, "clean": clean, "pgd20": i < pgd if clean else None, "autoattack": verdict, "worst": i < 9})
    pd.DataFrame(rows).sample(frac=1, random_state=0).to_parquet(path)  # order is in `index`
    seal(path.with_name("attack.json"))


def fill(profile: Profile, results: Path) -> Path:
    """Result files of every experiment and seed, in that folder."""
    pictures = results / "pictures"
    pictures.mkdir(parents=True)
    grid = sample_grids({"fresh": (np.zeros((20, 1, 8, 8), np.uint8), np.arange(20) % 10)}, tuple("0123456789"), 2)
    save(grid, pictures / "samples.png")
    animate({"down E(x)": np.zeros((3, 10, 1, 8, 8), np.uint8)}, (0, 1, 2), 10, pictures / "chains.gif")
    for i, (name, experiment) in enumerate(profile.experiments.items()):
        for seed in profile.seeds:
            folder, correct = results / name / f"seed{seed}", 90 - i - seed
            trained = {"finetune_seconds": 10.0 + seed, "selected_epoch": 3, "epochs": 4, "git_commit": "abc", "data_hash": "d1"}
            trained |= {"method": experiment.method, **(DIVERGED if name == "eb_jdat" else HEALTHY)}
            write_result(folder / "finetune.json", trained)
            curve = pd.DataFrame({"epoch": [1, 2], "validation_clean_acc": [0.5, 0.9], "energy_clean": [-1, -2]})
            curve.to_csv(folder / "finetune_curve.csv")
            write_result(folder / "attack.json", attack_result(correct))
            write_verdicts(folder / "verdicts.parquet", profile, correct)
            write_result(folder / "generate.json", {**SAMPLES, "frechet": 12.5 + i})
            write_result(folder / "energy.json", {f"energy_{k}": float(i) for k in ENERGIES} | ENERGY | {"energy_gap_adversarial": 2.0 + i})
            random = np.random.default_rng(i)
            np.savez(folder / "energy.npz", **{prefix + g: random.normal(size=50) for g in GROUPS for prefix in ("", "joint_")})
            write_result(folder / "reliability.json", RELIABILITY)
            for picture, copy in (("chains.gif", "chains.gif"), ("samples.png", "samples.png"), ("samples.png", "reliability.png")):
                shutil.copy(pictures / picture, folder / copy)
    for name in profile.pretraining:
        for seed in profile.seeds:
            folder = results / "pretraining" / name / f"seed{seed}"
            write_result(folder / "pretrain.json", {"pretrain_seconds": 5.0})
            (folder / "pretrain_curve.csv").write_text("epoch\n1\n")
    for path in results.rglob("seed*/*.json"):
        seal(path)
    return results


def with_metrics(runs: list[RunResult], **metrics: dict[str, Any]) -> list[RunResult]:
    """Other metrics for some experiments."""
    return [dataclasses.replace(run, metrics={**run.metrics, **metrics.get(run.experiment, {})}) for run in runs]


def site_of(profile: Profile, results: Path, runs: list[RunResult] | None = None, card: dict[str, Any] = CARD) -> Site:
    runs = collect(profile, results, "d1") if runs is None else runs
    findings = claims.judge(claims.Evidence(profile, runs, results))
    return Site(profile, "digits", results, card, runs, findings, pairs.with_controls(profile, results))
