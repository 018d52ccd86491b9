"""The fetcher: which addresses are public, and what real servers can and cannot make it do."""

import datetime
import errno
import http.server
import io
import ipaddress
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from stack import fetcher
from stack.errors import BadInput, StackError, StorageFull, TooLarge, Unavailable
from stack.fetcher import Address, Fetcher, is_public

HOST = "data.example.org"
CONTENT = bytes(range(256)) * 40


# Which addresses are public


@pytest.mark.parametrize(
    "address",
    [
        *(
            "0.0.0.0",
            "0.1.2.3",
            "10.0.0.1",
            "10.255.255.255",
            "127.0.0.1",
            "127.255.0.1",
            "172.16.0.1",
            "172.31.255.255",
        ),
        *("192.168.0.1", "169.254.169.254", "169.254.0.1", "100.64.0.1", "100.127.255.255", "100.100.100.200"),
        *("192.0.0.1", "192.0.0.170", "192.0.2.1", "198.51.100.1", "203.0.113.9", "198.18.0.1", "198.19.255.255"),
        *("192.88.99.1", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255"),
        *("::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::ffff:0:8.8.8.8", "::8.8.8.8"),
        *("64:ff9b::8.8.8.8", "64:ff9b::127.0.0.1", "64:ff9b:1::1", "100::1", "2001::1", "2001:0:a9fe:a9fe::1"),
        *("2001:10::1", "2001:20::1", "2001:db8::1", "2002:7f00:1::", "2002:808:808::1", "3fff::1", "5f00::1"),
        *("fc00::1", "fd00:ec2::254", "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1", "ff0e::1", "4000::1"),
    ],
)
def test_what_is_not_public_is_not_allowed(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address",
    [
        *(
            "8.8.8.8",
            "1.1.1.1",
            "93.184.216.34",
            "172.15.0.1",
            "172.32.0.1",
            "100.63.255.255",
            "100.128.0.1",
            "198.20.0.1",
        ),
        *("223.255.255.255", "2606:4700:4700::1111", "2001:4860:4860::8888", "2a00:1450:4001::1"),
    ],
)
def test_public_addresses_are_allowed(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "LOCALHOST", "localhost.", "127.0.0.1", "127.1", "0", "0.0.0.0", "2130706433", "0x7f000001"),
        *("0x7f.1", "0177.0.0.1", "017700000001", "[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]"),
        *("169.254.169.254", "0xa9fea9fe", "2852039166", "10.0.0.1", "[fe80::1]", "[64:ff9b::7f00:1]", "①②⑦.⓪.⓪.①"),
    ],
)
def test_no_way_to_write_an_inner_address_is_allowed(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the system's own resolver, which knows many."""
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("it has connected"))
    with pytest.raises(BadInput):
        Fetcher().fetch(f"https://{host}/a.jsonl", io.BytesIO(), 1_000)


@pytest.mark.parametrize(
    "addresses",
    [["10.0.0.1"], ["8.8.8.8", "127.0.0.1"], ["127.0.0.1", "8.8.8.8"], ["8.8.8.8", "::1"], []],
    ids=["private", "public first", "private first", "of another family", "none"],
)
def test_one_address_that_is_not_public_is_enough(addresses: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("it has connected"))
    fetching = Fetcher(resolve=lambda host, port: addresses)
    with pytest.raises(BadInput, match=r"data\.example\.org may not be asked") as caught:
        fetching.fetch(f"https://{HOST}/a.jsonl", io.BytesIO(), 1_000)
    assert not any(address in caught.value.message for address in addresses), "what a name inside means is not told"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://example.org/a.jsonl", "allowed: https://"),
        ("ftp://example.org/a.jsonl", "allowed: https://"),
        ("https:///a.jsonl", "allowed: https://"),
        ("https://user@example.org/a.jsonl", "user name"),
        ("https://:password@example.org/a.jsonl", "user name"),
        ("https://example.org@127.0.0.1/a.jsonl", "user name"),
        ("https://example.org:22/a.jsonl", "the port 22 may not be asked; allowed: 443"),
        ("https://example.org:80/a.jsonl", "the port 80"),
        ("https://example.org:99999/a.jsonl", "is no address"),
        ("https://example.org:x/a.jsonl", "is no address"),
        ("https://[::1/a.jsonl", "is no address"),
        ("https://" + "a" * 64 + ".org/a.jsonl", "is no address"),
        ("https://example.org/a b.jsonl", "percent-encoded"),
        ("https://example.org/ä.jsonl", "percent-encoded"),
        ("https://example.org/a\x00.jsonl", "percent-encoded"),
        ("https://example.org\\@127.0.0.1/a.jsonl", ""),
        ("https://none.invalid/a.jsonl", "there is no host 'none.invalid'"),
    ],
)
def test_addresses_that_are_not_fetched(url: str, words: str) -> None:
    with pytest.raises(BadInput) as caught:
        Fetcher().fetch(url, io.BytesIO(), 1_000)
    assert words in caught.value.message


# Real servers, on this machine


class Authority:
    """A certificate authority for tests."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tests")])
        self.certificate = self._sign(self._name, self._key.public_key(), x509.BasicConstraints(ca=True, path_length=0))

    def server(self, host: str) -> ssl.SSLContext:
        """What a server needs to prove that it is this host."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.SubjectAlternativeName([x509.DNSName(host)])
        certificate = self._sign(x509.Name([]), key.public_key(), name)
        file = self._folder / f"{host}.pem"
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        file.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(file)
        return context

    def client(self) -> ssl.SSLContext:
        """What believes this authority."""
        text = self.certificate.public_bytes(serialization.Encoding.PEM).decode()
        return ssl.create_default_context(cadata=text)

    def _sign(self, name: x509.Name, key: Any, extension: x509.ExtensionType) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(extension, critical=not name.rdns or isinstance(extension, x509.BasicConstraints))
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .sign(self._key, hashes.SHA256())
        )


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


Answer = Callable[[http.server.BaseHTTPRequestHandler], None]


@contextmanager
def serving(tls: ssl.SSLContext, answer: Answer) -> Iterator[tuple[int, list[Any]]]:
    """A server on 127.0.0.1; gives its port, and the requests that it has had: the path and the headers."""
    requests: list[Any] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            requests.append((self.path, dict(self.headers)))
            self.close_connection = True
            with suppress(OSError):  # the client may leave
                answer(self)

        do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *_: Any) -> None:
            pass

    server = Server(("127.0.0.1", 0), Handler)
    server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server.server_address[1], requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def is_this_machine(address: Address) -> bool:
    return address.is_loopback


@pytest.fixture
def fetch(authority: Authority) -> Iterator[Callable[..., bytes]]:
    """Fetches from a server that answers so, which is found under HOST."""

    def fetch(
        answer: Answer, most: int = 100_000, path: str = "/a.jsonl?x=1", host: str = HOST, **options: Any
    ) -> bytes:
        with serving(authority.server(host), answer) as (port, requests):
            fetching = Fetcher(
                resolve=lambda *_: ["127.0.0.1"],
                is_allowed=is_this_machine,
                ports=frozenset({port}),
                tls=authority.client(),
                **options,
            )
            into = io.BytesIO()
            try:
                fetching.fetch(f"https://{HOST}:{port}{path}", into, most)
            finally:
                seen.extend(requests)
            return into.getvalue()

    seen: list[Any] = []
    fetch.seen = seen  # type: ignore[attr-defined]
    return fetch


def sends(status: int = 200, content: bytes = CONTENT, **headers: str) -> Answer:
    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    return answer


def in_chunks(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    for start in range(0, len(CONTENT), 1_000):
        block = CONTENT[start : start + 1_000]
        handler.wfile.write(b"%x\r\n%s\r\n" % (len(block), block))
    handler.wfile.write(b"0\r\n\r\n")


def without_end(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(bytes(10_000))


def drips(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    wait = threading.Event()
    while not wait.wait(0.02):
        handler.wfile.write(b"x")


def drips_headers(handler: http.server.BaseHTTPRequestHandler) -> None:
    wait = threading.Event()
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
    while not wait.wait(0.02):
        handler.wfile.write(b"x")


def says_wait(handler: http.server.BaseHTTPRequestHandler) -> None:
    while True:
        handler.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")


def says_nothing(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.rfile.read(1)


def breaks_off(handler: http.server.BaseHTTPRequestHandler) -> None:
    sends(content=CONTENT[:100], Content_Length=str(len(CONTENT)))(handler)


@pytest.mark.parametrize("answer", [sends(), in_chunks], ids=["whole", "in chunks"])
def test_what_lies_at_an_address_is_fetched(fetch: Any, answer: Answer) -> None:
    assert fetch(answer) == CONTENT
    ((path, headers),) = fetch.seen
    assert path == "/a.jsonl?x=1"
    assert headers["Host"].startswith(f"{HOST}:")
    assert headers["Accept-Encoding"] == "identity"
    assert {name.lower() for name in headers} == {"host", "accept", "accept-encoding", "user-agent", "connection"}


def test_the_name_is_looked_up_once_and_the_connection_goes_where_was_checked(authority: Authority) -> None:
    """A name server that gives a public address first and then another one gets nowhere."""
    answers = iter([["127.0.0.1"], ["127.0.0.2"], ["127.0.0.2"]])
    with serving(authority.server(HOST), sends()) as (port, requests):
        fetching = Fetcher(
            resolve=lambda *_: next(answers),
            is_allowed=lambda address: str(address) == "127.0.0.1",
            ports=frozenset({port}),
            tls=authority.client(),
        )
        fetching.fetch(f"https://{HOST}:{port}/", io.BytesIO(), 100_000)
        assert next(answers) == ["127.0.0.2"], "it was looked up again"
        with pytest.raises(BadInput, match="may not be asked"):
            fetching.fetch(f"https://{HOST}:{port}/", io.BytesIO(), 100_000)
        assert len(requests) == 1


def test_a_second_address_is_asked_if_the_first_one_is_not_there(authority: Authority) -> None:
    with serving(authority.server(HOST), sends()) as (port, _):
        fetching = Fetcher(
            resolve=lambda *_: ["127.0.0.9", "127.0.0.1"],
            is_allowed=is_this_machine,
            ports=frozenset({port}),
            tls=authority.client(),
        )
        into = io.BytesIO()
        fetching.fetch(f"https://{HOST}:{port}/", into, 100_000)
        assert into.getvalue() == CONTENT


def test_a_server_must_prove_its_name(fetch: Any) -> None:
    with pytest.raises(BadInput, match=f"{HOST} cannot prove that it is {HOST}"):
        fetch(sends(), host="other.example.org")
    assert fetch.seen == []


def test_only_known_authorities_are_believed(authority: Authority) -> None:
    with serving(authority.server(HOST), sends()) as (port, requests):
        fetching = Fetcher(resolve=lambda *_: ["127.0.0.1"], is_allowed=is_this_machine, ports=frozenset({port}))
        with pytest.raises(BadInput, match="cannot prove"):
            fetching.fetch(f"https://{HOST}:{port}/", io.BytesIO(), 100_000)
        assert requests == []


def test_proxies_of_the_environment_are_not_asked(fetch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert fetch(sends()) == CONTENT


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed_but_named(fetch: Any, status: int) -> None:
    with pytest.raises(BadInput, match=r"redirects to 'https://127\.0\.0\.1/secret'; redirects are not followed"):
        fetch(sends(status, b"", Location="https://127.0.0.1/secret"))
    assert len(fetch.seen) == 1


@pytest.mark.parametrize(
    ("status", "error"),
    [(404, BadInput), (403, BadInput), (204, BadInput), (206, BadInput), (500, Unavailable), (503, Unavailable)],
)
def test_other_answers_are_refused_with_their_status(fetch: Any, status: int, error: type[StackError]) -> None:
    with pytest.raises(error, match=f"answers with the status {status}"):
        fetch(sends(status, b""))


def test_content_that_is_just_as_large_as_allowed_is_taken(fetch: Any) -> None:
    assert fetch(sends(), most=len(CONTENT)) == CONTENT


def test_too_much_content_is_refused_as_it_is_declared(fetch: Any) -> None:
    with pytest.raises(TooLarge, match=f"{len(CONTENT)} bytes; allowed: {len(CONTENT) - 1}"):
        fetch(sends(), most=len(CONTENT) - 1)


@pytest.mark.parametrize("answer", [in_chunks, without_end], ids=["in chunks", "without end"])
def test_too_much_content_is_cut_as_it_comes(fetch: Any, answer: Answer) -> None:
    with pytest.raises(TooLarge, match="more than 5000 bytes"):
        fetch(answer, most=5_000)


@pytest.mark.parametrize(
    "answer",
    [
        *(sends(status, b"", Location="https://elsewhere.org/?key=hunter2") for status in (302, 401, 500)),
        *(sends(Content_Encoding="gzip"), without_end, breaks_off, says_nothing),
    ],
)
def test_what_is_wrong_with_an_answer_to_what_was_sent_does_not_tell_its_address(
    authority: Authority, answer: Answer
) -> None:
    """It may be the config's, and hold a key."""
    with serving(authority.server(HOST), answer) as (port, _):
        options: dict[str, Any] = dict(resolve=lambda *_: ["127.0.0.1"], is_allowed=is_this_machine)
        fetching = Fetcher(**options, ports=frozenset({port}), tls=authority.client(), idle_seconds=0.3)
        with pytest.raises(Unavailable) as caught:
            fetching.send(f"https://{HOST}:{port}/hunter2?key=hunter2", "GET", {}, b"", 1_000)
    assert "hunter2" not in caught.value.message


@pytest.mark.parametrize(
    "url", ["http://example.org/?key=hunter2", "https://[::1/?key=hunter2", "https://example.org/ä?key=hunter2"]
)
def test_the_parameters_of_an_address_that_is_not_allowed_are_not_repeated(url: str) -> None:
    with pytest.raises(BadInput) as caught:
        Fetcher().send(url, "POST", {}, b"", 1_000)
    assert "hunter2" not in caught.value.message
    assert url.partition("?")[0] in caught.value.message


@pytest.mark.parametrize("encoding", ["gzip", "br", "zstd", "gzip, identity"])
def test_content_that_is_packed_unasked_is_refused(fetch: Any, encoding: str) -> None:
    with pytest.raises(BadInput, match="content-encoding"):
        fetch(sends(Content_Encoding=encoding))


@pytest.mark.parametrize("answer", [drips, drips_headers, says_wait, without_end], ids=lambda one: one.__name__)
def test_a_fetch_ends_at_its_deadline_whatever_the_server_does(fetch: Any, answer: Answer) -> None:
    with pytest.raises(Unavailable, match=r"was not there within 0\.5 s"):
        fetch(answer, most=2**40, seconds=0.5)


def test_content_that_comes_too_slowly_is_cut(fetch: Any) -> None:
    with pytest.raises(Unavailable, match="fewer than 16384 bytes a second"):
        fetch(drips, idle_seconds=0.3)


def test_a_server_that_says_nothing_is_given_up(fetch: Any) -> None:
    with pytest.raises(Unavailable, match=r"does not answer as it should: .*timed out"):
        fetch(says_nothing, idle_seconds=0.3)


def test_content_that_breaks_off_is_refused(fetch: Any) -> None:
    with pytest.raises(Unavailable, match="broke off after 100 bytes"):
        fetch(breaks_off)


def test_a_server_that_speaks_no_http_is_refused(fetch: Any) -> None:
    with pytest.raises(Unavailable, match="does not answer as it should"):
        fetch(lambda handler: handler.wfile.write(b"SSH-2.0-OpenSSH\r\n"))


def test_nobody_there_is_unavailable(authority: Authority) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # but it does not listen
        port = taken.getsockname()[1]
        fetching = Fetcher(resolve=lambda *_: ["127.0.0.1"], is_allowed=is_this_machine, ports=frozenset({port}))
        with pytest.raises(Unavailable, match="does not answer"):
            fetching.fetch(f"https://{HOST}:{port}/", io.BytesIO(), 1_000)


def test_a_full_disk_is_507(authority: Authority) -> None:
    with (
        serving(authority.server(HOST), sends()) as (port, _),
        open("/dev/full", "wb", buffering=0) as full,
    ):
        fetching = Fetcher(
            resolve=lambda *_: ["127.0.0.1"],
            is_allowed=is_this_machine,
            ports=frozenset({port}),
            tls=authority.client(),
        )
        with pytest.raises(StorageFull, match="No space left"):
            fetching.fetch(f"https://{HOST}:{port}/", full, 100_000)  # type: ignore[arg-type]


def test_a_disk_that_fails_otherwise_is_neither_full_nor_the_hosts_fault(authority: Authority) -> None:
    class Broken(io.BytesIO):
        def write(self, _: Any) -> int:
            raise OSError(errno.EIO, "Input/output error")

    with serving(authority.server(HOST), sends()) as (port, _):
        fetching = Fetcher(
            resolve=lambda *_: ["127.0.0.1"],
            is_allowed=is_this_machine,
            ports=frozenset({port}),
            tls=authority.client(),
        )
        with pytest.raises(StackError, match="cannot be kept: Input/output error") as caught:
            fetching.fetch(f"https://{HOST}:{port}/", Broken(), 100_000)
    assert type(caught.value) is StackError


def test_a_fetch_leaves_no_thread_behind(fetch: Any) -> None:
    before = set(threading.enumerate())
    fetch(sends())
    assert not set(threading.enumerate()) - before


def test_the_one_that_is_used_allows_only_public_addresses() -> None:
    default = Fetcher()
    assert default.is_allowed is is_public
    assert default.resolve is fetcher.resolve
    assert default.ports == {443}
    assert default.tls.check_hostname
    assert default.tls.verify_mode == ssl.CERT_REQUIRED


# Asking with any method


@pytest.fixture
def ask(authority: Authority) -> Iterator[Callable[..., fetcher.Answer]]:
    """Asks a server that answers so, which is found under HOST."""

    def ask(
        answer: Answer,
        method: str = "GET",
        headers: dict[str, str] | None = None,
        content: bytes | None = None,
        most: int = 100_000,
        cut: fetcher.Cut | None = None,
    ) -> fetcher.Answer:
        with serving(authority.server(HOST), answer) as (port, requests):
            asking = Fetcher(
                resolve=lambda *_: ["127.0.0.1"],
                is_allowed=is_this_machine,
                ports=frozenset({port}),
                tls=authority.client(),
            )
            try:
                return asking.ask(f"https://{HOST}:{port}/a?x=1", method, headers or {}, content, most, cut)
            finally:
                seen.extend(requests)

    seen: list[Any] = []
    ask.seen = seen  # type: ignore[attr-defined]
    return ask


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE"])
def test_what_is_asked_is_sent_and_what_is_answered_is_given(ask: Any, method: str) -> None:
    def echoes(handler: http.server.BaseHTTPRequestHandler) -> None:
        said = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        sends(200, f"{handler.command} {said.decode()}".encode(), Content_Type="text/plain; charset=utf-8")(handler)

    content = b'{"a": 1}' if method in ("POST", "PUT") else None
    answer = ask(echoes, method, {"X-Key": "k", "accept": "text/plain"}, content)
    said = f"{method} {content.decode() if content else ''}".encode()
    assert answer == fetcher.Answer(200, "text/plain; charset=utf-8", said)
    ((path, headers),) = ask.seen
    assert path == "/a?x=1"
    sent = {name.lower(): value for name, value in headers.items()}
    assert (sent["x-key"], sent["accept"]) == ("k", "text/plain")
    assert sent.get("content-type") == ("application/json" if content else None)


@pytest.mark.parametrize("status", [200, 201, 204, 400, 404, 500, 503])
def test_other_statuses_than_redirects_are_given(ask: Any, status: int) -> None:
    assert ask(sends(status, b"")).status == status


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (sends(302, b"", Location="https://127.0.0.1/secret"), "redirects are not followed"),
        (sends(Content_Encoding="gzip"), "content-encoding"),
        (without_end, "more than 100000 bytes"),
        (breaks_off, "broke off"),
    ],
)
def test_what_is_asked_and_not_answered_as_it_should_is_unavailable(ask: Any, answer: Answer, words: str) -> None:
    with pytest.raises(Unavailable, match=words) as caught:
        ask(answer)
    assert "secret" not in caught.value.message


@pytest.mark.parametrize(
    "headers",
    [{"Host": "inside"}, {"content-length": "1"}, {"X A": "b"}, {"X-A": "b\r\nX-C: d"}, {"X-A": "ä"}, {"X-A": "\0"}],
)
def test_headers_that_are_not_the_askers_are_refused(ask: Any, headers: dict[str, str]) -> None:
    with pytest.raises(BadInput, match="cannot be sent"):
        ask(sends(), headers=headers)
    assert ask.seen == []


def test_what_is_asked_can_be_cut_off_by_another_thread(ask: Any) -> None:
    cut, ended = fetcher.Cut(), threading.Event()

    def hangs(handler: http.server.BaseHTTPRequestHandler) -> None:
        cut()
        handler.rfile.read(1)
        ended.set()

    with pytest.raises(Unavailable, match="does not answer"):
        ask(hangs, cut=cut)
    assert ended.wait(10)


def test_what_is_cut_off_before_it_begins_is_not_asked(ask: Any) -> None:
    cut = fetcher.Cut()
    cut()
    with pytest.raises(Unavailable, match="it was given up"):
        ask(sends(), cut=cut)
    assert ask.seen == []


def test_http_is_asked_only_where_it_is_allowed() -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Says)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    url = f"http://127.0.0.1:{server.server_address[1]}/"
    try:
        with pytest.raises(BadInput, match="allowed: https"):
            Fetcher(is_allowed=is_this_machine, ports=None).ask(url, "GET", {}, None, 100)
        inside = Fetcher(is_allowed=is_this_machine, ports=None, takes_http=True)
        assert inside.ask(url, "GET", {}, None, 100) == fetcher.Answer(200, "text/plain", b"here")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Says(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        sends(200, b"here", Content_Type="text/plain")(self)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize("url", ["http://example.org/", "https://example.org:8080/", "file:///etc/passwd", "https://"])
def test_what_could_not_be_asked_is_told_without_asking(url: str) -> None:
    with pytest.raises(BadInput):
        Fetcher().require_askable(url)
    Fetcher().require_askable("https://none.invalid/")
