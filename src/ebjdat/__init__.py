"""Reproducibility pipeline for EB-JDAT: train, attack and sample joint energy-based models, and report what holds.

From Python: `evaluate`, `load_checkpoint` and `train` (docs/api.md). They are imported on first use: `import ebjdat` loads nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ebjdat.api import evaluate, load_checkpoint, train

__version__ = "0.1.0"
__all__ = ["__version__", "evaluate", "load_checkpoint", "train"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module("ebjdat.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
