"""Typed, validated settings of a profile (`params/<profile>.yaml`).

`load` reports every problem at once, each with file, key path and what is allowed, before anything runs. What it returns
is immutable. All perturbation budgets and attack steps are distances in [0, 1] pixels; chain steps and image noise are in
the internal range [-1, 1], as the JEM family states them.
"""

from __future__ import annotations

import difflib
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict, ValidationError, model_validator

from ebjdat import registry, yamlfile
from ebjdat.errors import UserError, brief
from ebjdat.files import digest
from ebjdat.pixels import Budget, unit_distance

RUN_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
NAME_PATTERN = r"^[A-Za-z][A-Za-z0-9_-]*$"
PROTOCOL_PATTERN = r"^[a-z][a-z0-9_]*$"  # part of metric names
STANDARD = "standard"  # the protocol whose figures stand first
BINARY = "standard_binary"  # what stands for it where there are two or three classes
RELEASED = "released"  # the paper's own evaluation
LONGEST = 100  # characters of a name: of folders, with more added to it (a file system takes 255 bytes), and in MLflow
LONGEST_RUN = 150  # characters of a run's name: the profile's, and that of every override
RESERVED = "pretraining"  # the folder of shared pretrainings beside those of experiments

MOST_PROBLEMS = 50  # that are listed; one slip in a profile's common part may make many


class ParamsError(UserError):
    """Everything that is wrong with a profile, one problem per line."""


def prefix_of(protocol: str) -> str:
    """What the names of a protocol's results begin with: nothing for the standard one."""
    return "" if protocol == STANDARD else f"{protocol}_"


def nearest(name: str, allowed: Sequence[str]) -> str:
    """Sentence that names the nearest allowed name, if one is near, and all of them."""
    close = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
    return (f"did you mean {close[0]!r}? " if close else "") + f"allowed: {', '.join(sorted(allowed)[:MOST_PROBLEMS])}"


def shown(value: Any) -> str:
    """A value as a message quotes it: on one line, ASCII, at most 80 characters."""
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def known(names: Mapping[str, object]) -> AfterValidator:
    def check(value: str) -> str:
        if value not in names:
            raise ValueError(f"{shown(value)} is unknown; {nearest(value, list(names))}")
        return value

    return AfterValidator(check)


def refuse_non_number(value: Any) -> Any:
    if isinstance(value, bool | str):
        raise ValueError(f"a number is allowed, found {shown(value)}")
    return value


def read_switch(value: Any) -> Any:
    """YAML's yes, no, on and off; in quotes they are text."""
    if isinstance(value, yamlfile.Word):
        return value.truth
    if not isinstance(value, bool):
        raise ValueError(f"a valid boolean is true or false, found {shown(value)}")
    return value


def one_printable_line(value: str) -> str:
    if not value.isprintable():
        raise ValueError(f"printable characters on one line are allowed, found {shown(value)}")
    return value


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


# Upper bounds refuse what cannot be meant before it runs out of memory or time; no honest profile meets them.
MOST = 10**8  # images, iterations
LARGEST = 1e30  # real numbers; single precision ends at 3e38
Number = BeforeValidator(refuse_non_number)
StrictBool = Annotated[bool, Strict(), BeforeValidator(read_switch)]
Count = Annotated[int, Number, Field(ge=1, le=MOST)]
TwoOrMore = Annotated[int, Number, Field(ge=2, le=MOST)]  # a spread needs two
CountOrZero = Annotated[int, Number, Field(ge=0, le=MOST)]
Few = Annotated[int, Number, Field(ge=1, le=1000)]  # layers, threads, restarts
Steps = Annotated[int, Number, Field(ge=1, le=100_000)]  # gradients, one after another
Batch = Annotated[int, Number, Field(ge=1, le=1_000_000)]  # images at once
Epochs = Annotated[int, Number, Field(ge=0, le=100_000)]
RandomSeed = Annotated[int, Number, Field(ge=0, lt=2**32)]  # scikit-learn takes no larger ones
Positive = Annotated[float, Number, Field(gt=0, le=LARGEST)]
NotNegative = Annotated[float, Number, Field(ge=0, le=LARGEST)]
Signed = Annotated[float, Number, Field(ge=-LARGEST, le=LARGEST)]
Line = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(one_printable_line)]
FilePath = Line
Label = Annotated[str, Field(min_length=1, max_length=LONGEST), AfterValidator(one_printable_line)]
Fraction01 = Annotated[float, Number, Field(ge=0, le=1)]
Epsilon = Annotated[Budget, Field(gt=0, le=1)]
EntryName = Annotated[str, Field(pattern=NAME_PATTERN, max_length=LONGEST)]
ProtocolName = Annotated[str, Field(pattern=PROTOCOL_PATTERN, max_length=LONGEST)]
Norm = Literal["Linf", "L2"]


class DataSettings(Settings):
    source: Annotated[str, known(registry.SOURCES)]
    label: Label | None = None  # how the data set is called in tables; default: the source's name
    path: FilePath | None = None  # source folder: a folder or archive of class folders
    size: Annotated[int, Number, Field(ge=8, le=1024)] | None = None  # source folder: scale the shorter side to it, crop the centre
    channels: Annotated[Literal[1, 3], Number] | None = None  # source folder: read all as grey or RGB; None: grey where all files are
    background: Annotated[int, Number, Field(ge=0, le=255)] = 255  # source folder: grey level under transparent pixels
    classes: tuple[str, ...] | None = None  # source folder: class folders in the order of their labels; None: see docs/data.md
    follow_links: StrictBool = False  # source folder: also links that lead out of it, and not into this repository's DVC cache
    root: FilePath = "datasets"  # where torchvision's sets are kept and downloaded to when missing
    test: Count | None = None  # digits: images held out for testing
    validation: Count  # images held out of training to select checkpoints
    n_train: Count | None = None  # use only so many training images (stratified), after the validation split
    n_test: Count | None = None  # keep only so many test images
    split_seed: RandomSeed = 0  # the splits never depend on a run's seed

    @property
    def name(self) -> str:
        return self.label or self.source

    @property
    def record(self) -> registry.Source:
        """What is known of the source without reading the data."""
        return registry.SOURCES[self.source]

    def training_size(self) -> int | None:
        """Training images, where that is known without reading the data."""
        if self.record.train is None:
            return self.n_train
        total = self.record.train - (self.test or 0) - self.validation
        return total if self.n_train is None else min(self.n_train, total)

    def test_size(self) -> int | None:
        """Test images, where that is known without reading the data."""
        return min(filter(None, (self.test or self.record.test, self.n_test)), default=None)

    @model_validator(mode="after")
    def consistent(self) -> Self:
        if "path" in self.record.reads and not self.path:
            raise ValueError(f"source {self.source!r} needs `path`, a folder or archive (.tar.xz, .tar.gz, .zip) of class folders")
        for name in ("size", "channels", "background", "classes", "follow_links"):
            if name not in self.record.reads and getattr(self, name) != type(self).model_fields[name].default:
                readers = " or ".join(repr(source) for source, record in registry.SOURCES.items() if name in record.reads)
                raise ValueError(f"`{name}` is for source {readers}; images of {self.source!r} are read one way")
        if self.record.test == 0 and not self.test:
            raise ValueError(f"source {self.source!r} needs `test`, how many of its {self.record.train} images are held out for testing")
        if self.record.test != 0 and self.test:
            raise ValueError(f"`test` is not for source {self.source!r}, which has its own test split; limit that with `n_test`")
        size = self.training_size()
        if size is not None and size < 1:
            raise ValueError("`test` and `validation` leave no training images")
        return self


class ModelSettings(Settings):
    depth: Few = 28  # 6 n + 4
    width: Few = 10
    norm: Literal["none", "batch"] = "batch"
    negative_slope: Fraction01 = 0.2  # leaky ReLU
    variant: Literal["wrn", "jem"] = "wrn"  # the published network, or that of the JEM family's code (models/wrn.py)

    @property
    def title(self) -> str:
        return f"WRN-{self.depth}-{self.width}" + (" (jem)" if self.variant == "jem" else "")

    @model_validator(mode="after")
    def six_n_plus_four(self) -> Self:
        if self.depth < 10 or (self.depth - 4) % 6:
            raise ValueError(f"depth {self.depth}: a wide residual network has 6 n + 4 layers (10, 16, 22, 28, ...)")
        return self


class OptimizerSettings(Settings):
    name: Annotated[str, known(registry.OPTIMIZERS)] = "sgd"
    lr: Positive
    momentum: Annotated[float, Number, Field(ge=0, lt=1)] = 0.9  # adam: its first beta
    weight_decay: NotNegative = 0.0


class ScheduleSettings(Settings):
    name: Annotated[str, known(registry.SCHEDULES)] = "multistep"
    warmup: CountOrZero = 0  # iterations
    milestones: tuple[Count, ...] = ()  # epochs
    factor: Positive = 0.2
    peak: Fraction01 = 0.3  # onecycle: fraction of training at which the rate is highest


class ChainSettings(Settings):
    sampler: Annotated[str, known(registry.SAMPLERS)] = "pyld"
    start: Annotated[str, known(registry.STARTS)] = "class_gaussians"
    conditional: StrictBool = False  # walk down E(x, y) of the chain's class instead of E(x)
    steps: Steps = 10  # full gradients per draw
    inner_steps: Steps = 5  # pyld: steps through the stem per full gradient
    step_size: Positive = 0.2  # internal range
    noise: NotNegative = 0.0  # internal range, standard deviation per full gradient
    clamp: Positive | None = 1.0  # clipped_sgld, pyld: gradients are clamped to [-clamp, clamp]
    mode: Literal["train", "eval"] = "train"  # batch-norm statistics while sampling
    buffer: Count = 10_000  # images in the replay buffer
    reinit: Fraction01 = 0.05  # chance that a chain starts afresh


class AdversarySettings(Settings):
    score: Annotated[str, known(registry.SCORES)] = "ce"
    norm: Norm = "Linf"
    eps: Epsilon
    steps: Steps = 10
    step_size: Epsilon
    range: Literal["unit", "internal"] = "unit"  # pixels that eps and step_size are stated in; internal: half as far, as released
    start: Literal["uniform", "gaussian", "clean"] = "uniform"  # in the ball; or 0.001 N(0, 1) in [0, 1] pixels (TRADES); or at x
    project: StrictBool = True  # back into the eps-ball after each step; the released code does not
    mode: Literal["train", "eval"] = "train"  # batch-norm statistics while attacking

    @model_validator(mode="after")
    def step_within(self) -> Self:
        if self.step_size > 2 * self.eps:
            raise ValueError(f"step_size {self.step_size:.4g} is more than the diameter 2 eps = {2 * self.eps:.4g}")
        if self.score == "kl" and self.start == "clean":
            raise ValueError("score 'kl' has no gradient at the clean image; start 'uniform' or 'gaussian' is allowed")
        return self


class WeightSettings(Settings):
    w1: NotNegative = 1.0  # log p(x)
    w2: Signed = 1.0  # energy alignment; negative raises E(adversarial) over E(clean), as the released code does
    w3: NotNegative = 1.0  # cross-entropies
    # clean images of the energy alignment: those that the neighbours are of, or those of the p(x) term, as the released code does
    align: Literal["paired", "density"] = "paired"
    beta: NotNegative = 6.0  # trades: weight of the KL term
    energy_l2: NotNegative = 0.0  # mean squared energy of images and chains


class AugmentSettings(Settings):
    pad: Annotated[int, Number, Field(ge=0, le=1000)] = 4  # reflect-pad, then crop at random
    flip: StrictBool = False
    noise: NotNegative = 0.03  # on the images of the p(x) term, internal range, standard deviation
    labelled_noise: NotNegative = 0.0  # the same on those of the p(y|x) terms; neighbours are of the noisy ones
    density: Literal["augmented", "plain"] = "augmented"  # images of the p(x) term; plain: neither cropped nor flipped (SADA-JEM)

    @property
    def changes(self) -> bool:
        """Whether images are cropped or flipped at all."""
        return bool(self.pad or self.flip)


class SelectionSettings(Settings):
    score: Literal["clean", "robust", "clean_and_robust"] | None = None  # None: the method's own
    after: Fraction01 = 0.0  # checkpoints compete after this fraction of the epochs


class UpdateSettings(Settings):
    name: Annotated[str, known(registry.UPDATES)] = "plain"
    rho: Positive = 2.0  # sam: radius in weight space
    adaptive: StrictBool = True  # sam: radius relative to each weight's size


class Rung(Settings):
    """One change that a diverged training is continued with.

    by: lr and steps are multiplied by it (steps are rounded up), energy_l2 becomes at least it; a new noise seed needs none.
    """

    change: Literal["seed", "lr", "steps", "energy_l2"]
    by: Positive | None = None

    @model_validator(mode="after")
    def complete(self) -> Self:
        if (self.change == "seed") != (self.by is None):
            raise ValueError("'seed' takes no `by`" if self.change == "seed" else f"{self.change!r} needs `by`")
        if self.change == "lr" and self.by is not None and self.by >= 1:
            raise ValueError(f"`by` is {self.by}: a lower rate is meant, so less than 1 is allowed")
        if self.change == "steps" and self.by is not None and self.by <= 1:
            raise ValueError(f"`by` is {self.by}: more chain steps are meant, so more than 1 is allowed")
        return self


LADDER = (
    Rung(change="seed"),
    Rung(change="lr", by=0.1),
    Rung(change="lr", by=0.1),
    Rung(change="steps", by=2),
    Rung(change="energy_l2", by=0.01),
)


class HealingSettings(Settings):
    """When a training counts as diverged, and what is changed then, one rung per recovery; changes add up."""

    mode: Literal["heal", "record"] = "heal"  # record: note the first collapse and go on, as an ablation wants it
    every: Annotated[int, Number, Field(ge=1, le=100)] = 50  # steps between checks
    energy: Positive = 1e5  # bound of |mean energy| of images and chains
    gap: Positive = 1e3  # bound of |mean E(clean) - mean E(chains)| and |mean E(clean) - mean E(adversarial)|
    cross_entropy: Positive = 3.0  # bound on clean images, in units of log K, the cross-entropy of a guess
    saturation: Fraction01 = 0.9  # bound of the share of chain pixels at the range's ends, over that of images
    contrast: NotNegative = 0.1  # least spread of pixels within a chain, as a fraction of images'
    diversity: NotNegative = 0.1  # least spread of a pixel across chains, as a fraction of images'
    ladder: tuple[Rung, ...] = LADDER


class ComputeSettings(Settings):
    """How a training step is computed. All of it changes results, some only by rounding, so it counts among what determines them."""

    # fp32: as it says, also on a GPU; tf32: its products in TF32 there; bf16: layers by autocast, with weights, logits, energies,
    # losses and images in fp32
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    # slices of a batch, one after another, for less memory; batch norm has statistics of each slice, and counts each
    accumulate: Count = 1
    recompute: StrictBool = False  # activation checkpointing in the loss: less memory for a third more of its time
    compile: StrictBool = False  # torch.compile; where it fails, the step runs without

    @model_validator(mode="after")
    def one_of_two(self) -> Self:
        if self.recompute and self.compile:
            raise ValueError("torch cannot compile recomputed blocks whose statistics count once; recompute or compile is allowed")
        return self


class TrainingSettings(Settings):
    epochs: Epochs  # over the labelled images
    batch_size: Batch
    density_batch: Literal["labelled", "own"] = "labelled"  # images of the p(x) term: the labelled ones, or of a shuffle of their own
    density_batch_size: Batch | None = None  # own: how many, and how many chains; None: batch_size
    optimizer: OptimizerSettings
    schedule: ScheduleSettings = ScheduleSettings()
    update: UpdateSettings = UpdateSettings()
    ema: Annotated[float, Number, Field(gt=0, lt=1)] | None = None  # decay of averaged weights, evaluated beside the raw ones
    weights: WeightSettings = WeightSettings()
    chain: ChainSettings = ChainSettings()
    adversary: AdversarySettings
    augment: AugmentSettings = AugmentSettings()
    selection: SelectionSettings = SelectionSettings()
    healing: HealingSettings = HealingSettings()
    compute: ComputeSettings = ComputeSettings()

    @property
    def own_density(self) -> int | None:
        """Images of the p(x) term in a step, where they are drawn for themselves."""
        return (self.density_batch_size or self.batch_size) if self.density_batch == "own" else None

    @property
    def chains(self) -> int:
        """Chains that a step moves: one per image of the p(x) term."""
        return self.own_density or self.batch_size

    @model_validator(mode="after")
    def slices_are_equal(self) -> Self:
        if self.density_batch_size and self.density_batch != "own":
            raise ValueError("density_batch_size is for density_batch 'own'; the labelled images are batch_size many")
        for name, size in (("batch_size", self.batch_size), ("density_batch_size", self.chains)):
            if size % self.compute.accumulate:
                raise ValueError(f"{name} {size} is no multiple of compute.accumulate {self.compute.accumulate}")
        return self

    @model_validator(mode="after")
    def milestones_within(self) -> Self:
        late = [m for m in self.schedule.milestones if self.epochs and m >= self.epochs]
        if self.schedule.name == "multistep" and late:
            raise ValueError(f"schedule.milestones {late} lie at or after the last epoch ({self.epochs})")
        return self


class MethodSettings(Settings):
    """A method, the rows of settings it stands on, and what differs from them."""

    method: Annotated[str, known(registry.METHODS)] = "classifier"
    base: Annotated[str, known(registry.BASES)] | None = None  # None: the method's first
    form: Annotated[str, known(registry.FORMS)] | None = None  # None: the method's first
    training: dict[str, Any] = {}  # overrides

    @model_validator(mode="after")
    def rows_of_the_method(self) -> Self:
        method = registry.METHODS[self.method]
        for name, value, allowed in (("base", self.base, method.bases), ("form", self.form, method.forms)):
            if value is not None and value not in allowed:
                raise ValueError(f"method {self.method!r} has no {name} {value!r}; allowed: {', '.join(allowed) or 'none'}")
        return self


class Pretraining(MethodSettings):
    """A training that several experiments may start from; epochs 0 is the fresh, seeded initialisation."""

    epochs: Epochs
    model: dict[str, Any] = {}  # overrides of the profile's network, for every experiment that starts from here


class Experiment(MethodSettings):
    method: Annotated[str, known(registry.METHODS)]
    pretraining: str
    note: str | None = None  # shown in the report


class PGDSettings(Settings):
    """PGD-n on cross-entropy (Madry et al. 2018) from random starts in the ball."""

    steps: Steps = 20
    step_size: Epsilon  # in the protocol's range
    restarts: Few = 1


class EnsembleSettings(Settings):
    """One attack of an ensemble. Each reads what registry.ATTACKS says of it."""

    steps: Steps = 100
    targets: Count = 9  # classes aimed at, in the order of the logits; never more than there are
    queries: Count = 5000
    range: Literal["unit", "internal"] = "unit"  # pixels FAB works in; its box is [0, 1] of them, internal: the brighter half


class ProtocolSettings(Settings):
    """How robustness is measured: data that name one column of the report."""

    like: Annotated[str, known(registry.PROTOCOLS)] | None = None  # the row it stands on; None: the one of its own name
    norm: Norm = "Linf"
    eps: Epsilon
    range: Literal["unit", "internal"] = "unit"  # pixels that eps and step sizes are stated in; internal: half as far, as released
    noise: NotNegative = 0.0  # on the images before they are classified or attacked; internal range, standard deviation
    noise_on: dict[Annotated[str, known(registry.BASES)], NotNegative] = {}  # instead, for experiments on this row of the JEM family
    n: CountOrZero  # the first n test examples meet the ensemble; 0: none. PGD meets the whole split
    pgd: PGDSettings
    attacks: dict[Annotated[str, known(registry.ATTACKS)], EnsembleSettings]

    @property
    def radius(self) -> float:
        """Radius of the ball in [0, 1] pixels."""
        return self.eps if self.range == "unit" else unit_distance(self.eps)

    @property
    def pgd_step(self) -> float:
        """Step size of PGD in [0, 1] pixels."""
        return self.pgd.step_size if self.range == "unit" else unit_distance(self.pgd.step_size)

    def on(self, base: str | None) -> ProtocolSettings:
        """The protocol as an experiment on this base meets it: with one noise. None: a network that stands on none."""
        return self.model_copy(update={"noise": self.noise_on.get(base or "", self.noise), "noise_on": {}})

    @model_validator(mode="after")
    def sensible(self) -> Self:
        if self.pgd.step_size > 2 * self.eps:
            raise ValueError(f"pgd.step_size {self.pgd.step_size:.4g} is more than the diameter 2 eps = {2 * self.eps:.4g}")
        for name, attack in self.attacks.items():
            usual = EnsembleSettings()
            unread = [
                k
                for k in EnsembleSettings.model_fields
                if k not in registry.ATTACKS[name].reads and getattr(attack, k) != getattr(usual, k)
            ]
            if unread:
                raise ValueError(f"attacks.{name} does not read {', '.join(unread)}; it reads {', '.join(registry.ATTACKS[name].reads)}")
        return self


def usual_protocols(n: int, overrides: Sequence[str] = ()) -> AttackSettings:
    """The field's protocols for natural images (L-infinity 8/255, L2 0.5) and the released one, for networks without a profile.

    n: images that each ensemble meets. overrides: YAML files or key.path=value of an AttackSettings.
    """
    raw: dict[str, Any] = {
        "protocols": {
            STANDARD: {"eps": "8/255", "pgd": {"step_size": "2/255"}, "n": n},
            "released": {"eps": "8/255", "pgd": {"step_size": "1/255"}, "n": n},
            "standard_l2": {"like": STANDARD, "norm": "L2", "eps": 0.5, "pgd": {"step_size": 0.1}, "n": n},
        }
    }
    raw = merge(raw, *(content for _, content in read_layers(None, overrides)))
    problems = [f"{_key_path(where)}: {what}" for where, what in _invalid(AttackSettings, raw, ())]
    if problems:
        raise ParamsError("\n".join(problems))
    return AttackSettings.model_validate(raw)


def too_few_classes(settings: AttackSettings, classes: int) -> str | None:
    """Which protocols' ensembles cannot be run on so few classes, and what works; None where all can."""
    wrong = [
        f"protocol {name!r}: {attack} needs at least {registry.FEWEST_CLASSES[attack]} classes, here are {classes}; set its n to 0"
        for name, protocol in settings.protocols.items()
        for attack in (protocol.attacks if protocol.n else ())
        if classes < registry.FEWEST_CLASSES.get(attack, 0)
    ]
    if not wrong:
        return None
    eps, step = settings.standard.radius, settings.standard.pgd_step
    works = f"protocols.{BINARY}={{eps: {eps:.6g}, pgd: {{step_size: {step:.6g}}}, n: {settings.standard.n or 1000}}}"
    return f"{'; '.join(wrong)}; in their place works {works} (APGD-CE, FAB, Square)"


def with_rows(protocols: Any) -> Any:
    """Protocols as they stand in a profile, each merged over the row that it stands on; null leaves a protocol or an attack out."""
    if not isinstance(protocols, Mapping):
        return protocols
    merged: dict[Any, Any] = {}
    for name, entry in protocols.items():
        like = _mapping(entry).get("like")
        row = registry.PROTOCOLS.get(str(like or name))
        if entry is None:
            continue
        if not isinstance(entry, Mapping):
            merged[name] = entry
        elif row is None and like:
            raise ValueError(f"protocol {name!r}: `like` {like!r} is unknown; {nearest(str(like), list(registry.PROTOCOLS))}")
        elif row is None:
            raise ValueError(f"protocol {name!r} needs `like`, the row that it stands on; allowed: {', '.join(registry.PROTOCOLS)}")
        else:
            whole = merge(row.defaults, entry)
            attacks = whole["attacks"]
            for attack in _mapping(attacks):
                if attack not in registry.ATTACKS:
                    raise ValueError(f"protocol {name!r}: attack {attack!r} is unknown; {nearest(str(attack), list(registry.ATTACKS))}")
            merged[name] = (
                {**whole, "attacks": {k: v for k, v in attacks.items() if v is not None}} if isinstance(attacks, Mapping) else whole
            )
    return merged


class CheckSettings(Settings):
    """Integrity checks of an evaluation: how many examples they take, and how hard they try."""

    n: Count = 100  # the first n test examples
    sweep: tuple[Positive, ...] = (0.25, 0.5, 1.0, 1.5, 2.0, 4.0)  # radii of the sweep, in units of the standard protocol's
    steps: Steps = 100  # of the stronger PGD
    restarts: Few = 3


class ReferenceSettings(Settings):
    experiment: str = "classifier"
    seed: RandomSeed = 0


class AttackSettings(Settings):
    protocols: Annotated[dict[ProtocolName, ProtocolSettings], BeforeValidator(with_rows)]
    checks: CheckSettings = CheckSettings()
    transfer: ReferenceSettings | None = ReferenceSettings()  # whose adversarial examples are tried on every other model
    search: Literal["fp32", "bf16"] = "fp32"  # arithmetic of the ensemble's search; fp32 decides every verdict
    seed: RandomSeed = 0
    batch_size: Batch = 250

    @property
    def standard(self) -> ProtocolSettings:
        return self.protocols[STANDARD]

    def on(self, base: str | None) -> AttackSettings:
        """The settings with every protocol as an experiment on this base meets it."""
        return self.model_copy(update={"protocols": {name: protocol.on(base) for name, protocol in self.protocols.items()}})

    @model_validator(mode="after")
    def has_standard(self) -> Self:
        if STANDARD not in self.protocols:
            raise ValueError(f"protocols: {STANDARD!r} is missing; every result is reported under it")
        for name in registry.PROTOCOLS:
            row, found = registry.PROTOCOLS[name].defaults, self.protocols.get(name)
            kept = {k: EnsembleSettings.model_validate(attack) for k, attack in row["attacks"].items()}
            meant = (row["norm"], row["range"], row["noise"], row.get("noise_on", {}), row["pgd"]["steps"], 1, kept)
            is_so = found and (found.norm, found.range, found.noise, found.noise_on, found.pgd.steps, found.pgd.restarts, found.attacks)
            if found and is_so != meant:
                raise ValueError(
                    f"protocols.{name}: norm, range, noise, noise_on, pgd.steps, pgd.restarts and attacks are what its name means; "
                    f"add a protocol `like: {name}`"
                )
        if "ema" in self.protocols:
            raise ValueError("protocols: results of averaged weights are named ema_...; use another name")
        return self


class SampleProtocolSettings(Settings):
    """Which samples are measured, and against which images; the name is part of the results' names."""

    like: Annotated[str, known(registry.SAMPLE_PROTOCOLS)] | None = None  # the row it stands on; None: the one of its own name
    source: Literal["fresh", "conditional", "buffer"]  # chains down E(x); chains down E(x, y); the training's replay buffer
    select: Annotated[float, Number, Field(gt=0, le=1)] = 1.0  # most confident fraction of each predicted class; 1: no selection
    against: Literal["train", "all"] = "train"  # all: validation and test images too


def with_sample_rows(protocols: Any) -> Any:
    """Every row of registry.SAMPLE_PROTOCOLS, then a profile's own protocols, each over its row; a null protocol is left out."""
    if not isinstance(protocols, Mapping):
        return protocols
    merged: dict[Any, Any] = {name: dict(row.defaults) for name, row in registry.SAMPLE_PROTOCOLS.items()}
    for name, entry in protocols.items():
        row = registry.SAMPLE_PROTOCOLS.get(str(_mapping(entry).get("like") or name))
        if entry is None:
            merged.pop(name, None)
        elif isinstance(entry, Mapping) and row is None:
            raise ValueError(f"protocol {name!r} needs `like`, the row that it stands on; allowed: {', '.join(registry.SAMPLE_PROTOCOLS)}")
        else:
            merged[name] = merge(row.defaults, entry) if row and isinstance(entry, Mapping) else entry
    return merged


class GenerateSettings(Settings):
    n: TwoOrMore  # fresh chains
    steps: Steps  # full gradients per fresh chain
    extractor: Literal["inception", "reference", "auto"] = "reference"
    inception_weights: FilePath | None = None  # a file; None: torch-fidelity's own download
    reference: ReferenceSettings = ReferenceSettings()
    grid: Few = 10  # images per class in the grid
    seed: RandomSeed = 0
    batch_size: Batch = 250
    protocols: Annotated[dict[ProtocolName, SampleProtocolSettings], BeforeValidator(with_sample_rows)] = Field(
        default={}, validate_default=True
    )

    @model_validator(mode="after")
    def names_mean_what_they_say(self) -> Self:
        if STANDARD not in self.protocols:
            raise ValueError(f"protocols: {STANDARD!r} cannot be left out; every result is reported under it")
        if "ema" in self.protocols:
            raise ValueError("protocols: results of averaged weights are named ema_...; use another name")
        for name, row in registry.SAMPLE_PROTOCOLS.items():
            if name in self.protocols and self.protocols[name].model_dump(exclude={"like"}) != row.defaults:
                raise ValueError(f"protocols.{name}: its values are what its name means; add a protocol `like: {name}`")
        return self


class EnergySettings(Settings):
    n: TwoOrMore | None = None  # first n test images; None: all
    batch_size: Batch = 250


AUTO = "auto"  # the OOD sets that suit the data and are there


def one_or_more(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


class ReliabilitySettings(Settings):
    """Calibration, and detection of out-of-distribution and of adversarial images."""

    n: TwoOrMore | None = None  # first n test images; None: all
    bins: Annotated[int, Number, Field(ge=1, le=10_000)] = 15  # of the calibration error, equally wide
    ood: Annotated[tuple[Annotated[str, known({AUTO: None, **registry.OOD_SETS})], ...], BeforeValidator(one_or_more)] = (AUTO,)
    ood_path: FilePath | None = None  # set folder: a folder or archive of class folders, as data.path
    seed: RandomSeed = 0
    batch_size: Batch = 250

    @model_validator(mode="after")
    def consistent(self) -> Self:
        if AUTO in self.ood and len(self.ood) > 1:
            raise ValueError(f"`ood` is {AUTO!r} or a list of sets, not both")
        if "folder" in self.ood and not self.ood_path:
            raise ValueError("ood 'folder' needs `ood_path`, a folder or archive (.tar.xz, .tar.gz, .zip) of class folders")
        if self.ood_path and not {"folder", AUTO} & set(self.ood):
            raise ValueError("`ood_path` is for ood 'folder', which is not in `ood`")
        return self


class Evaluation(Settings):
    attack: AttackSettings
    generate: GenerateSettings
    energy: EnergySettings = EnergySettings()
    reliability: ReliabilitySettings = ReliabilitySettings()


class Runtime(Settings):
    """How it is run; nothing here changes a result beyond the arithmetic of the machine."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Few = 1
    checkpoint_minutes: Positive = 5.0


class ReportSettings(Settings):
    paper: Literal["cifar10", "cifar100", "imagenet_subset"] | None = None  # whose numbers stand beside ours


class Profile(Settings):
    data: DataSettings
    model: ModelSettings
    training: TrainingSettings
    bases: dict[Annotated[str, known(registry.BASES)], dict[str, Any]] = {}  # this profile's values of the JEM family's rows
    pretraining: dict[EntryName, Pretraining] = Field(min_length=1, max_length=1000)
    experiments: dict[EntryName, Experiment] = Field(min_length=1, max_length=1000)
    seeds: tuple[RandomSeed, ...] = Field(min_length=1, max_length=1000)
    evaluation: Evaluation
    runtime: Runtime = Runtime()
    report: ReportSettings = ReportSettings()

    def pretraining_settings(self, name: str) -> TrainingSettings:
        entry = self.pretraining[name]
        return self._training(entry, {"epochs": entry.epochs})

    def training_settings(self, experiment: str) -> TrainingSettings:
        return self._training(self.experiments[experiment])

    def _training(self, entry: MethodSettings, *more: Mapping[str, Any]) -> TrainingSettings:
        layers = training_layers(self.training.model_dump(), self.bases, entry.method, entry.base, entry.form, entry.training)
        return TrainingSettings.model_validate(merge(*layers, *more))

    def model_settings(self, pretraining: str) -> ModelSettings:
        """The network of a pretraining and of every experiment that starts from it."""
        return ModelSettings.model_validate(merge(self.model.model_dump(), self.pretraining[pretraining].model))

    def attack_settings(self, experiment: str) -> AttackSettings:
        """What the experiment's robustness is measured with."""
        entry = self.experiments[experiment]
        return self.evaluation.attack.on(base_of(entry.method, entry.base))

    def resolved(self, experiment: str) -> dict[str, Any]:
        """Everything that determines an experiment's results, except its seed, with defaults filled in and overrides applied."""
        entry = self.experiments[experiment]
        pretraining = self.pretraining[entry.pretraining]
        settings = self.pretraining_settings(entry.pretraining)
        return {
            "data": self.data.model_dump(exclude={"path", "root", "label"}),
            "model": self.model_settings(entry.pretraining).model_dump(),
            "pretraining": {"method": pretraining.method, **settings.model_dump()} if pretraining.epochs else {"epochs": 0},
            "method": entry.method,
            "training": self.training_settings(experiment).model_dump(),
            "evaluation": self.evaluation.model_dump(),
        }

    def params_hash(self, experiment: str, seed: int) -> str:
        return digest(self.resolved(experiment), seed)[:16]


def base_of(method: str, base: str | None) -> str | None:
    """The row of the JEM family that a method stands on: the one that was asked for, or its first, if it has any."""
    bases = registry.METHODS[method].bases
    return base or (bases[0] if bases else None)


def form_of(method: str, form: str | None) -> str | None:
    """The form of a method: the one that was asked for, or its first, if it has any."""
    forms = registry.METHODS[method].forms
    return form or (forms[0] if forms else None)


def form_values(form: str, base: str | None) -> dict[str, Any]:
    """Settings of a form on a row of the JEM family."""
    row = registry.FORMS[form]
    return merge(row.defaults, row.on.get(base or "", {}))


def section_names(profile: Profile, job: Mapping[str, str]) -> dict[str, str]:
    """A workflow job's wildcards and "base", by which rules name the sections of the profile that they read."""
    entry: MethodSettings | None = None
    if "experiment" in job:
        entry = profile.experiments[job["experiment"]]
    elif "pretraining" in job:
        entry = profile.pretraining[job["pretraining"]]
    return {**job, "base": (entry and base_of(entry.method, entry.base)) or "none"}


def section(raw: Mapping[str, Any], path: str) -> Any:
    """What stands at "a.b.c" of raw settings; None where nothing does."""
    value: Any = raw
    for key in path.split("."):
        value = _mapping(value).get(key)
    return value


def training_layers(
    training: Mapping[str, Any],
    bases: Mapping[str, Mapping[str, Any]],
    method: str,
    base: str | None,
    form: str | None,
    own: Mapping[str, Any],
) -> list[Mapping[str, Any]]:
    """What a training's settings are merged from, weakest first.

    The profile's `training`, the base's published row, the profile's values for that base, the method's defaults, the form,
    and the experiment's own settings.
    """
    entry = registry.METHODS[method]
    row = base_of(method, base)
    shape = form_of(method, form)
    return [
        training,
        *([registry.BASES[row].defaults, bases.get(row, {})] if row else []),
        entry.defaults,
        *([form_values(shape, row)] if shape else []),
        own,
    ]


ROWS: Mapping[str, Mapping[str, registry.Preset]] = {"base": registry.BASES, "form": registry.FORMS}

# Chain settings that only samplers read, and those of the profile's training.chain that no training would ever see: every row
# of BASES either sets them itself or has a sampler that does not read them.
READ_BY_SAMPLERS = frozenset(key for sampler in registry.SAMPLERS.values() for key in sampler.reads)
NEVER_USED = frozenset(
    key
    for key in ("sampler", "start", "mode", *READ_BY_SAMPLERS)
    if all(
        key in row.defaults["chain"] or (key in READ_BY_SAMPLERS and key not in registry.SAMPLERS[row.defaults["chain"]["sampler"]].reads)
        for row in registry.BASES.values()
    )
)


def catalogue() -> dict[str, dict[str, dict[str, Any]]]:
    """Every strategy by kind and name: its source, its implementation, and its defaults (what a profile may override)."""

    def entries(names: Mapping[str, registry.Entry], section: type[BaseModel] | None = None) -> dict[str, dict[str, Any]]:
        defaults = section.model_construct().model_dump() if section else {}
        return {
            name: {"source": e.source, "implementation": e.target, "defaults": {key: defaults[key] for key in e.reads}}
            for name, e in names.items()
        }

    methods = {
        name: {
            "source": m.source,
            "implementation": m.target,
            "samples": list(m.samples),
            "selection": m.selection,
            "bases": list(m.bases),
            "forms": list(m.forms),
            "defaults": merge({}, *training_layers({}, {}, name, None, None, {})),
        }
        for name, m in registry.METHODS.items()
    }
    rows = {
        kind: {name: {"source": row.source, "on": flat(row.on), "defaults": dict(row.defaults)} for name, row in names.items()}
        for kind, names in (("bases", registry.BASES), ("forms", registry.FORMS))
    }
    return {
        "methods": methods,
        **rows,
        "samplers": entries(registry.SAMPLERS, ChainSettings),
        "starts": entries(registry.STARTS),
        "scores": entries(registry.SCORES),
        "updates": entries(registry.UPDATES, UpdateSettings),
        "optimizers": entries(registry.OPTIMIZERS, OptimizerSettings),
        "schedules": entries(registry.SCHEDULES, ScheduleSettings),
    }


def merge(base: Mapping[str, Any], *overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings merged key by key; the later one wins."""
    result = dict(base)
    for override in overrides:
        for key, value in override.items():
            below = result.get(key)
            result[key] = merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return result


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value
    return result


def split_overrides(text: str) -> list[str]:
    """Overrides that stand in one text (make's OVERRIDES, Snakemake's `overrides=`), as a shell would part them.

    A value with spaces is quoted: "data.path='my images.tar.xz' params/overrides/ci.yaml".
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ParamsError(f"overrides {text!r}: {error}; words are quoted as in a shell: data.path='my images.tar.xz'") from None
    for word in words:
        if "=" not in word and Path(word).suffix not in (".yaml", ".yml"):
            raise ParamsError(
                f"overrides {text!r}: {word!r} is neither key.path=value nor a YAML file; "
                "a value with spaces is quoted: data.path='my images.tar.xz'"
            )
    return words


def join_overrides(overrides: Sequence[str]) -> str:
    """What Snakemake's `overrides=` takes for these: the words, or a list where one of them would have to be quoted."""
    text = " ".join(overrides)
    return text if text == shlex.join(overrides) else json.dumps(list(overrides), ensure_ascii=False)


def read_layers(path: Path | str | None, overrides: Sequence[str] = ()) -> list[tuple[str, dict[str, Any]]]:
    """The profile, where there is one, and its overrides (a YAML file, or "key.path=value") as (where it is from, raw mapping)."""
    layers, profile = [], [] if path is None else [path]
    for i, item in enumerate(map(str, [*profile, *overrides])):
        name = f"override {shown(item)}" if "=" in item else item if item.isprintable() and 0 < len(item) < 1000 else shown(item)
        try:
            content = yamlfile.parse_assignment(item) if "=" in item else yamlfile.parse(yamlfile.read_text(Path(item)))
        except FileNotFoundError as error:
            beside = sorted(p.stem for p in Path(item).parent.glob("*.yaml") if p.stem.isprintable())
            near = f"; {nearest(Path(item).stem, beside)}" if beside else ""
            if i >= len(profile) and Path(item).suffix not in (".yaml", ".yml"):
                near = "; key.path=value or a YAML file is allowed"
            raise ParamsError(f"{name}: there is no such file{near}") from error
        except yamlfile.YamlError as error:
            raise ParamsError(f"{name}: {error}") from error
        if not isinstance(content, dict):
            found = "nothing" if content is None else type(content).__name__
            raise ParamsError(f"{name}: a mapping of settings is allowed, found {found}")
        layers.append((name, content))
    return layers


def load(path: Path | str, overrides: Sequence[str] = ()) -> Profile:
    """Read and check a profile with its overrides. Raises ParamsError that lists every problem."""
    layers = read_layers(path, overrides)
    run_name(path, overrides)  # (what is wrong with it)
    raw = merge({}, *(content for _, content in layers))
    problems = list(dict.fromkeys(chain(_without_effect(layers), _problems(raw))))
    if problems:
        lines = [f"{_origin(layers, where)}: {_key_path(where)}: {what}" for where, what in problems[:MOST_PROBLEMS]]
        more = [f"and {len(problems) - MOST_PROBLEMS} more"] if len(problems) > MOST_PROBLEMS else []
        raise ParamsError(f"{len(problems)} problem{'s' if len(problems) > 1 else ''} in the settings:\n  " + "\n  ".join(lines + more))
    return Profile.model_validate(raw)


def _key_path(where: Sequence[str | int]) -> str:
    """a.b.0, escaped where letters only look like those of a key."""
    return ascii(".".join(map(str, where)))[1:-1] or "top level"


def _without_effect(layers: Sequence[tuple[str, Mapping[str, Any]]]) -> Iterator[Problem]:
    """Empty mappings laid over settings: "change nothing" as likely as "replace by nothing"."""

    def inside(below: Mapping[str, Any], over: Mapping[str, Any], where: tuple[str | int, ...]) -> Iterator[Problem]:
        if below and not over:
            yield where, "an empty mapping over settings neither changes nor removes any; leave it out, or name what is to change"
        for key in over.keys() & below.keys():
            if isinstance(over[key], Mapping) and isinstance(below[key], Mapping):
                yield from inside(below[key], over[key], (*where, key))

    below: Mapping[str, Any] = {}
    for _, content in layers:
        yield from inside(below, content, ())
        below = merge(below, content)


Problem = tuple[tuple[str | int, ...], str]


def _problems(raw: Mapping[str, Any]) -> Iterator[Problem]:
    """Every problem of the raw settings: each section by itself first, then what sections say of each other."""
    yield from _invalid(Profile, raw, ())
    sections = {name: _section(name, raw) for name in ("data", "evaluation")}
    training = raw.get("training")
    if isinstance(training, Mapping) and not list(_invalid(TrainingSettings, training, ())):
        yield from _training_problems(raw, training, cast(DataSettings | None, sections["data"]))
    yield from _reference_problems(raw)
    data, evaluation = cast(DataSettings | None, sections["data"]), cast(Evaluation | None, sections["evaluation"])
    if data and evaluation:
        yield from _evaluation_problems(raw, data, evaluation)


def _section(name: str, raw: Mapping[str, Any]) -> BaseModel | None:
    model = cast(type[BaseModel], Profile.model_fields[name].annotation)
    try:
        return model.model_validate(raw.get(name))
    except ValidationError:
        return None


def _entries(raw: Mapping[str, Any], section: str) -> dict[str, Mapping[str, Any]]:
    entries = raw.get(section)
    return {k: v for k, v in entries.items() if isinstance(v, Mapping)} if isinstance(entries, Mapping) else {}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _training_problems(raw: Mapping[str, Any], training: Mapping[str, Any], data: DataSettings | None) -> Iterator[Problem]:
    """Problems of each training after its overrides, and of its size against the data."""
    size = data.training_size() if data else None
    bases = _entries(raw, "bases")
    trainings: list[tuple[tuple[str | int, ...], Mapping[str, Any]]] = [(("training",), training)]
    for base, values in bases.items():
        if base in registry.BASES:
            trainings.append((("bases", base), merge(training, registry.BASES[base].defaults, values)))
    for kind in ("pretraining", "experiments"):
        for name, entry in _entries(raw, kind).items():
            override = entry.get("training", {})
            method = str(entry.get("method", "classifier"))
            if not isinstance(override, Mapping) or method not in registry.METHODS:
                continue
            row, form = (str(entry.get(key)) if str(entry.get(key)) in rows else None for key, rows in ROWS.items())
            own = {"epochs": entry["epochs"]} if kind == "pretraining" and isinstance(entry.get("epochs"), int) else {}
            merged = merge(*training_layers(training, bases, method, row, form, override), own)
            trainings.append(((kind, name, "training"), merged))
            sampler = str(_mapping(merged.get("chain")).get("sampler", ChainSettings().sampler))
            reads = registry.SAMPLERS[sampler].reads if sampler in registry.SAMPLERS else tuple(READ_BY_SAMPLERS)
            for key in sorted(READ_BY_SAMPLERS & set(_mapping(override.get("chain"))) - set(reads)):
                yield (kind, name, "training", "chain", key), f"is not read by sampler {sampler!r}; it reads {', '.join(reads)}"
    mirrored = f"mirrored images of {data.source!r} are of another class or of none; allowed: false" if data else ""
    for where, settings in trainings:
        found = list(_invalid(TrainingSettings, settings, where))
        yield from found
        if data and not data.record.flip and _mapping(settings.get("augment")).get("flip") is True:
            yield (*where, "augment", "flip"), mirrored
        for key in ("batch_size", "density_batch_size"):
            batch = settings.get(key)
            if not found and size is not None and isinstance(batch, int) and batch > size:
                yield (*where, key), f"{batch} is larger than the training split ({size} images); allowed: 1 to {size}"
    for key in sorted(NEVER_USED & set(_mapping(training.get("chain")))):
        yield ("training", "chain", key), f"is never used, since every row of the JEM family sets it; set bases.<base>.chain.{key}"


def _reference_problems(raw: Mapping[str, Any]) -> Iterator[Problem]:
    pretrainings = _entries(raw, "pretraining")
    for name, entry in _entries(raw, "experiments").items():
        if name == RESERVED:
            yield ("experiments", name), "this name is kept for the shared pretrainings' folder; use another"
        wanted = entry.get("pretraining")
        if isinstance(wanted, str) and wanted not in pretrainings:
            yield ("experiments", name, "pretraining"), f"{wanted!r} is not under `pretraining`; {nearest(wanted, list(pretrainings))}"
    first: dict[str, str] = {}
    for name, entry in pretrainings.items():
        if isinstance(entry.get("training"), Mapping) and "epochs" in entry["training"]:
            yield ("pretraining", name, "training", "epochs"), f"stands one level too deep; set pretraining.{name}.epochs"
        network = merge(_mapping(raw.get("model")), _mapping(entry.get("model")))
        yield from _invalid(ModelSettings, network, ("pretraining", name, "model"))
        content = {"method": "classifier", "training": {}, **entry} if entry.get("epochs") != 0 else {"epochs": 0}
        content = {**content, "model": sorted(network.items())}
        twin = first.setdefault(repr(sorted(content.items())), name)
        if twin != name:
            yield ("pretraining", name), f"the same settings as pretraining.{twin}; name that one, so that its checkpoint is shared"
    seeds = raw.get("seeds")
    numbers = [seed for seed in seeds if isinstance(seed, int | float)] if isinstance(seeds, list) else []
    if len(set(numbers)) < len(numbers):  # 0 and 0.0 are one
        yield ("seeds",), "each seed may stand once"


def _evaluation_problems(raw: Mapping[str, Any], data: DataSettings, evaluation: Evaluation) -> Iterator[Problem]:
    test = data.test_size()
    for name, protocol in evaluation.attack.protocols.items():
        if test and protocol.n > test:
            yield ("evaluation", "attack", "protocols", name, "n"), f"{protocol.n} is more than the test split has; allowed: 0 to {test}"
    if evaluation.energy.n and test and evaluation.energy.n > test:
        yield ("evaluation", "energy", "n"), f"{evaluation.energy.n} is more than the test split has; allowed: 1 to {test}"
    if evaluation.attack.transfer is not None:
        yield from _no_such_run(raw, ("evaluation", "attack", "transfer"), evaluation.attack.transfer)
    generate = evaluation.generate
    if generate.extractor == "inception" and data.record.shape and data.record.shape[0] == 1:
        what = f"Inception is for natural images in colour; allowed for {data.source!r}: reference"
        yield ("evaluation", "generate", "extractor"), what
    if generate.extractor != "inception":
        yield from _no_such_run(raw, ("evaluation", "generate", "reference"), generate.reference)
    reliability = evaluation.reliability
    if reliability.n and test and reliability.n > test:
        yield ("evaluation", "reliability", "n"), f"{reliability.n} is more than the test split has; allowed: 2 to {test}"
    if "path" not in data.record.reads and data.source in reliability.ood:
        yield ("evaluation", "reliability", "ood"), f"{data.source!r} is what the networks are trained on; name another set"
    if data.path and reliability.ood_path == data.path:
        yield ("evaluation", "reliability", "ood_path"), "is data.path, what the networks are trained on; name another set"


def _no_such_run(raw: Mapping[str, Any], where: tuple[str, ...], wanted: ReferenceSettings) -> Iterator[Problem]:
    experiments = list(_entries(raw, "experiments"))
    if wanted.experiment not in experiments:
        yield (
            (*where, "experiment"),
            f"{wanted.experiment!r} is not an experiment of this profile; {nearest(wanted.experiment, experiments)}",
        )
    if isinstance(raw.get("seeds"), list) and wanted.seed not in raw["seeds"]:
        yield (*where, "seed"), f"{wanted.seed} is not one of the profile's seeds {shown(raw['seeds'])}"


def _invalid(model: type[BaseModel], raw: Any, prefix: tuple[str | int, ...]) -> Iterator[Problem]:
    try:
        model.model_validate(raw)
    except ValidationError as error:
        for one in error.errors(include_url=False):
            where = tuple(part for part in one["loc"] if part != "[key]")
            if one["type"] == "extra_forbidden":
                what = f"unknown key; {nearest(str(where[-1]), _fields_at(model, where[:-1]))}"
            elif one["type"] == "too_short" and one["input"]:
                continue  # pydantic counts the valid ones alone; each of the others is a problem of its own
            elif one["type"] == "missing":
                what = "is missing"
            elif one["type"] == "value_error":
                what = str(one["ctx"]["error"])
            else:
                msg = re.sub(" or instance of \\w+", "", one["msg"]).replace("tuple", "list").replace("dictionary", "mapping")
                what = f"{msg[0].lower()}{msg[1:]}, found {shown(one['input'])}"
            yield (*prefix, *where), what


def _fields_at(model: type[BaseModel], where: Sequence[str | int]) -> list[str]:
    """Field names of the settings class that lies at `where` below `model`."""
    for part in where:
        field = model.model_fields.get(str(part))
        if field is None:  # a name in a mapping such as `experiments`: stay at the class of its values
            continue
        for candidate in (field.annotation, *_all_args(field.annotation)):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                model = candidate
                break
    return list(model.model_fields)


def _all_args(annotation: Any) -> Iterator[Any]:
    for argument in get_args(annotation):
        yield argument
        yield from _all_args(argument)


def _origin(layers: Sequence[tuple[str, Mapping[str, Any]]], where: Sequence[str | int]) -> str:
    """The last layer that says something at `where`, else the first of those that say most of what is above it."""
    told, deepest = layers[0][0], 0
    for name, content in layers:
        value: Any = content
        for depth, part in enumerate(where):
            if not isinstance(value, Mapping):  # a list or plain value of this layer, which stands for all below it
                depth = len(where)
                break
            if part not in value:
                break
            value = value[part]
        else:
            depth = len(where)
        if depth > deepest or depth == len(where):
            told, deepest = name, depth
    return told


def run_name(path: Path | str, overrides: Sequence[str] = ()) -> str:
    """Name of results, checkpoints and MLflow experiment: the profile's, plus what it is overridden by.

    An overridden run so never mixes with the profile's own: "digits+ci", or "digits+1a2b3c" for key=value overrides.
    Raises ParamsError for a file whose name cannot be part of folders and file patterns.
    """
    files = [Path(item).stem for item in overrides if "=" not in item]
    for stem in (Path(path).stem, *files):
        if not RUN_PATTERN.fullmatch(stem):
            raise ParamsError(
                f"a file's name becomes part of folders' names, so letters, digits, ., - and _ are allowed, up to 100; found {shown(stem)}"
            )
    values = [item for item in overrides if "=" in item]
    name = "+".join([Path(path).stem, *files, *([digest(values)[:6]] if values else [])])
    if len(name) > LONGEST_RUN:
        told = f"{brief(name, 60)}, {len(name)} characters; allowed are {LONGEST_RUN}"
        raise ParamsError(f"{path}: with its overrides the run is named {told}; shorten the files' names")
    return name


@dataclass(frozen=True)
class Named:
    """A file or folder that settings name. lost: without it the run ends only after trainings."""

    key: str
    path: str
    here: bool
    lost: bool
    otherwise: str  # what happens, or is to be done, where it is not there

    def __str__(self) -> str:
        return f"{self.key}: {self.path} " + ("is here" if self.here else self.otherwise)


def _named(key: str, path: str | Path, lost: bool, otherwise: str) -> Named:
    try:
        return Named(key, str(path), Path(path).exists(), lost, otherwise)
    except OSError as error:  # no file can have this path
        return Named(key, brief(path), False, True, f"cannot be had: {error.strerror}")


def named_files(profile: Profile) -> Iterator[Named]:
    """The files and folders outside of `results` that a profile reads, and whether they are there."""
    data, reliability, generate = profile.data, profile.evaluation.reliability, profile.evaluation.generate
    if "path" in data.record.reads and data.path:
        yield _named("data.path", data.path, False, "is not here yet; put the folder or archive there")
    for key, source in [("data.root", data.source), *(("evaluation.reliability.ood", name) for name in reliability.ood)]:
        if source in registry.SOURCES and (file := registry.SOURCES[source].downloads):
            fetched = f"is not here yet; {source} is fetched to data.root when it is read"
            yield _named(key, Path(data.root, file), False, fetched)
    if path := reliability.ood_path:
        yield _named("evaluation.reliability.ood_path", path, True, "is not here; put the folder or archive there")
    if (path := generate.inception_weights) and generate.extractor != "reference":
        named = _named("evaluation.generate.inception_weights", path, True, "is not here; put the file of Inception's weights there")
        yield replace(named, here=named.here and Path(path).is_file())


def lost_files(profile: Profile) -> list[str]:
    """Named files, a line each, whose absence would be noticed only after trainings."""
    return [str(named) for named in named_files(profile) if named.lost and not named.here]


def require_files(profile: Profile) -> None:
    """Raises ParamsError for lost_files."""
    if lost := lost_files(profile):
        raise ParamsError("\n".join(lost))
