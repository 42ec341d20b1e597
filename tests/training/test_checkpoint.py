"""Checkpoints as files: what is read back, and every way in which a file can be wrong, made in its bytes here.

The layout (safetensors: 8 bytes of length, JSON, tensors) and the digests are written out again, not taken from the package.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from ebjdat.cli import app
from ebjdat.data.prepared import Prepared
from ebjdat.models.modes import UnitRange
from ebjdat.models.wrn import WideResNet, build
from ebjdat.settings import ModelSettings, Profile
from ebjdat.settings import load as load_profile
from ebjdat.training import checkpoint
from ebjdat.training.checkpoint import Checkpoint, CheckpointError, Header
from tests.conftest import ROOT

MODEL = ModelSettings(depth=10, width=1)


@pytest.fixture
def header(profile: Profile) -> Header:
    return Header(
        title="eb_jdat/seed0",
        run="digits",
        method="eb_jdat",
        seed=0,
        model=MODEL,
        training=profile.training_settings("eb_jdat"),
        image_shape=(1, 8, 8),
        classes=tuple("0123456789"),
        data_hash="data1",
        params_hash="params1",
        git_commit="abc",
        metrics={"selection_score": 0.1 + 0.2},
    )


@pytest.fixture
def saved(tmp_path: Path, network: WideResNet, header: Header) -> Path:
    buffer = torch.randint(0, 256, (6, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    averaged = {name: value + 1 for name, value in network.state_dict().items()}
    checkpoint.save(Checkpoint(header, network.state_dict(), buffer, torch.arange(6), averaged), tmp_path / "c.safetensors")
    return tmp_path / "c.safetensors"


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    """The file's own table (dtype, shape and place of each tensor, and "__metadata__") and the tensors' bytes."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def written(path: Path, table: dict[str, Any], data: bytes) -> Path:
    text = json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def edited(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """The file with another header of this package, everything else as it was."""
    table, data = parts(path)
    plain = json.loads(table["__metadata__"]["ebjdat"])
    change(plain)
    table["__metadata__"]["ebjdat"] = json.dumps(plain)
    return written(path, table, data)


def refused(path: Path, why: str, **expected: Any) -> None:
    with pytest.raises(CheckpointError, match=why):
        checkpoint.load(path, **expected)


def test_round_trip(saved: Path, network: WideResNet) -> None:
    loaded = checkpoint.load(
        saved, data_hash="data1", model=MODEL, method="eb_jdat", image_shape=[1, 8, 8], classes=[str(k) for k in range(10)]
    )
    x = torch.rand(2, 1, 8, 8)
    assert torch.allclose(loaded.network(torch.device("cpu"))(x), network.eval()(x), atol=1e-5)  # another memory format
    assert loaded.buffer is not None
    assert loaded.buffer.shape == (6, 1, 8, 8)
    assert loaded.ema is not None
    assert torch.equal(loaded.ema["head.weight"], loaded.weights["head.weight"] + 1)
    assert loaded.header.training.adversary.score == "energy"
    assert (loaded.header.run, loaded.header.params_hash) == ("digits", "params1")
    assert loaded.header.metrics == {"selection_score": 0.30000000000000004}


def test_a_checkpoint_keeps_its_networks_variant(saved: Path, header: Header, tmp_path: Path) -> None:
    """The JEM family's network comes back as such and fits no settings of the other; a header without the key is of that other."""
    jem = ModelSettings(depth=10, width=1, variant="jem")
    network, path = build(jem, 1, 10, 1).eval(), tmp_path / "jem.safetensors"
    checkpoint.save(Checkpoint(dataclasses.replace(header, model=jem), network.state_dict(), None, None), path)
    x = torch.rand(2, 1, 8, 8)
    assert torch.allclose(checkpoint.load(path, model=jem).network(torch.device("cpu"))(x), network(x), atol=1e-5)
    refused(path, r"variant jem \(settings: wrn\)", model=MODEL)
    shown = CliRunner().invoke(app, ["inspect", str(path)])
    assert shown.exit_code == 0
    assert "model.variant" in shown.output

    def old(plain: dict[str, Any]) -> None:
        del plain["model"]["variant"]
        plain["digest"] = checkpoint.header_digest(plain)

    assert checkpoint.load(edited(saved, old), model=MODEL).header.model == MODEL


def test_the_same_content_gives_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    checkpoint.save(checkpoint.load(saved), tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == saved.read_bytes()


def test_digests_are_those_that_the_documentation_says(saved: Path) -> None:
    """Recomputed with NumPy and hashlib: "dtype (shape) " and the bytes; the header as sorted JSON without its digest."""
    table, data = parts(saved)
    plain = json.loads(table["__metadata__"]["ebjdat"])
    names = {"F32": "float32", "I64": "int64", "U8": "uint8"}
    for name, entry in table.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            shape = str(tuple(entry["shape"]))
            text = f"{names[entry['dtype']]} {shape} ".encode() + data[begin:end]
            assert plain["tensors"].pop(name) == hashlib.sha256(text).hexdigest()
    assert plain["tensors"] == {}
    plain = json.loads(table["__metadata__"]["ebjdat"])
    own = plain.pop("digest")
    assert own == hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


@pytest.mark.parametrize("name", ["model.stem.weight", "ema.head.bias", "buffer.images", "model.blocks.0.norm1.num_batches_tracked"])
def test_one_flipped_bit_names_its_tensor(saved: Path, name: str) -> None:
    table, data = parts(saved)
    name = name if name in table else next(n for n in table if n.endswith("num_batches_tracked"))
    begin, end = table[name]["data_offsets"]
    place = begin + (end - begin) // 2
    flipped = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
    refused(written(saved, table, flipped), rf"changed since it was written: tensors changed: {name};")


def test_swapped_retyped_missing_and_added_tensors_are_named(saved: Path, tmp_path: Path) -> None:
    table, data = parts(saved)
    same = [name for name in table if name.endswith(("norm.weight", "norm.bias"))]
    first, second = next((a, b) for a in same for b in same if a < b and table[a]["shape"] == table[b]["shape"])
    swapped = table | {first: table[second], second: table[first]}
    refused(written(saved, swapped, data), rf"tensors changed: .*{first}, {second}")

    retyped = table | {"model.head.bias": {**table["model.head.bias"], "dtype": "I32"}}  # the same bytes
    refused(written(saved, retyped, data), r"tensors changed: model\.head\.bias;")

    tensors = load_file(written(saved, table, data))
    head = {"ebjdat": table["__metadata__"]["ebjdat"]}
    save_file({n: v for n, v in tensors.items() if n != "model.head.bias"}, tmp_path / "less.safetensors", head)
    refused(tmp_path / "less.safetensors", r"tensors missing: model\.head\.bias;")
    save_file({**tensors, "model.extra": torch.zeros(1)}, tmp_path / "more.safetensors", head)
    refused(tmp_path / "more.safetensors", r"tensors added: model\.extra;")


@pytest.mark.parametrize("change", [{"seed": 1}, {"metrics": {"selection_score": 0.99}}, {"data_hash": "data2"}, {"digest": None}])
def test_a_header_that_was_edited_is_noticed(saved: Path, change: dict[str, Any]) -> None:
    refused(edited(saved, lambda plain: plain.update(change)), "the header was changed", data_hash="data2")


def test_every_cut_is_noticed(saved: Path) -> None:
    whole = saved.read_bytes()
    for length in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        saved.write_bytes(whole[:length])
        refused(saved, r"not a whole safetensors file .*; if a stage made it, delete it and rerun that stage")


def test_files_of_other_kinds_say_what_they_are(saved: Path, tmp_path: Path) -> None:
    refused(tmp_path / "none.safetensors", "no such checkpoint; run the stage that makes it first")
    torch.save({"a": torch.zeros(1)}, tmp_path / "torch.safetensors")
    refused(tmp_path / "torch.safetensors", "not a whole safetensors file")
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    refused(tmp_path / "foreign.safetensors", "not a checkpoint of this package")
    for text in ("{", "[]"):
        save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors", {"ebjdat": text})
        refused(tmp_path / "foreign.safetensors", "its header is not")


def test_formats_of_other_versions_are_refused(saved: Path) -> None:
    """Format 1, of before there were digests, had no "format"; a later one says its number."""

    def age(plain: dict[str, Any]) -> None:
        for name in ("format", "tensors", "digest", "run", "params_hash"):
            del plain[name]

    newer = edited(saved, lambda plain: plain.update(format=3, version="9.0"))
    refused(newer, r"format 3 is of another version; .* reads format 2 \(written by version 9\.0, commit abc")
    refused(edited(saved, age), r"format 1 has no digests, .*: rerun its stage")


@pytest.mark.parametrize(
    ("expected", "why"),
    [
        ({"data_hash": "data2"}, "trained on data data1, this is data data2; train again"),
        ({"model": ModelSettings(depth=10, width=2)}, r"holds another network: width 1 \(settings: 2\)"),
        ({"method": "jempp"}, "method 'eb_jdat', not 'jempp'"),
        ({"image_shape": [3, 32, 32]}, r"takes images of shape \(1, 8, 8\), expected \(3, 32, 32\)"),
        ({"classes": [str(k) for k in range(100)]}, "has 10 classes, expected 100"),
        ({"classes": ["zero", *"123456789"]}, r"has other classes: '0' \(expected: 'zero'\)"),
        (
            {"method": "jem", "image_shape": (3, 8, 8), "data_hash": "x", "model": ModelSettings(depth=16, width=1)},
            r"method .*; takes images .*; was trained on .*; holds another network: depth 10 \(settings: 16\)",
        ),
    ],
)
def test_everything_that_does_not_fit_is_named(saved: Path, expected: dict[str, Any], why: str) -> None:
    refused(saved, why, **expected)


def test_weights_of_another_width_do_not_fit_their_header(tmp_path: Path, header: Header) -> None:
    """Intact, digests and all, but wrong: the header says width 1, 10 classes, one channel."""
    path = tmp_path / "c.safetensors"
    for wrong, name in (
        (build(ModelSettings(depth=10, width=2), 1, 10, 0), r"block"),
        (build(MODEL, 1, 3, 0), r"head\.bias, head\.weight;"),
        (build(MODEL, 3, 10, 0), r"stem\.weight;"),
    ):
        checkpoint.save(Checkpoint(header, wrong.state_dict(), None, None), path)
        refused(path, rf"do not fit its own header: .*{name}")
        checkpoint.save(Checkpoint(header, build(MODEL, 1, 10, 0).state_dict(), None, None, wrong.state_dict()), path)
        refused(path, rf"do not fit its own header: .*{name}")


def test_an_experiments_checkpoint_fits_its_profile(saved: Path, profile: Profile, digits: Prepared, header: Header) -> None:
    right = dataclasses.replace(header, model=profile.model, data_hash=digits.data_hash)
    big = build(profile.model, 1, 10, 0)
    checkpoint.save(Checkpoint(right, big.state_dict(), None, None), saved)
    assert checkpoint.load_for(profile, "eb_jdat", saved, digits).header == right
    with pytest.raises(CheckpointError, match="method 'eb_jdat', not 'pgd_at'"):
        checkpoint.load_for(profile, "pgd_at", saved, digits)
    with pytest.raises(CheckpointError, match="data"):
        checkpoint.load_for(profile, "eb_jdat", saved, dataclasses.replace(digits, data_hash="other"))
    wider = load_profile(ROOT / "params/digits.yaml", ["model.width=5"])
    with pytest.raises(CheckpointError, match="holds another network: width"):
        checkpoint.load_for(wider, "eb_jdat", saved, digits)


def test_inspect_shows_the_header_and_whether_it_changed(saved: Path) -> None:
    run = CliRunner().invoke
    listed = json.loads(run(app, ["inspect", str(saved), "--json"]).output)
    assert (listed["run"], listed["method"], listed["params_hash"], listed["data_hash"]) == ("digits", "eb_jdat", "params1", "data1")
    assert listed["tensors"]["model.head.bias"]["shape"] == [10]
    assert listed["problems"] == []
    shown = run(app, ["inspect", str(saved)])
    assert shown.exit_code == 0
    assert all(text in shown.output for text in ("params1", "training.optimizer.lr", "replay buffer", "every digest fits"))
    changed = run(app, ["inspect", str(edited(saved, lambda plain: plain.update(seed=1)))])
    assert changed.exit_code == 1
    assert "the header was changed" in changed.output
    old = run(app, ["inspect", str(edited(saved, lambda plain: plain.pop("format"))), "--json"])
    assert old.exit_code == 1
    assert "format 1 has no digests" in json.loads(old.output)["problems"][0]
    missing = run(app, ["inspect", "none.safetensors"])
    assert missing.exit_code == 1
    assert "no such checkpoint" in missing.output


def test_the_documentations_python_runs(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: WideResNet) -> None:
    """The code blocks of docs/checkpoints.md, as they stand, on a real file."""
    monkeypatch.chdir(tmp_path)
    saved.rename("seed0.safetensors")
    blocks = (ROOT / "docs/checkpoints.md").read_text().split("```python\n")[1:]
    assert len(blocks) == 2
    images = np.random.default_rng(0).random((4, 1, 8, 8), dtype=np.float32)
    names: dict[str, Any] = {"images": torch.from_numpy(images)}
    exec(blocks[0].split("```")[0], names)
    assert torch.allclose(names["logits"], UnitRange(network).eval()(names["images"]), atol=1e-5)
    names = {}
    exec(blocks[1].split("```")[0], names)
    with safe_open("seed0.safetensors", "pt") as file:
        assert names["header"] == json.loads(file.metadata()["ebjdat"])


def headed(path: Path, header: bytes, length: int | None = None, data: bytes = b"") -> Path:
    """A safetensors file with these bytes as its header, and this length before it."""
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def tensor(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_a_header_is_measured_before_it_is_read(tmp_path: Path) -> None:
    path = headed(tmp_path / "c.safetensors", b"{}", length=2**40)
    refused(path, r"a header of 1,099,511,627,776 bytes in a file of 10\); if a stage made it, delete it")
    headed(path, b"{}", length=2**33)
    os.truncate(path, 2**33 + 100)  # a hole: it takes no place
    with pytest.raises(CheckpointError, match=r"a header of 8,589,934,592 bytes; at most 33,554,432 are allowed"):
        checkpoint.inspect(path)
    os.mkfifo(tmp_path / "fifo")
    refused(tmp_path / "fifo", "not a regular file")


@pytest.mark.parametrize(
    "table",
    [
        {"a": tensor(0, 8, [1])},
        {"a": tensor(0, 4, [1]), "b": tensor(0, 4, [1])},
        {"a": tensor(4, 8, [1])},
        {"a": tensor(0, 4, [2**62, 2**62])},
        {"a": tensor(0, 8, [1], "C64")},
        {"a": tensor(0, 4, [1], "NONE")},
        {"a": tensor(-4, 0, [1])},
        {"__metadata__": {"ebjdat": {"format": 2}}, "a": tensor(0, 4, [1])},
        {"__metadata__": ["ebjdat"], "a": tensor(0, 4, [1])},
        {"a": [[[]]]},
        [],
    ],
)
def test_tables_of_tensors_that_do_not_fit_are_one_clear_line(tmp_path: Path, table: Any) -> None:
    path = headed(tmp_path / "c.safetensors", json.dumps(table).encode(), data=bytes(4))
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert CliRunner().invoke(app, ["inspect", str(path)]).exit_code == 1


DEEP: Any = json.loads("[" * 400 + "]" * 400)


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("training", [1, 2], "training: Input should be a valid dictionary"),
        ("training", DEEP, "nested more than 50 levels deep"),
        ("model", {"depth": 10**9}, "tensors do not fit its own header|depth"),
        ("model", {"depth": 10, "width": 10**12}, "width: Input should be less"),
        ("model", {"depth": 10, "width": 10**40}, "width: Input should be less"),
        ("model", 3, "model: Input should be a valid dictionary"),
        ("image_shape", [1, 8], "image_shape"),
        ("image_shape", [10**12, 8, 8], "tensors do not fit its own header"),
        ("image_shape", [-1, 8, 8], r"image_shape\.0: Input should be greater than 0"),
        ("image_shape", "188", "image_shape"),
        ("classes", 10, "classes: Input should be a valid tuple"),
        ("classes", [["0"]] * 10, r"classes\.0: Input should be a valid string"),
        ("classes", ["c"] * 200_000, "tensors do not fit its own header"),
        ("seed", {"a": 1}, "seed: Input should be a valid integer"),
        ("metrics", {"score": "high"}, "metrics.score"),
        ("events", "none", "events"),
        ("tensors", [], "the header was changed"),
        ("format", [2], r"checkpoint format \[2\] is of another version"),
        ("format", "x" * 100_000, r"checkpoint format x+… \(99,960 more characters\)"),
    ],
)
def test_headers_of_other_kinds_are_one_clear_line(saved: Path, name: str, value: Any, why: str) -> None:
    """With correct digests, as somebody makes them who recomputes them."""

    def forge(plain: dict[str, Any]) -> None:
        plain[name] = value
        rest = {key: kept for key, kept in plain.items() if key != "digest"}
        plain["digest"] = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()

    edited(saved, forge)
    with pytest.raises(CheckpointError, match=why) as caught:
        checkpoint.load(saved)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 2000
    shown = CliRunner().invoke(app, ["inspect", str(saved)])
    assert shown.exit_code in (0, 1)
    assert not isinstance(shown.exception, Exception) or isinstance(shown.exception, SystemExit)
    assert len(shown.output.splitlines()) < 400


def test_a_replay_buffer_of_other_images_is_refused(saved: Path, network: WideResNet, header: Header) -> None:
    images, labels = torch.zeros(6, 1, 8, 8, dtype=torch.uint8), torch.arange(6)
    for wrong, of in ((images.float(), labels), (images[:, :, :4], labels), (images, labels + 5), (images, labels[:5]), (images, -labels)):
        checkpoint.save(Checkpoint(header, network.state_dict(), wrong, of), saved)
        refused(saved, "its replay buffer does not fit its own header")


def test_inspect_shows_names_as_they_stand_and_never_pages_of_them(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What rich reads as markup or an emoji, what a terminal obeys, and 200,000 classes."""
    monkeypatch.setenv("COLUMNS", "200")
    nasty = ["[red]", "[/]", ":x:", "\x1b[2J\r", "caf\udce9", "a\nb"]
    edited(saved, lambda plain: plain.update(classes=nasty + [f"class {i}" for i in range(200_000)], title="[/]", run="[bold"))
    shown = CliRunner().invoke(app, ["inspect", str(saved)])
    assert shown.exit_code == 1
    assert "the header was changed" in shown.output
    text = " ".join(shown.output.replace("│", " ").split())
    for name in ("[red], [/], :x:, \\x1b[2J\\r, caf\\udce9, a\\nb, class 0", "(200,006 in all)", "title [/]", "run [bold"):
        assert name in text
    assert "\x1b" not in shown.output
    assert len(shown.output) < 40_000
