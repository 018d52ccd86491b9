"""Wire types of embeddings, at both doors.

The responses describe the answers, which stack/embeddings.py writes from the vectors as they are: to look at each of
their numbers would take longer than the model.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, PlainValidator, Tag

from stack.api.messages import MAX_PARTS, Text
from stack.api.wire import ModelId, Request, Wire, at_most

MAX_TEXTS = 2_048
# In characters, or in tokens where those are given.
MAX_TEXT_LENGTH = 200_000
MAX_LENGTH = 2_000_000
MAX_DIMENSIONS = 100_000
MAX_TOKEN = 10_000_000


def _kind(value: Any) -> str | None:
    """The tag of a text; brackets keep it out of the place that an error names."""
    return "(text)" if isinstance(value, str) else "(parts)" if isinstance(value, list) else None


# A list is one text in parts: they are put together without anything between them.
TextOrParts = Annotated[
    Annotated[Text, Tag("(text)")] | Annotated[Annotated[list[Text], at_most(MAX_PARTS)], Tag("(parts)")],
    Discriminator(_kind, "text", "should be a text, or a list of texts that are its parts"),
]


def _bounded(contents: list[str | list[str]]) -> list[str | list[str]]:
    _require_lengths([len("".join(content)) for content in contents])
    return contents


def _require_lengths(lengths: list[int]) -> None:
    for index, length in enumerate(lengths):
        if length == 0:
            raise ValueError(f"text {index} is empty")
        if length > MAX_TEXT_LENGTH:
            raise ValueError(f"text {index} has {length} characters or tokens; allowed: at most {MAX_TEXT_LENGTH}")
    if sum(lengths) > MAX_LENGTH:
        raise ValueError(f"has {sum(lengths)} characters or tokens in all; allowed: at most {MAX_LENGTH}")


class EmbeddingsRequest(Request):
    """Texts for an embedding model. One over the model's length is refused, or cut if `truncate` is set."""

    model: ModelId
    contents: Annotated[list[TextOrParts], Field(min_length=1), at_most(MAX_TEXTS), AfterValidator(_bounded)]
    truncate: bool = False

    @property
    def texts(self) -> list[str]:
        return ["".join(content) for content in self.contents]


class EmbeddingsResponse(Wire):
    """One vector for each of the contents, in their order."""

    embeddings: list[list[float]]


def _input(value: Any) -> list[str] | list[list[int]]:
    """OpenAI's four kinds of input, as a list of texts or of texts in tokens."""
    several = [value] if isinstance(value, str) or _is_tokens(value) else value
    if not isinstance(several, list) or not several:
        raise ValueError("is none of: a text, a list of texts, a list of tokens, a list of lists of tokens")
    if len(several) > MAX_TEXTS:
        raise ValueError(f"has {len(several)} entries; allowed: at most {MAX_TEXTS}")
    in_words = isinstance(several[0], str)
    for index, one in enumerate(several):
        if not (isinstance(one, str) if in_words else one == [] or _is_tokens(one)):
            raise ValueError(f"text {index} is not {'a text' if in_words else 'a list of tokens'}, as the others are")
    _require_lengths([len(one) for one in several])
    for index, one in enumerate(several):
        if in_words:
            _require_whole_characters(index, one)
        elif not all(type(token) is int and 0 <= token <= MAX_TOKEN for token in one):
            raise ValueError(f"text {index} has tokens that are none; allowed: integers from 0 to {MAX_TOKEN}")
    return several


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], int | float)


def _require_whole_characters(index: int, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"text {index} holds half of a character") from None


# The four kinds of input, as our OpenAPI document has them; _input checks them.
_Text = Annotated[str, Field(min_length=1, max_length=MAX_TEXT_LENGTH)]
_Token = Annotated[int, Field(ge=0, le=MAX_TOKEN)]
_Tokens = Annotated[list[_Token], Field(min_length=1, max_length=MAX_TEXT_LENGTH)]
_Input = (
    _Text
    | Annotated[list[_Text], Field(min_length=1, max_length=MAX_TEXTS)]
    | _Tokens
    | Annotated[list[_Tokens], Field(min_length=1, max_length=MAX_TEXTS)]
)


class OpenAIEmbeddingsRequest(Wire):
    """`input` is a text, several, the tokens of one, or those of several, in the model's own vocabulary.

    `dimensions` shortens the vectors, where the model allows it. `truncate` is an addition: a text over the model's
    length is refused, or cut if it is set.
    """

    model: ModelId
    input: Annotated[
        list[str] | list[list[int]],
        PlainValidator(_input, json_schema_input_type=_Input),
    ]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1, le=MAX_DIMENSIONS)] | None = None
    user: Annotated[str, Field(max_length=1_000)] | None = None
    truncate: bool = False


class OpenAIEmbedding(Wire):
    """A vector: its numbers, or, in base64, their float32 in little-endian order."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class OpenAIEmbeddingsUsage(Wire):
    prompt_tokens: int
    total_tokens: int


class OpenAIEmbeddingsResponse(Wire):
    object: Literal["list"] = "list"
    data: list[OpenAIEmbedding]
    model: str
    usage: OpenAIEmbeddingsUsage
