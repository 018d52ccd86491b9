"""API keys: who holds one acts for its tenant, within its scopes.

A key is `lsr_ID_SECRET`, so that a leaked one can be recognised and revoked by its id. It is shown once, when it is
made; the store keeps its SHA-256. The secret is 256 random bits, which nobody can guess their way back to from the
hash, so the hash needs neither salt nor slowness, and a key can be looked up by it: how long that takes tells nothing
about another key. Keys stand in no log and in no error.

Where no key was ever made, everybody is the local user, and so only this machine may be listened to. Once one was
made, every request needs one, even when all are revoked.
"""

import hashlib
import ipaddress
import re
import secrets
import threading
from collections.abc import Sequence
from time import monotonic

from stack.context import SCOPES, Principal
from stack.errors import BadInput, NotFound, Unauthorized
from stack.store import Store
from stack.store.keys import ApiKey

# Parts of file names and of the ids of Ray jobs, where a dot separates; lower case, as some file systems know no other.
TENANT = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
MAX_NAME = 200
HOW_TO_MAKE_ONE = "python -m stack keys create --tenant NAME --name WHAT_FOR --scopes inference,data,training,agents"
_ID = re.compile(r"[0-9a-f]{16}")
_KEY = re.compile(r"lsr_[0-9a-f]{16}_[A-Za-z0-9_-]{43}")


def create(store: Store, tenant: str, name: str, scopes: Sequence[str]) -> tuple[ApiKey, str]:
    """Makes a key; returns what is kept of it, and the key, which nobody is told again. Raises BadInput."""
    check_tenant(tenant)
    if not 1 <= len(name) <= MAX_NAME or not name.isprintable():
        raise BadInput(f"the name must have 1 to {MAX_NAME} printable characters, not {name[:80]!r}", param="name")
    if not scopes:
        raise BadInput(f"a key needs at least one scope; allowed: {', '.join(SCOPES)}", param="scopes")
    for scope in scopes:
        if scope not in SCOPES:
            raise BadInput(f"there is no scope {scope[:80]!r}; allowed: {', '.join(SCOPES)}", param="scopes")
    key_id = secrets.token_hex(8)
    key = f"lsr_{key_id}_{secrets.token_urlsafe(32)}"
    held = [scope for scope in SCOPES if scope in scopes]
    return store.keys.add(key_id, tenant, name, held, _hash(key)), key


def revoke(store: Store, id: str) -> ApiKey:
    """Revokes a key, for good; doing it again is fine. Raises NotFound."""
    if not _ID.fullmatch(id):  # it may be a whole key, which no error shows
        raise NotFound("the id of a key is 16 of 0-9 and a-f; `keys list` shows the ids", param="id")
    store.keys.revoke(id)
    key = store.keys.get(id)
    if key is None:
        raise NotFound(f"there is no key with the id {id!r}; `keys list` shows the ids", param="id")
    return key


def check_tenant(tenant: str) -> None:
    """Raises BadInput unless this can be the name of a tenant."""
    if not TENANT.fullmatch(tenant):
        raise BadInput(
            f"the tenant must be 1 to 63 of a-z, 0-9, _ and -, with a letter or digit first, not {tenant[:80]!r}",
            param="tenant",
        )


def require_keys(store: Store, host: str | None) -> None:
    """Raises Unauthorized, saying what to do, where other machines would be listened to and there are no keys.

    A host that is not known, None, may be any.
    """
    if (host is not None and is_loopback(host)) or store.keys.any():
        return
    who = f"whoever reaches {host or 'all addresses'}" if host is not None else "whoever reaches one of the nodes"
    or_else = ", or set http_options.host to 127.0.0.1" if host is not None else ""
    raise Unauthorized(
        f"there are no API keys, so {who} could use the stack: "
        f"make one with `{HOW_TO_MAKE_ONE}` (and the same STACK_CONFIG and STACK_HOME){or_else}"
    )


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own. Names other than localhost may be anybody's."""
    if host.lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


class Keyring:
    """The keys as one process knows them.

    What was looked up holds for `ttl` seconds, in which a revoked key still works. Only keys that were found are kept,
    at most `size` of them, so that wrong ones cannot drive them out.
    """

    def __init__(self, store: Store, ttl: float = 2.0, size: int = 10_000) -> None:
        self._store = store
        self._ttl = ttl
        self._size = size
        self._found: dict[str, tuple[Principal, float]] = {}
        self._needed = False
        self._asked_at = float("-inf")
        self._lock = threading.Lock()

    def known(self, key: str) -> Principal | None:
        """Who holds a key that was looked up lately; asks no database. Raises Unauthorized for what can be no key."""
        if not _KEY.fullmatch(key):
            raise Unauthorized("the API key is not of the form lsr_ID_SECRET")
        principal, until = self._found.get(_hash(key), (None, 0.0))
        return principal if monotonic() < until else None

    def find(self, key: str) -> Principal:
        """Who holds a key. Raises Unauthorized for one that is not known or is revoked. Asks the database."""
        sha256, until = _hash(key), monotonic() + self._ttl
        found = self._store.keys.of_hash(sha256)
        with self._lock:
            self._found.pop(sha256, None)
            if found is None:
                raise Unauthorized("the API key is not known, or is revoked")
            principal = Principal(found.tenant, frozenset(found.scopes))
            while len(self._found) >= self._size:  # the one that was looked up first
                del self._found[next(iter(self._found))]
            self._found[sha256] = (principal, until)
        return principal

    def is_open(self) -> bool | None:
        """Whether no key was ever made, as far as was asked lately; None if it must be asked again."""
        if self._needed:
            return False
        return True if monotonic() < self._asked_at + self._ttl else None

    def ask_whether_open(self) -> bool:
        """The same, from the database. It never turns back to true."""
        asked_at = monotonic()
        if self._store.keys.any():
            self._needed = True
        self._asked_at = asked_at
        return not self._needed


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
