"""A secret key in use: what it was used for lies beside its file, and ends it.

A verdict is told after its use is durable, and no second rejection of one key is told: numerics-matmul, Theorem 8.
"""

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from gpu.keys import Key, Progress, make
from gpu.plan import Model
from proof.bundle import Proof
from proof.digest import canonical
from proof.encoding import fields, integer, parse, text
from proof.errors import Malformed, Unavailable
from proof.messages import Verdict
from proof.sampling import SEED_BYTES
from verifier.key_file import Held, Terms, read, read_revealed, write, write_revealed
from verifier.verify import verify

MAX_STATE_BYTES = 4096


@dataclass(frozen=True)
class State:
    used: int = 0
    retired: str | None = None


def create(path: Path, model: Model, terms: Terms, progress: Progress = lambda _: None) -> Key:
    """Make a key from the system's randomness, and its file. Raises Malformed for a model that has none."""
    with _reserved(path):
        key = make(model, secrets.token_bytes(SEED_BYTES), progress)
        write(path, key, terms)
        _store(path, key, State())
    return key


def judge(path: Path, proof: Proof, seed: bytes, now: float) -> Verdict:
    """Verify with the key at `path`, count it, and retire the key when that was its last verdict.

    Raises Unavailable when the key is retired, Malformed for a proof of another model.
    """
    held = read(path)
    key = held.key
    if proof.commitment.model != key.model.id:
        raise Malformed(f"the key is for model {key.model.id.hex()}, the proof of {proof.commitment.model.hex()}")
    if held.terms.public:
        return verify(proof, key.model, seed, task=proof.task, key=key)
    with _locked(path):
        state = _usable(path, held, now)
        _store(path, key, replace(state, used=state.used + 1))
    verdict = verify(proof, key.model, seed, task=proof.task, key=key)
    with _locked(path):
        state = _usable(path, held, now, over=1)
        if verdict.verdict == "rejected":
            _store(path, key, replace(state, retired="it has rejected a proof"))
    return verdict


def state_of(path: Path, key: Key) -> State:
    """What is on record of a key. Raises Unavailable where nothing is: a key without a past may not be used."""
    place = _beside(path, "state")
    try:
        with place.open("rb") as file:
            content = file.read(MAX_STATE_BYTES + 1)
    except FileNotFoundError:
        raise Unavailable(f"{place} is missing, so nobody can tell whether the key was retired") from None
    id_, used, retired = fields(parse(content, str(place), MAX_STATE_BYTES), str(place), ("key", "used", "retired"))
    if id_ != key.id.hex():
        raise Malformed(f"{place} is of another key")
    return State(integer(used, "used"), None if retired is None else text(retired, "retired"))


def reveal(path: Path, out: Path) -> None:
    """Retire a key, then write its seed for everybody, from which `rebuild` makes the same key."""
    held = read(path)
    if held.terms.public:
        raise Malformed(f"{path} was rebuilt from a seed that is public already")
    with _locked(path):
        state = state_of(path, held.key)
        _store(path, held.key, replace(state, retired=state.retired or "it was revealed"))
    write_revealed(out, held)


def rebuild(path: Path, model: Model, revealed: Path, progress: Progress = lambda _: None) -> Key:
    """The key of a seed that was revealed, made again from the model, in a file at `path`."""
    given = read_revealed(revealed)
    if given.model != model.id:
        raise Malformed(f"the key is for model {given.model.hex()}, not {model.id.hex()}")
    with _reserved(path):
        key = make(model, given.seed, progress)
        write(path, key, replace(given.terms, public=True))
    return key


def _usable(path: Path, held: Held, now: float, over: int = 0) -> State:
    """The state of a key that may give a verdict; `over` verdicts of its last ones are counted already."""
    state = state_of(path, held.key)
    if state.retired is None:
        spent = state.used - over >= held.terms.checks
        ended = now >= held.terms.until
        if spent or ended:
            why = f"it has given {state.used} verdicts" if spent else f"its epoch {held.terms.epoch!r} has ended"
            state = replace(state, retired=why)
            _store(path, held.key, state)
    if state.retired is not None:
        raise Unavailable(f"key {held.key.id.hex()} is retired, {state.retired}: reveal it and make the next one")
    return state


def _store(path: Path, key: Key, state: State) -> None:
    """Durable when it returns."""
    place, partial = _beside(path, "state"), _beside(path, secrets.token_hex(8))
    content = {"key": key.id.hex(), "used": state.used, "retired": state.retired}
    with open(partial, "xb", opener=_private) as file:
        file.write(canonical(content))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(place)
    folder = os.open(place.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(_beside(path, "lock"), "ab", opener=_private) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _reserved(path: Path) -> Iterator[None]:
    """A new file at `path`, which goes again when what should fill it fails."""
    try:
        with open(path, "xb", opener=_private):
            pass
    except FileExistsError:
        raise Malformed(f"{path} exists: a key is never overwritten") from None
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _private(name: str, flags: int) -> int:
    return os.open(name, flags, 0o600)


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(f"{path.name}.{ending}")
