"""Which code a job can execute, as one digest: with its settings and its inputs, what makes a result out of date.

From a stage's function on, every definition that is used by name is followed through the package: functions, classes, constants.
Strategies are called through the registry; a job's are those that its settings name. Definitions count as syntax trees
without docstrings, so comments, formatting, and where a definition stands change nothing.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from symtable import SymbolTable, symtable
from typing import Any

import ebjdat
from ebjdat.registry import Entry

PACKAGE = "ebjdat"
# Of its classes only methods count: a job's settings hold the fields' values, as they are after all checks. They are followed
# from wherever an attribute of that name is used.
SETTINGS = tuple(f"ebjdat.settings.{name}" for name in ("types", "data", "training", "evaluation"))
# Modules, packages and definitions ("module:name") that no number of a result comes from: messages, progress, MLflow,
# reading and refusing of settings.
WITHOUT_EFFECT = frozenset(
    {
        *("ebjdat.registry", "ebjdat.yamlfile", "ebjdat.errors", "ebjdat.progress", "ebjdat.tracking", "ebjdat.checkout"),
        *("ebjdat.jobs", "ebjdat.layout", "ebjdat.codehash", "ebjdat.settings.types:ParamsError"),
        *("ebjdat.settings.profile", "ebjdat.settings.problems", "ebjdat.settings.loading", "ebjdat.settings.strategies"),
        *("ebjdat.settings.evaluation:too_few_classes", "ebjdat.pixels:parse_budget"),
    }
)

Definition = tuple[str, str]  # module, name


@dataclass(frozen=True)
class Statement:
    """A statement at the top of a module. text: its syntax without places, docstrings and annotations of functions."""

    text: str
    names: frozenset[str]
    attributes: frozenset[str]


@dataclass(frozen=True)
class Module:
    """defined: name -> statements that define it. always: what runs when the module is imported, beside definitions.

    imported: name -> what it is here: a module ("ebjdat.pixels", "") or a definition in one ("ebjdat.pixels", "INTERNAL").
    """

    defined: Mapping[str, tuple[ast.stmt, ...]]
    always: tuple[ast.stmt, ...]
    imported: Mapping[str, Definition]


def digest(starts: Iterable[str], entries: Iterable[Entry] = (), texts: Iterable[str] = ()) -> str:
    """Digest (16 hexadecimal digits) of what can be executed from these definitions ("module:name") on, with these strategies.

    texts: modules ("ebjdat.registry.methods") of which everything counts, and patterns of other files ("report/*.j2").
    """
    named = {entry.target: entry for entry in entries}
    total = hashlib.sha256()
    for target, entry in sorted(named.items()):
        total.update(f"{target} {sorted((k, v) for k, v in vars(entry).items() if k in ('reads', 'samples', 'selection'))}\n".encode())
    for text in sorted(statement.text for statement in code(*starts, *named).values()):
        total.update(f"{hashlib.sha256(text.encode()).hexdigest()}\n".encode())
    for name in texts:
        if name.startswith(f"{PACKAGE}."):
            module = parsed(name)
            parts = [statement_of(s).text for s in {*module.always, *(s for group in module.defined.values() for s in group)}]
            total.update("\n".join([name, *sorted(parts)]).encode())
        else:
            files = sorted(Path(ebjdat.__file__).parent.glob(name))
            total.update(b"".join([name.encode(), *(file.read_bytes() for file in files)]))
    return total.hexdigest()[:16]


def code(*targets: str) -> dict[tuple[str, str, int], Statement]:
    """(module, name, number) -> statement, for all that these definitions ("module:name") can execute, and they.

    Raises LookupError where there is no such definition: nothing would ever make its digest another one.
    """
    waiting: list[Definition] = [(home, name) for home, _, name in (target.partition(":") for target in targets)]
    for home, name in waiting:
        if name not in parsed(home).defined:
            raise LookupError(f"{home} defines no {name}")
    seen: set[Definition] = set()
    found: dict[tuple[str, str, int], Statement] = {}
    while waiting:
        home, name = waiting.pop()
        if (home, name) in seen or not counts(home, name):
            continue
        seen.add((home, name))
        module = parsed(home)
        here = {(home, name, i): statement_of(s) for i, s in enumerate(module.defined.get(name, ()))}
        here |= {(home, "", i): statement_of(s) for i, s in enumerate(module.always)}
        found |= here
        if name in module.imported and name not in module.defined:
            waiting.append(module.imported[name])
        for statement in here.values():
            waiting += used(home, module, statement)
    return found


def counts(module: str, name: str) -> bool:
    return module.startswith(f"{PACKAGE}.") and not WITHOUT_EFFECT & {module, module.rpartition(".")[0], f"{module}:{name}"}


def used(home: str, module: Module, statement: Statement) -> Iterator[Definition]:
    """Definitions of the package that a statement uses by name."""
    for settings in SETTINGS:
        yield from ((settings, attribute) for attribute in statement.attributes & {*parsed(settings).defined})
    for name in statement.names:
        if name in module.defined:
            yield home, name
        elif name in module.imported:
            source, what = module.imported[name]
            if what:
                yield source, what
            elif counts(source, ""):
                other = parsed(source)
                yield from ((source, attribute) for attribute in statement.attributes & {*other.defined, *other.imported})


def file_of(module: str) -> Path:
    """Where a module's or package's source is, or would be. (Nothing is imported: torch takes seconds.)"""
    path = Path(ebjdat.__file__).parent.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def source(module: str) -> bytes:
    return file_of(module).read_bytes()


@cache
def parsed(name: str) -> Module:
    tree = ast.parse(source(name))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        if isinstance(node, ast.arg):
            node.annotation = None
    imported = {alias: what for node in ast.walk(tree) for alias, what in bound(node)}
    defined: dict[str, tuple[ast.stmt, ...]] = {}
    always = []
    for node in tree.body:
        inner = [node]
        if name in SETTINGS and isinstance(node, ast.ClassDef):
            inner = [n for n in node.body if computes(n)] if counts(name, node.name) else []
        for statement in inner:
            names = defines(statement)
            if not names and not isinstance(statement, ast.Import | ast.ImportFrom) and not for_types(statement):
                always.append(statement)
            for one in names:
                defined[one] = (*defined.get(one, ()), statement)
    return Module(defined, tuple(always), imported)


def for_types(node: ast.stmt) -> bool:
    """Whether it is `if TYPE_CHECKING:`, which nothing executes."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def computes(node: ast.stmt) -> bool:
    """Whether it is a method, and no validator."""
    return isinstance(node, ast.FunctionDef) and not any("validator" in ast.unparse(d) for d in node.decorator_list)


def defines(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign | ast.AugAssign) else []
    return [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]


def bound(node: ast.AST) -> Iterator[tuple[str, Definition]]:
    """Names that an import binds to something of this package."""
    if isinstance(node, ast.Import):
        yield from ((a.asname, (a.name, "")) for a in node.names if a.asname and a.name.startswith(f"{PACKAGE}."))
    elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
        for a in node.names:
            below = f"{node.module}.{a.name}"
            yield a.asname or a.name, (below, "") if file_of(below).exists() else (str(node.module), a.name)


@cache
def statement_of(node: ast.stmt) -> Statement:
    table = symtable(ast.unparse(node), "", "exec")
    return Statement(plain(node), frozenset(looked_up(table)), frozenset(n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)))


def looked_up(table: SymbolTable) -> Iterator[str]:
    """Names that a statement looks up in its module, or imports: no local variables."""
    for symbol in table.get_symbols():
        if symbol.is_imported() or (symbol.is_referenced() and (table.get_type() == "module" or symbol.is_global())):
            yield symbol.get_name()
    for inner in table.get_children():
        yield from looked_up(inner)


def plain(node: Any) -> str:
    """A syntax tree as text without places in the file; the same in every version of Python that has the same syntax for it."""
    if isinstance(node, ast.AST):
        fields = ((name, value) for name, value in ast.iter_fields(node) if value is not None and value != [])
        return f"{type(node).__name__}({', '.join(f'{name}={plain(value)}' for name, value in fields)})"
    return f"[{', '.join(map(plain, node))}]" if isinstance(node, list) else repr(node)
