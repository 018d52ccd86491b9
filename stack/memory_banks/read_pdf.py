"""Reads a PDF's text: a program of its own, so that what it is given can take neither time nor memory.

    python -I read_pdf.py SECONDS MAX_PAGES MAX_CHARACTERS < FILE

It writes {"pages": [...]}, the text of each page, or {"problem": ..., "too_large": ...}. Nothing is written where its
bounds ended it. The reading is PDFium's, the library of Chromium.
"""

import json
import resource
import sys
from typing import Any

import pypdfium2
from pypdfium2.raw import FPDF_ERR_PASSWORD

MAX_MEMORY = 2**30


def main() -> None:
    seconds, max_pages, max_characters = (int(word) for word in sys.argv[1:])
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # the answer goes by a pipe
    print(json.dumps(pages(sys.stdin.buffer.read(), max_pages, max_characters)), flush=True)


def pages(content: bytes, max_pages: int, max_characters: int) -> dict[str, Any]:
    try:
        document = pypdfium2.PdfDocument(content)
    except pypdfium2.PdfiumError as error:
        if error.err_code == FPDF_ERR_PASSWORD:
            return {"problem": "is encrypted; allowed: files that open without a password"}
        return {"problem": f"is no PDF that can be read: {error}"}
    if len(document) > max_pages:
        return {"problem": f"has {len(document)} pages; allowed: at most {max_pages}", "too_large": True}
    texts: list[str] = []
    characters = 0
    for number in range(len(document)):
        try:
            text = document[number].get_textpage().get_text_range()
        except pypdfium2.PdfiumError as error:
            return {"problem": f"has a page that cannot be read, page {number + 1}: {error}"}
        characters += len(text)
        if characters > max_characters:
            return {"problem": f"has more than {max_characters} characters, which are the most", "too_large": True}
        texts.append(text)
    return {"pages": texts}


if __name__ == "__main__":
    main()
