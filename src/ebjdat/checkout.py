"""A check that the code which runs belongs to the checkout in which it is called."""

from __future__ import annotations

import os
from pathlib import Path

import ebjdat
from ebjdat.errors import UserError


class CheckoutError(UserError):
    """The code of one checkout was called in another."""


def refuse_another(folder: Path) -> None:
    """Raise CheckoutError if `folder` is in a checkout of this project but the package comes from another.

    In a copied or moved checkout, the programs of its .venv still run the original's code. An installed package (in
    site-packages) belongs to no checkout and may be used anywhere.
    """
    folder, package = folder.resolve(), Path(ebjdat.__file__).resolve().parent
    here = next((place for place in (folder, *folder.parents) if (place / "src/ebjdat/__init__.py").is_file()), None)
    other = package.parents[1]
    if here is None or package.parent.name != "src" or here.samefile(other):
        return
    by_path = any(place and Path(place).resolve() == package.parent for place in os.environ.get("PYTHONPATH", "").split(os.pathsep))
    remedy = "unset PYTHONPATH, which names it" if by_path else "`make install` here, then use its .venv/bin"
    raise CheckoutError(f"this folder belongs to the checkout {here}, but the code that would run is that of {other}: {remedy}")
