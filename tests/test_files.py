"""Files that are not what they should be, and text that is more than text: one clear line each, whatever a stranger put there."""

from __future__ import annotations

import io
import json
import os
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from ebjdat import settings as params
from ebjdat.cli import app, friendly
from ebjdat.data.prepared import Prepared
from ebjdat.errors import UserError, brief, few, message, printable
from ebjdat.evaluation.robust import Verdicts
from ebjdat.files import FileError, parse_json, read_json, read_npz, write_npz
from ebjdat.settings import ParamsError
from ebjdat.stages import evaluate
from ebjdat.training import state

from .conftest import ROOT

sys.path.append(str(ROOT / "workflow/scripts"))
import dvc_results


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("pgd_at 91 % ± 2", "pgd_at 91 % ± 2"),
        ("\x1b[2J\x1b]0;title\x07", "\\x1b[2J\\x1b]0;title\\x07"),
        ("a\tb\nc\rd", "a\\tb\\nc\\rd"),
        ("\u202ereversed", "\\u202ereversed"),
        ("caf\udce9", "caf\\udce9"),  # a file name that is no UTF-8
        ("\x9b2J", "\\x9b2J"),
    ],
)
def test_what_a_terminal_would_obey_is_shown_as_an_escape(text: str, shown: str) -> None:
    assert printable(text) == shown
    shown.encode()


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ([], ""),
        ("ab", "a, b"),
        ("abcd", "a, b, c, d"),
        ("abcde", "a, b, c, d and 1 more"),
        (["\n", "x" * 101], f"\\n, {'x' * 100}… (1 more characters)"),
    ],
)
def test_of_many_names_the_first_are_told(names: Sequence[str], told: str) -> None:
    assert few(iter(names)) == told


def test_messages_keep_their_lines_and_are_never_pages() -> None:
    assert message("one\n  two\x1b[1m") == "one\n  two\\x1b[1m"
    assert brief("a" * 1500) == "a" * 1000 + "… (500 more characters)"
    long = message("\n".join(["x" * 5000] * 300))
    assert len(long) < 210_000
    assert long.endswith("… (100 more lines)")


def test_a_command_shows_an_errors_text_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    @friendly
    def command() -> None:
        raise UserError("folder/\x1b[31mred[/]\udce9: unknown\nand more")

    with pytest.raises(typer.Exit):
        command()
    assert capsys.readouterr().err == "error: folder/\\x1b[31mred[/]\\udce9: unknown\nand more\n"


JSON = {
    "empty": b"",
    "cut": b'{"a": [1, 2',
    "no UTF-8": b'{"a": "\xff\xfe"}',
    "a list": b"[1]",
    "a number": b"7",
    "nested deeply": b"[" * 100_000 + b"]" * 100_000,
    "nested too deeply for us": b'{"a":' * 60 + b"1" + b"}" * 60,
    "digits": b'{"a": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("what", JSON)
def test_a_damaged_json_file_is_one_clear_line(tmp_path: Path, what: str) -> None:
    path = tmp_path / "attack.json"
    path.write_bytes(JSON[what])
    with pytest.raises(FileError) as caught:
        read_json(path)
    told = str(caught.value)
    assert told.startswith(f"{path}: damaged, or not what it should be (")
    assert told.endswith("; delete it and run its stage again")
    assert "\n" not in told
    assert len(told) < 500


def test_what_is_no_plain_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    for name, why in (("fifo", "not a plain file"), ("folder", "not a plain file"), ("zero", "not a plain file")):
        for read in (read_json, read_npz):
            with pytest.raises(FileError, match=f"{name}: {why}"):
                read(tmp_path / name)
    with pytest.raises(FileError, match="gone: there is no such file; run the stage that makes it first"):
        read_json(tmp_path / "gone")
    (tmp_path / "large.json").write_bytes(b"{}")
    os.truncate(tmp_path / "large.json", 2**33)  # a hole: it takes no place
    with pytest.raises(FileError, match="8,589,934,592 bytes, more than the 67,108,864 that are read"):
        read_json(tmp_path / "large.json")


def test_json_of_our_own_depth_is_read() -> None:
    deep: Any = 1
    for _ in range(30):
        deep = {"a": [deep]}
        if _ == 23:
            kept = json.dumps(deep)
    assert parse_json(kept) == json.loads(kept)
    with pytest.raises(ValueError, match="nested more than 50 levels deep"):
        parse_json(json.dumps(deep))


def npz(path: Path, compression: int = zipfile.ZIP_STORED, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path


def npy(array: Any) -> bytes:
    memory = io.BytesIO()
    np.save(memory, array, allow_pickle=True)
    return memory.getvalue()


def claims_terabytes() -> bytes:
    memory = io.BytesIO()
    np.lib.format.write_array_header_1_0(memory, {"descr": "<f8", "fortran_order": False, "shape": (10**13,)})
    return memory.getvalue()


def test_arrays_come_back_and_damaged_ones_are_named(tmp_path: Path) -> None:
    path = tmp_path / "energy.npz"
    write_npz(path, {"clean": np.arange(3.0), "key": np.array("k")})
    found = read_npz(path, ["clean"])
    assert found.keys() == {"clean"}
    np.testing.assert_array_equal(found["clean"], [0, 1, 2])
    assert read_npz(path).keys() == {"clean", "key"}
    whole = path.read_bytes()
    bad = {
        "empty": b"",
        "cut": whole[: len(whole) // 2],
        "an array alone": npy(np.zeros(3)),
        "junk": b"junk" * 100,
        "another name": npz(tmp_path / "x", other=npy(np.zeros(1))).read_bytes(),
        "pickled": npz(tmp_path / "x", clean=npy(np.array([{}], dtype=object))).read_bytes(),
        "terabytes": npz(tmp_path / "x", clean=claims_terabytes()).read_bytes(),
        "changed": whole.replace(np.float64(2).tobytes(), np.float64(3).tobytes(), 1),
    }
    for content in bad.values():
        path.write_bytes(content)
        with pytest.raises(FileError, match=r"energy\.npz: damaged, or not what it should be \(.*\); delete it and run its stage again"):
            read_npz(path, ["clean"])


def test_verdicts_of_an_interrupted_evaluation(tmp_path: Path) -> None:
    stands = {"pgd20": torch.tensor([1, -1], dtype=torch.int8)}
    lost = torch.zeros(2, dtype=torch.bool)
    kept = Verdicts(torch.tensor([0, 1]), torch.tensor([0, 0]), "key", stands, lost, {"pgd20": 1})
    kept.save(tmp_path / "standard.npz")
    again = Verdicts.load(tmp_path / "standard.npz", torch.device("cpu"))
    assert (again.key, again.done) == ("key", {"pgd20": 1})
    assert torch.equal(again.stands["pgd20"], kept.stands["pgd20"])
    arrays = read_npz(tmp_path / "standard.npz")
    for name, value in {
        "y": np.zeros(3, np.int64),
        "prediction": np.zeros(2),
        "stands.pgd20": np.zeros(5, np.int8),
        "lost": np.zeros(3, bool),
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
    assert evaluate._samples(tmp_path / "samples.npz", data)[1].tolist() == [0, 1, 2, 9]
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
            evaluate._samples(tmp_path / "samples.npz", data)


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
            params.load(ROOT / "params/digits.yaml", [key])
    with pytest.raises(ParamsError, match=r"data\.label: .*at most 100 characters"):
        params.load(ROOT / "params/digits.yaml", [f"data.label={name}"])


def test_names_of_runs_that_no_folder_can_have_are_refused_at_check(tmp_path: Path) -> None:
    overrides = []
    for stem in ("a" * 100, "b" * 60):
        (tmp_path / f"{stem}.yaml").write_text("seeds: [0]\n")
        overrides.append(str(tmp_path / f"{stem}.yaml"))
    with pytest.raises(ParamsError, match=r"digits\.yaml: .*168 characters; allowed are 150; shorten the files' names"):
        params.load(ROOT / "params/digits.yaml", overrides)
    assert params.run_name("params/digits.yaml", overrides[:1]) == f"digits+{'a' * 100}"
    (tmp_path / "x\x1b[2J.yaml").write_text("seeds: [0]\n")
    with pytest.raises(ParamsError, match=r"a file's name becomes part of folders' names, .* found 'x\\x1b\[2J'"):
        params.load(ROOT / "params/digits.yaml", [str(tmp_path / "x\x1b[2J.yaml")])


LOCKS = {
    "no process": '{"write": {"/a": {"cmd": "dvc repro"}}, "read": {}}',
    "a reader without a process": '{"read": {"/a": [{"cmd": "snakemake"}]}}',
    "a process that is text": '{"write": {"/a": {"pid": "12", "cmd": "dvc"}}}',
    "an impossible process": '{"write": {"/a": {"pid": 99999999999999999999, "cmd": "dvc"}}}',
    "no command": '{"write": {"/a": {"pid": 1}}}',
    "a list": "[]",
    "lists inside": '{"write": [1], "read": 3}',
    "a holder that is text": '{"write": {"/a": "x"}}',
    "cut": '{"write": {',
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("what", LOCKS)
def test_dvcs_lock_file_that_is_damaged_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    monkeypatch.chdir(tmp_path)
    dvc_results.RUNNING.parent.mkdir(parents=True)
    dvc_results.RUNNING.write_text(LOCKS[what])
    with pytest.raises(dvc_results.DvcError, match=r"^\.dvc/tmp/rwlock: not as DVC writes it \(.*\); .* delete the file and run again$"):
        dvc_results.refuse_beside_dvc()


def test_dvcs_lock_file_of_a_living_process_is_respected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    dvc_results.refuse_beside_dvc()  # no file
    dvc_results.RUNNING.parent.mkdir(parents=True)
    dvc_results.RUNNING.write_text(json.dumps({"write": {"/a": {"pid": os.getppid(), "cmd": "dvc repro"}}}))
    with pytest.raises(dvc_results.BusyError, match="`dvc repro`"):
        dvc_results.refuse_beside_dvc()


NO_DVC_LOCKS = [
    "<<<<<<< HEAD\n",
    "[1, 2]",
    "stages: 3",
    "stages: {a: [b]}",
    "stages: {a: {outs: [path]}}",
    "stages: {a: {outs: [{md5: 1}]}}",
]


@pytest.mark.parametrize("text", [*NO_DVC_LOCKS, "[" * 2000])
def test_a_dvc_lock_that_is_none_is_named(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert dvc_results.locked_outputs("digits") == {}  # no file
    Path("dvc.lock").write_text(text)
    with pytest.raises(dvc_results.DvcError, match=r"^dvc\.lock: not as DVC writes it"):
        dvc_results.locked_outputs("digits")


def test_what_a_dvc_lock_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("dvc.lock").write_text("schema: '2.0'\nstages:\n  a:\n    cmd: x\n    outs:\n    - {path: y, md5: 0f, size: 3}\n  b: {cmd: z}\n")
    assert dvc_results.locked_outputs("digits") == {"a": {"y": "0f"}, "b": {}}
