"""The database under the record: SQLite (WAL) or PostgreSQL through SQLAlchemy, and how its tables are migrated."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, event, inspect, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from proof.errors import Malformed, Unavailable

WAIT_SECONDS = 30  # for another writer of SQLite
CONNECT_SECONDS = 5
POOL = 20  # connections to PostgreSQL that one process keeps, and as many more for a moment
MIGRATION_LOCK = 0x4153534159  # of PostgreSQL's advisory locks, the name in ASCII
CLOCKS = {
    "sqlite": "SELECT (julianday('now') - 2440587.5) * 86400",
    "postgresql": "SELECT extract(epoch FROM clock_timestamp())",
}
FIRST = "0001"  # the tables of records that were made before there were migrations


class Database:
    """One engine. Reading and writing raise Unavailable while the database does not answer; IntegrityError passes."""

    def __init__(self, url: str) -> None:
        self._engine = _engine(url)

    def migrate(self) -> None:
        """Bring the tables to this version; of many processes that start at once one does it."""
        with _available(), self._engine.execution_options(begin="BEGIN IMMEDIATE").begin() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
            config = _config()
            config.attributes["connection"] = connection
            known = MigrationContext.configure(connection).get_current_revision()
            if known is None and inspect(connection).has_table("tasks"):
                command.stamp(config, FIRST)
            command.upgrade(config, "head")

    def check(self) -> None:
        """Raises Malformed for a record that was not prepared, or is not of this version."""
        with _available(), self._engine.connect() as connection:
            found = MigrationContext.configure(connection).get_current_revision()
        if found != self.head:
            raise Malformed(f"the record is at version {found or 'none'} and not {self.head}: run `assay init`")

    @property
    def head(self) -> str | None:
        """The version of the tables that this code needs."""
        return ScriptDirectory.from_config(_config()).get_current_head()

    def ping(self) -> None:
        with self.read() as session:
            session.execute(text("SELECT 1"))

    def clock(self) -> float:
        """Unix seconds by the database's clock."""
        with self.read() as session:
            return float(session.scalar(text(CLOCKS[self._engine.dialect.name])) or 0.0)

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def read(self) -> Iterator[Session]:
        with _available(), Session(self._engine, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """One transaction, durable once the block has ended."""
        engine = self._engine.execution_options(begin="BEGIN IMMEDIATE")
        with _available(), Session(engine, expire_on_commit=False) as session, session.begin():
            yield session


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(files("verifier") / "migrations"))
    return config


@contextmanager
def _available() -> Iterator[None]:
    try:
        yield
    except IntegrityError:
        raise
    except (DBAPIError, PoolTimeout) as error:
        raise Unavailable(f"the database does not answer: {type(error).__name__}") from error


def _engine(url: str) -> Engine:
    if not url.startswith("sqlite"):
        return create_engine(
            url,
            pool_pre_ping=True,
            pool_size=POOL,
            max_overflow=POOL,
            isolation_level="READ COMMITTED",
            connect_args={"connect_timeout": CONNECT_SECONDS},
        )
    engine = create_engine(url, connect_args={"timeout": WAIT_SECONDS, "isolation_level": None})

    @event.listens_for(engine, "connect")
    def durable(connection: Any, _: Any) -> None:
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        """A writer takes the lock at once: one that read first could not upgrade without a deadlock."""
        connection.exec_driver_sql(connection.get_execution_options().get("begin", "BEGIN"))

    return engine
