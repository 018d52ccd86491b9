"""Wire types of the agentic system: agents, their sessions, the turns of these, and the steps of a turn."""

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from stack.api.agent_tools import MAX_TOOLS, AgentTools, FunctionName, Shields
from stack.api.inference import MAX_MESSAGES, SamplingParams, ToolCallDelta, ToolChoice, ToolPromptFormat
from stack.api.memory_banks import MemoryBank
from stack.api.messages import (
    Attachment,
    CompletionMessage,
    Content,
    ToolCall,
    ToolName,
    ToolResponseMessage,
    UserMessage,
)
from stack.api.safety import ShieldResponse
from stack.api.wire import ModelId, Request, Wire, at_most, without_nul

MAX_INSTRUCTIONS = 200_000
MAX_ATTACHMENTS = 20
# How many turns a session can have.
MAX_TURNS = 1_000

AgentId = Annotated[str, Field(max_length=100), AfterValidator(without_nul)]
SessionId = AgentId
TurnId = AgentId
Instructions = Annotated[str, Field(max_length=MAX_INSTRUCTIONS)]
# The tools whose calls the client is asked about before they are run, by the names that the model calls them by.
Approval = Annotated[list[FunctionName], at_most(MAX_TOOLS)]


class AgentConfig(Wire):
    """What an agent is. Calls of the tools that `approval` names are run once the client has approved of them."""

    model: ModelId
    instructions: Instructions
    sampling_params: SamplingParams = SamplingParams()
    tools: AgentTools = []
    tool_choice: ToolChoice = ToolChoice.auto
    tool_prompt_format: ToolPromptFormat = ToolPromptFormat.json
    input_shields: Shields = []
    output_shields: Shields = []
    approval: Approval = []


# Agents and sessions


class CreateAgenticSystemRequest(Request):
    agent_config: AgentConfig


class AgenticSystemCreateResponse(Wire):
    agent_id: str


class UpdateAgenticSystemRequest(Request):
    """Another config of an agent, for the turns that begin from now on."""

    agent_id: AgentId
    agent_config: AgentConfig


class AgentVersion(Wire):
    """An agent as it is, or was. Versions count up from 1."""

    agent_id: str
    version: int
    agent_config: AgentConfig
    created_at: str


class AgentEntry(Wire):
    """An agent in a list, with its newest version."""

    agent_id: str
    version: int
    created_at: str


class DeleteAgenticSystemRequest(Request):
    agent_id: AgentId


class CreateAgenticSystemSessionRequest(Request):
    agent_id: AgentId
    session_name: Annotated[str, Field(max_length=200), AfterValidator(without_nul)]


class AgenticSystemSessionCreateResponse(Wire):
    session_id: str


class DeleteAgenticSystemSessionRequest(Request):
    agent_id: AgentId
    session_id: SessionId


class GetAgenticSystemSessionRequest(Request):
    """The turns to be told of, in this order; without them all."""

    turn_ids: Annotated[list[TurnId], at_most(MAX_TURNS)] | None = None


class SessionEntry(Wire):
    """A session in a list, with the number of its turns."""

    session_id: str
    session_name: str
    started_at: str
    turns: int


# Steps


class StepType(StrEnum):
    inference = "inference"
    tool_execution = "tool_execution"
    shield_call = "shield_call"
    memory_retrieval = "memory_retrieval"


class _Step(Wire):
    turn_id: str
    step_id: str
    started_at: str | None = None
    completed_at: str | None = None


class InferenceStep(_Step):
    step_type: Literal["inference"] = "inference"
    model_response: CompletionMessage


class ToolResponse(Wire):
    call_id: Annotated[str, Field(max_length=200)]
    tool_name: ToolName
    content: Content


class ToolExecutionStep(_Step):
    step_type: Literal["tool_execution"] = "tool_execution"
    tool_calls: list[ToolCall]
    tool_responses: list[ToolResponse]


class ShieldCallStep(_Step):
    step_type: Literal["shield_call"] = "shield_call"
    response: ShieldResponse


class Citation(Wire):
    """Where a part of the inserted context comes from: the chunk at a `position`, from 0, of a document of a bank."""

    bank_id: str
    document_id: str
    position: int
    score: float


class MemoryRetrievalStep(_Step):
    """What was found in the banks, and put into the last user message's context. `query` is what they were asked."""

    step_type: Literal["memory_retrieval"] = "memory_retrieval"
    memory_bank_ids: list[str]
    inserted_context: Content
    query: str | None = None
    citations: list[Citation] = []


Step = Annotated[
    InferenceStep | ToolExecutionStep | ShieldCallStep | MemoryRetrievalStep, Field(discriminator="step_type")
]


class AgenticSystemStepResponse(Wire):
    step: Step


# Turns


class TurnState(StrEnum):
    queued = "queued"
    running = "running"
    awaiting_approval = "awaiting_approval"
    completed = "completed"
    failed = "failed"
    cancelled = "cancelled"


InputMessage = Annotated[UserMessage | ToolResponseMessage, Field(discriminator="role")]


class AgenticSystemTurnCreateRequest(Request):
    """A turn of a session. What stands beside messages and attachments takes, for this turn, the place of the agent's.

    Empty lists of tools and shields do not: some clients send them with every turn.
    While another turn of the session is under way, this one waits; without `wait` it is refused.
    """

    agent_id: AgentId
    session_id: SessionId
    messages: Annotated[list[InputMessage], Field(min_length=1), at_most(MAX_MESSAGES)]
    attachments: Annotated[list[Attachment], at_most(MAX_ATTACHMENTS)] | None = None
    instructions: Instructions | None = None
    sampling_params: SamplingParams | None = None
    tools: AgentTools | None = None
    tool_choice: ToolChoice | None = None
    tool_prompt_format: ToolPromptFormat | None = None
    input_shields: Shields | None = None
    output_shields: Shields | None = None
    approval: Approval | None = None
    stream: bool = False
    wait: bool = True


class TurnError(Wire):
    """Why a turn has failed, as an error envelope says it."""

    code: str
    message: str


class Turn(Wire):
    """A turn, with the steps that have ended. There is no `output_message` before it is completed.

    `awaiting` are the calls that the client is to approve of.
    """

    turn_id: str
    session_id: str
    input_messages: list[InputMessage]
    steps: list[Step]
    output_message: CompletionMessage | None = None
    output_attachments: list[Attachment]
    started_at: str
    completed_at: str | None = None
    state: TurnState
    agent_version: int
    error: TurnError | None = None
    awaiting: list[ToolCall] = []


class Session(Wire):
    """A session; `memory_bank` is that of its attachments, if there were some."""

    session_id: str
    session_name: str
    turns: list[Turn]
    started_at: str
    memory_bank: MemoryBank | None = None


class CancelTurnRequest(Request):
    agent_id: AgentId
    turn_id: TurnId


class ApproveTurnRequest(Request):
    """Which of the calls that a turn awaits are to be run, by their ids. It goes on when all of them are decided.

    The keys in the header X-LlamaStack-ProviderData of the request that made the turn are not kept while it waits: the
    tools have those of the request that decides the last call.
    """

    agent_id: AgentId
    turn_id: TurnId
    approvals: Annotated[dict[Annotated[str, Field(max_length=200)], bool], Field(min_length=1), at_most(100)]


class TurnStateResponse(Wire):
    turn_id: str
    state: TurnState


# Events


class AgenticSystemTurnResponseTurnStartPayload(Wire):
    event_type: Literal["turn_start"] = "turn_start"
    turn_id: str


class AgenticSystemTurnResponseStepStartPayload(Wire):
    event_type: Literal["step_start"] = "step_start"
    step_type: StepType
    step_id: str
    metadata: dict[str, Any] | None = None


class AgenticSystemTurnResponseStepProgressPayload(Wire):
    """What is new in a step: text of the model, of one of its calls, or of what the tool of the call `call_id` says."""

    event_type: Literal["step_progress"] = "step_progress"
    step_type: StepType
    step_id: str
    model_response_text_delta: str | None = None
    tool_call_delta: ToolCallDelta | None = None
    tool_response_text_delta: str | None = None
    call_id: str | None = None


class AgenticSystemTurnResponseStepCompletePayload(Wire):
    event_type: Literal["step_complete"] = "step_complete"
    step_type: StepType
    step_details: Step


class AgenticSystemTurnResponseTurnCompletePayload(Wire):
    event_type: Literal["turn_complete"] = "turn_complete"
    turn: Turn


class AgenticSystemTurnResponseAwaitingApprovalPayload(Wire):
    """The stream ends here: it goes on when the client has approved of the calls, or has not."""

    event_type: Literal["turn_awaiting_approval"] = "turn_awaiting_approval"
    turn_id: str
    tool_calls: list[ToolCall]


Payload = Annotated[
    AgenticSystemTurnResponseStepStartPayload
    | AgenticSystemTurnResponseStepProgressPayload
    | AgenticSystemTurnResponseStepCompletePayload
    | AgenticSystemTurnResponseTurnStartPayload
    | AgenticSystemTurnResponseTurnCompletePayload
    | AgenticSystemTurnResponseAwaitingApprovalPayload,
    Field(discriminator="event_type"),
]


class AgenticSystemTurnResponseEvent(Wire):
    payload: Payload


class AgenticSystemTurnResponseStreamChunk(Wire):
    event: AgenticSystemTurnResponseEvent
