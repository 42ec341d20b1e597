"""The package for Python programs: evaluate any network, load a checkpoint, train an experiment of a profile."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ebjdat.data import prepared
from ebjdat.data.prepared import Prepared
from ebjdat.errors import AttackError
from ebjdat.evaluation import robust, verdicts
from ebjdat.evaluation.audit import limited
from ebjdat.evaluation.verdicts import ProtocolResult
from ebjdat.jobs import STAGES
from ebjdat.models.modes import UnitRange
from ebjdat.pixels import UNIT
from ebjdat.settings import ParamsError, load, nearest, usual_protocols
from ebjdat.settings.profile import Pretraining, Profile
from ebjdat.training import checkpoint
from ebjdat.training.checkpoint import Header
from ebjdat.training.fit import train_checkpoint


def evaluate(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    protocol: str = "standard",
    *,
    n: int = 1000,
    seed: int = 0,
    device: torch.device | str = "cpu",
    overrides: Sequence[str] = (),
) -> ProtocolResult:
    """Clean accuracy, and accuracy under PGD-20 and AutoAttack, of any network.

    model: images (B, C, H, W) in [0, 1] -> logits (B, K), with its own preprocessing inside. It is moved to `device` and evaluated
    as a copy in eval mode and fp32; its mode and its gradients stay as they are.
    x: floating-point images (N, C, H, W) in [0, 1]. y: integer classes (N,) in 0 … K - 1.
    protocol: "standard" (RobustBench: L-infinity, 8/255), "standard_l2" (0.5), "released" (that of EB-JDAT's released code), or
    one that `overrides` define.
    n: AutoAttack runs on the first n images, PGD on all; 0 for PGD alone.
    overrides: as on the command line, in evaluation.attack, e.g. "protocols.standard.eps=4/255", "batch_size=100".

    The same arguments give the same result. Raises AttackError for images or labels of another kind, and for a network that the
    attacks cannot evaluate (no gradient, other outputs than logits); ParamsError for a protocol or override that does not exist.

    >>> result = ebjdat.evaluate(model, x, y, n=100)
    >>> result.clean.value, result.pgd.value, result.ensemble.robust.interval
    (0.94, 0.52, (0.36, 0.55))
    """
    if not (x.is_floating_point() and x.ndim == 4 and len(x) and y.shape == x.shape[:1]) or y.is_floating_point():
        raise AttackError(
            f"images are {x.dtype} {tuple(x.shape)}, labels {y.dtype} {tuple(y.shape)}; floating-point images (N, C, H, W) and one "
            "integer label for each are needed"
        )
    if not bool(((x >= UNIT[0]) & (x <= UNIT[1])).all()):
        raise AttackError(f"images reach from {float(x.min()):.4g} to {float(x.max()):.4g}; they must be in [0, 1]")
    chosen = limited(usual_protocols(n, [f"seed={seed}", *overrides]), len(x))
    if protocol not in chosen.protocols:
        raise ParamsError(f"there is no protocol {protocol!r}; {nearest(protocol, list(chosen.protocols))}")
    network, x, y = model.to(device), x.to(device, torch.float32), y.to(device, torch.int64)
    workers = torch.get_num_threads()
    return verdicts.result(chosen.protocols[protocol], robust.evaluate(network, x, y, protocol, chosen, workers=workers))


def load_checkpoint(path: Path | str, device: torch.device | str = "cpu", averaged: bool = False) -> tuple[nn.Module, Header]:
    """A network that this package trained, and what made it.

    The network takes images (B, C, H, W) in [0, 1] and returns logits (B, K), in eval mode on `device`. The header holds its method,
    seed, settings, classes, image shape and data hash. averaged: the averaged weights instead of the raw ones.

    Raises CheckpointError for a file that is missing, damaged, changed or foreign, and where there are no averaged weights.

    >>> network, header = ebjdat.load_checkpoint("checkpoints/digits/eb_jdat/seed0.safetensors")
    >>> header.classes[network(x).argmax(1)[0]]
    '7'
    """
    loaded = checkpoint.load(Path(path))
    if averaged and loaded.ema is None:
        raise checkpoint.CheckpointError(f"{path}: has no averaged weights; train with training.ema")
    return UnitRange(loaded.network(torch.device(device), loaded.ema if averaged else None)).eval(), loaded.header


def train(
    profile: Path | str,
    experiment: str,
    out: Path | str,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    overrides: Sequence[str] = (),
) -> tuple[nn.Module, Header]:
    """Train an experiment of a profile from its pretraining, on the profile's data, and write its checkpoint to `out`.

    profile: e.g. "params/digits.yaml". overrides: as on the command line: YAML files or "key.path=value".
    Returns what `load_checkpoint(out)` does. The checkpoints of its pretraining and of its teacher are written beside `out` and used
    again. A training that was interrupted continues when it is called again. The same arguments give the same weights on the same
    machine.

    Raises ParamsError for settings that are wrong, DataError for the images, TrainingError where training diverged for good.

    >>> network, header = ebjdat.train("params/digits.yaml", "eb_jdat", "eb_jdat.safetensors", overrides=["training.epochs=2"])
    >>> header.metrics["selection_score"]
    0.81
    """
    chosen = load(profile, overrides)
    if experiment not in chosen.experiments:
        raise ParamsError(f"{experiment!r} is not in this profile; {nearest(experiment, list(chosen.experiments))}")
    data, _ = prepared.prepare(chosen.data)
    _train(chosen, experiment, Path(out), data, seed, torch.device(device))
    return load_checkpoint(out, device)


def _train(chosen: Profile, experiment: str, out: Path, data: Prepared, seed: int, on: torch.device) -> None:
    entry = chosen.experiments[experiment]
    start, initial = chosen.pretraining[entry.pretraining], out.with_name(f"{out.stem}.{entry.pretraining}{out.suffix}")
    code = STAGES["pretrain"].digest(chosen, entry.pretraining)
    if not _is_made(initial, start, data.data_hash, seed, code):
        train_checkpoint(start.method, start.model, start.training, data, initial, seed=seed, device=on, code=code)
    code = STAGES["finetune"].digest(chosen, experiment)
    named, teacher = entry.training.teacher, None
    if named and named.experiment:
        own = seed if named.seed is None else named.seed
        teacher = out.with_name(f"{out.stem}.{named.experiment}-seed{own}{out.suffix}")
        student = chosen.experiments[named.experiment]
        of_teacher = STAGES["finetune"].digest(chosen, named.experiment)
        if not _is_made(teacher, Pretraining(student.method, student.model, student.training), data.data_hash, own, of_teacher):
            _train(chosen, named.experiment, teacher, data, own, on)
    elif named and named.weights:
        teacher = Path(named.weights)
    train_checkpoint(
        entry.method, entry.model, entry.training, data, out, seed=seed, device=on, initial=initial, code=code, teacher=teacher
    )


def _is_made(path: Path, start: Pretraining, data_hash: str, seed: int, code: str) -> bool:
    """Whether the file holds this pretraining. It is then kept: an interrupted fine-tuning continues only from the same file."""
    try:
        header = checkpoint.load(path, data_hash=data_hash, model=start.model, method=start.method).header
    except checkpoint.CheckpointError:
        return False
    return (header.training, header.seed, header.code) == (start.training, seed, code)
