"""The work on one task, from its inputs to the uploaded proof; the process beside a worker calls it per task."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy.typing as npt

from gpu.plan import Model
from proof import bundle
from proof.attestation import sign_commitment
from proof.messages import Verdict
from prover import prove
from prover.client import Client
from prover.prove import Recorded

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Served:
    """How one task went."""

    proof_bytes: int
    verdict: Verdict


def serve(client: Client, task: bytes, model: Model, engine: Callable[[Mapping[str, Array]], Recorded]) -> Served:
    """Run, commit, answer the challenge, upload, and wait for the verdict; the client is the worker's own.

    Raises Conflict when the task is taken or over, Unavailable when the service does not answer.
    """
    with TemporaryDirectory(prefix="assay-") as folder:
        terms = client.task(task)
        inputs = client.inputs(task, Path(folder))
        committed = prove.commit(model, engine(inputs), terms)
        signed = sign_commitment(committed.commitment, terms.reward, client.key)
        challenge = client.commit(task, signed, terms.reward)
        path = Path(folder) / "proof.safetensors"
        bundle.write_proof(path, prove.answer(committed, signed, challenge, terms))
        client.upload(task, path, terms.reward)
        return Served(path.stat().st_size, client.verdict(task))
