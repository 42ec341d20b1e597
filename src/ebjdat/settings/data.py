"""Settings of the data set and its splits."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, ValidationInfo, model_validator

from ebjdat import registry
from ebjdat.settings.types import Count, FilePath, Label, Number, RandomSeed, Settings, StrictBool, known


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
    validation: Count  # images held out of training to select checkpoints
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
        if self.record.train is None:
            return self.n_train
        total = self.record.train - (self.test or 0) - self.validation
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
