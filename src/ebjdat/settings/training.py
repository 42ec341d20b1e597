"""Settings of the network and of its training."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ebjdat import registry
from ebjdat.settings.types import (
    Batch,
    Count,
    CountOrZero,
    Epochs,
    Epsilon,
    Few,
    Fraction01,
    Norm,
    NotNegative,
    Number,
    Positive,
    Settings,
    Signed,
    Steps,
    StrictBool,
    known,
)


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
