"""Stage `prepare`: source -> prepared arrays and data card."""

from __future__ import annotations

from pathlib import Path

from ebjdat.data import prepared
from ebjdat.params import Profile


def run(profile: Profile, out: Path, card_out: Path) -> None:
    data, card = prepared.prepare(profile.data)
    prepared.save(data, card, out, card_out)
    sizes = ", ".join(f"{n} {split}" for split, n in card["sizes"].items())
    print(f"{card['name']}: {sizes}; {card['image_shape']} uint8, {len(card['classes'])} classes, data {card['data_hash']}")
    for line in (*card["notes"], *(f"warning: {warning}" for warning in card["warnings"])):
        print(line)
