"""Damaged, hostile and oversized files: one clear line each, before memory is allocated."""

from __future__ import annotations

import io
import json
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ebjdat.cli import app
from ebjdat.data import external
from ebjdat.data.prepared import Prepared
from ebjdat.evaluation.verdicts import Verdicts
from ebjdat.files import FileError, arrays_of, parse_json, read_json, read_npz, write_npz
from ebjdat.settings import ParamsError, run_name
from ebjdat.settings import load as load_profile
from ebjdat.stages import evaluate
from ebjdat.training import state

from .conftest import ROOT
from .data.conftest import peak_below, refusal

JSON = {
    "empty": b"",
    "cut": b'{"a": [1, 2',
    "not UTF-8": b'{"a": "\xff\xfe"}',
    "a list": b"[1]",
    "a number": b"7",
    "nested deeply": b"[" * 100_000 + b"]" * 100_000,
    "nested beyond the limit": b'{"a":' * 60 + b"1" + b"}" * 60,
    "digits": b'{"a": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("what", JSON)
def test_a_damaged_json_file_is_one_clear_line(tmp_path: Path, what: str) -> None:
    path = tmp_path / "attack.json"
    path.write_bytes(JSON[what])
    with pytest.raises(FileError) as caught:
        read_json(path)
    assert re.fullmatch(rf"{path}: damaged or invalid \(.{{,300}}\); delete it and rerun its stage", str(caught.value))


def test_only_regular_files_of_limited_size_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "large.json").write_bytes(b"{}")
    os.truncate(tmp_path / "large.json", 2**33)  # a sparse file
    for name, expected in (
        *((name, "not a regular file; delete it and rerun its stage") for name in ("fifo", "folder", "zero")),
        ("gone", "no such file; run the stage that makes it first"),
        ("large.json", "8,589,934,592 bytes; at most 67,108,864 are allowed"),
    ):
        for read in (read_json, read_npz)[: 1 if name == "large.json" else 2]:
            with pytest.raises(FileError, match=f"{name}: {expected}"):
                read(tmp_path / name)


def test_nesting_is_limited_to_50_levels() -> None:
    for levels, allowed in ((50, True), (51, False)):
        text = "[" * levels + "]" * levels
        if allowed:
            assert parse_json(text) == json.loads(text)
        else:
            with pytest.raises(ValueError, match="nested more than 50 levels deep"):
                parse_json(text)


# Arrays


def npz(path: Path, compression: int = zipfile.ZIP_STORED, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path


def npy(array: Any) -> bytes:
    memory = io.BytesIO()
    np.save(memory, array, allow_pickle=True)
    return memory.getvalue()


def stated(shape: tuple[int, ...], dtype: str = "|u1") -> bytes:
    memory = io.BytesIO()
    np.lib.format.write_array_header_1_0(memory, {"descr": dtype, "fortran_order": False, "shape": shape})
    return memory.getvalue()


MEMBERS: dict[str, tuple[bytes, str]] = {  # of an .npz, deflated
    "terabytes": (stated((10**6, 3, 1024, 1024)), "does not match its size"),
    "negative": (stated((-1, 8)) + bytes(64), "does not match its size"),
    "too short": (stated((4, 8)) + bytes(8), "does not match its size"),
    "too long": (stated((4, 8)) + bytes(99), "does not match its size"),
    "pickled": (npy(np.array([{}], dtype=object)), "holds Python objects"),
    "header of 4 GB": (b"\x93NUMPY\2\0" + b"\xff" * 4 + bytes(50_000_000), "not a readable .npz"),
    "swollen": (stated((70_000_000,)) + bytes(70_000_000), "an array expands from"),
    "version 9": (b"\x93NUMPY\x09\0" + bytes(99), "not a readable .npz|format version"),
    "not an array": (b"hello", "not a readable .npz"),
    "nothing": (b"", "not a readable .npz"),
    "code": (b"\x93NUMPY\1\0\x20\0" + b"__import__('os').abort()".ljust(32), "not a readable .npz"),
}


@pytest.mark.parametrize("kind", MEMBERS)
def test_npz_members_are_checked_before_they_are_read(kind: str, tmp_path: Path) -> None:
    content, expected = MEMBERS[kind]
    path = npz(tmp_path / "a.npz", zipfile.ZIP_DEFLATED, images=content)
    with peak_below(8_000_000):
        assert re.search(expected, refusal(lambda: arrays_of(path)))
    with pytest.raises(FileError, match=r"a\.npz: damaged or invalid \(.*\); delete it and rerun its stage"):
        read_npz(path)


def test_small_npz_members_do_not_swell_together_and_only_those_requested_are_read(tmp_path: Path) -> None:
    zeros = {f"a{i}": np.zeros(12 * 2**20, np.uint8) for i in range(6)}  # 72 MiB from 72 kB
    images = np.random.default_rng(0).integers(0, 256, (4, 1, 8, 8), np.uint8)
    np.savez_compressed(path := tmp_path / "a.npz", images=images, labels=np.arange(4), **zeros)
    with peak_below(8_000_000):
        assert re.search(r"6 arrays together expand from 7\d,\d{3} to 75,498,240 bytes; 200 times", refusal(lambda: arrays_of(path)))
        assert list(arrays_of(path, names=("labels", "none"))) == list(read_npz(path, ["labels"])) == ["labels"]
        assert np.array_equal(external.images_of(path)[0], images)
    assert len(arrays_of(path, names=list(zeros)[:5])) == 5


@pytest.mark.parametrize("compress", [False, True])
def test_npz_files_are_read_as_numpy_reads_them(compress: bool, tmp_path: Path) -> None:
    arrays = {
        "a": np.arange(12).reshape(3, 4),
        "f": np.asfortranarray(np.random.default_rng(0).normal(size=(4, 5))),
        "t": np.array(["é", "x"]),
        "s": np.array(3.5),
        "empty": np.zeros((0, 5), np.uint8),
        "b": np.array([True, False]),
        "big": np.arange(5, dtype=">i4"),
    }
    path = tmp_path / "a.npz"
    (np.savez_compressed if compress else np.savez)(path, **arrays)
    read = arrays_of(path)
    assert list(read) == list(arrays)
    assert all(np.array_equal(read[name], array) and read[name].dtype == array.dtype for name, array in arrays.items())
    assert re.search(r"its arrays have .* bytes; at most 100 are allowed", refusal(lambda: arrays_of(path, limit=100)))


def test_damaged_npz_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "energy.npz"
    write_npz(path, {"clean": np.arange(3.0), "key": np.array("k")})
    assert read_npz(path).keys() == {"clean", "key"}
    whole = path.read_bytes()
    for content, expected in (
        (b"", "not a readable"),
        (b"junk" * 100, "not a readable"),
        (whole[: len(whole) // 2], "not a readable"),
        (npy(np.zeros(3)), "not a readable"),
        (whole.replace(np.float64(2).tobytes(), np.float64(3).tobytes(), 1), "not a readable"),  # its checksum
        (npz(tmp_path / "x", other=npy(np.zeros(1))).read_bytes(), "KeyError: 'clean'"),
    ):
        path.write_bytes(content)
        with pytest.raises(FileError, match=rf"energy\.npz: damaged or invalid \(.*{expected}.*\); delete it and rerun its stage"):
            read_npz(path, ["clean"])
    with pytest.raises(FileNotFoundError):
        arrays_of(tmp_path / "none.npz")
    assert "is not a file" in refusal(lambda: arrays_of(tmp_path))


# What other rooms read through it


def test_verdicts_of_an_interrupted_evaluation(tmp_path: Path) -> None:
    stands = {"pgd20": torch.tensor([1, -1], dtype=torch.int8)}
    lost = torch.zeros(2, dtype=torch.bool)
    found = {"pgd20": torch.tensor([[0.5, 0.9], [torch.nan, torch.nan]], dtype=torch.float64)}
    kept = Verdicts(torch.tensor([0, 1]), torch.tensor([0, 0]), "key", stands, lost, {"pgd20": 1}, found=found)
    kept.save(tmp_path / "standard.npz")
    again = Verdicts.load(tmp_path / "standard.npz", torch.device("cpu"))
    assert (again.key, again.done) == ("key", {"pgd20": 1})
    assert torch.equal(again.robust["pgd20"], kept.robust["pgd20"])
    assert torch.equal(again.found["pgd20"].nan_to_num(7), found["pgd20"].nan_to_num(7))
    arrays = read_npz(tmp_path / "standard.npz")
    for name, value in {
        "y": np.zeros(3, np.int64),
        "prediction": np.zeros(2),
        "robust.pgd20": np.zeros(5, np.int8),
        "lost": np.zeros(3, bool),
        "found.pgd20": np.zeros((2, 3)),
        "attacks": np.array(["fab"]),
        "done": np.array([[1]]),
        "excess": np.zeros(3),
    }.items():
        write_npz(tmp_path / "standard.npz", {**arrays, name: value})
        with pytest.raises(FileError, match=r"standard\.npz: damaged"):
            Verdicts.load(tmp_path / "standard.npz", torch.device("cpu"))


def test_samples_of_other_data_are_refused(tmp_path: Path) -> None:
    images, labels = np.zeros((4, 1, 8, 8), np.uint8), np.array([0, 1, 2, 9])
    index, classes = np.arange(4), tuple("0123456789")
    data = Prepared(images, labels, index, index, index, np.zeros((10, 1, 8, 8), np.float32), classes, "d1")
    write_npz(tmp_path / "samples.npz", {"images": images, "labels": labels})
    assert evaluate.read_samples(tmp_path / "samples.npz", data)[1].tolist() == [0, 1, 2, 9]
    for other, of in (
        (images.astype(np.float32), labels),
        (images[:, :, :4], labels),
        (images, labels[:3]),
        (images, labels + 1),
        (images, labels.astype(np.uint64)),
        (images[:0], labels[:0]),
    ):
        write_npz(tmp_path / "samples.npz", {"images": other, "labels": of})
        with pytest.raises(FileError, match=r"samples\.npz: .* are needed"):
            evaluate.read_samples(tmp_path / "samples.npz", data)


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04", {"epoch": 1}, [1, 2], {"epoch": "x", "ended": False, "events": [1]}])
def test_a_damaged_training_state_says_what_to_delete(tmp_path: Path, content: Any) -> None:
    path = tmp_path / state.END_OF_EPOCH
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)

    class Learner:
        model = torch.nn.Linear(1, 1)

        def load(self, state: Any) -> None:
            self.model.load_state_dict(state["model"])

    with pytest.raises(state.TrainingError, match=rf"{tmp_path}.*; delete (it|the folder) to start again"):
        state.TrainingState.restore(tmp_path, Learner())  # type: ignore[arg-type]


def test_names_that_no_folder_can_have_are_refused_at_check(tmp_path: Path) -> None:
    raw = (ROOT / "params/digits.yaml").read_text()
    name = "e" * 101
    path = tmp_path / "long.yaml"
    path.write_text(raw.replace("\n  eb_jdat:", f"\n  {name}:"))
    told = CliRunner().invoke(app, ["check", "--params", str(path)])
    assert told.exit_code == 1
    assert "experiments.eee" in told.output
    assert "at most 100 characters" in told.output
    path.write_text(raw.replace("\n  eb_jdat:", f"\n  {name[:100]}:"))
    assert CliRunner().invoke(app, ["check", "--params", str(path)]).exit_code == 0
    for key in (f"pretraining.{name}={{epochs: 1}}", f"evaluation.attack.protocols.{name}={{like: standard, eps: 0.1, n: 0}}"):
        with pytest.raises(ParamsError, match="at most 100 characters"):
            load_profile(ROOT / "params/digits.yaml", [key])
    with pytest.raises(ParamsError, match=r"data\.label: .*at most 100 characters"):
        load_profile(ROOT / "params/digits.yaml", [f"data.label={name}"])


def test_names_of_runs_that_no_folder_can_have_are_refused_at_check(tmp_path: Path) -> None:
    overrides = []
    for stem in ("a" * 100, "b" * 60):
        (tmp_path / f"{stem}.yaml").write_text("seeds: [0]\n")
        overrides.append(str(tmp_path / f"{stem}.yaml"))
    with pytest.raises(ParamsError, match=r"digits\.yaml: .*168 characters, 150 are allowed; shorten the file names"):
        load_profile(ROOT / "params/digits.yaml", overrides)
    assert run_name("params/digits.yaml", overrides[:1]) == f"digits+{'a' * 100}"
    (tmp_path / "x\x1b[2J.yaml").write_text("seeds: [0]\n")
    with pytest.raises(ParamsError, match=r"file names become part of folder names: .* found 'x\\x1b\[2J'"):
        load_profile(ROOT / "params/digits.yaml", [str(tmp_path / "x\x1b[2J.yaml")])
