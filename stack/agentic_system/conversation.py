"""What the model of one turn is told, made once and kept: attachments are had once, outputs of tools are put once into
the words that the model sees."""

from collections.abc import Sequence
from typing import Any

from stack import attachments
from stack.agentic_system import files, prompt
from stack.agentic_system.prompt import Message
from stack.api.agent_tools import CustomQueryGenerator, MemoryToolDefinition
from stack.api.agentic_system import AgentConfig, StepType
from stack.api.messages import Attachment
from stack.attachments import MAX_ATTACHMENTS
from stack.context import Context
from stack.errors import BadInput, StackError
from stack.store.turns import Step


class Conversation:
    """`past` are the turns before, oldest first; their attachments are had here too, and stay there as they are then.

    `messages` are the turn's new ones, as JSON of their wire types, `file_names` those that a tool can read.
    """

    def __init__(
        self,
        context: Context,
        config: AgentConfig,
        past: list[list[Message]],
        messages: Sequence[dict[str, Any]],
        given: Sequence[Attachment],
        file_names: Sequence[str],
    ) -> None:
        self._context = context
        self._config = config
        self.past = past
        self._messages = messages
        self._given = given
        self._file_names = file_names
        self._is_ready = False
        self._asked: list[Message] = []
        self._told: dict[str, list[Message]] = {}

    async def current(self, steps: Sequence[Step]) -> list[Message]:
        """The turn so far. Raises BadInput for attachments that the model does not take or that cannot be had."""
        if not self._is_ready:
            await self._make_ready(steps)
        told: list[Message] = []
        for step in steps:
            if step.details is not None:
                if step.id not in self._told:
                    self._told[step.id] = prompt.of_step(step.details)
                told += self._told[step.id]
        return self._asked + prompt.of_steps(told)

    async def _make_ready(self, steps: Sequence[Step]) -> None:
        retrieved = next((step for step in steps if step.kind == StepType.memory_retrieval and step.has_ended), None)
        context = retrieved.details["inserted_context"] if retrieved is not None and retrieved.details else None
        messages = self._messages
        if any(
            isinstance(tool, MemoryToolDefinition) and isinstance(tool.query_generator_config, CustomQueryGenerator)
            for tool in self._config.tools
        ):
            messages = [prompt.without_context(message) for message in messages]  # it was the query
        asked = prompt.asked(messages, context)
        line = f"Files that code_interpreter can read: {', '.join(self._file_names)}" if self._file_names else ""
        asked = prompt.with_parts(asked, await self._images(), line)
        self._asked = prompt.with_data(await attachments.resolve(self._context, self._config.model, asked))
        await self._have_past(MAX_ATTACHMENTS - prompt.attachments_in(self._asked))
        self._is_ready = True

    async def _images(self) -> list[dict[str, Any]]:
        """The images among the turn's attachments, where the model can see them.

        Raises BadInput for one that nothing here can use.
        """
        model = await self._context.models.find(self._config.model)
        seen = [one for one in self._given if files.is_image(one) and model.base.images]
        if not files.are_read(self._config.tools):
            for at, one in enumerate(self._given):
                if one not in seen and not files.is_text(one):
                    raise BadInput(
                        f"an attachment of the type {one.mime_type[:200]!r} cannot be used; allowed: texts, images for "
                        "a model that takes them, and any file where the agent has a code_interpreter that is run here",
                        param=f"attachments.{at}.mime_type",
                    )
        return [one.model_dump(mode="json") for one in seen]

    async def _have_past(self, most: int) -> None:
        """The attachments of the turns before are had again, the latest ones, as many as one request can have."""
        for at in range(len(self.past) - 1, -1, -1):
            messages = self.past[at]
            if not (count := prompt.attachments_in(messages)):
                continue
            most -= count
            if most >= 0:
                try:
                    had = await attachments.resolve(self._context, self._config.model, messages)
                    self.past[at] = prompt.with_data(had)
                    continue
                except StackError:
                    pass  # what is gone by now, or what this turn's model does not take, is no fault of this turn
            self.past[at] = prompt.with_data(prompt.without_attachments(messages))
