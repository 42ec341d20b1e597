"""External networks: from a function of another package, with weights from a file."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ebjdat.errors import UserError, brief, few, in_a_line
from ebjdat.models.weights import ModelError, read_weights

WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})  # DataParallel, SWA, compile, FSDP
COUNTERS = ("n_averaged", "num_batches_tracked")  # last parts of names that change no output; one may lack, or be too many
DEEPEST = 4  # wrappings of a state dict that are looked into
WIDEST = 1000  # entries of each that are
SHARED = 4  # routes to the same list or mapping that are gone
ITSELF = "."  # --weights-key of a file that is a state dict


def external_model(factory: str, weights: Path | None = None, key: str | None = None, device: torch.device | str = "cpu") -> nn.Module:
    """Call "package.module:function" without arguments and load the weights, if given: a network on the device, in eval mode.

    Modules in the current folder can be imported.

    weights: safetensors, or a file of torch.save with tensors, numbers and text alone, that holds a state dict however it is
    wrapped; prints what was read. key: which one, if several fit. Raises ModelError when something is missing or does not fit.
    """
    module, _, function = factory.partition(":")
    if not module or not function:
        raise ModelError(f"--model {factory!r}: package.module:function is allowed")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    asked = f"--model {factory!r}"
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError as error:
        root = module.split(".")[0]
        where = f"run this where {root!r} can be imported" if error.name in (root, module) else f"{root!r} needs it"
        raise ModelError(f"{asked}: {error}; {where}") from error
    except (Exception, SystemExit) as error:
        raise ModelError(f"{asked}: importing {module} raised {in_a_line(error)}") from error
    with external_code(f"{asked}: looking for {function} in {module}"):
        if not hasattr(imported, function):
            raise ModelError(f"{asked}: the module {module} has no {function!r}")
    with external_code(f"{asked}: {function}"):
        model = getattr(imported, function)()
        if not isinstance(model, nn.Module):
            raise ModelError(f"{asked} made {type(model).__name__}; a torch.nn.Module is needed")
    with external_code(f"{asked}: the network's own parameters(), buffers(), state_dict(), to() or eval()"):
        if any(is_lazy(p) or p.is_meta for p in (*model.parameters(), *model.buffers())):
            raise ModelError(f"{asked}: parameters without values (lazy layers, or on the device meta); make them in the function")
        if weights is not None:
            print(f"weights: {_load_into(model, factory, weights, key)}", flush=True)
        ready = model.to(device).eval()
        state = ready.state_dict() if isinstance(ready, nn.Module) else None
        if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
            raise ModelError(f"{asked}: the network's to(), eval() or state_dict() returns something other than torch's")
        return ready


@contextlib.contextmanager
def external_code(what: str) -> Iterator[None]:
    """Code of another package inside: what it raises, and its exit, become a ModelError."""
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
    """Load the weights that fit; returns a sentence on which they were."""
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    wanted = {name: value for name, value in state.items() if not name.endswith(COUNTERS)}
    content = read_weights(path, sum(value.nbytes for value in wanted.values()))
    fitting = [c for route, mapping in _mappings(content) for c in _candidates(route, mapping, wanted)]
    chosen = fitting if key is None else [c for c in fitting if c.route == ("" if key == ITSELF else key)]
    if not chosen and key is not None:
        raise ModelError(f"{path}: nothing under --weights-key {key!r} fits {factory}; {_listed(fitting)}")
    if not chosen:
        raise ModelError(f"{path}: {_misfit(content, wanted, factory)}")
    if any(not _equal(chosen[0], other) for other in chosen[1:]):
        if key is not None:
            raise ModelError(f"{path}: several weights under {key!r} fit {factory}, and differ; save a file with the right ones alone")
        raise ModelError(f"{path}: several weights fit {factory}, and differ; {_listed(chosen)}; choose with --weights-key")
    one = chosen[0]
    try:
        model.load_state_dict(one.tensors, strict=False)  # every name was compared; extra state that is no tensor stays as it is
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        raise ModelError(f"{path}: cannot be loaded into {factory}: {in_a_line(error)}") from error
    kinds = sorted({str(value.dtype).removeprefix("torch.") for value in one.tensors.values() if value.is_floating_point()})
    what = f"{path}: {len(one.tensors)} tensors ({', '.join(kinds)})" + (f" under {one.route!r}" if one.route else ", as they are")
    what += f"; not read: {few(one.left)}" if one.left else ""
    same = [c.route or "the file itself" for c in chosen[1:]]
    return what + (f"; identical ones are under {few(same)}" if same else "")


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
    own_names = {_canonical(name): name for name in wanted}
    if len(own_names) < len(wanted) or not own_names:
        return
    shared = _shared_prefix(list(own_names))
    last = max(own_names)[len(shared) :]
    for prefix in sorted({name[: len(name) - len(last)] for name in names if name[len(name) - len(last) :] == last}):
        under = {name[len(prefix) :]: kept for name, kept in names.items() if name[: len(prefix)] == prefix}
        core = {name[len(shared) :]: own for name, own in own_names.items()}
        if under.keys() != core.keys():
            continue
        for chosen in _wrappings(under, prefix, core):
            picked = {own: tensors[name] for own, name in chosen.items()}
            if _fits(picked, wanted):
                begins = _prefix(chosen[max(wanted)], max(wanted))
                yield Candidate(".".join((*route, *begins)), picked, tuple(sorted(tensors.keys() - set(chosen.values()))))


def _wrappings(
    under: Mapping[tuple[str, ...], list[str]], prefix: tuple[str, ...], core: Mapping[tuple[str, ...], str]
) -> Iterator[dict[str, str]]:
    """The file's names by the network's own; names that occur twice, wrapped and not, once for each wrapping that has them all."""
    if all(len(names) == 1 for names in under.values()):
        yield {own: under[name][0] for name, own in core.items()}
        return
    by_wrapping: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for name, own in core.items():
        for in_file in under[name]:
            by_wrapping.setdefault(_before(in_file, len(prefix)), {}).setdefault(own, []).append(in_file)
    for names in by_wrapping.values():
        if len(names) == len(core) and all(len(in_file) == 1 for in_file in names.values()):
            yield {own: in_file[0] for own, in_file in names.items()}


def _before(name: str, n: int) -> tuple[str, ...]:
    """A name's first parts: n that are no wrappers, and every wrapper up to the next that is none."""
    parts = name.split(".")
    inner = [i for i, part in enumerate(parts) if part not in WRAPPERS]
    return tuple(parts[: inner[n]] if n < len(inner) else parts)


def _prefix(in_file: str, own: str) -> tuple[str, ...]:
    """The file's name up to where the network's own name begins."""
    a, b = in_file.split("."), own.split(".")
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
    return wanted.keys() <= tensors.keys() and not any(_difference(tensors[name], value) for name, value in wanted.items())


def _difference(in_file: Tensor, own: Tensor) -> str:
    """Why the network cannot take a tensor of a file; "" where it can."""
    if in_file.shape != own.shape:
        return f"{tuple(in_file.shape)} in the file, {tuple(own.shape)} in the network"
    if in_file.is_quantized or in_file.layout != torch.strided or in_file.is_meta:
        return "not a plain tensor (quantised, sparse or without values)"
    if in_file.is_floating_point() != own.is_floating_point() or in_file.is_complex() != own.is_complex():
        return f"{in_file.dtype} in the file, {own.dtype} in the network".replace("torch.", "")
    return ""


def _equal(a: Candidate, b: Candidate) -> bool:
    return all(torch.equal(value, b.tensors[name]) for name, value in a.tensors.items())


def _misfit(content: Any, wanted: Mapping[str, Tensor], factory: str) -> str:
    """Why nothing fits, by the nearest mapping."""
    best, text = -1, ""
    core = {_canonical(name): name for name in wanted}
    for route, mapping in _mappings(content):
        in_file = {
            _canonical(k): v for k, v in mapping.items() if isinstance(k, str) and isinstance(v, Tensor) and not k.endswith(COUNTERS)
        }
        prefix = _shared_prefix(list(in_file)) if len({name[:1] for name in in_file}) == 1 else ()
        if not any(name[:1] == prefix[:1] for name in core):
            in_file = {name[len(prefix) :]: value for name, value in in_file.items()}
        missing, more = sorted(core.keys() - in_file.keys()), sorted(in_file.keys() - core.keys())
        other = {core[k]: why for k in core.keys() & in_file.keys() if (why := _difference(in_file[k], wanted[core[k]]))}
        wrong = {
            "Missing keys": [core[k] for k in missing],
            "unexpected": [".".join(k) for k in more],
            "of another kind": [f"{k} ({v})" for k, v in sorted(other.items())],
        }
        where = f" (under {brief('.'.join(route), 80)})" if route else ""
        score = len(core.keys() & in_file.keys())
        if score > best:
            best = score
            problems = "; ".join(f"{what}: {few(names)}" for what, names in wrong.items() if names)
            text = f"does not fit {factory}{where}: {problems or 'tensors occur twice, wrapped in two ways, and neither has all of them'}"
    names = f" of {few(content)}" if isinstance(content, Mapping) and content else ""
    return text or f"a state dict is needed, found {type(content).__name__}{names}"


def _listed(candidates: list[Candidate]) -> str:
    if not candidates:
        return "nothing in the file does"
    return f"what fits: {few([c.route or f'{ITSELF} (the file itself)' for c in candidates])}"
