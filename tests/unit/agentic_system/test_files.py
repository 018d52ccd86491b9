"""Attachments of turns as files."""

import threading

import pytest

from stack.agentic_system import files
from stack.agentic_system.files import files_of, is_image, is_text
from stack.api.messages import Attachment
from stack.errors import BadInput, TooLarge, Unavailable
from stack.fetcher import Fetcher


def of(content: str | list[str], mime_type: str = "text/plain") -> Attachment:
    return Attachment(content=content, mime_type=mime_type)


@pytest.mark.parametrize(
    ("mime_type", "text", "image"),
    [
        ("text/plain; charset=utf-8", True, False),
        ("TEXT/CSV", True, False),
        ("application/pdf", True, False),
        ("application/json", True, False),
        ("image/png", False, True),
        ("application/zip", False, False),
    ],
)
def test_kinds(mime_type: str, text: bool, image: bool) -> None:
    assert (is_text(of("x", mime_type)), is_image(of("x", mime_type))) == (text, image)


async def test_files_that_do_not_come_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    is_over = threading.Event()
    monkeypatch.setattr(files, "SECONDS", 0.05)
    monkeypatch.setattr(files, "_content", lambda *_: is_over.wait(10) and b"")
    with pytest.raises(Unavailable, match="not there within"):
        await files_of([of("a note")])
    is_over.set()


async def test_files_have_contents_and_names_of_their_own() -> None:
    given = [of("a note"), of(["in ", "parts"]), of("data:image/png;base64,AAEC", "image/png"), of("data:,x%20y")]
    assert [(file.name, file.content) for file in await files_of(given)] == [
        ("attachment_1.txt", b"a note"),
        ("attachment_2.txt", b"in parts"),
        ("attachment_3.png", b"\x00\x01\x02"),
        ("attachment_4.txt", b"x y"),
    ]


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("https://files.test/data/rivers.csv?x=1", "rivers.csv"),
        ("https://files.test/a%2Fb%2F..%2F..%2Fetc%2Fpasswd", "passwd"),
        ("https://files.test/.bashrc", "bashrc"),
        ("https://files.test/a b;rm -r.sh", "https"),
        ("https://files.test/", "attachment_1.csv"),
        ("https://files.test/..", "attachment_1.csv"),
        ("https://files.test/" + "x" * 300 + ".csv", "x" * 96 + ".csv"),
    ],
)
async def test_names_from_addresses_are_safe(monkeypatch: pytest.MonkeyPatch, address: str, name: str) -> None:
    monkeypatch.setattr(Fetcher, "fetch", lambda _, url, into, most: into.write(b"1"))
    (file,) = await files_of([of(address, "text/csv")])
    if name == "https":  # with a blank it is a text, and no address
        assert file.content == address.encode()
    else:
        assert file.name == name


async def test_the_same_name_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fetcher, "fetch", lambda _, url, into, most: into.write(b"1"))
    given = [of("https://a.test/x.csv"), of("https://b.test/x.csv"), of("https://c.test/x.csv"), of("https://c.test/x")]
    assert [file.name for file in await files_of(given)] == ["x.csv", "x_2.csv", "x_3.csv", "x"]


async def test_too_much_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_BYTES", 10)
    with pytest.raises(BadInput, match="more than 10 bytes together"):
        await files_of([of("12345"), of("678901")])
    with pytest.raises((BadInput, TooLarge)) as error:
        await files_of([of("data:text/plain;base64," + "QUFB" * 100)])
    assert error.value.param in ("attachments.0.content", "attachments")
