"""Stage `attack`: a network, this project's or any other, and test images -> accuracies, checks and verdicts under every protocol."""

from __future__ import annotations

import importlib
import itertools
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ebjdat import __version__
from ebjdat.data import outside, prepared
from ebjdat.data.batches import DeviceData
from ebjdat.errors import UserError
from ebjdat.evaluation.audit import Audit, audit, write_table
from ebjdat.files import digest, git_commit, write_json
from ebjdat.models.modes import UnitRange
from ebjdat.params import AttackSettings, prefix_of
from ebjdat.pixels import unit_from_uint8
from ebjdat.stages.context import Context, alone, source_files
from ebjdat.training import checkpoint

# What finished batches depend on beside their inputs; an edit there starts an evaluation again.
CODE = (
    *("errors.py", "params.py", "registry.py", "pixels.py", "files.py", "statistics.py", "stages/context.py", "stages/attack.py"),
    *("data", "models", "samplers", "evaluation"),
)


class ModelError(UserError):
    """The network of --model cannot be had; says what is wrong."""


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
    state = place / _made_from(settings, device, data.data_hash, weights)
    with context.track_result(experiment, seed, "attack", data, out) as tracker, alone(place):
        found = audit(UnitRange(loaded.network(device)).eval(), x, y, settings, other, state, title, workers=workers)
        metrics, tables = found.metrics, [_named(found, "raw")]
        if loaded.ema is not None:
            averaged = UnitRange(loaded.network(device, loaded.ema)).eval()
            again = audit(averaged, x, y, settings, None, state / "ema", f"{title}, averaged weights", with_checks=False, workers=workers)
            metrics |= {
                f"ema_{name}": value for name, value in again.metrics.items() if name.endswith(("_correct", "_acc", "_low", "_high"))
            }
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


def run_any(
    factory: str,
    weights: Path | None,
    source: str | None,
    data_path: Path,
    size: int | None,
    settings: AttackSettings,
    device: torch.device,
    out: Path,
    verdicts_out: Path,
) -> None:
    """Evaluate the network that `factory` ("package.module:function") makes, with weights from a file where they are not in it.

    Writes the same files as for a checkpoint of this project. State of an interrupted evaluation lies beside `out`.
    """
    model = outside_model(factory, weights).to(device)
    other = outside_model(source, None).to(device) if source else None
    images, labels = outside.images_of(data_path, size)
    x, y = unit_from_uint8(torch.from_numpy(images)).to(device), torch.from_numpy(labels).to(device)
    parts = ((name, checkpoint.content(value).tobytes()) for name, value in model.state_dict().items() if isinstance(value, Tensor))
    tensors = digest(*itertools.chain.from_iterable(parts))
    data_hash = digest(images.tobytes(), labels.tobytes())[:16]
    place = out.parent / f".{out.name}.state"
    with alone(place):
        state = place / _made_from(settings, device, data_hash, tensors, factory)
        found = audit(model, x, y, settings, other, state, factory, workers=torch.get_num_threads())
        about = {"model": factory, "weights": tensors[:16], "data": data_path.name, "data_hash": data_hash}
        _write(found.metrics, _named(found, "raw"), settings, about, out, verdicts_out)
        shutil.rmtree(place, ignore_errors=True)


def outside_model(factory: str, weights: Path | None) -> nn.Module:
    """Call "package.module:function" without arguments and load the weights, if given. The folder one works in can be imported from.

    weights: safetensors, or a file of torch.save with tensors alone (a state dict, or a mapping that holds one under
    "state_dict", "model_state_dict" or "model"). Raises ModelError when something is missing or does not fit.
    """
    module, _, function = factory.partition(":")
    if not module or not function:
        raise ModelError(f"--model {factory!r}: package.module:function is allowed")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        make = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        raise ModelError(f"--model {factory!r}: {error}; run this where {module.split('.')[0]!r} can be imported") from error
    except AttributeError as error:
        raise ModelError(f"--model {factory!r}: the module {module} has no {function!r}") from error
    model = make()
    if not isinstance(model, nn.Module):
        raise ModelError(f"--model {factory!r} made {type(model).__name__}; a torch.nn.Module is needed")
    if weights is not None:
        try:
            model.load_state_dict(_state_dict(weights))
        except RuntimeError as error:  # torch names every missing, unexpected and misshapen tensor
            raise ModelError(f"{weights}: does not fit {factory}: {error}") from error
    return model.eval()


def _state_dict(path: Path) -> dict[str, Tensor]:
    try:
        found: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ModelError(f"{path}: there is no such file") from error
    except (SafetensorError, OSError, EOFError, RuntimeError, ValueError, KeyError) as error:
        raise ModelError(f"{path}: not a file of weights ({error})") from error
    except Exception as error:  # pickle.UnpicklingError: weights_only refused what else is in it
        raise ModelError(f"{path}: holds more than tensors, which is not read; save model.state_dict() alone ({error})") from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ModelError(f"{path}: a state dict is needed, found {type(found).__name__}")
    return {name.removeprefix("module."): value for name, value in found.items()}


def _made_from(settings: AttackSettings, device: torch.device, *inputs: Any) -> str:
    machine = [str(device), torch.get_num_threads(), torch.__version__]
    return digest(settings.model_dump(), machine, *inputs, *source_files(*CODE))[:16]


def _named(found: Audit, weights: str) -> pa.Table:
    return found.table.add_column(0, "weights", pa.array([weights] * len(found.table)))


def _write(
    metrics: dict[str, Any], table: pa.Table, settings: AttackSettings, about: dict[str, Any], out: Path, verdicts_out: Path
) -> None:
    about = {**about, "git_commit": git_commit(), "version": __version__, "settings": settings.model_dump()}
    write_table(table, verdicts_out, about)
    write_json(out, {**metrics, **about})
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
