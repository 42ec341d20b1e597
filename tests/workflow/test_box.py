"""Stages on a bare machine, with the real programs: packed, interrupted, continued, refused where anything is wrong, taken back.

The bare machine is a Python in which only what the box asks for can be imported. Tests build on each other in this order.
"""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient
from packaging.requirements import Requirement

from ..conftest import ROOT
from .conftest import Project, checkout

STAGES = ("prepare", "pretrain-scratch-seed0", "finetune-classifier-seed0")
RESULT = "results/digits/classifier/seed0/finetune.json"
WEIGHTS = "checkpoints/digits/classifier/seed0.safetensors"
JOURNAL = "results/digits/classifier/seed0/finetune.journal.jsonl"
EPOCHS = 30
TO_CONTINUE = 75
BARE = """
import sys
class Bare:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, *more):
        return None if name.split(".")[0] in {blocked!r} else self.finder.find_spec(name, *more)
sys.meta_path[:] = map(Bare, sys.meta_path)
"""


def needed(names: set[str]) -> set[str]:
    """These distributions and all that they need."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        found.add(name)
        wanted = map(Requirement, importlib.metadata.requires(name) or [])
        waiting += [r.name for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


@dataclass(frozen=True)
class Box:
    """A packed folder on a machine that has torch, torchvision, what its requirements.txt lists, and nothing else."""

    folder: Path
    site: Path

    def environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SNAKEMAKE", "DVC", "MLFLOW", "EBJDAT", "GIT"))}
        return {**kept, "PYTHONPATH": str(self.site)}

    def run(self, *options: str, code: int | None = 0) -> str:
        done = subprocess.run(
            [sys.executable, self.folder / "run.py", *options],
            cwd="/",
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert code in (None, done.returncode), done.stdout[-4000:]
        return done.stdout

    def stopped(self, number: signal.Signals, stage: str, text: str) -> str:
        """Start it, wait until the stage at work has said so, send it a signal; what it said."""
        log = self.folder.parent / "stopped.log"
        with log.open("w") as out:
            process = subprocess.Popen(
                [sys.executable, self.folder / "run.py"], env=self.environment(), stdout=out, stderr=subprocess.STDOUT
            )
        deadline = time.monotonic() + 120
        while not re.search(text, log.read_text().rpartition(f"] {stage}")[2]):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        assert process.wait() == (TO_CONTINUE if number == signal.SIGTERM else -number)
        return log.read_text()

    def done(self) -> dict[str, dict[str, dict[str, str]]]:
        return json.loads((self.folder / "done.json").read_text())["stages"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The workstation: one experiment, whose training is long enough to be interrupted."""
    made = checkout(tmp_path_factory.mktemp("box") / "checkout", "classifier")
    made.change(
        experiments={"classifier": {"training": {"epochs": EPOCHS, "selection": {"after": 0.99}}}}, runtime={"checkpoint_minutes": 60}
    )
    made.commit("longer")
    return made


@pytest.fixture(scope="module")
def box(home: Project) -> Box:
    """Packed, and moved to another place."""
    home.run("python", "workflow/scripts/box.py", "pack", "box", "--experiments", "classifier", "--stages", "finetune")
    assert home.run("git", "status", "--porcelain") == ""
    folder, site = home.folder.parent / "elsewhere/box", home.folder.parent / "site"
    shutil.copytree(home.folder / "box", folder)
    shutil.rmtree(home.folder / "box")
    listed = {Requirement(line).name for line in (folder / "requirements.txt").read_text().splitlines()}
    there = needed({"torch", "torchvision", *listed})
    blocked = {
        module
        for module, distributions in importlib.metadata.packages_distributions().items()
        if not there.intersection(re.sub(r"[-_.]+", "-", name).lower() for name in distributions)
    }
    assert blocked > {"mlflow", "dvc", "snakemake", "pandas", "fastapi", "pytest"}
    site.mkdir()
    (site / "sitecustomize.py").write_text(BARE.format(blocked=blocked - {"ebjdat"}))
    return Box(folder, site)


@pytest.fixture
def broken(box: Box, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the box, for a test to spoil."""

    def make() -> Path:
        return Path(shutil.copytree(box.folder, tmp_path / "box", symlinks=True))

    return make


def refused(home: Project, box: Path, *options: str) -> str:
    """What `take` says; nothing was taken."""
    before = sorted(str(p) for folder in ("data", "checkpoints", "results") for p in (home.folder / folder).rglob("*"))
    text = home.run("python", "workflow/scripts/box.py", "take", str(box), *options, ok=False)
    assert text.startswith("error: ")
    assert "Traceback" not in text
    assert before == sorted(str(p) for folder in ("data", "checkpoints", "results") for p in (home.folder / folder).rglob("*"))
    assert not (home.folder / "dvc.lock").exists()
    return text


def imported(folder: Path, *starts: str) -> set[str]:
    """Third-party modules that these modules of the package, and those that they import, import anywhere."""
    seen: set[Path] = set()
    found: set[str] = set()
    waiting = [p for start in starts for p in ([folder / start] if start.endswith(".py") else (folder / start).glob("*.py"))]
    while waiting:
        file = waiting.pop()
        if file in seen or not file.exists() or file.name in ("publish.py", "store.py", "mlflow_model.py"):  # those that talk to MLflow
            continue
        seen.add(file)
        for node in ast.walk(ast.parse(file.read_text())):
            named = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                named = [node.module or "", *(f"{node.module}.{a.name}" for a in node.names)]
            for name in named:
                if name.startswith("ebjdat"):
                    path = folder.joinpath(*name.split(".")[1:])
                    waiting += [path / "__init__.py", path.with_suffix(".py")]
                else:
                    found.add(name.split(".")[0])
    assert len(seen) > 30
    return found - set(sys.stdlib_module_names)


def test_the_packages_of_the_box_are_those_that_its_stages_import() -> None:
    spec = importlib.util.spec_from_file_location("box", ROOT / "workflow/scripts/box.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["box"] = module
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "workflow/scripts"))
        spec.loader.exec_module(module)
    stages = [f"stages/{name}.py" for name in ("prepare", "train", "attack", "evaluate", "reliability")]
    packages = ("data", "models", "samplers", "objectives", "training", "evaluation")  # the registry imports them by name
    needed_here = imported(ROOT / "src/ebjdat", *stages, *packages)
    assert needed_here | {"typer"} == {*module.IMPORTS, "torch", "torchvision"}


def test_what_the_box_holds(box: Box) -> None:
    manifest = json.loads((box.folder / "box.json").read_text())
    assert [stage["name"] for stage in manifest["stages"]] == list(STAGES)
    assert all(stage["command"][:2] == ["-m", "ebjdat"] and "--threads" not in stage["command"] for stage in manifest["stages"])
    assert JOURNAL in manifest["stages"][2]["outputs"]
    text = subprocess.run(
        [sys.executable, "-c", "import mlflow"], env=box.environment(), capture_output=True, text=True, check=False
    ).stderr
    assert "No module named 'mlflow'" in text
    assert "0 of 3 stages of digits are done" in box.run("--status")
    assert not (box.folder / "done.json").exists()


def test_a_package_that_is_missing_is_named_before_anything_runs(broken: Callable[..., Path], box: Box) -> None:
    spoilt = Box(broken(), box.site)
    manifest = json.loads((spoilt.folder / "box.json").read_text())
    manifest["imports"]["no_such_module"] = "no-such-package==1.0"
    (spoilt.folder / "box.json").write_text(json.dumps(manifest))
    assert "missing on this machine: no-such-package==1.0" in spoilt.run(code=2)
    assert not (spoilt.folder / "done.json").exists()


@pytest.mark.parametrize("name", ["box.json", "done.json"])
@pytest.mark.parametrize("content", [b"{", b"[]", b"[" * 100_000, b"\xff"])
def test_a_damaged_list_is_one_line_there_and_here(home: Project, box: Box, tmp_path: Path, name: str, content: bytes) -> None:
    spoilt = tmp_path / "box"
    spoilt.mkdir()
    for file in ("run.py", "box.json"):
        shutil.copy(box.folder / file, spoilt)
    (spoilt / "done.json").write_text('{"stages": {}}')
    (spoilt / name).write_bytes(content)
    said = Box(spoilt, box.site).run("--status", code=2)
    assert said.startswith(f"{spoilt / name}: damaged")
    assert said.count("\n") == 1
    assert refused(home, spoilt).count("\n") == 1


def test_it_runs_in_pieces_and_loses_nothing(box: Box) -> None:
    box.stopped(signal.SIGKILL, "prepare", r": python")  # the stage does not outlive it
    deadline = time.monotonic() + 60
    while "another run.py, or a stage of one that was killed" in (said := box.run("--minutes", "0.00001", code=None)):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert "time is up: run it again to continue with prepare" in said
    text = box.stopped(signal.SIGTERM, STAGES[2], r"epoch +2/")
    assert "[1/3] prepare continues: python" in text
    assert "SIGTERM: finetune-classifier-seed0 is asked to stop" in text
    assert "training continues where it was" in text
    assert "run it again to continue with finetune-classifier-seed0" in text
    assert set(box.done()) == set(STAGES)
    assert "outputs" not in box.done()[STAGES[2]]
    text = box.run()
    assert "[3/3] finetune-classifier-seed0 continues: python -m ebjdat finetune" in text
    assert "prepare: done\n" in text
    assert "continues at epoch" in text
    assert "all 3 stages are done: copy this folder back" in text
    assert "3 of 3 stages of digits are done" in box.run("--status")
    events = [json.loads(line) for line in (box.folder / JOURNAL).read_text().splitlines()]
    assert [e["step"] for e in events if "metrics" in e] == list(range(1, EPOCHS + 1))
    assert sum("resumed" in e for e in events) == 1
    assert events[0]["begin"]["host"] == "box"
    assert events[-1]["end"] == "FINISHED"
    assert not list((box.folder / "state").rglob("*.journal.jsonl"))
    assert not list((box.folder / "state").rglob("*.pt"))
    assert not (box.folder / "logs/tracking.log").exists()  # no sender was ever started
    machine = box.done()[STAGES[2]]["machine"]
    assert machine["torch"].startswith("2.")
    assert os.uname().nodename not in (box.folder / "done.json").read_text()


def test_what_was_killed_between_its_end_and_the_note_of_it_does_not_run_again(broken: Callable[..., Path], box: Box) -> None:
    spoilt = Box(broken(), box.site)
    entries = spoilt.done()
    del entries[STAGES[2]]["outputs"]
    (spoilt.folder / "done.json").write_text(json.dumps({"format": 1, "stages": entries}))
    assert "begun   finetune-classifier-seed0" in spoilt.run("--status")
    assert "[3/3] finetune-classifier-seed0: done\n" in spoilt.run()
    assert spoilt.done() == box.done()


def test_what_failed_after_it_had_written_everything_is_not_done(broken: Callable[..., Path], box: Box) -> None:
    spoilt = Box(broken(), box.site)
    manifest = json.loads((spoilt.folder / "box.json").read_text())
    last = manifest["stages"][2]
    last["command"] = ["-c", f"import pathlib, sys; [pathlib.Path(p).write_text('x') for p in {last['outputs']}]; sys.exit(3)"]
    (spoilt.folder / "box.json").write_text(json.dumps(manifest))
    for _ in range(2):
        assert f"[3/3] {STAGES[2]}: FAILED with exit code 3" in spoilt.run(code=1)
    assert not any((spoilt.folder / name).exists() for name in last["outputs"])


def test_a_stage_that_is_called_by_hand_there_starts_no_sender(box: Box, tmp_path: Path) -> None:
    script = """
from pathlib import Path
from ebjdat.tracking.tracker import About, Subject, track
with track(Subject("run", "name", 0, "stage"), About({}, {}), Path("results/stage.journal.jsonl")) as tracker:
    tracker.final({"value": 1})
"""
    environment = {**box.environment(), "PYTHONPATH": f"{box.folder / 'src'}:{box.site}"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
    )
    assert done.stdout == ""
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()} == {"results/stage.journal.jsonl"}
    assert '"final": {"value": 1.0}' in (tmp_path / "results/stage.journal.jsonl").read_text()


def test_what_was_spoilt_on_the_way_is_refused(home: Project, box: Box, broken: Callable[..., Path]) -> None:
    spoilt = broken()
    weights = spoilt / WEIGHTS
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    curve = spoilt / "results/digits/classifier/seed0/finetune_curve.csv"
    curve.write_text(curve.read_text()[:-20])
    (spoilt / RESULT).unlink()
    code = spoilt / "src/ebjdat/pixels.py"
    code.write_text(code.read_text() + "\n# edited there\n")
    text = refused(home, spoilt)
    for name in (weights, curve):
        assert f"{name.relative_to(spoilt)}: changed or truncated since finetune-classifier-seed0 wrote it" in text
    assert f"{RESULT}: missing" in text
    assert "src/ebjdat/pixels.py: changed in the box since it was packed" in text
    assert "copy it back again" in text
    assert "again   finetune-classifier-seed0" in Box(spoilt, box.site).run("--status")


def test_what_was_done_is_what_was_packed(home: Project, box: Box, broken: Callable[..., Path]) -> None:
    """A log that is the package's own source would otherwise be written over it; another command, or fewer files, be taken."""
    spoilt, code, last = broken(), "src/ebjdat/pixels.py", STAGES[2]
    packed = json.loads((spoilt / "box.json").read_text())["files"]
    for key, value in (
        ("log", {code: packed[code]}),
        ("command", [*box.done()[last]["command"], "--override", "training.epochs=1"]),
        ("outputs", {name: content for name, content in box.done()[last]["outputs"].items() if name != WEIGHTS}),
    ):
        entries = box.done()
        entries[last][key] = value  # type: ignore[assignment]
        (spoilt / "done.json").write_text(json.dumps({"format": 1, "stages": entries}))
        assert f"{last}: not as box.json has it" in refused(home, spoilt), key


@pytest.mark.parametrize("path", ["../x", "/etc/x", "results/../../x"])
def test_no_path_leads_out_of_the_box(home: Project, broken: Callable[..., Path], path: str) -> None:
    spoilt = broken()
    for name in ("box.json", "done.json"):
        text = (spoilt / name).read_text()
        (spoilt / name).write_text(text.replace(RESULT, path))
    assert f"'{path}' leads out of the box" in refused(home, spoilt)


def test_links_in_the_box_are_refused(home: Project, broken: Callable[..., Path]) -> None:
    spoilt = broken()
    shutil.move(spoilt / RESULT, spoilt / "elsewhere.json")
    (spoilt / RESULT).symlink_to(spoilt / "elsewhere.json")
    assert f"{RESULT} is a link" in refused(home, spoilt)


def test_results_of_other_code_settings_or_data_are_refused(home: Project, box: Box) -> None:
    code = home.folder / "src/ebjdat/training/loop.py"
    old = code.read_text()
    code.write_text(old.replace("def train(", "assert True\n\n\ndef train("))
    home.change(experiments={"classifier": {"training": {"epochs": 7}}})
    try:
        text = refused(home, box.folder, "--force")
    finally:
        code.write_text(old)
        home.run("git", "checkout", "-q", "params")
    assert "finetune-classifier-seed0: code that it executes is another here" in text
    assert f"finetune-classifier-seed0: training.epochs was {EPOCHS} in the box, is 7 here" in text
    assert "prepare:" not in text
    assert re.search(r"packed at commit [0-9a-f]{12}, here is [0-9a-f]{12}-dirty: go to that code", text)


def test_other_results_are_not_overwritten_unasked_and_what_is_taken_is_both_tools_own(home: Project, box: Box) -> None:
    other = home.folder / RESULT
    other.parent.mkdir(parents=True)
    other.write_text("{}")
    assert f"{RESULT}: another one is here" in refused(home, box.folder)
    assert other.read_text() == "{}"
    text = home.run("python", "workflow/scripts/box.py", "take", str(box.folder), "--force")
    assert "took 3 of 3 stages" in text
    assert other.read_bytes() == (box.folder / RESULT).read_bytes()
    assert json.loads(other.read_text())["git_commit"] == home.run("git", "rev-parse", "--short=12", "HEAD").strip()
    # what is left is what was not run there
    assert home.planned() == {"attack": 1, "generate": 1, "energy": 1, "reliability": 1, "report": 1, "record": 1, "all": 1}
    assert not set(STAGES).intersection(home.status())
    home.run("git", "add", "-A")  # dvc.lock, and nothing that was missed by .gitignore
    assert home.run("git", "diff", "--cached", "--name-only").split() == ["dvc.lock"]
    locked = yaml.safe_load((home.folder / "dvc.lock").read_text())["stages"]
    assert set(locked) == {"digests", *STAGES}
    (entry,) = [out for out in locked[STAGES[2]]["outs"] if out["path"] == WEIGHTS]
    cached = home.folder / ".dvc/cache/files/md5" / entry["md5"][:2] / entry["md5"][2:]
    assert cached.read_bytes() == (box.folder / WEIGHTS).read_bytes()


def test_their_journals_fill_mlflow(home: Project, box: Box) -> None:
    uri = f"sqlite:///{home.folder.parent / 'fresh.db'}"
    assert "2 journals" in home.run("python", "-m", "ebjdat", "sync", MLFLOW_TRACKING_URI=uri, EBJDAT_TRACKING="1")
    client = MlflowClient(uri)
    runs = {r.info.run_name: r for r in client.search_runs([client.get_experiment_by_name("digits").experiment_id])}
    result = json.loads((home.folder / RESULT).read_text())
    assert runs["classifier/seed0"].data.metrics["selection_score"] == result["selection_score"]
    assert runs["classifier/seed0"].data.tags["host"] == "box"
    finetune = runs["classifier/seed0/finetune"]
    assert len(client.get_metric_history(finetune.info.run_id, "loss")) == EPOCHS


def test_what_is_up_to_date_here_is_taken_along_instead_of_run_again(home: Project) -> None:
    text = home.run("python", "workflow/scripts/box.py", "pack", "second", "--stages", "reliability")
    assert "second: 1 stages of digits" in text
    files = json.loads((home.folder / "second/box.json").read_text())["files"]
    assert {"data/digits/data.npz", "checkpoints/digits/classifier/seed0.safetensors"} <= set(files)
    assert "is there already" in home.run("python", "workflow/scripts/box.py", "pack", "second", ok=False)
    assert "did you mean 'classifier'?" in home.run(
        "python", "workflow/scripts/box.py", "pack", "b", "--experiments", "clasifier", ok=False
    )
