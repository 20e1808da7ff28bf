"""The decode rule: what it chooses, that a worker cannot choose otherwise, and where an answer ends."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu.decoding import Settings, admitted, choose
from gpu.ops.registry import REGISTRY
from proof.errors import Malformed, Reason, Rejected
from proof.policy import policy
from proof.sampling import gumbels
from tests.gpu.nodes import BF16, Case, accepted_forgeries, assembled, check, sampled

DOMAIN, OP = "assay", "Decode"
ANSWER, END = 1, 0
SEED = bytes(range(32))
GREEDY = Settings(0.0, 0, 1.0, SEED, 99)


def given_inputs(temperature=0.0, top_k=0, top_p=1.0, seed=SEED, max_tokens=99):
    return {
        "temperature": np.float32(temperature).reshape(()),
        "top_k": np.int64(top_k).reshape(()),
        "top_p": np.float32(top_p).reshape(()),
        "seed": np.frombuffer(seed, np.uint8),
        "max_tokens": np.int64(max_tokens).reshape(()),
    }


def case(rng, count, vocabulary=50, **asked):
    """A node and an honest answer of `count` tokens, the last one ending it."""
    logits = (3 * rng.standard_normal((count, vocabulary))).astype(BF16)
    logits[:, END] = -40
    logits[-1, END] = 40
    inputs = given_inputs(**asked)
    settings = Settings.of(inputs)
    answer = np.array([choose(row, settings, i) for i, row in enumerate(logits)], np.int64)
    arrays = [logits, answer, *(inputs[name] for name in ("temperature", "top_k", "top_p", "seed", "max_tokens"))]
    return Case(OP, arrays, {"eos": [END]}, domain=DOMAIN)


def worker_of(bent):
    return assembled(bent, [bent.inputs[ANSWER].reshape(-1, 1)])


def judged(bent, count=None):
    worker = worker_of(bent)
    return check(REGISTRY[DOMAIN, OP], worker, sampled(worker, np.random.default_rng(0), count))


def with_inputs(honest, **changed):
    names = ("logits", "answer", "temperature", "top_k", "top_p", "seed", "max_tokens")
    arrays = [changed.get(name, array) for name, array in zip(names, honest.inputs, strict=True)]
    return Case(OP, arrays, honest.attributes, domain=DOMAIN)


@pytest.mark.parametrize("asked", [{}, {"temperature": 0.7}, {"temperature": 1.2, "top_k": 7, "top_p": 0.9}])
def test_an_honest_answer_passes_and_no_forgery_of_it(asked):
    worker = worker_of(case(np.random.default_rng(1), 12, **asked))
    rng = np.random.default_rng(2)
    assert check(REGISTRY[DOMAIN, OP], worker, sampled(worker, rng, None)).entries == 12
    assert accepted_forgeries_of(worker, rng) == []


def accepted_forgeries_of(worker, rng):
    return accepted_forgeries(REGISTRY[DOMAIN, OP], worker, rng)


LIES = {
    "another token": lambda c, rng: with_inputs(c, answer=bent(c.inputs[1], 3, lambda t: t % 49 + 1)),
    "another temperature": lambda c, rng: with_inputs(c, temperature=np.float32(2.5).reshape(())),
    "another seed": lambda c, rng: with_inputs(c, seed=np.zeros(32, np.uint8)),
    "another top-k": lambda c, rng: with_inputs(c, top_k=np.int64(1).reshape(())),
    "positions shifted": lambda c, rng: with_inputs(
        c, logits=np.roll(c.inputs[0], 1, 0), answer=np.append(np.roll(c.inputs[1], 1)[:-1], END)
    ),
    "goes on after its end": lambda c, rng: with_inputs(c, answer=bent(c.inputs[1], 5, lambda t: END)),
    "longer than allowed": lambda c, rng: with_inputs(c, max_tokens=np.int64(11).reshape(())),
    "ends too early": lambda c, rng: with_inputs(c, logits=c.inputs[0][:-1], answer=c.inputs[1][:-1]),
    "a token that does not exist": lambda c, rng: with_inputs(c, answer=bent(c.inputs[1], 2, lambda t: 10**6)),
    "a negative token": lambda c, rng: with_inputs(c, answer=bent(c.inputs[1], 2, lambda t: -1)),
}


def bent(array, at, change):
    array = array.copy()
    array[at] = change(array[at])
    return array


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_no_lie_passes(lie):
    rng = np.random.default_rng(3)
    honest = case(rng, 12, temperature=0.8)
    judged(honest)
    with pytest.raises(Rejected) as rejection:
        judged(lie(honest, rng))
    assert rejection.value.reason is Reason.REEXECUTION


def test_tokens_that_were_not_fed_back_are_refused_wherever_they_stand():
    honest = case(np.random.default_rng(4), 30)
    rows = (np.array([2]),)
    worker = assembled(honest, [bent(honest.inputs[ANSWER], 20, lambda t: t + 1).reshape(-1, 1)])
    with pytest.raises(Rejected, match="fed back"):
        check(REGISTRY[DOMAIN, OP], worker, rows)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_row_that_is_not_finite_is_refused(value):
    honest = case(np.random.default_rng(5), 4)
    logits = honest.inputs[0].copy()
    logits[1, 7] = value
    with pytest.raises(Rejected) as rejection:
        judged(with_inputs(honest, logits=logits))
    assert rejection.value.reason is Reason.NONFINITE


NONSENSE = [{"temperature": -1.0}, {"temperature": np.nan}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}]


@pytest.mark.parametrize("asked", [*NONSENSE, {"max_tokens": 0}, {"temperature": np.inf}])
def test_settings_without_a_meaning_are_malformed(asked):
    with pytest.raises(Malformed, match="temperature"):
        Settings.of(given_inputs(**asked))
    honest = case(np.random.default_rng(6), 3)
    with pytest.raises(Rejected) as rejection:
        judged(with_inputs(honest, **{name: given_inputs(**asked)[name] for name in asked}))
    assert rejection.value.reason is Reason.INPUT


def test_greedy_takes_the_first_of_equals_and_admits_the_others():
    row = np.array([1.0, 5.0, 2.0, 5.0], np.float32)
    assert choose(row, GREEDY, 0) == 1
    assert admitted(row, GREEDY, 0).tolist() == [1, 3]


def test_four_rows_are_drawn_for_each_of_a_policy_and_the_last_one():
    site = worker_of(case(np.random.default_rng(8), 4000)).site
    rows = REGISTRY[DOMAIN, OP].sample(site, policy("spot"), SEED)
    assert 12 < len(rows) <= 17
    assert rows[-1] == 3999
    assert len(REGISTRY[DOMAIN, OP].sample(site, policy("full"), SEED)) == 4000


def test_a_tie_is_counted():
    honest = case(np.random.default_rng(7), 3)
    logits = honest.inputs[0].copy()
    logits[0] = -40
    logits[0, [4, 9]] = 20
    for token in (4, 9):
        tied = with_inputs(honest, logits=logits, answer=bent(honest.inputs[1], 0, lambda _, token=token: token))
        assert judged(tied).ambiguous == 1


def test_samples_have_the_distribution_of_the_softmax():
    row, settings = np.log(np.array([0.1, 0.2, 0.3, 0.4])), Settings(1.0, 0, 1.0, SEED, 9)
    counts = Counter(choose(row, settings, position) for position in range(20_000))
    assert [counts[i] / 20_000 for i in range(4)] == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.015)


def test_top_k_and_top_p_cut_what_they_say():
    row = np.log(np.array([0.05, 0.4, 0.3, 0.25]))
    drawn = {name: set() for name in ("k", "p")}
    for position in range(500):
        drawn["k"].add(choose(row, Settings(1.0, 2, 1.0, SEED, 9), position))
        drawn["p"].add(choose(row, Settings(1.0, 0, 0.69, SEED, 9), position))
    assert drawn == {"k": {1, 2}, "p": {1, 2}}


def test_gumbels_are_minus_log_of_minus_log_of_uniforms():
    drawn = gumbels(SEED, "label", 100_000)
    assert drawn.mean() == pytest.approx(0.5772156649, abs=0.02)
    assert drawn.var() == pytest.approx(np.pi**2 / 6, abs=0.05)
    assert np.array_equal(gumbels(SEED, "label", 10), drawn[:10])
    assert not np.array_equal(gumbels(bytes(32), "label", 10), drawn[:10])


@given(st.integers(0, 40), st.floats(0.05, 1.0), st.integers(0, 2**31), st.sampled_from([0.0, 0.3, 1.0, 2.0]))
def test_the_chosen_token_is_admitted(top_k, top_p, number, temperature):
    row = np.random.default_rng(number).standard_normal(40).astype(np.float16)
    settings = Settings(temperature, top_k, top_p, SEED, 9)
    choices = admitted(row, settings, number)
    assert choose(row, settings, number) in choices
    assert len(choices) <= (top_k or 40) or temperature == 0
