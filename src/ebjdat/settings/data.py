"""Settings of the data set and its splits."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, ValidationInfo, model_validator

from ebjdat import registry
from ebjdat.settings.types import MOST, Count, FilePath, Label, Number, RandomSeed, Settings, StrictBool, known


class ImbalanceSettings(Settings):
    """A long-tailed training split: of class c, the first being 0, int(largest ratio^(-c / (K - 1))) images are drawn.

    The protocol of CIFAR-10-LT (Cao et al. 2019, arXiv 1906.07413), drawn as RobustLT does (arXiv 2605.13395). The test split stays.
    """

    ratio: Annotated[float, Number, Field(ge=1, le=MOST)]  # of the largest class's images to the smallest's
    largest: Count  # images of the largest class
    validation: Annotated[float, Number, Field(gt=0, lt=1)] = 0.2  # share of each class's images for the validation split, rounded down

    def drawn(self, classes: int) -> list[int]:
        """Images of each class, training and validation together."""
        return [int(self.largest * self.ratio ** (-c / max(classes - 1, 1))) for c in range(classes)]

    def held_out(self, drawn: int) -> int:
        """Of a class's images, those of the validation split."""
        return int(self.validation * drawn)


class DataSettings(Settings):
    source: Annotated[str, known(registry.SOURCES)]
    label: Label | None = None  # name of the data set in tables; None: the source's name
    path: FilePath | None = None  # source folder: a folder or archive of class folders
    size: Annotated[int, Number, Field(ge=8, le=1024)] | None = None  # source folder: scale the shorter side to it, crop the centre
    channels: Annotated[Literal[1, 3], Number] | None = None  # source folder: read all as grey or RGB; None: grey where all files are
    background: Annotated[int, Number, Field(ge=0, le=255)] = 255  # source folder: grey level under transparent pixels
    classes: tuple[str, ...] | None = None  # source folder: class folders in the order of their labels; None: see docs/data.md
    follow_links: StrictBool = False  # source folder: also follow links that leave the folder for anywhere but this repository's DVC cache
    root: FilePath = "datasets"  # where torchvision's data sets are, or are downloaded to
    test: Count | None = None  # digits: images held out for testing
    validation: Count | None = None  # images held out of training to select checkpoints; None: `imbalance` says
    imbalance: ImbalanceSettings | None = None  # a long-tailed training split; None: all images
    n_train: Count | None = None  # use only this many training images (stratified), after the validation split
    n_test: Count | None = None  # keep only this many test images
    split_seed: RandomSeed = 0  # the splits never depend on a run's seed
    extra: FilePath | None = None  # more training images of these classes, which training.extra.share uses: see docs/data.md

    @property
    def name(self) -> str:
        return self.label or self.source

    @property
    def record(self) -> registry.Source:
        """Facts about the source that are known without reading the data."""
        return registry.SOURCES[self.source]

    def training_size(self) -> int | None:
        """Number of training images, or None where only the data tell."""
        if self.imbalance is not None:
            classes = self.record.classes
            return None if classes is None else sum(n - self.imbalance.held_out(n) for n in self.imbalance.drawn(classes))
        if self.record.train is None:
            return self.n_train
        total = self.record.train - (self.test or 0) - (self.validation or 0)
        return total if self.n_train is None else min(self.n_train, total)

    def test_size(self) -> int | None:
        """Number of test images, or None where only the data tell."""
        return min(filter(None, (self.test or self.record.test, self.n_test)), default=None)

    @model_validator(mode="after")
    def consistent(self) -> Self:
        if "path" in self.record.reads and not self.path:
            raise ValueError(f"source {self.source!r} needs `path`, a folder or archive (.tar.xz, .tar.gz, .zip) of class folders")
        for name in ("path", "size", "channels", "background", "classes", "follow_links"):
            if name not in self.record.reads and getattr(self, name) != type(self).model_fields[name].default:
                readers = " or ".join(repr(source) for source, record in registry.SOURCES.items() if name in record.reads)
                raise ValueError(f"`{name}` is for source {readers}; {self.source!r} does not read it")
        if self.record.test == 0 and not self.test:
            raise ValueError(f"source {self.source!r} needs `test`, how many of its {self.record.train} images are held out for testing")
        if self.record.test != 0 and self.test:
            raise ValueError(f"`test` is not for source {self.source!r}, which has its own test split; limit that with `n_test`")
        if self.imbalance is not None and (self.validation or self.n_train):
            what = "validation" if self.validation else "n_train"
            raise ValueError(
                f"`{what}` is not for a split with `imbalance`, whose ratio, largest and validation say how many images it has"
            )
        if self.imbalance is None and not self.validation:
            raise ValueError("needs `validation`, how many training images are held out to select checkpoints")
        size = self.training_size()
        if size is not None and size < 1:
            raise ValueError("`test` and `validation` leave no training images")
        return self


def data_in(info: ValidationInfo) -> DataSettings | None:
    """The data settings that a profile is validated with; None where a section is validated alone, or its profile's data are invalid."""
    data: DataSettings | None = (info.context or {}).get("data")
    return data


def within_test_split(n: int | None, info: ValidationInfo) -> int | None:
    """Validator of a number of test images."""
    size = data.test_size() if (data := data_in(info)) else None
    if n and size and n > size:
        raise ValueError(f"{n} is more than the test split has; allowed: up to {size}")
    return n
