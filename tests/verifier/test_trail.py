"""What the checks saw: all nodes in order, with the numbers of the verdict, which depends on none of it."""

import json
import zlib
from dataclasses import replace

import decoders
import numpy as np
import pytest
import torch
import world

import gpu.keys
from gpu.ops.call import Measure
from proof.errors import Malformed, Reason
from proof.sampling import drawn
from prover.engines.torch import Recorder as TorchRecorder
from verifier import trail
from verifier.checks import How
from verifier.trail import MAX_ROWS, MAX_TRAIL_BYTES, Trail, unpacked
from verifier.verify import verify

HUGE = 40_000


@pytest.fixture(scope="module")
def honest():
    asked = world.small()
    return asked, asked.prove(asked.run())


def seen(asked, proof):
    watch = Trail()
    verdict = verify(proof, asked.model, world.CHECK_SEED, task=asked.task, watch=watch)
    return verdict, watch, unpacked(watch.packed())


def bent(trace):
    trace["layer1.softmax"] = np.roll(trace["layer1.softmax"], 1, -1)
    return trace


def test_a_verdict_is_the_same_with_and_without_a_watcher(honest):
    asked, proof = honest
    assert seen(asked, proof)[0] == asked.judge(proof)
    lie = asked.prove(bent(asked.run()))
    assert seen(asked, lie)[0] == asked.judge(lie)


def test_every_node_is_seen_in_order_with_the_numbers_of_the_verdict(honest):
    asked, proof = honest
    verdict, _, document = seen(asked, proof)
    nodes = document["nodes"]
    assert [node["name"] for node in nodes] == [node.name for node in asked.model.nodes]
    assert len(nodes) == verdict.nodes_checked
    assert document["left_out"] == 0
    for family, entries in verdict.entries.items():
        own = [node for node in nodes if node["family"] == family]
        assert sum(node["entries"] for node in own) == entries
        assert max(node["ratio"] or 0.0 for node in own) == verdict.largest[family] <= 1
    assert {node["how"] for node in nodes} == {How.CHECKED, How.DERIVED}
    assert max(verdict.largest.values()) > 0


def test_drawn_rows_are_those_of_the_challenge(honest):
    asked, proof = honest
    document = seen(asked, proof)[2]
    softmax = next(node for node in document["nodes"] if node["name"] == "layer0.softmax")
    draw = document["draws"][softmax["draw"]]
    wanted = drawn(world.SEED, 16, 2 * world.HEADS * world.LENGTH)
    assert draw == {"of": 2 * world.HEADS * world.LENGTH, "count": len(wanted), "rows": wanted.tolist()}


def test_a_refused_node_is_the_last_one(honest):
    asked, _ = honest
    verdict, _, document = seen(asked, asked.prove(bent(asked.run())))
    assert verdict.reason == Reason.REEXECUTION
    last = document["nodes"][-1]
    assert (last["name"], last["how"], last["ratio"]) == (verdict.node, How.REFUSED, None)
    assert len(document["nodes"]) == verdict.nodes_checked + 1
    assert How.REFUSED not in [node["how"] for node in document["nodes"][:-1]]


def test_what_fails_before_all_nodes_leaves_an_empty_trail(honest):
    asked, proof = honest
    verdict, _, document = seen(replace(asked, nonce=bytes([7] * 32)), proof)
    assert verdict.reason == Reason.BINDING
    assert document["nodes"] == []
    assert document["seconds"] == {}


def test_tensors_that_nobody_committed_to_are_replayed(tmp_path):
    torch.manual_seed(3)
    network, statement = decoders.llama(tmp_path, layers=1)
    asked = {
        "prompt": np.arange(3, 9),
        "temperature": np.float32(0.8),
        "top_k": np.int64(0),
        "top_p": np.float32(1),
        "seed": np.zeros(32, np.uint8),
        "max_tokens": np.int64(2),
    }
    inputs = {name: np.asarray(value) for name, value in asked.items()}
    subject = world.World(b"", statement, inputs, policy="standard+torch-eager+boundary")
    proof = subject.prove(TorchRecorder(network, statement).generate(inputs))
    how = {node["name"]: node["how"] for node in seen(subject, proof)[2]["nodes"]}
    assert how["layers.0.gate"] == How.REPLAYED
    assert how["layers.0.output"] == How.CHECKED


def test_under_a_key_no_residual_is_written_down(honest):
    asked, proof = honest
    key, watch = gpu.keys.make(asked.model, bytes(32)), Trail()
    verdict = verify(proof, key.model, world.CHECK_SEED, task=asked.task, key=key, watch=watch)
    nodes = unpacked(watch.packed())["nodes"]
    assert verdict.verdict == "accepted"
    assert {node["ratio"] for node in nodes} == {None}
    assert sum(node["how"] == How.KEYED for node in nodes) == len(key.roles)


def test_seconds_are_told_by_family_and_step(honest):
    _, watch, document = seen(*honest)
    seconds = watch.seconds_by_family()
    families = {node["family"] for node in document["nodes"]}
    assert seconds.keys() == families | {"openings"} == document["seconds"].keys()
    assert min(seconds.values()) > 0


def test_a_number_that_is_none_is_left_out(honest):
    node, watch = honest[0].model.nodes[0], Trail()
    for ratio in (float("nan"), float("inf"), 0.5):
        watch.saw(node, How.CHECKED, Measure(1, ratio), np.zeros(0, np.int64), 0)
    assert [line["ratio"] for line in unpacked(watch.packed())["nodes"]] == [None, None, 0.5]


def test_of_too_many_nodes_the_middle_is_left_out(honest):
    node, watch = honest[0].model.nodes[0], Trail()
    for i in range(HUGE):
        watch.saw(replace(node, index=i, name=f"n{i:0200}"), How.CHECKED, None, np.zeros(0, np.int64), 0)
    packed = watch.packed()
    document = unpacked(packed)
    indices = [line["index"] for line in document["nodes"]]
    gap = np.flatnonzero(np.diff(indices) > 1)
    assert indices[0] == 0
    assert indices[-1] == HUGE - 1
    assert len(gap) == 1
    assert document["left_out"] == HUGE - len(indices) == indices[gap[0] + 1] - indices[gap[0]] - 1
    assert MAX_TRAIL_BYTES // 2 < len(zlib.decompress(packed)) <= MAX_TRAIL_BYTES


def test_of_a_draw_the_first_rows_are_kept_and_equal_draws_once(honest):
    node, watch = honest[0].model.nodes[0], Trail()
    for rows in (np.arange(1000), np.arange(1000), np.arange(3)):
        watch.saw(node, How.CHECKED, None, rows, 2000)
    document = unpacked(watch.packed())
    assert [line["draw"] for line in document["nodes"]] == [0, 0, 1]
    assert document["draws"][0] == {"of": 2000, "count": 1000, "rows": list(range(MAX_ROWS))}


def test_all_draws_have_room(honest):
    node, watch = honest[0].model.nodes[0], Trail()
    for i in range(2 * trail.MAX_DRAWS):
        watch.saw(node, How.CHECKED, None, np.arange(MAX_ROWS) + 2**62 + i, 2**63 - 1)
    packed = watch.packed()
    assert len(unpacked(packed)["draws"]) == trail.MAX_DRAWS
    assert len(zlib.decompress(packed)) < trail.ROOM


BROKEN = {
    "not deflated": b"{}",
    "not JSON": zlib.compress(b"{"),
    "not an object": zlib.compress(b"[]"),
    "no nodes": zlib.compress(b"{}"),
    "short line": zlib.compress(json.dumps({"nodes": [[1]]}).encode()),
    "larger than the bound": zlib.compress(bytes(MAX_TRAIL_BYTES + 1)),
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN)
def test_only_a_trail_is_unpacked(data):
    with pytest.raises(Malformed):
        unpacked(data)
