"""The text of a document: from the bytes that were given, of a type that is checked against them."""

import codecs
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from email.message import Message
from typing import Literal

from html_to_markdown import ConversionOptions, WarningKind, convert
from html_to_markdown.exceptions import ConversionError

from stack.errors import BadInput, TooLarge
from stack.memory_banks import read_pdf

# Of one document.
MAX_BYTES = 32 * 2**20
MAX_HTML_BYTES = 4 * 2**20
MAX_PAGES = 2_000
MAX_CHARACTERS = 5_000_000
# Of a PDF, the start of the process that reads it included.
SECONDS = 60

ALLOWED = "text/plain, text/markdown, text/html, application/pdf and other text/*"
_ALIASES = {
    "text/x-markdown": "text/markdown",
    "application/xhtml+xml": "text/html",
    "application/x-pdf": "application/pdf",
}
# By Python's names. What decodes by running rules of its own (idna, unicode_escape) is none of them.
_ENCODINGS = (
    "utf-8", "utf-16", "utf-16-le", "utf-16-be", "ascii",
    *(f"iso8859-{part}" for part in (*range(1, 12), *range(13, 17))),
    *(f"cp{page}" for page in (1250, 1251, 1252, 1253, 1254, 1255, 1256, 1257, 1258, 874, 932, 949)),
    "koi8-r", "koi8-u", "shift_jis", "euc_jp", "iso2022_jp", "gbk", "gb2312", "gb18030", "big5", "euc_kr",
)  # fmt: skip
_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
_PDF = b"%PDF-"
# Where the PDF's mark may stand, and where HTML says its encoding (WHATWG HTML, 13.2.3.2).
_BEGINNING = 1024
_HTML_CHARSET = re.compile(rb"<meta[^>]{0,200}?charset\s{0,8}=\s{0,8}[\"']?([\w.:-]{1,40})", re.IGNORECASE)
_TAG = re.compile(r"<[A-Za-z!/]")
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1a\x1c-\x1f]")
_BLANK_LINES = re.compile(r"\n(?:[ \t]*\n){3,}")
_BLANKS = re.compile(r"[^\S\n]{200,}")


@dataclass(frozen=True, slots=True)
class Page:
    """A page's text. Its number counts from 1; what is no PDF is one page without a number."""

    number: int | None
    text: str


@dataclass(frozen=True, slots=True)
class ReadText:
    """A document's pages. HTML has been turned into Markdown: then the format is "html"."""

    pages: tuple[Page, ...]
    format: Literal["text", "markdown", "html"]


def read(content: bytes, mime_type: str, name: str) -> ReadText:
    """The text of a document, with "\\n" at the ends of lines and long runs of blanks made short.

    `name` is how errors call the document, the request's field as a rule. Text is UTF-8, or what its byte order mark,
    the type's charset or HTML's meta element says. This takes time: up to SECONDS for a PDF, which a process of its own
    reads. Raises BadInput for a type that is not allowed or does not fit the bytes, and for what is empty, binary,
    encrypted or broken; TooLarge over the bounds above.
    """
    kind, charset = _kind(mime_type, name)
    if not content.strip():
        raise BadInput(f"{name} is empty; allowed: documents with text", param=name)
    most = MAX_HTML_BYTES if kind == "text/html" else MAX_BYTES
    if len(content) > most:
        raise TooLarge(f"{name} has {len(content)} bytes; allowed for {kind}: at most {most}", param=name)
    is_pdf = _PDF in content[:_BEGINNING] if kind == "application/pdf" else content.startswith(_PDF)
    if is_pdf != (kind == "application/pdf"):
        found = "are a PDF's" if is_pdf else "are no PDF's"
        raise BadInput(f"{name} is said to be {kind}, but its bytes {found}; allowed: the type that it is", param=name)
    if is_pdf:
        return _require_text(ReadText(_pdf_pages(content, name), "text"), name)
    text = _decoded(content, charset or (_html_charset(content) if kind == "text/html" else None), name)
    if kind == "text/html":
        return _require_text(ReadText((Page(None, _plain(_markdown(text, name))),), "html"), name)
    return _require_text(ReadText((Page(None, _plain(text)),), "markdown" if kind == "text/markdown" else "text"), name)


def _kind(mime_type: str, name: str) -> tuple[str, str | None]:
    """The type without its parameters, by its usual name, and its charset."""
    message = Message()
    message["content-type"] = mime_type if mime_type.isprintable() else ""
    kind = mime_type.partition(";")[0].strip().lower()
    kind = _ALIASES.get(kind, kind)
    if kind != "application/pdf" and not re.fullmatch(r"text/[\w.+-]{1,100}", kind):
        raise BadInput(f"{name} has the mime type {mime_type[:100]!r}; allowed: {ALLOWED}", param=name)
    return kind, message.get_content_charset()


def _html_charset(content: bytes) -> str | None:
    said = _HTML_CHARSET.search(content[:_BEGINNING])
    return said[1].decode("ascii") if said else None


def _decoded(content: bytes, charset: str | None, name: str) -> str:
    mark, encoding = next(((mark, one) for mark, one in _MARKS if content.startswith(mark)), (b"", charset or "utf-8"))
    try:
        known = codecs.lookup(encoding).name
    except LookupError:
        known = ""
    if known not in _ENCODINGS:
        raise BadInput(f"{name} has the charset {encoding!r}; allowed: {', '.join(_ENCODINGS)}", param=name)
    try:
        text = content[len(mark) :].decode(known)
    except UnicodeDecodeError as error:
        problem = f"its byte {error.start} is no {known}; allowed: text in UTF-8, or in the charset of its mime type"
        raise BadInput(f"{name} is binary or in another encoding: {problem}", param=name) from error
    if control := _CONTROL.search(text):
        problem = f"character {control.start()} is {control[0]!r}; allowed: text without control characters"
        raise BadInput(f"{name} is binary: {problem}", param=name)
    return text


def _markdown(text: str, name: str) -> str:
    if not _TAG.search(text):
        raise BadInput(f"{name} is said to be HTML, but has no tags; allowed: the type that it is", param=name)
    options = ConversionOptions(
        extract_metadata=False, compact_tables=True, autolinks=False, inline_data_media="alt_text_only"
    )
    try:
        converted = convert(text, options)
    except ConversionError as error:
        raise BadInput(f"{name} is no HTML that can be read: {error}", param=name) from error
    if lost := [warning.message for warning in converted.warnings if warning.kind == WarningKind.DEPTH_LIMIT_EXCEEDED]:
        raise BadInput(f"{name} is HTML of which a part would be lost: {lost[0]}", param=name)
    return converted.content or ""


def _pdf_pages(content: bytes, name: str) -> tuple[Page, ...]:
    command = [sys.executable, "-I", read_pdf.__file__, *map(str, (SECONDS, MAX_PAGES, MAX_CHARACTERS))]
    try:
        done = subprocess.run(command, input=content, capture_output=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise BadInput(f"{name} takes longer to read; allowed: PDFs of at most {SECONDS} s", param=name) from error
    if not done.stdout:
        said = (done.stderr.decode(errors="replace").strip().splitlines() or [f"exit {done.returncode}"])[-1][:200]
        raise BadInput(f"{name} cannot be read within the bounds on time and memory: {said}", param=name)
    answer = json.loads(done.stdout)
    if problem := answer.get("problem"):
        raise (TooLarge if answer.get("too_large") else BadInput)(f"{name} {problem}", param=name)
    # U+FFFE is PDFium's mark of a word that goes on in the next line.
    return tuple(
        Page(number, _plain(_CONTROL.sub("", text.replace("\ufffe", ""))))
        for number, text in enumerate(answer["pages"], start=1)
    )


def _plain(text: str) -> str:
    """Lines end with "\\n"; of a long run of blanks or empty lines stays what still means one."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return _BLANKS.sub(" " * 8, _BLANK_LINES.sub("\n\n\n", text))


def _require_text(text: ReadText, name: str) -> ReadText:
    characters = sum(len(page.text) for page in text.pages)
    if characters > MAX_CHARACTERS:
        raise TooLarge(f"{name} has {characters} characters; allowed: at most {MAX_CHARACTERS}", param=name)
    if not any(page.text.strip() for page in text.pages):
        what = "whose pages are pictures alone" if text.pages[:1] and text.pages[0].number else "that hold none"
        raise BadInput(f"{name} has no text; allowed: documents with text, and none {what}", param=name)
    return text
