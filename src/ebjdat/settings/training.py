"""Settings of the network and of its training."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from ebjdat import registry
from ebjdat.settings.data import data_in
from ebjdat.settings.types import (
    Batch,
    Count,
    CountOrZero,
    EntryName,
    Epochs,
    Epsilon,
    Few,
    FilePath,
    Fraction01,
    Norm,
    NotNegative,
    Number,
    Positive,
    RandomSeed,
    Settings,
    Signed,
    Steps,
    StrictBool,
    known,
)


def six_n_plus_four(depth: int) -> int:
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"depth {depth}: a wide residual network has 6 n + 4 layers (10, 16, 22, 28, ...)")
    return depth


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
    def has_blocks(self) -> Self:
        six_n_plus_four(self.depth)
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
    peak: Fraction01 = 0.3  # onecycle, cosine_onecycle: fraction of training at which the rate is highest


class ChainSettings(Settings):
    sampler: Annotated[str, known(registry.SAMPLERS)] = "pyld"
    start: Annotated[str, known(registry.STARTS)] = "class_gaussians"
    conditional: StrictBool = False  # descend E(x, y) of the chain's class instead of E(x)
    steps: Steps = 10  # full gradients per chain update
    inner_steps: Steps = 5  # pyld: steps through the stem per full gradient
    step_size: Positive = 0.2  # internal range
    noise: NotNegative = 0.0  # internal range, standard deviation per full gradient
    clamp: Positive | None = 1.0  # clipped_sgld, pyld: gradients are clamped to [-clamp, clamp]
    mode: Literal["train", "eval"] = "train"  # batch-norm statistics while sampling
    buffer: Count = 10_000  # images in the replay buffer
    reinit: Fraction01 = 0.05  # probability that a chain restarts


class BudgetSettings(Settings):
    """How eps and step_size depend on the image's class and on the epoch, in training (samplers/budgets.py)."""

    name: Annotated[str, known(registry.BUDGETS)] = "uniform"
    by_class: Fraction01 = 0.3  # robust_lt: share of eps that goes by the rarity of the class
    warmup: Fraction01 = 0.8  # robust_lt, ramp: share of the epochs in which the budget grows from 0


class AdversarySettings(Settings):
    score: Annotated[str, known(registry.SCORES)] = "ce"
    norm: Norm = "Linf"
    eps: Epsilon
    steps: Steps = 10
    step_size: Epsilon
    step_ratio: Positive | None = None  # step_size in units of eps; None: step_size itself
    start_ratio: Positive = 1.0  # radius of the uniform start, in units of eps; beyond 1, only without `project`
    range: Literal["unit", "internal"] = (
        "unit"  # unit of eps and step_size; internal: half as far in [0, 1] pixels, as in the released code
    )
    start: Literal["uniform", "gaussian", "clean"] = "uniform"  # in the eps-ball; 0.001 N(0, 1) in [0, 1] pixels (TRADES); at x
    project: StrictBool = True  # back into the eps-ball after each step; the released code does not
    mode: Literal["train", "eval"] = "train"  # batch-norm statistics while attacking
    budget: BudgetSettings = BudgetSettings()  # of training's neighbours; validation's have eps and step_size

    @property
    def step(self) -> float:
        """Size of a step, in the unit of eps."""
        return self.step_size if self.step_ratio is None else self.step_ratio * self.eps

    @model_validator(mode="after")
    def step_within(self) -> Self:
        if self.step > 2 * self.eps:
            raise ValueError(f"step_size {self.step:.4g} is more than the diameter 2 eps = {2 * self.eps:.4g}")
        if self.start_ratio > 1 and self.project:
            raise ValueError(f"start_ratio {self.start_ratio:.4g} leaves the ball, into which `project` brings it back; set project: false")
        if self.start_ratio != 1 and self.start != "uniform":
            raise ValueError(f"start_ratio is of start 'uniform', not of {self.start!r}")
        if "by_class" in registry.BUDGETS[self.budget.name].reads and not self.project:
            raise ValueError(f"budget {self.budget.name!r} starts in the ball of eps, whatever the class's is; it needs project: true")
        if self.score in ("kl", "squared") and self.start == "clean":
            raise ValueError(f"score {self.score!r} has no gradient at the clean image; start 'uniform' or 'gaussian' is allowed")
        return self


class ContrastSettings(Settings):
    """Images out of distribution that `dat` tells from data: where they begin, and how far they climb (objectives/dat.py)."""

    ood: Annotated[str, known(registry.MADE_SETS)] = "shuffled"  # made from the images of the p(x) term
    norm: Norm = "L2"  # of a step: unit vectors or signs
    step_size: Epsilon = 0.1
    direction: Literal["gradient", "random"] = "gradient"  # random: as far as with the gradient, the control
    most: Annotated[int, Number, Field(ge=0, le=1000)] = 40  # steps; they begin with 0
    threshold: Annotated[float, Number, Field(ge=0.5, le=1)] = 0.8  # area under the ROC curve at which there is one step more
    every: Count = 50  # training steps over which the area is averaged before the number of steps may grow

    @model_validator(mode="after")
    def moves(self) -> Self:
        if not self.most and self.direction != "gradient":
            raise ValueError(f"direction {self.direction!r} changes nothing where `most` is 0: no image moves")
        return self


class PolicySettings(Settings):
    """How `las_at` attacks each image: ranges of whole numbers, ends included, of which one is chosen (objectives/las_at.py)."""

    choose: Literal["learned", "uniform"] = "learned"  # uniform: with equal chances, always, the control
    unit: Epsilon = 1 / 255  # of eps and step, in [0, 1] pixels
    eps: tuple[Few, Few] = (3, 15)
    iterations: tuple[Few, Few] = (3, 14)
    step: tuple[Few, Few] = (1, 5)
    # the policy's own wide residual network, without batch norm, and its optimiser (SGD)
    depth: Few = 10
    width: Few = 1
    lr: Positive = 1e-4
    every: Count = 20  # training steps between two of its own

    @property
    def network(self) -> ModelSettings:
        return ModelSettings(depth=self.depth, width=self.width, norm="none")

    @field_validator("depth")
    @classmethod
    def has_blocks(cls, depth: int) -> int:
        return six_n_plus_four(depth)

    @field_validator("eps", "iterations", "step")
    @classmethod
    def ascends(cls, ends: tuple[int, int]) -> tuple[int, int]:
        if ends[0] > ends[1]:
            raise ValueError(f"{list(ends)} is no range; its first number must not be greater than its second")
        return ends

    @model_validator(mode="after")
    def sensible(self) -> Self:
        if self.eps[1] * self.unit > 1:
            raise ValueError(
                f"eps reaches {self.eps[1]} x unit = {self.eps[1] * self.unit:.4g}; at most 1, the range of pixels, is allowed"
            )
        if self.step[1] > 2 * self.eps[1]:
            raise ValueError(f"step reaches {self.step[1]}, more than the largest diameter 2 eps = {2 * self.eps[1]}")
        if self.choose == "learned" and all(low == high for low, high in (self.eps, self.iterations, self.step)):
            raise ValueError("every range has one number, so there is nothing to learn; set choose: uniform, or widen a range")
        return self


class ExampleWeights(Settings):
    """How much each example counts in the loss of an adversarial training (objectives/weighting.py)."""

    name: Annotated[str, known(registry.WEIGHTINGS)] = "uniform"
    radius: Positive = 0.1  # kl_dro: greatest KL divergence from equal weights, nats
    tilt: Positive = 1.0  # term: 1 / loss


class WeightSettings(Settings):
    w1: NotNegative = 1.0  # log p(x)
    w2: Signed = 1.0  # energy alignment; negative raises E(adversarial) over E(clean), as the released code does
    w3: NotNegative = 1.0  # cross-entropies
    # clean images of the energy alignment: those the adversarial neighbours start from, or (as in the released code) those of the p(x) term
    align: Literal["paired", "density"] = "paired"
    beta: NotNegative = 6.0  # trades, mart, weat: weight of the KL term
    delta: NotNegative = 1.0  # der: weight of the energy change; gradalign: of the gradients' misalignment
    targets: Annotated[float, Number, Field(ge=0, le=0.5)] = 0.05  # s2o: weight of each second-order term
    taught: Fraction01 = 1.0  # ard, rslad: weight of the teacher's term on adversarial images; 1 - taught, of that on clean ones
    temperature: Positive = 1.0  # ard: divides logits
    trust: NotNegative = 0.1  # iad: exponent of the teacher's probability of the label
    alone: Fraction01 = 0.3  # iad: fraction of the epochs, at first, in which the teacher alone is followed
    # label smoothing: (1 - s) CE + s mean_k(-log p_k), torch's; s / (K - 1) for each other class, as some define it, is s K / (K - 1) here
    smoothing: Annotated[float, Number, Field(ge=0, lt=1)] = 0.0
    examples: ExampleWeights = ExampleWeights()
    # what keeps the weights of examples (or MART's of its KL term, S2O's targets), but not where they belong
    control: Literal["none", "shuffled", "mean_matched"] = "none"
    energy_l2: NotNegative = 0.0  # mean squared energy of images and chains


class TeacherSettings(Settings):
    """The frozen network that a distilled training learns from: an experiment of the profile, or any network."""

    experiment: EntryName | None = None
    seed: RandomSeed | None = None  # of that experiment; None: the training's own
    model: FilePath | None = None  # package.module:function that makes a network for images in [0, 1]
    weights: FilePath | None = None  # model: a file of its weights; None: the function loads them
    weights_key: FilePath | None = None  # model: which of several weights in that file

    @model_validator(mode="after")
    def one_network(self) -> Self:
        if (self.experiment is None) == (self.model is None):
            raise ValueError("one of `experiment` (of this profile) and `model` (package.module:function) is needed")
        for name, value, owner in (
            ("seed", self.seed, "experiment"),
            ("weights", self.weights, "model"),
            ("weights_key", self.weights_key, "weights"),
        ):
            if value is not None and getattr(self, owner) is None:
                raise ValueError(f"`{name}` is of `{owner}`, which is not given")
        return self


class AugmentSettings(Settings):
    pad: Annotated[int, Number, Field(ge=0, le=1000)] = 4  # reflect-pad, then crop at random
    flip: StrictBool = False
    noise: NotNegative = 0.03  # standard deviation on images of the p(x) term, internal range
    labelled_noise: NotNegative = 0.0  # the same on images of the p(y|x) terms; adversaries start from the noisy ones
    density: Literal["augmented", "plain"] = "augmented"  # images of the p(x) term; plain: not cropped or flipped (SADA-JEM)

    @field_validator("flip")
    @classmethod
    def flip_keeps_labels(cls, flip: bool, info: ValidationInfo) -> bool:
        if flip and (data := data_in(info)) and not data.record.flip:
            raise ValueError(f"a mirrored image of {data.source!r} may lose its label; allowed: false")
        return flip

    @property
    def changes(self) -> bool:
        """Whether images are cropped or flipped at all."""
        return bool(self.pad or self.flip)


class ExtraSettings(Settings):
    """How training uses the images of data.extra. An epoch keeps its number of steps, so it shows fewer of the others."""

    share: Annotated[float, Number, Field(ge=0, lt=1)] = 0.0  # of each batch: int(share x batch_size) images, drawn with replacement
    shuffled_labels: StrictBool = False  # control: each of their labels on another of them

    @model_validator(mode="after")
    def labels_of_something(self) -> Self:
        if self.shuffled_labels and not self.share:
            raise ValueError("shuffled_labels changes nothing: share is 0")
        return self


class SelectionSettings(Settings):
    score: Literal["clean", "robust", "clean_and_robust"] | None = None  # None: the method's default
    after: Fraction01 = 0.0  # fraction of the epochs before checkpoints are compared


class UpdateSettings(Settings):
    name: Annotated[str, known(registry.UPDATES)] = "plain"
    rho: Positive = 2.0  # sam: radius in weight space; awp: of each layer, in units of its length
    after: CountOrZero = 0  # awp: epochs without a perturbation, at the beginning
    adaptive: StrictBool = True  # sam: radius relative to each weight's size

    @model_validator(mode="after")
    def relative_radius(self) -> Self:
        if self.name in ("awp", "awp_random") and self.rho > 1:
            raise ValueError(
                f"update {self.name!r} measures rho in lengths of each layer, and rho is {self.rho:.4g}; published: 0.005 to 0.01"
            )
        return self


class Rung(Settings):
    """One change with which a diverged training continues.

    by: factor of lr and steps (rounded up), lower bound of energy_l2; a new noise seed takes none.
    """

    change: Literal["seed", "lr", "steps", "energy_l2"]
    by: Positive | None = None

    @model_validator(mode="after")
    def complete(self) -> Self:
        if (self.change == "seed") != (self.by is None):
            raise ValueError("'seed' takes no `by`" if self.change == "seed" else f"{self.change!r} needs `by`")
        if self.change == "lr" and self.by is not None and self.by >= 1:
            raise ValueError(f"`by` is {self.by}: the rate must become lower; less than 1 is allowed")
        if self.change == "steps" and self.by is not None and self.by <= 1:
            raise ValueError(f"`by` is {self.by}: chains must become longer; more than 1 is allowed")
        return self


LADDER = (
    Rung(change="seed"),
    Rung(change="lr", by=0.1),
    Rung(change="lr", by=0.1),
    Rung(change="steps", by=2),
    Rung(change="energy_l2", by=0.01),
)


class HealingSettings(Settings):
    """When a training counts as diverged, and what changes then: one rung per recovery; changes accumulate."""

    mode: Literal["heal", "record"] = "heal"  # record: note the first collapse and continue, for ablations
    every: Annotated[int, Number, Field(ge=1, le=100)] = 50  # steps between checks
    energy: Positive = 1e5  # bound of |mean energy| of images and chains
    gap: Positive = 1e3  # bound of |mean E(clean) - mean E(chains)| and |mean E(clean) - mean E(adversarial)|
    cross_entropy: Positive = 3.0  # bound on clean images, in units of log K, the cross-entropy of guessing
    saturation: Fraction01 = 0.9  # bound of the fraction of chain pixels at the range's ends, beyond that of images
    contrast: NotNegative = 0.1  # least standard deviation of pixels within a chain, relative to images
    diversity: NotNegative = 0.1  # least standard deviation of a pixel across chains, relative to images
    # how far the PGD-10 accuracy on training images may fall below its best so far (catastrophic overfitting); None: not measured
    overfitting: Annotated[float, Number, Field(gt=0, lt=1)] | None = None
    ladder: tuple[Rung, ...] = LADDER


class ComputeSettings(Settings):
    """How a training step is computed. Every setting changes results, some only by rounding."""

    # fp32: true fp32 on a GPU too; tf32: matrix products in TF32 on a GPU; bf16: layers by autocast, while weights, logits,
    # energies, losses and images stay fp32
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    # sequential slices of a batch, to save memory; batch norm takes its statistics from each slice, and updates with each
    accumulate: Count = 1
    recompute: StrictBool = False  # activation checkpointing in the loss: less memory, a third more time
    compile: StrictBool = False  # torch.compile; where it fails, the step runs uncompiled

    @model_validator(mode="after")
    def one_of_two(self) -> Self:
        if self.recompute and self.compile:
            raise ValueError("torch cannot compile recomputed batch-norm blocks; set only one of recompute and compile")
        return self


class TrainingSettings(Settings):
    epochs: Epochs  # over the labelled images
    batch_size: Batch
    # batch-norm statistics in the loss: those of the batch; or the running ones, which stay as the pretraining left them
    mode: Literal["train", "eval"] = "train"
    density_batch: Literal["labelled", "own"] = "labelled"  # images of the p(x) term: the labelled ones, or from their own shuffle
    density_batch_size: Batch | None = None  # own: their number, which is that of chains; None: batch_size
    optimizer: OptimizerSettings
    schedule: ScheduleSettings = ScheduleSettings()
    update: UpdateSettings = UpdateSettings()
    ema: Annotated[float, Number, Field(gt=0, lt=1)] | None = None  # decay of averaged weights, which are evaluated besides the raw ones
    # share of the steps, at the beginning, whose weights are copied; later the decay grows to `ema`. None: it is `ema` from the start
    ema_warmup: Fraction01 | None = None
    weights: WeightSettings = WeightSettings()
    chain: ChainSettings = ChainSettings()
    adversary: AdversarySettings
    teacher: TeacherSettings | None = None
    contrast: ContrastSettings = ContrastSettings()
    policy: PolicySettings = PolicySettings()
    augment: AugmentSettings = AugmentSettings()
    extra: ExtraSettings = ExtraSettings()
    selection: SelectionSettings = SelectionSettings()
    healing: HealingSettings = HealingSettings()
    compute: ComputeSettings = ComputeSettings()

    @field_validator("extra")
    @classmethod
    def of_the_data(cls, extra: ExtraSettings, info: ValidationInfo) -> ExtraSettings:
        if extra.share and (data := data_in(info)) and data.extra is None:
            raise ValueError(f"share {extra.share:.4g} is of the images of data.extra, which is not set")
        return extra

    @field_validator("batch_size", "density_batch_size")
    @classmethod
    def within_training_split(cls, batch: int | None, info: ValidationInfo) -> int | None:
        size = data.training_size() if (data := data_in(info)) else None
        if batch and size is not None and batch > size:
            raise ValueError(f"{batch} is larger than the training split ({size} images); allowed: 1 to {size}")
        return batch

    @property
    def extra_images(self) -> int:
        """How many images of each batch are from data.extra."""
        return int(self.extra.share * self.batch_size)

    @property
    def own_density(self) -> int | None:
        """Images of the p(x) term per step where they have their own shuffle, else None."""
        return (self.density_batch_size or self.batch_size) if self.density_batch == "own" else None

    @property
    def chains(self) -> int:
        """Chains that a step updates: one per image of the p(x) term."""
        return self.own_density or self.batch_size

    @model_validator(mode="after")
    def slices_are_equal(self) -> Self:
        if self.density_batch_size and self.density_batch != "own":
            raise ValueError("density_batch_size is for density_batch 'own'; for 'labelled' set batch_size")
        for name, size in (("batch_size", self.batch_size), ("density_batch_size", self.chains)):
            if size % self.compute.accumulate:
                raise ValueError(f"{name} {size} is not a multiple of compute.accumulate {self.compute.accumulate}")
        return self

    @model_validator(mode="after")
    def extra_images_of_a_batch(self) -> Self:
        if self.extra.share and not self.extra_images:
            raise ValueError(f"extra.share {self.extra.share:.4g} of a batch of {self.batch_size} is no image; raise it, or set it to 0")
        return self

    @model_validator(mode="after")
    def warm_up_of_an_average(self) -> Self:
        if self.ema_warmup is not None and self.ema is None:
            raise ValueError(f"ema_warmup {self.ema_warmup:.4g} is for averaged weights; set ema, their decay, too")
        return self

    @model_validator(mode="after")
    def milestones_within(self) -> Self:
        late = [m for m in self.schedule.milestones if self.epochs and m >= self.epochs]
        if self.schedule.name == "multistep" and late:
            raise ValueError(f"schedule.milestones {late} are at or after the last epoch ({self.epochs})")
        return self
