"""Stage `attack`: a network, this project's or an external one, and test images -> accuracies, checks and verdicts under every protocol."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ebjdat import __version__, codehash
from ebjdat.data import external
from ebjdat.data.batches import DeviceData
from ebjdat.errors import AttackError
from ebjdat.evaluation import screen, universal
from ebjdat.evaluation.audit import Audit, audit, write_table
from ebjdat.evaluation.longtail import accuracies, head_and_tail
from ebjdat.evaluation.robust import fp32_eval_copy, number_of_classes
from ebjdat.evaluation.verdicts import pgd_name
from ebjdat.files import digest, git_commit, write_result
from ebjdat.jobs import named
from ebjdat.models.external import external_model
from ebjdat.models.modes import UnitRange, frozen_parameters
from ebjdat.models.wrn import WideResNet, features_and_logits
from ebjdat.names import STANDARD, flat_name, flat_results
from ebjdat.pixels import unit_from_uint8
from ebjdat.settings import AttackSettings
from ebjdat.stages.context import Context, alone
from ebjdat.stages.evaluation import Task, open_evaluation, state_key
from ebjdat.training import checkpoint

# Ends of names that averaged weights have, too.
AVERAGED = ("_correct", "_acc", "_low", "_high", "_alone", "_alone_share", "n_not_finite", "n_not_finite_adversarial")


@dataclass(frozen=True)
class ExternalNetwork:
    """factory: "package.module:function". weights: a file of them, if the factory does not load any. key: which of several
    weights in the file. source: the factory of the network that a transferred attack is made on.
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


def run(context: Context, task: Task) -> None:
    """Evaluate a checkpoint of the profile; averaged weights, where it has them, beside the raw ones.

    Inputs: data, weights and, for a transferred attack, source. Outputs: out, verdicts.
    """
    settings, source = context.profile.attack_settings(task.experiment), task.inputs.get("source")
    with open_evaluation(context, task, "attack", resumable=True) as evaluation:
        data, device, loaded = evaluation.data, evaluation.device, evaluation.checkpoint
        test = DeviceData(data, "test", device)
        x, y = test.unit(), test.labels
        is_source = settings.transfer is not None and (settings.transfer.experiment, settings.transfer.seed) == (task.experiment, task.seed)
        other = UnitRange(checkpoint.load(source, data_hash=data.data_hash).network(device)).eval() if source and not is_source else None
        workers = torch.get_num_threads()
        result = audit(UnitRange(loaded.network(device)).eval(), x, y, settings, other, evaluation.state, evaluation.title, workers=workers)
        metrics, tables = result.metrics, [_with_weights(result, "raw")]
        if loaded.ema is not None:
            network, title = UnitRange(loaded.network(device, loaded.ema)).eval(), f"{evaluation.title}, averaged weights"
            of_ema = audit(network, x, y, settings, None, evaluation.state / "ema", title, with_checks=False, workers=workers)
            metrics |= {f"ema_{name}": value for name, value in of_ema.metrics.items() if name.endswith(AVERAGED)}
            tables.append(_with_weights(of_ema, "ema"))
        if context.profile.data.imbalance is not None:
            counts = np.bincount(data.labels[data.train], minlength=len(data.classes)).tolist()
            groups, pgd = head_and_tail(counts), {name: pgd_name(protocol) for name, protocol in settings.protocols.items()}
            for table, averaged in zip(tables, (False, True), strict=False):
                of_groups = flat_results(accuracies(table, groups, pgd), averaged)
                metrics |= {name: value for name, value in of_groups.items() if not averaged or name.endswith(AVERAGED)}
        metrics |= _with_validation(loaded.network(device), DeviceData(data, "validation", device), (x, y), settings)
        evaluation.metrics = metrics
        evaluation.provenance = _provenance(settings) | {
            "experiment": task.experiment,
            "seed": task.seed,
            "data_hash": data.data_hash,
            "params_hash": context.profile.params_hash(task.experiment, task.seed),
        }
        write_table(pa.concat_tables(tables), task.outputs["verdicts"], evaluation.provenance)
    _print(metrics, settings, task.outputs["out"], task.outputs["verdicts"])


def _with_validation(network: WideResNet, validation: DeviceData, test: tuple[Tensor, Tensor], settings: AttackSettings) -> dict[str, Any]:
    """What is found on validation images and measured on test images, where the settings ask for it."""
    held_out, radius, found = (validation.unit(), validation.labels), settings.standard.radius, dict[str, Any]()
    with fp32_eval_copy(UnitRange(network)) as model:
        if settings.universal:
            each = universal.measure(model, held_out, test, radius, settings.universal.steps, settings.batch_size, settings.seed)
            found |= flat_results({STANDARD: each})
        if settings.screen:
            both, strength = partial(features_and_logits, network), settings.screen.ridge
            with frozen_parameters(network, "eval"):
                found |= screen.measure(both, held_out, test, radius, strength, settings.batch_size, settings.seed)
    return found


def run_external(
    network: ExternalNetwork, data: Images, settings: AttackSettings, device: torch.device, out: Path, verdicts_out: Path
) -> None:
    """Evaluate an external network. Writes the same files as for a checkpoint of this project.

    State of an interrupted evaluation lies beside `out`. Raises AttackError where the number of class folders is not the
    network's number of classes, and no file names them; and for what needs more than a network and test images.
    """
    _refuse_what_needs_a_profile(settings)
    names = external.class_names(data.classes) if data.classes else None
    model = external_model(network.factory, network.weights, network.key, device)
    other = external_model(network.source, device=device) if network.source else None
    images, labels, notes = external.images_of(data.path, data.size, names)
    for line in notes:
        print(f"{data.path}: {line}", flush=True)
    x, y = unit_from_uint8(torch.from_numpy(images)).to(device), torch.from_numpy(labels).to(device)
    if data.path.suffix != ".npz":
        with fp32_eval_copy(model) as copy:
            has, given = number_of_classes(copy, x, y), len(names) if names else int(labels.max()) + 1
        if has != given:
            what = f"{data.classes} names" if names else "the folders are"
            raise AttackError(
                f"{what} {given} classes, the network has {has}; --classes FILE names its classes, one per line, in the network's order"
            )
    parts = ((name, checkpoint.content(value).tobytes()) for name, value in model.state_dict().items() if isinstance(value, Tensor))
    tensors = digest(*itertools.chain.from_iterable(parts))
    data_hash = digest(images.tobytes(), labels.tobytes())[:16]
    folder = out.parent / f".{out.name}.state"
    with alone(folder):
        code = codehash.digest([f"{__name__}:run_external"], named({"attack": settings.model_dump()}))
        state = folder / state_key(settings.model_dump(), device, code, data_hash, tensors, network.factory)
        result = audit(model, x, y, settings, other, state, network.factory, workers=torch.get_num_threads())
        provenance = _provenance(settings) | {
            "model": network.factory,
            "weights": tensors[:16],
            "data": data.path.name,
            "data_hash": data_hash,
            "notes": list(notes),
        }
        write_table(_with_weights(result, "raw"), verdicts_out, provenance)
        write_result(out, {**result.metrics, **provenance}, [verdicts_out])
        _print(result.metrics, settings, out, verdicts_out)
        shutil.rmtree(folder, ignore_errors=True)


def _refuse_what_needs_a_profile(settings: AttackSettings) -> None:
    for name in ("universal", "screen"):
        if getattr(settings, name):
            raise AttackError(f"evaluation.attack.{name} needs validation images, which are not given with --model; set it to null")


def _provenance(settings: AttackSettings) -> dict[str, Any]:
    return {"git_commit": git_commit(), "version": __version__, "settings": settings.model_dump()}


def _with_weights(result: Audit, weights: str) -> pa.Table:
    return result.table.add_column(0, "weights", pa.array([weights] * len(result.table)))


def _print(metrics: Mapping[str, Any], settings: AttackSettings, *outputs: Path) -> None:
    for name, protocol in settings.protocols.items():
        attacks = {"clean": "clean", f"pgd{protocol.pgd.steps}": f"PGD-{protocol.pgd.steps}", "autoattack": "ensemble"}
        accuracies = {title: metrics.get(flat_name("acc", attack, name)) for attack, title in attacks.items()}
        parts = [f"{title} {accuracy:.1%}" for title, accuracy in accuracies.items() if accuracy is not None]
        parts[-1] += f" of the first {metrics[flat_name('n_attack', protocol=name)]}" if accuracies["ensemble"] is not None else ""
        for attack in protocol.adaptive_attacks:
            if (alone := metrics.get(flat_name("alone", attack, name))) is not None:
                parts.append(f"then {attack} {metrics[flat_name('acc', attack, name)]:.1%} ({alone} broken by it alone)")
        print(f"{name} ({protocol.norm}, radius {protocol.radius:.4g} in [0, 1]): {', '.join(parts)}", flush=True)
    passed = [check["passed"] for check in metrics["checks"]]
    print(f"integrity checks: {passed.count(True)} passed, {passed.count(False)} failed, {passed.count(None)} not run", flush=True)
    for check in metrics["checks"]:
        if check["passed"] is False:
            where = f" [{check['protocol']}]" if check["protocol"] else ""
            print(f"CHECK FAILED: {check['name']}{where}: {check['value']:.4g}, limit {check['limit']:.4g} ({check['says']})", flush=True)
    print(f"wrote {' and '.join(map(str, outputs))}", flush=True)
