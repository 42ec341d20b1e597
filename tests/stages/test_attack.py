"""`ebjdat attack` on external networks: torchvision's, and one with its own preprocessing and file."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from typer.testing import CliRunner

from ebjdat.cli import app
from ebjdat.data import external
from ebjdat.data.batches import DeviceData
from ebjdat.errors import DataError
from ebjdat.evaluation import screen, universal
from ebjdat.evaluation.audit import audit
from ebjdat.files import read_json
from ebjdat.models.external import external_model
from ebjdat.models.modes import UnitRange, frozen_parameters
from ebjdat.models.weights import ModelError
from ebjdat.models.wrn import features_and_logits
from ebjdat.names import flat_results
from ebjdat.settings import ParamsError, usual_protocols

from ..chain import Chain
from ..conftest import ROOT

NETS = '''
import torch, torchvision
from torch import nn

class Whitened(nn.Module):
    """Digits in [0, 1]; whitens them itself."""
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.full((1, 1, 8, 8), 0.3))
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, x):
        return self.layers((x - self.mean) / 0.37)

class Normalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = torchvision.models.squeezenet1_1(num_classes=4)
        self.register_buffer("mean", torch.tensor([0.5, 0.4, 0.6]).view(1, 3, 1, 1))

    def forward(self, x):
        return self.network((x - self.mean) / 0.25)

def whitened():
    return Whitened()

def squeezenet():
    torch.manual_seed(0)
    return Normalised()

def nothing():
    return 3
'''


FAST = ["--override", "protocols.standard.n=0", "--override", "protocols.standard_l2.n=0", "--override", "checks.n=20"]


LESS = ["--override", "protocols.released.n=8"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a module of networks, weights of a digits classifier trained here, and digits as an .npz."""
    (tmp_path / "somenets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("somenets", None)
    bunch = load_digits()
    images, labels = np.rint(bunch.images * 255 / 16).astype(np.uint8)[:, None], bunch.target
    model = external_model("somenets:whitened", None)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for layer in (model.layers[1], model.layers[3]):
            layer.reset_parameters()
        optimiser = torch.optim.Adam(model.parameters(), 0.01)
        x, y = torch.from_numpy(images[200:]).float() / 255, torch.from_numpy(labels[200:]).long()
        for _ in range(60):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimiser.step()
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "whitened.pt")
    save_file(model.state_dict(), tmp_path / "whitened.safetensors")
    np.savez(tmp_path / "digits.npz", images=images[:60], labels=labels[:60])
    return tmp_path


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["attack", *arguments])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.slow
def test_a_network_from_elsewhere_gets_the_same_files(folder: Path) -> None:
    words = ["--model", "somenets:whitened", "--weights", "whitened.pt", "--data", "digits.npz", "--out", "out/whitened.json", *FAST, *LESS]
    override = ["--override", "protocols.standard.eps=0.05", "--override", "protocols.standard.pgd.step_size=0.0125", "--threads", "1"]
    text = run(*words, *override)
    assert "standard (Linf, radius 0.05 in [0, 1]): clean" in text
    result = read_json(folder / "out/whitened.json")
    x, y = torch.from_numpy(np.load("digits.npz")["images"]).float() / 255, torch.from_numpy(np.load("digits.npz")["labels"])
    model = external_model("somenets:whitened", folder / "whitened.safetensors")
    with torch.no_grad():
        assert result["clean_correct"] == int((model(x).argmax(1) == y).sum()) > 50
    assert result["pgd20_correct"] < result["clean_correct"]
    assert result["radius"] == 0.05
    assert result["released_radius"] == pytest.approx(4 / 255)
    assert (result["n_test"], result["released_n_attack"]) == (60, 8)
    assert {check["name"] for check in result["checks"]} >= {"deterministic output", "gradients do not vanish"}
    assert result["model"] == "somenets:whitened"
    frame = pd.read_parquet(folder / "out/whitened.parquet")
    assert len(frame) == 3 * 60
    assert frame.query("protocol == 'released'")["autoattack"].sum() == result["released_autoattack_correct"]
    about = json.loads(pq.read_schema(folder / "out/whitened.parquet").metadata[b"ebjdat"])
    assert about["settings"]["protocols"]["standard"]["eps"] == 0.05
    assert about["data_hash"] == result["data_hash"]
    assert not list((folder / "out").glob(".*state*"))


@pytest.mark.slow
def test_a_torchvision_network_on_class_folders(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", 1), ("test", 5)):
        for k in range(4):
            place = folder / f"pictures/{split}/class{k}"
            place.mkdir(parents=True)
            for i in range(count):
                shade = rng.integers(0, 255, (40, 36, 3)) // 4 + 60 * k
                Image.fromarray(shade.astype(np.uint8)).save(place / f"{i}.png")
    (folder / "pictures/test/class0/notes.txt").write_text("of the camera")
    no_protocols, few_checks = "protocols={standard: {n: 0}, released: {n: 0}}", "checks={n: 8, steps: 25, restarts: 1, sweep: [1.0]}"
    words = "--model somenets:squeezenet --data pictures --size 32 --out net.json --n 6 --source somenets:squeezenet"
    said = run(*words.split(), "--override", no_protocols, "--override", few_checks)
    result = read_json(folder / "net.json")
    skipped = "skipped 1 file: 1 .txt ('test/class0/notes.txt')"
    assert f"pictures: {skipped}\n" in said
    assert result["notes"] == [skipped]
    images, labels, _ = external.images_of(folder / "pictures", 32)
    assert images.shape == (20, 3, 32, 32)
    assert sorted(labels) == sorted([0, 1, 2, 3] * 5)
    assert len(set(labels[:8].tolist())) > 2  # shuffled: the first n are not one class
    model = external_model("somenets:squeezenet", None)
    with torch.no_grad():
        predicted = model(torch.from_numpy(images).float() / 255).argmax(1).numpy()
    assert result["clean_correct"] == (predicted == labels).sum()
    assert next(c for c in result["checks"] if c["name"] == "a transferred attack is weaker")["passed"] is True


@pytest.mark.slow
def test_the_bench_of_attacks_runs_on_a_network_from_elsewhere(folder: Path) -> None:
    words = "--model somenets:whitened --weights whitened.pt --data digits.npz --n 1 --eps 0.5 --json b.json --threads 1 --search fp32"
    command = [sys.executable, str(ROOT / "workflow/scripts/bench_attacks.py"), *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "."})
    assert done.returncode == 0, done.stderr
    assert read_json(folder / "b.json")["equal_verdicts"] == {"fp32": 1.0}


@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on_and_ends_with_the_same_verdicts(folder: Path) -> None:
    words = ["--model", "somenets:whitened", "--weights", "whitened.safetensors"]
    quick = "{like: standard, eps: 0.05, pgd: {step_size: 0.01}, n: 40, attacks: {fab_t: {steps: 20}, square: {queries: 200}}}"
    words += ["--data", "digits.npz", "--threads", "1", *FAST, "--override", "protocols.released=null", "--override", "batch_size=20"]
    words += ["--override", f"protocols.quick={quick}"]
    environment = {**os.environ, "EBJDAT_TRACKING": "0"}
    run(*words, "--out", "whole/net.json")
    command = [sys.executable, "-m", "ebjdat", "attack", *words, "--out", "parts/net.json"]
    process = subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (states := list(folder.glob("parts/.net.json.state/*/quick.npz"))) or "apgd_t" not in np.load(states[0])["attacks"]:
        assert time.monotonic() < deadline
        assert process.poll() is None, "finished before it could be killed"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (folder / "parts/net.json").exists()
    again = subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True)
    assert "pgd20:" not in again.stderr  # done before; not done again
    whole, parts = (pd.read_parquet(folder / f"{name}/net.parquet") for name in ("whole", "parts"))
    pd.testing.assert_frame_equal(whole, parts)
    seconds = {"quick_attack_seconds", "digest"}
    first, second = read_json(folder / "whole/net.json"), read_json(folder / "parts/net.json")
    assert {k: v for k, v in first.items() if k not in seconds} == {k: v for k, v in second.items() if k not in seconds}
    assert not list(folder.glob("parts/.net.json.state"))


def test_what_is_wrong_with_a_network_is_said(folder: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, ("touch evil",)

    with Path("evil.pt").open("wb") as file:
        pickle.dump({"state_dict": Evil()}, file)
    torch.save({"layers.1.weight": torch.zeros(2, 2)}, "other.pt")
    for factory, weights, message in (
        ("somenets", None, "package.module:function is allowed"),
        ("nowhere:net", None, "No module named 'nowhere'; run this where 'nowhere' can be imported"),
        ("somenets:net", None, "the module somenets has no 'net'"),
        ("somenets:nothing", None, "made int; a torch.nn.Module is needed"),
        ("somenets:whitened", "missing.pt", "missing.pt: there is no such file"),
        ("somenets:whitened", "evil.pt", "evil.pt: "),
        ("somenets:whitened", "other.pt", r"other.pt: does not fit somenets:whitened: [\s\S]*Missing key"),
    ):
        with pytest.raises(ModelError, match=message):
            external_model(factory, Path(weights) if weights else None)
    assert not Path("evil").exists()
    with pytest.raises(DataError, match="--size is for folders"):
        external.images_of(Path("digits.npz"), 32)
    words = ["attack", "--model", "somenets:whitened", "--data", "digits.npz", "--out", "x.json", "--experiment", "a"]
    assert "--experiment means nothing" in CliRunner().invoke(app, words).output
    done = CliRunner().invoke(app, ["attack", "--data", "digits.npz", "--out", "x.json"])
    assert done.exit_code == 1
    assert "--params, --experiment and --weights are needed, or --model" in done.output
    with pytest.raises(ParamsError, match=r"protocols\.standard.epz: unknown key; did you mean 'eps'"):
        usual_protocols(10, ["protocols.standard.epz=1"])


def test_class_folders_have_the_order_that_is_named(folder: Path) -> None:
    """Folders by the digits' English names, against a network that counts from 0."""
    names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    data = np.load("digits.npz")
    for i, (image, label) in enumerate(zip(data["images"], data["labels"], strict=True)):
        for split in ("train", "test"):
            place = folder / f"pictures/{split}/{names[label]}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0]).save(place / f"{i}.png")
    (folder / "classes.txt").write_text("\n".join(names) + "\n")
    words = ["--model", "somenets:whitened", "--weights", "whitened.pt", "--data", "pictures", "--out", "x.json", "--n", "1", *FAST]
    words += ["--override", "protocols.released=null", "--threads", "1"]
    assert "CHECK FAILED: above chance" in run(*words)
    text = run(*words, "--classes", "classes.txt")
    assert "above chance" not in text
    assert "under 'state_dict.module.layers'" in text or "under 'state_dict.module'" in text
    model = external_model("somenets:whitened", folder / "whitened.safetensors")
    with torch.no_grad():
        right = model(torch.from_numpy(data["images"]).float() / 255).argmax(1).numpy() == data["labels"]
    assert read_json(folder / "x.json")["clean_correct"] == right.sum() > 50
    for content, message in (
        ("\n".join(names[:9]), "the class 'nine' is not in --classes"),
        ("\n".join((*names, "ten")), "classes.txt names 11 classes, the network has 10"),
        ("zero\none\nzero\n", "classes.txt, line 3: 'zero' is a duplicate"),
        ("zero\n\none\n", "classes.txt, line 2: is empty"),
        ("", "classes.txt: is empty"),
    ):
        (folder / "classes.txt").write_text(content)
        done = CliRunner().invoke(app, ["attack", *words, "--classes", "classes.txt"])
        assert done.exit_code == 1
        assert message in done.output
    shutil.rmtree(folder / "pictures/train/nine")
    shutil.rmtree(folder / "pictures/test/nine")
    assert "the folders are 9 classes, the network has 10; --classes" in CliRunner().invoke(app, ["attack", *words]).output


def test_two_classes_are_refused_with_what_works(folder: Path) -> None:
    """By `check`, `prepare` and `attack`, before anything takes long."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for k in range(2):
            place = folder / f"pictures/{split}/class{k}"
            place.mkdir(parents=True)
            for i in range(20):
                Image.fromarray(rng.integers(0, 255, (8, 8), dtype=np.uint8)).save(place / f"{i}.png")
    words = ["--params", str(ROOT / "params/digits.yaml")]
    for word in ("data={source: folder, path: pictures, validation: 4, test: null}", "data.size=8"):
        words += ["--override", word]
    files = ["--out", "data.npz", "--card", "card.json"]
    none = ["--override", "evaluation.attack.protocols.standard.n=0", "--override", "evaluation.attack.protocols.released.n=0"]
    none += ["--override", "evaluation.attack.protocols.standard_l2.n=0"]
    works = [*none, "--override", "evaluation.attack.protocols.standard_binary={eps: 0.15, pgd: {step_size: 0.0375}, n: 4}"]
    for command, more in (("check", []), ("prepare", files)):
        done = CliRunner().invoke(app, [command, *words, *more])
        assert done.exit_code == 1, done.output
        assert "apgd_t needs at least 4 classes, the data have 2; set its n to 0" in done.output
        assert "apgd_dlr needs at least 3 classes" in done.output
        assert "use protocols.standard_binary={eps: 0.15, pgd: {step_size: 0.0375}, n: 60}" in done.output
        assert not (folder / "data.npz").exists()
        done = CliRunner().invoke(app, [command, *words, *works, *more])
        assert done.exit_code == 0, done.output


@pytest.mark.slow
def test_the_python_function_says_the_same_as_the_command(folder: Path) -> None:
    model = external_model("somenets:whitened", folder / "whitened.safetensors")
    images, labels, notes = external.images_of(folder / "digits.npz")
    assert notes == ()
    asked = usual_protocols(20, [word for word in (*FAST, *LESS) if word != "--override"])
    found = audit(model, torch.from_numpy(images).float() / 255, torch.from_numpy(labels), asked)
    words = "--model somenets:whitened --weights whitened.safetensors --data digits.npz --n 20 --out w.json --threads 1"
    run(*words.split(), *FAST, *LESS)
    result = read_json(folder / "w.json")
    times = {"attack_seconds", "released_attack_seconds", "digest"}
    assert {k: v for k, v in found.metrics.items() if k not in times} == {k: result[k] for k in found.metrics if k not in times}


def test_what_is_found_on_validation_images_is_measured_on_test_images(chain: Chain) -> None:
    """The universal perturbation and the screen of a checkpoint, as their own modules measure them."""
    found, attack = read_json(chain.experiment / "attack.json"), chain.context.profile.evaluation.attack
    network = chain.network("eb_jdat")
    held_out, test = (DeviceData(chain.data, split, torch.device("cpu")) for split in ("validation", "test"))
    sets, radius, size = [(part.unit(), part.labels) for part in (held_out, test)], attack.standard.radius, attack.batch_size
    with frozen_parameters(network, "eval"):
        one = universal.measure(UnitRange(network), *sets, radius, 12, size, attack.seed)
        other = screen.measure(partial(features_and_logits, network), *sets, radius, 1e-3, size, attack.seed)
    expected = flat_results({"standard": one}) | other
    assert len(expected) == 9 + 8
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-6), name
    assert found["universal_random_acc"] >= found["universal_acc"]


@pytest.mark.parametrize("name", ["universal", "screen"])
def test_what_needs_validation_images_is_refused_for_other_networks(folder: Path, name: str) -> None:
    words = ["attack", "--model", "somenets:whitened", "--weights", "whitened.pt", "--data", "digits.npz", "--out", "a.json", *FAST]
    made = CliRunner().invoke(app, [*words, "--override", f"{name}={{}}"])
    assert made.exit_code == 1
    assert f"evaluation.attack.{name} needs validation images" in made.output
    assert not Path("a.json").exists()
