"""Which code runs, which commit it is of, and what `make` hands on: with real git, make and Snakemake."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import ebjdat
from ebjdat import yamlfile
from ebjdat.checkout import CheckoutError, refuse_another
from ebjdat.cli import app
from ebjdat.files import commit_of
from ebjdat.settings import ParamsError, join_overrides, split_overrides

from .conftest import ROOT

UNUSUAL = "my $x $$HOME 'ü' #2 & {a} \"q\" (1).tar.xz"


# Without what a make that runs these tests hands on to others below it.
OF_A_SHELL = {
    k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS")) and k not in ("PROFILE", "OVERRIDES", "QUOTED_OVERRIDES")
}


def git(folder: Path, *arguments: str) -> str:
    settings = ["-c", "user.name=t", "-c", "user.email=t@t.example", "-c", "protocol.file.allow=always"]
    done = subprocess.run(["git", *settings, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def package_in(folder: Path) -> Path:
    """A file layout like this project's; its package."""
    package = folder / "src/ebjdat"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (folder / "params.yaml").write_text("a: 1\n")
    (folder / "dvc.lock").write_text("")
    return package


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """That of a repository with one commit."""
    made = package_in(tmp_path / "own")
    git(tmp_path / "own", "init", "-q")
    git(tmp_path / "own", "add", "-A")
    git(tmp_path / "own", "commit", "-qm", "start")
    commit_of.cache_clear()
    return made


@pytest.fixture
def head(package: Path) -> str:
    return git(package, "rev-parse", "--short=12", "HEAD")


@pytest.mark.parametrize(
    ("changed", "mark"),
    [("", ""), ("params.yaml", "-dirty"), ("src/ebjdat/new.py", "-dirty"), ("dvc.lock", ""), ("notes.txt", "")],
)
def test_the_commit_is_that_of_the_code(package: Path, head: str, changed: str, mark: str) -> None:
    if changed:
        (package.parents[1] / changed).write_text("b: 2\n")
    assert commit_of(package) == head + mark


def test_somebody_elses_commit_is_not_taken(package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A source archive, unpacked in another repository, and outside of any."""
    assert commit_of(package_in(package.parents[1] / "vendor")) == "unknown"
    assert commit_of(package_in(tmp_path / "alone")) == "unknown"
    assert capsys.readouterr().err == ""


def test_worktrees_submodules_and_gits_own_variables(package: Path, head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(package, "worktree", "add", "-q", str(tmp_path / "tree"))
    outer = tmp_path / "outer"
    outer.mkdir()
    git(outer, "init", "-q")
    git(outer, "commit", "-qm", "another", "--allow-empty")
    git(outer, "submodule", "--quiet", "add", str(package.parents[1]), "sub")
    monkeypatch.setenv("GIT_DIR", str(outer / ".git"))  # as in a hook of another repository
    monkeypatch.setenv("GIT_WORK_TREE", str(outer))
    for folder in (tmp_path / "tree", outer / "sub", tmp_path / "own"):
        assert commit_of(folder / "src/ebjdat") == head


@pytest.mark.parametrize(
    ("variables", "reason"),
    [({"GIT_TEST_ASSUME_DIFFERENT_OWNER": "1"}, "dubious ownership"), ({"PATH": "/nowhere"}, "git is not installed")],
)
def test_why_git_cannot_say_is_output_once(
    package: Path, variables: dict[str, str], reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert [commit_of(package), commit_of(package)] == ["unknown", "unknown"]
    output = capsys.readouterr().err
    assert reason in output
    assert output.count("\n") == 1


def test_another_checkouts_code_is_refused(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = package.parents[1]
    (copy / "deep").mkdir()
    for folder in (copy, copy / "deep"):
        monkeypatch.chdir(folder)
        done = CliRunner().invoke(app, ["methods"])
        assert done.exit_code == 1
        assert f"this folder belongs to the checkout {copy}" in done.output
        assert f"that of {ROOT}" in done.output
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with pytest.raises(CheckoutError, match="`make install` here"):
        refuse_another(copy)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    with pytest.raises(CheckoutError, match="unset PYTHONPATH"):
        refuse_another(copy)


def test_its_own_and_installed_code_are_not_refused(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to(ROOT)
    for folder in (ROOT, ROOT / "docs", tmp_path, tmp_path / "link/params"):
        refuse_another(folder)
    monkeypatch.setattr(ebjdat, "__file__", str(tmp_path / "lib/site-packages/ebjdat/__init__.py"))
    refuse_another(package)


def make(folder: Path, *arguments: str, **environment: str) -> str:
    done = subprocess.run(["make", *arguments], cwd=folder, env={**OF_A_SHELL, **environment}, capture_output=True, text=True, check=True)
    return done.stdout


def test_make_sees_that_an_environment_came_along_from_another_place(tmp_path: Path) -> None:
    """(The commands that it would run; the environment itself takes a minute.)"""
    first = tmp_path / "a folder"
    first.mkdir()
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, first)
    assert "-m venv .venv" in make(first, "-n", "install")
    (first / ".venv/bin").mkdir(parents=True)
    (first / ".venv/bin/python").symlink_to(sys.executable)
    (first / ".venv/.installed").write_text(f"{first.resolve()}\n")
    assert "venv" not in make(first, "-n", "install")
    shutil.copytree(first, tmp_path / "copy", symlinks=True)
    output = make(tmp_path / "copy", "-n", "install")
    assert "rm -rf .venv" in output
    assert "-m venv .venv" in output
    (first / ".venv/bin/python").unlink()  # as after an update of the system's Python
    (first / ".venv/bin/python").symlink_to(tmp_path / "gone")
    assert "-m venv .venv" in make(first, "-n", "install")


SAY = '--eval=say: ; @printf "%s\\n" "$$OVERRIDES" "$$QUOTED_OVERRIDES" "$$XDG_CACHE_HOME"'


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_make_hands_overrides_on_as_they_were_written(how: str) -> None:
    written = shlex.join([f"data.path={UNUSUAL}", "params/overrides/ci.yaml"])
    output = make(ROOT, SAY, "say", *([f"OVERRIDES={written}"] if how == "argument" else []), OVERRIDES=written).splitlines()
    assert output[0] == written
    assert yaml.load(output[1], Loader=yaml.BaseLoader) == written
    assert split_overrides(written) == [f"data.path={UNUSUAL}", "params/overrides/ci.yaml"]


def test_caches_are_kept_in_the_checkout_where_home_has_no_place(tmp_path: Path) -> None:
    environment = {k: v for k, v in OF_A_SHELL.items() if k not in ("HOME", "XDG_CACHE_HOME")}
    for more, place in (({}, f"{ROOT}/.cache"), ({"HOME": "/proc/none"}, f"{ROOT}/.cache"), ({"HOME": str(tmp_path)}, "")):
        done = subprocess.run(["make", SAY, "say"], cwd=ROOT, env={**environment, **more}, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[2] == place


@pytest.mark.parametrize("value", [UNUSUAL, "images #2.zip", "a, b.zip", "ünïcode.zip", "10", "3 - 1.zip"])
def test_a_path_is_read_as_it_was_written(value: str) -> None:
    written = join_overrides([f"data.path={value}", "seeds=[0]"])
    read = yaml.load(written, Loader=yaml.BaseLoader)
    words = read if isinstance(read, list) else split_overrides(read)
    assert words == [f"data.path={value}", "seeds=[0]"]
    assert str(yamlfile.parse_assignment(words[0])["data"]["path"]) == value


@pytest.mark.parametrize("text", ["data.path=my images.tar.xz", "data.path='my images", "images.zip"])
def test_overrides_that_are_not_quoted_are_refused_with_the_way_to_do_it(text: str) -> None:
    with pytest.raises(ParamsError, match=r"data\.path='my images\.tar\.xz'"):
        split_overrides(text)


SNAKEFILE = f"""
include: "{ROOT}/workflow/rules/stop.smk"
onstart:
    watch_signals()
onerror:
    end_if_stopped()
rule all:
    output: "made"
    shell: "touch begun; sleep 60; touch made"
"""


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_workflow_that_is_stopped_says_so_in_one_line(number: signal.Signals, code: int, tmp_path: Path) -> None:
    (tmp_path / "Snakefile").write_text(SNAKEFILE)
    with (tmp_path / "log").open("w") as log:
        command = [sys.executable, "-m", "snakemake", "--cores", "1"]
        process = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "begun").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.05)
    os.killpg(process.pid, number)
    assert process.wait(60) == code
    output = (tmp_path / "log").read_text()
    assert output.splitlines()[-1] == "stopped: nothing is half-written, and the same command continues where it was"
    assert "Error in rule" not in output
    assert "WorkflowError" not in output
