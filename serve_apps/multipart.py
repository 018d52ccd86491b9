"""A file sent as multipart/form-data (RFC 7578), taken as it arrives: nothing of it is kept here.

The form has one part, named `file`, with a file name.
"""

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from stack.errors import BadInput

FIELD = "file"
MAX_HEADERS = 8 * 1024


class FileForm:
    """`write` what arrives; `name` is then the file's name, once it is known, and `take` gives what came of it."""

    def __init__(self, content_type: str) -> None:
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or not options.get(b"boundary"):
            message = f"the body is not multipart/form-data with a boundary, but {content_type[:80]!r}"
            raise BadInput(message, code="not_multipart")
        self.name: str | None = None
        self.size = 0
        self._blocks: list[bytes] = []
        self._header = b""
        self._value = b""
        self._headers = 0
        self._disposition = b""
        self._ended = False
        try:
            self._parser = MultipartParser(
                options[b"boundary"],
                {
                    "on_part_begin": self._begin,
                    "on_header_field": self._on_header,
                    "on_header_value": self._on_value,
                    "on_header_end": self._on_header_end,
                    "on_headers_finished": self._on_headers,
                    "on_part_data": self._on_data,
                    "on_end": self._end,
                },
            )
        except FormParserError as error:
            raise BadInput(f"the body is not multipart/form-data: {error}", code="not_multipart") from error

    def write(self, block: bytes) -> None:
        """Reads on. Raises BadInput for what is no such form."""
        try:
            self._parser.write(block)
        except FormParserError as error:
            raise BadInput(f"the body is not multipart/form-data: {error}", code="not_multipart") from error

    def take(self) -> bytes:
        """What has come of the file since the last time."""
        block = b"".join(self._blocks)
        self._blocks, self.size = [], 0
        return block

    def finish(self) -> None:
        """Raises BadInput unless the form is whole."""
        if not self._ended:
            raise BadInput("the body ends before the form does", code="not_multipart")
        if self.name is None:
            raise BadInput(f"the form has no file; it must have one part named {FIELD!r}", param=FIELD)

    def _begin(self) -> None:
        if self.name is not None:
            raise BadInput(f"the form has more than one part; allowed: one, named {FIELD!r}", param=FIELD)
        self._headers, self._disposition = 0, b""

    def _on_header(self, data: bytes, start: int, end: int) -> None:
        self._header += self._bounded(data[start:end])

    def _on_value(self, data: bytes, start: int, end: int) -> None:
        self._value += self._bounded(data[start:end])

    def _bounded(self, part: bytes) -> bytes:
        self._headers += len(part)
        if self._headers > MAX_HEADERS:
            raise BadInput(f"the headers of a part have more than {MAX_HEADERS} bytes", code="not_multipart")
        return part

    def _on_header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header = self._value = b""

    def _on_headers(self) -> None:
        _, options = parse_options_header(self._disposition)
        field = options.get(b"name", b"").decode("utf-8", "replace")
        name = options.get(b"filename", b"").decode("utf-8", "replace")
        if field != FIELD or not name:
            raise BadInput(
                f"the form has a part {field[:80]!r}; allowed: one part {FIELD!r}, with a file name", param=FIELD
            )
        self.name = name

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        self._blocks.append(data[start:end])
        self.size += end - start

    def _end(self) -> None:
        self._ended = True
