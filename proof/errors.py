"""What can go wrong on purpose. Anything else that is raised is a bug, and crashes.

Failure
├── Malformed     the bytes are not a message            answered 422, no verdict
├── Rejected      a message, and it is false             recorded as the verdict
├── Conflict      a true message at the wrong stage      answered 409, no verdict
└── Unavailable   we cannot tell just now                retried, answered 503, no verdict
"""

from enum import StrEnum


class Reason(StrEnum):
    """Why a proof was rejected. Part of the wire format: values are never renamed."""

    BINDING = "binding"  # commitment, challenge or task of another statement
    SIGNATURE = "signature"  # not signed by the worker it names
    SHAPE = "shape"  # tensors, dtypes or shapes that the graph does not give
    INPUT = "input"  # the inputs are not the task's
    SELECTION = "selection"  # other rows opened than the challenge selects
    OPENING = "opening"  # opened rows do not lead to the committed root
    NONFINITE = "nonfinite"  # NaN or infinity where the op gives none
    FREIVALDS = "freivalds"  # a product fails its random combination
    REEXECUTION = "reexecution"  # a row computed again gives another result


class Failure(Exception):
    """Base of every expected failure."""


class Malformed(Failure):
    """The bytes do not decode to a message within its limits."""


class Rejected(Failure):
    """The message is well formed and false."""

    def __init__(self, reason: Reason, detail: str, node: str | None = None) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
        self.node = node


class Conflict(Failure):
    """The record is not at the stage that this message belongs to."""


class Unavailable(Failure):
    """A store, device or signer of ours did not answer."""
