"""Networks that this project did not make: from somebody's function, with weights from somebody's file.

A file of weights is never run: torch reads it with weights_only, and not before its records and its pickle were checked, so that
neither code in it nor a size that it claims does any harm.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import pickle
import pickletools
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ebjdat.errors import DataError, UserError, brief, few, in_a_line
from ebjdat.files import ZipSource

WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})  # DataParallel, SWA, compile, FSDP
COUNTERS = ("n_averaged", "num_batches_tracked")  # last parts of names that change no output; one may lack, or be too many
DEEPEST = 4  # wrappings of a state dict that are looked into
WIDEST = 1000  # entries of each that are
MOST_HEADER = 4 * 2**20  # bytes of a file that describe its tensors; a network with 1,000 of them takes 0.2 MB
MOST_WORK, PART = MOST_HEADER, 8  # characters that a pickle copies or hashes, and for how many of them a part of a tuple counts
MOST_OLD = 2**29  # bytes of a file in torch's format before 1.6, which has to be read as a whole
SHARED = 4  # routes to the same list or mapping that are gone
OLD_PICKLES = 5  # in torch's format before 1.6: a magic number, a version, the machine's sizes, the content, names of records
LEAST_ROOM, ROOM = 2**30, 16  # bytes of tensors that a file may hold: so many and so many times the network's own


class ModelError(UserError):
    """The network of --model cannot be had; says what is wrong."""


class NotRead:
    """Stands for objects in a checkpoint that are no weights and are known to be harmless: nothing is made of what they say."""

    def __init__(self, *args: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


HARMLESS = (
    *(f"{package}.multiarray.{name}" for package in ("numpy.core", "numpy._core") for name in ("scalar", "_reconstruct")),
    *("numpy.dtype", "numpy.ndarray", "argparse.Namespace"),
)
ITSELF = "."  # --weights-key of a file that is a state dict
MADE = object()  # stands for what a call in a pickle returns
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


def external_model(factory: str, weights: Path | None = None, key: str | None = None, device: torch.device | str = "cpu") -> nn.Module:
    """Call "package.module:function" without arguments and load the weights, if given: a network on the device, in eval mode.

    The folder one works in can be imported from.

    weights: safetensors, or a file of torch.save with tensors, numbers and text alone, that holds a state dict however it is
    wrapped; what was read is said. key: which, where several fit. Raises ModelError when something is missing or does not fit.
    """
    module, _, function = factory.partition(":")
    if not module or not function:
        raise ModelError(f"--model {factory!r}: package.module:function is allowed")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    asked = f"--model {factory!r}"
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        root = module.split(".")[0]
        where = f"run this where {root!r} can be imported" if error.name in (root, module) else f"{root!r} needs it"
        raise ModelError(f"{asked}: {error}; {where}") from error
    except (Exception, SystemExit) as error:
        raise ModelError(f"{asked}: importing {module} raised {in_a_line(error)}") from error
    with theirs(f"{asked}: looking for {function} in {module}"):
        if not hasattr(found, function):
            raise ModelError(f"{asked}: the module {module} has no {function!r}")
    with theirs(f"{asked}: {function}"):
        model = getattr(found, function)()
        if not isinstance(model, nn.Module):
            raise ModelError(f"{asked} made {type(model).__name__}; a torch.nn.Module is needed")
    with theirs(f"{asked}: the network's own parameters(), buffers(), state_dict(), to() or eval()"):
        if any(is_lazy(p) or p.is_meta for p in (*model.parameters(), *model.buffers())):
            raise ModelError(f"{asked}: parameters without values (lazy layers, or on the device meta); make them in the function")
        if weights is not None:
            print(f"weights: {_load_into(model, factory, weights, key)}", flush=True)
        ready = model.to(device).eval()
        state = ready.state_dict() if isinstance(ready, nn.Module) else None
        if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
            raise ModelError(f"{asked}: the network's to(), eval() or state_dict() returns something else than torch's do")
        return ready


@contextlib.contextmanager
def theirs(what: str) -> Iterator[None]:
    """Run somebody's code inside: what it raises, and its exit, become a ModelError that says what it was."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise ModelError(f"{what} raised {in_a_line(error)}") from error


@dataclass(frozen=True)
class Candidate:
    """A state dict in a file that fits the network. route: where it begins, "state_dict.module"; "" when it is the file itself.

    tensors: by the network's own names. left: names in the same mapping that are no part of it.
    """

    route: str
    tensors: dict[str, Tensor]
    left: tuple[str, ...]


def _load_into(model: nn.Module, factory: str, path: Path, key: str | None) -> str:
    """Load the weights that fit; says in words which they were."""
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    wanted = {name: value for name, value in state.items() if not name.endswith(COUNTERS)}
    content = read_weights(path, sum(value.nbytes for value in wanted.values()))
    found = [c for route, mapping in _mappings(content) for c in _candidates(route, mapping, wanted)]
    chosen = found if key is None else [c for c in found if c.route == ("" if key == ITSELF else key)]
    if not chosen and key is not None:
        raise ModelError(f"{path}: nothing that fits {factory} is under --weights-key {key!r}; {_listed(found)}")
    if not chosen:
        raise ModelError(f"{path}: {_misfit(content, wanted, factory)}")
    if any(not _equal(chosen[0], other) for other in chosen[1:]):
        if key is not None:
            raise ModelError(f"{path}: several weights under {key!r} fit {factory}, and differ; save those that are meant alone")
        raise ModelError(f"{path}: several weights fit {factory}, and differ; {_listed(chosen)}; --weights-key says which")
    one = chosen[0]
    try:
        model.load_state_dict(one.tensors, strict=False)  # every name was compared; what is no tensor (extra state) stays as it is
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        raise ModelError(f"{path}: cannot be loaded into {factory}: {in_a_line(error)}") from error
    kinds = sorted({str(value.dtype).removeprefix("torch.") for value in one.tensors.values() if value.is_floating_point()})
    what = f"{path}: {len(one.tensors)} tensors ({', '.join(kinds)})" + (f" under {one.route!r}" if one.route else ", as they are")
    what += f"; not read: {few(one.left)}" if one.left else ""
    same = [c.route or "the file itself" for c in chosen[1:]]
    return what + (f"; the same are under {few(same)}" if same else "")


def _mappings(content: Any) -> Iterator[tuple[tuple[str, ...], Mapping[Any, Any]]]:
    """Every mapping in a file that holds tensors by name, the outermost first, with where it lies."""
    yield from _below(content, (), Counter())


def _below(content: Any, route: tuple[str, ...], visits: Counter[int]) -> Iterator[tuple[tuple[str, ...], Mapping[Any, Any]]]:
    visits[id(content)] += 1
    if visits[id(content)] > SHARED:
        return
    if isinstance(content, Mapping) and any(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
        yield route, content
    if not isinstance(content, Mapping | list | tuple) or len(route) == DEEPEST or len(content) > WIDEST:
        return
    for name, part in content.items() if isinstance(content, Mapping) else enumerate(content):
        if isinstance(part, Mapping | list | tuple):
            yield from _below(part, (*route, str(name)), visits)


def _canonical(name: str) -> tuple[str, ...]:
    """A tensor's name without the wrappers that DataParallel, SWA, compile and others put around modules."""
    return tuple(part for part in name.split(".") if part not in WRAPPERS)


def _candidates(route: tuple[str, ...], mapping: Mapping[Any, Any], wanted: Mapping[str, Tensor]) -> Iterator[Candidate]:
    """The state dicts in a mapping that fit: as it is, without wrappers, below a prefix, or with the network's own prefix put on."""
    tensors = {name: value for name, value in mapping.items() if isinstance(name, str) and isinstance(value, Tensor)}
    tensors = {name: value for name, value in tensors.items() if not name.endswith(COUNTERS)}
    if tensors.keys() == wanted.keys() and _fits(tensors, wanted):
        yield Candidate(".".join(route), tensors, ())
        return
    names: dict[tuple[str, ...], list[str]] = {}
    for name in tensors:
        names.setdefault(_canonical(name), []).append(name)
    ours = {_canonical(name): name for name in wanted}
    if len(ours) < len(wanted) or not ours:
        return
    shared = _shared_prefix(list(ours))
    last = max(ours)[len(shared) :]
    for prefix in sorted({name[: len(name) - len(last)] for name in names if name[len(name) - len(last) :] == last}):
        under = {name[len(prefix) :]: kept for name, kept in names.items() if name[: len(prefix)] == prefix}
        core = {name[len(shared) :]: own for name, own in ours.items()}
        if under.keys() != core.keys():
            continue
        for chosen in _wrappings(under, prefix, core):
            picked = {own: tensors[name] for own, name in chosen.items()}
            if _fits(picked, wanted):
                begins = _begins(chosen[max(wanted)], max(wanted))
                yield Candidate(".".join((*route, *begins)), picked, tuple(sorted(tensors.keys() - set(chosen.values()))))


def _wrappings(
    under: Mapping[tuple[str, ...], list[str]], prefix: tuple[str, ...], core: Mapping[tuple[str, ...], str]
) -> Iterator[dict[str, str]]:
    """The file's names by the network's own; where names are there twice, wrapped and not, once for each wrapping that has them all."""
    if all(len(names) == 1 for names in under.values()):
        yield {own: under[name][0] for name, own in core.items()}
        return
    found: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for name, own in core.items():
        for theirs in under[name]:
            found.setdefault(_before(theirs, len(prefix)), {}).setdefault(own, []).append(theirs)
    for names in found.values():
        if len(names) == len(core) and all(len(theirs) == 1 for theirs in names.values()):
            yield {own: theirs[0] for own, theirs in names.items()}


def _before(name: str, n: int) -> tuple[str, ...]:
    """A name's first parts: n that are no wrappers, and every wrapper up to the next that is none."""
    parts = name.split(".")
    inner = [i for i, part in enumerate(parts) if part not in WRAPPERS]
    return tuple(parts[: inner[n]] if n < len(inner) else parts)


def _begins(theirs: str, ours: str) -> tuple[str, ...]:
    """What stands before the network's own name in the file's."""
    a, b = theirs.split("."), ours.split(".")
    same = 0
    while same < min(len(a), len(b)) and a[-1 - same] == b[-1 - same]:
        same += 1
    return tuple(a[: len(a) - same])


def _shared_prefix(names: list[tuple[str, ...]]) -> tuple[str, ...]:
    """What all names begin with, at most all but their last part."""
    low, high = min(names), max(names)
    same = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))
    return low[: min(same, min(map(len, names)) - 1)]


def _fits(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    return wanted.keys() <= tensors.keys() and not any(_differs(tensors[name], value) for name, value in wanted.items())


def _differs(theirs: Tensor, ours: Tensor) -> str:
    """How a tensor of a file is not one that the network can take; "" where it can."""
    if theirs.shape != ours.shape:
        return f"{tuple(theirs.shape)} in the file, {tuple(ours.shape)} in the network"
    if theirs.is_quantized or theirs.layout != torch.strided or theirs.is_meta:
        return "no plain tensor (quantised, sparse or without values)"
    if theirs.is_floating_point() != ours.is_floating_point() or theirs.is_complex() != ours.is_complex():
        return f"{theirs.dtype} in the file, {ours.dtype} in the network".replace("torch.", "")
    return ""


def _equal(a: Candidate, b: Candidate) -> bool:
    return all(torch.equal(value, b.tensors[name]) for name, value in a.tensors.items())


def _misfit(content: Any, wanted: Mapping[str, Tensor], factory: str) -> str:
    """Why nothing fits, of the mapping that comes nearest."""
    best, text = -1, ""
    core = {_canonical(name): name for name in wanted}
    for route, mapping in _mappings(content):
        theirs = {_canonical(k): v for k, v in mapping.items() if isinstance(k, str) and isinstance(v, Tensor) and not k.endswith(COUNTERS)}
        prefix = _shared_prefix(list(theirs)) if len({name[:1] for name in theirs}) == 1 else ()
        if not any(name[:1] == prefix[:1] for name in core):
            theirs = {name[len(prefix) :]: value for name, value in theirs.items()}
        missing, more = sorted(core.keys() - theirs.keys()), sorted(theirs.keys() - core.keys())
        other = {core[k]: told for k in core.keys() & theirs.keys() if (told := _differs(theirs[k], wanted[core[k]]))}
        wrong = {
            "Missing keys": [core[k] for k in missing],
            "unexpected": [".".join(k) for k in more],
            "of another kind": [f"{k} ({v})" for k, v in sorted(other.items())],
        }
        where = f" (under {brief('.'.join(route), 80)})" if route else ""
        score = len(core.keys() & theirs.keys())
        if score > best:
            best = score
            told = "; ".join(f"{what}: {few(names)}" for what, names in wrong.items() if names)
            text = f"does not fit {factory}{where}: {told or 'tensors are there twice, wrapped in two ways, and neither has all of them'}"
    found = f" of {few(content)}" if isinstance(content, Mapping) and content else ""
    return text or f"a state dict is needed, found {type(content).__name__}{found}"


def _listed(found: list[Candidate]) -> str:
    return f"what fits: {few([c.route or f'{ITSELF} (the file itself)' for c in found])}" if found else "nothing in the file does"


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
        raise ModelError(f"{path}: damaged or cut off ({in_a_line(error)})") from error
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
    """Stands for a mapping in a pickle."""

    n: int = 0


class _Name(str):
    """What a pickle names, as it writes it."""


def _examine(path: Path, file: io.BytesIO) -> None:
    """Follow the next pickle of a file without making anything of it.

    Raises ModelError where it names or calls what is not in CALLS, and where it repeats itself so often that it would take
    more memory or time than its length says. What torch does not read at all is left to torch.
    """
    stack: list[Any] = []
    marks: list[list[Any]] = []
    memo: dict[int, Any] = {}
    refused: set[str] = set()
    work = 0
    value: Any
    try:
        for instruction, value, _ in pickletools.genops(file):
            kind = instruction.name
            looked: Any = ()  # what is copied, or hashed, as a whole
            if instruction.proto > 2:
                return
            if kind in ("TUPLE", "APPENDS", "SETITEMS"):
                given, stack = stack, marks.pop()
                if kind == "TUPLE":
                    stack.append(tuple(given))
                elif kind == "APPENDS":
                    stack[-1] += given  # a list, as below; torch would refuse others too
                elif kind == "SETITEMS":
                    looked = tuple(key for key in given[::2] if isinstance(key, tuple))
                    stack[-1].n += len(given) // 2
            elif kind == "MARK":
                marks.append(stack)
                stack = []
            elif kind in ("BINPUT", "LONG_BINPUT"):
                memo[value] = stack[-1]
            else:
                taken = [stack.pop() for _ in instruction.stack_before][::-1]
                made = value
                if kind == "GLOBAL":
                    made = _Name(value.replace(" ", "."))
                    refused |= set() if _is_read(made) else {made}
                elif kind in ("BINGET", "LONG_BINGET"):
                    made = memo[value]
                elif kind in ("REDUCE", "NEWOBJ"):
                    called, looked = taken
                    if not (called in CALLS and isinstance(looked, tuple) and CALLS[called](looked)):
                        refused.add(called if isinstance(called, _Name) else "calls of what it does not name")
                    made = _Entries() if called in ("collections.OrderedDict", "collections.Counter") else MADE
                elif kind in ("EMPTY_DICT", "EMPTY_LIST"):
                    made = _Entries() if kind == "EMPTY_DICT" else []
                elif kind in ("EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
                    made = tuple(taken)
                elif kind in ("APPEND", "SETITEM", "BUILD"):
                    made = taken[0]
                    looked = taken[1] if kind == "BUILD" or (kind == "SETITEM" and isinstance(taken[1], tuple)) else ()
                    if kind == "SETITEM":
                        made.n += 1
                    elif kind == "APPEND":
                        made.append(taken[1])
                elif kind == "BINPERSID":
                    made = MADE
                stack += [made] if instruction.stack_after else []
            work += _length(looked)
            if work > MOST_WORK:
                raise ModelError(f"{path}: its pickle repeats itself without end; it was not read")
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, UnicodeError) as error:
        raise ModelError(f"{path}: not a file of weights ({in_a_line(error)})") from error
    if refused:
        raise ModelError(
            f"{path}: holds pickled objects ({few(sorted(refused))}), which could run code or fill memory; save model.state_dict() alone"
        )


def _are_pairs(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) for pair in value)


def _is_read(name: str) -> bool:
    """Whether a pickle may name this: what it may call, and what stands for a kind of tensor."""
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
    """The classes and functions that a file names beside those that are read; found without running it."""
    try:
        with torch.serialization.safe_globals([(NotRead, name) for name in HARMLESS]):
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:
        return []
