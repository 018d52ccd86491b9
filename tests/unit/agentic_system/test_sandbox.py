import asyncio
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from threading import Thread

import psutil
import pytest

from stack.agentic_system import bubblewrap
from stack.agentic_system.sandbox import HEAD, TAIL, CannotStart, Ended, Limits, Sandbox, check
from tests.sandboxes import SECONDS, all_end, inhabitants, run, said, sandbox

ROOT = Path(__file__).parents[3]


async def test_state_is_kept_from_cell_to_cell() -> None:
    async with sandbox() as running:
        assert (await run(running, "import math\ndef area(r): return math.pi * r * r")).text == ""
        assert (await run(running, "round(area(2), 3)")).text == "12.566\n"


@pytest.mark.parametrize(
    ("code", "shown"),
    [
        ("1 + 1", "2\n"),
        ("print('a')\n'b'", "a\n'b'\n"),
        ("None", ""),
        ("x = 1", ""),
        ("", ""),
        ("# nothing", ""),
        ("import sys; print('err', file=sys.stderr)", "err\n"),
        ("print('no end', end='')", "no end"),
        ("print('ä€😀')", "ä€😀\n"),
        ("import os; os.write(1, b'\\xff\\n'); None", "�\n"),
        ("class A: pass\nimport pickle; pickle.loads(pickle.dumps(A())).__class__ is A", "True\n"),
        ("import sys; sys.argv", "['']\n"),
        ("__name__", "'__main__'\n"),
        ("input()", "EOFError: EOF when reading a line\n"),
    ],
)
async def test_what_a_cell_shows(code: str, shown: str) -> None:
    text = await said(code)
    assert text == shown or (text.startswith("Traceback") and text.endswith(shown))


async def test_a_traceback_is_short_and_the_state_stays() -> None:
    async with sandbox() as running:
        await run(running, "def f(x):\n    return 1 / x")
        failed = await run(running, "y = 5\nf(0)")
        assert failed.is_failure
        lines = [line for line in failed.text.splitlines() if line.strip("~^ ")]
        assert lines == [
            "Traceback (most recent call last):",
            '  File "<cell 2>", line 2, in <module>',
            "    f(0)",
            '  File "<cell 1>", line 2, in f',
            "    return 1 / x",
            "ZeroDivisionError: division by zero",
        ]
        assert "\n    return 1 / x\n           ~~^~~\n" in failed.text
        assert (await run(running, "y")).text == "5\n"


async def test_a_traceback_leaves_out_what_is_between_the_cell_and_the_end() -> None:
    text = await said("import json\njson.loads('{')")
    assert '"<cell 1>", line 2' in text
    assert text.count("  File ") == 3
    assert "cells.py" not in text


@pytest.mark.parametrize("code", ["def", "x = (", "return 1", "a\x00b", "x" * 10 + " y"])
async def test_code_that_is_no_python(code: str) -> None:
    async with sandbox() as running:
        failed = await run(running, code)
        assert failed.is_failure
        assert "SyntaxError" in failed.text or "ValueError" in failed.text
        assert (await run(running, "1")).text == "1\n"


@pytest.mark.parametrize("code", ["exit()", "quit()", "raise SystemExit(3)", "import sys; sys.exit('bye')"])
async def test_leaving_ends_the_cell_alone(code: str) -> None:
    async with sandbox() as running:
        await run(running, "x = 1")
        assert not (await run(running, code)).is_failure
        assert (await run(running, "x")).text == "1\n"


async def test_what_is_raised_is_the_cells_whatever_it_is() -> None:
    async with sandbox() as running:
        assert (await run(running, "raise KeyboardInterrupt")).text.endswith("KeyboardInterrupt\n")
        assert (await run(running, "def f(): f()\nf()")).text.endswith(
            "RecursionError: maximum recursion depth exceeded\n"
        )
        assert (await run(running, "raise ExceptionGroup('two', [ValueError(1), TypeError(2)])")).is_failure
        assert (await run(running, "class E(Exception):\n    def __str__(self): 1/0\nraise E")).is_failure
        assert (await run(running, "1")).text == "1\n"


async def test_what_is_printed_is_told_as_it_comes() -> None:
    async with sandbox() as running:
        told: asyncio.Queue[str] = asyncio.Queue()
        code = "import time\nprint('first')\nwhile not go.is_set(): time.sleep(0.01)"
        await run(running, "import threading; go = threading.Event()")
        cell = asyncio.create_task(running.run(code, SECONDS, told.put_nowait))
        assert await told.get() == "first\n"
        assert not cell.done()
        cell.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cell


async def test_of_much_output_the_beginning_and_the_end_are_kept() -> None:
    told: list[str] = []
    async with sandbox() as running:
        ran = await running.run("print('begin'); print('x' * 1_000_000); print('end')", SECONDS, told.append)
    assert ran.text.startswith("begin\nxxx")
    assert ran.text.endswith("xxx\nend\n")
    assert f"[… {1_000_011 - HEAD - TAIL} bytes are left out …]" in ran.text
    assert len("".join(told)) == HEAD


async def test_a_value_of_any_size_is_shown_in_part() -> None:
    async with sandbox(Limits(printed=200_000)) as running:
        assert (await run(running, "'x' * 10_000_000")).text.endswith("xxx …\n")


async def test_a_cell_that_takes_too_long_is_ended() -> None:
    async with sandbox() as running:
        with all_end(), pytest.raises(Ended, match=r"the cell ran for more than 0\.5 s") as ended:
            await run(running, "print('so far')\nwhile True: pass", seconds=0.5)
        assert ended.value.text == "so far\n"
        assert not running.is_running


async def test_a_cell_that_is_cancelled_is_ended() -> None:
    async with sandbox() as running:
        begun = asyncio.Event()
        cell = asyncio.create_task(running.run("print(1)\nwhile True: pass", SECONDS, lambda _: begun.set()))
        await begun.wait()
        assert len(inhabitants()) == 3
        cell.cancel()
        with all_end(), pytest.raises(asyncio.CancelledError):
            await cell


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import os; os._exit(3)", "it ended itself with the status 3"),
        ("import os; os.kill(os.getpid(), 9)", "it was ended by the signal 9"),
        ("import os; os.abort()", "it was ended by the signal 6"),
        ("import ctypes; ctypes.string_at(0)", "it was ended by the signal 11"),
    ],
)
async def test_a_process_that_ends_by_itself(code: str, why: str) -> None:
    async with sandbox() as running:
        with all_end(), pytest.raises(Ended, match=why):
            await run(running, code)


async def test_a_process_that_ended_between_two_cells() -> None:
    async with sandbox() as running:
        await run(running, "import os, threading; go = os.pipe()")
        inside = inhabitants()
        await run(running, "threading.Thread(target=lambda: (os.read(go[0], 1), os._exit(4))).start()")
        await run(running, "threading.Timer(0.2, os.write, [go[1], b'x']).start()")
        await asyncio.to_thread(psutil.wait_procs, inside[1:], SECONDS)
        with pytest.raises(Ended, match="status 4"):
            await run(running, "1")


async def test_the_event_loop_goes_on_meanwhile() -> None:
    async with sandbox() as running:
        cell = asyncio.create_task(run(running, "import time; time.sleep(0.2); 'slept'"))
        turns = 0
        while not cell.done():
            await asyncio.sleep(0)
            turns += 1
        assert (await cell).text == "'slept'\n"
        assert turns > 100


async def test_cells_in_several_sandboxes_run_at_once_and_know_nothing_of_each_other() -> None:
    async with sandbox() as one, sandbox() as other:
        both = await asyncio.gather(run(one, "x = 1; open('f', 'w').write('1')"), run(other, "'x' in dir()"))
        assert both[1].text == "False\n"
        assert (await run(other, "import os; os.listdir('.')")).text == "[]\n"


def test_it_runs_in_a_thread_that_is_not_the_main_one() -> None:
    found: list[str] = []
    thread = Thread(target=lambda: found.append(asyncio.run(said("6 * 7"))))
    thread.start()
    thread.join()
    assert found == ["42\n"]


async def test_libraries_for_data_and_plots_are_there() -> None:
    async with sandbox() as running:
        code = "import numpy as np, pandas as pd, scipy.stats, sympy\npd.DataFrame({'a': np.arange(3)})['a'].sum()"
        assert (await run(running, code)).text == "np.int64(3)\n"
        plot = "import matplotlib.pyplot as plt\nfor n in range(2):\n    plt.figure(); plt.plot([1, 2])\nplt.show()"
        assert (await run(running, plot)).text == ""
        assert (await run(running, "import os; sorted(os.listdir('.'))")).text == "['figure_1.png', 'figure_2.png']\n"
        assert (await run(running, "plt.get_fignums()")).text == "[]\n"
        await run(running, "plt.hist([1, 2, 2])")
        assert os.stat("figure_3.png", dir_fd=running.folder).st_size > 1_000


async def test_threads_work() -> None:
    code = "from concurrent.futures import ThreadPoolExecutor\nlist(ThreadPoolExecutor(8).map(abs, [-1, -2]))"
    assert await said(code) == "[1, 2]\n"
    assert await said("import asyncio\nasyncio.run(asyncio.to_thread(lambda: 5))") == "5\n"


async def test_the_check_says_why_there_can_be_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    await check()
    program = tmp_path / "bwrap"
    program.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CannotStart, match="No permissions to create new namespace"):
        await check()
    program.write_text("#!/bin/sh\nexit 7\n")
    with pytest.raises(CannotStart, match="status 7"):
        await check()
    program.unlink()
    with pytest.raises(CannotStart, match=r"bubblewrap is not installed.*apt install bubblewrap"):
        await check()


async def test_what_fails_or_is_cancelled_leaves_no_files_open(monkeypatch: pytest.MonkeyPatch) -> None:
    await said("1")
    before = psutil.Process().num_fds()
    await said("1")
    starting = asyncio.create_task(Sandbox.start(Limits()))
    await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    monkeypatch.setenv("PATH", "")
    with pytest.raises(CannotStart):
        await Sandbox.start(Limits())
    assert psutil.Process().num_fds() == before
    assert inhabitants() == []


def test_it_ends_with_the_process_that_started_it() -> None:
    code = (
        "import asyncio, sys\nfrom tests.sandboxes import inhabitants, run, sandbox\n"
        "async def main():\n"
        "    async with sandbox() as running:\n"
        "        tell = lambda _: print(*(one.pid for one in inhabitants()), flush=True)\n"
        "        await running.run('print(1)\\nwhile True: pass', 60, tell)\n"
        "asyncio.run(main())"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT, text=True) as starter:
        assert starter.stdout is not None
        inside = [psutil.Process(int(pid)) for pid in starter.stdout.readline().split()]
        assert len(inside) == 3
        starter.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(inside, SECONDS)
    assert alive == []


def test_it_runs_for_an_ordinary_user() -> None:
    code = (
        "import asyncio, os\nfrom stack.agentic_system.sandbox import check\nasyncio.run(check())\nprint(os.geteuid())"
    )
    command = [sys.executable, "-c", code]
    if bubblewrap.is_root():
        command = as_nobody(command, [sys.base_prefix, sys.prefix, str(ROOT)])
    environment = dict(os.environ, PYTHONPATH=str(ROOT), PYTHONDONTWRITEBYTECODE="1")
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.stderr == ""
    assert int(run.stdout) != 0


def as_nobody(command: list[str], folders: list[str]) -> list[str]:
    """A command as nobody, with mounts of its own, in which nobody can get at these folders."""
    lines = ["set -e", "cd /", "kept=$(mktemp -d)"]
    closed = {}
    for number, folder in enumerate(folders):
        above = [place for place in Path(folder).parents[::-1] if not place.stat().st_mode & 0o001]
        if above:
            closed[shlex.quote(folder)] = shlex.quote(str(above[0])), f'"$kept"/{number}'
    lines += [f"mkdir {kept} && mount --bind {folder} {kept}" for folder, (_, kept) in closed.items()]
    lines += [f"mount -t tmpfs -o mode=755 tmpfs {above}" for above in {above for above, _ in closed.values()}]
    lines += [f"mkdir -p {folder} && mount --bind {kept} {folder}" for folder, (_, kept) in closed.items()]
    user = str(bubblewrap.NOBODY)
    lines.append(f'exec setpriv --reuid {user} --regid {user} --clear-groups "$@"')
    return ["unshare", "--mount", "sh", "-c", "\n".join(lines), "sh", *command]
