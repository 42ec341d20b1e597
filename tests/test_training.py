"""The loop: schedules against torch's, resuming after SIGKILL bit for bit, selection by validation, checkpoints."""

from __future__ import annotations

import copy
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ebjdat import settings as params
from ebjdat.data import prepared
from ebjdat.data.batches import Batch, DeviceData
from ebjdat.data.prepared import Prepared
from ebjdat.metrics import describe
from ebjdat.models.wrn import WideResNet, build
from ebjdat.samplers.starts import StartPool
from ebjdat.settings import ModelSettings, OptimizerSettings, Profile, ScheduleSettings, TrainingSettings, UpdateSettings, merge
from ebjdat.training import checkpoint, loop, schedules, updates
from ebjdat.training.checkpoint import Checkpoint, Header
from ebjdat.training.healing import Event
from ebjdat.training.loop import Job, Trained, train

from .conftest import ROOT


def test_multistep_matches_torch() -> None:
    """Against torch's LinearLR and MultiStepLR chained by hand: 100 steps per epoch."""
    settings = ScheduleSettings(name="multistep", warmup=50, milestones=(2, 3), factor=0.2)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], 1.0)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 50, 1.0, 49)
    steps = torch.optim.lr_scheduler.MultiStepLR(optimizer, [200, 300], 0.2)
    for step in range(400):
        assert schedules.multistep(settings, step, 100, 4) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)
        optimizer.step()
        warm.step()
        steps.step()


def test_onecycle_is_a_triangle() -> None:
    settings = ScheduleSettings(name="onecycle", peak=0.25)
    factors = [schedules.onecycle(settings, step, 10, 4) for step in range(40)]
    x = (np.arange(40) + 0.5) / 40
    assert np.allclose(factors, np.interp(x, [0, 0.25, 1], [0, 1, 0]))
    assert schedules.constant(ScheduleSettings(name="constant", warmup=4), 1, 10, 4) == 0.5


def test_plain_update_is_one_sgd_step_by_hand() -> None:
    """Two steps of SGD with momentum and weight decay on a quadratic, written out."""
    w = torch.nn.Parameter(torch.tensor([3.0]))
    optimizer = updates.sgd([w], OptimizerSettings(lr=0.1, momentum=0.9, weight_decay=0.5))
    expected, velocity = 3.0, 0.0
    for _ in range(2):
        terms = updates.plain(torch.nn.Module(), optimizer, [lambda: {"loss": (w**2).sum()}], UpdateSettings())
        assert float(terms["loss"].detach()) == pytest.approx(expected**2)
        gradient = 2 * expected + 0.5 * expected
        velocity = 0.9 * velocity + gradient
        expected -= 0.1 * velocity
        assert w.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("adaptive", [False, True])
def test_sam_on_a_quadratic_has_a_closed_form(adaptive: bool) -> None:
    """f = w'Aw/2: e = rho g/|g| or rho w^2 g/||w| g| with g = Aw, and the step is -lr A(w + e). float64."""
    a = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    start = torch.tensor([0.7, -1.3], dtype=torch.float64)
    w = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([w], lr=0.1)
    terms = updates.sam(torch.nn.Module(), optimizer, [lambda: {"loss": w @ a @ w / 2}], UpdateSettings(rho=0.5, adaptive=adaptive))
    g = a @ start
    e = 0.5 * (start**2 * g / (start.abs() * g).norm() if adaptive else g / g.norm())
    assert torch.allclose(w.detach(), start - 0.1 * a @ (start + e), atol=1e-12)
    assert float(terms["loss"].detach()) == pytest.approx(float(start @ a @ start / 2))  # the loss at w, not at w + e


def test_sam_measures_its_radius_over_all_weights_together() -> None:
    """Two parameter tensors, as one vector in the closed form: e = rho g / |g| over both."""
    one, two = (torch.nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in ([1.0, -2.0], [3.0]))
    optimizer = torch.optim.SGD([one, two], lr=0.1)
    updates.sam(
        torch.nn.Module(), optimizer, [lambda: {"loss": (one**2).sum() + 2 * (two**2).sum()}], UpdateSettings(rho=0.5, adaptive=False)
    )
    start, curvature = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64), torch.tensor([2.0, 2.0, 4.0], dtype=torch.float64)
    g = curvature * start
    expected = start - 0.1 * curvature * (start + 0.5 * g / g.norm())
    assert torch.allclose(torch.cat([one, two]).detach(), expected, atol=1e-12)


def test_adam_is_torchs_with_the_settings_betas() -> None:
    ours, theirs = (torch.nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2))
    first = updates.adam([ours], OptimizerSettings(name="adam", lr=0.1, momentum=0.5, weight_decay=0.1))
    second = torch.optim.Adam([theirs], lr=0.1, betas=(0.5, 0.999), weight_decay=0.1)
    for _ in range(3):
        for parameter, optimizer in ((ours, first), (theirs, second)):
            optimizer.zero_grad()
            (parameter**3).sum().backward()
            optimizer.step()
    assert torch.equal(ours, theirs)


def test_validation_attacks_by_one_protocol_whatever_the_training_does(
    digits: Prepared, network: WideResNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The released form trains with its own neighbours; validation is PGD-10 on cross-entropy, projected, in eval mode."""
    released = FULL.training_settings("eb_jdat_released")
    seen, real = [], loop.neighbours

    def note(model: object, x: object, y: object, spec: object, noise: object) -> object:
        seen.append(spec)
        return real(model, x, y, spec, noise)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "neighbours", note)
    loop.validation_scores(network, released, DeviceData(digits, "validation", torch.device("cpu")), robust=True)
    (spec,) = seen
    found = (spec.score, spec.steps, spec.mode, spec.start, spec.project, spec.range, spec.eps)
    assert found == ("ce", 10, "eval", "uniform", True, "unit", released.adversary.eps)


def test_averaged_weights_are_validated_by_themselves(digits: Prepared, network: WideResNet, settings: TrainingSettings) -> None:
    job = Job("t", "eb_jdat", changed(settings, ema=0.9), 0, Path())
    pool = StartPool.of(DeviceData(digits, "train", torch.device("cpu"), 200), torch.from_numpy(digits.class_mean))
    learner = loop.Learner.of(network, job, pool)
    assert learner.ema is not None
    with torch.no_grad():
        for weight in learner.ema.module.parameters():
            weight.zero_()
    row: dict[str, float] = {}
    loop.validate(learner, job, DeviceData(digits, "validation", torch.device("cpu")), row)
    assert row["ema_validation_energy"] == pytest.approx(-np.log(10), abs=1e-5)
    assert row["validation_energy"] != pytest.approx(-np.log(10), abs=1e-3)


def test_the_last_epoch_always_competes(digits: Prepared, settings: TrainingSettings, tmp_path: Path) -> None:
    _, result = run(digits, changed(settings, epochs=2, selection={"after": 1.0}), tmp_path / "state")
    assert result.selected.epoch == 2
    assert result.selected.score == (result.rows[-1]["validation_clean_acc"] + result.rows[-1]["validation_robust_acc"]) / 2 > 0


def test_sam_evaluates_one_loss_twice_and_keeps_running_statistics_of_the_first(network: WideResNet) -> None:
    """After SAM, batch norm's running statistics are those that one plain evaluation leaves."""
    x = torch.rand(16, 1, 8, 8)
    plain, calls = copy.deepcopy(network), []
    plain.train()
    plain(x)

    def closure() -> dict[str, torch.Tensor]:
        calls.append({k: v.clone() for k, v in network.state_dict().items() if k.endswith("weight")})
        return {"loss": network(x).square().mean()}

    network.train()
    updates.sam(network, torch.optim.SGD(network.parameters(), lr=0.1), [closure], UpdateSettings(rho=1.0))
    assert len(calls) == 2
    assert not torch.equal(calls[0]["stem.weight"], calls[1]["stem.weight"])
    ours, theirs = network.state_dict(), plain.state_dict()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours if "running" in k)
    assert any(not torch.equal(ours[k], torch.zeros_like(ours[k])) for k in ours if "running_mean" in k)


def run(
    digits: Prepared,
    settings: TrainingSettings,
    state: Path,
    method: str = "eb_jdat",
    minutes: float = 1e9,
    events: list[Event] | None = None,
    seed: int = 0,
) -> tuple[WideResNet, Trained]:
    cpu = torch.device("cpu")
    model = build(ModelSettings(depth=10, width=1), 1, 10, 0)
    job = Job("test", method, settings, seed, state, minutes)
    data, validation = DeviceData(digits, "train", cpu, 256), DeviceData(digits, "validation", cpu)
    heard = (lambda event: events.append(event)) if events is not None else (lambda event: None)
    return model, train(model, job, data, validation, torch.from_numpy(digits.class_mean), on_event=heard)


def changed(settings: TrainingSettings, **changes: Any) -> TrainingSettings:
    return TrainingSettings.model_validate(merge(settings.model_dump(), changes))


def same(first: Trained, second: Trained) -> bool:
    pairs = [(first.selected.weights[k], second.selected.weights[k]) for k in first.selected.weights]
    pairs += [(first.selected.buffer, second.selected.buffer)] if first.selected.buffer is not None else []  # type: ignore[list-item]
    return all(torch.equal(a, b) for a, b in pairs)


def test_same_seed_same_weights(digits: Prepared, settings: TrainingSettings, tmp_path: Path) -> None:
    first, second = (run(digits, settings, tmp_path / name)[1] for name in ("a", "b"))
    assert all(torch.equal(first.selected.weights[k], second.selected.weights[k]) for k in first.selected.weights)
    assert torch.equal(first.selected.buffer, second.selected.buffer)  # type: ignore[arg-type]


FULL = params.load(ROOT / "params/digits-full.yaml")


@pytest.mark.parametrize("experiment", FULL.experiments)
def test_every_method_trains_repeats_itself_and_logs_what_it_has(experiment: str, digits: Prepared, tmp_path: Path) -> None:
    """Every experiment of the full comparison for one short epoch, twice: the same seed gives the same weights."""
    method = FULL.experiments[experiment].method
    settings = changed(FULL.training_settings(experiment), epochs=1, chain={"steps": 2, "buffer": 128}, adversary={"steps": 1})
    before = build(ModelSettings(depth=10, width=1), 1, 10, 0).state_dict()
    result, again = (run(digits, settings, tmp_path / name, method)[1] for name in "ab")
    assert same(result, again)
    assert not torch.equal(before["stem.weight"], result.selected.weights["stem.weight"])
    logged = set(result.rows[0])
    assert {describe(name).stage for name in logged} <= {"curve", "energy"}
    assert {"loss", "lr", "epoch", "seconds", "validation_clean_acc", "health_energy", "health_cross_entropy"} <= logged
    assert ("validation_robust_acc" in logged) == (method in ("pgd_at", "trades", "eb_jdat"))
    chains = method in ("jem", "jempp", "sadajem", "eb_jdat")
    assert ("energy_generated" in logged) == ("health_diversity" in logged) == (result.selected.buffer is not None) == chains
    assert (result.selected.ema is not None) == (settings.ema is not None) == ("ema_validation_clean_acc" in logged)


def test_an_interrupted_epoch_continues_bit_for_bit(
    digits: Prepared, settings: TrainingSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after every single step in turn; also the rows' running means and the buffer are restored, and chains planned.

    With images of the p(x) term of their own, whose passes do not end with the epochs.
    """
    monkeypatch.setattr(loop, "PLANNED_STEPS", 3)
    settings = changed(settings, epochs=2, ema=0.9, density_batch="own", density_batch_size=40, augment={"labelled_noise": 0.03})
    sizes, batches = set(), loop.epoch_batches

    def noted(*arguments: Any, **named: Any) -> Iterator[Batch]:
        for batch in batches(*arguments, **named):
            sizes.add((len(batch.x), len(batch.x_density)))
            yield batch

    monkeypatch.setattr(loop, "epoch_batches", noted)
    _, whole = run(digits, settings, tmp_path / "whole")
    state, saves = tmp_path / "cut", 0
    save = loop.Progress.save

    def save_and_stop(self: loop.Progress, *arguments: object) -> None:
        nonlocal saves
        save(self, *arguments)  # type: ignore[arg-type]
        saves += 1
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.Progress, "save", save_and_stop)
    for _ in range(30):
        try:
            _, result = run(digits, settings, state, minutes=0.0)
            break
        except KeyboardInterrupt:
            continue
    assert saves == 1 + 2 * (4 + 1)  # at the start, after each of 4 steps, and at the end of the epoch
    assert same(whole, result)
    assert all(torch.equal(whole.selected.ema[k], result.selected.ema[k]) for k in whole.selected.ema)  # type: ignore[index, union-attr]
    strip = lambda rows: [{k: v for k, v in row.items() if k != "seconds"} for row in rows]  # noqa: E731
    assert strip(whole.rows) == strip(result.rows)
    assert sizes == {(settings.batch_size, 40)}


def command(folder: Path, name: str) -> list[str]:
    return [
        *(sys.executable, "-m", "ebjdat.cli", "finetune", "--params", str(ROOT / "params/digits.yaml")),
        *("--override", str(ROOT / "params/overrides/ci.yaml"), "--override", "experiments.eb_jdat.training.epochs=2"),
        *("--override", "runtime.checkpoint_minutes=0.0001", "--experiment", "eb_jdat", "--seed", "0"),
        *("--data", str(folder / "data.npz"), "--initial", str(folder / "initial.safetensors")),
        *("--out", f"{name}.safetensors", "--metrics", f"{name}.json", "--curve", f"{name}.csv"),
    ]


def test_sigkill_anywhere_and_again_gives_the_same_weights(digits: Prepared, profile: Profile, tmp_path: Path) -> None:
    """The real command, killed while it trains, then left alone; against one that was never killed."""
    data, card = prepared.prepare(profile.data)
    prepared.save(data, card, tmp_path / "data.npz", tmp_path / "card.json")
    model = build(profile.model, 1, 10, 0)
    header = Header(
        *("t", "digits", "classifier", 0, profile.model, profile.pretraining_settings("scratch"), (1, 8, 8)),
        *(data.classes, data.data_hash, "p", "x", {}),
    )
    checkpoint.save(Checkpoint(header, model.state_dict(), None, None), tmp_path / "initial.safetensors")
    environment = {**os.environ, "EBJDAT_TRACKING": "0", "OMP_NUM_THREADS": "1"}
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    subprocess.run(command(tmp_path, "out"), cwd=tmp_path / "whole", env=environment, check=True, capture_output=True)

    for wait in (0.7, None):  # seconds after the first state of this try was seen
        before = {p: p.stat().st_mtime_ns for p in (tmp_path / "killed/state").rglob("*.pt")}
        process = subprocess.Popen(command(tmp_path, "out"), cwd=tmp_path / "killed", env=environment, stderr=subprocess.PIPE)
        while wait and process.poll() is None:
            now = {p: p.stat().st_mtime_ns for p in (tmp_path / "killed/state").rglob("*.pt")}
            if now and now != before:
                time.sleep(wait)
                process.send_signal(signal.SIGKILL)
            time.sleep(0.02)
        _, errors = process.communicate()
        assert process.returncode == (-signal.SIGKILL if wait else 0), errors.decode()
        assert bool(list((tmp_path / "killed").glob("out*"))) == (wait is None)
    assert b"continues at epoch" in errors
    whole, killed = (load_file(tmp_path / name / "out.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    assert "buffer.images" in whole
    assert all(torch.equal(whole[k], killed[k]) for k in whole)
    assert not list((tmp_path / "killed/state").rglob("*.pt"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_the_step_it_is_at(
    number: signal.Signals, digits: Prepared, settings: TrainingSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal during the second step: that step is finished and saved, and the next try starts at the third."""
    _, whole = run(digits, settings, tmp_path / "whole")
    add, calls = loop.Progress.add, 0

    def add_and_signal(self: loop.Progress, terms: dict[str, torch.Tensor]) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            os.kill(os.getpid(), number)
        add(self, terms)

    monkeypatch.setattr(loop.Progress, "add", add_and_signal)
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt):
        run(digits, settings, tmp_path / "cut")
    assert calls == 2
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    _, result = run(digits, settings, tmp_path / "cut")
    assert calls == 4  # of the epoch's 4 steps, the last two
    assert all(torch.equal(whole.selected.weights[k], result.selected.weights[k]) for k in whole.selected.weights)


def test_selection_uses_validation_and_a_later_epoch_wins_ties(
    digits: Prepared, settings: TrainingSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.9, 0.5, 0.7, 0.7, 0.6])
    weights = []

    def validate(learner: loop.Learner, job: Job, data: DeviceData, row: dict[str, float]) -> float:
        row["validation_energy"] = -1.0
        weights.append(learner.model.state_dict()["head.bias"].clone())
        return next(scores)

    monkeypatch.setattr(loop, "validate", validate)
    _, result = run(digits, changed(settings, epochs=5, selection={"after": 0.2}), tmp_path / "state")
    assert result.selected.epoch == 4  # the first epoch lies before `after`; 3 and 4 tie
    assert torch.equal(result.selected.weights["head.bias"], weights[3])


def test_validation_never_sees_the_test_split(digits: Prepared, settings: TrainingSettings, network: WideResNet) -> None:
    """validate() against a count by hand on the validation images."""
    network.eval()
    images, labels = digits.split("validation")
    with torch.no_grad():
        correct = (network(torch.from_numpy(images).float() / 127.5 - 1).argmax(1).numpy() == labels).mean()
    row: dict[str, float] = {}
    job = Job("t", "eb_jdat", settings, 0, Path())
    learner = loop.Learner(network, torch.optim.SGD(network.parameters()), None, None)
    score = loop.validate(learner, job, DeviceData(digits, "validation", torch.device("cpu")), row)
    assert row["validation_clean_acc"] == pytest.approx(correct)
    assert row["validation_robust_acc"] <= row["validation_clean_acc"]
    assert score == pytest.approx((row["validation_clean_acc"] + row["validation_robust_acc"]) / 2)


def test_one_flipped_bit_in_a_training_state_is_refused(tmp_path: Path) -> None:
    """torch.load alone takes it: the training would go on with another weight."""
    file, weights = tmp_path / "step.pt", torch.arange(1000.0)
    torch.save({"model": weights}, file)
    whole = file.read_bytes()
    at = whole.index(weights.numpy().tobytes()[:64])
    assert torch.equal(loop._read(file, torch.device("cpu"))["model"], weights)  # type: ignore[index]
    for place in (at, at + 1999, at + 3999):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert not torch.equal(torch.load(file, weights_only=True)["model"], weights)
        with pytest.raises(loop.TrainingError, match=r"step\.pt: damaged training state .*delete it to start again"):
            loop._read(file, torch.device("cpu"))


def test_a_disk_that_is_full_for_a_training_state_is_said_to_be_full() -> None:
    """torch.save alone raises a RuntimeError about positions in a file."""
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'") as found:
        loop._write({"model": torch.arange(100_000.0)}, Path("/dev/full"))
    assert found.value.errno == errno.ENOSPC


def test_a_full_disk_keeps_the_old_file(tmp_path: Path) -> None:
    from ebjdat.files import write_atomic

    target = tmp_path / "result.json"
    target.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_atomic(target, fail)
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]
