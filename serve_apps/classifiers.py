"""A sequence classifier as a Serve deployment, for shields and reward models, with the texts of several requests in one
batch: a model of transformers, by vLLM on GPUs where it has the architecture, or a small head on an embedding model
(stack/heads.py)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from jinja2 import TemplateError
from pydantic import Discriminator, Tag, ValidationError
from ray import serve

from serve_apps import vllm_pooling
from serve_apps.batching import Batches, Rows, Tokens, deployment_options, set_threads
from serve_apps.embeddings import Encoder
from stack import heads
from stack.api.wire import Wire, describe
from stack.config import EmbeddingModel, RewardModel, SequenceClassifier, home
from stack.errors import BadInput
from stack.models import Classifiable, Failure, Scores


def build(args: dict[str, Any]) -> serve.Application:
    """The application of one classifier: its entry in the config."""
    try:
        model = ClassifierApplication.model_validate(args).model
    except ValidationError as error:
        raise BadInput(f"args of a classifier's application: {describe(error)}") from error
    return Scorer.options(**deployment_options(model)).bind(model)  # type: ignore[attr-defined, no-any-return]


def _kind(value: Any) -> str:
    """The tag of a classifier, by which alone it is read; brackets keep it out of the place that an error names."""
    return "(reward model)" if isinstance(value, dict) and "kind" in value else "(classifier)"


class ClassifierApplication(Wire):
    """The args of a classifier's application."""

    model: Annotated[
        Annotated[RewardModel, Tag("(reward model)")] | Annotated[SequenceClassifier, Tag("(classifier)")],
        Discriminator(_kind),
    ]


@serve.deployment
class Scorer:
    """Scores texts and messages."""

    def __init__(self, model: SequenceClassifier) -> None:
        self._classifier = Classifier(model)
        if isinstance(model, RewardModel):
            model.weights_of(self._classifier.labels)  # raises where they do not fit each other
        self._probe, _ = self._classifier.tokenize(["Are you well?"], windows=True)
        self._batches = Batches(model, self._classifier.logits)

    async def classify(self, inputs: Sequence[Classifiable], windows: bool) -> Scores | Failure:
        """The logits of inputs, or why they are refused (see stack.models.Engine)."""
        try:
            tokens, of = await self._batches.tokenized(self._classifier.tokenize, inputs, windows)
        except BadInput as error:
            return Failure(error.status, error.message, error.param)
        values = await self._batches.rows(tokens)
        if not np.isfinite(values).all():
            return Failure(500, "the model answered with numbers that are none (NaN or infinite)")
        total = sum(len(one) for one in tokens)
        return Scores(values, np.array(of), self._classifier.labels, total, self._classifier.is_multi_label)

    async def check_health(self) -> None:
        """Raises unless the model answers."""
        if not np.isfinite(await self._batches.rows_at_once(self._probe)).all():
            raise RuntimeError("the classifier answers with numbers that are none (NaN or infinite)")


class Classifier:
    """A classifier, loaded from its folder. Its weights are safetensors and it brings no code.

    Raises BadInput if the folder holds none. `labels` are those of the columns of its logits.
    """

    def __init__(self, model: SequenceClassifier) -> None:
        set_threads(model)
        is_head = (model.folder / heads.HEAD).is_file()
        self._loaded = _head_on_encoder(model) if is_head else _sequence_classifier(model)
        self.labels = self._loaded.labels
        self.is_multi_label = self._loaded.is_multi_label
        self.max_tokens = self._loaded.max_tokens
        if not self._loaded.tokenizer.is_fast:  # which alone makes windows
            raise BadInput(f"the tokenizer in {model.folder} is none of the tokenizers library (tokenizer.json)")

    def tokenize(self, inputs: Sequence[Classifiable], windows: bool) -> tuple[list[Tokens], list[int]]:
        """The tokens of inputs, of at most `max_tokens` each, and of which input each is. See stack.models.Engine.

        Not for several threads at once, as the tokenizer keeps whether it truncates.
        """
        tokens, of = [], []
        for index, one in enumerate(inputs):
            try:
                made = self._tokens(one, windows)
            except BadInput as error:
                raise BadInput(error.message, param=str(index)) from error
            tokens += made
            of += [index] * len(made)
        return tokens, of

    def logits(self, texts: list[Tokens]) -> Rows:
        """The logits of tokenized texts, which are padded to one length: (texts, labels)."""
        return self._loaded.logits(texts)

    def _tokens(self, given: Classifiable, windows: bool) -> list[Tokens]:
        is_text, tokenizer = isinstance(given, str), self._loaded.tokenizer
        # What a text says is text, also where it has the letters of a special token. Templates write such ones.
        options: dict[str, Any] = dict(split_special_tokens=is_text) | dict(
            add_special_tokens=is_text or self._loaded.adds_special_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        if windows:
            special = tokenizer.num_special_tokens_to_add() if options["add_special_tokens"] else 0
            overlap = (self.max_tokens - special) // 2
            options |= dict(truncation=True, max_length=self.max_tokens, stride=overlap, return_overflowing_tokens=True)
        text = given if isinstance(given, str) else self._rendered(given)
        tokens: list[Tokens] = tokenizer([text], **options)["input_ids"]
        if len(tokens[0]) > self.max_tokens:
            raise BadInput(f"has {len(tokens[0])} tokens; the model takes at most {self.max_tokens}")
        if not tokens[0]:
            raise BadInput("is empty, and the model adds no special token to it")
        return tokens

    def _rendered(self, messages: list[dict[str, Any]]) -> str:
        template = self._loaded.chat_template
        if template is None:
            raise BadInput("the model has no chat template, and takes texts alone")
        try:
            text = self._loaded.tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
        except TemplateError as error:
            raise BadInput(f"the model's chat template does not take these messages: {error}") from error
        return str(text)


@dataclass(frozen=True)
class _Loaded:
    """What a folder holds. `adds_special_tokens` says whether the tokenizer adds them to what the template writes."""

    tokenizer: Any
    logits: Callable[[list[Tokens]], Rows]
    labels: tuple[str, ...]
    max_tokens: int
    chat_template: str | None
    adds_special_tokens: bool
    is_multi_label: bool = False


def _head_on_encoder(model: SequenceClassifier) -> _Loaded:
    head, weight, bias = heads.load(model.folder)
    encoder = Encoder(EmbeddingModel(id=model.id, path=head.encoder, cpus=model.cpus, gpus=model.gpus))
    if heads.encoder_sha256(home() / head.encoder) != head.encoder_sha256:
        raise BadInput(f"the head in {model.folder} was trained on other weights than those in {head.encoder}")
    if encoder.dimensions != weight.shape[1]:
        raise BadInput(f"the head in {model.folder} is for {weight.shape[1]} dimensions, not {encoder.dimensions}")
    if encoder.prompt:
        raise BadInput(f"the embedding model in {head.encoder} has a prompt of its own, which heads do not use")

    def logits(texts: list[Tokens]) -> Rows:
        return encoder.encode(texts) @ weight.T + bias

    limit = min(model.max_tokens, head.max_tokens)
    return _Loaded(encoder.tokenizer, logits, tuple(head.labels), limit, head.chat_template, adds_special_tokens=True)


def _sequence_classifier(model: SequenceClassifier) -> _Loaded:
    from transformers import AutoConfig, AutoTokenizer

    # Padding on the left would shift the positions.
    tokenizer = AutoTokenizer.from_pretrained(model.folder, local_files_only=True, padding_side="right")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    config = AutoConfig.from_pretrained(model.folder, local_files_only=True)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or model.max_tokens
    limit = min(model.max_tokens, positions, tokenizer.model_max_length)
    # On CPU vLLM's engine takes half a minute to start, and a core and memory of its own, for models that are small.
    if model.gpus and vllm_pooling.supports(model.folder):
        _require_head(model, config)
        share = model.gpus * vllm_pooling.GPU_SHARE
        logits = vllm_pooling.logits_of(model.folder, limit, model.max_batch, gpu_memory_utilization=share)
    else:
        logits = _by_transformers(model, tokenizer)
    return _Loaded(
        tokenizer,
        logits,
        tuple(str(config.id2label[number]) for number in range(config.num_labels)),
        limit,
        tokenizer.chat_template,
        adds_special_tokens=False,
        is_multi_label=config.problem_type == "multi_label_classification",
    )


def _require_head(model: SequenceClassifier, config: Any) -> None:
    """Raises BadInput for weights without a head, which vLLM would take for none that is missing."""
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForSequenceClassification

    with torch.device("meta"):
        network = AutoModelForSequenceClassification.from_config(config)
    names = set[str]()
    for file in model.folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            names |= set(weights.keys())
    body = f"{network.base_model_prefix}."
    missing = sorted(name for name in network.state_dict() if not name.startswith(body) and name not in names)
    if missing:
        raise BadInput(f"the model in {model.folder} is no sequence classifier: it has no {', '.join(missing[:3])}")


def _by_transformers(model: SequenceClassifier, tokenizer: Any) -> Callable[[list[Tokens]], Rows]:
    import torch
    from transformers import AutoModelForSequenceClassification

    network, loading = AutoModelForSequenceClassification.from_pretrained(
        model.folder,
        local_files_only=True,
        use_safetensors=True,
        dtype="auto" if model.gpus else "float32",
        output_loading_info=True,
    )
    if missing := sorted(loading["missing_keys"]):  # they would be drawn at random
        raise BadInput(f"the model in {model.folder} is no sequence classifier: it has no {', '.join(missing[:3])}")
    if network.config.pad_token_id is None:  # decoders find the last token of a padded text by it
        network.config.pad_token_id = tokenizer.pad_token_id
    network.to("cuda" if model.gpus else "cpu").eval()

    def logits(texts: list[Tokens]) -> Rows:
        features = dict(tokenizer.pad({"input_ids": texts}, padding=True, return_tensors="pt"))
        features = {name: tensor.to(network.device) for name, tensor in features.items()}
        with torch.inference_mode():
            return network(**features).logits.float().cpu().numpy()  # type: ignore[no-any-return]

    return logits
