"""Ray's clusters that work by one database: for a while there may be two, where one is to follow the other.

Each says again and again that it lives. What one has begun is left to it for as long; what one has left that is not
heard of any more, the others go on with. The name of an owner ends with its cluster: `session:1@CLUSTER`.
"""

from sqlalchemy import Connection, Engine, delete, insert, select, update

from stack.store.connection import now, past, writing
from stack.store.schema import clusters

# How long a cluster counts as one that lives since it has said so. It says so several times within that.
HEARD_S = 20.0
# After how long one that has fallen silent is forgotten.
KEPT_S = 24 * 3600.0


class Clusters:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def tell(self, id: str) -> None:
        """Says that a cluster lives."""
        with writing(self._engine) as connection:
            told = update(clusters).where(clusters.c.id == id).values(told_at=now())
            if connection.execute(told).rowcount == 0:
                connection.execute(delete(clusters).where(clusters.c.told_at < past(KEPT_S)))
                connection.execute(insert(clusters).values(id=id, told_at=now()))

    def others(self, cluster: str | None) -> set[str]:
        """The clusters that live, beside this one."""
        with self._engine.connect() as connection:
            return others(connection, cluster)


def others(connection: Connection, cluster: str | None) -> set[str]:
    found = connection.execute(select(clusters.c.id).where(clusters.c.told_at >= past(HEARD_S))).scalars()
    return {one for one in found if one != cluster}


def cluster_of(owner: str | None) -> str | None:
    """In which cluster an owner is; None for one that is in none, or whose cluster is not known."""
    return owner.rpartition("@")[2] if owner is not None and "@" in owner else None
