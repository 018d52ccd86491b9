"""Compiles grammars on trial, in processes that may be killed: `python -m serve_apps.grammar_compiler MODEL_FOLDER`.

Lines of JSON come by standard input, {"id", "kind", "value"}, and go by standard output, {"id", "problem"}: what is
wrong with the grammar, or null. Each is compiled by a fork of its own, with a clock and a bound on its memory, so that
this process, which has loaded the model's tokens, never runs what users have written. It ends with its parent.
"""

import json
import os
import re
import resource
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

SECONDS = 2.6  # for one grammar
MEMORY_BYTES = 2**30  # on top of what is loaded
THREADS = min(8, os.cpu_count() or 1)  # of each, as vLLM has it
STEPS = 64  # tokens that are chosen on trial
MAX_MASK_MS = 10  # to find out which tokens may follow, on average
MAX_PROBLEM_CHARACTERS = 300

TOO_SLOW = f"takes longer than {SECONDS} s to compile; bounds of repetitions (maxLength, {{1,100}}) cost the most"
TOO_LARGE = f"needs more than {MEMORY_BYTES // 2**20} MB to be compiled"
_EBNF_RULE = re.compile(r"^(?:(?!#|//).)*::=", re.MULTILINE)  # outside of a comment; Lark's rules have a colon
_PLACE = re.compile(r"\[\d\d:\d\d:\d\d\] |\S+\.(cc|h|py):\d+:? ?|^(Error|Warning): ")


def main(folder: Path) -> None:
    tokens = load(folder)
    _watch_parent()
    compiling: dict[int, int] = {}  # ids by process
    signal.signal(signal.SIGCHLD, lambda _signal, _frame: _collect(compiling))
    send(0, None)
    for line in sys.stdin.buffer:
        request = json.loads(line)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
        process = os.fork()
        if process == 0:
            _compile_and_exit(tokens, **request)
        compiling[process] = request["id"]
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])


def load(folder: Path) -> Any:
    """The model's tokens, as xgrammar needs them."""
    import xgrammar
    from transformers import PreTrainedTokenizerFast

    if (folder / "tokenizer.json").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    else:
        from transformers import AutoTokenizer  # takes seconds more

        tokenizer = AutoTokenizer.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    return xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=size)


def problem_of(tokens: Any, kind: str, value: str) -> str | None:
    """What is wrong with a grammar: it is none, or no text fits it. It is compiled as vLLM does, and used on trial."""
    try:
        return _try(tokens, _compiled(tokens, kind, value))
    except MemoryError:
        return TOO_LARGE
    except (RuntimeError, ValueError, TypeError, RecursionError) as error:  # xgrammar's own are of these
        return TOO_LARGE if "bad_alloc" in str(error) else f"cannot be used: {_readable(error)}"


def send(id: int, problem: str | None) -> None:
    """One line, which is short enough to be written at once, whoever else writes."""
    os.write(1, json.dumps({"id": id, "problem": problem and problem[:MAX_PROBLEM_CHARACTERS]}).encode() + b"\n")


def _compiled(tokens: Any, kind: str, value: str) -> Any:
    import xgrammar

    compiler = xgrammar.GrammarCompiler(tokens, max_threads=THREADS, cache_enabled=False)
    match kind:
        case "json":
            return compiler.compile_json_schema(value, any_whitespace=False, separators=(",", ":"))
        case "regex":
            return compiler.compile_regex(value)
        case "choice":
            texts = (json.dumps(text, ensure_ascii=False) for text in json.loads(value))
            return compiler.compile_grammar("root ::= " + " | ".join(texts))
        case "grammar" if _EBNF_RULE.search(value):
            return compiler.compile_grammar(value)
        case "grammar":
            return compiler.compile_lark(value)
        case _:
            raise ValueError(f"{kind} is no kind of grammar")


def _try(tokens: Any, grammar: Any) -> str | None:
    """Chooses some tokens by a grammar: what may follow costs an ambiguous one ever more, and all requests wait for it.

    Tokens that end the text are chosen only where there is no other.
    """
    import numpy
    import xgrammar

    matcher = xgrammar.GrammarMatcher(grammar)
    mask = numpy.zeros((1, (tokens.vocab_size + 31) // 32), dtype=numpy.int32)
    begin = time.thread_time()
    for step in range(STEPS):
        mask.fill(-1)
        matcher.fill_next_token_bitmask(mask)
        allowed = numpy.unpackbits(mask.view(numpy.uint8), bitorder="little")[: tokens.vocab_size]
        ends = allowed[tokens.stop_token_ids].any()
        allowed[tokens.stop_token_ids] = 0
        choices = numpy.flatnonzero(allowed)
        if not len(choices) and not ends:
            return "is fit by no text"
        if (
            not len(choices)
            or not matcher.accept_token(int(choices[(step * 7_919) % len(choices)]))
            or matcher.is_terminated()
        ):
            break  # at the end of a text
    milliseconds = (time.thread_time() - begin) / (step + 1) * 1_000
    if milliseconds > MAX_MASK_MS:
        return f"takes {milliseconds:.0f} ms for each token; allowed: at most {MAX_MASK_MS}"
    return None


def _compile_and_exit(tokens: Any, id: int, kind: str, value: str) -> NoReturn:
    """Runs in a fork."""
    for number in (signal.SIGALRM, signal.SIGCHLD, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    pages = int(Path("/proc/self/statm").read_text().split()[5])
    bound = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (bound, bound))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    send(id, problem_of(tokens, kind, value))
    os._exit(0)


def _collect(compiling: dict[int, int]) -> None:
    """Tells of the forks that were killed; the others have told themselves."""
    while compiling:
        process, status = os.waitpid(-1, os.WNOHANG)
        if process == 0:
            return
        number = compiling.pop(process)
        if os.WIFSIGNALED(status):
            send(number, TOO_SLOW if os.WTERMSIG(status) == signal.SIGALRM else TOO_LARGE)
        elif os.WEXITSTATUS(status):
            send(number, "cannot be compiled")


def _watch_parent() -> None:
    """Ends this process with its parent, also where another process has kept the pipe open."""
    parent = os.getppid()

    def check(_signal: int, _frame: FrameType | None) -> None:
        if os.getppid() != parent:
            os._exit(0)

    signal.signal(signal.SIGALRM, check)
    signal.setitimer(signal.ITIMER_REAL, 5, 5)


def _readable(error: Exception) -> str:
    """An error of xgrammar without places in its source."""
    first = next((line for line in str(error).strip().splitlines() if line.strip()), type(error).__name__)
    return _PLACE.sub("", first).strip()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
