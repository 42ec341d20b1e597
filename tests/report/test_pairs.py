"""Models compared on the same examples: McNemar and Holm by hand; damaged verdicts are named."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from ebjdat.files import FileError
from ebjdat.report import pairs
from ebjdat.report.pairs import correct_examples, pairwise
from ebjdat.settings import Profile

from .results import write_verdicts


def test_pairs_of_models_are_compared_on_the_same_examples(profile: Profile, filled: Path) -> None:
    write_verdicts(filled / "pgd_at/seed0/verdicts.parquet", profile, 90, pgd=80, ensemble=20)
    write_verdicts(filled / "eb_jdat/seed0/verdicts.parquet", profile, 90, pgd=57)  # another p: Holm's factors differ from pair to pair
    compared = {(p["a"], p["b"]): p for p in pairwise(profile, filled, 0, "pgd20")}
    assert len(compared) == 6
    pair = compared["classifier", "pgd_at"]
    assert (pair["only_a"], pair["only_b"], pair["n"]) == (0, 30, 100)
    assert pair["p"] == pytest.approx(2 * 0.5**30)
    assert compared["classifier", "jempp"]["p"] == 1
    smallest = sorted(p["p"] for p in compared.values())
    holm = [min(1, max(smallest[j] * (6 - j) for j in range(i + 1))) for i in range(6)]
    assert sorted(p["p_holm"] for p in compared.values()) == pytest.approx(holm)
    compared = {(p["a"], p["b"]): p for p in pairwise(profile, filled, 0, "autoattack")}
    assert (compared["classifier", "pgd_at"]["only_b"], compared["classifier", "pgd_at"]["n"]) == (11, 20)


def test_damaged_verdicts_are_named(profile: Profile, filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = filled / "eb_jdat/seed0/verdicts.parquet"
    whole, frame = path.read_bytes(), pd.read_parquet(path)
    others = (frame.drop(columns="pgd20"), frame.assign(pgd20="yes"), frame.assign(protocol="other"), frame.assign(weights=1))
    for content in (b"", b"PAR1", whole[: len(whole) // 2], b"junk" * 100, *others):
        path.write_bytes(content) if isinstance(content, bytes) else content.to_parquet(path)
        with pytest.raises(FileError, match=r"verdicts\.parquet: damaged"):
            correct_examples(filled, "eb_jdat", 0, "pgd20")
    frame[frame["index"] < 90].to_parquet(path)
    with pytest.raises(
        FileError, match=r"not of the same examples \(pgd20: classifier has 100, .*eb_jdat has 90\); rerun the attack stage"
    ):
        pairwise(profile, filled, 0, "pgd20")
    path.write_bytes(whole)
    monkeypatch.setattr(pairs, "MOST_VERDICTS", 10)
    with pytest.raises(FileError, match="rows"):
        correct_examples(filled, "eb_jdat", 0, "pgd20")
