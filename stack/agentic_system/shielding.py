"""What shields say of what tools are asked and give."""

import asyncio
from collections.abc import Sequence

from stack import safety
from stack.api.messages import Message
from stack.api.safety import OnViolationAction, ShieldDefinition
from stack.context import Context
from stack.errors import StackError


async def refusal(
    context: Context,
    shields: Sequence[ShieldDefinition],
    message: Message,
    what: str,
    seconds: float | None = None,
) -> str | None:
    """What is said in the place of what a shield does not let pass; None where all do. They run side by side.

    `what` names it. A shield that cannot judge, or not within `seconds`, lets nothing pass.
    """
    verdicts = await asyncio.gather(*(_verdict(context, shield, message, what, seconds) for shield in shields))
    return next((one for one in verdicts if one is not None), None)


async def _verdict(
    context: Context, shield: ShieldDefinition, message: Message, what: str, seconds: float | None
) -> str | None:
    try:
        async with asyncio.timeout(seconds):
            response = await safety.judge(context, shield, [message])
    except (StackError, TimeoutError) as error:
        why = error.message if isinstance(error, StackError) else f"it has not answered within {seconds:.3g} s"
        return f"The shield {str(shield.shield_type)!r} could not judge {what}: {why}"
    if not response.is_violation or shield.on_violation_action != OnViolationAction.raise_:
        return None
    why = response.violation_return_message or response.violation_type or "a violation"
    return f"The shield {str(shield.shield_type)!r} does not pass {what}: {why}"
