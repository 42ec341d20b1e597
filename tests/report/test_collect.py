"""Result files are read whole or refused: no damaged, changed or mistyped value reaches the report."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from ebjdat.files import FileError, read_json, write_result
from ebjdat.report.collect import collect, read_card, read_curve
from ebjdat.settings import Profile

from .results import CARD, MADE, change

RUN = "eb_jdat/seed0"


@pytest.mark.parametrize(
    ("file", "values", "why"),
    [
        ("finetune", {"finetune_seconds": "10"}, "finetune_seconds is '10', where its unit is seconds"),
        ("finetune", {"git_commit": None}, "without git_commit"),
        ("finetune", {"events": "none"}, "events is 'none', where its unit is list of text"),
        ("finetune", {"events": [1]}, r"events\.0: Input should be a valid string"),
        ("attack", {"clean_acc": [0.5]}, r"clean_acc is \[0.5\], where its unit is fraction"),
        ("attack", {"pgd20_acc": None}, "without pgd20_acc"),
        ("attack", {"released_pgd20_acc": "x" * 9999}, r"released_pgd20_acc is 'x+… "),
        ("attack", {"sweep": []}, "sweep: List should have at least 1 item"),
        ("attack", {"sweep": [[0.1]]}, r"sweep\.0"),
        ("attack", {"sweep": [["a", "b"]]}, r"sweep\.0\.0"),
        ("attack", {"checks": [{"name": "x"}]}, r"checks\.0\.protocol: Field required"),
        ("attack", {"n_test": True}, "n_test is True, where its unit is count"),
        ("generate", {"frechet_extractor": 3}, "frechet_extractor is 3"),
        ("energy", {"energy_gap_generated": {}}, "energy_gap_generated is {}"),
        ("energy", {"energy_clean": None}, "without energy_clean"),
        ("reliability", {"ood_missing": ["svhn"]}, "ood_missing is"),
        ("reliability", {f"name{i}": i for i in range(10_001)}, "names"),
    ],
)
def test_a_result_that_is_not_what_its_name_says_names_its_file(
    profile: Profile, filled: Path, file: str, values: dict[str, Any], why: str
) -> None:
    path = filled / RUN / f"{file}.json"
    change(path, **values)
    with pytest.raises(FileError, match=why) as caught:
        collect(profile, filled, "d1")
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert message.endswith("; delete it and rerun its stage")
    assert len(message) < 600


@pytest.mark.parametrize(
    ("stage", "name", "refused"), [("attack", "n_test", True), ("energy", "n_energy_clean", True), ("attack", "clean_acc", False)]
)
def test_a_measurement_may_be_null_but_not_a_count(profile: Profile, filled: Path, stage: str, name: str, refused: bool) -> None:
    path = filled / RUN / f"{stage}.json"
    write_result(path, {**read_json(path), name: None})
    if refused:
        with pytest.raises(FileError, match=f"without {name}"):
            collect(profile, filled, "d1")
    else:
        assert collect(profile, filled, "d1")[-1].metrics[name] is None


def test_no_changed_bit_of_a_result_reaches_the_report(profile: Profile, filled: Path) -> None:
    path = filled / RUN / "attack.json"
    whole, runs = path.read_bytes(), collect(profile, filled, "d1")
    number = whole.index(b'"clean_acc": 0.') + len(b'"clean_acc": 0.')
    bits = [(number, 0), *((i * 97 % len(whole), i % 8) for i in range(200))]
    messages = []
    for place, bit in bits:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
        try:
            assert collect(profile, filled, "d1") == runs  # one blank became another
        except FileError as error:
            messages.append(str(error))
    assert len(messages) > 150
    assert all(text.startswith(f"{path}: ") for text in messages)
    for old, new, why in (
        (b'"digest"', b'"tsegid"', "no digest, so from an earlier version"),
        (
            whole[number - 1 : number + 2],
            whole[number - 1 : number] + b"1" + whole[number + 1 : number + 2],
            "changed since it was written",
        ),
    ):
        path.write_bytes(whole.replace(old, new))
        with pytest.raises(FileError, match=why):
            collect(profile, filled, "d1")


@pytest.mark.parametrize("name", [name for stage, names in MADE.items() if stage != "pretrain" for name in names])
def test_a_changed_file_beside_a_result_is_refused(profile: Profile, filled: Path, name: str) -> None:
    """A curve, a picture, verdicts or energies with one bit flipped, which their formats may well not notice."""
    path = filled / RUN / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    with pytest.raises(FileError, match=rf"^{path}: changed since its stage wrote it .*`dvc checkout {path}`"):
        collect(profile, filled, "d1")
    path.write_bytes(whole)
    runs = collect(profile, filled, "d1")
    assert "files" not in runs[0].metrics
    path.unlink()
    assert collect(profile, filled, "d1") == runs  # whoever reads it reports that it is missing
    os.mkfifo(path)
    with pytest.raises(FileError, match=rf"^{path}: not a regular file"):
        collect(profile, filled, "d1")


@pytest.mark.parametrize(
    ("files", "why"),
    [([], "files is list; names with"), (None, "without files, so from an earlier version")],
)
def test_a_result_without_a_list_of_its_files_is_refused(profile: Profile, filled: Path, files: Any, why: str) -> None:
    change(filled / RUN / "energy.json", files=files)
    with pytest.raises(FileError, match=rf"energy\.json: .*{why}"):
        collect(profile, filled, "d1")


def test_a_missing_result_and_a_wrong_card_are_named(profile: Profile, filled: Path) -> None:
    (filled / "pretraining/clean/seed0/pretrain.json").unlink()
    with pytest.raises(FileError, match=r"pretrain\.json: no such file"):
        collect(profile, filled, "d1")
    write_result(filled / "card.json", {**CARD, "sizes": [1]})
    with pytest.raises(FileError, match=r"card\.json: .*sizes"):
        read_card(filled / "card.json")


@pytest.mark.parametrize("content", [b"", b"\x00\xff\xfe", b"epoch,loss\n1,2\n3,4,5,6\n", b"loss\n1\n", b"epoch,energy_clean\n1,high\n"])
def test_a_damaged_curve_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "finetune_curve.csv").write_bytes(content)
    with pytest.raises(FileError, match=r"finetune_curve\.csv: damaged or invalid"):
        read_curve(tmp_path / "finetune_curve.csv")


def test_a_pretrainings_divergences_are_listed_with_each_run_that_shares_it(three_seeds: Profile, filled_three: Path) -> None:
    change(filled_three / "pretraining/clean/seed0/pretrain.json", events=["epoch 1, step 2: seen; done"])
    events = {(run.experiment, run.seed): run.metrics["events"] for run in collect(three_seeds, filled_three, "d1")}
    assert events["pgd_at", 0] == ["pretraining clean, epoch 1, step 2: seen; done"]
    assert events["pgd_at", 1] == events["classifier", 0] == []
