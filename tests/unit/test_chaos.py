"""What a chaos run makes of the attempts that its clients have made."""

from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread

from tests.chaos.load import Attempt, Balancer
from tests.chaos.run import Result, is_bad, recovery_of, table

FINE = Attempt("chat", "http://gateway", 0, 1, "ok")
STRUCK = 100.0
SLOW = {"chat": 15.0}


def test_what_fails_or_takes_long_is_bad_and_streams_may_take_long() -> None:
    assert not is_bad(FINE, SLOW)
    assert is_bad(replace(FINE, outcome="refused"), SLOW)
    assert is_bad(replace(FINE, end=16), SLOW)
    assert not is_bad(replace(FINE, kind="long stream", end=16), SLOW)


def test_what_has_recovered_is_answered_from_then_on() -> None:
    attempts = [
        replace(FINE, start=99, end=99.5, outcome="broken"),  # before
        replace(FINE, start=101, end=102),
        replace(FINE, start=103, end=110, outcome="refused"),
        replace(FINE, start=104, end=105),  # which the last failure outlasts
        replace(FINE, start=112, end=113),
    ]
    assert recovery_of(attempts, STRUCK, SLOW) == 12
    assert recovery_of(attempts[:2], STRUCK, SLOW) == 0
    assert recovery_of(attempts[:4], STRUCK, SLOW) == 10


def test_the_target_is_missed_by_what_is_lost_late_or_fails_where_nothing_may() -> None:
    fine = Result("gateway", "a gateway is killed", recovery={"chat": 12.0, "insert": 59.0})
    assert fine.met
    assert not replace(fine, recovery={"chat": 61.0}).met
    assert not replace(fine, missing=["the document d1 is there 0 times"]).met
    assert not replace(fine, lost=["chat: 500"]).met
    assert not replace(fine, failed="the worker does not come back").met
    assert replace(fine, broken=3).met
    assert not replace(fine, broken=3, planned=True).met


def test_the_table_has_a_row_for_each() -> None:
    one = Result("gateway", "a gateway is killed", seconds=10, answered=50, recovery={"chat": 1.5}, p50={"chat": 0.2})
    assert table([one]).splitlines()[2].startswith("| a gateway is killed | 50 | 5.0 | 0 | 0 | 0 |")
    assert "1.5 s" in table([one])


def test_a_balancer_looks_after_each_gateway_in_one_phase_after_another() -> None:
    asked: dict[str, Event] = {"once": Event()}

    class Gateway(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked["once"].set()
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Gateway) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        balancer = Balancer([f"http://127.0.0.1:{server.server_port}"])
        try:
            for _ in range(2):
                balancer.is_down(balancer.urls[0])
                assert not balancer.well
                asked["once"] = Event()
                with balancer.looking():
                    assert asked["once"].wait(10)
                assert balancer.well == balancer.urls, "one that answers again is asked again"
        finally:
            server.shutdown()
            thread.join()
