"""Stages on a bare machine, with the real programs: packed, interrupted, continued, refused if anything is wrong, taken back.

The bare machine is a Python in which only what the box asks for can be imported. Tests build on each other in this order.
"""

from __future__ import annotations

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
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient
from packaging.requirements import Requirement

from ..conftest import ROOT
from .conftest import Project, checkout

TRAINING = "finetune-classifier-seed0"
STAGES = ("prepare", "pretrain-scratch-seed0", TRAINING)
RESULT = "results/digits/classifier/seed0/finetune.json"
CURVE = "results/digits/classifier/seed0/finetune_curve.csv"
WEIGHTS = "checkpoints/digits/classifier/seed0.safetensors"
JOURNAL = "results/digits/classifier/seed0/finetune.journal.jsonl"
CODE = "src/ebjdat/pixels.py"
BOX = ("python", "workflow/scripts/box.py")
Content = dict[str, Any]
EPOCHS = 30
TO_CONTINUE = 75

BARE = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *more: None if name.partition(".")[0] in {blocked!r} else find(name, *more)
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

    def copy(self, folder: Path) -> Box:
        return Box(Path(shutil.copytree(self.folder, folder, symlinks=True)), self.site)

    def environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SNAKEMAKE", "DVC", "MLFLOW", "EBJDAT", "GIT"))}
        return {**kept, "PYTHONPATH": str(self.site)}

    def python(self, *command: str | Path, code: int | None = 0, cwd: Path = Path("/")) -> str:
        done = subprocess.run(
            [sys.executable, *command], cwd=cwd, env=self.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert code in (None, done.returncode), done.stdout[-4000:]
        return done.stdout

    def run(self, *options: str, code: int | None = 0) -> str:
        return self.python(self.folder / "run.py", *options, code=code)

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

    def done(self) -> dict[str, Content]:
        return json.loads((self.folder / "done.json").read_text())

    def edit(self, file: str, change: Callable[[Any], object]) -> None:
        """Change a JSON file of the box."""
        content = json.loads((self.folder / file).read_text())
        change(content)
        (self.folder / file).write_text(json.dumps(content))


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
def packed(home: Project) -> Box:
    """Packed, and moved to another place. Not to be changed."""
    home.run(*BOX, "pack", "box", "--experiments", "classifier", "--stages", "finetune")
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


@dataclass(frozen=True)
class Story:
    """A box that was killed, stopped for time, asked to stop, and run to its end; and what it said after each."""

    box: Box
    time_is_up: str
    asked_to_stop: str
    status: str
    stages: set[str]
    last: str


@pytest.fixture(scope="module")
def story(packed: Box, tmp_path_factory: pytest.TempPathFactory) -> Story:
    box = packed.copy(tmp_path_factory.mktemp("run") / "box")
    box.stopped(signal.SIGKILL, "prepare", r": python")  # the stage does not outlive it
    deadline = time.monotonic() + 60
    while "another run.py, or a stage of one that was killed" in (time_is_up := box.run("--minutes", "0.00001", code=None)):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    asked_to_stop = box.stopped(signal.SIGTERM, TRAINING, r"epoch +2/")
    status, stages = box.run("--status"), set(box.done())
    return Story(box, time_is_up, asked_to_stop, status, stages, box.run())


@pytest.fixture(scope="module")
def box(story: Story) -> Box:
    """Run to its end. Not to be changed."""
    return story.box


@pytest.fixture
def spoilt(box: Box, tmp_path: Path) -> Box:
    """A copy of the box that was run, for a test to spoil."""
    return box.copy(tmp_path / "box")


@dataclass(frozen=True)
class Taken:
    """A checkout that had another result and took the box; and what it said, unasked and with --force."""

    here: Project
    unasked: str
    kept: str
    forced: str


@pytest.fixture(scope="module")
def taken(home: Project, box: Box, tmp_path_factory: pytest.TempPathFactory) -> Taken:
    here = home.copy(tmp_path_factory.mktemp("taker") / "checkout")
    other = here.folder / RESULT
    other.parent.mkdir(parents=True)
    other.write_text("{}")
    unasked = refused(here, box.folder)
    return Taken(here, unasked, other.read_text(), here.run(*BOX, "take", str(box.folder), "--force"))


def refused(home: Project, box: Path, *options: str, limit: str = "unlimited") -> str:
    """What `take` says; nothing was taken. limit: largest file that it can write (KiB)."""

    def placed() -> list[Path]:
        found = (path for folder in ("data", "checkpoints", "results") for path in (home.folder / folder).rglob("*"))
        return sorted(path for path in found if path.is_file())

    before = placed()
    text = home.run("bash", "-c", f'ulimit -f {limit}; exec "$@"', "bash", *BOX, "take", str(box), *options, ok=False)
    assert text.startswith("error: ")
    assert "Traceback" not in text
    assert before == placed()
    assert not (home.folder / "dvc.lock").exists()
    return text


def test_what_the_box_holds_and_asks_for(packed: Box) -> None:
    manifest = json.loads((packed.folder / "box.json").read_text())
    assert [stage["name"] for stage in manifest["stages"]] == list(STAGES)
    assert all(stage["command"][:2] == ["-m", "ebjdat"] and "--threads" not in stage["command"] for stage in manifest["stages"])
    assert JOURNAL in manifest["stages"][2]["outputs"]
    modules = [path for path in (ROOT / "src/ebjdat").rglob("*.py") if path.parent.name != "report" or path.name == "figures.py"]
    texts = [path.read_text() for path in modules if path.name not in ("publish.py", "store.py", "mlflow_model.py")]  # of MLflow
    imported = {name for text in texts for name in re.findall(r"^ *(?:from|import) (\w+)", text, re.MULTILINE)}
    assert set(manifest["imports"]) == imported - set(sys.stdlib_module_names) - {"ebjdat"}
    assert "No module named 'mlflow'" in packed.python("-c", "import mlflow", code=1)
    assert "0 of 3 stages of digits are done" in packed.run("--status")
    assert not (packed.folder / "done.json").exists()


def test_nothing_runs_where_a_package_is_missing_or_what_was_packed_has_changed(packed: Box, tmp_path: Path) -> None:
    spoilt = packed.copy(tmp_path / "box")
    (spoilt.folder / CODE).open("a").write("# edited there\n")
    assert f"{CODE}: changed since the box was packed" in spoilt.run(code=2)
    spoilt.edit("box.json", lambda manifest: manifest["imports"].update(no_such_module="no-such-package==1.0"))
    spoilt.edit("box.json", lambda manifest: manifest["files"].pop(CODE))
    assert "missing on this machine: no-such-package==1.0; `python -m pip install" in spoilt.run(code=2)
    assert not (spoilt.folder / "done.json").exists()


@pytest.mark.parametrize(
    ("name", "content"), [("box.json", b"{"), ("box.json", b"[" * 100_000), ("done.json", b"[]"), ("done.json", b"\xff")], ids=range(4)
)
def test_a_damaged_list_is_one_line_there_and_here(home: Project, spoilt: Box, name: str, content: bytes) -> None:
    (spoilt.folder / "done.json").write_text("{}")
    (spoilt.folder / name).write_bytes(content)
    for said in (spoilt.run("--status", code=2), refused(home, spoilt.folder).removeprefix("error: ")):
        assert said.startswith(f"{spoilt.folder / name}: missing or damaged; ")
        assert said.count("\n") == 1


def test_it_runs_in_pieces_and_loses_nothing(story: Story) -> None:
    box = story.box
    assert "time is up: run it again to continue with prepare" in story.time_is_up
    assert "[1/3] prepare continues: python" in story.asked_to_stop
    assert f"SIGTERM: {TRAINING} is asked to stop" in story.asked_to_stop
    assert "training continues where it was" in story.asked_to_stop
    assert f"run it again to continue with {TRAINING}" in story.asked_to_stop
    assert story.stages == set(STAGES)
    assert f"begun   {TRAINING}" in story.status
    assert f"[3/3] {TRAINING} continues: python -m ebjdat finetune" in story.last
    assert "prepare: done\n" in story.last
    assert "continues at epoch" in story.last
    assert "3 of 3 stages are done; copy this folder back" in story.last
    assert "3 of 3 stages of digits are done" in box.run("--status")
    events = [json.loads(line) for line in (box.folder / JOURNAL).read_text().splitlines()]
    assert [e["step"] for e in events if "metrics" in e] == list(range(1, EPOCHS + 1))
    assert [e["end"] for e in events if "end" in e] == ["KILLED", "FINISHED"]
    assert events[0]["begin"]["host"] == "box"
    assert not [path for end in ("*.journal.jsonl", "*.pt") for path in (box.folder / "state").rglob(end)]
    assert not (box.folder / "logs/tracking.log").exists()  # no sender was ever started
    assert box.done()[TRAINING]["machine"]["torch"].startswith("2.")
    assert os.uname().nodename not in (box.folder / "done.json").read_text()


def test_two_never_run_in_one_folder(packed: Box, tmp_path: Path) -> None:
    spoilt = packed.copy(tmp_path / "box")
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(15)"
    spoilt.edit("box.json", lambda manifest: manifest["stages"][0].update(command=["-c", deaf]))
    spoilt.stopped(signal.SIGKILL, "prepare", r"\ndeaf")
    assert spoilt.run(code=2).startswith("another run.py, or a stage of one that was killed, is still running in this folder")


def test_what_was_killed_between_its_end_and_the_note_of_it_does_not_run_again(spoilt: Box, box: Box) -> None:
    def forget(done: Content) -> None:
        for name in (RESULT, CURVE, WEIGHTS, JOURNAL):
            del done[TRAINING]["files"][name]

    spoilt.edit("done.json", forget)
    assert f"[3/3] {TRAINING}: done\n" in spoilt.run()
    assert spoilt.done() == box.done()


def test_what_failed_after_it_had_written_everything_is_not_done(spoilt: Box) -> None:
    def fail(manifest: Content) -> None:
        last = manifest["stages"][2]
        last["command"] = ["-c", f"import pathlib, sys; [pathlib.Path(p).write_text('x') for p in {last['outputs']}]; sys.exit(3)"]

    spoilt.edit("box.json", fail)
    assert f"again   {TRAINING}" in spoilt.run("--status")
    for _ in range(2):
        assert f"[3/3] {TRAINING}: FAILED with exit code 3" in spoilt.run(code=1)
    assert not any((spoilt.folder / name).exists() for name in (RESULT, CURVE, WEIGHTS, JOURNAL))
    (spoilt.folder / "data/digits/data.npz").unlink()
    spoilt.edit("box.json", lambda manifest: manifest["stages"].pop(0))  # so that nothing makes it again
    assert f"[2/2] {TRAINING}: cannot run without data/digits/data.npz" in spoilt.run(code=1)


def test_a_stage_that_is_called_by_hand_there_starts_no_sender(box: Box, tmp_path: Path) -> None:
    script = f"""
import sys; sys.path.insert(0, "{box.folder}/src")
from pathlib import Path
from ebjdat.tracking.journal import Subject
from ebjdat.tracking.tracker import Tracker
with Tracker(Subject("run", "name", 0, "stage"), {{}}, {{}}, Path("results/stage.journal.jsonl")) as tracker:
    tracker.final({{"value": 1}})
"""
    assert box.python("-c", script, cwd=tmp_path) == ""
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()} == {"results/stage.journal.jsonl"}
    assert '"final": {"value": 1.0}' in (tmp_path / "results/stage.journal.jsonl").read_text()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def link(path: Path) -> None:
    path.rename(path.with_suffix(".elsewhere"))
    path.symlink_to(path.with_suffix(".elsewhere"))


def rename(box: Box, old: str, new: str) -> None:
    for file in ("box.json", "done.json"):
        path = box.folder / file
        path.write_text(path.read_text().replace(f'"{old}"', f'"{new}"'))


def of_training(**changes: object) -> Callable[[Box], None]:
    return lambda box: box.edit("done.json", lambda done: done[TRAINING]["stage"].update(changes))


def only_a_part(done: Content) -> None:
    part = {file: content for file, content in done[TRAINING]["files"].items() if file != WEIGHTS}
    done |= {name: {**done[TRAINING], "files": part} for name in STAGES}


SPOILT: dict[str, tuple[Callable[[Box], None], str]] = {
    "weights": (lambda box: flip(box.folder / WEIGHTS), f"{WEIGHTS}: changed or truncated since {TRAINING} wrote it"),
    "curve": (lambda box: os.truncate(box.folder / CURVE, 20), f"{CURVE}: changed or truncated since {TRAINING} wrote it"),
    "result": (lambda box: (box.folder / RESULT).unlink(), f"{RESULT}: missing"),
    "code": (lambda box: os.truncate(box.folder / CODE, 20), f"{CODE}: changed in the box since it was packed"),
    "command": (of_training(command=["-m", "ebjdat"]), f"{TRAINING}: command was ['-m', 'ebjdat'] in the box, is ['-m', 'ebjdat', "),
    "log": (of_training(log=CODE), f"{TRAINING}: log was {CODE} in the box, is logs/"),
    "other code": (of_training(code="0123"), f"{TRAINING}: code was 0123 in the box, is "),
    "stage": (lambda box: rename(box, TRAINING, "finetune-x-seed0"), "finetune-x-seed0: this profile has no such stage here"),
    "part": (lambda box: box.edit("done.json", only_a_part), "no stage was finished in it"),
    "shape": (lambda box: box.edit("done.json", lambda done: done.update(prepare=3)), "box.json or done.json is damaged (TypeError"),
    "format": (lambda box: box.edit("box.json", lambda manifest: manifest.update(format=2)), "of format 2; this version takes format"),
    "link": (lambda box: link(box.folder / RESULT), f"{RESULT!r} leads out of the box, or is a link"),
    "profile": (lambda box: rename(box, "digits", "../digits"), "'params/../digits.yaml' leads out of the box"),
    **{path: ((lambda box, p=path: rename(box, RESULT, p)), f"{path!r} leads out") for path in ("../x", "/etc/x", "results/../../x")},
}


@pytest.mark.parametrize(("spoil", "said"), SPOILT.values(), ids=SPOILT)
def test_what_was_spoilt_or_forged_on_the_way_is_refused(home: Project, spoilt: Box, spoil: Callable[[Box], None], said: str) -> None:
    spoil(spoilt)
    assert said in refused(home, spoilt.folder)


def test_nothing_is_taken_where_the_disk_is_full(home: Project, box: Box) -> None:
    assert "File too large" in refused(home, box.folder, limit="64")


def test_results_of_other_code_settings_or_data_are_refused(home: Project, spoilt: Box) -> None:
    code = home.folder / "src/ebjdat/training/loop.py"
    old = code.read_text()
    code.write_text(old.replace("def train(", "assert True\n\n\ndef train("))
    home.change(experiments={"classifier": {"training": {"epochs": 7}}})
    spoilt.edit("done.json", lambda done: done[TRAINING]["files"].update({"data/digits/data.npz": "0"}))
    try:
        text = refused(home, spoilt.folder, "--force")
    finally:
        code.write_text(old)
        home.run("git", "checkout", "-q", "params")
    assert f"{TRAINING}: code was " in text
    assert f"{TRAINING}: training.epochs was {EPOCHS} in the box, is 7 here" in text
    assert f"data/digits/data.npz: {TRAINING} was run with another one" in text
    assert "prepare:" not in text
    assert re.search(r"packed at commit [0-9a-f]{12}, here is [0-9a-f]{12}-dirty; docs/box.md", text)


def test_other_results_are_not_overwritten_unasked_and_what_is_taken_is_both_tools_own(taken: Taken, box: Box) -> None:
    home, result = taken.here, taken.here.folder / RESULT
    assert f"{RESULT}: another one is here" in taken.unasked
    assert taken.kept == "{}"
    assert "took 3 of 3 stages" in taken.forced
    assert result.read_bytes() == (box.folder / RESULT).read_bytes()
    assert json.loads(result.read_text())["git_commit"] == home.run("git", "rev-parse", "--short=12", "HEAD").strip()
    # what is left is what was not run there
    assert home.planned() == {"attack": 1, "generate": 1, "energy": 1, "reliability": 1, "report": 1, "record": 1, "all": 1}
    assert not set(STAGES).intersection(home.status())
    home.run("git", "add", "-A")  # dvc.lock, and nothing that was missed by .gitignore
    assert home.run("git", "diff", "--cached", "--name-only").split() == ["dvc.lock"]
    locked = yaml.safe_load((home.folder / "dvc.lock").read_text())["stages"]
    assert set(locked) == {"digests", *STAGES}
    (entry,) = [out for out in locked[TRAINING]["outs"] if out["path"] == WEIGHTS]
    cached = home.folder / ".dvc/cache/files/md5" / entry["md5"][:2] / entry["md5"][2:]
    assert cached.read_bytes() == (box.folder / WEIGHTS).read_bytes()


def test_their_journals_fill_mlflow(taken: Taken) -> None:
    home = taken.here
    uri = f"sqlite:///{home.folder.parent / 'fresh.db'}"
    assert "2 journals" in home.run("python", "-m", "ebjdat", "sync", MLFLOW_TRACKING_URI=uri, EBJDAT_TRACKING="1")
    client = MlflowClient(uri)
    runs = {r.info.run_name: r for r in client.search_runs([client.get_experiment_by_name("digits").experiment_id])}
    result = json.loads((home.folder / RESULT).read_text())
    assert runs["classifier/seed0"].data.metrics["selection_score"] == result["selection_score"]
    assert runs["classifier/seed0"].data.tags["host"] == "box"
    finetune = runs["classifier/seed0/finetune"]
    assert len(client.get_metric_history(finetune.info.run_id, "loss")) == EPOCHS


def test_what_is_up_to_date_here_is_taken_along_instead_of_run_again(taken: Taken) -> None:
    home = taken.here
    text = home.run(*BOX, "pack", "second", "--stages", "reliability")
    assert "second: 1 stages of digits" in text
    files = json.loads((home.folder / "second/box.json").read_text())["files"]
    assert {"data/digits/data.npz", "checkpoints/digits/classifier/seed0.safetensors"} <= set(files)
    assert "is there already" in home.run(*BOX, "pack", "second", ok=False)
    assert "did you mean 'classifier'?" in home.run(*BOX, "pack", "b", "--experiments", "clasifier", ok=False)
    folder = "data.source=folder data.path=params data.size=8 data.channels=1 data.test=null"
    assert "data.path: params is not a file here" in home.run(*BOX, "pack", "b", "--overrides", folder, ok=False)
