"""Finds code in texts and scans it: a program of its own, so that what it is given can take neither time nor memory.

    python -I code_scan.py < a Unix socket

It has imported all that a scan needs, and forks for each: what one does reaches no other. By the socket comes a message
for each scan, how many seconds it may take, with two files: one to read {"texts": [...], "unfinished": [...]} from, and
one to write to: BEGUN, and {"findings": [...], "unread": [...]} or the traceback of what went wrong. After BEGUN alone
the scan was ended by its bounds. The program ends when the other end of the socket is closed.

Python is scanned by bandit's rules; code of all languages for keys and tokens by those of detect-secrets. Code is what
stands between fences, what is indented, a paragraph, or a whole text that is Python. Comments that tell bandit to look
away (nosec) are not heard.
"""

import ast
import codeop
import gc
import io
import json
import logging
import os
import re
import resource
import signal
import socket
import struct
import sys
import tempfile
import textwrap
import tokenize
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

MAX_MEMORY = 2**30
BEGUN = "\n"
SECONDS = struct.Struct("d")  # each message
PYTHON = frozenset(("python", "py", "python3", "py3", "python2", "ipython", "ipython3", "pycon", "gyp", "sage"))
# detect-secrets' rules for keys of a known form. Those that go by randomness or by a variable's name err too often.
SECRETS = (
    "AWSKeyDetector", "ArtifactoryDetector", "AzureStorageKeyDetector", "CloudantDetector", "DiscordBotTokenDetector",
    "GitHubTokenDetector", "GitLabTokenDetector", "IbmCloudIamDetector", "JwtTokenDetector", "MailchimpDetector",
    "NpmDetector", "OpenAIDetector", "PrivateKeyDetector", "PypiTokenDetector", "SendGridDetector", "SlackDetector",
    "SquareOAuthDetector", "StripeDetector", "TelegramBotTokenDetector", "TwilioKeyDetector",
)  # fmt: skip
# How deep fences within fences are read.
MAX_DEPTH = 3
# How many lines of words before and behind a piece of Python are looked past.
CUTS = 20
_FENCE = re.compile(r"^[ \t>]*(`{3,}|~{3,})[ \t]*([^\s`{]*)")
_PROMPT = re.compile(r"^[ \t]*(>>>|\.\.\.|In \[\d+\]:)[ ]?")
_CLAUSES = frozenset(("else", "elif", "except", "finally"))
_BLANKS = frozenset((tokenize.NL, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER))
_CODE_NODES = (ast.Import, ast.ImportFrom, ast.Call, ast.Assign, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@dataclass(frozen=True)
class Block:
    """Code, the line of the text in which it begins (from 1), and whether its author says that it is Python.

    `is_open` is what goes to the end of the text without an end of its own: in a text that is still being streamed, it
    may go on. `depth` is how many fences are around its own.
    """

    code: str
    line: int
    language: str = ""
    is_open: bool = False
    depth: int = 0

    @property
    def is_said_python(self) -> bool:
        return self.language.lower() in PYTHON

    @property
    def has_fences(self) -> bool:
        return any(_FENCE.match(line) for line in self.code.splitlines())


def main() -> None:
    """Scans in forked processes until the other end of stdin is closed."""
    logging.disable(logging.CRITICAL)
    scan(["```python\nimport os\n```"])  # imports everything, once; none of it starts a thread
    gc.freeze()  # so that what was imported stays shared
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a scan: the kernel removes it
    requests = socket.socket(fileno=sys.stdin.fileno())
    while True:
        message, files, _, _ = socket.recv_fds(requests, SECONDS.size, 2)
        if len(files) < 2:
            return
        if not os.fork():
            _scan_within(*SECONDS.unpack(message), *files)
        for file in files:
            os.close(file)


def _scan_within(seconds: float, given: int, answer: int) -> NoReturn:
    """Scans what is given, in this process and at most so long, and ends it."""
    signal.setitimer(signal.ITIMER_REAL, seconds)  # its signal ends the process
    whole = max(1, round(seconds))
    resource.setrlimit(resource.RLIMIT_CPU, (whole, whole + 1))
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))  # nothing that it starts could outlive it
    for number, file in enumerate((given, answer, answer)):
        os.dup2(file, number)  # stdin, stdout, stderr
    print(BEGUN, end="", flush=True)
    asked = json.load(sys.stdin)
    print(json.dumps(scan(asked["texts"], asked["unfinished"])), flush=True)
    os._exit(0)


def scan(texts: list[str], unfinished: Collection[int] = ()) -> dict[str, list[dict[str, Any]]]:
    """What was found (rule, severity, line, why, text), and which code could not be read (line, why, text).

    `unfinished` are the numbers of the texts that are still being streamed: code may break off at their end.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the code, and of what the libraries' own imports warn
        return _scan(texts, unfinished)


def _scan(texts: list[str], unfinished: Collection[int]) -> dict[str, list[dict[str, Any]]]:
    findings: list[dict[str, Any]] = []
    unread: list[dict[str, Any]] = []
    sources: list[tuple[int, Block]] = []
    lines: list[tuple[int, int, str]] = []
    for number, text in enumerate(texts):
        found_blocks = list(blocks(text))
        lines += [(number, line, code) for line, code in _lines_of_code(text, found_blocks)]
        for block in found_blocks:
            source, problem = python_of(block, may_go_on=block.is_open and number in unfinished)
            if problem:
                unread.append({"text": number, "line": block.line, "why": problem})
            elif source is not None:
                sources.append((number, Block(source, block.line)))
    for (number, block), result in zip(sources, _bandit([block.code for _, block in sources]), strict=True):
        if isinstance(result, str):
            unread.append({"text": number, "line": block.line, "why": result})
        else:
            findings += [{"text": number, **found, "line": block.line + found["line"] - 1} for found in result]
    findings += _secrets(lines)
    # A paragraph may be indented too, and is then found twice.
    once = {(found["text"], found["line"], found["rule"]): found for found in findings}
    return {"findings": list(once.values()), "unread": unread}


def blocks(text: str, depth: int = 0) -> Iterator[Block]:
    """The code of a text: fenced blocks, then of the rest all of it if it is Python, or else its parts that may be.

    `depth` is how many fences are around the text.
    """
    rest: list[str] = []
    fence, language, begun, code = "", "", 0, list[str]()
    for number, line in enumerate(text.splitlines(), start=1):
        mark = _FENCE.match(line)
        if fence:
            if mark and mark[1].startswith(fence) and not mark[2]:
                yield from _fenced(Block("\n".join(code), begun + 1, language, depth=depth))
                fence, code = "", []
            else:
                code.append(line)
            rest.append("")
        elif mark:
            fence, language, begun = mark[1], mark[2], number
            rest.append("")
        else:
            rest.append(line)
    if fence:
        yield from _fenced(Block("\n".join(code), begun + 1, language, is_open=True, depth=depth))
    whole = Block("\n".join(rest), 1)
    if _is_code(_parsed(whole.code)):
        yield whole
    else:
        yield from _parts(rest, lambda line: line.startswith(("    ", "\t")) or not line.strip())
        yield from _parts(rest, lambda line: bool(line.strip()))


def _fenced(block: Block) -> Iterator[Block]:
    """What stands between fences; what stands between fences within it, and the Python among what is none."""
    yield block
    if block.depth < MAX_DEPTH if block.has_fences else _parsed(_without_prompts(block.code)) is None:
        for inner in blocks(block.code, block.depth + 1):
            yield replace(inner, line=block.line + inner.line - 1, is_open=inner.is_open and block.is_open)


def python_of(block: Block, *, may_go_on: bool = False) -> tuple[str | None, str | None]:
    """A block's source if it is Python, or why it cannot be read: it says that it is Python, or hides what it is.

    Of code that may go on it is the beginning that is whole, if there is any yet.
    """
    if block.depth >= MAX_DEPTH and block.has_fences:
        return None, "fences are nested too deeply"
    code = _without_prompts(block.code)
    try:
        tree = _parsed(code, strict=True)
    except SyntaxError as error:
        if may_go_on and _goes_on(code):
            return _beginning(code), None
        return (None, f"it does not parse: {error.msg}") if block.is_said_python else (None, None)
    except (ValueError, RecursionError, MemoryError) as error:
        return None, f"it cannot be parsed: {type(error).__name__}"
    return (textwrap.dedent(code), None) if block.is_said_python or _is_code(tree) else (None, None)


def _parts(lines: list[str], belongs: Any) -> Iterator[Block]:
    """The Python in runs of lines that belong together."""
    begun, run = 0, list[str]()
    for number, line in enumerate([*lines, None], start=1):
        if line is not None and belongs(line):
            begun = begun if run else number
            run.append(line)
        elif run:
            if (block := _python_in(run, begun)) is not None:
                yield block
            run = []


def _python_in(lines: list[str], begun: int) -> Block | None:
    """The Python within lines that may have words before and behind it."""
    for start in range(min(CUTS, len(lines))):
        for end in range(len(lines), max(start, len(lines) - CUTS), -1):
            code = "\n".join(lines[start:end])
            if _is_code(_parsed(_without_prompts(code))):
                return Block(code, begun + start)
    return None


def _parsed(code: str, *, strict: bool = False) -> ast.Module | None:
    try:
        return ast.parse(textwrap.dedent(code))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        if strict:
            raise
        return None


def _is_code(tree: ast.Module | None) -> bool:
    return tree is not None and any(isinstance(node, _CODE_NODES) for node in ast.walk(tree))


def _goes_on(code: str) -> bool:
    """Whether code that does not parse may yet become Python, by what follows and by the end of its last line."""
    lines = textwrap.dedent(code).splitlines()[:-1]
    try:
        compile("\n".join([*lines, ""]), "", "exec", ast.PyCF_ONLY_AST | codeop.Compile().flags)
    except SyntaxError as error:
        return error.msg == "incomplete input"
    except (ValueError, RecursionError, MemoryError):
        return False
    return True


def _beginning(code: str) -> str | None:
    """The beginning of code that breaks off, without its last line and the statement that is not whole.

    Where what is left does not parse, as a `try` without its `except`, the statement around it goes too.
    """
    lines = textwrap.dedent(code).splitlines()[:-1]
    if (tree := _parsed("\n".join(lines))) is not None:
        return "\n".join(lines) if _is_code(tree) else None
    least = sys.maxsize
    for row, column, word in reversed(_statements(lines)):
        if column < least or word == "@":
            least = column + (word in _CLAUSES)
            if (tree := _parsed("\n".join(lines[:row]))) is not None:
                return "\n".join(lines[:row]) if _is_code(tree) else None
    return None


def _statements(lines: list[str]) -> list[tuple[int, int, str]]:
    """Where statements begin, to where the code breaks off: the row and the column, from 0, and the first word."""
    starts: list[tuple[int, int, str]] = []
    is_new = True
    try:
        for token in tokenize.generate_tokens(io.StringIO("\n".join([*lines, ""])).readline):
            if token.type == tokenize.NEWLINE:
                is_new = True
            elif is_new and token.type not in _BLANKS:
                starts.append((token.start[0] - 1, token.start[1], token.string))
                is_new = False
    except tokenize.TokenError as error:
        if is_new:  # within a long string, which begins the statement
            starts.append((error.args[1][0] - 1, error.args[1][1], ""))
    return starts


def _without_prompts(code: str) -> str:
    """Code as it is typed: without the prompts and results of a session, and without what only notebooks understand.

    What is left out leaves its line empty.
    """
    lines = code.splitlines()
    if any(_PROMPT.match(line) for line in lines):
        lines = [_PROMPT.sub("", line) if _PROMPT.match(line) else "" for line in lines]
    return "\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in lines)


def _bandit(sources: list[str]) -> list[list[dict[str, Any]] | str]:
    """Of each source what bandit finds, or why it could not read it."""
    from bandit.core.config import BanditConfig
    from bandit.core.manager import BanditManager

    results: list[list[dict[str, Any]] | str] = [[] for _ in sources]
    if not sources:
        return results
    with tempfile.TemporaryDirectory() as folder:
        files = {str(Path(folder, f"{number}.py")): number for number in range(len(sources))}
        for file, number in files.items():
            Path(file).write_text(sources[number], encoding="utf-8", errors="replace")
        manager = BanditManager(BanditConfig(), "file", quiet=True, ignore_nosec=True)
        manager.discover_files(list(files))
        manager.run_tests()
        for issue in manager.get_issue_list():
            found = results[files[issue.fname]]
            assert isinstance(found, list)
            rule = f"{issue.test_id} {issue.test}"
            found.append(dict(rule=rule, severity=issue.severity.lower(), line=issue.lineno, why=issue.text))
        for file, reason in manager.skipped:
            results[files[file]] = f"bandit cannot read it: {reason}"
    return results


def _lines_of_code(text: str, found: list[Block]) -> Iterator[tuple[int, str]]:
    """The lines of code of any language, with their numbers: those of the text's blocks, and what is indented."""
    numbers = {block.line + row for block in found for row in range(block.code.count("\n") + 1)}
    for number, line in enumerate(text.splitlines(), start=1):
        if number in numbers or line.startswith(("    ", "\t")):
            yield number, line


def _secrets(lines: list[tuple[int, int, str]]) -> list[dict[str, Any]]:
    """The keys in lines, each with the number of its text and its own."""
    if not lines:
        return []
    from detect_secrets.core.scan import scan_line
    from detect_secrets.settings import transient_settings

    # Without filters, one of which would ask the services whether a key is real.
    with transient_settings({"plugins_used": [{"name": name} for name in SECRETS], "filters_used": []}):
        return [
            dict(
                text=text, rule=f"secret {secret.type}", severity="high", line=number, why="a secret stands in the code"
            )
            for text, number, line in lines
            for secret in scan_line(line)
        ]


if __name__ == "__main__":
    main()
