"""`assay serve` as a stranger meets it: one command, real HTTP, a real worker process, and nothing left running."""

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import world

from proof import attestation
from proof.errors import Malformed
from prover import sidecar
from prover.client import Client, terms

ROOT = Path(__file__).parents[2]
PATIENCE = 30.0


def prepared(data):
    """The API key of a fresh record."""
    command = [sys.executable, "-m", "assay", "init", "--data", str(data), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    return json.loads(done.stdout)["api_key"]


def started(data, *options):
    command = [sys.executable, "-m", "assay", "serve", "--data", str(data), "--port", "0", *options]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    ready = re.fullmatch(r"ready (http://127\.0\.0\.1:\d+) signer (0x[0-9a-f]{40})\n", line)
    assert ready, line
    return process, *ready.groups()


def children(process):
    """Whichever of its threads started them."""
    found = [path.read_text().split() for path in Path(f"/proc/{process.pid}/task").glob("*/children")]
    return [int(pid) for pids in found for pid in pids if alive(pid)]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def until(condition):
    give_up = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.05)


@pytest.mark.skipif(not Path("/proc").exists(), reason="reads /proc")
def test_a_task_is_paid_whatever_is_killed_and_nothing_is_left_running(tmp_path):
    asked = world.small()
    (tmp_path / "model.onnx").write_bytes(asked.source)
    key = prepared(tmp_path / "data")
    process, url, signer = started(tmp_path / "data")
    first = children(process)
    try:
        with Client(url, key=key) as client, Client(url, worker=world.WORKER) as worker:
            model = client.register(tmp_path / "model.onnx")
            order = terms(
                model, "spot", world.REWARD, "0x" + "9a" * 20, int(time.time()) + 600, secrets.token_bytes(32)
            )
            task = client.ask(order, asked.inputs)
            for pid in first:  # Valkey, and the worker processes: others are started
                os.kill(pid, signal.SIGKILL)
            served = sidecar.serve(worker, task, asked.model, lambda inputs: asked.run(inputs=inputs))
            assert served.verdict.verdict == "accepted"
            signed = client.attestation(task)
            attestation.verify(signed, signer)
            assert signed.attestation.amount == world.REWARD.amount
            with Client(url, worker=bytes.fromhex("22" * 32)) as stranger, pytest.raises(Malformed, match="no task"):
                sidecar.serve(stranger, task, asked.model, lambda inputs: asked.run(inputs=inputs))
        until(lambda: httpx.get(f"{url}/readyz").is_success)
        until(lambda: len(children(process)) == 4)  # Valkey, judging, delivering, and what opens models
        second = children(process)
    finally:
        process.kill()
        process.wait(PATIENCE)
    until(lambda: not [pid for pid in second if alive(pid)])

    process, url, again = started(tmp_path / "data", "--workers", "0")
    third = children(process)
    try:
        assert again == signer
        with Client(url, key=key) as client:
            assert client.state(task).stage == "attested"
    finally:
        process.terminate()
        assert process.wait(PATIENCE) == 0
    assert not [pid for pid in third if alive(pid)]
