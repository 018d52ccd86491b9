"""Grammars are tried elsewhere first: what is none, or costs too much, is refused in time, and the next is tried."""

import asyncio
import itertools
import json
import string
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from serve_apps import grammar_guard
from serve_apps.grammar_guard import PLACES, GrammarGuard
from stack.errors import BadInput, Unavailable

pytestmark = pytest.mark.asyncio(loop_scope="module")

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
GOOD: list[dict[str, Any]] = [
    {"json": PERSON},
    {"json": {"$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}}}, "$ref": "#/$defs/n"}},
    {"json_object": True},
    {"regex": r"[a-z]+@[a-z]+\.com"},
    {"choice": ["yes", "no", 'both "\\\n', "ä"]},
    {"grammar": 'root ::= "a" root | "b"'},
    {"grammar": 'start: "a" start | "b"  // not ::='},
]
NONE: list[tuple[dict[str, Any], str]] = [
    ({"json": {"type": "colour"}}, 'the JSON schema cannot be used: Unsupported type "colour"'),
    ({"json": {"type": "object", "properties": {"a": False}, "required": ["a"]}}, "cannot accept any value"),
    ({"json": {"$ref": "#"}}, "the JSON schema is fit by no text"),
    ({"regex": "("}, "the regular expression cannot be used: "),
    ({"regex": "(?=a)b"}, "Lookahead is not supported"),
    ({"grammar": "root ::= ("}, "the grammar cannot be used: "),
    ({"grammar": 'rot ::= "a"'}, 'root rule with name "root" is not found'),
    ({"grammar": "root ::= root"}, "the grammar is fit by no text"),
    ({"grammar": 'start: ("a"'}, "the grammar cannot be used: "),
]
# Each would keep an engine busy for minutes, or for longer with each token.
COSTLY: list[dict[str, Any]] = [
    {"json": {"type": "string", "pattern": "^(.{1,100}){1,90}$"}},
    {"regex": "(.{1,110}){1,88}"},
    {"grammar": 'root ::= (("a"{0,1000}){0,1000}){0,1000}'},
    {"grammar": "root ::= s\ns ::= s s s | s s | [a-z ] | [a-z ]{2,5}"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model of which only the tokens are there: bytes, and all words of two and three letters."""
    letters = string.ascii_lowercase
    words = ["".join(word) for length in (2, 3) for word in itertools.product(letters, repeat=length)]
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *words, "<|end|>"]
    merges = [(word[:-1], word[-1]) for word in words]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("model")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    (folder / "config.json").write_text(json.dumps({"vocab_size": len(tokens)}))
    return folder


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def guard(model: Path) -> AsyncIterator[GrammarGuard]:
    guard = GrammarGuard(model)
    await guard.start()
    yield guard
    guard.close()


async def refusal(guard: GrammarGuard, constraint: dict[str, Any]) -> str:
    with pytest.raises(BadInput) as caught:
        await guard.check(constraint)
    assert caught.value.param == "structured_outputs"
    return caught.value.message


def compilers() -> list[psutil.Process]:
    """The processes that this one has started for its guards."""
    return [one for one in psutil.Process().children() if "serve_apps.grammar_compiler" in one.cmdline()]


@pytest.mark.parametrize("constraint", GOOD, ids=str)
async def test_what_an_engine_can_use_passes(guard: GrammarGuard, constraint: dict[str, Any]) -> None:
    await guard.check(constraint)


@pytest.mark.parametrize(("constraint", "words"), NONE, ids=str)
async def test_what_is_no_grammar_is_refused_with_the_reason(
    guard: GrammarGuard, constraint: dict[str, Any], words: str
) -> None:
    message = await refusal(guard, constraint)
    assert words in message
    assert ".cc" not in message
    assert len(message) < 400


@pytest.mark.parametrize("constraint", COSTLY, ids=str)
async def test_what_costs_too_much_is_refused_in_time_and_the_next_one_passes(
    guard: GrammarGuard, constraint: dict[str, Any]
) -> None:
    begin = time.monotonic()
    message = await refusal(guard, constraint)
    assert time.monotonic() - begin < 3
    assert "takes" in message or "needs more than" in message
    await guard.check({"choice": [f"after {constraint}"]})


async def test_the_event_loop_goes_on_meanwhile(guard: GrammarGuard) -> None:
    checking = asyncio.create_task(refusal(guard, {"regex": "(.{1,99}){1,91}"}))
    longest, last = 0.0, time.monotonic()
    while not checking.done():
        await asyncio.sleep(0.01)
        longest, last = max(longest, time.monotonic() - last), time.monotonic()
    assert "takes longer than" in await checking
    assert longest < 0.5


async def test_many_at_once_are_told_apart(guard: GrammarGuard) -> None:
    good = [guard.check({"regex": f"a{number}[a-z]"}) for number in range(16)]
    bad = [refusal(guard, {"regex": f"({number}"}) for number in range(4)]
    answers = await asyncio.gather(*good, *bad)
    assert answers[:16] == [None] * 16
    assert all("cannot be used" in str(answer) for answer in answers[16:])


async def test_costly_ones_at_once_do_not_keep_a_good_one_out(guard: GrammarGuard) -> None:
    bad = [refusal(guard, {"regex": f"{number}(.{{1,99}}){{1,90}}"}) for number in range(3)]
    begin = time.monotonic()
    checking = asyncio.gather(*bad)
    await guard.check({"regex": "good[0-9]"})
    assert not checking.done()
    await checking
    assert time.monotonic() - begin < 3.5


async def test_where_all_places_are_taken_one_is_told_to_try_again(
    guard: GrammarGuard, monkeypatch: pytest.MonkeyPatch
) -> None:
    checking = [asyncio.create_task(refusal(guard, {"regex": f"(.{{1,9{n}}}){{1,95}}"})) for n in range(PLACES)]
    await asyncio.sleep(0)
    monkeypatch.setattr(grammar_guard, "WAIT_S", 0.1)
    with pytest.raises(Unavailable, match="too many grammars are compiled"):
        await guard.check({"regex": "one more"})
    await asyncio.gather(*checking)
    await guard.check({"regex": "one more"})


async def test_whoever_leaves_does_not_take_the_answer_from_another(guard: GrammarGuard) -> None:
    first, second = (asyncio.create_task(guard.check({"regex": "shared[0-9]{1,50}"})) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    await second
    with pytest.raises(asyncio.CancelledError):
        await first


async def test_what_is_known_is_not_tried_again(guard: GrammarGuard) -> None:
    await guard.check({"regex": "known"})
    message = await refusal(guard, {"regex": "known("})
    (compiler,) = compilers()
    compiler.suspend()
    try:
        await guard.check({"regex": "known"})
        assert await refusal(guard, {"regex": "known("}) == message
    finally:
        compiler.resume()


async def test_a_process_that_has_died_is_replaced(model: Path) -> None:
    others = compilers()
    guard = GrammarGuard(model)
    await guard.start()
    (compiler,) = (one for one in compilers() if one not in others)
    compiler.kill()
    await asyncio.to_thread(compiler.wait, 10)
    await guard.check({"regex": "b"})
    (replacement,) = (one for one in compilers() if one not in others)
    guard.close()
    await asyncio.to_thread(replacement.wait, 10)


async def test_the_process_ends_with_its_parent(model: Path) -> None:
    code = f"""
import asyncio, os, pathlib, psutil
from serve_apps.grammar_guard import GrammarGuard

async def main():
    await GrammarGuard(pathlib.Path({str(model)!r})).check({{"regex": "a"}})
    print(psutil.Process().children()[0].pid, flush=True)
    os._exit(1)

asyncio.run(main())
"""
    ended = await asyncio.to_thread(subprocess.run, [sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 1, ended.stderr
    pid = int(ended.stdout)
    if psutil.pid_exists(pid):
        await asyncio.to_thread(psutil.Process(pid).wait, 10)


BODIES: list[tuple[dict[str, Any], str]] = [
    ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "colour"}}}},
        "response_format",
    ),
]


@pytest.mark.parametrize(("body", "param"), BODIES, ids=str)
async def test_the_constraint_of_a_body_is_checked(guard: GrammarGuard, body: dict[str, Any], param: str) -> None:
    with pytest.raises(BadInput, match="cannot be used") as caught:
        await guard.check_body({"messages": []} | body)
    assert caught.value.param == param


@pytest.mark.parametrize(
    "body", [{}, {"response_format": {"type": "text"}}, {"structured_outputs": {"json_object": True}}], ids=str
)
async def test_a_body_that_nothing_constrains_passes(guard: GrammarGuard, body: dict[str, Any]) -> None:
    await guard.check_body(body)
