"""assay status, for a person who keeps the service running, and assay task: look at one, put a stalled one back."""

import os
import shutil
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from proof.errors import Conflict, Unavailable
from verifier.database import Database
from verifier.figures import Figures
from verifier.lifecycle import Stage
from verifier.queue import JUDGE, QUEUES, TaskQueue
from verifier.settings import Settings
from verifier.store import Store
from verifier.summaries import Filter

cli = typer.Typer()
task_cli = typer.Typer(help="Look at a task, or put a stalled one back to work.", no_args_is_help=True)
cli.add_typer(task_cli, name="task")
out = Console()

STALLED_SHOWN = 10
RETRIED_AT_ONCE = 1000
LATE_SECONDS = 60.0  # that a task may wait for us before somebody should look
LOW_BYTES = 2**30

Data = Annotated[Path | None, typer.Option(help="Where the record is kept; also ASSAY_DATA.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
TaskId = Annotated[str | None, typer.Argument(metavar="TASK", help="Its id, 64 hex digits.")]


@cli.command()
def status(data: Data = None, as_json: Json = False) -> None:
    """How the service stands, from the record and Redis. Exit 0: well; 1: something needs a person; 3: cannot tell."""
    settings = Settings.from_env(os.environ, data)
    told = _status(settings, _database(settings), time.time())
    if as_json:
        out.print_json(data=told)
    else:
        _show(told)
    if told["attention"]:
        raise typer.Exit(1)


@task_cli.command()
def show(task: Annotated[str, typer.Argument(metavar="TASK")], data: Data = None, as_json: Json = False) -> None:
    """One task: its stage, who works on it, and what has come of it."""
    found = Store(_database(Settings.from_env(os.environ, data))).task(task)
    if found is None:
        raise Conflict(f"there is no task {task}")
    row = found.task
    told = {
        "task": row.id,
        "stage": row.stage,
        "detail": row.detail,
        "tenant": row.tenant,
        "model": row.model,
        "attempts": row.attempts,
        "leased_until": row.lease if row.owner else None,
        "created": row.created,
        "changed": row.changed,
        "deadline": row.deadline,
        "worker": found.worker,
        "verdict": found.verdict,
        "reason": found.reason,
        "attestation": found.uid,
    }
    if as_json:
        out.print_json(data=told)
        return
    for name, value in told.items():
        if value is not None:
            out.print(f"{name:13} {value}", highlight=False, markup=False)


@task_cli.command()
def retry(
    task: TaskId = None,
    every: Annotated[bool, typer.Option("--all", help="Every stalled task.")] = False,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Put stalled tasks back to where they stalled, with fresh attempts, once their cause is gone."""
    if (task is None) != every:
        raise typer.BadParameter("give a TASK, or --all")
    store, now = Store(_database(Settings.from_env(os.environ, data))), time.time()
    tasks = [task] if task else [one.task.id for one in store.tasks(RETRIED_AT_ONCE, Filter(stage=Stage.STALLED))]
    told = {entry: str(store.retry(entry, now)) for entry in tasks}
    if as_json:
        out.print_json(data=told)
    else:
        out.print("\n".join(f"{entry} {stage}" for entry, stage in told.items()) or "nothing is stalled")


def _database(settings: Settings) -> Database:
    database = Database(settings.database)
    database.check()
    return database


def _status(settings: Settings, database: Database, now: float) -> dict[str, Any]:
    figures = Figures(database)
    since, stages = figures.waiting_since(), figures.stages()
    waited = None if since is None else now - since
    free = shutil.disk_usage(settings.data).free
    queue = _queue(settings.redis)
    attention = []
    if stages[Stage.STALLED]:
        attention.append(f"{stages[Stage.STALLED]} tasks are stalled: assay task retry TASK, once the cause is gone")
    if waited is not None and waited > LATE_SECONDS:
        attention.append(f"a task has waited for {waited:.0f} s: are there enough `assay work`?")
    if queue and not queue[JUDGE]["workers"]:
        attention.append("no worker process is running: start `assay work`")
    if free < LOW_BYTES:
        attention.append(f"{free >> 20} MiB are left under {settings.data}")
    return {
        "stages": stages,
        "verdicts": [{"verdict": v, "reason": reason or None, "count": n} for v, reason, n in figures.verdicts()],
        "longest_wait_seconds": waited,
        "last_attestation": figures.last_attestation(),
        "attested": [
            {"chain_id": chain, "token": token, "amount": str(amount)}
            for (chain, token), amount in sorted(figures.attested().items())
        ],
        "queues": queue,
        "deliveries": figures.deliveries(),
        "free_bytes": free,
        "stalled": [{"task": one.task, "detail": one.detail} for one in figures.stalled(STALLED_SHOWN)],
        "attention": attention,
    }


def _queue(url: str | None) -> dict[str, dict[str, int]] | None:
    """None where Redis is the service's own, which only it can reach."""
    if url is None:
        return None
    queue = TaskQueue(url)
    try:
        return {
            routine: {"jobs": queue.length(name), "workers": queue.workers(name)} for routine, name in QUEUES.items()
        }
    except Unavailable:
        return {routine: {"jobs": -1, "workers": 0} for routine in QUEUES}
    finally:
        queue.close()


def _show(told: dict[str, Any]) -> None:
    table = Table("stage", "tasks", title="tasks")
    for stage, number in told["stages"].items():
        if number:
            table.add_row(stage, str(number))
    out.print(table)
    for one in told["verdicts"]:
        out.print(f"{one['verdict']:9} {one['reason'] or '':12} {one['count']}", highlight=False)
    for one in told["attested"]:
        out.print(f"attested {one['amount']} of {one['token']} on chain {one['chain_id']}", highlight=False)
    if told["last_attestation"]:
        out.print(f"last attestation {time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(told['last_attestation']))} UTC")
    for routine, found in (told["queues"] or {}).items():
        out.print(f"{routine}: {found['jobs']} jobs, {found['workers']} processes", highlight=False)
    out.print(f"{told['free_bytes'] >> 30} GiB free", highlight=False)
    for one in told["stalled"]:
        out.print(f"stalled {one['task']}: {one['detail']}", highlight=False, markup=False)
    for line in told["attention"]:
        out.print(f"[bold red]![/] {line}", highlight=False)
    if not told["attention"]:
        out.print("[green]nothing needs you[/]")
