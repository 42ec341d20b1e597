"""Models compared on the same examples: McNemar and Holm by hand; damaged verdicts are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from ebjdat.files import FileError
from ebjdat.report import pairs
from ebjdat.report.pairs import correct_examples, pairwise
from ebjdat.settings import STANDARD, Profile, load

from ..conftest import ROOT
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


# ---- methods and their controls

N = 200


def verdicts(results: Path, name: str, seed: int, right: np.ndarray[Any, Any]) -> None:
    path = results / name / f"seed{seed}" / "verdicts.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {"weights": "raw", "protocol": STANDARD, "index": range(N), "clean": True, "pgd20": right, "autoattack": right}
    pd.DataFrame(rows).to_parquet(path)


NO_OTHER = [f"evaluation.attack.protocols.{name}.n=0" for name in ("released", "standard_l2")]


def contest(seeds: list[int], ensemble: int = N) -> Profile:
    changes = [f"seeds={seeds}", "experiments.eb_jdat.control=pgd_at", f"evaluation.attack.protocols.standard.n={ensemble}", *NO_OTHER]
    return load(ROOT / "params/digits.yaml", changes)


def made(results: Path, extra: list[int]) -> None:
    """For each seed the method is right on `extra` images more than the control, which is right on 100."""
    for seed, more in enumerate(extra):
        verdicts(results, "pgd_at", seed, np.arange(N) < 100)
        verdicts(results, "eb_jdat", seed, np.arange(N) < 100 + more)


@pytest.mark.parametrize(("more", "outcome"), [(12, "better"), (3, "tied"), (-12, "worse")])
def test_one_seed_by_mcnemars_test(more: int, outcome: str, tmp_path: Path) -> None:
    made(tmp_path, [more])
    clean, pgd, ensemble = pairs.with_controls(contest([0]), tmp_path)
    assert (pgd.outcome, pgd.difference, pgd.n, pgd.seeds) == (outcome, more / N, N, 1)
    assert pgd.p == pytest.approx(min(1.0, 2 * 0.5 ** abs(more)))  # all discordant examples on one side
    assert (clean.outcome, clean.difference, clean.p) == ("tied", 0, 1)
    assert (ensemble.column, ensemble.outcome) == ("autoattack", outcome)
    assert [c.column for c in pairs.with_controls(contest([0], ensemble=0), tmp_path)] == ["clean", "pgd20"]


def test_the_ensemble_of_another_protocol_is_compared_under_its_own_name(tmp_path: Path) -> None:
    """As it was measured: other images are right under it than under the standard one."""
    for name, right in (("pgd_at", 100), ("eb_jdat", 112)):
        verdicts(tmp_path, name, 0, np.arange(N) < right)
        path = tmp_path / name / "seed0/verdicts.parquet"
        frame = pd.read_parquet(path)
        other = frame.assign(protocol="light", autoattack=frame["index"] < 50)
        pd.concat([frame, other]).to_parquet(path)
    light = "evaluation.attack.protocols.light={like: standard, eps: 0.1, n: 200, pgd: {step_size: 0.02}}"
    changes = ["seeds=[0]", "experiments.eb_jdat.control=pgd_at", "evaluation.attack.protocols.standard.n=0", light, *NO_OTHER]
    found = pairs.with_controls(load(ROOT / "params/digits.yaml", changes), tmp_path)
    assert [(c.title, c.outcome) for c in found if c.protocol in (STANDARD, "light")] == [
        ("clean", "tied"),
        ("PGD-20", "better"),
        ("ensemble of light", "tied"),
    ]


def test_each_of_several_controls_is_compared(tmp_path: Path) -> None:
    made(tmp_path, [12])
    verdicts(tmp_path, "jempp", 0, np.arange(N) < 112)
    profile = load(ROOT / "params/digits.yaml", ["seeds=[0]", "experiments.eb_jdat.control=[pgd_at, jempp]"])
    found = pairs.with_controls(profile, tmp_path)
    assert [(c.b, c.outcome) for c in found if c.column == "pgd20"] == [("pgd_at", "better"), ("jempp", "tied")]


@pytest.mark.parametrize(("extra", "outcome"), [([10, 12, 14], "better"), ([-10, 12, 14], "tied"), ([-9, -12, -14], "worse")])
def test_several_seeds_by_students_test(extra: list[int], outcome: str, tmp_path: Path) -> None:
    made(tmp_path, extra)
    _, pgd, _ = pairs.with_controls(contest([0, 1, 2]), tmp_path)
    differences = [more / N for more in extra]
    assert pgd.outcome == outcome
    assert pgd.difference == pytest.approx(np.mean(differences))
    assert pgd.p == pytest.approx(stats.ttest_1samp(differences, 0).pvalue)
    interval = stats.t.interval(0.95, 2, np.mean(differences), stats.sem(differences))
    assert (pgd.low, pgd.high) == pytest.approx(interval)
    assert ((pgd.low > 0) or (pgd.high < 0)) == (outcome != "tied")


@pytest.mark.parametrize(("more", "outcome"), [(1, "tied"), (0, "tied"), (5, "better")])
def test_seeds_with_equal_differences_are_judged_by_their_examples(more: int, outcome: str, tmp_path: Path) -> None:
    """Their spread is 0, so Student's t would be certain of any difference: 3 more of 600 are no evidence (p = 0.25), 15 are."""
    made(tmp_path, [more] * 3)
    _, pgd, _ = pairs.with_controls(contest([0, 1, 2]), tmp_path)
    assert (pgd.outcome, pgd.p) == (outcome, pytest.approx(min(1.0, 2 * 0.5 ** (3 * more))))
    assert pgd.low < pgd.difference < pgd.high
