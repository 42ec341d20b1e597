"""Settings of the evaluation: protocols of robustness, samples, energies, reliability."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from ebjdat import registry
from ebjdat.pixels import unit_distance
from ebjdat.settings.types import (
    Batch,
    Count,
    CountOrZero,
    Epsilon,
    Few,
    FilePath,
    Norm,
    NotNegative,
    Number,
    Positive,
    ProtocolName,
    RandomSeed,
    Settings,
    Steps,
    TwoOrMore,
    known,
    mapping,
    merge,
    nearest,
)

STANDARD = "standard"  # the protocol whose figures stand first
BINARY = "standard_binary"  # what stands for it where there are two or three classes
RELEASED = "released"  # the paper's own evaluation


def prefix_of(protocol: str) -> str:
    """What the names of a protocol's results begin with: nothing for the standard one."""
    return "" if protocol == STANDARD else f"{protocol}_"


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
    # instead, for experiments on this row of the JEM family
    noise_on: dict[Annotated[str, known(registry.BASES)], NotNegative] = Field(default_factory=dict)
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
        like = mapping(entry).get("like")
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
            for attack in mapping(attacks):
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
        row = registry.SAMPLE_PROTOCOLS.get(str(mapping(entry).get("like") or name))
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
