"""A service as workers and protocols use it with arrays and files: models, tasks, commitments, proofs, bundles."""

import base64
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import onnx
from blake3 import blake3
from onnx import external_data_helper

from proof import bundle
from proof.attestation import SignedAttestation
from proof.errors import Unavailable
from proof.graph import dtype_name
from proof.messages import Challenge, Commitment, Reward, Task, Verdict
from proof.requests import Action
from prover.calls import Purpose, Service, at

Array = npt.NDArray[Any]
POLL = 0.02  # seconds between two looks at what follows at once


class Client(Service):
    """One service. Use as a context manager, with an API key or with a worker's private key."""

    def register(self, model: Path) -> bytes:
        """Upload an ONNX model and the files that hold its weights, if any lie outside it; returns its id.

        Raises Malformed naming the op that cannot be checked.
        """
        proto = onnx.load(model, load_external_data=False)
        outside = [tensor for tensor in proto.graph.initializer if external_data_helper.uses_external_data(tensor)]
        files = {external_data_helper.ExternalDataInfo(tensor).location for tensor in outside}
        digests = {location: self._weights(model.parent / location) for location in sorted(files)}
        for entry in (entry for tensor in outside for entry in tensor.external_data if entry.key == "location"):
            entry.value = digests[entry.value]
        content = proto.SerializeToString() if outside else model.read_bytes()
        answer = self.call("POST", "/v1/models", content=content, headers=_BINARY, timeout=None)
        return bytes.fromhex(answer.json()["model"])

    def _weights(self, path: Path) -> str:
        """Upload a file of weights unless the service has it; returns its digest."""
        digest = blake3().update_mmap(path).hexdigest()
        if self.send("GET", f"/v1/weights/{digest}").status_code == httpx.codes.NOT_FOUND:
            self.call("PUT", f"/v1/weights/{digest}", content=path, headers=_BINARY, timeout=None)
        return digest

    def signer(self) -> str:
        """The address that signs this service's attestations, as it says; compare it with the one you were told."""
        return str(self.about()["signer"])

    def ask(self, terms: "Terms", inputs: Mapping[str, Array], worker: str | None = None) -> bytes:
        """Post a task with its inputs, for one worker or for whoever is first; returns the task's id."""
        return self.post(body(terms, inputs, worker)).id

    def task(self, task: bytes) -> Task:
        return self.state(task).task

    def inputs(self, task: bytes, folder: Path) -> dict[str, Array]:
        """The task's input tensors, kept in a file under `folder`."""
        return self._tensors(task, "inputs", folder)

    def outputs(self, task: bytes, folder: Path) -> dict[str, Array]:
        """The proven output tensors of an accepted task."""
        return self._tensors(task, "outputs", folder)

    def commit(self, task: bytes, commitment: Commitment, reward: Reward) -> Challenge:
        """Send a signed commitment; the answer is the challenge. Raises Conflict if another stands."""
        purpose = Purpose(Action.COMMIT, task, commitment.digest(), reward)
        answer = self.call("POST", f"{at(task)}/commitment", json=commitment.to_json(), purpose=purpose)
        return Challenge.from_json(answer.json())

    def upload(self, task: bytes, proof: Path, reward: Reward) -> None:
        """Send the proof file under the signature of the worker that committed."""
        purpose = Purpose(Action.PROVE, task, bundle.file_digest(proof), reward)
        self.call("PUT", f"{at(task)}/proof", content=proof, headers=_BINARY, timeout=None, purpose=purpose)

    def verdict(self, task: bytes, wait: float = 60.0) -> Verdict:
        """The verdict, waiting up to `wait` seconds for it. Raises Unavailable when there is none by then."""
        until = time.monotonic() + wait
        while True:
            left = max(0, int(until - time.monotonic()))
            headers = {"Prefer": f"wait={min(left, 20)}"}
            answer = self.send("GET", f"{at(task)}/verdict", purpose=Purpose(Action.READ, task), headers=headers)
            if answer.status_code != httpx.codes.NOT_FOUND:
                break
            if not left:
                raise Unavailable(f"no verdict of task {task.hex()} after {wait:.0f} s")
            time.sleep(POLL)
        answer = self.call("GET", f"{at(task)}/verdict", purpose=Purpose(Action.READ, task))
        return Verdict.from_json(answer.json())

    def attestation(self, task: bytes, wait: float = 60.0) -> SignedAttestation:
        """The signed attestation with which a task ends. Raises Unavailable when there is none after `wait` seconds."""
        self.settled(task, wait)
        answer = self.call("GET", f"{at(task)}/attestation", purpose=Purpose(Action.READ, task))
        return SignedAttestation.from_json(answer.json())

    def bundle(self, task: bytes, path: Path) -> None:
        """Keep everything an auditor needs in one file."""
        self._download(task, "bundle", path)

    def _tensors(self, task: bytes, what: str, folder: Path) -> dict[str, Array]:
        path = folder / f"{task.hex()}.{what}.safetensors"
        self._download(task, what, path)
        return dict(bundle.read(path).tensors)

    def _download(self, task: bytes, what: str, path: Path) -> None:
        with self.stream(f"{at(task)}/{what}", Purpose(Action.READ, task)) as answer, path.open("wb") as file:
            for part in answer.iter_bytes():
                file.write(part)


Terms = dict[str, Any]
_BINARY = {"Content-Type": "application/octet-stream"}


def terms(model: bytes, policy: str, reward: Reward, payer: str, deadline: int, nonce: bytes) -> Terms:
    """What a task asks for and pays, as the API takes it; `deadline` in unix seconds."""
    return {
        "model": model.hex(),
        "policy": policy,
        "reward": reward.to_json(),
        "payer": payer,
        "deadline": deadline,
        "nonce": nonce.hex(),
    }


def body(terms: Terms, inputs: Mapping[str, Array], worker: str | None = None) -> dict[str, Any]:
    """The task as it is posted."""
    assigned = {"worker": worker} if worker else {}
    return terms | assigned | {"inputs": {name: _tensor(array) for name, array in inputs.items()}}


def _tensor(array: Array) -> dict[str, Any]:
    data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
    return {"dtype": dtype_name(array.dtype), "shape": list(array.shape), "data": data}
