"""How much a tenant may keep: artifacts and uploads together, and no more than the disk has left."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from sqlalchemy import insert

from stack import quotas
from stack.context import Context
from stack.errors import StorageFull
from stack.store import Artifact, now
from stack.store.schema import uploads
from tests import samples


@pytest.fixture
def small(context: Context) -> Context:
    """A context in which a tenant may keep 10,000 bytes."""
    return replace(context, config=context.config.model_copy(update={"max_tenant_bytes": 10_000}))


def keep(context: Context, artifacts: int, uploaded: int) -> None:
    """Rows of an artifact and of an upload of so many bytes."""
    tenant = context.tenant
    job = samples.add_job(context.store, "job-1", tenant=tenant)
    experiment = context.store.telemetry.run_experiment(tenant, job.run_id)
    made = Artifact("a" * 32, tenant, experiment, job.run_id, "a", "model", "a", artifacts, {}, created_at=now())
    context.store.artifacts.add(made)
    row = dict(id="b" * 32, tenant=tenant, name="b", bytes=uploaded, sha256="", created_at=now())
    with context.store.engine.begin() as connection:
        connection.execute(insert(uploads).values(**row))


def test_a_tenant_without_anything_has_all_of_its_quota(small: Context) -> None:
    quotas.require_room(small, 10_000)
    with pytest.raises(StorageFull, match="'default' keeps 0 bytes already, and 10001 more are needed; allowed: 10000"):
        quotas.require_room(small, 10_001)


def test_artifacts_and_uploads_count_together(small: Context) -> None:
    keep(small, 3_000, 4_000)
    quotas.require_room(small, 3_000)
    with pytest.raises(StorageFull, match="keeps 7000 bytes already"):
        quotas.require_room(small, 3_001)


def test_what_others_keep_does_not_count(small: Context) -> None:
    keep(small, 3_000, 4_000)
    quotas.require_room(small.of_tenant("acme"), 10_000)


def test_more_than_the_disk_has_left_is_refused(context: Context) -> None:
    context = replace(context, config=context.config.model_copy(update={"max_tenant_bytes": 2**62}))
    with pytest.raises(StorageFull, match="the artifacts' disk has"):
        quotas.require_room(context, 2**61)


def test_a_job_needs_room_for_what_it_writes_meanwhile_beside_what_it_keeps(
    context: Context, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here both are on one disk."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000))
    work = home / "work" / "default" / "job-1"
    quotas.require_room_for_job(context, kept=300, temporary=700, work=work)
    with pytest.raises(StorageFull, match="the disk on which jobs work has 1000 bytes left, and 1001 are needed"):
        quotas.require_room_for_job(context, kept=300, temporary=701, work=work)
    (work / "train").mkdir(parents=True)
    (work / "train" / "checkpoint").write_bytes(b"x" * 500)
    quotas.require_room_for_job(context, kept=300, temporary=1_200, work=work)
    with pytest.raises(StorageFull, match="1001 are needed"):
        quotas.require_room_for_job(context, kept=300, temporary=1_201, work=work)
