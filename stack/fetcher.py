"""The one way to what lies at an address that a user gave.

Such an address must not lead the server to where only the server can go. So the addresses that its name stands for are
looked up once, all of them must be public, and the connection goes to one of those, while TLS still proves the name.
There are no redirects and no proxies; bytes and time are bounded. An address of the config is the operator's, and may
be inside: it is asked by a Fetcher that allows that.
"""

import contextlib
import http.client
import io
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import BinaryIO
from urllib.parse import urlsplit

from stack import disk
from stack.errors import BadInput, StackError, TooLarge, Unavailable

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

BLOCK = 2**18
# Beside what Python's ipaddress takes for private: addresses that lead on to others (6to4 and its relays, Teredo),
# and documentation. Of IPv6 only 2000::/3 is public at all, which leaves out NAT64 and mapped IPv4.
_NOT_PUBLIC = [
    ipaddress.ip_network(network)
    for network in ("192.88.99.0/24", "2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")
]
_HEADERS = {
    "Accept": "*/*",
    "Accept-Encoding": "identity",
    "Connection": "close",
    "User-Agent": "llama-stack-ray",
}
# What HTTP itself needs to be right, and what names another host or proxy.
_OWN_HEADERS = frozenset(
    ("host", "content-length", "content-type", "content-encoding", "transfer-encoding", "connection", "te", "trailer",
     "upgrade", "expect", "accept-encoding", "user-agent", "proxy-authorization", "proxy-connection", "keep-alive")
)  # fmt: skip
_PUBLIC_V6 = ipaddress.ip_network("2000::/3")


def is_public(address: Address) -> bool:
    """Whether an address belongs to the public internet, and leads to nowhere else."""
    if address.version == 6 and address not in _PUBLIC_V6:
        return False
    if not address.is_global or address.is_multicast or address.is_reserved:
        return False
    return not any(address in network for network in _NOT_PUBLIC)


def resolve(host: str, port: int) -> list[str]:
    """The addresses that a name stands for. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def refused_header(headers: Mapping[str, str]) -> str | None:
    """The first header that cannot be sent: its name or value is none of HTTP's, or it is the fetcher's own."""
    for name, value in headers.items():
        is_token = name.isascii() and name.replace("-", "").replace("_", "").isalnum()
        if not is_token or name.lower() in _OWN_HEADERS or not (value.isascii() and value.isprintable()):
            return name
    return None


@dataclass(frozen=True)
class Answer:
    """What was answered, with whatever status but a redirect. `content_type` is the header as it came, or ""."""

    status: int
    content_type: str
    content: bytes


class Cut:
    """Ends a request from another thread, whatever it is doing: it fails like one whose far side has gone."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._connection: socket.socket | None = None
        self._is_cut = False

    def __call__(self) -> None:
        with self._lock:
            self._is_cut = True
            if self._connection is not None:
                _cut(self._connection)

    @contextlib.contextmanager
    def watching(self, connection: socket.socket) -> Iterator[None]:
        """Where the connection can be cut. Raises OSError if it was before it began."""
        with self._lock:
            if self._is_cut:
                raise ConnectionAbortedError("it was given up")
            self._connection = connection
        try:
            yield
        finally:
            with self._lock:
                self._connection = None


@dataclass(frozen=True)
class Fetcher:
    """Fetches files by https, and sends JSON. `seconds` bounds a whole fetch, `idle_seconds` each wait within it.

    After the first `idle_seconds` content must come at `slowest` bytes a second on average. `ports` is None for any;
    http:// addresses are asked only with `takes_http`.
    """

    resolve: Callable[[str, int], list[str]] = resolve
    is_allowed: Callable[[Address], bool] = is_public
    ports: frozenset[int] | None = frozenset({443})
    takes_http: bool = False
    tls: ssl.SSLContext = field(default_factory=ssl.create_default_context)
    seconds: float = 600
    idle_seconds: float = 10
    slowest: int = 16 * 1024

    def fetch(self, url: str, into: BinaryIO, most: int) -> None:
        """Writes what lies at an address into a file.

        Raises BadInput for an address that is not allowed or has nothing, TooLarge for more than `most` bytes, and
        Unavailable where nobody answers in time.
        """
        host, port, target = self._parts(url)
        addresses = self._addresses(host, port)
        deadline = time.monotonic() + self.seconds
        with self._our_errors(host, deadline), self._connected(url, host, port, addresses, deadline) as connection:
            connection.request("GET", target, headers=_HEADERS)
            with connection.getresponse() as response:
                _check(response, url, most)
                self._copy(response, into, most, deadline)

    def send(self, url: str, method: str, headers: Mapping[str, str], content: bytes, most: int) -> bytes:
        """What an address answers to JSON that is sent to it.

        Raises BadInput for an address that is not allowed, and Unavailable for all that the far side does not do as it
        should: it does not answer in time, redirects, or answers another status than 200 or more than `most` bytes.
        They name the host alone: the address may be the config's, and hold a key that is not for those who ask.
        """
        answer = self.ask(url, method, headers, content, most)
        if answer.status != 200:
            raise Unavailable(f"{urlsplit(url).hostname} answers with the status {answer.status}")
        return answer.content

    def ask(
        self,
        url: str,
        method: str,
        headers: Mapping[str, str],
        content: bytes | None,
        most: int,
        cut: Cut | None = None,
    ) -> Answer:
        """What an address answers to a request, with its status; the `content` that is sent along is JSON.

        Raises as `send` does, but for the status, and BadInput for a header that cannot be sent. By `cut` another
        thread can end it.
        """
        if (name := refused_header(headers)) is not None:
            raise BadInput(f"the header {name[:100]!r} cannot be sent")
        host, port, target = self._parts(url)
        addresses = self._addresses(host, port)
        deadline = time.monotonic() + self.seconds
        own = _HEADERS if content is None else {**_HEADERS, "Content-Type": "application/json"}
        given = {name.lower() for name in headers}
        sent = {**headers, **{name: value for name, value in own.items() if name.lower() not in given}}
        into = io.BytesIO()
        try:
            with (
                self._our_errors(host, deadline),
                self._connected(url, host, port, addresses, deadline, cut) as connection,
            ):
                connection.request(method, target, body=content, headers=sent)
                with connection.getresponse() as response:
                    _check_not_redirected(response, host)
                    _check_content(response, host, most)
                    self._copy(response, into, most, deadline)
                    return Answer(response.status, response.headers.get("content-type", ""), into.getvalue())
        except (BadInput, TooLarge) as error:
            raise Unavailable(error.message) from error

    def require_askable(self, url: str) -> None:
        """Raises BadInput for what is no address, or not one of those that are asked; nothing is looked up."""
        self._parts(url)

    @contextlib.contextmanager
    def _our_errors(self, host: str, deadline: float) -> Iterator[None]:
        """Turns errors of a connection into StackErrors."""
        try:
            yield
        except ssl.SSLCertVerificationError as error:
            raise BadInput(f"{host} cannot prove that it is {host}: {error.verify_message}") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            if time.monotonic() >= deadline:
                raise _too_slow(f"was not there within {self.seconds:g} s") from error
            raise Unavailable(f"{host} does not answer as it should: {str(error) or type(error).__name__}") from error

    def _parts(self, url: str) -> tuple[str, int, str]:
        """The host, the port and the rest of an address."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443)
            host.encode("idna")
        except ValueError as error:
            raise BadInput(f"{_without_query(url)!r} is no address: {error}") from error
        if not (parts.scheme == "https" or (parts.scheme == "http" and self.takes_http)) or not host:
            raise BadInput(f"{_without_query(url)!r} cannot be fetched; allowed: https://host/path")
        if parts.username is not None or parts.password is not None:
            raise BadInput("an address must not hold a user name or a password")
        if self.ports is not None and port not in self.ports:
            allowed = ", ".join(str(one) for one in sorted(self.ports))
            raise BadInput(f"the port {port} may not be asked; allowed: {allowed}")
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        if not target.isascii() or not target.isprintable() or " " in target or "\\" in url:
            raise BadInput(f"{_without_query(url)!r} holds characters that must be percent-encoded in an address")
        return host, port, target

    def _addresses(self, host: str, port: int) -> list[str]:
        try:
            found = self.resolve(host, port)
            addresses = [ipaddress.ip_address(address) for address in found]
        except (OSError, ValueError) as error:
            raise BadInput(f"there is no host {host!r}") from error
        # One that is not allowed is enough: what a name stands for next time may be another one of them.
        if not addresses or not all(self.is_allowed(address) for address in addresses):
            raise BadInput(f"{host} may not be asked: it is not, or not only, at public addresses")
        return found

    @contextlib.contextmanager
    def _connected(
        self, url: str, host: str, port: int, addresses: list[str], deadline: float, cut: Cut | None = None
    ) -> Iterator[http.client.HTTPConnection]:
        is_plain = url.lower().startswith("http://")
        connection = (http.client.HTTPConnection if is_plain else http.client.HTTPSConnection)(host, port)
        with contextlib.closing(connection), _connect(addresses, port, self.idle_seconds) as plain:
            # Whatever it is doing, a fetch ends at its deadline: the far side can keep each single wait short.
            copy = plain.dup()
            watchdog = threading.Timer(max(0, deadline - time.monotonic()), _cut, args=[copy])
            watchdog.daemon = True
            watchdog.start()
            try:
                with (cut or Cut()).watching(copy):
                    connection.sock = plain if is_plain else self.tls.wrap_socket(plain, server_hostname=host)
                    yield connection
            finally:
                watchdog.cancel()
                copy.close()

    def _copy(self, response: http.client.HTTPResponse, into: BinaryIO, most: int, deadline: float) -> None:
        started, total = time.monotonic(), 0
        while block := response.read1(BLOCK):
            total += len(block)
            if total > most:
                raise TooLarge(f"the content has more than {most} bytes")
            _write(into, block)
            now = time.monotonic()
            if now >= deadline:
                raise _too_slow(f"was not there within {self.seconds:g} s")
            if now - started > self.idle_seconds and total < self.slowest * (now - started):
                raise _too_slow(f"came with fewer than {self.slowest} bytes a second")
        if time.monotonic() >= deadline:  # it was cut, which looks like an end
            raise _too_slow(f"was not there within {self.seconds:g} s")
        if response.length:
            raise Unavailable(f"the content broke off after {total} bytes")


def _without_query(url: str) -> str:
    """An address without its parameters, among which keys may be."""
    return url.partition("?")[0]


def _check(response: http.client.HTTPResponse, url: str, most: int) -> None:
    _check_not_redirected(response, url, response.headers.get("location", "nowhere"))
    if response.status >= 500:
        raise Unavailable(f"{url} answers with the status {response.status}")
    if response.status != 200:
        raise BadInput(f"{url} answers with the status {response.status}")
    _check_content(response, url, most)


def _check_not_redirected(response: http.client.HTTPResponse, url: str, target: str = "") -> None:
    if 300 <= response.status < 400:
        to = f" to {target[:500]!r}" if target else ""
        raise BadInput(f"{url} redirects{to}; redirects are not followed: name that address")


def _check_content(response: http.client.HTTPResponse, url: str, most: int) -> None:
    encoding = response.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise BadInput(f"{url} answers with the content-encoding {encoding[:50]!r}; allowed: identity")
    if response.length is not None and response.length > most:
        raise TooLarge(f"the content has {response.length} bytes; allowed: {most}")


def _connect(addresses: list[str], port: int, seconds: float) -> socket.socket:
    """A connection to the first address that takes one."""
    for address in addresses[:-1]:
        with contextlib.suppress(OSError):
            return socket.create_connection((address, port), timeout=seconds)
    return socket.create_connection((addresses[-1], port), timeout=seconds)


def _cut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _write(into: BinaryIO, block: bytes) -> None:
    try:
        with disk.telling_full("the disk for a copy of the content"):
            into.write(block)
    except OSError as error:  # told apart from one of the connection
        raise StackError(f"the content cannot be kept: {error.strerror}") from error


def _too_slow(what: str) -> Unavailable:
    return Unavailable(f"the content {what}")
