"""The memory step: what the banks of an agent and of its session know about what the user says.

All banks are asked side by side. Scores of different banks cannot be compared, so the best chunk of each comes before
the second best of any; documents that are looked up by their ids come first. The best chunks that fit are put into the
last user message's context, each with a number, and the step cites them.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stack import inference
from stack.addresses import address_in
from stack.agentic_system import files
from stack.agentic_system.look_ups import LookUp
from stack.agentic_system.prompt import tokens_of_text
from stack.agentic_system.shielding import refusal
from stack.agentic_system.tools.answers import plain
from stack.agentic_system.tools.tool import cut
from stack.api.agent_tools import (
    CustomQueryGenerator,
    DefaultQueryGenerator,
    GraphBank,
    KeyValueBank,
    LlmQueryGenerator,
    MemoryBankChoice,
    MemoryToolDefinition,
    QueryGenerator,
)
from stack.api.inference import ChatCompletionRequest, SamplingParams
from stack.api.memory_banks import (
    MAX_QUERY,
    Address,
    CreateMemoryBankRequest,
    DocumentContent,
    InsertDocumentsRequest,
    KeywordBankConfig,
    MemoryBankDocument,
    QueriedChunk,
    QueryDocumentsRequest,
    QueryParams,
    VectorBankConfig,
)
from stack.api.messages import Attachment, Message, ToolResponseMessage, UserMessage
from stack.context import Context
from stack.errors import BadInput, NotFound
from stack.memory_banks import banks
from stack.memory_banks.banks import Memory
from stack.memory_banks.documents import longest_chunk

# Of a session's bank, where its embedding model takes so many.
CHUNK_TOKENS = 256
# A query that a model makes.
QUERY_TOKENS = 128
# The least that a query is cut to, where it is too long for an embedding model.
LEAST_QUERY = 64
# How a session's bank is asked by an agent without a memory tool.
DEFAULT = MemoryToolDefinition(
    type="memory", memory_bank_configs=[], query_generator_config=DefaultQueryGenerator(type="default")
)


@dataclass(frozen=True)
class _Retrieval:
    """A look-up, with what it is done by."""

    context: Context
    memory: Memory
    tool: MemoryToolDefinition
    asked: LookUp


@dataclass(frozen=True)
class _Found:
    bank_id: str
    chunk: QueriedChunk
    score: float
    tokens: int


async def retrieve(context: Context, memory: Memory, asked: LookUp) -> dict[str, Any]:
    """The details of the step. The turn's text attachments are in the session's bank by then.

    Raises BadInput for an attachment that cannot be read, and Unavailable where a bank or its model is away.
    """
    tool = asked.tool or DEFAULT
    retrieval = _Retrieval(context, memory, tool, asked)
    own_bank = asked.session_bank
    if texts := [one for one in asked.attachments if files.is_text(one)]:
        own_bank = await _kept(retrieval, texts)
    query = await _query(context, tool.query_generator_config, asked.messages)
    choices = [*tool.memory_bank_configs]
    details: dict[str, Any] = {
        "memory_bank_ids": [one.bank_id for one in choices],
        "inserted_context": "",
        "query": query,
    }
    if own_bank is not None:
        details["memory_bank_ids"].append(own_bank)
    if not query:
        return details
    if refused := await refusal(context, tool.input_shields, UserMessage(content=query), "the query"):
        return details | {"inserted_context": refused}
    found = await _all_found(retrieval, choices, own_bank, query)
    text, cited = _inserted(found, tool.max_chunks, min(tool.max_tokens_in_context, asked.max_tokens))
    if text:
        said = ToolResponseMessage(call_id="memory", tool_name="memory", content=text)
        if refused := await refusal(context, tool.output_shields, said, "what was looked up"):
            return details | {"inserted_context": refused}
    citations = [
        {
            "bank_id": one.bank_id,
            "document_id": one.chunk.document_id,
            "position": one.chunk.position,
            "score": one.score,
        }
        for one in cited
    ]
    return details | {"inserted_context": text, "citations": citations}


def said_by_user(messages: Sequence[Message]) -> list[str]:
    """The texts of user messages, without their attachments and contexts."""
    return [text for one in messages if isinstance(one, UserMessage) and (text := _text(one.content))]


async def _query(context: Context, generator: QueryGenerator, messages: Sequence[Message]) -> str:
    texts = said_by_user(messages)
    match generator:
        case DefaultQueryGenerator():
            query = generator.sep.join(texts)
        case CustomQueryGenerator():
            users = [one for one in messages if isinstance(one, UserMessage)]
            query = _text(users[-1].context) if users and users[-1].context is not None else ""
        case LlmQueryGenerator():
            asked = UserMessage(content=generator.template.replace("{messages}", "\n".join(texts)))
            sampling = SamplingParams(max_tokens=QUERY_TOKENS)
            request = ChatCompletionRequest(model=generator.model, messages=[asked], sampling_params=sampling)
            answer = await inference.chat_completion(context, request)
            query = _text(answer.completion_message.content)
    return plain(query).strip()[-MAX_QUERY:].strip()


async def _all_found(
    retrieval: _Retrieval, choices: Sequence[MemoryBankChoice], own_bank: str | None, query: str
) -> list[_Found]:
    """What all banks have found, best first."""
    asked = [_found(retrieval, choice.bank_id, query, choice) for choice in choices]
    if own_bank is not None:
        asked.append(_found_in_own(retrieval, own_bank, query))
    lists = await asyncio.gather(*asked)
    by_id = [
        one for choice, found in zip(choices, lists, strict=False) if isinstance(choice, KeyValueBank) for one in found
    ]
    ranked = [
        (rank, one)
        for at, found in enumerate(lists)
        if at >= len(choices) or not isinstance(choices[at], KeyValueBank)
        for rank, one in enumerate(found, start=1)
    ]
    return by_id + [one for _, one in sorted(ranked, key=lambda pair: pair[0])]


async def _found_in_own(retrieval: _Retrieval, bank_id: str, query: str) -> list[_Found]:
    """The session's own bank can be dropped as any other; then there is nothing in it."""
    try:
        return await _found(retrieval, bank_id, query, None)
    except NotFound:
        return []


async def _found(retrieval: _Retrieval, bank_id: str, query: str, choice: MemoryBankChoice | None) -> list[_Found]:
    most = retrieval.tool.max_chunks
    if isinstance(choice, KeyValueBank):
        lists = await asyncio.gather(
            *(_asked(retrieval, bank_id, key, QueryParams(max_chunks=1)) for key in choice.keys)
        )
        return [one for found in lists for one in found]
    entities = choice.entities if isinstance(choice, GraphBank) else []
    return await _asked(retrieval, bank_id, query, QueryParams(max_chunks=most, entities=entities))


async def _asked(retrieval: _Retrieval, bank_id: str, query: str, params: QueryParams) -> list[_Found]:
    """What a bank finds. Of a query that is too long for its embedding model, the end is asked."""
    while True:
        request = QueryDocumentsRequest(bank_id=bank_id, query=query, params=params)
        try:
            answer = await banks.query(retrieval.context, retrieval.memory, request)
        except BadInput as error:
            if error.param != "query" or len(query) <= LEAST_QUERY:
                raise
            query = query[len(query) // 2 :].strip() or query[:LEAST_QUERY]
            continue
        pairs = zip(answer.chunks, answer.scores, strict=True)
        return [_Found(bank_id, chunk, score, tokens_of_text(chunk.content)) for chunk, score in pairs]


def _inserted(found: Sequence[_Found], max_chunks: int, max_tokens: int) -> tuple[str, list[_Found]]:
    """The best chunks that there is room for, as a text, and which they are. Of the first one, what fits is taken."""
    parts: list[str] = []
    cited: list[_Found] = []
    left = max_tokens
    for one in found[:max_chunks]:
        head = f"[{len(cited) + 1}] {' '.join(one.chunk.document_id.split())}, part {one.chunk.position + 1}:\n"
        size = max(one.chunk.token_count, one.tokens) + tokens_of_text(head)
        text = one.chunk.content
        if size > left and not cited:
            text = cut(text, max(1, left * len(text) // size))
        elif size > left:
            break
        left -= size
        parts.append(head + text)
        cited.append(one)
    return plain("\n\n".join(parts)), cited


async def _kept(retrieval: _Retrieval, texts: Sequence[Attachment]) -> str:
    """Puts text attachments into the session's bank, which is made where there is none. Returns its id.

    Their ids tell the turn and the place, so that what was put there before is not put there twice.
    """
    bank_id = retrieval.asked.session_bank or await _made(retrieval)
    documents = [
        MemoryBankDocument(
            document_id=f"{retrieval.asked.turn_id}/{at + 1}",
            content=_document(one),
            mime_type=one.mime_type,
            metadata={},
        )
        for at, one in enumerate(texts)
    ]
    request = InsertDocumentsRequest(bank_id=bank_id, documents=documents)
    await banks.insert(retrieval.context, retrieval.memory, request)
    return bank_id


async def _made(retrieval: _Retrieval) -> str:
    """A bank for the session's attachments: by meaning where an embedding model is served, else by words."""
    context, session_id = retrieval.context, retrieval.asked.session_id
    config: VectorBankConfig | KeywordBankConfig = KeywordBankConfig(type="keyword", stem=True)
    if context.config.embedding_models:
        model = context.config.embedding_models[0]
        size = min(CHUNK_TOKENS, await asyncio.to_thread(longest_chunk, model))
        config = VectorBankConfig(type="vector", embedding_model=model.id, chunk_size_in_tokens=size)
    request = CreateMemoryBankRequest(name=f"attachments of the session {session_id}", config=config)
    bank = await banks.new(context, request)
    bank_id = await asyncio.to_thread(context.store.agents.give_bank, session_id, bank)
    if bank_id is None:
        raise NotFound(f"the session {session_id!r} is not there any more", param="session_id")
    return bank_id


def _document(attachment: Attachment) -> DocumentContent:
    content = attachment.content
    if isinstance(content, str) and address_in(content) is not None:
        return Address(uri=content)
    return plain(content) if isinstance(content, str) else [plain(part) for part in content]


def _text(content: Any) -> str:
    parts = content if isinstance(content, list) else [content]
    return "".join(part for part in parts if isinstance(part, str))
