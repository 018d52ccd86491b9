"""How long what a gateway streams may last: so long one that is replaced, or its node, waits until it has ended."""

from stack.agentic_system.answer import FINAL_SECONDS
from stack.config import Config


def longest_stream_s(config: Config) -> float:
    """The seconds that the longest stream of a model or of a turn may take.

    A turn has agents.max_seconds, then its last answer; and a step that began just before these were over, or a shield
    that judges the answer, has one model's time on top. A job's log that is followed has no bound, and breaks off.
    """
    of_model = max(model.request_timeout_s for model in config.all_models)
    return config.agents.max_seconds + FINAL_SECONDS + of_model
