"""Files of a training's state: damaged ones, and full disks."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from ebjdat.files import write_atomic
from ebjdat.training import state
from ebjdat.training.state import TrainingError

CPU = torch.device("cpu")


def test_one_flipped_bit_is_refused(tmp_path: Path) -> None:
    """torch.load alone takes it: training would continue with another weight."""
    file, weights = tmp_path / "step.pt", torch.arange(1000.0)
    torch.save({"model": weights}, file)
    whole = file.read_bytes()
    at = whole.index(weights.numpy().tobytes()[:64])
    assert torch.equal(state._read(file, CPU)["model"], weights)  # type: ignore[index]
    for place in (at, at + 1999, at + 3999):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert not torch.equal(torch.load(file, weights_only=True)["model"], weights)
        with pytest.raises(TrainingError, match=r"step\.pt: damaged training state .*delete it to start again"):
            state._read(file, CPU)


def test_a_full_disk_is_named() -> None:
    """torch.save alone raises a RuntimeError about positions in a file."""
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'") as raised:
        state._write({"model": torch.arange(100_000.0)}, Path("/dev/full"))
    assert raised.value.errno == errno.ENOSPC


def test_a_full_disk_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    target.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_atomic(target, fail)
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]
