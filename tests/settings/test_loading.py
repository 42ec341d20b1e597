"""Files and overrides of a profile: which are read, what a run is named, which other files it needs."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from ebjdat.cli import app
from ebjdat.evaluation.frechet import ExtractorError
from ebjdat.settings import ParamsError, load, run_name, usual_protocols
from ebjdat.stages import prepare

from ..conftest import ROOT
from .conftest import CIFAR, DIGITS, FOLDER


def check(profile: Path, *overrides: str) -> Result:
    """`ebjdat check`"""
    return CliRunner().invoke(app, ["check", "--params", str(profile), *(word for one in overrides for word in ("--override", one))])


@pytest.mark.parametrize(
    ("path", "overrides", "expected"),
    [
        ("digits.yaml", ["training.epochs"], r"^training\.epochs: there is no such file; key\.path=value or a YAML file is allowed$"),
        ("digit.yaml", [], r"params/digit\.yaml: there is no such file; did you mean 'digits'"),
        ("digit", [], r"params/digit: there is no such file; did you mean 'digits'"),
        (None, ["checks.n"], r"^checks\.n: there is no such file; key\.path=value or a YAML file is allowed$"),
        (
            None,
            ["batch_size=0", "checks.m=1"],
            r"^batch_size: input should be greater than .*\nchecks\.m: unknown key; |^checks\.m: .*\nbatch",
        ),
    ],
)
def test_what_is_neither_a_setting_nor_a_file_is_refused(path: str | None, overrides: list[str], expected: str) -> None:
    with pytest.raises(ParamsError, match=expected):
        load(ROOT / "params" / path, overrides) if path else usual_protocols(10, overrides)


def test_run_names_keep_overridden_results_apart() -> None:
    assert run_name("params/digits.yaml") == "digits"
    assert run_name("params/digits.yaml", ["params/overrides/ci.yaml"]) == "digits+ci"
    assert run_name("params/digits.yaml", ["a.b=1"]) != run_name("params/digits.yaml", ["a.b=2"])
    with pytest.raises(ParamsError, match=r"has 161 characters, 150 are allowed; shorten the file names"):
        run_name("a.yaml", ["b" * 79 + ".yaml", "c" * 79 + ".yaml"])


@pytest.mark.parametrize("name", ["a b", "a+b", "-a", ".a", "{a}", "a;b", "ä", "x" * 101])
def test_files_whose_names_cannot_name_folders_are_refused(tmp_path: Path, name: str) -> None:
    file = tmp_path / f"{name}.yaml"
    file.write_text("runtime: {threads: 2}")
    done = check(DIGITS, str(file))
    assert done.exit_code == 1
    assert "file names become part of folder names" in done.output


def test_check_lists_what_is_missing(tmp_path: Path) -> None:
    absent = check(FOLDER, f"data.path={tmp_path / 'images.tar.xz'}")
    assert absent.exit_code == 0
    assert "fine; " in absent.stdout
    assert "images.tar.xz is not here yet" in absent.stderr
    assert check(FOLDER, f"data.path={tmp_path}").stderr == ""
    absent = check(CIFAR, f"data.root={tmp_path}")
    assert absent.exit_code == 0
    assert f"data.root: {tmp_path}/cifar-10-batches-py is not here yet; cifar10 is downloaded" in absent.stderr
    (tmp_path / "cifar-10-batches-py").mkdir()
    assert f"data.root: {tmp_path}/cifar-10-batches-py is here" in check(CIFAR, f"data.root={tmp_path}").stdout


def test_check_reports_all_that_is_wrong_at_once(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / "images/train" / name).mkdir(parents=True)
    ood = f"evaluation.reliability.ood_path={tmp_path}/gone"
    done = check(FOLDER, f"data.path={tmp_path}/images", ood)
    assert done.exit_code == 1
    assert f"evaluation.reliability.ood_path: {tmp_path}/gone is not here" in done.stderr
    assert "needs at least 4 classes, the data have 2" in done.stderr
    done = check(FOLDER, ood, f"data.path={'x' * 300}")
    assert done.exit_code == 1
    assert "data.path: xxx" in done.stderr
    assert "File name too long" in done.stderr
    assert f"evaluation.reliability.ood_path: {tmp_path}/gone is not here" in done.stderr


def test_a_teachers_weights_must_exist_before_anything_trains(tmp_path: Path) -> None:
    student = f"{{method: ard, pretraining: clean, training: {{teacher: {{model: 'a:b', weights: {tmp_path}/gone.pt}}}}}}"
    gone = rf"experiments\.s\.training\.teacher\.weights: {tmp_path}/gone\.pt is not here; put the teacher's weights there"
    with pytest.raises(ParamsError, match=gone):
        prepare.run(load(DIGITS, [f"experiments.s={student}"]), tmp_path / "data.npz", tmp_path / "card.json")


@pytest.mark.parametrize(
    ("key", "more"), [("generate.inception_weights", ["evaluation.generate.extractor=inception"]), ("reliability.ood_path", [])]
)
def test_files_that_settings_name_must_exist_before_anything_trains(tmp_path: Path, key: str, more: list[str]) -> None:
    exists, gone = tmp_path / "exists.pth", tmp_path / "gone.pth"
    exists.write_bytes(b"no weights")
    words = [f"data.path={tmp_path}", *more]
    with pytest.raises(ParamsError, match=rf"evaluation.{key}: {gone} is not here; put "):
        prepare.run(load(FOLDER, [*words, f"evaluation.{key}={gone}"]), tmp_path / "data.npz", tmp_path / "card.json")
    for path, code, text in ((gone, 1, "is not here; put "), (exists, 0, "is here")):
        done = check(FOLDER, *words, f"evaluation.{key}={path}")
        assert (done.exit_code, f"evaluation.{key}: {path} {text}" in done.output) == (code, True)
    if more:
        with pytest.raises(ExtractorError, match=r"Inception's weights are unavailable from .*exists\.pth"):
            prepare.run(load(FOLDER, [*words, f"evaluation.{key}={exists}"]), tmp_path / "data.npz", tmp_path / "card.json")
    assert not (tmp_path / "data.npz").exists()


PATHS = {
    "check": "--params=params/cifar10-folder.yaml --override=data.path={}",
    "check_root": "--params=params/cifar10.yaml --override=data.root={}",
    "check_ood": "--params=params/digits.yaml --override=evaluation.reliability.ood_path={}",
    "check_params": "--params={}",
    "check_override": "--params=params/digits.yaml --override={}",
    "prepare": "--params=params/digits.yaml --out={} --card=card.json",
    "inspect": "{}",
    "attack": "--model=torch.nn:Identity --weights={} --data=none.npz --out=out.json",
    "attack_data": "--model=torch.nn:Identity --data={} --out=out.json",
}


@pytest.mark.parametrize("name", PATHS)
def test_a_path_that_no_file_can_have_is_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    done = CliRunner().invoke(app, [name.partition("_")[0], *PATHS[name].format("a" * 300).split()])
    assert (done.exit_code, type(done.exception)) == (1, SystemExit)
    assert done.stderr.count("\n") == 1
    assert "aaaa" in done.stderr
    assert "File name too long" in done.stderr
