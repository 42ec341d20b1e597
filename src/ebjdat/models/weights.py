"""Reading files of weights from elsewhere: safetensors, or torch.save with tensors, numbers and text alone.

A file is never executed: torch reads it with weights_only, and only after its records and its pickle were checked, so that
neither code in it nor a size that it claims does any harm.
"""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ebjdat.errors import DataError, UserError, brief, few, in_a_line
from ebjdat.files import ZipSource

MOST_HEADER = 4 * 2**20  # bytes of a file that describe its tensors; a network with 1,000 of them takes 0.2 MB
MOST_WORK, PART = MOST_HEADER, 8  # characters that a pickle copies or hashes, and for how many of them a part of a tuple counts
MOST_OLD = 2**29  # bytes of a file in torch's format before 1.6, which has to be read as a whole
OLD_PICKLES = 5  # in torch's format before 1.6: a magic number, a version, the machine's sizes, the content, names of records
LEAST_ROOM, ROOM = 2**30, 16  # bytes of tensors that a file may hold: so many and so many times the network's own


class ModelError(UserError):
    """An external network or its file of weights cannot be used; says what is wrong."""


class NotRead:
    """Placeholder for objects in a checkpoint that are no weights and are known to be harmless: they are not built."""

    def __init__(self, *args: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


HARMLESS = (
    *(f"{package}.multiarray.{name}" for package in ("numpy.core", "numpy._core") for name in ("scalar", "_reconstruct")),
    *("numpy.dtype", "numpy.ndarray", "argparse.Namespace"),
)
MADE = object()  # what a call in a pickle returns
TENSORS = (  # what makes tensors of a file's own bytes
    *(f"torch._utils._rebuild_{name}" for name in ("tensor", "tensor_v2", "tensor_v3", "parameter", "parameter_with_state")),
    "torch.nn.parameter.Parameter",
)
# What a pickle may call, and with what. Whatever else it names is refused: weights_only allows calls that take any amount of
# memory or time for a number (bytearray, torch.Tensor), for a view that repeats one (set of a tensor), or in a chain (encode).
CALLS: dict[str, Callable[[tuple[Any, ...]], bool]] = {
    "collections.OrderedDict": lambda given: given == () or (len(given) == 1 and _are_pairs(given[0])),  # with pairs: Python 2
    "__builtin__.set": lambda given: all(isinstance(part, list) and not any(isinstance(p, tuple) for p in part) for part in given),
    "collections.Counter": lambda given: all(isinstance(part, _Entries) for part in given),
    "torch.Size": lambda given: all(isinstance(part, tuple) for part in given),
    "_codecs.encode": lambda given: len(given) == 2 and isinstance(given[0], str) and given[1] == "latin1",
    **dict.fromkeys(("torch.device", "__builtin__.complex"), lambda given: MADE not in given),
    "torch._tensor._rebuild_from_type_v2": lambda given: given[:1] != () and given[0] in TENSORS,
    **dict.fromkeys((*TENSORS, *HARMLESS), lambda given: True),
}


def read_weights(path: Path, room: int) -> Any:
    """What a file of weights holds: safetensors, or a file of torch.save with tensors, numbers and text alone, on the CPU.

    room: bytes of the network's own tensors, which say how large a file is read. Raises ModelError for anything else.
    """
    if not path.is_file():
        raise ModelError(f"{path}: {'not a file' if path.exists() else 'there is no such file'}")
    size = path.stat().st_size
    if not size:
        raise ModelError(f"{path}: is empty")
    try:
        with path.open("rb") as file:
            start = file.read(9)
        if size > (most := LEAST_ROOM + ROOM * room):
            raise ModelError(
                f"{path}: has {size:,} bytes; for a network of {room:,} at most {most:,} are read; save model.state_dict() alone"
            )
        if start[:4] == b"PK\x03\x04":
            return _read_zip(path)
        if start[8:] == b"{" or path.suffix == ".safetensors":
            return _read_safetensors(path, start)
        return _read_old(path, size)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({in_a_line(error)})") from error


def _read_safetensors(path: Path, start: bytes) -> dict[str, Tensor]:
    if int.from_bytes(start[:8], "little") > MOST_HEADER:
        raise ModelError(f"{path}: not a file of weights (its header claims {int.from_bytes(start[:8], 'little'):,} bytes)")
    try:
        return load_file(path)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, json.JSONDecodeError) as error:
        raise ModelError(f"{path}: not a file of weights ({in_a_line(error)})") from error


def _read_zip(path: Path) -> Any:
    """A file of torch.save: a zip of records as they are in memory, and a pickle that describes them."""
    try:
        with ZipSource(path, MOST_HEADER) as source, zipfile.ZipFile(source) as archive:
            records = archive.infolist()
            names = [record.filename for record in records]
            if any(name.endswith("/constants.pkl") for name in names):
                raise ModelError(f"{path}: a TorchScript program, not weights; let the function of --model return torch.jit.load(...)")
            if not any(name.endswith("data.pkl") for name in names):
                raise ModelError(f"{path}: not a file of weights (a zip without data.pkl)")
            for record in records:
                if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size or record.flag_bits & 1:
                    raise ModelError(
                        f"{path}: the record {brief(record.filename, 80)!r} is compressed, which torch.save never does; it was not read"
                    )
            if len(set(names)) < len(names) or sum(record.file_size for record in records) > path.stat().st_size:
                raise ModelError(f"{path}: its records overlap; it was not read")
            described = sum(record.file_size for record in records if "/data/" not in record.filename)
            if described > MOST_HEADER:
                raise ModelError(
                    f"{path}: {described:,} bytes describe its tensors, at most {MOST_HEADER:,} are read; save model.state_dict() alone"
                )
            for record in records:  # torch does not compare checksums
                with archive.open(record) as file:
                    while file.read(2**20):
                        pass
                if record.filename.lower().endswith("data.pkl"):  # torch finds it by any case
                    _examine(path, io.BytesIO(archive.read(record)))
    except DataError as error:
        raise ModelError(str(error)) from error
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, RuntimeError, OverflowError) as error:
        raise ModelError(f"{path}: damaged or truncated ({in_a_line(error)})") from error
    return _unpickled(path, mmap=True)


def _read_old(path: Path, size: int) -> Any:
    if size > MOST_OLD:
        raise ModelError(
            f"{path}: has {size:,} bytes in torch's old format; at most {MOST_OLD:,} are read; save it again with torch 1.6 or newer"
        )
    with path.open("rb") as file:
        start = io.BytesIO(file.read(MOST_HEADER))
    for _ in range(OLD_PICKLES):
        _examine(path, start)
    return _unpickled(path, mmap=False)


@dataclass
class _Entries:
    """A mapping in a pickle, by its size."""

    n: int = 0


class _Name(str):
    """A global that a pickle names, as it is written there."""


def _examine(path: Path, file: io.BytesIO) -> None:
    """Follow the next pickle of a file without building anything.

    Raises ModelError where it names or calls what is not in CALLS, and where it repeats itself so often that it would take
    more memory or time than its length suggests. What torch does not read at all is left to torch.
    """
    machine, work = _Machine(), 0
    try:
        for instruction, value, _ in pickletools.genops(file):
            if instruction.proto > 2:
                return
            work += _length(machine.step(instruction, value))
            if work > MOST_WORK:
                raise ModelError(f"{path}: its pickle repeats itself without end; it was not read")
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, UnicodeError) as error:
        raise ModelError(f"{path}: not a file of weights ({in_a_line(error)})") from error
    if machine.refused:
        raise ModelError(
            f"{path}: holds pickled objects ({few(sorted(machine.refused))}), which could run code or fill memory; "
            "save model.state_dict() alone"
        )


class _Machine:
    """Pickle's stack machine over placeholders. refused: names that may not be read."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.refused: set[str] = set()

    def step(self, instruction: pickletools.OpcodeInfo, value: Any) -> Any:
        """Execute one instruction; returns what it would copy or hash as a whole."""
        name = instruction.name
        if name == "MARK":
            self.marks.append(self.stack)
            self.stack = []
        elif name in ("TUPLE", "APPENDS", "SETITEMS"):
            items, self.stack = self.stack, self.marks.pop()
            if name == "TUPLE":
                self.stack.append(tuple(items))
            elif name == "APPENDS":
                self.stack[-1] += items  # to a list alone, as in torch
            else:
                self.stack[-1].n += len(items) // 2
                return tuple(key for key in items[::2] if isinstance(key, tuple))
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[value] = self.stack[-1]
        else:
            operands = [self.stack.pop() for _ in instruction.stack_before][::-1]
            result, used = OPERATIONS[name](self, value, operands) if name in OPERATIONS else (value, ())
            self.stack += [result] if instruction.stack_after else []
            return used
        return ()

    def name(self, value: str, operands: list[Any]) -> tuple[Any, Any]:
        name = _Name(value.replace(" ", "."))
        self.refused |= set() if _is_read(name) else {name}
        return name, ()

    def call(self, value: None, operands: list[Any]) -> tuple[Any, Any]:
        called, given = operands
        if not (called in CALLS and isinstance(given, tuple) and CALLS[called](given)):
            self.refused.add(called if isinstance(called, _Name) else "calls of what it does not name")
        return _Entries() if called in ("collections.OrderedDict", "collections.Counter") else MADE, given

    def append(self, value: None, operands: list[Any]) -> tuple[Any, Any]:
        operands[0].append(operands[1])
        return operands[0], ()

    def set_item(self, value: None, operands: list[Any]) -> tuple[Any, Any]:
        mapping, key, _ = operands
        mapping.n += 1
        return mapping, key if isinstance(key, tuple) else ()


# Instruction -> (result, what it uses as a whole); of all others the result is their own value.
OPERATIONS: Mapping[str, Callable[[_Machine, Any, list[Any]], tuple[Any, Any]]] = {
    "GLOBAL": _Machine.name,
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda machine, value, _: (machine.memo[value], ())),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), _Machine.call),
    "EMPTY_DICT": lambda *_: (_Entries(), ()),
    "EMPTY_LIST": lambda *_: ([], ()),
    **dict.fromkeys(("EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"), lambda _, value, operands: (tuple(operands), ())),
    "APPEND": _Machine.append,
    "SETITEM": _Machine.set_item,
    "BUILD": lambda _, value, operands: tuple(operands),
    "BINPERSID": lambda *_: (MADE, ()),
}


def _are_pairs(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) for pair in value)


def _is_read(name: str) -> bool:
    """Whether a pickle may name this: what it may call, and and what denotes a kind of tensor."""
    module, _, last = name.rpartition(".")
    is_kind = module in ("torch", "torch.storage", "torch.cuda") and last.endswith("Storage")
    return name in CALLS or is_kind or name == "torch.Tensor" or (module == "torch" and isinstance(getattr(torch, last, None), torch.dtype))


def _length(value: Any) -> int:
    """Work to copy or hash a value, with tuples in tuples however often they are shared; counted to MOST_WORK."""
    waiting, n = [value], 0
    while waiting and n <= MOST_WORK:
        part = waiting.pop()
        waiting += part if isinstance(part, tuple) else ()
        n += PART * len(part) if isinstance(part, tuple | list) else len(part) if isinstance(part, str) else 0
        n += PART * part.n if isinstance(part, _Entries) else 0
    return n


def _unpickled(path: Path, mmap: bool) -> Any:
    try:
        with torch.serialization.safe_globals([(NotRead, name) for name in HARMLESS]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        named = _pickled_objects(path)
        if not named:
            raise ModelError(
                f"{path}: not a file of weights, or one with more in it than tensors; save model.state_dict() alone"
            ) from error
        raise ModelError(f"{path}: holds pickled objects ({few(named)}), which could run code; save model.state_dict() alone") from error
    except Exception as error:  # a damaged pickle can fail in any way
        raise ModelError(f"{path}: not a file of weights ({in_a_line(error)})") from error


def _pickled_objects(path: Path) -> list[str]:
    """The classes and functions that a file names beside those that are read; without executing it."""
    try:
        with torch.serialization.safe_globals([(NotRead, name) for name in HARMLESS]):
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:
        return []
