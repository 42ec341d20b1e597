"""Robustness of any network that takes [0, 1] images and returns logits: verdicts, example by example, under a protocol.

Clean predictions, PGD-n on every example, and the protocol's ensemble on its first n, in fp32 and eval mode. A verdict is
decided here, by the network itself on the images that an attack returned; attacks only propose.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ebjdat import registry
from ebjdat.data.batches import generator
from ebjdat.errors import AttackError, UserError, in_a_line
from ebjdat.evaluation import autoattack, distortion
from ebjdat.evaluation.verdicts import NOT_ATTACKED, Verdicts, pgd_name
from ebjdat.files import digest
from ebjdat.models.logits import NO_CLASS, predicted
from ebjdat.models.modes import Guarded, copied, frozen_parameters
from ebjdat.pixels import UNIT, unit_distance
from ebjdat.progress import Bar
from ebjdat.samplers.pgd import MakeScore, cross_entropy_score, projected_gradient, random_point
from ebjdat.settings import AdaptiveSettings, AttackSettings, EnsembleSettings, ProtocolSettings, too_few_classes

SLACK = autoattack.SLACK
PROBE = 0x5EED_0B5E_55ED  # a seed that nobody sets
MOST_NOT_FINITE = 0.1  # share of clean images without finite logits, beyond which a network is broken and has no accuracy


def batches(n: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


@torch.no_grad()
def predictions(model: nn.Module, x: Tensor, batch_size: int) -> Tensor:
    """Predicted classes (N,) of images (N, C, H, W) in [0, 1]; NO_CLASS where the logits are not finite."""
    return torch.cat([predicted(model(x[part])) for part in batches(len(x), batch_size)])


def pgd_batch(
    model: nn.Module, x: Tensor, y: Tensor, protocol: ProtocolSettings, start: Tensor, score: MakeScore = cross_entropy_score
) -> Tensor:
    """PGD-n on cross-entropy (Madry et al. 2018), or another score, from `start`: adversarial images in [0, 1]."""
    return projected_gradient(
        score(model, x, y),
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


def pgd_examples(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    protocol: ProtocolSettings,
    seed: int,
    batch_size: int,
    score: MakeScore = cross_entropy_score,
) -> Tensor:
    """PGD-n, one start: adversarial images (N, C, H, W) in [0, 1]; the same settings, images and weights give the same ones.

    x: images of the protocol (noise, if it has any, already on them).
    """
    with frozen_parameters(model, "eval"):
        parts = [(part, pgd_start(x[part], part.start, protocol, seed)) for part in batches(len(x), batch_size)]
        return torch.cat([pgd_batch(model, x[part], y[part], protocol, start, score) for part, start in parts])


def apply_protocol_noise(protocol: ProtocolSettings, x: Tensor, seed: int) -> Tensor:
    """Images in [0, 1] as the protocol shows them to the network: with its noise, the same for every network; not clamped, as released."""
    if not protocol.noise:
        return x
    noise = torch.randn(x.shape, generator=generator(x.device, "protocol noise", seed), device=x.device)
    return x + unit_distance(protocol.noise) * noise


def ball_violation(adversarial: Tensor, x: Tensor, norm: str, radius: float) -> Tensor:
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

    One that cannot be copied is used itself and restored. Raises AttackError where its weights would have to be changed for that.
    """
    with contextlib.ExitStack() as stack:
        try:
            network = copied(model).eval().float().requires_grad_(False)
        except (Exception, SystemExit) as error:  # a part of it that cannot be copied: a lock, a stream, a generator
            try:
                network = model
                others = any(p.is_floating_point() and p.dtype != torch.float32 for p in (*model.parameters(), *model.buffers()))
                stack.enter_context(frozen_parameters(model, "eval"))
            except (Exception, SystemExit) as another:
                raise AttackError(f"the network cannot be put into eval mode: {in_a_line(another)}") from another
            if others:
                raise AttackError(f"the network cannot be copied ({in_a_line(error)}); then its weights must be float32") from error
        guarded = Guarded(network)
        matmul, convolution = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        device = next((p.device.type for p in guarded.parameters()), "cpu")
        try:
            with torch.autocast(device, enabled=False):
                yield guarded
        finally:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, convolution


def number_of_classes(network: Guarded, x: Tensor, y: Tensor) -> int:
    """How many classes the network has.

    Raises AttackError when it returns no logits for these labels, or passes no gradient on to the image.
    """
    image = x[:1].detach().requires_grad_(True)
    with torch.enable_grad(), autoattack.own_randomness():
        torch.manual_seed(PROBE)
        logits = network(image)
        if torch.initial_seed() != PROBE:
            raise AttackError("the network sets torch's random seed, so attacks would repeat the same noise; give it a torch.Generator")
    classes = int(logits.shape[1])
    if classes < 2:
        few = "one logit" if classes else "no logits"
        raise AttackError(f"the network returned {few}; two classes need two, e.g. torch.cat([torch.zeros_like(z), z], 1)")
    lowest, highest = int(y.min()), int(y.max())
    if lowest < 0 or highest >= classes:
        counted = "; they seem to start at 1, and must start at 0" if (lowest, highest) == (1, classes) else ""
        raise AttackError(
            f"labels go {f'down to {lowest}' if lowest < 0 else f'up to {highest}'}, but the network has {classes} classes{counted}"
        )
    torch.autograd.grad(logits.sum(), image)
    return classes


def check_network(network: Guarded, x: Tensor, y: Tensor, name: str, settings: AttackSettings) -> tuple[int, Tensor]:
    """A network's number of classes, and its predictions (N,) on the images as the protocol `name` shows them.

    Raises AttackError when it does not return logits with a gradient, has too few classes for an attack, changes the images
    that it is given, or returns logits that are not finite for more than MOST_NOT_FINITE of them.
    """
    classes = number_of_classes(network, x, y)
    if problem := too_few_classes(settings, classes):
        raise AttackError(problem)
    shown, predictions = apply_protocol_noise(settings.protocols[name], x.contiguous(), settings.seed), []
    with torch.no_grad():
        for part in batches(len(shown), settings.batch_size):
            given = shown[part].clone()
            predictions.append(predicted(network.of(given)))
            if not torch.equal(given, shown[part]):
                raise AttackError("the network changes the images it is given; let its forward begin with x = x.clone()")
    prediction = torch.cat(predictions)
    lost = int((prediction == NO_CLASS).sum())
    if lost > MOST_NOT_FINITE * len(x):
        raise AttackError(
            f"the network's logits are not finite for {lost} of {len(x)} images (protocol {name!r}); with more than "
            f"{MOST_NOT_FINITE:.0%} it is not evaluated; check its weights, its precision and its input range, [0, 1]"
        )
    return classes, prediction


def evaluate(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    name: str,
    settings: AttackSettings,
    state: Path | None = None,
    title: str = "attack",
    workers: int = 1,
    checked: tuple[int, Tensor] | None = None,
) -> Verdicts:
    """Verdicts on images x (N, C, H, W) in [0, 1] with labels y (N,) under the protocol `name` of the settings.

    state: a folder in which finished batches are kept; called again after an interruption, with the same network, images and
    settings, it continues there and ends with the same verdicts. workers: processes of one thread each that share the ensemble's
    batches, on a CPU; small networks gain more from them than from threads, and batches, so verdicts, are the same. checked:
    what `check_network` returned for the same arguments, if it was called. Raises AttackError as `check_network` does.
    """
    protocol = settings.protocols[name]
    with fp32_eval_copy(model) as network:
        classes, prediction = checked or check_network(network, x, y, name, settings)
        x = apply_protocol_noise(protocol, x.contiguous(), settings.seed)
        file = state / f"{name}.npz" if state else None
        with torch.no_grad():
            logits = network(x[:8])
        inputs = [array.cpu().numpy().tobytes() for array in (x, y, logits)]
        key = digest(protocol.model_dump(), settings.seed, settings.batch_size, settings.search, *inputs)
        verdicts = Verdicts.load(file, x.device) if file and file.exists() else None
        if verdicts is None or verdicts.key != key:
            verdicts = Verdicts(y, prediction, key, lost=torch.zeros_like(y, dtype=torch.bool), classes=classes)
        run = _Run(network, x, y, protocol, settings, verdicts, file, f"{title}: {name}", workers if x.device.type == "cpu" else 1)
        run.pgd()
        if protocol.n:
            run.ensemble(classes)
    return verdicts


Job = tuple[str, autoattack.FastNetwork, Tensor, Tensor, EnsembleSettings | AdaptiveSettings, ProtocolSettings, int]


def _attack(job: Job) -> tuple[Tensor, list[str], float]:
    """One batch of one attack: its images, the warnings of AutoAttack's code, seconds."""
    name, *arguments = job
    started = time.perf_counter()
    with autoattack.collected_warnings() as messages:
        attacks = registry.ATTACKS if name in registry.ATTACKS else registry.ADAPTIVE
        adversarial = registry.load(attacks, name)(*arguments)
    return adversarial, messages, time.perf_counter() - started


def _attack_on_one_thread(job: Job) -> tuple[Tensor, list[str], float]:
    torch.set_num_threads(1)
    return _attack(job)


def _shared(jobs: list[Job], workers: int) -> Iterator[tuple[Tensor, list[str], float]]:
    """The jobs' results in order, from processes of one thread each; from this one where the network cannot be sent to them."""
    from joblib import Parallel, delayed

    done = 0
    try:
        shared = Parallel(min(workers, len(jobs)), backend="loky", return_as="generator")
        for result in shared(delayed(_attack_on_one_thread)(job) for job in jobs):
            done += 1
            yield result
    except UserError:
        raise
    except Exception:  # pickle, or the network's own code, fails in many ways; an attack's own error is raised again below
        yield from map(_attack, jobs[done:])


@dataclass
class _Run:
    network: nn.Module
    x: Tensor
    y: Tensor
    protocol: ProtocolSettings
    settings: AttackSettings
    verdicts: Verdicts
    file: Path | None
    title: str
    workers: int

    def pgd(self) -> None:
        """Every example, batch by batch in order; an example is robust if it is after each restart."""
        name, size = pgd_name(self.protocol), self.settings.batch_size
        parts = list(batches(len(self.x), size))
        if self._begin(name) == len(parts):
            return
        with Bar(f"{self.title}, {name}", len(parts)) as bar:
            bar.at(self.verdicts.done[name])
            for i, part in enumerate(parts[self.verdicts.done[name] :], self.verdicts.done[name]):
                started = time.perf_counter()
                rows = self.verdicts.clean[part].nonzero().squeeze(1)  # within the batch
                robust = torch.ones(len(rows), dtype=torch.bool, device=self.x.device)
                for restart in range(self.protocol.pgd.restarts if len(rows) else 0):
                    start = pgd_start(self.x[part], part.start, self.protocol, self.settings.seed, restart)[rows]
                    adversarial = pgd_batch(self.network, self.x[part][rows], self.y[part][rows], self.protocol, start)
                    robust &= self._verdicts(name, adversarial, rows + part.start)
                self._finish(name, i, rows + part.start, robust, time.perf_counter() - started)
                bar.advance()
            bar.line(self._summary(name, self.verdicts.robust_under([name])))

    def ensemble(self, classes: int) -> None:
        """The first n examples; each attack gets those that are robust under the ones before it, in batches of their own order.

        Adaptive attacks come last; what AutoAttack's own checks look at ends before them.
        """
        n, size = self.protocol.n, self.settings.batch_size
        fast = autoattack.FastNetwork(self.network, self.x[:size], self.settings.search == "bf16")
        finite = (self.verdicts.prediction[: min(n, size)] != NO_CLASS).nonzero().squeeze(1)  # comparisons with NaN mean nothing
        if len(finite):
            self._add_flags(autoattack.flags(self.network, self.x[finite], self.y[finite], self.protocol))
        names = list(self.protocol.attacks)
        for i, (name, attack) in enumerate(self.protocol.attacks.items()):
            self._attack_rest(fast, name, attack, names[:i], autoattack.queries(name, attack, classes))
        after = {name: float(self.verdicts.robust_under(names[: i + 1])[:n].float().mean()) for i, name in enumerate(names)}
        self._add_flags(autoattack.square_flag({"clean": float(self.verdicts.clean[:n].float().mean()), **after}))
        for name, adaptive in self.protocol.adaptive_attacks.items():
            self._attack_rest(fast, name, adaptive, names, adaptive.restarts * (adaptive.steps + 1))

    def _attack_rest(
        self, fast: autoattack.FastNetwork, name: str, settings: EnsembleSettings | AdaptiveSettings, before: list[str], cost: int
    ) -> None:
        """One attack on those of the first n that are robust under the ones before it. cost: at most how many queries an image takes."""
        n, size = self.protocol.n, self.settings.batch_size
        rest = self.verdicts.robust_under(before)[:n].nonzero().squeeze(1)
        after = [*before, name]
        parts = rest.tensor_split(-(-len(rest) // size)) if len(rest) else ()  # of equal size, to share the work evenly
        if self._begin(name) == len(parts):
            return
        first = self.verdicts.done[name]
        with Bar(f"{self.title}, {name}", cost * len(rest)) as bar:
            jobs = [(name, fast, self.x[rows], self.y[rows], settings, self.protocol, self.settings.seed) for rows in parts[first:]]
            bar.at(cost * sum(map(len, parts[:first])))
            bar.show({"batches": first, "robust_acc": int(self.verdicts.robust_under(after)[:n].sum()) / n})
            shared = self.workers > 1 and len(jobs) > 1
            fast.count = None if shared else bar.advance
            results = _shared(jobs, self.workers) if shared else map(_attack, jobs)
            for i, (rows, (adversarial, messages, seconds)) in enumerate(zip(parts[first:], results, strict=True), first):
                self._add_flags(messages)
                self._finish(name, i, rows, self._verdicts(name, adversarial, rows), seconds)
                bar.at(cost * sum(map(len, parts[: i + 1])))
                bar.show({"batches": i + 1, "robust_acc": int(self.verdicts.robust_under(after)[:n].sum()) / n})
            fast.count = None
            bar.line(self._summary(name, self.verdicts.robust_under(after)[:n]))

    def _add_flags(self, messages: list[str]) -> None:
        self.verdicts.flags += [message for message in messages if message not in self.verdicts.flags]

    def _begin(self, name: str) -> int:
        """How many batches of an attack are done."""
        self.verdicts.robust.setdefault(name, torch.full_like(self.y, NOT_ATTACKED, dtype=torch.int8))
        self.verdicts.found.setdefault(name, torch.full((len(self.y), 2), torch.nan, dtype=torch.float64, device=self.y.device))
        return self.verdicts.done.setdefault(name, 0)

    def _verdicts(self, name: str, adversarial: Tensor, rows: Tensor) -> Tensor:
        """Whether each example is still classified correctly; an image outside its ball or [0, 1] breaks nothing, but is recorded.

        Of the first image with which this attack breaks an example, how far it is from the example.
        """
        beyond = ball_violation(adversarial, self.x[rows], self.protocol.norm, self.protocol.radius)
        beyond *= (adversarial != self.x[rows]).flatten(1).any(1)  # an attack that found nothing returns the image as it was
        self.verdicts.excess = max(self.verdicts.excess, float(beyond.max()))
        prediction = predictions(self.network, adversarial, self.settings.batch_size)
        self.verdicts.lost[rows] |= (prediction == NO_CLASS) & (beyond <= SLACK)
        robust = (prediction == self.y[rows]) | (beyond > SLACK)
        found = self.verdicts.found[name]
        new = ~robust & found[rows, 0].isnan()
        if new.any():
            found[rows[new]] = distortion.measured(adversarial[new], self.x[rows[new]])
        return robust

    def _finish(self, name: str, batch: int, rows: Tensor, robust: Tensor, seconds: float) -> None:
        self.verdicts.robust[name][rows] = robust.to(torch.int8)
        self.verdicts.done[name] = batch + 1
        self.verdicts.seconds[name] = self.verdicts.seconds.get(name, 0.0) + seconds
        if self.file:
            self.verdicts.save(self.file)

    def _summary(self, name: str, robust: Tensor) -> str:
        return f"{float(robust.float().mean()):.1%} of {len(robust)} are robust ({self.verdicts.seconds.get(name, 0.0):.1f} s)"
