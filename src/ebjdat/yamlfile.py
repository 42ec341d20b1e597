"""A strict reader of YAML settings: profiles, override files and `key.path=value` words.

It reads YAML 1.2, as DVC does: 1e-3 is a number and `on` is text. It refuses what YAML readers disagree about (010, 1_000, 1:30,
2001-02-03) and what has no place in settings: tags, keys that are not text, duplicate keys. Every bound is far above a sensible
profile and far below what would take seconds.
"""

from __future__ import annotations

import math
import re
import stat
import unicodedata
from pathlib import Path
from typing import Any

import yaml

from ebjdat.errors import UserError

LARGEST_FILE = 2**18  # bytes; shipped profiles have less than 10,000
MOST_VALUES = 10_000  # in a file; each repetition by an alias counts
DEEPEST = 50  # levels of nesting
LONGEST_TEXT = 10_000  # characters of one value
LONGEST_NAME = 200  # characters of one key
LONGEST_NUMBER = 100  # digits

KEY = re.compile(r"[A-Za-z0-9_-]+")
CORE = "tag:yaml.org,2002:"
UNCLEAR, WORD = "unclear", "word"
# Types of unquoted values in YAML 1.2, by the first pattern that fits; anything else is text.
KINDS = {
    CORE + "null": r"(~|null|Null|NULL|)\Z",
    CORE + "bool": r"(true|True|TRUE|false|False|FALSE)\Z",
    CORE + "int": r"[-+]?(0|[1-9][0-9]*)\Z",
    CORE + "float": r"([-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))\Z",
    CORE + "merge": r"<<\Z",
    WORD: r"(yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF)\Z",
    # leading zeros; other bases; underscores; base 60; dates; YAML 1.1's default key
    UNCLEAR: r"([-+]?0[0-9]+|[-+]?0(b[01_]+|o[0-7_]+|x[0-9a-fA-F_]+)|(?=.*_)(?=.*[0-9])[-+]?[0-9._]+([eE][-+]?[0-9]+)?"
    r"|[-+]?[0-9]+(:[0-5]?[0-9])+(\.[0-9]*)?|[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}([Tt \t]+[0-9].*)?|=)\Z",
}


class YamlError(UserError):
    """The text is not YAML of settings; one line says where and why."""


class Word(str):
    """Unquoted yes, no, on or off: text in YAML 1.2 and to DVC; settings that are true or false take it as such."""

    __slots__ = ()

    @property
    def truth(self) -> bool:
        return self.lower() in ("yes", "on")


class _Composer(yaml.BaseLoader):
    """Text -> nodes, within bounds. BaseLoader resolves no types by itself."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = self.nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        self.nodes += 1
        if self.depth > DEEPEST or self.nodes > MOST_VALUES:
            what = f"nested deeper than {DEEPEST} levels" if self.depth > DEEPEST else f"more than {MOST_VALUES:,} values"
            raise yaml.composer.ComposerError(None, None, what, self.peek_event().start_mark)
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


for _kind, _pattern in KINDS.items():
    _Composer.add_implicit_resolver(_kind, re.compile(_pattern), None)


def read_text(path: Path) -> str:
    """The text of a regular file of at most LARGEST_FILE bytes. Raises YamlError, or FileNotFoundError."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait, a device may have no end
            raise YamlError(f"is {'a folder' if path.is_dir() else 'not a regular file'}; a YAML file is allowed")
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a name with NUL
        raise YamlError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if len(content) > LARGEST_FILE:
        raise YamlError(f"is larger than {LARGEST_FILE // 1024} KiB; a YAML file of settings is allowed")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise YamlError(f"not a YAML file: line {line}: the byte 0x{content[error.start]:02x} is not UTF-8") from error


def parse(text: str) -> Any:
    """The content of a YAML text: mappings, lists, text, numbers, booleans, null. Raises YamlError."""
    node = _compose(text)
    return None if node is None else _Values().of(node, ())


def parse_assignment(word: str) -> dict[str, Any]:
    """ "training.epochs=3" -> {"training": {"epochs": 3}}. Raises YamlError."""
    path, _, text = word.partition("=")
    keys = path.split(".")
    if not all(KEY.fullmatch(key) and len(key) <= LONGEST_NAME for key in keys) or len(keys) > DEEPEST:
        raise YamlError("no key path before `=`; keys of letters, digits, - and _ joined by dots are allowed")
    node = _compose(text)
    if node is None:
        raise YamlError(f"no value; write {path}=null for none, {path}='\"\"' for empty text")
    result = _Values().of(node, tuple(keys))
    if text[node.end_mark.index :].lstrip().startswith("#"):
        if not isinstance(result, str) or getattr(node, "style", None):
            raise YamlError("# begins a comment; put quotes around the whole value")
        result = text.strip()  # "images #2.zip": an override has no comments
    for key in reversed(keys):
        result = {key: result}
    return result


def _compose(text: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=_Composer)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlError(f"not YAML: line {line}: the character U+{error.character:04X} is not allowed") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        what = ", ".join(filter(None, (error.context, error.problem)))
        raise YamlError(f"not YAML: {place}{what}") from error
    except (ValueError, OverflowError) as error:  # an escape beyond Unicode, a version with thousands of digits
        raise YamlError(f"not YAML: {error}") from error


class _Values:
    """Nodes -> values. Every use of an alias is read again, so that its repetitions count."""

    def __init__(self) -> None:
        self.left = MOST_VALUES

    def of(self, node: yaml.Node, where: tuple[str | int, ...], depth: int = 0) -> Any:
        self.left -= 1
        if self.left < 0:
            raise _refused(node, where, f"aliases expand to more than {MOST_VALUES:,} values")
        if depth > DEEPEST:
            raise _refused(node, where[:3], "an alias inside its own anchor")
        if isinstance(node, yaml.MappingNode) and node.tag == CORE + "map":
            return self._mapping(node, where, depth)
        if isinstance(node, yaml.SequenceNode) and node.tag == CORE + "seq":
            return [self.of(item, (*where, i), depth + 1) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node, where)
        raise _refused(node, where, _no_tag(node))

    def _mapping(self, node: yaml.MappingNode, where: tuple[str | int, ...], depth: int) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}  # from `<<`; the mapping's own keys override it, and the first of several wins
        seen = set()
        for key_node, value_node in node.value:
            merges = key_node.tag == CORE + "merge"
            key = "<<" if merges else _scalar(key_node, where) if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str) or isinstance(key, Word):
                scalar = isinstance(key_node, yaml.ScalarNode)
                found = f"{_short(key_node.value)} (quoted, it is text)" if scalar else f"a {key_node.id}"
                raise _refused(key_node, where, f"a key must be text, found {found}")
            if len(key) > LONGEST_NAME or not key.isprintable():
                raise _refused(key_node, where, f"{_short(key)} is not a key: at most {LONGEST_NAME} printable characters are allowed")
            if (merges, key) in seen:
                raise _refused(key_node, where, f"duplicate key {key!r}" + ("; <<: [*a, *b] is allowed" if merges else ""))
            seen.add((merges, key))
            if not merges:
                own[str(key)] = self.of(value_node, (*where, key), depth + 1)
                continue
            for part in value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]:
                content = self.of(part, (*where, key), depth + 1)
                if not isinstance(content, dict):
                    raise _refused(part, where, "<< takes an alias of a mapping or a list of such aliases")
                merged = {**content, **merged}
        return {**merged, **own}


def _scalar(node: yaml.ScalarNode, where: tuple[str | int, ...]) -> Any:
    tag, text = node.tag, node.value
    if tag == UNCLEAR:
        what = f"{_short(text)} means different things to different YAML readers; write a plain decimal number, or quoted text"
        raise _refused(node, where, what)
    if tag in (CORE + "str", WORD):
        if len(text) > LONGEST_TEXT:
            raise _refused(node, where, f"a text of {len(text):,} characters; at most {LONGEST_TEXT:,} are allowed")
        if bad := [c for c in text if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t"]:
            raise _refused(node, where, f"the character U+{ord(bad[0]):04X} is not allowed in text")
        return Word(text) if tag == WORD else text
    if tag not in KINDS or tag == CORE + "merge":
        raise _refused(node, where, _no_tag(node))
    if not re.match(KINDS[tag], text):
        raise _refused(node, where, f"{_short(text)} is not a value of the tag !!{tag.removeprefix(CORE)}")
    if tag == CORE + "null":
        return None
    if tag == CORE + "bool":
        return text.lower() == "true"
    if len(text) > LONGEST_NUMBER:
        raise _refused(node, where, f"a number of {len(text):,} characters; at most {LONGEST_NUMBER} are allowed")
    if tag == CORE + "int":
        return int(text)
    value = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    if math.isinf(value) and "inf" not in text.lower():
        raise _refused(node, where, f"{_short(text)} is too large a number")
    return value


def _no_tag(node: yaml.Node) -> str:
    shown = "!!" + node.tag.removeprefix(CORE) if node.tag.startswith(CORE) else node.tag
    return f"the tag {_short(shown)}; plain values, lists and mappings are allowed"


def _short(text: str) -> str:
    """Text quoted and escaped, cut to 60 characters."""
    return ascii(text) if len(text) <= 60 else ascii(text[:57]) + "..."


def _refused(node: yaml.Node, where: tuple[str | int, ...], what: str) -> YamlError:
    path = ".".join(map(str, where))
    return YamlError(f"line {node.start_mark.line + 1}: {path + ': ' if path else ''}{what}")
