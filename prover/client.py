"""The calls to the API, for protocols and workers. Problems become the failures they stand for.

Repeating any call is safe: the service identifies tasks, commitments and proofs by their content.
"""

import base64
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import numpy as np
import numpy.typing as npt
import onnx
from blake3 import blake3
from onnx import external_data_helper

from proof import bundle
from proof.attestation import SignedAttestation, sign_upload
from proof.errors import Conflict, Failure, Malformed, Unavailable
from proof.graph import dtype_name
from proof.messages import Challenge, Commitment, Reward, Task, Verdict

TIMEOUT = 60.0  # seconds for one call; uploads get none
POLL = 0.05  # seconds between two looks at a task
MAX_PROBLEM = 2000  # characters of a problem's detail

Array = npt.NDArray[Any]


class Client:
    """One service. Use as a context manager."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=url, timeout=TIMEOUT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._http.close()

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
        answer = self._call("POST", "/v1/models", content=content, headers=_BINARY, timeout=None)
        return bytes.fromhex(answer.json()["model"])

    def _weights(self, path: Path) -> str:
        """Upload a file of weights unless the service has it; returns its digest."""
        digest = blake3().update_mmap(path).hexdigest()
        found = self._send("GET", f"/v1/weights/{digest}")
        if found.status_code == httpx.codes.NOT_FOUND:
            with path.open("rb") as file:
                self._call("PUT", f"/v1/weights/{digest}", content=file, headers=_BINARY, timeout=None)
        else:
            _checked(found)
        return digest

    def signer(self) -> str:
        """The address that signs this service's attestations, as it says; compare it with the one you were told."""
        return str(self._call("GET", "/").json()["signer"])

    def post(self, terms: "Terms", inputs: Mapping[str, Array]) -> bytes:
        """Post a task with its inputs; returns the task's id."""
        body = terms | {"inputs": {name: _tensor(array) for name, array in inputs.items()}}
        return bytes.fromhex(self._call("POST", "/v1/tasks", json=body).json()["id"])

    def task(self, task: bytes) -> Task:
        return Task.from_json(self._task(task)["task"])

    def stage(self, task: bytes) -> str:
        return str(self._task(task)["stage"])

    def check_seconds(self, task: bytes) -> float | None:
        """How long the service's check took; None before the verdict."""
        seconds = self._task(task)["check_seconds"]
        return None if seconds is None else float(seconds)

    def inputs(self, task: bytes, folder: Path) -> dict[str, Array]:
        """The task's input tensors, kept in a file under `folder`."""
        return self._tensors(f"{_at(task)}/inputs", folder / f"{task.hex()}.inputs.safetensors")

    def outputs(self, task: bytes, folder: Path) -> dict[str, Array]:
        """The proven output tensors of an accepted task."""
        return self._tensors(f"{_at(task)}/outputs", folder / f"{task.hex()}.outputs.safetensors")

    def commit(self, task: bytes, commitment: Commitment) -> Challenge:
        """Send a signed commitment; the answer is the challenge. Raises Conflict if another stands."""
        answer = self._call("POST", f"{_at(task)}/commitment", json=commitment.to_json())
        return Challenge.from_json(answer.json())

    def upload(self, task: bytes, proof: Path, commitment: bytes, reward: Reward, key: bytes) -> None:
        """Send the proof file under the signature of the worker that committed."""
        signature = sign_upload(task, commitment, bundle.file_digest(proof), reward, key)
        headers = _BINARY | {"Assay-Signature": "0x" + signature.hex()}
        with proof.open("rb") as file:
            self._call("PUT", f"{_at(task)}/proof", content=file, headers=headers, timeout=None)

    def verdict(self, task: bytes, wait: float = 60.0) -> Verdict:
        """The verdict, waiting up to `wait` seconds for it. Raises Unavailable when there is none by then."""
        return Verdict.from_json(self._awaited(task, "verdict", wait))

    def attestation(self, task: bytes, wait: float = 10.0) -> SignedAttestation:
        """The signed attestation that follows a verdict. Raises Unavailable when there is none after `wait` seconds."""
        return SignedAttestation.from_json(self._awaited(task, "attestation", wait))

    def bundle(self, task: bytes, path: Path) -> None:
        """Keep everything an auditor needs in one file."""
        self._download(f"{_at(task)}/bundle", path)

    def _awaited(self, task: bytes, what: str, wait: float) -> object:
        until = time.monotonic() + wait
        while True:
            answer = self._send("GET", f"{_at(task)}/{what}")
            if answer.status_code != httpx.codes.NOT_FOUND:
                return _checked(answer).json()
            if time.monotonic() > until:
                raise Unavailable(f"no {what} of task {task.hex()} after {wait:.0f} s; it is {self.stage(task)}")
            time.sleep(POLL)

    def _task(self, task: bytes) -> dict[str, Any]:
        return dict(self._call("GET", _at(task)).json())

    def _tensors(self, url: str, path: Path) -> dict[str, Array]:
        self._download(url, path)
        return dict(bundle.read(path).tensors)

    def _download(self, url: str, path: Path) -> None:
        with self._http.stream("GET", url) as answer:
            if answer.is_error:
                answer.read()
                raise _failure(answer)
            with path.open("wb") as file:
                for part in answer.iter_bytes():
                    file.write(part)

    def _call(self, method: str, url: str, **content: Any) -> httpx.Response:
        return _checked(self._send(method, url, **content))

    def _send(self, method: str, url: str, **content: Any) -> httpx.Response:
        try:
            return self._http.request(method, url, **content)
        except httpx.TransportError as error:
            raise Unavailable(f"the service does not answer: {error}") from error


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


def _at(task: bytes) -> str:
    return f"/v1/tasks/{task.hex()}"


def _tensor(array: Array) -> dict[str, Any]:
    data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
    return {"dtype": dtype_name(array.dtype), "shape": list(array.shape), "data": data}


def _checked(answer: httpx.Response) -> httpx.Response:
    if answer.is_error:
        raise _failure(answer)
    return answer


def _failure(answer: httpx.Response) -> Failure:
    """The failure that a problem stands for (api/README.md)."""
    try:
        problem = answer.json()
        said = f"{problem['code']}: {str(problem['detail'])[:MAX_PROBLEM]}"
    except (ValueError, KeyError, TypeError):
        said = f"HTTP {answer.status_code}"
    if answer.status_code in (httpx.codes.CONFLICT, httpx.codes.GONE):
        return Conflict(said)
    if answer.is_server_error:
        return Unavailable(said)
    return Malformed(said)
