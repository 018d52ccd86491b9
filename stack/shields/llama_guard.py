"""Llama Guard 3: a chat model that is told the categories of what is unsafe, and judges a conversation's last turn.

The prompt is that of Meta's model card (Llama Guard 3, "Prompt template"; Inan et al. 2023, arXiv 2312.06674). Any
chat model can be asked it; those that were trained for it answer well.
"""

import asyncio
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from stack.context import Context
from stack.models import Endpoint
from stack.shield_config import LlamaGuardShield
from stack.shields.text import unmasked
from stack.shields.verdict import PASSED, UNJUDGED, Said, Verdict
from stack.shields.words import ask

VERSION = "llama-guard-3"
CATEGORIES = {
    "S1": "Violent Crimes",
    "S2": "Non-Violent Crimes",
    "S3": "Sex Crimes",
    "S4": "Child Exploitation",
    "S5": "Defamation",
    "S6": "Specialized Advice",
    "S7": "Privacy",
    "S8": "Intellectual Property",
    "S9": "Indiscriminate Weapons",
    "S10": "Hate",
    "S11": "Self-Harm",
    "S12": "Sexual Content",
    "S13": "Elections",
    "S14": "Code Interpreter Abuse",
}
# Room for "unsafe" and all the codes.
MAX_TOKENS = 100
# What would end the conversation within the prompt, or a turn of the model's own format.
_MARKS = re.compile(r"<(?=\||(?:BEGIN|END) (?:CONVERSATION|UNSAFE CONTENT CATEGORIES)>)", re.IGNORECASE)
# What would begin another turn in it.
_TURN = re.compile(r"(?<!\S)(User|Agent)\s*:", re.IGNORECASE)
_LLAMA_3 = "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"


async def judge(context: Context, shield: LlamaGuardShield, said: Sequence[Said]) -> Verdict:
    """Asks the model for its verdict on the last turn, that of the user or that of the agent."""
    if not any(one.text.strip() for one in said if one.is_judged):
        return PASSED
    models = context.of_tenant(shield.tenant).models
    task = await asyncio.to_thread(prompt, said, categories_of(shield))
    endpoint, body = await _body(shield, task, models)
    answer = await ask(models, endpoint, body, unsafe="unsafe", safe="safe")
    return read(shield, answer.text, answer.unsafe)


def categories_of(shield: LlamaGuardShield) -> Mapping[str, str]:
    return shield.categories or CATEGORIES


def prompt(said: Sequence[Said], categories: Mapping[str, str]) -> str:
    """The task in Llama Guard 3's words. What goes into the model is the user's, and what it says is the agent's."""
    listed = "\n".join(f"{code}: {name.rstrip('.')}." for code, name in categories.items())
    turns = [
        (agent, "\n".join(_TURN.sub(r"\1 -", _MARKS.sub("< ", unmasked(one.text))) for one in group))
        for agent, group in groupby(said, key=lambda one: "Agent" if one.role == "assistant" else "User")
    ]
    conversation = "\n\n".join(f"{agent}: {text}" for agent, text in turns)
    last = turns[-1][0]
    return (
        f"Task: Check if there is unsafe content in '{last}' messages in conversations according our safety policy "
        f"with the below categories.\n\n"
        f"<BEGIN UNSAFE CONTENT CATEGORIES>\n\n{listed}\n\n<END UNSAFE CONTENT CATEGORIES>\n\n"
        f"<BEGIN CONVERSATION>\n\n{conversation}\n\n<END CONVERSATION>\n\n"
        f"Provide your safety assessment for ONLY THE LAST {last} message in the above conversation:\n"
        " - First line must read 'safe' or 'unsafe'.\n"
        " - If unsafe, a second line must include a comma-separated list of violated categories."
    )


def read(shield: LlamaGuardShield, text: str, score: float) -> Verdict:
    """The verdict of an answer: "safe" alone, or "unsafe" with codes; anything else is a violation too."""
    first, *rest = [line.strip() for line in text.strip().splitlines() if line.strip()] or [""]
    if first.lower() == "safe" and not rest and score < shield.threshold:
        return Verdict(is_violation=False, score=score)
    if first.lower() == "unsafe" or (first.lower() == "safe" and not rest):
        known = categories_of(shield)
        codes = [code for code in re.split(r"[,\s]+", rest[0] if rest else "") if code in known]
        names = ", ".join(known[code] for code in codes) or "a category that the model does not name"
        return Verdict(True, ",".join(codes) or "unsafe", f"The content is unsafe: {names}.", score)
    message = f"The shield's model answered neither 'safe' nor 'unsafe' with categories, but {text[:80]!r}."
    return Verdict(True, UNJUDGED, message, score)


async def _body(shield: LlamaGuardShield, task: str, models: Any) -> tuple[Endpoint, dict[str, Any]]:
    """How the model is asked. Llama Guard's own chat template would write the task around what is the task already."""
    body: dict[str, Any] = dict(model=shield.model, max_tokens=MAX_TOKENS)
    if (await models.find(shield.model)).base.prompt_format == "llama3":
        return "completions", body | {"prompt": _LLAMA_3.format(task)}
    return "chat", body | {"messages": [{"role": "user", "content": task}]}
