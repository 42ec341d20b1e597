"""What a registry's rows are, and how the implementation of one is imported."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

# What a method belongs to. energy: models p(x) as well; joint: that, and trained on adversarial neighbours; distilled: from a teacher.
Family = Literal["standard", "adversarial", "energy", "joint", "distilled"]


@dataclass(frozen=True)
class Entry:
    """A strategy: `target` is "module:function"; `source` is the paper or package it follows.

    reads: settings of its section that it uses; it ignores the others.
    """

    target: str
    source: str
    reads: tuple[str, ...] = ()


@dataclass(frozen=True)
class Preset:
    """Named settings: values without code. A profile's and an experiment's own values override them.

    on: for a form, what it changes on a preset of BASES.
    """

    source: str
    defaults: Mapping[str, Any]
    on: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Logged:
    """A scalar that one method alone logs per epoch. better: "higher", "lower", or "" for neither."""

    name: str
    unit: str
    better: Literal["higher", "lower", ""]
    meaning: str


@dataclass(frozen=True, kw_only=True)
class Method(Entry):
    """A training objective.

    reads: what it uses of `training.weights` beyond w1, w2, w3, align and energy_l2.
    samples: names in SAMPLES; a step makes each once, in this order, before the loss; later ones see earlier ones.
    state: "module:factory" of what it changes during training besides the network (objectives/terms.py, MethodState); "" for nothing.
    selection: the validation score that picks the checkpoint unless the settings choose another.
    bases: presets of BASES that it can use, the first by default. forms: likewise of FORMS.
    defaults: training settings of the method; they override those of its base.
    logs: what it logs beyond the common cross-entropies, accuracies and energies; the package metrics explains these names.
    second_order: its loss contains derivatives of the network, which training.compute.compile and .recompute cannot differentiate again.
    control: what has to be worse if the method's claim holds; "" for baselines and controls.
    """

    family: Family
    samples: tuple[str, ...] = ()
    state: str = ""
    selection: str = "clean"
    bases: tuple[str, ...] = ()
    forms: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    logs: tuple[Logged, ...] = ()
    second_order: bool = False
    control: str = ""

    @property
    def has_chains(self) -> bool:
        """Whether it trains on chains, and so keeps a replay buffer."""
        return "negatives" in self.samples


@dataclass(frozen=True)
class Source(Entry):
    """A data set: its function takes the data settings and returns data.sources.Raw. reads: the data settings that are for it.

    train, test: its official numbers of images. test 0: it has no test split, so `data.test` of its images are drawn for one.
    shape: (channels, height, width) of an image. classes: how many. None, of each of these: only the data say.
    flip: whether a mirrored image keeps its label.
    downloads: what is fetched to `data.root` where it is missing. The function of a source that downloads also takes the splits to
    read and whether it may download (see data.sources.svhn).
    """

    train: int | None = None
    test: int | None = None
    shape: tuple[int, int, int] | None = None
    classes: int | None = None
    flip: bool = True
    downloads: str | None = None


# The code that "released" means. The paper links another address, whose release may differ.
RELEASE = "jkcjkc/EB-JDAT at 327ea16 (May 2025)"


def load(registry: Mapping[str, Entry], name: str) -> Callable[..., Any]:
    """Import and return the implementation of `name`."""
    return implementation(registry[name].target)


def implementation(target: str) -> Callable[..., Any]:
    """Import and return what is at "module:function"."""
    function: Callable[..., Any] = pkgutil.resolve_name(target)
    return function
