"""Policies: what they open, what they miss, and that their bits are bound."""

import pytest

from proof.errors import Malformed
from proof.policy import POLICIES, Policy, policy


def test_the_named_policies_open_4_16_and_all_rows():
    amounts = {"spot": (4, 1), "standard": (16, 1), "full": (None, None)}
    assert {name: (rules.rows, rules.heads) for name, rules in POLICIES.items() if "+" not in name} == amounts


def test_a_name_says_strength_and_commitment():
    assert len(POLICIES) == 3 * (1 + 2 * 2)
    strict = policy("spot+torch-sdpa+boundary")
    assert (strict.rows, strict.profile, strict.boundary) == (4, "torch-sdpa", True)
    assert (policy("spot").profile, policy("spot").boundary) == (None, False)


def test_a_policy_that_nobody_knows_is_malformed():
    with pytest.raises(Malformed, match="spot, spot"):
        policy("lenient")


def test_misses_are_the_chance_to_open_no_wrong_row():
    assert policy("spot").misses(0.5) == 0.5**4
    assert policy("standard").misses(0.1) == pytest.approx(0.9**16)
    assert policy("standard").misses(0.0) == 1.0
    assert policy("full").misses(0.01) == 0.0
    assert policy("full").misses(0.0) == 1.0


def test_the_report_names_every_fraction():
    assert list(policy("spot").report()) == ["0.01", "0.05", "0.1", "0.25", "0.5", "1.0"]
    assert policy("spot").report()["1.0"] == 0.0


def test_soundness_never_falls_when_rows_rise():
    bits = [Policy("p", rows).soundness_bits for rows in (*range(1, 64), None)]
    assert bits == sorted(bits)
    bits = {"spot": 4, "standard": 16, "full": 20}
    assert all(rules.soundness_bits == bits[name.partition("+")[0]] for name, rules in POLICIES.items())


def test_every_parameter_is_bound_by_the_hash():
    variants = [
        Policy("p", 4),
        Policy("q", 4),
        Policy("p", None),
        Policy("p", 4, heads=1),
        Policy("p", 4, profile="torch-eager"),
        Policy("p", 4, boundary=True),
        Policy("p", 4, challenges=7),
        Policy("p", 4, entries=255),
        Policy("p", 4, delta_bits=41),
    ]
    assert len({variant.hash() for variant in variants}) == len(variants)
