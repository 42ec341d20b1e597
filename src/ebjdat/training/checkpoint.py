"""Checkpoints: one safetensors file with weights, the replay buffer, and in its header everything that explains them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ebjdat import __version__
from ebjdat.errors import UserError
from ebjdat.files import write_atomic
from ebjdat.models.wrn import WideResNet
from ebjdat.params import ModelSettings, TrainingSettings

HEADER = "ebjdat"


class CheckpointError(UserError):
    """The checkpoint cannot be used here; says what differs."""


@dataclass(frozen=True)
class Header:
    """What made a checkpoint, and what it is for."""

    title: str
    method: str
    seed: int
    model: ModelSettings
    training: TrainingSettings
    image_shape: tuple[int, int, int]
    classes: tuple[str, ...]
    data_hash: str
    git_commit: str
    metrics: dict[str, float]
    events: tuple[str, ...] = ()  # divergences, and what was changed in `training` after them
    version: str = __version__

    def dump(self) -> str:
        plain = vars(self) | {"model": self.model.model_dump(), "training": self.training.model_dump()}
        return json.dumps(plain, sort_keys=True)

    @classmethod
    def parse(cls, text: str) -> Header:
        plain: dict[str, Any] = json.loads(text)
        return cls(
            **plain
            | {
                "model": ModelSettings.model_validate(plain["model"]),
                "training": TrainingSettings.model_validate(plain["training"]),
                "image_shape": tuple(plain["image_shape"]),
                "classes": tuple(plain["classes"]),
                "events": tuple(plain["events"]),
            }
        )


@dataclass(frozen=True)
class Checkpoint:
    """buffer: uint8 (N, C, H, W) and the class each chain started from (N,), for methods with chains.

    ema: averaged weights of the same epoch, where training kept them.
    """

    header: Header
    weights: dict[str, Tensor]
    buffer: Tensor | None
    buffer_labels: Tensor | None
    ema: dict[str, Tensor] | None = None

    def network(self, device: torch.device, weights: dict[str, Tensor] | None = None) -> WideResNet:
        """The network with the checkpoint's weights (or these, e.g. `ema`), in eval mode."""
        channels = self.header.image_shape[0]
        model = WideResNet(self.header.model, channels, len(self.header.classes))
        model.load_state_dict(weights or self.weights)
        return model.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]


def save(checkpoint: Checkpoint, path: Path) -> None:
    tensors = {f"model.{name}": value.contiguous() for name, value in checkpoint.weights.items()}
    tensors |= {f"ema.{name}": value.contiguous() for name, value in (checkpoint.ema or {}).items()}
    if checkpoint.buffer is not None and checkpoint.buffer_labels is not None:
        tensors |= {"buffer.images": checkpoint.buffer.contiguous(), "buffer.labels": checkpoint.buffer_labels.contiguous()}
    write_atomic(path, lambda temporary: save_file(tensors, temporary, {HEADER: checkpoint.header.dump()}))


def load(path: Path, *, data_hash: str | None = None, model: ModelSettings | None = None) -> Checkpoint:
    """Read a checkpoint; with data_hash or model, refuse one that was made from other data or for another network.

    Raises CheckpointError for a missing, truncated or foreign file, and for one that does not fit, saying what differs.
    """
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(HEADER)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: there is no such checkpoint; run the stage that makes it first") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error}); delete it and run its stage again") from error
    if text is None:
        raise CheckpointError(f"{path}: a safetensors file, but not a checkpoint of this package (no {HEADER!r} header)")
    try:
        header = Header.parse(text)
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: its header cannot be read by version {__version__}: {error}") from error
    if data_hash is not None and header.data_hash != data_hash:
        raise CheckpointError(f"{path}: was trained on data {header.data_hash}, this is data {data_hash}; train again")
    if model is not None and header.model != model:
        theirs, ours = header.model.model_dump(), model.model_dump()
        differs = ", ".join(f"{k} {theirs[k]} (settings: {ours[k]})" for k in ours if theirs[k] != ours[k])
        raise CheckpointError(f"{path}: holds another network: {differs}; train again")
    weights, ema = (
        {name.removeprefix(part): value for name, value in tensors.items() if name.startswith(part)} for part in ("model.", "ema.")
    )
    channels, classes = header.image_shape[0], len(header.classes)
    expected = {k: tuple(v.shape) for k, v in WideResNet(header.model, channels, classes).state_dict().items()}
    for found in ({k: tuple(v.shape) for k, v in part.items()} for part in ([weights, ema] if ema else [weights])):
        if expected != found:
            wrong = sorted(k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k))
            raise CheckpointError(f"{path}: tensors do not fit its own header: {', '.join(wrong[:5])}")
    return Checkpoint(header, weights, tensors.get("buffer.images"), tensors.get("buffer.labels"), ema or None)
