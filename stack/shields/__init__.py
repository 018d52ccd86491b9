"""The shields, one file each: what judges messages, and how a violation is told.

A shield gives a Verdict, or raises a StackError where it cannot be asked now. It never passes what it has not judged.
"""

from collections.abc import Sequence

from stack.api.safety import RestAPIExecutionConfig
from stack.context import Context
from stack.shield_config import (
    ClassifierShield,
    CodeScannerShield,
    LlamaGuardShield,
    Shield,
    ThirdPartyShield,
    WordShield,
)
from stack.shields import classifier, code_scanner, llama_guard, third_party, word_shield
from stack.shields.verdict import Said, Verdict

__all__ = ["Said", "Verdict", "judge", "version"]


async def judge(
    context: Context, shield: Shield, said: Sequence[Said], execution: RestAPIExecutionConfig | None = None
) -> Verdict:
    """The verdict of a shield on messages. Raises BadInput, TooManyRequests, EngineFailed, Unavailable."""
    match shield:
        case LlamaGuardShield():
            return await llama_guard.judge(context, shield, said)
        case WordShield():
            return await word_shield.judge(context, shield, said)
        case ClassifierShield():
            return await classifier.judge(context, shield, said)
        case CodeScannerShield():
            return await code_scanner.judge(context, shield, said)
        case ThirdPartyShield():
            return await third_party.judge(context, shield, said, execution)


def version(shield: Shield) -> str:
    """What is behind a verdict: the version of the method, and the model that was asked."""
    match shield:
        case LlamaGuardShield():
            return f"{llama_guard.VERSION}/{shield.model}"
        case WordShield():
            return f"{word_shield.VERSION}/{shield.model}"
        case ClassifierShield():
            return f"{classifier.VERSION}/{shield.model}"
        case CodeScannerShield():
            return code_scanner.VERSION
        case ThirdPartyShield():
            return third_party.VERSION
