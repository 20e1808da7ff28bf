"""Opens and plans models that strangers send, in a process of its own: what reads them is C++, and may crash or hang.

`python -m verifier.inspector` answers requests, a line of JSON each, until stdin closes. The parent gives it time and
kills it when that is over; the next request starts another.
"""

import json
import os
import resource
import select
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from proof.encoding import fields, parse, text
from proof.errors import Failure, Malformed, Unavailable

OPEN_SECONDS, PLAN_SECONDS = 120.0, 20.0
MAX_LINE_BYTES = 64 * 2**20
MAX_DATA_BYTES = 16 * 2**30  # of memory of its own; files that are mapped do not count
INSPECTORS = 2
PLANNED = 4096  # plans that are remembered to be possible

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Inspected:
    """What there is to a model."""

    id: str
    report: dict[str, Any]
    files: tuple[str, ...]  # blobs that it points to


class Inspector:
    """A few processes, started when they are needed. Raises Malformed for what is no model that can be checked."""

    def __init__(self, blobs: Path, opening: float = OPEN_SECONDS, planning: float = PLAN_SECONDS) -> None:
        self.blobs = blobs
        self._opening, self._planning = opening, planning
        self._children = [_Child() for _ in range(INSPECTORS)]
        self._planned: OrderedDict[str, None] = OrderedDict()
        self._lock = Lock()

    def report(self, path: Path) -> Inspected:
        """What the file at `path` holds, external data found among the blobs."""
        told = self._ask({"path": str(path)}, self._opening)
        id_, report, files = fields(told, "report", ("id", "report", "files"))
        if not isinstance(report, dict) or not isinstance(files, list):
            raise Unavailable("the inspector answers with something else than a report")
        return Inspected(str(id_), report, tuple(map(str, files)))

    def plan(self, path: Path, shapes: Shapes, policy: str) -> None:
        """Raise Malformed unless the model at `path` can be run on inputs of these shapes and checked by the policy."""
        asked = {"path": str(path), "shapes": {name: list(shape) for name, shape in shapes.items()}, "policy": policy}
        key = json.dumps(asked, sort_keys=True)
        with self._lock:
            if key in self._planned:
                return
        self._ask(asked, self._opening + self._planning)
        with self._lock:
            self._planned[key] = None
            while len(self._planned) > PLANNED:
                self._planned.popitem(last=False)

    def close(self) -> None:
        for child in self._children:
            child.stop()

    def _ask(self, request: Mapping[str, Any], seconds: float) -> object:
        request = {"blobs": str(self.blobs), **request}
        with self._lock:
            child = min(self._children, key=lambda one: one.waiting)
            child.waiting += 1
        try:
            return child.ask(request, seconds)
        finally:
            with self._lock:
                child.waiting -= 1


@dataclass
class _Child:
    waiting: int = 0
    _process: "subprocess.Popen[bytes] | None" = None
    _lock: Lock = field(default_factory=Lock)

    def ask(self, request: Mapping[str, Any], seconds: float) -> object:
        with self._lock:
            answer = self._exchanged(json.dumps(request).encode() + b"\n", seconds)
        told = parse(answer, "inspector", MAX_LINE_BYTES)
        error, kind, result = fields(told, "inspector", ("error", "kind", "result"))
        if error is not None:
            said = text(error, "inspector.error", MAX_LINE_BYTES)
            raise Unavailable(said) if kind == "unavailable" else Malformed(said)
        return result

    def _exchanged(self, line: bytes, seconds: float) -> bytes:
        process = self._running()
        try:
            _write(process, line)
        except BrokenPipeError:  # it died while it had nothing to do: no fault of this request
            process = self._running()
            _write(process, line)
        answer = _answer(process, seconds)
        if answer is None:
            process.kill()
            process.wait()
            raise Malformed(f"the library that reads models crashed on it, or took more than {seconds:.0f} s")
        return answer

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._process is None or self._process.poll() is not None:
            command = [sys.executable, "-m", "verifier.inspector"]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
            )
        return self._process

    def stop(self) -> None:
        if self._process and self._process.stdin:
            self._process.stdin.close()
            self._process.kill()
            self._process.wait()


def _write(process: "subprocess.Popen[bytes]", line: bytes) -> None:
    assert process.stdin
    process.stdin.write(line)
    process.stdin.flush()


def _answer(process: "subprocess.Popen[bytes]", seconds: float) -> bytes | None:
    """A line; None when the process ends or the time is over."""
    assert process.stdout
    until, answer = time.monotonic() + seconds, b""
    out = process.stdout.fileno()
    while not answer.endswith(b"\n"):
        left = until - time.monotonic()
        if left <= 0 or not select.select([out], [], [], left)[0]:
            return None
        part = os.read(out, 2**16)
        answer += part
        if not part or len(answer) > MAX_LINE_BYTES:
            return None
    return answer


def main() -> None:
    """Answer requests. What libraries print goes to stderr, so that answers stay whole."""
    from verifier.opening import Opening

    resource.setrlimit(resource.RLIMIT_DATA, (MAX_DATA_BYTES, MAX_DATA_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    opening = Opening()
    for line in sys.stdin.buffer:
        told: dict[str, Any] = {"error": None, "kind": None, "result": None}
        try:
            told["result"] = opening.answer(json.loads(line))
        except Failure as failure:
            told |= {"error": str(failure), "kind": "unavailable" if isinstance(failure, Unavailable) else "malformed"}
        except MemoryError:
            told |= {"error": f"it takes more than {MAX_DATA_BYTES >> 30} GiB to open", "kind": "malformed"}
        answers.write(json.dumps(told).encode() + b"\n")
        answers.flush()


if __name__ == "__main__":
    main()
