"""Files that are not as they were written: refused in one clear line, made again, or harmless; never another number without a word."""

from __future__ import annotations

import io
import random
import re
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ebjdat.settings import ParamsError, load

from .conftest import Campaign
from .judge import content, differences
from .lanes import Lane, Warm, clear_error, finished, outputs, warm

pytestmark = pytest.mark.torture

WHOLE = "not damaged"  # tried first: what then is refused says nothing about damage
FLIPS = 3
SETTINGS = 60  # damaged profiles; each is read in milliseconds

# What a stage reads: kind, file, stage.
SEED = "results/digits/eb_jdat/seed0"
READ = [
    ("checkpoint", "checkpoints/digits/eb_jdat/seed0.safetensors", "energy eb_jdat"),
    ("checkpoint", "checkpoints/digits/pretraining/clean/seed0.safetensors", "finetune eb_jdat"),
    ("arrays", "data/digits/data.npz", "energy eb_jdat"),
    ("arrays", "data/digits/data.npz", "finetune eb_jdat"),
    ("arrays", f"{SEED}/samples.npz", "energy eb_jdat"),
    ("arrays", f"{SEED}/energy.npz", "report"),
    *(("JSON", f"{SEED}/{stage}.json", "report") for stage in ("finetune", "attack", "generate", "energy", "reliability")),
    ("JSON", "results/digits/pretraining/clean/seed0/pretrain.json", "report"),
    ("JSON", "data/digits/card.json", "report"),
    ("tables", f"{SEED}/verdicts.parquet", "report"),
    ("tables", f"{SEED}/finetune_curve.csv", "report"),
    ("pictures", f"{SEED}/samples.png", "report"),
    ("pictures", f"{SEED}/chains.gif", "report"),
    ("pictures", f"{SEED}/reliability.png", "report"),
]


def flipped(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]


def damages(data: bytes, rng: random.Random) -> Iterator[tuple[str, bytes]]:
    yield WHOLE, data
    for i in range(FLIPS):
        yield f"bit flipped ({i})", flipped(data, rng)
    yield "cut short", data[: rng.randrange(1, len(data))]
    yield "emptied", b""
    yield "doubled", data + data
    middle = len(data) // 2
    yield "zeros inside", data[:middle] + bytes(min(512, len(data) - middle)) + data[middle + 512 :]


def note(campaign: Campaign, kind: str, name: str, what: str, wrong: list[str], how: str) -> None:
    if what == WHOLE and not how.startswith("same"):
        wrong = [*wrong, f"{how}, though it was whole"]
    campaign.tally.add("damage", kind, f"{name}, {what}", wrong, how)


def verdict(lane: Lane, status: int, wrong: Callable[[], list[str]], *named: str) -> tuple[list[str], str]:
    """How a command took a damaged file: what is wrong with it, and in which way it went well."""
    said = lane.said()
    if status:
        return clear_error(said, *named), "refused"
    found = wrong()
    if found and any(name in said for name in named):
        return (["a traceback"] if "Traceback" in said else []), "said, and went on"
    return found, "same results"


def exact(campaign: Campaign, lane: Lane, names: list[str]) -> list[str]:
    """Pages, too, byte for byte: the seconds in them are the reference's own."""
    pages = [name for name in names if name.endswith((".html", ".md"))]
    return [f"{n} differs" for n in pages if (lane.folder / n).read_bytes() != (campaign.reference.folder / n).read_bytes()]


def read_by_stages(campaign: Campaign, part: list[tuple[str, str, str]]) -> None:
    lane = finished(campaign.reference.folder, campaign.folder / f"damage-{part[0][0]}")
    with warm(lane) as runner:
        for kind, name, stage in part:
            arguments = campaign.commands[stage]
            made = outputs(arguments)
            rng = campaign.random("damage", name, stage)
            for what, data in damages((lane.folder / name).read_bytes(), rng):
                if campaign.late():
                    return
                (lane.folder / name).write_bytes(data)
                status = runner.call(arguments)

                def wrong(name: str = name, made: list[str] = made) -> list[str]:
                    found = [w for w in differences(campaign.whole, lane.folder) if not w.startswith(name)]
                    return found or exact(campaign, lane, made)

                note(campaign, kind, f"{name} for {stage}", what, *verdict(lane, status, wrong, name))
                lane.take_back(campaign.reference.folder, name, *made)


def states(campaign: Campaign, runner: Warm, stage: str, only: str) -> Path:
    """What a stage that was killed at this write leaves to go on from; its outputs are gone."""
    lane = runner.lane
    for name in outputs(campaign.commands[stage]):
        (lane.folder / name).unlink(missing_ok=True)
    shutil.rmtree(lane.folder / "state", ignore_errors=True)
    told = lane.folder.with_suffix(".told")
    told.unlink(missing_ok=True)
    runner.call(campaign.commands[stage], {"do": "kill", "told": str(told), "only": only})
    assert told.exists(), f"{stage}: no write like {only}: {lane.said()}"
    kept = lane.folder.with_suffix(".state")
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(lane.folder / "state", kept)
    return kept


def of_killed_stages(campaign: Campaign) -> None:
    """State of a training, of an evaluation, and the journal of a stage at work."""
    tried = [
        ("training state", "finetune eb_jdat", r"move state/.*/step\.pt 3", "step.pt"),
        ("training state", "finetune eb_jdat", r"move state/.*/step\.pt 3", "epoch.pt"),
        ("attack state", "attack eb_jdat", r"move state/.*/released\.npz", "standard.npz"),
        ("journals", "finetune eb_jdat", r"move checkpoints/", "*.journal.jsonl"),
    ]
    lane = finished(campaign.reference.folder, campaign.folder / "damage-state")
    with warm(lane) as runner:
        for kind, stage, only, pattern in tried:
            kept = states(campaign, runner, stage, only)
            (place,) = (path.relative_to(kept) for path in kept.rglob(pattern))
            rng = campaign.random("state", stage, pattern)
            for what, data in damages((kept / place).read_bytes(), rng):
                if campaign.late():
                    return
                shutil.rmtree(lane.folder / "state")
                shutil.copytree(kept, lane.folder / "state")
                victim = lane.folder / "state" / place
                victim.write_bytes(data)
                for name in outputs(campaign.commands[stage]):
                    (lane.folder / name).unlink(missing_ok=True)
                status = runner.call(campaign.commands[stage])
                wrong, how = verdict(lane, status, lambda: differences(campaign.whole, lane.folder), place.name)
                if status and not wrong:  # as the message says
                    victim.unlink()
                    again = runner.call(campaign.commands[stage])
                    wrong = clear_error(lane.said()) if again else differences(campaign.whole, lane.folder)
                    how = "refused; deleted, made again with the same results"
                note(campaign, kind, f"{place.name} for {stage}", what, wrong, how)
            lane.take_back(campaign.reference.folder, *outputs(campaign.commands[stage]))


def settings(campaign: Campaign) -> None:
    """A profile is another one, under another hash; or refused, by ParamsError alone."""
    file = campaign.folder / "digits.yaml"
    original = (campaign.reference.folder / "params/digits.yaml").read_bytes()
    whole = load(campaign.reference.folder / "params/digits.yaml", [])
    rng = campaign.random("settings")
    tried = [each for _ in range(SETTINGS // 8 + 1) for each in damages(original, rng)]
    for i, (what, data) in enumerate(tried):
        file.write_bytes(data)
        wrong, how = [], "refused"
        try:
            found = load(file, [])
        except ParamsError as error:
            wrong = [] if str(file) in str(error) or "digits.yaml" in str(error) else [f"does not name the file: {str(error)[:160]}"]
        except Exception as error:
            wrong = [f"{type(error).__name__}: {str(error)[:160]}"]
        else:
            same = found.model_dump() == whole.model_dump()
            how = "same settings" if same else "other settings"
        note(campaign, "settings", f"profile {i}", what, wrong, how)


def images() -> dict[str, bytes]:
    """Digits as PNG files: 2 classes, 12 images to train and 6 to test of each."""
    from sklearn.datasets import load_digits

    digits, found = load_digits(), {}
    for label in (0, 1):
        chosen = digits.images[digits.target == label][:18]
        for i, image in enumerate(chosen):
            memory = io.BytesIO()
            Image.fromarray((image * 15).astype(np.uint8)).save(memory, "PNG")
            found[f"{'train' if i < 12 else 'test'}/{'zero' if label == 0 else 'one'}/{i:02}.png"] = memory.getvalue()
    return found


def packed(kind: str, files: dict[str, bytes]) -> bytes:
    memory = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(memory, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in files.items():
                archive.writestr(name, data)
        return memory.getvalue()
    with tarfile.open(fileobj=memory, mode=f"w:{kind}") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return memory.getvalue()


def sources(campaign: Campaign) -> None:
    """A folder of images and archives of it, read by `prepare`: the data hash says what was read."""
    lane = finished(campaign.reference.folder, campaign.folder / "damage-images")
    files = images()
    command = ["prepare", "--params", "params/digits.yaml", "--out", "data/other.npz", "--card", "data/other.json"]
    command += ["--override", "data.source=folder", "--override", "data.validation=4", "--override", "data.test=null"]
    command += ["--override", "data.n_train=null", "--override", "data.n_test=null", "--override", "data.label=other"]
    command += ["--override", "data.path={}"]
    rng = campaign.random("images")

    def tries() -> Iterator[tuple[str, str, Callable[[Path], None], str]]:
        for kind in ("zip", "xz", "gz"):
            name = "images.zip" if kind == "zip" else f"images.tar.{kind}"
            for what, data in damages(packed(kind, files), rng):
                yield name, what, (lambda path, data=data: path.write_bytes(data)), name
        victim = sorted(files)[5]
        for what, data in damages(files[victim], rng):

            def write(path: Path, data: bytes = data) -> None:
                shutil.rmtree(path, ignore_errors=True)
                for name, whole in files.items():
                    (path / name).parent.mkdir(parents=True, exist_ok=True)
                    (path / name).write_bytes(data if name == victim else whole)

            yield "images", what, write, victim

    whole = ""
    with warm(lane) as runner:
        for name, what, write, victim in tries():
            if campaign.late():
                return
            write(lane.folder / name)
            (lane.folder / "data/other.npz").unlink(missing_ok=True)
            status = runner.call([word.format(name) for word in command])
            said = lane.said()
            if status:
                wrong, how = clear_error(said, victim), "refused"
            else:
                found = content(lane.folder / "data/other.npz")
                whole = whole or found
                n = np.load(lane.folder / "data/other.npz")["images"].shape[0]
                few = n != len(files) and not re.search(r"skipped|left out|ignored", said)
                wrong = [f"{len(files) - n} images fewer, without a word"] if few else []
                how = "same data" if found == whole else "other data, under another hash"
            note(campaign, "images", f"{victim} of {name}" if victim != name else name, what, wrong, how)


def shown_tables(campaign: Campaign) -> None:
    """`ebjdat show` reads the stages' results, `ebjdat inspect` any checkpoint."""
    lane = finished(campaign.reference.folder, campaign.folder / "damage-show")
    tried = [
        ("JSON", f"{SEED}/finetune.json", ["show", "--params", "params/digits.yaml"]),
        ("checkpoint", "checkpoints/digits/eb_jdat/seed0.safetensors", ["inspect", "checkpoints/digits/eb_jdat/seed0.safetensors"]),
    ]
    with warm(lane) as runner:
        for kind, name, command in tried:
            assert runner.call(command) == 0, lane.said()
            whole = lane.said()
            for what, data in damages((lane.folder / name).read_bytes(), campaign.random("shown", name)):
                (lane.folder / name).write_bytes(data)
                status = runner.call(command)
                if "NOT AS IT WAS WRITTEN" in lane.said():  # inspect shows the rest all the same
                    wrong, how = ([] if status else ["exit status 0"]), "refused"
                else:
                    wrong, how = verdict(lane, status, lambda whole=whole: [] if lane.said() == whole else ["shows something else"], name)
                note(campaign, kind, f"{name} for {command[0]}", what, wrong, how)
            lane.take_back(campaign.reference.folder, name)


def stores(campaign: Campaign) -> None:
    """dvc.lock, which Snakemake asks at its start; mlflow.db and finished journals, which `ebjdat sync` reads."""
    lane = finished(campaign.reference.folder, campaign.folder / "damage-stores")
    original = (lane.folder / "dvc.lock").read_bytes()
    for what, data in damages(original, campaign.random("dvc.lock")):
        if campaign.late():
            return
        (lane.folder / "dvc.lock").write_bytes(data)
        status = lane.call("snakemake", "--dry-run", "--cores", "1")
        said = lane.said()
        wrong = ["a traceback"] if "Traceback (most recent call last)" in said else []
        if status and "dvc.lock" not in said:
            wrong.append(f"does not name dvc.lock: {said.strip()[-200:]}")
        jobs = Lane.jobs(said)
        how = "refused" if status else f"said that it would run {sum(jobs.values())} jobs" if jobs else "same: nothing to do"
        wrong += differences(campaign.whole, lane.folder)
        note(campaign, "stores", "dvc.lock for snakemake", what, wrong, how)
        shutil.rmtree(lane.folder)
        lane = finished(campaign.reference.folder, campaign.folder / "damage-stores")

    def sent(store: Path) -> tuple[int, dict[str, object]]:
        status = lane.call("python", "-m", "ebjdat", "sync", EBJDAT_TRACKING="1", MLFLOW_TRACKING_URI=f"sqlite:///{store}")
        return status, {} if status else values(store)

    for path in sorted(lane.folder.rglob("*.journal.jsonl")):  # a few are enough
        if path.parent.name != "seed0" or "eb_jdat" not in str(path) or path.name.split(".")[0] not in ("finetune", "energy"):
            path.unlink()
    store = lane.folder / "mlflow.db"
    status, whole = sent(store)
    assert status == 0, lane.said()
    assert whole
    filled = store.read_bytes()
    for what, data in damages(filled, campaign.random("mlflow.db")):
        if campaign.late():
            return
        store.write_bytes(data)
        status, found = sent(store)
        if status:
            wrong, how = clear_error(lane.said()), "refused; deleted, filled again"
            store.unlink()
            status, found = sent(store)
            wrong += [] if (status, found) == (0, whole) else [f"not filled again: {lane.said().strip()[-200:]}"]
        else:
            wrong, how = ([] if found == whole else ["other values"]), "same values"
        note(campaign, "stores", "mlflow.db for sync", what, wrong, how)
    journal = lane.folder / SEED / "finetune.journal.jsonl"
    original = journal.read_bytes()
    for what, data in damages(original, campaign.random("journal")):
        if campaign.late():
            return
        journal.write_bytes(data)
        store.unlink(missing_ok=True)
        status, found = sent(store)
        wrong, how = verdict(lane, status, lambda found=found: [] if found == whole else ["other values"], journal.name)
        note(campaign, "journals", f"{journal.name} for sync", what, wrong, how)


def values(store: Path) -> dict[str, object]:
    """Every value of the store, but for what a clock measured: run's name -> (metric, step) -> values."""
    import sqlite3

    with sqlite3.connect(f"file:{store}?mode=ro", uri=True) as base:
        rows = base.execute("select r.name, m.key, m.step, m.value from metrics m join runs r using (run_uuid) order by 1, 2, 3, 4")
        return {f"{n} {k} {s} {v}": 1 for n, k, s, v in rows if not k.startswith("system/") and not k.endswith("seconds")}


def test_damaged_files(campaign: Campaign) -> None:
    light = [each for each in READ if each[2] != "report"]
    heavy = [each for each in READ if each[2] == "report"]
    work = [lambda: read_by_stages(campaign, heavy), lambda: stores(campaign), lambda: read_by_stages(campaign, light)]
    work += [lambda: of_killed_stages(campaign), lambda: sources(campaign), lambda: shown_tables(campaign), lambda: settings(campaign)]
    campaign.side_by_side(lambda each: None if campaign.late() else each(), work)
    assert not campaign.tally.failed("damage")
