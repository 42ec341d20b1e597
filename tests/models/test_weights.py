"""Files of weights from elsewhere: read, or refused in one line."""

from __future__ import annotations

import codecs
import os
import pickle
import struct
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ebjdat.models.external import external_model
from ebjdat.models.weights import ModelError

from ..networks import plain
from .somebodys import STATE


def rezipped(change: Callable[[dict[str, bytes]], None], method: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile("good.pt") as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    change(records)
    with zipfile.ZipFile("bad.pt", "w", method) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


def forged(start: int, value: bytes) -> None:
    """The sizes of the last record, as the list of records states them."""
    content = bytearray(Path("good.pt").read_bytes())
    at = content.rfind(b"PK\x01\x02") + start
    content[at : at + len(value)] = value
    Path("bad.pt").write_bytes(bytes(content))


def sparse(start: bytes, size: int) -> None:
    with Path("bad.pt").open("wb") as file:
        file.write(start)
        file.truncate(size)


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch evil",)


class Calls:
    """Pickled as a call."""

    def __init__(self, function: Callable[..., Any], *given: Any) -> None:
        self.call = function, given

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def nested(kind: type, width: int, deep: int) -> Any:
    """Lists or tuples that hold the same one many times: a short pickle."""
    inner: Any = kind()
    for _ in range(deep):
        inner = kind([inner] * width)
    return inner


def repeated_text(n: int) -> list[Calls]:
    text = "a" * 2**16
    return [Calls(codecs.encode, text, "latin1") for _ in range(n)]


ONE, dense = torch.zeros(1), torch._utils._rebuild_device_tensor_from_cpu_tensor


BOMBS: dict[str, tuple[Any, str]] = {  # short pickles that would take memory or time
    "a number": (Calls(bytearray, 2**28), "__builtin__.bytearray"),
    "a tensor's size": (Calls(torch.Tensor, 2**28), "torch.Tensor"),
    "another's": (Calls(torch.FloatTensor, 2**28), "torch.FloatTensor"),
    "a view in a set": (Calls(set, ONE.expand(2**20)), "__builtin__.set"),
    "a view's pairs": (Calls(OrderedDict, ONE.expand(2**20, 2)), "collections.OrderedDict"),
    "pairs that are views": (Calls(OrderedDict, [ONE.expand(2)]), "collections.OrderedDict"),
    "a set of keys of keys": ({nested(tuple, 2, 3)}, "__builtin__.set"),
    "a view's shape": (Calls(torch.Size, ONE.expand(2**20)), "torch.Size"),
    "a view counted": (Calls(Counter, ONE.expand(2**20)), "collections.Counter"),
    "by another's hand": (
        Calls(torch._tensor._rebuild_from_type_v2, bytearray, torch.Tensor, (2**28,), None),
        "torch._tensor._rebuild_from",
    ),
    "a dense copy": (
        Calls(torch._utils._rebuild_device_tensor_from_cpu_tensor, ONE.expand(2**27), torch.float64, "cpu", False),
        "torch._utils",
    ),
    "twice as long": (Calls(codecs.encode, Calls(codecs.encode, "ab", "latin1"), "hex"), "_codecs.encode"),
    "text again and again": (repeated_text(200), "repeats itself"),
    "a key of keys": ({nested(tuple, 2, 23): 1}, "repeats itself"),
}


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old"])
@pytest.mark.parametrize("kind", BOMBS)
def test_a_short_pickle_takes_no_memory_and_no_time(kind: str, old: bool) -> None:
    content, message = BOMBS[kind]
    torch.save({"state_dict": STATE, "x": content}, "bad.pt", _use_new_zipfile_serialization=not old)
    with pytest.raises(ModelError, match=message) as raised:
        external_model("somebodys:plain", Path("bad.pt"))
    assert str(raised.value).isprintable()


def test_what_usual_checkpoints_hold_beside_tensors_is_read() -> None:
    parameter = nn.Parameter(torch.ones(3))
    parameter.group = "head"
    content = {
        "model": STATE,
        "parameters": dict(plain().named_parameters()),
        "more": [parameter, torch.Size([1, 2]), torch.device("cpu"), torch.bfloat16, 3j, b"bytes", 2**70, None, True],
        "milestones": Counter([30, 30, 60]),
        "classes": {"cat", "dog", 3},
        "by Python 2": Calls(OrderedDict, [["weight", torch.ones(2)], ["bias", torch.ones(2)]]),
        "scores": np.arange(2000.0),
        "pairs": {(0, 1): "a", "text": ("tuple", [1, {2: 3.5}])},
    }
    for new in (True, False):
        torch.save(content, "weights.pt", _use_new_zipfile_serialization=new)
        assert torch.equal(external_model("somebodys:plain", Path("weights.pt"), "model").state_dict()["3.bias"], STATE["3.bias"])


def test_a_long_list_of_records_is_not_read() -> None:
    torch.save(STATE, "good.pt")
    with zipfile.ZipFile("good.pt", "a") as archive:
        for i in range(2100):
            archive.writestr(f"good/{i:02000d}", b"")
    with pytest.raises(ModelError, match=r"good\.pt: its member list has more than 4,194,304 bytes"):
        external_model("somebodys:plain", Path("good.pt"))


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "empty": (lambda: Path("bad.pt").write_bytes(b""), "is empty"),
    "folder": (lambda: Path("bad.pt").mkdir(), "not a file"),
    "fifo": (lambda: os.mkfifo("bad.pt"), "not a file"),
    "endless": (lambda: Path("bad.pt").symlink_to("/dev/zero"), "not a file"),
    "web page": (lambda: Path("bad.pt").write_bytes(b"<html>gone</html>"), "not a file of weights"),
    "cut": (lambda: Path("bad.pt").write_bytes(Path("good.pt").read_bytes()[:-300]), "damaged or truncated"),
    "compressed": (lambda: rezipped(lambda r: r.update({"good/data/0": bytes(2**24)}), zipfile.ZIP_DEFLATED), "is compressed"),
    "lzma": (lambda: rezipped(lambda r: None, zipfile.ZIP_LZMA), "is compressed"),
    "claims": (lambda: forged(20, struct.pack("<II", 2**32 - 16, 2**32 - 16)), "its records overlap"),
    "long pickle": (lambda: rezipped(lambda r: r.update({"good/data.pkl": b"\x80\x02" + bytes(5 * 2**20)})), "bytes describe its tensors"),
    "other zip": (lambda: rezipped(lambda r: r.pop("good/data.pkl")), "a zip without data.pkl"),
    "huge": (lambda: sparse(b"PK\x03\x04", 20 * 2**30), "for a network of"),
    "huge and old": (lambda: sparse(b"\x80\x02", 900 * 2**20), "in torch's old format"),
    "long header": (lambda: Path("bad.pt").write_bytes(struct.pack("<Q", 2**40) + b"{"), "its header claims 1,099,511,627,776 bytes"),
    "terabytes": (
        lambda: Path("bad.pt").write_bytes(
            struct.pack("<Q", 71) + b'{"1.weight":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4]}}'
        ),
        "not a file of weights",
    ),
    "code": (lambda: Path("bad.pt").write_bytes(pickle.dumps({"state_dict": Evil()})), "not a file of weights"),
    "code in a zip": (lambda: torch.save({"state_dict": STATE, "x": Evil()}, "bad.pt"), r"pickled objects \(posix.system\)"),
}


@pytest.mark.parametrize("kind", BAD)
def test_files_from_strangers_are_refused_unread(kind: str) -> None:
    torch.save(STATE, "good.pt")
    make, message = BAD[kind]
    make()
    with pytest.raises(ModelError, match=message) as raised:
        external_model("somebodys:plain", Path("bad.pt"))
    assert str(raised.value).startswith("bad.pt: ")
    assert str(raised.value).isprintable()
    assert not Path("evil").exists()


def test_no_flipped_bit_of_a_file_is_loaded() -> None:
    """torch does not compare the checksums that it writes."""
    torch.save(STATE, "good.pt")
    content, rng = Path("good.pt").read_bytes(), np.random.default_rng(0)
    at = content.find(STATE["1.weight"].numpy().tobytes()[:64])
    torch.save({**STATE, "1.weight": STATE["1.weight"]}, "bad.pt")
    refused = 0
    for place in [at, at + 70, *rng.integers(0, len(content), 60)]:
        flipped = bytearray(content)
        flipped[place] ^= 1 << int(rng.integers(8))
        Path("bad.pt").write_bytes(bytes(flipped))
        try:
            found = external_model("somebodys:plain", Path("bad.pt")).state_dict()
            assert all(torch.equal(found[name], value) for name, value in STATE.items()), place
        except ModelError:
            refused += 1
    assert refused > 30  # the rest lies between records
