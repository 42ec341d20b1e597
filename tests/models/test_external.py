"""External networks and state dicts, however they are wrapped."""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.optim.swa_utils import AveragedModel

from ebjdat.models.external import external_model
from ebjdat.models.weights import ModelError

from ..networks import images, plain
from .somebodys import FACTORIES, OTHER, STATE, below

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
    assert "identical ones are under state_dict_ema" in _told(FILES["the same twice"][0], capsys)


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
    differ = f"several weights fit somebodys:plain, and differ; what fits: {', '.join(routes)}; choose with --weights-key"
    with pytest.raises(ModelError, match=differ):
        external_model("somebodys:plain", Path("weights.pt"))
    for route, state in zip(routes, (STATE, OTHER), strict=True):
        assert torch.equal(external_model("somebodys:plain", Path("weights.pt"), route).state_dict()["3.bias"], state["3.bias"])
    with pytest.raises(ModelError, match=f"nothing under --weights-key 'nix' fits .*; what fits: {routes[0]}"):
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
        with pytest.raises(ModelError, match=r"and differ; what fits: .*\. \(the file itself\).*; choose with --w"):
            external_model("somebodys:named", file)
    half = {**raw, "module.conv.weight": other["conv.weight"]}
    save_file(half, "half.safetensors")
    assert set(external_model("somebodys:named", Path("half.safetensors")).state_dict()["conv.weight"].unique().tolist()) == {1.0}
    save_file({name: value for name, value in half.items() if name != "norm.bias"} | {"module.norm.bias": other["norm.bias"]}, "bad.pt")
    with pytest.raises(ModelError, match="tensors occur twice, wrapped in two ways, and neither has all of them"):
        external_model("somebodys:named", Path("bad.pt"))


def test_a_state_dict_with_another_in_it_is_not_taken_without_a_word() -> None:
    torch.save({**STATE, "averaged": OTHER}, "weights.pt")
    with pytest.raises(ModelError, match=r"and differ; what fits: \. \(the file itself\), averaged; choose with --weights-key"):
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


def nested(kind: type, width: int, deep: int) -> Any:
    """Lists or tuples that hold the same one many times: a short pickle."""
    inner: Any = kind()
    for _ in range(deep):
        inner = kind([inner] * width)
    return inner


ONE, dense = torch.zeros(1), torch._utils._rebuild_device_tensor_from_cpu_tensor


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


def test_a_function_that_fails_is_one_line(tmp_path: Path) -> None:
    Path("broken.py").write_text("import nothing_of_the_kind\n")
    Path("worse.py").write_text("raise ValueError('at import')\n")
    Path("moody.py").write_text("def __getattr__(name):\n    raise RuntimeError('not today')\n")
    for factory, message in (
        ("moody:net", "looking for net in moody raised RuntimeError: not today"),
        ("somebodys:no eval", r"own parameters\(\), .* or eval\(\) raised ValueError: no eval"),
        ("somebodys:no state", r"state_dict\(\), to\(\) or eval\(\) raised KeyError: 'no state'"),
        ("somebodys:other eval", "eval.. or state_dict.. returns something other than torch's"),
        ("somebodys:raising", r"raising raised KeyError: 'no\\x1b\[31m such\\nsetting'"),
        ("somebodys:leaving", "leaving raised SystemExit: 2"),
        ("somebodys:lazy", "parameters without values"),
        ("broken:net", "No module named 'nothing_of_the_kind'; 'broken' needs it"),
        ("worse:net", "importing worse raised ValueError: at import"),
    ):
        with pytest.raises(ModelError, match=message) as raised:
            external_model(factory)
        assert str(raised.value).isprintable()
