"""One Assay service over HTTP, typed, for protocols and workers; prover/client.py adds arrays and proof files.

Repeating any call is safe, since the service knows tasks, commitments and proofs by their content; so a call that meets
a service that is away, overloaded, or short of breath is repeated until `patience` is used up.
"""

import json
import random
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from proof.attestation import key_address
from proof.errors import Conflict, Failure, Malformed, Unavailable
from proof.messages import Reward, Task
from proof.requests import NOTHING, Action, WorkerRequest, origin, sign_request

TIMEOUT = 60.0  # seconds for one call; uploads get none
PATIENCE = 30.0  # seconds that a call is repeated while the service cannot tell
LONGEST_PAUSE = 5.0
REQUEST_SECONDS = 120  # that a worker's signature on a request is valid
WAIT_SECONDS = 20  # that the service is asked to wait for a change
MAX_PROBLEM = 2000  # characters of a problem's detail
FINAL = ("attested", "expired", "stalled")


@dataclass(frozen=True)
class Worker:
    """Who signs requests: a worker by its private key. The domain is that of a task's reward, once it is known."""

    key: bytes

    @property
    def address(self) -> str:
        return key_address(self.key)


@dataclass(frozen=True)
class Purpose:
    """What a worker's request is for; its signature is worth nothing for anything else."""

    action: Action
    task: bytes = NOTHING
    content: bytes = NOTHING  # digest of what is sent
    reward: Reward | None = None


@dataclass(frozen=True)
class TaskState:
    """A task as the service shows it."""

    id: bytes
    stage: str
    detail: str | None
    created: float
    task: Task
    tenant: str
    assigned: str | None
    worker: str | None
    verdict: str | None
    reason: str | None
    check_seconds: float | None
    attestation: bytes | None

    @property
    def final(self) -> bool:
        return self.stage in FINAL

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "TaskState":
        names = ("stage", "detail", "created", "tenant", "assigned", "worker", "verdict", "reason", "check_seconds")
        uid = value["attestation"]
        return cls(
            id=bytes.fromhex(value["id"]),
            task=Task.from_json(value["task"]),
            attestation=bytes.fromhex(uid) if uid else None,
            **{name: value[name] for name in names},
        )


@dataclass(frozen=True)
class Event:
    """A task came to a stage. Numbers rise; `Service.events` goes on after one."""

    number: int
    task: bytes
    stage: str


class Service:
    """One service, called with an API key or as a worker. Use as a context manager."""

    def __init__(
        self, url: str, key: str | None = None, worker: bytes | None = None, patience: float = PATIENCE
    ) -> None:
        self.origin = origin(url)
        self.worker = Worker(worker) if worker else None
        self._patience = patience
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(base_url=url, timeout=TIMEOUT, headers=headers)

    @property
    def key(self) -> bytes:
        """The worker's private key. Raises Malformed for a client that is none's."""
        if self.worker is None:
            raise Malformed("this client calls with an API key: give it the worker's private key")
        return self.worker.key

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._http.close()

    def about(self) -> dict[str, Any]:
        """Who signs here, and which limits hold, as the service says."""
        return dict(self.call("GET", "/.well-known/assay.json").json())

    # ---- tasks

    def post(self, body: Mapping[str, Any], repeat: str | None = None) -> TaskState:
        """Post a task in the API's form; `repeat` is an Idempotency-Key."""
        headers = {"Idempotency-Key": repeat} if repeat else {}
        return TaskState.from_json(self.call("POST", "/v1/tasks", json=body, headers=headers).json())

    def post_many(self, bodies: Iterable[Mapping[str, Any]]) -> list[TaskState | Failure]:
        """Post many tasks at once; for each its state, or why it was refused."""
        results = self.call("POST", "/v1/tasks:batch", json={"tasks": list(bodies)}).json()["results"]
        return [TaskState.from_json(one["task"]) if one["task"] else failure(one["problem"]) for one in results]

    def state(self, task: bytes) -> TaskState:
        return TaskState.from_json(self.call("GET", at(task), purpose=Purpose(Action.READ, task)).json())

    def settled(self, task: bytes, wait: float = 60.0) -> TaskState:
        """The task at a final stage. Raises Unavailable when it is not there after `wait` seconds."""
        until = time.monotonic() + wait
        while True:
            left = max(0.0, until - time.monotonic())
            prefer = {"Prefer": f"wait={min(WAIT_SECONDS, int(left))}"}
            state = TaskState.from_json(
                self.call("GET", at(task), purpose=Purpose(Action.READ, task), headers=prefer).json()
            )
            if state.final:
                return state
            if not left:
                raise Unavailable(f"task {task.hex()} is {state.stage} after {wait:.0f} s")

    def tasks(self, stage: str | None = None) -> Iterator[TaskState]:
        """All tasks that the caller may see, the oldest first, page after page."""
        query: dict[str, Any] = {"stage": stage} if stage else {}
        while True:
            page = self.call("GET", "/v1/tasks", params=query, purpose=Purpose(Action.LIST)).json()
            yield from map(TaskState.from_json, page["tasks"])
            if page["next"] is None:
                return
            query["cursor"] = page["next"]

    # ---- events and webhooks

    def events(self, after: int = 0) -> Iterator[Event]:
        """What happens to the caller's tasks, from number `after` on, until the connection ends."""
        headers = {"Last-Event-ID": str(after), "Accept": "text/event-stream"}
        timeout = httpx.Timeout(TIMEOUT, read=None)
        with self._http.stream("GET", "/v1/events", headers=headers, timeout=timeout) as answer:
            if answer.is_error:
                answer.read()
                raise _failure(answer)
            for line in answer.iter_lines():
                if line.startswith("data:"):
                    data = json.loads(line.removeprefix("data:"))
                    yield Event(int(data["event"]), bytes.fromhex(data["task"]), str(data["stage"]))

    def add_webhook(self, url: str, stages: Iterable[str] = ()) -> tuple[str, str]:
        """Have the stages of tasks told to `url`; returns the webhook's id and the secret that signs deliveries."""
        told = self.call("POST", "/v1/webhooks", json={"url": url, "stages": list(stages)}).json()
        return str(told["id"]), str(told["secret"])

    def remove_webhook(self, webhook: str) -> None:
        self.call("DELETE", f"/v1/webhooks/{webhook}")

    # ---- calls

    def call(self, method: str, url: str, *, purpose: Purpose | None = None, **content: Any) -> httpx.Response:
        """One request, repeated while the service cannot tell. Raises what the problem in its answer stands for."""
        answer = self.send(method, url, purpose=purpose, **content)
        if answer.is_error:
            raise _failure(answer)
        return answer

    def send(self, method: str, url: str, *, purpose: Purpose | None = None, **content: Any) -> httpx.Response:
        """As `call`, but gives back an answer that is a problem, unless it asks to be repeated."""
        until, pause = time.monotonic() + self._patience, 0.05
        headers = dict(content.pop("headers", {}))
        body = content.get("content")
        while True:
            try:
                if isinstance(body, Path):
                    with body.open("rb") as file:
                        answer = self._http.request(
                            method, url, headers=headers | self.signed(purpose), **(content | {"content": file})
                        )
                else:
                    answer = self._http.request(method, url, headers=headers | self.signed(purpose), **content)
            except httpx.TransportError as error:
                if time.monotonic() + pause > until:
                    raise Unavailable(f"the service does not answer: {error}") from error
            else:
                asked = _retry_after(answer)
                if asked is None or time.monotonic() + max(asked, pause) > until:
                    return answer
                pause = max(asked, pause)
            time.sleep(pause * random.uniform(0.8, 1.2))
            pause = min(2 * pause, LONGEST_PAUSE)

    @contextmanager
    def stream(self, url: str, purpose: Purpose | None = None) -> Iterator[httpx.Response]:
        """A body that is read as it comes."""
        with self._http.stream("GET", url, headers=self.signed(purpose)) as answer:
            if answer.is_error:
                answer.read()
                raise _failure(answer)
            yield answer

    def signed(self, purpose: Purpose | None, now: float | None = None) -> dict[str, str]:
        """The headers with which a worker's request says who asks for what; none for others."""
        if self.worker is None or purpose is None:
            return {}
        expires = int(time.time() if now is None else now) + REQUEST_SECONDS
        request = WorkerRequest(self.origin, purpose.action, purpose.task, purpose.content, expires)
        signature = sign_request(request, purpose.reward, self.worker.key)
        return {
            "Assay-Worker": self.worker.address,
            "Assay-Expires": str(expires),
            "Assay-Content": "0x" + purpose.content.hex(),
            "Assay-Signature": "0x" + signature.hex(),
        }


def at(task: bytes) -> str:
    return f"/v1/tasks/{task.hex()}"


def failure(problem: Mapping[str, Any]) -> Failure:
    """The failure that a problem stands for (api/README.md)."""
    try:
        said, status = f"{problem['code']}: {str(problem['detail'])[:MAX_PROBLEM]}", int(problem["status"])
    except (KeyError, TypeError, ValueError):
        return Unavailable("the service answers with something that is no problem of its own")
    if status in (httpx.codes.CONFLICT, httpx.codes.GONE):
        return Conflict(said)
    if status >= httpx.codes.INTERNAL_SERVER_ERROR or status == httpx.codes.TOO_MANY_REQUESTS:
        return Unavailable(said)
    return Malformed(said)


def _failure(answer: httpx.Response) -> Failure:
    try:
        return failure(answer.json())
    except ValueError:
        return Unavailable(f"HTTP {answer.status_code} from something else than the service")


def _retry_after(answer: httpx.Response) -> float | None:
    """Seconds after which the same request is to be repeated; None where that is no use."""
    if answer.status_code not in (httpx.codes.TOO_MANY_REQUESTS, httpx.codes.SERVICE_UNAVAILABLE):
        return None
    given = answer.headers.get("Retry-After", "1")
    return float(given) if given.isdigit() else 1.0
