"""The stages of a task, and the one table of what may follow what.

    posted -> challenged -> checking -> accepted | rejected -> attested
    posted, challenged -> lapsed (the deadline passed) -> expired (that is signed)
    whatever waits for us -> stalled (a fault of ours: nobody is paid or punished) -> where it was, when asked to

The store moves a task by compare-and-set on this table; nothing else writes a stage.
"""

from enum import StrEnum
from typing import NamedTuple

from proof.errors import Conflict


class Stage(StrEnum):
    """Part of the wire format: values are never renamed."""

    POSTED = "posted"
    CHALLENGED = "challenged"  # a commitment is stored, and the challenge with it
    CHECKING = "checking"  # the proof is stored, and the check seed with it
    ACCEPTED = "accepted"
    REJECTED = "rejected"
    ATTESTED = "attested"  # the verdict, either way, is signed
    LAPSED = "lapsed"
    EXPIRED = "expired"  # that the deadline passed without a proof is signed
    STALLED = "stalled"


class Event(StrEnum):
    COMMIT = "commit"
    PROVE = "prove"
    ACCEPT = "accept"
    REJECT = "reject"
    ATTEST = "attest"
    LAPSE = "lapse"
    EXPIRE = "expire"
    STALL = "stall"
    RETRY_CHECK = "retry_check"
    RETRY_ACCEPTED = "retry_accepted"
    RETRY_REJECTED = "retry_rejected"
    RETRY_LAPSED = "retry_lapsed"


class Transition(NamedTuple):
    sources: tuple[Stage, ...]
    target: Stage


DUE = (Stage.CHECKING, Stage.ACCEPTED, Stage.REJECTED, Stage.LAPSED)  # a worker process has something left to do
FINAL = (Stage.ATTESTED, Stage.EXPIRED, Stage.STALLED)

TRANSITIONS = {
    Event.COMMIT: Transition((Stage.POSTED,), Stage.CHALLENGED),
    Event.PROVE: Transition((Stage.CHALLENGED,), Stage.CHECKING),
    Event.ACCEPT: Transition((Stage.CHECKING,), Stage.ACCEPTED),
    Event.REJECT: Transition((Stage.CHECKING,), Stage.REJECTED),
    Event.ATTEST: Transition((Stage.ACCEPTED, Stage.REJECTED), Stage.ATTESTED),
    Event.LAPSE: Transition((Stage.POSTED, Stage.CHALLENGED), Stage.LAPSED),
    Event.EXPIRE: Transition((Stage.LAPSED,), Stage.EXPIRED),
    Event.STALL: Transition(DUE, Stage.STALLED),
    Event.RETRY_CHECK: Transition((Stage.STALLED,), Stage.CHECKING),
    Event.RETRY_ACCEPTED: Transition((Stage.STALLED,), Stage.ACCEPTED),
    Event.RETRY_REJECTED: Transition((Stage.STALLED,), Stage.REJECTED),
    Event.RETRY_LAPSED: Transition((Stage.STALLED,), Stage.LAPSED),
}


class Expired(Conflict):
    """The deadline passed before this message came."""
