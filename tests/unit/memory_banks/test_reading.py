"""The text of documents, from their bytes."""

from pathlib import Path

import pytest

from stack.errors import BadInput, TooLarge
from stack.memory_banks import reading
from stack.memory_banks.reading import Page, read
from tests.memory import pdf

ENCRYPTED = Path(__file__).with_name("encrypted.pdf")


def test_text_is_utf8_or_what_its_mark_or_its_charset_says() -> None:
    expected = (Page(None, "Größe\nzwei"),)
    assert read("Größe\r\nzwei".encode(), "text/plain", "content").pages == expected
    assert read("Größe\rzwei".encode("utf-8-sig"), "text/plain", "content").pages == expected
    assert read("Größe\nzwei".encode("utf-16"), "text/plain", "content").pages == expected
    assert read("Größe\nzwei".encode("cp1252"), 'text/plain; charset="windows-1252"', "content").pages == expected
    assert read(b"# One", "text/markdown", "content").format == "markdown"
    assert read(b"a,b", "text/csv", "content").format == "text"


def test_html_becomes_markdown_without_what_nobody_reads() -> None:
    html = (
        '<html><head><meta charset="iso-8859-1"><title>T</title><style>p {}</style><script>alert(1)</script></head>'
        '<body><h1>Größe</h1><p>Some <b>text</b>.</p><img alt="a sail" src="data:image/png;base64,AAAA">'
        "<pre><code>def f():\n    return 1</code></pre><table><tr><th>a</th></tr><tr><td>1</td></tr></table></html>"
    )
    found = read(html.encode("latin-1"), "text/html", "content")
    text = found.pages[0].text
    assert found.format == "html"
    assert "# Größe\n\nSome **text**." in text
    assert "```\ndef f():\n    return 1\n```" in text
    assert "| a |" in text
    assert "alert" not in text
    assert "base64" not in text


def test_a_pdf_is_read_page_by_page() -> None:
    found = read(pdf("The first page", "The second page"), "application/pdf", "content")
    assert [page.number for page in found.pages] == [1, 2]
    assert [page.text.strip() for page in found.pages] == ["The first page", "The second page"]


@pytest.mark.parametrize(
    ("content", "mime_type", "message"),
    [
        (b"", "text/plain", "is empty"),
        (b" \n\t", "text/plain", "is empty"),
        (b"a", "image/png", "allowed: text/plain"),
        (b"a", "", "allowed: text/plain"),
        (b"a", "text/plain; charset=zlib", "charset 'zlib'"),
        (b"a", "text/plain; charset=idna", "charset 'idna'"),
        (b"a\x00b", "text/plain", "is binary"),
        (b"\x89PNG\r\n\x1a\n\xff", "text/markdown", "is binary"),
        (b"%PDF-1.7", "text/plain", "are a PDF's"),
        (b"plain", "application/pdf", "are no PDF's"),
        (b"%PDF-1.7 and then nothing", "application/pdf", "no PDF that can be read"),
        (b"plain", "text/html", "has no tags"),
        (b"<p></p>", "text/html", "has no text"),
        (b"<div>" * 5_000 + b"deep", "text/html", "would be lost"),
    ],
)
def test_what_cannot_be_read_is_refused_with_what_is_allowed(content: bytes, mime_type: str, message: str) -> None:
    with pytest.raises(BadInput, match=message) as raised:
        read(content, mime_type, "documents.3.content")
    assert raised.value.param == "documents.3.content"
    assert raised.value.message.startswith("documents.3.content ")


def test_an_encrypted_pdf_is_refused() -> None:
    with pytest.raises(BadInput, match="is encrypted"):
        read(ENCRYPTED.read_bytes(), "application/pdf", "content")


def test_a_pdf_without_text_is_refused() -> None:
    with pytest.raises(BadInput, match="pictures alone"):
        read(pdf("", ""), "application/pdf", "content")


def test_what_is_over_a_bound_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_CHARACTERS", 100)
    monkeypatch.setattr(reading, "MAX_BYTES", 100_000)
    monkeypatch.setattr(reading, "MAX_PAGES", 2)
    with pytest.raises(TooLarge, match="200 characters"):
        read(b"a" * 200, "text/plain", "content")
    with pytest.raises(TooLarge, match="200000 bytes"):
        read(b"a" * 200_000, "text/plain", "content")
    with pytest.raises(TooLarge, match="has 3 pages"):
        read(pdf("a", "b", "c"), "application/pdf", "content")
    with pytest.raises(TooLarge, match="more than 100 characters"):
        read(pdf("a" * 90, "b" * 90), "application/pdf", "content")


def test_a_pdf_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "SECONDS", 0)
    with pytest.raises(BadInput, match="at most 0 s"):
        read(pdf("a"), "application/pdf", "content")
