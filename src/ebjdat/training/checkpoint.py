"""Checkpoints: one safetensors file with weights, the replay buffer, and in its header everything that explains them.

The header also holds a digest of each tensor and of itself, so every load notices a file that changed since it was written.
That guards against accidents and hand edits, not against somebody who recomputes the digests.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import PositiveInt, TypeAdapter, ValidationError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ebjdat import __version__
from ebjdat.data.prepared import Prepared
from ebjdat.errors import UserError, brief, few
from ebjdat.files import parse_json, write_atomic
from ebjdat.models.wrn import WideResNet
from ebjdat.settings import ModelSettings, Profile, TrainingSettings

HEADER = "ebjdat"
FORMAT = 2  # 1 had no digests
REMEDY = "if a stage made it, delete it and rerun that stage"
LARGEST_HEADER = 32 * 2**20  # bytes; that of 200,000 classes has 10 MB
TENSORS, DIGEST = "tensors", "digest"  # keys beside the header's own


class CheckpointError(UserError):
    """The checkpoint cannot be used here; says why and what to do."""


@dataclass(frozen=True)
class Header:
    """What made a checkpoint, and what it is for."""

    title: str
    run: str  # name of results: the profile, and what it is overridden by
    method: str
    seed: int
    model: ModelSettings
    training: TrainingSettings
    image_shape: tuple[PositiveInt, PositiveInt, PositiveInt]
    classes: tuple[str, ...]
    data_hash: str
    params_hash: str  # of the experiment and seed, when it was trained
    git_commit: str
    metrics: dict[str, int | float]
    code: str = ""  # digest of what the training could execute; "" where unknown
    events: tuple[str, ...] = ()  # divergences, and what was changed in `training` after them
    version: str = __version__
    format: int = FORMAT

    def plain(self) -> dict[str, Any]:
        return vars(self) | {"model": self.model.model_dump(), "training": self.training.model_dump()}

    @classmethod
    def parse(cls, plain: Mapping[str, Any]) -> Header:
        """Raises ValueError that names what is missing, of the wrong type, or not allowed."""
        try:
            return TypeAdapter(cls).validate_python(plain)
        except ValidationError as error:
            wrong = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors(include_url=False, include_input=False)]
            raise ValueError(few(wrong)) from None


@dataclass(frozen=True)
class Checkpoint:
    """Weights and what explains them.

    buffer, buffer_labels: uint8 (N, C, H, W) and the class each chain started from (N,), for methods with chains.
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


def content(value: Tensor) -> NDArray[np.uint8]:
    """A tensor's bytes, row by row."""
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def tensor_digest(value: Tensor) -> str:
    """sha256 of "dtype (shape) " and the bytes, e.g. "float32 (10, 16) ..."; a scalar's shape is "()"."""
    total = hashlib.sha256(f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)} ".encode())
    total.update(content(value).data)
    return total.hexdigest()


def header_digest(plain: Mapping[str, Any]) -> str:
    """sha256 of the header as JSON with sorted keys, without its own digest."""
    rest = {name: value for name, value in plain.items() if name != DIGEST}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def save(checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint; the same content gives the same bytes."""
    tensors = {f"model.{name}": value.contiguous() for name, value in checkpoint.weights.items()}
    tensors |= {f"ema.{name}": value.contiguous() for name, value in (checkpoint.ema or {}).items()}
    if checkpoint.buffer is not None and checkpoint.buffer_labels is not None:
        tensors |= {"buffer.images": checkpoint.buffer.contiguous(), "buffer.labels": checkpoint.buffer_labels.contiguous()}
    plain = checkpoint.header.plain() | {TENSORS: {name: tensor_digest(value) for name, value in tensors.items()}}
    plain[DIGEST] = header_digest(plain)
    # one entry: safetensors writes several in no fixed order, and the same training would give other bytes
    write_atomic(path, lambda temporary: save_file(tensors, temporary, {HEADER: json.dumps(plain, sort_keys=True)}))


def load(
    path: Path | str,
    *,
    data_hash: str | None = None,
    model: ModelSettings | None = None,
    method: str | None = None,
    image_shape: Sequence[int] | None = None,
    classes: Sequence[str] | None = None,
) -> Checkpoint:
    """Read a checkpoint and verify its digests; with any of the arguments, refuse one that was made for something else.

    Raises CheckpointError for a missing, truncated, changed or foreign file, and for one that does not fit, saying what
    differs and what to do.
    """
    plain, tensors = _read(path)
    if problems := _problems(plain, tensors):
        raise CheckpointError(
            f"{path}: changed since it was written: {'; '.join(problems)}; do not trust it, delete it and rerun its stage"
        )
    try:
        header = Header.parse({name: value for name, value in plain.items() if name not in (TENSORS, DIGEST)})
    except ValueError as error:
        written = f"written by version {brief(plain.get('version'), 40)}"
        raise CheckpointError(f"{path}: version {__version__} cannot read its header ({written}): {error}; rerun its stage") from error
    expected = {"method": method, "image_shape": image_shape, "classes": classes, "data_hash": data_hash, "model": model}
    checked = [_difference(name, getattr(header, name), value) for name, value in expected.items() if value is not None]
    if differences := list(filter(None, checked)):
        raise CheckpointError(
            f"{path}: {'; '.join(differences)}; train again, or give the checkpoint that belongs to these settings and data"
        )
    weights, ema = (
        {name.removeprefix(part): value for name, value in tensors.items() if name.startswith(part)} for part in ("model.", "ema.")
    )
    network = _layout_of(header, len(weights))
    for layout in map(_layout, [weights, ema] if ema else [weights]):
        if layout != network:
            unfit = sorted(k for k in network.keys() | layout.keys() if network.get(k) != layout.get(k))
            raise CheckpointError(f"{path}: tensors do not fit its own header: {few(unfit)}; rerun its stage")
    buffer, labels = tensors.get("buffer.images"), tensors.get("buffer.labels")
    if not _is_buffer(buffer, labels, header):
        raise CheckpointError(f"{path}: its replay buffer does not fit its own header; rerun its stage")
    return Checkpoint(header, weights, buffer, labels, ema or None)


def load_for(profile: Profile, experiment: str, path: Path, data: Prepared) -> Checkpoint:
    """The checkpoint of a profile's experiment on these data. Raises CheckpointError for one of another method, network or data."""
    entry = profile.experiments[experiment]
    network, shape = profile.model_settings(entry.pretraining), data.image_shape
    return load(path, data_hash=data.data_hash, model=network, method=entry.method, image_shape=shape, classes=data.classes)


def inspect(path: Path) -> dict[str, Any]:
    """A checkpoint's header, also of another format, with "problems": what changed since it was written.

    Its "tensors" are name -> {"dtype", "shape", "sha256"}. Raises CheckpointError where there is no readable header.
    """
    plain, tensors = _read(path, any_format=True)
    known = plain[TENSORS] if isinstance(plain.get(TENSORS), dict) else {}
    listed = {
        name: {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape), "sha256": known.get(name)}
        for name, value in tensors.items()
    }
    problems = _problems(plain, tensors) if plain.get("format") == FORMAT else [_other_format(plain)]
    return {**plain, TENSORS: listed, "problems": problems}


def _layout(weights: Mapping[str, Tensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(value.shape), value.dtype) for name, value in weights.items()}


def _layout_of(header: Header, most: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and types of the header's network, without allocating it; empty where it has more layers than there are tensors."""
    if header.model.depth > 6 * most + 4:
        return {}
    try:
        with torch.device("meta"):
            return _layout(WideResNet(header.model, header.image_shape[0], len(header.classes)).state_dict())
    except (RuntimeError, OverflowError, TypeError):  # wider than torch can count
        return {}


def _is_buffer(images: Tensor | None, labels: Tensor | None, header: Header) -> bool:
    """Whether there is no replay buffer, or one with the header's image shape and classes."""
    if images is None or labels is None:
        return images is labels
    return (
        (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
        and tuple(images.shape) == (len(labels), *header.image_shape)
        and labels.ndim == 1
        and (not len(labels) or (int(labels.min()) >= 0 and int(labels.max()) < len(header.classes)))
    )


def _read(path: Path | str, any_format: bool = False) -> tuple[dict[str, Any], dict[str, Tensor]]:
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint; run the stage that makes it first")
    if not path.is_file():
        raise CheckpointError(f"{path}: not a regular file; give a checkpoint")
    try:
        _check_header_length(path)
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(HEADER)
            tensors = {name: file.get_tensor(name) for name in file.keys()} if text is not None else {}  # noqa: SIM118 (not a mapping)
    except CheckpointError:
        raise
    except Exception as error:  # SafetensorError, OSError, or torch's own at a type that it does not have
        raise CheckpointError(f"{path}: not a whole safetensors file ({brief(error, 200)}); {REMEDY}") from error
    if text is None:
        raise CheckpointError(f"{path}: a safetensors file, but not a checkpoint of this package (no {HEADER!r} header)")
    try:
        plain = parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"{path}: its header is not JSON ({brief(error, 200)}); {REMEDY}") from error
    if not isinstance(plain, dict):
        raise CheckpointError(f"{path}: its header is not a JSON object; {REMEDY}")
    if plain.get("format") != FORMAT and not any_format:
        raise CheckpointError(f"{path}: {_other_format(plain)}")
    return plain, tensors


def _check_header_length(path: Path) -> None:
    """Refuse an impossible length, which is in the first 8 bytes of the file, before anything else is read."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
    size = path.stat().st_size
    if length > size - 8:
        raise CheckpointError(f"{path}: not a whole safetensors file (a header of {length:,} bytes in a file of {size:,}); {REMEDY}")
    if length > LARGEST_HEADER:
        raise CheckpointError(f"{path}: a header of {length:,} bytes; at most {LARGEST_HEADER:,} are allowed")


def _other_format(plain: Mapping[str, Any]) -> str:
    what = "has no digests, so changes go unnoticed" if "format" not in plain else "is of another version"
    return (
        f"checkpoint format {brief(plain.get('format', 1), 40)} {what}; version {__version__} reads format {FORMAT} (written by version "
        f"{brief(plain.get('version', 'unknown'), 40)}, commit {brief(plain.get('git_commit', 'unknown'), 40)}): rerun its stage"
    )


def _problems(plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[str]:
    """How header and tensors differ from what was written, in words; empty when they do not."""
    problems = []
    written = plain.get(TENSORS)
    if plain.get(DIGEST) != header_digest(plain) or not isinstance(written, dict):
        problems.append("the header was changed (its digest does not fit)")
    written = written if isinstance(written, dict) else {}
    unlike = {
        "changed": [name for name in tensors.keys() & written.keys() if tensor_digest(tensors[name]) != written[name]],
        "missing": written.keys() - tensors.keys(),
        "added": tensors.keys() - written.keys(),
    }
    return problems + [f"tensors {how}: {few(sorted(names))}" for how, names in unlike.items() if names]


def _difference(name: str, actual: Any, expected: Any) -> str:
    """How a field of the header differs from what is expected, in words; "" where it does not."""
    if isinstance(actual, tuple):
        expected = tuple(expected)
    if actual == expected:
        return ""
    if name == "model":
        own, wanted = actual.model_dump(), expected.model_dump()
        return f"holds another network: {', '.join(f'{k} {own[k]} (settings: {wanted[k]})' for k in wanted if own[k] != wanted[k])}"
    if name == "classes" and len(actual) == len(expected):
        renamed = [f"{a!r} (expected: {b!r})" for a, b in zip(actual, expected, strict=True) if a != b]
        return f"has other classes: {few(renamed)}"
    texts = {
        "data_hash": f"was trained on data {actual}, this is data {expected}",
        "classes": f"has {len(actual)} classes, expected {len(expected)}",
        "image_shape": f"takes images of shape {actual}, expected {expected} (channels, height, width)",
        "method": f"method {actual!r}, not {expected!r}",
    }
    return texts[name]
