"""Flat names of results: made and taken apart, one the inverse of the other."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebjdat.names import ResultName, flat_name, flat_results, take_apart

PROTOCOLS = ("standard", "released", "standard_l2", "released_l2")  # some begin like another
NAMES = {
    "clean_acc": ResultName("acc", "clean"),
    "released_pgd20_acc": ResultName("acc", "pgd20", "released"),
    "pgd20_acc_first_n": ResultName("acc_first_n", "pgd20"),
    "ema_standard_l2_after_fab_t_correct": ResultName("correct", "after_fab_t", "standard_l2", averaged=True),
    "standard_l2_n_targets": ResultName("n_targets", "", "standard_l2"),
    "ema_released_energy_ce_alone_share_low": ResultName("alone_share_low", "energy_ce", "released", averaged=True),
    "autoattack_warnings": ResultName("warnings", "autoattack"),
    "ema_frechet": ResultName("frechet", averaged=True),
    "energy_clean": ResultName("energy_clean"),
    "other_clean_acc": ResultName("other_clean_acc"),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_taken_apart_and_made_again(name: str) -> None:
    parts = take_apart(name, PROTOCOLS)
    assert parts == NAMES[name]
    assert flat_name(**vars(parts)) == name


@given(
    averaged=st.booleans(),
    protocol=st.sampled_from(PROTOCOLS),
    attack=st.sampled_from(("pgd7", "autoattack", "after_apgd_t", "after_fab")),
    statistic=st.from_regex(r"[a-z][a-z_]{0,8}", fullmatch=True),
)
def test_any_name_of_an_attack_survives_the_round_trip(averaged: bool, protocol: str, attack: str, statistic: str) -> None:
    assert take_apart(flat_name(statistic, attack, protocol, averaged), PROTOCOLS) == ResultName(statistic, attack, protocol, averaged)


def test_nested_results_become_flat() -> None:
    nested = {"standard": {"": {"n_test": 5}, "clean": {"acc": 0.5}}, "released": {"pgd20": {"acc": 0.25, "correct": 1}}}
    assert flat_results(nested) == {"n_test": 5, "clean_acc": 0.5, "released_pgd20_acc": 0.25, "released_pgd20_correct": 1}
    assert flat_results(nested, averaged=True).keys() == {
        "ema_n_test",
        "ema_clean_acc",
        "ema_released_pgd20_acc",
        "ema_released_pgd20_correct",
    }
