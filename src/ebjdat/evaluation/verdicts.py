"""Verdicts of one protocol, example by example: the file of an interrupted evaluation, the result, and the table made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ebjdat.evaluation import autoattack
from ebjdat.files import read_npz, reading, write_npz
from ebjdat.intervals import Proportion
from ebjdat.models.logits import NO_CLASS
from ebjdat.settings import ProtocolSettings

NOT_ATTACKED = -1  # broken already, wrong without an attack, or beyond the first n


@dataclass
class Verdicts:
    """Of N examples in the order of the test split, under one protocol.

    prediction: class (N,) of each image as the protocol shows it; NO_CLASS where its logits are not finite. key: digest of
    network, images, protocol and batch size. robust: attack -> int8 (N,): 1 correct after the attack, 0 broken by it,
    NOT_ATTACKED. found: attack -> float64 (N, 2): L2 and SSIM of the image with which it broke an example, nan elsewhere. lost:
    bool (N,), whether an attack returned an image whose logits are not finite; that is broken. done: finished batches of each
    attack. excess: how far the farthest image that an attack returned lies outside the ball or [0, 1]; such images break
    nothing. seconds, flags: per attack; AutoAttack's own warnings. classes: of the network.
    """

    y: Tensor
    prediction: Tensor
    key: str = ""
    robust: dict[str, Tensor] = field(default_factory=dict)
    lost: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    done: dict[str, int] = field(default_factory=dict)
    excess: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)
    classes: int = 0
    found: dict[str, Tensor] = field(default_factory=dict)

    @property
    def clean(self) -> Tensor:
        """Correct without an attack (N,)."""
        return self.prediction == self.y

    def robust_under(self, attacks: Sequence[str]) -> Tensor:
        """Correct without an attack and after each of these (N,)."""
        robust = self.clean.clone()
        for name in attacks:
            robust &= self.robust[name] != 0
        return robust

    def save(self, path: Path) -> None:
        arrays = {f"robust.{name}": value.cpu().numpy() for name, value in self.robust.items()}
        arrays |= {f"found.{name}": value.cpu().numpy() for name, value in self.found.items()}
        arrays |= {name: getattr(self, name).cpu().numpy() for name in ("y", "prediction", "lost")} | {"key": np.array(self.key)}
        arrays |= {"classes": np.array(self.classes)}
        arrays |= {"attacks": np.array(list(self.done), dtype=str), "done": np.array(list(self.done.values()), dtype=np.int64)}
        arrays |= {"seconds": np.array([self.seconds.get(name, 0.0) for name in self.done]), "excess": np.array(self.excess)}
        write_npz(path, {**arrays, "flags": np.array(self.flags, dtype=str)})

    @classmethod
    def load(cls, path: Path, device: torch.device) -> Verdicts:
        """Raises FileError for a damaged file."""
        file = read_npz(path)
        with reading(path, largest=None):
            names = file["attacks"].tolist()
            loaded = cls(
                y=torch.from_numpy(file["y"]).to(device),
                prediction=torch.from_numpy(file["prediction"]).to(device),
                lost=torch.from_numpy(file["lost"]).to(device),
                classes=int(file["classes"]),
                key=str(file["key"]),
                robust={name: torch.from_numpy(file[f"robust.{name}"]).to(device) for name in names},
                found={name: torch.from_numpy(file[f"found.{name}"]).to(device) for name in names},
                done=dict(zip(names, map(int, file["done"].tolist()), strict=True)),
                excess=float(file["excess"]),
                seconds=dict(zip(names, file["seconds"].tolist(), strict=True)),
                flags=file["flags"].tolist(),
            )
            expected = [(torch.int64, loaded.prediction), (torch.int64, loaded.y), (torch.bool, loaded.lost)]
            expected += [(torch.int8, verdicts) for verdicts in loaded.robust.values()]
            if loaded.y.ndim != 1 or any(value.dtype != dtype or value.shape != loaded.y.shape for dtype, value in expected):
                raise ValueError("verdicts of other shapes or types")
            if any(value.dtype != torch.float64 or value.shape != (len(loaded.y), 2) for value in loaded.found.values()):
                raise ValueError("distances of other shapes or types")
            return loaded


@dataclass(frozen=True)
class Found:
    """The images with which attacks broke n examples, one each: means of L2 and SSIM; None where n is 0."""

    l2: float | None
    ssim: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[Tensor]) -> Found:
        """values: of `Verdicts.found`, each (N, 2)."""
        each = torch.cat([value[~value[:, 0].isnan()] for value in values])
        if not len(each):
            return cls(None, None, 0)
        l2, ssim = each.mean(0).tolist()
        return cls(l2, ssim, len(each))

    def statistics(self) -> dict[str, Any]:
        return {"found_l2": self.l2, "found_ssim": self.ssim, "found_n": self.n}


@dataclass(frozen=True)
class AdaptiveResult:
    """An adaptive attack on what the ensemble left of the first n. robust: correct after both. alone: broken by it, not by the ensemble."""

    robust: Proportion
    alone: Proportion
    found: Found

    def statistics(self) -> dict[str, Any]:
        low, high = self.alone.interval
        return {
            **statistics(self.robust),
            "alone": self.alone.correct,
            "alone_share": self.alone.value,
            "alone_share_low": low,
            "alone_share_high": high,
            **self.found.statistics(),
        }


@dataclass(frozen=True)
class EnsembleResult:
    """The ensemble on a protocol's first n examples.

    robust: correct after every attack. after: attack -> correct after it and those before it. pgd: correct after PGD, on the
    same examples. warnings: of AutoAttack's own checks. targets: targeted attack -> how many classes it aims at. adaptive: the
    attacks that came after it, each on what the ensemble left.
    """

    robust: Proportion
    after: Mapping[str, Proportion]
    pgd: Proportion
    warnings: tuple[str, ...]
    seconds: float
    targets: Mapping[str, int]
    adaptive: Mapping[str, AdaptiveResult]
    found: Found


@dataclass(frozen=True)
class ProtocolResult:
    """A network's accuracy under one protocol. clean, pgd: of all examples. not_finite: images without finite logits, as they
    are and after an attack. ensemble: None where the protocol has none, or n is 0.
    """

    norm: str
    eps: float
    radius: float
    pgd_name: str
    not_finite: int
    not_finite_adversarial: int
    clean: Proportion
    pgd: Proportion
    found: Found
    n_attack: int
    ensemble: EnsembleResult | None = None

    def statistics(self) -> dict[str, dict[str, Any]]:
        """attack -> statistic -> value for names.flat_results: "clean", PGD, the ensemble, and "" for the protocol as a whole."""
        of_protocol: dict[str, Any] = {
            "norm": self.norm,
            "eps": self.eps,
            "radius": self.radius,
            "n_test": self.clean.n,
            "n_not_finite": self.not_finite,
            "n_not_finite_adversarial": self.not_finite_adversarial,
            "n_attack": self.n_attack,
        }
        values = {"": of_protocol, "clean": statistics(self.clean), self.pgd_name: {**statistics(self.pgd), **self.found.statistics()}}
        if self.ensemble:
            of_protocol |= {"attack_seconds": self.ensemble.seconds, "n_targets": dict(self.ensemble.targets)}
            values[self.pgd_name]["acc_first_n"] = self.ensemble.pgd.value
            warnings = {"warnings": list(self.ensemble.warnings)}
            values["autoattack"] = {**statistics(self.ensemble.robust), **self.ensemble.found.statistics(), **warnings}
            values |= {f"after_{attack}": {"correct": after.correct} for attack, after in self.ensemble.after.items()}
            values |= {name: adaptive.statistics() for name, adaptive in self.ensemble.adaptive.items()}
        return values


def statistics(proportion: Proportion) -> dict[str, Any]:
    """A proportion with its interval, as result files name them."""
    low, high = proportion.interval
    return {"correct": proportion.correct, "acc": proportion.value, "low": low, "high": high}


def pgd_name(protocol: ProtocolSettings) -> str:
    return f"pgd{protocol.pgd.steps}"


def proportion(correct: Tensor) -> Proportion:
    """How many of (N,) are correct."""
    return Proportion(int(correct.sum()), len(correct))


def result(protocol: ProtocolSettings, verdicts: Verdicts) -> ProtocolResult:
    """Accuracies of a protocol whose verdicts are complete."""
    pgd, n, names = pgd_name(protocol), protocol.n, list(protocol.attacks)
    after_pgd = verdicts.robust_under([pgd])
    ensemble = None
    if n and names:
        ensemble = EnsembleResult(
            robust=proportion(verdicts.robust_under(names)[:n]),
            after={attack: proportion(verdicts.robust_under(names[: i + 1])[:n]) for i, attack in enumerate(names)},
            pgd=Proportion(int(after_pgd[:n].sum()), n),
            warnings=tuple(verdicts.flags),
            seconds=round(sum(verdicts.seconds.values()), 3),
            targets={a: autoattack.aimed_at(s, verdicts.classes) for a, s in protocol.attacks.items() if a in autoattack.TARGETED},
            adaptive={
                name: AdaptiveResult(
                    proportion(verdicts.robust_under([*names, name])[:n]),
                    proportion(verdicts.robust[name][:n] == 0),
                    Found.of([verdicts.found[name]]),
                )
                for name in protocol.adaptive_attacks
            },
            found=Found.of([verdicts.found[name] for name in names]),
        )
    return ProtocolResult(
        norm=protocol.norm,
        eps=protocol.eps,
        radius=protocol.radius,
        pgd_name=pgd,
        not_finite=int((verdicts.prediction == NO_CLASS).sum()),
        not_finite_adversarial=int(verdicts.lost.sum()),
        clean=proportion(verdicts.clean),
        pgd=proportion(after_pgd),
        found=Found.of([verdicts.found[pgd]]),
        n_attack=n,
        ensemble=ensemble,
    )


def columns(name: str, protocol: ProtocolSettings, verdicts: Verdicts) -> dict[str, list[Any]]:
    """A row per example: what verdicts.parquet holds of one protocol. A verdict that was not asked for is None."""
    n = protocol.n if protocol.attacks else 0
    names = list(protocol.attacks)
    after = verdicts.robust_under(names) if n else verdicts.clean
    worst = verdicts.robust_under([pgd_name(protocol), *([*names, *protocol.adaptive_attacks] if n else [])])
    attacked = {
        attack: [None if value == NOT_ATTACKED else bool(value) for value in robust.tolist()] for attack, robust in verdicts.robust.items()
    }
    return {
        "protocol": [name] * len(worst),
        "index": list(range(len(worst))),
        "label": verdicts.y.tolist(),
        "prediction": verdicts.prediction.tolist(),
        "clean": verdicts.clean.tolist(),
        **attacked,
        "autoattack": [bool(value) if i < n else None for i, value in enumerate(after.tolist())],
        "worst": worst.tolist(),
    }
