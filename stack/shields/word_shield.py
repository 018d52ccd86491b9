"""A fine-tuned chat model as a shield, such as the quickstart's adapter, which answers with one of two words."""

import asyncio
from collections.abc import Sequence

from stack.context import Context
from stack.shield_config import WordShield
from stack.shields.text import unmasked
from stack.shields.verdict import PASSED, UNJUDGED, Said, Verdict
from stack.shields.words import Answer, ask

VERSION = "1"
# A word is at most so many tokens, and one more shows whether there is anything behind it.
MAX_TOKENS = 8
# How many messages of a conversation are asked about at once.
AT_ONCE = 8
# Of what was judged before, so much is judged again with what has come behind it.
OVERLAP = 1_000


async def judge(context: Context, shield: WordShield, said: Sequence[Said]) -> Verdict:
    """Asks the model about each message that is judged; the worst answer counts. One that fails ends the others."""
    slots = asyncio.Semaphore(AT_ONCE)

    async def one_of(text: str) -> Verdict:
        async with slots:
            return read(shield, await _ask(context, shield, text))

    texts = await asyncio.to_thread(judged_texts, said)
    if not texts:
        return PASSED
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one_of(text)) for text in texts]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from failed
    return max((task.result() for task in tasks), key=lambda one: (one.is_violation, one.score or 0))


def judged_texts(said: Sequence[Said]) -> list[str]:
    """The texts that are judged one by one: what people, tools and the model say.

    System messages are the application's own words, which give instructions as injections do: they are judged where
    there is nothing else.
    """
    judged = [one for one in said if one.is_judged]
    others = [one for one in judged if one.role != "system"]
    texts = [unmasked(one.text[max(0, one.passed - OVERLAP) :]) for one in others or judged]
    return [text for text in texts if text.strip()]


def read(shield: WordShield, answer: Answer) -> Verdict:
    """The verdict of an answer, which is one of the two words; anything else is a violation too."""
    word = answer.text.strip().strip(".").lower()
    if word == shield.safe_word.lower() and answer.unsafe < shield.threshold:
        return Verdict(is_violation=False, score=answer.unsafe)
    if word in (shield.safe_word.lower(), shield.unsafe_word.lower()):
        return Verdict(True, shield.unsafe_word, f"The content was judged to be: {shield.unsafe_word}.", answer.unsafe)
    allowed = f"{shield.unsafe_word!r} nor {shield.safe_word!r}"
    return Verdict(
        True, UNJUDGED, f"The shield's model answered neither {allowed}, but {answer.text[:80]!r}.", answer.unsafe
    )


async def _ask(context: Context, shield: WordShield, text: str) -> Answer:
    messages = [{"role": "system", "content": shield.system_prompt}, {"role": "user", "content": text}]
    body = dict(model=shield.model, max_tokens=MAX_TOKENS, messages=messages)
    models = context.of_tenant(shield.tenant).models
    return await ask(models, "chat", body, shield.unsafe_word, shield.safe_word)
