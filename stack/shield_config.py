"""The shields of the config, and which of them a model's questions and answers pass."""

from collections.abc import Collection, Iterable, Mapping
from typing import Annotated, Literal

from pydantic import Field, field_validator

from stack.api.safety import MAX_SHIELDS, BuiltinShield, RestAPIExecutionConfig, RestAPIMethod, ShieldId
from stack.api.wire import ModelId, Wire, at_most

Score = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, Field(min_length=1, max_length=10_000)]
# Among the models with shields: all that are not named, also those that are added while the stack runs.
EVERY_OTHER = "*"


class _Shield(Wire):
    """A shield: the id by which it is named. Its verdicts are logged, and with `log_text` also what it judged."""

    id: ShieldId
    log_text: bool = False


class _ModelShield(_Shield):
    """One that asks a language model, in the name of a tenant, whose adapters it may be one of."""

    model: ModelId
    tenant: Annotated[str, Field(min_length=1, max_length=100)] = "default"
    threshold: Score = 0.5


class LlamaGuardShield(_ModelShield):
    """Llama Guard 3: a chat model that says by which of `categories` (code: name) a conversation is unsafe.

    A violation is an answer other than "safe", or one whose probability of "unsafe" is at least `threshold`.
    """

    type: Literal["llama_guard"]
    categories: (
        Annotated[
            dict[Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9]{0,9}$")], Text], Field(min_length=1), at_most(100)
        ]
        | None
    ) = None


class WordShield(_ModelShield):
    """A chat model that was trained to answer what a user says with one of two words, such as a fine-tuned adapter.

    A violation is `unsafe_word`, or a probability of it of at least `threshold`, or any answer that is neither word.
    """

    type: Literal["word_shield"]
    system_prompt: Text
    unsafe_word: Annotated[str, Field(min_length=1, max_length=100)]
    safe_word: Annotated[str, Field(min_length=1, max_length=100)]


class ClassifierShield(_Shield):
    """A sequence classifier, one of `classifiers`: a violation is a probability of its `labels` from `threshold` on.

    Without `labels` they are Prompt Guard's: an injection shield looks for all but the benign one, a jailbreak shield
    for jailbreaks alone, where the classifier tells them from other injections.
    """

    type: Literal["injection_shield", "jailbreak_shield"]
    model: ShieldId
    labels: Annotated[list[Annotated[str, Field(max_length=200)]], Field(min_length=1), at_most(100)] | None = None
    threshold: Score = 0.5


class CodeScannerShield(_Shield):
    """A scan of the code in messages: a violation is a finding of at least this severity."""

    type: Literal["code_scanner_guard"]
    severity: Literal["low", "medium", "high"] = "medium"
    timeout_s: Annotated[float, Field(ge=0.1, le=300)] = 20


class ThirdPartyShield(_Shield):
    """A service elsewhere. `execution_config` is how it is asked where a request does not say it.

    What it does not answer as it should, in `timeout_s` seconds, is a violation, or with `fails_open` none.
    """

    type: Literal["third_party_shield"]
    execution_config: RestAPIExecutionConfig | None = None
    timeout_s: Annotated[float, Field(ge=0.1, le=300)] = 10
    fails_open: bool = False

    @field_validator("execution_config")
    @classmethod
    def _can_be_asked(cls, asked: RestAPIExecutionConfig | None) -> RestAPIExecutionConfig | None:
        if asked is not None and (problem := why_not_askable(asked)) is not None:
            raise ValueError(problem[1])
        return asked


def why_not_askable(asked: RestAPIExecutionConfig) -> tuple[str, str] | None:
    """The field by which messages cannot be sent along, and why; None if they can."""
    if asked.method not in (RestAPIMethod.POST, RestAPIMethod.PUT):
        return "method", f"method is {asked.method.value}; allowed: POST, PUT, as the messages are sent along"
    if "messages" in (asked.body or {}):
        return "body", "body has a key 'messages', which the shield sets"
    return None


Shield = Annotated[
    LlamaGuardShield | WordShield | ClassifierShield | CodeScannerShield | ThirdPartyShield, Field(discriminator="type")
]


class ModelShields(Wire):
    """The shields, by their ids, that judge all that a model is asked (`input`) and all that it answers (`output`).

    A streamed answer is judged each `window` characters, which are held back until then. An adapter without an entry of
    its own has that of its base model, and a model without one that of EVERY_OTHER.
    """

    input: Annotated[list[ShieldId], at_most(MAX_SHIELDS)] = []
    output: Annotated[list[ShieldId], at_most(MAX_SHIELDS)] = []
    window: Annotated[int, Field(ge=1, le=100_000)] = 200


def base_of(model: str, models: Iterable[str]) -> str | None:
    """Which of the config's models a model is: itself, or the one that it was trained from, as its id says.

    An adapter's is base:job_uuid, that of a model which a job has trained whole is base-job_uuid.
    """
    bases = [one for one in models if model == one or model.startswith((f"{one}:", f"{one}-"))]
    return max(bases, key=len, default=None)


def require_base(model: str, models: Collection[str], of: str) -> None:
    """Raises ValueError unless a model is one of the config's, or by its id one that was trained from one of them."""
    if base_of(model, models) is None:
        raise ValueError(
            f"{of} has the model {model!r}; allowed: {', '.join(models)}, and what was trained from one of them "
            "(base:job_uuid, base-job_uuid)"
        )


def require_shields_fit(
    shields: Iterable[Shield], classifiers: set[str], shielded: Mapping[str, ModelShields], models: Collection[str]
) -> None:
    """Raises ValueError unless all ids fit: those of shields are used once and known, classifiers and models are there.

    A mistyped one would shield nothing, or let nothing pass. `models` are the config's language models.
    """
    known: dict[str, Shield] = {}
    for shield in shields:
        if shield.id in known:
            raise ValueError(f"shields: the id {shield.id!r} is used more than once")
        if shield.id in set(BuiltinShield) and shield.id != shield.type:
            raise ValueError(f"shields: {shield.id!r} is a {shield.type}; allowed for that id: the type {shield.id}")
        if isinstance(shield, ClassifierShield) and shield.model not in classifiers:
            listed = ", ".join(sorted(classifiers)) or "none"
            raise ValueError(f"shields: {shield.id!r} has the model {shield.model!r}; classifiers: {listed}")
        if isinstance(shield, LlamaGuardShield | WordShield):
            require_base(shield.model, models, f"shields: {shield.id!r}")
        known[shield.id] = shield
    for model, wanted in shielded.items():
        if model != EVERY_OTHER and not any(model == one or model.startswith(f"{one}:") for one in models):
            raise ValueError(
                f"model_shields: there is no model {model!r}; allowed: {', '.join(models)}, an adapter of one of them "
                f"(base:job_uuid), and {EVERY_OTHER!r} for all others, also those that are added"
            )
        for name in (*wanted.input, *wanted.output):
            if name not in known:
                raise ValueError(f"model_shields: {model!r} has {name!r}; shields: {', '.join(known) or 'none'}")
