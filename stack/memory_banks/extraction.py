"""What graph banks ask a language model for: the entities and relations in the chunks of documents."""

import asyncio
from collections.abc import Sequence
from itertools import islice
from typing import Any

from stack.api.memory_banks import GraphBankConfig
from stack.api.messages import StopReason
from stack.context import Context
from stack.errors import BadInput, NotFound
from stack.inference import answer_chat
from stack.memory_banks.entities import RESPONSE_FORMAT, question, read_answer
from stack.memory_banks.rows import Chunk, Graph, Mention, Relation
from stack.memory_banks.tasks import all_of
from stack.models import Model

# How many chunks the model reads at once.
AT_ONCE = 8
# An answer that is no JSON is asked for once more, with chance in it.
TEMPERATURES = (0.0, 0.7)
# Half of a model's context is the chunk's with the question, the other half the answer's.
QUESTION_TOKENS = 200
MAX_ANSWER_TOKENS = 2_048


async def set_up(context: Context, config: GraphBankConfig) -> GraphBankConfig:
    """The config of a new bank, in which the model is named: the first language model, where none is asked for.

    Raises NotFound or BadInput for a model that cannot be asked, and BadInput for chunks that are too long for it.
    """
    name = config.model if config.model is not None else await asyncio.to_thread(_first_model, context)
    try:
        model = await context.models.find(name)
    except (BadInput, NotFound) as error:
        error.param = "config.model"
        raise
    most = _half(model) - QUESTION_TOKENS
    if config.chunk_size_in_tokens > most:
        raise BadInput(
            f"chunk_size_in_tokens is {config.chunk_size_in_tokens}; allowed: 8 to {most}, as the model {name!r} has "
            f"a context of {model.base.context} tokens, with room for an answer",
            param="config.chunk_size_in_tokens",
        )
    return config.model_copy(update={"model": name})


async def extract(
    context: Context, config: GraphBankConfig, document_ids: Sequence[str], cut: Sequence[Sequence[Chunk]]
) -> list[Graph]:
    """What stands in documents, from their chunks, in their order.

    Raises what asking the model raises, and BadInput for a document of which
    the model's answer is no JSON, twice. Who leaves takes all questions along.
    """
    assert config.model is not None
    model = await context.models.find(config.model)
    slots = asyncio.Semaphore(AT_ONCE)

    async def read(number: int, chunk: Chunk) -> tuple[list[Mention], list[Relation]]:
        async with slots:
            for temperature in TEMPERATURES:
                if (found := await _asked(context, model, chunk, temperature)) is not None:
                    return found
        raise BadInput(
            f"of the document {document_ids[number]!r} the model {model.id!r} has twice answered with no JSON when it "
            f"was asked for the entities in the chunk {chunk.position}; nothing was written",
            param=f"documents.{number}",
        )

    chunks = [(number, chunk) for number, of_document in enumerate(cut) for chunk in of_document]
    found = iter(await all_of(read(*one) for one in chunks))
    return [_graph(list(islice(found, len(of_document)))) for of_document in cut]


async def _asked(
    context: Context, model: Model, chunk: Chunk, temperature: float
) -> tuple[list[Mention], list[Relation]] | None:
    body: dict[str, Any] = {
        "model": model.id,
        "messages": [{"role": "user", "content": question(chunk)}],
        "temperature": temperature,
        "max_tokens": min(_half(model), MAX_ANSWER_TOKENS),
        "response_format": RESPONSE_FORMAT,
        "stream": False,
    }
    message = (await answer_chat(context, body)).message
    is_cut = message.stop_reason == StopReason.out_of_tokens
    return read_answer(str(message.content), chunk, is_cut=is_cut)


def _first_model(context: Context) -> str:
    return context.models.language_models()[0].id


def _half(model: Model) -> int:
    return model.base.context // 2


def _graph(found: Sequence[tuple[list[Mention], list[Relation]]]) -> Graph:
    return Graph(
        tuple(mention for mentions, _ in found for mention in mentions),
        tuple(relation for _, relations in found for relation in relations),
    )
