"""Data sets, and those that are out of distribution."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from ebjdat.registry.entries import Entry, Source

_torchvision = partial(Source, reads=("root",), shape=(3, 32, 32))

SOURCES: Mapping[str, Source] = {
    "digits": Source(
        "ebjdat.data.sources:digits",
        "scikit-learn's bundled UCI digits, 8x8",
        reads=("test",),
        train=1_797,
        test=0,
        shape=(1, 8, 8),
        classes=10,
        flip=False,
    ),
    "svhn": _torchvision(
        "ebjdat.data.sources:svhn",
        "Netzer et al. 2011, torchvision",
        train=73_257,
        test=26_032,
        classes=10,
        flip=False,
        downloads="test_32x32.mat",
    ),
    "cifar100": _torchvision(
        "ebjdat.data.sources:cifar100", "Krizhevsky 2009, torchvision", train=50_000, test=10_000, classes=100, downloads="cifar-100-python"
    ),
    "cifar10": _torchvision(
        "ebjdat.data.sources:cifar10",
        "Krizhevsky 2009, torchvision",
        train=50_000,
        test=10_000,
        classes=10,
        downloads="cifar-10-batches-py",
    ),
    "folder": Source(
        "ebjdat.data.sources:folder",
        "class folders, or an archive of them",
        reads=("path", "size", "channels", "background", "classes", "follow_links"),
    ),
}

# What reads `data.extra`, where there is any.
EXTRA: Mapping[str, Entry] = {"extra": Entry("ebjdat.data.extra:read_extra", "more training images: an npz, or class folders")}

# Out-of-distribution sets that are made from the images at hand.
MADE_SETS: Mapping[str, Entry] = {
    "noise": Entry("ebjdat.data.made:noise", "uniform in [0, 1]; Hendrycks & Gimpel 2017, arXiv 1610.02136"),
    "inverted": Entry("ebjdat.data.made:inverted", "1 - x: each image's negative"),
    "shuffled": Entry("ebjdat.data.made:shuffled", "x with its pixels permuted, each image in its own order"),
}

# Out-of-distribution sets of the evaluation: made from the test images, or the test images of other sources.
OOD_SETS: Mapping[str, Entry] = {**MADE_SETS, **{name: source for name, source in SOURCES.items() if source.test != 0}}
