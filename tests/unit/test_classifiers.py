"""Sequence classifiers: their models in this process, heads on embedding models, and their application."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stack import heads
from stack.config import Config, RewardModel, SequenceClassifier, home
from stack.errors import BadInput
from stack.heads import Head
from stack.models import Failure, Scores
from tests.conftest import CONFIG

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Ray itself warns of as it is imported
    from serve_apps.classifiers import Classifier, Scorer, build

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "capital", "of", "france", "is", "paris", "##s", "one"]
TEMPLATE = (
    "{% for one in messages %}{% if one.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "[CLS] {{ one.content }} [SEP]{% endfor %}"
)
MAX_TOKENS = 16
MINILM = home() / "models" / "all-MiniLM-L6-v2"  # as scripts/setup prepares it


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of few words and three labels, with drawn weights."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

    folder = tmp_path_factory.mktemp("classifier")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = BertTokenizer(str(folder / "vocab.txt"), model_max_length=MAX_TOKENS)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=MAX_TOKENS, id2label={0: "benign", 1: "injection", 2: "jailbreak"},
        initializer_range=1.0,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def classifier(folder: Path) -> Classifier:
    return Classifier(SequenceClassifier(id="tiny", path=str(folder)))


def logits(classifier: Classifier, *inputs: Any, windows: bool = False) -> Any:
    return classifier.logits(classifier.tokenize(inputs, windows)[0])


# A model of transformers


def test_logits_are_those_of_transformers(classifier: Classifier, folder: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    texts = ["the capital of france is paris", "one", "paris is the capital of one one one"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.inference_mode():
        theirs = [model(**tokenizer(text, return_tensors="pt")).logits[0].numpy() for text in texts]
    ours = logits(classifier, *texts)
    assert ours == pytest.approx(np.array(theirs), abs=1e-5)
    assert ours.shape == (3, 3)
    assert ours.dtype == np.float32
    assert np.ptp(ours, axis=0).min() > 0.01, "the texts must differ"


def test_what_the_model_is_like_is_found_in_its_folder(classifier: Classifier, folder: Path) -> None:
    assert classifier.labels == ("benign", "injection", "jailbreak")
    assert classifier.max_tokens == MAX_TOKENS
    assert Classifier(SequenceClassifier(id="tiny", path=str(folder), max_tokens=16)).max_tokens == 16


def test_a_text_that_is_too_long_is_named_with_both_lengths(classifier: Classifier) -> None:
    with pytest.raises(BadInput, match="has 17 tokens; the model takes at most 16") as caught:
        classifier.tokenize(["one " * 14, "one " * 15], windows=False)
    assert caught.value.param == "1"


def test_long_texts_are_seen_in_windows_that_overlap_by_half(classifier: Classifier) -> None:
    words = ("the capital of france is paris one " * 5).split()
    windows, of = classifier.tokenize(["one", " ".join(words), "paris"], windows=True)
    assert of == [0, 1, 1, 1, 1, 2]
    ids = [WORDS.index(word) for word in words]
    assert [window[1:-1] for window in windows[1:-1]] == [ids[start : start + 14] for start in (0, 7, 14, 21)]
    assert all(window[0] == 2 and window[-1] == 3 for window in windows)


def test_a_window_is_scored_as_a_text_of_its_own(classifier: Classifier) -> None:
    words = ("the capital of france is paris one " * 3).split()
    together = logits(classifier, " ".join(words), windows=True)
    alone = logits(classifier, " ".join(words[:14]), " ".join(words[7:]))
    assert together == pytest.approx(alone, abs=1e-5)


def test_a_text_is_scored_alike_whatever_stands_beside_it(classifier: Classifier) -> None:
    texts = ["one", "the capital of france is paris one one one"]
    together = logits(classifier, *texts)
    for row, text in zip(together, texts, strict=True):
        assert row == pytest.approx(logits(classifier, text)[0], abs=1e-5)


def test_messages_are_written_by_the_models_own_template(classifier: Classifier) -> None:
    messages = [dict(role="user", content="the capital"), dict(role="assistant", content="paris")]
    (tokens,), _ = classifier.tokenize([messages], windows=False)
    assert [WORDS[token] for token in tokens] == ["[CLS]", "the", "capital", "[SEP]", "[CLS]", "paris", "[SEP]"]


def test_special_tokens_within_a_text_are_text(classifier: Classifier) -> None:
    (tokens,), _ = classifier.tokenize(["one [SEP] one"], windows=False)
    assert tokens.count(WORDS.index("[SEP]")) == 1


def test_messages_that_the_template_does_not_take_are_named(classifier: Classifier) -> None:
    with pytest.raises(BadInput, match="template does not take these messages: no system") as caught:
        classifier.tokenize(["one", [dict(role="system", content="one")]], windows=False)
    assert caught.value.param == "1"


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def test_a_model_without_a_template_takes_texts_alone(folder: Path, tmp_path: Path) -> None:
    without = copied(folder, tmp_path / "without")
    (without / "chat_template.jinja").unlink()
    classifier = Classifier(SequenceClassifier(id="tiny", path=str(without)))
    with pytest.raises(BadInput, match="no chat template"):
        classifier.tokenize([[dict(role="user", content="one")]], windows=False)


def test_a_model_without_a_head_is_refused_rather_than_given_a_drawn_one(folder: Path, tmp_path: Path) -> None:
    from transformers import BertModel

    without = copied(folder, tmp_path / "without")
    BertModel.from_pretrained(without).save_pretrained(without)
    with pytest.raises(BadInput, match=r"no sequence classifier: it has no classifier\.bias, classifier\.weight"):
        Classifier(SequenceClassifier(id="tiny", path=str(without)))


def test_a_missing_head_is_found_without_loading_weights(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, BertModel

    from serve_apps.classifiers import _require_head

    _require_head(SequenceClassifier(id="tiny", path=str(folder)), AutoConfig.from_pretrained(folder))
    without = copied(folder, tmp_path / "without")
    BertModel.from_pretrained(without).save_pretrained(without)
    with pytest.raises(BadInput, match=r"no sequence classifier: it has no classifier\.bias, classifier\.weight"):
        _require_head(SequenceClassifier(id="tiny", path=str(without)), AutoConfig.from_pretrained(folder))


def test_weights_that_are_a_pickle_are_not_loaded(folder: Path, tmp_path: Path) -> None:
    pickled = copied(folder, tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    torch.save({}, pickled / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        Classifier(SequenceClassifier(id="tiny", path=str(pickled)))


def test_a_decoder_is_scored_at_its_last_token_also_where_others_pad_it(folder: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    decoder = copied(folder, tmp_path / "decoder")
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, num_labels=1, pad_token_id=None, bos_token_id=2, eos_token_id=3,
        initializer_range=1.0,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForSequenceClassification(config).save_pretrained(decoder)
    classifier = Classifier(SequenceClassifier(id="tiny", path=str(decoder)))
    texts = ["one paris", "the capital of france is paris one one one"]
    together = logits(classifier, *texts)
    assert together.shape == (2, 1)
    assert together[0] == pytest.approx(logits(classifier, texts[0])[0], abs=1e-4)
    assert together[1] == pytest.approx(logits(classifier, texts[1])[0], abs=1e-4)


# Heads


def head_of(encoder: Path, **changes: Any) -> Head:
    fields: dict[str, Any] = dict(
        encoder=str(encoder), encoder_sha256=heads.encoder_sha256(encoder), labels=["safe", "unsafe"], max_tokens=14,
        command="python -m jobs.train", data_sha256={"rows": "0" * 64}, scores={"accuracy": 0.9},
    )  # fmt: skip
    return Head(**fields | changes)


@pytest.fixture(scope="module")
def encoder(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertModel

    encoder = tmp_path_factory.mktemp("encoders") / "encoder"
    shutil.copytree(folder, encoder)
    BertModel.from_pretrained(encoder).save_pretrained(encoder)
    return encoder


WEIGHT = np.random.default_rng(1).normal(size=(2, 16)).astype(np.float32)
BIAS = np.array([0.5, -1], dtype=np.float32)


def test_a_head_gives_a_linear_function_of_the_vectors(encoder: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    heads.save(tmp_path / "head", head_of(encoder), WEIGHT, BIAS)
    classifier = Classifier(SequenceClassifier(id="tiny", path=str(tmp_path / "head")))
    texts = ["the capital of france", "one"]
    vectors = SentenceTransformer(str(encoder), device="cpu").encode(texts)
    assert logits(classifier, *texts) == pytest.approx(vectors @ WEIGHT.T + BIAS, abs=1e-5)
    assert (classifier.labels, classifier.max_tokens) == (("safe", "unsafe"), 14)


def test_a_head_makes_a_text_of_messages_by_its_own_template(encoder: Path, tmp_path: Path) -> None:
    template = "{{ messages[-1].content }} {{ messages[0].content }}"
    heads.save(tmp_path / "head", head_of(encoder, chat_template=template), WEIGHT, BIAS)
    classifier = Classifier(SequenceClassifier(id="tiny", path=str(tmp_path / "head")))
    messages = [dict(role="user", content="the capital"), dict(role="assistant", content="paris")]
    assert logits(classifier, messages) == pytest.approx(logits(classifier, "paris the capital"), abs=1e-6)


def test_a_head_for_other_weights_is_refused(encoder: Path, tmp_path: Path) -> None:
    heads.save(tmp_path / "head", head_of(encoder, encoder_sha256="0" * 64), WEIGHT, BIAS)
    with pytest.raises(BadInput, match="was trained on other weights"):
        Classifier(SequenceClassifier(id="tiny", path=str(tmp_path / "head")))
    heads.save(tmp_path / "head", head_of(encoder), WEIGHT[:, :8], BIAS)
    with pytest.raises(BadInput, match="is for 8 dimensions, not 16"):
        Classifier(SequenceClassifier(id="tiny", path=str(tmp_path / "head")))


def test_a_head_is_read_as_it_was_written_and_a_broken_one_is_refused(encoder: Path, tmp_path: Path) -> None:
    head = head_of(encoder)
    heads.save(tmp_path, head, WEIGHT, BIAS)
    read, weight, bias = heads.load(tmp_path)
    assert read == head
    assert (weight == WEIGHT).all()
    assert (bias == BIAS).all()
    heads.save(tmp_path, head, WEIGHT, BIAS[:1])
    with pytest.raises(BadInput, match=r"allowed: weight \(2, dimensions\) and bias \(2,\)"):
        heads.load(tmp_path)
    (tmp_path / heads.HEAD).write_text(json.dumps({"labels": []}))
    with pytest.raises(BadInput, match="encoder: is required"):
        heads.load(tmp_path)
    (tmp_path / heads.HEAD).write_text(head.model_dump_json())
    (tmp_path / heads.WEIGHTS).write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(BadInput, match="cannot be read"):
        heads.load(tmp_path)


def test_a_head_on_minilm_tells_apart_what_its_vectors_tell_apart(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(MINILM), device="cpu")
    weight = model.encode(["Cats and dogs are pets.", "The bank raised its interest rates."])
    head = head_of(MINILM, labels=["animals", "money"], max_tokens=256)
    heads.save(tmp_path, head, weight, np.zeros(2, dtype=np.float32))
    classifier = Classifier(SequenceClassifier(id="topics", path=str(tmp_path)))
    likeliest = logits(classifier, "My hamster sleeps all day.", "Loans have become expensive.").argmax(axis=1)
    assert [classifier.labels[number] for number in likeliest] == ["animals", "money"]


# The deployment


@pytest.fixture(autouse=True)
def _batches_of_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve's batches are only to be had within a replica: here each request is a batch of its own."""

    def batch(**_options: Any) -> Any:
        def of(function: Any) -> Any:
            async def alone(chunk: Any) -> Any:
                (rows,) = await function([chunk])
                return rows

            return alone

        return of

    monkeypatch.setattr("serve_apps.batching.serve.batch", batch)


def scorer(folder: Path, **entry: Any) -> Any:
    return Scorer.func_or_class(SequenceClassifier(id="tiny", path=str(folder), **entry))  # type: ignore[attr-defined]


async def test_rows_are_in_the_order_of_the_inputs(folder: Path, classifier: Classifier) -> None:
    texts = [" ".join(["paris", *["one"] * count]) for count in (9, 1, 13, 0, 5, 20, 2)]
    scores = await scorer(folder, max_batch=2).classify(texts, True)
    assert isinstance(scores, Scores)
    assert scores.inputs.tolist() == [0, 1, 2, 3, 4, 5, 5, 6]
    assert scores.labels == classifier.labels
    assert scores.values == pytest.approx(logits(classifier, *texts, windows=True), abs=1e-5)
    assert scores.tokens == sum(len(one) for one in classifier.tokenize(texts, windows=True)[0])


async def test_scores_say_whether_several_labels_can_be_true(folder: Path, tmp_path: Path) -> None:
    several = copied(folder, tmp_path / "several")
    config = json.loads((several / "config.json").read_text()) | {"problem_type": "multi_label_classification"}
    (several / "config.json").write_text(json.dumps(config))
    assert [(await scorer(one).classify(["paris"], True)).is_multi_label for one in (folder, several)] == [False, True]


async def test_what_is_refused_is_told_with_the_index(folder: Path) -> None:
    refused = await scorer(folder).classify(["one", "one " * 15], False)
    assert isinstance(refused, Failure)
    assert (refused.status, refused.param) == (400, "1")


async def test_a_replica_whose_model_answers_nonsense_is_not_healthy(folder: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    await scorer(folder).check_health()
    broken = copied(folder, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["classifier.bias"] = np.full(3, np.nan, dtype=np.float32)
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="numbers that are none"):
        await scorer(broken).check_health()
    failed = await scorer(broken).classify(["one"], False)
    assert isinstance(failed, Failure)
    assert failed.status == 500


def test_a_reward_model_whose_heads_do_not_fit_does_not_start(folder: Path) -> None:
    def start(**entry: Any) -> None:
        Scorer.func_or_class(RewardModel(id="tiny", path=str(folder), kind="classifier", **entry))  # type: ignore[attr-defined]

    with pytest.raises(BadInput, match="needs `heads`, as it has the labels benign, injection, jailbreak"):
        start()
    with pytest.raises(BadInput, match=r"no label 'safe' \(heads\): benign, injection, jailbreak"):
        start(heads={"safe": 1})
    start(heads={"benign": 1, "jailbreak": -0.5})


def test_the_application_has_what_the_config_says() -> None:
    entry = {"id": "guard", "path": "models/guard", "cpus": 2, "max_queued_requests": 7}
    for kind in ({}, {"kind": "classifier", "heads": {"helpful": 0.3}}):
        deployment = build({"model": entry | kind})._bound_deployment  # type: ignore[attr-defined]
        (model,) = deployment.init_args
        assert isinstance(model, RewardModel) == bool(kind)
        assert deployment.ray_actor_options["num_cpus"] == 2
        assert deployment.max_queued_requests == 7


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"id": "guard"}, "model.path: is required"),
        ({"id": "guard", "path": "x", "heads": {}}, "unknown key 'heads'"),
        ({"id": "guard", "path": "x", "kind": "judge"}, "model.kind: Input should be 'classifier'"),
        ({"id": "guard", "path": "x", "kind": "classifier", "heads": {"a": 1e9}}, "model.heads.a: Input should be"),
    ],
)
def test_args_that_are_none_are_refused_by_name(model: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        build({"model": model})


# The config


def parsed(**entries: Any) -> Config:
    return Config.parse(CONFIG | entries, "stack.yaml")


JUDGE = {"kind": "judge", "id": "judge", "model": "small", "rubric": "Is it kind?"}


def test_all_models_are_those_that_have_applications() -> None:
    config = parsed(
        classifiers=[{"id": "guard", "path": "models/guard"}],
        reward_models=[{"kind": "classifier", "id": "reward", "path": "models/reward"}, JUDGE],
    )
    assert [model.id for model in config.all_models[-2:]] == ["guard", "reward"]
    assert [judge.id for judge in config.judges] == ["judge"]
    assert config.classifiers[0].folder == home() / "models/guard"


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"classifiers": [{"id": "judge", "path": "x"}]}, "the id 'judge' is used more than once"),
        ({"reward_models": [JUDGE, {"id": "r", "path": "x"}]}, "reward_models.1: .*kind"),
        ({"reward_models": [JUDGE | {"lowest": 3, "highest": 3}]}, "highest is 3; allowed: more than lowest, 3"),
        ({"reward_models": [JUDGE | {"highest": 10}]}, "highest: Input should be less than or equal to 9"),
        ({"reward_models": [JUDGE | {"rubric": ""}]}, "rubric: .*at least 1 character"),
    ],
)
def test_entries_that_are_none_are_refused_by_name(entries: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        parsed(**{"reward_models": [JUDGE]} | entries)
