"""The database's schema, step by step. `stack/store/migrate.py` says how they are run."""
