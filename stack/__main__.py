"""What an administrator does at the command line: `python -m stack keys --help`."""

import argparse
import json
import sys
from contextlib import closing
from dataclasses import asdict

from sqlalchemy.exc import SQLAlchemyError

from stack import keys
from stack.config import Config
from stack.context import DEFAULT_TENANT, SCOPES
from stack.errors import StackError
from stack.store import Store, faults
from stack.store.keys import ApiKey

WHERE = (
    "The keys are in the database that the stack's configuration names: the environment variable STACK_CONFIG is the "
    "Serve config file (default: serve_apps/local.yaml), STACK_HOME the home folder (default: ~/.llama-stack-ray)."
)


def main(arguments: list[str] | None = None) -> int:
    """Runs a command. What cannot be done is told in one line, with the exit status 2."""
    given = _parser().parse_args(arguments)
    try:
        with closing(Store(Config.from_environment().store_url)) as store:
            _keys(store, given)
    except StackError as error:
        return _fail(error.message)
    except SQLAlchemyError as error:
        return _fail(f"the database cannot be used: {faults.reason(error)}")
    except OSError as error:
        return _fail(f"the database cannot be opened: {error}")
    return 0


def _keys(store: Store, given: argparse.Namespace) -> None:
    if given.command == "create":
        scopes = [scope.strip() for scope in given.scopes.split(",") if scope.strip()]
        row, key = keys.create(store, given.tenant, given.name, scopes)
        if given.json:
            print(json.dumps(asdict(row) | {"key": key}))
        else:
            print(key)
            print(f"the key {row.id} of {row.tenant}: keep it, it is not shown again", file=sys.stderr)
    elif given.command == "list":
        rows = store.keys.list(given.tenant)
        print(json.dumps([asdict(row) for row in rows]) if given.json else _table(rows))
    else:
        row = keys.revoke(store, given.id)
        print(f"the key {row.id} of {row.tenant} ({row.name}) is revoked; the gateway takes it for a few seconds more")


def _table(rows: list[ApiKey]) -> str:
    if not rows:
        return "there are no keys"
    heads = ("id", "tenant", "name", "scopes", "created", "revoked")
    cells = [
        (row.id, row.tenant, row.name, ",".join(row.scopes), row.created_at[:19], (row.revoked_at or "-")[:19])
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    lines = ("  ".join(map(str.ljust, line, widths)).rstrip() for line in (heads, *cells))
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m stack", description=__doc__, epilog=WHERE)
    things = parser.add_subparsers(dest="thing", required=True, metavar="keys")
    about = "API keys: each acts for one tenant, within its scopes."
    commands = things.add_parser("keys", help=about, description=about, epilog=WHERE).add_subparsers(
        dest="command", required=True, metavar="create | list | revoke"
    )
    create = commands.add_parser(
        "create", help="makes a key and shows it, once", description="Makes a key and shows it, once.", epilog=WHERE
    )
    create.add_argument("--tenant", default=DEFAULT_TENANT, help="whose key it is (default: %(default)s)")
    create.add_argument("--name", required=True, help="what it is for, to tell it from others")
    create.add_argument(
        "--scopes",
        required=True,
        metavar="A,B",
        help=f"what it may do, of {', '.join(SCOPES)}; admin may do everything",
    )
    create.add_argument("--json", action="store_true", help="print a JSON object")
    listing = commands.add_parser("list", help="shows the keys", description="Shows the keys.", epilog=WHERE)
    listing.add_argument("--tenant", help="only this tenant's")
    listing.add_argument("--json", action="store_true", help="print a JSON array")
    revoke = commands.add_parser(
        "revoke", help="makes a key useless, for good", description="Makes a key useless, for good.", epilog=WHERE
    )
    revoke.add_argument("id", metavar="ID", help="the id of the key, as `keys list` shows it")
    return parser


def _fail(message: str) -> int:
    print(f"stack: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
