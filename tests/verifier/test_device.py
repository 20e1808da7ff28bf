"""A device changes no verdict: it clears what the reference accepts, and the reference judges the rest."""

from dataclasses import replace

import numpy as np
import pytest
import world
from host_device import HostDevice

from gpu.clearing.stand import Shelf, Stand, shelf_of
from gpu.ops.call import Tensor
from proof.errors import Reason
from proof.graph import Spec
from verifier.verify import verify


@pytest.fixture(scope="module")
def shelf():
    return shelf_of(HostDevice())


def bent(name, change):
    def bend(trace):
        values = trace[name].copy()
        change(values)
        return {**trace, name: values}

    return bend


LIES = {
    "an honest run": lambda trace: trace,
    "one entry of a product": bent("layer0.q", lambda v: v.__setitem__((1, 11, 3), v[1, 11, 3] + 1)),
    "zeros for a product": bent("layer1.wide", lambda v: v.fill(0)),
    "a NaN": bent("layer0.attended", lambda v: v.__setitem__((0, 11, 0), np.nan)),
    "other probabilities": bent("layer1.softmax", lambda v: v.__imul__(0.99)),
    "a norm left out": bent("layer0.normed", lambda v: v.__imul__(1.001)),
    "rows swapped": bent("logits", lambda v: v.__setitem__(slice(None), v[::-1].copy())),
}


@pytest.mark.parametrize("policy", ["spot", "standard", "full"])
@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_verdicts_are_the_same_with_and_without_a_device(shelf, policy, lie):
    subject = replace(world.small(), policy=policy)
    proof = subject.prove(lie(subject.run()))
    alone = subject.judge(proof)
    beside = verify(proof, subject.model, world.CHECK_SEED, task=subject.task, shelf=shelf)
    assert beside.largest == pytest.approx(alone.largest, rel=1e-3)
    assert replace(beside, largest=alone.largest) == alone
    assert (alone.reason is None) == (lie is LIES["an honest run"])


def test_rows_that_lead_to_no_root_are_refused_by_their_digests_on_the_device(shelf):
    subject = world.small()
    proof = subject.prove(subject.run())
    opening = proof.openings["logits"]
    rows = opening.rows.copy()
    rows[0, 0] += 1
    lie = replace(proof, openings={**proof.openings, "logits": replace(opening, rows=rows)})
    verdict = verify(lie, subject.model, world.CHECK_SEED, task=subject.task, shelf=shelf)
    assert verdict.reason is Reason.OPENING


class Full(HostDevice):
    """A device with room for so many arrays."""

    def __init__(self, arrays):
        super().__init__()
        self.left = arrays

    def empty(self, shape, dtype):
        self.left -= 1
        if self.left < 0:
            raise MemoryError("out of memory")
        return super().empty(shape, dtype)


@pytest.mark.parametrize("arrays", [1, 5, 40, 60, 90])
def test_a_device_that_is_full_changes_no_verdict(arrays):
    subject = replace(world.small(), policy="full")
    proof = subject.prove(subject.run())
    beside = verify(proof, subject.model, world.CHECK_SEED, task=subject.task, shelf=Shelf(Full(arrays), 1e9))
    assert replace(beside, largest={}) == replace(subject.judge(proof), largest={})


def test_a_shelf_keeps_one_copy_and_drops_the_oldest_beyond_its_budget():
    device, arrays = HostDevice(), [np.full(100, i, np.uint8) for i in range(4)]
    shelf = Shelf(device, 250)
    first = shelf.get(arrays[0])
    assert shelf.get(arrays[0]) is first
    shelf.get(arrays[1])
    assert shelf.get(arrays[0]) is first
    shelf.get(arrays[2])  # drops the second, which was used longest ago
    assert shelf.get(arrays[0]) is first
    assert (device.numpy(shelf.get(arrays[1])) == 1).all()


def test_a_row_that_was_not_opened_is_no_row_of_the_device():
    stand = Stand(Shelf(HostDevice(), 1e9), 1)
    tensor = Tensor(Spec(np.dtype(np.float32), (5, 2)), np.zeros((2, 2), np.float32), np.array([1, 3]))
    assert stand.places(tensor, np.array([3, 1, 3])).tolist() == [1, 0, 1]
    with pytest.raises(KeyError):
        stand.places(tensor, np.array([2]))
