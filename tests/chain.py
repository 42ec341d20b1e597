"""A small chain of results: every stage of one experiment on digits, run in this process, with everything there is to measure.

conftest.py makes it once for all tests of a run (`chain`), whose files no test changes.
"""

from __future__ import annotations

import gc
import json
import sys
import threading
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import FrameType

import pytest
import torch
import yaml

import ebjdat
from ebjdat.data import prepared
from ebjdat.data.prepared import Prepared
from ebjdat.models.wrn import WideResNet
from ebjdat.settings import merge
from ebjdat.stages import attack, evaluate, prepare, reliability, report, train
from ebjdat.stages.context import Context
from ebjdat.stages.evaluation import Task
from ebjdat.training import checkpoint

from .conftest import ROOT

PACKAGE = str(Path(ebjdat.__file__).parent)
OWN = "mine"  # a protocol that only this profile has
FEW = {
    "n": 2,
    "pgd": {"step_size": 0.03},
    "adaptive_attacks": {"energy_ce": {"steps": 3, "restarts": 2}},
    "attacks": {
        "apgd_ce": {"steps": 2},
        "apgd_t": {"steps": 2, "targets": 2},
        "fab_t": {"steps": 1, "targets": 1},
        "square": {"queries": 5},
    },
}
OUTPUTS = {  # of the evaluations of a checkpoint
    "attack": {"out": "attack.json", "verdicts": "verdicts.parquet"},
    "generate": {"out": "generate.json", "samples": "samples.npz", "grid": "samples.png", "chains": "chains.gif"},
    "energy": {"out": "energy.json", "values": "energy.npz", "figure": "energy.png"},
    "reliability": {"out": "reliability.json", "values": "reliability.npz", "figure": "reliability.png"},
}
REPORTS = ("summary.csv", "metrics.json", "table.csv", "table.md", "report.html", "audit.html", "audit.md")


class Executed:
    """While it is entered: (file, first line) of every function of the package that is called, in any thread."""

    def __init__(self) -> None:
        self.functions: set[tuple[str, int]] = set()

    def __enter__(self) -> Executed:
        gc.collect()  # a generator that an earlier test left would run once more when it is collected
        threading.setprofile(self.note)
        sys.setprofile(self.note)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]

    def note(self, frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_name != "<module>" and code.co_filename.startswith(PACKAGE):
            self.functions.add((code.co_filename, code.co_firstlineno))


def outputs(folder: Path, stage: str) -> dict[str, Path]:
    """An evaluation's files in a folder."""
    return {name: folder / file for name, file in OUTPUTS[stage].items()}


def trained(folder: Path, stage: str = "finetune", weights: Path | None = None) -> train.Outputs:
    """A training's files in a folder."""
    return train.Outputs(weights or folder / f"{stage}.safetensors", folder / f"{stage}.json", folder / f"{stage}_curve.csv")


@dataclass(frozen=True)
class Chain:
    """Pretrainings "clean" and "scratch" (the latter untrained), and eb_jdat fine-tuned from "clean"; none of its files may be changed."""

    folder: Path

    @cached_property
    def context(self) -> Context:
        return Context.load(self.folder / "tiny.yaml", [])

    @property
    def data_path(self) -> Path:
        return self.folder / "data.npz"

    @cached_property
    def data(self) -> Prepared:
        return prepared.load(self.data_path)

    @property
    def results(self) -> Path:
        return self.folder / "results"

    @property
    def experiment(self) -> Path:
        """Results of eb_jdat."""
        return self.results / "eb_jdat/seed0"

    def weights(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def network(self, name: str) -> WideResNet:
        return checkpoint.load(self.weights(name)).network(torch.device("cpu"))

    def task(self, stage: str, folder: Path, weights: Path | None = None, experiment: str = "eb_jdat") -> Task:
        """An evaluation whose outputs lie in a folder."""
        inputs = {"data": self.data_path, "weights": weights or self.weights("eb_jdat")}
        more = {"attack": "source", "generate": "reference"}
        inputs |= {more[stage]: self.weights("clean")} if stage in more else {}
        inputs |= {"samples": folder / "samples.npz"} if stage == "energy" else {}
        return Task(experiment, 0, inputs, outputs(folder, stage))

    def executed(self, stage: str) -> list[tuple[str, int]]:
        """(file, first line) of every function of the package that was called in a stage."""
        return [(file, line) for file, line in json.loads((self.folder / f"executed-{stage}.json").read_text())]


def profile() -> dict[str, object]:
    """The digits in a reduced budget: one experiment with chains, neighbours, averaged weights and an ensemble."""
    content = yaml.safe_load((ROOT / "params/digits.yaml").read_text())
    content["experiments"] = {"eb_jdat": {"method": "eb_jdat", "pretraining": "clean", "training": {"ema": 0.9}}}
    small = yaml.safe_load((ROOT / "params/overrides/ci.yaml").read_text())
    content = merge(content, {key: value for key, value in small.items() if key != "experiments"})
    protocols = {
        "standard": {"eps": 0.15, "n": 0, "pgd": {"step_size": 0.03}},
        "released": {"eps": 0.15, "n": 0, "pgd": {"step_size": 0.02}},
        OWN: {"like": "standard", "eps": 0.1, **FEW},
    }
    content["evaluation"]["attack"] = {"protocols": protocols, "transfer": None, "checks": {"n": 5, "steps": 20, "restarts": 1}}
    content["evaluation"]["attack"] |= {"universal": {"steps": 12}, "screen": {}}
    content["evaluation"]["reliability"] = {"autoencoder": {"width": 96, "epochs": 10}}
    own = {"reference": {"experiment": "eb_jdat", "seed": 0}, "protocols": {OWN: {"like": "released", "select": 1.0}}}
    content["evaluation"]["generate"] |= own
    return content


def make(folder: Path) -> None:
    """Every stage, in order."""
    (folder / "tiny.yaml").write_text(yaml.safe_dump(profile()))
    chain = Chain(folder)
    context, data, clean = chain.context, chain.data_path, chain.weights("clean")
    run = {"attack": attack.run, "generate": evaluate.generate, "energy": evaluate.energy, "reliability": reliability.run}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("EBJDAT_TRACKING", "0")
        prepare.run(context.profile, data, folder / "card.json")
        for name in ("clean", "scratch"):
            out = trained(chain.results / f"pretraining/{name}/seed0", "pretrain", chain.weights(name))
            train.pretrain(context, name, 0, data, out, None)
        for stage in ("finetune", *run):
            with Executed() as executed:
                if stage == "finetune":
                    train.finetune(context, "eb_jdat", 0, data, clean, trained(chain.experiment, weights=chain.weights("eb_jdat")), None)
                else:
                    run[stage](context, chain.task(stage, chain.experiment))
            (folder / f"executed-{stage}.json").write_text(json.dumps(sorted(executed.functions)))
        report.run(context, Path("results"), Path("card.json"), report.Outputs(*(Path("results") / name for name in REPORTS)))
