"""Alembic's entry: it runs on the connection, and in the transaction, that Database.migrate gives."""

from alembic import context

from verifier.tables import Row

context.configure(connection=context.config.attributes["connection"], target_metadata=Row.metadata)
context.run_migrations()
