"""Values of settings: bounds, numbers, names; helpers on raw mappings."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebjdat.pixels import parse_budget
from ebjdat.settings.types import flat, merge, section

from .conftest import Refusal


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.batch_size=1000000000000", "training.batch_size: input should be less than or equal to 1000000"),
        ("training.epochs=1e9", "training.epochs: input should be less than or equal to 100000"),
        ("model.depth=1000000", "model.depth: input should be less than or equal to 1000"),
        ("runtime.threads=1e6", "runtime.threads: input should be less than or equal to 1000"),
        (f"seeds=[{2**70}]", "seeds.0: input should be less than 4294967296"),
        ("evaluation.generate.n=1e12", "evaluation.generate.n: input should be less than or equal to 100000000"),
        ("evaluation.generate.n=1", "evaluation.generate.n: input should be greater than or equal to 2"),
        ("training.optimizer.lr=1e300", "training.optimizer.lr: input should be less than or equal to 1000000"),
        ("training.optimizer.lr=.nan", "training.optimizer.lr: input should be a finite number"),
        ("training.optimizer.momentum=1", "training.optimizer.momentum: input should be less than 1"),
        ("training.ema=1", "training.ema: input should be less than 1"),
        ("training.adversary.eps=0", "training.adversary.eps: input should be greater than 0"),
        ("training.adversary.eps=300/255", "training.adversary.eps: input should be less than or equal to 1"),
        ("training.adversary.eps=8/0", "training.adversary.eps: '8/0' is not a number; a number or a fraction such as"),
        ("training.adversary.eps=true", "training.adversary.eps: a number or a fraction such as"),
        ("training.adversary.eps=1e999999999/255", "training.adversary.eps: '1e999999999/255' is not a number; a number or a fraction"),
        ("training.adversary.eps='1e999999999'", "training.adversary.eps: '1e999999999' is not a number"),
        ("training.adversary.eps='8 8/255'", "training.adversary.eps: '8 8/255' is not a number"),
        ("training.epochs=true", "training.epochs: a number is allowed, found True"),
        ("training.batch_size='64'", "training.batch_size: a number is allowed, found '64'"),
        ("training.augment.flip=1", "training.augment.flip: a valid boolean is true or false, found 1"),
        ("seeds=[-1]", "seeds.0: input should be greater than or equal to 0"),
        ("seeds=[]", "seeds: tuple should have at least 1 item"),
        ("experiments.a.b={method: classifier}", "experiments.a.b: unknown key"),
        ("seeds=[0, 0.0]", "seeds: duplicate seed"),
        ("seeds=[1, true]", "seeds.1: a number is allowed, found True"),
        ('seeds=["0"]', "seeds.0: a number is allowed, found '0'"),
        ("data={source: folder, test: null, path: x, size: 1e6}", "data.size: input should be less than or equal to 1024"),
        ("data={source: folder, test: null, path: x, channels: true}", "data.channels: a number is allowed, found True"),
        ('data.root="a\\nb"', "data.root: printable characters on one line are allowed"),
        ("data.root=''", "data.root: string should have at least 1 character"),
    ],
)
def test_values_that_can_never_work_are_refused(override: str, expected: str, refusal: Refusal) -> None:
    assert f"override {override!r}: {expected}" in (text := refusal([override])) or f'override "{override}": {expected}' in text


@given(st.integers(0, 255), st.integers(1, 255))
def test_budgets_as_fractions(a: int, b: int) -> None:
    assert parse_budget(f"{a}/{b}") == a / b == parse_budget(f" {a} / {b} ")


@given(st.dictionaries(st.sampled_from("abc"), st.integers() | st.dictionaries(st.sampled_from("abc"), st.integers())))
def test_merge_leaves_its_arguments_alone(content: dict[str, Any]) -> None:
    before = copy.deepcopy(content)
    merged = merge(content, {"a": {"b": 1}})
    assert content == before
    assert section(merged, "a.b") == flat(merged)["a.b"] == 1
