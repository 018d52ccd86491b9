"""What alembic runs: the migrations on the connection that `stack.store.migrate` hands over, in its transaction."""

from alembic import context

from stack.store.schema import schema

context.configure(connection=context.config.attributes["connection"], target_metadata=schema, render_as_batch=True)
context.run_migrations()
