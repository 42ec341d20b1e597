"""Stage `prepare`: source -> prepared arrays and data card."""

from __future__ import annotations

from pathlib import Path

from ebjdat.data import prepared
from ebjdat.params import ParamsError, Profile, too_few_classes


def run(profile: Profile, out: Path, card_out: Path) -> None:
    """Raises ParamsError where a protocol's ensemble cannot be run on so few classes: that is known here, before any training."""
    data, card = prepared.prepare(profile.data)
    if problem := too_few_classes(profile.evaluation.attack, len(data.classes)):
        raise ParamsError(f"evaluation.attack: {problem}")
    prepared.save(data, card, out, card_out)
    sizes = ", ".join(f"{n} {split}" for split, n in card["sizes"].items())
    print(f"{card['name']}: {sizes}; {card['image_shape']} uint8, {len(card['classes'])} classes, data {card['data_hash']}")
