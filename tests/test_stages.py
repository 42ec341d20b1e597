"""Stages on real files: what they write is recomputed here from the data and the checkpoint alone."""

from __future__ import annotations

import ast
import subprocess
import sys
import threading
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim.swa_utils import AveragedModel

import ebjdat
from ebjdat import codehash, jobs
from ebjdat.data import prepared
from ebjdat.data.batches import DeviceData
from ebjdat.evaluation.frechet import frechet_distance
from ebjdat.evaluation.generate import fresh_chains
from ebjdat.files import read_json
from ebjdat.models.wrn import WideResNet
from ebjdat.samplers.starts import StartPool
from ebjdat.settings import load
from ebjdat.stages import attack, evaluate, train
from ebjdat.stages.context import BusyError, Context, journal_of
from ebjdat.stages.evaluation import Task
from ebjdat.training import checkpoint, fit, healing
from ebjdat.training.state import TrainingError

from .conftest import ROOT

PACKAGE = str(Path(ebjdat.__file__).parent)
NO_ENSEMBLES = [f"evaluation.attack.protocols.{name}.n=0" for name in ("standard", "released", "standard_l2")]


class Executed:
    """While it is entered: (file, first line) of every function of the package that is called, in any thread."""

    def __init__(self) -> None:
        self.functions: set[tuple[str, int]] = set()

    def __enter__(self) -> Executed:
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


class Files:
    """A folder with prepared digits, two fine-tuned networks and a context for the reduced profile."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.executed = {stage: Executed() for stage in ("finetune", "attack", "generate", "energy")}
        overrides = [str(ROOT / "params/overrides/ci.yaml"), *NO_ENSEMBLES]
        self.context = Context(load(ROOT / "params/digits.yaml", overrides), "test")
        self.data_path = folder / "data.npz"
        self.data, card = prepared.prepare(self.context.profile.data)
        prepared.save(self.data, card, self.data_path, folder / "card.json")

    def out(self, name: str) -> train.Outputs:
        return train.Outputs(self.folder / f"{name}.safetensors", self.folder / f"{name}.json", self.folder / f"{name}.csv")

    def task(self, experiment: str, weights: Path, outputs: dict[str, Path], **inputs: Path) -> Task:
        return Task(experiment, 0, {"data": self.data_path, "weights": weights, **inputs}, outputs)

    def network(self, name: str) -> WideResNet:
        return checkpoint.load(self.out(name).checkpoint).network(torch.device("cpu"))


def pictures(folder: Path) -> dict[str, Path]:
    """Outputs of `generate`."""
    names = {"out": "generate.json", "samples": "samples.npz", "grid": "samples.png", "chains": "chains.gif"}
    return {name: folder / file for name, file in names.items()}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """pretraining -> "clean"; eb_jdat fine-tuned from it -> "eb_jdat"; the untrained classifier is the reference."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("stages")
        patch.chdir(folder)
        patch.setenv("EBJDAT_TRACKING", "0")
        made = Files(folder)
        for name in ("clean", "scratch"):
            train.pretrain(made.context, name, 0, made.data_path, made.out(name), None)
        with made.executed["finetune"]:
            train.finetune(made.context, "eb_jdat", 0, made.data_path, made.out("clean").checkpoint, made.out("eb_jdat"), None)
        weights, other = made.out("eb_jdat").checkpoint, made.out("clean").checkpoint
        outputs = {"out": folder / "attack.json", "verdicts": folder / "verdicts.parquet"}
        with made.executed["attack"]:
            attack.run(made.context, made.task("eb_jdat", weights, outputs, source=other))
        with made.executed["generate"]:
            evaluate.generate(made.context, made.task("eb_jdat", weights, pictures(folder), reference=other))
        outputs = {"out": folder / "energy.json", "values": folder / "energy.npz", "figure": folder / "energy.png"}
        with made.executed["energy"]:
            evaluate.energy(made.context, made.task("eb_jdat", weights, outputs, samples=folder / "samples.npz"))
    return made


@pytest.mark.parametrize("stage", ["finetune", "attack", "generate", "energy"])
def test_nothing_is_executed_that_the_digest_of_a_jobs_code_does_not_hold(stage: str, files: Files) -> None:
    """By what Python really called. Reading of settings and what has no effect on numbers is left out of both."""
    spec = jobs.STAGES[stage]
    strategies = spec.strategies(files.context.profile, "eb_jdat")
    held = {key[:2] for key in codehash.code(*spec.code, *(entry.target for entry in strategies))}
    executed = set()
    for file, functions in groupby(sorted(files.executed[stage].functions), itemgetter(0)):
        module = f"ebjdat.{file.removeprefix(PACKAGE).strip('/').removesuffix('.py').replace('/', '.')}"
        statements = ast.parse(Path(file).read_bytes()).body
        for _, line in functions:
            (names,) = [codehash.defines(n) or [""] for n in statements if first_line(n) <= line <= (n.end_lineno or 0)]
            executed |= {(module, one) for one in names}
    counted = {(module, one) for module, one in executed if codehash.counts(module, one) and module not in codehash.SETTINGS}
    assert len(counted) > 20
    assert counted - held == set()


def test_state_made_by_other_code_is_not_continued(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checkpoint.load(files.out("eb_jdat").checkpoint).header.code == jobs.STAGES["finetune"].digest(files.context.profile, "eb_jdat")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EBJDAT_TRACKING", "0")
    states: list[Path] = []

    def stopped(*found: Any, **_: Any) -> None:
        states.extend(s for a in found for s in [a if isinstance(a, Path) else getattr(a, "state", None)] if s)
        raise KeyboardInterrupt

    monkeypatch.setattr(fit, "train", stopped)
    monkeypatch.setattr(attack, "audit", stopped)
    task = files.task("eb_jdat", files.out("eb_jdat").checkpoint, {"out": tmp_path / "a.json", "verdicts": tmp_path / "v.parquet"})
    for code in ("as it is", "as it is", "another"):
        if code == "another":
            monkeypatch.setattr(codehash, "digest", lambda *_: "another")
        with pytest.raises(KeyboardInterrupt):
            train.pretrain(files.context, "clean", 0, files.data_path, files.out("other"), None)
        with pytest.raises(KeyboardInterrupt):
            attack.run(files.context, task)
    assert states[:2] == states[2:4]
    assert not set(states[4:]) & set(states[:4])


def first_line(node: ast.stmt) -> int:
    return min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])


def logits(network: WideResNet, images: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return network(torch.from_numpy(images).float() / 127.5 - 1).double().numpy()


def marginal(values: np.ndarray) -> np.ndarray:
    return -np.log(np.exp(values).sum(1))


def test_attack_measures_the_test_split_under_the_trained_network(files: Files) -> None:
    result = read_json(files.folder / "attack.json")
    images, labels = files.data.split("test")
    assert result["n_test"] == 100
    assert result["clean_correct"] == (logits(files.network("eb_jdat"), images).argmax(1) == labels).sum()
    assert 0 < result["pgd20_correct"] < result["clean_correct"]
    assert result["n_attack"] == 0


def test_energies_are_those_of_the_test_images_and_the_samples(files: Files) -> None:
    network = files.network("eb_jdat")
    images, labels = files.data.split("test")
    values = np.load(files.folder / "energy.npz", allow_pickle=False)
    samples = np.load(files.folder / "samples.npz", allow_pickle=False)
    clean = logits(network, images)
    assert np.allclose(values["clean"], marginal(clean), atol=1e-4)
    assert np.allclose(values["joint_clean"], -clean[np.arange(100), labels], atol=1e-4)
    generated = logits(network, samples["images"])
    assert np.allclose(values["generated"], marginal(generated), atol=1e-4)
    assert np.allclose(values["joint_generated"], -generated[np.arange(100), samples["labels"]], atol=1e-4)
    assert not np.allclose(values["adversarial"], values["clean"], atol=0.01)
    result = read_json(files.folder / "energy.json")
    assert result["energy_gap_adversarial"] == pytest.approx(np.abs(values["adversarial"] - values["clean"]).mean())
    assert result["energy_gap_generated"] == pytest.approx(abs(values["generated"].mean() - values["clean"].mean()))


def test_frechet_distance_is_to_the_training_images_under_the_reference(files: Files) -> None:
    reference = files.network("clean")
    samples = np.load(files.folder / "samples.npz", allow_pickle=False)["images"]

    def features(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return reference.features(torch.from_numpy(images).float() / 127.5 - 1).double().numpy()

    result = read_json(files.folder / "generate.json")
    train_images, _ = files.data.split("train")
    assert result["frechet"] == pytest.approx(frechet_distance(features(samples), features(train_images)), rel=1e-3)
    buffer = checkpoint.load(files.out("eb_jdat").checkpoint).buffer
    assert buffer is not None
    assert result["frechet_buffer"] == pytest.approx(frechet_distance(features(buffer.numpy()), features(train_images)), rel=1e-3)
    assert (result["frechet_extractor"], result["n_samples"], result["n_buffer"]) == ("reference", 100, len(buffer))
    assert result["frechet_start"] != result["frechet"]


def test_finetuning_starts_from_its_pretraining_and_selects_on_validation(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files.folder)
    monkeypatch.setenv("EBJDAT_TRACKING", "0")
    still = Context(load(ROOT / "params/digits.yaml", ["experiments.classifier.training.epochs=0", "data.n_test=100"]), "test")
    train.finetune(still, "classifier", 0, files.data_path, files.out("clean").checkpoint, files.out("still"), None)
    first, second = (checkpoint.load(files.out(name).checkpoint).weights for name in ("clean", "still"))
    assert all(torch.equal(first[k], second[k]) for k in first)
    other = checkpoint.load(files.out("scratch").checkpoint).weights
    assert not torch.equal(first["stem.weight"], other["stem.weight"])
    images, labels = files.data.split("validation")
    accuracy = (logits(files.network("clean"), images).argmax(1) == labels).mean()
    assert read_json(files.out("clean").metrics)["selection_score"] == pytest.approx(accuracy)
    header = checkpoint.load(files.out("eb_jdat").checkpoint, data_hash=files.data.data_hash).header
    assert (header.method, header.seed, header.training.adversary.score) == ("eb_jdat", 0, "energy")


def test_seeds_give_different_initialisations(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files.folder)
    monkeypatch.setenv("EBJDAT_TRACKING", "0")
    train.pretrain(files.context, "scratch", 1, files.data_path, files.out("scratch1"), None)
    one, two = (checkpoint.load(files.out(name).checkpoint).weights["stem.weight"] for name in ("scratch", "scratch1"))
    assert not torch.equal(one, two)


def diverging(files: Files, **more: str) -> Context:
    """The reduced profile with EB-JDAT at 100 times its rate, 4 epochs."""
    own = {"optimizer.lr": "30", "epochs": "4", "schedule.name": "constant", "healing.every": "5", **more}
    overrides = [str(ROOT / "params/overrides/ci.yaml"), *(f"experiments.eb_jdat.training.{k}={v}" for k, v in own.items())]
    return Context(load(ROOT / "params/digits.yaml", overrides), "diverging")


def sent(out: train.Outputs, folder: Path) -> Any:
    """A client of the store to which the training's journal was sent."""
    from mlflow import MlflowClient

    from ebjdat.tracking.publish import Publisher

    uri = f"sqlite:///{folder / 'mlflow.db'}"
    assert Publisher(uri).publish([journal_of(out.metrics)]).errors == []
    return MlflowClient(uri)


def test_recoveries_are_in_the_result_and_in_mlflow(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EBJDAT_TRACKING", "0")
    context, out = diverging(files), files.out("healed")
    train.finetune(context, "eb_jdat", 0, files.data_path, files.out("clean").checkpoint, out, None)
    result = read_json(out.metrics)
    assert result["collapse_epoch"] == 1
    assert result["recoveries"] == len(result["events"]) >= 2
    assert "a new noise seed" in result["events"][0]
    assert "the rate x 0.1" in result["events"][1]
    assert checkpoint.load(out.checkpoint).header.metrics["recoveries"] == result["recoveries"]
    client = sent(out, tmp_path)
    runs = client.search_runs([client.get_experiment_by_name("diverging").experiment_id])
    assert len(runs) == 2
    for run in runs:  # the experiment's and its stage's
        assert run.data.metrics["collapse_epoch"] == 1
        assert run.data.metrics["recoveries"] == result["recoveries"]
        assert [run.data.tags[f"event_{i}"] for i in range(1, len(result["events"]) + 1)] == result["events"]


def test_a_collapse_that_is_only_recorded_is_no_recovery(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And done again without one, nothing of it is left on the experiment's current run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EBJDAT_TRACKING", "0")
    overrides = [str(ROOT / "params/overrides/ci.yaml"), "experiments.eb_jdat.training.epochs=2"]
    own = ["experiments.eb_jdat.training.healing.mode=record", "experiments.eb_jdat.training.healing.gap=1.0e-9"]
    context, out = Context(load(ROOT / "params/digits.yaml", [*overrides, *own]), "recorded"), files.out("recorded")
    train.finetune(context, "eb_jdat", 0, files.data_path, files.out("clean").checkpoint, out, None)
    result = read_json(out.metrics)
    assert (result["collapse_epoch"], result["recoveries"], len(result["events"])) == (1, 0, 1)
    assert checkpoint.load(out.checkpoint).header.events == tuple(result["events"])
    client = sent(out, tmp_path)
    where = [client.get_experiment_by_name("recorded").experiment_id]
    for run in client.search_runs(where):
        assert run.data.metrics["recoveries"] == 0
        assert "event_1" in run.data.tags
        assert (run.data.tags["base"], run.data.tags["form"]) == ("jempp", "paper")

    monkeypatch.setattr(healing, "symptoms", lambda *_: ())
    train.finetune(context, "eb_jdat", 0, files.data_path, files.out("clean").checkpoint, out, None)
    sent(out, tmp_path)
    (current,) = client.search_runs(where, "tags.kind = 'result' and tags.superseded = 'false'")
    assert "event_1" not in current.data.tags
    assert "collapse_epoch" not in current.data.metrics


def test_an_experiment_has_the_network_of_its_pretraining(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EBJDAT_TRACKING", "0")
    overrides = [str(ROOT / "params/overrides/ci.yaml"), "pretraining.clean.model.norm=none", "pretraining.clean.epochs=0"]
    context = Context(load(ROOT / "params/digits.yaml", overrides), "narrow")
    train.pretrain(context, "clean", 0, files.data_path, files.out("plain"), None)
    train.finetune(context, "eb_jdat", 0, files.data_path, files.out("plain").checkpoint, files.out("tuned"), None)
    assert checkpoint.load(files.out("tuned").checkpoint).header.model.norm == "none"
    assert not any("norm" in name for name in checkpoint.load(files.out("tuned").checkpoint).weights)


def test_a_hopeless_training_leaves_earlier_results_alone(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EBJDAT_TRACKING", "0")
    out = train.Outputs(*(tmp_path / f"result.{kind}" for kind in ("safetensors", "json", "csv")))
    train.finetune(files.context, "eb_jdat", 0, files.data_path, files.out("clean").checkpoint, out, None)
    before = [path.read_bytes() for path in vars(out).values()]
    hopeless = diverging(files, **{"optimizer.lr": "1.0e+20", "healing.ladder": "[{change: seed}]"})
    with pytest.raises(TrainingError, match=r"Already tried:\n  1\. epoch 1"):
        train.finetune(hopeless, "eb_jdat", 0, files.data_path, files.out("clean").checkpoint, out, None)
    assert [path.read_bytes() for path in vars(out).values()] == before
    assert list((tmp_path / "state").rglob("epoch.pt"))


def test_a_state_that_another_process_trains_is_left_alone(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lock is held by a real other process, as after a kill -9 of the workflow alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EBJDAT_TRACKING", "0")
    job = (files.context, "eb_jdat", 0, files.data_path, files.out("clean").checkpoint, files.out("alone"), None)
    folder = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "train", lambda model, job, *rest: folder.append(job.state) or sys.exit("seen"))
        with pytest.raises(SystemExit, match="seen"):
            train.finetune(*job)
    code = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(folder[0].parent / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(BusyError, match="another process is at work on this right now"):
            train.finetune(*job)
        other.communicate("")
    train.finetune(*job)


def test_averaged_weights_are_kept_and_measured_beside_the_raw_ones(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ema_* is recomputed here from the checkpoint's averaged weights; the averages themselves by their recursion."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EBJDAT_TRACKING", "0")
    overrides = [str(ROOT / "params/overrides/ci.yaml"), *NO_ENSEMBLES, "experiments.eb_jdat.training.ema=0.9"]
    context, out = Context(load(ROOT / "params/digits.yaml", overrides), "ema"), files.out("ema")
    seen = []
    average = AveragedModel.update_parameters

    def update_and_note(self: AveragedModel, model: torch.nn.Module) -> None:
        average(self, model)
        seen.append({k: v.clone() for k, v in model.state_dict().items() if v.is_floating_point()})

    monkeypatch.setattr(AveragedModel, "update_parameters", update_and_note)
    train.finetune(context, "eb_jdat", 0, files.data_path, files.out("clean").checkpoint, out, None)
    loaded = checkpoint.load(out.checkpoint)
    assert loaded.ema is not None
    expected = seen[0]
    for later in seen[1:]:
        expected = {k: 0.9 * v + 0.1 * later[k] for k, v in expected.items()}
    assert all(torch.allclose(loaded.ema[k], v, atol=1e-5) for k, v in expected.items())  # float32, 18 steps
    assert not torch.equal(loaded.ema["head.weight"], loaded.weights["head.weight"])

    outputs = {"out": tmp_path / "attack.json", "verdicts": tmp_path / "verdicts.parquet"}
    attack.run(context, files.task("eb_jdat", out.checkpoint, outputs))
    result = read_json(tmp_path / "attack.json")
    images, labels = files.data.split("test")
    for prefix, weights in (("", loaded.weights), ("ema_", loaded.ema)):
        network = loaded.network(torch.device("cpu"), weights)
        assert result[f"{prefix}clean_correct"] == (logits(network, images).argmax(1) == labels).sum()
    evaluate.generate(context, files.task("eb_jdat", out.checkpoint, pictures(tmp_path), reference=files.out("clean").checkpoint))
    generated = read_json(tmp_path / "generate.json")
    spec, settings = loaded.header.training.chain, context.profile.evaluation.generate
    train_data = DeviceData(files.data, "train", torch.device("cpu"))
    pool = StartPool.of(train_data, torch.from_numpy(files.data.class_mean))
    fresh, _ = fresh_chains(loaded.network(torch.device("cpu"), loaded.ema), pool, spec, settings)
    images, ruler = fresh.images.numpy(), files.network("clean")
    with torch.no_grad():
        features = [ruler.features(torch.from_numpy(x).float() / 127.5 - 1).double().numpy() for x in (images, train_data.images.numpy())]
    assert generated["ema_frechet"] == pytest.approx(frechet_distance(*features), rel=1e-3)
    assert generated["ema_frechet"] != generated["frechet"]
