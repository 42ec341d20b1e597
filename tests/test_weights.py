"""Networks and weights as other people have them: read however they are wrapped, or refused in one line."""

from __future__ import annotations

import argparse
import codecs
import contextlib
import os
import pathlib
import pickle
import struct
import sys
import time
import types
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ebjdat.errors import AttackError
from ebjdat.evaluation import robust
from ebjdat.evaluation.audit import audit
from ebjdat.models.external import external_model
from ebjdat.models.weights import ModelError
from ebjdat.settings import AttackSettings

from .conftest import Linear
from .test_robust import images, labelled, settings


class Wrapped(nn.Module):
    """A network below a name of its own, with batch norm, whose counter some files lack."""

    def __init__(self, network: nn.Module | None = None) -> None:
        super().__init__()
        self.net = network or plain()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def plain(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.BatchNorm1d(12, momentum=None), nn.Linear(12, 10))
    network(images())  # statistics of these images
    return network.eval()


def below(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in state.items()}


def raising() -> nn.Module:
    raise KeyError("no\x1b[31m such\nsetting")


def leaving() -> nn.Module:
    sys.exit(2)


class Own(nn.Module):
    """A network one of whose methods is its own."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        super().__init__()
        self.network = plain()
        setattr(self, name, function)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


def refusing(error: BaseException) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> None:
        raise error

    return refuse


STATE, OTHER = plain().state_dict(), plain(1).state_dict()
FACTORIES: dict[str, Callable[[], Any]] = {
    "plain": plain,
    "parallel": lambda: nn.DataParallel(plain()),
    "wrapped": Wrapped,
    "averaged": lambda: AveragedModel(plain()),
    "raising": raising,
    "leaving": leaving,
    "no eval": lambda: Own("eval", refusing(ValueError("no eval"))),
    "no state": lambda: Own("state_dict", refusing(KeyError("no state"))),
    "other eval": lambda: Own("eval", lambda: None),
    "lazy": lambda: nn.LazyLinear(3),
    "named": lambda: nn.Sequential(OrderedDict(conv=nn.Linear(16, 8), norm=nn.Linear(8, 10))),  # "module" lies between them
}


@pytest.fixture(autouse=True)
def somebodys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = types.ModuleType("somebodys")
    vars(module).update(FACTORIES)
    monkeypatch.setitem(sys.modules, "somebodys", module)
    monkeypatch.chdir(tmp_path)


FILES: dict[str, tuple[Any, str]] = {  # what is in a file, and where the weights are in it
    "as they are": (STATE, ""),
    "parallel": (below("module.", STATE), "module"),
    "compiled": (below("_orig_mod.", STATE), "_orig_mod"),
    "compiled and parallel": ({"state_dict": below("module._orig_mod.", STATE)}, "state_dict.module._orig_mod"),
    "lightning": ({"state_dict": {**below("model.", STATE), "criterion.weight": torch.ones(3)}, "epoch": 3}, "state_dict.model"),
    "lightning, compiled": ({"state_dict": below("model._orig_mod.", STATE)}, "state_dict.model._orig_mod"),
    "a recipe": ({"net": STATE, "acc": 97.1, "epoch": 3}, "net"),
    "averaged": (AveragedModel(plain()).state_dict(), "module"),
    "deep": ({"a": [{"network": below("module.net.", STATE)}]}, "a.0.network.module.net"),
    "an optimiser": ({"model": STATE, "optimizer": torch.optim.Adam(plain().parameters()).state_dict()}, "model"),
    "numpy": ({"model": STATE, "best": np.float64(3), "losses": np.arange(3), "args": argparse.Namespace(lr=np.float32(1))}, "model"),
    "the same twice": ({"state_dict": STATE, "state_dict_ema": {k: v * 1 for k, v in STATE.items()}}, "state_dict"),
    "no counters": ({k: v for k, v in STATE.items() if "num_batches" not in k}, ""),
}


@pytest.mark.parametrize("factory", ["plain", "parallel", "wrapped", "averaged"])
def test_weights_are_found_however_they_are_wrapped(factory: str, capsys: pytest.CaptureFixture[str]) -> None:
    x, reference = images(), plain()
    reference.load_state_dict(STATE)
    expected = reference(x)
    for name, (content, route) in FILES.items():
        torch.save(content, "weights.pt")
        model = external_model(f"somebodys:{factory}", Path("weights.pt"))
        assert torch.equal(model(x), expected), name
        told = capsys.readouterr().out
        assert told.startswith("weights: weights.pt: ")
        if factory == "plain":
            assert (f"under {route!r}" if route else "as they are") in told, name
    assert "not read: criterion.weight" in _told(FILES["lightning"][0], capsys)
    assert "the same are under state_dict_ema" in _told(FILES["the same twice"][0], capsys)


def _told(content: Any, capsys: pytest.CaptureFixture[str]) -> str:
    torch.save(content, "weights.pt")
    external_model("somebodys:plain", Path("weights.pt"))
    return capsys.readouterr().out


def test_half_and_double_weights_and_old_files_are_read() -> None:
    for dtype in (torch.float16, torch.float64):
        torch.save({k: v.to(dtype) if v.is_floating_point() else v for k, v in STATE.items()}, "weights.pt")
        found = external_model("somebodys:plain", Path("weights.pt")).state_dict()["1.weight"]
        assert torch.equal(found, STATE["1.weight"].to(dtype).float())
    torch.save(STATE, "old.pt", _use_new_zipfile_serialization=False)
    save_file(STATE, "weights.bin")  # safetensors by any name
    for name in ("old.pt", "weights.bin"):
        assert torch.equal(external_model("somebodys:plain", Path(name)).state_dict()["3.bias"], STATE["3.bias"])


@pytest.mark.parametrize(
    ("content", "routes"),
    [
        ({"state_dict": STATE, "state_dict_ema": OTHER}, ("state_dict", "state_dict_ema")),
        ({**below("student.", STATE), **below("teacher.", OTHER)}, ("student", "teacher")),
        ({**below("module.", STATE), **below("_orig_mod.", OTHER)}, ("module", "_orig_mod")),
    ],
)
def test_of_several_that_differ_one_has_to_be_named(content: Any, routes: tuple[str, str]) -> None:
    torch.save(content, "weights.pt")
    with pytest.raises(ModelError, match=f"several weights fit somebodys:plain, and differ; what fits: {', '.join(routes)}; --weights-key"):
        external_model("somebodys:plain", Path("weights.pt"))
    for route, state in zip(routes, (STATE, OTHER), strict=True):
        assert torch.equal(external_model("somebodys:plain", Path("weights.pt"), route).state_dict()["3.bias"], state["3.bias"])
    with pytest.raises(ModelError, match=f"nothing that fits .* is under --weights-key 'nix'; what fits: {routes[0]}"):
        external_model("somebodys:plain", Path("weights.pt"), "nix")


def test_names_that_are_there_wrapped_and_not_are_never_mixed() -> None:
    raw, other = ({name: torch.full_like(value, i) for name, value in FACTORIES["named"]().state_dict().items()} for i in (1.0, 2.0))
    both = {**raw, **below("module.", other)}
    save_file(both, "both.safetensors")
    torch.save(dict(sorted(both.items(), key=lambda entry: entry[0], reverse=True)), "both.pt")
    for file in (Path("both.safetensors"), Path("both.pt")):
        for key, expected in ((".", 1.0), ("", 1.0), ("module", 2.0)):
            found = external_model("somebodys:named", file, key).state_dict().values()
            assert {float(value.unique()) for value in found} == {expected}, (file, key)
        with pytest.raises(ModelError, match=r"and differ; what fits: .*\. \(the file itself\).*; --w"):
            external_model("somebodys:named", file)
    half = {**raw, "module.conv.weight": other["conv.weight"]}
    save_file(half, "half.safetensors")
    assert set(external_model("somebodys:named", Path("half.safetensors")).state_dict()["conv.weight"].unique().tolist()) == {1.0}
    save_file({name: value for name, value in half.items() if name != "norm.bias"} | {"module.norm.bias": other["norm.bias"]}, "bad.pt")
    with pytest.raises(ModelError, match="tensors are there twice, wrapped in two ways, and neither has all of them"):
        external_model("somebodys:named", Path("bad.pt"))


def test_a_state_dict_with_another_in_it_is_not_taken_without_a_word() -> None:
    torch.save({**STATE, "averaged": OTHER}, "weights.pt")
    with pytest.raises(ModelError, match=r"and differ; what fits: \. \(the file itself\), averaged; --weights-key"):
        external_model("somebodys:plain", Path("weights.pt"))
    for key, state in ((".", STATE), ("averaged", OTHER)):
        assert torch.equal(external_model("somebodys:plain", Path("weights.pt"), key).state_dict()["3.bias"], state["3.bias"])
    torch.save({"a": {"b": STATE}, "a.b": OTHER}, "weights.pt")
    with pytest.raises(ModelError, match=r"several weights under 'a\.b' fit somebodys:plain, and differ; save"):
        external_model("somebodys:plain", Path("weights.pt"), "a.b")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({**STATE, "fc2.weight": torch.ones(2)}, "does not fit somebodys:plain: unexpected: fc2.weight"),
        ({"net": {k: v for k, v in STATE.items() if "bias" not in k}}, r"\(under net\): Missing keys: 1.bias, 2.bias, 3.bias"),
        ({**STATE, "3.bias": torch.zeros(12)}, r"of another kind: 3.bias \(\(12,\) in the file, \(10,\) in the network\)"),
        ({k: (50 * v).to(torch.int8) for k, v in STATE.items()}, "1.bias .int8 in the file, float32 in the network"),
        (dict(enumerate(STATE.values())), "a state dict is needed, found dict of 0, 1, 2, 3 and 5 more"),
        (torch.zeros(3), "a state dict is needed, found Tensor"),
        ({"\x1b[31m" + "a" * 500: torch.zeros(2)}, r"unexpected: \\x1b\[31maaa"),
        (plain(), "holds pickled objects .torch.nn.modules"),
        (
            {"state_dict": STATE, "path": pathlib.PurePosixPath("x")},
            r"pickled objects \(pathlib.PurePosixPath\), which could run code or fill memory; save",
        ),
    ],
)
def test_what_does_not_fit_is_said_in_a_line(content: Any, message: str) -> None:
    torch.save(content, "weights.pt")
    with pytest.raises(ModelError, match=message) as raised:
        external_model("somebodys:plain", Path("weights.pt"))
    assert str(raised.value).isprintable()


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


def test_lists_of_the_same_list_are_walked_once() -> None:
    started = time.monotonic()
    for content, message in (
        ({"weights": STATE, "x": nested(list, 1000, 4)}, None),
        (nested(list, 1000, 4), "a state dict is needed, found list"),
        ([[{"1.weight": ONE}] * 1000] * 1000, "does not fit"),
    ):
        torch.save(content, "weights.pt")
        with pytest.raises(ModelError, match=message) if message else contextlib.nullcontext():
            external_model("somebodys:plain", Path("weights.pt"))
    assert time.monotonic() - started < 1


def test_a_long_list_of_records_is_not_read() -> None:
    torch.save(STATE, "good.pt")
    with zipfile.ZipFile("good.pt", "a") as archive:
        for i in range(2100):
            archive.writestr(f"good/{i:02000d}", b"")
    with pytest.raises(ModelError, match=r"good\.pt: the list of its members has more than 4,194,304 bytes"):
        external_model("somebodys:plain", Path("good.pt"))


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "empty": (lambda: Path("bad.pt").write_bytes(b""), "is empty"),
    "folder": (lambda: Path("bad.pt").mkdir(), "not a file"),
    "fifo": (lambda: os.mkfifo("bad.pt"), "not a file"),
    "endless": (lambda: Path("bad.pt").symlink_to("/dev/zero"), "not a file"),
    "web page": (lambda: Path("bad.pt").write_bytes(b"<html>gone</html>"), "not a file of weights"),
    "cut": (lambda: Path("bad.pt").write_bytes(Path("good.pt").read_bytes()[:-300]), "damaged or cut off"),
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


def test_a_function_that_fails_is_one_line(tmp_path: Path) -> None:
    Path("broken.py").write_text("import nothing_of_the_kind\n")
    Path("worse.py").write_text("raise ValueError('at import')\n")
    Path("moody.py").write_text("def __getattr__(name):\n    raise RuntimeError('not today')\n")
    for factory, message in (
        ("moody:net", "looking for net in moody raised RuntimeError: not today"),
        ("somebodys:no eval", r"own parameters\(\), .* or eval\(\) raised ValueError: no eval"),
        ("somebodys:no state", r"state_dict\(\), to\(\) or eval\(\) raised KeyError: 'no state'"),
        ("somebodys:other eval", "eval.. or state_dict.. returns something else than torch's do"),
        ("somebodys:raising", r"raising raised KeyError: 'no\\x1b\[31m such\\nsetting'"),
        ("somebodys:leaving", "leaving raised SystemExit: 2"),
        ("somebodys:lazy", "parameters without values"),
        ("broken:net", "No module named 'nothing_of_the_kind'; 'broken' needs it"),
        ("worse:net", "importing worse raised ValueError: at import"),
    ):
        with pytest.raises(ModelError, match=message) as raised:
            external_model(factory)
        assert str(raised.value).isprintable()


class InPlace(nn.Module):
    def __init__(self, change: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.network, self.change = plain(), change

    def forward(self, x: Tensor) -> Tensor:
        self.change(x)
        return self.network(x)


class Uncopied(nn.Module):
    """Holds what cannot be copied or pickled."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.generator = plain(), (i for i in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


def normed(wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Used once in train mode, so that old hooks keep a result of a pass."""
    model = plain()
    model[1] = wrap(model[1])
    model.train()(images())
    return model.eval()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "make",
    [
        lambda: normed(nn.utils.spectral_norm),
        lambda: normed(nn.utils.weight_norm),
        lambda: normed(nn.utils.parametrizations.spectral_norm),
        lambda: normed(nn.utils.parametrizations.weight_norm),
        lambda: nn.DataParallel(plain()),
        lambda: torch.jit.trace(plain(), images()),
        lambda: InPlace(lambda x: x.mul_(1.0)),
        Uncopied,
    ],
    ids=["spectral, hook", "weight, hook", "spectral", "weight", "parallel", "TorchScript", "in place", "not copied"],
)
def test_verdicts_are_those_of_the_plain_network(make: Callable[[], nn.Module]) -> None:
    """Also by two processes, of which some networks cannot be handed to any. The network is left as it was."""
    torch.manual_seed(0)
    model, x = make(), images(30)

    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return model(x.clone())

    with torch.no_grad():
        y = labelled(model, x.clone())
        before = model(x.clone())
    model.train()
    given = x.clone()
    asked = settings(0.012, 30, batch_size=10)
    quick = asked.protocols["quick"].model_copy(update={"attacks": {"apgd_ce": asked.protocols["quick"].attacks["apgd_ce"]}})
    asked = asked.model_copy(update={"protocols": {"standard": settings(0.012, 0).standard, "quick": quick}})
    found = robust.evaluate(model, given, y, "quick", asked, workers=2 if isinstance(model, Uncopied) else 1)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    model.eval()
    expected = robust.evaluate(Plain().eval(), x, y, "quick", asked)
    assert torch.equal(given, x)
    assert all(torch.equal(found.robust[name], expected.robust[name]) for name in expected.robust)
    assert 0 < int(found.robust_under(["pgd20", "apgd_ce"]).sum()) < 26
    with torch.no_grad():
        assert torch.equal(model(x.clone()), before)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (InPlace(lambda x: x.data.sub_(0.02)), r"changes the images it is given; let its forward begin with x = x.clone\(\)"),
        (InPlace(lambda x: x.sub_(0.5).div_(0.5)), "changes the images it is given"),
        (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()),
            r"failed on images of shape \(1, 1, 4, 4\), in \[0, 1\]: RuntimeError: Given groups=1",
        ),
        (nn.Sequential(nn.Flatten(), nn.Linear(16, 1)), "returned one logit; two classes need two"),
        (InPlace(lambda x: {}["setting"]), "failed on images of shape .*: KeyError: 'setting'"),
    ],
)
def test_networks_that_cannot_be_judged_are_refused_in_a_line(model: nn.Module, message: str) -> None:
    x = images()
    before = x.clone()
    with pytest.raises(AttackError, match=message) as raised:
        robust.evaluate(model.eval(), x, torch.zeros(len(x), dtype=torch.int64), "standard", settings(0.01, 0))
    assert str(raised.value).isprintable()
    assert torch.equal(x, before)


class Backward(torch.autograd.Function):
    """The identity, whose backward pass raises."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, error: BaseException) -> Tensor:
        ctx.error = error
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        raise ctx.error


class Wordless(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


class After(nn.Module):
    """A network with something on the way out, once it was called `late` times."""

    def __init__(self, change: Callable[[Tensor], Any], late: int = 0) -> None:
        super().__init__()
        self.network, self.change, self.late, self.calls = plain(), change, late, 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        logits = self.network(x)
        return self.change(logits) if self.calls > self.late else logits


@pytest.mark.parametrize("late", [0, 4, 30])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z: Backward.apply(z, ValueError("once\nonly")), "no gradient can be taken through the network: ValueError: once only"),
        (lambda z: Backward.apply(z, SystemExit(3)), "no gradient can be taken through the network: SystemExit: 3"),
        (lambda z: sys.exit(3), r"the network failed on images of shape \(\d+, 1, 4, 4\), in \[0, 1\]: SystemExit: 3"),
        (lambda z: z[: len(z) // 2], r"returned a tensor of shape \(\d+, 10\) for .*; logits of shape \(\d+, classes\) are needed"),
        (lambda z: z[:, : 10 - (len(z) > 1)], r"returned \d+ logits for each of .*, and \d+ before"),
        (lambda z: {"logits": z}, "returned dict for"),
        (lambda z: z[..., None, None], r"returned a tensor of shape \(\d+, 10, 1, 1\) for"),
        (lambda z: z.to(torch.complex64), r"returned a tensor of complex64 of shape \(\d+, 10\)"),
        (lambda z: z.round().long(), r"returned a tensor of int64 of shape \(\d+, 10\)"),
        (lambda z: refusing(Wordless())(), r"the network failed on images of shape \(\d+, 1, 4, 4\), in \[0, 1\]: Wordless$"),
        (lambda z: z.detach(), "passes no gradient on to its input"),
    ],
)
def test_whatever_a_network_does_whenever_is_one_line(change: Callable[[Tensor], Any], message: str, late: int) -> None:
    """At the first call, or in the midst of an attack."""
    x = images(30)
    asked = settings(0.012, 0, batch_size=16)
    with pytest.raises(AttackError, match=message) as raised:
        robust.evaluate(After(change, late).eval(), x, plain()(x).argmax(1), "standard", asked)
    assert str(raised.value).isprintable()


def test_a_key_stops_also_a_network() -> None:
    x = images()
    for change in (lambda z: refusing(KeyboardInterrupt())(), lambda z: Backward.apply(z, KeyboardInterrupt())):
        with pytest.raises(KeyboardInterrupt):
            robust.evaluate(After(change).eval(), x, torch.zeros(len(x), dtype=torch.int64), "standard", settings(0.01, 0))


@pytest.mark.parametrize("change", [Tensor.bfloat16, Tensor.half, Tensor.double, lambda z: z.as_subclass(type("Kind", (Tensor,), {}))])
def test_logits_of_another_kind_are_as_good(change: Callable[[Tensor], Tensor]) -> None:
    """As those that are rounded alike and then made fp32."""
    x = images(30)
    y = plain()(x).argmax(1)
    asked = settings(0.012, 0)
    both = (change, lambda z: change(z).as_subclass(Tensor).float())
    found, expected = (robust.evaluate(After(f).eval(), x, y, "standard", asked) for f in both)
    assert torch.equal(found.prediction, expected.prediction)
    assert torch.equal(found.robust["pgd20"], expected.robust["pgd20"])
    assert 0 < int(found.robust_under(["pgd20"]).sum()) < 30


def test_a_network_that_sets_the_seed_of_attacks_is_refused() -> None:
    """Square would draw the same squares at every step. One that puts the generator back is fine."""
    x = images()
    y = plain()(x).argmax(1)

    def seeded(z: Tensor) -> Tensor:
        torch.manual_seed(0)
        return z

    def own(z: Tensor) -> Tensor:
        with torch.random.fork_rng():
            return seeded(z)

    before = torch.get_rng_state()
    with pytest.raises(AttackError, match="sets torch's random seed"):
        robust.evaluate(After(seeded).eval(), x, y, "standard", settings(0.01, 0))
    robust.evaluate(After(own).eval(), x, y, "standard", settings(0.01, 0))
    assert torch.equal(torch.get_rng_state(), before)


def test_no_logits_are_refused() -> None:
    with pytest.raises(AttackError, match="the network returned no logits; two classes need two"):
        robust.evaluate(After(lambda z: z[:, :0]).eval(), images(), torch.zeros(24, dtype=torch.int64), "standard", settings(0.01, 0))


def test_images_are_shown_once_before_an_attack() -> None:
    """One pass under each protocol; what changes its images is refused in it, before any attack."""
    x, seen = images(40), []

    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = Linear()

        def forward(self, x: Tensor) -> Tensor:
            if not x.requires_grad:
                seen.append(len(x))
            return self.network(x)

    one = {"eps": 0.01, "n": 0, "pgd": {"step_size": 0.01}}
    asked = AttackSettings.model_validate({"protocols": {"standard": one, "released": one}, "batch_size": 40})
    y = (Linear()(x).argmax(1) + 1) % 10  # nothing stands, nothing is attacked
    audit(Counted().eval(), x, y, asked, with_checks=False)
    assert sum(n for n in seen if n == 40) == 2 * 40


def test_labels_counted_from_one_are_told() -> None:
    y = torch.arange(24) % 10 + 1
    with pytest.raises(AttackError, match=r"labels go up to 10, but the network has 10 classes; they seem to start at 1"):
        robust.evaluate(Linear().eval(), images(), y, "standard", settings(0.01, 0))
