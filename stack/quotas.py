"""How much a tenant may keep, and whether there is room for more."""

from stack.context import Context
from stack.errors import StorageFull


def require_room(context: Context, size: int) -> None:
    """Raises StorageFull unless the tenant may keep so many bytes more, and the disk of the artifacts has them left.

    What counts has a row: it is finished. Two who ask at the same moment do not see each other, so a tenant can come to
    keep more than its quota by what was under way.
    """
    most = context.config.max_tenant_bytes
    kept = context.store.artifacts.bytes_of(context.tenant) + context.store.datasets.uploaded_bytes(context.tenant)
    if kept + size > most:
        raise StorageFull(
            f"the tenant {context.tenant!r} keeps {kept} bytes already, and {size} more are needed; allowed: {most}"
        )
    context.artifacts.require_room(size)
