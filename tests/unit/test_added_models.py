"""Models that are added while the stack runs: what may be one, who may be asked, and how applications follow."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from stack import added_models, trained_models
from stack.added_models import Application, Reconciler
from stack.api.models import ModelState, ServedModel
from stack.config import Config, LanguageModel
from stack.context import Context
from stack.errors import BadInput, Conflict, NotFound, StackError, Unavailable
from stack.store import models as store_models
from tests import samples
from tests.conftest import CONFIG
from tests.scripted_deployer import RUNNING, ScriptedDeployer


@pytest.fixture
def deployer() -> ScriptedDeployer:
    return ScriptedDeployer({"gateway": RUNNING, "small": RUNNING})


@pytest.fixture
def reconciler(context: Context, deployer: ScriptedDeployer) -> Reconciler:
    return Reconciler(context.config, context.store, deployer)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is removed is known by all gateways at once."""
    monkeypatch.setattr(added_models, "RECENT_S", 0.0)


def entry(id: str = "extra", **others: Any) -> LanguageModel:
    return LanguageModel.model_validate({"id": id, "path": "models/small"} | others)


def state_of(context: Context, deployer: ScriptedDeployer, id: str = "extra") -> ServedModel | None:
    listed = added_models.list_models(context, deployer)
    return next((model for model in listed if model.id == id), None)


def test_an_added_model_is_started_once_and_then_runs(
    context: Context, deployer: ScriptedDeployer, reconciler: Reconciler
) -> None:
    added = added_models.add(context, entry(context=128), deployer)
    assert (added.source, added.state) == ("added", "starting")
    assert added.model == {"id": "extra", "path": "models/small", "context": 128}
    for _ in range(3):
        reconciler.reconcile()
    assert deployer.deployed == [(entry(context=128), "artifacts")]
    found = state_of(context, deployer)
    assert found is not None
    assert (found.state, found.replicas) == ("starting", 0)
    deployer.running["extra"] = RUNNING
    found = state_of(context, deployer)
    assert found is not None
    assert (found.state, found.replicas, found.created_at) == ("running", 1, added.created_at)


def test_everybody_may_ask_an_added_model_and_its_adapters(context: Context, deployer: ScriptedDeployer) -> None:
    added_models.add(context, entry(context=128), deployer)
    samples.add_adapter(context.store, "extra:tune-1", "extra", "tune-1")
    assert [model.id for model in context.models.all()] == ["small", "extra", "extra:tune-1"]
    other = context.of_tenant("other")
    assert other.models.get("extra").base == entry(context=128)
    assert context.models.get("extra:tune-1").base.id == "extra"
    with pytest.raises(NotFound):
        other.models.get("extra:tune-1")


async def test_an_added_model_is_found_and_answers(context: Context, deployer: ScriptedDeployer) -> None:
    added_models.add(context, entry(), deployer)
    for _ in range(2):  # the second time without a question to the database
        assert (await context.models.find("extra")).base == entry()
    body = {"model": "extra", "messages": [{"role": "user", "content": "Where?"}]}
    assert b"Paris" in await context.models.answer("chat", body)


def test_another_process_sees_what_was_added_and_removed(
    context: Context, deployer: ScriptedDeployer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_models, "RECENT_S", 0.0)
    other = Context.open(context.config, engine=context.engine)
    try:
        with pytest.raises(NotFound):
            other.models.get("extra")
        added_models.add(context, entry(), deployer)
        assert other.models.get("extra").base == entry()
        added_models.remove(context, "extra", deployer)
        with pytest.raises(NotFound):
            other.models.get("extra")
    finally:
        other.close()


def test_what_was_read_counts_for_a_while_and_spares_the_database(
    context: Context, deployer: ScriptedDeployer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_models, "RECENT_S", 3_600.0)
    added_models.add(context, entry(), deployer)
    assert context.models.get("extra").base == entry()
    assert list(context.store.models.known() or {}) == ["extra"]
    context.store.models.list = lambda: pytest.fail("the database is asked")  # type: ignore[method-assign]
    assert context.models.get("extra").base == entry()


def test_the_same_model_may_be_added_again_and_another_one_may_not(
    context: Context, deployer: ScriptedDeployer, reconciler: Reconciler
) -> None:
    first = added_models.add(context, entry(context=128), deployer)
    reconciler.reconcile()
    assert added_models.add(context, entry(context=128), deployer).created_at == first.created_at
    with pytest.raises(Conflict, match="'extra' is added already, with another entry"):
        added_models.add(context, entry(context=256), deployer)


@pytest.mark.parametrize(
    ("id", "words"), [("small", "the config lists"), ("gateway", "another application"), ("theirs", "another")]
)
def test_an_id_that_is_taken_is_refused(context: Context, deployer: ScriptedDeployer, id: str, words: str) -> None:
    deployer.running["theirs"] = RUNNING
    with pytest.raises(Conflict, match=words) as caught:
        added_models.add(context, entry(id), deployer)
    assert caught.value.param == "id"
    assert context.store.models.list() == []


def test_an_id_of_an_embedding_model_is_taken(context: Context, deployer: ScriptedDeployer) -> None:
    embedding = {"embedding_models": [{"id": "vectors", "path": "models/vectors"}]}
    config = Config.parse(CONFIG | embedding | {"store": context.config.store}, "test")
    other = Context.open(config, engine=context.engine)
    try:
        with pytest.raises(Conflict, match="the config lists a model 'vectors'"):
            added_models.add(other, entry("vectors"), deployer)
    finally:
        other.close()


@pytest.mark.parametrize("path", ["models/none", "/nowhere", ".", "models/small/config.json"])
def test_a_folder_without_a_model_is_refused(context: Context, deployer: ScriptedDeployer, path: str) -> None:
    with pytest.raises(BadInput, match="no model in the folder") as caught:
        added_models.add(context, entry(path=path), deployer)
    assert caught.value.param == "path"


@pytest.mark.parametrize("path", ["~nobody-here/model", "x" * 300, "models/\ud83d"])
def test_a_folder_that_cannot_be_read_is_refused(context: Context, deployer: ScriptedDeployer, path: str) -> None:
    with pytest.raises(BadInput, match=r"cannot be read|no model in the folder"):
        added_models.add(context, LanguageModel.model_construct(id="extra", path=path, engine={}), deployer)


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ({"worker_cls": "os.system"}, ["'worker_cls'", "config file", "max_num_seqs"]),
        ({"load_format": "pt"}, ["'load_format'"]),
        ({"logits_processors": ["a.b"]}, ["'logits_processors'"]),
        ({"hf_overrides": {"auto_map": {}}}, ["'hf_overrides'"]),
        ({"model_impl": "transformers"}, ["'model_impl'"]),
        ({"download_dir": "/etc"}, ["'download_dir'"]),
        ({"speculative_config": {"model": "/x"}}, ["'speculative_config'"]),
        ({"kv_transfer_config": {}}, ["'kv_transfer_config'"]),
        ({"max_num_seqs": "8"}, ["engine.max_num_seqs", "int", "'8'"]),
        ({"max_num_seqs": True}, ["engine.max_num_seqs", "int", "'True'"]),
        ({"max_num_seqs": 10**30}, ["engine.max_num_seqs", "too large"]),
        ({"enforce_eager": 1}, ["engine.enforce_eager", "bool", "'1'"]),
        ({"gpu_memory_utilization": float("inf")}, ["engine.gpu_memory_utilization", "too large"]),
        ({"gpu_memory_utilization": float("nan")}, ["engine.gpu_memory_utilization", "too large"]),
        ({"kv_cache_dtype": "x" * 60}, ["engine.kv_cache_dtype", "too large"]),
        ({"kv_cache_dtype": {"a": 1}}, ["engine.kv_cache_dtype", "str"]),
    ],
)
def test_arguments_of_the_engine_that_could_run_code_or_are_none_are_refused(
    context: Context, deployer: ScriptedDeployer, engine: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(BadInput) as caught:
        added_models.add(context, entry(engine=engine), deployer)
    assert caught.value.param == "engine"
    for word in words:
        assert word in caught.value.message
    assert context.store.models.list() == []


def test_arguments_of_the_engine_that_set_its_speed_are_taken(context: Context, deployer: ScriptedDeployer) -> None:
    engine = {"enforce_eager": True, "max_num_seqs": 8, "gpu_memory_utilization": 1, "kv_cache_dtype": "fp8"}
    assert added_models.add(context, entry(engine=engine), deployer).model["engine"] == engine


def test_only_so_many_models_are_added(
    context: Context, deployer: ScriptedDeployer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(added_models, "MAX_ADDED", 2)
    for name in ("one", "two"):
        added_models.add(context, entry(name), deployer)
    with pytest.raises(Conflict, match="2 models are added") as caught:
        added_models.add(context, entry("three"), deployer)
    assert caught.value.code == "too_many_models"
    assert added_models.add(context, entry("two"), deployer).id == "two"


def test_of_many_who_add_at_once_only_so_many_may(context: Context) -> None:
    def add(number: int) -> bool:
        name = f"model-{number}"
        return context.store.models.add(name, "default", {"id": name, "path": "models/small"}, most=3) is not None

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(add, range(8))) == 3
    assert len(context.store.models.list()) == 3


def test_a_removed_model_is_not_asked_any_more_and_its_application_goes(
    context: Context, deployer: ScriptedDeployer, reconciler: Reconciler
) -> None:
    added_models.add(context, entry(), deployer)
    reconciler.reconcile()
    deployer.running["extra"] = RUNNING
    removed = added_models.remove(context, "extra", deployer)
    assert removed.state == "stopping"
    with pytest.raises(NotFound):
        context.models.get("extra")
    reconciler.reconcile()
    reconciler.reconcile()
    assert deployer.deleted == ["extra"], "once, and then its requests end"
    found = state_of(context, deployer)
    assert found is not None
    assert found.state == "stopping"
    with pytest.raises(Conflict, match="is being removed"):
        added_models.add(context, entry(), deployer)
    del deployer.running["extra"]
    reconciler.reconcile()
    assert state_of(context, deployer) is None
    added_models.add(context, entry(), deployer)
    reconciler.reconcile()
    assert len(deployer.deployed) == 2


def test_an_application_is_not_stopped_before_all_gateways_know(
    context: Context, deployer: ScriptedDeployer, reconciler: Reconciler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(added_models, "RECENT_S", 3_600.0)
    added_models.add(context, entry(), deployer)
    reconciler.reconcile()
    added_models.remove(context, "extra", deployer)
    reconciler.reconcile()
    assert deployer.deleted == []


def test_a_model_that_is_removed_before_it_is_started_just_goes(
    context: Context, deployer: ScriptedDeployer, reconciler: Reconciler
) -> None:
    added_models.add(context, entry(), deployer)
    added_models.remove(context, "extra", deployer)
    reconciler.reconcile()
    assert (deployer.deployed, deployer.deleted, context.store.models.list()) == ([], [], [])


def test_a_model_of_the_config_is_not_removed_here(context: Context, deployer: ScriptedDeployer) -> None:
    with pytest.raises(Conflict, match="out of the config file"):
        added_models.remove(context, "small", deployer)


@pytest.mark.parametrize("id", ["none", "", "gateway", "extra:tune-1"])
def test_a_model_that_is_not_there_is_not_removed(context: Context, deployer: ScriptedDeployer, id: str) -> None:
    added_models.add(context, entry(), deployer)
    with pytest.raises(NotFound, match="there are: extra"):
        added_models.remove(context, id, deployer)


def test_a_private_model_is_started_and_listed_for_its_tenant(
    context: Context, deployer: ScriptedDeployer, reconciler: Reconciler
) -> None:
    samples.add_trained(context.store, "extra", "acme")
    reconciler.reconcile()
    assert deployer.deployed == [(entry(), "artifacts")]
    found = state_of(context.of_tenant("acme"), deployer)
    assert found is not None
    assert (found.source, found.state, found.model) == ("trained", "starting", {"id": "extra", "path": "models/small"})
    assert [model.id for model in added_models.list_models(context, deployer)] == ["small"]


def test_the_files_of_a_trained_model_go_when_nothing_serves_it_any_more(
    context: Context, deployer: ScriptedDeployer, reconciler: Reconciler, tmp_path: Path
) -> None:
    (tmp_path / "made").mkdir()
    kept = trained_models.keep("acme/models/small-tune", tmp_path / "made")
    samples.add_trained(context.store, "extra", "acme", path=str(kept))
    deployer.running["extra"] = RUNNING
    added_models.remove(context.of_tenant("acme"), "extra", deployer)
    reconciler.reconcile()
    assert kept.is_dir(), "it ends its requests"
    del deployer.running["extra"]
    reconciler.reconcile()
    assert not kept.exists()


def test_a_private_model_is_removed_by_its_tenant_alone(
    context: Context, deployer: ScriptedDeployer, reconciler: Reconciler
) -> None:
    added_models.add(context, entry("everybodys"), deployer)
    samples.add_trained(context.store, "extra", "acme")
    with pytest.raises(NotFound) as unknown:
        added_models.remove(context, "extrx", deployer)
    with pytest.raises(NotFound) as private:
        added_models.remove(context, "extra", deployer)
    assert private.value.message == unknown.value.message.replace("extrx", "extra")
    assert private.value.message == "there is no added model 'extra'; there are: everybodys"
    assert (private.value.param, private.value.code) == (unknown.value.param, unknown.value.code)
    acme = context.of_tenant("acme")
    with pytest.raises(NotFound, match=r"there are: everybodys, extra$"):
        added_models.remove(acme, "extrx", deployer)
    assert acme.models.get("extra").id == "extra"
    assert added_models.remove(acme, "extra", deployer).source == "trained"
    with pytest.raises(NotFound):
        acme.models.get("extra")
    with pytest.raises(NotFound, match=r"there are: everybodys$"):
        added_models.remove(context, "extra", deployer)
    reconciler.reconcile()
    assert [row.id for row in context.store.models.list()] == ["everybodys"]


@pytest.mark.parametrize("state", ["waiting", "running", "removed"])
def test_of_anothers_private_model_it_is_told_that_the_id_is_taken(
    context: Context, deployer: ScriptedDeployer, state: str
) -> None:
    deployer.running["theirs"] = RUNNING
    with pytest.raises(Conflict) as theirs:
        added_models.add(context, entry("theirs"), deployer)
    samples.add_trained(context.store, "extra", "acme")
    if state == "running":
        deployer.running["extra"] = RUNNING
    elif state == "removed":
        added_models.remove(context.of_tenant("acme"), "extra", deployer)
    before = context.store.models.list()
    for path in ("models/small", "models/none"):
        with pytest.raises(Conflict) as private:
            added_models.add(context, entry(path=path), deployer)
        assert private.value.message == theirs.value.message.replace("theirs", "extra")
        assert (private.value.param, private.value.code) == (theirs.value.param, theirs.value.code)
    assert context.store.models.list() == before


def test_a_private_model_that_comes_while_one_is_added_is_not_told_of_either(
    context: Context, deployer: ScriptedDeployer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(model: LanguageModel) -> None:
        samples.add_trained(context.store, model.id, "acme")

    monkeypatch.setattr(added_models, "_require_model", check)
    with pytest.raises(Conflict, match="there is another application 'extra' already"):
        added_models.add(context, entry(), deployer)


def test_private_models_keep_nobody_from_adding_one(
    context: Context, deployer: ScriptedDeployer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(added_models, "MAX_ADDED", 1)
    samples.add_trained(context.store, "trained", "acme")
    assert added_models.add(context, entry(), deployer).id == "extra"
    with pytest.raises(Conflict, match="1 models are added"):
        added_models.add(context, entry("more"), deployer)


def test_after_a_restart_models_are_started_again_by_themselves(context: Context, deployer: ScriptedDeployer) -> None:
    added_models.add(context, entry(), deployer)
    Reconciler(context.config, context.store, deployer).reconcile()
    after = ScriptedDeployer({"gateway": RUNNING, "small": RUNNING})
    Reconciler(context.config, context.store, after).reconcile()
    assert after.deployed == deployer.deployed


def test_a_model_that_came_into_the_config_is_left_to_it(context: Context, deployer: ScriptedDeployer) -> None:
    added_models.add(context, entry(), deployer)
    both = CONFIG["models"] + [{"id": "extra", "path": "models/other"}]
    config = Config.parse(CONFIG | {"store": context.config.store, "models": both}, "test")
    other = Context.open(config, engine=context.engine)
    try:
        assert other.models.get("extra").base.path == "models/other"
        assert [model.id for model in other.models.all()] == ["small", "extra"]
        Reconciler(config, other.store, deployer).reconcile()
        assert (deployer.deployed, deployer.deleted, other.store.models.list()) == ([], [], [])
    finally:
        other.close()


@pytest.mark.parametrize("error", [BadInput("no such accelerator"), Unavailable("Ray is away")], ids=["bad", "away"])
def test_a_model_that_cannot_be_started_says_why_and_is_tried_again_later(
    context: Context,
    deployer: ScriptedDeployer,
    reconciler: Reconciler,
    monkeypatch: pytest.MonkeyPatch,
    error: StackError,
) -> None:
    added_models.add(context, entry(), deployer)
    deployer.fault = error
    reconciler.reconcile()
    reconciler.reconcile()
    assert len(deployer.deployed) == 1, "not at once"
    found = state_of(context, deployer)
    assert found is not None
    assert (found.state, found.reason) == ("failed", error.message)
    monkeypatch.setattr(added_models, "RETRY_S", 0.0)
    deployer.fault = None
    reconciler.reconcile()
    found = state_of(context, deployer)
    assert found is not None
    assert (found.state, found.reason) == ("starting", None)


def test_an_entry_of_an_older_version_that_is_none_any_more_says_so_and_stops_no_other(
    context: Context, deployer: ScriptedDeployer, reconciler: Reconciler
) -> None:
    context.store.models.add("old", "default", {"id": "old", "path": "a", "gone": 1}, most=10)
    added_models.add(context, entry(), deployer)
    reconciler.reconcile()
    assert [model.id for model, _ in deployer.deployed] == ["extra"]
    assert [model.id for model in context.models.all()] == ["small", "extra"]
    with pytest.raises(NotFound):
        context.models.get("old")
    found = state_of(context, deployer, "old")
    assert found is not None
    assert found.state == "failed"
    assert found.reason is not None
    assert "unknown key 'gone'" in found.reason


def test_without_added_models_ray_serve_is_not_asked(reconciler: Reconciler, deployer: ScriptedDeployer) -> None:
    deployer.is_away = True
    reconciler.reconcile()


def test_models_of_the_config_are_listed_with_their_state(context: Context, deployer: ScriptedDeployer) -> None:
    deployer.running["small"] = Application(ModelState.failed, 0, "out of memory")
    (small,) = added_models.list_models(context, deployer)
    assert (small.source, small.state, small.reason) == ("config", "failed", "out of memory")
    assert small.model["context"] == 256
    del deployer.running["small"]
    (small,) = added_models.list_models(context, deployer)
    assert (small.state, small.reason) == ("failed", "it is not deployed")
