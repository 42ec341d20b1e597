"""That the code which runs is the code of the checkout in which it is called."""

from __future__ import annotations

import os
from pathlib import Path

import ebjdat
from ebjdat.errors import UserError


class CheckoutError(UserError):
    """The code of one checkout was called in another one."""


def refuse_another(folder: Path) -> None:
    """Raise CheckoutError where `folder` is in a checkout of this project and the package comes from another one.

    A copied or moved folder brings programs along that still run the first one's code and write as if it were theirs. An
    installed package (in site-packages) belongs to no checkout and may be used anywhere.
    """
    folder, package = folder.resolve(), Path(ebjdat.__file__).resolve().parent
    here = next((place for place in (folder, *folder.parents) if (place / "src/ebjdat/__init__.py").is_file()), None)
    theirs = package.parents[1]
    if here is None or package.parent.name != "src" or here.samefile(theirs):
        return
    told = any(place and Path(place).resolve() == package.parent for place in os.environ.get("PYTHONPATH", "").split(os.pathsep))
    mend = "unset PYTHONPATH, which names it" if told else "`make install` here, then use its .venv/bin"
    raise CheckoutError(f"this folder is of the checkout {here}, but the code that would run is that of {theirs}: {mend}")
