"""Stage `prepare`: source -> prepared arrays and data card."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ebjdat.data import prepared
from ebjdat.data.sources import said_of_skipped
from ebjdat.params import Profile


def run(profile: Profile, out: Path, card_out: Path) -> None:
    data, card = prepared.prepare(profile.data)
    prepared.save(data, card, out, card_out)
    sizes = ", ".join(f"{n} {split}" for split, n in card["sizes"].items())
    print(f"{card['name']}: {sizes}; {card['image_shape']} uint8, {len(card['classes'])} classes, data {card['data_hash']}")
    for line in _notes(card):
        print(line)


def _notes(card: dict[str, Any]) -> Iterator[str]:
    """What a reader of the card should not miss, a line each."""
    reading, found = card["reading"], card["duplicates"]
    if reading.get("class_order") == "numeric" and sorted(card["classes"]) != card["classes"]:
        yield f"classes are in numeric order ({', '.join(card['classes'][:4])}, ...), not sorted as text; data.classes gives another"
    for split, folder in reading.get("folders", {}).items():
        yield f"the folder {folder!r} is the {split} split"
    for rule, n in reading.get("converted", {}).items():
        yield f"{n} images: {rule}"
    if reading.get("grey_stored_as_rgb"):
        yield "all images are grey, but stored as RGB: three equal channels; data.channels: 1 makes them one"
    if reading.get("skipped"):
        yield f"warning: {said_of_skipped(reading['skipped'])}"
    said = {
        "test_in_train": "test images are training images too, pixel by pixel",
        "test_in_validation": "test images are validation images too",
        "validation_in_train": "validation images are training images too",
        "within_train": "training images are there again",
        "conflicting_labels": "pictures bear more than one label",
    }
    for key, what in said.items():
        if found[key]:
            yield f"warning: {found[key]} {what}"
