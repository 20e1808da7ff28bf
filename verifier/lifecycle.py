"""The stages of a task, and the one table of what may follow what.

    posted -> challenged -> checking -> accepted | rejected -> attested
    posted, challenged -> expired (the deadline passed)      checking -> stalled (ours: no verdict, nobody is punished)

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
    EXPIRED = "expired"
    STALLED = "stalled"


class Event(StrEnum):
    COMMIT = "commit"
    PROVE = "prove"
    ACCEPT = "accept"
    REJECT = "reject"
    ATTEST = "attest"
    EXPIRE = "expire"
    STALL = "stall"


class Transition(NamedTuple):
    sources: tuple[Stage, ...]
    target: Stage


TRANSITIONS = {
    Event.COMMIT: Transition((Stage.POSTED,), Stage.CHALLENGED),
    Event.PROVE: Transition((Stage.CHALLENGED,), Stage.CHECKING),
    Event.ACCEPT: Transition((Stage.CHECKING,), Stage.ACCEPTED),
    Event.REJECT: Transition((Stage.CHECKING,), Stage.REJECTED),
    Event.ATTEST: Transition((Stage.ACCEPTED, Stage.REJECTED), Stage.ATTESTED),
    Event.EXPIRE: Transition((Stage.POSTED, Stage.CHALLENGED), Stage.EXPIRED),
    Event.STALL: Transition((Stage.CHECKING,), Stage.STALLED),
}
DUE = (Stage.CHECKING, Stage.ACCEPTED, Stage.REJECTED)  # a worker process has something left to do


class Expired(Conflict):
    """The deadline passed before this message came."""


class LostLease(Conflict):
    """Another worker process has taken the task over."""
