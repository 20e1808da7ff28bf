"""Tables that migrations make are those that the code names, from nothing and from a record of before."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import servers
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from record import NOW, work
from sqlalchemy import select, text

from proof.errors import Malformed
from verifier import database as databases
from verifier.database import Database
from verifier.tables import AttestationRow, RevenueRow, Row, TaskRow


def differences(database):
    with database._engine.connect() as connection:
        return compare_metadata(MigrationContext.configure(connection), Row.metadata)


def test_the_tables_are_those_of_the_code(record):
    assert differences(record.database) == []
    record.database.check()


def test_many_that_start_at_once_migrate_once(record_url):
    opened = [Database(record_url) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(Database.migrate, opened))
    assert differences(opened[0]) == []
    for database in opened:
        database.close()


def test_a_record_that_was_not_prepared_is_refused(record_url):
    database = Database(record_url)
    with pytest.raises(Malformed, match="assay init"):
        database.check()
    database.close()


def test_a_record_of_before_keeps_its_tasks_and_attestations(record, before):
    """Its tables were made without migrations."""
    done = work()
    task = record.check(done)
    record.judge()
    kept = record.store.attestation_of(task)
    database = Database(before)
    with database._engine.begin() as connection:
        config = databases._config()
        config.attributes["connection"] = connection
        command.upgrade(config, databases.FIRST)
        copy(record.database, connection)
        connection.execute(text("DROP TABLE alembic_version"))
    database.migrate()
    assert differences(database) == []
    with database.read() as session:
        row, attested = session.get_one(TaskRow, task), session.get_one(AttestationRow, kept.uid)
        (revenue,) = session.scalars(select(RevenueRow)).all()
    assert (row.tenant, row.changed, row.worker) == ("default", NOW, None)
    assert (attested.payee, attested.verdict) == (kept.payee, kept.verdict)
    assert (revenue.payee, int(revenue.amount)) == (kept.payee, done.asked.task.reward.amount)
    database.close()


@pytest.fixture
def before(request, tmp_path_factory):
    """Another empty database, of the same kind."""
    return servers.fresh(request.node.callspec.params["record_url"], tmp_path_factory.mktemp("before"))


def copy(source, connection):
    """What the first version held."""
    later = {"tasks": {"tenant", "worker", "changed"}, "attestations": {"payee", "verdict"}, "verdicts": {"trail"}}
    for name in ("models", "tasks", "commitments", "proofs", "verdicts", "attestations"):
        table = Row.metadata.tables[name]
        columns = [column for column in table.columns if column.name not in later.get(name, set())]
        with source.read() as session:
            rows = [dict(row._mapping) for row in session.execute(select(*columns))]
        if rows:
            connection.execute(table.insert(), rows)
