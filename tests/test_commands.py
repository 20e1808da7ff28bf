"""The commands as a stranger runs them: files in, files out, exit codes, JSON."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import world

from proof import bundle
from prover import cheats

ACCEPTED, REJECTED, MALFORMED = 0, 1, 2


def assay(*arguments: object, expect: int = ACCEPTED) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "assay", *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == expect, done.stderr[-2000:] + done.stdout[-2000:]
    return done.stdout if expect != MALFORMED else done.stderr


class Folder:
    """Paths of one offline proof."""

    def __init__(self, path: Path) -> None:
        self.model, self.inputs, self.trace = path / "model.onnx", path / "in.safetensors", path / "trace.safetensors"
        self.commitment, self.challenge = path / "commitment.json", path / "challenge.json"
        self.proof = path / "proof.safetensors"

    def prove(self, policy: str = "standard") -> None:
        assay("commit", self.model, self.trace, "--out", self.commitment)
        assay("challenge", self.commitment, "--policy", policy, "--out", self.challenge, "--seed", world.SEED.hex())
        assay("open", self.model, self.trace, self.challenge, "--out", self.proof)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    files = Folder(tmp_path)
    subject = world.small()
    files.model.write_bytes(subject.source)
    bundle.write(files.inputs, subject.inputs.items(), {})
    assay("run", files.model, files.inputs, "--trace", files.trace)
    return files


def test_show_names_what_there_is_to_check(folder):
    report = json.loads(assay("model", "show", folder.model, "--json"))
    assert report["model"] == world.small().model.id.hex()
    assert report["nodes"] == len(world.small().model.nodes) == sum(report["families"].values())
    assert report["verifiable"] is True


def test_show_says_why_a_model_cannot_be_verified(folder):
    node = onnx.helper.make_node("RandomNormalLike", ["x"], ["y"], "dice")
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2]) for name in "xy"]
    graph = onnx.helper.make_graph([node], "g", ends[:1], ends[1:])
    onnx.save(onnx.helper.make_model(graph), folder.model)
    report = json.loads(assay("model", "show", folder.model, "--json", expect=REJECTED))
    assert (report["verifiable"], report["families"]) == (False, {"none": 1})
    assert "RandomNormalLike node 'dice'" in report["refusal"]


def test_a_trace_holds_the_inputs_and_every_node_output(folder):
    trace = bundle.read(folder.trace).tensors
    nodes = world.small().model.nodes
    assert set(trace) == {"ids"} | {name for node in nodes for name in node.outputs}


def test_an_honest_proof_is_accepted_with_what_it_covers(folder):
    folder.prove()
    verdict = json.loads(assay("verify", folder.model, folder.proof, "--json", "--seed", world.CHECK_SEED.hex()))
    assert verdict["verdict"] == "accepted"
    assert verdict["nodes_checked"] == verdict["nodes_total"] == len(world.small().model.nodes)
    assert (verdict["policy"], verdict["rows"]) == ("standard", 16)
    assert verdict["misses"]["0.5"] == 0.5**16
    assert (verdict["reason"], verdict["node"]) == (None, None)


@pytest.mark.parametrize("policy", ["spot", "full"])
def test_a_tampered_trace_is_rejected_at_its_node(folder, policy):
    trace = dict(bundle.read(folder.trace).tensors)
    bundle.write(folder.trace.with_name("bent"), cheats.bent(trace, "layer1.mixed", np.zeros_like).items(), {})
    folder.trace = folder.trace.with_name("bent")
    folder.prove(policy)
    verdict = json.loads(assay("verify", folder.model, folder.proof, "--json", expect=REJECTED))
    assert verdict["verdict"] == "rejected"
    assert verdict["node"] == "layer1.mixed"
    assert verdict["reason"] in {"freivalds", "reexecution"}


def test_verify_draws_its_own_seed(folder):
    folder.prove()
    seeds = {json.loads(assay("verify", folder.model, folder.proof, "--json"))["check_seed"] for _ in range(2)}
    assert len(seeds) == 2


@pytest.mark.parametrize("name", ["model", "proof"])
def test_bytes_that_are_no_file_of_ours_are_malformed(folder, name):
    folder.prove()
    getattr(folder, name).write_bytes(b"not this")
    assert "assay:" in assay("verify", folder.model, folder.proof, expect=MALFORMED)


def test_usage_errors_are_malformed(folder):
    assay("challenge", folder.model, "--out", folder.challenge, expect=MALFORMED)
    assay("verify", folder.model, folder.model.with_name("absent"), expect=MALFORMED)
    folder.prove()
    assay("verify", folder.model, folder.proof, "--seed", "abc", expect=MALFORMED)


def test_a_trace_that_lacks_a_tensor_is_named(folder):
    trace = dict(bundle.read(folder.trace).tensors)
    del trace["layer0.softmax"]
    short = folder.trace.with_name("short")
    bundle.write(short, trace.items(), {})
    assert "layer0.softmax" in assay("commit", folder.model, short, "--out", folder.commitment, expect=MALFORMED)


def test_another_trace_cannot_answer_the_challenge(folder):
    folder.prove()
    trace = cheats.bent(dict(bundle.read(folder.trace).tensors), "logits", np.zeros_like)
    other = folder.trace.with_name("other")
    bundle.write(other, trace.items(), {})
    assert "another commitment" in assay(
        "open", folder.model, other, folder.challenge, "--out", folder.proof, expect=MALFORMED
    )


def test_the_demo_pays_the_honest_worker_and_nobody_else(tmp_path):
    result = json.loads(assay("demo", "--json", "--out", tmp_path / "demo"))
    assert result["ok"] is True
    assert [row["verdict"] for row in result["honest"]] == ["accepted"] * 2
    assert len(result["cheats"]) >= 8
    assert all(row["verdict"] in {"rejected", "refused"} and row["reason"] for row in result["cheats"])
    assert all(int(paid["amount"]) > 0 for paid in result["paid"])
    shown = json.loads(assay("verify", result["model"], tmp_path / "demo" / "honest.safetensors", "--json"))
    assert shown["verdict"] == "accepted"
    assert shown["task"] is not None
