"""The reader of settings: what it reads, DVC's reader reads as the same; everything else is refused in one line, at once."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from ebjdat import yamlfile
from ebjdat.settings import ParamsError, flat, load, merge

from .conftest import ROOT

DIGITS = ROOT / "params/digits.yaml"
BASE: dict[str, Any] = yaml.safe_load(DIGITS.read_text())
BOMB = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else '0'] * 9)}]\n" for i in range(9))  # 9 ** 9 zeros
quick = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


def refusal(read: Callable[[], object]) -> str:
    """The message of ParamsError, within two seconds of computing: of four here, since a process with many objects collects garbage."""
    start = time.process_time()
    with pytest.raises(ParamsError) as caught:
        read()
    assert time.process_time() - start < 4
    return str(caught.value)


def by_dvc(text: str) -> Any:
    """DVC reads params files with ruamel.yaml's safe loader."""
    return YAML(typ="safe").load(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("1e-3", 0.001), ("1E-3", 0.001), ("-1e-3", -0.001), ("+1e5", 1e5), ("1e5", 1e5), ("1.e3", 1e3), (".5", 0.5), ("5.", 5.0)],
        *[("0", 0), ("-7", -7), ("+7", 7), ("01.5", 1.5), ("-.inf", float("-inf")), ("1e-400", 0.0)],
        *[("true", True), ("False", False), ("~", None), ("null", None), ("", None), ("tRue", "tRue")],
        *[("yes", "yes"), ("No", "No"), ("on", "on"), ("y", "y"), ("8/255", "8/255"), ("1e", "1e"), ("nan", "nan"), ("1,000", "1,000")],
        *[("'1e-3'", "1e-3"), ('"010"', "010"), ("!!str 010", "010"), ("!!int '3'", 3), ("!!float 1e3", 1000.0)],
        *[("[1, &x 2, *x]", [1, 2, 2]), ("{b: {c: 1}}", {"b": {"c": 1}}), ("{<<: [{b: 1}, {b: 2, c: 3}], d: 4}", {"b": 1, "c": 3, "d": 4})],
    ],
)
def test_values_are_read_as_dvc_reads_them(text: str, value: Any) -> None:
    read = yamlfile.parse(f"a: {text}\n")["a"]
    assert read == value
    assert type(read) is type(value) or (isinstance(read, yamlfile.Word) and value in ("yes", "No", "on"))
    assert by_dvc(f"a: {text}\n")["a"] == value


@settings(quick, max_examples=50)
@given(st.floats(allow_nan=False) | st.integers(-(10**90), 10**90))
def test_numbers_as_python_writes_them_are_numbers_to_both(number: float) -> None:
    text = f"a: {number!r}".replace("inf", ".inf")
    assert yamlfile.parse(text)["a"] == by_dvc(text)["a"] == number


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *[
            (f"a: {v}", f"a: '{v}' means different things")
            for v in ("010", "08", "0x1F", "0b1", "0o7", "0x_", "1_000", "0.1_0", "1:30", "=")
        ],
        *[(f"a: {v}", f"a: '{v}' means different things") for v in ("2001-13-45", "2001-01-01", "2001-01-01 10:00:00")],
        *[(f"a: !!int {v}", f"a: '{v}' is not a value of the tag !!int") for v in ("foo", "1.5", "010", "0x_")],
        *[(f"a: !!{t} x", "is not a value of the tag") for t in ("float", "bool", "null")],
        *[
            (f"a: !!{t}", f"a: the tag '!!{t.split()[0]}'")
            for t in ("timestamp x", "binary AA==", "python/name:os.system x", "set {b}", "seq 3")
        ],
        ("a: !mine 1", "a: the tag '!mine'"),
        ("a: 1e400", "line 1: a: '1e400' is too large a number"),
        ("\na: [0, " + "9" * 5000 + "]", "line 2: a.1: a number of 5,000 characters; at most 100"),
        ("%YAML 1." + "9" * 5000 + "\n---\na: 1", "not YAML: "),
        ("a: {b: 1, b: 2}", "line 1: a: duplicate key 'b'"),
        ("a: {b: 1, 'b': 2}", "duplicate key 'b'"),
        ("a: {<<: {b: 1}, <<: {c: 1}}", "duplicate key '<<'; <<: [*a, *b] is allowed"),
        ("a: {<<: {b: 1, b: 2}}", "a.<<: duplicate key 'b'"),
        ("a: {<<: 3}", "<< takes an alias of a mapping"),
        *[(f"{k}: 1", "a key must be text, found '") for k in ("1", "1.5", "true", "yes", "on", "null", "1e3")],
        *[(f"{k}: 1", "a key must be text, found a ") for k in ("[a]", "{a: b}", "? [a]\n")],
        ("x" * 201 + ": 1", "is not a key"),
        ("a\u200b: 1", r"'a\u200b' is not a key"),
        ('"a\\nb": 1', "is not a key"),
        ('a: "\\ud800"', "the character U+D800 is not allowed in text"),
        ('a: "\\e[31m"', "the character U+001B is not allowed in text"),
        ('a: "\\U99999999"', "not YAML: "),
        ("a: \0", "not YAML: line 1: the character U+0000"),
        ("\ta: 1", "not YAML: line 1, column 1: while scanning"),
        ("a: 'x", "not YAML: line 1, column 6: while scanning a quoted scalar, found unexpected end of stream"),
        ("a: 1\n---\nb: 2", "not YAML: line 2, column 1: expected a single document"),
        ("a: *b", "found undefined alias 'b'"),
        ("a: " + "x" * 10_001, "a text of 10,001 characters; at most 10,000"),
        *[(c * 3000, "nested deeper than 50 levels") for c in ("[", "{a: ", "- ", "? ")],
        ("\n".join(" " * i + f"k{i}:" for i in range(600)), "nested deeper than 50 levels"),
        ("a: &a [*a]", "an alias inside its own anchor"),
        ("a: &a {b: {<<: *a}}", "an alias inside its own anchor"),
        (BOMB + "seeds: *a8", "aliases expand to more than 10,000 values"),
        (
            "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}' if i else '{b: 1}'] * 9)}]}}\n" for i in range(9)),
            "aliases expand to more than",
        ),
        ("a: [" + "1," * 100_000 + "]", "more than 10,000 values"),
        ("{" + "a," * 60_000 + "}", "more than 10,000 values"),
        ("#" * (2**18 + 1), "is larger than 256 KiB"),
        ("", "a mapping of settings is allowed, found nothing"),
        ("# nothing", "a mapping of settings is allowed, found nothing"),
        ("- a", "a mapping of settings is allowed, found list"),
    ],
    ids=lambda text: ascii(text[:30]),
)
def test_what_is_no_settings_file_is_refused_in_one_line_that_names_it(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes(text.encode())
    message = refusal(lambda: load(file))
    assert message.startswith(f"{file}: ")
    assert expected in message
    assert "\n" not in message
    assert len(message) < 400


def test_only_regular_utf8_files_are_read(tmp_path: Path) -> None:
    text = DIGITS.read_bytes()
    bom, utf16, latin, huge, pipe, loop, gone = (
        tmp_path / f"{name}.yaml" for name in ("bom", "16", "latin", "huge", "pipe", "loop", "gone")
    )
    bom.write_bytes(b"\xef\xbb\xbf" + text)
    assert load(bom) == load(DIGITS)
    utf16.write_bytes(text.decode().encode("utf-16"))
    latin.write_bytes(text + b"# caf\xe9")
    with huge.open("wb") as file:
        file.truncate(10**12)  # a hole: nothing on the disk
    os.mkfifo(pipe)
    loop.symlink_to(loop)
    expected = {
        tmp_path: "is a folder; a YAML file is allowed",
        utf16: "line 1: the byte 0xff is not UTF-8",
        latin: f"line {text.count(10) + 1}: the byte 0xe9 is not UTF-8",
        huge: "is larger than 256 KiB",
        pipe: "is not a regular file",
        Path("/dev/zero"): "is not a regular file",
        loop: "cannot be read: Too many levels",
        bom / "below": "cannot be read: Not a directory",
        gone: "there is no such file; ",
        tmp_path / ("x" * 300): "cannot be read: File name too long",
    }
    for path, what in expected.items():
        for message in (refusal(lambda path=path: load(path)), refusal(lambda path=path: load(DIGITS, [str(path)]))):
            assert message.startswith(f"{path}: {'not a YAML file: ' if 'UTF-8' in what else ''}{what}")
    assert refusal(lambda: load(DIGITS, ["a\0b"])) == r"'a\x00b': cannot be read: embedded null byte"


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        *[(w, "no key path before `=`") for w in ("=3", "a..b=1", ".a=1", "training.=1", "training .epochs=1", "params/x=1.yaml")],
        *[(w, "no key path before `=`") for w in ("tr\u0430ining.epochs=3", "x" * 201 + "=1", ".".join("a" * 60) + "=1")],
        *[(f"training.epochs={v}", "no value; write training.epochs=null for none") for v in ("", "  ", "#3")],
        ("training.epochs=3 #1", "# begins a comment"),
        ("training.epochs=2001-13-45", "line 1: training.epochs: '2001-13-45' means different things"),
        ("training.optimizer={lr: 0.1, lr: 0.2}", "line 1: training.optimizer: duplicate key 'lr'"),
        ("training.epochs=[", "not YAML: line 1, column 2: while parsing"),
        ("training.epochs=!!int foo", "'foo' is not a value of the tag !!int"),
        ("training.epochs=" + "[" * 3000, "nested deeper than 50 levels"),
        ("training.epochs.x=1", "training.epochs: input should be a valid integer, found {'x': 1}"),
        ("seeds.0=1", "seeds: input should be a valid list, found {'0': 1}"),
        ("training=[]", "training: input should be a valid mapping, found []"),
        ("training=null", "training: input should be a valid mapping, found None"),
        ("experiments.on.method=classifier", "experiments.on.pretraining: is missing"),
        *[
            (f"{w}={{}}", f"{w}: an empty mapping over settings neither changes nor removes any")
            for w in ("experiments", "model", "bases.jempp")
        ],
    ],
    ids=lambda text: ascii(text[:30]),
)
def test_overrides_that_are_not_meant_are_refused(word: str, expected: str) -> None:
    message = refusal(lambda: load(DIGITS, ["training.batch_size=32", word]))
    assert expected in message
    assert f"override {ascii(word)[:40]}" in message


def test_a_hash_in_the_text_of_an_override_is_part_of_it() -> None:
    assert yamlfile.parse_assignment("data.path=images #2.zip") == {"data": {"path": "images #2.zip"}}


def test_empty_mappings_change_nothing_and_are_refused_over_settings_only(tmp_path: Path) -> None:
    over = tmp_path / "over.yaml"
    for text, where in (
        ("{}", "top level"),
        ("training: {chain: {}}", "training.chain"),
        ("experiments: {jempp: {training: {}}}", "training"),
    ):
        over.write_text(text)
        assert f"{over}: " in (message := refusal(lambda: load(DIGITS, [str(over)])))
        assert f"{where}: an empty mapping over settings" in message
    assert load(DIGITS, ["training.healing.ladder=[]", "pretraining.scratch.model={}"]).training.healing.ladder == ()
    assert load(DIGITS, ["evaluation.attack.transfer=null", "evaluation.attack.transfer={}"]) == load(DIGITS)


def test_words_of_yaml_are_text_in_names_and_truth_values_where_those_are_meant(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    text = DIGITS.read_text().replace("  pgd_at:\n", "  'on':\n").replace("reinit: 0.05", "reinit: 0.05, conditional: Yes")
    file.write_text(text)
    profile = load(file, ["data.label=off", "experiments.on.note=no", "training.adversary.project=off"])
    assert "on" in profile.experiments
    assert (profile.data.label, profile.experiments["on"].note) == ("off", "no")
    assert profile.training.chain.conditional is True
    assert profile.training_settings("on").adversary.project is False
    for value in ("'yes'", "'true'", "y", "1", "null"):
        assert "training.augment.flip: a valid boolean is true or false, found" in refusal(
            lambda value=value: load(DIGITS, [f"training.augment.flip={value}"])
        )


def test_scientific_notation_is_the_same_setting_and_the_same_hash() -> None:
    plain = load(DIGITS, ["training.optimizer.lr=0.001", "training.chain.buffer=1000"])
    short = load(DIGITS, ["training.optimizer.lr=1e-3", "training.chain.buffer=1e3"])
    assert short.training.optimizer.lr == 0.001
    assert [short.params_hash(e, 0) for e in short.experiments] == [plain.params_hash(e, 0) for e in plain.experiments]


TOKENS = [*"[]{}:,#&*!|>'\"@%=?-~\t\0\x85\ufeff\n ", ": ", "- ", "\n  ", "&a ", "*a ", "<<: ", "!!int ", "!!binary ", "!x ", "---\n", "\\x"]
TOKENS += ["1e400", "0x_", "1:30", "010", "1e-3", ".inf", "null", "yes", "seeds", "training", "9" * 5000, "2001-13-45", "\u2028", "ſ"]


@settings(quick, max_examples=100)
@given(st.lists(st.sampled_from(TOKENS) | st.text(max_size=4), max_size=20).map("".join))
def test_any_text_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    """As a whole file, as one value of a file, and as an override word. Nothing but ParamsError comes out."""
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    for content in (text, f"seeds: {text}"):
        file.write_bytes(content.encode("utf-8", "surrogatepass"))
        refusal(lambda: load(file))  # other sections are missing, whatever it holds
    refusal(lambda: load(file, [f"data.nothing={text}"]))


SECTIONS = sorted({key.rpartition(".")[0] for key in flat(BASE)} - {""})
KEYS = sorted({*flat(BASE), *SECTIONS, "bases.jem.chain", "evaluation.reliability.ood", "training.healing.ladder", "training.compute"})
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([10**99, 1e300, "8/0", "1e999999999", "1e999999999/255", "sgld", "auto", "digits", "a\nb"]),
    lambda values: (
        st.lists(values, max_size=3)
        | st.dictionaries(
            st.text(max_size=4) | st.sampled_from(["chain", "steps", "like", "eps", "method", "training"]), values, max_size=3
        )
    ),
    max_leaves=5,
)


@settings(quick, max_examples=50)
@given(st.lists(st.tuples(st.sampled_from(KEYS), VALUES), min_size=1, max_size=3))
def test_any_settings_are_accepted_or_refused(tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[str, Any]]) -> None:
    """Values of any kind laid over a profile, at any of its keys. Nothing but ParamsError comes out."""
    raw = BASE
    for path, value in changes:
        for key in reversed(path.split(".")):
            value = {key: value}
        raw = merge(raw, value)
    file = tmp_path_factory.getbasetemp() / "merged.yaml"
    file.write_text(yaml.safe_dump(raw), encoding="utf-8")
    with contextlib.suppress(ParamsError):
        profile = load(file)
        assert all(profile.params_hash(experiment, seed) for experiment in profile.experiments for seed in profile.seeds)
