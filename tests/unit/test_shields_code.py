"""The code scanner: which code it finds in messages, what it says of it, and what it does where it cannot read it."""

import asyncio
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

from stack import openai_chats
from stack.config import Config
from stack.context import Context
from stack.errors import EngineFailed, ShieldViolation
from stack.shield_config import CodeScannerShield
from stack.shields import code_scanner
from stack.shields.code_scan import BEGUN, MAX_MEMORY, blocks, scan
from stack.shields.verdict import UNJUDGED, Said, Verdict
from tests.conftest import CONFIG
from tests.scripted_engine import ScriptedEngine

SHIELD = CodeScannerShield(id="code", type="code_scanner_guard")
EVIL = "import os\nos.system('rm -r ' + folder)"
INDENTED = "\n".join("    " + line for line in EVIL.splitlines())
NOWHERE: Any = None  # it needs no context


async def judged(text: str, shield: CodeScannerShield = SHIELD) -> Verdict:
    return await code_scanner.judge(NOWHERE, shield, [Said("user", text)])


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (f"Run this:\n\n```python\n{EVIL}\n```\nand tell me.", 5),
        (f"~~~py\n{EVIL}\n~~~", 3),
        (f"```\n{EVIL}\n```", 3),
        (f"> ```python\n{EVIL}\n```", 3),
        (f"```python\n{EVIL}", 3),
        (f"```python\n{EVIL}\ndef unfinished(", 3),
        (f"````\n```\n{EVIL}\n````", 4),
        (EVIL, 2),
        (f"Words first, as ever.\n\n{INDENTED}\n\nThen more words.", 4),
        (f"Please run this for me:\n{EVIL}\nThank you so much", 3),
        (f"1. A step\n\n{EVIL}\n\n2. Another step, please", 4),
        ("```python\n>>> import os\n>>> os.system('rm -r ' + folder)\n0\n```", 3),
        (f"```python\n%matplotlib inline\n{EVIL}\n```", 4),
        ("```python\nimport os\nos.system('rm -r ' + folder)  # nosec\n```", 3),
        (f"```\n{EVIL}\nThat is all!\n```", 3),
        (f"```sh\nfirst, this:\n\n{EVIL}\n```", 5),
    ],
)
def test_python_is_found_wherever_it_stands(text: str, line: int) -> None:
    found = [(one["rule"], one["line"], one["severity"]) for one in scan([text])["findings"]]
    assert ("B605 start_process_with_a_shell", line, "high") in found
    assert len(found) == len(set(found))


@pytest.mark.parametrize(
    "text",
    [
        "What is the capital of France?",
        "It is big (very big), I think; and old.\n\nSo is Rome.",
        "```python\nprint('hello')\n```",
        "```sql\nSELECT * FROM cities WHERE name = 'Paris'\n```",
        "```\n$ ls -la\ntotal 0\n```",
        "",
    ],
)
async def test_words_and_harmless_code_pass(text: str) -> None:
    assert not (await judged(text)).is_violation


async def test_a_finding_says_rule_line_and_why() -> None:
    verdict = await judged(f"```python\n{EVIL}\n```")
    assert (verdict.is_violation, verdict.type) == (True, "B605 start_process_with_a_shell")
    assert verdict.message is not None
    assert "B605 start_process_with_a_shell, line 3: Starting a process with a shell" in verdict.message


@pytest.mark.parametrize(("severity", "is_violation"), [("low", True), ("medium", False), ("high", False)])
async def test_what_is_below_the_severity_passes(severity: str, is_violation: bool) -> None:
    shield = CodeScannerShield.model_validate({"id": "code", "type": "code_scanner_guard", "severity": severity})
    assert (await judged("```python\nimport subprocess\n```", shield)).is_violation == is_violation


@pytest.mark.parametrize("language", ["bash", "javascript", "yaml", ""])
async def test_keys_are_found_in_code_of_any_language(language: str) -> None:
    key = "AKIA" + "IOSFODNN7EXAMPLA"
    verdict = await judged(f"Set it:\n```{language}\nkey: {key}\n```")
    assert (verdict.is_violation, verdict.type) == (True, "secret AWS Access Key")
    assert verdict.message is not None
    assert "line 3" in verdict.message
    assert key not in verdict.message


@pytest.mark.parametrize("code", ["def f(:", "print 'hello'", "x = " + "(" * 5_000, "x = 1\0"])
async def test_python_that_cannot_be_read_does_not_pass(code: str) -> None:
    verdict = await judged(f"```python\n{code}\n```")
    assert (verdict.is_violation, verdict.type) == (True, UNJUDGED)


BROKEN = "(\nimport os\nos.system('rm -r ' + folder)"


@pytest.mark.parametrize("code", [BROKEN, BROKEN + "\n(" * 30, "x = [\n1,\n2", "try:\n    a()"])
async def test_python_that_breaks_off_at_the_end_of_a_whole_text_does_not_pass(code: str) -> None:
    assert (await judged(f"```python\n{code}")).is_violation


@pytest.mark.parametrize("code", [BROKEN + "\nx", BROKEN + "\n(" * 30, "def f(:\n    pass\n", "print 'a'\nprint"])
async def test_python_that_no_end_could_mend_does_not_pass_while_it_is_streamed(code: str) -> None:
    said = Said("assistant", f"```python\n{code}", is_unfinished=True)
    assert (await code_scanner.judge(NOWHERE, SHIELD, [said])).is_violation


@pytest.mark.parametrize(
    "end",
    [
        "x = [\n" + "    1,\n" * 100 + "    2",
        'page = """\n' + "<p>it is\n" * 100 + "<p",
        "try:\n" + "    print()\n" * 100 + "    pri",
        "@cached\n@timed\ndef f(a,\n      b",
        "try:\n    print()\nexcept (ValueError,\n        Key",
        "if x:\n    print()\nelse:",
        "class A:\n    def f(self):\n        return f(1,\n            2",
        "x = 'a wor",
        'def f():\n    """It\nis',
        '"""It\nis',
    ],
)
def test_of_python_that_is_streamed_the_beginning_is_scanned(end: str) -> None:
    harmless = scan([f"```python\nprint()\n{end}"], unfinished=[0])
    assert harmless == {"findings": [], "unread": []}
    found = scan([f"```python\n{EVIL}\n{end}"], unfinished=[0])
    assert [(one["rule"], one["line"]) for one in found["findings"]] == [("B605 start_process_with_a_shell", 3)]
    assert found["unread"] == []
    assert scan([f"```python\n{end}"])["unread"] != []


async def test_a_streamed_answer_s_code_may_break_off_in_a_window_and_not_at_its_end(
    home: Path, store_url: str, engine: ScriptedEngine
) -> None:
    shields = [{"id": "code", "type": "code_scanner_guard"}]
    config = {"store": store_url, "shields": shields, "model_shields": {"small": {"output": ["code"], "window": 20}}}
    asked = {"model": "small", "stream": True, "messages": [{"role": "user", "content": "Write code."}]}
    with closing(Context.open(Config.parse(CONFIG | config, "the tests' config"), engine=engine)) as context:
        engine.tokens = ("```python\n", "x = [\n  1,\n  2,\n", "  3]\n```\n")
        assert b"[DONE]" in b"".join([item async for item in await openai_chats.stream(context, asked)])
        engine.tokens = ("```python\n", "x = [\n  1,\n  2,\n", "  3\n")
        with pytest.raises(ShieldViolation, match="it does not parse"):
            [item async for item in await openai_chats.stream(context, asked)]


async def test_a_scan_that_takes_too_long_is_ended_and_does_not_pass() -> None:
    shield = SHIELD.model_copy(update={"timeout_s": 0.1})
    started = time.monotonic()
    verdict = await judged("x = 1\n" * 200_000, shield)
    assert (verdict.is_violation, verdict.type) == (True, UNJUDGED)
    assert time.monotonic() - started < 10


async def test_all_messages_are_scanned_but_those_that_have_passed() -> None:
    evil = f"```python\n{EVIL}\n```"
    said = [Said("user", evil), Said("assistant", "Done.")]
    assert (await code_scanner.judge(NOWHERE, SHIELD, said)).is_violation
    passed = [Said("user", evil, passed=len(evil)), Said("assistant", "Done.")]
    assert not (await code_scanner.judge(NOWHERE, SHIELD, passed)).is_violation


@pytest.mark.parametrize("mask", ["\u200b", "\ufeff", "\u00ad"])
@pytest.mark.parametrize("text", [EVIL, f"```\n{EVIL}\n```", f"Do this:\n\n{INDENTED}", "os.system(folder)"])
async def test_code_is_read_without_its_masks(text: str, mask: str) -> None:
    verdict = await judged(text.replace("system(", f"sys{mask}tem(") + mask)
    assert (verdict.is_violation, verdict.type) == (True, "B605 start_process_with_a_shell")


async def test_a_mask_that_would_break_the_code_does_not_hide_it() -> None:
    assert (await judged("import os\nos.system(folder)  # \uff02\nx = '\uff07'")).is_violation


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"code": EVIL}),
        json.dumps([EVIL]),
        json.dumps({"code": "os.system(folder)"}),
        '<tool_call>{"name": "python", "parameters": ' + json.dumps({"code": EVIL}) + "}</tool_call>",
        '<tool_call>{"name": "python", "arguments": ' + json.dumps(json.dumps({"code": EVIL})) + "}</tool_call>",
        '5" of it: ' + json.dumps({"code": EVIL}),
        json.dumps({"code": EVIL})[:-2],
        json.dumps({"code": "os.sys\u200btem(folder)"}),
        f"[python(code={json.dumps(EVIL)})]",
        "<|python_tag|>os.system(folder)",
        "At once. <|python_tag|>os.system(folder)",
    ],
)
async def test_code_that_a_tool_is_called_with_is_found(text: str) -> None:
    verdict = await judged(text)
    assert (verdict.is_violation, verdict.type) == (True, "B605 start_process_with_a_shell")


def test_words_within_quotes_are_no_code_and_broken_escapes_end_a_text() -> None:
    assert code_scanner.readings('He said: "os.system(x)", and "C:\\data", and left.') == [
        'He said: "os.system(x)", and "C:\\data", and left.'
    ]
    assert "os\n" in code_scanner.readings('{"code": "os\\n\\u00')


def test_a_megabyte_of_quotes_is_read() -> None:
    assert len(code_scanner.readings('"\\n":"' * 150_000)) < 10


@pytest.mark.parametrize("text", ["```a\n" * 600, "````md\n~~~~md\n```md\n~~~md\n```py\nprint()\n```"])
async def test_fences_that_are_nested_too_deeply_do_not_pass(text: str) -> None:
    verdict = await judged(text)
    assert (verdict.is_violation, verdict.type) == (True, UNJUDGED)
    assert verdict.message is not None
    assert "fences are nested too deeply" in verdict.message


@pytest.mark.parametrize("code", ["x = " + "-" * 2_000 + "1", "x = " + "a." * 3_000 + "b", "x" + "()" * 500])
async def test_code_that_is_nested_too_deeply_is_no_failure(code: str) -> None:
    """It is read, or it does not pass."""
    verdict = await judged(f"```python\n{code}\n```")
    assert verdict.type in (None, UNJUDGED)


@pytest.mark.parametrize(("indent", "is_found"), [("    ", True), ("\t", True), ("", False)])
async def test_keys_are_found_in_what_is_indented_whatever_its_language(indent: str, is_found: bool) -> None:
    key = "AKIA" + "IOSFODNN7EXAMPLA"
    verdict = await judged(f"Set it:\n\n{indent}export KEY={key};\n\nThat is it.")
    assert verdict.is_violation == is_found
    assert not is_found or "line 3" in str(verdict.message)


async def test_a_scan_that_finds_no_free_thread_in_time_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    free = threading.Event()
    with ThreadPoolExecutor(1) as busy:
        monkeypatch.setattr(code_scanner, "_SCANS", busy)
        busy.submit(free.wait)
        try:
            verdict = await asyncio.wait_for(judged("x = 1", SHIELD.model_copy(update={"timeout_s": 0.1})), 30)
        finally:
            free.set()
    assert (verdict.is_violation, verdict.type) == (True, UNJUDGED)


SCANNER = code_scanner._SCANNER


async def process() -> int:
    """The id of the process that scans, which runs."""
    assert (await judged(EVIL)).is_violation
    assert SCANNER._running is not None
    return SCANNER._running[0].pid


@contextmanager
def begun(given: int, seconds: float = 20) -> Iterator[socket.socket]:
    """A scan of what is read from a file, which has begun. Gives its answer."""
    answer, theirs = socket.socketpair()
    with answer:
        with theirs:
            SCANNER._request(seconds, [given, theirs.fileno()])
        answer.settimeout(30)
        assert answer.recv(1) == BEGUN.encode()
        yield answer


@contextmanager
def waiting() -> Iterator[tuple[socket.socket, FileIO]]:
    """A scan that has begun, and waits for what it is to scan. Gives its answer, and where to write."""
    given, writing = (FileIO(end, mode) for end, mode in zip(os.pipe(), "rw", strict=True))
    with writing, given, begun(given.fileno()) as answer:
        given.close()
        yield answer, writing


def finish(answer: socket.socket, writing: FileIO) -> bytes:
    with writing:
        writing.write(json.dumps({"texts": [EVIL], "unfinished": []}).encode())
    return read(answer)


def read(answer: socket.socket) -> bytes:
    with answer.makefile("rb") as lines:
        return lines.read()


async def test_all_scans_are_by_one_process_which_has_one_thread_and_no_file_of_this_one() -> None:
    scanner = await process()
    assert await process() == scanner
    assert len(list(Path(f"/proc/{scanner}/task").iterdir())) == 1
    assert {int(one.name) for one in Path(f"/proc/{scanner}/fd").iterdir()} == {0, 1, 2}


async def test_after_a_scan_that_took_too_long_the_same_process_scans_on() -> None:
    scanner = await process()
    verdict = await judged("x = 1\n" * 200_000, SHIELD.model_copy(update={"timeout_s": 0.1}))
    assert (verdict.is_violation, verdict.type) == (True, UNJUDGED)
    assert await process() == scanner


async def test_the_time_of_a_scan_ends_it_whatever_it_does() -> None:
    await process()
    given, writing = (FileIO(end, mode) for end, mode in zip(os.pipe(), "rw", strict=True))
    with writing, given, begun(given.fileno(), 0.1) as answer:
        assert read(answer) == b""


async def test_a_scan_s_memory_is_bounded_and_the_next_one_has_all_of_it() -> None:
    scanner = await process()
    with FileIO(os.memfd_create("large"), "r+") as given:
        given.truncate(2 * MAX_MEMORY)
        with begun(given.fileno()) as answer:
            assert read(answer).strip().endswith(b"MemoryError")
    assert await process() == scanner


async def test_a_scan_starts_no_process_and_its_bounds_are_its_own() -> None:
    scanner = await process()
    with waiting() as (answer, writing):
        (scan,) = Path(f"/proc/{scanner}/task/{scanner}/children").read_text().split()
        limits, own = (Path(f"/proc/{one}/limits").read_text() for one in (scan, scanner))
        assert re.search(r"^Max processes +0 +0 ", limits, re.MULTILINE)
        assert re.search(rf"^Max address space +{MAX_MEMORY} +{MAX_MEMORY} ", limits, re.MULTILINE)
        assert re.search(r"^Max cpu time +20 +21 ", limits, re.MULTILINE)
        assert re.search(r"^Max address space +unlimited ", own, re.MULTILINE)
        assert b"B605" in finish(answer, writing)


async def test_four_scans_run_at_once() -> None:
    await process()
    with ExitStack() as stack:
        for answer, writing in [stack.enter_context(waiting()) for _ in range(4)]:
            assert b"B605" in finish(answer, writing)


@pytest.mark.parametrize("has_ended", [True, False])
async def test_a_scanner_that_is_killed_between_scans_is_replaced(has_ended: bool) -> None:
    scanner = await process()
    end = os.pidfd_open(scanner)
    os.kill(scanner, signal.SIGKILL)
    assert not has_ended or select.select([end], [], [], 30)[0]
    os.close(end)
    assert await process() != scanner


async def test_a_scan_goes_on_where_its_scanner_is_killed() -> None:
    scanner = await process()
    with waiting() as (answer, writing):
        os.kill(scanner, signal.SIGKILL)
        assert b"B605" in finish(answer, writing)
    assert await process() != scanner


@pytest.mark.parametrize("kills", [1, 2])
async def test_a_scan_that_has_not_begun_when_its_scanner_is_killed_is_asked_for_once_more(
    kills: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    scanner, request, killed = await process(), SCANNER._request, list[int]()
    os.kill(scanner, signal.SIGSTOP)  # it does not begin

    def kill_it(seconds: float, files: list[int]) -> subprocess.Popen[bytes]:
        asked = request(seconds, files)
        if len(killed) < kills:
            killed.append(asked.pid)
            os.kill(asked.pid, signal.SIGKILL)
        return asked

    monkeypatch.setattr(SCANNER, "_request", kill_it)
    if kills == 1:
        assert (await judged(EVIL)).type == "B605 start_process_with_a_shell"
    else:
        with pytest.raises(EngineFailed, match="the code scanner ends before it scans"):
            await judged(EVIL)
    assert killed[0] == scanner


async def test_a_process_that_loses_a_request_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    scanner, request, lost = await process(), SCANNER._request, list[int]()

    def lose_one(seconds: float, files: list[int]) -> subprocess.Popen[bytes]:
        assert SCANNER._running is not None
        if lost:
            return request(seconds, files)
        lost.append(SCANNER._running[0].pid)
        return SCANNER._running[0]

    monkeypatch.setattr(SCANNER, "_request", lose_one)
    assert await process() != scanner
    assert lost == [scanner]


async def test_a_scan_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = SCANNER.ask
    monkeypatch.setattr(SCANNER, "ask", lambda _, seconds: ask(b"{", seconds))
    with pytest.raises(EngineFailed, match=r"the code scanner failed: json\.decoder\.JSONDecodeError: "):
        await judged(EVIL)


def test_the_scanner_ends_when_its_gateway_is_killed() -> None:
    program = f"""
import sys
from stack.shields import code_scanner
assert code_scanner._SCANNER.ask({json.dumps({"texts": [EVIL], "unfinished": []}).encode()!r}, 20)
print(code_scanner._SCANNER._running[0].pid, flush=True)
sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as gateway:
        assert gateway.stdout is not None
        end = os.pidfd_open(int(gateway.stdout.readline()))
        gateway.kill()
        assert select.select([end], [], [], 30)[0]
        os.close(end)


def test_the_version_names_both_packages_with_rules() -> None:
    assert re.fullmatch(r"bandit-[\d.]+\+detect-secrets-[\d.]+", code_scanner.VERSION)


def test_blocks_know_their_language_and_whether_they_end() -> None:
    found = list(blocks("a\n```Python title=x\nb\n```\nc\n~~~\nd"))
    assert [(one.code, one.line, one.is_said_python, one.is_open) for one in found] == [
        ("b", 3, True, False),
        ("d", 7, False, True),
    ]


def test_a_broken_fence_is_no_way_past_it() -> None:
    findings = scan([f"```python\n```\n{EVIL}\n```\nwords, and more"])["findings"]
    assert findings
