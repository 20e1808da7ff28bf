"""A worker's request to a service, signed: who asks, for what, where and until when.

EIP-712 `WorkerRequest` in the domain of the task's reward; to list and to read, which a worker does before it knows the
reward, in that of chain 0 and the zero address. `origin` is the service as the worker dials it (scheme://host[:port]):
what is signed for one service is worthless at another, also at one that passes requests on.
"""

import re
from dataclasses import dataclass
from enum import StrEnum

from proof import eip712
from proof.errors import Malformed, Reason, Rejected
from proof.messages import Reward

WORKER_REQUEST = "WorkerRequest(string origin,string action,bytes32 task,bytes32 content,uint64 expiresAt)"
MAX_REQUEST_SECONDS = 600  # that a request may be valid
LEEWAY_SECONDS = 30  # between two clocks
MAX_ORIGIN = 256
NO_CHAIN, NO_CONTRACT = 0, "0x" + "00" * 20
NOTHING = bytes(32)  # of a request that sends nothing, or is about no task

_ORIGIN = re.compile(r"https?://[a-z0-9.\[\]:-]+")


class Action(StrEnum):
    """Part of the wire format: values are never renamed."""

    LIST = "list"
    READ = "read"
    COMMIT = "commit"
    PROVE = "prove"


@dataclass(frozen=True)
class WorkerRequest:
    origin: str
    action: Action
    task: bytes  # its id; NOTHING to list
    content: bytes  # digest of the commitment or of the proof file that is sent; NOTHING to read
    expires_at: int  # Unix seconds

    def digest(self, reward: Reward | None) -> bytes:
        """What is signed, in the domain of `reward`, or of none."""
        values = (self.origin, str(self.action), self.task, self.content, self.expires_at)
        chain_id, contract = (reward.chain_id, reward.contract) if reward else (NO_CHAIN, NO_CONTRACT)
        return eip712.digest(eip712.struct_hash(WORKER_REQUEST, values), chain_id, contract)


def sign_request(request: WorkerRequest, reward: Reward | None, private_key: bytes) -> bytes:
    return eip712.sign(request.digest(reward), private_key)


def verify_request(request: WorkerRequest, reward: Reward | None, signature: bytes, worker: str) -> None:
    """Check that `worker` signed. Raises Rejected."""
    signer = eip712.recover(request.digest(reward), signature)
    if signer != worker:
        raise Rejected(Reason.SIGNATURE, f"the request is signed by {signer}, not by {worker}")


def origin(url: str) -> str:
    """The origin of a URL as it is signed. Raises Malformed for what is no URL of a service."""
    found = _ORIGIN.match(url.strip().lower())
    if not found or len(found[0]) > MAX_ORIGIN:
        raise Malformed(f"{url[:MAX_ORIGIN]!r}: not http:// or https:// and a host")
    return found[0]
