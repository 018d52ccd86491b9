"""The rows of spans. What is told of one first stands, and its start and its end may come in any order."""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Engine, case, insert, select, update
from sqlalchemy.exc import IntegrityError

from stack.store.schema import spans

# A span whose end alone has been told has no name, and the time of its end for that of its start.
UNNAMED = ""


@dataclass(frozen=True)
class Span:
    """A row of `spans`."""

    trace_id: str
    span_id: str
    parent_span_id: str | None
    name: str
    attributes: dict[str, Any]
    status: str | None
    started_at: str
    ended_at: str | None


class Traces:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def start_span(
        self,
        tenant: str,
        trace_id: str,
        span_id: str,
        name: str,
        started_at: str,
        parent_span_id: str | None,
        attributes: dict[str, Any],
    ) -> Span | None:
        """Writes that a span has started; if that has been told before, changes nothing and returns what is known."""
        start: dict[str, Any] = dict(name=name, started_at=started_at, parent_span_id=parent_span_id)
        row = dict(tenant=tenant, trace_id=trace_id, span_id=span_id, attributes=attributes, **start)
        known = self._add(row)
        if known is None:
            return None
        start["attributes"] = attributes | known.attributes  # those of the end are newer
        return self._change(tenant, known, spans.c.name == UNNAMED, start)

    def end_span(
        self, tenant: str, trace_id: str, span_id: str, ended_at: str, status: str, attributes: dict[str, Any]
    ) -> Span | None:
        """Writes that a span has ended; if that has been told before, changes nothing and returns what is known."""
        end: dict[str, Any] = dict(ended_at=ended_at, status=status)
        row = dict(tenant=tenant, trace_id=trace_id, span_id=span_id, attributes=attributes, **end)
        known = self._add(row | dict(name=UNNAMED, started_at=ended_at))
        if known is None:
            return None
        end["attributes"] = known.attributes | attributes
        return self._change(tenant, known, spans.c.ended_at.is_(None), end)

    def span(self, tenant: str, trace_id: str, span_id: str) -> Span | None:
        return self._first(_spans(tenant, trace_id).where(spans.c.span_id == span_id))

    def spans(self, tenant: str, trace_id: str, limit: int) -> list[Span]:
        """The spans of a trace, in the order of their starts."""
        query = _spans(tenant, trace_id).order_by(spans.c.started_at, spans.c.span_id).limit(limit)
        with self._engine.connect() as connection:
            return [Span(**row) for row in connection.execute(query).mappings()]

    def root(self, tenant: str, trace_id: str) -> Span | None:
        """The first span without a parent, or the first one where all have a parent."""
        rank = case((spans.c.name == UNNAMED, 2), (spans.c.parent_span_id.is_not(None), 1), else_=0)
        return self._first(_spans(tenant, trace_id).order_by(rank, spans.c.started_at, spans.c.span_id))

    def _add(self, row: dict[str, Any]) -> Span | None:
        """Adds a span, or returns the one that is there."""
        try:
            with self._engine.begin() as connection:
                connection.execute(insert(spans).values(**row))
        except IntegrityError:
            known = self.span(row["tenant"], row["trace_id"], row["span_id"])
            if known is None:
                raise  # it was not the id
            return known
        return None

    def _change(self, tenant: str, known: Span, if_still: Any, values: dict[str, Any]) -> Span | None:
        """Completes a span that was added by its other end, or returns it if another was faster.

        The attributes that `values` has from `known` are the last ones if it is still so: each end is written once.
        """
        of_span = (spans.c.trace_id == known.trace_id) & (spans.c.span_id == known.span_id)
        query = update(spans).where(spans.c.tenant == tenant, of_span, if_still).values(**values)
        with self._engine.begin() as connection:
            if connection.execute(query).rowcount == 1:
                return None
        return self.span(tenant, known.trace_id, known.span_id)

    def _first(self, query: Any) -> Span | None:
        with self._engine.connect() as connection:
            found = connection.execute(query.limit(1)).mappings().first()
        return Span(**found) if found else None


def _spans(tenant: str, trace_id: str) -> Any:
    columns = [column for column in spans.c if column is not spans.c.tenant]
    return select(*columns).where(spans.c.tenant == tenant, spans.c.trace_id == trace_id)
