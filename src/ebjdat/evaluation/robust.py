"""Robustness of any network that takes [0, 1] images and returns logits: verdicts, example by example, under a protocol.

Clean predictions, PGD-n on every example, and the protocol's ensemble on its first n, in fp32 and eval mode. A verdict is
decided here, by the network itself on the images that an attack returned; attacks only propose.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ebjdat import registry
from ebjdat.data.batches import generator
from ebjdat.errors import AttackError, UserError, in_a_line
from ebjdat.evaluation import ensemble
from ebjdat.files import digest, read_npz, reading, write_npz
from ebjdat.intervals import wilson
from ebjdat.models.logits import NO_CLASS, predicted
from ebjdat.models.modes import Guarded, copied, frozen_parameters
from ebjdat.pixels import UNIT, unit_distance
from ebjdat.progress import Bar
from ebjdat.samplers.pgd import cross_entropy_score, projected_gradient, random_point
from ebjdat.settings import AttackSettings, EnsembleSettings, ProtocolSettings, prefix_of, too_few_classes

SLACK = ensemble.SLACK
NOT_ATTACKED = -1  # broken already, wrong without an attack, or beyond the first n
PROBE = 0x5EED_0B5E_55ED  # a seed that nobody sets
MOST_NOT_FINITE = 0.1  # share of clean images without finite logits, beyond which a network is broken and has no accuracy


@dataclass
class Verdicts:
    """What one protocol found, for N examples in the order of the test split.

    prediction: class (N,) of each image as the protocol shows it; NO_CLASS where its logits are not finite. key: digest of
    network, images, protocol and batch size. stands: attack -> int8 (N,): 1 correct after the attack, 0 broken by it,
    NOT_ATTACKED. lost: bool (N,), whether an attack returned an image whose logits are not finite; that is broken. done:
    finished batches of each attack. excess: how far the farthest image that an attack returned lies outside the ball or
    [0, 1]; such images break nothing. seconds, flags: per attack; AutoAttack's own warnings. classes: of the network.
    """

    y: Tensor
    prediction: Tensor
    key: str = ""
    stands: dict[str, Tensor] = field(default_factory=dict)
    lost: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    done: dict[str, int] = field(default_factory=dict)
    excess: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)
    classes: int = 0

    @property
    def clean(self) -> Tensor:
        return self.prediction == self.y

    def robust_under(self, attacks: list[str]) -> Tensor:
        """Correct without an attack and after each of these (N,)."""
        standing = self.clean.clone()
        for name in attacks:
            standing &= self.stands[name] != 0
        return standing

    def save(self, path: Path) -> None:
        arrays = {f"stands.{name}": value.cpu().numpy() for name, value in self.stands.items()}
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
            found = cls(
                y=torch.from_numpy(file["y"]).to(device),
                prediction=torch.from_numpy(file["prediction"]).to(device),
                lost=torch.from_numpy(file["lost"]).to(device),
                classes=int(file["classes"]),
                key=str(file["key"]),
                stands={name: torch.from_numpy(file[f"stands.{name}"]).to(device) for name in names},
                done=dict(zip(names, map(int, file["done"].tolist()), strict=True)),
                excess=float(file["excess"]),
                seconds=dict(zip(names, file["seconds"].tolist(), strict=True)),
                flags=file["flags"].tolist(),
            )
            wanted = [(torch.int64, found.prediction), (torch.int64, found.y), (torch.bool, found.lost)]
            wanted += [(torch.int8, verdicts) for verdicts in found.stands.values()]
            if found.y.ndim != 1 or any(value.dtype != kind or value.shape != found.y.shape for kind, value in wanted):
                raise ValueError("verdicts of other shapes or types")
            return found


def batches(n: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


@torch.no_grad()
def predictions(model: nn.Module, x: Tensor, batch_size: int) -> Tensor:
    """Predicted classes (N,) of images (N, C, H, W) in [0, 1]; NO_CLASS where the logits are not finite."""
    return torch.cat([predicted(model(x[part])) for part in batches(len(x), batch_size)])


def pgd_batch(model: nn.Module, x: Tensor, y: Tensor, protocol: ProtocolSettings, start: Tensor) -> Tensor:
    """PGD-n on cross-entropy (Madry et al. 2018) from `start`: adversarial images in [0, 1]."""
    return projected_gradient(
        cross_entropy_score(model, x, y),
        x,
        eps=protocol.radius,
        step_size=protocol.pgd_step,
        steps=protocol.pgd.steps,
        norm=protocol.norm,
        bounds=UNIT,
        start=start,
    )


def pgd_start(x: Tensor, place: int, protocol: ProtocolSettings, seed: int, restart: int = 0) -> Tensor:
    """Random points in the balls around x, a function of the batch's place in the split, the seed and the restart."""
    noise = generator(x.device, "pgd", seed, place, *([restart] if restart else []))
    return random_point(x, protocol.radius, protocol.norm, UNIT, noise)


def pgd_examples(model: nn.Module, x: Tensor, y: Tensor, protocol: ProtocolSettings, seed: int, batch_size: int) -> Tensor:
    """PGD-n, one start: adversarial images (N, C, H, W) in [0, 1]; the same settings, images and weights give the same ones.

    x: images of the protocol (noise, if it has any, already on them).
    """
    with frozen_parameters(model, "eval"):
        parts = [(part, pgd_start(x[part], part.start, protocol, seed)) for part in batches(len(x), batch_size)]
        return torch.cat([pgd_batch(model, x[part], y[part], protocol, start) for part, start in parts])


def apply_protocol_noise(protocol: ProtocolSettings, x: Tensor, seed: int) -> Tensor:
    """Images in [0, 1] as the protocol shows them to the network: with its noise, the same for every network; not clamped, as released."""
    if not protocol.noise:
        return x
    noise = torch.randn(x.shape, generator=generator(x.device, "protocol noise", seed), device=x.device)
    return x + unit_distance(protocol.noise) * noise


def outside(adversarial: Tensor, x: Tensor, norm: str, radius: float) -> Tensor:
    """How far each image (N, C, H, W) lies outside the ball around x (brought into [0, 1]) or outside [0, 1]: (N,), 0 inside.

    1, as far as [0, 1] goes, for an image with a pixel that is not finite.
    """
    delta = (adversarial - x.clamp(*UNIT)).flatten(1)
    size = delta.abs().amax(1) if norm == "Linf" else delta.norm(dim=1)
    flat = adversarial.flatten(1)
    beyond = torch.stack([size - radius, UNIT[0] - flat.amin(1), flat.amax(1) - UNIT[1]]).amax(0).clamp_min(0)
    return torch.where(torch.isfinite(flat).all(1), beyond, 1.0)


@contextlib.contextmanager
def fp32_eval_copy(model: nn.Module) -> Iterator[Guarded]:
    """A copy of the network as verdicts see it: eval mode, fp32 weights and arithmetic (no autocast, no TF32), no parameter gradients.

    One that cannot be copied is used itself, and put back. Raises AttackError where its weights would have to be changed for that.
    """
    with contextlib.ExitStack() as held:
        try:
            network = copied(model).eval().float().requires_grad_(False)
        except (Exception, SystemExit) as error:  # a part of it that nobody foresaw: a lock, a stream, a generator
            try:
                network = model
                others = any(p.is_floating_point() and p.dtype != torch.float32 for p in (*model.parameters(), *model.buffers()))
                held.enter_context(frozen_parameters(model, "eval"))
            except (Exception, SystemExit) as another:
                raise AttackError(f"the network cannot be put into eval mode: {in_a_line(another)}") from another
            if others:
                raise AttackError(f"the network cannot be copied ({in_a_line(error)}); then its weights must be float32") from error
        judge = Guarded(network)
        matmul, convolution = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        device = next((p.device.type for p in judge.parameters()), "cpu")
        try:
            with torch.autocast(device, enabled=False):
                yield judge
        finally:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, convolution


def classes_of(judge: Guarded, x: Tensor, y: Tensor) -> int:
    """How many classes the network tells apart.

    Raises AttackError when it returns no logits for these labels, or passes no gradient on to the image.
    """
    image = x[:1].detach().requires_grad_(True)
    with torch.enable_grad(), ensemble.own_randomness():
        torch.manual_seed(PROBE)
        logits = judge(image)
        if torch.initial_seed() != PROBE:
            raise AttackError("the network sets torch's random seed, so attacks would draw the same again; give it a torch.Generator")
    classes = int(logits.shape[1])
    if classes < 2:
        few = "one logit" if classes else "no logits"
        raise AttackError(f"the network returned {few}; of two classes two are needed, e.g. torch.cat([torch.zeros_like(z), z], 1)")
    lowest, highest = int(y.min()), int(y.max())
    if lowest < 0 or highest >= classes:
        counted = "; they seem to be counted from 1, and must be from 0" if (lowest, highest) == (1, classes) else ""
        raise AttackError(
            f"labels go {f'down to {lowest}' if lowest < 0 else f'up to {highest}'}, but the network tells {classes} classes apart{counted}"
        )
    torch.autograd.grad(logits.sum(), image)
    return classes


def fit(judge: Guarded, x: Tensor, y: Tensor, name: str, settings: AttackSettings) -> tuple[int, Tensor]:
    """What the protocol `name` needs to know of a network: its classes, and what it predicts of the images it is shown (N,).

    Raises AttackError when it does not return logits with a gradient, has too few classes for an attack, changes the images
    that it is given, or returns logits that are not finite for more than MOST_NOT_FINITE of them.
    """
    classes = classes_of(judge, x, y)
    if problem := too_few_classes(settings, classes):
        raise AttackError(problem)
    shown, found = apply_protocol_noise(settings.protocols[name], x.contiguous(), settings.seed), []
    with torch.no_grad():
        for part in batches(len(shown), settings.batch_size):
            given = shown[part].clone()
            found.append(predicted(judge.of(given)))
            if not torch.equal(given, shown[part]):
                raise AttackError("the network changes the images it is given; let its forward begin with x = x.clone()")
    prediction = torch.cat(found)
    lost = int((prediction == NO_CLASS).sum())
    if lost > MOST_NOT_FINITE * len(x):
        raise AttackError(
            f"the network's logits are not finite for {lost} of {len(x)} images (protocol {name!r}); with more than "
            f"{MOST_NOT_FINITE:.0%} it is not evaluated; check its weights, its precision and its input range, [0, 1]"
        )
    return classes, prediction


def pgd_name(protocol: ProtocolSettings) -> str:
    return f"pgd{protocol.pgd.steps}"


def evaluate(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    name: str,
    settings: AttackSettings,
    state: Path | None = None,
    title: str = "attack",
    workers: int = 1,
    fitted: tuple[int, Tensor] | None = None,
) -> Verdicts:
    """Verdicts on images x (N, C, H, W) in [0, 1] with labels y (N,) under the protocol `name` of the settings.

    state: a folder in which finished batches are kept; called again after an interruption, with the same network, images and
    settings, it goes on there and ends with the same verdicts. workers: processes of one thread each that share the ensemble's
    batches, on a CPU; small networks gain more from them than from threads, and batches, so verdicts, are the same. fitted:
    what `fit` returned for the same arguments, where it was called. Raises AttackError as `fit` does.
    """
    protocol = settings.protocols[name]
    with fp32_eval_copy(model) as judge:
        classes, prediction = fitted or fit(judge, x, y, name, settings)
        x = apply_protocol_noise(protocol, x.contiguous(), settings.seed)
        file = state / f"{name}.npz" if state else None
        with torch.no_grad():
            network = judge(x[:8])
        about = [array.cpu().numpy().tobytes() for array in (x, y, network)]
        key = digest(protocol.model_dump(), settings.seed, settings.batch_size, settings.search, *about)
        verdicts = Verdicts.load(file, x.device) if file and file.exists() else None
        if verdicts is None or verdicts.key != key:
            verdicts = Verdicts(y, prediction, key, lost=torch.zeros_like(y, dtype=torch.bool), classes=classes)
        run = _Run(judge, x, y, protocol, settings, verdicts, file, f"{title}: {name}", workers if x.device.type == "cpu" else 1)
        run.pgd()
        if protocol.n:
            run.ensemble(classes)
    return verdicts


Job = tuple[str, ensemble.FastNetwork, Tensor, Tensor, EnsembleSettings, ProtocolSettings, int]


def _attack(job: Job) -> tuple[Tensor, list[str], float]:
    """One batch of one attack: its images, what AutoAttack's code warned of, seconds."""
    name, *arguments = job
    started = time.perf_counter()
    with ensemble.heard() as told:
        moved = registry.load(registry.ATTACKS, name)(*arguments)
    return moved, told, time.perf_counter() - started


def _attack_on_one_thread(job: Job) -> tuple[Tensor, list[str], float]:
    torch.set_num_threads(1)
    return _attack(job)


def _shared(jobs: list[Job], workers: int) -> Iterator[tuple[Tensor, list[str], float]]:
    """The jobs' results in their order, made by processes of one thread each; by this one where they cannot be handed the network."""
    from joblib import Parallel, delayed

    done = 0
    try:
        shared = Parallel(min(workers, len(jobs)), backend="loky", return_as="generator")
        for found in shared(delayed(_attack_on_one_thread)(job) for job in jobs):
            done += 1
            yield found
    except UserError:
        raise
    except Exception:  # pickle, or whoever wrote the network, refuses in many ways; an error of an attack comes again below
        yield from map(_attack, jobs[done:])


@dataclass
class _Run:
    judge: nn.Module
    x: Tensor
    y: Tensor
    protocol: ProtocolSettings
    settings: AttackSettings
    verdicts: Verdicts
    file: Path | None
    title: str
    workers: int

    def pgd(self) -> None:
        """Every example, batch by batch in order; it stands when it does after each restart."""
        name, size = pgd_name(self.protocol), self.settings.batch_size
        parts = list(batches(len(self.x), size))
        if self._begin(name) == len(parts):
            return
        with Bar(f"{self.title}, {name}", len(parts)) as bar:
            bar.at(self.verdicts.done[name])
            for i, part in enumerate(parts[self.verdicts.done[name] :], self.verdicts.done[name]):
                started = time.perf_counter()
                rows = self.verdicts.clean[part].nonzero().squeeze(1)  # within the batch
                stands = torch.ones(len(rows), dtype=torch.bool, device=self.x.device)
                for restart in range(self.protocol.pgd.restarts if len(rows) else 0):
                    start = pgd_start(self.x[part], part.start, self.protocol, self.settings.seed, restart)[rows]
                    moved = pgd_batch(self.judge, self.x[part][rows], self.y[part][rows], self.protocol, start)
                    stands &= self._judged(moved, rows + part.start)
                self._finish(name, i, rows + part.start, stands, time.perf_counter() - started)
                bar.advance()
            bar.line(self._told(name, len(self.x), self.verdicts.robust_under([name])))

    def ensemble(self, classes: int) -> None:
        """The first n examples; each attack meets those that the ones before it left standing, in batches of their own order."""
        n, size = self.protocol.n, self.settings.batch_size
        network = ensemble.FastNetwork(self.judge, self.x[:size], self.settings.search == "bf16")
        finite = (self.verdicts.prediction[: min(n, size)] != NO_CLASS).nonzero().squeeze(1)  # comparisons with NaN say nothing
        if len(finite):
            self._heard(ensemble.flags(self.judge, self.x[finite], self.y[finite], self.protocol))
        before: list[str] = []
        for name, settings in self.protocol.attacks.items():
            standing = self.verdicts.robust_under(before)[:n].nonzero().squeeze(1)
            before.append(name)
            parts = standing.tensor_split(-(-len(standing) // size)) if len(standing) else ()  # equal ones share the work evenly
            if self._begin(name) == len(parts):
                continue
            cost, first = ensemble.queries(name, settings, classes), self.verdicts.done[name]
            with Bar(f"{self.title}, {name}", cost * len(standing)) as bar:
                jobs = [(name, network, self.x[rows], self.y[rows], settings, self.protocol, self.settings.seed) for rows in parts[first:]]
                bar.at(cost * sum(map(len, parts[:first])))
                bar.show({"batches": first, "robust_acc": int(self.verdicts.robust_under(before)[:n].sum()) / n})
                shared = self.workers > 1 and len(jobs) > 1
                network.count = None if shared else bar.advance
                found = _shared(jobs, self.workers) if shared else map(_attack, jobs)
                for i, (rows, (moved, told, seconds)) in enumerate(zip(parts[first:], found, strict=True), first):
                    self._heard(told)
                    self._finish(name, i, rows, self._judged(moved, rows), seconds)
                    bar.at(cost * sum(map(len, parts[: i + 1])))
                    bar.show({"batches": i + 1, "robust_acc": int(self.verdicts.robust_under(before)[:n].sum()) / n})
                network.count = None
                bar.line(self._told(name, n, self.verdicts.robust_under(before)[:n]))
        after = {name: float(self.verdicts.robust_under(before[: i + 1])[:n].float().mean()) for i, name in enumerate(before)}
        self._heard(ensemble.square_flag({"clean": float(self.verdicts.clean[:n].float().mean()), **after}))

    def _heard(self, told: list[str]) -> None:
        self.verdicts.flags += [text for text in told if text not in self.verdicts.flags]

    def _begin(self, name: str) -> int:
        """How many batches of an attack are done."""
        self.verdicts.stands.setdefault(name, torch.full_like(self.y, NOT_ATTACKED, dtype=torch.int8))
        return self.verdicts.done.setdefault(name, 0)

    def _judged(self, moved: Tensor, rows: Tensor) -> Tensor:
        """Whether each example is still classified right; an image outside its ball or [0, 1] breaks nothing, but is kept count of."""
        beyond = outside(moved, self.x[rows], self.protocol.norm, self.protocol.radius)
        beyond *= (moved != self.x[rows]).flatten(1).any(1)  # an attack that found nothing returns the image as it was
        self.verdicts.excess = max(self.verdicts.excess, float(beyond.max()))
        prediction = predictions(self.judge, moved, self.settings.batch_size)
        self.verdicts.lost[rows] |= (prediction == NO_CLASS) & (beyond <= SLACK)
        return (prediction == self.y[rows]) | (beyond > SLACK)

    def _finish(self, name: str, batch: int, rows: Tensor, stands: Tensor, seconds: float) -> None:
        self.verdicts.stands[name][rows] = stands.to(torch.int8)
        self.verdicts.done[name] = batch + 1
        self.verdicts.seconds[name] = self.verdicts.seconds.get(name, 0.0) + seconds
        if self.file:
            self.verdicts.save(self.file)

    def _told(self, name: str, n: int, standing: Tensor) -> str:
        return f"{float(standing.float().mean()):.1%} of {n} stand after it ({self.verdicts.seconds.get(name, 0.0):.1f} s)"


def summary(name: str, protocol: ProtocolSettings, verdicts: Verdicts) -> dict[str, Any]:
    """Counts, accuracies and Wilson 95 % intervals of a protocol, flat; names of protocols other than the standard one begin with theirs.

    pgd<n>_acc: of all examples. autoattack_acc: of the first n, after the whole ensemble; after_<attack>_correct: after this
    and the attacks before it. pgd<n>_acc_first_n: PGD on the ensemble's examples, to compare.
    """
    pgd, n = pgd_name(protocol), protocol.n
    clean, after_pgd = verdicts.clean, verdicts.robust_under([pgd])
    found: dict[str, Any] = {
        "norm": protocol.norm,
        "eps": protocol.eps,
        "radius": protocol.radius,
        "n_test": len(clean),
        "n_not_finite": int((verdicts.prediction == NO_CLASS).sum()),
        "n_not_finite_adversarial": int(verdicts.lost.sum()),
        **_counted("clean", clean),
        **_counted(pgd, after_pgd),
        "n_attack": n,
    }
    names = list(protocol.attacks)
    if n and names:
        found |= _counted("autoattack", verdicts.robust_under(names)[:n])
        for i, attack in enumerate(names):
            found[f"after_{attack}_correct"] = int(verdicts.robust_under(names[: i + 1])[:n].sum())
        found |= {f"{pgd}_acc_first_n": int(after_pgd[:n].sum()) / n, "autoattack_warnings": verdicts.flags}
        found["attack_seconds"] = round(sum(verdicts.seconds.values()), 3)
        found["n_targets"] = {a: ensemble.aimed_at(s, verdicts.classes) for a, s in protocol.attacks.items() if a in ensemble.TARGETED}
    return {f"{prefix_of(name)}{key}": value for key, value in found.items()}


def _counted(name: str, correct: Tensor) -> dict[str, Any]:
    """How many of (N,) are correct, the fraction, and its interval."""
    count = int(correct.sum())
    low, high = wilson(count, len(correct))
    return {f"{name}_correct": count, f"{name}_acc": count / len(correct), f"{name}_low": low, f"{name}_high": high}


def columns(name: str, protocol: ProtocolSettings, verdicts: Verdicts) -> dict[str, list[Any]]:
    """The verdicts as a table, a row per example: what verdicts.parquet holds of one protocol. A verdict that was not asked for is None."""
    n = protocol.n if protocol.attacks else 0
    names = list(protocol.attacks)
    after = verdicts.robust_under(names) if n else verdicts.clean
    worst = verdicts.robust_under([pgd_name(protocol), *(names if n else [])])
    asked = {
        attack: [None if value == NOT_ATTACKED else bool(value) for value in stands.tolist()] for attack, stands in verdicts.stands.items()
    }
    return {
        "protocol": [name] * len(worst),
        "index": list(range(len(worst))),
        "label": verdicts.y.tolist(),
        "prediction": verdicts.prediction.tolist(),
        "clean": verdicts.clean.tolist(),
        **asked,
        "autoattack": [bool(value) if i < n else None for i, value in enumerate(after.tolist())],
        "worst": worst.tolist(),
    }
