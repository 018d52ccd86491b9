"""Addresses that users give in the place of a content, and data: addresses, which hold theirs."""

import base64
import binascii
from urllib.parse import unquote, unquote_to_bytes

from stack.errors import BadInput, TooLarge

_WITH_SLASHES = ("https", "http", "file")


def address_in(content: str, *more_schemes: str) -> str | None:
    """The address that a content is, with its scheme in lower case; None for a text that at most begins like one.

    Its scheme is data, https, http, file or one of the others that are given.
    """
    scheme, _, rest = content.partition(":")
    known = scheme.lower() == "data" or (scheme.lower() in (*_WITH_SLASHES, *more_schemes) and rest.startswith("//"))
    if not known or any(character.isspace() for character in content[:4_000]):
        return None
    return f"{scheme.lower()}:{rest}"


def shown(url: str) -> str:
    """An address as a message can name it."""
    return repr(url if len(url) <= 80 else url[:77] + "...")


def decoded(url: str, most: int) -> tuple[str, bytes]:
    """The MIME type and the content of a data: address (RFC 2397). Raises BadInput, and TooLarge.

    The type is empty where the address has none. A content may come to a little more than `most` bytes.
    """
    head, comma, data = url.removeprefix("data:").partition(",")
    if not comma:
        raise BadInput(f"{shown(url)} is no data: address; allowed: data:TYPE;base64,CONTENT")
    if len(data) > 4 * most:
        raise TooLarge(f"the content has {len(data)} characters, which is more than {most} bytes")
    mime_type = head.removesuffix(";base64")
    if not head.endswith(";base64"):
        return mime_type, unquote_to_bytes(data)
    try:
        return mime_type, base64.b64decode(unquote(data), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadInput(f"the data: address does not hold base64: {error}") from error
