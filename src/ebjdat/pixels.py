"""The only place that converts pixel ranges and perturbation budgets.

Stored images are uint8. Users, attacks and results use the unit range [0, 1]. Networks, chains and training work in
the JEM family's internal range [-1, 1] (x_internal = 2 * x_unit - 1), so an L-infinity or L2 budget doubles when converted.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator

if TYPE_CHECKING:  # settings import this module and must not load torch
    from torch import Tensor

INTERNAL = (-1.0, 1.0)
UNIT = (0.0, 1.0)


# "0.03", "3e-2" or "8/255". The number of digits is limited: Python's Fraction takes minutes for "1e999999999".
BUDGET = re.compile(r" *([-+]?[0-9]{1,15}) */ *([0-9]{1,15}) *| *[-+]?([0-9]{1,40}\.?[0-9]{0,40}|\.[0-9]{1,40})([eE][-+]?[0-9]{1,3})? *")


def parse_budget(value: Any) -> float:
    """A number of [0, 1] pixels from 0.03, "0.03" or "8/255". Raises ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError('a number or a fraction such as "8/255" is allowed')
    try:
        if not isinstance(value, str):
            return float(value)
        found = BUDGET.fullmatch(value)
        if found is None:
            raise ValueError("neither a number nor a fraction")
        return int(found[1]) / int(found[2]) if found[2] else float(value)
    except (ValueError, ArithmeticError) as error:
        shown = ascii(value)[:60]
        raise ValueError(f'{shown} is not a number; a number or a fraction such as "8/255" is allowed') from error


Budget = Annotated[float, BeforeValidator(parse_budget)]


def unit_from_uint8(x: Tensor) -> Tensor:
    """uint8 [0, 255] -> float32 [0, 1]."""
    return x.float() / 255


def uint8_from_unit(x: Tensor) -> Tensor:
    """float [0, 1] -> uint8, rounded to nearest; values outside are clamped."""
    return (x.clamp(0, 1) * 255).round().byte()


def internal_from_unit(x: Tensor) -> Tensor:
    """[0, 1] -> [-1, 1]."""
    return x * 2 - 1


def unit_from_internal(x: Tensor) -> Tensor:
    """[-1, 1] -> [0, 1]."""
    return (x + 1) / 2


def internal_distance(unit_distance: float) -> float:
    """A distance or step (eps, step size) of the unit range, in the internal range."""
    return unit_distance * 2


def unit_distance(internal_distance: float) -> float:
    """A distance or step of the internal range, in [0, 1] pixels."""
    return internal_distance / 2
