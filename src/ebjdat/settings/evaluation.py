"""Settings of the evaluation: protocols of robustness, samples, energies, reliability."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from ebjdat import registry
from ebjdat.names import STANDARD
from ebjdat.pixels import unit_distance
from ebjdat.settings.data import data_in, within_test_split
from ebjdat.settings.types import (
    Batch,
    Count,
    CountOrZero,
    EntryName,
    Epochs,
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
    one_or_more,
)

BINARY = "standard_binary"  # its substitute for two or three classes
RELEASED = "released"  # the paper's own evaluation
AUTO = "auto"  # the OOD sets that suit the data and are available


class PGDSettings(Settings):
    """PGD-n on cross-entropy (Madry et al. 2018) from random starts in the ball."""

    steps: Steps = 20
    step_size: Epsilon  # in the protocol's range
    restarts: Few = 1


class EnsembleSettings(Settings):
    """One attack of an ensemble; registry.ATTACKS lists what each reads."""

    steps: Steps = 100
    targets: Count = 9  # target classes, by descending logit; at most all others
    queries: Count = 5000
    range: Literal["unit", "internal"] = "unit"  # pixels of FAB, which clips to [0, 1]; internal: the brighter half


class AdaptiveSettings(Settings):
    """One adaptive attack; registry.ADAPTIVE lists what each reads."""

    steps: Steps = 100  # of each start
    restarts: Few = 2  # random starts; every other one climbs with the opposite sign of `weight`
    weight: NotNegative = 1.0  # of the energy beside the cross-entropy; 0: cross-entropy alone


class ProtocolSettings(Settings):
    """How robustness is measured; one column of the report."""

    like: Annotated[str, known(registry.PROTOCOLS)] | None = None  # the preset it starts from; None: that of its own name
    norm: Norm = "Linf"
    eps: Epsilon
    range: Literal["unit", "internal"] = "unit"  # unit of eps and step sizes; internal: half as far in [0, 1] pixels
    noise: NotNegative = 0.0  # standard deviation, internal range; added to images before they are classified or attacked
    # base -> noise, in place of `noise`
    noise_on: dict[Annotated[str, known(registry.BASES)], NotNegative] = Field(default_factory=dict)
    # the ensemble attacks the first n test examples; 0: none. PGD attacks the whole split
    n: Annotated[CountOrZero, AfterValidator(within_test_split)]
    pgd: PGDSettings
    attacks: dict[Annotated[str, known(registry.ATTACKS)], EnsembleSettings]
    # what attacks those of the first n that the ensemble left; reported beside its figure, which stays what it is
    adaptive_attacks: dict[Annotated[str, known(registry.ADAPTIVE)], AdaptiveSettings] = Field(default_factory=dict)

    @property
    def radius(self) -> float:
        """Radius of the ball in [0, 1] pixels."""
        return self.eps if self.range == "unit" else unit_distance(self.eps)

    @property
    def pgd_step(self) -> float:
        """Step size of PGD in [0, 1] pixels."""
        return self.pgd.step_size if self.range == "unit" else unit_distance(self.pgd.step_size)

    def on(self, base: str | None) -> ProtocolSettings:
        """The protocol for experiments on this base, with its one noise. None: any other network."""
        return self.model_copy(update={"noise": self.noise_on.get(base or "", self.noise), "noise_on": {}})

    def keeps(self, preset: Mapping[str, Any]) -> bool:
        """Whether only what a preset leaves open (eps, n, the step size of PGD, adaptive attacks) is this protocol's own."""
        own = self.model_dump(exclude={"like", "eps", "n", "adaptive_attacks"})
        del own["pgd"]["step_size"]
        attacks = {name: {**EnsembleSettings().model_dump(), **values} for name, values in preset["attacks"].items()}
        return own == {"noise_on": {}, **preset, "pgd": {"restarts": 1, **preset["pgd"]}, "attacks": attacks}

    @model_validator(mode="after")
    def sensible(self) -> Self:
        if self.pgd.step_size > 2 * self.eps:
            raise ValueError(f"pgd.step_size {self.pgd.step_size:.4g} is more than the diameter 2 eps = {2 * self.eps:.4g}")
        for name, attack in self.attacks.items():
            reads = registry.ATTACKS[name].reads
            unread = [
                key for key, field in EnsembleSettings.model_fields.items() if key not in reads and getattr(attack, key) != field.default
            ]
            if unread:
                raise ValueError(f"attacks.{name} does not read {', '.join(unread)}; it reads {', '.join(reads)}")
        if self.adaptive_attacks and not self.attacks:
            raise ValueError("adaptive attacks need an ensemble: they attack what `attacks` left, and there are none")
        return self


def too_few_classes(settings: AttackSettings, classes: int) -> str | None:
    """Which protocols' ensembles need more classes, and what works; None if all can run."""
    wrong = [
        f"protocol {name!r}: {attack} needs at least {registry.FEWEST_CLASSES[attack]} classes, the data have {classes}; set its n to 0"
        for name, protocol in settings.protocols.items()
        for attack in (protocol.attacks if protocol.n else ())
        if classes < registry.FEWEST_CLASSES.get(attack, 0)
    ]
    if not wrong:
        return None
    eps, step = settings.standard.radius, settings.standard.pgd_step
    works = f"protocols.{BINARY}={{eps: {eps:.6g}, pgd: {{step_size: {step:.6g}}}, n: {settings.standard.n or 1000}}}"
    return f"{'; '.join(wrong)}; use {works} instead (APGD-CE, FAB, Square)"


def over_presets(protocols: Any) -> Any:
    """A profile's protocols, each merged over its preset in registry.PROTOCOLS; null leaves out a protocol or an attack."""
    if not isinstance(protocols, Mapping):
        return protocols
    merged = {name: _over_preset(name, entry, registry.PROTOCOLS) for name, entry in protocols.items() if entry is not None}
    for name in merged:
        for kind, entries in (("attacks", registry.ATTACKS), ("adaptive_attacks", registry.ADAPTIVE)):
            attacks = mapping(mapping(merged[name]).get(kind))
            for attack in attacks:
                if attack not in entries:
                    elsewhere = "; it belongs under `adaptive_attacks`" if attack in registry.ADAPTIVE else ""
                    known_ones = nearest(str(attack), list(entries))
                    raise ValueError(f"protocol {name!r}: attack {attack!r} is unknown{elsewhere}; {known_ones}")
            if attacks:
                merged[name] = {**merged[name], kind: {attack: values for attack, values in attacks.items() if values is not None}}
    return merged


def _over_preset(name: Any, entry: Any, presets: Mapping[str, registry.Preset]) -> Any:
    """A protocol merged over the preset that it is `like`, or that has its name."""
    if not isinstance(entry, Mapping):
        return entry
    like = entry.get("like")
    if str(like or name) in presets:
        return merge(presets[str(like or name)].defaults, entry)
    if like:
        raise ValueError(f"protocol {name!r}: `like` {like!r} is unknown; {nearest(str(like), list(presets))}")
    raise ValueError(f"protocol {name!r} needs `like`, the preset it starts from; allowed: {', '.join(presets)}")


class CheckSettings(Settings):
    """Integrity checks of an evaluation: their number of examples and their effort."""

    n: Count = 100  # the first n test examples
    sweep: tuple[Positive, ...] = (0.25, 0.5, 1.0, 1.5, 2.0, 4.0)  # radii of the sweep, in units of the standard protocol's
    steps: Steps = 100  # of the stronger PGD
    restarts: Few = 3


class UniversalSettings(Settings):
    """One perturbation for every test image, within the standard protocol's radius, found on validation images."""

    steps: Steps = 100  # sign steps, one batch of validation images each


class ScreenSettings(Settings):
    """Input gradients predicted from features of validation images: a screen, not a measure of robustness."""

    ridge: Positive = 1e-3  # of the regression, in units of a feature's mean square


class ReferenceSettings(Settings):
    """A run of the same profile."""

    experiment: str = "classifier"
    seed: RandomSeed = 0


class AttackSettings(Settings):
    protocols: Annotated[dict[ProtocolName, ProtocolSettings], BeforeValidator(over_presets)]
    checks: CheckSettings = CheckSettings()
    transfer: ReferenceSettings | None = ReferenceSettings()  # its adversarial examples are transferred to every other model
    universal: UniversalSettings | None = None  # None: not measured
    screen: ScreenSettings | None = None  # None: not run
    search: Literal["fp32", "bf16"] = "fp32"  # precision of the ensemble's search; every verdict is decided in fp32
    seed: RandomSeed = 0
    batch_size: Batch = 250

    @property
    def standard(self) -> ProtocolSettings:
        return self.protocols[STANDARD]

    def on(self, base: str | None) -> AttackSettings:
        """The settings for experiments on this base (see ProtocolSettings.on)."""
        return self.model_copy(update={"protocols": {name: protocol.on(base) for name, protocol in self.protocols.items()}})

    @model_validator(mode="after")
    def has_standard(self) -> Self:
        if STANDARD not in self.protocols:
            raise ValueError(f"protocols: {STANDARD!r} is missing; it is always reported")
        for name, preset in registry.PROTOCOLS.items():
            if name in self.protocols and not self.protocols[name].keeps(preset.defaults):
                raise ValueError(
                    f"protocols.{name}: its name fixes norm, range, noise, noise_on, pgd.steps, pgd.restarts and attacks; "
                    f"add a protocol `like: {name}`"
                )
        return self


class SampleProtocolSettings(Settings):
    """Which samples are measured, against which images. Its name is part of the results' names."""

    like: Annotated[str, known(registry.SAMPLE_PROTOCOLS)] | None = None  # the preset it starts from; None: that of its own name
    source: Literal["fresh", "conditional", "buffer"]  # chains of E(x); chains of E(x, y); the training's replay buffer
    select: Annotated[float, Number, Field(gt=0, le=1)] = 1.0  # most confident fraction of each predicted class; 1: no selection
    against: Literal["train", "all"] = "train"  # all: also validation and test images


def over_sample_presets(protocols: Any) -> Any:
    """All of registry.SAMPLE_PROTOCOLS and a profile's own protocols, each merged over its preset; null leaves out a protocol."""
    if not isinstance(protocols, Mapping):
        return protocols
    every = {**{name: {} for name in registry.SAMPLE_PROTOCOLS}, **protocols}
    return {name: _over_preset(name, entry, registry.SAMPLE_PROTOCOLS) for name, entry in every.items() if entry is not None}


class GenerateSettings(Settings):
    n: TwoOrMore  # fresh chains
    steps: Steps  # full gradients per fresh chain
    extractor: Literal["inception", "reference", "auto"] = "reference"
    inception_weights: FilePath | None = None  # a file; None: torch-fidelity's own download
    reference: ReferenceSettings = ReferenceSettings()
    grid: Few = 10  # images per class in the grid
    seed: RandomSeed = 0
    batch_size: Batch = 250
    protocols: Annotated[dict[ProtocolName, SampleProtocolSettings], BeforeValidator(over_sample_presets)] = Field(
        default={}, validate_default=True
    )

    @field_validator("extractor")
    @classmethod
    def inception_reads_colour(cls, extractor: str, info: ValidationInfo) -> str:
        if extractor == "inception" and (data := data_in(info)) and data.record.shape and data.record.shape[0] == 1:
            raise ValueError(f"Inception is for natural images in colour; allowed for {data.source!r}: reference")
        return extractor

    @model_validator(mode="after")
    def presets_unchanged(self) -> Self:
        if STANDARD not in self.protocols:
            raise ValueError(f"protocols: {STANDARD!r} is missing; it is always reported")
        for name, row in registry.SAMPLE_PROTOCOLS.items():
            if name in self.protocols and self.protocols[name].model_dump(exclude={"like"}) != row.defaults:
                raise ValueError(f"protocols.{name}: its name fixes its values; add a protocol `like: {name}`")
        return self


class EnergySettings(Settings):
    n: Annotated[TwoOrMore | None, AfterValidator(within_test_split)] = None  # first n test images; None: all
    batch_size: Batch = 250


class AutoencoderSettings(Settings):
    """A sparse autoencoder of penultimate features: how badly it reconstructs an image's makes the image suspicious."""

    width: Count = 256  # hidden units
    sparsity: NotNegative = 1e-3  # weight of the units' mean activity in the loss
    epochs: Annotated[Epochs, Field(ge=1)] = 60
    lr: Positive = 3e-3
    evasion: NotNegative = 1.0  # weight of the reconstruction error in the attack that knows the detector: CE - evasion * error


class ReliabilitySettings(Settings):
    """Calibration, and detection of out-of-distribution and of adversarial images."""

    n: Annotated[TwoOrMore | None, AfterValidator(within_test_split)] = None  # first n test images; None: all
    bins: Annotated[int, Number, Field(ge=1, le=10_000)] = 15  # of the calibration error, equally wide
    ood: Annotated[tuple[Annotated[str, known({AUTO: None, **registry.OOD_SETS})], ...], BeforeValidator(one_or_more)] = (AUTO,)
    ood_path: FilePath | None = None  # set folder: a folder or archive of class folders, as data.path
    autoencoder: AutoencoderSettings | None = None  # a further detector of adversarial images; None: left out
    seed: RandomSeed = 0
    batch_size: Batch = 250

    @field_validator("ood")
    @classmethod
    def ood_differs_from_data(cls, ood: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if (data := data_in(info)) and "path" not in data.record.reads and data.source in ood:
            raise ValueError(f"{data.source!r} is the training data; name another set")
        return ood

    @field_validator("ood_path")
    @classmethod
    def ood_path_differs_from_data(cls, path: str | None, info: ValidationInfo) -> str | None:
        if path and (data := data_in(info)) and path == data.path:
            raise ValueError("is data.path, the training data; name another set")
        return path

    @model_validator(mode="after")
    def consistent(self) -> Self:
        if AUTO in self.ood and len(self.ood) > 1:
            raise ValueError(f"`ood` is {AUTO!r} or a list of sets, not both")
        if "folder" in self.ood and not self.ood_path:
            raise ValueError("ood 'folder' needs `ood_path`, a folder or archive (.tar.xz, .tar.gz, .zip) of class folders")
        if self.ood_path and not {"folder", AUTO} & set(self.ood):
            raise ValueError("`ood_path` is for ood 'folder', which is not in `ood`")
        return self


class TeachingSettings(Settings):
    """What distilled experiments' teachers say of training images that a recipe does not learn (arXiv 2605.21999)."""

    recipe: EntryName  # an experiment of this profile; its networks of all seeds say what is learned
    n: Count | None = None  # first n training images; None: all
    steps: Steps = 10  # of PGD, in the standard protocol's ball
    batch_size: Batch = 250


class Evaluation(Settings):
    attack: AttackSettings
    generate: GenerateSettings
    energy: EnergySettings = EnergySettings()
    reliability: ReliabilitySettings = ReliabilitySettings()
    teacher: TeachingSettings | None = None  # None: not measured
