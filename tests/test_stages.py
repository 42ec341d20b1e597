"""Stages on real files: what they write is recomputed here from the data and the checkpoint alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from ebjdat import codehash, jobs
from ebjdat.evaluation.frechet import frechet_distance
from ebjdat.files import read_json
from ebjdat.models.wrn import WideResNet
from ebjdat.settings import ImbalanceSettings, load
from ebjdat.stages import attack, train
from ebjdat.stages.context import BusyError, Context, journal_of
from ebjdat.training import checkpoint, fit, healing
from ebjdat.training.state import TrainingError

from .chain import OWN, PACKAGE, Chain, trained
from .conftest import ROOT

CPU = torch.device("cpu")


def context(run: str, *overrides: str, **training: str) -> Context:
    """The reduced profile with other settings; `training` are those of eb_jdat."""
    own = [f"experiments.eb_jdat.training.{key}={value}" for key, value in training.items()]
    return Context(load(ROOT / "params/digits.yaml", [str(ROOT / "params/overrides/ci.yaml"), *overrides, *own]), run)


def finetuned(context: Context, chain: Chain, folder: Path, initial: Path | None = None, experiment: str = "eb_jdat") -> train.Outputs:
    """Fine-tuned from the chain's pretraining; its files are in the folder."""
    out = trained(folder)
    train.finetune(context, experiment, 0, chain.data_path, initial or chain.weights("clean"), out, None)
    return out


@pytest.mark.parametrize("stage", ["finetune", "attack", "generate", "energy", "reliability"])
def test_nothing_is_executed_that_the_digest_of_a_jobs_code_does_not_hold(stage: str, chain: Chain) -> None:
    """By what Python really called. Reading of settings and what has no effect on numbers is left out of both."""
    spec = jobs.STAGES[stage]
    strategies = spec.strategies(chain.context.profile, "eb_jdat")
    held = {key[:2] for key in codehash.code(*spec.code, *(entry.target for entry in strategies))}
    executed = set()
    for file, functions in groupby(chain.executed(stage), itemgetter(0)):
        module = f"ebjdat.{file.removeprefix(PACKAGE).strip('/').removesuffix('.py').replace('/', '.')}"
        statements = ast.parse(Path(file).read_bytes()).body
        for _, line in functions:
            (names,) = [codehash.defines(n) or [""] for n in statements if first_line(n) <= line <= (n.end_lineno or 0)]
            executed |= {(module, one) for one in names}
    counted = {(module, one) for module, one in executed if codehash.counts(module, one) and module not in codehash.SETTINGS}
    assert len(counted) > 20
    assert counted - held == set()


def first_line(node: ast.stmt) -> int:
    return min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])


def test_state_made_by_other_code_is_not_continued(chain: Chain, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = checkpoint.load(chain.weights("eb_jdat")).header.code
    assert code == jobs.STAGES["finetune"].digest(chain.context.profile, "eb_jdat")
    states: list[Path] = []

    def stopped(*found: Any, **_: Any) -> None:
        states.extend(s for a in found for s in [a if isinstance(a, Path) else getattr(a, "state", None)] if s)
        raise KeyboardInterrupt

    monkeypatch.setattr(fit, "train", stopped)
    monkeypatch.setattr(attack, "audit", stopped)
    for code in ("as it is", "as it is", "another"):
        if code == "another":
            monkeypatch.setattr(codehash, "digest", lambda *_: "another")
        with pytest.raises(KeyboardInterrupt):
            train.pretrain(chain.context, "clean", 0, chain.data_path, trained(here), None)
        with pytest.raises(KeyboardInterrupt):
            attack.run(chain.context, chain.task("attack", here))
    assert states[:2] == states[2:4]
    assert not set(states[4:]) & set(states[:4])


def logits(network: WideResNet, images: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return network(torch.from_numpy(images).float() / 127.5 - 1).double().numpy()


def features(network: WideResNet, images: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return network.features(torch.from_numpy(images).float() / 127.5 - 1).double().numpy()


def marginal(values: np.ndarray) -> np.ndarray:
    return -np.log(np.exp(values).sum(1))


def test_attack_measures_the_test_split_under_the_trained_network_and_its_averaged_weights(chain: Chain) -> None:
    result, loaded = read_json(chain.experiment / "attack.json"), checkpoint.load(chain.weights("eb_jdat"))
    images, labels = chain.data.split("test")
    assert result["n_test"] == 100
    for prefix, weights in (("", loaded.weights), ("ema_", loaded.ema)):
        assert result[f"{prefix}clean_correct"] == (logits(loaded.network(CPU, weights), images).argmax(1) == labels).sum()
    assert not torch.equal(loaded.ema["head.weight"], loaded.weights["head.weight"])  # type: ignore[index]
    assert 0 < result["pgd20_correct"] < result["clean_correct"]
    assert result["n_attack"] == 0


def test_energies_are_those_of_the_test_images_and_the_samples(chain: Chain) -> None:
    network = chain.network("eb_jdat")
    images, labels = chain.data.split("test")
    values, samples = (np.load(chain.experiment / name, allow_pickle=False) for name in ("energy.npz", "samples.npz"))
    clean, generated = logits(network, images), logits(network, samples["images"])
    assert np.allclose(values["clean"], marginal(clean), atol=1e-4)
    assert np.allclose(values["joint_clean"], -clean[np.arange(100), labels], atol=1e-4)
    assert np.allclose(values["generated"], marginal(generated), atol=1e-4)
    assert np.allclose(values["joint_generated"], -generated[np.arange(100), samples["labels"]], atol=1e-4)
    assert not np.allclose(values["adversarial"], values["clean"], atol=0.01)
    result = read_json(chain.experiment / "energy.json")
    assert result["energy_gap_adversarial"] == pytest.approx(np.abs(values["adversarial"] - values["clean"]).mean())
    assert result["energy_gap_generated"] == pytest.approx(abs(values["generated"].mean() - values["clean"].mean()))
    assert result["energy_change_untargeted"] == pytest.approx((values["adversarial"] - values["clean"]).mean())
    attacks = ("energy_aware", "targeted", "untargeted", "ascent")
    change, rise = ({name: result[f"energy_{what}_{name}"] for name in attacks} for what in ("change", "rise"))
    assert change["energy_aware"] < min(change["targeted"], change["untargeted"])  # each attack climbs what it is named after
    assert change["ascent"] > max(change["targeted"], change["untargeted"])
    assert change["targeted"] != change["untargeted"]
    assert rise["ascent"] == 1.0


def test_frechet_distance_is_to_the_training_images_under_the_reference(chain: Chain) -> None:
    """(Averaged weights, conditional chains and other measures: stages/test_evaluate.py.)"""
    reference, buffer = chain.network("clean"), checkpoint.load(chain.weights("eb_jdat")).buffer
    samples = np.load(chain.experiment / "samples.npz", allow_pickle=False)["images"]
    result, real = read_json(chain.experiment / "generate.json"), features(reference, chain.data.split("train")[0])
    assert result["frechet"] == pytest.approx(frechet_distance(features(reference, samples), real), rel=1e-3)
    assert buffer is not None
    assert result["frechet_buffer"] == pytest.approx(frechet_distance(features(reference, buffer.numpy()), real), rel=1e-3)
    assert (result["frechet_extractor"], result["n_samples"], result["n_buffer"]) == ("reference", 100, len(buffer))
    assert result["frechet_start"] != result["frechet"]


def test_averaged_weights_follow_their_recursion(chain: Chain, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    average = AveragedModel.update_parameters

    def update_and_note(self: AveragedModel, model: torch.nn.Module) -> None:
        average(self, model)
        seen.append({k: v.clone() for k, v in model.state_dict().items() if v.is_floating_point()})

    monkeypatch.setattr(AveragedModel, "update_parameters", update_and_note)
    loaded = checkpoint.load(finetuned(chain.context, chain, here).checkpoint)
    assert loaded.ema is not None
    expected = seen[0]
    for later in seen[1:]:
        expected = {k: 0.9 * v + 0.1 * later[k] for k, v in expected.items()}
    assert all(torch.allclose(loaded.ema[k], v, atol=1e-5) for k, v in expected.items())  # float32, 18 steps


def test_finetuning_starts_from_its_pretraining_and_selects_on_validation(chain: Chain, here: Path) -> None:
    out = finetuned(context("still", "experiments.classifier.training.epochs=0"), chain, here, experiment="classifier")
    first, second, other = (checkpoint.load(path).weights for path in (chain.weights("clean"), out.checkpoint, chain.weights("scratch")))
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not torch.equal(first["stem.weight"], other["stem.weight"])
    images, labels = chain.data.split("validation")
    accuracy = (logits(chain.network("clean"), images).argmax(1) == labels).mean()
    assert read_json(chain.results / "pretraining/clean/seed0/pretrain.json")["selection_score"] == pytest.approx(accuracy)
    header = checkpoint.load(chain.weights("eb_jdat"), data_hash=chain.data.data_hash).header
    assert (header.method, header.seed, header.training.adversary.score) == ("eb_jdat", 0, "energy")


def test_seeds_give_different_initialisations(chain: Chain, here: Path) -> None:
    train.pretrain(chain.context, "scratch", 1, chain.data_path, trained(here), None)
    one, two = (checkpoint.load(path).weights["stem.weight"] for path in (chain.weights("scratch"), trained(here).checkpoint))
    assert not torch.equal(one, two)


def diverging(**more: str) -> Context:
    """EB-JDAT at 100 times its rate, 4 epochs."""
    own = {"optimizer.lr": "30", "epochs": "4", "schedule.name": "constant", "healing.every": "5", **more}
    return context("diverging", **own)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One for all, since making it takes seconds; each test has an MLflow experiment of its own there."""
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"


def sent(out: train.Outputs, store: str) -> Any:
    """A client of the store, to which the training's journal was sent."""
    from mlflow import MlflowClient

    from ebjdat.tracking.publish import Publisher

    assert Publisher(store).publish([journal_of(out.metrics)]).errors == []
    return MlflowClient(store)


def test_recoveries_are_in_the_result_and_in_mlflow(chain: Chain, here: Path, store: str) -> None:
    out = finetuned(diverging(), chain, here)
    result = read_json(out.metrics)
    assert result["collapse_epoch"] == 1
    assert result["recoveries"] == len(result["events"]) >= 2
    assert "a new noise seed" in result["events"][0]
    assert "the rate x 0.1" in result["events"][1]
    assert checkpoint.load(out.checkpoint).header.metrics["recoveries"] == result["recoveries"]
    client = sent(out, store)
    runs = client.search_runs([client.get_experiment_by_name("diverging").experiment_id])
    assert len(runs) == 2
    for run in runs:  # the experiment's and its stage's
        assert run.data.metrics["collapse_epoch"] == 1
        assert run.data.metrics["recoveries"] == result["recoveries"]
        assert [run.data.tags[f"event_{i}"] for i in range(1, len(result["events"]) + 1)] == result["events"]


def test_a_collapse_that_is_only_recorded_is_no_recovery(chain: Chain, here: Path, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And done again without one, nothing of it is left on the experiment's current run."""
    recorded = context("recorded", **{"epochs": "2", "healing.mode": "record", "healing.gap": "1.0e-9"})
    out = finetuned(recorded, chain, here)
    result = read_json(out.metrics)
    assert (result["collapse_epoch"], result["recoveries"], len(result["events"])) == (1, 0, 1)
    assert checkpoint.load(out.checkpoint).header.events == tuple(result["events"])
    client = sent(out, store)
    where = [client.get_experiment_by_name("recorded").experiment_id]
    for run in client.search_runs(where):
        assert run.data.metrics["recoveries"] == 0
        assert "event_1" in run.data.tags
        assert (run.data.tags["base"], run.data.tags["form"]) == ("jempp", "paper")

    monkeypatch.setattr(healing, "symptoms", lambda *_: ())
    sent(finetuned(recorded, chain, here), store)
    (current,) = client.search_runs(where, "tags.kind = 'result' and tags.superseded = 'false'")
    assert "event_1" not in current.data.tags
    assert "collapse_epoch" not in current.data.metrics


def test_an_experiment_has_the_network_of_its_pretraining(chain: Chain, here: Path) -> None:
    narrow = context("narrow", "pretraining.clean.model.norm=none", "pretraining.clean.epochs=0", epochs="0")
    plain = trained(here, "pretrain")
    train.pretrain(narrow, "clean", 0, chain.data_path, plain, None)
    loaded = checkpoint.load(finetuned(narrow, chain, here, plain.checkpoint).checkpoint)
    assert loaded.header.model.norm == "none"
    assert not any("norm" in name for name in loaded.weights)


def test_a_hopeless_training_leaves_earlier_results_alone(chain: Chain, here: Path) -> None:
    before = [path.read_bytes() for path in vars(finetuned(context("short", epochs="1"), chain, here)).values()]
    hopeless = diverging(**{"optimizer.lr": "1.0e+20", "healing.ladder": "[{change: seed}]"})
    with pytest.raises(TrainingError, match=r"Already tried:\n  1\. epoch 1"):
        finetuned(hopeless, chain, here)
    assert [path.read_bytes() for path in vars(trained(here)).values()] == before
    assert list((here / "state").rglob("epoch.pt"))


def test_a_state_that_another_process_trains_is_left_alone(chain: Chain, here: Path) -> None:
    """Its lock is held by a real other process, as after a kill -9 of the workflow alone."""
    folder = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "train", lambda model, job, *rest: folder.append(job.state) or sys.exit("seen"))
        with pytest.raises(SystemExit, match="seen"):
            finetuned(chain.context, chain, here)
    code = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(folder[0].parent / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(BusyError, match="another process is at work on this right now"):
            finetuned(chain.context, chain, here)
        other.communicate("")
    finetuned(chain.context, chain, here)


def test_frequent_and_rare_classes_are_measured_where_the_split_is_long_tailed(chain: Chain, here: Path) -> None:
    """Raw and averaged weights, every protocol: recomputed from the verdicts, with the classes by their training images."""
    assert not any("tail" in name for name in read_json(chain.experiment / "attack.json"))
    data = chain.context.profile.data.model_copy(update={"validation": None, "imbalance": ImbalanceSettings(ratio=2, largest=100)})
    attack.run(replace(chain.context, profile=replace(chain.context.profile, data=data)), chain.task("attack", here))
    found, frame = read_json(here / "attack.json"), pd.read_parquet(here / "verdicts.parquet")
    counts = np.bincount(chain.data.labels[chain.data.train])
    large = sorted(range(10), key=lambda c: -counts[c])[:2]
    for weights, first in (("raw", ""), ("ema", "ema_")):
        for protocol, second in (("standard", ""), ("released", "released_"), (OWN, f"{OWN}_")):
            own = frame[(frame["weights"] == weights) & (frame["protocol"] == protocol)]
            for group, rows in (("head", own[own["label"].isin(large)]), ("tail", own[~own["label"].isin(large)])):
                assert found[f"{second}n_{group}"] == len(rows)
                assert found[f"{first}{second}clean_{group}_correct"] == rows["clean"].sum()
                assert found[f"{first}{second}pgd20_{group}_acc"] == (rows["pgd20"] == True).sum() / len(rows)  # noqa: E712
    whole = [read_json(path / "attack.json")["clean_correct"] for path in (here, chain.experiment)]
    assert whole[0] == whole[1] == found["clean_head_correct"] + found["clean_tail_correct"]
