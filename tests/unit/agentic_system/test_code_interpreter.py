import asyncio
import base64
import subprocess
import sys
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from stack.addresses import decoded
from stack.agentic_system import sandbox_slots
from stack.agentic_system.sandbox import Limits
from stack.agentic_system.sandbox_slots import NoneFree
from stack.agentic_system.toolbox import open_tools, require_openable
from stack.agentic_system.tools import code_interpreter
from stack.agentic_system.tools.code_interpreter import MAX_FILE_BYTES, CodeInterpreter
from stack.agentic_system.tools.tool import MAX_CHARACTERS, Call, File, Output, ToolFailed
from stack.agents_config import AgentsConfig
from stack.api.agent_tools import CodeInterpreterToolDefinition
from stack.errors import BadInput
from tests.sandboxes import all_end, inhabitants

GONE = "What earlier calls defined, and their files, are gone."
INLINE = CodeInterpreterToolDefinition(type="code_interpreter", enable_inline_code_execution=True)


@asynccontextmanager
async def interpreter(*files: File, seconds: float = 30, is_resumed: bool = False) -> AsyncGenerator[CodeInterpreter]:
    tool = CodeInterpreter(files, seconds=seconds, is_resumed=is_resumed)
    try:
        yield tool
    finally:
        await tool.close()


async def call(tool: CodeInterpreter, code: str, told: list[str] | None = None) -> Output:
    return await run(tool, Call("1", {"code": code}, {}, (told if told is not None else []).append))


async def run(tool: CodeInterpreter, one: Call) -> Output:
    """As the loop does."""
    async with tool.turn:
        return await tool.run(one)


async def test_code_runs_and_its_state_is_kept() -> None:
    told: list[str] = []
    async with interpreter() as tool:
        assert await call(tool, "x = 6") == Output("It printed nothing.")
        assert await call(tool, "print(x * 7)", told) == Output("42")
        assert told == ["42\n"]
        failed = await call(tool, "y")
        assert failed.content.endswith("NameError: name 'y' is not defined")


async def test_it_costs_nothing_until_it_is_called() -> None:
    async with interpreter() as tool:
        assert inhabitants() == []
        assert tool.definition().name == tool.name == "code_interpreter"


async def test_files_of_the_user_are_there() -> None:
    async with interpreter(File("sales.csv", b"n\n1\n2\n"), File("a b.txt", "ä".encode())) as tool:
        assert (await call(tool, "open('sales.csv').read(), open('a b.txt').read()")).content == r"('n\n1\n2\n', 'ä')"
        changed = await call(tool, "print('3', file=open('sales.csv', 'a'))")
        assert changed.content == "It printed nothing.\nFile: sales.csv (text/csv, 8 bytes)"
        assert (await call(tool, "import os; os.remove('a b.txt'); sorted(os.listdir('.'))")).content == "['sales.csv']"


async def test_files_and_plots_come_back_as_attachments() -> None:
    code = "import os\nopen('t.txt', 'w').write('text')\nos.mkdir('out')\nopen('out/ä, b', 'wb').write(b'\\xff'); None"
    async with interpreter() as tool:
        output = await call(tool, code)
        assert [(one.mime_type, decoded(str(one.content), 1_000)) for one in output.attachments] == [
            ("application/octet-stream", ("application/octet-stream;name=out%2F%C3%A4%2C%20b", b"\xff")),
            ("text/plain", ("text/plain;name=t.txt", b"text")),
        ]
        plotted = await call(tool, "import matplotlib.pyplot as plt; plt.plot([3, 1]); plt.title('t'); plt.show()")
        assert plotted.content.startswith("It printed nothing.\nFile: figure_1.png (image/png, ")
        (plot,) = plotted.attachments
        assert plot.mime_type == "image/png"
        assert base64.b64decode(str(plot.content).partition(",")[2]).startswith(b"\x89PNG")
        assert (await call(tool, "1")).attachments == ()


async def test_what_is_not_given_on_is_told() -> None:
    async with interpreter() as tool:
        output = await call(
            tool, f"open('big', 'wb').write(b'x' * {MAX_FILE_BYTES + 1})\nos = __import__('os')\nos.symlink('/', 'l')"
        )
        assert output.attachments == ()
        assert (
            "The file 'big' is not given on: it has 4194305 bytes, of which there is room for 4194304."
            in output.content
        )
        assert "The file 'l' is not given on: it cannot be read: Too many levels of symbolic links." in output.content


async def test_an_output_has_bounds() -> None:
    code = "for n in range(100): open(f'a_file_with_a_long_name_{n}', 'w').close()\nprint('ä' * 1_000_000)"
    async with interpreter() as tool:
        output = await call(tool, code)
        assert len(output.content) <= MAX_CHARACTERS
        assert len(output.attachments) == code_interpreter.MAX_FILES


async def test_a_sandbox_that_ends_is_told_and_the_next_call_has_a_new_one() -> None:
    async with interpreter(File("f", b"1"), seconds=0.5) as tool:
        ended = await call(
            tool, "x = 1\nopen('half', 'w').write('done')\nprint('so far', flush=True)\nwhile True: pass"
        )
        assert ended.content == (
            f"so far\nThe interpreter was ended, as the cell ran for more than 0.5 s. {GONE}\n"
            "File: half (application/octet-stream, 4 bytes)"
        )
        assert len(ended.attachments) == 1
        assert inhabitants() == []
        again = await call(tool, "import os; 'x' in dir(), os.listdir('.')")
        assert again.content == f"(False, ['f'])\nThe interpreter was started anew. {GONE}"
        assert (await call(tool, "1")).content == "1"


async def test_a_turn_that_goes_on_elsewhere_is_told_what_it_has_lost() -> None:
    async with interpreter(is_resumed=True) as tool:
        assert (await call(tool, "1")).content == f"1\nThe interpreter was started anew. {GONE}"
        assert (await call(tool, "1")).content == "1"


async def test_calls_side_by_side_run_one_after_another() -> None:
    async with interpreter() as tool:
        outputs = await asyncio.gather(*(call(tool, f"x = {n}; import time; time.sleep(0.01); x") for n in range(5)))
        assert [one.content for one in outputs] == list("01234")


async def test_a_call_that_is_cancelled_ends_the_sandbox() -> None:
    async with interpreter() as tool:
        begun = asyncio.Event()
        code = "print(1)\nwhile True: pass"
        running = asyncio.create_task(run(tool, Call("1", {"code": code}, {}, lambda _: begun.set())))
        await begun.wait()
        running.cancel()
        with all_end(), pytest.raises(asyncio.CancelledError):
            await running
        assert (await call(tool, "2")).content == f"2\nThe interpreter was started anew. {GONE}"


async def test_closing_ends_a_cell_that_runs() -> None:
    async with interpreter() as tool:
        begun = asyncio.Event()
        code = "print(1)\nwhile True: pass"
        running = asyncio.create_task(run(tool, Call("1", {"code": code}, {}, lambda _: begun.set())))
        await begun.wait()
        with all_end():
            await tool.close()
        assert "The interpreter was ended" in (await running).content


async def test_files_that_do_not_fit_are_told() -> None:
    tool = CodeInterpreter([File("big", b"x" * 200_000)], limits=Limits(folder=100_000))
    with pytest.raises(ToolFailed, match="there is no room for the file 'big': No space left on device"):
        await call(tool, "1")
    await tool.close()
    assert inhabitants() == []


async def test_without_bubblewrap_nothing_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    async with interpreter() as tool:
        with pytest.raises(ToolFailed, match=r"^the code interpreter cannot start now: bubblewrap is not installed"):
            await call(tool, f"open({str(tmp_path / 'f')!r}, 'w')")
    assert list(tmp_path.iterdir()) == []


async def test_the_reason_names_no_path_of_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bwrap = tmp_path / "bwrap"
    bwrap.write_text(f'#!/bin/sh\necho "bwrap: Can\'t bind {tmp_path}/a: No such file or directory" >&2\nexit 1\n')
    bwrap.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    async with interpreter() as tool:
        with pytest.raises(ToolFailed, match=r"now: bwrap: Can't bind …: No such file or directory$"):
            await call(tool, "1")


async def test_no_more_run_at_once_than_may(monkeypatch: pytest.MonkeyPatch) -> None:
    # Other numbers than anybody else's on this machine.
    monkeypatch.setattr(sandbox_slots, "PREFIX", f"test-{uuid.uuid4().hex}")
    first, second = (CodeInterpreter(seconds=20, at_once=1) for _ in range(2))
    try:
        assert (await call(first, "1")).content == "1"
        hasty = CodeInterpreter(seconds=0.2, at_once=1)
        with pytest.raises(
            ToolFailed, match=r"the code was not run, and can be later: as many .* may \(1\), .* within 0\.1 s"
        ):
            await call(hasty, "1")
        waiting = asyncio.create_task(call(second, "2"))
        assert (await call(first, "3")).content == "3", "what has one keeps it"
        assert not waiting.done()
        await first.close()
        assert (await waiting).content == "2"
    finally:
        await first.close()
        await second.close()


async def test_one_that_cannot_start_gives_its_slot_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sandbox_slots, "PREFIX", f"test-{uuid.uuid4().hex}")
    tool = CodeInterpreter(seconds=20, at_once=1)
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("PATH", str(tmp_path))
        with pytest.raises(ToolFailed, match="cannot start"):
            await call(tool, "1")
    assert (await call(tool, "1")).content == "1"
    await tool.close()


@contextmanager
def holder_of_a_slot(prefix: str) -> Iterator["subprocess.Popen[bytes]"]:
    code = f"""
import asyncio
from stack.agentic_system import sandbox_slots
sandbox_slots.PREFIX = {prefix!r}
slot = asyncio.run(sandbox_slots.take(1, 0))
print(flush=True)
input()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline()
        yield holder
        holder.kill()


async def test_a_process_that_is_killed_gives_its_slots_back(monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = f"test-{uuid.uuid4().hex}"
    monkeypatch.setattr(sandbox_slots, "PREFIX", prefix)
    with holder_of_a_slot(prefix), pytest.raises(NoneFree):
        await sandbox_slots.take(1, 0)
    (await sandbox_slots.take(1, 0)).close()


async def test_an_agent_with_it_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code_interpreter.require.cache_clear()
    path = str(tmp_path)
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("PATH", path)
        with pytest.raises(BadInput, match="code_interpreter cannot be used here: bubblewrap is not installed"):
            await require_openable(AgentsConfig(), [INLINE])
    await require_openable(AgentsConfig(), [INLINE])
    monkeypatch.setenv("PATH", path)
    await require_openable(AgentsConfig(), [INLINE])  # it could run already


async def test_an_agent_has_it_by_its_definition() -> None:
    async with open_tools(AgentsConfig(tool_timeout_s=10), [INLINE], [File("f", b"1")]) as tools:
        output = await tools["code_interpreter"].run(Call("1", {"code": "open('f').read()"}, {}, lambda _: None))
        assert output.content == "'1'"
    assert inhabitants() == []
