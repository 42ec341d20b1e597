"""Stage `prepare`: source -> prepared arrays and data card."""

from __future__ import annotations

from pathlib import Path

from ebjdat.data import prepared
from ebjdat.settings import ParamsError, Profile, require_files, too_few_classes


def run(profile: Profile, out: Path, card_out: Path) -> None:
    """Raises DataError for the images; ParamsError or ExtractorError for what would fail only in later stages: missing files, and too
    few classes for a protocol's ensemble."""
    require_files(profile)
    generate = profile.evaluation.generate
    if generate.extractor == "inception":  # downloaded and read now, since `generate` follows hours of training
        import torch

        from ebjdat.evaluation.frechet import inception_features

        inception_features(None, generate, torch.device("cpu"))
    data, card = prepared.prepare(profile.data)
    if problem := too_few_classes(profile.evaluation.attack, len(data.classes)):
        raise ParamsError(f"evaluation.attack: {problem}")
    prepared.save(data, card, out, card_out)
    sizes = ", ".join(f"{n} {split}" for split, n in card["sizes"].items())
    print(f"{card['name']}: {sizes}; {card['image_shape']} uint8, {len(card['classes'])} classes, data {card['data_hash']}")
    for line in (*card["notes"], *(f"warning: {warning}" for warning in card["warnings"])):
        print(line)
