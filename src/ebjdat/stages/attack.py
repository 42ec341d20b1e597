"""Stage `attack`: a network, this project's or any other, and test images -> accuracies, checks and verdicts under every protocol."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from ebjdat import __version__, codehash
from ebjdat.data import external, prepared
from ebjdat.data.batches import DeviceData
from ebjdat.errors import AttackError
from ebjdat.evaluation.audit import Audit, audit, write_table
from ebjdat.evaluation.robust import classes_of, fp32_eval_copy
from ebjdat.files import digest, git_commit, write_result
from ebjdat.jobs import STAGES, named
from ebjdat.models.external import external_model
from ebjdat.models.modes import UnitRange
from ebjdat.pixels import unit_from_uint8
from ebjdat.settings import AttackSettings, prefix_of
from ebjdat.stages.context import Context, alone
from ebjdat.training import checkpoint

AVERAGED = ("_correct", "_acc", "_low", "_high", "n_not_finite", "n_not_finite_adversarial")  # ends of names that averaged weights have too


@dataclass(frozen=True)
class Foreign:
    """A network from elsewhere: its factory "package.module:function", a file of weights where they are not in it, and which of
    several weights of the file. source: the factory of the network that a transferred attack is made on.
    """

    factory: str
    weights: Path | None = None
    key: str | None = None
    source: str | None = None


@dataclass(frozen=True)
class Images:
    """Test images as data.external.images_of takes them. classes: a file of class names in the network's order."""

    path: Path
    size: int | None = None
    classes: Path | None = None


def run(
    context: Context,
    experiment: str,
    seed: int,
    data_path: Path,
    weights: Path,
    source: Path | None,
    out: Path,
    verdicts_out: Path,
    threads: int | None,
) -> None:
    """Evaluate a checkpoint of the profile; averaged weights, where it has them, beside the raw ones."""
    data = prepared.load(data_path)
    device = context.device(threads)
    loaded = checkpoint.load_for(context.profile, experiment, weights, data)
    settings = context.profile.attack_settings(experiment)
    test = DeviceData(data, "test", device)
    x, y = test.unit(), test.labels
    is_source = settings.transfer is not None and (settings.transfer.experiment, settings.transfer.seed) == (experiment, seed)
    other = UnitRange(checkpoint.load(source, data_hash=data.data_hash).network(device)).eval() if source and not is_source else None
    title, workers = f"{experiment}/seed{seed}", torch.get_num_threads()
    place = Path("state") / context.run / experiment / f"seed{seed}-attack"
    state = place / _made_from(settings, device, STAGES["attack"].digest(context.profile, experiment), data.data_hash, weights)
    with context.track_result(experiment, seed, "attack", data, out) as tracker, alone(place):
        found = audit(UnitRange(loaded.network(device)).eval(), x, y, settings, other, state, title, workers=workers)
        metrics, tables = found.metrics, [_named(found, "raw")]
        if loaded.ema is not None:
            averaged = UnitRange(loaded.network(device, loaded.ema)).eval()
            again = audit(averaged, x, y, settings, None, state / "ema", f"{title}, averaged weights", with_checks=False, workers=workers)
            metrics |= {f"ema_{name}": value for name, value in again.metrics.items() if name.endswith(AVERAGED)}
            tables.append(_named(again, "ema"))
        about = {
            "experiment": experiment,
            "seed": seed,
            "data_hash": data.data_hash,
            "params_hash": context.profile.params_hash(experiment, seed),
        }
        _write(metrics, pa.concat_tables(tables), settings, about, out, verdicts_out)
        tracker.final(metrics)
    shutil.rmtree(place, ignore_errors=True)  # only after every declared output is written, the journal too


def run_any(network: Foreign, data: Images, settings: AttackSettings, device: torch.device, out: Path, verdicts_out: Path) -> None:
    """Evaluate a network from elsewhere. Writes the same files as for a checkpoint of this project.

    State of an interrupted evaluation lies beside `out`. Raises AttackError where class folders are not as many as the network's
    classes, and no file says which they are.
    """
    names = external.class_names(data.classes) if data.classes else None
    model = external_model(network.factory, network.weights, network.key, device)
    other = external_model(network.source, device=device) if network.source else None
    images, labels, notes = external.images_of(data.path, data.size, names)
    for line in notes:
        print(f"{data.path}: {line}", flush=True)
    x, y = unit_from_uint8(torch.from_numpy(images)).to(device), torch.from_numpy(labels).to(device)
    if data.path.suffix != ".npz":
        with fp32_eval_copy(model) as judge:
            theirs, ours = classes_of(judge, x, y), len(names) if names else int(labels.max()) + 1
        if theirs != ours:
            what = f"{data.classes} names" if names else "the folders are"
            raise AttackError(
                f"{what} {ours} classes, the network tells {theirs} apart; --classes FILE names its classes, one a line, in its order"
            )
    parts = ((name, checkpoint.content(value).tobytes()) for name, value in model.state_dict().items() if isinstance(value, Tensor))
    tensors = digest(*itertools.chain.from_iterable(parts))
    data_hash = digest(images.tobytes(), labels.tobytes())[:16]
    place = out.parent / f".{out.name}.state"
    with alone(place):
        code = codehash.digest([f"{__name__}:run_any"], named({"attack": settings.model_dump()}))
        state = place / _made_from(settings, device, code, data_hash, tensors, network.factory)
        found = audit(model, x, y, settings, other, state, network.factory, workers=torch.get_num_threads())
        about = {"model": network.factory, "weights": tensors[:16], "data": data.path.name, "data_hash": data_hash, "notes": list(notes)}
        _write(found.metrics, _named(found, "raw"), settings, about, out, verdicts_out)
        shutil.rmtree(place, ignore_errors=True)


def _made_from(settings: AttackSettings, device: torch.device, code: str, *inputs: Any) -> str:
    """What finished batches depend on: where any of it is another, an evaluation starts again."""
    machine = [str(device), torch.get_num_threads(), torch.__version__]
    return digest(settings.model_dump(), machine, code, *inputs)[:16]


def _named(found: Audit, weights: str) -> pa.Table:
    return found.table.add_column(0, "weights", pa.array([weights] * len(found.table)))


def _write(
    metrics: dict[str, Any], table: pa.Table, settings: AttackSettings, about: dict[str, Any], out: Path, verdicts_out: Path
) -> None:
    about = {**about, "git_commit": git_commit(), "version": __version__, "settings": settings.model_dump()}
    write_table(table, verdicts_out, about)
    write_result(out, {**metrics, **about}, [verdicts_out])
    for name, protocol in settings.protocols.items():
        prefix = prefix_of(name)
        n, pgd = metrics[f"{prefix}n_attack"], f"pgd{protocol.pgd.steps}"
        told = [f"clean {metrics[f'{prefix}clean_acc']:.1%}", f"PGD-{protocol.pgd.steps} {metrics[f'{prefix}{pgd}_acc']:.1%}"]
        told += [f"ensemble {metrics[f'{prefix}autoattack_acc']:.1%} of the first {n}"] if f"{prefix}autoattack_acc" in metrics else []
        print(f"{name} ({protocol.norm}, radius {protocol.radius:.4g} in [0, 1]): {', '.join(told)}", flush=True)
    passed = [check["passed"] for check in metrics["checks"]]
    print(f"integrity checks: {passed.count(True)} passed, {passed.count(False)} failed, {passed.count(None)} not asked", flush=True)
    for check in metrics["checks"]:
        if check["passed"] is False:
            where = f" [{check['protocol']}]" if check["protocol"] else ""
            print(f"CHECK FAILED: {check['name']}{where}: {check['value']:.4g}, limit {check['limit']:.4g} ({check['says']})", flush=True)
    print(f"wrote {out} and {verdicts_out}", flush=True)
